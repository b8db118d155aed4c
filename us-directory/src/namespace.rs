//! The namespace: what mutations do to inodes, names, maps and blocks.
//!
//! A [`Tx`] reads a view of the store plus its own writes, applies mutations, and ends as one
//! [`WriteBatch`] with what changed. It does no I/O of its own, takes no lease and keeps no lock:
//! who may change what is asked of an [`Authority`]. A batch whose mutation fails is dropped whole.
//!
//! Invariants (checked by the model tests):
//! - a name's `d` and `c` keys say the same; a directory counts its entries and subdirectories;
//! - `allocated_bytes` of an inode is the sum of its extents; a chunk's extents are sorted, disjoint;
//! - the sum of a block's `r` keys is its `live_bytes`, their number its `references`; a block
//!   without references is gone from `b` and `p` and has a `g` key (unless it was inline);
//! - an inode without names is gone from `i` and has a `k` key, unless an `o` key keeps it or it lies
//!   in the trash ([`trash`]).
//!
//! Called by the engine only. Fails with [`ApplyError`]: a broken rule (the client's fault) or the
//! store's failure.

use us_core::ids::{BlockId, VolumeId};
use us_proto::v1::mutation::Op;
use us_proto::v1::{Mutation, Timestamp};

use crate::store::StoreError;

mod attributes;
mod blocks;
mod data;
mod entries;
mod images;
mod reap;
#[cfg(test)]
mod tests;
mod trash;
mod tx;

pub use attributes::XattrRecord;
pub use blocks::{margin_holds, with_bit_cleared};
pub use trash::Purged;
pub use tx::{BlockChange, Outcome, TrashRule, Tx};
pub use us_core::limits::{CHUNK_BYTES, CHUNK_EXTENTS_MAX, DEPTH_MAX, FILE_BYTES_MAX};
use us_core::limits::{SEALED_XATTRS_BYTES_MAX, ZERO_EXTENT_BYTES_MAX};

/// Bytes of a name's hash.
pub const NAME_HASH_BYTES: usize = 16;
/// The longest sealed name (a name of 255 bytes, padding and seal).
pub const SEALED_NAME_BYTES_MAX: usize = 512;
/// The longest sealed target of a symbolic link.
pub const SEALED_TARGET_BYTES_MAX: usize = 4096 + 256;
/// The longest sealed xattr: a name of 255 bytes, a value of 64 KiB, the seal.
pub const SEALED_XATTR_BYTES_MAX: usize = (64 << 10) + 512;
/// The longest sealed page of an inline block.
pub const INLINE_BYTES_MAX: usize = (16 << 10) + 64;

/// `st_mode`: the type bits.
pub const S_IFMT: u32 = 0o170_000;
/// `st_mode`: a directory.
pub const S_IFDIR: u32 = 0o040_000;
/// `st_mode`: a symbolic link.
pub const S_IFLNK: u32 = 0o120_000;
/// `st_mode`: a regular file.
pub const S_IFREG: u32 = 0o100_000;

/// Who changes, and what it may.
pub trait Authority {
    /// The session's number.
    fn session(&self) -> u64;
    /// Whether the session holds the inode EXCLUSIVE.
    fn exclusive(&self, ino: u64) -> bool;
    /// Whether the session may create this inode.
    fn may_create(&self, ino: u64) -> bool;
    /// The other sessions that have said they have the inode open.
    fn open_elsewhere(&self, ino: u64) -> Vec<u64>;
    /// Whether there is such a provider.
    fn provider_exists(&self, provider: u32) -> bool;
    /// Whether a lease with this birth was ever given.
    fn birth_given(&self, birth: u64) -> bool;
    /// No lease was granted yet under this number, or a greater one.
    fn next_grant(&self) -> u64;
}

/// A rule that a mutation breaks. The client should have known: its session ends.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Rule {
    /// No such inode.
    #[error("there is no inode {ino}")]
    NoInode {
        /// The inode.
        ino: u64,
    },
    /// No such name.
    #[error("directory {dir} has no such name")]
    NoEntry {
        /// The directory.
        dir: u64,
    },
    /// A name is something else than the mutation expects.
    #[error("a name in directory {dir} is inode {found}, not {expected}")]
    EntryDiffers {
        /// The directory.
        dir: u64,
        /// What the mutation says.
        expected: u64,
        /// What it is.
        found: u64,
    },
    /// The name is taken.
    #[error("the name is taken in directory {dir} (inode {ino})")]
    Exists {
        /// The directory.
        dir: u64,
        /// What has it.
        ino: u64,
    },
    /// Not in the trash.
    #[error("inode {ino} is not in the trash")]
    NotTrashed {
        /// The inode.
        ino: u64,
    },
    /// Not a directory.
    #[error("inode {ino} is not a directory")]
    NotADirectory {
        /// The inode.
        ino: u64,
    },
    /// A directory where there must be none.
    #[error("inode {ino} is a directory")]
    IsADirectory {
        /// The inode.
        ino: u64,
    },
    /// Not a regular file.
    #[error("inode {ino} is not a regular file")]
    NotAFile {
        /// The inode.
        ino: u64,
    },
    /// A directory with names in it.
    #[error("directory {ino} is not empty")]
    NotEmpty {
        /// The directory.
        ino: u64,
    },
    /// A directory would lie in itself.
    #[error("directory {ino} would come to lie in itself")]
    Loop {
        /// The directory.
        ino: u64,
    },
    /// The root has no name.
    #[error("the root cannot be moved, linked or removed")]
    Root,
    /// The directory was removed while it is still open.
    #[error("directory {ino} was removed")]
    Removed {
        /// The directory.
        ino: u64,
    },
    /// The session may not create this inode.
    #[error("inode {ino} is not of a range leased to this session, or was used before")]
    InodeNotLeased {
        /// The inode.
        ino: u64,
    },
    /// The session does not hold the inode EXCLUSIVE.
    #[error("the session does not hold inode {ino} exclusively")]
    NotExclusive {
        /// The inode.
        ino: u64,
    },
    /// A field is longer than allowed.
    #[error("{field}: {bytes} bytes, where {bytes_max} are allowed")]
    TooLong {
        /// Which field.
        field: &'static str,
        /// Its bytes.
        bytes: u64,
        /// The most allowed.
        bytes_max: u64,
    },
    /// A field makes no sense.
    #[error("{field} makes no sense")]
    Malformed {
        /// Which field.
        field: &'static str,
    },
    /// The block id was used before.
    #[error("block {block} exists already")]
    BlockExists {
        /// The block.
        block: BlockId,
    },
    /// Nothing refers to such a block.
    #[error("there is no block {block}")]
    NoBlock {
        /// The block.
        block: BlockId,
    },
    /// The extent leaves its block.
    #[error("bytes {offset}+{length} of block {block}, which has {plaintext_bytes}")]
    OutsideBlock {
        /// The block.
        block: BlockId,
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u64,
        /// Bytes of the block.
        plaintext_bytes: u32,
    },
    /// A chunk's map would have too many extents.
    #[error("chunk {chunk} of inode {ino} would have {extents} extents; at most 1024 are allowed")]
    TooManyExtents {
        /// The inode.
        ino: u64,
        /// The chunk.
        chunk: u64,
        /// Extents it would have.
        extents: usize,
    },
    /// The block's code or sizes are not the volume's.
    #[error("block {block}: its code or sizes are not those of this volume")]
    Geometry {
        /// The block.
        block: BlockId,
    },
    /// Too few fragments are durable.
    #[error("block {block}: too few of its fragments are durable for the write margin")]
    WriteMargin {
        /// The block.
        block: BlockId,
    },
    /// The birth was never given.
    #[error("block {block}: birth {birth} was never given")]
    Birth {
        /// The block.
        block: BlockId,
        /// The birth.
        birth: u64,
    },
    /// More than the volume's quota can be stretched to.
    #[error(
        "the volume's quota of {quota_bytes} bytes is used up, and more than it may be exceeded by"
    )]
    Quota {
        /// The quota.
        quota_bytes: u64,
    },
    /// A fragment is said to lie at a provider that does not exist.
    #[error("block {block}: there is no provider {provider}")]
    NoProvider {
        /// The block.
        block: BlockId,
        /// The provider.
        provider: u32,
    },
}

/// Why a batch was not applied.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ApplyError {
    /// The client broke a rule.
    #[error(transparent)]
    Rule(#[from] Rule),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// The later of two times; absent counts as never.
fn later(left: Option<Timestamp>, right: Option<Timestamp>) -> Option<Timestamp> {
    let order = |time: &Option<Timestamp>| time.as_ref().map(|time| (time.seconds, time.nanos));
    if order(&left) > order(&right) { left } else { right }
}

/// Fails unless `bytes` is at most `bytes_max`.
fn at_most(field: &'static str, bytes: usize, bytes_max: usize) -> Result<(), Rule> {
    if bytes <= bytes_max {
        return Ok(());
    }
    Err(Rule::TooLong { field, bytes: bytes as u64, bytes_max: bytes_max as u64 })
}

impl Tx<'_> {
    /// Applies one mutation.
    ///
    /// # Errors
    /// [`ApplyError`]: the transaction must then be dropped.
    pub fn apply(&mut self, who: &dyn Authority, mutation: &Mutation) -> Result<(), ApplyError> {
        match &mutation.op {
            Some(Op::Create(create)) => self.create(who, create)?,
            Some(Op::Link(link)) => self.link(who, link)?,
            Some(Op::Unlink(unlink)) => self.unlink(who, unlink)?,
            Some(Op::Rename(rename)) => self.rename(who, rename)?,
            Some(Op::SetAttributes(set)) => self.set_attributes(who, set)?,
            Some(Op::SetXattr(set)) => self.set_xattr(who, set)?,
            Some(Op::RemoveXattr(remove)) => self.remove_xattr(who, remove)?,
            Some(Op::CommitData(commit)) => self.commit_data(who, commit)?,
            Some(Op::Release(release)) => self.release(who.session(), release.ino)?,
            Some(Op::FragmentsDurable(durable)) => self.fragments_durable(durable)?,
            Some(Op::Restore(restore)) => self.restore(who, restore)?,
            None => return Err(Rule::Malformed { field: "mutation" }.into()),
        }
        self.bury()?;
        Ok(())
    }
}

/// The root directory of a new volume.
pub fn new_root(volume: &VolumeId, time: Timestamp) -> crate::store::WriteBatch {
    let mut batch = crate::store::WriteBatch::new();
    let root = crate::records::InodeRecord {
        mode: S_IFDIR | 0o777,
        nlink: 2,
        atime: Some(time),
        mtime: Some(time),
        ctime: Some(time),
        parent: 1,
        version: 1,
        ..Default::default()
    };
    batch.put(crate::keys::inode(volume, 1), crate::records::encode(&root));
    let usage = crate::records::UsageRecord { inodes: 1, ..Default::default() };
    batch.put(crate::keys::usage(volume), crate::records::encode(&usage));
    batch
}
