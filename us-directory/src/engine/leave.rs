//! Providers that leave for good by their owner's word: emptied as by a drain, told how far it is, and
//! taken out of membership when nothing is left that anybody could ask them for.

use us_core::ids::ProviderId;
use us_proto::v1::LeaveProgress;
use us_proto::v1::provider_down::Event as Down;

use super::events::EventKind;
use super::members::member_batch;
use super::{Durability, Effect, Engine, Then};
use crate::keys;
use crate::store::{KeyRange, StoreError, WriteBatch};

/// How often a leaving provider hears how far it is.
const TELL_EVERY_MS: u64 = 1_000;
/// Deletions of a provider that leaves forgotten in one step.
const FORGET_SLICE: usize = 4096;

impl Engine {
    /// A provider's owner says that it leaves, or that it stays.
    pub(super) fn leave(&mut self, provider: u32, leaving: bool) -> Result<(), StoreError> {
        let Some(member) = self.members.get_mut(&provider) else { return Ok(()) };
        if member.record.leaving == leaving {
            return Ok(());
        }
        member.record.leaving = leaving;
        member.empty_since_ms = None;
        let batch = member_batch(provider, &member.record);
        self.commit(batch, Durability::Durable)?;
        self.drain_now(provider, !leaving)?;
        Ok(())
    }

    /// Tells those that leave how far it is, and lets go of those of which nothing is left.
    pub(super) fn leave_chore(&mut self) -> Result<(), StoreError> {
        let leaving = self.members.iter().filter(|(_, m)| m.record.leaving && m.online);
        let leaving: Vec<u32> = leaving.map(|(provider, _)| *provider).collect();
        for provider in leaving {
            let left = self.left_at(provider)?;
            let (now_ms, grace_ms) = (self.now_ms(), 2 * self.config.lease_ms);
            let left_s = self.repair_status().left_s;
            let Some(member) = self.members.get_mut(&provider) else { continue };
            if left > 0 {
                member.empty_since_ms = None;
            }
            // Readers may still have a map that names it.
            let since_ms = (left == 0).then(|| *member.empty_since_ms.get_or_insert(now_ms));
            if since_ms.is_some_and(|since_ms| now_ms >= since_ms + grace_ms) {
                self.let_go(provider)?;
                continue;
            }
            if now_ms >= member.told_left_ms + TELL_EVERY_MS {
                member.told_left_ms = now_ms;
                let Some(conn) = member.conn else { continue };
                let grace_s = since_ms.map(|at_ms| (at_ms + grace_ms - now_ms).div_ceil(1000));
                let left_s = grace_s.unwrap_or(left_s);
                let said = LeaveProgress { fragments_left: left, left_s, left: false };
                self.tell(conn, Down::Leaving(said));
            }
        }
        Ok(())
    }

    /// Fragments that records name at a provider; before everything is counted more than none.
    fn left_at(&self, provider: u32) -> Result<u64, StoreError> {
        let counted = self.counts.fragments_at(provider);
        if counted > 0 || !self.counts.complete {
            return Ok(counted.max(1));
        }
        Ok(u64::from(self.holds_something(provider)?))
    }

    /// Whether any record names the provider.
    pub(super) fn holds_something(&self, provider: u32) -> Result<bool, StoreError> {
        for volume in self.volumes.keys() {
            let range = KeyRange::prefix(&keys::holdings(volume, provider));
            if !self.store.scan(&range, 1)?.is_empty() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn let_go(&mut self, provider: u32) -> Result<(), StoreError> {
        let range = KeyRange::prefix(&keys::deletes(provider));
        let condemned = self.store.scan(&range, FORGET_SLICE)?;
        let mut batch = WriteBatch::new();
        self.pending_deletes -= condemned.len() as i64;
        let is_last = condemned.len() < FORGET_SLICE;
        condemned.into_iter().for_each(|(key, _)| batch.delete(key));
        if !is_last {
            self.commit(batch, Durability::Applied)?;
            return Ok(());
        }
        let Some(mut member) = self.members.remove(&provider) else { return Ok(()) };
        batch.delete(keys::provider(provider));
        let conn = member.conn.take();
        self.placer.forget(ProviderId(provider));
        self.repairs.unwell.remove(&provider);
        self.queries.retain(|_, query| query.provider != provider);
        if let Some(keeping) = &mut self.keeping {
            keeping.copies.gone(provider);
        }
        self.root_outdated();
        self.note_event(EventKind::ProviderLeft, provider, member.record.name)?;
        let seq = self.commit(batch, Durability::Durable)?;
        match conn {
            Some(conn) => {
                self.connections.remove(&conn);
                self.then(seq, Then::Left { conn })
            }
            None => Ok(()),
        }
    }

    /// It is durable that the provider is none any more: it may know, and go.
    pub(super) fn say_left(&mut self, conn: super::ConnId) {
        let said = LeaveProgress { fragments_left: 0, left_s: 0, left: true };
        self.tell(conn, Down::Leaving(said));
        self.effects.push(Effect::End { conn });
    }
}
