//! What sessions lease ahead: placements with births, ranges of inode numbers; and statfs.

use us_core::geometry::{BlockGeometry, Code};
use us_core::ids::ProviderId;
use us_core::placement::{
    PlacementError, PlacementRequest, ProviderFacts, providers_needed, record_bytes_max,
};
use us_proto::v1::session_down::Event as Down;
use us_proto::v1::{
    InodesLeased, LeaseInodes, LeasePlacements, PlacementLease, PlacementsLeased, SessionDown,
    StatfsReply, StatfsRequest,
};

use super::members::Member;
use super::{BIRTHS_AHEAD, ConnId, Durability, Engine, Then};
use crate::keys;
use crate::records::{BlockRecord, InodeRange, encode};
use crate::store::{StoreError, WriteBatch};

/// The most placements one request leases.
const PLACEMENTS_MAX: u32 = 256;
/// The most inode numbers one request leases.
const INODES_MAX: u32 = 65_536;
/// The most separate ranges of inode numbers a session may have.
const INODE_RANGES_MAX: usize = 1024;
/// Blocks the cleaner and deletes keep for themselves, at least.
const RESERVE_BLOCKS_MIN: u64 = 64;
/// One block in this many is kept for the cleaner and deletes.
const RESERVE_SHARE: u64 = 50;

/// How many blocks of a code fit into the swarm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Space {
    /// Were it empty.
    pub total_blocks: u64,
    /// Now, with what providers can clear away.
    pub free_blocks: u64,
    /// Of them kept for the cleaner and deletes.
    pub reserve_blocks: u64,
}

/// The most bytes a fragment of this code takes at a provider.
pub(super) fn fragment_bytes_max(code: Code) -> u64 {
    let geometry = BlockGeometry::new(code, code.block_bytes_max())
        .expect("the largest block of a code has a geometry");
    record_bytes_max(geometry.fragment_bytes() as u64)
}

/// The most blocks of `fragments` each that fit where provider i has space for `room[i]` fragments
/// and takes at most `share` of one block: the largest B with Σ min(room_i, share·B) ≥ fragments·B.
pub fn blocks_that_fit(room: &[u64], fragments: u64) -> u64 {
    let usable = room.iter().filter(|room| **room > 0).count() as u64;
    if usable == 0 || fragments == 0 {
        return 0;
    }
    let share = fragments.div_ceil(usable);
    let fits = |blocks: u64| {
        let each = share.saturating_mul(blocks);
        let sum = room.iter().fold(0u64, |sum, room| sum.saturating_add(each.min(*room)));
        sum >= fragments.saturating_mul(blocks)
    };
    let (mut low, mut high) = (0, room.iter().fold(0u64, |a, b| a.saturating_add(*b)) + 1);
    while low + 1 < high {
        let middle = low + (high - low) / 2;
        if fits(middle) { low = middle } else { high = middle }
    }
    low
}

impl Engine {
    pub(super) fn lease_placements(
        &mut self,
        session: u64,
        conn: ConnId,
        ask: &LeasePlacements,
    ) -> Result<(), StoreError> {
        let volume = self.sessions.get(&session).and_then(|s| self.volumes.get(&s.volume));
        let Some(code) = volume.map(|volume| volume.code) else { return Ok(()) };
        let (count, why_none) = self.may_lease(session, ask.count)?;
        let mut reply = self.choose_places(code, count)?;
        self.note_leased(session, &reply);
        reply.request = ask.request;
        if count == 0 && !why_none.is_empty() {
            reply.no_space = true;
            reply.error = why_none;
        }
        let down = Box::new(SessionDown { event: Some(Down::Placements(reply)) });
        self.then(self.births_promised, Then::Send(conn, down))
    }

    /// Places for `count` blocks. The answer may leave when `births_promised` is durable.
    pub(super) fn choose_places(
        &mut self,
        code: Code,
        count: u32,
    ) -> Result<PlacementsLeased, StoreError> {
        let fragment_bytes = fragment_bytes_max(code);
        let mut reply = PlacementsLeased::default();
        for _ in 0..count.min(PLACEMENTS_MAX) {
            let seed = self.next_birth.wrapping_mul(0x2545_f491_4f6c_dd1d) ^ self.cluster.run;
            let request = PlacementRequest { code, fragment_bytes, seed };
            match self.placer.choose(&request) {
                Ok(placement) => {
                    self.note_spread(placement.degraded);
                    self.promise(&placement.providers, fragment_bytes);
                    let sites = placement.providers.iter().map(|id| self.site_number(*id));
                    let sites = sites.collect();
                    let providers = placement.providers.iter().map(|provider| provider.0).collect();
                    reply.leases.push(PlacementLease { birth: self.next_birth, providers, sites });
                    self.next_birth += 1;
                }
                Err(error) => {
                    reply.no_space = match error {
                        PlacementError::NoSpace { .. } => true,
                        // Those that are full are not too few.
                        PlacementError::TooFewProviders { needed, .. } => {
                            self.members.values().filter(|one| one.may_have_space()).count()
                                >= needed
                        }
                    };
                    self.trash.pressed |= reply.no_space;
                    reply.space_comes = reply.no_space && self.space_comes(code);
                    reply.error = error.to_string();
                    break;
                }
            }
        }
        // Births below the durable mark are safe to give; the mark moves well ahead of them.
        if self.next_birth + BIRTHS_AHEAD / 2 > self.cluster.births_end {
            self.cluster.births_end = self.next_birth + BIRTHS_AHEAD;
            self.births_promised = self.commit_cluster(Durability::Durable)?;
        }
        Ok(reply)
    }

    /// A number for a provider's labelled site, for those who have to put a fragment elsewhere; 0:
    /// it has no label.
    fn site_number(&self, provider: ProviderId) -> u32 {
        let field = self.placer.landscape().field();
        field.node(provider).map_or(0, |node| field.known(node).place.index() as u32)
    }

    /// Tells the placer how a provider is now.
    pub(super) fn note_provider(&mut self, provider: u32) {
        let Some(member) = self.members.get(&provider) else { return };
        self.placer.upsert(&ProviderFacts {
            provider: ProviderId(provider),
            site: member.record.site.clone(),
            address: member.record.address.clone(),
            capacity_bytes: member.report.capacity_bytes,
            free_bytes: member.free_bytes(),
            usable: member.takes_new(),
        });
    }

    /// Tells the placer where a block was and is.
    pub(super) fn note_placement(
        &mut self,
        before: Option<&BlockRecord>,
        after: Option<&BlockRecord>,
    ) {
        let providers = |block: Option<&BlockRecord>| -> Vec<ProviderId> {
            let coded = block.filter(|block| !block.is_inline());
            coded.map_or_else(Vec::new, |b| b.providers.iter().map(|id| ProviderId(*id)).collect())
        };
        let (before, after) = (providers(before), providers(after));
        if before == after {
            return;
        }
        if !before.is_empty() {
            self.placer.removed(&before);
        }
        if !after.is_empty() {
            self.placer.placed(&after);
        }
    }

    /// How many blocks of this code fit.
    pub(super) fn space(&self, code: Code) -> Space {
        let fragment_bytes = fragment_bytes_max(code);
        let fragments = code.fragments() as u64;
        let room = |bytes: fn(&Member) -> u64| -> Vec<u64> {
            let usable = self.members.values().filter(|member| member.may_have_space());
            usable.map(|member| bytes(member) / fragment_bytes).collect()
        };
        let total_blocks = blocks_that_fit(&room(|m| m.report.capacity_bytes), fragments);
        Space {
            total_blocks,
            free_blocks: blocks_that_fit(&room(Member::clearable_bytes), fragments),
            reserve_blocks: (total_blocks / RESERVE_SHARE).max(RESERVE_BLOCKS_MIN),
        }
    }

    /// Whether blocks of this code fit once what was deleted is cleared away.
    fn space_comes(&self, code: Code) -> bool {
        let fragment_bytes = fragment_bytes_max(code);
        let fits = |bytes: u64| bytes >= fragment_bytes;
        let has_room = |member: &&Member| member.takes_new() && fits(member.free_bytes());
        let will_have = |member: &&Member| {
            let is_cleared = member.may_have_space() && fits(member.report.reclaimable_bytes);
            has_room(member) || (is_cleared && fits(member.clearable_bytes()))
        };
        let roomy = self.members.values().filter(will_have).count();
        let roomy_now = self.members.values().filter(has_room).count();
        // What lies in graves, or is being deleted, is in no provider's trash yet.
        (roomy >= providers_needed(code) && roomy > roomy_now)
            || self.pending_deletes > 0
            || self.trash.bytes > 0
    }

    /// Space that was promised is not free until the provider's next reports say so.
    fn promise(&mut self, providers: &[ProviderId], bytes: u64) {
        for provider in providers {
            if let Some(member) = self.members.get_mut(&provider.0) {
                member.promised_bytes += bytes;
                self.placer.update(*provider, member.free_bytes(), member.takes_new());
            }
        }
    }

    pub(super) fn lease_inodes(
        &mut self,
        session: u64,
        conn: ConnId,
        ask: &LeaseInodes,
    ) -> Result<(), StoreError> {
        let Some(known) = self.sessions.get_mut(&session) else { return Ok(()) };
        let volume_id = known.volume;
        let Some(volume) = self.volumes.get_mut(&volume_id) else { return Ok(()) };
        let count = ask.count.clamp(1, INODES_MAX);
        let first = volume.record.next_ino;
        volume.record.next_ino += u64::from(count);
        let ranges = &mut known.record.inodes;
        let full = ranges.len() >= INODE_RANGES_MAX;
        match ranges.last_mut().filter(|last| last.first + last.count == first) {
            Some(last) => last.count += u64::from(count),
            // The oldest is long used up: a mount creates from the newest it has heard of.
            None if full => {
                ranges.remove(0);
                ranges.push(InodeRange { first, count: u64::from(count) });
            }
            None => ranges.push(InodeRange { first, count: u64::from(count) }),
        }
        let mut batch = WriteBatch::new();
        batch.put(keys::volume(&volume_id), encode(&volume.record));
        batch.put(keys::session(session), encode(&known.record));
        let seq = self.commit(batch, Durability::Durable)?;
        let leased = InodesLeased { request: ask.request, first, count };
        let down = Box::new(SessionDown { event: Some(Down::Inodes(leased)) });
        self.then(seq, Then::Send(conn, down))
    }

    pub(super) fn statfs(
        &mut self,
        session: u64,
        conn: ConnId,
        ask: &StatfsRequest,
    ) -> Result<(), StoreError> {
        let Some(volume_id) = self.sessions.get(&session).map(|known| known.volume) else {
            return Ok(());
        };
        let Some(volume) = self.volumes.get(&volume_id) else { return Ok(()) };
        let usage = self.usage(&volume_id)?;
        let (code, quota) = (volume.code, volume.record.quota_bytes);
        let block_bytes = code.block_bytes_max() as u64;
        let space = self.space(code);
        let used_bytes = usage.live_bytes.saturating_sub(usage.trash_bytes);
        // The trash of volumes yields to need, as that of providers does.
        let free_blocks = (space.free_blocks + self.trash_blocks(code)?).min(space.total_blocks);
        let mut reply = StatfsReply {
            request: ask.request,
            total_bytes: (space.total_blocks * block_bytes).max(used_bytes),
            free_bytes: free_blocks * block_bytes,
            available_bytes: free_blocks.saturating_sub(space.reserve_blocks) * block_bytes,
            inodes: usage.inodes,
        };
        if quota > 0 {
            let left = quota.saturating_sub(used_bytes);
            reply.total_bytes = reply.total_bytes.min(quota);
            reply.free_bytes = reply.free_bytes.min(left);
            reply.available_bytes = reply.available_bytes.min(left);
        }
        self.send(conn, Down::Statfs(reply));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plain_sum_lies_when_disks_differ() {
        assert_eq!(blocks_that_fit(&[10; 6], 6), 10);
        assert_eq!(blocks_that_fit(&[1000, 10, 10, 10, 10, 10], 6), 10);
        assert_eq!(blocks_that_fit(&[10; 12], 6), 20);
        assert_eq!(blocks_that_fit(&[12; 4], 6), 8);
        assert_eq!(blocks_that_fit(&[], 6), 0);
    }
}
