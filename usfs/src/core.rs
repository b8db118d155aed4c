//! The mount as a pure state machine: what is cached and under which leases, what is dirty, and the
//! session's log.
//!
//! Every operation is a method that runs to its end in memory, or stops: with an error, or with a
//! [`Stall`] that names what is missing. A stalled operation has changed nothing and is simply
//! called again once the stall is resolved. With EXCLUSIVE leases at hand nothing is missing:
//! creates, writes, renames and removals are answered at once and only appended to the log.
//!
//! Invariants:
//! - what is cached of an inode is true under its lease, and dropped before the lease is returned;
//! - a mutation is appended under the leases it needs, in the same step as the cache changes;
//! - the session's messages leave in the order: log, then requests and returns made after it;
//! - a size in the log never runs ahead of the data in the log.
//!
//! Owned by `fs` behind one lock that is never held across an await; no I/O, no clock in here.

pub mod acl;
mod attributes;
mod cleaning;
mod crowding;
mod files;
mod flush;
mod handles;
mod inlined;
mod install;
mod known;
mod leases;
mod listing;
pub mod locks;
mod names;
pub mod node;
mod rescue;
mod siblings;
#[cfg(test)]
mod tests;
mod xattrs;

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use us_core::daemon::logging::RequestId;
use us_core::disk::BlockInfo;
use us_core::geometry::Code;
use us_core::ids::{BlockId, Ino};
use us_core::name::NameKey;
use us_proto::v1;
use us_proto::v1::mutation::Op;

pub use self::cleaning::Cleaning;
pub use self::crowding::Rewrite;
pub use self::files::{ReadPiece, ReadPlan};
pub use self::flush::{FlushReason, SealPlan, StoreFailure, Stored};
pub use self::handles::OpenFile;
pub use self::inlined::Packing;
pub use self::install::Effect;
pub use self::leases::{FinishedRecall, Recall};
pub use self::names::{NewNode, Renamed};
use self::node::{Dentry, DirNames, Level, Missed, Node};
pub use self::rescue::{Undurable, UndurableFile};
use crate::attributes::{Attributes, FileKind, FileTime};
use crate::fs::{Entry, FsError, NAME_BYTES_MAX};
use crate::session::log::{LogPosition, SessionLog};

/// The moment an operation happens.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Now {
    /// CLOCK_BOOTTIME: leases and ages count on it.
    pub boot: Duration,
    /// Wall time: only for files' times.
    pub wall: FileTime,
}

/// Why an operation did not come to its end.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Stop {
    /// It failed.
    Fail(FsError),
    /// Something is missing; then it is called again.
    Stall(Stall),
}

impl From<FsError> for Stop {
    fn from(error: FsError) -> Self {
        Self::Fail(error)
    }
}

/// What an operation waits for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Stall {
    /// An answer of the directory.
    Fetch(Want),
    /// The inode's dirty data must be committed first.
    Flush(Ino),
    /// A chunk of a file's map (the second) has nearly as many extents as it can have.
    Compact(Ino, u64),
    /// Dirty data fills the memory it may use.
    Space,
    /// The log is full.
    Log,
    /// No inode numbers are left.
    Inodes,
    /// How much space the volume has must be known.
    FreeSpace,
    /// The directory has not answered for so long that no lease is trusted.
    Session,
}

/// Something to ask the directory for. Equal wants travel once.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Want {
    /// An inode's attributes.
    Inode {
        /// The inode.
        ino: Ino,
        /// The lease at least.
        level: Level,
    },
    /// One name.
    Entry {
        /// The directory.
        dir: Ino,
        /// The name.
        name: Box<[u8]>,
        /// The lease on the directory.
        level: Level,
    },
    /// A page of a listing.
    Entries {
        /// The directory.
        dir: Ino,
        /// After this cookie.
        after: u64,
    },
    /// Chunks of a map.
    Map {
        /// The file.
        ino: Ino,
        /// The first chunk.
        first_chunk: u64,
        /// How many.
        chunks: u32,
    },
    /// All extended attributes.
    Xattrs {
        /// The inode.
        ino: Ino,
        /// The lease at least.
        level: Level,
    },
}

/// A request that is not answered.
#[derive(Debug)]
struct Asked {
    want: Want,
    /// The request it was first asked for.
    trace: RequestId,
    /// The end of the log then: it is sent behind that.
    at: LogPosition,
}

/// What the core is told when the session opens.
#[derive(Debug)]
pub struct CoreConfig {
    /// Seals and opens names.
    pub names: NameKey,
    /// The volume's code.
    pub code: Code,
    /// Nothing may change.
    pub read_only: bool,
    /// Reading changes no access time.
    pub no_atime: bool,
    /// Most bytes of data that is dirty or in flight.
    pub dirty_bytes_max: usize,
    /// Most inodes cached without being used.
    pub nodes_max: usize,
}

/// The state of a mount.
#[derive(Debug)]
pub struct Core {
    config: CoreConfig,
    nodes: HashMap<Ino, Node>,
    handles: HashMap<u64, OpenFile>,
    handles_made: u64,
    /// Where blocks lie, as the directory last said; a cache, asked again when wrong.
    blocks: quick_cache::unsync::Cache<BlockId, Arc<BlockInfo>>,
    log: SessionLog,
    outbox: VecDeque<v1::session_up::Event>,
    pending: HashMap<u64, Asked>,
    requests: HashMap<Want, u64>,
    requests_made: u64,
    inodes: std::ops::Range<u64>,
    inodes_asked: bool,
    /// Leases are believed until then.
    trusted_until: Duration,
    /// Why the session ended, if it did.
    ended: Option<String>,
    /// Somebody waits for durability: ask for it behind the log.
    sync_wanted: bool,
    dirty: flush::DirtyFiles,
    write_errors: u64,
    /// Recalls nobody answers yet: at most one for each lease and level, for the directory asks once.
    recalls: VecDeque<Recall>,
    /// Bytes left in the volume, and when the directory said so.
    free_space: Option<(Duration, u64)>,
    /// Leases given up behind mutations that may have to be replayed under them.
    let_go: VecDeque<leases::LetGo>,
    locks: locks::OwnLocks,
}

/// Block infos cached.
const BLOCKS_CACHED_MAX: usize = 32 << 10;
/// Inode numbers asked for at once.
pub const INODES_LEASED: u32 = 16 << 10;

impl Core {
    /// A mount that caches nothing yet.
    pub fn new(config: CoreConfig) -> Self {
        Self {
            nodes: HashMap::new(),
            handles: HashMap::new(),
            handles_made: 0,
            blocks: quick_cache::unsync::Cache::new(BLOCKS_CACHED_MAX),
            log: SessionLog::new(),
            outbox: VecDeque::new(),
            pending: HashMap::new(),
            requests: HashMap::new(),
            requests_made: 0,
            inodes: 0..0,
            inodes_asked: false,
            trusted_until: Duration::ZERO,
            ended: None,
            sync_wanted: false,
            dirty: flush::DirtyFiles::new(config.code),
            write_errors: 0,
            recalls: VecDeque::new(),
            free_space: None,
            let_go: VecDeque::new(),
            locks: locks::OwnLocks::default(),
            config,
        }
    }

    /// The session's log.
    pub fn log(&mut self) -> &mut SessionLog {
        &mut self.log
    }

    /// Until when leases are believed.
    pub const fn trusted_until(&self) -> Duration {
        self.trusted_until
    }

    /// Believes leases until `until`.
    pub fn trust_until(&mut self, until: Duration) {
        self.trusted_until = until;
    }

    /// Why the session ended, if it did.
    pub fn ended(&self) -> Option<&str> {
        self.ended.as_deref()
    }

    /// The session is over: every operation fails from now on.
    pub fn end(&mut self, why: String) {
        self.ended.get_or_insert(why);
    }

    /// Whether `ino` has been made durable as far as the log goes; answers the position to wait for.
    pub fn log_end(&self) -> LogPosition {
        self.log.end()
    }

    /// Asks for durability of all that is in the log now.
    pub fn want_sync(&mut self) -> LogPosition {
        self.sync_wanted = true;
        self.log.end()
    }

    /// Whether somebody waits for what is to be sent, or it is much.
    pub fn is_urgent(&self) -> bool {
        self.sync_wanted || !self.outbox.is_empty() || self.log.is_worthwhile()
    }

    /// The next messages for the directory, in order: the log's batches, then requests and returns.
    /// At most `max` messages.
    pub fn take_outgoing(&mut self, max: usize, out: &mut Vec<v1::session_up::Event>) {
        let force = self.sync_wanted || !self.outbox.is_empty();
        let mut log_drained = false;
        while out.len() < max {
            let Some(batch) = self.log.take_sendable(force) else {
                log_drained = true;
                break;
            };
            out.push(v1::session_up::Event::Batch(batch));
        }
        if !log_drained {
            return;
        }
        if std::mem::take(&mut self.sync_wanted) {
            out.push(v1::session_up::Event::Sync(v1::Sync {}));
        }
        while out.len() < max {
            let Some(mut event) = self.outbox.pop_front() else { break };
            self.refresh(&mut event);
            out.push(event);
        }
    }

    /// A return of a lease waits behind the log. Whoever used the inode may have gone meanwhile, and
    /// the `Release` that says so has overtaken it: it must not count as open for ever.
    fn refresh(&self, event: &mut v1::session_up::Event) {
        let v1::session_up::Event::LeaseReturn(returned) = event else { return };
        for lease in returned.leases.iter_mut().filter(|lease| lease.open) {
            lease.open = self.nodes.get(&Ino(lease.ino)).is_some_and(Node::is_referred);
        }
    }

    /// Queues a message behind all that is in the log.
    pub fn send(&mut self, event: v1::session_up::Event) {
        self.outbox.push_back(event);
    }

    /// A number for a request that only the shell knows of (locks, placements, statistics).
    pub fn request_number(&mut self) -> u64 {
        self.requests_made += 1;
        self.requests_made
    }

    fn append(&mut self, op: Op, inos: &[Ino]) -> LogPosition {
        let position = self.log.append(op);
        for ino in inos {
            if let Some(node) = self.nodes.get_mut(ino) {
                node.logged = position;
            }
        }
        position
    }

    /// What every operation checks first: the session lives, and its leases can be believed.
    fn check_session(&self, now: Now) -> Result<(), Stop> {
        if let Some(why) = &self.ended {
            return Err(FsError::SessionEnded(why.clone()).into());
        }
        if now.boot >= self.trusted_until {
            return Err(Stop::Stall(Stall::Session));
        }
        Ok(())
    }

    /// What every operation that changes something checks besides.
    fn check_change(&self, now: Now) -> Result<(), Stop> {
        self.check_session(now)?;
        if self.config.read_only {
            return Err(FsError::ReadOnly.into());
        }
        if self.log.is_full() {
            return Err(Stop::Stall(Stall::Log));
        }
        Ok(())
    }

    /// The inode with its attributes under a lease of at least `level`.
    fn need(&mut self, ino: Ino, level: Level) -> Result<&mut Node, Stop> {
        let has = self
            .nodes
            .get(&ino)
            .is_some_and(|node| node.lease.usable() >= level && node.attributes.is_some());
        match self.nodes.get_mut(&ino) {
            Some(node) if has => {
                node.used = true;
                Ok(node)
            }
            _ => Err(Stop::Stall(Stall::Fetch(Want::Inode { ino, level }))),
        }
    }

    /// Several inodes, asked for in inode order so that two mounts cannot wait for each other.
    fn need_all(&mut self, inos: &mut [Ino], level: Level) -> Result<(), Stop> {
        inos.sort_unstable();
        inos.iter().filter(|ino| ino.0 != 0).try_for_each(|ino| self.need(*ino, level).map(|_| ()))
    }

    /// A directory under a lease.
    fn need_dir(&mut self, dir: Ino, level: Level) -> Result<&mut Node, Stop> {
        let node = self.need(dir, level)?;
        if node.attributes.is_some_and(|attributes| attributes.kind != FileKind::Directory) {
            return Err(FsError::NotADirectory.into());
        }
        node.names.get_or_insert_default();
        Ok(node)
    }

    /// What `name` is in `dir`, under a lease of the directory.
    fn need_name(&mut self, dir: Ino, name: &[u8], level: Level) -> Result<Dentry, Stop> {
        check_name(name)?;
        let node = self.need_dir(dir, level)?;
        if let Some(dentry) = node.names.as_deref().and_then(|names| names.get(name)) {
            return Ok(dentry);
        }
        let want = match self.names_mut(dir).missed() {
            Missed::One => Want::Entry { dir, name: name.into(), level },
            Missed::Many { after } => Want::Entries { dir, after },
        };
        Err(Stop::Stall(Stall::Fetch(want)))
    }

    /// The attributes of an inode that `need` has just answered for.
    fn attributes_mut(&mut self, ino: Ino) -> &mut Attributes {
        let node = self.nodes.get_mut(&ino).expect("the caller holds the inode's lease");
        node.attributes.as_mut().expect("attributes are there while the lease is")
    }

    /// The names of a directory that `need_dir` has just answered for.
    fn names_mut(&mut self, dir: Ino) -> &mut DirNames {
        let node = self.nodes.get_mut(&dir).expect("the caller holds the directory's lease");
        node.names.get_or_insert_default()
    }

    /// How long the kernel may believe what it is told of `inos` now.
    fn valid(&self, now: Now, inos: &[Ino]) -> Duration {
        let kept = |ino: &Ino| {
            let lease = self.nodes.get(ino).map(|node| node.lease);
            lease.is_some_and(|lease| lease.keep.is_none() && lease.level > Level::None)
        };
        if inos.iter().all(kept) {
            self.trusted_until.saturating_sub(now.boot)
        } else {
            Duration::ZERO
        }
    }

    /// The inode as the kernel may see and cache it.
    fn entry(&self, now: Now, ino: Ino, dir: Option<Ino>) -> Option<Entry> {
        let node = self.nodes.get(&ino)?;
        let attributes = node.shown_attributes()?;
        let valid = match dir {
            _ if node.allocated_guessed => Duration::ZERO,
            Some(dir) => self.valid(now, &[ino, dir]),
            None => self.valid(now, &[ino]),
        };
        Some(Entry { attributes, valid })
    }
}

/// Whether a name can be one.
fn check_name(name: &[u8]) -> Result<(), FsError> {
    match name.len() {
        0 => Err(FsError::NotFound),
        bytes if bytes > NAME_BYTES_MAX => Err(FsError::NameTooLong),
        _ => Ok(()),
    }
}

/// The time of a change: now, but never before what the inode already shows.
fn change_time(now: Now, attributes: &Attributes) -> FileTime {
    now.wall.max(attributes.ctime)
}
