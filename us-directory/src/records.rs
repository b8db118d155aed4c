//! The values of the store, as protobuf messages by derive. Field numbers are never reused.

use bytes::Bytes;
use prost::Message;
use us_core::ids::VolumeId;
use us_proto::v1::Timestamp;

use crate::store::StoreError;

/// `i`: what an inode is.
#[derive(Clone, PartialEq, Message)]
pub struct InodeRecord {
    /// Type and permission bits.
    #[prost(uint32, tag = "1")]
    pub mode: u32,
    /// Names (of a directory: 2 and one for each subdirectory).
    #[prost(uint32, tag = "2")]
    pub nlink: u32,
    /// Owner.
    #[prost(uint32, tag = "3")]
    pub uid: u32,
    /// Group.
    #[prost(uint32, tag = "4")]
    pub gid: u32,
    /// Device number.
    #[prost(uint32, tag = "5")]
    pub rdev: u32,
    /// Bytes.
    #[prost(uint64, tag = "6")]
    pub size: u64,
    /// Mapped bytes.
    #[prost(uint64, tag = "7")]
    pub allocated_bytes: u64,
    /// Last access.
    #[prost(message, optional, tag = "8")]
    pub atime: Option<Timestamp>,
    /// Last change of the data.
    #[prost(message, optional, tag = "9")]
    pub mtime: Option<Timestamp>,
    /// Last change of anything.
    #[prost(message, optional, tag = "10")]
    pub ctime: Option<Timestamp>,
    /// Sealed target of a symbolic link.
    #[prost(bytes = "bytes", tag = "11")]
    pub sealed_target: Bytes,
    /// The directory a directory lies in.
    #[prost(uint64, tag = "12")]
    pub parent: u64,
    /// Grows with every change.
    #[prost(uint64, tag = "13")]
    pub version: u64,
    /// Extended attributes.
    #[prost(uint32, tag = "14")]
    pub xattrs: u32,
    /// Bytes of their sealed values.
    #[prost(uint64, tag = "15")]
    pub xattr_bytes: u64,
    /// Of a directory: its names.
    #[prost(uint64, tag = "16")]
    pub entries: u64,
    /// Of a directory: the last cookie given.
    #[prost(uint64, tag = "17")]
    pub last_cookie: u64,
    /// Of an unlinked inode: the sessions that have it open (`o` keys).
    #[prost(uint32, tag = "18")]
    pub orphans: u32,
    /// The cluster's clock when it was made.
    #[prost(uint64, tag = "19")]
    pub born_ms: u64,
    /// Mapped bytes that are zeros, and in no block.
    #[prost(uint64, tag = "20")]
    pub zero_bytes: u64,
    /// It has no name, and goes to the trash when nobody has it open, or is there.
    #[prost(message, optional, tag = "21")]
    pub removed: Option<RemovedRecord>,
    /// It was in the trash.
    #[prost(message, optional, tag = "22")]
    pub restored: Option<RestoredRecord>,
    /// Of a directory: something that lay in it went to the trash.
    #[prost(bool, tag = "23")]
    pub keeps_trash: bool,
    /// Of such a directory: when the last of it did (`at_ms`); 0: not known.
    #[prost(uint64, tag = "24")]
    pub trashed_in_it_ms: u64,
}

impl InodeRecord {
    /// Whether it lies in the trash: only the trash knows it.
    pub fn is_trashed(&self) -> bool {
        self.removed.as_ref().is_some_and(|removed| removed.trashed)
    }

    /// Bytes of blocks that it refers to.
    pub fn stored_bytes(&self) -> u64 {
        self.allocated_bytes.saturating_sub(self.zero_bytes)
    }
}

/// How an inode lost its last name.
#[derive(Clone, PartialEq, Message)]
pub struct RemovedRecord {
    /// The directory it lay in.
    #[prost(uint64, tag = "1")]
    pub dir: u64,
    /// 16 bytes.
    #[prost(bytes = "bytes", tag = "2")]
    pub name_hash: Bytes,
    /// The name, sealed for that directory.
    #[prost(bytes = "bytes", tag = "3")]
    pub sealed_name: Bytes,
    /// When, as the mount says.
    #[prost(message, optional, tag = "4")]
    pub time: Option<Timestamp>,
    /// By whom, as the mount says.
    #[prost(uint32, optional, tag = "5")]
    pub uid: Option<u32>,
    /// The cluster's clock: its place in the trash.
    #[prost(uint64, tag = "6")]
    pub at_ms: u64,
    /// Nobody has it open any more: it has a `t` key.
    #[prost(bool, tag = "7")]
    pub trashed: bool,
}

/// How an inode came out of the trash. Leases of the time before are none any more.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct RestoredRecord {
    /// The session that took it out.
    #[prost(uint64, tag = "1")]
    pub session: u64,
    /// Grants below this are of the time before.
    #[prost(uint64, tag = "2")]
    pub grant: u64,
}

/// `d`: what a name is.
#[derive(Clone, PartialEq, Message)]
pub struct EntryRecord {
    /// The inode.
    #[prost(uint64, tag = "1")]
    pub ino: u64,
    /// The place in the listing.
    #[prost(uint64, tag = "2")]
    pub cookie: u64,
    /// The name, sealed.
    #[prost(bytes = "bytes", tag = "3")]
    pub sealed_name: Bytes,
}

/// `c`: a line of the listing.
#[derive(Clone, PartialEq, Message)]
pub struct CookieRecord {
    /// The inode.
    #[prost(uint64, tag = "1")]
    pub ino: u64,
    /// 16 bytes.
    #[prost(bytes = "bytes", tag = "2")]
    pub name_hash: Bytes,
    /// The name, sealed.
    #[prost(bytes = "bytes", tag = "3")]
    pub sealed_name: Bytes,
}

/// A run of a chunk's bytes.
#[derive(Clone, PartialEq, Message)]
pub struct ExtentRecord {
    /// First byte, within the chunk.
    #[prost(uint32, tag = "1")]
    pub offset: u32,
    /// Bytes.
    #[prost(uint32, tag = "2")]
    pub length: u32,
    /// 16 bytes; empty: allocated zeros.
    #[prost(bytes = "bytes", tag = "3")]
    pub block: Bytes,
    /// First byte, within the block's plaintext.
    #[prost(uint32, tag = "4")]
    pub block_offset: u32,
}

impl ExtentRecord {
    /// The first byte behind it, within the chunk.
    pub fn end(&self) -> u32 {
        self.offset.saturating_add(self.length)
    }
}

/// `m`: the map of one chunk, sorted, without overlaps.
#[derive(Clone, PartialEq, Message)]
pub struct ChunkRecord {
    /// The extents.
    #[prost(message, repeated, tag = "1")]
    pub extents: Vec<ExtentRecord>,
}

/// `b`: a block.
#[derive(Clone, PartialEq, Message)]
pub struct BlockRecord {
    /// Data fragments; 0 for an inline block.
    #[prost(uint32, tag = "1")]
    pub s: u32,
    /// Parity fragments.
    #[prost(uint32, tag = "2")]
    pub r: u32,
    /// Bytes of a page.
    #[prost(uint32, tag = "3")]
    pub page_bytes: u32,
    /// Bytes of plaintext.
    #[prost(uint32, tag = "4")]
    pub plaintext_bytes: u32,
    /// Of the placement lease.
    #[prost(uint64, tag = "5")]
    pub birth: u64,
    /// One for each fragment.
    #[prost(uint32, repeated, tag = "6")]
    pub providers: Vec<u32>,
    /// Bitmap: the provider has said it is durable there.
    #[prost(bytes = "bytes", tag = "7")]
    pub durable: Bytes,
    /// Bitmap: found there, but its bytes are wrong.
    #[prost(bytes = "bytes", tag = "8")]
    pub damaged: Bytes,
    /// Bitmap: the provider has said it does not have it.
    #[prost(bytes = "bytes", tag = "9")]
    pub missing: Bytes,
    /// Kind of the fingerprints.
    #[prost(uint32, tag = "10")]
    pub fingerprint_kind: u32,
    /// Hash over them.
    #[prost(bytes = "bytes", tag = "11")]
    pub fingerprint_hash: Bytes,
    /// The sealed page of an inline block.
    #[prost(bytes = "bytes", tag = "12")]
    pub inline: Bytes,
    /// Bytes of it that files refer to; a clone counts again.
    #[prost(uint64, tag = "13")]
    pub live_bytes: u64,
    /// `r` keys that name it.
    #[prost(uint64, tag = "14")]
    pub references: u64,
}

impl BlockRecord {
    /// Whether its bytes lie in this record.
    pub fn is_inline(&self) -> bool {
        !self.inline.is_empty()
    }

    /// Whether a provider has confirmed every fragment.
    pub fn is_settled(&self) -> bool {
        (0..self.providers.len()).all(|index| {
            bit(&self.durable, index) || bit(&self.damaged, index) || bit(&self.missing, index)
        })
    }
}

/// Bit `index` of a bitmap (bit 0 of byte 0 is fragment 0); absent bytes are zeros.
pub fn bit(bitmap: &[u8], index: usize) -> bool {
    bitmap.get(index / 8).is_some_and(|byte| byte >> (index % 8) & 1 == 1)
}

/// The bitmap with bit `index` set or cleared.
pub fn with_bit(bitmap: &[u8], index: usize, value: bool) -> Bytes {
    let mut bitmap = bitmap.to_vec();
    if bitmap.len() <= index / 8 {
        bitmap.resize(index / 8 + 1, 0);
    }
    let mask = 1 << (index % 8);
    if value {
        bitmap[index / 8] |= mask;
    } else {
        bitmap[index / 8] &= !mask;
    }
    bitmap.into()
}

/// `r`: how much of a block a chunk refers to; `t`: bytes that something in the trash keeps.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct ReferenceRecord {
    /// Bytes.
    #[prost(uint64, tag = "1")]
    pub bytes: u64,
}

/// `p` and `q`: fragments of a block at a provider.
#[derive(Clone, PartialEq, Message)]
pub struct HoldingRecord {
    /// Bitmap over the block's fragments.
    #[prost(bytes = "bytes", tag = "1")]
    pub fragments: Bytes,
    /// Of a `q` key whose block may live: its volume. What its record names by then stays.
    #[prost(bytes = "bytes", tag = "2")]
    pub volume: Bytes,
}

/// `g`: a dead block, or fragments of a live one that lie elsewhere now.
#[derive(Clone, PartialEq, Message)]
pub struct GraveRecord {
    /// One for each fragment; 0: nothing to delete.
    #[prost(uint32, repeated, tag = "1")]
    pub providers: Vec<u32>,
    /// Of a live block: its volume. What its record names by then stays.
    #[prost(bytes = "bytes", tag = "2")]
    pub volume: Bytes,
}

/// `u`: what a volume uses.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct UsageRecord {
    /// Inodes, unlinked but open ones among them, without those in the trash.
    #[prost(uint64, tag = "1")]
    pub inodes: u64,
    /// Bytes of blocks that files refer to.
    #[prost(uint64, tag = "2")]
    pub live_bytes: u64,
    /// Blocks, inline ones among them.
    #[prost(uint64, tag = "3")]
    pub blocks: u64,
    /// Plaintext bytes of all blocks.
    #[prost(uint64, tag = "4")]
    pub stored_bytes: u64,
    /// Inline blocks.
    #[prost(uint64, tag = "5")]
    pub inline_blocks: u64,
    /// Bytes inline.
    #[prost(uint64, tag = "6")]
    pub inline_bytes: u64,
    /// Inodes in the trash; they are not among `inodes`.
    #[prost(uint64, tag = "7")]
    pub trash_files: u64,
    /// Bytes of blocks that they refer to; they are among `live_bytes`.
    #[prost(uint64, tag = "8")]
    pub trash_bytes: u64,
}

/// `s`: a session.
#[derive(Clone, PartialEq, Message)]
pub struct SessionRecord {
    /// 16 bytes.
    #[prost(bytes = "bytes", tag = "1")]
    pub volume: Bytes,
    /// The last batch whose effects are in the store.
    #[prost(uint64, tag = "2")]
    pub applied: u64,
    /// Shut out: nothing more is taken from it.
    #[prost(bool, tag = "3")]
    pub fenced: bool,
    /// For people.
    #[prost(string, tag = "4")]
    pub host: String,
    /// It changes nothing.
    #[prost(bool, tag = "5")]
    pub read_only: bool,
    /// Inode numbers it may create, sorted.
    #[prost(message, repeated, tag = "6")]
    pub inodes: Vec<InodeRange>,
    /// The key that opened it: only that may resume it.
    #[prost(bytes = "bytes", tag = "7")]
    pub key_hash: Bytes,
    /// It was opened with an administrator's certificate, which may use every volume.
    #[prost(bool, tag = "20")]
    pub by_admin: bool,
}

/// A run of inode numbers.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct InodeRange {
    /// The first.
    #[prost(uint64, tag = "1")]
    pub first: u64,
    /// How many.
    #[prost(uint64, tag = "2")]
    pub count: u64,
}

/// `v`: a volume.
#[derive(Clone, PartialEq, Message)]
pub struct VolumeRecord {
    /// Its name.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Data fragments a block.
    #[prost(uint32, tag = "2")]
    pub s: u32,
    /// Parity fragments a block.
    #[prost(uint32, tag = "3")]
    pub r: u32,
    /// Plaintext bytes it may refer to; 0: no limit.
    #[prost(uint64, tag = "4")]
    pub quota_bytes: u64,
    /// The key of a managed volume; empty for a private one.
    #[prost(bytes = "bytes", tag = "5")]
    pub key: Bytes,
    /// The next inode number that was never given out.
    #[prost(uint64, tag = "6")]
    pub next_ino: u64,
    /// Being deleted.
    #[prost(bool, tag = "7")]
    pub deleting: bool,
    /// Blocks are repaired when they have at most this - 1 durable fragments more than s; 0: as soon
    /// as one is lost.
    #[prost(uint32, tag = "8")]
    pub repair_at: u32,
    /// What is removed can be had back for so long; 0: there is no trash; absent: the default.
    #[prost(uint32, optional, tag = "9")]
    pub trash_hours: Option<u32>,
    /// Only for those in `access`; a volume from before there was access is for every client.
    #[prost(bool, tag = "20")]
    pub closed: bool,
    /// Who may use it.
    #[prost(message, repeated, tag = "21")]
    pub access: Vec<AccessRecord>,
    /// Of a private volume: its key ring, which is opaque here (docs/formats.md, "Key ring").
    #[prost(bytes = "bytes", tag = "22")]
    pub key_ring: Bytes,
    /// How often the key ring was replaced, and one: 0 of a managed volume.
    #[prost(uint64, tag = "23")]
    pub key_ring_version: u64,
    /// The client that made it, by the SHA-256 of its public key; empty: an administrator, or not noted.
    #[prost(bytes = "bytes", tag = "24")]
    pub maker: Bytes,
}

/// A client that may use a volume.
#[derive(Clone, PartialEq, Message)]
pub struct AccessRecord {
    /// SHA-256 of its public key.
    #[prost(bytes = "bytes", tag = "1")]
    pub key_hash: Bytes,
    /// It changes nothing.
    #[prost(bool, tag = "2")]
    pub read_only: bool,
}

/// How long what is removed can be had back, where nothing else was said: seven days.
pub const TRASH_HOURS: u32 = 7 * 24;

impl VolumeRecord {
    /// How long what is removed can be had back.
    pub fn kept_hours(&self) -> u32 {
        self.trash_hours.unwrap_or(TRASH_HOURS)
    }
}

/// `y`: a provider.
#[derive(Clone, PartialEq, Message)]
pub struct ProviderRecord {
    /// SHA-256 of its public key.
    #[prost(bytes = "bytes", tag = "1")]
    pub key_hash: Bytes,
    /// Its store's id.
    #[prost(bytes = "bytes", tag = "2")]
    pub store: Bytes,
    /// The last cookie it is known to have stored.
    #[prost(bytes = "bytes", tag = "3")]
    pub cookie: Bytes,
    /// A cookie sent, of which it is not known whether it was stored.
    #[prost(bytes = "bytes", tag = "4")]
    pub cookie_sent: Bytes,
    /// What clients dial.
    #[prost(string, tag = "5")]
    pub address: String,
    /// Label path.
    #[prost(string, tag = "6")]
    pub site: String,
    /// The name in its certificate.
    #[prost(string, tag = "7")]
    pub name: String,
    /// Its store was rolled back, cloned or replaced: believed again when checked up to here.
    #[prost(bool, tag = "8")]
    pub suspect: bool,
    /// It took leave: expected back.
    #[prost(bool, tag = "9")]
    pub dormant: bool,
    /// The cluster's clock when it fell silent; 0 while it is online.
    #[prost(uint64, tag = "10")]
    pub silent_since_ms: u64,
    /// The cluster's clock at which it is expected back; 0: not known.
    #[prost(uint64, tag = "11")]
    pub back_at_ms: u64,
    /// Given up: what it held is rebuilt elsewhere.
    #[prost(bool, tag = "12")]
    pub dead: bool,
    /// Being emptied: nothing new goes there, what it holds is moved.
    #[prost(bool, tag = "13")]
    pub draining: bool,
    /// For each hour of the week (0 = Monday 0:00 UTC) the share of it in which it is online, of 255.
    #[prost(bytes = "bytes", tag = "14")]
    pub profile: Bytes,
    /// Hours the profile was learnt from.
    #[prost(uint32, tag = "15")]
    pub profile_hours: u32,
    /// The cluster's clock when it last had a retain list, or joined.
    #[prost(uint64, tag = "16")]
    pub retained_ms: u64,
    /// Its owner wants it to leave: it is let go when nothing is left there.
    #[prost(bool, tag = "17")]
    pub leaving: bool,
    /// Nothing was known of its week when it fell silent.
    #[prost(bool, tag = "18")]
    pub stranger: bool,
    /// Fragments of different blocks that it claimed and the directory found wrong or not there.
    #[prost(uint32, tag = "19")]
    pub found_wrong: u32,
    /// The last of those blocks.
    #[prost(bytes = "bytes", repeated, tag = "20")]
    pub found_blocks: Vec<Bytes>,
    /// What it holds does not count.
    #[prost(bool, tag = "21")]
    pub distrusted: bool,
}

/// `e`: something that happened.
#[derive(Clone, PartialEq, Message)]
pub struct EventRecord {
    /// Wall time.
    #[prost(uint64, tag = "1")]
    pub unix_ms: u64,
    /// What, as a number of the engine's event kinds.
    #[prost(uint32, tag = "2")]
    pub kind: u32,
    /// To which provider; 0: to none.
    #[prost(uint32, tag = "3")]
    pub provider: u32,
    /// For people.
    #[prost(string, tag = "4")]
    pub detail: String,
    /// Whose order it was; empty: nobody's.
    #[prost(string, tag = "5")]
    pub by: String,
    /// The id of the volume it names; empty: none, or not noted.
    #[prost(bytes = "bytes", tag = "6")]
    pub volume: Bytes,
}

/// `a`: a member, by the hash of its key.
#[derive(Clone, PartialEq, Message)]
pub struct JoinedRecord {
    /// As in its certificate.
    #[prost(string, tag = "1")]
    pub role: String,
    /// As in its certificate.
    #[prost(string, tag = "2")]
    pub name: String,
    /// Of its invitation.
    #[prost(string, tag = "3")]
    pub site: String,
    /// Wall time, for people.
    #[prost(uint64, tag = "4")]
    pub joined_unix_ms: u64,
    /// Of its certificate.
    #[prost(bytes = "bytes", tag = "5")]
    pub serial: Bytes,
    /// The cluster's clock when its certificate was issued.
    #[prost(uint64, tag = "6")]
    pub issued_ms: u64,
    /// The cluster's clock when it expires.
    #[prost(uint64, tag = "7")]
    pub expires_ms: u64,
    /// It has expired, and is refused.
    #[prost(bool, tag = "8")]
    pub expired: bool,
    /// Wall time; 0: it was not.
    #[prost(uint64, tag = "9")]
    pub revoked_unix_ms: u64,
    /// Who invited it.
    #[prost(string, tag = "10")]
    pub by: String,
    /// The hash of the secret it joined with; empty: none.
    #[prost(bytes = "bytes", tag = "11")]
    pub invite: Bytes,
    /// The directory's incarnation when it joined by an invitation; 0: by none, or before it was noted.
    #[prost(uint64, tag = "12")]
    pub incarnation: u64,
}

impl JoinedRecord {
    /// Whether it was shut out for ever.
    pub fn is_revoked(&self) -> bool {
        self.revoked_unix_ms > 0
    }

    /// Whether it is a member no more.
    pub fn is_refused(&self) -> bool {
        self.expired || self.is_revoked()
    }
}

/// `j`: an invitation, by the hash of its secret.
#[derive(Clone, PartialEq, Message)]
pub struct InviteRecord {
    /// What newcomers become.
    #[prost(string, tag = "1")]
    pub role: String,
    /// The site they get.
    #[prost(string, tag = "2")]
    pub site: String,
    /// The name they get; empty: their own.
    #[prost(string, tag = "3")]
    pub name: String,
    /// How many more may use it.
    #[prost(uint32, tag = "4")]
    pub uses_left: u32,
    /// The cluster's clock when it is over.
    #[prost(uint64, tag = "5")]
    pub expires_ms: u64,
    /// Who made it.
    #[prost(string, tag = "6")]
    pub by: String,
}

/// `z`: the registry's counters.
#[derive(Clone, PartialEq, Message)]
pub struct RegistryRecord {
    /// The number of the list of refused keys; it only grows.
    #[prost(uint64, tag = "1")]
    pub version: u64,
}

/// `n`: the cluster's counters. They only grow.
#[derive(Clone, PartialEq, Message)]
pub struct ClusterRecord {
    /// 16 bytes.
    #[prost(bytes = "bytes", tag = "1")]
    pub cluster: Bytes,
    /// Grows when the state is restored from a backup.
    #[prost(uint64, tag = "2")]
    pub incarnation: u64,
    /// Grows at every start.
    #[prost(uint64, tag = "3")]
    pub run: u64,
    /// The next session's number.
    #[prost(uint64, tag = "4")]
    pub next_session: u64,
    /// The next provider's number.
    #[prost(uint32, tag = "5")]
    pub next_provider: u32,
    /// No birth at or above this was ever given.
    #[prost(uint64, tag = "6")]
    pub births_end: u64,
    /// The cluster's own time: milliseconds that directories have run, rounded down.
    #[prost(uint64, tag = "7")]
    pub clock_ms: u64,
    /// Sessions below this lost something in a restore: none of them is resumed.
    #[prost(uint64, tag = "8")]
    pub sessions_lost_below: u64,
    /// No block of a birth below this is committed unasked any more: fragments of such births that
    /// nothing names are garbage.
    #[prost(uint64, tag = "9")]
    pub births_floor: u64,
    /// Births from here to `births_spared_end` may be those of blocks that a restore has forgotten:
    /// their fragments are never garbage.
    #[prost(uint64, tag = "10")]
    pub births_spared: u64,
    /// The end of the spared births; 0: none.
    #[prost(uint64, tag = "11")]
    pub births_spared_end: u64,
    /// No grant was signed in this period or a later one: the next run begins with it.
    #[prost(uint64, tag = "20")]
    pub periods_end: u64,
}

impl ClusterRecord {
    /// Births from the floor up to `end` may be those of blocks this state does not know.
    pub fn spare_births(&mut self, end: u64) {
        let from = if self.births_spared_end > 0 { self.births_spared } else { u64::MAX };
        self.births_spared = from.min(self.births_floor);
        self.births_spared_end = end;
    }

    /// Whether a birth may be that of a block this state has forgotten.
    pub fn is_spared(&self, birth: u64) -> bool {
        (self.births_spared..self.births_spared_end).contains(&birth)
    }
}

/// Decodes a stored value.
///
/// # Errors
/// [`StoreError::Value`] when it is not one.
pub fn decode<T: Message + Default>(key: &[u8], value: &Bytes) -> Result<T, StoreError> {
    T::decode(value.clone()).map_err(|error| StoreError::Value {
        key: key.iter().map(|byte| format!("{byte:02x}")).collect(),
        detail: error.to_string(),
    })
}

/// Encodes a value.
pub fn encode(value: &impl Message) -> Bytes {
    value.encode_to_vec().into()
}

/// A volume id out of a stored field.
pub fn volume_id(bytes: &[u8]) -> VolumeId {
    VolumeId::from_slice(bytes).unwrap_or(crate::keys::CLUSTER)
}
