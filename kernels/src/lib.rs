//! MX kernels.
