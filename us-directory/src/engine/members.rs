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
    CheckFragments, CheckReply, DamageReport, FragmentStatus, ProviderDown, ProviderEntry,
    ProviderHello, ProviderRefused, ProviderReport, ProviderState, ProviderTable, ProviderUp,
    ProviderWelcome,
};

use super::{ConnId, Durability, Effect, Engine, Then};
use crate::keys;
use crate::records::{HoldingRecord, ProviderRecord, bit, block_id, decode, encode, with_bit};
use crate::store::{KeyRange, StoreError, WriteBatch};

/// Fragments in one message to a provider.
pub(super) const FRAGMENTS_A_MESSAGE: usize = 4096;
/// Providers.
const PROVIDERS_MAX: usize = 1 << 17;
/// The longest address, site or note.
const TEXT_BYTES_MAX: usize = 1024;
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
    /// Deletions it was sent and has not confirmed: the ticket and the keys.
    pub deleting: Option<(u64, Vec<Bytes>)>,
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
            deleting: None,
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

    /// What can still be put there.
    pub fn free_bytes(&self) -> u64 {
        self.report.free_bytes.saturating_sub(self.promised_bytes)
    }

    /// Its state for people and clients.
    pub fn state(&self) -> ProviderState {
        if self.is_reachable() {
            ProviderState::Online
        } else if self.record.dormant {
            ProviderState::Dormant
        } else {
            ProviderState::Absent
        }
    }
}

/// Fragments a provider was asked about.
#[derive(Debug)]
pub(super) struct Query {
    provider: u32,
    pieces: Vec<Piece>,
    /// Of a sweep of a suspect provider: where it goes on.
    sweep: Option<(VolumeId, Bytes)>,
}

fn text(mut text: String) -> String {
    let end = (0..=TEXT_BYTES_MAX.min(text.len())).rev().find(|at| text.is_char_boundary(*at));
    text.truncate(end.unwrap_or(0));
    text
}

fn piece_message(piece: &Piece) -> us_proto::v1::FragmentId {
    let block = Bytes::copy_from_slice(piece.1.as_bytes());
    us_proto::v1::FragmentId { block, index: u32::from(piece.2) }
}

impl Engine {
    pub(super) fn tell(&mut self, conn: ConnId, event: Down) {
        self.effects.push(Effect::Provider { conn, down: ProviderDown { event: Some(event) } });
    }

    fn refuse_provider(&mut self, conn: ConnId, reason: &str) {
        tracing::warn!(reason, "provider refused");
        self.tell(conn, Down::Refused(ProviderRefused { reason: reason.to_owned() }));
        self.effects.push(Effect::End { conn });
        self.disconnected(conn);
    }

    pub(super) fn provider_says(&mut self, conn: ConnId, up: ProviderUp) -> Result<(), StoreError> {
        let Some(connection) = self.connections.get(&conn) else { return Ok(()) };
        let known = connection.provider;
        let (provider, event) = match (known, up.event) {
            (None, Some(Up::Hello(hello))) => return self.hello(conn, hello),
            (Some(provider), Some(event)) => (provider, event),
            _ => {
                self.refuse_provider(conn, "the first message must be a hello");
                return Ok(());
            }
        };
        let now_ms = self.now_ms();
        let Some(member) = self.members.get_mut(&provider).filter(|m| m.conn == Some(conn)) else {
            return Ok(());
        };
        member.heard_ms = now_ms;
        match event {
            Up::Hello(_) => self.refuse_provider(conn, "a second hello"),
            Up::Report(report) => self.report(provider, report)?,
            Up::Damage(damage) => self.provider_damage(provider, &damage)?,
            Up::Deleted(done) => self.deleted(provider, done.ticket)?,
            Up::Checked(reply) => self.checked(provider, &reply)?,
            Up::Goodbye(_) => {
                member.record.dormant = true;
                let batch = member_batch(provider, &member.record);
                self.commit(batch, Durability::Applied)?;
            }
            Up::RootStored(_) => {}
        }
        Ok(())
    }

    fn hello(&mut self, conn: ConnId, hello: ProviderHello) -> Result<(), StoreError> {
        let Some(connection) = self.connections.get(&conn) else { return Ok(()) };
        let peer = connection.peer.clone();
        if hello.store.len() != 16 || hello.address.is_empty() {
            self.refuse_provider(conn, "a hello without store or address");
            return Ok(());
        }
        let found = self.members.iter().find(|(_, m)| m.record.key_hash == peer.key_hash);
        let (provider, mut record) = match found {
            Some((provider, member)) => (*provider, member.record.clone()),
            None if self.members.len() >= PROVIDERS_MAX => {
                self.refuse_provider(conn, "too many providers");
                return Ok(());
            }
            None => {
                let provider = self.cluster.next_provider;
                self.cluster.next_provider += 1;
                let key_hash = peer.key_hash.clone().into();
                let store = hello.store.clone();
                (provider, ProviderRecord { key_hash, store, ..Default::default() })
            }
        };
        let same_cookie = hello.cookie == record.cookie || hello.cookie == record.cookie_sent;
        if hello.store != record.store || !same_cookie {
            tracing::warn!(provider, "its store was rolled back, cloned or replaced");
            record.suspect = true;
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
        let mut batch = member_batch(provider, &record);
        batch.put(keys::cluster(), encode(&self.cluster));
        let now_ms = self.now_ms();
        let member =
            self.members.entry(provider).or_insert_with(|| Member::restored(record.clone()));
        member.record = record;
        member.report = hello.report.unwrap_or_default();
        member.heard_ms = now_ms;
        member.promised_bytes = 0;
        member.deleting = None;
        member.online = false;
        let old = member.conn.replace(conn);
        if let Some(old) = old {
            self.connections.remove(&old);
            self.effects.push(Effect::End { conn: old });
        }
        self.queries.retain(|_, query| query.provider != provider);
        self.note_provider(provider);
        if let Some(connection) = self.connections.get_mut(&conn) {
            connection.provider = Some(provider);
        }
        let seq = self.commit(batch, Durability::Durable)?;
        self.then(seq, Then::Member { conn, provider })
    }

    /// The provider's record is durable: it may know its number and cookie.
    pub(super) fn welcome(&mut self, conn: ConnId, provider: u32) -> Result<(), StoreError> {
        let Some(member) = self.members.get_mut(&provider).filter(|m| m.conn == Some(conn)) else {
            return Ok(());
        };
        member.online = true;
        let suspect = member.record.suspect;
        let welcome = ProviderWelcome {
            provider,
            cookie: member.record.cookie_sent.clone(),
            report_every_ms: self.config.report_every_ms,
            grant_key: Bytes::new(),
            cluster: self.cluster.cluster.clone(),
        };
        self.tell(conn, Down::Welcome(welcome));
        tracing::info!(provider, suspect, "provider online");
        self.note_provider(provider);
        self.push_provider(provider);
        if suspect {
            self.sweep(provider, None)?;
        } else {
            self.ask_unsettled_of(provider);
        }
        self.send_deletes()
    }

    fn report(&mut self, provider: u32, report: ProviderReport) -> Result<(), StoreError> {
        let Some(member) = self.members.get_mut(&provider) else { return Ok(()) };
        member.promised_bytes /= 2;
        member.report = ProviderReport { note: text(report.note.clone()), ..report };
        if member.online && member.record.cookie != member.record.cookie_sent {
            // It has stored the cookie before it said anything.
            member.record.cookie = member.record.cookie_sent.clone();
            let batch = member_batch(provider, &member.record);
            self.commit(batch, Durability::Applied)?;
        }
        self.note_provider(provider);
        Ok(())
    }

    pub(super) fn provider_gone(&mut self, conn: ConnId, provider: u32) {
        let Some(member) = self.members.get_mut(&provider).filter(|m| m.conn == Some(conn)) else {
            return;
        };
        member.conn = None;
        member.deleting = None;
        let was_online = std::mem::take(&mut member.online);
        self.queries.retain(|_, query| query.provider != provider);
        self.note_provider(provider);
        if was_online {
            tracing::info!(provider, "provider gone");
            self.push_provider(provider);
        }
    }

    /// Providers that went silent without saying goodbye count as absent.
    pub(super) fn check_members(&mut self) {
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
            self.disconnected(conn);
        }
    }

    fn provider_entry(provider: u32, member: &Member) -> ProviderEntry {
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
    fn push_provider(&mut self, provider: u32) {
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
        let member = self.members.get(&provider).filter(|member| member.online);
        let Some(conn) = member.and_then(|member| member.conn) else { return };
        let query = self.next_query;
        self.next_query += 1;
        let fragments = pieces.iter().map(piece_message).collect();
        self.queries.insert(query, Query { provider, pieces, sweep });
        self.tell(conn, Down::Check(CheckFragments { query, fragments }));
    }

    fn checked(&mut self, provider: u32, reply: &CheckReply) -> Result<(), StoreError> {
        let Some(query) = self.queries.remove(&reply.query) else { return Ok(()) };
        if query.provider != provider {
            return Ok(());
        }
        let found: Vec<(Piece, i32)> =
            query.pieces.into_iter().zip(reply.statuses.iter().copied()).collect();
        self.note_fragments(provider, &found)?;
        if query.sweep.is_some() {
            self.sweep(provider, query.sweep)?;
        }
        Ok(())
    }

    /// Asks a suspect provider about the next page of what it should have; at the end it is believed.
    fn sweep(&mut self, provider: u32, after: Option<(VolumeId, Bytes)>) -> Result<(), StoreError> {
        let volumes: Vec<VolumeId> = self.volumes.keys().copied().collect();
        let from = after.as_ref().map(|(volume, _)| *volume);
        for volume in volumes.into_iter().filter(|volume| Some(*volume) >= from) {
            let mut range = KeyRange::prefix(&keys::holdings(&volume, provider));
            if let Some((_, key)) = after.as_ref().filter(|(at, _)| *at == volume) {
                range = range.after(key);
            }
            // A page of blocks can name more fragments than a message takes: 255 a block at most.
            let pairs = self.store.scan(&range, FRAGMENTS_A_MESSAGE / 256)?;
            let Some((last, _)) = pairs.last() else { continue };
            let last = last.clone();
            let mut pieces = Vec::new();
            for (key, value) in pairs {
                let held: HoldingRecord = decode(&key, &value)?;
                let Some(block) = keys::last_block(&key) else { continue };
                let indexes = (0..=u8::MAX).filter(|index| bit(&held.fragments, *index as usize));
                pieces.extend(indexes.map(|index| (volume, block, index)));
            }
            self.query(provider, pieces, Some((volume, last)));
            return Ok(());
        }
        let Some(member) = self.members.get_mut(&provider) else { return Ok(()) };
        member.record.suspect = false;
        let batch = member_batch(provider, &member.record);
        self.commit(batch, Durability::Applied)?;
        tracing::info!(provider, "checked: believed again");
        self.note_provider(provider);
        self.push_provider(provider);
        Ok(())
    }

    /// Notes what a provider (or a reader) says of fragments that lie there.
    pub(super) fn note_fragments(
        &mut self,
        provider: u32,
        found: &[(Piece, i32)],
    ) -> Result<(), StoreError> {
        let mut volumes: Vec<VolumeId> = found.iter().map(|((volume, ..), _)| *volume).collect();
        volumes.sort_unstable();
        volumes.dedup();
        for volume in volumes {
            let Some(mut tx) = self.tx(volume) else { continue };
            for ((_, block, index), status) in found.iter().filter(|((at, ..), _)| *at == volume) {
                let index = *index as usize;
                let Some(record) = tx.block_mut(block)? else { continue };
                if record.providers.get(index) != Some(&provider) {
                    continue;
                }
                match FragmentStatus::try_from(*status) {
                    Ok(FragmentStatus::Ok) => {
                        record.durable = with_bit(&record.durable, index, true);
                        record.missing = crate::namespace::with_bit_cleared(&record.missing, index);
                    }
                    Ok(FragmentStatus::NotFound) => {
                        record.durable = crate::namespace::with_bit_cleared(&record.durable, index);
                        record.missing = with_bit(&record.missing, index, true);
                    }
                    Ok(FragmentStatus::Damaged) => {
                        record.damaged = with_bit(&record.damaged, index, true);
                    }
                    _ => {}
                }
            }
            let outcome = tx.finish()?;
            if !outcome.batch.is_empty() {
                self.commit(outcome.batch, Durability::Applied)?;
                self.note_blocks(volume, outcome.blocks);
            }
        }
        Ok(())
    }

    fn provider_damage(&mut self, provider: u32, damage: &DamageReport) -> Result<(), StoreError> {
        let volumes: Vec<VolumeId> = self.volumes.keys().copied().collect();
        let mut found = Vec::new();
        for fragment in damage.fragments.iter().take(FRAGMENTS_A_MESSAGE) {
            let (Some(block), Ok(index)) =
                (block_id(&fragment.block), u8::try_from(fragment.index))
            else {
                continue;
            };
            for volume in &volumes {
                if self.store.get(&keys::block(volume, &block))?.is_some() {
                    found.push(((*volume, block, index), FragmentStatus::Damaged as i32));
                }
            }
        }
        tracing::warn!(provider, fragments = found.len(), detail = %damage.detail, "damage");
        self.note_fragments(provider, &found)
    }

    /// A reader could not use a fragment. Wrong bytes are believed (the reader has the keys); a
    /// missing one is asked of its provider first.
    pub(super) fn client_damage(
        &mut self,
        session: u64,
        damage: &us_proto::v1::Damage,
    ) -> Result<(), StoreError> {
        let Some(volume) = self.sessions.get(&session).map(|known| known.volume) else {
            return Ok(());
        };
        let fragment = damage.fragment.clone().unwrap_or_default();
        let (Some(block), Ok(index)) = (block_id(&fragment.block), u8::try_from(fragment.index))
        else {
            return self.refuse(session, "damage of what is no fragment".to_owned());
        };
        let piece = (volume, block, index);
        let provider = damage.provider;
        tracing::warn!(session, provider, %block, index, detail = %damage.detail, "read damage");
        match FragmentStatus::try_from(damage.status) {
            Ok(FragmentStatus::Damaged) => self.note_fragments(provider, &[(piece, damage.status)]),
            Ok(FragmentStatus::NotFound) => {
                self.query(provider, vec![piece], None);
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

/// A batch that writes a provider's record.
pub(super) fn member_batch(provider: u32, record: &ProviderRecord) -> WriteBatch {
    let mut batch = WriteBatch::new();
    batch.put(keys::provider(provider), encode(record));
    batch
}
