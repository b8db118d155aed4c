//! The segment files: making, opening, reading and removing them.
//!
//! A handle stays usable after its file was removed, so a reader that holds one is never surprised.
//! At most [`HANDLES_MAX`] files are open at a time, however large the store.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;
use rustix::buffer::spare_capacity;

use super::format::{
    ENVELOPE_BYTES, Envelope, SEGMENT_HEADER_BYTES, Salt, SegmentHeader, SegmentHeaderError,
};
use us_core::daemon::disk;
use us_core::daemon::files::sync_dir;

/// Segment files open at a time.
pub const HANDLES_MAX: usize = 256;

/// One open segment file.
#[derive(Debug)]
pub struct Segment {
    /// Its number.
    pub number: u32,
    /// The mark in every envelope.
    pub salt: Salt,
    /// Where it lies.
    pub path: PathBuf,
    /// The file.
    pub file: File,
}

impl Segment {
    /// Reads `bytes` at `offset`, fewer only where the file ends.
    ///
    /// # Errors
    /// Any I/O error.
    pub fn read(&self, offset: u64, bytes: usize) -> io::Result<Vec<u8>> {
        let mut buffer = Vec::with_capacity(bytes.max(1));
        while buffer.len() < bytes {
            let at = offset + buffer.len() as u64;
            buffer.reserve_exact(bytes - buffer.len());
            match rustix::io::pread(&self.file, spare_capacity(&mut buffer), at) {
                Ok(0) => break,
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        buffer.truncate(bytes);
        Ok(buffer)
    }

    /// As [`Segment::read`], of what the system has in memory: fewer bytes where it has not all.
    ///
    /// # Errors
    /// Any I/O error; [`io::ErrorKind::WouldBlock`] where it has none of them.
    pub fn read_now(&self, offset: u64, bytes: usize) -> io::Result<Vec<u8>> {
        let mut buffer = vec![0; bytes];
        let parts = &mut [io::IoSliceMut::new(&mut buffer)];
        let flags = rustix::io::ReadWriteFlags::NOWAIT;
        let found = rustix::io::preadv2(&self.file, parts, offset, flags)?;
        buffer.truncate(found);
        Ok(buffer)
    }

    /// Whether nothing is stored between two offsets; not where the file system does not say.
    pub fn is_hole(&self, from: u64, to: u64) -> bool {
        match rustix::fs::seek(&self.file, rustix::fs::SeekFrom::Data(from)) {
            Ok(data) => data >= to,
            // No data up to the end of the file.
            Err(rustix::io::Errno::NXIO) => true,
            Err(_) => false,
        }
    }

    /// Bytes the file has.
    ///
    /// # Errors
    /// Any I/O error.
    pub fn file_bytes(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }
}

/// Why a segment does not open.
#[derive(Debug, thiserror::Error)]
pub enum SegmentError {
    /// The disk failed.
    #[error("cannot {action} segment {}", path.display())]
    Io {
        /// What was being done.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Neither its header nor its first record can be read.
    #[error("segment {} is unreadable", path.display())]
    Header {
        /// The file.
        path: PathBuf,
        /// What is wrong with the header.
        #[source]
        source: SegmentHeaderError,
    },
    /// The file of another store, or of another number.
    #[error("{} is not a segment of this store", path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
    },
}

/// All segment files of a store.
#[derive(Debug)]
pub struct Segments {
    dir: PathBuf,
    store: [u8; 16],
    open: Mutex<Handles>,
}

#[derive(Debug, Default)]
struct Handles {
    segments: HashMap<u32, (Arc<Segment>, u64)>,
    clock: u64,
}

impl Segments {
    /// The segments in `dir`, which is made where it is missing.
    ///
    /// # Errors
    /// [`SegmentError::Io`].
    pub fn new(dir: PathBuf, store: [u8; 16]) -> Result<Self, SegmentError> {
        fs::create_dir_all(&dir).and_then(|()| sync_dir(&dir)).map_err(|source| {
            SegmentError::Io { action: "make the folder of", path: dir.clone(), source }
        })?;
        Ok(Self { dir, store, open: Mutex::default() })
    }

    /// The numbers of all segments there are, in order.
    ///
    /// # Errors
    /// [`SegmentError::Io`].
    pub fn numbers(&self) -> Result<Vec<u32>, SegmentError> {
        let failed = |source| SegmentError::Io { action: "list", path: self.dir.clone(), source };
        let mut numbers = Vec::new();
        for item in fs::read_dir(&self.dir).map_err(failed)? {
            let name = item.map_err(failed)?.file_name();
            numbers.extend(name.to_str().and_then(parse_name));
        }
        numbers.sort_unstable();
        Ok(numbers)
    }

    /// Makes a segment; its header and its name are durable when this returns.
    ///
    /// # Errors
    /// [`SegmentError::Io`]; no file is left behind then, where that can be done.
    pub fn create(&self, number: u32) -> Result<Arc<Segment>, SegmentError> {
        let path = self.path(number);
        let failed = |source| SegmentError::Io { action: "make", path: path.clone(), source };
        let mut salt = Salt::default();
        getrandom::fill(&mut salt).map_err(|error| failed(io::Error::other(error)))?;
        let header = SegmentHeader { store: self.store, number, salt };
        let make = || {
            let mut options = OpenOptions::new();
            let file = options.read(true).write(true).create_new(true).open(&path)?;
            write_all_at(&file, &header.encode(), 0)?;
            disk::sync_all(&file, &path)?;
            sync_dir(&self.dir)?;
            Ok(file)
        };
        let file = make().map_err(|error: io::Error| {
            if error.kind() != io::ErrorKind::AlreadyExists {
                let _ = fs::remove_file(&path);
            }
            failed(error)
        })?;
        let segment = Arc::new(Segment { number, salt, path: path.clone(), file });
        self.remember(&segment);
        Ok(segment)
    }

    /// A segment that is open.
    pub fn opened(&self, number: u32) -> Option<Arc<Segment>> {
        self.open.lock().get(number)
    }

    /// Opens a segment.
    ///
    /// # Errors
    /// [`SegmentError`].
    pub fn open(&self, number: u32) -> Result<Arc<Segment>, SegmentError> {
        if let Some(segment) = self.opened(number) {
            return Ok(segment);
        }
        let segment = Arc::new(self.open_file(number)?);
        self.remember(&segment);
        Ok(segment)
    }

    fn open_file(&self, number: u32) -> Result<Segment, SegmentError> {
        let path = self.path(number);
        let failed = |source| SegmentError::Io { action: "open", path: path.clone(), source };
        let file = OpenOptions::new().read(true).write(true).open(&path).map_err(failed)?;
        let mut segment = Segment { number, salt: Salt::default(), path: path.clone(), file };
        let start = segment
            .read(0, SEGMENT_HEADER_BYTES as usize + ENVELOPE_BYTES)
            .map_err(|source| SegmentError::Io { action: "read", path: path.clone(), source })?;
        segment.salt = match SegmentHeader::decode(&start) {
            Ok(header) if header.store == self.store && header.number == number => header.salt,
            Ok(_) => return Err(SegmentError::Foreign { path }),
            Err(source) => {
                let first = start.get(SEGMENT_HEADER_BYTES as usize..);
                let salt = first.and_then(Envelope::decode_any_salt);
                let salt = salt.filter(|envelope| envelope.offset == SEGMENT_HEADER_BYTES);
                let Some(envelope) = salt else {
                    return Err(SegmentError::Header { path, source });
                };
                tracing::warn!(%source, path = %path.display(), "its first record gives the salt");
                envelope.salt
            }
        };
        Ok(segment)
    }

    /// Removes a segment's file.
    ///
    /// # Errors
    /// [`SegmentError::Io`].
    pub fn remove(&self, number: u32) -> Result<(), SegmentError> {
        let path = self.path(number);
        self.open.lock().segments.remove(&number);
        fs::remove_file(&path)
            .and_then(|()| sync_dir(&self.dir))
            .map_err(|source| SegmentError::Io { action: "remove", path, source })
    }

    /// Puts an unreadable file out of the way, under a name that [`Segments::numbers`] skips.
    ///
    /// # Errors
    /// [`SegmentError::Io`].
    pub fn set_aside(&self, number: u32) -> Result<PathBuf, SegmentError> {
        let (from, to) = (self.path(number), self.path(number).with_extension("unreadable"));
        self.open.lock().segments.remove(&number);
        fs::rename(&from, &to)
            .and_then(|()| sync_dir(&self.dir))
            .map_err(|source| SegmentError::Io { action: "set aside", path: from, source })?;
        Ok(to)
    }

    /// The folder of the segments.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    fn path(&self, number: u32) -> PathBuf {
        self.dir.join(format!("{number:08x}.seg"))
    }

    fn remember(&self, segment: &Arc<Segment>) {
        self.open.lock().insert(Arc::clone(segment));
    }
}

impl Handles {
    fn get(&mut self, number: u32) -> Option<Arc<Segment>> {
        self.clock += 1;
        let (segment, used) = self.segments.get_mut(&number)?;
        *used = self.clock;
        Some(Arc::clone(segment))
    }

    fn insert(&mut self, segment: Arc<Segment>) {
        if self.segments.len() >= HANDLES_MAX {
            let oldest = self.segments.iter().min_by_key(|(_, (_, used))| *used);
            if let Some(number) = oldest.map(|(number, _)| *number) {
                self.segments.remove(&number);
            }
        }
        self.clock += 1;
        self.segments.insert(segment.number, (segment, self.clock));
    }
}

fn parse_name(name: &str) -> Option<u32> {
    let digits = name.strip_suffix(".seg")?;
    (digits.len() == 8).then(|| u32::from_str_radix(digits, 16).ok()).flatten()
}

/// Writes all of `bytes` at `offset`.
///
/// # Errors
/// Any I/O error; some of the bytes may be written then.
pub fn write_all_at(file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::write_all_at(file, bytes, offset)
}
