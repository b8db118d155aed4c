//! What a root says, and what the store keeps of it. Protobuf by derive; field numbers are never
//! reused.

use bytes::Bytes;
use prost::Message;
use us_core::disk::BlockInfo;
use us_proto::v1;

/// One block of an image.
#[derive(Clone, PartialEq, Message)]
pub struct ImageBlock {
    /// 16 bytes.
    #[prost(bytes = "bytes", tag = "1")]
    pub block: Bytes,
    /// Data fragments.
    #[prost(uint32, tag = "2")]
    pub s: u32,
    /// Parity fragments.
    #[prost(uint32, tag = "3")]
    pub r: u32,
    /// Bytes of a page.
    #[prost(uint32, tag = "4")]
    pub page_bytes: u32,
    /// Bytes of plaintext.
    #[prost(uint32, tag = "5")]
    pub plaintext_bytes: u32,
    /// Of the placement lease.
    #[prost(uint64, tag = "6")]
    pub birth: u64,
    /// One for each fragment.
    #[prost(uint32, repeated, tag = "7")]
    pub providers: Vec<u32>,
    /// Kind of the fingerprints.
    #[prost(uint32, tag = "8")]
    pub fingerprint_kind: u32,
    /// Hash over them.
    #[prost(bytes = "bytes", tag = "9")]
    pub fingerprint_hash: Bytes,
}

impl ImageBlock {
    /// The block as readers want it; `None` where it makes no sense.
    pub fn info(&self) -> Option<BlockInfo> {
        BlockInfo::from_proto(&v1::BlockInfo {
            block: self.block.clone(),
            s: self.s,
            r: self.r,
            page_bytes: self.page_bytes,
            plaintext_bytes: self.plaintext_bytes,
            providers: self.providers.clone(),
            durable: Bytes::new(),
            fingerprint_kind: self.fingerprint_kind,
            fingerprint_hash: self.fingerprint_hash.clone(),
            inline: Bytes::new(),
        })
    }
}

/// A run of an image: the whole state at a commit, or what changed since the run before.
#[derive(Clone, PartialEq, Message)]
pub struct ImageRun {
    /// Its number; the blocks' reference.
    #[prost(uint64, tag = "1")]
    pub number: u64,
    /// The first commit in it; 0: it is a base, the whole state.
    #[prost(uint64, tag = "2")]
    pub first_seq: u64,
    /// The last commit in it.
    #[prost(uint64, tag = "3")]
    pub last_seq: u64,
    /// Bytes of its stream.
    #[prost(uint64, tag = "4")]
    pub bytes: u64,
    /// The blocks of the stream, in order. In the store only their ids are kept.
    #[prost(message, repeated, tag = "5")]
    pub blocks: Vec<ImageBlock>,
}

/// Where a provider is.
#[derive(Clone, PartialEq, Message)]
pub struct ManifestProvider {
    /// Its number.
    #[prost(uint32, tag = "1")]
    pub provider: u32,
    /// What clients dial.
    #[prost(string, tag = "2")]
    pub address: String,
    /// SHA-256 of its public key.
    #[prost(bytes = "bytes", tag = "3")]
    pub key_hash: Bytes,
}

/// What a sealed root says: enough to rebuild the state up to `covers_seq`.
#[derive(Clone, PartialEq, Message)]
pub struct Manifest {
    /// 16 bytes.
    #[prost(bytes = "bytes", tag = "1")]
    pub cluster: Bytes,
    /// Of the state.
    #[prost(uint64, tag = "2")]
    pub incarnation: u64,
    /// Grows with every root; the newest counts.
    #[prost(uint64, tag = "3")]
    pub sequence: u64,
    /// Commits up to here are in the runs; 0: none, the records begin with the first.
    #[prost(uint64, tag = "4")]
    pub covers_seq: u64,
    /// A base and what follows it.
    #[prost(message, repeated, tag = "5")]
    pub runs: Vec<ImageRun>,
    /// All providers.
    #[prost(message, repeated, tag = "6")]
    pub providers: Vec<ManifestProvider>,
}

/// `w`: the root as the store keeps it. Its blocks' places are in their `b` records.
#[derive(Clone, PartialEq, Message)]
pub struct RootRecord {
    /// Of the newest root.
    #[prost(uint64, tag = "1")]
    pub sequence: u64,
    /// Commits up to here are in the runs.
    #[prost(uint64, tag = "2")]
    pub covers_seq: u64,
    /// A base and what follows it.
    #[prost(message, repeated, tag = "3")]
    pub runs: Vec<ImageRun>,
    /// Runs whose blocks go when the newest root is stored.
    #[prost(message, repeated, tag = "4")]
    pub superseded: Vec<ImageRun>,
    /// The number of the next run.
    #[prost(uint64, tag = "5")]
    pub next_run: u64,
    /// There is no image of the present state: one must be made, whatever the records say.
    #[prost(bool, tag = "6")]
    pub void: bool,
}
