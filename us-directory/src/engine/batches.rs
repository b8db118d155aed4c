//! Batches of mutations: applied whole, acknowledged applied and later durable.

use us_core::daemon::logging::RequestId;
use us_proto::v1::mutation::Op;
use us_proto::v1::session_down::Event as Down;
use us_proto::v1::{Applied, Batch, Durable};

use super::leases::Level;
use super::{Durability, Engine};
use crate::keys;
use crate::namespace::{ApplyError, Authority, Outcome, Rule};
use crate::store::{StoreError, WriteBatch};

/// The most mutations a batch may have.
pub const BATCH_MUTATIONS_MAX: usize = 4096;
/// The most requests a batch may name for the logs.
const TRACES_MAX: usize = 64;

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
        if batch.traces.len() > TRACES_MAX {
            let detail = format!("{} requests named in one batch", batch.traces.len());
            return self.refuse(session, detail);
        }
        if batch.mutations.len() > BATCH_MUTATIONS_MAX {
            let detail = format!("{} mutations in one batch", batch.mutations.len());
            return self.refuse(session, detail);
        }
        if known.record.read_only && !batch.mutations.is_empty() {
            return self.refuse(session, "a read-only session changes nothing".to_owned());
        }
        match self.apply(session, batch) {
            Ok(outcome) => self.applied(session, batch, outcome),
            Err(ApplyError::Store(error)) => Err(error),
            Err(ApplyError::Rule(rule)) => {
                self.refuse(session, format!("batch {}: {rule}", batch.number))
            }
        }
    }

    fn apply(&self, session: u64, batch: &Batch) -> Result<Outcome, ApplyError> {
        let known = self.sessions.get(&session).ok_or(Rule::Malformed { field: "session" })?;
        let mut tx = self.tx(known.volume).ok_or(Rule::Malformed { field: "volume" })?;
        let who = SessionAuthority { engine: self, session };
        for mutation in &batch.mutations {
            tx.apply(&who, mutation)?;
        }
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
        self.note_recent(session, volume, &outcome.touched, seq);
        self.note_blocks(volume, outcome.blocks);
        for ino in &outcome.created {
            self.leases.created(session, &(volume, *ino));
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
