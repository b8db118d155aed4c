//! How a request is answered: polled once on the FUSE thread, moved to the runtime if it must wait;
//! its error logged and made an errno.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::future::Future;
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use fuser::{Errno, FileHandle, FopenFlags, Generation, INodeNo, Notifier};
use fuser::{
    ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry,
    ReplyLock, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr,
};
use parking_lot::Mutex;
use tokio::runtime::Handle as Runtime;
use tokio_util::task::TaskTracker;
use tracing::Instrument;
use us_core::daemon::logging::RequestId;

use super::convert;
use crate::attributes::FileKind;
use crate::fs::{Entry, Fs, FsError, Opened};

/// Inode numbers are never reused, so one generation does for all.
pub(super) const GENERATION: Generation = Generation(0);

/// Files open for writing in this mount, and how often: only those can have pages in the kernel
/// that were changed through a mapping.
#[derive(Clone, Default)]
pub(super) struct Writers(Arc<Mutex<HashMap<INodeNo, u32>>>);

impl Writers {
    pub(super) fn opened(&self, ino: INodeNo) {
        *self.0.lock().entry(ino).or_default() += 1;
    }

    pub(super) fn closed(&self, ino: INodeNo) {
        let mut writers = self.0.lock();
        if let Some(count) = writers.get_mut(&ino) {
            *count -= 1;
            if *count == 0 {
                writers.remove(&ino);
            }
        }
    }

    fn contains(&self, ino: INodeNo) -> bool {
        self.0.lock().contains_key(&ino)
    }
}

/// The adapter that fuser calls.
pub(super) struct Adapter {
    pub(super) fs: Fs,
    pub(super) runtime: Runtime,
    pub(super) writers: Writers,
    /// The requests that were not answered at once.
    pub(super) waiting: TaskTracker,
    /// Filled in when the session exists.
    pub(super) notifier: Arc<Mutex<Option<Notifier>>>,
}

impl Adapter {
    /// Runs one request to its answer: here if it does not have to wait, else on the runtime.
    pub(super) fn run(
        &self,
        operation: &'static str,
        ino: INodeNo,
        work: impl Future<Output = ()> + Send + 'static,
    ) {
        let request = RequestId::next();
        let span = tracing::debug_span!("fuse", operation, ino = ino.0, %request);
        tracing::debug!(parent: &span, "asked");
        let mut work = Box::pin(request.scope(work).instrument(span));
        let first = {
            let _entered = self.runtime.enter();
            work.as_mut().poll(&mut Context::from_waker(Waker::noop()))
        };
        if first == Poll::Pending {
            metrics::counter!("us_fuse_waited_total", "operation" => operation).increment(1);
            self.waiting.spawn_on(work, &self.runtime);
        }
    }

    /// [`Adapter::run`] for work that ends in a value or an error.
    pub(super) fn serve<R: Refuse, T: Send + 'static>(
        &self,
        operation: &'static str,
        ino: INodeNo,
        reply: R,
        work: impl Future<Output = Result<T, FsError>> + Send + 'static,
        answer: impl FnOnce(R, T) + Send + 'static,
    ) {
        self.run(operation, ino, async move {
            match work.await {
                Ok(value) => answer(reply, value),
                Err(error) => refuse(operation, ino, &error, reply),
            }
        });
    }

    /// Makes the kernel write back the pages that a program changed through a mapping: it does so
    /// before it forgets them.
    pub(super) fn flush_mapped_pages(
        &self,
        ino: INodeNo,
    ) -> impl Future<Output = ()> + Send + 'static {
        let written = self.writers.contains(ino);
        let notifier = if written { self.notifier.lock().clone() } else { None };
        async move {
            let Some(notifier) = notifier else { return };
            let flushed = tokio::task::spawn_blocking(move || notifier.inval_inode(ino, 0, 0));
            if let Ok(Err(error)) = flushed.await {
                tracing::debug!(%error, ino = ino.0, "the kernel did not flush mapped pages");
            }
        }
    }
}

/// Answers an error, and says in the log what the errno cannot.
pub(super) fn refuse<R: Refuse>(operation: &'static str, ino: INodeNo, error: &FsError, reply: R) {
    match error {
        FsError::Io(_)
        | FsError::SessionEnded(_)
        | FsError::TimedOut(_)
        | FsError::NoSpace(_)
        | FsError::ShuttingDown => {
            metrics::counter!("us_fuse_errors_total", "operation" => operation).increment(1);
            tracing::warn!(operation, ino = ino.0, %error, "a request failed");
        }
        FsError::NotFound
        | FsError::Stale(_)
        | FsError::Exists
        | FsError::NotADirectory
        | FsError::IsADirectory
        | FsError::NotEmpty
        | FsError::NameTooLong
        | FsError::Invalid(_)
        | FsError::NotPermitted
        | FsError::ReadOnly
        | FsError::TooDeep
        | FsError::TooLarge
        | FsError::TooManyLinks
        | FsError::NoXattr
        | FsError::BufferTooSmall
        | FsError::XattrTooLarge
        | FsError::BadHandle
        | FsError::NoSuchOffset
        | FsError::Locked
        | FsError::LockWaitEnded
        | FsError::TooManyLocks
        | FsError::NotSupported => {
            tracing::trace!(operation, ino = ino.0, %error, "refused");
        }
    }
    reply.refuse(convert::errno(error));
}

/// Every kind of reply can be an error.
pub(super) trait Refuse: Send + 'static {
    fn refuse(self, errno: Errno);
}

macro_rules! refusing {
    ($($reply:ty)*) => {$(
        impl Refuse for $reply {
            fn refuse(self, errno: Errno) {
                self.error(errno);
            }
        }
    )*};
}

refusing! {
    ReplyAttr ReplyCreate ReplyData ReplyDirectory ReplyDirectoryPlus ReplyEmpty ReplyEntry
    ReplyLock ReplyLseek ReplyOpen ReplyStatfs ReplyWrite ReplyXattr
}

pub(super) fn answer_entry(reply: ReplyEntry, entry: Entry) {
    reply.entry(&entry.valid, &convert::file_attr(&entry.attributes), GENERATION);
}

pub(super) fn answer_attr(reply: ReplyAttr, entry: Entry) {
    reply.attr(&entry.valid, &convert::file_attr(&entry.attributes));
}

pub(super) fn answer_opened(reply: ReplyOpen, opened: Opened) {
    reply.opened(FileHandle(opened.handle.0), keep_cache(opened));
}

pub(super) fn answer_value(reply: ReplyXattr, value: &[u8], size: u32) {
    match u32::try_from(value.len()) {
        Ok(bytes) if size == 0 => reply.size(bytes),
        Ok(bytes) if bytes <= size => reply.data(value),
        _ => reply.error(Errno::ERANGE),
    }
}

pub(super) fn keep_cache(opened: Opened) -> FopenFlags {
    if opened.keep_cache { FopenFlags::FOPEN_KEEP_CACHE } else { FopenFlags::empty() }
}

/// A readdirplus reply being filled. fuser 0.18 cannot answer a name without its inode (`nodeid` 0),
/// and the kernel counts a lookup for each that has one: such a name ends the reply, and begins the
/// next one by being looked up.
pub(super) struct Listing {
    pub(super) reply: ReplyDirectoryPlus,
    pub(super) names: usize,
    pub(super) without_entry: Option<(u64, Box<[u8]>)>,
}

impl Listing {
    pub(super) fn add(&mut self, listed: &crate::fs::Listed<'_>) -> bool {
        if let Some(entry) = &listed.entry {
            return self.push(listed.cookie, listed.name, entry);
        }
        if matches!(listed.name, b"." | b"..") {
            return self.push_blank(listed.cookie, listed.name, listed.ino.0, listed.kind);
        }
        self.without_entry = Some((listed.cookie, listed.name.into()));
        false
    }

    pub(super) fn push(&mut self, cookie: u64, name: &[u8], entry: &Entry) -> bool {
        let attr = convert::file_attr(&entry.attributes);
        self.put(cookie, name, entry.valid, &attr)
    }

    pub(super) fn push_blank(
        &mut self,
        cookie: u64,
        name: &[u8],
        ino: u64,
        kind: FileKind,
    ) -> bool {
        let attr = convert::blank_attr(ino, convert::file_type(kind));
        self.put(cookie, name, Duration::ZERO, &attr)
    }

    fn put(&mut self, cookie: u64, name: &[u8], valid: Duration, attr: &fuser::FileAttr) -> bool {
        let name = OsStr::from_bytes(name);
        let full = self.reply.add(attr.ino, cookie, name, &valid, attr, GENERATION);
        self.names += usize::from(!full);
        !full
    }
}
