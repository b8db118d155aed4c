//! Many small files, and many names.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::bed::{Bed, Done, Sample, Shared, each, remove};

pub(crate) const FILES: usize = 2000;
pub(crate) const FILE_BYTES: usize = 4096;
const FOLDERS: usize = 20;
const SYNCED_FILES: usize = 200;
const NAMES: usize = 1000;
const LISTINGS: usize = 5;
const FOLDER: &str = "small";
const SYNCED: &str = "synced";
const NAMES_FOLDER: &str = "names";

fn file(folder: &Path, number: usize) -> PathBuf {
    folder.join(format!("d{:02}/f{number:05}", number % FOLDERS))
}

fn bytes(shared: &Shared, number: usize) -> &[u8] {
    shared.data.of(2 << 40 | number as u64, FILE_BYTES)
}

fn make(path: &Path, bytes: &[u8]) -> Result<File> {
    let mut file = OpenOptions::new().write(true).create_new(true).open(path)?;
    file.write_all(bytes)?;
    Ok(file)
}

/// Makes the small files.
pub(crate) fn make_all(folder: &Path, shared: &Shared) -> Result<Done> {
    fs::create_dir(folder)?;
    for number in 0..FOLDERS {
        fs::create_dir(folder.join(format!("d{number:02}")))?;
    }
    each(FILES, |number| make(&file(folder, number), bytes(shared, number)).map(drop))
}

/// The folder of the small files, all of them there.
fn complete(bed: &Bed, shared: &Shared) -> Result<PathBuf> {
    let folder = bed.path(FOLDER);
    if !file(&folder, FILES - 1).exists() {
        remove(&folder)?;
        ensure!(!make_all(&folder, shared)?.partial, "the files are not made in time");
    }
    Ok(folder)
}

pub(super) fn create(bed: &mut Bed, shared: &Shared) -> Result<Sample> {
    let folder = bed.path(FOLDER);
    remove(&folder)?;
    bed.time(shared, || make_all(&folder, shared))
}

pub(super) fn read(bed: &mut Bed, shared: &Shared) -> Result<Sample> {
    let folder = complete(bed, shared)?;
    bed.cool()?;
    let mut buffer = [0; 2 * FILE_BYTES];
    bed.time(shared, || {
        each(FILES, |number| {
            let count = File::open(file(&folder, number))?.read(&mut buffer)?;
            let same = buffer[..count] == *bytes(shared, number);
            ensure!(same, "small file {number} is not what was written");
            Ok(())
        })
    })
}

pub(super) fn stat(bed: &mut Bed, shared: &Shared) -> Result<Sample> {
    let folder = complete(bed, shared)?;
    let all = || {
        each(FILES, |number| {
            let size = fs::metadata(file(&folder, number))?.len();
            ensure!(size == FILE_BYTES as u64, "small file {number} has {size} bytes");
            Ok(())
        })
    };
    all()?;
    bed.time(shared, all)
}

pub(super) fn create_fsync(bed: &mut Bed, shared: &Shared) -> Result<Sample> {
    let folder = bed.path(SYNCED);
    remove(&folder)?;
    fs::create_dir(&folder)?;
    bed.time(shared, || {
        each(SYNCED_FILES, |number| {
            let file = make(&folder.join(number.to_string()), bytes(shared, number))?;
            Ok(file.sync_all()?)
        })
    })
}

pub(super) fn mkdir(bed: &mut Bed, shared: &Shared) -> Result<Sample> {
    let folder = bed.path(NAMES_FOLDER);
    remove(&folder)?;
    fs::create_dir(&folder)?;
    bed.time(shared, || {
        each(NAMES, |number| Ok(fs::create_dir(folder.join(format!("d{number}")))?))
    })
}

/// A folder with as many folders and empty files, each file's name begins with `letter`.
fn named(bed: &Bed, letter: char) -> Result<PathBuf> {
    let folder = bed.path(NAMES_FOLDER);
    let last = NAMES - 1;
    if folder.join(format!("{letter}{last}")).exists() && folder.join(format!("d{last}")).exists() {
        return Ok(folder);
    }
    fs::create_dir_all(&folder)?;
    for number in 0..NAMES {
        fs::create_dir_all(folder.join(format!("d{number}")))?;
        File::create(folder.join(format!("{letter}{number}")))?;
    }
    Ok(folder)
}

pub(super) fn rename(bed: &mut Bed, shared: &Shared) -> Result<Sample> {
    let folder = named(bed, 'f')?;
    bed.time(shared, || {
        each(NAMES, |number| {
            let (from, to) = (format!("f{number}"), format!("g{number}"));
            fs::rename(folder.join(&from), folder.join(to)).with_context(|| from)
        })
    })
}

pub(super) fn readdir(bed: &mut Bed, shared: &Shared) -> Result<Sample> {
    let folder = named(bed, 'g')?;
    bed.time(shared, || {
        let mut names = 0;
        for _ in 0..LISTINGS {
            for entry in fs::read_dir(&folder)? {
                names += usize::from(!entry?.file_name().is_empty());
            }
        }
        ensure!(names == LISTINGS * 2 * NAMES, "{names} names were listed");
        Ok(Done::all(names as f64))
    })
}

pub(super) fn unlink(bed: &mut Bed, shared: &Shared) -> Result<Sample> {
    let folder = named(bed, 'g')?;
    bed.time(shared, || {
        each(NAMES, |number| Ok(fs::remove_file(folder.join(format!("g{number}")))?))
    })
}
