//! The provider of Us: keeps other people's fragments on an idle disk.

pub mod store;
