//! The kernel sources inside this library, and what is compiled from them.

use std::fmt;

use sha2::{Digest, Sha256};

/// One module of kernels: a source file and the macros that specialise it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Unit {
    /// The source's name, `scores` for `kernels/cuda/scores.cu`.
    pub name: &'static str,
    /// Macros defined before its first line.
    pub defines: &'static [(&'static str, i64)],
}

impl Unit {
    /// A unit without macros.
    pub const fn plain(name: &'static str) -> Self {
        Self { name, defines: &[] }
    }

    /// Its name in file names: the source, then what is defined.
    pub fn stem(&self) -> String {
        let mut stem = self.name.to_string();
        for (name, value) in self.defines {
            stem.push_str(&format!("-{name}={value}"));
        }
        stem
    }

    /// The text of its source, when there is such a source.
    pub fn source(&self) -> Option<&'static str> {
        SOURCES.iter().find(|(name, _)| *name == self.name).map(|(_, text)| *text)
    }

    /// What its machine code follows from, but for the compiler: source, headers, macros and
    /// architecture. As hex.
    pub fn key(&self, arch: Arch) -> String {
        let mut hash = Sha256::new();
        let mut field = |bytes: &[u8]| {
            hash.update((bytes.len() as u64).to_le_bytes());
            hash.update(bytes);
        };
        field(self.name.as_bytes());
        field(self.source().unwrap_or_default().as_bytes());
        for (name, text) in HEADERS {
            field(name.as_bytes());
            field(text.as_bytes());
        }
        for option in self.options(arch) {
            field(option.as_bytes());
        }
        hex(&hash.finalize())
    }

    /// NVRTC's options. nvcc understands them too.
    pub fn options(&self, arch: Arch) -> Vec<String> {
        let mut options = vec![format!("--gpu-architecture={arch}"), "-std=c++17".into()];
        options.extend(self.defines.iter().map(|(name, value)| format!("-D{name}={value}")));
        options
    }
}

/// A GPU architecture that machine code is made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Arch {
    /// Major compute capability.
    pub major: u32,
    /// Minor compute capability.
    pub minor: u32,
    /// Whether instructions that only this very architecture has are allowed (`sm_90a`).
    pub specific: bool,
}

impl Arch {
    /// The architectures that every change is compiled for. Older ones lack bfloat16.
    pub const TESTED: [Self; 6] = [
        Self::of_device(8, 0),
        Self::of_device(8, 6),
        Self::of_device(8, 9),
        Self::of_device(9, 0),
        Self::of_device(10, 0),
        Self::of_device(12, 0),
    ];

    /// What kernels for a device of this compute capability are compiled for.
    pub const fn of_device(major: u32, minor: u32) -> Self {
        Self { major, minor, specific: major >= 9 }
    }

    /// Architectures whose machine code runs on a device of this one, best first.
    pub fn compatible(self) -> Vec<Self> {
        let mut all = vec![self];
        all.extend(
            (0..=self.minor)
                .rev()
                .map(|minor| Self { major: self.major, minor, specific: false })
                .filter(|&arch| arch != self),
        );
        all
    }

    /// Reads `sm_90a`.
    pub fn parse(text: &str) -> Option<Self> {
        let digits = text.strip_prefix("sm_")?;
        let (digits, specific) = match digits.strip_suffix('a') {
            Some(digits) => (digits, true),
            None => (digits, false),
        };
        let number: u32 = digits.parse().ok()?;
        (number >= 10).then_some(Self { major: number / 10, minor: number % 10, specific })
    }
}

impl fmt::Display for Arch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sm_{}{}{}", self.major, self.minor, if self.specific { "a" } else { "" })
    }
}

macro_rules! embedded {
    ($($file:literal => $name:literal),* $(,)?) => {
        &[$(($name, include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/cuda/", $file)))),*]
    };
}

/// Sources by unit name.
const SOURCES: &[(&str, &str)] = embedded![
    "fold.cu" => "fold",
    "fp8.cu" => "fp8",
    "linear.cu" => "linear",
    "finish.cu" => "finish",
    "scores.cu" => "scores",
    "wide.cu" => "wide",
];

/// Headers as sources include them.
pub(super) const HEADERS: &[(&str, &str)] = embedded![
    "common.cuh" => "common.cuh",
    "formats.cuh" => "formats.cuh",
    "exact.cuh" => "exact.cuh",
    "weights.cuh" => "weights.cuh",
    "types.cuh" => "types.cuh",
    "hopper.cuh" => "hopper.cuh",
];

/// Every unit that some plan loads on this architecture: what continuous integration and
/// ahead-of-time builds compile.
pub fn all(arch: Arch) -> Vec<Unit> {
    let mut all =
        vec![super::linear::FOLD, super::linear::FINISH, super::fp8::UNIT, super::scores::UNIT];
    all.extend(super::tiles::units());
    if arch == Arch::of_device(9, 0) {
        all.extend(super::wide::units());
    }
    all
}

/// Lower-case hexadecimal.
pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn architectures_print_parse_and_fall_back() {
        for arch in Arch::TESTED {
            assert_eq!(Arch::parse(&arch.to_string()), Some(arch));
        }
        assert_eq!(Arch::of_device(9, 0).to_string(), "sm_90a");
        assert_eq!(Arch::of_device(12, 1).to_string(), "sm_121a");
        for bad in ["", "sm_", "sm_a", "sm_9", "90", "sm_9x"] {
            assert_eq!(Arch::parse(bad), None, "{bad}");
        }
        let names = |a: Arch| a.compatible().iter().map(Arch::to_string).collect::<Vec<_>>();
        assert_eq!(names(Arch::of_device(8, 6))[..2], ["sm_86", "sm_85"]);
        assert_eq!(names(Arch::of_device(9, 0)), ["sm_90a", "sm_90"]);
    }

    #[test]
    fn every_unit_has_a_source_and_its_own_key() {
        let mut keys = std::collections::HashSet::new();
        let mut stems = std::collections::HashSet::new();
        for arch in Arch::TESTED {
            for unit in all(arch) {
                assert!(unit.source().is_some(), "{unit:?}");
                assert!(stems.insert((arch, unit.stem())), "{unit:?} twice");
                assert!(keys.insert(unit.key(arch)), "{unit:?} {arch}");
            }
        }
    }

    #[test]
    fn the_key_follows_the_macros() {
        let arch = Arch::TESTED[0];
        let a = Unit { name: "scores", defines: &[("A", 1)] };
        let b = Unit { name: "scores", defines: &[("A", 2)] };
        assert_ne!(a.key(arch), b.key(arch));
        assert_ne!(a.key(arch), Unit::plain("scores").key(arch));
        assert_eq!(a.stem(), "scores-A=1");
    }
}
