//! Tests of the crate as a whole: golden vectors, and every CPU variant against the reference.

mod golden;
