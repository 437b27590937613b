//! Which kernels a caller insists on.

/// Kernels that a caller may insist on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Choice {
    /// The fastest.
    #[default]
    Fastest,
    /// `linear.cu`.
    Fused,
    /// W decoded to memory, then cuBLASLt, where there are rows enough.
    Dense,
    /// `wide.cu`.
    Wide {
        /// Rows of X of a block: 64, 128 or 256.
        tile: usize,
        /// Shares of k; no more than steps of 128 are taken.
        splits: usize,
    },
}

impl Choice {
    /// What `MX_CUDA_PATH` asks for: `fused`, `dense` or `wide:TILE:SPLITS`.
    pub(super) fn from_env() -> Self {
        static CHOICE: std::sync::OnceLock<Choice> = std::sync::OnceLock::new();
        *CHOICE.get_or_init(|| {
            let text = std::env::var("MX_CUDA_PATH").unwrap_or_default();
            let mut words = text.split(':');
            let mut number = || words.next().and_then(|word| word.parse().ok());
            match text.as_str() {
                "fused" => Self::Fused,
                "dense" => Self::Dense,
                _ if text.starts_with("wide:") => {
                    number();
                    match (number(), number()) {
                        (Some(tile), Some(splits)) => Self::Wide { tile, splits },
                        _ => Self::Fastest,
                    }
                }
                _ => Self::Fastest,
            }
        })
    }
}
