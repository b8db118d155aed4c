//! What the pipeline needs from outside: a directory and a way to providers. Both are traits, so
//! that tests and simulation can stand in for them.

use bytes::Bytes;
use futures::future::BoxFuture;
use tokio::time::Instant;

use super::{BlockInfo, FragmentFailure, PlacementError};
use crate::fragment::FragmentRecord;
use crate::ids::{Birth, BlockId, FragmentId, ProviderId};

/// A place for one block, leased ahead.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PlacementLease {
    /// Goes into every fragment's record and into the commit.
    pub birth: Birth,
    /// One provider a fragment, in the order of the fragments. One may appear more than once.
    pub providers: Vec<ProviderId>,
    /// The site of each; empty where the directory does not say.
    pub sites: Vec<SiteNumber>,
}

/// A labelled site, by a number that means something only beside others of the same directory;
/// 0: no label, so that nobody is known to be close.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Debug)]
pub struct SiteNumber(pub u32);

impl SiteNumber {
    /// Of providers without a label.
    pub const UNLABELLED: Self = Self(0);
}

/// A fragment a reader could not use.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Damage {
    /// The fragment.
    pub fragment: FragmentId,
    /// Who should have it.
    pub provider: ProviderId,
    /// What was wrong.
    pub failure: FragmentFailure,
}

/// Slots of one fragment: what one get asks for.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct SlotRange {
    /// The fragment.
    pub fragment: FragmentId,
    /// The first slot.
    pub first_slot: u32,
    /// How many; at least one, or none from the fragment's end on.
    pub slots: u32,
    /// Bytes of one slot, so that the answer's length is known.
    pub slot_bytes: u32,
}

impl SlotRange {
    /// Bytes of the answer.
    pub const fn bytes(&self) -> usize {
        self.slots as usize * self.slot_bytes as usize
    }
}

/// The directory, as far as blocks are concerned.
pub trait BlockDirectory: Send + Sync + 'static {
    /// A place for one more block. Waits for the directory where none is leased ahead.
    fn lease_placement(&self) -> BoxFuture<'_, Result<PlacementLease, PlacementError>>;

    /// Where the block is now; `None` where the directory does not know it or does not answer.
    fn locate(&self, block: BlockId) -> BoxFuture<'_, Option<BlockInfo>>;

    /// A fragment was missing or wrong. Must not block.
    fn report(&self, damage: Damage);
}

/// The way to providers.
pub trait FragmentTransport: Send + Sync + 'static {
    /// Stores one fragment; returns once it is durable. Gives up at `deadline`.
    fn put(
        &self,
        provider: ProviderId,
        record: FragmentRecord,
        deadline: Instant,
    ) -> BoxFuture<'static, Result<(), FragmentFailure>>;

    /// Reads slots of one fragment; gives up at `deadline`. The implementation may send requests
    /// that wait for one provider together. Answers of a wrong length count as
    /// [`FragmentFailure::Length`], whoever finds it.
    fn get(
        &self,
        provider: ProviderId,
        slots: SlotRange,
        deadline: Instant,
    ) -> BoxFuture<'static, Result<Bytes, FragmentFailure>>;

    /// Whether a request to the provider is likely to be answered: false for those known to be
    /// unreachable. Only a hint, for the order in which providers are asked.
    fn is_reachable(&self, provider: ProviderId) -> bool;
}
