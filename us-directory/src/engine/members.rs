//! Providers: who they are, whether they can be reached, what they have room for.
//!
//! A provider's number belongs to its key for ever. At each connect it gets a fresh cookie to store;
//! another cookie or another store next time means rolled back, cloned or replaced: it is *suspect*,
//! counts as absent, and every fragment expected there is checked before it is believed again.

use bytes::Bytes;
use us_core::ids::{BlockId, VolumeId};
use us_proto::v1::provider_down::Event as Down;
use us_proto::v1::provider_up::Event as Up;
use us_proto::v1::session_down::Event as SessionEvent;
use us_proto::v1::{
    CheckFragments, CheckReply, FragmentStatus, ProviderDown, ProviderEntry, ProviderHello,
    ProviderRefused, ProviderReport, ProviderState, ProviderTable, ProviderUp, ProviderWelcome,
    RecordsHeld,
};

use super::events::EventKind;
use super::presence::{self, Clocks};
use super::{ConnId, Durability, Effect, Engine, Then};
use crate::keys;
use crate::records::{HoldingRecord, ProviderRecord, bit, decode, encode, with_bit};
use crate::store::{KeyRange, StoreError, WriteBatch};

/// Fragments in one message to a provider.
pub(super) const FRAGMENTS_A_MESSAGE: usize = 4096;
/// Blocks a suspect provider is asked about at once: what it answers is one commit.
const SWEEP_BLOCKS: usize = 256;
/// Providers.
const PROVIDERS_MAX: usize = 1 << 17;
/// The longest address, site or note.
const TEXT_BYTES_MAX: usize = 1024;
/// The longest absence that a goodbye is believed: a month.
const AWAY_S_MAX: u64 = 31 * 24 * 3600;
/// No provider has more bytes, or a faster line, whatever it reports: 1 PiB.
const BYTES_MAX: u64 = 1 << 50;
/// Reports that may be missed before a provider counts as absent.
const REPORTS_MISSED_MAX: u64 = 4;

/// A fragment of a volume's block.
pub(super) type Piece = (VolumeId, BlockId, u8);

/// A provider, as far as it need not survive the directory.
#[derive(Debug)]
pub(super) struct Member {
    pub record: ProviderRecord,
    pub conn: Option<ConnId>,
    /// It was welcomed on this connection.
    pub online: bool,
    pub report: ProviderReport,
    pub heard_ms: u64,
    /// Space of leased placements, fading with every report.
    pub promised_bytes: u64,
    /// The root it is known to have stored.
    pub root_stored: u64,
    /// Records of the journal it said it has, at its hello.
    pub records_held: Option<RecordsHeld>,
    /// Deletions it was sent and has not confirmed: the ticket and the keys.
    pub deleting: Option<(u64, Vec<Bytes>)>,
    /// When it was sent them.
    pub deleting_since_ms: u64,
    /// The log says that it is silent.
    pub told_silent: bool,
    /// It was due, and fell silent together with many.
    pub braked: bool,
    /// How long it said it would be away; 0: it did not.
    pub away_ms: u64,
    /// Slow ticks of this hour in which it was online.
    pub online_ticks: u64,
    /// It leaves, and since then nothing is left there.
    pub empty_since_ms: Option<u64>,
    /// When it was last told how far its leaving is.
    pub told_left_ms: u64,
}

impl Member {
    /// A provider the store knows, not heard of since the start.
    pub fn restored(record: ProviderRecord) -> Self {
        Self {
            record,
            conn: None,
            online: false,
            report: ProviderReport::default(),
            heard_ms: 0,
            promised_bytes: 0,
            root_stored: 0,
            records_held: None,
            deleting: None,
            deleting_since_ms: 0,
            told_silent: false,
            braked: false,
            away_ms: 0,
            online_ticks: 0,
            empty_since_ms: None,
            told_left_ms: 0,
        }
    }

    /// Whether its fragments can be read.
    pub fn is_reachable(&self) -> bool {
        self.online && !self.record.suspect
    }

    /// Whether new fragments can go there.
    pub fn is_usable(&self) -> bool {
        self.is_reachable() && self.report.accepts_puts
    }

    /// Whether blocks may be placed there: it is usable, trusted, and not being emptied.
    pub fn takes_new(&self) -> bool {
        self.is_usable() && !self.record.draining && !self.record.distrusted
    }

    /// Whether blocks may be placed there as far as anything but space is concerned.
    pub fn may_have_space(&self) -> bool {
        self.is_reachable()
            && (self.report.accepts_puts || self.report.full)
            && !self.record.draining
            && !self.record.distrusted
    }

    /// Whether what it holds still exists, as far as anybody may count on it.
    pub fn counts(&self) -> bool {
        !self.record.dead && !self.record.distrusted
    }

    /// Whether it has been silent for so long that it is to be given up.
    pub fn is_due(&self, clock_ms: u64, clocks: &Clocks) -> bool {
        let record = &self.record;
        !self.online
            && !record.dead
            && record.silent_since_ms > 0
            && clock_ms >= presence::due_ms(record, clocks)
    }

    /// As the brake sees it: its site, and since when it is silent.
    pub fn silence(&self) -> (&str, Option<u64>) {
        let since_ms = (!self.online).then_some(self.record.silent_since_ms);
        (&self.record.site, since_ms)
    }

    /// What can still be put there.
    pub fn free_bytes(&self) -> u64 {
        self.report.free_bytes.saturating_sub(self.promised_bytes)
    }

    /// What can be put there once its trash is emptied.
    pub fn clearable_bytes(&self) -> u64 {
        let bytes = self.report.free_bytes.saturating_add(self.report.reclaimable_bytes);
        bytes.saturating_sub(self.promised_bytes).min(self.report.capacity_bytes)
    }

    /// Its state for people and clients.
    pub fn state(&self, clock_ms: u64, clocks: &Clocks) -> ProviderState {
        presence::state(&self.record, self.is_reachable(), clock_ms, clocks)
    }
}

/// Fragments a provider was asked about.
#[derive(Debug)]
pub(super) struct Query {
    pub provider: u32,
    pieces: Vec<Piece>,
    /// Of a sweep of a suspect provider: where it goes on.
    sweep: Option<(VolumeId, Bytes)>,
    /// The one fragment is to be audited.
    is_audit: bool,
}

impl Query {
    /// Whether the provider has what it is to be audited for.
    pub fn of_audit(provider: u32, piece: Piece) -> Self {
        Self { provider, pieces: vec![piece], sweep: None, is_audit: true }
    }
}

#[cfg(test)]
impl Query {
    /// How many fragments were asked after.
    pub fn fragments(&self) -> usize {
        self.pieces.len()
    }
}

pub(super) fn text(mut text: String) -> String {
    let end = (0..=TEXT_BYTES_MAX.min(text.len())).rev().find(|at| text.is_char_boundary(*at));
    text.truncate(end.unwrap_or(0));
    text
}

pub(super) fn piece_message(piece: &Piece) -> us_proto::v1::FragmentId {
    let block = Bytes::copy_from_slice(piece.1.as_bytes());
    us_proto::v1::FragmentId { block, index: u32::from(piece.2) }
}

impl Engine {
    pub(super) fn tell(&mut self, conn: ConnId, event: Down) {
        self.effects.push(Effect::Provider { conn, down: ProviderDown { event: Some(event) } });
    }

    fn refuse_provider(&mut self, conn: ConnId, reason: &str) -> Result<(), StoreError> {
        tracing::warn!(reason, "provider refused");
        self.tell(conn, Down::Refused(ProviderRefused { reason: reason.to_owned() }));
        self.effects.push(Effect::End { conn });
        self.disconnected(conn)
    }

    pub(super) fn provider_says(&mut self, conn: ConnId, up: ProviderUp) -> Result<(), StoreError> {
        let Some(connection) = self.connections.get(&conn) else { return Ok(()) };
        let known = connection.provider;
        let (provider, event) = match (known, up.event) {
            (None, Some(Up::Hello(hello))) => return self.hello(conn, hello),
            (Some(provider), Some(event)) => (provider, event),
            _ => {
                return self.refuse_provider(conn, "the first message must be a hello");
            }
        };
        let now_ms = self.now_ms();
        let Some(member) = self.members.get_mut(&provider).filter(|m| m.conn == Some(conn)) else {
            return Ok(());
        };
        member.heard_ms = now_ms;
        match event {
            Up::Hello(_) => self.refuse_provider(conn, "a second hello")?,
            Up::Report(report) => self.report(provider, report)?,
            Up::Damage(damage) => self.provider_damage(provider, &damage)?,
            Up::Deleted(done) => self.deleted(provider, done.ticket)?,
            Up::Checked(reply) => self.checked(provider, &reply)?,
            Up::Goodbye(goodbye) => {
                member.away_ms = goodbye.back_in_s.min(AWAY_S_MAX) * 1000;
                member.record.dormant = true;
                let batch = member_batch(provider, &member.record);
                self.commit(batch, Durability::Applied)?;
            }
            Up::RootStored(root) => self.root_stored(provider, root.sequence),
            Up::RecordsStored(stored) => self.records_stored(provider, &stored),
            Up::Rebuilt(reply) => self.rebuilt(provider, &reply)?,
            Up::Retain(reply) => self.retain_reply(provider, &reply)?,
        }
        Ok(())
    }

    fn hello(&mut self, conn: ConnId, hello: ProviderHello) -> Result<(), StoreError> {
        let Some(connection) = self.connections.get(&conn) else { return Ok(()) };
        let peer = connection.peer.clone();
        if hello.store.len() != 16 || hello.address.is_empty() {
            return self.refuse_provider(conn, "a hello without store or address");
        }
        let known = self.provider_of_key.get(&peer.key_hash[..]).copied();
        let found = known.and_then(|known| Some((known, self.members.get(&known)?)));
        let (provider, mut record) = match found {
            Some((provider, member)) => (provider, member.record.clone()),
            None if self.members.len() >= PROVIDERS_MAX => {
                return self.refuse_provider(conn, "too many providers");
            }
            None => {
                let provider = self.cluster.next_provider;
                self.cluster.next_provider += 1;
                let key_hash = peer.key_hash.clone().into();
                let store = hello.store.clone();
                let retained_ms = self.clock_ms();
                (provider, ProviderRecord { key_hash, store, retained_ms, ..Default::default() })
            }
        };
        let same_cookie = hello.cookie == record.cookie || hello.cookie == record.cookie_sent;
        // Within one connection the cookie stays; the number of its next record does not.
        let known = self.members.get(&provider).map_or(0, |member| member.report.next_record);
        let now = hello.report.as_ref().map_or(0, |report| report.next_record);
        let went_back = hello.store == record.store && now > 0 && now < known;
        if hello.store != record.store || !same_cookie || went_back {
            tracing::warn!(provider, "its store was rolled back, cloned or replaced");
            record.suspect = true;
        }
        let moved = record.address != hello.address || !self.members.contains_key(&provider);
        self.root_seen(hello.root_sequence);
        self.run_seen(provider, hello.records.as_ref());
        if moved {
            self.root_outdated();
        }
        let mut cookie = [0; 16];
        self.entropy.fill(&mut cookie);
        record.store = hello.store;
        record.cookie = hello.cookie;
        record.cookie_sent = Bytes::copy_from_slice(&cookie);
        record.address = text(hello.address);
        record.site = text(hello.site);
        record.name = peer.name;
        record.dormant = false;
        let was_dead = std::mem::take(&mut record.dead);
        let was_silent_ms = match std::mem::take(&mut record.silent_since_ms) {
            0 => 0,
            since_ms => self.clock_ms().saturating_sub(since_ms),
        };
        record.back_at_ms = 0;
        let (name, suspect) = (record.name.clone(), record.suspect);
        let is_new = !self.members.contains_key(&provider);
        let mut batch = member_batch(provider, &record);
        batch.put(keys::cluster(), encode(&self.cluster));
        let now_ms = self.now_ms();
        self.provider_of_key.insert(record.key_hash.clone(), provider);
        let member =
            self.members.entry(provider).or_insert_with(|| Member::restored(record.clone()));
        member.record = record;
        member.report = believed(hello.report.unwrap_or_default());
        let report = member.report.clone();
        member.heard_ms = now_ms;
        member.promised_bytes = 0;
        member.root_stored = 0;
        member.records_held = hello.records;
        member.deleting = None;
        member.online = false;
        member.told_silent = false;
        member.braked = false;
        let old = member.conn.replace(conn);
        if let Some(old) = old {
            self.connections.remove(&old);
            self.effects.push(Effect::End { conn: old });
        }
        if let Some(keeping) = &mut self.keeping {
            keeping.copies.gone(provider);
            keeping.members_changed = true;
        }
        self.queries.retain(|_, query| query.provider != provider);
        self.note_line(provider, &report);
        self.note_provider(provider);
        if let Some(connection) = self.connections.get_mut(&conn) {
            connection.provider = Some(provider);
        }
        // What the old stream's orders were is begun again: nobody answers them any more.
        self.rebuilder_gone(provider)?;
        let seq = self.commit(batch, Durability::Durable)?;
        if was_dead {
            self.note_well(provider);
            self.note_event(EventKind::ProviderRevived, provider, name.clone())?;
        }
        if suspect {
            let detail = "its store was rolled back, cloned or replaced".to_owned();
            self.note_event(EventKind::ProviderSuspect, provider, detail)?;
        }
        if is_new {
            self.note_event(EventKind::ProviderJoined, provider, name)?;
        } else if was_silent_ms >= self.config.clocks.absent_ms {
            let detail = format!("{name}, after {} s", was_silent_ms / 1000);
            self.note_event(EventKind::ProviderOnline, provider, detail)?;
        }
        self.then(seq, Then::Member { conn, provider })
    }

    /// The provider's record is durable: it may know its number and cookie.
    pub(super) fn welcome(&mut self, conn: ConnId, provider: u32) -> Result<(), StoreError> {
        let Some(member) = self.members.get_mut(&provider).filter(|m| m.conn == Some(conn)) else {
            return Ok(());
        };
        member.online = true;
        let (suspect, cookie) = (member.record.suspect, member.record.cookie_sent.clone());
        let (grant_key, grant_time) = self.grant_basis();
        let welcome = ProviderWelcome {
            provider,
            cookie,
            report_every_ms: self.config.report_every_ms,
            grant_key,
            cluster: self.cluster.cluster.clone(),
            grant_time,
        };
        self.tell(conn, Down::Welcome(welcome));
        let refused = self.refused_keys();
        if refused.version > 0 || refused.incarnation > 1 {
            self.tell(conn, Down::RefusedKeys(refused));
        }
        tracing::info!(provider, suspect, "provider online");
        self.note_provider(provider);
        self.push_provider(provider);
        self.keep_with(conn);
        if suspect {
            self.sweep(provider, None)?;
        } else {
            self.ask_unsettled_of(provider);
            self.sources_are_back();
        }
        if self.totals_have_crowds() {
            self.scan_blocks();
        }
        self.send_deletes_to(provider)
    }

    fn report(&mut self, provider: u32, report: ProviderReport) -> Result<(), StoreError> {
        let Some(member) = self.members.get_mut(&provider) else { return Ok(()) };
        let leaving = report.leaving;
        member.promised_bytes /= 2;
        member.report = believed(report);
        let report = member.report.clone();
        self.note_line(provider, &report);
        let Some(member) = self.members.get_mut(&provider) else { return Ok(()) };
        if member.online && member.record.cookie != member.record.cookie_sent {
            // It has stored the cookie before it said anything.
            member.record.cookie = member.record.cookie_sent.clone();
            let batch = member_batch(provider, &member.record);
            self.commit(batch, Durability::Applied)?;
        }
        self.note_provider(provider);
        self.leave(provider, leaving)
    }

    pub(super) fn provider_gone(&mut self, conn: ConnId, provider: u32) -> Result<(), StoreError> {
        let (clock_ms, unix_ms) = (self.clock_ms(), self.at.unix_ms);
        let Some(member) = self.members.get_mut(&provider).filter(|m| m.conn == Some(conn)) else {
            return Ok(());
        };
        member.conn = None;
        member.deleting = None;
        let was_online = std::mem::take(&mut member.online);
        let away_ms = std::mem::take(&mut member.away_ms);
        presence::fell_silent(&mut member.record, clock_ms, unix_ms, away_ms);
        let batch = member_batch(provider, &member.record);
        self.commit(batch, Durability::Applied)?;
        if let Some(keeping) = &mut self.keeping {
            keeping.copies.gone(provider);
            keeping.members_changed = true;
        }
        self.queries.retain(|_, query| query.provider != provider);
        self.note_provider(provider);
        if was_online {
            tracing::info!(provider, "provider gone");
            self.push_provider(provider);
        }
        self.rebuilder_gone(provider)
    }

    /// Providers that went silent without saying goodbye count as absent.
    pub(super) fn check_members(&mut self) -> Result<(), StoreError> {
        let silence_ms = self.config.report_every_ms * REPORTS_MISSED_MAX + 1000;
        let now_ms = self.now_ms();
        let silent: Vec<ConnId> = self
            .members
            .values()
            .filter(|member| now_ms > member.heard_ms + silence_ms)
            .filter_map(|member| member.conn)
            .collect();
        for conn in silent {
            self.effects.push(Effect::End { conn });
            self.disconnected(conn)?;
        }
        Ok(())
    }

    pub(super) fn provider_entry(provider: u32, member: &Member) -> ProviderEntry {
        ProviderEntry {
            provider,
            address: member.record.address.clone(),
            key_hash: member.record.key_hash.clone(),
            reachable: member.is_reachable(),
        }
    }

    pub(super) fn provider_table(&self) -> ProviderTable {
        let entries = self.members.iter();
        let providers = entries.map(|(id, member)| Self::provider_entry(*id, member)).collect();
        ProviderTable { providers, whole: true }
    }

    /// Tells every session how a provider is now.
    pub(super) fn push_provider(&mut self, provider: u32) {
        let Some(member) = self.members.get(&provider) else { return };
        let providers = vec![Self::provider_entry(provider, member)];
        let table = ProviderTable { providers, whole: false };
        let conns: Vec<ConnId> =
            self.sessions.values().filter(|s| s.greeted).filter_map(|s| s.conn).collect();
        for conn in conns {
            self.send(conn, SessionEvent::Providers(table.clone()));
        }
    }

    /// Asks a provider whether it has fragments.
    pub(super) fn query(
        &mut self,
        provider: u32,
        pieces: Vec<Piece>,
        sweep: Option<(VolumeId, Bytes)>,
    ) {
        // What a restored directory still knows may have been deleted since its backup.
        let bring_back = sweep.is_some();
        self.query_with(provider, pieces, sweep, bring_back);
    }

    /// As [`Engine::query`]; with `bring_back` what lies in the provider's trash comes out of it.
    pub(super) fn query_with(
        &mut self,
        provider: u32,
        pieces: Vec<Piece>,
        sweep: Option<(VolumeId, Bytes)>,
        bring_back: bool,
    ) {
        let member = self.members.get(&provider).filter(|member| member.online);
        let Some(conn) = member.and_then(|member| member.conn) else { return };
        let query = self.next_query;
        self.next_query += 1;
        let fragments = pieces.iter().map(piece_message).collect();
        self.queries.insert(query, Query { provider, pieces, sweep, is_audit: false });
        let check = CheckFragments { query, fragments, bring_back, when_idle: false };
        self.tell(conn, Down::Check(check));
    }

    fn checked(&mut self, provider: u32, reply: &CheckReply) -> Result<(), StoreError> {
        // Another's query stays: a provider speaks only for itself.
        if self.queries.get(&reply.query).is_none_or(|query| query.provider != provider) {
            return Ok(());
        }
        let Some(query) = self.queries.remove(&reply.query) else { return Ok(()) };
        if query.is_audit {
            return self.audit_claimed(reply.query, reply.statuses.first().copied());
        }
        let found: Vec<(Piece, i32)> =
            query.pieces.into_iter().zip(reply.statuses.iter().copied()).collect();
        let newly_bad = self.note_fragments(provider, &found)?;
        if query.sweep.is_some() {
            return self.sweep(provider, query.sweep);
        }
        self.tell_damage(provider, newly_bad, "it does not have them")
    }

    /// Asks a suspect provider about the next page of what it should have; at the end it is believed.
    pub(super) fn sweep(
        &mut self,
        provider: u32,
        after: Option<(VolumeId, Bytes)>,
    ) -> Result<(), StoreError> {
        let volumes: Vec<VolumeId> = self.volumes.keys().copied().collect();
        let from = after.as_ref().map(|(volume, _)| *volume);
        for volume in volumes.into_iter().filter(|volume| Some(*volume) >= from) {
            let mut range = KeyRange::prefix(&keys::holdings(&volume, provider));
            if let Some((_, key)) = after.as_ref().filter(|(at, _)| *at == volume) {
                range = range.after(key);
            }
            let (mut pieces, mut last) = (Vec::new(), None);
            for (key, value) in self.store.scan(&range, SWEEP_BLOCKS)? {
                let held: HoldingRecord = decode(&key, &value)?;
                let named = (0..=u8::MAX).filter(|index| bit(&held.fragments, *index as usize));
                let named: Vec<u8> = named.collect();
                if pieces.len() + named.len() > FRAGMENTS_A_MESSAGE {
                    break;
                }
                let block = keys::last_block(&key);
                let named = block.map(|block| named.into_iter().map(move |at| (volume, block, at)));
                pieces.extend(named.into_iter().flatten());
                last = Some(key);
            }
            let Some(last) = last else { continue };
            self.query(provider, pieces, Some((volume, last)));
            return Ok(());
        }
        let Some(member) = self.members.get_mut(&provider) else { return Ok(()) };
        member.record.suspect = false;
        let batch = member_batch(provider, &member.record);
        self.commit(batch, Durability::Applied)?;
        tracing::info!(provider, "checked: believed again");
        if let Some(keeping) = &mut self.keeping {
            keeping.members_changed = true;
        }
        self.note_provider(provider);
        self.push_provider(provider);
        self.sources_are_back();
        self.begin_repairs()
    }

    /// Notes what a provider (or a reader) says of fragments that lie there. Returns how many were
    /// thought well until now.
    pub(super) fn note_fragments(
        &mut self,
        provider: u32,
        found: &[(Piece, i32)],
    ) -> Result<usize, StoreError> {
        use crate::namespace::with_bit_cleared;
        let mut volumes: Vec<VolumeId> = found.iter().map(|((volume, ..), _)| *volume).collect();
        volumes.sort_unstable();
        volumes.dedup();
        let mut newly_bad = 0;
        for volume in volumes {
            let Some(mut tx) = self.tx(volume) else { continue };
            for ((_, block, index), status) in found.iter().filter(|((at, ..), _)| *at == volume) {
                let index = *index as usize;
                let Some(record) = tx.block_mut(block)? else { continue };
                if record.providers.get(index) != Some(&provider) {
                    continue;
                }
                let was_well = bit(&record.durable, index)
                    && !bit(&record.damaged, index)
                    && !bit(&record.missing, index);
                match FragmentStatus::try_from(*status) {
                    Ok(FragmentStatus::Ok) => {
                        record.durable = with_bit(&record.durable, index, true);
                        record.missing = with_bit_cleared(&record.missing, index);
                        continue;
                    }
                    Ok(FragmentStatus::NotFound) => {
                        record.durable = with_bit_cleared(&record.durable, index);
                        record.missing = with_bit(&record.missing, index, true);
                    }
                    Ok(FragmentStatus::Damaged) => {
                        record.damaged = with_bit(&record.damaged, index, true);
                    }
                    _ => continue,
                }
                newly_bad += usize::from(was_well);
            }
            let outcome = tx.finish()?;
            if !outcome.batch.is_empty() {
                self.commit(outcome.batch, Durability::Applied)?;
                self.note_blocks(volume, outcome.blocks);
            }
        }
        Ok(newly_bad)
    }
}

/// A report as far as it can be true: sums over all providers stay numbers, whatever one says.
fn believed(report: ProviderReport) -> ProviderReport {
    let capacity_bytes = report.capacity_bytes.min(BYTES_MAX);
    ProviderReport {
        capacity_bytes,
        used_bytes: report.used_bytes.min(BYTES_MAX),
        free_bytes: report.free_bytes.min(capacity_bytes),
        reclaimable_bytes: report.reclaimable_bytes.min(BYTES_MAX),
        fragments: report.fragments.min(BYTES_MAX),
        damaged: report.damaged.min(BYTES_MAX),
        uplink_bytes_per_s: report.uplink_bytes_per_s.min(BYTES_MAX),
        downlink_bytes_per_s: report.downlink_bytes_per_s.min(BYTES_MAX),
        note: text(report.note),
        ..report
    }
}

/// A batch that writes a provider's record.
pub(super) fn member_batch(provider: u32, record: &ProviderRecord) -> WriteBatch {
    let mut batch = WriteBatch::new();
    batch.put(keys::provider(provider), encode(record));
    batch
}
