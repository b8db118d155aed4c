//! What of one file is sealed into blocks that are not committed yet.

use std::collections::BTreeMap;
use std::ops::Range;

use bytes::Bytes;

use super::intervals::{Divide, IntervalMap};

/// Names one block on its way, in the order of sealing. Chosen by the owner, who never uses one
/// twice.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Ticket(pub u64);

/// A piece of a file that was packed into a block.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SealedPiece {
    /// Where in the file.
    pub offset: u64,
    /// The bytes.
    pub bytes: Bytes,
    /// Where in the block's plaintext.
    pub block_offset: u64,
}

#[derive(Clone, Debug)]
struct Sealed {
    bytes: Bytes,
    block_offset: u64,
}

impl Divide for Sealed {
    fn advance(&mut self, bytes: u64) {
        drop(self.bytes.split_to(bytes as usize));
        self.block_offset += bytes;
    }

    fn shorten(&mut self, bytes: u64) {
        self.bytes.truncate(bytes as usize);
    }
}

/// Sealed and uncommitted pieces of one file, by ticket. A newer ticket hides an older one where
/// both have bytes, and does not trim it.
#[derive(Debug, Default)]
pub struct InFlight {
    tickets: BTreeMap<Ticket, IntervalMap<Sealed>>,
}

impl InFlight {
    /// Bytes in flight.
    pub fn bytes(&self) -> u64 {
        self.tickets.values().map(IntervalMap::bytes).sum()
    }

    /// Whether nothing is in flight.
    pub fn is_empty(&self) -> bool {
        self.tickets.is_empty()
    }

    /// The tickets that still hold bytes or are not finished, oldest first.
    pub fn tickets(&self) -> impl Iterator<Item = Ticket> + '_ {
        self.tickets.keys().copied()
    }

    /// Adds pieces to a ticket.
    pub fn insert(&mut self, ticket: Ticket, pieces: &[SealedPiece]) {
        let sealed = self.tickets.entry(ticket).or_default();
        for piece in pieces {
            let range = piece.offset..piece.offset + piece.bytes.len() as u64;
            let (bytes, block_offset) = (piece.bytes.clone(), piece.block_offset);
            sealed.set(range, Sealed { bytes, block_offset });
        }
    }

    /// Drops `range` from every ticket: its bytes are gone from the file.
    pub fn punch(&mut self, range: Range<u64>) {
        self.tickets.values_mut().for_each(|sealed| sealed.cut(range.clone()));
    }

    /// Drops everything from `size` on.
    pub fn truncate(&mut self, size: u64) {
        self.punch(size..u64::MAX);
    }

    /// The newest bytes in `range`, in order; pieces of tickets up to `above` are not looked at.
    pub fn overlay(&self, range: Range<u64>, above: Option<Ticket>) -> Vec<(u64, Bytes)> {
        let mut pieces = Vec::new();
        let mut gaps = vec![range];
        for (ticket, sealed) in self.tickets.iter().rev() {
            if above.is_some_and(|above| *ticket <= above) || gaps.is_empty() {
                break;
            }
            let mut left = Vec::new();
            for gap in gaps {
                pieces
                    .extend(sealed.overlay(gap.clone()).map(|(at, piece)| (at.start, piece.bytes)));
                left.extend(sealed.gaps(gap));
            }
            gaps = left;
        }
        pieces.sort_unstable_by_key(|(offset, _)| *offset);
        pieces
    }

    /// What a ticket would commit now, in order.
    pub fn ranges(&self, ticket: Ticket) -> impl Iterator<Item = Range<u64>> + '_ {
        self.tickets.get(&ticket).into_iter().flat_map(IntervalMap::iter).map(|(range, _)| range)
    }

    /// The first byte in flight at or after `offset`.
    pub fn next_at(&self, offset: u64) -> Option<u64> {
        self.tickets.values().filter_map(|sealed| sealed.next_at(offset, |_| true)).min()
    }

    /// Where a piece that covers `offset` ends.
    pub fn end_at(&self, offset: u64) -> Option<u64> {
        self.tickets.values().filter_map(|sealed| sealed.at(offset)).map(|(end, _)| end).max()
    }

    /// Ends a ticket and returns what of it is still part of the file, in order.
    pub fn finish(&mut self, ticket: Ticket) -> Vec<SealedPiece> {
        let sealed = self.tickets.remove(&ticket).unwrap_or_default();
        let pieces = sealed.iter().map(|(range, piece)| SealedPiece {
            offset: range.start,
            bytes: piece.bytes.clone(),
            block_offset: piece.block_offset,
        });
        pieces.collect()
    }
}
