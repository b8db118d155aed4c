//! The heart of Us: the vocabulary shared by all programs, the erasure code, the seal, placement,
//! the block pipeline and the plumbing every daemon shares.
//!
//! Dependencies point one way: the programs use this crate, this crate uses only `us-proto`.

pub mod code;
pub mod daemon;
pub mod disk;
pub mod durability;
pub mod fragment;
pub mod geometry;
pub mod grant;
pub mod ids;
pub mod keyring;
pub mod limits;
pub mod name;
pub mod placement;
pub mod range_locks;
pub mod seal;
pub mod tls;
pub mod wire;
