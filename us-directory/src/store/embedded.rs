//! The engine of every directory that needs nothing installed: a journal in front of `redb`.
//!
//! ```text
//! commit --> overlay (memory) ............ read: overlay, frozen overlay, redb
//!    \-----> queue --> journal thread: append, fdatasync (many commits at once)
//!                         \--> at 64 MiB: next file, and the overlay so far is frozen
//!                                 \--> checkpoint thread: frozen overlay -> redb, one durable
//!                                      transaction with its last seq; older journal files go
//! ```
//! Between append and fdatasync the journal's thread says that the records are written, so that others
//! can be sent them while the disk works. Files that the checkpoint has made needless are kept for
//! readers of records for a while (`store/records.rs`).
//!
//! A snapshot is a clone of the overlays and a read transaction: O(1), and neither commits nor
//! checkpoints wait for it. A start opens redb and replays the journal behind the checkpoint's seq.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bytes::Bytes;
use imbl::OrdMap;
use parking_lot::{Condvar, Mutex};
use redb::{Database, ReadOnlyTable, ReadableDatabase, ReadableTable, TableDefinition};
use us_core::daemon::disk::sync_path;

use super::journal::{
    BODY_BYTES_MAX, FileTag, JournalFile, encode_body, encode_record, file_path, sync_dir,
};
use super::records::JournalRecords;
use super::replay::replay;
use super::{
    Durability, DurableSink, KeyRange, Layer, MetaStore, Pair, Progress, Seq, StoreError,
    StoreFacts, View, WriteBatch, merge_layers,
};

const STATE: TableDefinition<'static, &'static [u8], &'static [u8]> = TableDefinition::new("state");
const FACTS: TableDefinition<'static, &'static str, u64> = TableDefinition::new("facts");
const SEQ: &str = "seq";
const INCARNATION: &str = "incarnation";
/// Bytes of commits that may wait for the journal's thread.
const QUEUE_BYTES_MAX: usize = 64 << 20;
/// How long an applied commit may stay in memory only.
const SYNC_EVERY: Duration = Duration::from_millis(500);
/// Bytes written into a new checkpoint at once.
const BUILD_BYTES: usize = 32 << 20;
/// While a checkpoint runs the next overlay may grow to this many times its usual size.
const OVERLAY_FACTOR_MAX: u64 = 3;

/// Sizes of an embedded store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EmbeddedOptions {
    /// Memory redb may use to cache pages.
    pub cache_bytes: usize,
    /// A journal file of this size starts a checkpoint.
    pub journal_file_bytes: u64,
    /// An overlay of this many keys starts a checkpoint.
    pub overlay_keys: usize,
}

impl Default for EmbeddedOptions {
    fn default() -> Self {
        Self { cache_bytes: 64 << 20, journal_file_bytes: 64 << 20, overlay_keys: 200_000 }
    }
}

pub(super) type Overlay = OrdMap<Bytes, Option<Bytes>>;

/// The checkpoint as of some commit.
struct Base {
    table: ReadOnlyTable<&'static [u8], &'static [u8]>,
    path: Arc<str>,
}

impl Base {
    fn error(&self, error: &dyn std::fmt::Display) -> StoreError {
        StoreError::Checkpoint { path: self.path.to_string(), detail: error.to_string() }
    }

    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, StoreError> {
        let found = self.table.get(key).map_err(|error| self.error(&error))?;
        Ok(found.map(|value| Bytes::copy_from_slice(value.value())))
    }
}

/// What a reader sees.
#[derive(Clone)]
struct Layers {
    active: Overlay,
    frozen: Option<Overlay>,
    base: Arc<Base>,
}

impl View for Layers {
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, StoreError> {
        let frozen = || self.frozen.as_ref().and_then(|frozen| frozen.get(key));
        match self.active.get(key).or_else(frozen) {
            Some(written) => Ok(written.clone()),
            None => self.base.get(key),
        }
    }

    fn scan(&self, range: &KeyRange, limit: usize) -> Result<Vec<Pair>, StoreError> {
        let Some(bounds) = range.bounds() else { return Ok(Vec::new()) };
        let base = &self.base;
        let mut stored = base.table.range::<&[u8]>(bounds).map_err(|error| base.error(&error))?;
        let next = || match stored.next() {
            None => Ok(None),
            Some(Ok((key, value))) => Ok(Some((
                Bytes::copy_from_slice(key.value()),
                Bytes::copy_from_slice(value.value()),
            ))),
            Some(Err(error)) => Err(base.error(&error)),
        };
        let mut layers: Vec<Layer<'_>> = vec![Box::new(self.active.range::<_, [u8]>(bounds))];
        if let Some(frozen) = &self.frozen {
            layers.push(Box::new(frozen.range::<_, [u8]>(bounds)));
        }
        merge_layers(layers, next, limit)
    }
}

/// An overlay on its way into the checkpoint.
struct Frozen {
    overlay: Overlay,
    seq: Seq,
}

enum Command {
    Append { seq: Seq, body: Vec<u8>, durable: bool },
    Sync,
    Rotate(Frozen),
    Close,
}

#[derive(Default)]
struct QueueState {
    commands: std::collections::VecDeque<Command>,
    bytes: usize,
    failed: Option<StoreError>,
}

/// The way from commits to the journal's thread, bounded in bytes.
#[derive(Default)]
struct Queue {
    state: Mutex<QueueState>,
    changed: Condvar,
}

impl Queue {
    fn push(&self, command: Command) -> Result<(), StoreError> {
        let bytes = if let Command::Append { body, .. } = &command { body.len() + 64 } else { 64 };
        let mut state = self.state.lock();
        loop {
            if let Some(first) = &state.failed {
                return Err(StoreError::Stopped { first: first.to_string() });
            }
            if state.bytes < QUEUE_BYTES_MAX {
                break;
            }
            self.changed.wait(&mut state);
        }
        state.bytes += bytes;
        state.commands.push_back(command);
        self.changed.notify_all();
        Ok(())
    }

    /// Everything that waits; nothing when `until` came first.
    fn take(&self, until: Option<Instant>) -> std::collections::VecDeque<Command> {
        let mut state = self.state.lock();
        while state.commands.is_empty() {
            match until {
                None => self.changed.wait(&mut state),
                Some(until) => {
                    if self.changed.wait_until(&mut state, until).timed_out() {
                        break;
                    }
                }
            }
        }
        state.bytes = 0;
        self.changed.notify_all();
        std::mem::take(&mut state.commands)
    }

    fn fail(&self, error: &StoreError) {
        let mut state = self.state.lock();
        state.failed.get_or_insert_with(|| error.clone());
        self.changed.notify_all();
    }
}

/// The journal's thread.
struct Writer {
    dir: PathBuf,
    file: JournalFile,
    queue: Arc<Queue>,
    records: Arc<JournalRecords>,
    sink: DurableSink,
    checkpoints: SyncSender<Frozen>,
    /// The last record encoded, and the last that is in the file.
    written: Seq,
    flushed: Seq,
    synced: Seq,
    buffer: Vec<u8>,
    sync_by: Option<Instant>,
}

impl Writer {
    fn run(mut self) {
        if let Err(error) = self.write() {
            self.queue.fail(&error);
            (self.sink)(Err(error));
        }
    }

    fn write(&mut self) -> Result<(), StoreError> {
        loop {
            let commands = self.queue.take(self.sync_by);
            let mut sync = self.sync_by.is_some_and(|by| by <= Instant::now());
            for command in commands {
                match command {
                    Command::Append { seq, body, durable } => {
                        let tag = self.file.tag();
                        encode_record(&mut self.buffer, tag, seq, self.synced, &body);
                        self.written = seq;
                        self.sync_by.get_or_insert_with(|| Instant::now() + SYNC_EVERY);
                        sync |= durable;
                    }
                    Command::Sync => sync = true,
                    Command::Rotate(frozen) => {
                        self.sync()?;
                        self.file.finish()?;
                        let tag = FileTag { salt: salt(), ..self.file.tag() };
                        self.file = JournalFile::create(&self.dir, tag, frozen.seq + 1)?;
                        self.records.began(frozen.seq + 1, file_path(&self.dir, frozen.seq + 1));
                        // The checkpoint's thread takes one at a time, and only one is ever made.
                        if self.checkpoints.send(frozen).is_err() {
                            return Ok(());
                        }
                        sync = false;
                    }
                    Command::Close => {
                        self.sync()?;
                        // A witness: a flipped bit in what was synced is no torn tail any more.
                        let body = encode_body(&WriteBatch::new());
                        let (tag, seq) = (self.file.tag(), self.written + 1);
                        encode_record(&mut self.buffer, tag, seq, self.synced, &body);
                        self.written = seq;
                        self.sync()?;
                        return self.file.finish();
                    }
                }
            }
            if sync {
                self.sync()?;
            } else if !self.buffer.is_empty() {
                self.flush()?;
            }
        }
    }

    fn flush(&mut self) -> Result<(), StoreError> {
        self.file.append(&self.buffer)?;
        self.buffer.clear();
        self.buffer.shrink_to(1 << 20);
        if self.flushed < self.written {
            self.flushed = self.written;
            self.records.wrote(self.written);
            self.tell();
        }
        Ok(())
    }

    fn tell(&self) {
        (self.sink)(Ok(Progress { written: self.flushed, synced: self.synced }));
    }

    fn sync(&mut self) -> Result<(), StoreError> {
        self.flush()?;
        self.sync_by = None;
        if self.synced < self.written {
            let started = Instant::now();
            self.file.sync()?;
            metrics::histogram!("us_directory_journal_sync_seconds").record(started.elapsed());
            self.synced = self.written;
            self.tell();
        }
        Ok(())
    }
}

/// The checkpoint's thread.
struct Checkpointer {
    database: Database,
    path: Arc<str>,
    records: Arc<JournalRecords>,
    queue: Arc<Queue>,
    sink: DurableSink,
    frozen: Receiver<Frozen>,
    done: SyncSender<Arc<Base>>,
}

impl Checkpointer {
    fn run(self) {
        while let Ok(frozen) = self.frozen.recv() {
            let started = Instant::now();
            match self.checkpoint(&frozen) {
                Ok(base) => {
                    metrics::histogram!("us_directory_checkpoint_seconds")
                        .record(started.elapsed());
                    tracing::debug!(seq = frozen.seq, keys = frozen.overlay.len(), "checkpoint");
                    if self.done.send(base).is_err() {
                        return;
                    }
                }
                Err(error) => {
                    self.queue.fail(&error);
                    return (self.sink)(Err(error));
                }
            }
        }
    }

    fn checkpoint(&self, frozen: &Frozen) -> Result<Arc<Base>, StoreError> {
        write_checkpoint(&self.database, frozen)
            .map_err(|error| checkpoint_error(&self.path, &error))?;
        let base = open_base(&self.database, &self.path)?;
        self.records.checkpointed(frozen.seq)?;
        Ok(base)
    }
}

fn checkpoint_error(path: &str, error: &dyn std::fmt::Display) -> StoreError {
    StoreError::Checkpoint { path: path.to_owned(), detail: error.to_string() }
}

fn write_checkpoint(database: &Database, frozen: &Frozen) -> Result<(), redb::Error> {
    let transaction = database.begin_write()?;
    {
        let mut state = transaction.open_table(STATE)?;
        for (key, value) in &frozen.overlay {
            match value {
                Some(value) => {
                    state.insert(key.as_ref(), value.as_ref())?;
                }
                None => {
                    state.remove(key.as_ref())?;
                }
            }
        }
        transaction.open_table(FACTS)?.insert(SEQ, frozen.seq)?;
    }
    transaction.commit()?;
    Ok(())
}

fn open_base(database: &Database, path: &Arc<str>) -> Result<Arc<Base>, StoreError> {
    let open = || -> Result<_, redb::Error> { Ok(database.begin_read()?.open_table(STATE)?) };
    let table = open().map_err(|error| checkpoint_error(path, &error))?;
    Ok(Arc::new(Base { table, path: path.clone() }))
}

fn salt() -> u64 {
    getrandom::u64().expect("the system gives randomness")
}

/// The embedded store.
pub struct EmbeddedStore {
    layers: Layers,
    seq: Seq,
    queue: Arc<Queue>,
    records: Arc<JournalRecords>,
    done: Mutex<Receiver<Arc<Base>>>,
    options: EmbeddedOptions,
    journal_bytes: u64,
    frozen_bytes: u64,
    threads: Vec<JoinHandle<()>>,
}

impl EmbeddedStore {
    /// Opens the store in `dir`, making it where there is none. `sink` hears how far commits are
    /// durable.
    ///
    /// # Errors
    /// [`StoreError`] when the disk fails, the store is in use, or durable bytes are damaged.
    pub fn open(
        dir: &Path,
        options: EmbeddedOptions,
        sink: DurableSink,
    ) -> Result<Self, StoreError> {
        std::fs::create_dir_all(dir).map_err(|error| StoreError::io("make", dir, error))?;
        let (database, path) = open_database(dir, options.cache_bytes)?;
        let facts = read_facts(&database).map_err(|error| checkpoint_error(&path, &error))?;
        let base = open_base(&database, &path)?;
        let mut layers = Layers { active: Overlay::new(), frozen: None, base };
        let (seq, journal_bytes) = replay(dir, facts.seq, &mut layers.active)?;
        let tag = FileTag { incarnation: facts.incarnation, salt: salt() };
        let file = JournalFile::create(dir, tag, seq + 1)?;
        let records = Arc::new(JournalRecords::new(dir, facts.seq, seq)?);
        let queue = Arc::new(Queue::default());
        let (checkpoints, frozen) = sync_channel(1);
        let (finished, done) = sync_channel(1);
        let writer = Writer {
            dir: dir.to_owned(),
            file,
            queue: queue.clone(),
            records: records.clone(),
            sink: sink.clone(),
            checkpoints,
            written: seq,
            flushed: seq,
            synced: seq,
            buffer: Vec::new(),
            sync_by: None,
        };
        let checkpointer = Checkpointer {
            database,
            path,
            records: records.clone(),
            queue: queue.clone(),
            sink: sink.clone(),
            frozen,
            done: finished,
        };
        let threads = vec![
            spawn(dir, "checkpoint", move || checkpointer.run())?,
            spawn(dir, "journal", move || writer.run())?,
        ];
        sink(Ok(Progress { written: seq, synced: seq }));
        let done = Mutex::new(done);
        Ok(Self {
            layers,
            seq,
            queue,
            records,
            done,
            options,
            journal_bytes,
            frozen_bytes: 0,
            threads,
        })
    }

    /// Takes over what the checkpoint's thread has finished; waits for it where asked.
    fn take_checkpoint(&mut self, wait: bool) -> Result<(), StoreError> {
        if self.layers.frozen.is_none() {
            return Ok(());
        }
        let base = if wait {
            self.done.get_mut().recv().map_err(|_| self.stopped())?
        } else {
            match self.done.get_mut().try_recv() {
                Ok(base) => base,
                Err(std::sync::mpsc::TryRecvError::Empty) => return Ok(()),
                Err(std::sync::mpsc::TryRecvError::Disconnected) => return Err(self.stopped()),
            }
        };
        self.layers.base = base;
        self.layers.frozen = None;
        self.frozen_bytes = 0;
        Ok(())
    }

    fn stopped(&self) -> StoreError {
        let first = self.queue.state.lock().failed.as_ref().map(ToString::to_string);
        StoreError::Stopped { first: first.unwrap_or_else(|| "its thread ended".to_owned()) }
    }

    /// Starts a checkpoint where the journal or the overlay is long enough.
    fn maybe_freeze(&mut self) -> Result<(), StoreError> {
        let long = self.journal_bytes >= self.options.journal_file_bytes
            || self.layers.active.len() >= self.options.overlay_keys;
        if !long {
            return Ok(());
        }
        let too_long = self.journal_bytes >= OVERLAY_FACTOR_MAX * self.options.journal_file_bytes
            || self.layers.active.len() as u64
                >= OVERLAY_FACTOR_MAX * self.options.overlay_keys as u64;
        self.take_checkpoint(too_long)?;
        if self.layers.frozen.is_some() {
            return Ok(());
        }
        let overlay = std::mem::take(&mut self.layers.active);
        self.layers.frozen = Some(overlay.clone());
        self.frozen_bytes = std::mem::take(&mut self.journal_bytes);
        self.queue.push(Command::Rotate(Frozen { overlay, seq: self.seq }))
    }
}

/// Fills the checkpoint of a store that is being restored, before anyone opens it.
#[derive(Debug)]
pub struct CheckpointBuilder {
    database: Database,
    path: Arc<str>,
    waiting: Overlay,
    waiting_bytes: usize,
}

impl CheckpointBuilder {
    /// An empty checkpoint in `dir`, which is made where it is not there.
    ///
    /// # Errors
    /// [`StoreError`] when the disk fails.
    pub fn create(dir: &Path) -> Result<Self, StoreError> {
        std::fs::create_dir_all(dir).map_err(|error| StoreError::io("make", dir, error))?;
        let (database, path) = open_database(dir, EmbeddedOptions::default().cache_bytes)?;
        read_facts(&database).map_err(|error| checkpoint_error(&path, &error))?;
        Ok(Self { database, path, waiting: Overlay::new(), waiting_bytes: 0 })
    }

    /// Applies writes; a later write of a key counts.
    ///
    /// # Errors
    /// [`StoreError`] when the disk fails.
    pub fn apply(&mut self, batch: WriteBatch) -> Result<(), StoreError> {
        for (key, value) in batch {
            self.waiting_bytes += key.len() + value.as_ref().map_or(0, Bytes::len);
            self.waiting.insert(key, value);
        }
        if self.waiting_bytes >= BUILD_BYTES {
            self.write(0)?;
        }
        Ok(())
    }

    fn write(&mut self, seq: Seq) -> Result<(), StoreError> {
        self.waiting_bytes = 0;
        let frozen = Frozen { overlay: std::mem::take(&mut self.waiting), seq };
        write_checkpoint(&self.database, &frozen)
            .map_err(|error| checkpoint_error(&self.path, &error))
    }

    /// Ends the checkpoint: it is the state at `seq`, of this incarnation.
    ///
    /// # Errors
    /// [`StoreError`] when the disk fails.
    pub fn finish(mut self, seq: Seq, incarnation: u64) -> Result<(), StoreError> {
        self.write(seq)?;
        let write = || -> Result<(), redb::Error> {
            let transaction = self.database.begin_write()?;
            transaction.open_table(FACTS)?.insert(INCARNATION, incarnation)?;
            Ok(transaction.commit()?)
        };
        write().map_err(|error| checkpoint_error(&self.path, &error))
    }
}

struct StoredFacts {
    seq: Seq,
    incarnation: u64,
}

fn open_database(dir: &Path, cache_bytes: usize) -> Result<(Database, Arc<str>), StoreError> {
    let path = dir.join("checkpoint.redb");
    let name: Arc<str> = path.display().to_string().into();
    let existed = path.exists();
    let database = Database::builder().set_cache_size(cache_bytes).create(&path);
    let database = match database {
        Ok(database) => database,
        Err(redb::DatabaseError::DatabaseAlreadyOpen) => {
            return Err(StoreError::InUse { path: name.to_string() });
        }
        Err(error) => return Err(checkpoint_error(&name, &error)),
    };
    if !existed {
        sync_dir(dir)?;
    }
    // As of the journal: what a killed commit left in the page cache is not believed yet.
    sync_path(&path).map_err(|error| StoreError::io("sync", &path, error))?;
    Ok((database, name))
}

/// Reads the checkpoint's facts; a new database gets its tables.
fn read_facts(database: &Database) -> Result<StoredFacts, redb::Error> {
    let transaction = database.begin_write()?;
    let (facts, fresh) = {
        transaction.open_table(STATE)?;
        let mut table = transaction.open_table(FACTS)?;
        let seq = table.get(SEQ)?.map(|value| value.value());
        if seq.is_none() {
            table.insert(SEQ, 0)?;
            table.insert(INCARNATION, 1)?;
        }
        let incarnation = table.get(INCARNATION)?.map_or(1, |value| value.value());
        (StoredFacts { seq: seq.unwrap_or(0), incarnation }, seq.is_none())
    };
    if fresh {
        transaction.commit()?;
    } else {
        transaction.abort()?;
    }
    Ok(facts)
}

fn spawn(
    dir: &Path,
    name: &str,
    work: impl FnOnce() + Send + 'static,
) -> Result<JoinHandle<()>, StoreError> {
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(work)
        .map_err(|error| StoreError::io("start a thread for", dir, error))
}

impl View for EmbeddedStore {
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, StoreError> {
        self.layers.get(key)
    }

    fn scan(&self, range: &KeyRange, limit: usize) -> Result<Vec<Pair>, StoreError> {
        self.layers.scan(range, limit)
    }
}

impl MetaStore for EmbeddedStore {
    fn snapshot(&self) -> Arc<dyn View> {
        Arc::new(self.layers.clone())
    }

    fn commit(&mut self, batch: WriteBatch, durability: Durability) -> Result<Seq, StoreError> {
        let durable = durability == Durability::Durable;
        if batch.is_empty() {
            if durable {
                self.queue.push(Command::Sync)?;
            }
            return Ok(self.seq);
        }
        let body = encode_body(&batch);
        // A longer one would be acknowledged and not read back.
        assert!(body.len() <= BODY_BYTES_MAX, "a commit of {} bytes", body.len());
        self.journal_bytes += body.len() as u64 + 64;
        self.seq += 1;
        self.queue.push(Command::Append { seq: self.seq, body, durable })?;
        for (key, value) in batch {
            self.layers.active.insert(key, value);
        }
        self.take_checkpoint(false)?;
        self.maybe_freeze()?;
        Ok(self.seq)
    }

    fn facts(&self) -> StoreFacts {
        StoreFacts { seq: self.seq, journal_bytes: self.journal_bytes + self.frozen_bytes }
    }

    fn first_record(&self) -> Seq {
        self.records.first()
    }

    fn records(&self, from: Seq, bytes_max: usize) -> Result<Vec<(Seq, Bytes)>, StoreError> {
        self.records.read(from, bytes_max)
    }

    fn record_bytes(&self, from: Seq) -> u64 {
        self.records.bytes_from(from)
    }

    fn keep_records(&self, from: Seq) -> Result<(), StoreError> {
        self.records.keep(from)
    }
}

impl Drop for EmbeddedStore {
    fn drop(&mut self) {
        let _failed_before = self.queue.push(Command::Close);
        // The checkpoint's thread may wait to hand over what nobody takes any more.
        let (_, nobody) = sync_channel(1);
        *self.done.get_mut() = nobody;
        while let Some(thread) = self.threads.pop() {
            let _panicked = thread.join();
        }
    }
}
