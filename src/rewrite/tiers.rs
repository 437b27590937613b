//! The built-in selections of layers.

use std::{fmt, str::FromStr};

use serde::Serialize;

/// Which layers a rewrite takes; for C and D also in which formats.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Tier {
    /// Feed-forward projections in the chosen format.
    A,
    /// Feed-forward and attention projections in the chosen format.
    B,
    /// Feed-forward projections in fp6_e3m2, attention's in fp8_e4m3.
    C,
    /// Feed-forward projections in fp4_e2m1, attention's in fp6_e3m2.
    D,
    /// The same as B; the default.
    #[default]
    Full,
    /// Every Linear but routers and the head, in the chosen format.
    AllLinears,
    /// The same as A.
    MlpOnly,
}

impl Tier {
    /// All of them.
    pub const ALL: [Self; 7] =
        [Self::A, Self::B, Self::C, Self::D, Self::Full, Self::AllLinears, Self::MlpOnly];

    /// The name used on the command line and in file names.
    pub fn name(self) -> &'static str {
        match self {
            Self::A => "a",
            Self::B => "b",
            Self::C => "c",
            Self::D => "d",
            Self::Full => "full",
            Self::AllLinears => "all-linears",
            Self::MlpOnly => "mlp-only",
        }
    }

    /// The name used in sentences: `tier a`, `all-linears`.
    pub fn title(self) -> String {
        match self {
            Self::AllLinears | Self::MlpOnly => self.name().to_owned(),
            _ => format!("tier {}", self.name()),
        }
    }

    /// Tiers C and D bring their own formats; `--format` contradicts them.
    pub fn has_fixed_formats(self) -> bool {
        matches!(self, Self::C | Self::D)
    }
}

impl fmt::Display for Tier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A tier that does not exist.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown tier '{0}': use a, b, c, d, full, all-linears or mlp-only")]
pub struct UnknownTier(String);

impl FromStr for Tier {
    type Err = UnknownTier;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        let lower = name.to_ascii_lowercase();
        Self::ALL
            .into_iter()
            .find(|t| t.name() == lower)
            .ok_or_else(|| UnknownTier(name.to_owned()))
    }
}
