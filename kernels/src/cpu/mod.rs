//! Which instructions the kernels use on this machine.

/// Variants that this machine can run, the best first.
pub fn available_variants() -> &'static [&'static str] {
    &["scalar"]
}

/// The variant in use: the best available, or a lower one that `MX_CPU_VARIANT` names.
pub fn variant() -> &'static str {
    "scalar"
}
