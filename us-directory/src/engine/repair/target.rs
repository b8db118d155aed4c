//! Who is to make a fragment again and keep it.

use us_core::geometry::Code;
use us_core::ids::ProviderId;
use us_core::placement::{RepairRequest, record_bytes_max};

use super::BlockKey;
use crate::engine::Engine;
use crate::engine::members::Member;
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
    /// it and was never found to claim what it has not, else where the placer puts it, else to whoever holds the least of the block. Those who
    /// could not make it are asked again when there is nobody else.
    pub(super) fn choose_target(
        &mut self,
        key: &BlockKey,
        block: &BlockRecord,
        index: usize,
        fragment_bytes: u64,
    ) -> Result<Target, StoreError> {
        let needed = record_bytes_max(fragment_bytes);
        let mut avoid = self.repairs.to_avoid(key, self.at.now_ms);
        let holder = block.providers[index];
        if self.members.get(&holder).is_some_and(|member| member.record.found_wrong > 0) {
            avoid.push(holder);
        }
        let target = self.target_beside(key, block, index, needed, &avoid)?;
        if target != Target::None || avoid.is_empty() {
            return Ok(target);
        }
        if let Some(setback) = self.repairs.setbacks.get_mut(key) {
            setback.tried.clear();
        }
        self.target_beside(key, block, index, needed, &[])
    }

    fn target_beside(
        &mut self,
        key: &BlockKey,
        block: &BlockRecord,
        index: usize,
        needed: u64,
        avoid: &[u32],
    ) -> Result<Target, StoreError> {
        if !avoid.contains(&block.providers[index])
            && let Some(target) = self.keep_or_wait(block, index, needed)
        {
            return Ok(target);
        }
        if let Some(provider) = self.placed_target(key, block, index, needed, avoid)? {
            let now = self.repairs.jobs.may_rebuild(provider);
            return Ok(if now { Target::Provider(provider) } else { Target::Later });
        }
        self.any_target(key, block, index, needed, avoid)
    }

    /// The holder itself, where it can take the fragment again, now or soon.
    pub(super) fn keep_or_wait(
        &self,
        block: &BlockRecord,
        index: usize,
        needed: u64,
    ) -> Option<Target> {
        let holder = block.providers[index];
        let member = self.members.get(&holder)?;
        let is_crowded = block
            .providers
            .iter()
            .enumerate()
            .any(|(at, provider)| at != index && *provider == holder);
        if member.takes_new() && member.free_bytes() >= needed && !is_crowded {
            let now = self.repairs.jobs.may_rebuild(holder);
            return Some(if now { Target::Provider(holder) } else { Target::Later });
        }
        // One that is being checked takes its fragments back a moment later.
        (member.online && member.record.suspect).then_some(Target::Later)
    }

    /// Whom the placer takes: who has inherited the dead holder's slot, else a pick as for a new
    /// block. `None` where it knows nobody who holds nothing of the block.
    fn placed_target(
        &mut self,
        key: &BlockKey,
        block: &BlockRecord,
        index: usize,
        fragment_bytes: u64,
        avoid: &[u32],
    ) -> Result<Option<u32>, StoreError> {
        /// Providers that are passed over because they are still deleting something of the block.
        const PASSED_OVER_MAX: usize = 8;
        let passed_over_max = avoid.len() + PASSED_OVER_MAX;
        let Ok(code) = Code::new(block.s as usize, block.r as usize) else { return Ok(None) };
        let holders: Vec<ProviderId> = block.providers.iter().copied().map(ProviderId).collect();
        let mut avoid: Vec<ProviderId> = avoid.iter().copied().map(ProviderId).collect();
        let mut seed = [0; 8];
        seed.copy_from_slice(&key.1.as_bytes()[8..]);
        while avoid.len() < passed_over_max {
            let request = RepairRequest {
                code,
                fragment_bytes,
                holders: &holders,
                lost: index,
                avoid: &avoid,
                seed: u64::from_le_bytes(seed) ^ index as u64,
            };
            let Ok(target) = self.placer.choose_repair(&request) else { return Ok(None) };
            let holds = holders.iter().enumerate();
            if holds.into_iter().any(|(at, holder)| at != index && *holder == target.provider) {
                return Ok(None);
            }
            let is_there = self.members.get(&target.provider.0).is_some_and(|m| m.takes_new());
            if is_there && !self.is_deleting(target.provider.0, key)? {
                return Ok(Some(target.provider.0));
            }
            avoid.push(target.provider);
        }
        Ok(None)
    }

    /// Anybody with space: who holds the least of the block, in a site that holds the least of it.
    fn any_target(
        &self,
        key: &BlockKey,
        block: &BlockRecord,
        index: usize,
        needed: u64,
        avoid: &[u32],
    ) -> Result<Target, StoreError> {
        let others = || {
            let holders = block.providers.iter().enumerate();
            holders.filter(move |(at, _)| *at != index).map(|(_, provider)| *provider)
        };
        // Before two fragments lie at one provider, those who failed have their second chance.
        let may_crowd = avoid.is_empty() || self.repairs.has_waited_long(key);
        let fits = |provider: u32| {
            let takes = |member: &Member| member.takes_new() && member.free_bytes() >= needed;
            !avoid.contains(&provider)
                && self.members.get(&provider).is_some_and(takes)
                && (may_crowd || others().all(|other| other != provider))
        };
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
    pub(in crate::engine) fn is_deleting(
        &self,
        provider: u32,
        key: &BlockKey,
    ) -> Result<bool, StoreError> {
        Ok(self.store.get(&keys::delete(provider, &key.1))?.is_some())
    }
}
