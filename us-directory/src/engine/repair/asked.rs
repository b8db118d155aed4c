//! What administrators ask of reconstruction: drains, deaths by hand, scrubs, what-if; and what the
//! log tells when it is done.

use us_proto::v1::StartScrub;
use us_proto::v1::provider_down::Event as Down;

use crate::engine::event::{Answer, RefusalKind};
use crate::engine::events::EventKind;
use crate::engine::health::Reach;
use crate::engine::members::{Member, member_batch};
use crate::engine::{ConnId, Durability, Engine};
use crate::store::StoreError;

impl Engine {
    fn no_provider(provider: u32) -> Answer {
        let detail = format!("there is no provider {provider}");
        Answer::Refused { kind: RefusalKind::NotFound, detail }
    }

    /// Fragments the directory expects at a provider.
    pub(in crate::engine) fn fragments_at(&self, provider: u32) -> u64 {
        self.counts.fragments_at(provider)
    }

    pub(in crate::engine) fn drain(
        &mut self,
        provider: u32,
        undo: bool,
    ) -> Result<Answer, StoreError> {
        let Some(member) = self.members.get(&provider) else {
            return Ok(Self::no_provider(provider));
        };
        if undo && member.record.leaving {
            let detail = format!(
                "provider {provider} leaves by its owner's word: `us-provider leave --undo` there"
            );
            return Ok(Answer::Refused { kind: RefusalKind::Busy, detail });
        }
        self.drain_now(provider, undo)
    }

    /// Begins or ends to empty a provider.
    pub(in crate::engine) fn drain_now(
        &mut self,
        provider: u32,
        undo: bool,
    ) -> Result<Answer, StoreError> {
        let Some(member) = self.members.get_mut(&provider) else {
            return Ok(Self::no_provider(provider));
        };
        let name = member.record.name.clone();
        if member.record.draining != undo {
            return Ok(Answer::Count(self.fragments_at(provider)));
        }
        member.record.draining = !undo;
        let batch = member_batch(provider, &member.record);
        self.commit(batch, Durability::Durable)?;
        if undo {
            self.note_well(provider);
            self.repairs.drains.remove(&provider);
            self.note_event(EventKind::DrainEnded, provider, name)?;
        } else {
            self.repairs.unwell.insert(provider);
            self.repairs.drains.insert(provider);
            self.note_event(EventKind::DrainBegun, provider, name)?;
        }
        self.note_provider(provider);
        self.scan_holdings(provider);
        Ok(Answer::Count(self.fragments_at(provider)))
    }

    pub(in crate::engine) fn give_up_asked(&mut self, provider: u32) -> Result<Answer, StoreError> {
        let Some(member) = self.members.get(&provider) else {
            return Ok(Self::no_provider(provider));
        };
        if member.online {
            let detail = format!(
                "provider {provider} is online: drain it, or stop it before it is given up"
            );
            return Ok(Answer::Refused { kind: RefusalKind::Busy, detail });
        }
        let fragments = self.fragments_at(provider);
        if !member.record.dead {
            self.declare_dead(provider)?;
        }
        Ok(Answer::Count(fragments))
    }

    /// Has providers read all they hold.
    pub(in crate::engine) fn scrub(&mut self, provider: u32) -> Answer {
        if provider != 0 && !self.members.contains_key(&provider) {
            return Self::no_provider(provider);
        }
        let told: Vec<ConnId> = self
            .members
            .iter()
            .filter(|(id, member)| member.online && (provider == 0 || **id == provider))
            .filter_map(|(_, member)| member.conn)
            .collect();
        for conn in &told {
            self.tell(*conn, Down::StartScrub(StartScrub {}));
        }
        Answer::Count(told.len() as u64)
    }

    /// How blocks would be without some providers, in what can be read now.
    pub(in crate::engine) fn what_if(&self, without: &[u32]) -> Answer {
        if let Some(unknown) = without.iter().find(|id| !self.members.contains_key(id)) {
            return Self::no_provider(*unknown);
        }
        let totals = self.counts.totals(|provider| {
            let member = self.members.get(&provider).filter(|_| !without.contains(&provider));
            Reach {
                reachable: member.is_some_and(Member::is_reachable),
                expected: member.is_some_and(Member::counts),
            }
        });
        Answer::WhatIf(totals.summary)
    }

    /// Whether some blocks have fragments that share a provider.
    pub(in crate::engine) fn totals_have_crowds(&self) -> bool {
        self.counts.complete && self.counts.has_crowds()
    }

    /// Says once when a drain, or all repairs, are done.
    pub(in crate::engine) fn note_ends(&mut self) -> Result<(), StoreError> {
        let idle = self.repairs.queue.len() + self.repairs.queue.aside() == 0
            && self.repairs.jobs.is_empty()
            && self.repairs.later.is_empty()
            && !self.is_scanning();
        if !idle {
            return Ok(());
        }
        if self.repairs.done.0 > self.repairs.told {
            let blocks = self.repairs.done.0 - self.repairs.told;
            self.repairs.told = self.repairs.done.0;
            self.note_event(EventKind::RepairsDone, 0, format!("{blocks} fragments were made"))?;
        }
        if !self.counts.complete || self.repairs.drains.is_empty() {
            return Ok(());
        }
        let empty = |provider: &u32| self.fragments_at(*provider) == 0;
        let drained: Vec<u32> = self.repairs.drains.iter().copied().filter(empty).collect();
        for provider in drained {
            self.repairs.drains.remove(&provider);
            self.note_event(EventKind::DrainDone, provider, "nothing is left there".to_owned())?;
        }
        Ok(())
    }
}
