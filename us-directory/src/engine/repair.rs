//! Reconstruction: which fragments are made again, in what order, by whom, from whom.
//!
//! ```text
//! commits, checks, damage, late fragments --+
//! scan of a dead provider's holdings -------+--> queue --> jobs --> order to a rebuilder
//! scan of everything (start, brake, room) --+      ^                     |
//!                                                  +--- not yet ---- Rebuilt: the block's record
//!                                                                    names its new holder
//! ```
//! The queue is only a hint: a block is assessed again when its turn comes, from its record as it is
//! then, so that nothing in memory has to survive the directory. File bytes never pass through here.
//!
//! Invariants:
//! - one repair of a block at a time; a repair never changes a block's id, birth or shape;
//! - the record names a new holder only after that has the fragment durably, and only if the place
//!   is still the one the order was made from;
//! - what lies at the old holder is deleted two lease times later, and only if the record does not
//!   name that holder again;
//! - no provider is asked for more than its limits, however much waits.

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};

use bytes::Bytes;
use us_core::geometry::{BlockGeometry, Code, FRAGMENTS_MAX};
use us_core::ids::VolumeId;
use us_proto::v1::provider_down::Event as Down;
use us_proto::v1::{
    CancelRebuild, FragmentStatus, ProviderReport, RebuildStatus, Rebuilt, RepairStatus,
};

use super::audit::Reporter;
use super::members::FRAGMENTS_A_MESSAGE;
use super::{Durability, Engine, presence};
use crate::keys;
use crate::records::{BlockRecord, decode};
use crate::store::{KeyRange, StoreError};

mod asked;
mod assess;
mod begin;
mod jobs;
mod queue;
mod rates;
mod route;
mod target;

pub use assess::{Assessment, Holder, URGENT_S};
pub use jobs::{Disturbance, Job, Jobs, RepairLimits};
pub use queue::{BlockKey, Queue};
pub use rates::{Pulled, Rates, Stated};

/// Blocks a scan looks at in one tick.
const SCAN_SLICE: usize = 1024;
/// How long a block waits after its first failed repair; doubles up to the last.
const RETRY_FIRST_MS: u64 = 1_000;
const RETRY_LAST_MS: u64 = 5 * 60_000;
/// Orders that fail one after the other before a provider gets none for a while.
const FAILING_ORDERS: u32 = 3;
const FAILING_PAUSE_MS: u64 = 60_000;
/// Failures of one block's repair before it takes a worse place than the best.
const PATIENCE_FAILURES: u32 = 4;
/// The rate shown is a mean over about this time.
const RATE_MS: f64 = 10_000.0;

/// A walk over blocks that may need repair.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Scan {
    /// What a provider should hold.
    Holdings(u32),
    /// Everything.
    Blocks,
}

#[derive(Debug)]
struct Scanning {
    scan: Scan,
    volumes: VecDeque<VolumeId>,
    after: Option<Bytes>,
    /// It was asked for again meanwhile: when it has seen everything it begins anew.
    again: bool,
}

/// A repair that failed, and when it is tried again.
#[derive(Debug, Default)]
struct Setback {
    failures: u32,
    until_ms: u64,
    /// Who was to make the fragment and could not.
    tried: Vec<u32>,
    /// Fragments that may lie where an order was given up.
    strays: Vec<route::Place>,
}

/// A rebuilder whose orders fail one after the other.
#[derive(Debug, Default)]
struct Failing {
    orders: u32,
    until_ms: u64,
}

/// The state of reconstruction; all of it can be found again.
#[derive(Debug, Default)]
pub(super) struct Repairs {
    pub queue: Queue,
    pub jobs: Jobs,
    scans: VecDeque<Scanning>,
    setbacks: HashMap<BlockKey, Setback>,
    later: BTreeSet<(u64, BlockKey)>,
    failing: HashMap<u32, Failing>,
    /// Fragments that may lie where an order was given up, of blocks that are well now.
    strays: Vec<(BlockKey, route::Place)>,
    /// Providers that are dead, distrusted or being emptied: new blocks there need a look.
    pub unwell: HashSet<u32>,
    /// Helpers chosen for blocks that wait, together with those of many others.
    planned: HashMap<BlockKey, route::Planned>,
    /// Of the providers being emptied those of which the log has not said that they are.
    pub drains: BTreeSet<u32>,
    /// Blocks and fragment bytes made since the start.
    done: (u64, u64),
    /// Of the blocks: those the log has told of.
    told: u64,
    failed: u64,
    rate: f64,
    rate_ms: u64,
    /// What the lines give.
    pub rates: Rates,
}

impl Repairs {
    pub fn new(limits: RepairLimits) -> Self {
        Self { jobs: Jobs::new(limits), ..Self::default() }
    }

    /// Whether blocks wait that can be repaired, or are under way, or will be tried again.
    pub fn is_busy(&self) -> bool {
        !self.queue.is_empty() || !self.jobs.is_empty() || !self.later.is_empty()
    }

    /// A job ended, however: should its block need another, helpers are chosen anew.
    fn end(&mut self, ticket: u64) -> Option<Job> {
        let job = self.jobs.end(ticket)?;
        self.planned.remove(&job.key);
        Some(job)
    }

    /// A job ended before anyone was asked for anything: its helpers stay chosen.
    fn end_unasked(&mut self, ticket: u64, now_ms: u64) -> Option<Job> {
        let job = self.jobs.end(ticket)?;
        self.jobs.take_back(&job, now_ms);
        Some(job)
    }

    fn forget(&mut self, key: &BlockKey) {
        self.queue.remove(key);
        self.planned.remove(key);
        self.succeeded(key);
    }

    fn succeeded(&mut self, key: &BlockKey) {
        if let Some(setback) = self.setbacks.remove(key) {
            self.later.remove(&(setback.until_ms, *key));
            self.strays.extend(setback.strays.into_iter().map(|place| (*key, place)));
        }
    }

    fn set_back(&mut self, key: BlockKey, now_ms: u64) {
        self.queue.remove(&key);
        let setback = self.setbacks.entry(key).or_default();
        self.later.remove(&(setback.until_ms, key));
        let wait_ms = RETRY_FIRST_MS.saturating_mul(1 << setback.failures.min(16));
        setback.failures += 1;
        setback.until_ms = now_ms + wait_ms.min(RETRY_LAST_MS);
        self.later.insert((setback.until_ms, key));
    }

    /// An order failed for a reason that may lie with its rebuilder: another is tried next.
    fn blame(&mut self, key: BlockKey, target: u32, now_ms: u64) {
        let tried = &mut self.setbacks.entry(key).or_default().tried;
        if !tried.contains(&target) {
            tried.push(target);
        }
        let failing = self.failing.entry(target).or_default();
        failing.orders = failing.orders.saturating_add(1);
        if failing.orders >= FAILING_ORDERS {
            failing.until_ms = now_ms + FAILING_PAUSE_MS;
        }
    }

    /// The order was given up: its fragments may have been made all the same.
    fn note_strays(&mut self, job: &Job) {
        let strays = &mut self.setbacks.entry(job.key).or_default().strays;
        let made = job.wanted.iter().map(|(index, _)| (*index, job.target));
        strays.extend(made);
        strays.sort_unstable();
        strays.dedup();
    }

    /// Whether a block's repair has failed often enough to take a worse place for it.
    fn has_waited_long(&self, key: &BlockKey) -> bool {
        self.setbacks.get(key).is_some_and(|setback| setback.failures >= PATIENCE_FAILURES)
    }

    /// Who is not asked to make a fragment of the block while anybody else can be.
    fn to_avoid(&self, key: &BlockKey, now_ms: u64) -> Vec<u32> {
        let mut avoid: Vec<u32> =
            self.setbacks.get(key).map_or_else(Vec::new, |setback| setback.tried.clone());
        let failing = self.failing.iter().filter(|(_, failing)| failing.until_ms > now_ms);
        avoid.extend(failing.map(|(provider, _)| *provider));
        avoid
    }

    /// What had failed and has waited long enough.
    fn recovered(&mut self, now_ms: u64) -> Vec<BlockKey> {
        let mut recovered = Vec::new();
        while let Some((until_ms, key)) = self.later.first().copied() {
            if until_ms > now_ms {
                break;
            }
            self.later.remove(&(until_ms, key));
            recovered.push(key);
        }
        recovered
    }

    fn note_done(&mut self, now_ms: u64, bytes: u64) {
        self.done = (self.done.0 + 1, self.done.1 + bytes);
        self.rate = self.rate_now(now_ms) + bytes as f64 / RATE_MS * 1000.0;
        self.rate_ms = now_ms;
    }

    /// Bytes of fragments made a second, lately.
    fn rate_now(&self, now_ms: u64) -> f64 {
        self.rate * (-(now_ms.saturating_sub(self.rate_ms) as f64) / RATE_MS).exp()
    }
}

/// How low a block's durable fragments may fall above s before it is repaired: eager unless its
/// volume says otherwise.
fn repair_at(repair_at: u32, block: &BlockRecord) -> usize {
    match repair_at {
        0 => (block.r as usize).saturating_sub(1),
        r0 => (r0 as usize - 1).min((block.r as usize).saturating_sub(1)),
    }
}

impl Engine {
    fn holder(&self, provider: u32) -> Holder {
        let clocks = &self.config.clocks;
        let mean_s = (clocks.mttf_ms.max(1) as f64) / 1000.0;
        match self.members.get(&provider) {
            None => Holder {
                lives: false,
                trusted: true,
                reachable: false,
                draining: false,
                hazard: 1.0,
            },
            Some(member) => {
                let (record, reachable) = (&member.record, member.is_reachable());
                let factor = presence::hazard_factor(record, reachable, self.clock_ms(), clocks);
                Holder {
                    lives: !record.dead,
                    trusted: !record.distrusted,
                    reachable,
                    draining: record.draining,
                    hazard: factor / mean_s,
                }
            }
        }
    }

    fn assess(&self, key: &BlockKey, block: &BlockRecord) -> Assessment {
        let late = self.unsettled.get(key).is_some_and(|unsettled| unsettled.late);
        Assessment::of(block, late, |provider| self.holder(provider))
    }

    fn wanted(&self, key: &BlockKey, block: &BlockRecord, found: &Assessment) -> Vec<u8> {
        let lazy = self.volumes.get(&key.0).map_or(0, |volume| volume.record.repair_at);
        let mut holders = block.providers.clone();
        holders.sort_unstable();
        holders.dedup();
        let others = self.members.iter().filter(|(_, member)| member.takes_new());
        let can_spread = !found.crowded.is_empty()
            && others.map(|(id, _)| *id).any(|id| holders.binary_search(&id).is_err());
        found.wanted(block.s as usize, repair_at(lazy, block), can_spread)
    }

    /// A block's record, or what is known of its holders, changed: queues it where it needs repair.
    pub(super) fn consider(&mut self, key: BlockKey, block: Option<&BlockRecord>) {
        let Some(block) = block.filter(|block| !block.is_inline()) else {
            return self.repairs.forget(&key);
        };
        let late = self.unsettled.get(&key).is_some_and(|unsettled| unsettled.late);
        let suspicious = late
            || !block.damaged.is_empty()
            || !block.missing.is_empty()
            || block.providers.iter().any(|provider| self.repairs.unwell.contains(provider))
            || self.repairs.queue.contains(&key);
        if !suspicious || self.repairs.jobs.is_running(&key) {
            return;
        }
        let found = self.assess(&key, block);
        if self.wanted(&key, block, &found).is_empty() {
            self.repairs.forget(&key);
        } else if self.repairs.setbacks.get(&key).is_none_or(|s| s.until_ms <= self.at.now_ms) {
            self.repairs.queue.put(key, found.rank_s());
        }
    }

    /// Looks at everything a provider should hold: it died, came back, or is to be emptied.
    pub(super) fn scan_holdings(&mut self, provider: u32) {
        self.begin_scan(Scan::Holdings(provider));
    }

    /// Looks at every block.
    pub(super) fn scan_blocks(&mut self) {
        self.begin_scan(Scan::Blocks);
    }

    fn begin_scan(&mut self, scan: Scan) {
        // Not from the start: what lies at the end would never be seen where this is asked for often.
        if let Some(running) = self.repairs.scans.iter_mut().find(|found| found.scan == scan) {
            running.again = true;
            return;
        }
        let volumes = self.volumes.keys().copied().collect();
        self.repairs.scans.push_back(Scanning { scan, volumes, after: None, again: false });
    }

    /// Whether blocks that need repair may still be found.
    pub(super) fn is_scanning(&self) -> bool {
        !self.repairs.scans.is_empty()
    }

    fn scan_slice(&mut self) -> Result<(), StoreError> {
        let Some(mut scanning) = self.repairs.scans.pop_front() else { return Ok(()) };
        let Some(volume) = scanning.volumes.front().copied() else {
            if scanning.again {
                self.begin_scan(scanning.scan);
            }
            return Ok(());
        };
        let prefix = match scanning.scan {
            Scan::Holdings(provider) => keys::holdings(&volume, provider),
            Scan::Blocks => keys::tag(&volume, b'b'),
        };
        let range = KeyRange::prefix(&prefix);
        let range = scanning.after.take().map_or(range.clone(), |after| range.after(&after));
        let pairs = self.store.scan(&range, SCAN_SLICE)?;
        match pairs.last() {
            Some((last, _)) if pairs.len() == SCAN_SLICE => scanning.after = Some(last.clone()),
            _ => {
                scanning.volumes.pop_front();
            }
        }
        for (key, value) in &pairs {
            let Some(block) = keys::last_block(key) else { continue };
            let key = (volume, block);
            let record = match scanning.scan {
                Scan::Blocks => Some(decode(key.1.as_bytes(), value)?),
                Scan::Holdings(_) => self.stored_block(&key)?,
            };
            self.look_at(key, record.as_ref());
        }
        if !scanning.volumes.is_empty() {
            self.repairs.scans.push_front(scanning);
        } else if scanning.again {
            self.begin_scan(scanning.scan);
        }
        Ok(())
    }

    /// As [`Engine::consider`], for a block that may look sound and not be.
    fn look_at(&mut self, key: BlockKey, block: Option<&BlockRecord>) {
        let Some(block) = block.filter(|block| !block.is_inline()) else { return };
        if self.repairs.jobs.is_running(&key) {
            return;
        }
        let found = self.assess(&key, block);
        if !self.wanted(&key, block, &found).is_empty() {
            self.repairs.queue.put(key, found.rank_s());
        }
    }

    /// A provider can be read from again: what waited for it is tried again.
    pub(super) fn sources_are_back(&mut self) {
        self.repairs.queue.try_again();
    }

    /// What orders that were given up may have left behind goes.
    fn bury_strays(&mut self) -> Result<(), StoreError> {
        for ((volume, block), (index, provider)) in std::mem::take(&mut self.repairs.strays) {
            let Some(mut tx) = self.tx(volume) else { continue };
            tx.bury_stray(&block, usize::from(index), provider)?;
            let outcome = tx.finish()?;
            if !outcome.batch.is_empty() {
                self.commit(outcome.batch, Durability::Applied)?;
                self.pending_deletes += outcome.graves as i64;
            }
        }
        Ok(())
    }

    /// One step of reconstruction: every tick.
    pub(super) fn run_repairs(&mut self) -> Result<(), StoreError> {
        let now_ms = self.now_ms();
        self.bury_strays()?;
        self.scan_slice()?;
        for key in self.repairs.recovered(now_ms) {
            let block = self.stored_block(&key)?;
            self.look_at(key, block.as_ref());
        }
        for ticket in self.repairs.jobs.overdue(now_ms) {
            if let Some(job) = self.repairs.end(ticket) {
                self.repairs.failed += 1;
                self.repairs.blame(job.key, job.target, now_ms);
                self.repairs.note_strays(&job);
                self.repairs.set_back(job.key, now_ms);
                let conn = self.members.get(&job.target).and_then(|member| member.conn);
                if let Some(conn) = conn {
                    self.tell(conn, Down::CancelRebuild(CancelRebuild { ticket }));
                }
            }
        }
        if self.repairs.queue.take_dropped() {
            self.scan_blocks();
        }
        self.begin_repairs()
    }

    /// A rebuilder says how an order ended.
    pub(super) fn rebuilt(&mut self, provider: u32, reply: &Rebuilt) -> Result<(), StoreError> {
        let ours = self.repairs.jobs.get(reply.ticket).is_some_and(|job| job.target == provider);
        // A rebuilder that is busy refuses before it asks anyone (or stops): the same helpers are
        // asked then.
        let now_ms = self.now_ms();
        let unasked = reply.status() == RebuildStatus::Busy && reply.pulled.is_empty();
        let ended = |repairs: &mut Repairs| match unasked {
            true => repairs.end_unasked(reply.ticket, now_ms),
            false => repairs.end(reply.ticket),
        };
        let Some(job) = ours.then(|| ended(&mut self.repairs)).flatten() else {
            return Ok(());
        };
        self.note_faults(&job, reply)?;
        self.note_rates(provider, reply);
        let label = RebuildStatus::try_from(reply.status).unwrap_or_default();
        metrics::counter!("us_directory_repairs_total", "status" => label.as_str_name())
            .increment(1);
        if label == RebuildStatus::Ok {
            self.repairs.failing.remove(&provider);
            self.repairs.note_done(now_ms, job.fragment_bytes * job.wanted.len() as u64);
            self.commit_repair(&job)?;
        } else {
            self.repairs.failed += 1;
            tracing::warn!(
                block = %job.key.1, provider, status = label.as_str_name(), detail = %reply.detail,
                "a repair failed"
            );
            // Without right sources too: it may be the one who does not reach them. One that is busy is
            // waited for once.
            let again = self.repairs.setbacks.contains_key(&job.key);
            if label != RebuildStatus::Busy || again {
                self.repairs.blame(job.key, provider, now_ms);
            }
            self.repairs.set_back(job.key, now_ms);
        }
        // More of the block may be wanting, and there is room for others.
        let block = self.stored_block(&job.key)?;
        if label == RebuildStatus::Ok {
            match &block {
                Some(record) => self.look_at(job.key, Some(record)),
                None => self.repairs.forget(&job.key),
            }
        }
        self.begin_repairs()
    }

    /// What the rebuilder found wrong with its sources.
    fn note_faults(&mut self, job: &Job, reply: &Rebuilt) -> Result<(), StoreError> {
        for fault in reply.faults.iter().take(FRAGMENTS_A_MESSAGE) {
            let Ok(index) = u8::try_from(fault.index) else { continue };
            let piece = (job.key.0, job.key.1, index);
            match FragmentStatus::try_from(fault.status) {
                Ok(FragmentStatus::Damaged) => {
                    let (provider, status) = (fault.provider, fault.status);
                    let newly_bad = self.note_fragments(provider, &[(piece, status)])?;
                    self.audit_soon(provider, piece, Reporter::Provider(job.target));
                    self.tell_damage(provider, newly_bad, &fault.detail)?;
                }
                // Not believed unasked: the provider itself is to say so.
                Ok(FragmentStatus::NotFound) => self.query(fault.provider, vec![piece], None),
                _ => {}
            }
        }
        Ok(())
    }

    /// How fast its sources were.
    fn note_rates(&mut self, rebuilder: u32, reply: &Rebuilt) {
        let pulled: Vec<Pulled> = reply
            .pulled
            .iter()
            .take(FRAGMENTS_MAX)
            .map(|from| Pulled {
                from: from.provider,
                bytes: from.bytes,
                took_ms: from.took_us as f64 / 1000.0,
            })
            .collect();
        let (now_ms, members) = (self.now_ms(), &self.members);
        let site = |id| members.get(&id).map_or("", |member| member.record.site.as_str());
        self.repairs.rates.note(rebuilder, &pulled, now_ms, site);
    }

    /// What the owner of a provider says of its line: new limits for repair.
    pub(super) fn note_line(&mut self, provider: u32, report: &ProviderReport) {
        let (up, down) = (report.uplink_bytes_per_s, report.downlink_bytes_per_s);
        self.repairs.rates.state(provider, Stated { up, down });
        self.repairs.jobs.set_uplink(provider, up);
    }

    /// The fragments are durable at the rebuilder: the record names it, if all is as it was.
    fn commit_repair(&mut self, job: &Job) -> Result<(), StoreError> {
        let (volume, block) = job.key;
        self.repairs.succeeded(&job.key);
        let Some(mut tx) = self.tx(volume) else { return Ok(()) };
        for (index, from) in &job.wanted {
            tx.relocate(&block, usize::from(*index), *from, job.target)?;
        }
        let outcome = tx.finish()?;
        if outcome.batch.is_empty() {
            return Ok(());
        }
        self.commit(outcome.batch, Durability::Applied)?;
        self.pending_deletes += outcome.graves as i64;
        self.note_blocks(volume, outcome.blocks);
        Ok(())
    }

    /// A provider's stream ended: what it was rebuilding is begun again elsewhere.
    pub(super) fn rebuilder_gone(&mut self, provider: u32) -> Result<(), StoreError> {
        for ticket in self.repairs.jobs.at(provider) {
            if let Some(job) = self.repairs.end(ticket) {
                self.repairs.note_strays(&job);
                let block = self.stored_block(&job.key)?;
                self.look_at(job.key, block.as_ref());
            }
        }
        Ok(())
    }

    /// For the screen.
    pub(super) fn repair_status(&self) -> RepairStatus {
        let repairs = &self.repairs;
        let waiting = repairs.queue.len() + repairs.later.len();
        let rate = repairs.rate_now(self.at.now_ms);
        let urgent = repairs.queue.count_below(URGENT_S, 100_000);
        let left = (waiting + repairs.jobs.len()) as u64;
        let mean_bytes = repairs.done.1.checked_div(repairs.done.0).unwrap_or(0);
        RepairStatus {
            queued: waiting as u64,
            urgent: urgent as u64,
            running: repairs.jobs.len() as u64,
            waiting: repairs.queue.aside() as u64,
            scanning: self.is_scanning(),
            done_blocks: repairs.done.0,
            done_bytes: repairs.done.1,
            failed: repairs.failed,
            bytes_per_s: rate as u64,
            left_s: if rate >= 1.0 { (left * mean_bytes) as f64 / rate } else { 0.0 } as u64,
        }
    }
}

/// The shape a record says; `None` where there is no such shape.
pub(super) fn geometry_of(block: &BlockRecord) -> Option<BlockGeometry> {
    let code = Code::new(block.s as usize, block.r as usize).ok()?;
    let (plaintext, page) = (block.plaintext_bytes as usize, block.page_bytes as usize);
    let fits = block.providers.len() == code.fragments();
    BlockGeometry::with_page(code, plaintext, page).ok().filter(|_| fits)
}
