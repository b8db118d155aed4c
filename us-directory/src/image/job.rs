//! The job that writes images of a running directory into the swarm, outside the engine's thread.
//!
//! ```text
//! engine: what is to be written? --> stream of the run --> blocks through VirtualDisk --> engine:
//!         commit the blocks, the new root, and the end of the runs it replaces
//! ```
//! What may fail is left for the next look: too few providers, a full swarm, a lost connection. The
//! fragments of a run that was given up are garbage like those of any block that was never
//! committed.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use us_core::disk::{
    BlockDirectory, BlockInfo, Damage, DiskConfig, LinksConfig, PlacementError, PlacementLease,
    ProviderLinks, SiteNumber, StoredBlock, VirtualDisk,
};
use us_core::geometry::Code;
use us_core::ids::{Birth, BlockId, ClusterId, ProviderId};
use us_core::seal::Secret;
use us_core::tls::Identity;

use super::ImageWriter;
use crate::engine::{Answer, ImageContent, ImagePlan, Question};
use crate::recovery::{ImageBlock, ImageRun, image_key, image_volume};
use crate::shell::Directory;
use crate::store::journal::decode_body;

/// How often the engine is asked whether there is something to write.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// The wait after a failure, at first and at most.
const RETRY: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(300));
/// How long one block may take.
const BLOCK_TIMEOUT: Duration = Duration::from_secs(60);
/// Placements leased at once.
const LEASES_AHEAD: u32 = 8;
/// Bytes of records asked for at once.
const RECORDS_BYTES: usize = 4 << 20;
/// Memory for blocks on their way, and for pages read.
const STORE_BYTES_MAX: usize = 32 << 20;
const READ_BYTES_MAX: usize = 16 << 20;
/// Pieces of the stream that wait to be stored.
const PIECES_MAX: usize = 2;

/// What the job works with.
#[derive(Debug)]
pub struct ImageJob {
    /// The running directory.
    pub directory: Directory,
    /// Its identity, shown to providers.
    pub identity: Identity,
    /// The recovery secret.
    pub secret: Secret,
    /// The code of the image's blocks.
    pub code: Code,
}

/// Why a run was not written.
#[derive(Debug, thiserror::Error)]
enum JobError {
    #[error(transparent)]
    Gone(#[from] crate::shell::Gone),
    #[error("a block cannot be stored: {0}")]
    Store(#[from] us_core::disk::StoreError),
    #[error("the state cannot be read: {0}")]
    State(#[from] crate::store::StoreError),
    #[error("the records of a delta are not kept any more")]
    RecordsGone,
    #[error("the engine refuses it: {0}")]
    Refused(String),
}

impl ImageJob {
    /// Works until `stop`.
    pub async fn run(self, stop: CancellationToken) {
        let cluster: ClusterId = self.identity.own().cluster;
        let links = ProviderLinks::new(self.identity.clone(), LinksConfig::default());
        let places =
            Arc::new(Places { directory: self.directory.clone(), ahead: Default::default() });
        let config = DiskConfig {
            store_bytes_max: STORE_BYTES_MAX,
            read_bytes_max: READ_BYTES_MAX,
            cache_bytes: 1 << 20,
            cpu_jobs_max: 1,
            ..DiskConfig::default()
        };
        let disk = VirtualDisk::new(
            image_volume(cluster.as_bytes()),
            image_key(&self.secret, &cluster),
            self.code,
            config,
            places,
            Arc::new(links.clone()),
        );
        let mut retry = RETRY.0;
        let mut wait = LOOK_EVERY;
        // Cancel-safe: sleeping; a run that is dropped leaves fragments that nothing refers to.
        while stop.run_until_cancelled(tokio::time::sleep(wait)).await.is_some() {
            let Some(done) = stop.run_until_cancelled(self.look(&disk, &links)).await else {
                break;
            };
            match done {
                Ok(()) => (wait, retry) = (LOOK_EVERY, RETRY.0),
                Err(JobError::Gone(_)) => break,
                Err(error) => {
                    tracing::warn!(%error, retry_s = retry.as_secs(), "no image of the state");
                    (wait, retry) = (retry, (retry * 2).min(RETRY.1));
                }
            }
        }
        disk.close().await;
    }

    async fn look(&self, disk: &VirtualDisk, links: &ProviderLinks) -> Result<(), JobError> {
        let Answer::Plan(Some(plan)) = self.directory.ask(Question::PlanImage).await? else {
            return Ok(());
        };
        tracing::info!(?plan, "writing an image of the state");
        links.update(&plan.providers);
        let (number, last_seq) = (plan.number, plan.last_seq);
        let first_seq = match &plan.content {
            ImageContent::Base(_) => 0,
            ImageContent::Delta { first_seq } => *first_seq,
        };
        let stored = self.write(disk, plan).await?;
        let bytes = stored.iter().map(|block| block.info.plaintext_bytes() as u64).sum();
        let blocks: Vec<_> = stored.iter().map(StoredBlock::to_commit).collect();
        let run = ImageRun {
            number,
            first_seq,
            last_seq,
            bytes,
            blocks: blocks.iter().map(ImageBlock::from).collect(),
        };
        match self.directory.ask(Question::CommitImage { run, blocks }).await? {
            Answer::Refused { detail, .. } => Err(JobError::Refused(detail)),
            _ => Ok(()),
        }
    }

    async fn write(
        &self,
        disk: &VirtualDisk,
        plan: ImagePlan,
    ) -> Result<Vec<StoredBlock>, JobError> {
        let (pieces, mut stream) = tokio::sync::mpsc::channel::<Bytes>(PIECES_MAX);
        let block_bytes = self.code.block_bytes_max();
        let writing = match plan.content {
            ImageContent::Base(view) => tokio::task::spawn_blocking(move || {
                let mut writer = ImageWriter::new(0, plan.last_seq);
                writer.write_view(&*view, block_bytes, |piece| pieces.blocking_send(piece).is_ok())
            }),
            ImageContent::Delta { first_seq } => {
                let changes = self.changes(first_seq, plan.last_seq).await?;
                tokio::task::spawn_blocking(move || {
                    let mut writer = ImageWriter::new(first_seq, plan.last_seq);
                    writer.write_changes(changes);
                    while let Some(piece) = writer.take(block_bytes) {
                        if pieces.blocking_send(piece).is_err() {
                            return Ok(());
                        }
                    }
                    let rest = writer.take_rest();
                    if !rest.is_empty() {
                        let _gone = pieces.blocking_send(rest);
                    }
                    Ok(())
                })
            }
        };
        let mut blocks = Vec::new();
        while let Some(piece) = stream.recv().await {
            blocks.push(disk.store(vec![piece], Instant::now() + BLOCK_TIMEOUT).await?);
        }
        writing.await.expect("the writer of a stream does not panic")?;
        Ok(blocks)
    }

    /// What the commits of a range left of the keys they wrote.
    async fn changes(
        &self,
        first_seq: u64,
        last_seq: u64,
    ) -> Result<BTreeMap<Bytes, Option<Bytes>>, JobError> {
        let (mut changes, mut next) = (BTreeMap::new(), first_seq);
        while next <= last_seq {
            let question = Question::Records { from: next, bytes_max: RECORDS_BYTES };
            let Answer::Records(records) = self.directory.ask(question).await? else {
                return Err(JobError::RecordsGone);
            };
            if records.first().is_none_or(|(seq, _)| *seq != next) {
                return Err(JobError::RecordsGone);
            }
            for (seq, body) in records.into_iter().take_while(|(seq, _)| *seq <= last_seq) {
                let batch = decode_body(&body).ok_or(JobError::RecordsGone)?;
                changes.extend(batch);
                next = seq + 1;
            }
            tokio::task::yield_now().await;
        }
        Ok(changes)
    }
}

/// The engine as the pipeline wants it.
struct Places {
    directory: Directory,
    ahead: parking_lot::Mutex<VecDeque<PlacementLease>>,
}

impl BlockDirectory for Places {
    fn lease_placement(&self) -> BoxFuture<'_, Result<PlacementLease, PlacementError>> {
        async {
            if let Some(lease) = self.ahead.lock().pop_front() {
                return Ok(lease);
            }
            let ended = |detail: &str| PlacementError::Ended { detail: detail.to_owned() };
            let question = Question::LeaseForImage { count: LEASES_AHEAD };
            let answer = self.directory.ask(question).await;
            let Answer::Placements(leased) = answer.map_err(|gone| ended(&gone.to_string()))?
            else {
                return Err(ended("another answer"));
            };
            let leases = leased.leases.into_iter().map(|lease| PlacementLease {
                birth: Birth(lease.birth),
                providers: lease.providers.into_iter().map(ProviderId).collect(),
                sites: lease.sites.into_iter().map(SiteNumber).collect(),
            });
            let mut ahead = self.ahead.lock();
            ahead.extend(leases);
            let detail = leased.error;
            ahead.pop_front().ok_or(if leased.no_space {
                PlacementError::NoSpace { detail }
            } else {
                PlacementError::TooFewProviders { detail }
            })
        }
        .boxed()
    }

    fn locate(&self, block: BlockId) -> BoxFuture<'_, Option<BlockInfo>> {
        async move {
            match self.directory.ask(Question::LocateImage { block }).await {
                Ok(Answer::ImageBlock(found)) => found?.info(),
                _ => None,
            }
        }
        .boxed()
    }

    fn report(&self, damage: Damage) {
        tracing::warn!(?damage, "a fragment of the image");
    }
}
