//! Opening a store: from whatever the last run left to a state in which the index agrees with the
//! segments.
//!
//! Only what lies behind the index's mark is walked; all of it where the index is not to be
//! trusted. At the end of the last segment, bytes behind the last whole record are those of a batch
//! that was never acknowledged: they are cut off. A bad record with a good one behind it is damage:
//! it is kept, indexed as damaged where its header still says what it was, and reported.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::Semaphore;
use us_core::daemon::disk;
use us_core::daemon::files::{Access, DirLock, write_atomic};
use us_core::fragment::FragmentHeader;
use us_core::ids::{FragmentId, VolumeId};

use super::accounts::Accounts;
use super::format::{Envelope, SEGMENT_HEADER_BYTES, SegmentHeader};
use super::index::{Entry, Index, IndexError, Place, Staged};
use super::read::Fronts;
use super::scan::{Content, Depth, Found, Scanner};
use super::segments::{Segment, SegmentError, Segments};
use super::writer::{Start, Writer, entry_of, kept_bytes};
use super::{CHARGE_BYTES, Handle, OpenError, Shared, StoreOptions};

/// Records brought into the index at once.
const CHUNK_RECORDS: usize = 4096;
/// Commands that may be sent without a permit of the queue: notes of damage.
const UNCHARGED_COMMANDS: usize = 64;

/// What was found and done when the store opened.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Recovery {
    /// Whether the whole index was made again.
    pub rebuilt: bool,
    /// Records walked.
    pub records: u64,
    /// Bytes of unacknowledged puts cut off the end of the last segment.
    pub cut_bytes: u64,
    /// Bytes inside segments that are no record.
    pub unreadable_bytes: u64,
    /// Fragments found damaged.
    pub damaged: u64,
    /// Segments the index knew fragments in that are not there any more; where the index is lost
    /// too and there is not one segment, 1.
    pub missing_segments: usize,
    /// Files that could not be read as segments and were renamed.
    pub set_aside: Vec<PathBuf>,
    /// How long it took.
    pub took: Duration,
}

impl Recovery {
    /// Whether fragments may be gone that were acknowledged: what others think is here is to be
    /// looked at again.
    pub fn has_lost_something(&self) -> bool {
        self.missing_segments > 0 || self.unreadable_bytes > 0 || !self.set_aside.is_empty()
    }
}

pub(super) fn open(dir: &Path, options: StoreOptions) -> Result<Handle, OpenError> {
    let begun = Instant::now();
    let lock = DirLock::take(dir)?;
    let is_new = !dir.join("store").exists();
    let id = store_id(dir)?;
    let segments = Segments::new(dir.join("segments"), id)?;
    let index = Index::open(dir, options.index_cache_bytes)?;
    let mut walk = Walk::new(&options, index, segments)?;
    let start = walk.run(is_new)?;
    let Walk { index, segments, accounts, mut recovery, .. } = walk;
    recovery.took = begun.elapsed();
    let queue_units = (options.queue_bytes / CHARGE_BYTES).clamp(1, 1 << 20);
    let shared = Arc::new(Shared {
        dir: dir.to_owned(),
        id,
        options,
        index,
        segments,
        fronts: Fronts::default(),
        accounts: Mutex::new(accounts),
        trouble: Mutex::new(None),
        unmarked: Mutex::default(),
        stuck: Mutex::default(),
        fresh_damage: Mutex::new(Vec::new()),
    });
    let damaged = shared.index.damaged(super::space::FRESH_DAMAGE_MAX)?;
    *shared.fresh_damage.lock() = damaged;
    let (commands, receiver) = sync_channel(queue_units + UNCHARGED_COMMANDS);
    let writer = Writer::new(Arc::clone(&shared), start);
    let writer = std::thread::Builder::new()
        .name("store-writer".into())
        .spawn(move || writer.run(&receiver))
        .map_err(|source| OpenError::Io {
            action: "start the writer of",
            path: dir.to_owned(),
            source,
        })?;
    Ok(Handle {
        shared,
        recovery,
        queue: Arc::new(Semaphore::new(queue_units)),
        queue_units: queue_units as u32,
        commands: Mutex::new(Some(commands)),
        writer: Mutex::new(Some(writer)),
        _lock: lock,
    })
}

/// The id in the file `store`; where there is none, that of the segments, or a new one.
fn store_id(dir: &Path) -> Result<[u8; 16], OpenError> {
    let path = dir.join("store");
    let failed = |action, source| OpenError::Io { action, path: path.clone(), source };
    match std::fs::read_to_string(&path) {
        Ok(text) => {
            // A volume's id has the same shape: 16 bytes, 32 digits.
            let id = text.trim().parse::<VolumeId>();
            return id
                .map(|id| *id.as_bytes())
                .map_err(|_not_digits| OpenError::Identity { path: path.clone() });
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed("read", error)),
    }
    let id = id_in_segments(&dir.join("segments")).unwrap_or_else(VolumeId::generate);
    write_atomic(&path, format!("{id}\n").as_bytes(), Access::Public)
        .map_err(|error| failed("write", error))?;
    Ok(*id.as_bytes())
}

fn id_in_segments(dir: &Path) -> Option<VolumeId> {
    let files = std::fs::read_dir(dir).ok()?;
    files.flatten().find_map(|file| {
        let mut start = [0u8; SEGMENT_HEADER_BYTES as usize];
        let mut file = std::fs::File::open(file.path()).ok()?;
        std::io::Read::read_exact(&mut file, &mut start).ok()?;
        SegmentHeader::decode(&start).ok().map(|header| VolumeId::from_bytes(header.store))
    })
}

/// The walk over what is not yet indexed.
struct Walk<'a> {
    options: &'a StoreOptions,
    index: Index,
    segments: Segments,
    accounts: Accounts,
    recovery: Recovery,
    staged: Staged,
    staged_records: usize,
    next_seq: u64,
}

impl<'a> Walk<'a> {
    fn new(
        options: &'a StoreOptions,
        index: Index,
        segments: Segments,
    ) -> Result<Walk<'a>, OpenError> {
        Ok(Walk {
            options,
            index,
            segments,
            accounts: Accounts::default(),
            recovery: Recovery::default(),
            staged: Staged::default(),
            staged_records: 0,
            next_seq: 1,
        })
    }

    /// Brings the index up to the end of the last segment.
    fn run(&mut self, is_new: bool) -> Result<Start, OpenError> {
        let numbers = self.segments.numbers()?;
        self.recovery.missing_segments = self.missing_segments(&numbers, is_new);
        let from = self.trusted_start(&numbers)?;
        self.recovery.rebuilt = from.is_none() && !numbers.is_empty();
        let rebuilt = self.recovery.rebuilt;
        let from = from.unwrap_or(Place { segment: 0, offset: SEGMENT_HEADER_BYTES });
        let mut next_segment = from.segment;
        let mut active = None;
        for number in numbers.iter().copied().filter(|number| *number >= from.segment) {
            let is_last = numbers.last() == Some(&number);
            next_segment = number + 1;
            let Some(segment) = self.open_segment(number)? else { continue };
            let offset = if number == from.segment { from.offset } else { SEGMENT_HEADER_BYTES };
            let depth = if is_last || !rebuilt { Depth::Whole } else { Depth::Headers };
            let end = self.walk_segment(&segment, offset, depth, is_last)?;
            self.apply(Place { segment: number, offset: end })?;
            if is_last && end < self.options.segment_bytes {
                active = Some((segment, end));
            }
        }
        if active.is_none() {
            self.apply(Place { segment: next_segment, offset: SEGMENT_HEADER_BYTES })?;
        }
        Ok(Start { active, next_segment, next_seq: self.next_seq })
    }

    /// How many segments with fragments the index knows that are not there.
    fn missing_segments(&self, numbers: &[u32], is_new: bool) -> usize {
        let (Ok(Some(_)), Ok(accounts)) = (self.index.mark(), self.index.accounts()) else {
            return usize::from(!is_new && numbers.is_empty());
        };
        let known = accounts.segments().filter(|(_, account)| !account.is_dead());
        let gone: Vec<u32> = known
            .map(|(number, _)| number)
            .filter(|number| numbers.binary_search(number).is_err())
            .collect();
        if !gone.is_empty() {
            tracing::error!(segments = ?gone, "fragments are gone with their segments");
        }
        gone.len()
    }

    /// Where to begin: behind the mark, if the index speaks of exactly the segments there are.
    fn trusted_start(&mut self, numbers: &[u32]) -> Result<Option<Place>, OpenError> {
        let mark = self.index.mark().unwrap_or_else(|error| {
            tracing::warn!(%error, "the index has no mark");
            None
        });
        let accounts = self.index.accounts().unwrap_or_default();
        if let Some(mark) = mark {
            let known: Vec<u32> = accounts.segments().map(|(number, _)| number).collect();
            let before = |numbers: &[u32]| -> Vec<u32> {
                numbers.iter().copied().filter(|number| *number < mark.place.segment).collect()
            };
            let has_current =
                !known.contains(&mark.place.segment) || numbers.contains(&mark.place.segment);
            let whole = known.iter().all(|number| *number <= mark.place.segment);
            if has_current && whole && before(&known) == before(numbers) {
                self.accounts = accounts;
                self.next_seq = mark.next_seq;
                return Ok(Some(mark.place));
            }
            tracing::warn!("the index speaks of other segments than there are; it is rebuilt");
        }
        self.index.clear()?;
        Ok(None)
    }

    /// Opens a segment; `None` where the file is none and was put aside.
    fn open_segment(&mut self, number: u32) -> Result<Option<Arc<Segment>>, OpenError> {
        match self.segments.open(number) {
            Ok(segment) => Ok(Some(segment)),
            Err(error @ (SegmentError::Header { .. } | SegmentError::Foreign { .. })) => {
                tracing::error!(%error, "put aside");
                self.recovery.set_aside.push(self.segments.set_aside(number)?);
                Ok(None)
            }
            Err(error @ SegmentError::Io { .. }) => Err(error.into()),
        }
    }

    /// Walks one segment; says where its last record ends.
    fn walk_segment(
        &mut self,
        segment: &Arc<Segment>,
        from: u64,
        depth: Depth,
        is_last: bool,
    ) -> Result<u64, OpenError> {
        let failed = |action, source| OpenError::Io { action, path: segment.path.clone(), source };
        // A kill, or a failed fdatasync, leaves records in the page cache. They are on the disk before
        // they are indexed: a put that meets one of them is answered at once.
        if segment.file_bytes().map_err(|source| failed("measure", source))? > from {
            disk::sync_data(&segment.file, &segment.path)
                .map_err(|source| failed("sync", source))?;
        }
        let mut scanner = Scanner::new(Arc::clone(segment), from, depth)
            .map_err(|source| failed("read", source))?;
        let mut end = from;
        // Damaged records that are only the torn end unless a good one follows.
        let mut doubtful: Vec<(Envelope, FragmentHeader)> = Vec::new();
        let mut doubtful_bytes = 0;
        while let Some(found) = scanner.step().map_err(|source| failed("read", source))? {
            match found {
                Found::Unreadable { offset, end } => doubtful_bytes += end - offset,
                Found::Record(envelope, Content::Fragment { header, intact: false }) => {
                    doubtful.push((envelope, header));
                }
                Found::Record(envelope, content) => {
                    self.recovery.unreadable_bytes += std::mem::take(&mut doubtful_bytes);
                    self.take_damaged(segment.number, &mut doubtful)?;
                    end = envelope.offset + envelope.padded_bytes();
                    self.take(segment.number, &envelope, content)?;
                    if self.staged_records >= CHUNK_RECORDS {
                        self.accounts.set_end(segment.number, end);
                        self.apply(Place { segment: segment.number, offset: end })?;
                    }
                }
            }
        }
        let file_bytes = segment.file_bytes().map_err(|source| failed("measure", source))?;
        if is_last {
            if file_bytes > end {
                self.recovery.cut_bytes += file_bytes - end;
                let cut = segment.file.set_len(end);
                let cut = cut.and_then(|()| disk::sync_all(&segment.file, &segment.path));
                cut.map_err(|source| failed("cut", source))?;
            }
        } else {
            self.recovery.unreadable_bytes += doubtful_bytes;
            self.take_damaged(segment.number, &mut doubtful)?;
            end = file_bytes.next_multiple_of(super::format::ALIGN).max(end);
        }
        self.accounts.set_end(segment.number, end);
        self.staged.touch(segment.number);
        Ok(end)
    }

    fn take_damaged(
        &mut self,
        segment: u32,
        doubtful: &mut Vec<(Envelope, FragmentHeader)>,
    ) -> Result<(), OpenError> {
        for (envelope, header) in doubtful.drain(..) {
            self.take(segment, &envelope, Content::Fragment { header, intact: false })?;
        }
        Ok(())
    }

    /// Stages what a record says. Records come in the order in which they were written.
    fn take(
        &mut self,
        segment: u32,
        envelope: &Envelope,
        content: Content,
    ) -> Result<(), OpenError> {
        self.recovery.records += 1;
        self.staged_records += 1;
        self.next_seq = self.next_seq.max(envelope.seq + 1);
        match content {
            Content::Fragment { header, intact } => {
                let current = self.entry(header.id())?;
                let is_newer = current.is_none_or(|entry| entry.seq < envelope.seq);
                if is_newer && (intact || current.is_none()) {
                    self.recovery.damaged += u64::from(!intact);
                    let entry = entry_of(&header, envelope, segment);
                    let entry = Entry { damaged: !intact, ..entry };
                    self.staged.set(header.id(), current, Some(entry));
                }
            }
            Content::Tombstone(id) => {
                let current = self.entry(id)?;
                if current.is_some_and(|entry| entry.seq <= envelope.seq) {
                    self.staged.set(id, current, None);
                }
                let body = envelope.offset + kept_bytes();
                let end = envelope.offset + envelope.padded_bytes();
                // Where the file system has no holes the bytes are dead, not given back.
                if self.segments.open(segment)?.is_hole(body, end) {
                    self.accounts.punch(segment, end - body);
                }
            }
            Content::Trash(ids) => self.set_trashed(&ids, envelope)?,
            Content::Restore(ids) => {
                self.set_trashed(&ids, &Envelope { trashed_at_s: 0, ..*envelope })?
            }
        }
        Ok(())
    }

    fn set_trashed(&mut self, ids: &[FragmentId], envelope: &Envelope) -> Result<(), OpenError> {
        for id in ids {
            let current = self.entry(*id)?;
            if let Some(entry) = current.filter(|entry| entry.seq < envelope.seq) {
                let entry = Entry { trashed_at_s: envelope.trashed_at_s, ..entry };
                self.staged.set(*id, current, Some(entry));
            }
        }
        self.staged_records += ids.len();
        Ok(())
    }

    fn entry(&self, id: FragmentId) -> Result<Option<Entry>, IndexError> {
        self.staged.entry(&self.index, id)
    }

    fn apply(&mut self, place: Place) -> Result<(), OpenError> {
        let staged = std::mem::take(&mut self.staged);
        self.staged_records = 0;
        Ok(self.index.apply(staged, &mut self.accounts, place, self.next_seq)?)
    }
}
