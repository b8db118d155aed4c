//! The client pipeline: [`VirtualDisk`] stores plaintext as blocks and reads it back.
//!
//! ```text
//! store: plaintext -> pages sealed -> parity -> f puts at once -> margin holds: acknowledged
//!                                                             -> the rest in the background
//! read:  range -> pages -> cache, or a flight others wait for too
//!                       -> sealed pages on this machine's disk -> opened
//!                       -> slots of data fragments -> opened
//!                       -> late, lost or wrong: slots of any s others -> rebuilt -> opened
//! ```
//!
//! What it owns: the bytes on their way (bounded by permits), the cache of opened pages, what it
//! has learnt about how fast each provider answers. Nothing durable. Placement leases, the current
//! places of a block and damage reports go through [`BlockDirectory`], fragments through
//! [`FragmentTransport`]; tests and simulation fake both.
//!
//! Invariants:
//! - a block is acknowledged only while, whichever w providers vanish, s durable fragments remain;
//! - an id is sealed once; every try of a put sends the same bytes;
//! - bytes handed out have passed their page's seal, wherever they came from;
//! - permits travel with the work: all are back when the last put or get of a block is over;
//! - a block is given up when nothing of it gets through, and not because the own line is slow.
//!
//! Called by usfs, repair of content, and tools. What may fail: [`StoreError`], [`ReadError`].

mod block;
mod buffers;
mod cpu;
mod error;
mod gather;
mod latency;
mod links;
mod margin;
pub mod memory;
mod neighbours;
mod placing;
mod read;
mod read_ahead;
mod sealed_pages;
mod seams;
mod slots;
mod stage;
mod store;
#[cfg(test)]
mod tests;
mod uplink;

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::Semaphore;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use block::{BlockInfo, FragmentBits, InlineBlock, StoredBlock};
pub use error::{FragmentFailure, FragmentLoss, PlacementError, ReadError, Retry, StoreError};
pub use links::{FetchedSlots, LinksConfig, ProviderAddress, ProviderLinks};
pub use margin::{durable_after_loss, margin_holds};
pub use read_ahead::{ReadAhead, ReadAheadLimits};
pub use sealed_pages::{SEALED_PAGES_BYTES_MIN, SealedPages, SealedPagesError, indexed_pages};
pub use seams::{BlockDirectory, Damage, FragmentTransport, PlacementLease, SiteNumber, SlotRange};
pub use store::LateFragments;

use crate::code::ErasureCode;
use crate::geometry::Code;
use crate::ids::{BlockId, VolumeId};
use crate::seal::VolumeKey;

/// When a block is acknowledged.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Acknowledge {
    /// As soon as the write margin holds.
    #[default]
    Margin,
    /// When every fragment is durable (`-o ack=full`).
    Full,
}

/// Limits and clocks of a [`VirtualDisk`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DiskConfig {
    /// When a block is acknowledged.
    pub acknowledge: Acknowledge,
    /// Bytes of fragments that may be on their way to providers.
    pub store_bytes_max: usize,
    /// Bytes that reads under way may hold.
    pub read_bytes_max: usize,
    /// Bytes of opened pages kept of which a part was read, at least ([`VirtualDisk::set_cache_bytes`]).
    pub cache_bytes: usize,
    /// Bytes of opened pages kept that were read ahead.
    pub ahead_bytes: usize,
    /// Blocks sealed or opened at once; 0: one for each CPU, at most 8.
    pub cpu_jobs_max: usize,
    /// How long one provider may take for a put before its fragments are put on another as well;
    /// longer where the own line is slow.
    pub put_patience: Duration,
    /// How long nothing of a block may get through before it is given up.
    pub put_stall: Duration,
    /// The same once the block is acknowledged.
    pub put_background: Duration,
    /// The least and the most that a get waits before parity is asked too.
    pub hedge_after: Range<Duration>,
    /// How long a read may take before it fails.
    pub read_deadline: Duration,
}

impl Default for DiskConfig {
    fn default() -> Self {
        Self {
            acknowledge: Acknowledge::Margin,
            store_bytes_max: 128 << 20,
            read_bytes_max: 128 << 20,
            cache_bytes: 128 << 20,
            ahead_bytes: 64 << 20,
            cpu_jobs_max: 0,
            put_patience: Duration::from_secs(3),
            put_stall: Duration::from_secs(45),
            put_background: Duration::from_secs(60),
            hedge_after: Duration::from_millis(5)..Duration::from_millis(500),
            read_deadline: Duration::from_secs(30),
        }
    }
}

/// One volume's bytes: blocks in, blocks out. Cheap to clone; all clones are one disk.
#[derive(Clone)]
pub struct VirtualDisk {
    shared: Arc<Shared>,
}

/// What a read that must fetch brings along.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Around {
    /// Nothing.
    #[default]
    Nothing,
    /// The aligned run of so many bytes.
    Bytes(usize),
    /// What else was written with it: more, the more often this happens in the block.
    Neighbours,
}

struct Shared {
    volume: VolumeId,
    key: VolumeKey,
    code: ErasureCode,
    /// Codes of blocks written under another code of the volume.
    other_codes: Mutex<HashMap<Code, ErasureCode>>,
    config: DiskConfig,
    directory: Arc<dyn BlockDirectory>,
    transport: Arc<dyn FragmentTransport>,
    cpu: cpu::CpuJobs,
    buffers: Arc<buffers::Buffers>,
    latencies: Mutex<latency::Latencies>,
    cache: quick_cache::sync::Cache<read::PageKey, Bytes, read::PageWeight>,
    stage: Mutex<stage::Stage>,
    /// What was read before, on this machine's disk.
    sealed: Option<SealedPages>,
    flights: read::Flights,
    neighbours: Mutex<neighbours::Neighbours>,
    /// In units of [`PERMIT_BYTES`], as the next two.
    store_permits: Arc<Semaphore>,
    read_permits: Arc<Semaphore>,
    rebuild_permits: Arc<Semaphore>,
    uplink: uplink::Uplink,
    /// Blocks whose places were asked for because a provider was away, and when.
    located: quick_cache::sync::Cache<BlockId, Instant>,
    locate_permits: Arc<Semaphore>,
    closed: CancellationToken,
    tasks: TaskTracker,
}

/// Blocks remembered whose places were asked for.
const LOCATED_MAX: usize = 4096;
/// Questions after the places of blocks that may be on their way apart from reads.
const LOCATES_MAX: usize = 4;
/// What one permit of memory stands for.
const PERMIT_BYTES: usize = 4096;

/// Permits for `bytes`, and never more than there are.
const fn permits_for(bytes: usize, bytes_max: usize) -> u32 {
    let (wanted, all) = (bytes.div_ceil(PERMIT_BYTES), permits_of(bytes_max));
    if wanted < all { wanted as u32 } else { all as u32 }
}

/// All permits of a limit; one at least.
const fn permits_of(bytes_max: usize) -> usize {
    let permits = bytes_max.div_ceil(PERMIT_BYTES);
    let permits = if permits == 0 { 1 } else { permits };
    if permits < u32::MAX as usize >> 3 { permits } else { u32::MAX as usize >> 3 }
}

impl VirtualDisk {
    /// The disk of `volume`. New blocks take `code`; blocks of other codes stay readable.
    pub fn new(
        volume: VolumeId,
        key: VolumeKey,
        code: Code,
        config: DiskConfig,
        directory: Arc<dyn BlockDirectory>,
        transport: Arc<dyn FragmentTransport>,
    ) -> Self {
        let permits = |bytes_max| Arc::new(Semaphore::new(permits_of(bytes_max)));
        let cache_items = (config.cache_bytes / (16 << 10)).max(16);
        Self {
            shared: Arc::new(Shared {
                volume,
                key,
                code: ErasureCode::new(code),
                other_codes: Mutex::default(),
                directory,
                transport,
                cpu: cpu::CpuJobs::new(config.cpu_jobs_max),
                buffers: Arc::default(),
                latencies: Mutex::default(),
                cache: quick_cache::sync::Cache::with_weighter(
                    cache_items,
                    config.cache_bytes as u64,
                    read::PageWeight,
                ),
                stage: Mutex::new(stage::Stage::new(config.ahead_bytes)),
                sealed: None,
                flights: read::Flights::default(),
                neighbours: Mutex::default(),
                store_permits: permits(config.store_bytes_max),
                read_permits: permits(config.read_bytes_max),
                rebuild_permits: permits(config.read_bytes_max),
                uplink: uplink::Uplink::default(),
                located: quick_cache::sync::Cache::new(LOCATED_MAX),
                locate_permits: Arc::new(Semaphore::new(LOCATES_MAX)),
                closed: CancellationToken::new(),
                tasks: TaskTracker::new(),
                config,
            }),
        }
    }

    /// The same disk, which keeps the pages it reads in `sealed` too. Only for one that has just been made.
    ///
    /// # Panics
    /// When there are clones of it.
    pub fn keeping(mut self, sealed: SealedPages) -> Self {
        let shared = Arc::get_mut(&mut self.shared).expect("nobody else has a disk just made");
        shared.sealed = Some(sealed);
        self
    }

    /// The code of new blocks.
    pub fn code(&self) -> Code {
        self.shared.code.code()
    }

    /// Stores the concatenation of `plaintext` (at most [`Code::block_bytes_max`]) as one block.
    /// Returns when the margin holds; the other puts go on for a bounded time. On a slow line it
    /// takes its time: it fails when nothing of the block gets through any more.
    ///
    /// # Errors
    /// [`StoreError`]; nothing is acknowledged then. By `deadline` there is an answer.
    pub async fn store(
        &self,
        plaintext: Vec<Bytes>,
        deadline: Instant,
    ) -> Result<StoredBlock, StoreError> {
        self.shared.store(plaintext, deadline).await
    }

    /// Seals the concatenation of `plaintext` (at most [`crate::seal::INLINE_BYTES_MAX`]) for the
    /// directory to keep.
    ///
    /// # Errors
    /// [`StoreError::InlineBytes`].
    pub fn seal_inline(&self, plaintext: &[Bytes]) -> Result<InlineBlock, StoreError> {
        self.shared.seal_inline(plaintext)
    }

    /// Reads `range` of the block's plaintext: consecutive pieces, which together are exactly the
    /// range. Small pieces are shared with the cache, so that nothing is copied.
    ///
    /// # Errors
    /// [`ReadError`]; never wrong bytes.
    pub async fn read(
        &self,
        block: &BlockInfo,
        range: Range<usize>,
    ) -> Result<Vec<Bytes>, ReadError> {
        self.shared.read(block, range, Around::Nothing).await
    }

    /// As [`VirtualDisk::read`]; what must be fetched brings along pages around it, which the cache
    /// keeps.
    ///
    /// # Errors
    /// [`ReadError`]; never wrong bytes.
    pub async fn read_around(
        &self,
        block: &BlockInfo,
        range: Range<usize>,
        around: Around,
    ) -> Result<Vec<Bytes>, ReadError> {
        self.shared.read(block, range, around).await
    }

    /// How many bytes of opened pages are kept.
    pub fn cache_bytes(&self) -> u64 {
        self.shared.cache.capacity()
    }

    /// Keeps so many bytes of opened pages from now on, never fewer than [`DiskConfig::cache_bytes`];
    /// what is too much leaves at once.
    pub fn set_cache_bytes(&self, bytes: u64) {
        self.shared.cache.set_capacity(bytes.max(self.shared.config.cache_bytes as u64));
    }

    /// Reads many ranges at once; the answers come in the order of the ranges.
    pub async fn read_many(
        &self,
        ranges: Vec<(BlockInfo, Range<usize>)>,
    ) -> Vec<Result<Vec<Bytes>, ReadError>> {
        futures::future::join_all(
            ranges.iter().map(|(block, range)| self.read(block, range.clone())),
        )
        .await
    }

    /// Brings `range` into the cache in the background, unless memory for reads is short.
    pub fn prefetch(&self, block: &BlockInfo, range: Range<usize>) {
        self.shared.prefetch(block, range);
    }

    /// Refuses new work and ends what is under way: late fragments of acknowledged blocks get a
    /// moment more, whoever waits for anything else is told that the disk is closed.
    pub async fn close(&self) {
        self.shared.closed.cancel();
        self.shared.store_permits.close();
        self.shared.read_permits.close();
        self.shared.rebuild_permits.close();
        self.shared.tasks.close();
        self.shared.tasks.wait().await;
        if let Some(sealed) = self.shared.sealed.clone() {
            // Fails only while the runtime ends.
            let _ = tokio::task::spawn_blocking(move || sealed.close()).await;
        }
    }
}
