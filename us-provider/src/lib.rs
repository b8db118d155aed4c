//! The provider of Us: keeps other people's fragments on an idle disk.
//!
//! [`store`] owns the bytes, [`service`] serves them, [`membership`] keeps the one stream with the
//! directory, [`grants`] judges who may move fragments, [`rebuild`] makes lost fragments again, [`guest`] decides when background work may run, [`control`] is the owner's way in,
//! [`daemon`] puts them together.

pub mod config;
pub mod control;
pub mod copies;
pub mod daemon;
pub mod grants;
pub mod guest;
pub mod leave;
pub mod membership;
pub mod rebuild;
pub mod service;
pub mod store;
