//! Retain lists: now and then each provider gets the list of what it is to keep, from a snapshot. It
//! answers with what it holds beyond that and is older, and each of these is judged as things are
//! then ([`super::garbage`]): orphans of writes and repairs that were cut short leave so.
//!
//! One list at a time, one page on its way. A list that is not answered is given up; the next one
//! comes when every provider had its turn.

use bytes::Bytes;
use us_core::ids::{BlockId, VolumeId};
use us_proto::v1::provider_down::Event as Down;
use us_proto::v1::{InventoryItem, RetainEntry, RetainPage, RetainReply};

use super::events::EventKind;
use super::garbage::{Stray, Verdict};
use super::members::{FRAGMENTS_A_MESSAGE, member_batch};
use super::{Durability, Engine};
use crate::holdings::{Held, Holdings};
use crate::store::StoreError;

/// Blocks on one page.
const PAGE_BLOCKS: usize = 4096;
/// How long a provider may take for one page.
const PAGE_TIMEOUT_MS: u64 = 120_000;

/// A list on its way.
pub(super) struct Retain {
    provider: u32,
    list: u64,
    /// Run and commit of the snapshot.
    run: u64,
    seq: u64,
    births_below: u64,
    holdings: Holdings,
    /// Read and not sent: how the end is known before the last page.
    head: Option<Held>,
    page: u32,
    entries: u64,
    is_last_sent: bool,
    sent_ms: u64,
    orphans: u64,
    wanted: u64,
}

impl Engine {
    /// Goes on with retain lists: every slow tick.
    pub(super) fn retain_chore(&mut self) -> Result<(), StoreError> {
        let now_ms = self.now_ms();
        if let Some(retain) = &self.retain {
            let provider = retain.provider;
            let here = self.members.get(&provider).is_some_and(super::Member::is_reachable);
            if here && now_ms < retain.sent_ms + PAGE_TIMEOUT_MS {
                return Ok(());
            }
            tracing::info!(provider, "its retain list is given up");
            self.retain = None;
            if here {
                self.retained(provider)?;
            }
        }
        let every_ms = self.config.retain_every_ms;
        if every_ms == 0 || self.cluster.births_floor == 0 || !self.counts.complete {
            return Ok(());
        }
        let clock_ms = self.clock_ms();
        let due = self
            .members
            .iter()
            .filter(|(_, member)| member.is_reachable())
            .map(|(provider, member)| (member.record.retained_ms + every_ms, *provider))
            .min();
        match due {
            Some((at_ms, provider)) if at_ms <= clock_ms => self.begin_list(provider),
            _ => Ok(()),
        }
    }

    fn begin_list(&mut self, provider: u32) -> Result<(), StoreError> {
        let volumes: Vec<VolumeId> = self.volumes.keys().copied().collect();
        let mut holdings = Holdings::new(self.store.snapshot(), volumes, provider)?;
        let head = holdings.next_block()?;
        let list = self.next_query;
        self.next_query += 1;
        self.retain = Some(Retain {
            provider,
            list,
            run: self.cluster.run,
            seq: self.last_seq,
            births_below: self.cluster.births_floor,
            holdings,
            head,
            page: 0,
            entries: 0,
            is_last_sent: false,
            sent_ms: 0,
            orphans: 0,
            wanted: 0,
        });
        self.send_page()
    }

    fn send_page(&mut self) -> Result<(), StoreError> {
        let now_ms = self.now_ms();
        let incarnation = self.cluster.incarnation;
        let Some(retain) = &mut self.retain else { return Ok(()) };
        let mut entries = Vec::new();
        while entries.len() < PAGE_BLOCKS
            && let Some(held) = retain.head.take()
        {
            let block = Bytes::copy_from_slice(held.block.as_bytes());
            entries.push(RetainEntry { block, fragments: held.fragments });
            retain.head = retain.holdings.next_block()?;
        }
        retain.entries += entries.len() as u64;
        retain.is_last_sent = retain.head.is_none();
        retain.sent_ms = now_ms;
        let page = RetainPage {
            list: retain.list,
            incarnation,
            run: retain.run,
            seq: retain.seq,
            births_below: retain.births_below,
            page: retain.page,
            entries,
            last: retain.is_last_sent,
            entries_total: if retain.is_last_sent { retain.entries } else { 0 },
        };
        let member = self.members.get(&retain.provider);
        if let Some(conn) = member.and_then(|member| member.conn) {
            self.tell(conn, Down::Retain(page));
        }
        Ok(())
    }

    /// A provider has taken a page, or says what it holds beyond the list.
    pub(super) fn retain_reply(
        &mut self,
        provider: u32,
        reply: &RetainReply,
    ) -> Result<(), StoreError> {
        let Some(retain) = &mut self.retain else { return Ok(()) };
        if (retain.provider, retain.list, retain.page) != (provider, reply.list, reply.page) {
            return Ok(());
        }
        if !reply.refused.is_empty() {
            tracing::warn!(provider, reason = %reply.refused, "it refuses its retain list");
            self.retain = None;
            self.note_event(EventKind::RetainRefused, provider, reply.refused.clone())?;
            return self.retained(provider);
        }
        if !retain.is_last_sent {
            retain.page += 1;
            return self.send_page();
        }
        let strays: Vec<Stray> =
            reply.unlisted.iter().take(FRAGMENTS_A_MESSAGE).filter_map(stray).collect();
        let verdicts = self.judge(provider, &strays, true)?;
        let Some(retain) = &mut self.retain else { return Ok(()) };
        let count = |wanted| verdicts.iter().filter(|verdict| **verdict == wanted).count() as u64;
        retain.orphans += count(Verdict::Orphan);
        retain.wanted += count(Verdict::Wanted);
        retain.sent_ms = self.at.now_ms;
        if !reply.done {
            return Ok(());
        }
        let (orphans, wanted) = (retain.orphans, retain.wanted);
        self.retain = None;
        if orphans + wanted > 0 {
            let detail =
                format!("{orphans} fragments that nothing names; {wanted} that were missed");
            self.note_event(EventKind::Garbage, provider, detail)?;
        }
        self.retained(provider)
    }

    /// The provider had its turn.
    fn retained(&mut self, provider: u32) -> Result<(), StoreError> {
        let clock_ms = self.clock_ms();
        let Some(member) = self.members.get_mut(&provider) else { return Ok(()) };
        member.record.retained_ms = clock_ms;
        let batch = member_batch(provider, &member.record);
        self.commit(batch, Durability::Applied)?;
        Ok(())
    }
}

/// A line of an inventory; nothing where it makes no sense.
fn stray(item: &InventoryItem) -> Option<Stray> {
    let fragment = item.fragment.as_ref()?;
    Some(Stray {
        volume: VolumeId::from_slice(&item.volume)?,
        block: BlockId::from_slice(&fragment.block)?,
        index: u8::try_from(fragment.index).ok()?,
        birth: item.birth,
    })
}
