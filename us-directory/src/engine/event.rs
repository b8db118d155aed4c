//! What the engine hears and what it answers.

use std::sync::Arc;

use us_core::ids::VolumeId;
use us_core::tls::PeerIdentity;
use us_proto::v1::{
    AccessLevel, BlockCommit, BlockSummary, ClusterEvent, PlacementsLeased, ProviderDown,
    ProviderUp, RefusedKeys, RepairStatus, SessionDown, SessionUp, StatusReply, VolumeAccess,
    VolumeInfo, VolumeKeysReply,
};

use super::audit::{AuditOutcome, AuditPlan};
use super::garbage::{FsckBasis, Stray, Verdict};
use super::health::CountedSlice;
use super::keeping::ImagePlan;
use super::private::PrivateVolume;
use super::registry::{RegistryAnswer, RegistryQuestion};
use super::trash::TrashBasis;
use crate::namespace::Purged;
use crate::recovery::{ImageBlock, ImageRun};
use crate::store::{Seq, View};

/// A connection, numbered by the shell; numbers are never used again.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct ConnId(pub u64);

/// An administrator's question, numbered by the shell.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct AskId(pub u64);

/// The time of a step.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Moment {
    /// Milliseconds of CLOCK_BOOTTIME since the engine started; decides.
    pub now_ms: u64,
    /// Wall time; decides nothing.
    pub unix_ms: u64,
}

/// Who is at the other end of a connection.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Peer {
    /// SHA-256 of its public key.
    pub key_hash: Vec<u8>,
    /// The name in its certificate.
    pub name: String,
    /// Its certificate is an administrator's.
    pub admin: bool,
}

/// What the engine hears.
#[derive(Debug)]
pub enum Event {
    /// A mount opened its stream.
    SessionConnected {
        /// The connection.
        conn: ConnId,
        /// Who.
        peer: Peer,
    },
    /// A mount says something.
    Session {
        /// The connection.
        conn: ConnId,
        /// What.
        up: SessionUp,
    },
    /// A provider opened its stream.
    ProviderConnected {
        /// The connection.
        conn: ConnId,
        /// Who.
        peer: Peer,
    },
    /// A provider says something.
    Provider {
        /// The connection.
        conn: ConnId,
        /// What.
        up: ProviderUp,
    },
    /// A stream ended, of a mount or of a provider.
    Disconnected {
        /// The connection.
        conn: ConnId,
    },
    /// The store's records can be read up to here.
    Written {
        /// The commit.
        seq: Seq,
    },
    /// The store is durable up to here.
    Durable {
        /// The commit.
        seq: Seq,
    },
    /// An administrator asks.
    Ask {
        /// The question's number.
        ask: AskId,
        /// The question.
        question: Question,
    },
    /// A member asks.
    AskedBy {
        /// The question's number.
        ask: AskId,
        /// Who.
        by: PeerIdentity,
        /// The question.
        question: Question,
    },
    /// Somebody with a good certificate has connected.
    Met {
        /// Who.
        peer: PeerIdentity,
    },
    /// The background count of blocks has got further.
    Counted(CountedSlice),
    /// Time passes.
    Tick,
}

/// A volume to be made.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct NewVolume {
    /// Its name.
    pub name: String,
    /// Data fragments a block.
    pub s: u32,
    /// Parity fragments a block.
    pub r: u32,
    /// 0: no limit.
    pub quota_bytes: u64,
    /// Repair begins when no more than so many can be lost; `None`: as soon as one is.
    pub repair_at: Option<u32>,
    /// What is removed can be had back for so long; 0: no trash; `None`: the default.
    pub trash_hours: Option<u32>,
    /// Who makes it; `None`: it is to be open to every client.
    pub maker: Option<Peer>,
    /// Who may use it besides.
    pub access: Vec<VolumeAccess>,
    /// Its id and its key ring, where it is private.
    pub private: Option<PrivateVolume>,
}

impl NewVolume {
    /// One without a limit or settings of its own, open to every client.
    pub fn named(name: &str, s: u32, r: u32) -> Self {
        Self { name: name.to_owned(), s, r, ..Self::default() }
    }
}

impl From<NewVolume> for Question {
    fn from(volume: NewVolume) -> Self {
        Self::CreateVolume(Box::new(volume))
    }
}

/// What an administrator asks.
#[derive(Clone, PartialEq, Debug)]
pub enum Question {
    /// The one screen.
    Status,
    /// Makes a volume.
    CreateVolume(Box<NewVolume>),
    /// The key ring of a volume.
    VolumeKeys {
        /// The volume's name or id.
        volume: String,
        /// Who asks: the ring is for those who may open the volume.
        asker: Peer,
    },
    /// Replaces the key ring of a private volume.
    SetVolumeKeys {
        /// The volume's name or id.
        volume: String,
        /// The version it follows.
        version: u64,
        /// The ring.
        key_ring: bytes::Bytes,
    },
    /// Gives a client access to a volume, or takes it.
    SetAccess {
        /// The volume's name or id.
        name: String,
        /// The hash of the client's key in hexadecimal, or how it begins.
        client: String,
        /// What it may do.
        level: AccessLevel,
    },
    /// Changes a volume's settings.
    SetVolume {
        /// Its name.
        name: String,
        /// As for [`NewVolume`]; `None`: as it is.
        repair_at: Option<u32>,
        /// 0: no limit; `None`: as it is.
        quota_bytes: Option<u64>,
        /// 0: no trash; `None`: as it is.
        trash_hours: Option<u32>,
    },
    /// What a look into a volume's trash starts from.
    TrashBasis {
        /// Its name or id.
        volume: String,
        /// Who looks.
        asker: Peer,
    },
    /// Removes things from the trash for ever.
    PurgeTrash {
        /// The volume's name or id.
        volume: String,
        /// What.
        inos: Vec<u64>,
    },
    /// All volumes.
    ListVolumes,
    /// Removes a volume and all in it.
    DeleteVolume {
        /// Its name.
        name: String,
    },
    /// The state to look around in, with what providers are like now.
    Snapshot,
    /// Empties a provider, or ends that.
    Drain {
        /// Which.
        provider: u32,
        /// Ends it.
        undo: bool,
    },
    /// Gives a provider up now.
    GiveUp {
        /// Which.
        provider: u32,
    },
    /// Forgets a provider's marks.
    Trust {
        /// Which.
        provider: u32,
    },
    /// What the audit's job is to read: answered when there is something.
    NextAudit,
    /// What came of an audit.
    Audited {
        /// The plan's number.
        ticket: u64,
        /// What came.
        outcome: AuditOutcome,
    },
    /// Looks at every block again.
    Repair,
    /// Has providers read all they hold.
    Scrub {
        /// Which; 0: all.
        provider: u32,
    },
    /// How blocks would be without these providers.
    WhatIf {
        /// Which.
        without: Vec<u32>,
    },
    /// What a check of everything starts from.
    FsckBasis,
    /// What to think of fragments that a provider holds and nothing is known to name.
    Judge {
        /// Who holds them.
        provider: u32,
        /// The fragments.
        strays: Vec<Stray>,
        /// Orphans are to be deleted, and what is wanted taken over.
        mend: bool,
    },
    /// Asks a provider after fragments it seems not to have; what it lacks is made again.
    Doubt {
        /// Who should have them.
        provider: u32,
        /// The fragments.
        pieces: Vec<(VolumeId, us_core::ids::BlockId, u8)>,
    },
    /// Writes anew who holds these blocks, and lets go of those that nothing refers to.
    Mend {
        /// Their volume.
        volume: VolumeId,
        /// The block, and a provider that may be listed wrongly for it.
        blocks: Vec<(us_core::ids::BlockId, u32)>,
    },
    /// A page of the log.
    Events {
        /// Those behind this number.
        after: u64,
        /// Only so many of the newest; 0: all.
        last: u64,
    },
    /// The state as of a commit that is durable.
    Backup,
    /// What the image's job is to do.
    PlanImage,
    /// Records for the image's job.
    Records {
        /// The first.
        from: Seq,
        /// Bytes in one answer.
        bytes_max: usize,
    },
    /// Places for the image's blocks.
    LeaseForImage {
        /// How many.
        count: u32,
    },
    /// Where a block of the image is now.
    LocateImage {
        /// The block.
        block: us_core::ids::BlockId,
    },
    /// A run of the image is in the swarm.
    CommitImage {
        /// The run.
        run: ImageRun,
        /// Its blocks.
        blocks: Vec<BlockCommit>,
    },
    /// Who takes part.
    Registry(RegistryQuestion),
}

/// What an administrator is answered.
#[derive(Clone)]
pub enum Answer {
    /// The one screen.
    Status(Box<StatusReply>),
    /// The volume that was made.
    Volume(VolumeInfo),
    /// A volume's key ring.
    VolumeKeys(VolumeKeysReply),
    /// All volumes.
    Volumes(Vec<VolumeInfo>),
    /// Done.
    Done,
    /// The state.
    Snapshot(StateSnapshot),
    /// How many fragments, or providers, it concerns.
    Count(u64),
    /// What repair is doing.
    Repair(RepairStatus),
    /// How blocks would be.
    WhatIf(BlockSummary),
    /// What a check of everything starts from.
    FsckBasis(Box<FsckBasis>),
    /// What to think of each.
    Verdicts(Vec<Verdict>),
    /// What a look into a volume's trash starts from.
    TrashBasis(TrashBasis),
    /// What left the trash.
    Purged(Purged),
    /// A page of the log.
    Events(Vec<ClusterEvent>),
    /// The state of a durable commit, and its number.
    Backup(Arc<dyn View>, Seq),
    /// A run to write, if any.
    Plan(Option<ImagePlan>),
    /// Records, without gaps.
    Records(Vec<(Seq, bytes::Bytes)>),
    /// Places.
    Placements(PlacementsLeased),
    /// What to read.
    Audit(Box<AuditPlan>),
    /// A block of the image, if there is such a one.
    ImageBlock(Option<Box<ImageBlock>>),
    /// Who takes part.
    Registry(RegistryAnswer),
    /// It cannot be done.
    Refused {
        /// What kind of refusal.
        kind: RefusalKind,
        /// Why, for people.
        detail: String,
    },
}

/// Kinds of refusals.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RefusalKind {
    /// There is no such thing.
    NotFound,
    /// There is one already.
    Exists,
    /// The question makes no sense.
    Invalid,
    /// Something is in the way.
    Busy,
    /// Not for this certificate.
    Denied,
}

/// A snapshot of the state for a scan outside the engine's thread.
#[derive(Clone)]
pub struct StateSnapshot {
    /// The store.
    pub view: Arc<dyn View>,
    /// Volumes: id and name.
    pub volumes: Vec<(VolumeId, String)>,
    /// Providers: number and state (a `ProviderState`).
    pub providers: Vec<(u32, i32)>,
}

impl std::fmt::Debug for Answer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Status(status) => f.debug_tuple("Status").field(status).finish(),
            Self::Volume(volume) => f.debug_tuple("Volume").field(volume).finish(),
            Self::VolumeKeys(keys) => f.debug_tuple("VolumeKeys").field(&keys.version).finish(),
            Self::Volumes(volumes) => f.debug_tuple("Volumes").field(volumes).finish(),
            Self::Done => f.write_str("Done"),
            Self::Snapshot(_) => f.write_str("Snapshot"),
            Self::Count(count) => f.debug_tuple("Count").field(count).finish(),
            Self::Repair(status) => f.debug_tuple("Repair").field(status).finish(),
            Self::WhatIf(summary) => f.debug_tuple("WhatIf").field(summary).finish(),
            Self::FsckBasis(basis) => f.debug_tuple("FsckBasis").field(&basis.floor).finish(),
            Self::Verdicts(all) => f.debug_tuple("Verdicts").field(&all.len()).finish(),
            Self::TrashBasis(basis) => f.debug_tuple("TrashBasis").field(&basis.volume).finish(),
            Self::Purged(purged) => f.debug_tuple("Purged").field(purged).finish(),
            Self::Events(events) => f.debug_tuple("Events").field(events).finish(),
            Self::Backup(_, seq) => f.debug_tuple("Backup").field(seq).finish(),
            Self::Plan(plan) => f.debug_tuple("Plan").field(plan).finish(),
            Self::Records(records) => f.debug_tuple("Records").field(&records.len()).finish(),
            Self::Placements(leased) => f.debug_tuple("Placements").field(leased).finish(),
            Self::Audit(plan) => f.debug_tuple("Audit").field(plan).finish(),
            Self::Registry(answer) => f.debug_tuple("Registry").field(answer).finish(),
            Self::ImageBlock(block) => f.debug_tuple("ImageBlock").field(block).finish(),
            Self::Refused { kind, detail } => {
                f.debug_struct("Refused").field("kind", kind).field("detail", detail).finish()
            }
        }
    }
}

/// What the shell is to do.
#[derive(Debug)]
pub enum Effect {
    /// Send to a mount.
    Session {
        /// The connection.
        conn: ConnId,
        /// What.
        down: SessionDown,
    },
    /// Send to a provider.
    Provider {
        /// The connection.
        conn: ConnId,
        /// What.
        down: ProviderDown,
    },
    /// End a connection when what was sent on it is out.
    End {
        /// The connection.
        conn: ConnId,
    },
    /// Let nobody with these keys in, and cut off who is.
    Refuse(RefusedKeys),
    /// Answer an administrator.
    Answer {
        /// The question's number.
        ask: AskId,
        /// The answer.
        answer: Answer,
    },
}
