//! The stages of a sweep: one precision each.

use super::error::{Error, Result};
use crate::rewrite::Lowering;
use mx_kernels::ElementFormat;
use std::fmt;
use std::str::FromStr;

/// One precision of a sweep.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stage {
    /// The model as it is.
    Baseline,
    /// Every weight and every float result rounded to bfloat16.
    Bf16,
    /// bfloat16 rounding of weight and activation of the chosen layers.
    Bfp16,
    /// Emulated NV-FP8, a saturating cast to E4M3.
    NvFp8EmuE4m3,
    /// Emulated NV-FP8, a saturating cast to E5M2.
    NvFp8EmuE5m2,
    /// One MX element format.
    Mx(ElementFormat),
    /// The fixed formats of tier C.
    MxTierC,
    /// The fixed formats of tier D.
    MxTierD,
    /// Weight-only int8, symmetric per output channel.
    Int8,
    /// NV-FP8 with tensor scales on a GPU.
    NvFp8,
}

/// The five MX element formats, in the order of the stages.
pub const MX_FORMATS: [ElementFormat; 5] = [
    ElementFormat::Fp8E4M3,
    ElementFormat::Fp8E5M2,
    ElementFormat::Fp6E3M2,
    ElementFormat::Fp6E2M3,
    ElementFormat::Fp4E2M1,
];

impl Stage {
    /// The name in records and on the command line.
    pub fn name(self) -> String {
        match self {
            Self::Baseline => "baseline".into(),
            Self::Mx(format) => format!("mx-{}", format.name()),
            Self::MxTierC => "mx-tier-c".into(),
            Self::MxTierD => "mx-tier-d".into(),
            Self::NvFp8 => "nvfp8".into(),
            Self::Bf16 | Self::Bfp16 | Self::NvFp8EmuE4m3 | Self::NvFp8EmuE5m2 | Self::Int8 => {
                self.lowering().map_or_else(String::new, |lowering| lowering.name().into())
            }
        }
    }

    /// The rewrite that makes the stage's graph; `None` where there is none.
    pub fn lowering(self) -> Option<Lowering> {
        Some(match self {
            Self::Baseline => return None,
            Self::Bf16 => Lowering::Bf16,
            Self::Bfp16 => Lowering::Bfp16,
            Self::NvFp8EmuE4m3 => Lowering::NvFp8EmuE4m3,
            Self::NvFp8EmuE5m2 => Lowering::NvFp8EmuE5m2,
            Self::Mx(_) | Self::MxTierC | Self::MxTierD => Lowering::Mx,
            Self::Int8 => Lowering::Int8,
            Self::NvFp8 => Lowering::NvFp8,
        })
    }

    /// Weight and activation format, as recorded. `None` for the model's own type.
    pub fn formats(self) -> Option<(&'static str, &'static str)> {
        Some(match self {
            Self::Baseline => return None,
            Self::Bf16 | Self::Bfp16 => ("bf16", "bf16"),
            Self::NvFp8EmuE4m3 | Self::NvFp8 => ("fp8_e4m3", "fp8_e4m3"),
            Self::NvFp8EmuE5m2 => ("fp8_e5m2", "fp8_e5m2"),
            Self::Mx(format) => (format.name(), format.name()),
            Self::MxTierC => ("fp6_e3m2+fp8_e4m3", "fp6_e3m2+fp8_e4m3"),
            Self::MxTierD => ("fp4_e2m1+fp6_e3m2", "fp4_e2m1+fp6_e3m2"),
            Self::Int8 => ("int8", "none"),
        })
    }

    /// Whether the stage replaces the tier's layers; baseline and bf16 concern the whole graph.
    pub fn follows_tier(self) -> bool {
        !matches!(self, Self::Baseline | Self::Bf16)
    }

    /// All stages of a sweep in order. `tier` C and D bring their own formats: one MX stage.
    pub fn sweep(tier: Tier) -> Vec<Self> {
        let mut stages =
            vec![Self::Baseline, Self::Bf16, Self::Bfp16, Self::NvFp8EmuE4m3, Self::NvFp8EmuE5m2];
        match tier {
            Tier::C => stages.push(Self::MxTierC),
            Tier::D => stages.push(Self::MxTierD),
            _ => stages.extend(MX_FORMATS.map(Self::Mx)),
        }
        stages.extend([Self::Int8, Self::NvFp8]);
        stages
    }
}

pub use crate::rewrite::tiers::Tier;

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name())
    }
}

impl FromStr for Stage {
    type Err = String;

    fn from_str(name: &str) -> std::result::Result<Self, String> {
        let mut all = Self::sweep(Tier::Full);
        all.extend([Self::MxTierC, Self::MxTierD]);
        all.iter().copied().find(|stage| stage.name() == name).ok_or_else(|| {
            let names: Vec<_> = all.iter().map(|stage| stage.name()).collect();
            format!("unknown stage {name:?}; known are {}", names.join(", "))
        })
    }
}

/// Which stages of a sweep to run.
#[derive(Clone, Debug, Default)]
pub struct Selection {
    /// Only these; empty = all.
    pub only: Vec<Stage>,
    /// Only these MX formats; empty = all.
    pub mx_formats: Vec<ElementFormat>,
    /// Leave out bf16.
    pub skip_bf16: bool,
    /// Leave out bfp16.
    pub skip_bfp16: bool,
    /// Leave out both emulations of NV-FP8.
    pub skip_nvfp8_emulation: bool,
    /// Leave out every MX stage.
    pub skip_mx: bool,
    /// Leave out int8.
    pub skip_int8: bool,
    /// Leave out real NV-FP8.
    pub skip_nvfp8: bool,
}

impl Selection {
    /// The stages to run, in order.
    ///
    /// # Errors
    /// A contradiction: an MX format with a tier of fixed formats, a stage that the tier does not
    /// have, or nothing left.
    pub fn stages(&self, tier: Tier) -> Result<Vec<Stage>> {
        let all = Stage::sweep(tier);
        if tier.has_fixed_formats() && !self.mx_formats.is_empty() {
            return Err(Error::Usage(format!(
                "--mx-format contradicts --tier {tier}, whose formats are fixed"
            )));
        }
        if let Some(format) = self.mx_formats.iter().find(|f| !MX_FORMATS.contains(f)) {
            return Err(Error::Usage(format!(
                "--mx-format {}: not one of {}",
                format.name(),
                MX_FORMATS.map(|f| f.name()).join(", ")
            )));
        }
        if let Some(stage) = self.only.iter().find(|stage| !all.contains(stage)) {
            let names: Vec<_> = all.iter().map(|stage| stage.name()).collect();
            return Err(Error::Usage(format!(
                "stage {stage} does not exist with --tier {tier}; its stages are {}",
                names.join(", ")
            )));
        }
        let stages: Vec<_> = all.into_iter().filter(|&stage| self.takes(stage)).collect();
        if stages.is_empty() {
            return Err(Error::Usage("no stage is left to run".into()));
        }
        Ok(stages)
    }

    fn takes(&self, stage: Stage) -> bool {
        let skipped = match stage {
            Stage::Baseline => false,
            Stage::Bf16 => self.skip_bf16,
            Stage::Bfp16 => self.skip_bfp16,
            Stage::NvFp8EmuE4m3 | Stage::NvFp8EmuE5m2 => self.skip_nvfp8_emulation,
            Stage::Mx(format) => {
                self.skip_mx || !(self.mx_formats.is_empty() || self.mx_formats.contains(&format))
            }
            Stage::MxTierC | Stage::MxTierD => self.skip_mx,
            Stage::Int8 => self.skip_int8,
            Stage::NvFp8 => self.skip_nvfp8,
        };
        !skipped && (self.only.is_empty() || self.only.contains(&stage))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(selection: &Selection, tier: Tier) -> Vec<String> {
        selection.stages(tier).unwrap().iter().map(|s| s.name()).collect()
    }

    #[test]
    fn the_sweep_has_the_designs_stages_in_order() {
        let design = "baseline bf16 bfp16 nvfp8-emu-e4m3 nvfp8-emu-e5m2 mx-fp8_e4m3 mx-fp8_e5m2 \
                      mx-fp6_e3m2 mx-fp6_e2m3 mx-fp4_e2m1 int8 nvfp8";
        assert_eq!(names(&Selection::default(), Tier::Full).join(" "), design);
        let c = names(&Selection::default(), Tier::C);
        assert_eq!(c.len(), 8);
        assert!(c.contains(&"mx-tier-c".to_owned()));
        for name in design.split(' ').chain(["mx-tier-c", "mx-tier-d"]) {
            assert_eq!(name.parse::<Stage>().unwrap().name(), name);
        }
        assert!("mx-fp5".parse::<Stage>().unwrap_err().contains("mx-fp8_e4m3"));
    }

    #[test]
    fn stages_are_chosen_by_name_format_and_skip() {
        let only = Selection { only: vec![Stage::Int8, Stage::Baseline], ..Selection::default() };
        assert_eq!(names(&only, Tier::Full), ["baseline", "int8"]);
        let formats = Selection {
            mx_formats: vec![ElementFormat::Fp4E2M1],
            skip_bf16: true,
            skip_bfp16: true,
            skip_nvfp8_emulation: true,
            skip_int8: true,
            skip_nvfp8: true,
            ..Selection::default()
        };
        assert_eq!(names(&formats, Tier::A), ["baseline", "mx-fp4_e2m1"]);
        let no_mx = Selection { skip_mx: true, ..Selection::default() };
        assert!(names(&no_mx, Tier::D).iter().all(|name| !name.starts_with("mx-")));
    }

    #[test]
    fn contradictions_are_usage_errors() {
        let message = |selection: Selection, tier| match selection.stages(tier) {
            Err(Error::Usage(message)) => message,
            other => panic!("{other:?}"),
        };
        let formats = Selection { mx_formats: vec![MX_FORMATS[0]], ..Selection::default() };
        assert!(message(formats, Tier::C).contains("--tier c"));
        let bf16 = Selection { mx_formats: vec![ElementFormat::Bf16], ..Selection::default() };
        assert!(message(bf16, Tier::Full).contains("--mx-format bf16"));
        let missing = Selection { only: vec![Stage::MxTierC], ..Selection::default() };
        assert!(message(missing, Tier::Full).contains("mx-tier-c"));
        let nothing =
            Selection { only: vec![Stage::Int8], skip_int8: true, ..Selection::default() };
        assert!(message(nothing, Tier::Full).contains("no stage"));
    }
}
