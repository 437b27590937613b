//! MX operators.
