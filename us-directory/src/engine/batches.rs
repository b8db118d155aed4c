//! Batches of mutations: applied whole, acknowledged applied and later durable.

use bytes::Bytes;
use us_core::daemon::logging::RequestId;
use us_core::ids::VolumeId;
use us_core::limits::{BATCH_MUTATIONS_MAX, BATCH_TRACES_MAX};
use us_proto::v1::mutation::Op;
use us_proto::v1::session_down::Event as Down;
use us_proto::v1::{Applied, Batch, Durable, Mutation};

use super::leases::Level;
use super::{Durability, Engine};
use crate::keys;
use crate::namespace::{ApplyError, Authority, FILE_BYTES_MAX, Outcome, Rule};
use crate::store::{StoreError, WriteBatch};

/// The most bytes of keys and values one batch may change: far below a record of the journal.
const RECORD_BYTES_MAX: usize = 256 << 20;
/// Chunks freed in one commit ahead of a batch that cuts more.
const FREE_SLICE: usize = 256;

/// What a session may do, for the namespace.
struct SessionAuthority<'e> {
    engine: &'e Engine,
    session: u64,
}

impl Authority for SessionAuthority<'_> {
    fn session(&self) -> u64 {
        self.session
    }

    fn exclusive(&self, ino: u64) -> bool {
        let known = self.engine.sessions.get(&self.session);
        known.is_some_and(|known| {
            self.engine.leases.level(self.session, &(known.volume, ino)) == Level::Exclusive
        })
    }

    fn may_create(&self, ino: u64) -> bool {
        let known = self.engine.sessions.get(&self.session);
        known.is_some_and(|known| {
            let mut ranges = known.record.inodes.iter();
            ranges.any(|range| ino >= range.first && ino - range.first < range.count)
        })
    }

    fn open_elsewhere(&self, ino: u64) -> Vec<u64> {
        let Some(own) = self.engine.sessions.get(&self.session) else { return Vec::new() };
        let others = self.engine.sessions.iter();
        others
            .filter(|(id, other)| {
                **id != self.session
                    && other.is_alive()
                    && other.volume == own.volume
                    && other.open.contains(&ino)
            })
            .map(|(id, _)| *id)
            .collect()
    }

    fn provider_exists(&self, provider: u32) -> bool {
        // One that has left may still be named by a place leased before: its fragment is made again.
        provider > 0 && provider < self.engine.cluster.next_provider
    }

    fn birth_given(&self, birth: u64) -> bool {
        birth > 0 && birth < self.engine.cluster.births_end
    }

    fn next_grant(&self) -> u64 {
        self.engine.leases.next_grant()
    }
}

impl Engine {
    pub(super) fn batch(&mut self, session: u64, batch: &Batch) -> Result<(), StoreError> {
        let Some(known) = self.sessions.get(&session) else { return Ok(()) };
        let applied = known.record.applied;
        if batch.number <= applied {
            // Sent again after a reconnect: it is in already.
            let told = known.undurable.front().map_or(applied, |(_, first)| first - 1);
            self.send_session(session, Down::Applied(Applied { number: applied }));
            self.send_session(session, Down::Durable(Durable { number: told }));
            return Ok(());
        }
        if batch.number != applied + 1 {
            let detail = format!("batch {} came where {} is next", batch.number, applied + 1);
            return self.refuse(session, detail);
        }
        if batch.traces.len() > BATCH_TRACES_MAX {
            let detail = format!("{} requests named in one batch", batch.traces.len());
            return self.refuse(session, detail);
        }
        if batch.mutations.len() > BATCH_MUTATIONS_MAX {
            let detail = format!("{} mutations in one batch", batch.mutations.len());
            return self.refuse(session, detail);
        }
        // Letting go of an inode that another mount removed changes nothing of the volume.
        let releases = |mutation: &Mutation| matches!(mutation.op, Some(Op::Release(_)));
        if known.record.read_only && !batch.mutations.iter().all(releases) {
            return self.refuse(session, "a read-only session changes nothing".to_owned());
        }
        self.free_ahead(session, batch)?;
        match self.apply(session, batch) {
            Ok(outcome) if outcome.batch.bytes() > RECORD_BYTES_MAX => {
                let bytes = outcome.batch.bytes();
                self.refuse(session, format!("batch {} changes {bytes} bytes", batch.number))
            }
            Ok(outcome) => self.applied(session, batch, outcome),
            Err(ApplyError::Store(error)) => Err(error),
            Err(ApplyError::Rule(rule)) => {
                self.refuse(session, format!("batch {}: {rule}", batch.number))
            }
        }
    }

    /// Frees most of what a batch cuts off huge files in commits of their own, before it is applied:
    /// all at once would be more than memory and a record of the journal take. The file keeps its size
    /// until then; after a crash in between, a part of what was to go is a hole.
    fn free_ahead(&mut self, session: u64, batch: &Batch) -> Result<(), StoreError> {
        let Some(volume) = self.sessions.get(&session).map(|known| known.volume) else {
            return Ok(());
        };
        let mut cuts = Vec::new();
        for mutation in &batch.mutations {
            match &mutation.op {
                Some(Op::SetAttributes(set)) => {
                    cuts.extend(set.size.map(|from| (set.ino, from, None)))
                }
                Some(Op::CommitData(data)) => {
                    let new = |block: &Bytes| data.blocks.iter().any(|made| made.block == *block);
                    if data.extents.iter().any(|extent| {
                        !extent.expected_block.is_empty()
                            || !extent.block.is_empty() && !new(&extent.block)
                    }) {
                        // It refers to what is stored: to a block that only the cut-off part names?
                        break;
                    }
                    let holes = data.extents.iter().filter(|e| e.block.is_empty() && !e.zero);
                    cuts.extend(holes.map(|extent| {
                        let end = extent.offset.saturating_add(extent.length);
                        (extent.ino, extent.offset, Some(end))
                    }));
                }
                _ => {}
            }
        }
        for (ino, from, to) in cuts {
            if self.leases.level(session, &(volume, ino)) != Level::Exclusive {
                continue;
            }
            while self.free_slice_ahead(session, volume, (ino, from, to))? {}
        }
        Ok(())
    }

    fn free_slice_ahead(
        &mut self,
        session: u64,
        volume: VolumeId,
        (ino, from, to): (u64, u64, Option<u64>),
    ) -> Result<bool, StoreError> {
        let Some(mut tx) = self.tx(volume) else { return Ok(false) };
        match tx.free_slice(ino, from, to.unwrap_or(FILE_BYTES_MAX), FREE_SLICE) {
            Ok(true) => {}
            // A rule it breaks it breaks again when the batch is applied.
            Ok(false) | Err(ApplyError::Rule(_)) => return Ok(false),
            Err(ApplyError::Store(error)) => return Err(error),
        }
        let outcome = tx.finish()?;
        let seq = self.commit(outcome.batch, Durability::Applied)?;
        self.pending_deletes += outcome.graves as i64;
        self.note_recent(session, volume, &[ino], seq);
        self.note_blocks(volume, outcome.blocks);
        Ok(true)
    }

    fn apply(&self, session: u64, batch: &Batch) -> Result<Outcome, ApplyError> {
        let known = self.sessions.get(&session).ok_or(Rule::Malformed { field: "session" })?;
        let mut tx = self.tx(known.volume).ok_or(Rule::Malformed { field: "volume" })?;
        let who = SessionAuthority { engine: self, session };
        for mutation in &batch.mutations {
            tx.apply(&who, mutation)?;
        }
        self.check_quota(&known.volume, &tx)?;
        let mut record = known.record.clone();
        record.applied = batch.number;
        tx.put(keys::session(session), &record);
        Ok(tx.finish()?)
    }

    fn applied(&mut self, session: u64, batch: &Batch, outcome: Outcome) -> Result<(), StoreError> {
        let seq = self.commit(outcome.batch, Durability::Applied)?;
        let Some(known) = self.sessions.get_mut(&session) else { return Ok(()) };
        known.record.applied = batch.number;
        let volume = known.volume;
        if seq > self.durable {
            known.undurable.push_back((seq, batch.number));
        }
        for mutation in &batch.mutations {
            if let Some(Op::Release(release)) = &mutation.op {
                known.open.remove(&release.ino);
            }
        }
        self.pending_deletes += outcome.graves as i64;
        self.note_committed(session, batch);
        self.note_recent(session, volume, &outcome.touched, seq);
        self.note_blocks(volume, outcome.blocks);
        for ino in &outcome.restored {
            self.leases.forget_everyone(&(volume, *ino));
        }
        for ino in &outcome.created {
            for other in self.leases.created(session, &(volume, *ino)) {
                self.refuse(other, format!("it held inode {ino} before that was made"))?;
            }
        }
        for ino in &outcome.deleted {
            self.leases.forget(session, &(volume, *ino));
            self.wake_inode(&(volume, *ino));
        }
        metrics::counter!("us_directory_batches_total").increment(1);
        metrics::counter!("us_directory_mutations_total").increment(batch.mutations.len() as u64);
        for trace in &batch.traces {
            let (request, batch) = (RequestId(*trace), batch.number);
            tracing::debug!(%request, session, batch, seq, "applied");
        }
        self.send_session(session, Down::Applied(Applied { number: batch.number }));
        if seq <= self.durable {
            self.send_session(session, Down::Durable(Durable { number: batch.number }));
        }
        Ok(())
    }

    /// Tells sessions how far their batches are durable.
    pub(super) fn tell_durable(&mut self) {
        let durable = self.durable;
        let mut told = Vec::new();
        for (id, session) in &mut self.sessions {
            let mut number = None;
            while session.undurable.front().is_some_and(|(seq, _)| *seq <= durable) {
                number = session.undurable.pop_front().map(|(_, number)| number);
            }
            told.extend(number.map(|number| (*id, number)));
        }
        for (session, number) in told {
            self.send_session(session, Down::Durable(Durable { number }));
        }
    }

    /// Makes everything applied so far durable now.
    pub(super) fn sync(&mut self) -> Result<(), StoreError> {
        if self.last_seq > self.durable {
            self.sync_store()?;
        }
        Ok(())
    }

    pub(super) fn sync_store(&mut self) -> Result<(), StoreError> {
        self.commit(WriteBatch::new(), Durability::Durable)?;
        Ok(())
    }
}
