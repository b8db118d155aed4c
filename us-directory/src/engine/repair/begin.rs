//! Beginning repairs: from the head of the queue to orders.

use bytes::Bytes;
use us_core::geometry::BlockGeometry;
use us_core::grant::Rights;
use us_proto::v1::provider_down::Event as Down;
use us_proto::v1::{RebuildFragments, RebuildPath, RebuildSource};

use super::route::{Place, Route};
use super::{Assessment, BlockKey, Job, geometry_of, jobs::AHEAD_MS, target};
use crate::engine::Engine;
use crate::engine::grants::Wanted;
use crate::records::BlockRecord;
use crate::store::StoreError;

/// Blocks at the head of the queue that may be blocked before the others have to wait too.
const BLOCKED_MAX: usize = 16;
/// Blocks whose helpers are chosen together.
const TOGETHER_MAX: usize = 64;

/// A block that can be repaired now.
#[derive(Debug)]
pub(super) struct Ready {
    pub key: BlockKey,
    pub block: BlockRecord,
    pub found: Assessment,
    pub geometry: BlockGeometry,
    /// The fragment that is wanted.
    pub index: u8,
}

impl Ready {
    /// Whether the fragment is only moved: its own holder is the one source.
    pub fn is_move(&self) -> bool {
        self.found.sources.contains(&self.index)
    }

    /// Fragments that can be read and are not the one that is wanted, with their holders.
    pub fn sources(&self) -> impl Iterator<Item = Place> + '_ {
        let others = self.found.sources.iter().filter(|index| **index != self.index);
        others.map(|index| (*index, self.block.providers[usize::from(*index)]))
    }
}

impl Engine {
    pub(in crate::engine) fn begin_repairs(&mut self) -> Result<(), StoreError> {
        if !self.counts.complete || self.repairs.queue.is_empty() {
            // What is settled and what is late is not known before everything was counted once.
            return Ok(());
        }
        let jobs_max = self.repairs.jobs.limits().jobs_max;
        let first: Vec<BlockKey> =
            self.repairs.queue.first(jobs_max + BLOCKED_MAX).map(|(_, key)| key).collect();
        let mut first = first.into_iter();
        let mut blocked = 0;
        while self.repairs.jobs.has_room() && blocked < BLOCKED_MAX {
            let mut ready = Vec::with_capacity(TOGETHER_MAX);
            for key in first.by_ref() {
                let Some(next) = self.ready(key)? else { continue };
                if self.must_wait(&next) {
                    blocked += 1;
                } else {
                    ready.push(next);
                }
                if ready.len() >= TOGETHER_MAX || blocked >= BLOCKED_MAX {
                    break;
                }
            }
            if ready.is_empty() {
                return Ok(());
            }
            for (ready, helpers) in self.with_helpers(ready) {
                if !self.repairs.jobs.has_room() || blocked >= BLOCKED_MAX {
                    return Ok(());
                }
                blocked += usize::from(!self.begin_repair(ready, helpers)?);
            }
        }
        Ok(())
    }

    /// The block with what it lacks; `None` where it lacks nothing, or nothing can be done now.
    fn ready(&mut self, key: BlockKey) -> Result<Option<Ready>, StoreError> {
        let Some(block) = self.stored_block(&key)?.filter(|block| !block.is_inline()) else {
            self.repairs.forget(&key);
            return Ok(None);
        };
        let found = self.assess(&key, &block);
        let Some(index) = self.wanted(&key, &block, &found).first().copied() else {
            self.repairs.forget(&key);
            return Ok(None);
        };
        let is_move = found.sources.contains(&index);
        if !is_move && found.sources.len() < block.s as usize {
            self.repairs.queue.set_aside(key, found.rank_s());
            return Ok(None);
        }
        let Some(geometry) = geometry_of(&block) else {
            tracing::error!(block = %key.1, "its record has an impossible shape");
            self.repairs.forget(&key);
            return Ok(None);
        };
        Ok(Some(Ready { key, block, found, geometry, index }))
    }

    /// Whether whoever is to have the fragment is at its limit: seen without asking the placer.
    fn must_wait(&self, ready: &Ready) -> bool {
        let needed = us_core::placement::record_bytes_max(ready.geometry.fragment_bytes() as u64);
        let kept = self.keep_or_wait(&ready.block, usize::from(ready.index), needed);
        kept == Some(target::Target::Later)
    }

    /// Begins the repair of a block; false where it has to wait for others to end.
    fn begin_repair(&mut self, ready: Ready, helpers: Vec<Place>) -> Result<bool, StoreError> {
        let Ready { key, block, geometry, index, .. } = &ready;
        let (key, index, now_ms) = (*key, *index, self.now_ms());
        // Those before it may have used up what some can send.
        if self.planned_are_busy(&ready) {
            return Ok(false);
        }
        let mut helpers = helpers;
        helpers.retain(|(_, provider)| self.repairs.jobs.may_queue(*provider, now_ms));
        if !ready.is_move() && helpers.len() < block.s as usize {
            return Ok(false);
        }
        let fragment_bytes = geometry.fragment_bytes() as u64;
        let target = match self.choose_target(&key, block, usize::from(index), fragment_bytes)? {
            target::Target::Provider(target) => target,
            target::Target::Later => return Ok(false),
            target::Target::None => {
                self.repairs.set_back(key, now_ms);
                return Ok(true);
            }
        };
        let Some(route) = self.route(&ready, helpers, target) else { return Ok(false) };
        let Some(conn) = self.members.get(&target).and_then(|member| member.conn) else {
            return Ok(false);
        };
        let ticket = self.next_query;
        self.next_query += 1;
        // What goes over slow lines is waited for: to ask another costs that one's line too.
        let jobs = &self.repairs.jobs;
        let sending = route
            .senders
            .iter()
            .map(|(_, sender)| jobs.sends_for_ms(*sender, route.sent_bytes, now_ms));
        let takes_ms = sending.max().unwrap_or(0);
        // Orders given later share those lines, as far as a line's orders may run ahead.
        let patience_ms = if takes_ms > 0 { (takes_ms + AHEAD_MS) * 3 / 2 } else { 0 };
        let time_ms = jobs.limits().deadline_ms.max(patience_ms * 3);
        let job = Job {
            key,
            wanted: vec![(index, block.providers[usize::from(index)])],
            target,
            senders: route.senders.clone(),
            sent_bytes: route.sent_bytes,
            fragment_bytes,
            begun_ms: now_ms,
            deadline_ms: now_ms + time_ms,
        };
        let path = route.path.as_str_name();
        metrics::counter!("us_directory_repairs_ordered_total", "path" => path).increment(1);
        tracing::debug!(block = %key.1, target, path, "a repair is ordered");
        let mut order = self.order(ticket, &job, block, route);
        (order.deadline_ms, order.patience_ms) = (time_ms, patience_ms);
        self.grant_reads(&mut order, &key, target);
        self.repairs.queue.remove(&key);
        self.repairs.jobs.begin(ticket, job, now_ms);
        self.tell(conn, Down::Rebuild(order));
        Ok(true)
    }

    /// What the rebuilder shows to its sources, and these to each other where they add up sums.
    fn grant_reads(&mut self, order: &mut RebuildFragments, key: &BlockKey, target: u32) {
        let lasts_ms = order.deadline_ms;
        let grant = |engine: &mut Self, provider: u32| {
            let member = engine.members.get(&provider);
            let holder = member.map(|member| member.record.key_hash.clone()).unwrap_or_default();
            let (volume, block) = (key.0, Some(key.1));
            let rights = Rights::Read;
            engine.sign(&Wanted { volume, block, holder: &holder, rights, lasts_ms })
        };
        order.grant = grant(self, target);
        if matches!(order.path(), RebuildPath::Chain | RebuildPath::Sites) {
            for source in &mut order.sources {
                source.grant = grant(self, source.provider);
            }
        }
    }

    fn order(&self, ticket: u64, job: &Job, block: &BlockRecord, route: Route) -> RebuildFragments {
        let wanted = |index: u8| job.wanted.iter().any(|(wanted, _)| *wanted == index);
        let places = route.senders.into_iter().chain(route.standby);
        let (holders, sources): (Vec<Place>, Vec<Place>) =
            places.partition(|(index, _)| wanted(*index));
        let source = |(index, provider): (u8, u32)| {
            let record = &self.members.get(&provider)?.record;
            Some(RebuildSource {
                index: u32::from(index),
                provider,
                address: record.address.clone(),
                key_hash: record.key_hash.clone(),
                site: record.site.clone(),
                ..Default::default()
            })
        };
        RebuildFragments {
            ticket,
            block: Bytes::copy_from_slice(job.key.1.as_bytes()),
            volume: Bytes::copy_from_slice(job.key.0.as_bytes()),
            birth: block.birth,
            s: block.s,
            r: block.r,
            page_bytes: block.page_bytes,
            plaintext_bytes: block.plaintext_bytes,
            fingerprint_kind: block.fingerprint_kind,
            fingerprint_hash: block.fingerprint_hash.clone(),
            wanted: job.wanted.iter().map(|(index, _)| u32::from(*index)).collect(),
            sources: sources.into_iter().filter_map(source).collect(),
            holders: holders.into_iter().filter_map(source).collect(),
            path: route.path as i32,
            bytes_per_s_max: 0,
            ..Default::default()
        }
    }
}
