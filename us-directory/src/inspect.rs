//! Looking around in a snapshot for administrators: where a file's bytes lie, what a block is. Runs
//! outside the engine's thread.

use std::collections::BTreeMap;

use bytes::Bytes;
use us_core::ids::VolumeId;
use us_proto::v1::{FileRange, ProviderState, WhereBlock, WhereFragment};

use crate::engine::StateSnapshot;
use crate::keys;
use crate::namespace::CHUNK_BYTES;
use crate::records::{BlockRecord, ChunkRecord, bit, block_id, decode};
use crate::store::{KeyRange, StoreError};

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
            let Some(id) = block_id(&block) else { continue };
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
    let id = block_id(block).ok_or(InspectError::NoBlock)?;
    for (volume, _) in &snapshot.volumes {
        if let Some(record) = read::<BlockRecord>(snapshot, &keys::block(volume, &id))? {
            return Ok(describe(snapshot, volume, block.clone(), record, Vec::new()));
        }
    }
    Err(InspectError::NoBlock)
}
