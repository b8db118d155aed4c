//! What administrators ask: status, volumes, a snapshot to look around in.

use std::collections::BTreeMap;

use us_core::geometry::Code;
use us_core::ids::VolumeId;
use us_proto::v1::{
    Health, JournalStatus, ProviderState, ProviderStatus, SessionStatus, StatusReply, Timestamp,
    VolumeInfo,
};

use super::event::{Answer, AskId, Effect, NewVolume, Question, RefusalKind, StateSnapshot};
use super::events::EventKind;
use super::health::{Reach, Totals};
use super::private::PrivateVolume;
use super::{Durability, Engine, Then, VOLUMES_MAX, VOLUMES_OF_ONE_MAX, Volume, access};
use crate::keys;
use crate::namespace::new_root;
use crate::records::{UsageRecord, VolumeRecord, decode, encode};
use crate::store::StoreError;

/// The longest name of a volume.
const VOLUME_NAME_BYTES_MAX: usize = 64;
/// Sessions that status lists.
const SESSIONS_LISTED_MAX: usize = 256;

pub(super) fn refused(kind: RefusalKind, detail: impl Into<String>) -> Answer {
    Answer::Refused { kind, detail: detail.into() }
}

impl Engine {
    pub(super) fn ask(&mut self, ask: AskId, question: Question) -> Result<(), StoreError> {
        let answer = match question {
            Question::Status => Answer::Status(Box::new(self.status()?)),
            Question::ListVolumes => Answer::Volumes(self.volume_infos()?),
            Question::Snapshot => Answer::Snapshot(self.state_snapshot()),
            Question::CreateVolume(volume) => {
                let NewVolume { name, s, r, quota_bytes, .. } = *volume;
                let maker = volume.maker.as_ref();
                let record = VolumeRecord {
                    closed: maker.is_some(),
                    maker: access::maker_key(maker),
                    access: access::first_access(maker, &volume.access),
                    name,
                    s,
                    r,
                    quota_bytes,
                    repair_at: stored_repair_at(volume.repair_at, r),
                    trash_hours: volume.trash_hours,
                    ..Default::default()
                };
                return self.create_volume(ask, record, volume.private);
            }
            Question::VolumeKeys { volume, asker } => self.volume_keys(&volume, &asker),
            Question::SetVolumeKeys { volume, version, key_ring } => {
                return self.set_volume_keys(ask, &volume, version, key_ring);
            }
            Question::SetVolume { name, repair_at, quota_bytes, trash_hours } => {
                return self.set_volume(ask, &name, |record| {
                    if repair_at.is_some() {
                        record.repair_at = stored_repair_at(repair_at, record.r);
                    }
                    record.quota_bytes = quota_bytes.unwrap_or(record.quota_bytes);
                    record.trash_hours = trash_hours.or(record.trash_hours);
                });
            }
            Question::SetAccess { name, client, level } => {
                return self.set_access(ask, &name, &client, level);
            }
            Question::TrashBasis { volume, asker } => self.trash_basis(&volume, &asker),
            Question::PurgeTrash { volume, inos } => {
                return self.purge_trash(ask, &volume, &inos);
            }
            Question::DeleteVolume { name } => return self.delete_volume(ask, &name),
            Question::Drain { provider, undo } => self.drain(provider, undo)?,
            Question::GiveUp { provider } => self.give_up_asked(provider)?,
            Question::Trust { provider } => {
                let answer = self.trust(provider)?;
                return self.then(self.last_seq, Then::Answer(ask, answer));
            }
            Question::NextAudit => {
                self.next_audit(ask);
                return Ok(());
            }
            Question::Audited { ticket, outcome } => {
                self.audited(ticket, outcome)?;
                Answer::Done
            }
            Question::Repair => {
                self.sources_are_back();
                self.scan_blocks();
                Answer::Repair(self.repair_status())
            }
            Question::Scrub { provider } => self.scrub(provider),
            Question::WhatIf { without } => self.what_if(&without),
            Question::FsckBasis => Answer::FsckBasis(Box::new(self.fsck_basis())),
            Question::Judge { provider, strays, mend } => {
                let verdicts = self.judge(provider, &strays, mend)?;
                return self.then(self.last_seq, Then::Answer(ask, Answer::Verdicts(verdicts)));
            }
            Question::Doubt { provider, pieces } => {
                self.query_with(provider, pieces, None, true);
                Answer::Done
            }
            Question::Mend { volume, blocks } => Answer::Count(self.mend(volume, &blocks)?),
            Question::Events { after, last } => Answer::Events(self.events(after, last)?),
            Question::Backup => {
                let (view, seq) = (self.store.snapshot(), self.last_seq);
                self.sync()?;
                return self.then(seq, Then::Answer(ask, Answer::Backup(view, seq)));
            }
            Question::PlanImage => Answer::Plan(self.plan_image()?),
            Question::Records { from, bytes_max } => {
                Answer::Records(self.kept_records(from, bytes_max))
            }
            Question::LeaseForImage { count } => return self.lease_for_image(ask, count),
            Question::LocateImage { block } => self.locate_image(&block)?,
            Question::Registry(question) => return self.ask_registry(ask, question),
            Question::CommitImage { run, blocks } => return self.commit_image(ask, run, &blocks),
        };
        self.effects.push(Effect::Answer { ask, answer });
        Ok(())
    }

    pub(super) fn state_snapshot(&self) -> StateSnapshot {
        let volumes = self.volumes.iter();
        let providers = self.members.iter();
        StateSnapshot {
            view: self.store.snapshot(),
            volumes: volumes
                .filter(|(id, _)| self.asker_sees(id))
                .map(|(id, volume)| (*id, volume.record.name.clone()))
                .collect(),
            providers: providers.map(|(id, member)| (*id, self.state_of(member) as i32)).collect(),
        }
    }

    fn create_volume(
        &mut self,
        ask: AskId,
        mut record: VolumeRecord,
        private: Option<PrivateVolume>,
    ) -> Result<(), StoreError> {
        let VolumeRecord { name, s, r, .. } = &record;
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        let answer = match Code::new(*s as usize, *r as usize) {
            Err(error) => Err(refused(RefusalKind::Invalid, error.to_string())),
            Ok(_)
                if name.is_empty()
                    || name.len() > VOLUME_NAME_BYTES_MAX
                    || name.starts_with('.')
                    || !name.chars().all(plain) =>
            {
                let detail = "a volume's name has 1 to 64 letters, digits, '-', '_' or '.'";
                Err(refused(RefusalKind::Invalid, detail))
            }
            Ok(_) if self.volumes.values().any(|volume| volume.record.name == *name) => {
                let detail = format!("there is a volume {name:?} already");
                Err(refused(RefusalKind::Exists, detail))
            }
            Ok(_) if self.volumes.len() >= VOLUMES_MAX => {
                Err(refused(RefusalKind::Busy, "there are too many volumes"))
            }
            Ok(_) if self.made_by(&record.maker) >= VOLUMES_OF_ONE_MAX => {
                let detail = format!(
                    "a client makes at most {VOLUMES_OF_ONE_MAX} volumes: have an administrator \
                     delete some, or make this one"
                );
                Err(refused(RefusalKind::Busy, detail))
            }
            Ok(code) => {
                let made = self.keys_of_new(&mut record, private);
                made.map(|id| (code, id)).map_err(|(kind, detail)| refused(kind, detail))
            }
        };
        let (code, id) = match answer {
            Ok(made) => made,
            Err(answer) => {
                self.effects.push(Effect::Answer { ask, answer });
                return Ok(());
            }
        };
        record.next_ino = 2;
        let time = Timestamp {
            seconds: (self.at.unix_ms / 1000) as i64,
            nanos: (self.at.unix_ms % 1000) as u32 * 1_000_000,
        };
        let mut batch = new_root(&id, time);
        batch.put(keys::volume(&id), encode(&record));
        let usage = UsageRecord { inodes: 1, ..Default::default() };
        let detail = format!("{} {code}", record.name);
        let volume = Volume { record, code };
        let info = volume_info(&id, &volume, usage);
        self.volumes.insert(id, volume);
        self.note_volume_event(EventKind::VolumeMade, &id, detail)?;
        let seq = self.commit(batch, Durability::Durable)?;
        self.then(seq, Then::Answer(ask, Answer::Volume(info)))
    }

    /// Volumes that this client made; 0 for administrators.
    fn made_by(&self, maker: &[u8]) -> usize {
        let made = |volume: &&Volume| !maker.is_empty() && volume.record.maker[..] == *maker;
        self.volumes.values().filter(made).count()
    }

    /// Changes a volume's settings; what is now too thin is found at once.
    fn set_volume(
        &mut self,
        ask: AskId,
        name: &str,
        change: impl FnOnce(&mut VolumeRecord),
    ) -> Result<(), StoreError> {
        let shown = |(id, volume): &(&VolumeId, &Volume)| {
            volume.record.name == name && !volume.record.deleting && !self.is_hidden(id)
        };
        let Some(id) = self.volumes.iter().find(shown).map(|(id, _)| *id) else {
            let answer = refused(RefusalKind::NotFound, format!("there is no volume {name:?}"));
            self.effects.push(Effect::Answer { ask, answer });
            return Ok(());
        };
        let usage = self.usage(&id)?;
        let Some(volume) = self.volumes.get_mut(&id) else { return Ok(()) };
        let record = &mut volume.record;
        change(record);
        let mut batch = crate::store::WriteBatch::new();
        batch.put(keys::volume(&id), encode(record));
        let info = volume_info(&id, volume, usage);
        let (left, quota, hours) = (info.repair_at, info.quota_bytes, info.trash_hours);
        let detail =
            format!("{name}: repaired at {left} to spare, quota {quota} bytes, trash {hours} h");
        self.note_volume_event(EventKind::VolumeChanged, &id, detail)?;
        let seq = self.commit(batch, Durability::Durable)?;
        self.scan_blocks();
        self.then(seq, Then::Answer(ask, Answer::Volume(info)))
    }

    fn delete_volume(&mut self, ask: AskId, name: &str) -> Result<(), StoreError> {
        let found = self
            .volumes
            .iter()
            .find(|(id, volume)| {
                volume.record.name == name && !volume.record.deleting && !self.is_hidden(id)
            })
            .map(|(id, _)| *id);
        let Some(id) = found else {
            let answer = refused(RefusalKind::NotFound, format!("there is no volume {name:?}"));
            self.effects.push(Effect::Answer { ask, answer });
            return Ok(());
        };
        if self.sessions.values().any(|known| known.volume == id && known.is_alive()) {
            let detail = format!("volume {name:?} is mounted: unmount it first");
            let answer = refused(RefusalKind::Busy, detail);
            self.effects.push(Effect::Answer { ask, answer });
            return Ok(());
        }
        let mut batch = crate::store::WriteBatch::new();
        if let Some(volume) = self.volumes.get_mut(&id) {
            volume.record.deleting = true;
            batch.put(keys::volume(&id), encode(&volume.record));
        }
        self.note_volume_event(EventKind::VolumeRemoved, &id, name.to_owned())?;
        let seq = self.commit(batch, Durability::Durable)?;
        self.then(seq, Then::Answer(ask, Answer::Done))
    }

    fn volume_infos(&self) -> Result<Vec<VolumeInfo>, StoreError> {
        let mut infos = Vec::with_capacity(self.volumes.len());
        let shown = |(id, volume): &(&VolumeId, &Volume)| {
            !volume.record.deleting && !self.is_hidden(id) && self.asker_sees(id)
        };
        for (id, volume) in self.volumes.iter().filter(shown) {
            infos.push(volume_info(id, volume, self.usage(id)?));
        }
        Ok(infos)
    }

    pub(super) fn usage(&self, volume: &VolumeId) -> Result<UsageRecord, StoreError> {
        let key = keys::usage(volume);
        let stored = self.store.get(&key)?.map(|value| decode(&key, &value));
        Ok(stored.transpose()?.unwrap_or_default())
    }

    /// The sums over all blocks, as providers are now.
    pub(super) fn totals(&self) -> Totals {
        self.counts.totals(|provider| {
            let member = self.members.get(&provider);
            Reach {
                reachable: member.is_some_and(super::Member::is_reachable),
                expected: member.is_some_and(super::Member::counts),
            }
        })
    }

    fn status(&self) -> Result<StatusReply, StoreError> {
        let mut totals = self.totals();
        for volume in self.volumes.keys() {
            let usage = self.usage(volume)?;
            totals.summary.live_bytes += usage.live_bytes;
            totals.summary.stored_bytes += usage.stored_bytes;
        }
        let providers = self.provider_statuses(&totals);
        let facts = self.store.facts();
        let health = health(&totals);
        let holders = self.live_copies();
        let copies = JournalStatus {
            sequence: facts.seq,
            copies: holders.len() as u32,
            bytes: facts.journal_bytes,
            holders,
            image_sequence: self.image_covers(),
        };
        Ok(StatusReply {
            health: health as i32,
            summary: summary(health, &totals, !self.counts.complete),
            counting: !self.counts.complete,
            capacity_bytes: providers.iter().map(|provider| provider.capacity_bytes).sum(),
            used_bytes: providers.iter().map(|provider| provider.used_bytes).sum(),
            blocks: Some(totals.summary),
            providers,
            volumes: self.volume_infos()?,
            sessions: self.session_statuses(),
            pending_deletes: self.pending_deletes.max(0) as u64,
            journal: Some(copies),
            repair: Some(self.repair_status()),
            braked: self.braked() as u32,
            placement: Some(self.placement_status()),
            uptime_s: self.at.now_ms / 1000,
            cluster: self.cluster.cluster.iter().map(|byte| format!("{byte:02x}")).collect(),
        })
    }

    fn provider_statuses(&self, totals: &Totals) -> Vec<ProviderStatus> {
        let members = self.members.iter();
        let width = self.width_shown();
        members
            .map(|(provider, member)| ProviderStatus {
                provider: *provider,
                address: member.record.address.clone(),
                site: member.record.site.clone(),
                metapeer: self.metapeer_of(*provider, width),
                state: self.state_of(member) as i32,
                capacity_bytes: member.report.capacity_bytes,
                used_bytes: member.report.used_bytes,
                reclaimable_bytes: member.report.reclaimable_bytes,
                free_bytes: member.report.free_bytes,
                fragments: totals.fragments.get(provider).copied().unwrap_or(0),
                last_seen_s: (self.at.now_ms.saturating_sub(member.heard_ms)) / 1000,
                note: if member.record.suspect {
                    "its store was rolled back, cloned or replaced: being checked".to_owned()
                } else {
                    member.report.note.clone()
                },
                accepts_puts: member.takes_new(),
                damaged: totals.damaged.get(provider).copied().unwrap_or(0),
                name: member.record.name.clone(),
                draining: member.record.draining,
                found_wrong: member.record.found_wrong,
                distrusted: member.record.distrusted,
                back_in_s: member.record.back_at_ms.saturating_sub(self.clock_ms()) / 1000,
                ..self.disturbed(*provider)
            })
            .collect()
    }

    fn state_of(&self, member: &super::Member) -> ProviderState {
        member.state(self.clock_ms(), &self.config.clocks)
    }

    /// A status with only what repairs cost the provider.
    fn disturbed(&self, provider: u32) -> ProviderStatus {
        let cost = self.repairs.jobs.disturbance(provider, self.at.now_ms);
        ProviderStatus {
            repair_sent_fragments: cost.fragments,
            repair_sent_bytes: cost.bytes,
            repair_worst_fragments: cost.worst_fragments,
            repair_worst_bytes: cost.worst_bytes,
            ..Default::default()
        }
    }

    fn session_statuses(&self) -> Vec<SessionStatus> {
        let alive = self.sessions.iter();
        let alive = alive.filter(|(_, known)| known.is_alive() && self.asker_sees(&known.volume));
        alive
            .take(SESSIONS_LISTED_MAX)
            .map(|(id, session)| SessionStatus {
                session: *id,
                host: session.record.host.clone(),
                volume: self
                    .volumes
                    .get(&session.volume)
                    .map(|volume| volume.record.name.clone())
                    .unwrap_or_default(),
                connected: session.conn.is_some(),
                leases: self.leases.count(*id) as u64,
                undurable_batches: session.undurable.len() as u64,
            })
            .collect()
    }

    /// Numbers for the gauges: what it is called, how much.
    pub fn gauges(&self) -> BTreeMap<&'static str, f64> {
        let totals = self.totals();
        let online = self.members.values().filter(|member| member.is_reachable()).count();
        let distrusted = self.members.values().filter(|m| m.record.distrusted).count();
        let connected = self.sessions.values().filter(|session| session.conn.is_some()).count();
        BTreeMap::from([
            ("us_directory_blocks", totals.summary.total as f64),
            ("us_directory_blocks_readable", totals.summary.readable as f64),
            ("us_directory_blocks_waiting", totals.summary.waiting as f64),
            ("us_directory_blocks_lost", totals.summary.lost as f64),
            ("us_directory_blocks_unsettled", totals.summary.unsettled as f64),
            ("us_directory_blocks_crowded", totals.summary.crowded as f64),
            ("us_directory_blocks_degraded", totals.degraded as f64),
            ("us_directory_fragments_damaged", totals.summary.damaged_fragments as f64),
            ("us_directory_providers", self.members.len() as f64),
            ("us_directory_providers_online", online as f64),
            ("us_directory_providers_distrusted", distrusted as f64),
            ("us_directory_sessions", connected as f64),
            ("us_directory_requests_parked", self.parked.len() as f64),
            ("us_directory_placement_degraded", f64::from(u8::from(self.spread.told))),
            ("us_directory_placements_degraded", self.spread.blocks as f64),
            ("us_directory_repairs_queued", self.repairs.queue.len() as f64),
            ("us_directory_repairs_urgent", self.repair_status().urgent as f64),
            ("us_directory_repairs_waiting", self.repairs.queue.aside() as f64),
            ("us_directory_repairs_running", self.repairs.jobs.len() as f64),
            ("us_directory_repair_bytes_per_s", self.repair_status().bytes_per_s as f64),
            ("us_directory_providers_braked", self.braked() as f64),
            ("us_directory_deletes_pending", self.pending_deletes.max(0) as f64),
            ("us_directory_journal_copies", self.live_copies().len() as f64),
            ("us_directory_journal_bytes", self.store.facts().journal_bytes as f64),
            ("us_directory_signatures", self.counts.signatures() as f64),
            ("us_directory_trash_files", self.trash.files as f64),
            ("us_directory_trash_bytes", self.trash.bytes as f64),
        ])
    }
}

/// How a record says that repair begins at so many to spare: one more, 0 for "as soon as one is lost".
fn stored_repair_at(repair_at: Option<u32>, r: u32) -> u32 {
    repair_at.filter(|left| left + 1 < r).map_or(0, |left| left + 1)
}

pub(super) fn volume_info(id: &VolumeId, volume: &Volume, usage: UsageRecord) -> VolumeInfo {
    VolumeInfo {
        volume: bytes::Bytes::copy_from_slice(id.as_bytes()),
        name: volume.record.name.clone(),
        s: volume.record.s,
        r: volume.record.r,
        inodes: usage.inodes,
        live_bytes: usage.live_bytes,
        blocks: usage.blocks,
        private: volume.record.key.is_empty(),
        quota_bytes: volume.record.quota_bytes,
        repair_at: match volume.record.repair_at {
            0 => volume.record.r.saturating_sub(1),
            at => (at - 1).min(volume.record.r.saturating_sub(1)),
        },
        trash_hours: volume.record.kept_hours(),
        trash_files: usage.trash_files,
        trash_bytes: usage.trash_bytes,
        closed: volume.record.closed,
        access: access::shown(&volume.record),
    }
}

/// OK means: every block has all its fragments durable on reachable providers, each on one of its
/// own, apart from fragments on their way for less than the settle time (those blocks are shown as
/// unsettled).
fn health(totals: &Totals) -> Health {
    if totals.summary.lost > 0 {
        Health::Lost
    } else if totals.summary.waiting > 0 {
        Health::Unreadable
    } else if totals.degraded > 0 {
        Health::Degraded
    } else {
        Health::Ok
    }
}

fn summary(health: Health, totals: &Totals, counting: bool) -> String {
    let blocks = &totals.summary;
    let so_far = if counting { " so far (still counting)" } else { "" };
    match health {
        Health::Lost => format!("{} blocks are lost{so_far}", blocks.lost),
        Health::Unreadable => {
            format!("{} blocks wait for providers to return{so_far}", blocks.waiting)
        }
        Health::Degraded => {
            format!("everything is readable; {} blocks lack redundancy{so_far}", totals.degraded)
        }
        Health::Ok | Health::Unspecified if blocks.unsettled > 0 => format!(
            "everything is readable; {} blocks just written are settling{so_far}",
            blocks.unsettled
        ),
        Health::Ok | Health::Unspecified => {
            format!("everything is readable with full redundancy{so_far}")
        }
    }
}
