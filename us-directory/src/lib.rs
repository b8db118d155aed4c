//! us
