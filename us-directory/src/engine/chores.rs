//! What the directory does as time passes: freeing deleted files, deleting fragments of dead blocks,
//! asking after fragments that were not confirmed. Every chore works in bounded slices.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashSet};

use bytes::Bytes;
use us_core::ids::{BlockId, VolumeId};
use us_proto::v1::provider_down::Event as Down;
use us_proto::v1::{DeleteFragments, FragmentId};

use super::garbage::SecondLook;
use super::health::CountedSlice;
use super::locks::LockEvent;
use super::members::{FRAGMENTS_A_MESSAGE, Piece};
use super::{Durability, Engine, Then};
use crate::keys;
use crate::namespace::{ApplyError, Outcome};
use crate::records::{BlockRecord, GraveRecord, HoldingRecord, bit, decode, encode, with_bit};
use crate::store::{KeyRange, StoreError, WriteBatch};

/// Chunks and inodes freed in one tick.
const REAP_SLICE: usize = 256;
/// Dead blocks handed to their providers for deletion in one slow tick.
const GRAVES_SLICE: usize = 4096;
/// Unsettled blocks looked at in one slow tick.
const SETTLE_SLICE: usize = 4096;
/// Keys of a deleted volume removed in one tick.
const VOLUME_KEYS_SLICE: usize = 4096;
/// How long a provider may take to confirm deletions before it is asked again.
const DELETE_ANSWER_MS: u64 = 60_000;
/// How often the slow chores run.
const SLOW_TICK_MS: u64 = 500;
/// How far the stored clock may lag behind while something waits for it.
const CLOCK_LAG_MS: u64 = 10_000;
/// How far it may while something lies in the trash.
const TRASH_CLOCK_LAG_MS: u64 = 600_000;

/// A block with fragments that are not confirmed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Unsettled {
    /// For too long: it counts as lacking redundancy.
    pub late: bool,
    next_ms: u64,
}

impl Engine {
    pub(super) fn tick(&mut self) -> Result<(), StoreError> {
        self.check_parked()?;
        self.step_locks(LockEvent::Tick)?;
        self.reap()?;
        self.run_repairs()?;
        if self.now_ms() < self.last_slow_tick_ms + SLOW_TICK_MS {
            return Ok(());
        }
        self.last_slow_tick_ms = self.now_ms();
        self.check_members()?;
        self.count_periods()?;
        self.count_presence();
        self.learn_presence()?;
        self.check_clocks()?;
        self.note_ends()?;
        self.keeping_chores()?;
        self.check_unsettled()?;
        self.expand_graves()?;
        self.ask_deletes_again()?;
        self.raise_floor()?;
        self.retain_chore()?;
        self.audit_chore()?;
        self.leave_chore()?;
        self.registry_chore()?;
        self.trash_chore()?;
        self.clean_chore()?;
        self.tell_spread()?;
        if std::mem::take(&mut self.deletes_wait) {
            self.send_deletes()?;
        }
        let lag_ms = if self.pending_deletes > 0 { CLOCK_LAG_MS } else { TRASH_CLOCK_LAG_MS };
        let needed = self.pending_deletes > 0 || self.trash.files > 0;
        if needed && self.clock_ms() > self.clock_stored_ms + lag_ms {
            self.commit_cluster(Durability::Applied)?;
        }
        Ok(())
    }

    /// Commits what a chore did.
    pub(super) fn chore_done(
        &mut self,
        volume: VolumeId,
        outcome: Outcome,
    ) -> Result<(), StoreError> {
        if outcome.batch.is_empty() {
            return Ok(());
        }
        self.commit(outcome.batch, Durability::Applied)?;
        self.pending_deletes += outcome.graves as i64;
        self.note_blocks(volume, outcome.blocks);
        Ok(())
    }

    fn reap(&mut self) -> Result<(), StoreError> {
        let volumes: Vec<(VolumeId, bool)> =
            self.volumes.iter().map(|(id, volume)| (*id, volume.record.deleting)).collect();
        for (volume, deleting) in volumes {
            if deleting {
                self.reap_volume(volume)?;
                continue;
            }
            let range = KeyRange::prefix(&keys::tag(&volume, b'k'));
            let doomed = self.store.scan(&range, REAP_SLICE)?;
            let Some(mut tx) = self.tx(volume).filter(|_| !doomed.is_empty()) else { continue };
            let mut left = REAP_SLICE;
            for (key, _) in &doomed {
                left -= tx.reap(keys::last_number(key), left).or_else(no_rule)?.min(left);
                if left == 0 {
                    break;
                }
            }
            let outcome = tx.finish()?;
            self.chore_done(volume, outcome)?;
        }
        Ok(())
    }

    fn reap_volume(&mut self, volume: VolumeId) -> Result<(), StoreError> {
        let Some(mut tx) = self.tx(volume) else { return Ok(()) };
        if tx.reap_volume(REAP_SLICE).or_else(no_rule)? > 0 {
            let outcome = tx.finish()?;
            return self.chore_done(volume, outcome);
        }
        drop(tx);
        let range = KeyRange::prefix(&keys::volume_prefix(&volume));
        let pairs = self.store.scan(&range, VOLUME_KEYS_SLICE)?;
        let mut batch = WriteBatch::new();
        let last = pairs.len() < VOLUME_KEYS_SLICE;
        pairs.into_iter().for_each(|(key, _)| batch.delete(key));
        if last {
            batch.delete(keys::volume(&volume));
            self.volumes.remove(&volume);
            // None of its sessions is alive: their records go too.
            let here = self.sessions.iter().filter(|(_, known)| known.volume == volume);
            let here: Vec<u64> = here.map(|(session, _)| *session).collect();
            for session in here {
                batch.delete(keys::session(session));
                self.sessions.remove(&session);
            }
        }
        self.commit(batch, Durability::Applied)?;
        Ok(())
    }

    // ------------------------------------------------------------ deleting fragments

    /// Turns the graves that are due into deletions for each provider.
    fn expand_graves(&mut self) -> Result<(), StoreError> {
        let range = KeyRange {
            from: keys::tag(&keys::CLUSTER, b'g'),
            to: Some(keys::graves_end(self.clock_ms())),
        };
        let due = self.store.scan(&range, GRAVES_SLICE)?;
        if due.is_empty() {
            return Ok(());
        }
        let mut batch = WriteBatch::new();
        for (key, value) in due {
            let grave: GraveRecord = decode(&key, &value)?;
            let Some(block) = keys::last_block(&key) else { continue };
            let mut held: BTreeMap<u32, Bytes> = BTreeMap::new();
            // Fragments that moved may have moved back since.
            let volume = VolumeId::from_slice(&grave.volume);
            let live = match volume {
                Some(volume) => self.stored_block(&(volume, block))?,
                None => None,
            };
            for (index, provider) in grave.providers.iter().enumerate() {
                let named = live.as_ref().and_then(|block| block.providers.get(index));
                if *provider == 0 || named == Some(provider) {
                    continue;
                }
                let bitmap = held.entry(*provider).or_default();
                *bitmap = with_bit(bitmap, index, true);
            }
            self.pending_deletes += held.len() as i64 - 1;
            for (provider, fragments) in held {
                let key = keys::delete(provider, &block);
                let asked = match batch.get(&key) {
                    Some(asked) => asked.clone(),
                    None => self.store.get(&key)?,
                };
                let asked: HoldingRecord =
                    asked.map(|value| decode(&key, &value)).transpose()?.unwrap_or_default();
                self.pending_deletes -= i64::from(!asked.fragments.is_empty());
                let fragments = (0..8 * asked.fragments.len())
                    .filter(|index| bit(&asked.fragments, *index))
                    .fold(fragments, |both, index| with_bit(&both, index, true));
                let volume = grave.volume.clone();
                batch.put(key, encode(&HoldingRecord { fragments, volume }));
            }
            batch.delete(key);
        }
        let seq = self.commit(batch, Durability::Applied)?;
        self.then(seq, Then::Deletes)
    }

    /// Sends every provider that can hear its next page of deletions.
    pub(super) fn send_deletes(&mut self) -> Result<(), StoreError> {
        let ready: Vec<u32> = self
            .members
            .iter()
            .filter(|(_, member)| member.online && member.deleting.is_none())
            .map(|(provider, _)| *provider)
            .collect();
        for provider in ready {
            self.send_deletes_to(provider)?;
        }
        Ok(())
    }

    /// Sends a provider its next page of deletions.
    pub(super) fn send_deletes_to(&mut self, provider: u32) -> Result<(), StoreError> {
        let range = KeyRange::prefix(&keys::deletes(provider));
        let pairs = self.store.scan(&range, FRAGMENTS_A_MESSAGE)?;
        let (mut sent, mut fragments) = (Vec::new(), Vec::new());
        let mut spared = WriteBatch::new();
        for (key, value) in pairs {
            let mut held: HoldingRecord = decode(&key, &value)?;
            let Some(block) = keys::last_block(&key) else { continue };
            match self.look_again(provider, &block, &held)? {
                SecondLook::Go => {}
                SecondLook::Wait => {
                    self.deletes_wait = true;
                    continue;
                }
                SecondLook::Spare { left } if left.is_empty() => {
                    self.pending_deletes -= 1;
                    spared.delete(key);
                    continue;
                }
                SecondLook::Spare { left } => {
                    held.fragments = left;
                    spared.put(key.clone(), encode(&held));
                }
            }
            let indexes = (0..=u8::MAX).filter(|index| bit(&held.fragments, *index as usize));
            let indexes: Vec<u8> = indexes.collect();
            if fragments.len() + indexes.len() > FRAGMENTS_A_MESSAGE {
                break;
            }
            let block = Bytes::copy_from_slice(block.as_bytes());
            let named = indexes.iter().map(|index| u32::from(*index));
            fragments.extend(named.map(|index| FragmentId { block: block.clone(), index }));
            sent.push(key);
        }
        if !spared.is_empty() {
            self.commit(spared, Durability::Applied)?;
        }
        if sent.is_empty() {
            return Ok(());
        }
        let ticket = self.next_query;
        self.next_query += 1;
        let Some(member) = self.members.get_mut(&provider) else { return Ok(()) };
        let Some(conn) = member.conn else { return Ok(()) };
        member.deleting = Some((ticket, sent));
        member.deleting_since_ms = self.at.now_ms;
        self.tell(conn, Down::Delete(DeleteFragments { ticket, fragments }));
        Ok(())
    }

    /// Deletions that were not confirmed in time are sent again: to delete twice harms nobody.
    fn ask_deletes_again(&mut self) -> Result<(), StoreError> {
        let now_ms = self.now_ms();
        let late = self.members.values_mut().filter(|member| {
            member.deleting.is_some() && now_ms >= member.deleting_since_ms + DELETE_ANSWER_MS
        });
        let late = late.map(|member| member.deleting = None).count();
        if late == 0 {
            return Ok(());
        }
        metrics::counter!("us_directory_deletes_repeated_total").increment(late as u64);
        self.send_deletes()
    }

    pub(super) fn deleted(&mut self, provider: u32, ticket: u64) -> Result<(), StoreError> {
        let Some(member) = self.members.get_mut(&provider) else { return Ok(()) };
        let Some((_, sent)) = member.deleting.take_if(|(asked, _)| *asked == ticket) else {
            return Ok(());
        };
        let mut batch = WriteBatch::new();
        self.pending_deletes -= sent.len() as i64;
        metrics::counter!("us_directory_deletes_total").increment(sent.len() as u64);
        sent.into_iter().for_each(|key| batch.delete(key));
        self.commit(batch, Durability::Applied)?;
        self.send_deletes_to(provider)
    }

    // ------------------------------------------------------------ settling

    /// Starts to wait for the confirmation of a block's fragments.
    pub(super) fn watch(&mut self, key: (VolumeId, BlockId)) {
        let next_ms = self.now_ms() + self.config.settle_ms;
        if let Entry::Vacant(entry) = self.unsettled.entry(key) {
            entry.insert(Unsettled { late: false, next_ms });
            self.settle_order.insert((next_ms, key.0, key.1));
        }
    }

    /// Every fragment of the block is confirmed, or the block is gone.
    pub(super) fn settled(&mut self, key: &(VolumeId, BlockId)) {
        if let Some(unsettled) = self.unsettled.remove(key) {
            self.settle_order.remove(&(unsettled.next_ms, key.0, key.1));
        }
    }

    pub(super) fn stored_block(
        &self,
        key: &(VolumeId, BlockId),
    ) -> Result<Option<BlockRecord>, StoreError> {
        let stored = keys::block(&key.0, &key.1);
        self.store.get(&stored)?.map(|value| decode(&stored, &value)).transpose()
    }

    /// Asks after fragments that were not confirmed in time.
    fn check_unsettled(&mut self) -> Result<(), StoreError> {
        let now_ms = self.now_ms();
        let mut asked: BTreeMap<u32, Vec<Piece>> = BTreeMap::new();
        for _ in 0..SETTLE_SLICE {
            let Some(first) = self.settle_order.first().copied() else { break };
            if first.0 > now_ms {
                break;
            }
            self.settle_order.remove(&first);
            let key = (first.1, first.2);
            let next_ms = now_ms + self.config.settle_ms;
            let Some(block) = self.stored_block(&key)? else {
                self.unsettled.remove(&key);
                continue;
            };
            let Some(unsettled) = self.unsettled.get_mut(&key) else { continue };
            unsettled.next_ms = next_ms;
            if !std::mem::replace(&mut unsettled.late, true) {
                self.counts.remove(&block, false);
                self.counts.add(&block, true);
            }
            self.settle_order.insert((next_ms, key.0, key.1));
            self.consider(key, Some(&block));
            for (provider, piece) in pending(&key, &block) {
                asked.entry(provider).or_default().push(piece);
            }
        }
        for (provider, pieces) in asked {
            for page in pieces.chunks(FRAGMENTS_A_MESSAGE) {
                self.query(provider, page.to_vec(), None);
            }
        }
        Ok(())
    }

    /// A provider is back: what it had not confirmed is asked at the next chance.
    pub(super) fn ask_unsettled_of(&mut self, provider: u32) {
        let now_ms = self.now_ms();
        let late: Vec<(VolumeId, BlockId)> = self
            .unsettled
            .iter()
            .filter(|(_, unsettled)| unsettled.late)
            .map(|(key, _)| *key)
            .collect();
        tracing::debug!(provider, blocks = late.len(), "asking again after late fragments");
        for key in late {
            if let Some(unsettled) = self.unsettled.get_mut(&key) {
                self.settle_order.remove(&(unsettled.next_ms, key.0, key.1));
                unsettled.next_ms = now_ms;
                self.settle_order.insert((now_ms, key.0, key.1));
            }
        }
    }

    // ------------------------------------------------------------ counting

    /// The background count has got further.
    pub(super) fn counted(&mut self, mut slice: CountedSlice) {
        for (signature, blocks) in &slice.signatures {
            self.placer.counted(&signature.providers(), *blocks);
        }
        self.counts.merge(&mut slice);
        self.pending_deletes += slice.deletes as i64;
        for key in slice.unsettled {
            if !self.changed_while_counting.contains(&key) {
                self.watch(key);
            }
        }
        for (key, sparse) in slice.sparse {
            if !self.changed_while_counting.contains(&key) {
                self.cleaning.found(key, sparse);
            }
        }
        for key in slice.sample {
            if !self.changed_while_counting.contains(&key) {
                self.audits.pivots.add(key);
            }
        }
        if slice.last {
            self.changed_while_counting = HashSet::new();
            self.scan_blocks();
            tracing::info!(signatures = self.counts.signatures(), "blocks counted");
        }
    }
}

/// The fragments of a block that wait for confirmation, with their providers.
fn pending(key: &(VolumeId, BlockId), block: &BlockRecord) -> impl Iterator<Item = (u32, Piece)> {
    let waiting = block.providers.iter().enumerate().filter(|(index, _)| {
        !bit(&block.durable, *index) && !bit(&block.damaged, *index) && !bit(&block.missing, *index)
    });
    waiting.map(|(index, provider)| (*provider, (key.0, key.1, index as u8)))
}

/// A chore breaks no rule of the namespace; one that does is a damaged record: it is left alone.
pub(super) fn no_rule<T: Default>(error: ApplyError) -> Result<T, StoreError> {
    match error {
        ApplyError::Store(error) => Err(error),
        ApplyError::Rule(rule) => {
            tracing::error!(%rule, "freeing what was deleted found a broken record");
            Ok(T::default())
        }
    }
}
