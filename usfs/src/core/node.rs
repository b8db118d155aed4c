//! What the mount knows of one inode, and under which lease.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::Duration;

use bytes::Bytes;
use us_core::ids::Ino;
use us_proto::v1;

use crate::attributes::{Attributes, FileKind, MODE_PERMISSIONS};
use crate::data::FileData;
use crate::fs::FsError;
use crate::session::log::LogPosition;

/// How much a lease allows.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub enum Level {
    /// Nothing may be believed.
    #[default]
    None,
    /// What is cached is true.
    Shared,
    /// Changes may be buffered too.
    Exclusive,
}

impl Level {
    /// The wire's value.
    pub const fn to_proto(self) -> i32 {
        match self {
            Self::None => v1::LeaseLevel::None as i32,
            Self::Shared => v1::LeaseLevel::Shared as i32,
            Self::Exclusive => v1::LeaseLevel::Exclusive as i32,
        }
    }

    /// The level in a message; an unknown one allows nothing.
    pub fn from_proto(level: i32) -> Self {
        match v1::LeaseLevel::try_from(level) {
            Ok(v1::LeaseLevel::Exclusive) => Self::Exclusive,
            Ok(v1::LeaseLevel::Shared) => Self::Shared,
            Ok(v1::LeaseLevel::None) | Err(_) => Self::None,
        }
    }
}

/// The lease on one inode.
#[derive(Clone, Copy, Debug, Default)]
pub struct Lease {
    /// What the directory granted.
    pub level: Level,
    /// The newest grant seen; 0 for an inode made here.
    pub grant: u64,
    /// A recall down to this level is being answered: nothing is changed under the lease any more,
    /// but read until it is returned (the kernel waits for reads before it forgets pages).
    pub keep: Option<Level>,
    /// A recall waits until then for the operation that asked for the grant.
    pub pinned_until: Option<Duration>,
}

impl Lease {
    /// What a new operation may rely on.
    pub fn usable(&self) -> Level {
        if self.keep.is_some() { self.level.min(Level::Shared) } else { self.level }
    }
}

/// A name in a directory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Dentry {
    /// It names an inode.
    Present {
        /// The inode.
        ino: Ino,
        /// Its place in the listing.
        cookie: u64,
        /// What it is, which never changes; `None` where the directory did not say because
        /// another mount has the inode.
        kind: Option<FileKind>,
    },
    /// There is no such name.
    Absent,
}

/// What is known of a directory's names.
#[derive(Debug, Default)]
pub struct DirNames {
    /// By name.
    pub names: HashMap<Box<[u8]>, Dentry>,
    /// Present names in listing order.
    pub order: BTreeMap<u64, Box<[u8]>>,
    /// Names with cookies up to here are all known.
    pub listed: u64,
    /// All names are known: what is not here does not exist.
    pub complete: bool,
    /// The cookie the next new name takes.
    pub next_cookie: u64,
    /// How often a name was not known, since names were last listed.
    pub misses: u64,
    /// A listing is on its way: names that go meanwhile must stay known as gone.
    pub listing: bool,
    /// The name at this cookie fails its seal: there is no listing beyond it.
    pub unlistable: Option<u64>,
    /// Cookies before this were looked at for files whose maps come along with others'.
    pub siblings_from: u64,
    /// So many maps come along with the next.
    pub siblings_wanted: usize,
    /// Names the kernel was told are not there, and may remember so while the lease lasts. Never more
    /// than [`TOLD_ABSENT_MAX`]: it is told to remember no others.
    pub told_absent: HashSet<Box<[u8]>>,
}

/// The most names of a directory that the kernel may remember as not there.
pub const TOLD_ABSENT_MAX: usize = 4096;
/// The most names of a directory kept as not there.
const ABSENT_MAX: usize = 4096;

/// The most names of one listing.
pub const LISTED_MAX: u64 = 4096;
/// So many names there may be for each that was asked for alone, if all are to be listed; and so many
/// are asked for alone in any case.
const LISTED_A_MISS: u64 = 32;
const MISSES_MIN: u64 = 4;

/// What to ask for when a name is not known.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Missed {
    /// That name.
    One,
    /// The names behind this cookie.
    Many {
        /// The last that is known.
        after: u64,
    },
}

/// The first cookie of a directory.
pub const FIRST_COOKIE: u64 = 1;

impl DirNames {
    /// An empty directory, wholly known.
    pub fn new_empty() -> Self {
        Self { complete: true, next_cookie: FIRST_COOKIE, ..Self::default() }
    }

    /// What is known of `name`.
    pub fn get(&self, name: &[u8]) -> Option<Dentry> {
        match self.names.get(name) {
            Some(dentry) => Some(*dentry),
            None if self.complete => Some(Dentry::Absent),
            None => None,
        }
    }

    /// Adds a new name at the end of the listing.
    pub fn add(&mut self, name: &[u8], ino: Ino, kind: FileKind) {
        let cookie = self.next_cookie;
        self.put(name, Dentry::Present { ino, cookie, kind: Some(kind) });
    }

    /// A name is looked up that is not known: what to ask for. Who looks up many of the names there are
    /// is given those behind what is known, and their attributes with them.
    pub fn missed(&mut self) -> Missed {
        self.misses += 1;
        let rest = self.next_cookie.saturating_sub(self.listed);
        let dear = self.misses < MISSES_MIN || rest > self.misses * LISTED_A_MISS;
        if dear || self.complete || self.unlistable.is_some() {
            return Missed::One;
        }
        self.misses = 0;
        Missed::Many { after: self.listed }
    }

    /// The kernel is told that there is no `name`: whether it may remember that. It is told when that
    /// changes.
    pub fn tell_absent(&mut self, name: &[u8]) -> bool {
        if self.told_absent.contains(name) {
            return true;
        }
        self.told_absent.len() < TOLD_ABSENT_MAX && self.told_absent.insert(name.into())
    }

    /// Names the kernel may have cached, there or not.
    pub fn told(&self) -> impl Iterator<Item = &[u8]> {
        let absent = self.told_absent.iter().filter(|name| !self.names.contains_key(&***name));
        self.names.keys().chain(absent).map(|name| &**name)
    }

    /// Notes what `name` is.
    pub fn put(&mut self, name: &[u8], dentry: Dentry) {
        // Absent names are only a cache, of lookups that anybody may make.
        if dentry == Dentry::Absent
            && !self.listing
            && self.names.len().saturating_sub(self.order.len()) >= ABSENT_MAX
        {
            self.names.retain(|_, dentry| *dentry != Dentry::Absent);
        }
        let old = self.names.insert(name.into(), dentry);
        if let Some(Dentry::Present { cookie: old, .. }) = old {
            self.order.remove(&old);
        }
        if let Dentry::Present { cookie, .. } = dentry {
            self.order.insert(cookie, name.into());
            self.next_cookie = self.next_cookie.max(cookie + 1);
        }
    }

    /// Notes that there is no `name`.
    pub fn remove(&mut self, name: &[u8]) {
        if let Some(Dentry::Present { cookie, .. }) = self.names.remove(name) {
            self.order.remove(&cookie);
        }
        if !self.complete {
            self.put(name, Dentry::Absent);
        }
    }

    /// Whether the directory is empty: `None` where that is not known.
    pub fn is_empty(&self) -> Option<bool> {
        if !self.order.is_empty() {
            return Some(false);
        }
        self.complete.then_some(true)
    }

    /// Forgets the names; the counter stays unknown too.
    pub fn clear(&mut self) {
        *self = Self::default();
    }
}

/// Data of a file that cannot be stored, while it is only tried again.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct WriteRetried {
    /// Since when, without anything of the file stored meanwhile.
    pub since: Duration,
    /// For how long nobody is told.
    pub patience: Duration,
    /// Why, the last time.
    pub error: FsError,
}

/// Data that could not be stored, and was not reported yet.
#[derive(Clone, Debug)]
pub struct WriteError {
    /// Grows with each error of the mount; a handle remembers up to which it has reported.
    pub sequence: u64,
    /// What happened.
    pub error: FsError,
}

/// One inode.
#[derive(Debug)]
pub struct Node {
    /// Its lease.
    pub lease: Lease,
    /// Its attributes, while the lease says they are true.
    pub attributes: Option<Attributes>,
    /// Whether it may have extended attributes that are not loaded.
    pub has_xattrs: bool,
    /// Extended attributes, all of them, opened.
    pub xattrs: Option<BTreeMap<Vec<u8>, Bytes>>,
    /// Target of a symbolic link.
    pub target: Option<Bytes>,
    /// Names, of a directory.
    pub names: Option<Box<DirNames>>,
    /// Where a directory lies, while the lease says so.
    pub parent: Ino,
    /// A directory in which the kernel was told of it last: a hint, whose other files may be wanted next.
    pub beside: Ino,
    /// Bytes, of a regular file.
    pub data: Option<Box<FileData>>,
    /// The size the directory knows when it has applied the log.
    pub logged_size: u64,
    /// Nothing lies behind the end of the file but what this mount put there under this lease.
    pub tail_checked: bool,
    /// `allocated_bytes` is a guess: something was cut off whose map was not here.
    pub allocated_guessed: bool,
    /// The last mutation in the log that concerns the inode.
    pub logged: LogPosition,
    /// Lookups the kernel has not given back.
    pub lookups: u64,
    /// Open handles.
    pub handles: u32,
    /// A lease was returned while the inode was in use, so the directory keeps it also without a
    /// name: it must hear when nobody uses it any more.
    pub told_open: bool,
    /// The kernel may keep pages from before: nothing was recalled since they were read.
    pub kernel_cache_valid: bool,
    /// When the first byte that is still dirty was written.
    pub dirty_since: Option<Duration>,
    /// Why its data could not be stored when last tried, while some of it still is not.
    pub write_failing: Option<FsError>,
    /// Its data cannot be stored, and nobody was told of it yet.
    pub write_retried: Option<WriteRetried>,
    /// How often its data could not be stored.
    pub aborts: u64,
    /// How often bytes that were stored became dirty again, because a chunk must be written anew first.
    pub postponed: u64,
    /// The last error of writing.
    pub write_error: Option<WriteError>,
    /// A use mark for eviction.
    pub used: bool,
}

impl Node {
    /// An inode of which nothing is known.
    pub fn unknown() -> Self {
        Self {
            lease: Lease::default(),
            attributes: None,
            has_xattrs: false,
            xattrs: None,
            target: None,
            names: None,
            parent: Ino(0),
            beside: Ino(0),
            data: None,
            logged_size: 0,
            tail_checked: false,
            allocated_guessed: false,
            logged: LogPosition(0),
            lookups: 0,
            handles: 0,
            told_open: false,
            kernel_cache_valid: false,
            dirty_since: None,
            write_failing: None,
            write_retried: None,
            aborts: 0,
            postponed: 0,
            write_error: None,
            used: true,
        }
    }

    /// Forgets what only a lease made true.
    pub fn drop_cached(&mut self) {
        self.attributes = None;
        self.has_xattrs = false;
        self.xattrs = None;
        self.target = None;
        self.names = None;
        self.parent = Ino(0);
        self.data = None;
        self.tail_checked = false;
        self.allocated_guessed = false;
        self.kernel_cache_valid = false;
    }

    /// Whether a program or the kernel can still reach it, with or without a name. What the
    /// protocol calls open: the directory keeps such an inode when its last name goes.
    pub const fn is_referred(&self) -> bool {
        self.lookups > 0 || self.handles > 0
    }
}

/// The attributes in a message; `None` for a kind that does not exist.
pub fn attributes_from_proto(inode: &v1::Inode) -> Option<Attributes> {
    let times = inode.times.unwrap_or_default();
    Some(Attributes {
        ino: Ino(inode.ino),
        kind: FileKind::from_mode(inode.mode)?,
        permissions: inode.mode & MODE_PERMISSIONS,
        nlink: inode.nlink,
        uid: inode.uid,
        gid: inode.gid,
        rdev: inode.rdev,
        size: inode.size,
        allocated_bytes: inode.allocated_bytes,
        atime: times.atime.unwrap_or_default().into(),
        mtime: times.mtime.unwrap_or_default().into(),
        ctime: times.ctime.unwrap_or_default().into(),
    })
}
