//! The slots of one block that a read holds, and what can be made of them: pure.
//!
//! A row is the slots of one number in all fragments. The code works byte by byte, so any s slots
//! of a row give all others, and a lost page costs s slots, not s fragments.

use std::collections::{BTreeMap, BTreeSet};

use bytes::{Bytes, BytesMut};

use super::FragmentFailure;
use crate::code::ErasureCode;
use crate::geometry::{BlockGeometry, TAG_BYTES};
use crate::seal::BlockOpener;

/// Choices of s fragments tried for one page before it is given up.
const CHOICES_MAX: usize = 512;

/// What a page was rebuilt to, and which fragments were found wrong on the way.
pub(super) struct Rebuilt {
    pub page: Option<RebuiltPage>,
    /// (fragment, why).
    pub liars: Vec<(usize, FragmentFailure)>,
}

/// A rebuilt page that passed its seal.
pub(super) struct RebuiltPage {
    pub plaintext: Bytes,
    pub sealed: Bytes,
}

/// The slots of one row, by fragment.
#[derive(Clone, Default)]
pub(super) struct Row {
    pub slots: BTreeMap<usize, Bytes>,
}

/// All that opening and rebuilding needs of a block.
pub(super) struct Opening {
    pub geometry: BlockGeometry,
    pub code: ErasureCode,
    pub opener: BlockOpener,
}

impl Opening {
    /// The page in slot `slot` of data fragment `fragment`; `None` for padding and for parity.
    pub fn page_at(&self, fragment: usize, slot: usize) -> Option<usize> {
        let page = fragment * self.geometry.fragment_slots() + slot;
        (fragment < self.geometry.code().s() && page < self.geometry.pages()).then_some(page)
    }

    /// Whether the slot is implied: padding of a data fragment.
    pub fn is_padding(&self, fragment: usize, slot: usize) -> bool {
        fragment < self.geometry.code().s() && self.page_at(fragment, slot).is_none()
    }

    /// Bytes of a page as it is sealed, without the padding of its slot.
    pub fn sealed_bytes(&self, page: usize) -> usize {
        self.geometry.page_plaintext_bytes(page) + TAG_BYTES
    }

    /// Opens a page from its slot.
    pub fn open(&self, page: usize, slot: &[u8]) -> Option<Bytes> {
        let mut plaintext = BytesMut::zeroed(self.geometry.page_plaintext_bytes(page));
        let opened = self.opener.open_page_into(&self.geometry, page, slot, &mut plaintext);
        opened.ok().map(|()| plaintext.freeze())
    }

    /// The slot with its padding as the writer made it: zeros, whatever came.
    pub fn normal(&self, fragment: usize, slot: usize, bytes: Bytes) -> Bytes {
        let Some(page) = self.page_at(fragment, slot) else { return bytes };
        let used = self.sealed_bytes(page);
        if bytes[used..].iter().all(|byte| *byte == 0) {
            return bytes;
        }
        let mut normal = BytesMut::from(&bytes[..used]);
        normal.resize(bytes.len(), 0);
        normal.freeze()
    }

    /// Rebuilds the page of data fragment `wanted` from the other slots of its row, and finds who
    /// sent wrong ones. Nothing is believed that does not pass the page's seal.
    pub fn rebuild(&self, wanted: usize, slot: usize, row: &Row) -> Rebuilt {
        let mut liars = Vec::new();
        let Some(page) = self.page_at(wanted, slot) else {
            return Rebuilt { page: None, liars };
        };
        let mut helpers: Vec<(usize, Bytes)> = row
            .slots
            .iter()
            .filter(|(fragment, _)| **fragment != wanted)
            .map(|(fragment, bytes)| (*fragment, bytes.clone()))
            .collect();
        let mut rebuilt = self.try_choice(wanted, page, &helpers);
        if rebuilt.is_none() && helpers.len() >= self.geometry.code().s() {
            // The seal of the data helpers' own pages tells which of them lie.
            helpers.retain(|(fragment, bytes)| {
                let Some(own) = self.page_at(*fragment, slot) else { return true };
                let honest = self.open(own, bytes).is_some();
                if !honest {
                    liars.push((*fragment, FragmentFailure::Lying { page: own }));
                }
                honest
            });
            let chosen = self.try_choices(wanted, page, &helpers);
            if let Some((found, choice)) = chosen {
                rebuilt = Some(found);
                liars.extend(self.inconsistent(slot, &helpers, &choice));
            }
        }
        Rebuilt { page: rebuilt, liars }
    }

    /// Rebuilds from the first s of `helpers`.
    fn try_choice(
        &self,
        wanted: usize,
        page: usize,
        helpers: &[(usize, Bytes)],
    ) -> Option<RebuiltPage> {
        let present: Vec<(usize, &[u8])> =
            helpers.iter().map(|(fragment, bytes)| (*fragment, bytes.as_ref())).collect();
        let mut rebuilt = vec![0; self.geometry.slot_bytes()];
        self.code.reconstruct(&present, &mut [(wanted, &mut rebuilt)]).ok()?;
        let plaintext = self.open(page, &rebuilt)?;
        rebuilt.truncate(self.sealed_bytes(page));
        Some(RebuiltPage { plaintext, sealed: rebuilt.into() })
    }

    /// Tries choices of s helpers, data first (their seals hold), until one opens.
    fn try_choices(
        &self,
        wanted: usize,
        page: usize,
        helpers: &[(usize, Bytes)],
    ) -> Option<(RebuiltPage, Vec<(usize, Bytes)>)> {
        let s = self.geometry.code().s();
        let (data, parity) = helpers.split_at(helpers.partition_point(|(at, _)| *at < s));
        let wanted_parity = s.checked_sub(data.len())?;
        for choice in choices(parity.len(), wanted_parity).take(CHOICES_MAX) {
            let chosen: Vec<(usize, Bytes)> =
                data.iter().chain(choice.iter().map(|at| &parity[*at])).cloned().collect();
            if let Some(rebuilt) = self.try_choice(wanted, page, &chosen) {
                return Some((rebuilt, chosen));
            }
        }
        None
    }

    /// The helpers outside a proven choice whose bytes differ from what the choice determines.
    fn inconsistent(
        &self,
        slot: usize,
        helpers: &[(usize, Bytes)],
        choice: &[(usize, Bytes)],
    ) -> Vec<(usize, FragmentFailure)> {
        let chosen: BTreeSet<usize> = choice.iter().map(|(fragment, _)| *fragment).collect();
        let present: Vec<(usize, &[u8])> =
            choice.iter().map(|(fragment, bytes)| (*fragment, bytes.as_ref())).collect();
        let others = helpers.iter().filter(|(fragment, _)| !chosen.contains(fragment));
        let wrong = others.filter(|(fragment, bytes)| {
            let mut expected = vec![0; bytes.len()];
            let computed = self.code.reconstruct(&present, &mut [(*fragment, &mut expected)]);
            computed.is_ok() && expected != bytes.as_ref()
        });
        wrong.map(|(fragment, _)| (*fragment, FragmentFailure::Inconsistent { slot })).collect()
    }
}

/// Every choice of `k` out of 0..n, in order.
fn choices(n: usize, k: usize) -> impl Iterator<Item = Vec<usize>> {
    let first = (k <= n).then(|| (0..k).collect::<Vec<usize>>());
    std::iter::successors(first, move |last| {
        let mut next = last.clone();
        // The rightmost that can move does; those behind it follow directly.
        let at = (0..k).rev().find(|at| next[*at] < n - k + at)?;
        next[at] += 1;
        for behind in at + 1..k {
            next[behind] = next[behind - 1] + 1;
        }
        Some(next)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_are_all_and_each_once() {
        assert_eq!(
            choices(4, 2).collect::<Vec<_>>(),
            [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]]
        );
        assert_eq!(choices(3, 0).collect::<Vec<_>>(), [[0usize; 0]]);
        assert_eq!(choices(2, 3).count(), 0);
        let all: BTreeSet<_> = choices(7, 4).collect();
        assert_eq!((all.len(), choices(7, 4).count()), (35, 35));
    }
}
