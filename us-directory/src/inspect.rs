//! Looking around in a snapshot for administrators: where a file's bytes lie, what a block is. Runs
//! outside the engine's thread.

pub mod trash;

use std::collections::BTreeMap;

use bytes::Bytes;
use us_core::ids::{BlockId, VolumeId};
use us_proto::v1::{FileRange, ProviderState, WhatIfFile, WhereBlock, WhereFragment};

use crate::engine::StateSnapshot;
use crate::keys;
use crate::namespace::CHUNK_BYTES;
use crate::records::{BlockRecord, ChunkRecord, bit, decode};
use crate::store::{KeyRange, StoreError};

/// Blocks, or references to one, looked at together.
const BLOCKS_PAGE: usize = 4096;
/// Chunks looked at together: a block is reported once for each such window of a file.
const CHUNKS_WINDOW: usize = 256;

/// Why there is no answer.
#[derive(Debug, Clone, thiserror::Error)]
pub enum InspectError {
    /// No such volume.
    #[error("there is no volume {name:?}")]
    NoVolume {
        /// As asked for.
        name: String,
    },
    /// No such inode.
    #[error("there is no inode {ino}")]
    NoInode {
        /// As asked for.
        ino: u64,
    },
    /// No such block.
    #[error("there is no such block")]
    NoBlock,
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl From<InspectError> for tonic::Status {
    fn from(error: InspectError) -> Self {
        match error {
            InspectError::NoVolume { .. }
            | InspectError::NoInode { .. }
            | InspectError::NoBlock => Self::not_found(error.to_string()),
            InspectError::Store(error) => Self::internal(error.to_string()),
        }
    }
}

fn read<T: prost::Message + Default>(
    snapshot: &StateSnapshot,
    key: &Bytes,
) -> Result<Option<T>, StoreError> {
    snapshot.view.get(key)?.map(|value| decode(key, &value)).transpose()
}

fn describe(
    snapshot: &StateSnapshot,
    volume: &VolumeId,
    block: Bytes,
    record: BlockRecord,
    ranges: Vec<FileRange>,
) -> WhereBlock {
    let fragments = record.providers.iter().enumerate();
    let fragments = fragments.map(|(index, provider)| {
        let found = snapshot.providers.binary_search_by_key(provider, |(id, _)| *id);
        let state = found.map_or(ProviderState::Dead as i32, |at| snapshot.providers[at].1);
        WhereFragment {
            index: index as u32,
            provider: *provider,
            state,
            durable: bit(&record.durable, index),
            damaged: bit(&record.damaged, index) || bit(&record.missing, index),
        }
    });
    WhereBlock {
        block,
        volume: Bytes::copy_from_slice(volume.as_bytes()),
        s: record.s,
        r: record.r,
        plaintext_bytes: record.plaintext_bytes,
        live_bytes: record.live_bytes,
        inline: record.is_inline(),
        fragments: fragments.collect(),
        ranges,
    }
}

/// Tells `sink` of every block that a file's bytes lie in, until it says `false`.
///
/// # Errors
/// [`InspectError`].
pub fn where_file(
    snapshot: &StateSnapshot,
    volume: &str,
    ino: u64,
    mut sink: impl FnMut(WhereBlock) -> bool,
) -> Result<(), InspectError> {
    let by_id = volume.parse::<VolumeId>().ok();
    let found = snapshot.volumes.iter().find(|(id, name)| Some(*id) == by_id || name == volume);
    let (volume, _) = found.ok_or_else(|| InspectError::NoVolume { name: volume.to_owned() })?;
    if snapshot.view.get(&keys::inode(volume, ino))?.is_none() {
        return Err(InspectError::NoInode { ino });
    }
    let mut range = KeyRange::prefix(&keys::chunks(volume, ino));
    loop {
        let chunks = snapshot.view.scan(&range, CHUNKS_WINDOW)?;
        let Some((last, _)) = chunks.last() else { return Ok(()) };
        range = range.after(last);
        let mut blocks: BTreeMap<Bytes, Vec<FileRange>> = BTreeMap::new();
        for (key, value) in &chunks {
            let map: ChunkRecord = decode(key, value)?;
            let start = keys::last_number(key) * CHUNK_BYTES;
            for extent in map.extents.into_iter().filter(|extent| !extent.block.is_empty()) {
                let piece = FileRange {
                    offset: start + u64::from(extent.offset),
                    length: u64::from(extent.length),
                    block_offset: u64::from(extent.block_offset),
                };
                blocks.entry(extent.block).or_default().push(piece);
            }
        }
        for (block, ranges) in blocks {
            let Some(id) = BlockId::from_slice(&block) else { continue };
            let record = read(snapshot, &keys::block(volume, &id))?.unwrap_or_default();
            if !sink(describe(snapshot, volume, block, record, ranges)) {
                return Ok(());
            }
        }
    }
}

/// A block, in whatever volume it is.
///
/// # Errors
/// [`InspectError`].
pub fn find_block(snapshot: &StateSnapshot, block: &Bytes) -> Result<WhereBlock, InspectError> {
    let id = BlockId::from_slice(block).ok_or(InspectError::NoBlock)?;
    for (volume, _) in &snapshot.volumes {
        if let Some(record) = read::<BlockRecord>(snapshot, &keys::block(volume, &id))? {
            return Ok(describe(snapshot, volume, block.clone(), record, Vec::new()));
        }
    }
    Err(InspectError::NoBlock)
}

/// Files with blocks that could not be read without some providers, at most `files_max` of them, and
/// whether there are more. Looks at every block: slow.
///
/// # Errors
/// [`InspectError`] when the store fails.
pub fn files_lost(
    snapshot: &StateSnapshot,
    without: &[u32],
    files_max: usize,
) -> Result<(Vec<WhatIfFile>, bool), InspectError> {
    let online = |provider: &u32| {
        let at = snapshot.providers.binary_search_by_key(provider, |(id, _)| *id);
        at.is_ok_and(|at| snapshot.providers[at].1 == ProviderState::Online as i32)
            && !without.contains(provider)
    };
    let mut files: BTreeMap<(VolumeId, u64), u64> = BTreeMap::new();
    for (volume, _) in &snapshot.volumes {
        let mut range = KeyRange::prefix(&keys::tag(volume, b'b'));
        loop {
            let pairs = snapshot.view.scan(&range, BLOCKS_PAGE)?;
            for (key, value) in &pairs {
                let record: BlockRecord = decode(key, value)?;
                let readable =
                    record.is_inline() || readable_fragments(&record, online) >= record.s;
                let Some(block) = keys::last_block(key).filter(|_| !readable) else { continue };
                for ino in inodes_of(snapshot, volume, &block)? {
                    if files.len() >= files_max && !files.contains_key(&(*volume, ino)) {
                        return Ok((named(snapshot, files), true));
                    }
                    *files.entry((*volume, ino)).or_default() += 1;
                }
            }
            match pairs.last() {
                Some((last, _)) if pairs.len() == BLOCKS_PAGE => range = range.after(last),
                _ => break,
            }
        }
    }
    Ok((named(snapshot, files), false))
}

/// Fragments of a block that are durable at a provider that `online` names.
fn readable_fragments(record: &BlockRecord, online: impl Fn(&u32) -> bool) -> u32 {
    let at = record.providers.iter().enumerate();
    at.filter(|(index, provider)| {
        bit(&record.durable, *index)
            && !bit(&record.damaged, *index)
            && !bit(&record.missing, *index)
            && online(provider)
    })
    .count() as u32
}

/// The inodes that refer to a block.
fn inodes_of(
    snapshot: &StateSnapshot,
    volume: &VolumeId,
    block: &BlockId,
) -> Result<Vec<u64>, StoreError> {
    let range = KeyRange::prefix(&keys::references(volume, block));
    let pairs = snapshot.view.scan(&range, BLOCKS_PAGE)?;
    let mut inodes: Vec<u64> =
        pairs.iter().map(|(key, _)| keys::last_number(&key[..key.len() - 8])).collect();
    inodes.dedup();
    Ok(inodes)
}

fn named(snapshot: &StateSnapshot, files: BTreeMap<(VolumeId, u64), u64>) -> Vec<WhatIfFile> {
    let name = |volume: &VolumeId| {
        let found = snapshot.volumes.iter().find(|(id, _)| id == volume);
        found.map(|(_, name)| name.clone()).unwrap_or_default()
    };
    let file = |((volume, ino), unreadable_blocks): ((VolumeId, u64), u64)| WhatIfFile {
        volume: Bytes::copy_from_slice(volume.as_bytes()),
        volume_name: name(&volume),
        ino,
        unreadable_blocks,
    };
    files.into_iter().map(file).collect()
}
