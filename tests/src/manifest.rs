//! A workload that remembers what was acknowledged, and checks it after the plug was pulled.
//!
//! Three kinds of promises: a file written once and synced is there, byte for byte; a record
//! overwritten in place has at least the last synced version, at most the last one written; a file
//! replaced by rename is one of the versions from the last synced on, whole.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::tree::noise;

const RECORD_BYTES: usize = 4096;
const RECORDS: usize = 256;

/// What was acknowledged, and what was tried since.
#[derive(Debug, Default)]
pub struct Manifest {
    /// Files written once and synced: number and length.
    files: Vec<(u64, usize)>,
    /// The next file's number.
    next: u64,
    /// For each record: the last version synced, and the last version written.
    records: Vec<(u64, u64)>,
    /// For the replaced file: the last version synced, and the last version tried.
    replaced: (u64, u64),
}

fn version_bytes(version: u64, salt: u64) -> Vec<u8> {
    let mut bytes = noise(version * 1_000_003 + salt, RECORD_BYTES);
    bytes[..8].copy_from_slice(&version.to_le_bytes());
    bytes
}

fn file_bytes(number: u64) -> usize {
    // From a few bytes to a few blocks.
    [17, 4096, 30_000, 100_000, 1_000_000, 9_000_000][number as usize % 6] + number as usize % 97
}

impl Manifest {
    /// Works under `folder` until an operation fails or `stop` is set; gives the operations
    /// acknowledged.
    pub fn work(&mut self, folder: &Path, stop: &AtomicBool) -> u64 {
        self.records.resize(RECORDS, (0, 0));
        let mut acknowledged = 0;
        while !stop.load(Ordering::Relaxed) {
            if self.step(folder).is_err() {
                break;
            }
            acknowledged += 1;
        }
        acknowledged
    }

    fn step(&mut self, folder: &Path) -> io::Result<()> {
        let number = self.next;
        self.next += 1;
        let length = file_bytes(number);
        let mut file = File::create(folder.join(format!("file{number}")))?;
        file.write_all(&noise(number, length))?;
        file.sync_all()?;
        self.files.push((number, length));
        self.overwrite_records(folder, number)?;
        self.replace(folder)
    }

    fn overwrite_records(&mut self, folder: &Path, seed: u64) -> io::Result<()> {
        let path = folder.join("records");
        let file = OpenOptions::new().create(true).truncate(false).write(true).open(path)?;
        let first = (seed as usize * 31) % RECORDS;
        let touched = [first, (first + 7) % RECORDS, (first + 100) % RECORDS];
        for record in touched {
            self.records[record].1 += 1;
            let bytes = version_bytes(self.records[record].1, record as u64);
            file.write_all_at(&bytes, (record * RECORD_BYTES) as u64)?;
        }
        file.sync_data()?;
        for record in touched {
            self.records[record].0 = self.records[record].1;
        }
        Ok(())
    }

    fn replace(&mut self, folder: &Path) -> io::Result<()> {
        self.replaced.1 += 1;
        let temporary = folder.join("replaced.new");
        let mut file = File::create(&temporary)?;
        file.write_all(&version_bytes(self.replaced.1, 77))?;
        // Not synced before the rename: the disk itself must not let the name run ahead of the data.
        fs::rename(&temporary, folder.join("replaced"))?;
        file.sync_all()?;
        self.replaced.0 = self.replaced.1;
        Ok(())
    }

    /// Reads everything back.
    ///
    /// # Panics
    /// When anything acknowledged is not there, or there are bytes that nobody wrote.
    pub fn check(&mut self, folder: &Path) {
        for (number, length) in &self.files {
            let path = folder.join(format!("file{number}"));
            let read =
                fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            assert!(read == noise(*number, *length), "{}: not what was synced", path.display());
        }
        self.check_records(folder);
        self.check_replaced(folder);
    }

    fn check_records(&mut self, folder: &Path) {
        if self.records.iter().all(|(synced, _)| *synced == 0) {
            return;
        }
        let file = File::open(folder.join("records")).expect("it was synced");
        for (record, (synced, written)) in self.records.iter_mut().enumerate() {
            if *synced == 0 {
                // Never acknowledged: anything up to the last try may be there.
                continue;
            }
            let mut bytes = vec![0; RECORD_BYTES];
            file.read_exact_at(&mut bytes, (record * RECORD_BYTES) as u64).expect("a whole record");
            let version = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes"));
            assert!(
                (*synced..=*written).contains(&version),
                "record {record} has version {version}, not {synced} to {written}"
            );
            assert!(bytes == version_bytes(version, record as u64), "record {record} is torn");
            *synced = version;
        }
    }

    fn check_replaced(&mut self, folder: &Path) {
        let (synced, tried) = self.replaced;
        if synced == 0 {
            return;
        }
        let bytes = fs::read(folder.join("replaced")).expect("it was synced");
        assert_eq!(bytes.len(), RECORD_BYTES, "the renamed file ran ahead of its data");
        let version = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes"));
        assert!((synced..=tried).contains(&version), "version {version}, not {synced} to {tried}");
        assert!(bytes == version_bytes(version, 77), "the replaced file is torn");
        self.replaced.0 = version;
    }

    /// Files acknowledged so far.
    pub fn files(&self) -> usize {
        self.files.len()
    }
}
