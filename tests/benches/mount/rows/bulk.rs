//! One large file: written and read in order, and 4 KiB at a time anywhere.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use us_tests::tree::noise;

use super::aio::{Reader, SLOT_BYTES};
use crate::bed::{Bed, Done, Sample, Shared, remove};

const CHUNK_BYTES: usize = 1 << 20;
const FILE: &str = "large";
const RANDOM_FILE: &str = "random";
const RANDOM_MIB_MAX: u64 = 256;
const RANDOM_READS: Duration = Duration::from_secs(5);
const OVERWRITES_MAX: usize = 20_000;
const BLOCKS_A_CHUNK: u64 = (CHUNK_BYTES / SLOT_BYTES) as u64;

/// Writes the large file: `name` below the file system.
pub(crate) fn write_file(path: &Path, shared: &Shared) -> Result<Done> {
    let mut file = File::create(path)?;
    for chunk in 0..shared.size_mib {
        file.write_all(shared.data.of(chunk, CHUNK_BYTES))?;
    }
    file.sync_all()?;
    Ok(Done::all(shared.size_mib as f64))
}

pub(crate) fn read_file(path: &Path, shared: &Shared) -> Result<Done> {
    let mut file = File::open(path)?;
    let mut buffer = vec![0; CHUNK_BYTES];
    let mut bytes = 0;
    loop {
        match file.read(&mut buffer)? {
            0 => break,
            count => bytes += count as u64,
        }
    }
    ensure!(bytes == shared.size_mib << 20, "{} has {bytes} bytes", path.display());
    Ok(Done::all(shared.size_mib as f64))
}

/// Whether what was written is what is read.
pub(crate) fn verify_file(path: &Path, shared: &Shared) -> Result<()> {
    let mut file = File::open(path)?;
    let mut buffer = vec![0; CHUNK_BYTES];
    for chunk in 0..shared.size_mib {
        file.read_exact(&mut buffer)?;
        let same = buffer == shared.data.of(chunk, CHUNK_BYTES);
        ensure!(same, "MiB {chunk} of {} is not what was written", path.display());
    }
    Ok(())
}

pub(super) fn write(bed: &mut Bed, shared: &Shared) -> Result<Sample> {
    let path = bed.path(FILE);
    remove(&path)?;
    bed.time(shared, || write_file(&path, shared))
}

pub(super) fn read(bed: &mut Bed, shared: &Shared) -> Result<Sample> {
    let path = bed.path(FILE);
    if !path.exists() {
        write_file(&path, shared)?;
    }
    bed.cool()?;
    let sample = bed.time(shared, || read_file(&path, shared))?;
    verify_file(&path, shared)?;
    Ok(sample)
}

fn random_blocks(shared: &Shared) -> u64 {
    shared.size_mib.min(RANDOM_MIB_MAX) * BLOCKS_A_CHUNK
}

/// The bytes of a block of the file for random access after it was overwritten so often.
fn block(shared: &Shared, number: u64, generation: u8) -> &[u8] {
    shared.data.of(1 << 40 | u64::from(generation) << 32 | number, SLOT_BYTES)
}

fn make_random_file(bed: &mut Bed, shared: &Shared) -> Result<()> {
    let (path, blocks) = (bed.path(RANDOM_FILE), random_blocks(shared));
    if !bed.generations.is_empty() {
        return Ok(());
    }
    let mut file = File::create(&path)?;
    let mut chunk = Vec::with_capacity(CHUNK_BYTES);
    for number in 0..blocks {
        chunk.extend_from_slice(block(shared, number, 0));
        if chunk.len() == CHUNK_BYTES {
            file.write_all(&chunk)?;
            chunk.clear();
        }
    }
    file.sync_all()?;
    bed.generations = vec![0; blocks as usize];
    Ok(())
}

pub(super) fn random_read_1(bed: &mut Bed, shared: &Shared) -> Result<Sample> {
    random_read(bed, shared, 1)
}

pub(super) fn random_read_16(bed: &mut Bed, shared: &Shared) -> Result<Sample> {
    random_read(bed, shared, 16)
}

/// Reads blocks anywhere, `depth` at a time: each at most once, for some seconds.
fn random_read(bed: &mut Bed, shared: &Shared, depth: usize) -> Result<Sample> {
    make_random_file(bed, shared)?;
    bed.cool()?;
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECT)
        .open(bed.path(RANDOM_FILE))
        .context("open with O_DIRECT")?;
    let mut order = shuffled(bed.generations.len(), depth as u64).into_iter();
    let generations = &bed.generations;
    bed.time(shared, || {
        let mut reader = Reader::new(&file, depth)?;
        let mut asked: Vec<u32> = vec![0; depth];
        for (slot, number) in order.by_ref().take(depth).enumerate() {
            reader.ask(slot, u64::from(number) * SLOT_BYTES as u64)?;
            asked[slot] = number;
        }
        let (begun, mut reads) = (Instant::now(), 0.0);
        while reader.under_way() > 0 {
            for slot in reader.wait()? {
                let number = asked[slot];
                let wanted = block(shared, number.into(), generations[number as usize]);
                ensure!(reader.bytes(slot) == wanted, "block {number} is not what was written");
                reads += 1.0;
                let next = order.next().filter(|_| begun.elapsed() < RANDOM_READS);
                if let Some(number) = next {
                    reader.ask(slot, u64::from(number) * SLOT_BYTES as u64)?;
                    asked[slot] = number;
                }
            }
        }
        Ok(Done::all(reads))
    })
}

/// Overwrites blocks anywhere, each at most once, and syncs once.
pub(super) fn overwrite(bed: &mut Bed, shared: &Shared) -> Result<Sample> {
    make_random_file(bed, shared)?;
    let path = bed.path(RANDOM_FILE);
    let mut order = shuffled(bed.generations.len(), 77);
    order.truncate(OVERWRITES_MAX);
    let file = OpenOptions::new().read(true).write(true).open(&path)?;
    let mut generations = std::mem::take(&mut bed.generations);
    let sample = bed.time(shared, || {
        for number in order.iter().copied() {
            let generation = &mut generations[number as usize];
            *generation = generation.wrapping_add(1);
            let bytes = block(shared, number.into(), *generation);
            file.write_all_at(bytes, u64::from(number) * SLOT_BYTES as u64)?;
        }
        file.sync_all()?;
        Ok(Done::all(order.len() as f64))
    })?;
    drop(file);
    bed.cool()?;
    let mut file = File::open(&path)?;
    let mut bytes = vec![0; SLOT_BYTES];
    for (number, generation) in generations.iter().enumerate() {
        file.read_exact(&mut bytes)?;
        let same = bytes == block(shared, number as u64, *generation);
        ensure!(same, "block {number} is not what was written");
    }
    bed.generations = generations;
    Ok(sample)
}

/// The numbers below `count` in an order that only the seed decides.
fn shuffled(count: usize, seed: u64) -> Vec<u32> {
    let mut order: Vec<u32> = (0..count as u32).collect();
    let random = noise(seed, count * 8);
    for (at, bytes) in random.chunks_exact(8).enumerate().skip(1) {
        let bytes = bytes.try_into().expect("eight of them");
        order.swap(at, (u64::from_le_bytes(bytes) % (at as u64 + 1)) as usize);
    }
    order
}
