//! The job that reads what is audited, outside the engine's thread.
//!
//! ```text
//! engine: a fragment that its holder claims --> read whole over the bulk wire --> compared with what
//!         the writer committed --> wrong? others of the block are asked for right ones --> engine
//! ```
//! What to ask, and what an answer means, is the engine's ([`crate::engine::audit`]). A failure to
//! reach somebody says nothing. The directory shows its own certificate, as the image's job does.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::Semaphore;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use us_core::disk::{
    FetchedSlots, FragmentFailure, LinksConfig, ProviderAddress, ProviderLinks, SlotRange,
};
use us_core::fragment::{FragmentError, FragmentHeader, FragmentTrailer};
use us_core::ids::ProviderId;
use us_core::tls::{Identity, KeyHash};

use crate::engine::{Answer, AuditOutcome, AuditPlace, AuditPlan, Question};
use crate::shell::Directory;

/// Fragments read at once: they are in memory whole, 4 MiB each at most.
const READS_MAX: usize = 4;
/// How long one fragment may take.
const READ_TIMEOUT: Duration = Duration::from_secs(30);
/// Connections are kept so long after the last audit.
const IDLE: Duration = Duration::from_secs(10);

/// What the job works with.
#[derive(Debug)]
pub struct AuditJob {
    /// The running directory.
    pub directory: Directory,
    /// Its identity, shown to providers.
    pub identity: Identity,
}

/// What one holder gave.
enum Given {
    Right,
    Wrong(String),
    Failed(FragmentFailure),
}

impl AuditJob {
    /// Works until `stop`, or until the engine has ended.
    pub async fn run(self, stop: CancellationToken) {
        let config = LinksConfig { connections_max: 1, idle: Some(IDLE), ..LinksConfig::default() };
        let links = ProviderLinks::new(self.identity.clone(), config);
        let (turns, reads) = (Arc::new(Semaphore::new(READS_MAX)), TaskTracker::new());
        // Cancel-safe: an audit that was handed out and is not answered is forgotten by the engine.
        stop.run_until_cancelled(async {
            loop {
                let turn = Arc::clone(&turns).acquire_owned().await.expect("never closed");
                let Ok(Answer::Audit(plan)) = self.directory.ask(Question::NextAudit).await else {
                    return;
                };
                let (directory, links) = (self.directory.clone(), links.clone());
                reads.spawn(stop.clone().run_until_cancelled_owned(async move {
                    let outcome = audit(&links, &plan).await;
                    let ticket = plan.ticket;
                    // Gone: there is nobody to tell.
                    let _gone = directory.ask(Question::Audited { ticket, outcome }).await;
                    drop(turn);
                }));
            }
        })
        .await;
        reads.close();
        reads.wait().await;
    }
}

async fn audit(links: &ProviderLinks, plan: &AuditPlan) -> AuditOutcome {
    match read(links, plan, &plan.place).await {
        Given::Right => AuditOutcome::Right,
        Given::Wrong(detail) => {
            let is_witnessed = is_witnessed(links, plan).await;
            AuditOutcome::Wrong { detail, is_witnessed }
        }
        Given::Failed(FragmentFailure::NotFound) => AuditOutcome::Missing,
        Given::Failed(FragmentFailure::Damaged { detail } | FragmentFailure::Io { detail }) => {
            AuditOutcome::Damaged { detail }
        }
        Given::Failed(_) => AuditOutcome::Silent,
    }
}

/// Whether another holder gives right bytes of the block: then what was committed is what was
/// written.
async fn is_witnessed(links: &ProviderLinks, plan: &AuditPlan) -> bool {
    for witness in &plan.witnesses {
        if matches!(read(links, plan, witness).await, Given::Right) {
            return true;
        }
    }
    false
}

/// Reads a fragment whole and compares it.
async fn read(links: &ProviderLinks, plan: &AuditPlan, place: &AuditPlace) -> Given {
    let entry = &place.provider;
    let (Some(header), Some(key_hash)) =
        (plan.header_of(place.index), KeyHash::from_slice(&entry.key_hash))
    else {
        return Given::Failed(FragmentFailure::UnknownProvider);
    };
    let provider = ProviderId(entry.provider);
    let (address, reachable) = (entry.address.clone(), entry.reachable);
    links.learn(provider, ProviderAddress { address, key_hash, reachable });
    let slots = SlotRange {
        fragment: header.id(),
        first_slot: 0,
        slots: header.slots() as u32,
        slot_bytes: header.geometry().slot_bytes() as u32,
    };
    let fetching = links.fetch(provider, Bytes::new(), slots, Instant::now() + READ_TIMEOUT);
    let fetched = match fetching.await {
        Ok(fetched) => fetched,
        Err(failure @ FragmentFailure::Length { .. }) => return Given::Wrong(failure.to_string()),
        Err(failure) => return Given::Failed(failure),
    };
    metrics::counter!("us_directory_audit_bytes_total").increment(fetched.data.len() as u64);
    let list_hash = plan.list_hash;
    let compared =
        tokio::task::spawn_blocking(move || compare(&header, &list_hash, &fetched)).await;
    match compared {
        Ok(Ok(())) => Given::Right,
        Ok(Err(error)) => Given::Wrong(error.to_string()),
        // Stopped with the runtime.
        Err(_stopped) => Given::Failed(FragmentFailure::UnknownProvider),
    }
}

/// Why a fragment is not the writer's.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
enum Wrong {
    #[error("its header is not the block's")]
    Header,
    #[error(transparent)]
    Fragment(#[from] FragmentError),
}

/// Whether what came is what the block's commit speaks of.
fn compare(
    header: &FragmentHeader,
    list_hash: &[u8; 32],
    fetched: &FetchedSlots,
) -> Result<(), Wrong> {
    if fetched.header[..] != header.encode() {
        return Err(Wrong::Header);
    }
    let trailer = FragmentTrailer::decode_listed(header, list_hash, &fetched.trailer)?;
    Ok(trailer.fingerprints.check(header.id().index, &fetched.data)?)
}

#[cfg(test)]
mod tests {
    use us_core::fragment::{FingerprintKind, FragmentRecord, FragmentSums, records_of_block};
    use us_core::geometry::{BlockGeometry, Code};
    use us_core::ids::{Birth, BlockId, VolumeId};

    use super::*;

    fn records(kind: FingerprintKind, birth: u64) -> Vec<FragmentRecord> {
        let geometry = BlockGeometry::new(Code::new(2, 1).unwrap(), 20_000).unwrap();
        let bodies = (1..=3).map(|fill| vec![fill; geometry.fragment_bytes()].into()).collect();
        let (volume, block) = (VolumeId::from_bytes([1; 16]), BlockId::from_bytes([2; 16]));
        records_of_block(kind, volume, block, Birth(birth), geometry, bodies)
    }

    fn fetched(record: &FragmentRecord) -> FetchedSlots {
        let parts = record.to_parts();
        let header = Bytes::copy_from_slice(&parts.header);
        FetchedSlots { header, trailer: parts.trailer, data: parts.body }
    }

    #[test]
    fn only_the_writers_fragment_is_right() {
        for kind in [FingerprintKind::Crc32c, FingerprintKind::Blake3] {
            let records = records(kind, 3);
            let (right, hash) = (&records[1], records[1].trailer.fingerprints.hash());
            let check = |record: &FragmentRecord| compare(&right.header, &hash, &fetched(record));
            assert_eq!(check(right), Ok(()));
            assert_eq!(check(&records[0]), Err(Wrong::Header), "another fragment");
            assert_eq!(check(&self::records(kind, 4)[1]), Err(Wrong::Header), "another birth");
            let body = Bytes::from(vec![9; right.body.len()]);
            let sums = FragmentSums::of(&right.header.geometry(), &body);
            let mut other = FragmentRecord { body: body.clone(), ..right.clone() };
            other.trailer.slot_sums = sums.slots.clone();
            let index = right.header.id().index;
            let wrong = Wrong::Fragment(FragmentError::Fingerprint { index });
            assert_eq!(check(&other), Err(wrong), "other bytes with sums that hold");
            other.trailer.fingerprints = other.trailer.fingerprints.with(index, &body, &sums);
            let id = right.header.id();
            let wrong = Wrong::Fragment(FragmentError::OtherList { id });
            assert_eq!(check(&other), Err(wrong), "and a list that fits them");
        }
    }
}
