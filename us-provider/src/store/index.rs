//! Where each fragment lies: a cache in `sled`, rebuilt from the segments whenever it is not to be
//! trusted.
//!
//! One tree, keys by their first byte:
//! ```text
//! f fragment key             entry (64 B)
//! t seconds (BE), key        nothing: the trash in the order of deletion
//! x key                      nothing: fragments found damaged
//! s segment (BE)             its account
//! m                          mark: how far the segments are indexed
//! ```
//! Invariant: entries, accounts and mark change in one atomic batch, so after a crash of the
//! process they agree, and only what lies behind the mark must be scanned. After a crash of the
//! machine, after an error or a panic of sled, or when its segments are not those on the disk, it is
//! deleted and rebuilt.
//!
//! Only the store's writer changes it; any thread reads.

mod sound;

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use us_core::ids::{Birth, FragmentId, VolumeId};

use super::accounts::{Accounts, Class, SegmentAccount};
use super::format::padded_bytes;
pub use sound::Soundness;

/// What the index lacks after a crash is read from the segments: at most what was stored in this time.
const FLUSH_EVERY_MS: u64 = 5000;

/// Where a record begins.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Place {
    /// The number of the segment.
    pub segment: u32,
    /// The offset in it.
    pub offset: u64,
}

/// What the index knows of a fragment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Entry {
    /// Where its record begins.
    pub place: Place,
    /// The record's number in the store.
    pub seq: u64,
    /// Bytes of the payload: the fragment's record.
    pub payload_bytes: u32,
    /// Bytes of the fragment's body.
    pub fragment_bytes: u32,
    /// Its volume.
    pub volume: VolumeId,
    /// The birth number of its block.
    pub birth: Birth,
    /// Unix seconds at which it went to the trash; 0 while it counts.
    pub trashed_at_s: u64,
    /// Whether its record was found damaged.
    pub damaged: bool,
}

impl Entry {
    /// The tally it belongs to.
    pub const fn class(&self) -> Class {
        if self.trashed_at_s == 0 { Class::Live } else { Class::Trashed }
    }

    /// Bytes its record takes in the segment.
    pub const fn padded_bytes(&self) -> u64 {
        padded_bytes(self.payload_bytes)
    }

    /// The entry's value in the index.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(61);
        bytes.extend_from_slice(&self.place.segment.to_le_bytes());
        bytes.extend_from_slice(&self.place.offset.to_le_bytes());
        bytes.extend_from_slice(&self.seq.to_le_bytes());
        bytes.extend_from_slice(&self.payload_bytes.to_le_bytes());
        bytes.extend_from_slice(&self.fragment_bytes.to_le_bytes());
        bytes.extend_from_slice(self.volume.as_bytes());
        bytes.extend_from_slice(&self.birth.0.to_le_bytes());
        bytes.extend_from_slice(&self.trashed_at_s.to_le_bytes());
        bytes.push(self.damaged.into());
        bytes
    }

    /// Reads an entry's value; `None` for bytes that [`Index`] never writes.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let mut fields = Fields(bytes);
        let entry = Self {
            place: Place { segment: fields.u32()?, offset: fields.u64()? },
            seq: fields.u64()?,
            payload_bytes: fields.u32()?,
            fragment_bytes: fields.u32()?,
            volume: VolumeId::from_bytes(fields.take()?),
            birth: Birth(fields.u64()?),
            trashed_at_s: fields.u64()?,
            damaged: flag(fields.take()?)?,
        };
        fields.0.is_empty().then_some(entry)
    }
}

const fn flag([byte]: [u8; 1]) -> Option<bool> {
    match byte {
        0 => Some(false),
        1 => Some(true),
        _ => None,
    }
}

/// How far the segments are indexed, and what the next record's number is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Mark {
    /// Everything before this place is in the index.
    pub place: Place,
    /// The number of the next record.
    pub next_seq: u64,
    /// Fragments in the index, the trash included.
    pub fragments: u64,
}

impl Mark {
    /// The mark's value in the index.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = self.place.segment.to_le_bytes().to_vec();
        for value in [self.place.offset, self.next_seq, self.fragments] {
            bytes.extend_from_slice(&value.to_le_bytes());
        }
        bytes
    }

    /// Reads the mark's value; `None` for bytes that [`Index`] never writes.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let mut fields = Fields(bytes);
        let mark = Self {
            place: Place { segment: fields.u32()?, offset: fields.u64()? },
            next_seq: fields.u64()?,
            fragments: fields.u64()?,
        };
        fields.0.is_empty().then_some(mark)
    }
}

/// Takes little-endian fields from the front of bytes.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (value, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*value)
    }

    fn u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.take().map(u64::from_le_bytes)
    }
}

/// The index failed. It is a cache: after a restart it is rebuilt.
#[derive(Debug, Clone, thiserror::Error)]
pub enum IndexError {
    /// sled reports an error.
    #[error("the index failed; it is rebuilt at the next start")]
    Sled(#[from] sled::Error),
    /// A value that this program never writes.
    #[error(
        "the index holds an impossible value under {key:02x?}; it is rebuilt at the next start"
    )]
    Value {
        /// The key.
        key: Vec<u8>,
    },
}

/// The index.
#[derive(Debug)]
pub struct Index {
    db: sled::Db,
    soundness: Soundness,
    damaged: AtomicU64,
}

impl Index {
    /// Opens the index in `dir`, empty where there was none or none that could be trusted.
    ///
    /// # Errors
    /// [`IndexError`] when even an empty one cannot be made.
    pub fn open(dir: &Path, cache_bytes: u64) -> Result<Self, IndexError> {
        let mut soundness = Soundness::begin(dir);
        let path = dir.join("index");
        if soundness.is_suspect() {
            remove_tree(&path);
        }
        let db = open_caught(&path, cache_bytes).or_else(|error| {
            tracing::warn!(%error, "the index does not open; it is rebuilt");
            remove_tree(&path);
            open_caught(&path, cache_bytes)
        })?;
        let damaged = AtomicU64::new(db.scan_prefix(b"x").count() as u64);
        let index = Self { db, soundness: soundness.clone(), damaged };
        if !index.is_consistent(soundness.was_closed()) {
            index.clear()?;
        }
        soundness.opened();
        Ok(index)
    }

    /// Whether what was read back can be continued from: the mark is there and, where the last stop
    /// was not clean, as many fragments as it says.
    fn is_consistent(&self, was_closed: bool) -> bool {
        match self.mark() {
            Ok(None) => true,
            Ok(Some(mark)) => {
                let prefix = self.db.scan_prefix(b"f");
                was_closed || prefix.filter(Result::is_ok).count() as u64 == mark.fragments
            }
            Err(_) => false,
        }
    }

    /// Empties the index: everything will be scanned.
    ///
    /// # Errors
    /// [`IndexError`].
    pub fn clear(&self) -> Result<(), IndexError> {
        self.db.clear()?;
        self.damaged.store(0, Ordering::Relaxed);
        Ok(())
    }

    /// How far the segments are indexed; `None` when nothing is.
    ///
    /// # Errors
    /// [`IndexError`].
    pub fn mark(&self) -> Result<Option<Mark>, IndexError> {
        let Some(value) = self.db.get(b"m")? else { return Ok(None) };
        Mark::decode(&value).map(Some).ok_or(IndexError::Value { key: b"m".to_vec() })
    }

    /// The accounts as they were when the mark was made.
    ///
    /// # Errors
    /// [`IndexError`].
    pub fn accounts(&self) -> Result<Accounts, IndexError> {
        let mut segments = Vec::new();
        for item in self.db.scan_prefix(b"s") {
            let (key, value) = item?;
            let number = key.get(1..).and_then(|number| number.try_into().ok());
            let account = SegmentAccount::decode(&value);
            let (Some(number), Some(account)) = (number, account) else {
                return Err(IndexError::Value { key: key.to_vec() });
            };
            segments.push((u32::from_be_bytes(number), account));
        }
        Ok(Accounts::from_segments(segments))
    }

    /// What is known of a fragment.
    ///
    /// # Errors
    /// [`IndexError`].
    pub fn entry(&self, id: FragmentId) -> Result<Option<Entry>, IndexError> {
        let key = key(b'f', id);
        let Some(value) = self.db.get(key)? else { return Ok(None) };
        Entry::decode(&value).map(Some).ok_or(IndexError::Value { key: key.to_vec() })
    }

    /// Up to `limit` fragments after `after` (from the first where it is `None`), in key order.
    ///
    /// # Errors
    /// [`IndexError`].
    pub fn page(
        &self,
        after: Option<FragmentId>,
        limit: usize,
    ) -> Result<Vec<(FragmentId, Entry)>, IndexError> {
        use std::ops::Bound::{Excluded, Included};
        let start = after.map_or(Included(vec![b'f']), |id| Excluded(key(b'f', id).to_vec()));
        let items = self.db.range((start, Excluded(vec![b'f' + 1]))).take(limit);
        items
            .map(|item| {
                let (key, value) = item?;
                let id = FragmentId::from_key(&key[1..]);
                let entry = Entry::decode(&value);
                id.zip(entry).ok_or(IndexError::Value { key: key.to_vec() })
            })
            .collect()
    }

    /// Up to `limit` fragments that went to the trash before `before_s`, the oldest first.
    ///
    /// # Errors
    /// [`IndexError`].
    pub fn trash(&self, before_s: u64, limit: usize) -> Result<Vec<FragmentId>, IndexError> {
        let mut end = vec![b't'];
        end.extend_from_slice(&before_s.to_be_bytes());
        let items = self.db.range(vec![b't']..end).take(limit);
        items
            .map(|item| {
                let (key, _) = item?;
                FragmentId::from_key(key.get(9..).unwrap_or(&[]))
                    .ok_or(IndexError::Value { key: key.to_vec() })
            })
            .collect()
    }

    /// Up to `limit` fragments known to be damaged, in key order.
    ///
    /// # Errors
    /// [`IndexError`].
    pub fn damaged(&self, limit: usize) -> Result<Vec<FragmentId>, IndexError> {
        let items = self.db.scan_prefix(b"x").take(limit);
        items
            .map(|item| {
                let (key, _) = item?;
                FragmentId::from_key(&key[1..]).ok_or(IndexError::Value { key: key.to_vec() })
            })
            .collect()
    }

    /// Makes a set of changes visible, all or none, and books them in the accounts.
    ///
    /// # Errors
    /// [`IndexError`]; accounts and index may then disagree, and the index is not to be used again.
    pub fn apply(
        &self,
        staged: Staged,
        accounts: &mut Accounts,
        place: Place,
        next_seq: u64,
    ) -> Result<(), IndexError> {
        let mut batch = sled::Batch::default();
        let mut segments = staged.segments;
        for (id, Change { old, new }) in staged.changes {
            if let Some(entry) = old {
                accounts.leave(entry.place.segment, entry.class(), entry.padded_bytes());
                segments.insert(entry.place.segment);
            }
            if let Some(entry) = new {
                accounts.enter(entry.place.segment, entry.class(), entry.padded_bytes());
                segments.insert(entry.place.segment);
            }
            put_change(&mut batch, id, old, new);
            self.count_damage(old, new);
        }
        for number in segments {
            match accounts.segment(number) {
                account if account.bytes == 0 => batch.remove(&segment_key(number)),
                account => batch.insert(&segment_key(number), &account.encode()[..]),
            }
        }
        let fragments = accounts.live().records + accounts.trashed().records;
        batch.insert(b"m", Mark { place, next_seq, fragments }.encode());
        Ok(self.db.apply_batch(batch)?)
    }

    fn count_damage(&self, old: Option<Entry>, new: Option<Entry>) {
        match (is_damaged(old), is_damaged(new)) {
            (false, true) => drop(self.damaged.fetch_add(1, Ordering::Relaxed)),
            (true, false) => drop(self.damaged.fetch_sub(1, Ordering::Relaxed)),
            (true, true) | (false, false) => {}
        }
    }

    /// How many fragments are known to be damaged.
    pub fn damaged_count(&self) -> u64 {
        self.damaged.load(Ordering::Relaxed)
    }

    /// Writes everything out and notes that the next start may trust it.
    ///
    /// # Errors
    /// [`IndexError`].
    pub fn close(&self) -> Result<(), IndexError> {
        self.db.flush()?;
        self.soundness.closed();
        Ok(())
    }

    /// Notes that the next start must rebuild.
    pub fn distrust(&self) {
        self.soundness.distrust();
    }
}

#[derive(Debug)]
struct Change {
    old: Option<Entry>,
    new: Option<Entry>,
}

/// Changes that are not yet visible.
#[derive(Debug, Default)]
pub struct Staged {
    changes: HashMap<FragmentId, Change>,
    segments: BTreeSet<u32>,
}

impl Staged {
    /// What is known of a fragment with these changes made.
    ///
    /// # Errors
    /// [`IndexError`].
    pub fn entry(&self, index: &Index, id: FragmentId) -> Result<Option<Entry>, IndexError> {
        self.changes.get(&id).map_or_else(|| index.entry(id), |change| Ok(change.new))
    }

    /// Changes what is known of a fragment; `current` is what [`Staged::entry`] says of it now.
    pub fn set(&mut self, id: FragmentId, current: Option<Entry>, new: Option<Entry>) {
        self.changes.entry(id).or_insert(Change { old: current, new }).new = new;
    }

    /// Says that the account of a segment changed.
    pub fn touch(&mut self, segment: u32) {
        self.segments.insert(segment);
    }

    /// How many fragments are changed.
    pub fn len(&self) -> usize {
        self.changes.len()
    }

    /// Whether nothing is changed.
    pub fn is_empty(&self) -> bool {
        self.changes.is_empty() && self.segments.is_empty()
    }
}

fn put_change(batch: &mut sled::Batch, id: FragmentId, old: Option<Entry>, new: Option<Entry>) {
    match &new {
        Some(entry) => batch.insert(&key(b'f', id), entry.encode()),
        None => batch.remove(&key(b'f', id)),
    }
    let trashed = |entry: Option<Entry>| {
        entry.filter(|entry| entry.class() == Class::Trashed).map(|entry| entry.trashed_at_s)
    };
    let (was, is) = (trashed(old), trashed(new));
    if was != is {
        was.into_iter().for_each(|at_s| batch.remove(trash_key(at_s, id)));
        is.into_iter().for_each(|at_s| batch.insert(trash_key(at_s, id), &[]));
    }
    match (is_damaged(old), is_damaged(new)) {
        (false, true) => batch.insert(&key(b'x', id), &[]),
        (true, false) => batch.remove(&key(b'x', id)),
        (true, true) | (false, false) => {}
    }
}

fn is_damaged(entry: Option<Entry>) -> bool {
    entry.is_some_and(|entry| entry.damaged)
}

fn key(tag: u8, id: FragmentId) -> [u8; 18] {
    let mut key = [tag; 18];
    key[1..].copy_from_slice(&id.to_key());
    key
}

fn trash_key(at_s: u64, id: FragmentId) -> Vec<u8> {
    let mut key = vec![b't'];
    key.extend_from_slice(&at_s.to_be_bytes());
    key.extend_from_slice(&id.to_key());
    key
}

fn segment_key(number: u32) -> [u8; 5] {
    let mut key = [b's'; 5];
    key[1..].copy_from_slice(&number.to_be_bytes());
    key
}

fn remove_tree(path: &PathBuf) {
    match std::fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            tracing::warn!(%error, path = %path.display(), "the old index cannot be removed");
        }
        Ok(()) | Err(_) => {}
    }
}

/// Opens sled; a panic of it becomes an error where the build unwinds. Where it aborts,
/// [`Soundness`] has noted before that the index was being opened.
fn open_caught(path: &Path, cache_bytes: u64) -> Result<sled::Db, sled::Error> {
    let config = sled::Config::new()
        .path(path)
        .cache_capacity(cache_bytes)
        .mode(sled::Mode::HighThroughput)
        .flush_every_ms(Some(FLUSH_EVERY_MS));
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| config.open())).unwrap_or_else(|_| {
        Err(sled::Error::ReportableBug("sled panicked while it opened the index".into()))
    })
}
