//! What can go wrong with fragments and blocks, and whether to try again.

use crate::geometry::GeometryError;
use crate::ids::{BlockId, FragmentId, ProviderId};

/// What trying again could change.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Retry {
    /// The same request fails again.
    Never,
    /// The same provider (or directory) may answer later.
    SamePeerLater,
    /// Another provider may do it now.
    AnotherPeer,
}

/// Why one fragment was not stored or not read.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum FragmentFailure {
    /// The provider does not hold it.
    #[error("not found")]
    NotFound,
    /// The provider holds it, and its sums do not hold.
    #[error("damaged on the provider's disk: {detail}")]
    Damaged {
        /// The provider's words.
        detail: String,
    },
    /// The bytes came, and do not pass the seal of their page.
    #[error("wrong bytes: page {page} fails its seal")]
    Lying {
        /// The page in the block.
        page: usize,
    },
    /// The bytes do not match what the other fragments of the block determine.
    #[error("wrong bytes: slot {slot} does not fit the other fragments")]
    Inconsistent {
        /// The slot in the fragment.
        slot: usize,
    },
    /// Fewer or more bytes came than were asked for.
    #[error("{found} bytes came where {expected} were asked for")]
    Length {
        /// Bytes asked for.
        expected: usize,
        /// Bytes that came.
        found: usize,
    },
    /// Not for this role, or other bytes are stored under this id.
    #[error("refused: {detail}")]
    Refused {
        /// The provider's words.
        detail: String,
    },
    /// No grant for this, or one that has ended.
    #[error("no grant: {detail}")]
    NoGrant {
        /// The provider's words.
        detail: String,
    },
    /// The provider is full.
    #[error("the provider has no space")]
    NoSpace,
    /// The provider's disk failed.
    #[error("the provider's disk failed: {detail}")]
    Io {
        /// The provider's words.
        detail: String,
    },
    /// The provider did not understand the request.
    #[error("invalid request: {detail}")]
    Invalid {
        /// The provider's words.
        detail: String,
    },
    /// The provider has too much to do.
    #[error("busy")]
    Busy,
    /// No connection.
    #[error("unreachable: {detail}")]
    Unreachable {
        /// What happened.
        detail: String,
    },
    /// The directory's table does not have the provider.
    #[error("unknown provider")]
    UnknownProvider,
    /// No answer in time.
    #[error("no answer within {waited_ms} ms")]
    Timeout {
        /// How long it was waited for.
        waited_ms: u64,
    },
}

impl FragmentFailure {
    /// What trying again could change.
    pub const fn retry(&self) -> Retry {
        match self {
            Self::Busy | Self::Timeout { .. } | Self::NoGrant { .. } => Retry::SamePeerLater,
            Self::Invalid { .. } => Retry::Never,
            Self::NotFound
            | Self::Damaged { .. }
            | Self::Lying { .. }
            | Self::Inconsistent { .. }
            | Self::Length { .. }
            | Self::Refused { .. }
            | Self::NoSpace
            | Self::Io { .. }
            | Self::Unreachable { .. }
            | Self::UnknownProvider => Retry::AnotherPeer,
        }
    }

    /// Whether the fragment may be had from the same place a little later: nothing is wrong with it,
    /// only with the way there.
    pub const fn may_pass(&self) -> bool {
        matches!(
            self,
            Self::Busy
                | Self::Timeout { .. }
                | Self::Unreachable { .. }
                | Self::UnknownProvider
                | Self::NoGrant { .. }
        )
    }

    /// Whether it says that the fragment itself is gone or wrong, so that the directory must hear
    /// of it; a slow or absent provider is its own business with the directory.
    pub const fn is_damage(&self) -> bool {
        matches!(
            self,
            Self::NotFound
                | Self::Damaged { .. }
                | Self::Lying { .. }
                | Self::Inconsistent { .. }
                | Self::Length { .. }
                | Self::Io { .. }
        )
    }
}

/// One fragment that could not be used, and why.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("fragment {} on provider {provider}: {failure}", fragment.index)]
pub struct FragmentLoss {
    /// The fragment.
    pub fragment: FragmentId,
    /// Who should have it.
    pub provider: ProviderId,
    /// What happened.
    pub failure: FragmentFailure,
}

/// Why the directory gave no placement.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PlacementError {
    /// The providers are full, or the volume's allowance is used up.
    #[error("no space left: {detail}")]
    NoSpace {
        /// The directory's words.
        detail: String,
    },
    /// The providers are full of what was deleted, and it is being cleared away.
    #[error("no space left until what was deleted is cleared away: {detail}")]
    SpaceComes {
        /// The directory's words.
        detail: String,
    },
    /// Not enough live providers for the code's write margin.
    #[error("too few providers: {detail}")]
    TooFewProviders {
        /// The directory's words.
        detail: String,
    },
    /// The directory did not answer.
    #[error("the directory does not answer: {detail}")]
    Unavailable {
        /// What happened.
        detail: String,
    },
    /// The session ended: nothing can be written any more.
    #[error("the session with the directory has ended: {detail}")]
    Ended {
        /// Why.
        detail: String,
    },
}

impl PlacementError {
    /// What trying again could change.
    pub const fn retry(&self) -> Retry {
        match self {
            Self::NoSpace { .. }
            | Self::SpaceComes { .. }
            | Self::TooFewProviders { .. }
            | Self::Unavailable { .. } => Retry::SamePeerLater,
            Self::Ended { .. } => Retry::Never,
        }
    }
}

/// Why a block was not stored. Nothing was acknowledged; the plaintext may be stored again, which
/// seals it under another id.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum StoreError {
    /// No bytes, or more than a block of this code holds.
    #[error("this cannot be one block")]
    Geometry(#[from] GeometryError),
    /// No bytes, or more than an inline block holds.
    #[error("{bytes} bytes cannot be an inline block")]
    InlineBytes {
        /// The bytes given.
        bytes: usize,
    },
    /// The directory gave no placement.
    #[error("block not stored")]
    Placement(#[from] PlacementError),
    /// The providers are full.
    #[error("block {block} not stored: providers are full and no others are left")]
    NoSpace {
        /// The id the block had.
        block: BlockId,
    },
    /// Even with every fragment stored, the write margin would not hold.
    #[error(
        "block {block} not stored: of {providers} providers any {margin} may vanish, and then \
         fewer than {needed} fragments would remain"
    )]
    TooFewProviders {
        /// The id the block had.
        block: BlockId,
        /// Distinct providers that could be had.
        providers: usize,
        /// w.
        margin: usize,
        /// s.
        needed: usize,
    },
    /// The margin was not reached in time.
    #[error(
        "block {block} not stored in time: {durable} of {fragments} fragments are durable; {}",
        list(losses)
    )]
    Timeout {
        /// The id the block had.
        block: BlockId,
        /// Durable fragments.
        durable: usize,
        /// Fragments of the block.
        fragments: usize,
        /// What happened to the others so far.
        losses: Vec<FragmentLoss>,
    },
    /// The disk was closed.
    #[error("the disk is closed")]
    Closed,
}

impl StoreError {
    /// What trying again could change.
    pub const fn retry(&self) -> Retry {
        match self {
            Self::Geometry(_) | Self::InlineBytes { .. } | Self::Closed => Retry::Never,
            Self::Placement(error) => error.retry(),
            Self::NoSpace { .. } | Self::TooFewProviders { .. } | Self::Timeout { .. } => {
                Retry::SamePeerLater
            }
        }
    }
}

/// Why bytes were not read. Never stands for wrong bytes: those are not returned.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ReadError {
    /// The range is empty or leaves the block.
    #[error("bytes {start}..{end} of block {block}, which has {bytes}")]
    Range {
        /// The block.
        block: BlockId,
        /// First byte asked for.
        start: usize,
        /// End of the bytes asked for.
        end: usize,
        /// Plaintext bytes of the block.
        bytes: usize,
    },
    /// Fewer than s fragments could be had.
    #[error(
        "block {block} cannot be read now: {needed} fragments are needed, {have} were had; {}",
        list(losses)
    )]
    Lost {
        /// The block.
        block: BlockId,
        /// s.
        needed: usize,
        /// Usable fragments.
        have: usize,
        /// The others.
        losses: Vec<FragmentLoss>,
    },
    /// s or more fragments came, and no choice of them gives bytes that pass the seal.
    #[error(
        "block {block} cannot be read: the bytes of its fragments contradict each other; {}",
        list(losses)
    )]
    Tampered {
        /// The block.
        block: BlockId,
        /// Fragments known to be bad.
        losses: Vec<FragmentLoss>,
    },
    /// An inline block does not pass its seal.
    #[error("inline block {block} fails its seal: wrong bytes in the directory, or a wrong key")]
    InlineTampered {
        /// The block.
        block: BlockId,
    },
    /// Memory for reads was not to be had in time: earlier ones wait for their providers.
    #[error("block {block} was not read: earlier reads have held their memory for {waited_ms} ms")]
    Overloaded {
        /// The block.
        block: BlockId,
        /// How long it was waited for.
        waited_ms: u64,
    },
    /// The disk was closed.
    #[error("the disk is closed")]
    Closed,
}

impl ReadError {
    /// What trying again could change.
    pub const fn retry(&self) -> Retry {
        match self {
            Self::Lost { .. } | Self::Overloaded { .. } => Retry::SamePeerLater,
            Self::Range { .. }
            | Self::Tampered { .. }
            | Self::InlineTampered { .. }
            | Self::Closed => Retry::Never,
        }
    }
}

/// The losses in one line; the first eight where there are many.
fn list(losses: &[FragmentLoss]) -> String {
    let mut text: Vec<String> = losses.iter().take(8).map(ToString::to_string).collect();
    if losses.len() > 8 {
        text.push(format!("and {} more", losses.len() - 8));
    }
    if text.is_empty() { "none is known to be bad".to_owned() } else { text.join("; ") }
}
