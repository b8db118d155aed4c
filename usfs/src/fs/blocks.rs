//! The directory as the block pipeline sees it: places leased ahead, and where blocks are now.

use std::collections::VecDeque;
use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;
use us_core::daemon::logging::RequestId;
use us_core::disk::{
    BlockDirectory, BlockInfo, Damage, FragmentFailure, PlacementError, PlacementLease, SiteNumber,
};
use us_core::ids::{Birth, BlockId, ProviderId};
use us_proto::v1;
use us_proto::v1::session_down::Event as Down;
use us_proto::v1::session_up::Event as Up;

use super::FsError;
use super::shared::Shared;

/// Places leased at once.
const PLACEMENTS_LEASED: u32 = 32;
/// How long a directory that is gone is waited for.
const PATIENCE: Duration = Duration::from_secs(35);
/// How long the directory may take for an answer about blocks.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(15);

/// The mount's answer to what the pipeline needs. Made before the mount is, hence the late link.
#[derive(Default)]
pub(crate) struct Blocks {
    shared: OnceLock<Weak<Shared>>,
    /// Held while more places are asked for, so that only one asks.
    leased: tokio::sync::Mutex<VecDeque<PlacementLease>>,
}

impl Blocks {
    /// Connects it with its mount.
    pub fn connect(&self, shared: &Arc<Shared>) {
        // A second call would be the same mount again: there is only one.
        let _ = self.shared.set(Arc::downgrade(shared));
    }

    fn mount(&self) -> Option<Arc<Shared>> {
        self.shared.get().and_then(Weak::upgrade)
    }

    async fn next_placement(&self) -> Result<PlacementLease, PlacementError> {
        let ended = |detail: String| PlacementError::Ended { detail };
        let shared = self.mount().ok_or_else(|| ended("the mount is gone".to_owned()))?;
        let mut leased = self.leased.lock().await;
        if let Some(lease) = leased.pop_front() {
            return Ok(lease);
        }
        let answer = ask_placements(&shared).await?;
        let Down::Placements(answer) = answer else {
            return Err(PlacementError::Unavailable { detail: "not an answer".to_owned() });
        };
        leased.extend(answer.leases.iter().map(|lease| PlacementLease {
            birth: Birth(lease.birth),
            providers: lease.providers.iter().copied().map(ProviderId).collect(),
            sites: lease.sites.iter().copied().map(SiteNumber).collect(),
        }));
        let detail = answer.error;
        leased.pop_front().ok_or(match (answer.no_space, answer.space_comes) {
            (true, true) => PlacementError::SpaceComes { detail },
            (true, false) => PlacementError::NoSpace { detail },
            (false, _) => PlacementError::TooFewProviders { detail },
        })
    }

    async fn locate(&self, block: BlockId) -> Option<BlockInfo> {
        let shared = self.mount()?;
        let blocks = vec![Bytes::copy_from_slice(block.as_bytes())];
        let trace = RequestId::current().0;
        let ask = |request| {
            let want = v1::fetch::Want::Blocks(v1::FetchBlocks { blocks });
            Up::Fetch(v1::Fetch { request, want: Some(want), trace })
        };
        let Ok(Down::Fetched(fetched)) = shared.ask(ask, ANSWER_TIMEOUT).await else {
            return None;
        };
        let info = fetched.blocks.iter().find(|info| info.block[..] == block.as_bytes()[..])?;
        let info = shared.lock().core.remember_block(info)?;
        Some((*info).clone())
    }
}

/// Asks for places. A connection that breaks meanwhile is waited for: a directory that restarts
/// fails no write.
async fn ask_placements(shared: &Shared) -> Result<Down, PlacementError> {
    let mut progress = shared.progress.subscribe();
    let deadline = tokio::time::Instant::now() + PATIENCE;
    loop {
        progress.mark_unchanged();
        let ask = |request| {
            Up::LeasePlacements(v1::LeasePlacements { request, count: PLACEMENTS_LEASED })
        };
        let error = match shared.ask(ask, ANSWER_TIMEOUT).await {
            Ok(answer) => return Ok(answer),
            Err(FsError::SessionEnded(detail)) => return Err(PlacementError::Ended { detail }),
            Err(error) => error,
        };
        // The session signals when it is resumed.
        if !matches!(tokio::time::timeout_at(deadline, progress.changed()).await, Ok(Ok(()))) {
            return Err(PlacementError::Unavailable { detail: error.to_string() });
        }
    }
}

impl BlockDirectory for Blocks {
    fn lease_placement(&self) -> BoxFuture<'_, Result<PlacementLease, PlacementError>> {
        self.next_placement().boxed()
    }

    fn locate(&self, block: BlockId) -> BoxFuture<'_, Option<BlockInfo>> {
        self.locate(block).boxed()
    }

    fn report(&self, damage: Damage) {
        let Some(shared) = self.mount() else { return };
        tracing::warn!(fragment = %damage.fragment, provider = %damage.provider,
            failure = %damage.failure, "a fragment could not be used");
        let message = v1::Damage {
            fragment: Some(v1::FragmentId {
                block: Bytes::copy_from_slice(damage.fragment.block.as_bytes()),
                index: u32::from(damage.fragment.index),
            }),
            provider: damage.provider.0,
            status: status(&damage.failure) as i32,
            detail: damage.failure.to_string(),
        };
        shared.lock().core.send(Up::Damage(message));
        shared.outgoing.notify_one();
    }
}

const fn status(failure: &FragmentFailure) -> v1::FragmentStatus {
    match failure {
        FragmentFailure::NotFound => v1::FragmentStatus::NotFound,
        FragmentFailure::Damaged { .. }
        | FragmentFailure::Lying { .. }
        | FragmentFailure::Inconsistent { .. }
        | FragmentFailure::Length { .. } => v1::FragmentStatus::Damaged,
        FragmentFailure::Refused { .. } => v1::FragmentStatus::Refused,
        FragmentFailure::NoGrant { .. } => v1::FragmentStatus::NoGrant,
        FragmentFailure::NoSpace => v1::FragmentStatus::NoSpace,
        FragmentFailure::Io { .. } => v1::FragmentStatus::Io,
        FragmentFailure::Invalid { .. } => v1::FragmentStatus::Invalid,
        FragmentFailure::Busy
        | FragmentFailure::Unreachable { .. }
        | FragmentFailure::UnknownProvider
        | FragmentFailure::Timeout { .. } => v1::FragmentStatus::Busy,
    }
}
