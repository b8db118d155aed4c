//! The targets of the fuzzer, one module for each crate whose decoders they feed.
//!
//! A module is a plain file of functions `fn(&[u8])`, so that the crate's own tests can include it
//! by path and run the targets without a fuzzer.

pub mod us_core;
pub mod us_directory;
pub mod us_provider;
pub mod usfs;
