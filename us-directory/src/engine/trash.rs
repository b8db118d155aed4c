//! The trash of volumes: what leaves it when its time is over, or when space is short.
//!
//! What is in it is the namespace's (`namespace/trash.rs`); this is when it ends. Time is the cluster's
//! clock: while no directory runs nothing grows older. Space is short where fewer blocks fit than a
//! mark well above the reserve, counting what providers can clear away; or where a mount found no place.
//! Then what was removed longest ago goes, as much as is missing: what it frees is seen in providers'
//! reports only after two lease times, so what is on its way is reckoned in. Where a mount still finds no place
//! and nothing is on its way after all (blocks are shared with clones, bytes lay inline), more goes at once.
//!
//! Invariant: nothing leaves the trash before its time unless space is short or an administrator says so.

use std::collections::VecDeque;
use std::sync::Arc;

use us_core::geometry::Code;
use us_core::ids::VolumeId;

use super::admin::refused;
use super::chores::no_rule;
use super::event::{Answer, AskId, Effect, RefusalKind};
use super::events::EventKind;
use super::placement::{Space, fragment_bytes_max};
use super::{Durability, Engine, Peer, Then, Volume};
use crate::keys;
use crate::namespace::{Purged, TrashRule};
use crate::records::{ReferenceRecord, decode};
use crate::store::{KeyRange, StoreError, View};

/// What leaves the trash in one slow tick because its time is over, of one volume.
const EXPIRED_SLICE: usize = 256;
/// What leaves it in one slow tick because space is short.
const YIELDED_SLICE: usize = 1024;
/// Things an administrator removes from it at once.
pub const PURGE_MAX: usize = 1024;
/// Space is short where less than one block in so many is free.
const LOW_SHARE: u64 = 20;
/// Blocks made room for when a mount finds no place.
const PRESSED_BLOCKS: u64 = 64;
/// How often it is looked whether space is short; a mount that finds no place does not wait for it.
const LOOK_EVERY_MS: u64 = 5_000;
/// What was purged is seen in providers' reports so long after its graves are due.
const SEEN_MS: u64 = 30_000;

/// What the engine knows of the trash of all volumes, as of its last look.
#[derive(Debug, Default)]
pub(super) struct Trash {
    /// What is in it.
    pub files: u64,
    /// Bytes of blocks that it keeps.
    pub bytes: u64,
    /// A mount found no place for a block.
    pub pressed: bool,
    /// When something was last on its way to be deleted; reports tell of its space a little later.
    busy_ms: u64,
    /// Space is short.
    is_short: bool,
    /// When it is looked for that next.
    look_at_ms: u64,
    /// What was purged for space and is not seen yet: until when, and bytes of fragments.
    coming: VecDeque<(u64, u64)>,
}

/// What a look into a volume's trash starts from.
#[derive(Clone)]
pub struct TrashBasis {
    /// The state.
    pub view: Arc<dyn View>,
    /// The volume.
    pub volume: VolumeId,
    /// Its key, where it is managed.
    pub key: bytes::Bytes,
    /// The cluster's clock.
    pub clock_ms: u64,
}

/// Below how many free blocks space is short: a twentieth of all, and what is kept for deletes as far as
/// that is not most of a small swarm.
pub(super) fn low_mark(space: &Space) -> u64 {
    (space.total_blocks / LOW_SHARE).max(space.reserve_blocks.min(space.total_blocks / 4))
}

impl Engine {
    pub(super) fn trash_rule(&self, volume: &Volume) -> TrashRule {
        TrashRule {
            clock_ms: self.clock_ms(),
            age_ms: self.config.trash_age_ms,
            on: volume.record.kept_hours() > 0,
        }
    }

    /// The volumes that may have trash.
    fn volumes_with_trash(&self) -> Vec<(VolumeId, Code)> {
        let with =
            |(id, volume): &(&VolumeId, &Volume)| !volume.record.deleting && !self.is_hidden(id);
        self.volumes.iter().filter(with).map(|(id, volume)| (*id, volume.code)).collect()
    }

    pub(super) fn trash_chore(&mut self) -> Result<(), StoreError> {
        self.expire_trash()?;
        self.look_at_trash()?;
        self.yield_trash()
    }

    fn look_at_trash(&mut self) -> Result<(), StoreError> {
        let (mut files, mut bytes) = (0, 0);
        for (volume, _) in self.volumes_with_trash() {
            let usage = self.usage(&volume)?;
            files += usage.trash_files;
            bytes += usage.trash_bytes;
        }
        (self.trash.files, self.trash.bytes) = (files, bytes);
        Ok(())
    }

    /// What was removed longer ago than its volume keeps it leaves the trash.
    fn expire_trash(&mut self) -> Result<(), StoreError> {
        for (volume, _) in self.volumes_with_trash() {
            let Some(known) = self.volumes.get(&volume) else { continue };
            let kept_ms = u64::from(known.record.kept_hours()) * 3_600_000;
            let Some(until_ms) = self.clock_ms().checked_sub(kept_ms) else { continue };
            let range = KeyRange {
                from: keys::tag(&volume, b't'),
                to: Some(keys::trashed_end(&volume, until_ms)),
            };
            let due = self.store.scan(&range, EXPIRED_SLICE)?;
            let inos: Vec<u64> = due.iter().map(|(key, _)| keys::last_number(key)).collect();
            self.purge(volume, &inos, "expired")?;
        }
        Ok(())
    }

    /// Removes what of `inos` is in the trash for ever.
    fn purge(
        &mut self,
        volume: VolumeId,
        inos: &[u64],
        reason: &'static str,
    ) -> Result<Purged, StoreError> {
        let mut sum = Purged::default();
        let Some(mut tx) = self.tx(volume).filter(|_| !inos.is_empty()) else { return Ok(sum) };
        for ino in inos {
            let purged = tx.purge(*ino).or_else(no_rule::<Purged>)?;
            sum.files += purged.files;
            sum.stored_bytes += purged.stored_bytes;
        }
        let outcome = tx.finish()?;
        self.chore_done(volume, outcome)?;
        metrics::counter!("us_directory_trash_purged_total", "reason" => reason)
            .increment(sum.files);
        Ok(sum)
    }

    /// Blocks of this code that would fit where the trash of all volumes lies.
    pub(super) fn trash_blocks(&self, code: Code) -> Result<u64, StoreError> {
        let mut bytes = 0u64;
        for (volume, its_code) in self.volumes_with_trash() {
            bytes += raw_bytes(its_code, self.usage(&volume)?.trash_bytes);
        }
        Ok(bytes / (fragment_bytes_max(code) * code.fragments() as u64))
    }

    /// Bytes of fragments that have to become free, of those that nothing is on its way to free.
    fn missing_bytes(&mut self) -> Result<u64, StoreError> {
        let now_ms = self.now_ms();
        while self.trash.coming.front().is_some_and(|(until_ms, _)| *until_ms <= now_ms) {
            self.trash.coming.pop_front();
        }
        let pressed = std::mem::take(&mut self.trash.pressed);
        if self.pending_deletes > 0 || self.is_reaping()? {
            self.trash.busy_ms = now_ms;
        }
        if pressed && now_ms > self.trash.busy_ms + 3 * self.config.report_every_ms {
            // What was purged shared its blocks with what is left: nothing comes of it.
            self.trash.coming.clear();
        }
        let mut codes: Vec<Code> =
            self.volumes_with_trash().iter().map(|(_, code)| *code).collect();
        codes.sort_unstable_by_key(|code| (code.s(), code.r()));
        codes.dedup();
        let missing = codes.into_iter().map(|code| {
            let space = self.space(code);
            let blocks = low_mark(&space).saturating_sub(space.free_blocks);
            let blocks = if pressed { blocks.max(PRESSED_BLOCKS) } else { blocks };
            blocks * fragment_bytes_max(code) * code.fragments() as u64
        });
        let missing = missing.max().unwrap_or(0);
        let coming = self.trash.coming.iter().fold(0u64, |sum, (_, bytes)| sum + bytes);
        Ok(missing.saturating_sub(coming))
    }

    /// Whether something that was removed for ever is still being taken apart.
    fn is_reaping(&self) -> Result<bool, StoreError> {
        for volume in self.volumes.keys() {
            if !self.store.scan(&KeyRange::prefix(&keys::tag(volume, b'k')), 1)?.is_empty() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Where space is short, what was removed longest ago leaves the trash.
    fn yield_trash(&mut self) -> Result<(), StoreError> {
        // A start is not told of free space before providers have reported.
        if self.trash.bytes == 0 || !self.members.values().any(super::Member::may_have_space) {
            (self.trash.is_short, self.trash.pressed) = (false, false);
            return Ok(());
        }
        if self.now_ms() < self.trash.look_at_ms && !self.trash.pressed {
            return Ok(());
        }
        self.trash.look_at_ms = self.now_ms() + LOOK_EVERY_MS;
        let missing = self.missing_bytes()?;
        let was_short = std::mem::replace(&mut self.trash.is_short, missing > 0);
        if missing == 0 {
            return Ok(());
        }
        if !was_short && self.trash.coming.is_empty() {
            let detail = "space is short: what was removed longest ago leaves the trash early";
            self.note_event(EventKind::TrashYields, 0, detail.to_owned())?;
        }
        let mut freed = 0;
        let mut left = YIELDED_SLICE;
        while left > 0 && freed < missing {
            let Some((volume, code)) = self.oldest_trash()? else { break };
            let (inos, bytes) = self.oldest_of(volume, code, left, missing - freed)?;
            self.purge(volume, &inos, "space")?;
            left -= inos.len();
            freed += bytes;
        }
        let until_ms = self.now_ms() + 2 * self.config.lease_ms + SEEN_MS;
        self.trash.coming.push_back((until_ms, freed));
        self.look_at_trash()
    }

    /// The volume of what was removed longest ago.
    fn oldest_trash(&self) -> Result<Option<(VolumeId, Code)>, StoreError> {
        let mut oldest = None;
        for (volume, code) in self.volumes_with_trash() {
            let first = self.store.scan(&KeyRange::prefix(&keys::tag(&volume, b't')), 1)?;
            let Some((key, _)) = first.first() else { continue };
            let at_ms = keys::trashed_at(key);
            if oldest.is_none_or(|(other_ms, _)| at_ms < other_ms) {
                oldest = Some((at_ms, (volume, code)));
            }
        }
        Ok(oldest.map(|(_, volume)| volume))
    }

    /// What was removed longest ago of a volume: at most `limit`, and as much as frees `bytes`; and how
    /// much that is.
    fn oldest_of(
        &self,
        volume: VolumeId,
        code: Code,
        limit: usize,
        bytes: u64,
    ) -> Result<(Vec<u64>, u64), StoreError> {
        let range = KeyRange::prefix(&keys::tag(&volume, b't'));
        let (mut inos, mut sum) = (Vec::new(), 0);
        for (key, value) in self.store.scan(&range, limit)? {
            if sum >= bytes {
                break;
            }
            sum += raw_bytes(code, decode::<ReferenceRecord>(&key, &value)?.bytes);
            inos.push(keys::last_number(&key));
        }
        Ok((inos, sum))
    }

    pub(super) fn volume_named(&self, name: &str) -> Option<VolumeId> {
        let by_id = name.parse::<VolumeId>().ok();
        let found = self.volumes.iter().find(|(id, volume)| {
            let shown = !volume.record.deleting && !self.is_hidden(id);
            shown && (Some(**id) == by_id || volume.record.name == name)
        });
        found.map(|(id, _)| *id)
    }

    pub(super) fn trash_basis(&self, name: &str, asker: &Peer) -> Answer {
        let id = match self.volume_for(name, asker) {
            Ok(id) => id,
            Err((kind, detail)) => return refused(kind, detail),
        };
        let Some(volume) = self.volumes.get(&id) else {
            return refused(RefusalKind::NotFound, format!("there is no volume {name:?}"));
        };
        Answer::TrashBasis(TrashBasis {
            view: self.store.snapshot(),
            volume: id,
            key: volume.record.key.clone(),
            clock_ms: self.clock_ms(),
        })
    }

    pub(super) fn purge_trash(
        &mut self,
        ask: AskId,
        name: &str,
        inos: &[u64],
    ) -> Result<(), StoreError> {
        let refusal = match self.volume_named(name) {
            None => refused(RefusalKind::NotFound, format!("there is no volume {name:?}")),
            Some(_) if inos.len() > PURGE_MAX => {
                let detail = format!("at most {PURGE_MAX} things are purged at once");
                refused(RefusalKind::Invalid, detail)
            }
            Some(volume) => {
                let purged = self.purge(volume, inos, "asked")?;
                self.look_at_trash()?;
                self.commit(crate::store::WriteBatch::new(), Durability::Durable)?;
                return self.then(self.last_seq, Then::Answer(ask, Answer::Purged(purged)));
            }
        };
        self.effects.push(Effect::Answer { ask, answer: refusal });
        Ok(())
    }
}

/// Bytes of fragments that so many bytes of files take.
fn raw_bytes(code: Code, bytes: u64) -> u64 {
    (u128::from(bytes) * code.fragments() as u128 / code.s() as u128) as u64
}
