//! Where the directory's state lies: an ordered map of byte keys to byte values.
//!
//! A store does four things and nothing more: `get`, `scan`, `snapshot` and `commit`. One owner
//! writes; batches are applied whole and in order, each with a sequence number. A commit is either
//! *applied* (visible now, durable within a second) or *durable* (on stable storage at once); how
//! far the sequence is durable is told through the [`DurableSink`] given when the store is opened.
//!
//! Invariants:
//! - what is durable is a prefix of the sequence;
//! - a snapshot never changes, costs O(1) and makes no commit wait;
//! - after a failed write or sync the store takes no more commits, for ever: the kernel may have
//!   dropped the pages, so trying again could report durability that is not there.
//!
//! Every commit is also a *record*: its batch, encoded, under its number. Records can be read back for
//! a while ([`MetaStore::records`]): copies on other machines, images and backups are made of them.
//!
//! Called by the engine (its only writer) and, through snapshots, by the admin scans.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::Arc;

use bytes::Bytes;

pub mod embedded;
pub mod journal;
pub mod memory;
pub mod records;
mod replay;
#[cfg(test)]
mod tests;

/// The number of a commit. The first is 1; 0 means "nothing".
pub type Seq = u64;

/// A key and its value.
pub type Pair = (Bytes, Bytes);

/// Where a scan begins and ends.
type Bounds<'a> = (Bound<&'a [u8]>, Bound<&'a [u8]>);
/// Ordered writes over a base.
pub(crate) type Layer<'a> = Box<dyn Iterator<Item = (&'a Bytes, &'a Option<Bytes>)> + 'a>;

/// The longest key a store takes.
pub const KEY_BYTES_MAX: usize = 4 << 10;
/// The longest value a store takes.
pub const VALUE_BYTES_MAX: usize = 16 << 20;

/// How strong a commit is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Durability {
    /// Visible now, durable within a second.
    Applied,
    /// Synced at once (together with whatever else waits).
    Durable,
}

/// What can go wrong in a store. All of them end the directory's writing: none is retried.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StoreError {
    /// The disk refused.
    #[error("{action} {path}: {source}")]
    Io {
        /// What was being done.
        action: &'static str,
        /// To which file.
        path: String,
        /// The system's answer.
        source: Arc<std::io::Error>,
    },
    /// The checkpoint database refused.
    #[error("the checkpoint {path}: {detail}")]
    Checkpoint {
        /// Its file.
        path: String,
        /// What it said.
        detail: String,
    },
    /// Bytes that were durable are damaged or gone.
    #[error(
        "the journal {path} is damaged at byte {offset} (record {seq} expected): {detail}. \
         Restore from a backup; nothing was changed"
    )]
    Damaged {
        /// The journal file.
        path: String,
        /// Where in it.
        offset: u64,
        /// Which record should be there.
        seq: Seq,
        /// What is wrong.
        detail: &'static str,
    },
    /// An earlier write or sync failed: nothing more is written.
    #[error("the store has stopped writing since: {first}")]
    Stopped {
        /// The first failure.
        first: String,
    },
    /// A stored value cannot be decoded.
    #[error("the value under key {key} cannot be decoded: {detail}")]
    Value {
        /// The key, in hexadecimal.
        key: String,
        /// What the decoder said.
        detail: String,
    },
    /// Another process has the store open.
    #[error("{path} is in use by another process")]
    InUse {
        /// The lock file.
        path: String,
    },
}

impl StoreError {
    pub(crate) fn io(
        action: &'static str,
        path: &std::path::Path,
        source: impl Into<std::io::Error>,
    ) -> Self {
        Self::Io { action, path: path.display().to_string(), source: Arc::new(source.into()) }
    }
}

/// A range of keys: `from` is in it, `to` is not; no `to` means to the end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyRange {
    /// The first key.
    pub from: Bytes,
    /// The first key behind the range.
    pub to: Option<Bytes>,
}

impl KeyRange {
    /// All keys that begin with `prefix`.
    pub fn prefix(prefix: &[u8]) -> Self {
        let mut to = prefix.to_vec();
        while to.last() == Some(&0xff) {
            to.pop();
        }
        let to = to.last_mut().map(|last| *last += 1).map(|()| to.into());
        Self { from: Bytes::copy_from_slice(prefix), to }
    }

    /// The keys of the range behind `key`: the next page of a scan.
    #[must_use]
    pub fn after(&self, key: &[u8]) -> Self {
        let mut from = Vec::with_capacity(key.len() + 1);
        from.extend_from_slice(key);
        from.push(0);
        Self { from: from.into(), to: self.to.clone() }
    }

    /// The range as bounds for an ordered map; `None` when it is empty.
    pub(crate) fn bounds(&self) -> Option<Bounds<'_>> {
        if self.to.as_ref().is_some_and(|to| *to <= self.from) {
            return None;
        }
        let to = self.to.as_ref().map_or(Bound::Unbounded, |to| Bound::Excluded(to.as_ref()));
        Some((Bound::Included(self.from.as_ref()), to))
    }
}

/// Something that can be read: a store, a snapshot of it.
pub trait View: Send + Sync {
    /// The value under `key`.
    ///
    /// # Errors
    /// [`StoreError`] when the disk fails.
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, StoreError>;

    /// The first `limit` pairs of the range, in key order.
    ///
    /// # Errors
    /// [`StoreError`] when the disk fails.
    fn scan(&self, range: &KeyRange, limit: usize) -> Result<Vec<Pair>, StoreError>;
}

/// The store: what can be read, snapshots, and commits.
pub trait MetaStore: View {
    /// The state as it is now, for ever.
    fn snapshot(&self) -> Arc<dyn View>;

    /// Applies the batch whole and returns its number. An empty batch takes no number: it returns
    /// the last one, and with [`Durability::Durable`] asks that all up to it be synced.
    ///
    /// # Errors
    /// [`StoreError`] when the store has stopped writing.
    fn commit(&mut self, batch: WriteBatch, durability: Durability) -> Result<Seq, StoreError>;

    /// Facts for `status`.
    fn facts(&self) -> StoreFacts;

    /// The first commit whose record can still be read.
    fn first_record(&self) -> Seq;

    /// The bodies of records from `from` on, without gaps, until `bytes_max` is reached; at least
    /// one where there is any. Only what was announced as written. Nothing where `from` is no longer
    /// kept.
    ///
    /// # Errors
    /// [`StoreError`] when the disk fails.
    fn records(&self, from: Seq, bytes_max: usize) -> Result<Vec<(Seq, Bytes)>, StoreError>;

    /// About how many bytes the records from `from` on take.
    fn record_bytes(&self, from: Seq) -> u64;

    /// Records before `from` are not asked for any more. Those from there on are kept while they are
    /// not too many.
    ///
    /// # Errors
    /// [`StoreError`] when the disk fails.
    fn keep_records(&self, from: Seq) -> Result<(), StoreError>;
}

/// How far commits have got.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Their records can be read; a killed process does not lose them, a power cut may.
    pub written: Seq,
    /// On stable storage.
    pub synced: Seq,
}

/// What a store says about itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StoreFacts {
    /// The last commit.
    pub seq: Seq,
    /// Bytes in journal files: what a start replays.
    pub journal_bytes: u64,
}

/// Hears how far commits are written and synced, or that the store has stopped. Called from the
/// store's own thread; must not block for long.
pub type DurableSink = Arc<dyn Fn(Result<Progress, StoreError>) + Send + Sync>;

/// Writes that are applied together: at most one for each key.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WriteBatch {
    writes: BTreeMap<Bytes, Option<Bytes>>,
}

impl WriteBatch {
    /// A batch of nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets a key.
    ///
    /// # Panics
    /// When key or value are longer than any writer makes them.
    pub fn put(&mut self, key: Bytes, value: Bytes) {
        assert!(key.len() <= KEY_BYTES_MAX && value.len() <= VALUE_BYTES_MAX, "a write too long");
        self.writes.insert(key, Some(value));
    }

    /// Removes a key.
    pub fn delete(&mut self, key: Bytes) {
        assert!(key.len() <= KEY_BYTES_MAX, "a key too long");
        self.writes.insert(key, None);
    }

    /// What the batch says about a key.
    pub fn get(&self, key: &[u8]) -> Option<&Option<Bytes>> {
        self.writes.get(key)
    }

    /// The writes of a range, in key order.
    pub fn range<'a>(
        &'a self,
        range: &KeyRange,
    ) -> impl Iterator<Item = (&'a Bytes, &'a Option<Bytes>)> + use<'a> {
        let bounds = range.bounds();
        bounds.map(|bounds| self.writes.range::<[u8], _>(bounds)).into_iter().flatten()
    }

    /// All writes, in key order.
    pub fn iter(&self) -> impl Iterator<Item = (&Bytes, &Option<Bytes>)> {
        self.writes.iter()
    }

    /// Bytes of its keys and values.
    pub fn bytes(&self) -> usize {
        let bytes = |(key, value): (&Bytes, &Option<Bytes>)| {
            key.len() + value.as_ref().map_or(0, Bytes::len)
        };
        self.iter().map(bytes).sum()
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.writes.is_empty()
    }

    /// How many keys it touches.
    pub fn len(&self) -> usize {
        self.writes.len()
    }
}

impl IntoIterator for WriteBatch {
    type Item = (Bytes, Option<Bytes>);
    type IntoIter = std::collections::btree_map::IntoIter<Bytes, Option<Bytes>>;

    fn into_iter(self) -> Self::IntoIter {
        self.writes.into_iter()
    }
}

/// Merges ordered layers of writes over an ordered base: upper layers first, `None` hides a key.
pub(crate) fn merge_layers<'a>(
    layers: Vec<Layer<'a>>,
    mut base: impl FnMut() -> Result<Option<Pair>, StoreError>,
    limit: usize,
) -> Result<Vec<Pair>, StoreError> {
    let mut layers: Vec<_> = layers.into_iter().map(Iterator::peekable).collect();
    let mut below = base()?;
    let mut pairs = Vec::new();
    while pairs.len() < limit {
        let upper = layers.iter_mut().filter_map(|layer| layer.peek().map(|(key, _)| *key)).min();
        let take_base = match (upper, &below) {
            (None, None) => break,
            (None, Some(_)) => true,
            (Some(_), None) => false,
            (Some(key), Some((base_key, _))) => base_key < key,
        };
        if take_base {
            pairs.extend(below.take());
            below = base()?;
            continue;
        }
        let key = upper.expect("an upper layer was chosen").clone();
        let mut value = None;
        for layer in &mut layers {
            if layer.peek().is_some_and(|(next, _)| **next == key) {
                let (_, found) = layer.next().expect("peeked");
                value = value.or(Some(found));
            }
        }
        if below.as_ref().is_some_and(|(base_key, _)| *base_key == key) {
            below = base()?;
        }
        if let Some(Some(value)) = value {
            pairs.push((key, value.clone()));
        }
    }
    Ok(pairs)
}
