//! The log of what happened to the cluster, for people: providers that came, went and died, drains,
//! repairs that ended, who joined, was revoked, and ordered what. Kept in the store and only ever
//! appended to; beyond a bound the oldest are dropped, but never what somebody ordered or who came and
//! went as a member.

use bytes::Bytes;
use us_core::ids::VolumeId;
use us_proto::v1::ClusterEvent;

use super::{Durability, Engine};
use crate::keys;
use crate::records::{EventRecord, decode, encode};
use crate::store::{KeyRange, Pair, StoreError, WriteBatch};

/// Events kept.
const EVENTS_MAX: u64 = 100_000;
/// Events in one answer.
pub(super) const EVENTS_PAGE: usize = 1024;

/// What happened. The numbers are stored: never use one again.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub(super) enum EventKind {
    /// A provider joined for the first time.
    ProviderJoined = 1,
    /// A provider is online.
    ProviderOnline = 2,
    /// A provider fell silent.
    ProviderSilent = 3,
    /// A provider was given up.
    ProviderDead = 4,
    /// A provider that was given up is back.
    ProviderRevived = 5,
    /// A provider's store was rolled back, cloned or replaced.
    ProviderSuspect = 6,
    /// A provider is being emptied.
    DrainBegun = 7,
    /// Nothing is left at a provider that was being emptied.
    DrainDone = 8,
    /// A provider is not being emptied any more.
    DrainEnded = 9,
    /// Everything has its full redundancy again.
    RepairsDone = 10,
    /// Damaged or missing fragments were found.
    Damage = 11,
    /// A volume was made.
    VolumeMade = 12,
    /// A volume was removed.
    VolumeRemoved = 13,
    /// Fragments that nothing names were told to be deleted, or taken over where they were missed.
    Garbage = 14,
    /// A provider does not follow its retain list.
    RetainRefused = 15,
    /// Blocks are placed with less spread than they should have, or no longer.
    Placement = 16,
    /// A provider has left for good.
    ProviderLeft = 17,
    /// A volume's settings were changed.
    VolumeChanged = 18,
    /// Space is short: what was removed longest ago leaves the trash early.
    TrashYields = 19,
    /// An invitation was made.
    Invited = 30,
    /// An invitation was taken back.
    InviteCancelled = 31,
    /// A member joined, or was met for the first time.
    MemberJoined = 32,
    /// A member was shut out.
    MemberRevoked = 33,
    /// A member's certificate has expired.
    MemberExpired = 34,
    /// A check that mends what it finds began.
    CheckMends = 35,
    /// What a provider holds does not count any more: it claimed what it has not.
    ProviderDistrusted = 40,
    /// The marks of a provider were forgotten.
    ProviderTrusted = 41,
}

impl EventRecord {
    /// Whether it names a volume.
    fn names_a_volume(&self) -> bool {
        let kinds = [EventKind::VolumeMade, EventKind::VolumeRemoved, EventKind::VolumeChanged];
        kinds.iter().any(|kind| *kind as u32 == self.kind) || !self.volume.is_empty()
    }

    /// Whether it stays for ever.
    fn is_kept(&self) -> bool {
        let about_members = EventKind::Invited as u32..=EventKind::MemberExpired as u32;
        !self.by.is_empty() || about_members.contains(&self.kind)
    }
}

impl EventKind {
    /// The name, for programs.
    pub const fn name(kind: u32) -> &'static str {
        match kind {
            1 => "provider-joined",
            2 => "provider-online",
            3 => "provider-silent",
            4 => "provider-dead",
            5 => "provider-revived",
            6 => "provider-suspect",
            7 => "drain-begun",
            8 => "drain-done",
            9 => "drain-ended",
            10 => "repairs-done",
            11 => "damage",
            12 => "volume-made",
            13 => "volume-removed",
            14 => "garbage",
            15 => "retain-refused",
            16 => "placement",
            17 => "provider-left",
            18 => "volume-changed",
            19 => "trash-yields",
            30 => "invited",
            31 => "invite-cancelled",
            32 => "member-joined",
            33 => "member-revoked",
            34 => "member-expired",
            35 => "check-mends",
            40 => "provider-distrusted",
            41 => "provider-trusted",
            _ => "unknown",
        }
    }
}

impl Engine {
    /// Notes what happened; `provider` is 0 where it is about none.
    pub(super) fn note_event(
        &mut self,
        kind: EventKind,
        provider: u32,
        detail: String,
    ) -> Result<(), StoreError> {
        let kind = kind as u32;
        self.keep_event(EventRecord { kind, provider, detail, ..EventRecord::default() })
    }

    /// Notes what happened to a volume, which the detail names.
    pub(super) fn note_volume_event(
        &mut self,
        kind: EventKind,
        volume: &VolumeId,
        detail: String,
    ) -> Result<(), StoreError> {
        let (kind, volume) = (kind as u32, Bytes::copy_from_slice(volume.as_bytes()));
        self.keep_event(EventRecord { kind, volume, detail, ..EventRecord::default() })
    }

    fn keep_event(&mut self, event: EventRecord) -> Result<(), StoreError> {
        let number = self.next_event;
        self.next_event += 1;
        let by = self.asker.clone().unwrap_or_default();
        let EventRecord { kind, provider, detail, .. } = &event;
        tracing::info!(event = EventKind::name(*kind), provider, %detail, by, "event");
        let record = EventRecord { unix_ms: self.at.unix_ms, by, ..event };
        let mut batch = WriteBatch::new();
        batch.put(keys::event(number), encode(&record));
        if let Some(old) = number.checked_sub(EVENTS_MAX).map(keys::event) {
            let stored = self.store.get(&old)?;
            let stored = stored.map(|value| decode::<EventRecord>(&old, &value)).transpose()?;
            if stored.is_some_and(|stored| !stored.is_kept()) {
                batch.delete(old);
            }
        }
        self.commit(batch, Durability::Applied)?;
        Ok(())
    }

    /// Where the log goes on after a start.
    pub(super) fn load_events(&mut self) -> Result<(), StoreError> {
        // Its end is found by halving.
        let (mut low, mut high) = (0u64, 1u64);
        let has = |number: u64| -> Result<bool, StoreError> {
            let range = KeyRange {
                from: keys::event(number),
                to: Some(keys::tag(&keys::CLUSTER, b'e' + 1)),
            };
            Ok(!self.store.scan(&range, 1)?.is_empty())
        };
        while has(high)? {
            (low, high) = (high, high * 2);
        }
        while low + 1 < high {
            let middle = low + (high - low) / 2;
            if has(middle)? { low = middle } else { high = middle }
        }
        self.next_event = high;
        Ok(())
    }

    /// A page of events with numbers greater than `after`, the oldest first; with `last` the newest
    /// ones only. Without those that name volumes of which who asks may not know.
    pub(super) fn events(&self, after: u64, last: u64) -> Result<Vec<ClusterEvent>, StoreError> {
        let newest = self.next_event.saturating_sub(1);
        let after = if last > 0 { newest.saturating_sub(last).max(after) } else { after };
        let all = KeyRange::prefix(&keys::tag(&keys::CLUSTER, b'e'));
        let mut range = all.after(&keys::event(after));
        let mut events = Vec::new();
        // A page of which nothing is shown is no end.
        while events.is_empty() {
            let pairs = self.store.scan(&range, EVENTS_PAGE)?;
            let Some((last, _)) = pairs.last() else { break };
            range = range.after(last);
            self.show_events(&pairs, &mut events)?;
        }
        Ok(events)
    }

    fn show_events(
        &self,
        pairs: &[Pair],
        events: &mut Vec<ClusterEvent>,
    ) -> Result<(), StoreError> {
        for (key, value) in pairs {
            let record: EventRecord = decode(key, value)?;
            let volume = VolumeId::from_slice(&record.volume);
            let is_shown = volume.map_or_else(|| self.asker_sees_all(), |id| self.asker_sees(&id));
            if record.names_a_volume() && !is_shown {
                continue;
            }
            events.push(ClusterEvent {
                number: keys::last_number(key),
                unix_ms: record.unix_ms,
                kind: EventKind::name(record.kind).to_owned(),
                provider: record.provider,
                detail: record.detail,
                by: record.by,
            });
        }
        Ok(())
    }
}
