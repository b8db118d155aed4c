//! How much redundancy blocks have, counted exactly and kept up to date with every commit.
//!
//! Blocks of equal *signature* (code, and for every fragment its provider and state) are counted
//! together, so that `status` looks at signatures, not at blocks. After a start the stored blocks
//! are counted from a snapshot in the background while commits add and subtract at once; the sum is
//! exact when the count is complete. Pure: no clock, no I/O, except [`count_slice`], which the
//! shell runs on a thread of its own.

use std::collections::{BTreeMap, HashMap};

use us_core::ids::{BlockId, ProviderId, VolumeId};
use us_proto::v1::BlockSummary;

mod signatures;

use super::audit::Sampling;
use super::cleaning::Sparse;
use crate::keys;
use crate::records::{BlockRecord, bit, decode};
use crate::store::{KeyRange, StoreError, View};
use signatures::Signatures;

/// Blocks in one slice of the background count.
pub const COUNT_SLICE_BLOCKS: usize = 4096;

/// What is known of a fragment.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum FragmentState {
    /// Its provider has confirmed it.
    Durable,
    /// On its way.
    Pending,
    /// Not confirmed for too long.
    Late,
    /// Wrong bytes, or its provider does not have it.
    Gone,
}

/// What blocks that are counted together have in common.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Signature {
    s: u32,
    r: u32,
    /// Sorted.
    fragments: Box<[(u32, FragmentState)]>,
}

impl Signature {
    /// The signature of a coded block; `late` when it has been unsettled for too long.
    pub fn of(block: &BlockRecord, late: bool) -> Self {
        let mut fragments: Box<[(u32, FragmentState)]> = block
            .providers
            .iter()
            .enumerate()
            .map(|(index, provider)| (*provider, fragment_state(block, index, late)))
            .collect();
        fragments.sort_unstable();
        Self { s: block.s, r: block.r, fragments }
    }

    /// The provider of each fragment, in no particular order.
    pub fn providers(&self) -> Vec<ProviderId> {
        self.fragments.iter().map(|(provider, _)| ProviderId(*provider)).collect()
    }
}

impl Signature {
    fn is_crowded(&self) -> bool {
        self.fragments.windows(2).any(|pair| pair[0].0 == pair[1].0)
    }
}

/// The state of one fragment of a block.
pub fn fragment_state(block: &BlockRecord, index: usize, late: bool) -> FragmentState {
    if bit(&block.damaged, index) || bit(&block.missing, index) {
        FragmentState::Gone
    } else if bit(&block.durable, index) {
        FragmentState::Durable
    } else if late {
        FragmentState::Late
    } else {
        FragmentState::Pending
    }
}

/// What the count knows of a provider.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Reach {
    /// Its fragments can be read now.
    pub reachable: bool,
    /// Its fragments still exist, as far as anyone knows, and it is not distrusted.
    pub expected: bool,
}

/// A part of the stored blocks, counted from a snapshot.
#[derive(Debug, Default)]
pub struct CountedSlice {
    /// Coded blocks by signature.
    pub signatures: HashMap<Signature, i64>,
    /// Inline blocks.
    pub inline: i64,
    /// Blocks that are not settled.
    pub unsettled: Vec<(VolumeId, BlockId)>,
    /// Blocks of which little lives.
    pub sparse: Vec<((VolumeId, BlockId), Sparse)>,
    /// Coded blocks that are in the sample of audits.
    pub sample: Vec<(VolumeId, BlockId)>,
    /// Fragments that wait for deletion.
    pub deletes: u64,
    /// This was the last slice.
    pub last: bool,
}

/// The counters.
#[derive(Debug, Default)]
pub struct Counts {
    signatures: Signatures,
    inline: i64,
    crowded: i64,
    /// Fragments expected at each provider.
    fragments: HashMap<u32, i64>,
    /// The stored blocks are all counted.
    pub complete: bool,
}

/// The sums a screen shows.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Totals {
    /// For the screen.
    pub summary: BlockSummary,
    /// Blocks that lack something although nothing of them is merely on its way, and crowded ones:
    /// they bear the loss of fewer providers than r.
    pub degraded: u64,
    /// Fragments expected at each provider.
    pub fragments: HashMap<u32, u64>,
    /// Of them known to be damaged or missing.
    pub damaged: HashMap<u32, u64>,
}

impl Counts {
    /// A block appeared, or its record or lateness is this now.
    pub fn add(&mut self, block: &BlockRecord, late: bool) {
        self.change(block, late, 1);
    }

    /// A block went, or its record or lateness was this until now.
    pub fn remove(&mut self, block: &BlockRecord, late: bool) {
        self.change(block, late, -1);
    }

    fn change(&mut self, block: &BlockRecord, late: bool, by: i64) {
        if block.is_inline() {
            self.inline += by;
        } else {
            self.change_signature(&Signature::of(block, late), by);
        }
    }

    fn change_signature(&mut self, signature: &Signature, by: i64) {
        self.crowded += if signature.is_crowded() { by } else { 0 };
        for (provider, _) in &signature.fragments {
            *self.fragments.entry(*provider).or_default() += by;
        }
        self.signatures.change(signature, by);
    }

    /// Adds what the background count found.
    pub fn merge(&mut self, slice: &mut CountedSlice) {
        self.inline += slice.inline;
        for (signature, count) in slice.signatures.drain() {
            self.change_signature(&signature, count);
        }
        self.complete |= slice.last;
    }

    /// Whether fragments of some block share a provider.
    pub fn has_crowds(&self) -> bool {
        self.crowded > 0
    }

    /// Fragments expected at a provider.
    pub fn fragments_at(&self, provider: u32) -> u64 {
        self.fragments.get(&provider).map_or(0, |count| (*count).max(0) as u64)
    }

    /// How many distinct signatures there are.
    pub fn signatures(&self) -> usize {
        self.signatures.len()
    }

    /// Sums up, as providers are now.
    pub fn totals(&self, reach: impl Fn(u32) -> Reach) -> Totals {
        let mut totals = Totals::default();
        let inline = self.inline.max(0) as u64;
        totals.summary.total = inline;
        totals.summary.inline = inline;
        totals.summary.readable = inline;
        let fragments = self.fragments.iter().filter(|(_, count)| **count > 0);
        totals.fragments = fragments.map(|(provider, count)| (*provider, *count as u64)).collect();
        self.signatures.add_to(&mut totals, reach);
        totals
    }
}

/// Where the background count stands.
#[derive(Clone, Debug)]
pub struct CountCursor {
    ranges: BTreeMap<usize, (Option<VolumeId>, KeyRange)>,
    sampling: Sampling,
}

impl CountCursor {
    /// At the start of everything that is to be counted, and sampled.
    pub fn new(volumes: &[VolumeId], sampling: Sampling) -> Self {
        let blocks = volumes
            .iter()
            .map(|volume| (Some(*volume), KeyRange::prefix(&keys::tag(volume, b'b'))));
        let deletes =
            [b'g', b'q'].map(|tag| (None, KeyRange::prefix(&keys::tag(&keys::CLUSTER, tag))));
        Self { ranges: blocks.chain(deletes).enumerate().collect(), sampling }
    }
}

/// Counts the next slice of a snapshot. Slow where the snapshot lies on disk: not for the engine's
/// thread.
///
/// # Errors
/// [`StoreError`] when the disk fails or a record cannot be decoded.
pub fn count_slice(view: &dyn View, cursor: &mut CountCursor) -> Result<CountedSlice, StoreError> {
    let mut slice = CountedSlice::default();
    let sampling = cursor.sampling;
    let Some(mut entry) = cursor.ranges.first_entry() else {
        slice.last = true;
        return Ok(slice);
    };
    let (volume, range) = entry.get_mut();
    let pairs = view.scan(range, COUNT_SLICE_BLOCKS)?;
    for (key, value) in &pairs {
        let (Some(volume), Some(block)) = (*volume, keys::last_block(key)) else {
            slice.deletes += 1;
            continue;
        };
        let record: BlockRecord = decode(key, value)?;
        if record.is_inline() {
            slice.inline += 1;
            continue;
        }
        if !record.is_settled() {
            slice.unsettled.push((volume, block));
        }
        if sampling.takes(&block) {
            slice.sample.push((volume, block));
        }
        slice.sparse.extend(Sparse::of(&record).map(|sparse| ((volume, block), sparse)));
        *slice.signatures.entry(Signature::of(&record, false)).or_default() += 1;
    }
    match pairs.last() {
        Some((key, _)) if pairs.len() == COUNT_SLICE_BLOCKS => *range = range.after(key),
        _ => {
            entry.remove();
        }
    }
    slice.last = cursor.ranges.is_empty();
    Ok(slice)
}

#[cfg(test)]
mod tests;
