//! What a provider should hold by the `p` keys of a snapshot, over all volumes, in the order of its
//! own index: by block, then by fragment. Memory: one page a volume.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::sync::Arc;

use bytes::Bytes;
use us_core::ids::{BlockId, VolumeId};

use crate::keys;
use crate::records::{HoldingRecord, decode};
use crate::store::{KeyRange, StoreError, View};

/// `p` keys of one volume read together.
const PAGE: usize = 256;

/// A block of which the provider should hold fragments.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Held {
    /// The block's volume.
    pub volume: VolumeId,
    /// The block.
    pub block: BlockId,
    /// Bitmap over its fragments.
    pub fragments: Bytes,
}

struct Cursor {
    volume: VolumeId,
    range: Option<KeyRange>,
    page: VecDeque<(BlockId, Bytes)>,
}

impl Cursor {
    /// The next block, when the page before it is used up.
    fn fill(&mut self, view: &dyn View) -> Result<Option<BlockId>, StoreError> {
        while self.page.is_empty() {
            let Some(range) = self.range.take() else { return Ok(None) };
            let pairs = view.scan(&range, PAGE)?;
            if let Some((last, _)) = pairs.last().filter(|_| pairs.len() == PAGE) {
                self.range = Some(range.after(last));
            }
            for (key, value) in &pairs {
                let held: HoldingRecord = decode(key, value)?;
                let block = keys::last_block(key);
                self.page.extend(block.map(|block| (block, held.fragments)));
            }
        }
        Ok(self.page.front().map(|(block, _)| *block))
    }
}

/// Walks over what one provider should hold.
pub struct Holdings {
    view: Arc<dyn View>,
    cursors: Vec<Cursor>,
    heads: BinaryHeap<Reverse<(BlockId, usize)>>,
}

impl Holdings {
    /// At the start of what `provider` should hold of `volumes`.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn new(
        view: Arc<dyn View>,
        volumes: impl IntoIterator<Item = VolumeId>,
        provider: u32,
    ) -> Result<Self, StoreError> {
        let cursor = |volume| Cursor {
            volume,
            range: Some(KeyRange::prefix(&keys::holdings(&volume, provider))),
            page: VecDeque::new(),
        };
        let mut cursors: Vec<Cursor> = volumes.into_iter().map(cursor).collect();
        let mut heads = BinaryHeap::new();
        for (at, cursor) in cursors.iter_mut().enumerate() {
            heads.extend(cursor.fill(&*view)?.map(|block| Reverse((block, at))));
        }
        Ok(Self { view, cursors, heads })
    }

    /// The next block, `None` at the end.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn next_block(&mut self) -> Result<Option<Held>, StoreError> {
        let Some(Reverse((block, at))) = self.heads.pop() else { return Ok(None) };
        let cursor = &mut self.cursors[at];
        let (_, fragments) = cursor.page.pop_front().expect("its head came from here");
        let volume = cursor.volume;
        self.heads.extend(cursor.fill(&*self.view)?.map(|block| Reverse((block, at))));
        Ok(Some(Held { volume, block, fragments }))
    }
}
