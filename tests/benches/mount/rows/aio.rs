//! Reads that do not wait for each other, by one thread: Linux's own asynchronous I/O (`io_submit`),
//! on memory that O_DIRECT takes.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr;

use anyhow::{Result, ensure};

/// What one read reads.
pub(super) const SLOT_BYTES: usize = 4096;
const EVENTS: usize = 16;
const IOCB_CMD_PREAD: u16 = 0;

#[derive(Clone)]
#[repr(C, align(4096))]
struct Page([u8; SLOT_BYTES]);

/// `struct iocb` of the kernel, little-endian.
#[derive(Clone, Default)]
#[repr(C)]
struct Iocb {
    data: u64,
    key: u32,
    rw_flags: u32,
    opcode: u16,
    priority: i16,
    file: u32,
    buffer: u64,
    bytes: u64,
    offset: i64,
    reserved: u64,
    flags: u32,
    event_file: u32,
}

/// `struct io_event` of the kernel.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Event {
    data: u64,
    object: u64,
    result: i64,
    result2: i64,
}

/// Some reads of a file under way, each into a slot of its own.
pub(super) struct Reader<'f> {
    file: &'f File,
    context: libc::c_ulong,
    pages: Vec<Page>,
    requests: Vec<Iocb>,
    under_way: usize,
}

impl<'f> Reader<'f> {
    pub(super) fn new(file: &'f File, slots: usize) -> Result<Self> {
        let mut context: libc::c_ulong = 0;
        // SAFETY: the kernel writes one number to `context`.
        let made = unsafe { libc::syscall(libc::SYS_io_setup, slots, &raw mut context) };
        check(made)?;
        let (pages, requests) = (vec![Page([0; SLOT_BYTES]); slots], vec![Iocb::default(); slots]);
        Ok(Self { file, context, pages, requests, under_way: 0 })
    }

    /// Begins to read the block at `offset` into a slot that no read is under way for.
    pub(super) fn ask(&mut self, slot: usize, offset: u64) -> Result<()> {
        self.requests[slot] = Iocb {
            data: slot as u64,
            opcode: IOCB_CMD_PREAD,
            file: self.file.as_raw_fd() as u32,
            buffer: self.pages[slot].0.as_mut_ptr() as u64,
            bytes: SLOT_BYTES as u64,
            offset: offset as i64,
            ..Iocb::default()
        };
        let mut request: *mut Iocb = &raw mut self.requests[slot];
        // SAFETY: the request and the page it names live in this Reader, whose vectors do not grow,
        // and which ends its context, and so all reads under way, before they are freed.
        let asked =
            unsafe { libc::syscall(libc::SYS_io_submit, self.context, 1, &raw mut request) };
        check(asked)?;
        self.under_way += 1;
        Ok(())
    }

    /// The slots whose reads have ended, at least one.
    pub(super) fn wait(&mut self) -> Result<impl Iterator<Item = usize> + use<>> {
        let mut events = [Event::default(); EVENTS];
        let (timeout, most) = (ptr::null_mut::<libc::timespec>(), EVENTS as libc::c_long);
        // SAFETY: there is room for as many events as are asked for.
        let count = unsafe {
            let events = events.as_mut_ptr();
            libc::syscall(libc::SYS_io_getevents, self.context, 1_i64, most, events, timeout)
        };
        let count = check(count)?;
        for event in &events[..count] {
            let read = event.result;
            ensure!(read >= 0, "a read failed: {}", io::Error::from_raw_os_error(-read as i32));
            ensure!(read == SLOT_BYTES as i64, "a read gave {read} bytes");
        }
        self.under_way -= count;
        Ok(events.into_iter().take(count).map(|event| event.data as usize))
    }

    /// What was read into a slot.
    pub(super) fn bytes(&self, slot: usize) -> &[u8] {
        &self.pages[slot].0
    }

    pub(super) fn under_way(&self) -> usize {
        self.under_way
    }
}

impl Drop for Reader<'_> {
    fn drop(&mut self) {
        // SAFETY: the context is ours; the call waits for what is under way.
        unsafe { libc::syscall(libc::SYS_io_destroy, self.context) };
    }
}

fn check(result: libc::c_long) -> Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error().into())
}
