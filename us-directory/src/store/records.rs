//! Reading the journal's records back: for copies on other machines, images and backups.
//!
//! ```text
//! files    journal-...0001   journal-...0950   journal-...1800        the last is being written
//! marks    (1, 64) (40, 16500) ...                                    one every 16 KiB that was read
//!          \__ kept while a reader needs them, FILES_KEPT_MAX at most \__ behind the checkpoint
//! ```
//! What it owns: which journal files there are, where some of their records begin, and which of the
//! files that the checkpoint has made needless are kept for readers. Only what the journal's thread
//! has written is ever read. Shared by the store (reads), its journal's thread (notes what was
//! written) and its checkpoint's thread (removes files).

use std::collections::VecDeque;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use parking_lot::Mutex;

use super::journal::{
    FILE_HEADER_BYTES, FileTag, decode_header, decode_record, list_files, record_bytes,
};
use super::{Seq, StoreError};

/// Files kept for readers although their records are in the checkpoint.
pub const FILES_KEPT_MAX: usize = 4;
/// Bytes between two places that are remembered.
const MARK_BYTES: u64 = 16 << 10;
/// Bytes read at once.
const READ_BYTES: usize = 64 << 10;

/// The journal's files and how to find records in them.
#[derive(Debug)]
pub struct JournalRecords {
    dir: PathBuf,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// In order; the last is being written.
    files: VecDeque<IndexedFile>,
    /// The last record that is in its file.
    written: Seq,
    /// The last record that is in the checkpoint.
    checkpoint: Seq,
    /// Records from here on are wanted.
    wanted: Seq,
}

#[derive(Debug)]
struct IndexedFile {
    first: Seq,
    path: PathBuf,
    /// Known once it was read from.
    open: Option<(File, FileTag)>,
    /// Where some records begin, ascending; the first record's place is the first.
    marks: Vec<(Seq, u64)>,
    /// Where the last reader stopped.
    cursor: (Seq, u64),
}

impl IndexedFile {
    fn new(first: Seq, path: PathBuf) -> Self {
        let start = (first, FILE_HEADER_BYTES as u64);
        Self { first, path, open: None, marks: vec![start], cursor: start }
    }

    fn opened(&mut self) -> Result<(&File, FileTag), StoreError> {
        if self.open.is_none() {
            let path = &self.path;
            let file = File::open(path).map_err(|error| StoreError::io("open", path, error))?;
            let mut header = [0; FILE_HEADER_BYTES];
            file.read_exact_at(&mut header, 0)
                .map_err(|error| StoreError::io("read", path, error))?;
            let (tag, _) = decode_header(&header).ok_or_else(|| self.damaged(0, self.first))?;
            self.open = Some((file, tag));
        }
        let (file, tag) = self.open.as_ref().expect("just opened");
        Ok((file, *tag))
    }

    fn damaged(&self, offset: u64, seq: Seq) -> StoreError {
        StoreError::Damaged {
            path: self.path.display().to_string(),
            offset,
            seq,
            detail: "a record that was written cannot be read back",
        }
    }

    /// The nearest known place at or before a record.
    fn place(&self, seq: Seq) -> (Seq, u64) {
        if self.cursor.0 == seq {
            return self.cursor;
        }
        let behind = self.marks.partition_point(|(mark, _)| *mark <= seq);
        self.marks[behind.saturating_sub(1)]
    }

    /// Reads records `from..=to` until `bytes_max` bodies' bytes are there; one at least.
    fn read(
        &mut self,
        from: Seq,
        to: Seq,
        bytes_max: usize,
        out: &mut Vec<(Seq, Bytes)>,
        taken: &mut usize,
    ) -> Result<(), StoreError> {
        let (mut seq, mut offset) = self.place(from);
        self.opened()?;
        let mut buffer = Vec::new();
        let mut at = 0;
        while seq <= to && (out.is_empty() || *taken < bytes_max) {
            let (record, end) = loop {
                let (file, tag) = self.opened()?;
                let needed = record_bytes(&buffer[at..]);
                if buffer.len() - at >= needed {
                    match decode_record(&buffer, at, tag) {
                        Some(record) if record.seq == seq => {
                            let end = record.end.min(buffer.len());
                            break (record, end);
                        }
                        _ => return Err(self.damaged(offset, seq)),
                    }
                }
                buffer.drain(..at);
                at = 0;
                let have = buffer.len();
                buffer.resize(needed.max(READ_BYTES).max(have), 0);
                let got = file.read_at(&mut buffer[have..], offset + have as u64);
                let got = got.map_err(|error| StoreError::io("read", &self.path, error))?;
                buffer.truncate(have + got);
                if got == 0 {
                    return Err(self.damaged(offset, seq));
                }
            };
            if seq >= from {
                *taken += record.body.len();
                out.push((seq, Bytes::copy_from_slice(&buffer[record.body])));
            }
            // The padding of the very last record may not have been read.
            offset += (record.end - at) as u64;
            at = end;
            seq += 1;
            if self
                .marks
                .last()
                .is_some_and(|(mark, place)| *mark < seq && offset >= place + MARK_BYTES)
            {
                self.marks.push((seq, offset));
            }
        }
        self.cursor = (seq, offset);
        Ok(())
    }
}

impl JournalRecords {
    /// The files in `dir` as a start found them; `written` is the last record.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn new(dir: &Path, checkpoint: Seq, written: Seq) -> Result<Self, StoreError> {
        let files = list_files(dir)?;
        let files = files.into_iter().map(|(first, path)| IndexedFile::new(first, path)).collect();
        let state = State { files, written, checkpoint, wanted: 0 };
        let records = Self { dir: dir.to_owned(), state: Mutex::new(state) };
        records.prune()?;
        Ok(records)
    }

    /// A new file follows, with this first record.
    pub fn began(&self, first: Seq, path: PathBuf) {
        self.state.lock().files.push_back(IndexedFile::new(first, path));
    }

    /// Records up to here are in their files.
    pub fn wrote(&self, written: Seq) {
        self.state.lock().written = written;
    }

    /// Records up to here are in the checkpoint.
    ///
    /// # Errors
    /// [`StoreError::Io`] when a file cannot be removed.
    pub fn checkpointed(&self, seq: Seq) -> Result<(), StoreError> {
        self.state.lock().checkpoint = seq;
        self.prune()
    }

    /// Records before `wanted` are not needed by readers.
    ///
    /// # Errors
    /// [`StoreError::Io`] when a file cannot be removed.
    pub fn keep(&self, wanted: Seq) -> Result<(), StoreError> {
        self.state.lock().wanted = wanted;
        self.prune()
    }

    /// Removes files that neither a start nor a reader needs.
    fn prune(&self) -> Result<(), StoreError> {
        let mut state = self.state.lock();
        let before = state.files.len();
        // Files whose records are all in the checkpoint.
        let needless = |state: &State| {
            let next = state.files.iter().skip(1);
            next.take_while(|next| next.first <= state.checkpoint + 1).count()
        };
        while needless(&state) > 0 {
            let unwanted = state.files.get(1).is_some_and(|next| next.first <= state.wanted);
            if !unwanted && needless(&state) <= FILES_KEPT_MAX {
                break;
            }
            let Some(file) = state.files.pop_front() else { break };
            let path = &file.path;
            std::fs::remove_file(path).map_err(|error| StoreError::io("remove", path, error))?;
        }
        let removed = before - state.files.len();
        drop(state);
        if removed > 0 { super::journal::sync_dir(&self.dir) } else { Ok(()) }
    }

    /// The first record that can be read.
    pub fn first(&self) -> Seq {
        let state = self.state.lock();
        state.files.front().map_or(state.written + 1, |file| file.first)
    }

    /// Records from `from` on, in order without gaps, until `bytes_max` is reached: at least one
    /// where there is any. Nothing where the first is no longer kept.
    ///
    /// # Errors
    /// [`StoreError`] when the disk fails or a record cannot be read back.
    pub fn read(&self, from: Seq, bytes_max: usize) -> Result<Vec<(Seq, Bytes)>, StoreError> {
        let mut state = self.state.lock();
        let written = state.written;
        let mut out = Vec::new();
        let mut taken = 0;
        let mut next = from.max(1);
        while next <= written && (out.is_empty() || taken < bytes_max) {
            let behind = state.files.partition_point(|file| file.first <= next);
            let Some(index) = behind.checked_sub(1) else { break };
            let last = state.files.get(behind).map_or(written, |file| file.first - 1);
            let file = &mut state.files[index];
            file.read(next, last.min(written), bytes_max, &mut out, &mut taken)?;
            next = out.last().map_or(written, |(seq, _)| *seq) + 1;
        }
        Ok(out)
    }

    /// About how many bytes the files have from record `from` on.
    pub fn bytes_from(&self, from: Seq) -> u64 {
        let state = self.state.lock();
        let behind = state.files.partition_point(|file| file.first <= from);
        let files = state.files.iter().skip(behind.saturating_sub(1));
        let length =
            |file: &IndexedFile| std::fs::metadata(&file.path).map_or(0, |data| data.len());
        let bytes: u64 = files.map(length).sum();
        let before = behind.checked_sub(1).map(|index| &state.files[index]);
        bytes.saturating_sub(before.map_or(0, |file| file.place(from).1))
    }
}
