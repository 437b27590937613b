//! Scores of predicted tokens on a device.

use super::units::Unit;

/// The kernels of this module.
pub(super) const UNIT: Unit = Unit::plain("scores");
