//! The one thread that changes the store.
//!
//! ```text
//! take one command, and all that have come meanwhile, up to a batch
//!   -> stage: decide, number, envelope           nothing is visible yet
//!   -> commit: pwritev, fdatasync, index         now it is
//!   -> acknowledge all
//! ```
//! While it waits for the disk the next commands gather, so the batch grows with the load.
//!
//! A failed write or fdatasync fails the whole batch: none of it was visible, none is acknowledged,
//! and the segment gets no further record. A full disk is no failure: the batch's bytes are cut off
//! again and its puts answered "no space".

mod batch;
mod control;
mod stage;

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::num::NonZeroU64;
use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, oneshot};
use us_core::daemon::disk;
use us_core::fragment::FragmentHeader;
use us_core::ids::FragmentId;

use super::format::SEGMENT_HEADER_BYTES;
use super::index::{Entry, Place, Staged};
use super::segments::{Segment, SegmentError};
use super::{PutOutcome, Shared, StoreError};
use batch::Batch;
pub(super) use stage::{entry_of, kept_bytes};

/// Commands taken into one batch at most.
const BATCH_COMMANDS_MAX: usize = 4096;
/// After this time without a command the index is told to write itself out.
const IDLE: Duration = Duration::from_secs(5);

/// An answer to be sent.
pub(super) type Reply<T> = oneshot::Sender<Result<T, StoreError>>;

/// What the writer can be asked. Whoever sends one holds a permit of the queue.
#[derive(Debug)]
pub(super) enum Command {
    /// Store this record, which was verified.
    Put {
        header: FragmentHeader,
        record: Bytes,
        permit: OwnedSemaphorePermit,
        reply: Reply<PutOutcome>,
    },
    /// Put these into the trash.
    Trash { ids: Vec<FragmentId>, reply: Reply<usize> },
    /// Take these out of it.
    Restore { ids: Vec<FragmentId>, reply: Reply<usize> },
    /// Write the control records of a segment that is to go again, as far as they still matter.
    Carry { ids: Vec<FragmentId>, from_segment: u32, reply: Reply<usize> },
    /// Write a fragment again that lies in a segment that is to go, if the index still says of it
    /// what it did: that it lies there, or nothing.
    Move { entry: Entry, known: Option<Place>, record: Bytes, reply: Reply<bool> },
    /// Give back the space of these, if they are in the trash. Says how many were.
    Purge { ids: Vec<FragmentId>, reply: Reply<usize> },
    /// Remove a segment in which nothing counts.
    Remove { segment: u32, reply: Reply<bool> },
    /// Close the segment being written, so that it can be compacted.
    Seal { reply: Reply<()> },
    /// Write and sync a record that says nothing: does the disk work again?
    Probe { reply: Reply<()> },
    /// The record at this place was found damaged.
    Damaged { id: FragmentId, place: Place },
}

/// The segment being written.
#[derive(Debug)]
pub(super) struct Active {
    segment: Arc<Segment>,
    offset: u64,
}

/// Where writing goes on after an open.
#[derive(Debug)]
pub(super) struct Start {
    /// The last segment, if more fits into it, and where its last record ends.
    pub active: Option<(Arc<Segment>, u64)>,
    /// The number of the next segment.
    pub next_segment: u32,
    /// The number of the next record.
    pub next_seq: u64,
}

#[derive(Debug)]
pub(super) struct Writer {
    shared: Arc<Shared>,
    active: Option<Active>,
    next_segment: u32,
    next_seq: u64,
    /// The index failed: nothing more is believed or changed.
    broken: Option<StoreError>,
    /// Segments whose accounts changed outside a batch.
    touched: Vec<u32>,
    /// Segments in which a purge has failed: what is purged there now only becomes dead bytes.
    unburied: BTreeSet<u32>,
}

impl Writer {
    pub(super) fn new(shared: Arc<Shared>, start: Start) -> Self {
        let active = start.active.map(|(segment, offset)| Active { segment, offset });
        let Start { next_segment, next_seq, .. } = start;
        let (broken, touched, unburied) = (None, Vec::new(), BTreeSet::new());
        Self { shared, active, next_segment, next_seq, broken, touched, unburied }
    }

    /// Works until every sender is gone, then closes the index.
    pub(super) fn run(mut self, commands: &Receiver<Command>) {
        let mut left_over = None;
        loop {
            let first = match left_over.take() {
                Some(command) => command,
                None => match commands.recv_timeout(IDLE) {
                    Ok(command) => command,
                    Err(RecvTimeoutError::Timeout) => continue,
                    Err(RecvTimeoutError::Disconnected) => break,
                },
            };
            left_over = self.round(first, commands);
        }
        if self.broken.is_none()
            && let Err(error) = self.shared.index.close()
        {
            tracing::warn!(%error, "the index is not closed");
            self.shared.index.distrust();
        }
    }

    /// One batch. Returns a command that must wait for the next one.
    fn round(&mut self, first: Command, commands: &Receiver<Command>) -> Option<Command> {
        let mut batch = Batch::default();
        let mut next = Some(first);
        let mut left_over = None;
        let mut count = 0;
        while let Some(command) = next.take() {
            count += 1;
            if let Some(command) = self.stage(&mut batch, command) {
                left_over = Some(command);
                break;
            }
            if batch.bytes() >= self.shared.options.batch_bytes as u64
                || count >= BATCH_COMMANDS_MAX
            {
                break;
            }
            next = commands.try_recv().ok();
        }
        self.commit(batch);
        match left_over {
            Some(command) if Self::stands_alone(&command) => {
                self.alone(command);
                None
            }
            other => {
                if other.is_some() {
                    // It did not fit: the next batch begins a segment.
                    self.active = None;
                }
                other
            }
        }
    }

    /// Makes a batch durable and visible, and answers.
    fn commit(&mut self, mut batch: Batch) {
        if batch.is_empty() {
            batch.answer(Ok(()));
            return;
        }
        let begun = Instant::now();
        let result = self.write(&mut batch).and_then(|()| self.publish(&mut batch));
        metrics::histogram!("us_provider_commit_seconds").record(begun.elapsed().as_secs_f64());
        self.note(result.as_ref().err());
        let superseded = if result.is_ok() { batch.take_superseded() } else { Vec::new() };
        batch.answer(result);
        self.bury(&superseded);
    }

    /// Appends and syncs the batch's records. Nothing but files changes.
    fn write(&mut self, batch: &mut Batch) -> Result<(), StoreError> {
        if batch.bytes() == 0 {
            return Ok(());
        }
        let active = self.active.as_ref().ok_or(StoreError::Closed)?;
        let failed = |action, source: io::Error| StoreError::Io {
            action,
            path: active.segment.path.clone(),
            source: Arc::new(source),
        };
        let begun = Instant::now();
        let written = batch.write_to(&active.segment.file, active.offset);
        let end = active.offset + batch.bytes();
        match written {
            Ok(()) => {}
            Err(error) if is_full(&error) && active.segment.file.set_len(active.offset).is_ok() => {
                let free_bytes = self.shared.free_bytes(self.shared.used_bytes());
                return Err(StoreError::NoSpace { needed_bytes: batch.bytes(), free_bytes });
            }
            Err(error) => {
                let error = failed("write", error);
                self.abandon();
                return Err(error);
            }
        }
        metrics::histogram!("us_provider_write_seconds").record(begun.elapsed().as_secs_f64());
        let begun = Instant::now();
        if let Err(error) = self.sync(&active.segment) {
            let error = failed("sync", error);
            self.abandon();
            return Err(error);
        }
        if batch.is_bulk() {
            leave_cache(&active.segment.file, active.offset..end);
        }
        metrics::counter!("us_provider_fsyncs_total").increment(1);
        metrics::histogram!("us_provider_fsync_seconds").record(begun.elapsed().as_secs_f64());
        if let Some(active) = &mut self.active {
            active.offset = end;
        }
        Ok(())
    }

    fn sync(&self, segment: &Segment) -> io::Result<()> {
        #[cfg(test)]
        if self.shared.options.fail_sync.load(std::sync::atomic::Ordering::Relaxed) {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        disk::sync_data(&segment.file, &segment.path)
    }

    /// Brings index and accounts up to what is durable.
    fn publish(&mut self, batch: &mut Batch) -> Result<(), StoreError> {
        let staged = batch.take_staged();
        self.apply(staged)
    }

    fn apply(&mut self, mut staged: Staged) -> Result<(), StoreError> {
        let place = match &self.active {
            Some(active) => Place { segment: active.segment.number, offset: active.offset },
            None => Place { segment: self.next_segment, offset: SEGMENT_HEADER_BYTES },
        };
        self.touched.drain(..).for_each(|number| staged.touch(number));
        let mut accounts = self.shared.accounts.lock();
        if let Some(active) = &self.active {
            accounts.set_end(place.segment, active.offset);
            staged.touch(place.segment);
        }
        let applied = self.shared.index.apply(staged, &mut accounts, place, self.next_seq);
        drop(accounts);
        applied.map_err(|error| {
            let error = StoreError::Index(error);
            self.shared.index.distrust();
            self.broken = Some(error.clone());
            error
        })
    }

    /// Never writes to the active segment again. What was refused is cut off it, so that no later
    /// start finds it.
    fn abandon(&mut self) {
        let Some(active) = self.active.take() else { return };
        if let Err(error) = active.segment.file.set_len(active.offset) {
            tracing::error!(%error, path = %active.segment.path.display(), "cannot be cut");
        }
        let mut accounts = self.shared.accounts.lock();
        let bytes = active.segment.file_bytes().unwrap_or(active.offset).max(active.offset);
        accounts.set_end(active.segment.number, bytes);
        self.touched.push(active.segment.number);
        tracing::error!(path = %active.segment.path.display(), "segment closed after a failure");
    }

    /// Keeps for people why puts fail, as long as they do.
    fn note(&self, error: Option<&StoreError>) {
        let trouble = match error {
            Some(
                error @ (StoreError::Io { .. } | StoreError::Segment(_) | StoreError::Index(_)),
            ) => {
                tracing::error!(%error, "the store cannot write");
                metrics::counter!("us_provider_write_failures_total").increment(1);
                Some(error.to_string())
            }
            Some(_) => return,
            None => None,
        };
        *self.shared.trouble.lock() = trouble;
    }

    /// The segment to append to, with room for `bytes`; a new one where there is none.
    /// `Ok(None)`: there is one, but it has no room, and the batch's earlier records go first.
    fn room(
        &mut self,
        batch: &Batch,
        bytes: u64,
    ) -> Result<Option<(Arc<Segment>, u64)>, StoreError> {
        let segment_bytes = self.shared.options.segment_bytes;
        if let Some(active) = &self.active {
            let offset = active.offset + batch.bytes();
            if offset + bytes <= segment_bytes || offset == SEGMENT_HEADER_BYTES {
                return Ok(Some((Arc::clone(&active.segment), offset)));
            }
            if batch.bytes() > 0 {
                return Ok(None);
            }
            self.active = None;
        }
        assert_eq!(batch.bytes(), 0, "a batch lies in one segment");
        let created = self.shared.segments.create(self.next_segment);
        // A number is never used twice, not even one whose file could not be made.
        self.next_segment += 1;
        let segment = created.map_err(|error| {
            let error = match error {
                SegmentError::Io { source, .. } if is_full(&source) => {
                    let free_bytes = self.shared.free_bytes(self.shared.used_bytes());
                    StoreError::NoSpace { needed_bytes: bytes, free_bytes }
                }
                other => StoreError::Segment(Arc::new(other)),
            };
            self.note(Some(&error));
            error
        })?;
        self.active = Some(Active { segment: Arc::clone(&segment), offset: SEGMENT_HEADER_BYTES });
        Ok(Some((segment, SEGMENT_HEADER_BYTES)))
    }
}

/// Has the system forget what it keeps in memory of a part that is on the disk: the owner of the machine
/// needs that memory more than whoever reads the fragments again, who has a cache of their own.
fn leave_cache(file: &File, part: Range<u64>) {
    let bytes = NonZeroU64::new(part.end - part.start);
    if let Err(error) = rustix::fs::fadvise(file, part.start, bytes, rustix::fs::Advice::DontNeed) {
        // It would be a favour, no more.
        tracing::debug!(%error, "pages stay in the system's cache");
    }
}

/// Whether an error says that the disk is full rather than broken.
fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}
