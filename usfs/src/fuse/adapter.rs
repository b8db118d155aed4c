//! The kernel's requests, one method each. Nothing is decided here.
//!
//! A handler polls the operation once on its FUSE thread. What is not ready then moves to the
//! runtime, with its reply, and the thread takes the next request: no request waits behind another.

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::SystemTime;

use bytes::Bytes;
use fuser::{
    AccessFlags, BsdFileFlags, CopyFileRangeFlags, Errno, FileHandle, Filesystem, FopenFlags,
    INodeNo, InitFlags, IoctlFlags, KernelConfig, LockOwner, PollEvents, PollFlags, PollNotifier,
    RenameFlags, Request, TimeOrNow, WriteFlags,
};
use fuser::{
    ReplyAttr, ReplyBmap, ReplyCreate, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty,
    ReplyEntry, ReplyIoctl, ReplyLock, ReplyLseek, ReplyOpen, ReplyPoll, ReplyStatfs, ReplyWrite,
    ReplyXattr,
};
use us_core::ids::Ino;

use super::convert;
use super::serve::{
    Adapter, GENERATION, Listing, answer_attr, answer_entry, answer_opened, answer_value,
    keep_cache, refuse,
};
use crate::attributes::{FileKind, SetAttributes};
use crate::fs::{Handle, Lock, LockType, Lookup, Opened};

/// The largest WRITE and READ, in bytes.
pub(super) const REQUEST_BYTES_MAX: u32 = 1 << 20;
/// Requests the kernel sends without waiting for answers (read-ahead, asynchronous direct I/O).
const BACKGROUND_MAX: u16 = 128;
/// What `statfs` shows as free inodes: they end only with the space.
const FREE_INODES: u64 = 1_000_000_000;
/// The most bytes one copy_file_range answers: its reply counts in 32 bits.
const COPY_BYTES_MAX: u64 = 1 << 30;
/// What is asked of the kernel (DESIGN §12). Never asked: SETXATTR_EXT (fuser 0.18 panics on it)
/// and WRITEBACK_CACHE (the write-back cache is ours); FLOCK_LOCKS neither, so that flock stays with
/// the kernel of each machine.
const WANTED: [InitFlags; 11] = [
    InitFlags::FUSE_ASYNC_DIO,
    InitFlags::FUSE_PARALLEL_DIROPS,
    InitFlags::FUSE_DO_READDIRPLUS,
    InitFlags::FUSE_READDIRPLUS_AUTO,
    InitFlags::FUSE_CACHE_SYMLINKS,
    InitFlags::FUSE_EXPLICIT_INVAL_DATA,
    InitFlags::FUSE_HANDLE_KILLPRIV_V2,
    InitFlags::FUSE_POSIX_ACL,
    InitFlags::FUSE_DONT_MASK,
    InitFlags::FUSE_EXPORT_SUPPORT,
    InitFlags::FUSE_POSIX_LOCKS,
];

/// Unwraps what the kernel asked for, or answers the errno that says why not.
macro_rules! or_refuse {
    ($value:expr, $reply:expr) => {
        match $value {
            Ok(value) => value,
            Err(errno) => return $reply.error(errno),
        }
    };
}

const fn handle(handle: FileHandle) -> Handle {
    Handle(handle.0)
}

impl Filesystem for Adapter {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> io::Result<()> {
        for flag in WANTED {
            if config.add_capabilities(flag).is_err() {
                tracing::warn!(?flag, "this kernel's FUSE does not have it; going on without");
            }
        }
        // Each answers the nearest value that it can do, which is then what there is.
        let _ = config.set_max_write(REQUEST_BYTES_MAX);
        let _ = config.set_max_background(BACKGROUND_MAX);
        if let Err(nearest) = config.set_max_readahead(REQUEST_BYTES_MAX) {
            let _ = config.set_max_readahead(nearest);
        }
        Ok(())
    }

    fn lookup(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let (fs, caller, name) = (self.fs.clone(), convert::caller(request), convert::owned(name));
        let work = async move { fs.lookup(caller, Ino(parent.0), &name).await };
        self.serve("lookup", parent, reply, work, |reply, lookup| match lookup {
            Lookup::Found(entry) => answer_entry(reply, entry),
            Lookup::Absent(valid) if valid.is_zero() => reply.error(Errno::ENOENT),
            Lookup::Absent(valid) => {
                let nothing = convert::blank_attr(0, fuser::FileType::RegularFile);
                reply.entry(&valid, &nothing, GENERATION);
            }
        });
    }

    fn forget(&self, _request: &Request, ino: INodeNo, lookups: u64) {
        self.fs.forget(Ino(ino.0), lookups);
    }

    fn getattr(
        &self,
        _request: &Request,
        ino: INodeNo,
        _handle: Option<FileHandle>,
        reply: ReplyAttr,
    ) {
        let fs = self.fs.clone();
        let work = async move { fs.getattr(Ino(ino.0)).await };
        self.serve("getattr", ino, reply, work, answer_attr);
    }

    fn setattr(
        &self,
        request: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        file: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let caller = convert::caller(request);
        // fuser 0.18 does not show FATTR_KILL_SUIDGID. A change of owner always kills; a truncation
        // unless the caller has CAP_FSETID, for which root stands here.
        let kill_suid = uid.is_some() || gid.is_some() || (size.is_some() && caller.uid != 0);
        let change = SetAttributes {
            mode,
            uid,
            gid,
            size,
            atime: atime.map(convert::set_time),
            mtime: mtime.map(convert::set_time),
            kill_suid,
        };
        let fs = self.fs.clone();
        let work = async move { fs.setattr(caller, Ino(ino.0), file.map(handle), change).await };
        self.serve("setattr", ino, reply, work, answer_attr);
    }

    fn readlink(&self, _request: &Request, ino: INodeNo, reply: ReplyData) {
        let fs = self.fs.clone();
        let work = async move { fs.readlink(Ino(ino.0)).await };
        self.serve("readlink", ino, reply, work, |reply, target: Bytes| reply.data(&target));
    }

    fn mknod(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        rdev: u32,
        reply: ReplyEntry,
    ) {
        let (fs, caller, name) =
            (self.fs.clone(), convert::caller_with(request, umask), convert::owned(name));
        let work = async move { fs.mknod(caller, Ino(parent.0), &name, mode, rdev).await };
        self.serve("mknod", parent, reply, work, answer_entry);
    }

    fn mkdir(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        reply: ReplyEntry,
    ) {
        let (fs, caller, name) =
            (self.fs.clone(), convert::caller_with(request, umask), convert::owned(name));
        let work = async move { fs.mkdir(caller, Ino(parent.0), &name, mode).await };
        self.serve("mkdir", parent, reply, work, answer_entry);
    }

    fn unlink(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let (fs, caller, name) = (self.fs.clone(), convert::caller(request), convert::owned(name));
        let work = async move { fs.unlink(caller, Ino(parent.0), &name).await };
        self.serve("unlink", parent, reply, work, |reply, ()| reply.ok());
    }

    fn rmdir(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let (fs, caller, name) = (self.fs.clone(), convert::caller(request), convert::owned(name));
        let work = async move { fs.rmdir(caller, Ino(parent.0), &name).await };
        self.serve("rmdir", parent, reply, work, |reply, ()| reply.ok());
    }

    fn symlink(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        target: &Path,
        reply: ReplyEntry,
    ) {
        let (fs, caller, name) = (self.fs.clone(), convert::caller(request), convert::owned(name));
        let target = convert::owned(target.as_os_str());
        let work = async move { fs.symlink(caller, Ino(parent.0), &name, &target).await };
        self.serve("symlink", parent, reply, work, answer_entry);
    }

    fn rename(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        new_parent: INodeNo,
        new_name: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let mode = or_refuse!(convert::rename_mode(flags), reply);
        let (fs, caller) = (self.fs.clone(), convert::caller(request));
        let (name, new_name) = (convert::owned(name), convert::owned(new_name));
        let work = async move {
            fs.rename(caller, (Ino(parent.0), &name), (Ino(new_parent.0), &new_name), mode).await
        };
        self.serve("rename", parent, reply, work, |reply, ()| reply.ok());
    }

    fn link(
        &self,
        request: &Request,
        ino: INodeNo,
        new_parent: INodeNo,
        new_name: &OsStr,
        reply: ReplyEntry,
    ) {
        let (fs, caller) = (self.fs.clone(), convert::caller(request));
        let name = convert::owned(new_name);
        let work = async move { fs.link(caller, Ino(ino.0), Ino(new_parent.0), &name).await };
        self.serve("link", ino, reply, work, answer_entry);
    }

    fn open(&self, request: &Request, ino: INodeNo, flags: fuser::OpenFlags, reply: ReplyOpen) {
        let (fs, caller, flags) =
            (self.fs.clone(), convert::caller(request), convert::open_flags(flags.0));
        // Counted before it is open, and taken back if it fails: never too few.
        if flags.write {
            self.writers.opened(ino);
        }
        let writers = flags.write.then(|| self.writers.clone());
        self.run("open", ino, async move {
            match fs.open(caller, Ino(ino.0), flags).await {
                Ok(opened) => answer_opened(reply, opened),
                Err(error) => {
                    if let Some(writers) = writers {
                        writers.closed(ino);
                    }
                    refuse("open", ino, &error, reply);
                }
            }
        });
    }

    fn create(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let (fs, caller, name) =
            (self.fs.clone(), convert::caller_with(request, umask), convert::owned(name));
        let flags = convert::open_flags(flags);
        let writers = flags.write.then(|| self.writers.clone());
        let work = async move { fs.create(caller, Ino(parent.0), &name, mode, flags).await };
        self.serve("create", parent, reply, work, move |reply, (entry, opened)| {
            if let Some(writers) = writers {
                writers.opened(INodeNo(entry.attributes.ino.0));
            }
            reply.created(
                &entry.valid,
                &convert::file_attr(&entry.attributes),
                GENERATION,
                FileHandle(opened.handle.0),
                keep_cache(opened),
            );
        });
    }

    fn read(
        &self,
        _request: &Request,
        ino: INodeNo,
        file: FileHandle,
        offset: u64,
        size: u32,
        _flags: fuser::OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let fs = self.fs.clone();
        let work = async move { fs.read(handle(file), offset, size as usize).await };
        self.serve("read", ino, reply, work, |reply, data: Bytes| reply.data(&data));
    }

    fn write(
        &self,
        _request: &Request,
        ino: INodeNo,
        file: FileHandle,
        offset: u64,
        data: &[u8],
        write_flags: WriteFlags,
        flags: fuser::OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let flags = convert::write_flags(write_flags, flags.0);
        let file = handle(file);
        let ready = {
            let _entered = self.runtime.enter();
            self.fs.try_write_as(file, offset, data, flags)
        };
        match ready {
            Some(Ok(written)) => return reply.written(written as u32),
            Some(Err(error)) => return refuse("write", ino, &error, reply),
            None => {}
        }
        let (fs, data) = (self.fs.clone(), Bytes::copy_from_slice(data));
        let work = async move { fs.write_as(file, offset, data, flags).await };
        self.serve("write", ino, reply, work, |reply, written| reply.written(written as u32));
    }

    fn flush(
        &self,
        _request: &Request,
        ino: INodeNo,
        file: FileHandle,
        owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        let fs = self.fs.clone();
        let work = async move { fs.flush(handle(file), owner.0).await };
        self.serve("flush", ino, reply, work, |reply, ()| reply.ok());
    }

    fn release(
        &self,
        _request: &Request,
        ino: INodeNo,
        file: FileHandle,
        flags: fuser::OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        if convert::open_flags(flags.0).write {
            self.writers.closed(ino);
        }
        let _entered = self.runtime.enter();
        self.fs.release(handle(file));
        reply.ok();
    }

    fn fsync(
        &self,
        _request: &Request,
        ino: INodeNo,
        file: FileHandle,
        data_only: bool,
        reply: ReplyEmpty,
    ) {
        let fs = self.fs.clone();
        let work = async move { fs.fsync(handle(file), data_only).await };
        self.serve("fsync", ino, reply, work, |reply, ()| reply.ok());
    }

    fn opendir(&self, request: &Request, ino: INodeNo, _flags: fuser::OpenFlags, reply: ReplyOpen) {
        let (fs, caller) = (self.fs.clone(), convert::caller(request));
        let work = async move { fs.opendir(caller, Ino(ino.0)).await };
        self.serve("opendir", ino, reply, work, |reply, opened: Opened| {
            let mut flags = keep_cache(opened);
            if opened.keep_cache {
                flags |= FopenFlags::FOPEN_CACHE_DIR;
            }
            reply.opened(FileHandle(opened.handle.0), flags);
        });
    }

    fn readdir(
        &self,
        _request: &Request,
        ino: INodeNo,
        file: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let fs = self.fs.clone();
        self.run("readdir", ino, async move {
            let listed = fs
                .readdir(handle(file), offset, &mut |listed| {
                    let kind = convert::file_type(listed.kind);
                    let name = OsStr::from_bytes(listed.name);
                    !reply.add(INodeNo(listed.ino.0), listed.cookie, kind, name)
                })
                .await;
            match listed {
                Ok(()) => reply.ok(),
                Err(error) => refuse("readdir", ino, &error, reply),
            }
        });
    }

    fn readdirplus(
        &self,
        request: &Request,
        ino: INodeNo,
        file: FileHandle,
        offset: u64,
        reply: ReplyDirectoryPlus,
    ) {
        let (fs, caller) = (self.fs.clone(), convert::caller(request));
        let (parent, cookie) = (Ino(ino.0), offset);
        self.run("readdirplus", ino, async move {
            let mut listing = Listing { reply, names: 0, without_entry: None };
            let mut listed =
                fs.readdirplus(handle(file), cookie, &mut |name| listing.add(&name)).await;
            if let (Ok(()), 0, Some((cookie, name))) =
                (&listed, listing.names, listing.without_entry.take())
            {
                match fs.lookup(caller, parent, &name).await {
                    Ok(Lookup::Found(entry)) => {
                        listing.push(cookie, &name, &entry);
                    }
                    // Gone since it was listed. The kernel needs a name to go on from, so it gets
                    // this one, of no inode, and skips it.
                    Ok(Lookup::Absent(_)) => {
                        listing.push_blank(cookie, &name, 0, FileKind::Regular);
                    }
                    Err(error) => listed = Err(error),
                }
            }
            match listed {
                Ok(()) => listing.reply.ok(),
                Err(error) => refuse("readdirplus", ino, &error, listing.reply),
            }
        });
    }

    fn releasedir(
        &self,
        _request: &Request,
        _ino: INodeNo,
        file: FileHandle,
        _flags: fuser::OpenFlags,
        reply: ReplyEmpty,
    ) {
        self.fs.releasedir(handle(file));
        reply.ok();
    }

    fn fsyncdir(
        &self,
        _request: &Request,
        ino: INodeNo,
        file: FileHandle,
        _data_only: bool,
        reply: ReplyEmpty,
    ) {
        let fs = self.fs.clone();
        let work = async move { fs.fsyncdir(handle(file)).await };
        self.serve("fsyncdir", ino, reply, work, |reply, ()| reply.ok());
    }

    fn statfs(&self, _request: &Request, ino: INodeNo, reply: ReplyStatfs) {
        let fs = self.fs.clone();
        let work = async move { fs.statfs().await };
        self.serve("statfs", ino, reply, work, |reply, now| {
            let blocks = |bytes: u64| bytes / u64::from(convert::BLOCK_BYTES);
            reply.statfs(
                blocks(now.total_bytes),
                blocks(now.free_bytes),
                blocks(now.available_bytes),
                now.inodes + FREE_INODES,
                FREE_INODES,
                convert::BLOCK_BYTES,
                crate::fs::NAME_BYTES_MAX as u32,
                convert::BLOCK_BYTES,
            );
        });
    }

    fn setxattr(
        &self,
        request: &Request,
        ino: INodeNo,
        name: &OsStr,
        value: &[u8],
        flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        let mode = or_refuse!(convert::xattr_mode(flags), reply);
        let (fs, caller, name) = (self.fs.clone(), convert::caller(request), convert::owned(name));
        let value: Box<[u8]> = value.into();
        let work = async move { fs.setxattr(caller, Ino(ino.0), &name, &value, mode).await };
        self.serve("setxattr", ino, reply, work, |reply, ()| reply.ok());
    }

    fn getxattr(
        &self,
        _request: &Request,
        ino: INodeNo,
        name: &OsStr,
        size: u32,
        reply: ReplyXattr,
    ) {
        let (fs, name) = (self.fs.clone(), convert::owned(name));
        let work = async move { fs.getxattr(Ino(ino.0), &name).await };
        self.serve("getxattr", ino, reply, work, move |reply, value: Bytes| {
            answer_value(reply, &value, size);
        });
    }

    fn listxattr(&self, _request: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        let fs = self.fs.clone();
        let work = async move { fs.listxattr(Ino(ino.0)).await };
        self.serve("listxattr", ino, reply, work, move |reply, names: Bytes| {
            answer_value(reply, &names, size);
        });
    }

    fn removexattr(&self, request: &Request, ino: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let (fs, caller, name) = (self.fs.clone(), convert::caller(request), convert::owned(name));
        let work = async move { fs.removexattr(caller, Ino(ino.0), &name).await };
        self.serve("removexattr", ino, reply, work, |reply, ()| reply.ok());
    }

    fn getlk(
        &self,
        _request: &Request,
        ino: INodeNo,
        _file: FileHandle,
        owner: LockOwner,
        start: u64,
        end: u64,
        kind: i32,
        pid: u32,
        reply: ReplyLock,
    ) {
        let kind = or_refuse!(convert::lock_type(kind), reply);
        let (fs, lock) = (self.fs.clone(), Lock { owner: owner.0, start, end, kind, pid });
        let work = async move { fs.getlk(Ino(ino.0), lock).await };
        self.serve("getlk", ino, reply, work, move |reply, blocking| {
            let lock = blocking.unwrap_or(Lock { kind: LockType::Unlock, pid: 0, ..lock });
            reply.locked(lock.start, lock.end, convert::lock_number(lock.kind), lock.pid);
        });
    }

    fn setlk(
        &self,
        _request: &Request,
        ino: INodeNo,
        file: FileHandle,
        owner: LockOwner,
        start: u64,
        end: u64,
        kind: i32,
        pid: u32,
        wait: bool,
        reply: ReplyEmpty,
    ) {
        let kind = or_refuse!(convert::lock_type(kind), reply);
        let (fs, lock) = (self.fs.clone(), Lock { owner: owner.0, start, end, kind, pid });
        let work = async move { fs.setlk(Ino(ino.0), handle(file), lock, wait).await };
        self.serve("setlk", ino, reply, work, |reply, ()| reply.ok());
    }

    fn fallocate(
        &self,
        _request: &Request,
        ino: INodeNo,
        file: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let mode = or_refuse!(convert::allocate_mode(mode), reply);
        let fs = self.fs.clone();
        let work = async move { fs.fallocate(handle(file), offset, length, mode).await };
        self.serve("fallocate", ino, reply, work, |reply, ()| reply.ok());
    }

    fn lseek(
        &self,
        _request: &Request,
        ino: INodeNo,
        file: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        let seek = or_refuse!(convert::seek_for(whence), reply);
        let offset = or_refuse!(u64::try_from(offset).map_err(|_| Errno::ENXIO), reply);
        let (fs, flushed) = (self.fs.clone(), self.flush_mapped_pages(ino));
        let work = async move {
            flushed.await;
            fs.lseek(handle(file), offset, seek).await
        };
        self.serve("lseek", ino, reply, work, |reply, found| reply.offset(found as i64));
    }

    fn copy_file_range(
        &self,
        _request: &Request,
        ino: INodeNo,
        file: FileHandle,
        offset: u64,
        _to_ino: INodeNo,
        to_file: FileHandle,
        to_offset: u64,
        length: u64,
        _flags: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        let fs = self.fs.clone();
        let (from, to) = ((handle(file), offset), (handle(to_file), to_offset));
        let length = length.min(COPY_BYTES_MAX);
        let work = async move { fs.copy_file_range(from, to, length).await };
        self.serve("copy_file_range", ino, reply, work, |reply, bytes| {
            reply.written(bytes as u32);
        });
    }

    // What is not here to be done. Each errno is the one that makes the kernel, or the program, go
    // on: ENOSYS ends the kernel's asking.

    fn access(&self, _request: &Request, _ino: INodeNo, _mask: AccessFlags, reply: ReplyEmpty) {
        // default_permissions: the kernel decides, and does not ask.
        reply.error(Errno::ENOSYS);
    }

    fn bmap(&self, _request: &Request, _ino: INodeNo, _size: u32, _index: u64, reply: ReplyBmap) {
        reply.error(Errno::ENOSYS);
    }

    fn ioctl(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _file: FileHandle,
        _flags: IoctlFlags,
        _command: u32,
        _input: &[u8],
        _output_bytes: u32,
        reply: ReplyIoctl,
    ) {
        reply.error(Errno::ENOTTY);
    }

    fn poll(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _file: FileHandle,
        _notifier: PollNotifier,
        _events: PollEvents,
        _flags: PollFlags,
        reply: ReplyPoll,
    ) {
        // Files are always ready, which is what the kernel takes ENOSYS to mean.
        reply.error(Errno::ENOSYS);
    }
}
