//! What runs on, or is made for, an NVIDIA GPU.

mod units;
