//! Marks that last: how often a provider claimed a fragment that the directory itself then found
//! wrong or not there, and what follows.
//!
//! A provider with marks is not given again what it lost, while there is anybody else. One with
//! [`MARKS_MAX`] of them is *distrusted*: nothing new goes there, what it holds does not count and is
//! made again elsewhere, as if it were dead. It is read from where nobody else has enough, since all
//! that comes is verified. Only an administrator takes that back.

use bytes::Bytes;

use super::audit::Loss;
use super::event::{Answer, RefusalKind};
use super::events::EventKind;
use super::members::member_batch;
use super::{Durability, Engine};
use crate::records::ProviderRecord;
use crate::store::StoreError;

/// Fragments of different blocks found so that make a provider distrusted. One may be a fault that we
/// do not know of yet, two may have one cause; a disk that errs says so by its sums, and is not
/// counted here. A liar about a tenth of what it holds reaches three within half a day.
pub const MARKS_MAX: u32 = 3;
/// Blocks remembered, so that none counts twice.
const BLOCKS_KEPT: usize = 16;

impl ProviderRecord {
    /// Notes a block of which a fragment was found wrong there; false where that is known.
    fn mark(&mut self, block: Bytes) -> bool {
        if self.found_blocks.contains(&block) {
            return false;
        }
        if self.found_blocks.len() >= BLOCKS_KEPT {
            self.found_blocks.remove(0);
        }
        self.found_blocks.push(block);
        self.found_wrong = self.found_wrong.saturating_add(1);
        true
    }
}

impl Engine {
    /// The directory itself has seen that the provider does not have what it claims.
    pub(super) fn found_wrong(&mut self, loss: &Loss<'_>) -> Result<(), StoreError> {
        let Loss { provider, piece: (_, block, index), detail, .. } = *loss;
        let Some(member) = self.members.get_mut(&provider) else { return Ok(()) };
        let mut marks = member.record.found_wrong;
        if member.record.mark(Bytes::copy_from_slice(block.as_bytes())) {
            marks = member.record.found_wrong;
            let batch = member_batch(provider, &member.record);
            self.commit(batch, Durability::Durable)?;
        }
        tracing::warn!(provider, %block, index, marks, detail, "found wrong");
        // The mark first: what is lost here is not made again here.
        let told = format!("found by an audit: {detail}");
        self.lost_by_audit(&Loss { detail: &told, ..*loss })?;
        if marks >= MARKS_MAX {
            let why = format!("{marks} fragments that it claimed were wrong or not there");
            self.distrust(provider, &why)?;
        }
        Ok(())
    }

    /// Nothing that the provider holds counts any more.
    pub(super) fn distrust(&mut self, provider: u32, why: &str) -> Result<(), StoreError> {
        let Some(member) = self.members.get_mut(&provider) else { return Ok(()) };
        if std::mem::replace(&mut member.record.distrusted, true) {
            return Ok(());
        }
        let detail = format!("{}: {why}; `usctl trust` takes it back", member.record.name);
        let batch = member_batch(provider, &member.record);
        self.commit(batch, Durability::Durable)?;
        self.repairs.unwell.insert(provider);
        self.note_event(EventKind::ProviderDistrusted, provider, detail)?;
        if let Some(keeping) = &mut self.keeping {
            keeping.copies.gone(provider);
            keeping.members_changed = true;
        }
        self.note_provider(provider);
        self.scan_holdings(provider);
        Ok(())
    }

    /// Something that made the provider's blocks need a look is over.
    pub(super) fn note_well(&mut self, provider: u32) {
        let record = self.members.get(&provider).map(|member| &member.record);
        if record.is_none_or(|record| !record.dead && !record.draining && !record.distrusted) {
            self.repairs.unwell.remove(&provider);
        }
    }

    /// Takes back that a provider is distrusted: it counts again when it was asked after all it
    /// should have, and is audited soon.
    pub(super) fn trust(&mut self, provider: u32) -> Result<Answer, StoreError> {
        let Some(member) = self.members.get_mut(&provider) else {
            let detail = format!("there is no provider {provider}");
            return Ok(Answer::Refused { kind: RefusalKind::NotFound, detail });
        };
        let record = &mut member.record;
        if !record.distrusted && record.found_wrong == 0 {
            let detail = format!("provider {provider} has no marks: nothing to take back");
            return Ok(Answer::Refused { kind: RefusalKind::Invalid, detail });
        }
        let detail = format!("{}: {} marks are forgotten", record.name, record.found_wrong);
        (record.distrusted, record.found_wrong) = (false, 0);
        record.found_blocks.clear();
        record.suspect = true;
        let (online, batch) = (member.online, member_batch(provider, record));
        self.commit(batch, Durability::Durable)?;
        self.note_well(provider);
        self.audits.forgive(provider);
        self.audits.hurry(provider);
        self.note_event(EventKind::ProviderTrusted, provider, detail)?;
        self.note_provider(provider);
        self.push_provider(provider);
        if online {
            self.sweep(provider, None)?;
        }
        self.scan_holdings(provider);
        Ok(Answer::Count(self.fragments_at(provider)))
    }
}
