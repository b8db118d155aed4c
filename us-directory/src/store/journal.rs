//! The journal: append-only files of records, each one commit.
//!
//! ```text
//! file    journal-<first seq, 20 digits>
//!         header (64 bytes) | record | record | ...          everything little-endian
//!
//! header   0  magic "USDIRJNL"            record   0  magic "USJR"
//!          8  version u32 = 1                      4  body bytes u32
//!         12  CRC-32C u32                          8  CRC-32C u32
//!         16  incarnation u64                     12  zero u32
//!         24  first seq u64                       16  incarnation u64
//!         32  salt u64                            24  seq u64
//!         40  zeros                               32  synced u64
//!                                                 40  salt u64
//!                                                 48  body, then zeros to a multiple of 8
//! body     writes u32, then for each: key bytes u32 | value bytes u32 (u32::MAX: removed) | key | value
//! ```
//! A CRC covers its header (with the CRC field zero) and, of a record, the body. The salt is random
//! for each file, so that no stored value can pass for a record. `synced` is the last commit known to
//! be on stable storage when the record was written.
//!
//! Behind the last record lie zeros, which are cut off when a successor is made ([`AppendFile`]).
//!
//! Reading tells a torn tail from damage. A record that does not hold is the torn tail of the last
//! file, and is cut, *unless* a later record of that file says that it was synced: then durable bytes
//! are damaged, which is an error. A file is synced whole before its successor is made, so a bad
//! record in any file but the last is damage, and so is a missing number.

use std::fs::{File, OpenOptions};
use std::io::Read;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use crc_fast::{CrcAlgorithm, Digest, checksum};
use us_core::daemon::append::{AppendFile, are_zeros};
use us_core::daemon::disk;

use super::{KEY_BYTES_MAX, Seq, StoreError, VALUE_BYTES_MAX, WriteBatch};

const FILE_MAGIC: [u8; 8] = *b"USDIRJNL";
const RECORD_MAGIC: [u8; 4] = *b"USJR";
const VERSION: u32 = 1;
/// Bytes of a file's header.
pub const FILE_HEADER_BYTES: usize = 64;
/// Bytes of a record's header.
pub const RECORD_HEADER_BYTES: usize = 48;
const REMOVED: u32 = u32::MAX;
/// The longest body, written or read: more than any batch makes.
pub const BODY_BYTES_MAX: usize = 512 << 20;

/// What ties the records of a file to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileTag {
    /// Of the state.
    pub incarnation: u64,
    /// Random.
    pub salt: u64,
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at + 4)?.try_into().ok().map(u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..at + 8)?.try_into().ok().map(u64::from_le_bytes)
}

fn crc(bytes: &[u8]) -> u32 {
    checksum(CrcAlgorithm::Crc32Iscsi, bytes) as u32
}

/// The CRC of `bytes` as if those of `field` were zero, without a copy.
fn crc_without(bytes: &[u8], field: Range<usize>) -> u32 {
    let mut digest = Digest::new(CrcAlgorithm::Crc32Iscsi);
    digest.update(&bytes[..field.start]);
    digest.update(&[0; 4][..field.len()]);
    digest.update(&bytes[field.end..]);
    digest.finalize() as u32
}

/// The body of a batch.
pub fn encode_body(batch: &WriteBatch) -> Vec<u8> {
    let bytes: usize =
        batch.iter().map(|(key, value)| 8 + key.len() + value.as_ref().map_or(0, Bytes::len)).sum();
    let mut body = Vec::with_capacity(4 + bytes);
    body.extend((batch.len() as u32).to_le_bytes());
    for (key, value) in batch.iter() {
        body.extend((key.len() as u32).to_le_bytes());
        let length = value.as_ref().map_or(REMOVED, |value| value.len() as u32);
        body.extend(length.to_le_bytes());
        body.extend_from_slice(key);
        body.extend_from_slice(value.as_deref().unwrap_or_default());
    }
    body
}

/// The batch of a body; `None` when it is none: its keys do not ascend, or it is not all there.
pub fn decode_body(body: &Bytes) -> Option<WriteBatch> {
    let mut batch = WriteBatch::new();
    let mut last: Option<Bytes> = None;
    let writes = u32_at(body, 0)?;
    let mut at = 4;
    for _ in 0..writes {
        let key_bytes = u32_at(body, at)? as usize;
        let value_bytes = u32_at(body, at + 4)?;
        at += 8;
        if key_bytes > KEY_BYTES_MAX || body.len() - at < key_bytes {
            return None;
        }
        let key = body.slice(at..at + key_bytes);
        at += key_bytes;
        if last.as_ref().is_some_and(|last| *last >= key) {
            return None;
        }
        last = Some(key.clone());
        if value_bytes == REMOVED {
            batch.delete(key);
            continue;
        }
        let value_bytes = value_bytes as usize;
        if value_bytes > VALUE_BYTES_MAX || body.len() - at < value_bytes {
            return None;
        }
        batch.put(key, body.slice(at..at + value_bytes));
        at += value_bytes;
    }
    (at == body.len()).then_some(batch)
}

/// A file's header.
pub fn encode_header(tag: FileTag, first_seq: Seq) -> [u8; FILE_HEADER_BYTES] {
    let mut header = [0; FILE_HEADER_BYTES];
    header[..8].copy_from_slice(&FILE_MAGIC);
    header[8..12].copy_from_slice(&VERSION.to_le_bytes());
    header[16..24].copy_from_slice(&tag.incarnation.to_le_bytes());
    header[24..32].copy_from_slice(&first_seq.to_le_bytes());
    header[32..40].copy_from_slice(&tag.salt.to_le_bytes());
    let sum = crc(&header);
    header[12..16].copy_from_slice(&sum.to_le_bytes());
    header
}

/// The header at the start of `bytes`, and the record its file begins with; `None` when it does not
/// hold.
pub fn decode_header(bytes: &[u8]) -> Option<(FileTag, Seq)> {
    let mut header: [u8; FILE_HEADER_BYTES] = bytes.get(..FILE_HEADER_BYTES)?.try_into().ok()?;
    let sum = u32_at(&header, 12)?;
    header[12..16].fill(0);
    let holds = header[..8] == FILE_MAGIC && u32_at(&header, 8)? == VERSION && crc(&header) == sum;
    let tag = FileTag { incarnation: u64_at(&header, 16)?, salt: u64_at(&header, 32)? };
    Some((tag, u64_at(&header, 24)?)).filter(|_| holds)
}

/// Appends a record to `out`.
pub fn encode_record(out: &mut Vec<u8>, tag: FileTag, seq: Seq, synced: Seq, body: &[u8]) {
    let start = out.len();
    out.extend(RECORD_MAGIC);
    out.extend((body.len() as u32).to_le_bytes());
    out.extend([0; 8]);
    out.extend(tag.incarnation.to_le_bytes());
    out.extend(seq.to_le_bytes());
    out.extend(synced.to_le_bytes());
    out.extend(tag.salt.to_le_bytes());
    out.extend_from_slice(body);
    let sum = crc(&out[start..]);
    out[start + 8..start + 12].copy_from_slice(&sum.to_le_bytes());
    out.resize(out.len().next_multiple_of(8), 0);
}

/// A record read back.
#[derive(Debug)]
pub(super) struct Record {
    pub seq: Seq,
    pub synced: Seq,
    pub body: std::ops::Range<usize>,
    pub end: usize,
}

/// How many bytes must be there before the record that begins `bytes` can be decoded.
pub(super) fn record_bytes(bytes: &[u8]) -> usize {
    let body = bytes.get(..RECORD_HEADER_BYTES).and_then(|header| u32_at(header, 4));
    RECORD_HEADER_BYTES + body.map_or(0, |bytes| (bytes as usize).min(BODY_BYTES_MAX))
}

/// The record at `at`, if there is one that holds.
pub(super) fn decode_record(bytes: &[u8], at: usize, tag: FileTag) -> Option<Record> {
    let header = bytes.get(at..at + RECORD_HEADER_BYTES)?;
    let body_bytes = u32_at(header, 4)? as usize;
    let ours = header[..4] == RECORD_MAGIC
        && body_bytes <= BODY_BYTES_MAX
        && u64_at(header, 16)? == tag.incarnation
        && u64_at(header, 40)? == tag.salt;
    if !ours {
        return None;
    }
    let body = at + RECORD_HEADER_BYTES..at + RECORD_HEADER_BYTES + body_bytes;
    if crc_without(bytes.get(at..body.end)?, 8..12) != u32_at(header, 8)? {
        return None;
    }
    let end = body.end.next_multiple_of(8);
    Some(Record { seq: u64_at(header, 24)?, synced: u64_at(header, 32)?, body, end })
}

/// What a journal file held.
#[derive(Debug, Default)]
pub struct Replayed {
    /// The commits, in order.
    pub batches: Vec<(Seq, WriteBatch)>,
    /// Bytes up to the end of the last record that holds.
    pub good_bytes: u64,
    /// Bytes behind that: a torn tail, or zeros.
    pub torn_bytes: u64,
    /// Whether they are the zeros that a crash leaves.
    pub clean: bool,
}

/// Reads a journal file. Records before `expected` must be there but are not decoded further.
///
/// # Errors
/// [`StoreError::Damaged`] when durable bytes are damaged; [`StoreError::Io`].
pub fn read_file(
    path: &Path,
    first_seq: Seq,
    needed: Seq,
    last: bool,
) -> Result<Replayed, StoreError> {
    let mut bytes = Vec::new();
    let mut file = File::open(path).map_err(|error| StoreError::io("open", path, error))?;
    file.read_to_end(&mut bytes).map_err(|error| StoreError::io("read", path, error))?;
    replay(&bytes.into(), path, first_seq, needed, last)
}

/// [`read_file`] of a file's bytes; `path` is for errors.
///
/// # Errors
/// [`StoreError::Damaged`].
pub fn replay(
    bytes: &Bytes,
    path: &Path,
    first_seq: Seq,
    needed: Seq,
    last: bool,
) -> Result<Replayed, StoreError> {
    let damaged = |offset: usize, seq: Seq, detail: &'static str| StoreError::Damaged {
        path: path.display().to_string(),
        offset: offset as u64,
        seq,
        detail,
    };
    let Some((tag, named_seq)) = decode_header(bytes) else {
        // The header is synced before the first record is written.
        if last && bytes.len() <= FILE_HEADER_BYTES {
            return Ok(Replayed { torn_bytes: bytes.len() as u64, ..Default::default() });
        }
        return Err(damaged(0, first_seq, "the file's header does not hold"));
    };
    if named_seq != first_seq {
        return Err(damaged(0, first_seq, "the header names another first record"));
    }
    let (mut at, mut expected) = (FILE_HEADER_BYTES, first_seq);
    let mut batches = Vec::new();
    while at < bytes.len() {
        let Some(record) = decode_record(bytes, at, tag) else {
            if !last {
                return Err(damaged(at, expected, "a record does not hold, and files follow"));
            }
            if is_witnessed(bytes, at, tag, expected) {
                return Err(damaged(at, expected, "a record does not hold that was durable"));
            }
            break;
        };
        if record.seq != expected {
            return Err(damaged(at, expected, "records are missing"));
        }
        if record.seq >= needed {
            let batch = decode_body(&bytes.slice(record.body.clone()))
                .ok_or_else(|| damaged(at, expected, "a record's body makes no sense"))?;
            batches.push((record.seq, batch));
        }
        expected += 1;
        at = record.end;
    }
    let good = at.min(bytes.len());
    let tail = &bytes[good..];
    let (torn_bytes, clean) = (tail.len() as u64, are_zeros(tail));
    Ok(Replayed { batches, good_bytes: good as u64, torn_bytes, clean })
}

/// Whether any record behind `at` says that record `seq` was on stable storage.
fn is_witnessed(bytes: &[u8], at: usize, tag: FileTag, seq: Seq) -> bool {
    (at + 8..bytes.len()).step_by(8).any(|at| {
        bytes[at..].starts_with(&RECORD_MAGIC)
            && decode_record(bytes, at, tag).is_some_and(|record| record.synced >= seq)
    })
}

/// The path of the file whose first record is `first_seq`.
pub fn file_path(dir: &Path, first_seq: Seq) -> PathBuf {
    dir.join(format!("journal-{first_seq:020}"))
}

/// The journal files of a directory, in order.
///
/// # Errors
/// [`StoreError::Io`].
pub fn list_files(dir: &Path) -> Result<Vec<(Seq, PathBuf)>, StoreError> {
    let entries = std::fs::read_dir(dir).map_err(|error| StoreError::io("list", dir, error))?;
    let mut files = Vec::new();
    for entry in entries {
        let entry = entry.map_err(|error| StoreError::io("list", dir, error))?;
        let name = entry.file_name();
        let digits = name.to_str().and_then(|name| name.strip_prefix("journal-"));
        let digits = digits.filter(|digits| digits.len() == 20);
        if let Some(first_seq) = digits.and_then(|digits| digits.parse().ok()) {
            files.push((first_seq, entry.path()));
        }
    }
    files.sort_unstable();
    Ok(files)
}

/// Makes names in a directory durable.
///
/// # Errors
/// [`StoreError::Io`].
pub fn sync_dir(dir: &Path) -> Result<(), StoreError> {
    File::open(dir)
        .and_then(|dir| dir.sync_all())
        .map_err(|error| StoreError::io("sync the directory", dir, error))
}

/// Cuts a torn tail off, durably.
///
/// # Errors
/// [`StoreError::Io`].
pub fn cut(path: &Path, bytes: u64) -> Result<(), StoreError> {
    OpenOptions::new()
        .write(true)
        .open(path)
        .and_then(|file| file.set_len(bytes).and_then(|()| disk::sync_all(&file, path)))
        .map_err(|error| StoreError::io("cut the torn tail of", path, error))
}

/// A journal file that is written to.
#[derive(Debug)]
pub struct JournalFile {
    file: AppendFile,
    path: PathBuf,
    tag: FileTag,
}

impl JournalFile {
    /// Makes the file whose first record will be `first_seq`: its header and name are durable.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn create(dir: &Path, tag: FileTag, first_seq: Seq) -> Result<Self, StoreError> {
        let path = file_path(dir, first_seq);
        let mut options = OpenOptions::new();
        let made = options.read(true).write(true).create(true).truncate(true).open(&path);
        let file = made.map_err(|error| StoreError::io("make", &path, error))?;
        // Zeros come after it: a header that is torn is all there is.
        file.write_all_at(&encode_header(tag, first_seq), 0)
            .and_then(|()| disk::sync_all(&file, &path))
            .map_err(|error| StoreError::io("write", &path, error))?;
        let file = AppendFile::new(file, FILE_HEADER_BYTES as u64);
        sync_dir(dir)?;
        Ok(Self { file, path, tag })
    }

    /// What ties records to this file.
    pub fn tag(&self) -> FileTag {
        self.tag
    }

    /// Appends encoded records.
    ///
    /// # Errors
    /// [`StoreError::Io`]: nothing more must be written then.
    pub fn append(&mut self, records: &[u8]) -> Result<(), StoreError> {
        self.file.append(records).map_err(|error| StoreError::io("append to", &self.path, error))
    }

    /// Makes everything appended durable.
    ///
    /// # Errors
    /// [`StoreError::Io`]: nothing more must be written then.
    pub fn sync(&mut self) -> Result<(), StoreError> {
        let synced = disk::sync_data(self.file.file(), &self.path);
        synced.map_err(|error| StoreError::io("sync", &self.path, error))
    }

    /// Makes it durable as it is to stay: nothing more is appended.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn finish(&mut self) -> Result<(), StoreError> {
        let cut = self.file.cut().and_then(|()| disk::sync_all(self.file.file(), &self.path));
        cut.map_err(|error| StoreError::io("finish", &self.path, error))
    }
}
