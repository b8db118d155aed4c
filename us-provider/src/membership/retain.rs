//! Retain lists: the directory says from a snapshot what this provider is to keep; what is here, is
//! older, and is not in the list is told to the directory, which looks again and deletes it as
//! anything else, into the trash.
//!
//! ```text
//!  page 0, 1, 2 … last    beside the index, block by block    -> acknowledged one by one
//!  the last one           the sums are right, it is not empty -> what is not listed
//! ```
//! Invariants:
//! - nothing is said of a list that did not come whole: pages in order, blocks in order, the sums of
//!   the last page those of what came;
//! - an empty list is refused while anything here is old enough to be in it;
//! - a list of an earlier directory than one known here is refused: it is an old copy.

use us_core::ids::{BlockId, FragmentId};
use us_proto::v1::{RecordsHeld, RetainEntry, RetainPage};

use crate::store::{InventoryEntry, Store, StoreError};

/// Fragments of one list that are told; the next list finds the others.
const UNLISTED_MAX: usize = 65_536;
/// Entries of a page.
const ENTRIES_MAX: usize = 4096;
/// Index entries read together.
const INDEX_PAGE: usize = 1024;

/// Why a list is not followed.
#[derive(Debug, thiserror::Error)]
pub enum RetainError {
    /// A page is missing, or came twice.
    #[error("page {page} came where page {expected} was next")]
    Page {
        /// Which came.
        page: u32,
        /// Which was next.
        expected: u32,
    },
    /// It is from before what is known here.
    #[error("it is of directory {found:?}, and {known:?} was seen: an old copy of the directory")]
    Old {
        /// Incarnation, run and commit of the list.
        found: (u64, u64, u64),
        /// The newest known.
        known: (u64, u64, u64),
    },
    /// Its pages make no sense.
    #[error("{detail}")]
    Malformed {
        /// What is wrong.
        detail: &'static str,
    },
    /// Fewer entries came than it should have.
    #[error("{found} entries came of {expected}: it was cut short")]
    Short {
        /// That came.
        found: u64,
        /// That it has.
        expected: u64,
    },
    /// It names nothing, and something is here.
    #[error("it is empty, and {fragments} fragments here are old enough to be in it")]
    Empty {
        /// How many.
        fragments: u64,
    },
    /// The own index failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// A list that is coming.
#[derive(Debug)]
struct Coming {
    list: u64,
    births_below: u64,
    next_page: u32,
    entries: u64,
    last_block: Option<BlockId>,
    /// How far the index is walked.
    after: Option<FragmentId>,
    /// Fragments here that are old enough.
    old: u64,
    unlisted: Vec<InventoryEntry>,
}

/// What this provider does with lists, over all streams.
#[derive(Debug, Default)]
pub struct Retaining {
    coming: Option<Coming>,
    /// The newest directory that sent a list.
    known: (u64, u64, u64),
}

impl Retaining {
    /// Takes a page; with the last one says what is here and not in the list. Blocks.
    ///
    /// # Errors
    /// [`RetainError`]; the list is then forgotten.
    pub fn page(
        &mut self,
        store: &Store,
        held: Option<&RecordsHeld>,
        page: &RetainPage,
    ) -> Result<Option<Vec<InventoryEntry>>, RetainError> {
        let coming = self.coming.take();
        let found = (page.incarnation, page.run, page.seq);
        let records = held.map_or((0, 0, 0), |held| (held.incarnation, held.run, 0));
        let known = self.known.max(records);
        if found < known {
            return Err(RetainError::Old { found, known });
        }
        self.known = found;
        // The first page begins anew, whatever came before: numbers begin again with a new stream.
        let same = |coming: &Coming| page.page > 0 && coming.list == page.list;
        let mut coming = coming.filter(same).unwrap_or_else(|| Coming::new(page));
        if page.page != coming.next_page {
            return Err(RetainError::Page { page: page.page, expected: coming.next_page });
        }
        coming.take(store, page)?;
        if !page.last {
            self.coming = Some(coming);
            return Ok(None);
        }
        if coming.entries != page.entries_total {
            let (found, expected) = (coming.entries, page.entries_total);
            return Err(RetainError::Short { found, expected });
        }
        if coming.entries == 0 && coming.old > 0 {
            return Err(RetainError::Empty { fragments: coming.old });
        }
        Ok(Some(coming.unlisted))
    }
}

impl Coming {
    fn new(page: &RetainPage) -> Self {
        Self {
            list: page.list,
            births_below: page.births_below,
            next_page: 0,
            entries: 0,
            last_block: None,
            after: None,
            old: 0,
            unlisted: Vec::new(),
        }
    }

    fn take(&mut self, store: &Store, page: &RetainPage) -> Result<(), RetainError> {
        let malformed = |detail| Err(RetainError::Malformed { detail });
        if page.births_below != self.births_below {
            return malformed("its pages speak of different births");
        }
        if page.entries.len() > ENTRIES_MAX || (page.entries.is_empty() && !page.last) {
            return malformed("a page without entries, or with too many");
        }
        let mut listed = Vec::with_capacity(page.entries.len());
        for entry in &page.entries {
            let Some(block) = BlockId::from_slice(&entry.block) else {
                return malformed("an entry without a block");
            };
            if self.last_block.is_some_and(|last| block <= last) {
                return malformed("its blocks are not in order");
            }
            self.last_block = Some(block);
            listed.push((block, entry));
        }
        self.next_page += 1;
        self.entries += page.entries.len() as u64;
        let end = if page.last { None } else { self.last_block };
        self.walk(store, &listed, end)
    }

    /// Goes on in the index up to and with block `end`, or to its end.
    fn walk(
        &mut self,
        store: &Store,
        listed: &[(BlockId, &RetainEntry)],
        end: Option<BlockId>,
    ) -> Result<(), RetainError> {
        loop {
            let lines = store.inventory(self.after, INDEX_PAGE)?;
            if lines.is_empty() {
                return Ok(());
            }
            for line in lines {
                if end.is_some_and(|end| line.id.block > end) {
                    return Ok(());
                }
                self.after = Some(line.id);
                let is_old = line.entry.birth.0 < self.births_below;
                if line.entry.trashed_at_s != 0 || !is_old {
                    continue;
                }
                self.old += 1;
                let at = listed.binary_search_by_key(&line.id.block, |(block, _)| *block);
                let keeps = |entry: &RetainEntry| {
                    let byte = entry.fragments.get(usize::from(line.id.index / 8));
                    byte.is_some_and(|byte| byte >> (line.id.index % 8) & 1 == 1)
                };
                let is_listed = at.is_ok_and(|at| keeps(listed[at].1));
                if !is_listed && self.unlisted.len() < UNLISTED_MAX {
                    self.unlisted.push(line);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
