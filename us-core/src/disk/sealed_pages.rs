//! Sealed pages kept on this machine's disk, so that what was read once need not come from the swarm
//! again, also after a restart.
//!
//! ```text
//! DIR/lock
//! DIR/00000007.pages   sealed pages, one behind the other
//! DIR/00000007.index   which they are; written when the segment is full, now and then before, and at the end
//! ```
//! docs/formats.md draws the index. What lies there is what lies at the providers: ciphertext, of which
//! every page is bound to its block and number. So nothing here is believed: a page that fails its seal is
//! not there. Blocks never change and ids are never used twice, so nothing here is ever out of date.
//!
//! Who calls it: flights, before they ask providers; and the opening of what came. Pages are written by a
//! thread of its own from a short queue; what does not fit into the queue is not kept. What may fail:
//! only [`SealedPages::open`]. An error of the disk costs a miss, and writing then pauses.
//!
//! Invariant: no more than `bytes_max` and one segment lie in the folder.

mod index;

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::Mutex;

use self::index::{Entry, Index, Segment, key_of};
use super::read::PageKey;
use crate::daemon::files::{Access, DirLock, LockError, write_atomic};
use crate::fragment::crc32c;

/// The least that can be kept.
pub const SEALED_PAGES_BYTES_MIN: u64 = 16 << 20;
/// Pages that wait to be written; what comes beyond is not kept.
const QUEUE_PAGES_MAX: usize = 512;
/// Segments of a full folder, and the bounds of their size.
const SEGMENTS: u64 = 64;
const SEGMENT_BYTES: std::ops::RangeInclusive<u64> = 1 << 20..=128 << 20;
/// After so many bytes the index of the segment that is being filled is written too: what a kill costs.
const INDEX_EVERY_BYTES: u32 = 16 << 20;
/// How long nothing is written after an error of the disk.
const PAUSE: Duration = Duration::from_secs(60);

/// Numbers beyond make the folder begin anew.
const SEGMENT_MAX: u32 = 99_999_999;
const MAGIC: [u8; 8] = *b"USPAGES1";
const HEAD_BYTES: usize = 12;
const ENTRY_BYTES: usize = 16;

/// The `.pages` files by their segments' numbers.
type Files = HashMap<u32, Arc<File>>;

/// Why there is no cache on disk.
#[derive(Debug, thiserror::Error)]
pub enum SealedPagesError {
    /// Another mount uses the folder, or it cannot be made.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// It would be too small to be of use.
    #[error("a cache of {bytes} bytes is too small: at least {SEALED_PAGES_BYTES_MIN}")]
    TooSmall {
        /// What was asked for.
        bytes: u64,
    },
    /// The folder cannot be read or written.
    #[error("cannot use {}: {source}", path.display())]
    Io {
        /// The folder, or the file in it.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
}

/// Pages of one volume. Cheap to clone.
#[derive(Clone)]
pub struct SealedPages {
    kept: Arc<Kept>,
}

struct Kept {
    dir: PathBuf,
    state: Mutex<State>,
    queue: Mutex<Option<SyncSender<(PageKey, Bytes)>>>,
    writer: Mutex<Option<JoinHandle<()>>>,
}

struct State {
    index: Index,
    files: Files,
}

impl std::fmt::Debug for SealedPages {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("SealedPages").field(&self.kept.dir).finish()
    }
}

impl SealedPages {
    /// What `dir` has, and room for `bytes_max` altogether. The folder is made where it is not there; it
    /// is for one volume and one mount. Blocks.
    ///
    /// # Errors
    /// [`SealedPagesError`].
    pub fn open(dir: &Path, bytes_max: u64) -> Result<Self, SealedPagesError> {
        if bytes_max < SEALED_PAGES_BYTES_MIN {
            return Err(SealedPagesError::TooSmall { bytes: bytes_max });
        }
        let lock = DirLock::take(dir)?;
        let io_error = |source| SealedPagesError::Io { path: dir.to_owned(), source };
        let (segments, mut files) = find(dir).map_err(io_error)?;
        let segment_bytes =
            (bytes_max / SEGMENTS).clamp(*SEGMENT_BYTES.start(), *SEGMENT_BYTES.end());
        let mut index = Index::new(bytes_max, segment_bytes as u32, segments);
        // There may have been room for more.
        while let Some((segment, _)) = index.evict() {
            files.remove(&segment);
            remove(dir, segment);
        }
        let first = index.filling().number;
        files.insert(first, Arc::new(create(dir, first).map_err(io_error)?));
        let state = Mutex::new(State { index, files });
        let (queue, pages) = sync_channel(QUEUE_PAGES_MAX);
        let queue = Mutex::new(Some(queue));
        let kept = Arc::new(Kept { dir: dir.to_owned(), state, queue, writer: Mutex::new(None) });
        let mut writer =
            Writer { kept: Arc::clone(&kept), _lock: lock, paused: None, unindexed: 0 };
        let thread = std::thread::Builder::new().name("sealed-pages".to_owned());
        let thread = thread.spawn(move || writer.run(&pages)).map_err(io_error)?;
        *kept.writer.lock() = Some(thread);
        Ok(Self { kept })
    }

    /// Keeps a page, unless it is kept or too many wait to be.
    pub(super) fn keep(&self, key: PageKey, sealed: Bytes) {
        if self.kept.state.lock().index.knows(key_of(&key)) {
            return;
        }
        if let Some(queue) = &*self.kept.queue.lock() {
            // A full queue: the disk is slower than the swarm, and need not have everything.
            let _ = queue.try_send((key, sealed));
        }
    }

    /// Whether a page may be here. Does not block.
    pub(super) fn knows(&self, key: &PageKey) -> bool {
        self.kept.state.lock().index.knows(key_of(key))
    }

    /// Reads a page of `bytes` sealed bytes. What comes is not proven to be that page. Blocks.
    pub(super) fn load(&self, key: &PageKey, bytes: usize) -> Option<Bytes> {
        let key = key_of(key);
        let (place, file) = {
            let mut state = self.kept.state.lock();
            let place = state.index.find(key, u32::try_from(bytes).ok()?)?;
            (place, Arc::clone(state.files.get(&place.segment)?))
        };
        let mut page = vec![0; bytes];
        match file.read_exact_at(&mut page, u64::from(place.offset)) {
            Ok(()) => Some(page.into()),
            Err(error) => {
                tracing::debug!(%error, "a page cannot be read from the cache on disk");
                self.kept.state.lock().index.forget(key, place);
                None
            }
        }
    }

    /// The page that [`SealedPages::load`] gave is not what it should be.
    pub(super) fn forget(&self, key: &PageKey, bytes: usize) {
        let key = key_of(key);
        let mut state = self.kept.state.lock();
        let place = u32::try_from(bytes).ok().and_then(|bytes| state.index.find(key, bytes));
        if let Some(place) = place {
            state.index.forget(key, place);
        }
    }

    /// Writes down what is kept, for the next start. Nothing is kept from now on. Blocks.
    pub fn close(&self) {
        drop(self.kept.queue.lock().take());
        if let Some(writer) = self.kept.writer.lock().take() {
            // One that panicked has aborted the process.
            let _ = writer.join();
        }
    }
}

/// How many pages an index file tells of, beside a segment of `pages_bytes`; `None` where it is none.
pub fn indexed_pages(index: &[u8], pages_bytes: u64) -> Option<usize> {
    decode(1, index, pages_bytes).map(|segment| segment.entries.len())
}

fn pages_path(dir: &Path, segment: u32) -> PathBuf {
    dir.join(format!("{segment:08}.pages"))
}

fn index_path(dir: &Path, segment: u32) -> PathBuf {
    dir.join(format!("{segment:08}.index"))
}

fn create(dir: &Path, segment: u32) -> io::Result<File> {
    let mut options = File::options();
    options.read(true).write(true).create(true).truncate(true).open(pages_path(dir, segment))
}

/// What earlier runs left. A segment without a whole index is removed; other files are not ours.
fn find(dir: &Path) -> io::Result<(Vec<Segment>, Files)> {
    let (mut segments, mut files) = (Vec::new(), HashMap::new());
    for entry in fs::read_dir(dir)? {
        let name = entry?.file_name();
        let Some((number, kind)) = name.to_str().and_then(|name| name.split_once('.')) else {
            continue;
        };
        let (Ok(number), "pages" | "index") = (number.parse::<u32>(), kind) else { continue };
        let ours = [pages_path(dir, number), index_path(dir, number)];
        if !ours.iter().any(|path| path.file_name() == Some(&*name)) || files.contains_key(&number)
        {
            continue;
        }
        match find_segment(dir, number) {
            Some((segment, file)) if number < SEGMENT_MAX => {
                files.insert(number, Arc::new(file));
                segments.push(segment);
            }
            _ => remove(dir, number),
        }
    }
    Ok((segments, files))
}

/// A segment that is whole.
fn find_segment(dir: &Path, number: u32) -> Option<(Segment, File)> {
    let index = fs::read(index_path(dir, number)).ok()?;
    let file = File::open(pages_path(dir, number)).ok()?;
    let bytes = file.metadata().ok()?.len();
    Some((decode(number, &index, bytes)?, file))
}

fn remove(dir: &Path, segment: u32) {
    for path in [index_path(dir, segment), pages_path(dir, segment)] {
        if let Err(error) = fs::remove_file(&path)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(%error, path = %path.display(), "the cache on disk cannot be cleared");
        }
    }
}

fn encode(segment: &Segment) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEAD_BYTES + segment.entries.len() * ENTRY_BYTES + 4);
    bytes.extend(MAGIC);
    bytes.extend((segment.entries.len() as u32).to_le_bytes());
    for entry in &segment.entries {
        bytes.extend(entry.key.to_le_bytes());
        bytes.extend(entry.offset.to_le_bytes());
        bytes.extend(entry.length.to_le_bytes());
    }
    let sum = crc32c(&bytes);
    bytes.extend(sum.to_le_bytes());
    bytes
}

/// The segment that an index file tells of, of which `pages_bytes` lie there; `None` for any other bytes.
fn decode(number: u32, bytes: &[u8], pages_bytes: u64) -> Option<Segment> {
    let (body, sum) = bytes.split_last_chunk::<4>()?;
    let (head, list) = body.split_at_checked(HEAD_BYTES)?;
    let count = u32::from_le_bytes(head[8..].try_into().ok()?) as usize;
    let whole = head[..8] == MAGIC
        && list.len() == count.checked_mul(ENTRY_BYTES)?
        && crc32c(body) == u32::from_le_bytes(*sum);
    if !whole {
        return None;
    }
    let mut segment = Segment { number, ..Segment::default() };
    for entry in list.chunks_exact(ENTRY_BYTES) {
        let word = |at: usize| entry[at..at + 4].try_into().map(u32::from_le_bytes).ok();
        let key = u64::from_le_bytes(entry[..8].try_into().ok()?);
        let (offset, length) = (word(8)?, word(12)?);
        // Pages lie one behind the other.
        if offset != segment.bytes {
            return None;
        }
        segment.bytes = offset.checked_add(length)?;
        segment.entries.push(Entry { key, offset, length });
    }
    (u64::from(segment.bytes) <= pages_bytes).then_some(segment)
}

/// The thread that writes.
struct Writer {
    kept: Arc<Kept>,
    _lock: DirLock,
    paused: Option<Instant>,
    /// Bytes of the segment that is being filled which its index does not have yet.
    unindexed: u32,
}

impl Writer {
    fn run(&mut self, pages: &Receiver<(PageKey, Bytes)>) {
        while let Ok((key, sealed)) = pages.recv() {
            if self.paused.is_some_and(|until| Instant::now() < until) {
                continue;
            }
            self.paused = None;
            if let Err(error) = self.write(key_of(&key), &sealed) {
                tracing::warn!(
                    %error, dir = %self.kept.dir.display(),
                    "the cache on disk cannot be written; it is let alone for a minute"
                );
                self.paused = Some(Instant::now() + PAUSE);
                self.make_room();
            }
        }
        if let Err(error) = self.write_index() {
            tracing::warn!(%error, "what the cache on disk has got last is lost");
        }
    }

    fn write(&mut self, key: u64, sealed: &[u8]) -> io::Result<()> {
        if self.kept.state.lock().index.knows(key) {
            return Ok(());
        }
        self.append(key, sealed)?;
        if self.kept.state.lock().index.is_full() {
            self.begin_next()?;
        }
        loop {
            let evicted = self.kept.state.lock().index.evict();
            let Some((segment, stay)) = evicted else { return Ok(()) };
            self.take_out(segment, &stay)?;
        }
    }

    /// Writes a page behind all others of the segment that is being filled. Only this thread adds, so the
    /// place cannot change meanwhile.
    fn append(&mut self, key: u64, sealed: &[u8]) -> io::Result<()> {
        let (at, file) = {
            let state = self.kept.state.lock();
            let filling = state.index.filling();
            let file = state.files.get(&filling.number).map(Arc::clone);
            (filling.bytes, file.ok_or(io::ErrorKind::NotFound)?)
        };
        file.write_all_at(sealed, u64::from(at))?;
        self.kept.state.lock().index.add(key, sealed.len() as u32);
        self.unindexed += sealed.len() as u32;
        if self.unindexed >= INDEX_EVERY_BYTES {
            self.write_index()?;
        }
        Ok(())
    }

    fn write_index(&mut self) -> io::Result<()> {
        let (number, bytes) = {
            let state = self.kept.state.lock();
            let filling = state.index.filling();
            (filling.number, encode(filling))
        };
        self.unindexed = 0;
        write_atomic(&index_path(&self.kept.dir, number), &bytes, Access::Secret)
    }

    fn begin_next(&mut self) -> io::Result<()> {
        self.write_index()?;
        let next = self.kept.state.lock().index.filling().number + 1;
        let file = Arc::new(create(&self.kept.dir, next)?);
        let mut state = self.kept.state.lock();
        state.files.insert(next, file);
        state.index.begin_next();
        Ok(())
    }

    /// Removes a segment, and writes again what stays of it.
    fn take_out(&mut self, segment: u32, stay: &[Entry]) -> io::Result<()> {
        let file = self.kept.state.lock().files.remove(&segment);
        remove(&self.kept.dir, segment);
        let Some(file) = file else { return Ok(()) };
        for entry in stay {
            let mut page = vec![0; entry.length as usize];
            if file.read_exact_at(&mut page, u64::from(entry.offset)).is_ok() {
                self.append(entry.key, &page)?;
            }
        }
        Ok(())
    }

    /// Gives the disk a segment back.
    fn make_room(&self) {
        let dropped = self.kept.state.lock().index.drop_oldest();
        if let Some((segment, _)) = dropped {
            self.kept.state.lock().files.remove(&segment);
            remove(&self.kept.dir, segment);
        }
    }
}

#[cfg(test)]
mod tests;
