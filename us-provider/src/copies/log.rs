//! The files of records: appended to, synced, cut, dropped whole.
//!
//! Invariants:
//! - a record is acknowledged after the fdatasync behind it, and after those before it;
//! - a file holds records of one run; a start never appends to an older file;
//! - a file goes only when a root this provider has stored covers its records, when a later run of
//!   which the provider has everything repeats them, or when they are void;
//! - after a failed write or sync nothing more is acknowledged until the next start.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use us_core::daemon::append::{AppendFile, are_zeros};
use us_core::daemon::disk;
use us_proto::v1::{RecordPart, RecordsHeld, StoreRecords, StoreRoot};

use super::format::{
    HEADER_BYTES, Label, SEALED_BYTES_MAX, decode_frame, decode_header, encode_frame, encode_header,
};

/// A file of this size gets a successor.
const FILE_BYTES: u64 = 16 << 20;
/// Sealed bytes of one message read back.
const MESSAGE_BYTES: usize = 1 << 20;

/// Why records are not kept.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The disk failed.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was being done.
        action: &'static str,
        /// To what.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// There is no more room for them.
    #[error(
        "copies of the directory's journal take {held} bytes here, {limit} are the most \
         (directory_copies)"
    )]
    Full {
        /// Kept already.
        held: u64,
        /// The limit.
        limit: u64,
    },
    /// A write failed before.
    #[error("the log of records has failed before: {first}")]
    Failed {
        /// The first failure.
        first: String,
    },
    /// The message makes no sense.
    #[error("no such records: {detail}")]
    Invalid {
        /// What is wrong.
        detail: &'static str,
    },
}

impl LogError {
    pub(super) fn io(action: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Io { action, path: path.to_owned(), source }
    }
}

/// The folder of the files in a data folder.
pub(super) fn dir_of(data: &Path) -> PathBuf {
    data.join("directory")
}

fn path_of(dir: &Path, number: u32) -> PathBuf {
    dir.join(format!("{number:08x}.records"))
}

#[derive(Clone, Copy, Debug)]
struct LogFile {
    number: u32,
    label: Label,
    bytes: u64,
    /// The records in it; an empty file has none.
    seqs: Option<(u64, u64)>,
}

/// What is known of the newest run.
#[derive(Clone, Copy, Debug)]
struct Newest {
    label: Label,
    /// Its records without a gap, the newest such stretch: whole ones.
    whole: Option<(u64, u64)>,
    /// The record being received and its next part.
    partial: Option<(u64, u32)>,
}

impl Newest {
    /// Whether the part is new here; notes it.
    fn takes(&mut self, part: &RecordPart) -> bool {
        if self.whole.is_some_and(|(first, last)| (first..=last).contains(&part.seq)) {
            return false;
        }
        let expected = self.partial.filter(|(seq, _)| *seq == part.seq).map_or(0, |(_, next)| next);
        if part.part != expected && part.part != 0 {
            return false;
        }
        self.partial = Some((part.seq, part.part + 1));
        if part.last {
            self.partial = None;
            let follows = self.whole.filter(|(_, last)| last + 1 == part.seq);
            self.whole = Some((follows.map_or(part.seq, |(first, _)| first), part.seq));
        }
        true
    }
}

/// The log. Used by one thread.
#[derive(Debug)]
pub struct RecordLog {
    dir: PathBuf,
    limit_bytes: u64,
    files: Vec<LogFile>,
    /// The last of `files`, once something was appended since the start.
    current: Option<AppendFile>,
    next_number: u32,
    newest: Option<Newest>,
    unsynced: bool,
    failed: Option<String>,
}

impl RecordLog {
    /// Opens the log in `dir`, made where there is none; a torn tail is cut. Blocks.
    ///
    /// # Errors
    /// [`LogError::Io`].
    pub fn open(dir: &Path, limit_bytes: u64) -> Result<Self, LogError> {
        fs::create_dir_all(dir).map_err(|error| LogError::io("make", dir, error))?;
        let mut log = Self {
            dir: dir.to_owned(),
            limit_bytes,
            files: Vec::new(),
            current: None,
            next_number: 1,
            newest: None,
            unsynced: false,
            failed: None,
        };
        let numbers = numbers(dir)?;
        for (index, number) in numbers.iter().enumerate() {
            log.next_number = number + 1;
            log.load(*number, index + 1 == numbers.len())?;
        }
        Ok(log)
    }

    fn load(&mut self, number: u32, last: bool) -> Result<(), LogError> {
        let path = path_of(&self.dir, number);
        // What a kill left in the page cache is on the disk before anybody hears that it is here.
        disk::sync_path(&path).map_err(|error| LogError::io("sync", &path, error))?;
        let bytes = fs::read(&path).map_err(|error| LogError::io("read", &path, error))?;
        let bytes = Bytes::from(bytes);
        let Some((_, label)) = decode_header(&bytes).filter(|(named, _)| *named == number) else {
            // A header is synced before the first record is acknowledged.
            tracing::warn!(path = %path.display(), "no file of records: left alone");
            return Ok(());
        };
        let mut file = LogFile { number, label, bytes: bytes.len() as u64, seqs: None };
        let mut at = HEADER_BYTES;
        while let Some((part, end)) = decode_frame(&bytes, at) {
            at = end;
            note(&mut file, part.seq);
            self.note_newest(label, &part);
        }
        if at < bytes.len() && last {
            if !are_zeros(&bytes[at..]) {
                let torn = bytes.len() - at;
                tracing::warn!(path = %path.display(), bytes = torn, "torn tail cut");
            }
            let cut = OpenOptions::new().write(true).open(&path);
            cut.and_then(|file| {
                file.set_len(at as u64).and_then(|()| disk::sync_all(&file, &path))
            })
            .map_err(|error| LogError::io("cut", &path, error))?;
            file.bytes = at as u64;
        } else if !are_zeros(&bytes[at..]) {
            tracing::error!(path = %path.display(), at, "damaged: what follows is not given back");
        }
        self.files.push(file);
        Ok(())
    }

    fn note_newest(&mut self, label: Label, part: &RecordPart) -> bool {
        match &mut self.newest {
            Some(newest) if newest.label == label => newest.takes(part),
            Some(newest) if newest.label > label => true,
            newest => {
                *newest = Some(Newest { label, whole: None, partial: None });
                newest.as_mut().is_some_and(|newest| newest.takes(part))
            }
        }
    }

    fn bytes(&self) -> u64 {
        self.files.iter().map(|file| file.bytes).sum()
    }

    /// Appends records that are not here yet; says up to which the run's are whole. Durable after
    /// [`RecordLog::sync`].
    ///
    /// # Errors
    /// [`LogError`]; after [`LogError::Io`] nothing more is taken.
    pub fn append(&mut self, records: &StoreRecords) -> Result<u64, LogError> {
        if let Some(first) = &self.failed {
            return Err(LogError::Failed { first: first.clone() });
        }
        let label = Label::of(records).ok_or(LogError::Invalid { detail: "no salt" })?;
        if records.parts.iter().any(|part| part.sealed.len() > SEALED_BYTES_MAX) {
            return Err(LogError::Invalid { detail: "a part is too long" });
        }
        let bytes: u64 = records.parts.iter().map(|part| part.sealed.len() as u64 + 24).sum();
        if self.bytes() + bytes > self.limit_bytes {
            return Err(LogError::Full { held: self.bytes(), limit: self.limit_bytes });
        }
        let mut frames = Vec::with_capacity(bytes as usize);
        let mut written = Vec::new();
        for part in &records.parts {
            if self.note_newest(label, part) {
                encode_frame(&mut frames, part);
                written.push(part.seq);
            }
        }
        if !frames.is_empty() {
            let appended = self.write(label, &frames, &written);
            appended.inspect_err(|error| self.failed = Some(error.to_string()))?;
        }
        let newest = self.newest.filter(|newest| newest.label == label);
        Ok(newest.and_then(|newest| newest.whole).map_or(0, |(_, last)| last))
    }

    fn write(&mut self, label: Label, frames: &[u8], seqs: &[u64]) -> Result<(), LogError> {
        let fits = self.files.last().is_some_and(|last| {
            last.label == label && last.bytes < FILE_BYTES && self.current.is_some()
        });
        if !fits {
            self.begin(label)?;
        }
        let (Some(current), Some(file)) = (&mut self.current, self.files.last_mut()) else {
            return Ok(());
        };
        let path = path_of(&self.dir, file.number);
        current.append(frames).map_err(|error| LogError::io("append to", &path, error))?;
        self.unsynced = true;
        file.bytes += frames.len() as u64;
        seqs.iter().for_each(|seq| note(file, *seq));
        Ok(())
    }

    /// Begins a file; its header and name are durable.
    fn begin(&mut self, label: Label) -> Result<(), LogError> {
        // One fdatasync covers one file: what is in the old one first.
        self.sync()?;
        self.finish()?;
        let number = self.next_number;
        let path = path_of(&self.dir, number);
        let create = || -> io::Result<AppendFile> {
            let file = OpenOptions::new().write(true).create_new(true).open(&path)?;
            file.write_all_at(&encode_header(number, &label), 0)?;
            disk::sync_all(&file, &path)?;
            File::open(&self.dir)?.sync_all()?;
            Ok(AppendFile::new(file, HEADER_BYTES as u64))
        };
        let file = create().map_err(|error| LogError::io("make", &path, error))?;
        self.next_number += 1;
        self.current = Some(file);
        self.files.push(LogFile { number, label, bytes: HEADER_BYTES as u64, seqs: None });
        Ok(())
    }

    /// The file written last gets no more: what it holds is durable already.
    fn finish(&mut self) -> Result<(), LogError> {
        let (Some(mut current), Some(file)) = (self.current.take(), self.files.last()) else {
            return Ok(());
        };
        let path = path_of(&self.dir, file.number);
        let cut = current.cut().and_then(|()| disk::sync_all(current.file(), &path));
        cut.map_err(|error| LogError::io("finish", &path, error))
    }

    /// Makes everything appended durable.
    ///
    /// # Errors
    /// [`LogError::Io`]: nothing more is taken then; [`LogError::Failed`] where that was before.
    pub fn sync(&mut self) -> Result<(), LogError> {
        if let Some(first) = &self.failed {
            return Err(LogError::Failed { first: first.clone() });
        }
        if !std::mem::take(&mut self.unsynced) {
            return Ok(());
        }
        let Some(current) = &self.current else { return Ok(()) };
        let number = self.files.last().map_or(0, |file| file.number);
        let synced = disk::sync_data(current.file(), &path_of(&self.dir, number));
        synced.map_err(|error| {
            self.failed = Some(error.to_string());
            LogError::io("sync a file in", &self.dir, error)
        })
    }

    /// What is kept of the newest run.
    pub fn held(&self) -> Option<RecordsHeld> {
        let newest = self.newest.filter(|_| self.failed.is_none())?;
        let (first_seq, last_seq) = newest.whole?;
        let (incarnation, run) = (newest.label.incarnation, newest.label.run);
        Some(RecordsHeld { incarnation, run, first_seq, last_seq })
    }

    /// A root is durable here: lets go of files whose records it covers, and of those void by its
    /// run.
    pub fn drop_covered(&mut self, root: &StoreRoot) {
        let run = (root.incarnation, root.run);
        self.drop_files(|file| {
            let Some((first, last)) = file.seqs else { return true };
            let earlier = (file.label.incarnation, file.label.run) < run;
            let last = if earlier { last.min(root.run_first_seq.saturating_sub(1)) } else { last };
            last < first || last <= root.covers_seq
        });
    }

    /// Lets go of files of earlier runs that the newest repeats or voids.
    pub fn drop_superseded(&mut self) {
        let Some(Newest { label, whole: Some((first, last)), .. }) = self.newest else { return };
        if last + 1 < label.first_seq {
            return;
        }
        self.drop_files(|file| {
            file.label < label && file.seqs.is_none_or(|(begin, _)| first <= begin)
        });
    }

    fn drop_files(&mut self, needless: impl Fn(&LogFile) -> bool) {
        let (dir, files) = (&self.dir, &mut self.files);
        let before = files.len();
        let current = self.current.as_ref().and(files.last()).map(|file| file.number);
        let mut current_dropped = false;
        files.retain(|file| {
            if !needless(file) {
                return true;
            }
            let path = path_of(dir, file.number);
            match fs::remove_file(&path) {
                Ok(()) => {
                    current_dropped |= Some(file.number) == current;
                    false
                }
                Err(error) => {
                    tracing::warn!(path = %path.display(), %error, "cannot be removed");
                    true
                }
            }
        });
        if current_dropped {
            self.current = None;
            self.unsynced = false;
        }
        if files.len() < before {
            tracing::debug!(files = before - files.len(), "records dropped");
        }
    }
}

fn note(file: &mut LogFile, seq: u64) {
    let (first, last) = file.seqs.unwrap_or((seq, seq));
    file.seqs = Some((first.min(seq), last.max(seq)));
}

fn numbers(dir: &Path) -> Result<Vec<u32>, LogError> {
    let entries = fs::read_dir(dir).map_err(|error| LogError::io("list", dir, error))?;
    let mut numbers = Vec::new();
    for entry in entries {
        let entry = entry.map_err(|error| LogError::io("list", dir, error))?;
        let name = entry.file_name();
        let digits = name.to_str().and_then(|name| name.strip_suffix(".records"));
        let digits = digits.filter(|digits| digits.len() == 8);
        numbers.extend(digits.and_then(|digits| u32::from_str_radix(digits, 16).ok()));
    }
    numbers.sort_unstable();
    Ok(numbers)
}

/// Reads everything back, message by message, beside whoever appends.
#[derive(Debug)]
pub struct Reading {
    dir: PathBuf,
    numbers: std::vec::IntoIter<u32>,
    file: Option<(Label, Bytes, usize)>,
}

impl Reading {
    /// Of the files in the data folder `data`. Blocks.
    ///
    /// # Errors
    /// [`LogError::Io`].
    pub fn new(data: &Path) -> Result<Self, LogError> {
        let dir = dir_of(data);
        let numbers = if dir.exists() { numbers(&dir)? } else { Vec::new() };
        Ok(Self { dir, numbers: numbers.into_iter(), file: None })
    }

    /// The next message; `None` at the end. A frame that does not hold ends its file. Blocks.
    ///
    /// # Errors
    /// [`LogError::Io`].
    pub fn next_message(&mut self) -> Result<Option<StoreRecords>, LogError> {
        loop {
            if let Some((label, bytes, at)) = &mut self.file {
                let (mut parts, mut taken) = (Vec::new(), 0);
                while taken < MESSAGE_BYTES
                    && let Some((part, end)) = decode_frame(bytes, *at)
                {
                    taken += part.sealed.len();
                    parts.push(part);
                    *at = end;
                }
                if !parts.is_empty() {
                    return Ok(Some(label.message(parts)));
                }
                self.file = None;
            }
            let Some(number) = self.numbers.next() else { return Ok(None) };
            let path = path_of(&self.dir, number);
            let bytes = match fs::read(&path) {
                Ok(bytes) => Bytes::from(bytes),
                // Dropped meanwhile: a root covers it.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(LogError::io("read", &path, error)),
            };
            self.file = decode_header(&bytes).map(|(_, label)| (label, bytes, HEADER_BYTES));
        }
    }
}

#[cfg(test)]
mod tests;
