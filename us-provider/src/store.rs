//! The fragment store: append-only segments are the truth, the index is a cache of them.
//!
//! ```text
//!   put, delete, restore          read, combine, verify, inventory
//!        | bounded in bytes            |
//!   +----v-----------------+      +----v-----------+
//!   | writer: one thread   |      | any thread     |
//!   | append, fdatasync,   |----->| index, pread,  |
//!   | index, acknowledge   | index| check          |
//!   +----------------------+      +----------------+
//! ```
//! Invariants:
//! - A put or delete is acknowledged after the fdatasync that covers its record.
//! - Of one id there is one content for ever: other bytes under it are refused, unless what is
//!   stored is damaged.
//! - Every slot that leaves the store was checked against its sum and its id in this read.
//! - What fdatasync did not confirm is never acknowledged later: its segment is closed for ever.
//! - Only the writer changes segments, index and accounts.
//!
//! Callers: `service` (puts, reads), `membership` (deletes, checks, state), `guest` (scrub,
//! maintenance).

pub mod accounts;
pub mod format;
pub mod index;
mod maintain;
mod open;
mod read;
pub mod scan;
mod segments;
mod space;
mod writer;

#[cfg(test)]
#[path = "../samples/record.rs"]
pub(crate) mod record;
#[cfg(test)]
mod tests;

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::SyncSender;
use std::thread::JoinHandle;
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::{Semaphore, oneshot};
use us_core::code::CodeError;
use us_core::daemon::files::LockError;
use us_core::fragment::{FragmentError, FragmentRecord};
use us_core::ids::FragmentId;

use index::{Entry, IndexError};
pub use maintain::{MaintainLimits, Maintained, Scrubbed};
pub use open::Recovery;
pub use read::{Read, ReadRequest};
pub use segments::{HANDLES_MAX, SegmentError};
pub use space::StoreState;
use writer::Command;

/// Deletes and checks name at most this many fragments at a time.
pub const IDS_MAX: usize = format::CONTROL_IDS_MAX;
/// What a queued put is charged at least; with the queue's bytes this bounds its length too.
const CHARGE_BYTES: usize = 4096;

/// How a store works.
#[derive(Clone)]
pub struct StoreOptions {
    /// Bytes the store may take on the disk; `None`: only the reserve limits it.
    pub capacity_bytes: Option<u64>,
    /// Bytes that must stay free on the disk.
    pub reserve_bytes: u64,
    /// Bytes of a segment, about.
    pub segment_bytes: u64,
    /// Bytes of puts that may wait for the writer.
    pub queue_bytes: usize,
    /// Bytes the writer makes durable with one fdatasync, at most.
    pub batch_bytes: usize,
    /// How long a deleted fragment can be restored.
    pub trash_keep_s: u64,
    /// How long a deleted fragment can still be read: two lease times.
    pub trash_readable_s: u64,
    /// Memory of the index.
    pub index_cache_bytes: u64,
    /// Whether bodies of purged fragments are punched out of their segment. Where the disk cannot,
    /// segments are compacted instead.
    pub punch_holes: bool,
    /// Unix time in seconds.
    pub clock: Clock,
    /// Every sync fails while this is set.
    #[cfg(test)]
    pub(crate) fail_sync: Arc<std::sync::atomic::AtomicBool>,
    /// Offsets of envelopes that the disk does not give back.
    #[cfg(test)]
    pub(crate) bad_sectors: Arc<Mutex<std::collections::BTreeSet<u64>>>,
}

/// Where the store takes the time from.
pub type Clock = Arc<dyn Fn() -> u64 + Send + Sync>;

impl fmt::Debug for StoreOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StoreOptions")
            .field("capacity_bytes", &self.capacity_bytes)
            .field("reserve_bytes", &self.reserve_bytes)
            .field("segment_bytes", &self.segment_bytes)
            .finish_non_exhaustive()
    }
}

impl Default for StoreOptions {
    fn default() -> Self {
        Self {
            capacity_bytes: None,
            reserve_bytes: 0,
            segment_bytes: 256 << 20,
            queue_bytes: 64 << 20,
            batch_bytes: 32 << 20,
            trash_keep_s: 7 * 24 * 3600,
            trash_readable_s: 60,
            index_cache_bytes: 32 << 20,
            punch_holes: true,
            clock: Arc::new(|| {
                SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
            }),
            #[cfg(test)]
            fail_sync: Arc::default(),
            #[cfg(test)]
            bad_sectors: Arc::default(),
        }
    }
}

/// Why the store did not do what it was asked.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StoreError {
    /// It does not hold the fragment.
    #[error("no fragment {id} here")]
    NotFound {
        /// The fragment.
        id: FragmentId,
    },
    /// It holds the fragment, but its bytes are not those that were put.
    #[error("fragment {id} is damaged: {detail}")]
    Damaged {
        /// The fragment.
        id: FragmentId,
        /// What does not hold.
        detail: String,
    },
    /// Other bytes are stored under this id.
    #[error("fragment {id} is stored with other bytes: fragments are written once")]
    Refused {
        /// The fragment.
        id: FragmentId,
    },
    /// The cap, the reserve or the disk is reached.
    #[error("no space for {needed_bytes} bytes: {free_bytes} are free")]
    NoSpace {
        /// Bytes that were to be written.
        needed_bytes: u64,
        /// Bytes that may be.
        free_bytes: u64,
    },
    /// The disk failed.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was being done.
        action: &'static str,
        /// To what.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: Arc<io::Error>,
    },
    /// A segment does not open.
    #[error("{0}")]
    Segment(#[source] Arc<SegmentError>),
    /// The bytes to put are not a fragment's record.
    #[error("not a fragment: {0}")]
    Invalid(#[from] FragmentError),
    /// A combination that makes no sense.
    #[error("cannot combine: {0}")]
    Combine(#[from] CodeError),
    /// Fragments of different shapes, or too many, in one request.
    #[error("{detail}")]
    Request {
        /// What is wrong.
        detail: &'static str,
    },
    /// The index failed; the segments are not affected.
    #[error("{0}")]
    Index(#[from] IndexError),
    /// Too much is under way; later there is room.
    #[error("too many reads at once")]
    Busy,
    /// The store is closed, or its writer has stopped.
    #[error("the store is closed")]
    Closed,
}

/// Why a store does not open.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another process has it.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// A file of the store cannot be read or written.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was being done.
        action: &'static str,
        /// To what.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The file that says which store this is makes no sense.
    #[error("{} does not name a store: it must hold 32 hexadecimal digits", path.display())]
    Identity {
        /// The file.
        path: PathBuf,
    },
    /// A segment cannot be read.
    #[error(transparent)]
    Segment(#[from] SegmentError),
    /// Not even an empty index can be made.
    #[error(transparent)]
    Index(#[from] IndexError),
}

/// What became of a put.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PutOutcome {
    /// It is stored now.
    Stored,
    /// The same bytes were there.
    Present,
}

/// One line of the inventory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct InventoryEntry {
    /// The fragment.
    pub id: FragmentId,
    /// What the index knows of it.
    pub entry: Entry,
}

/// An open store. Cheap to clone; the last clone (or [`Store::close`]) ends it.
#[derive(Clone, Debug)]
pub struct Store {
    handle: Arc<Handle>,
}

/// What readers and the writer share.
#[derive(Debug)]
struct Shared {
    dir: PathBuf,
    id: [u8; 16],
    options: StoreOptions,
    index: index::Index,
    segments: segments::Segments,
    fronts: read::Fronts,
    accounts: Mutex<accounts::Accounts>,
    /// Why puts fail; `None` while they do not.
    trouble: Mutex<Option<String>>,
    /// Records that were forgotten and could not be marked as gone: no compaction takes them for lost.
    unmarked: Mutex<std::collections::BTreeSet<index::Place>>,
    /// Segments that could not be compacted, with the fragments they then had: left alone until that
    /// changes.
    stuck: Mutex<std::collections::BTreeMap<u32, u64>>,
    /// The damage found since it was last taken, bounded by [`space::FRESH_DAMAGE_MAX`].
    fresh_damage: Mutex<Vec<FragmentId>>,
}

#[derive(Debug)]
struct Handle {
    shared: Arc<Shared>,
    recovery: Recovery,
    queue: Arc<Semaphore>,
    queue_units: u32,
    commands: Mutex<Option<SyncSender<Command>>>,
    writer: Mutex<Option<JoinHandle<()>>>,
    _lock: us_core::daemon::files::DirLock,
}

impl Store {
    /// Opens the store in `dir`, made where there is none. Blocks until every record is indexed.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn open(dir: &Path, options: StoreOptions) -> Result<Self, OpenError> {
        open::open(dir, options).map(|handle| Self { handle: Arc::new(handle) })
    }

    /// The store's own id, made with it.
    pub fn id(&self) -> [u8; 16] {
        self.handle.shared.id
    }

    /// The folder it lies in.
    pub fn dir(&self) -> &Path {
        &self.handle.shared.dir
    }

    /// What was found when it opened.
    pub fn recovery(&self) -> &Recovery {
        &self.handle.recovery
    }

    /// Stores a fragment's record; it is durable when this returns. The record is checked whole
    /// first. Waits while the queue is full. The record is shared, not copied.
    ///
    /// # Errors
    /// [`StoreError::Invalid`], [`StoreError::Refused`], [`StoreError::NoSpace`],
    /// [`StoreError::Io`], [`StoreError::Closed`].
    pub async fn put(&self, record: Bytes) -> Result<PutOutcome, StoreError> {
        let decoded = FragmentRecord::decode(record.clone())?;
        decoded.verify_body()?;
        let units = record.len().div_ceil(CHARGE_BYTES) as u32;
        let units = units.clamp(1, self.handle.queue_units);
        let permit = Arc::clone(&self.handle.queue)
            .acquire_many_owned(units)
            .await
            .map_err(|_closed| StoreError::Closed)?;
        let (reply, answer) = oneshot::channel();
        self.send(Command::Put { header: decoded.header, record, permit, reply })?;
        answer.await.map_err(|_closed| StoreError::Closed)?
    }

    /// As [`Store::put`], for threads outside a runtime.
    ///
    /// # Errors
    /// As [`Store::put`].
    pub fn put_blocking(&self, record: Bytes) -> Result<PutOutcome, StoreError> {
        futures::executor::block_on(self.put(record))
    }

    /// Puts fragments into the trash; durable when this returns. Those not here are skipped. Says
    /// how many were.
    ///
    /// # Errors
    /// [`StoreError::Request`] for more than [`IDS_MAX`], [`StoreError::Io`],
    /// [`StoreError::Closed`].
    pub async fn delete(&self, ids: Vec<FragmentId>) -> Result<usize, StoreError> {
        check_count(&ids)?;
        self.ask(|reply| Command::Trash { ids, reply }).await
    }

    /// Takes fragments out of the trash; durable when this returns. Says how many were in it.
    ///
    /// # Errors
    /// As [`Store::delete`].
    pub async fn restore(&self, ids: Vec<FragmentId>) -> Result<usize, StoreError> {
        check_count(&ids)?;
        self.ask(|reply| Command::Restore { ids, reply }).await
    }

    /// Up to `limit` fragments in key order, after `after`; the trash included. Blocks.
    ///
    /// # Errors
    /// [`StoreError::Index`].
    pub fn inventory(
        &self,
        after: Option<FragmentId>,
        limit: usize,
    ) -> Result<Vec<InventoryEntry>, StoreError> {
        let page = self.handle.shared.index.page(after, limit)?;
        Ok(page.into_iter().map(|(id, entry)| InventoryEntry { id, entry }).collect())
    }

    /// Ends the store: what is queued is written, and the index is closed so that the next start is
    /// quick. Other clones of it answer [`StoreError::Closed`] from then on. Blocks.
    pub fn close(&self) {
        self.handle.close();
    }

    /// Notes that the index must be rebuilt at the next start: for a program that panics.
    pub fn distrust_index(&self) {
        self.handle.shared.index.distrust();
    }

    fn send(&self, command: Command) -> Result<(), StoreError> {
        let commands = self.handle.commands.lock().clone().ok_or(StoreError::Closed)?;
        commands.send(command).map_err(|_stopped| StoreError::Closed)
    }

    async fn ask<T>(
        &self,
        command: impl FnOnce(oneshot::Sender<Result<T, StoreError>>) -> Command,
    ) -> Result<T, StoreError> {
        let permit = Arc::clone(&self.handle.queue)
            .acquire_owned()
            .await
            .map_err(|_closed| StoreError::Closed)?;
        let (reply, answer) = oneshot::channel();
        self.send(command(reply))?;
        let answer = answer.await.map_err(|_closed| StoreError::Closed)?;
        drop(permit);
        answer
    }

    fn ask_blocking<T>(
        &self,
        command: impl FnOnce(oneshot::Sender<Result<T, StoreError>>) -> Command,
    ) -> Result<T, StoreError> {
        futures::executor::block_on(self.ask(command))
    }
}

fn check_count(ids: &[FragmentId]) -> Result<(), StoreError> {
    if ids.len() > IDS_MAX {
        return Err(StoreError::Request { detail: "more than 4096 fragments named at once" });
    }
    Ok(())
}

impl Handle {
    fn close(&self) {
        self.queue.close();
        drop(self.commands.lock().take());
        let writer = self.writer.lock().take();
        if writer.is_some_and(|writer| writer.join().is_err()) {
            tracing::error!("the store's writer had panicked");
            self.shared.index.distrust();
        }
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.close();
    }
}
