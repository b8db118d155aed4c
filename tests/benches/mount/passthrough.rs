//! A FUSE pass-through: every request is the same system call on a folder. What FUSE itself costs,
//! and so the limit that a FUSE file system on the same disk is measured against.
//!
//! It owns the folder, as libfuse's `passthrough_hp` does by default: names and attributes stay in
//! the kernel for a day, pages over a close, and writes go to the kernel's write-back cache. It runs as
//! root in a process of its own ([`serve`]) until it is unmounted. All requests are done as root.
//!
//! Not here: extended attributes (refused once, then the kernel does not ask), O_TMPFILE, mounts below
//! the folder. File locks stay with the kernel.

mod listing;
mod nodes;

use std::cell::RefCell;
use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::{Duration, SystemTime};

use anyhow::Context;
use fuser::{
    BsdFileFlags, Config, Errno, FileHandle, Filesystem, FopenFlags, Generation, INodeNo,
    InitFlags, KernelConfig, LockOwner, MountOption, OpenFlags, RenameFlags, Request, Session,
    SessionACL, TimeOrNow, WriteFlags,
};
use fuser::{
    ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry,
    ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr,
};
use parking_lot::Mutex;
use rustix::fs::{AtFlags, CWD, FallocateFlags, Mode, OFlags, Timestamps};

use self::listing::Listing;
use self::nodes::{Handles, Nodes, attr_of, nothing};

/// How long the kernel may believe a name and its attributes: nobody else changes them.
const VALID: Duration = Duration::from_secs(86_400);
const GENERATION: Generation = Generation(0);
/// As the mounts of `usfs`: threads, the largest request, read-ahead, requests in the background.
const THREADS: usize = 4;
const REQUEST_BYTES_MAX: u32 = 1 << 20;
const READ_AHEAD_KIB: u32 = 4096;
const BACKGROUND_MAX: u16 = 128;
/// O_DIRECT wants memory, offsets and lengths in multiples of this.
const PAGE_BYTES: usize = 4096;
const WANTED: [InitFlags; 8] = [
    InitFlags::FUSE_ASYNC_DIO,
    InitFlags::FUSE_ATOMIC_O_TRUNC,
    InitFlags::FUSE_CACHE_SYMLINKS,
    InitFlags::FUSE_DO_READDIRPLUS,
    InitFlags::FUSE_EXPORT_SUPPORT,
    InitFlags::FUSE_PARALLEL_DIROPS,
    InitFlags::FUSE_READDIRPLUS_AUTO,
    InitFlags::FUSE_WRITEBACK_CACHE,
];

thread_local! {
    /// What a thread's requests are read into.
    static BUFFER: RefCell<Vec<u8>> =
        RefCell::new(vec![0; REQUEST_BYTES_MAX as usize + PAGE_BYTES]);
}

/// Mounts `source` at `point` and serves it until it is unmounted.
pub fn serve(source: &Path, point: &Path) -> anyhow::Result<()> {
    // The kernel has applied the caller's.
    rustix::process::umask(Mode::empty());
    let nodes = Nodes::new(source).with_context(|| format!("open {}", source.display()))?;
    let fs = PassThrough { nodes, files: Handles::default(), folders: Handles::default() };
    let mut config = Config::default();
    config.acl = SessionACL::All;
    config.n_threads = Some(THREADS);
    config.clone_fd = true;
    config.mount_options =
        vec![MountOption::FSName("us-passthrough".into()), MountOption::DefaultPermissions];
    let session = Session::new(fs, point, &config)
        .with_context(|| format!("mount at {}", point.display()))?;
    raise_read_ahead(point).context("raise the read-ahead")?;
    session.run().context("serve")
}

/// The kernel's read-ahead on a mount is 128 KiB, whatever FUSE agreed on.
fn raise_read_ahead(point: &Path) -> io::Result<()> {
    let mounted = usfs::fuse::kernel::mount_at(&point.canonicalize()?)?;
    let mounted = mounted.ok_or(io::ErrorKind::NotFound)?;
    let path = format!("/sys/class/bdi/{}/read_ahead_kb", mounted.device);
    std::fs::write(path, READ_AHEAD_KIB.to_string())
}

/// An open file.
struct Open {
    fd: OwnedFd,
    direct: bool,
}

struct PassThrough {
    nodes: Nodes,
    files: Handles<Open>,
    folders: Handles<Mutex<Listing>>,
}

fn errno(error: rustix::io::Errno) -> Errno {
    Errno::from_i32(error.raw_os_error())
}

/// Answers what the system said, or hands over what it gave.
macro_rules! or_refuse {
    ($result:expr, $reply:expr) => {
        match $result {
            Ok(value) => value,
            Err(error) => return $reply.error(errno(error)),
        }
    };
}

fn answer(result: rustix::io::Result<()>, reply: ReplyEmpty) {
    match result {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(errno(error)),
    }
}

/// With the write-back cache the kernel reads where a program only writes, and knows itself where a
/// file ends.
fn source_flags(flags: i32) -> OFlags {
    let flags = OFlags::from_bits_retain(flags as u32);
    let mut kept = flags - OFlags::APPEND - OFlags::NOFOLLOW;
    if flags & OFlags::RWMODE == OFlags::WRONLY {
        kept = (kept - OFlags::RWMODE) | OFlags::RDWR;
    }
    kept | OFlags::CLOEXEC
}

/// The path under which an O_PATH descriptor is opened for its bytes.
fn by_descriptor(fd: &OwnedFd) -> String {
    use std::os::fd::AsRawFd;
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

fn mode(bits: u32) -> Mode {
    Mode::from_raw_mode(bits & 0o7777)
}

fn timestamp(time: Option<TimeOrNow>) -> rustix::fs::Timespec {
    let (tv_sec, tv_nsec) = match time {
        None => (0, rustix::fs::UTIME_OMIT),
        Some(TimeOrNow::Now) => (0, rustix::fs::UTIME_NOW),
        Some(TimeOrNow::SpecificTime(time)) => {
            let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
            (since.as_secs() as i64, i64::from(since.subsec_nanos()))
        }
    };
    rustix::fs::Timespec { tv_sec, tv_nsec }
}

impl PassThrough {
    /// Looks a new name up, as every request that makes one ends.
    fn entry(&self, parent: &OwnedFd, name: &OsStr, reply: ReplyEntry) {
        let stat = or_refuse!(self.nodes.look_up(parent, name.as_bytes()), reply);
        reply.entry(&VALID, &attr_of(&stat), GENERATION);
    }

    fn open_file(&self, fd: OwnedFd, flags: OFlags) -> FileHandle {
        FileHandle(self.files.add(Open { fd, direct: flags.contains(OFlags::DIRECT) }))
    }

    fn change(
        &self,
        fd: &OwnedFd,
        permissions: Option<u32>,
        owner: (Option<u32>, Option<u32>),
        size: Option<u64>,
        times: (Option<TimeOrNow>, Option<TimeOrNow>),
    ) -> rustix::io::Result<()> {
        if let Some(bits) = permissions {
            rustix::fs::chmod(by_descriptor(fd), mode(bits))?;
        }
        if owner != (None, None) {
            let uid = owner.0.map(rustix::fs::Uid::from_raw);
            let gid = owner.1.map(rustix::fs::Gid::from_raw);
            rustix::fs::chownat(fd, c"", uid, gid, AtFlags::EMPTY_PATH)?;
        }
        if let Some(bytes) = size {
            let flags = OFlags::WRONLY | OFlags::CLOEXEC;
            let file = rustix::fs::openat(CWD, by_descriptor(fd), flags, Mode::empty())?;
            rustix::fs::ftruncate(file, bytes)?;
        }
        if times.0.is_some() || times.1.is_some() {
            let (last_access, last_modification) = (timestamp(times.0), timestamp(times.1));
            let times = Timestamps { last_access, last_modification };
            rustix::fs::utimensat(fd, c"", &times, AtFlags::EMPTY_PATH)?;
        }
        Ok(())
    }
}

impl Filesystem for PassThrough {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> io::Result<()> {
        for flag in WANTED {
            // An older kernel goes on without.
            let _ = config.add_capabilities(flag);
        }
        let _ = config.set_max_write(REQUEST_BYTES_MAX);
        let _ = config.set_max_background(BACKGROUND_MAX);
        if let Err(nearest) = config.set_max_readahead(REQUEST_BYTES_MAX) {
            let _ = config.set_max_readahead(nearest);
        }
        Ok(())
    }

    fn lookup(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let parent = or_refuse!(self.nodes.get(parent), reply);
        match self.nodes.look_up(&parent, name.as_bytes()) {
            Ok(stat) => reply.entry(&VALID, &attr_of(&stat), GENERATION),
            Err(rustix::io::Errno::NOENT) => reply.entry(&VALID, &nothing(), GENERATION),
            Err(error) => reply.error(errno(error)),
        }
    }

    fn forget(&self, _request: &Request, ino: INodeNo, lookups: u64) {
        self.nodes.forget(ino, lookups);
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        let node = or_refuse!(self.nodes.get(ino), reply);
        let stat = or_refuse!(rustix::fs::fstat(&node), reply);
        reply.attr(&VALID, &attr_of(&stat));
    }

    fn setattr(
        &self,
        _request: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _file: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let node = or_refuse!(self.nodes.get(ino), reply);
        or_refuse!(self.change(&node, mode, (uid, gid), size, (atime, mtime)), reply);
        let stat = or_refuse!(rustix::fs::fstat(&node), reply);
        reply.attr(&VALID, &attr_of(&stat));
    }

    fn readlink(&self, _request: &Request, ino: INodeNo, reply: ReplyData) {
        let node = or_refuse!(self.nodes.get(ino), reply);
        let target = or_refuse!(rustix::fs::readlinkat(&node, c"", Vec::new()), reply);
        reply.data(target.as_bytes());
    }

    fn mknod(
        &self,
        _request: &Request,
        parent: INodeNo,
        name: &OsStr,
        bits: u32,
        _umask: u32,
        rdev: u32,
        reply: ReplyEntry,
    ) {
        let parent = or_refuse!(self.nodes.get(parent), reply);
        let kind = rustix::fs::FileType::from_raw_mode(bits);
        let made = rustix::fs::mknodat(&parent, name, kind, mode(bits), rdev.into());
        or_refuse!(made, reply);
        self.entry(&parent, name, reply);
    }

    fn mkdir(
        &self,
        _request: &Request,
        parent: INodeNo,
        name: &OsStr,
        bits: u32,
        _umask: u32,
        reply: ReplyEntry,
    ) {
        let parent = or_refuse!(self.nodes.get(parent), reply);
        or_refuse!(rustix::fs::mkdirat(&parent, name, mode(bits)), reply);
        self.entry(&parent, name, reply);
    }

    fn unlink(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let parent = or_refuse!(self.nodes.get(parent), reply);
        answer(rustix::fs::unlinkat(&parent, name, AtFlags::empty()), reply);
    }

    fn rmdir(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let parent = or_refuse!(self.nodes.get(parent), reply);
        answer(rustix::fs::unlinkat(&parent, name, AtFlags::REMOVEDIR), reply);
    }

    fn symlink(
        &self,
        _request: &Request,
        parent: INodeNo,
        name: &OsStr,
        target: &Path,
        reply: ReplyEntry,
    ) {
        let parent = or_refuse!(self.nodes.get(parent), reply);
        or_refuse!(rustix::fs::symlinkat(target, &parent, name), reply);
        self.entry(&parent, name, reply);
    }

    fn rename(
        &self,
        _request: &Request,
        parent: INodeNo,
        name: &OsStr,
        new_parent: INodeNo,
        new_name: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let parent = or_refuse!(self.nodes.get(parent), reply);
        let new_parent = or_refuse!(self.nodes.get(new_parent), reply);
        let flags = rustix::fs::RenameFlags::from_bits_retain(flags.bits());
        answer(rustix::fs::renameat_with(&parent, name, &new_parent, new_name, flags), reply);
    }

    fn link(
        &self,
        _request: &Request,
        ino: INodeNo,
        new_parent: INodeNo,
        new_name: &OsStr,
        reply: ReplyEntry,
    ) {
        let node = or_refuse!(self.nodes.get(ino), reply);
        let parent = or_refuse!(self.nodes.get(new_parent), reply);
        let linked = rustix::fs::linkat(&node, c"", &parent, new_name, AtFlags::EMPTY_PATH);
        or_refuse!(linked, reply);
        self.entry(&parent, new_name, reply);
    }

    fn open(&self, _request: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let node = or_refuse!(self.nodes.get(ino), reply);
        let flags = source_flags(flags.0);
        let opened = rustix::fs::openat(CWD, by_descriptor(&node), flags, Mode::empty());
        let handle = self.open_file(or_refuse!(opened, reply), flags);
        reply.opened(handle, FopenFlags::FOPEN_KEEP_CACHE);
    }

    fn create(
        &self,
        _request: &Request,
        parent: INodeNo,
        name: &OsStr,
        bits: u32,
        _umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let parent = or_refuse!(self.nodes.get(parent), reply);
        let flags = source_flags(flags) | OFlags::CREATE;
        let opened = or_refuse!(rustix::fs::openat(&parent, name, flags, mode(bits)), reply);
        let stat = or_refuse!(self.nodes.look_up(&parent, name.as_bytes()), reply);
        let handle = self.open_file(opened, flags);
        reply.created(&VALID, &attr_of(&stat), GENERATION, handle, FopenFlags::FOPEN_KEEP_CACHE);
    }

    fn read(
        &self,
        _request: &Request,
        _ino: INodeNo,
        file: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let file = or_refuse!(self.files.get(file.0), reply);
        BUFFER.with_borrow_mut(|buffer| {
            let from = buffer.as_ptr().align_offset(PAGE_BYTES);
            let size = (size as usize).min(REQUEST_BYTES_MAX as usize);
            let bytes = &mut buffer[from..from + size];
            let count = or_refuse!(rustix::io::pread(&file.fd, &mut *bytes, offset), reply);
            reply.data(&bytes[..count]);
        });
    }

    fn write(
        &self,
        _request: &Request,
        _ino: INodeNo,
        file: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let file = or_refuse!(self.files.get(file.0), reply);
        let written = if file.direct {
            BUFFER.with_borrow_mut(|buffer| {
                let from = buffer.as_ptr().align_offset(PAGE_BYTES);
                let bytes = &mut buffer[from..from + data.len()];
                bytes.copy_from_slice(data);
                rustix::io::pwrite(&file.fd, bytes, offset)
            })
        } else {
            rustix::io::pwrite(&file.fd, data, offset)
        };
        let written = or_refuse!(written, reply);
        reply.written(written as u32);
    }

    fn flush(
        &self,
        _request: &Request,
        _ino: INodeNo,
        file: FileHandle,
        _owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        // A close of another descriptor of the same open file: what the source does at a close.
        let file = or_refuse!(self.files.get(file.0), reply);
        answer(rustix::io::dup(&file.fd).map(drop), reply);
    }

    fn release(
        &self,
        _request: &Request,
        _ino: INodeNo,
        file: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        self.files.remove(file.0);
        reply.ok();
    }

    fn fsync(
        &self,
        _request: &Request,
        _ino: INodeNo,
        file: FileHandle,
        data_only: bool,
        reply: ReplyEmpty,
    ) {
        let file = or_refuse!(self.files.get(file.0), reply);
        answer(sync(&file.fd, data_only), reply);
    }

    fn opendir(&self, _request: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        let node = or_refuse!(self.nodes.get(ino), reply);
        let listing = or_refuse!(Listing::open(&node), reply);
        let handle = FileHandle(self.folders.add(Mutex::new(listing)));
        reply.opened(handle, FopenFlags::FOPEN_KEEP_CACHE | FopenFlags::FOPEN_CACHE_DIR);
    }

    fn readdir(
        &self,
        _request: &Request,
        _ino: INodeNo,
        folder: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let folder = or_refuse!(self.folders.get(folder.0), reply);
        let filled = folder.lock().list(offset, |name| {
            let text = OsStr::from_bytes(&name.name);
            Ok(!reply.add(INodeNo(name.ino), name.cookie, name.kind, text))
        });
        or_refuse!(filled, reply);
        reply.ok();
    }

    fn readdirplus(
        &self,
        _request: &Request,
        ino: INodeNo,
        folder: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        let node = or_refuse!(self.nodes.get(ino), reply);
        let folder = or_refuse!(self.folders.get(folder.0), reply);
        let filled = folder.lock().list(offset, |name| {
            let stat = self.nodes.look_up(&node, &name.name)?;
            let (attr, text) = (attr_of(&stat), OsStr::from_bytes(&name.name));
            let full = reply.add(attr.ino, name.cookie, text, &VALID, &attr, GENERATION);
            if full {
                // The kernel does not hear of it.
                self.nodes.forget(attr.ino, 1);
            }
            Ok(!full)
        });
        or_refuse!(filled, reply);
        reply.ok();
    }

    fn releasedir(
        &self,
        _request: &Request,
        _ino: INodeNo,
        folder: FileHandle,
        _flags: OpenFlags,
        reply: ReplyEmpty,
    ) {
        self.folders.remove(folder.0);
        reply.ok();
    }

    fn fsyncdir(
        &self,
        _request: &Request,
        _ino: INodeNo,
        folder: FileHandle,
        data_only: bool,
        reply: ReplyEmpty,
    ) {
        let folder = or_refuse!(self.folders.get(folder.0), reply);
        answer(sync(folder.lock().fd(), data_only), reply);
    }

    fn statfs(&self, _request: &Request, ino: INodeNo, reply: ReplyStatfs) {
        let node = or_refuse!(self.nodes.get(ino), reply);
        let now = or_refuse!(rustix::fs::fstatvfs(&node), reply);
        reply.statfs(
            now.f_blocks,
            now.f_bfree,
            now.f_bavail,
            now.f_files,
            now.f_ffree,
            now.f_bsize as u32,
            now.f_namemax as u32,
            now.f_frsize as u32,
        );
    }

    fn getxattr(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, reply: ReplyXattr) {
        reply.error(Errno::ENOSYS);
    }

    fn listxattr(&self, _request: &Request, _ino: INodeNo, _size: u32, reply: ReplyXattr) {
        reply.error(Errno::ENOSYS);
    }

    fn setxattr(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _name: &OsStr,
        _value: &[u8],
        _flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::ENOSYS);
    }

    fn fallocate(
        &self,
        _request: &Request,
        _ino: INodeNo,
        file: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let file = or_refuse!(self.files.get(file.0), reply);
        let mode = FallocateFlags::from_bits_retain(mode as u32);
        answer(rustix::fs::fallocate(&file.fd, mode, offset, length), reply);
    }
}

fn sync(fd: impl AsFd, data_only: bool) -> rustix::io::Result<()> {
    if data_only { rustix::fs::fdatasync(fd) } else { rustix::fs::fsync(fd) }
}
