//! What a provider holds and nothing names: garbage, or not.
//!
//! A fragment's birth is that of its block's placement lease. The *floor* is a birth below which
//! nobody is about to commit a block any more; it rises when leases are old enough and no mount is
//! away that may still have some. A commit of an older block is applied all the same, but its
//! fragments are asked after, and come out of the trash if they went there.
//!
//! Invariants:
//! - judged is the state as it is now, never a snapshot: what a record names, what a repair is making,
//!   what only this fragment can replace is no orphan;
//! - births at or above the floor are too young to judge, and those a restore may have forgotten are
//!   spared for ever;
//! - an orphan is deleted as any other fragment: a `q` key, looked at again when it is sent, and the
//!   provider's trash.

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;
use us_core::ids::{BlockId, VolumeId};
use us_proto::v1::ProviderTable;

use super::event::StateSnapshot;
use super::health::{FragmentState, fragment_state};
use super::members::{FRAGMENTS_A_MESSAGE, Piece};
use super::repair::BlockKey;
use super::{Durability, Engine, Then};
use crate::keys;
use crate::namespace::ApplyError;
use crate::records::{BlockRecord, HoldingRecord, bit, decode, encode, with_bit};
use crate::store::{StoreError, WriteBatch};

/// A mount that was silent for longer does not hold the floor: what it commits later is asked after.
const AWAY_MS: u64 = 24 * 3_600_000;
/// The floor rises in this many steps while leases grow old.
const STEPS: u64 = 8;

/// How births grow old.
#[derive(Debug, Default)]
pub(super) struct Births {
    /// When, and the first birth that was not given by then.
    marks: VecDeque<(u64, u64)>,
    /// The first birth leased for an image that is not committed.
    pub image: Option<u64>,
}

/// A fragment that a provider holds and nothing is known to name.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Stray {
    /// The volume its record says.
    pub volume: VolumeId,
    /// Its block.
    pub block: BlockId,
    /// Which of the block's fragments.
    pub index: u8,
    /// The birth its record says.
    pub birth: u64,
}

/// What to think of a stray fragment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// Its block's record names it.
    Named,
    /// Its block may still be committed.
    Young,
    /// Of a time this directory does not remember.
    Spared,
    /// It is to be deleted already.
    Dying,
    /// A repair is at work on its block, or its named holder is not there to be asked.
    Busy,
    /// Its block has lost just this fragment: it is taken over where that was asked for.
    Wanted,
    /// Garbage; deleted where that was asked for.
    Orphan,
}

/// What a deletion comes to when its block's record is looked at once more.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum SecondLook {
    /// It is sent.
    Go,
    /// The provider is making fragments of the block: later.
    Wait,
    /// The record names the provider again for some of it; these are left to delete.
    Spare {
        /// Bitmap; empty: none.
        left: Bytes,
    },
}

/// What a check of everything starts from.
#[derive(Clone)]
pub struct FsckBasis {
    /// The state.
    pub snapshot: StateSnapshot,
    /// Whom to ask.
    pub providers: ProviderTable,
    /// Fragments of births from here on are young.
    pub floor: u64,
    /// Blocks that are lost.
    pub lost: u64,
}

impl Engine {
    /// Lets the floor rise as far as it may.
    pub(super) fn raise_floor(&mut self) -> Result<(), StoreError> {
        let (now_ms, age_ms) = (self.now_ms(), self.config.garbage_age_ms);
        let is_time = |(at_ms, _): &(u64, u64)| now_ms >= at_ms + (age_ms / STEPS).max(1);
        if self.births.marks.back().is_none_or(is_time) {
            self.births.marks.push_back((now_ms, self.next_birth));
        }
        let mut old = None;
        while self.births.marks.front().is_some_and(|(at_ms, _)| now_ms >= at_ms + age_ms) {
            old = self.births.marks.pop_front().map(|(_, birth)| birth);
        }
        let Some(old) = old else { return Ok(()) };
        let is_away = |session: &super::sessions::Session| {
            let back = session.conn.is_some() && session.greeted;
            session.is_alive()
                && !session.record.read_only
                && !back
                && now_ms < session.heard_ms + AWAY_MS
        };
        let floor = self.births.image.map_or(old, |image| image.min(old));
        if floor <= self.cluster.births_floor || self.sessions.values().any(is_away) {
            return Ok(());
        }
        self.cluster.births_floor = floor;
        self.commit_cluster(Durability::Applied)?;
        Ok(())
    }

    /// A block was committed whose birth is below the floor: its fragments may have been taken for
    /// garbage, so they are asked after, and come back.
    pub(super) fn committed_late(&mut self, key: BlockKey, block: &BlockRecord) {
        tracing::warn!(block = %key.1, birth = block.birth, "committed late: asked after");
        let mut asked: BTreeMap<u32, Vec<Piece>> = BTreeMap::new();
        for (index, provider) in block.providers.iter().enumerate() {
            asked.entry(*provider).or_default().push((key.0, key.1, index as u8));
        }
        for (provider, pieces) in asked {
            self.query_with(provider, pieces, None, true);
        }
    }

    pub(super) fn fsck_basis(&self) -> FsckBasis {
        FsckBasis {
            snapshot: self.state_snapshot(),
            providers: self.provider_table(),
            floor: self.cluster.births_floor,
            lost: self.totals().summary.lost,
        }
    }

    /// What a deletion told long ago comes to now that it is to be sent.
    pub(super) fn look_again(
        &self,
        provider: u32,
        block: &BlockId,
        condemned: &HoldingRecord,
    ) -> Result<SecondLook, StoreError> {
        let Some(volume) = VolumeId::from_slice(&condemned.volume) else {
            // Of a block that is dead as a whole: its id never lives again.
            return Ok(SecondLook::Go);
        };
        let key = (volume, *block);
        if self.repairs.jobs.target_of(&key) == Some(provider) {
            return Ok(SecondLook::Wait);
        }
        let Some(record) = self.stored_block(&key)? else { return Ok(SecondLook::Go) };
        let named = |index: usize| record.providers.get(index) == Some(&provider);
        let left = (0..8 * condemned.fragments.len())
            .filter(|index| bit(&condemned.fragments, *index) && !named(*index))
            .fold(Bytes::new(), |bitmap, index| with_bit(&bitmap, index, true));
        let same = (0..8 * condemned.fragments.len())
            .all(|index| bit(&condemned.fragments, index) == bit(&left, index));
        Ok(if same { SecondLook::Go } else { SecondLook::Spare { left } })
    }

    /// What to think of fragments that `provider` says it holds, as things are now. With `mend`
    /// orphans are to be deleted, and wanted ones are taken over.
    pub(super) fn judge(
        &mut self,
        provider: u32,
        strays: &[Stray],
        mend: bool,
    ) -> Result<Vec<Verdict>, StoreError> {
        let mut verdicts = Vec::with_capacity(strays.len());
        let mut batch = WriteBatch::new();
        let mut wanted = Vec::new();
        for stray in strays.iter().take(FRAGMENTS_A_MESSAGE) {
            let verdict = self.judge_one(provider, stray, &batch)?;
            verdicts.push(verdict);
            match verdict {
                Verdict::Orphan if mend => self.condemn(provider, stray, &mut batch)?,
                Verdict::Wanted if mend => wanted.push(*stray),
                _ => {}
            }
        }
        if !batch.is_empty() {
            let seq = self.commit(batch, Durability::Applied)?;
            self.then(seq, Then::Deletes)?;
        }
        for stray in wanted {
            self.take_over(provider, &stray)?;
        }
        Ok(verdicts)
    }

    fn judge_one(
        &self,
        provider: u32,
        stray: &Stray,
        batch: &WriteBatch,
    ) -> Result<Verdict, StoreError> {
        let key = (stray.volume, stray.block);
        let index = usize::from(stray.index);
        let block = self.stored_block(&key)?;
        let named = block.as_ref().and_then(|block| block.providers.get(index)).copied();
        if named == Some(provider) {
            return Ok(Verdict::Named);
        }
        if self.repairs.jobs.is_running(&key) {
            return Ok(Verdict::Busy);
        }
        let condemned = keys::delete(provider, &stray.block);
        let staged = batch.get(&condemned).cloned().flatten();
        if let Some(value) = staged.map_or_else(|| self.store.get(&condemned), |v| Ok(Some(v)))? {
            let held: HoldingRecord = decode(&condemned, &value)?;
            if bit(&held.fragments, index) {
                return Ok(Verdict::Dying);
            }
        }
        if stray.birth >= self.cluster.births_floor {
            return Ok(Verdict::Young);
        }
        if self.cluster.is_spared(stray.birth) {
            return Ok(Verdict::Spared);
        }
        let (Some(block), Some(holder)) = (block, named) else { return Ok(Verdict::Orphan) };
        let member = self.members.get(&holder);
        let gone = member.is_none_or(|member| member.record.dead);
        Ok(match fragment_state(&block, index, false) {
            FragmentState::Gone => Verdict::Wanted,
            _ if gone => Verdict::Wanted,
            FragmentState::Durable if member.is_some_and(|m| m.is_reachable()) => Verdict::Orphan,
            // What cannot be asked after may turn out to be needed.
            FragmentState::Durable | FragmentState::Pending | FragmentState::Late => Verdict::Busy,
        })
    }

    fn condemn(
        &mut self,
        provider: u32,
        stray: &Stray,
        batch: &mut WriteBatch,
    ) -> Result<(), StoreError> {
        let key = keys::delete(provider, &stray.block);
        let asked = match batch.get(&key) {
            Some(asked) => asked.clone(),
            None => self.store.get(&key)?,
        };
        let asked: HoldingRecord =
            asked.map(|value| decode(&key, &value)).transpose()?.unwrap_or_default();
        self.pending_deletes += i64::from(asked.fragments.is_empty());
        let fragments = with_bit(&asked.fragments, usize::from(stray.index), true);
        let volume = Bytes::copy_from_slice(stray.volume.as_bytes());
        batch.put(key, encode(&HoldingRecord { fragments, volume }));
        metrics::counter!("us_directory_orphans_total").increment(1);
        Ok(())
    }

    /// A block has lost a fragment that lies at a provider where nobody looked for it.
    fn take_over(&mut self, provider: u32, stray: &Stray) -> Result<(), StoreError> {
        let key = (stray.volume, stray.block);
        let index = usize::from(stray.index);
        let Some(block) = self.stored_block(&key)? else { return Ok(()) };
        let Some(from) = block.providers.get(index).copied() else { return Ok(()) };
        let Some(mut tx) = self.tx(stray.volume) else { return Ok(()) };
        tx.relocate(&stray.block, index, from, provider)?;
        let outcome = tx.finish()?;
        self.commit(outcome.batch, Durability::Applied)?;
        self.pending_deletes += outcome.graves as i64;
        self.note_blocks(stray.volume, outcome.blocks);
        self.query_with(provider, vec![(stray.volume, stray.block, stray.index)], None, true);
        Ok(())
    }

    /// Writes anew what is listed of blocks, and lets go of those that nothing refers to. Says of how
    /// many something was wrong.
    pub(super) fn mend(
        &mut self,
        volume: VolumeId,
        blocks: &[(BlockId, u32)],
    ) -> Result<u64, StoreError> {
        let Some(mut tx) = self.tx(volume) else { return Ok(0) };
        let mut mended = 0;
        for (block, provider) in blocks.iter().take(FRAGMENTS_A_MESSAGE) {
            mended += u64::from(tx.mend_block(block, *provider).or_else(broken)?);
        }
        let outcome = tx.finish()?;
        if !outcome.batch.is_empty() {
            self.commit(outcome.batch, Durability::Applied)?;
            self.pending_deletes += outcome.graves as i64;
            self.note_blocks(volume, outcome.blocks);
        }
        Ok(mended)
    }
}

/// A record too broken to be mended is left, and found again.
fn broken(error: ApplyError) -> Result<bool, StoreError> {
    match error {
        ApplyError::Store(error) => Err(error),
        ApplyError::Rule(rule) => {
            tracing::error!(%rule, "a block cannot be mended");
            Ok(false)
        }
    }
}
