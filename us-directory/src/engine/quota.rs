//! What a volume, and a session, may take: quotas that hold whatever a client does.
//!
//! A mount keeps to its volume's quota by itself (statfs). One that does not is bounded here, twice:
//! - *leases*: a place that was leased and is not committed counts as a full block, against the quota
//!   and against [`LEASES_MAX`]; it is forgotten when nothing can be young under it any more
//!   (`garbage_age_ms`), also where its session has ended. Beyond the bound a mount hears "no space".
//! - *commits*: a batch that brings the volume beyond the quota and [`SLACK_BLOCKS`] more ends its
//!   session: an honest mount runs out of leases before.
//!
//! The quota is of bytes that files refer to, without the trash. A block of which few bytes are referred
//! to is stored whole all the same: what is stored may be [`STORED_LEASES`] times the quota until leases
//! end (the trash is emptied then), and [`STORED_COMMITS`] times until commits are refused.

use std::collections::BTreeMap;

use bytes::Bytes;
use us_core::ids::VolumeId;
use us_proto::v1::mutation::Op;
use us_proto::v1::{Batch, PlacementsLeased};

use super::Engine;
use crate::namespace::{ApplyError, Rule, Tx};
use crate::records::UsageRecord;
use crate::store::StoreError;

/// Places of one session that are leased and not committed.
pub(super) const LEASES_MAX: usize = 4096;
/// The same of all sessions of one client that have ended: who mounts and unmounts in turns leases ahead
/// each time.
pub(super) const LEFT_MAX: usize = 4 * LEASES_MAX;
/// Places that ended sessions left on one volume which its quota does not count: a mount leases a few dozen
/// ahead, and who mounts now and then is not to wait for them to be old.
pub(super) const LEFT_FREE: usize = 1024;
/// Full blocks a volume may have beyond its quota: places leased ahead, and mounts that write at once.
pub(super) const SLACK_BLOCKS: u64 = 64;
const STORED_LEASES: u64 = 4;
const STORED_COMMITS: u64 = 8;

/// The places a session has leased and not committed: birth, and when.
#[derive(Debug, Default)]
pub(super) struct Leased(BTreeMap<u64, u64>);

impl Leased {
    /// How many there are that are not too old to matter.
    fn count(&mut self, now_ms: u64, age_ms: u64) -> usize {
        // Births grow with time.
        while self.0.first_entry().is_some_and(|first| now_ms >= *first.get() + age_ms) {
            self.0.pop_first();
        }
        self.0.len()
    }
}

/// Places that sessions had leased and not committed when they ended, by their volume and client.
#[derive(Debug, Default)]
pub(super) struct Left(BTreeMap<(VolumeId, Bytes), Leased>);

impl Left {
    /// A session has ended.
    pub fn by(&mut self, volume: VolumeId, key_hash: &Bytes, leased: &mut Leased) {
        if !leased.0.is_empty() {
            let left = self.0.entry((volume, key_hash.clone())).or_default();
            left.0.append(&mut leased.0);
        }
    }

    /// How many that are not too old to matter lie on `volume`, and how many this client left anywhere.
    fn count(
        &mut self,
        now_ms: u64,
        age_ms: u64,
        volume: &VolumeId,
        key_hash: &Bytes,
    ) -> (usize, usize) {
        self.0.retain(|_, leased| leased.count(now_ms, age_ms) > 0);
        let sum = |counts: &dyn Fn(&(VolumeId, Bytes)) -> bool| -> usize {
            let left = self.0.iter().filter(|(whose, _)| counts(whose));
            left.map(|(_, leased)| leased.0.len()).sum()
        };
        (sum(&|(of, _)| of == volume), sum(&|(_, by)| by == key_hash))
    }
}

/// What a volume may still take.
struct Bounds {
    quota: u64,
    slack: u64,
}

impl Bounds {
    /// Full blocks that may be leased beside `outstanding` bytes.
    fn leases_left(&self, usage: &UsageRecord, outstanding: u64, block_bytes: u64) -> u64 {
        let live = usage.live_bytes.saturating_sub(usage.trash_bytes);
        let live_left = self.live_max().saturating_sub(live + outstanding);
        let stored_max = self.stored_max(STORED_LEASES);
        let stored_left = stored_max.saturating_sub(usage.stored_bytes + outstanding);
        live_left.min(stored_left) / block_bytes
    }

    fn live_max(&self) -> u64 {
        self.quota.saturating_add(self.slack)
    }

    fn stored_max(&self, times: u64) -> u64 {
        self.quota.saturating_mul(times).saturating_add(self.slack)
    }

    /// Whether what a transaction made grow is within its bound: what is beyond one already, because the
    /// quota was lowered, may be written anew.
    fn hold(&self, before: &UsageRecord, after: &UsageRecord) -> bool {
        let live = |usage: &UsageRecord| usage.live_bytes.saturating_sub(usage.trash_bytes);
        let live_holds = live(after) <= self.live_max() || live(after) <= live(before);
        let stored = after.stored_bytes;
        // Each block is counted whole: rewriting grows it until the old ones are dead.
        live_holds && (stored <= self.stored_max(STORED_COMMITS) || stored <= before.stored_bytes)
    }
}

impl Engine {
    /// A volume's bounds and the size of its blocks; `None`: it has no quota.
    fn bounds(&self, volume: &VolumeId) -> Option<(Bounds, u64)> {
        let volume = self.volumes.get(volume).filter(|known| known.record.quota_bytes > 0)?;
        let block_bytes = volume.code.block_bytes_max() as u64;
        let (quota, slack) = (volume.record.quota_bytes, SLACK_BLOCKS * block_bytes);
        Some((Bounds { quota, slack }, block_bytes))
    }

    /// How many of `count` places a session may lease now; what to say where it is none.
    pub(super) fn may_lease(
        &mut self,
        session: u64,
        count: u32,
    ) -> Result<(u32, String), StoreError> {
        let (now_ms, age_ms) = (self.now_ms(), self.config.garbage_age_ms);
        let Some(known) = self.sessions.get_mut(&session) else { return Ok((0, String::new())) };
        let (volume, key_hash) = (known.volume, known.record.key_hash.clone());
        let held = known.leased.count(now_ms, age_ms);
        let (on_volume, by_client) = self.left.count(now_ms, age_ms, &volume, &key_hash);
        let left = LEASES_MAX.saturating_sub(held) as u64;
        if left == 0 || by_client >= LEFT_MAX {
            let held = held + by_client;
            return Ok((0, format!("{held} places are leased and nothing was stored there")));
        }
        let Some((bounds, block_bytes)) = self.bounds(&volume) else {
            return Ok((count.min(left as u32), String::new()));
        };
        let others = self.sessions.values_mut().filter(|other| other.volume == volume);
        let leased: usize = others.map(|other| other.leased.count(now_ms, age_ms)).sum();
        let leased = leased + on_volume.saturating_sub(LEFT_FREE);
        let usage = self.usage(&volume)?;
        let room = bounds.leases_left(&usage, leased as u64 * block_bytes, block_bytes);
        if room == 0 {
            let quota = bounds.quota;
            return Ok((0, format!("the volume's quota of {quota} bytes is used up")));
        }
        Ok((u64::from(count).min(left).min(room) as u32, String::new()))
    }

    /// The session has these places now.
    pub(super) fn note_leased(&mut self, session: u64, reply: &PlacementsLeased) {
        let now_ms = self.now_ms();
        if let Some(known) = self.sessions.get_mut(&session) {
            known.leased.0.extend(reply.leases.iter().map(|lease| (lease.birth, now_ms)));
        }
    }

    /// A batch was applied: what it stored is leased no more.
    pub(super) fn note_committed(&mut self, session: u64, batch: &Batch) {
        let Some(known) = self.sessions.get_mut(&session) else { return };
        for mutation in &batch.mutations {
            let Some(Op::CommitData(data)) = &mutation.op else { continue };
            for block in &data.blocks {
                known.leased.0.remove(&block.birth);
            }
        }
    }

    /// Fails where a transaction leaves the volume with more than its quota can be stretched to, and
    /// grew it.
    pub(super) fn check_quota(&self, volume: &VolumeId, tx: &Tx<'_>) -> Result<(), ApplyError> {
        let Some((bounds, _)) = self.bounds(volume) else { return Ok(()) };
        if !tx.grows() || bounds.hold(&self.usage(volume)?, &tx.usage_after()?) {
            return Ok(());
        }
        Err(Rule::Quota { quota_bytes: bounds.quota }.into())
    }
}
