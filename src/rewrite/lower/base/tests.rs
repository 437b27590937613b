//! Which values change their type, on small graphs.
