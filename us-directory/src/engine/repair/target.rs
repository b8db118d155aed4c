//! Who is to make a fragment again and keep it.

use us_core::placement::record_bytes_max;

use super::BlockKey;
use crate::engine::Engine;
use crate::keys;
use crate::records::BlockRecord;
use crate::store::StoreError;

/// The answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Target {
    /// This provider.
    Provider(u32),
    /// The one it should be has enough to do just now.
    Later,
    /// Nobody has space.
    None,
}

impl Engine {
    /// Where fragment `index` of a block goes: back to its holder where that only lost or damaged
    /// it, else to a provider that holds nothing of the block, in a metapeer and a site that hold
    /// the least of it; between equals to the one with the least to do, then the most space.
    pub(super) fn choose_target(
        &self,
        key: &BlockKey,
        block: &BlockRecord,
        index: usize,
        fragment_bytes: u64,
    ) -> Result<Target, StoreError> {
        let needed = record_bytes_max(fragment_bytes);
        let fits = |provider: u32| {
            self.members
                .get(&provider)
                .is_some_and(|member| member.takes_new() && member.free_bytes() >= needed)
        };
        let holder = block.providers[index];
        let others = || {
            let holders = block.providers.iter().enumerate();
            holders.filter(move |(at, _)| *at != index).map(|(_, provider)| *provider)
        };
        if fits(holder) && others().all(|other| other != holder) {
            let now = self.repairs.jobs.may_rebuild(holder);
            return Ok(if now { Target::Provider(holder) } else { Target::Later });
        }
        // One that is being checked takes its fragments back a moment later.
        let member = self.members.get(&holder);
        if member.is_some_and(|member| member.online && member.record.suspect) {
            return Ok(Target::Later);
        }
        let site = |provider: u32| self.members.get(&provider).map(|m| m.record.site.as_str());
        let mut best = None;
        for (provider, member) in &self.members {
            if !fits(*provider) || self.is_deleting(*provider, key)? {
                continue;
            }
            let here = member.record.site.as_str();
            let in_site = others().filter(|other| !here.is_empty() && site(*other) == Some(here));
            let rank = (
                others().filter(|other| other == provider).count(),
                in_site.count(),
                self.repairs.jobs.load(*provider),
                u64::MAX - member.free_bytes(),
                *provider,
            );
            if best.is_none_or(|found| rank < found) {
                best = Some(rank);
            }
        }
        Ok(match best {
            None => Target::None,
            Some((.., provider)) if self.repairs.jobs.may_rebuild(provider) => {
                Target::Provider(provider)
            }
            Some(_) => Target::Later,
        })
    }

    /// Whether the provider has been told to delete fragments of the block and has not confirmed it:
    /// nothing of the block may go there until it has.
    fn is_deleting(&self, provider: u32, key: &BlockKey) -> Result<bool, StoreError> {
        if self.pending_deletes <= 0 {
            return Ok(false);
        }
        Ok(self.store.get(&keys::delete(provider, &key.1))?.is_some())
    }
}
