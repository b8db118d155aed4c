//! The data of files, as pure structures: what is written and not yet stored, what is on its way,
//! and what the directory's map says.
//!
//! ```text
//! write -> DirtyBuffer --seal--> InFlight (ticket) --commit--> FileMap
//!                ^------abort--------'
//! read  <- dirty, else in flight (newest ticket first), else map, else zeros
//! ```
//!
//! [`FileData`] is the three layers of one file; [`Packer`] chooses which files' dirty bytes make the
//! next block. Nothing here does I/O, waits, reads a clock or holds a lock: `core` owns the values
//! and drives them.
//!
//! Invariants:
//! - a byte leaves a layer in the step in which the next layer has it;
//! - truncate and punch reach all three layers, so that a later commit resurrects nothing;
//! - newer writes do not trim what is in flight: the older bytes still become durable, so that an
//!   fsync that waits for them alone has kept its word.

mod dirty;
mod file;
mod in_flight;
mod intervals;
mod map;
mod packer;
#[cfg(test)]
mod tests;

pub use dirty::DirtyBuffer;
pub use file::{ClonePlan, FileData, ReadPiece, ReadPlan, Seek};
pub use in_flight::{InFlight, SealedPiece, Ticket};
pub use map::{Extent, FileMap, MapPiece, MapSource, Place};
pub use packer::{DirtyFacts, PackItem, Packer, PackerLimits};
