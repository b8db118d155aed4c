//! An open folder: names read ahead of what the kernel, a page at a time, takes of them.

use std::collections::VecDeque;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use fuser::FileType;
use rustix::fs::{Mode, OFlags, RawDir};
use rustix::io::Result;

use super::nodes::kind_of;

/// What one getdents may give.
const BUFFER_BYTES: usize = 32 << 10;

pub(super) struct Name {
    pub(super) ino: u64,
    pub(super) kind: FileType,
    pub(super) name: Box<[u8]>,
    /// Where the listing goes on after it.
    pub(super) cookie: u64,
}

pub(super) struct Listing {
    fd: OwnedFd,
    ahead: VecDeque<Name>,
    /// Where `ahead` begins.
    position: u64,
}

impl Listing {
    pub(super) fn open(folder: &OwnedFd) -> Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(folder, c".", flags, Mode::empty())?;
        Ok(Self { fd, ahead: VecDeque::new(), position: 0 })
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Hands over names from `offset` on, while `take` says that there is room: a name for which there
    /// is none comes again. An error after the first name ends the listing there.
    pub(super) fn list(
        &mut self,
        offset: u64,
        mut take: impl FnMut(&Name) -> Result<bool>,
    ) -> Result<()> {
        if offset != self.position {
            rustix::fs::seek(&self.fd, rustix::fs::SeekFrom::Start(offset))?;
            self.ahead.clear();
            self.position = offset;
        }
        loop {
            if self.ahead.is_empty() {
                self.read_ahead()?;
            }
            let Some(name) = self.ahead.front() else { return Ok(()) };
            match take(name) {
                Ok(true) => {}
                Ok(false) => return Ok(()),
                Err(error) if self.position == offset => return Err(error),
                Err(_) => return Ok(()),
            }
            self.position = name.cookie;
            self.ahead.pop_front();
        }
    }

    fn read_ahead(&mut self) -> Result<()> {
        let mut space = [MaybeUninit::uninit(); BUFFER_BYTES];
        let mut names = RawDir::new(&self.fd, &mut space);
        while let Some(entry) = names.next() {
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            if name != b"." && name != b".." {
                self.ahead.push_back(Name {
                    ino: entry.ino(),
                    kind: kind_of(entry.file_type()),
                    name: name.into(),
                    cookie: entry.next_entry_cookie(),
                });
            }
            if names.is_buffer_empty() && !self.ahead.is_empty() {
                break;
            }
        }
        Ok(())
    }
}
