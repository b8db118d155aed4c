//! The central directory of Us: membership, namespace, placement, sessions and leases.
//!
//! One thread owns the [`engine`], which is a state machine over a [`store`]; the service adapts
//! gRPC streams to its events. ARCHITECTURE.md says who owns what.

pub mod audit;
pub mod backup;
pub mod engine;
pub mod enroll;
pub mod fsck;
pub mod holdings;
pub mod image;
pub mod inspect;
pub mod keys;
pub mod namespace;
pub mod records;
pub mod recovery;
pub mod restore;
pub mod run;
pub mod service;
pub mod shell;
pub mod store;
