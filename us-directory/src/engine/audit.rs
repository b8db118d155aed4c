//! Audits: fragments drawn at random, read whole and compared with what their writer committed.
//!
//! ```text
//! due, or reported --> "have you this?" --> the provider claims it --> the job reads it whole
//!                          |                                              |
//!                          +-- it says no: damage, and no lie             +--> right, wrong, gone
//! ```
//! The provider says first that it has the fragment, so that a fragment which is then not there or
//! is wrong was claimed by nobody else: what clients and rebuilders say of others moves an audit
//! forward, and marks nobody. Wrong bytes are held against their holder only when another holder of
//! the same block gave right ones: else it may be the writer's commit that is wrong.
//!
//! Reading and comparing is the job's ([`crate::audit`]); here is what to ask next and what an
//! answer means. None of it need survive: marks do ([`super::distrust`]).
//!
//! Invariants:
//! - judged is a fragment that its block's record names there before and after, at a provider whose
//!   stream is the same: what was deleted, moved, or away meanwhile says nothing;
//! - fragments, bytes and reports under way are bounded, those of one reporter too;
//! - where bytes a second are too few for all audits that are due, all providers wait alike;
//! - an audit at random waits, by at most the mean interval, for the repairs its holder works for.

mod pivots;

use std::collections::{BTreeMap, HashMap, VecDeque};

use us_core::fragment::{FingerprintKind, FragmentHeader};
use us_core::ids::{Birth, FragmentId as CoreFragmentId, VolumeId};
use us_core::placement::draw::SplitMix;
use us_proto::v1::provider_down::Event as Down;
use us_proto::v1::{CheckFragments, FragmentStatus, ProviderEntry, StartScrub};

use super::event::{Answer, AskId, Effect};
use super::members::{Member, Piece, Query, piece_message};
use super::repair::{BlockKey, geometry_of};
use super::{ConnId, Engine};
use crate::keys;
use crate::records::{BlockRecord, HoldingRecord, bit, decode};
use crate::store::{KeyRange, StoreError};
pub(super) use pivots::Pivots;
pub use pivots::Sampling;

/// Audits under way at once.
const AUDITS_MAX: usize = 16;
/// How long one may take in all: what was not answered by then says nothing.
const AUDIT_MS: u64 = 120_000;
/// An interval is at most this many times the mean.
const INTERVAL_MAX: f64 = 4.0;
/// Runs of blocks among which a fragment is drawn: more make the draw more even.
const RUNS: usize = 4;
/// Runs tried at most, where a provider holds nothing of most.
const RUNS_TRIED: usize = 64;
/// Keys read of one run.
const RUN_KEYS_MAX: usize = 8192;
/// Reports that wait for their audit, and those of one reporter.
const REPORTS_MAX: usize = 1024;
const REPORTS_OF_ONE_MAX: usize = 64;
/// Other holders that may be asked whether they have right bytes of the block.
const WITNESSES_MAX: usize = 4;
/// How often in a row a provider may say that it is busy before it is read from all the same, as by
/// any reader.
const BUSY_MAX: u32 = 6;
/// How often a provider that lacks something is asked after all it should have. What it owns to
/// within that time is one loss.
const CENSUS_EVERY_MS: u64 = 3_600_000;
/// So many losses among its last eight audits at random, by its own word, make a provider one that does
/// not keep. Those within an hour of one that counts are the same loss.
const ADMITTED_MAX: u32 = 3;

/// Who says that a fragment is wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Reporter {
    /// A mount.
    Session(u64),
    /// A rebuilder.
    Provider(u32),
}

/// Where a fragment is read.
#[derive(Clone, PartialEq, Debug)]
pub struct AuditPlace {
    /// Which fragment of the block.
    pub index: u8,
    /// Whose, and where that is.
    pub provider: ProviderEntry,
}

/// What the job is to read, and what must come.
#[derive(Clone, PartialEq, Debug)]
pub struct AuditPlan {
    /// For the answer.
    pub ticket: u64,
    /// What is audited.
    pub place: AuditPlace,
    /// Others of the block, should the first be wrong.
    pub witnesses: Vec<AuditPlace>,
    /// The header of the audited fragment's record.
    pub header: FragmentHeader,
    /// The hash of the block's fingerprint list.
    pub list_hash: [u8; 32],
}

impl AuditPlan {
    /// The header of fragment `index`; `None` where the block has none such.
    pub fn header_of(&self, index: u8) -> Option<FragmentHeader> {
        let (own, id) = (&self.header, self.header.id());
        let id = CoreFragmentId { index, ..id };
        let (geometry, kind) = (own.geometry(), own.fingerprint_kind());
        FragmentHeader::new(own.volume(), id, own.birth(), geometry, kind).ok()
    }
}

/// What came of an audit.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum AuditOutcome {
    /// The writer's bytes.
    Right,
    /// Others.
    Wrong {
        /// What is wrong with them.
        detail: String,
        /// Another holder gave right bytes of the same block.
        is_witnessed: bool,
    },
    /// The provider says now that it does not have it.
    Missing,
    /// The provider says that its disk does not give it.
    Damaged {
        /// Its words.
        detail: String,
    },
    /// No answer, or one that says nothing.
    Silent,
}

/// A fragment that a provider was asked after, or that the job reads.
#[derive(Clone, PartialEq, Debug)]
struct Subject {
    provider: u32,
    piece: Piece,
    /// The stream that it claims to have it on.
    conn: ConnId,
    /// Somebody has said that it is wrong.
    reported: bool,
    since_ms: u64,
}

/// A fragment that its holder does not give, or not as it was written.
#[derive(Clone, Copy, Debug)]
pub(super) struct Loss<'a> {
    pub provider: u32,
    pub piece: Piece,
    /// Not there, or damaged.
    pub status: FragmentStatus,
    pub detail: &'a str,
}

/// A report that waits.
#[derive(Clone, PartialEq, Debug)]
struct Report {
    provider: u32,
    piece: Piece,
    by: Reporter,
}

/// The state of auditing.
#[derive(Debug)]
pub(super) struct Audits {
    random: SplitMix,
    pub pivots: Pivots,
    /// When each provider is asked next.
    due: BTreeMap<u32, u64>,
    reports: VecDeque<Report>,
    /// By the number of the question whether the provider has it.
    asked: BTreeMap<u64, Subject>,
    ready: VecDeque<AuditPlan>,
    /// With the job, or ready for it.
    running: BTreeMap<u64, Subject>,
    /// The job waits for work.
    job: Option<AskId>,
    /// Bytes that may be read now; below zero: to wait for.
    bytes: f64,
    bytes_ms: u64,
    /// How often in a row a provider was too busy.
    busy: HashMap<u32, u32>,
    /// The last eight audits at random that were right or began a loss: a bit for each of the latter.
    admitted: HashMap<u32, u8>,
    /// When it was asked after all it should have, and when a loss was last held against it.
    census_ms: HashMap<u32, u64>,
    loss_ms: HashMap<u32, u64>,
}

impl Audits {
    pub fn new(seed: u64) -> Self {
        let mut random = SplitMix::new(seed);
        let pivots = Pivots::new(random.next());
        Self {
            random,
            pivots,
            due: BTreeMap::new(),
            reports: VecDeque::new(),
            asked: BTreeMap::new(),
            ready: VecDeque::new(),
            running: BTreeMap::new(),
            job: None,
            bytes: 0.0,
            bytes_ms: 0,
            busy: HashMap::new(),
            admitted: HashMap::new(),
            census_ms: HashMap::new(),
            loss_ms: HashMap::new(),
        }
    }

    /// A number below `end`.
    fn below(&mut self, end: usize) -> usize {
        (self.random.next() % end.max(1) as u64) as usize
    }

    /// The next of intervals of this mean: nobody can tell from the last one when it ends.
    fn interval_ms(&mut self, mean_ms: u64) -> u64 {
        let share = (self.random.next() >> 11) as f64 / (1u64 << 53) as f64;
        let times = -(1.0 - share).ln();
        (times.min(INTERVAL_MAX) * mean_ms as f64) as u64
    }

    /// The provider is asked as soon as may be.
    pub fn hurry(&mut self, provider: u32) {
        self.due.insert(provider, 0);
    }

    fn is_full(&self) -> bool {
        self.asked.len() + self.running.len() >= AUDITS_MAX
    }

    fn expire(&mut self, now_ms: u64) {
        let is_young = |subject: &Subject| now_ms < subject.since_ms + AUDIT_MS;
        let before = self.asked.len() + self.running.len();
        self.asked.retain(|_, subject| is_young(subject));
        self.running.retain(|_, subject| is_young(subject));
        self.ready.retain(|plan| self.running.contains_key(&plan.ticket));
        let late = before - self.asked.len() - self.running.len();
        (0..late).for_each(|_| count("silent"));
    }

    /// Notes whether an audit ended with damage that the provider owned to; true where that is so
    /// often the case that it does not keep what it took.
    fn note_admitted(&mut self, provider: u32, admitted: bool) -> bool {
        let last = self.admitted.entry(provider).or_default();
        *last = *last << 1 | u8::from(admitted);
        last.count_ones() >= ADMITTED_MAX
    }

    /// Nothing is held against the provider any more.
    pub fn forgive(&mut self, provider: u32) {
        self.admitted.remove(&provider);
        self.loss_ms.remove(&provider);
        self.busy.remove(&provider);
    }
}

fn count(result: &'static str) {
    metrics::counter!("us_directory_audits_total", "result" => result).increment(1);
}

impl Engine {
    /// Begins the audits that are due: every slow tick.
    pub(super) fn audit_chore(&mut self) -> Result<(), StoreError> {
        let now_ms = self.now_ms();
        self.audits.expire(now_ms);
        self.audits.due.retain(|provider, _| self.members.contains_key(provider));
        let rate = (self.config.audit_kib_per_s << 10) as f64;
        let passed_ms = now_ms.saturating_sub(std::mem::replace(&mut self.audits.bytes_ms, now_ms));
        self.audits.bytes = (self.audits.bytes + rate * passed_ms as f64 / 1000.0).min(rate);
        if self.audits.job.is_none() || !self.counts.complete {
            return Ok(());
        }
        while self.may_audit()
            && let Some(report) = self.audits.reports.pop_front()
        {
            self.begin_audit(report.provider, report.piece, true)?;
        }
        let mean_ms = self.config.audit_every_ms;
        if mean_ms == 0 {
            return Ok(());
        }
        for (due_ms, provider) in self.due_audits(now_ms, mean_ms) {
            if !self.may_audit() {
                break;
            }
            // Redundancy first: an audit keeps off a line that repairs need, for a while.
            let may_wait = now_ms < due_ms.saturating_add(mean_ms);
            if may_wait && !self.repairs.jobs.is_free(provider, now_ms) {
                continue;
            }
            let next_ms = now_ms + self.audits.interval_ms(mean_ms);
            self.audits.due.insert(provider, next_ms);
            if let Some(piece) = self.random_fragment(provider)? {
                self.begin_audit(provider, piece, false)?;
            }
        }
        Ok(())
    }

    /// Who is to be audited now, the longest due first: where the bytes a second are too few for all,
    /// everybody waits alike. Who is new gets its first time.
    fn due_audits(&mut self, now_ms: u64, mean_ms: u64) -> Vec<(u64, u32)> {
        let audits = &mut self.audits;
        let mut due = Vec::new();
        for (provider, _) in self.members.iter().filter(|(_, member)| member.is_reachable()) {
            let due_ms = match audits.due.get(provider) {
                Some(due_ms) => *due_ms,
                None => {
                    let first_ms = now_ms + audits.interval_ms(mean_ms);
                    audits.due.insert(*provider, first_ms);
                    first_ms
                }
            };
            if due_ms <= now_ms {
                due.push((due_ms, *provider));
            }
        }
        due.sort_unstable();
        due
    }

    /// Whether another may begin: within the bytes a second, and the number at once.
    fn may_audit(&self) -> bool {
        let has_bytes = self.config.audit_kib_per_s == 0 || self.audits.bytes >= 0.0;
        has_bytes && !self.audits.is_full()
    }

    /// One of the provider's fragments; each as likely as the others, nearly.
    fn random_fragment(&mut self, provider: u32) -> Result<Option<Piece>, StoreError> {
        let (mut found, mut runs) = (Vec::new(), 0);
        for _ in 0..RUNS_TRIED {
            let all = self.audits.pivots.runs();
            let number = self.audits.below(all);
            let here = self.held_in(provider, &self.audits.pivots.run(number))?;
            runs += usize::from(!here.is_empty());
            // A run counts as often as it has fragments.
            found.extend(here);
            if runs == RUNS || all == 1 {
                break;
            }
        }
        let at = self.audits.below(found.len());
        Ok(found.get(at).copied())
    }

    fn held_in(&self, provider: u32, run: &pivots::Run) -> Result<Vec<Piece>, StoreError> {
        let mut found = Vec::new();
        let volumes: Vec<VolumeId> = self.volumes.keys().copied().collect();
        for volume in volumes {
            let Some((from, to)) = pivots::within(run, volume) else { continue };
            let mut range = KeyRange::prefix(&keys::holdings(&volume, provider));
            if let Some(from) = from {
                range.from = keys::holding(&volume, provider, &from);
            }
            if let Some(to) = to {
                range.to = Some(keys::holding(&volume, provider, &to));
            }
            for (key, value) in self.store.scan(&range, RUN_KEYS_MAX)? {
                let held: HoldingRecord = decode(&key, &value)?;
                let Some(block) = keys::last_block(&key) else { continue };
                let here = (0..=u8::MAX).filter(|index| bit(&held.fragments, usize::from(*index)));
                found.extend(here.map(|index| (volume, block, index)));
            }
        }
        Ok(found)
    }

    /// Somebody says that a provider gave wrong bytes: the directory looks for itself.
    pub(super) fn audit_soon(&mut self, provider: u32, piece: Piece, by: Reporter) {
        let waiting = &mut self.audits.reports;
        let known = waiting.iter().any(|report| report.piece == piece);
        let of_one = waiting.iter().filter(|report| report.by == by).count();
        if known || waiting.len() >= REPORTS_MAX || of_one >= REPORTS_OF_ONE_MAX {
            return;
        }
        waiting.push_back(Report { provider, piece, by });
    }

    #[cfg(test)]
    pub(super) fn reports_waiting(&self) -> usize {
        self.audits.reports.len()
    }

    /// The block, and the provider's stream, where the record says that the provider has the
    /// fragment and can be asked for it.
    fn auditable(
        &self,
        provider: u32,
        piece: &Piece,
        reported: bool,
    ) -> Result<Option<(BlockRecord, ConnId)>, StoreError> {
        let (volume, block, index) = *piece;
        let member = self.members.get(&provider).filter(|member| member.is_reachable());
        let Some(conn) = member.and_then(|member| member.conn) else { return Ok(None) };
        let Some(record) = self.stored_block(&(volume, block))? else { return Ok(None) };
        let at = usize::from(index);
        let is_there = record.providers.get(at) == Some(&provider)
            && bit(&record.durable, at)
            && !bit(&record.missing, at)
            && (reported || !bit(&record.damaged, at));
        if !is_there || self.is_deleting(provider, &(volume, block))? {
            return Ok(None);
        }
        Ok(Some((record, conn)))
    }

    /// Asks the provider whether it has the fragment.
    fn begin_audit(
        &mut self,
        provider: u32,
        piece: Piece,
        reported: bool,
    ) -> Result<(), StoreError> {
        let Some((record, conn)) = self.auditable(provider, &piece, reported)? else {
            return Ok(());
        };
        let Some(geometry) = geometry_of(&record) else { return Ok(()) };
        let (bytes, now_ms) = (geometry.fragment_bytes() as u64, self.now_ms());
        self.audits.bytes -= bytes as f64;
        self.repairs.jobs.charge(provider, bytes, now_ms);
        let query = self.next_query;
        self.next_query += 1;
        let subject = Subject { provider, piece, conn, reported, since_ms: now_ms };
        self.audits.asked.insert(query, subject);
        self.queries.insert(query, Query::of_audit(provider, piece));
        let is_patient = self.audits.busy.get(&provider).is_none_or(|times| *times < BUSY_MAX);
        self.tell(
            conn,
            Down::Check(CheckFragments {
                query,
                fragments: vec![piece_message(&piece)],
                bring_back: false,
                when_idle: is_patient,
            }),
        );
        Ok(())
    }

    /// The provider says whether it has what it is to be audited for.
    pub(super) fn audit_claimed(
        &mut self,
        query: u64,
        status: Option<i32>,
    ) -> Result<(), StoreError> {
        let Some(subject) = self.audits.asked.remove(&query) else { return Ok(()) };
        let Subject { provider, piece, reported, .. } = subject;
        let found = self.auditable(provider, &piece, reported)?;
        let Some((record, _)) = found.filter(|(_, conn)| *conn == subject.conn) else {
            count("moot");
            return Ok(());
        };
        let status = status.and_then(|status| FragmentStatus::try_from(status).ok());
        match status {
            Some(FragmentStatus::Ok) => {
                self.audits.busy.remove(&provider);
                if let Some(plan) = self.audit_plan(query, &piece, &record) {
                    self.audits.running.insert(query, subject);
                    self.audits.ready.push_back(plan);
                    self.hand_out_audits();
                }
            }
            Some(FragmentStatus::Busy) => {
                *self.audits.busy.entry(provider).or_default() += 1;
                count("busy");
            }
            Some(status @ (FragmentStatus::NotFound | FragmentStatus::Damaged)) => {
                let how = if reported { "asked after a report" } else { "asked at random" };
                self.admitted(&subject, status, &format!("{how}, it says so"))?;
            }
            _ => count("silent"),
        }
        Ok(())
    }

    /// What the job needs; `None` for a record that makes no sense, which is no provider's fault.
    fn audit_plan(&self, ticket: u64, piece: &Piece, block: &BlockRecord) -> Option<AuditPlan> {
        let (volume, id, index) = *piece;
        let kind = u8::try_from(block.fingerprint_kind).ok()?;
        let kind = FingerprintKind::from_byte(kind).ok()?;
        let (geometry, birth) = (geometry_of(block)?, Birth(block.birth));
        let fragment = CoreFragmentId { block: id, index };
        let place = |at: usize| {
            let provider = block.providers[at];
            let member = self.members.get(&provider).filter(|member| member.is_reachable())?;
            let is_well = bit(&block.durable, at)
                && !bit(&block.damaged, at)
                && !bit(&block.missing, at)
                && !member.record.distrusted;
            let entry = Self::provider_entry(provider, member);
            (is_well || at == usize::from(index))
                .then_some(AuditPlace { index: at as u8, provider: entry })
        };
        let own = block.providers.get(usize::from(index)).copied()?;
        let others = (0..block.providers.len()).filter(|at| block.providers[*at] != own);
        Some(AuditPlan {
            ticket,
            place: place(usize::from(index))?,
            witnesses: others.filter_map(place).take(WITNESSES_MAX).collect(),
            header: FragmentHeader::new(volume, fragment, birth, geometry, kind).ok()?,
            list_hash: block.fingerprint_hash[..].try_into().ok()?,
        })
    }

    /// The job asks for the next audit: it is answered when there is one.
    pub(super) fn next_audit(&mut self, ask: AskId) {
        self.audits.job = Some(ask);
        self.hand_out_audits();
    }

    fn hand_out_audits(&mut self) {
        if self.audits.ready.is_empty() {
            return;
        }
        if let (Some(ask), Some(plan)) = (self.audits.job.take(), self.audits.ready.pop_front()) {
            let answer = Answer::Audit(Box::new(plan));
            self.effects.push(Effect::Answer { ask, answer });
        }
    }

    /// The job says what came of an audit.
    pub(super) fn audited(&mut self, ticket: u64, outcome: AuditOutcome) -> Result<(), StoreError> {
        let Some(subject) = self.audits.running.remove(&ticket) else { return Ok(()) };
        let Subject { provider, piece, reported, conn, .. } = subject;
        let now = self.auditable(provider, &piece, reported)?;
        if outcome == AuditOutcome::Silent || now.is_none_or(|(_, now)| now != conn) {
            count(if outcome == AuditOutcome::Silent { "silent" } else { "moot" });
            return Ok(());
        }
        tracing::debug!(provider, block = %piece.1, index = piece.2, ?outcome, "audited");
        let loss = |status, detail| Loss { provider, piece, status, detail };
        match outcome {
            AuditOutcome::Silent => Ok(()),
            AuditOutcome::Right => {
                if !reported {
                    self.audits.note_admitted(provider, false);
                }
                count("right");
                Ok(())
            }
            AuditOutcome::Wrong { detail, is_witnessed: true } => {
                count("wrong");
                self.found_wrong(&loss(FragmentStatus::Damaged, &detail))
            }
            AuditOutcome::Wrong { detail, is_witnessed: false } => {
                count("unwitnessed");
                let detail = format!("{detail}; nobody who could be asked has it right");
                self.lost_by_audit(&loss(FragmentStatus::Damaged, &detail))
            }
            AuditOutcome::Missing => {
                count("missing");
                let detail = "it claimed to have them, and did not give them";
                self.found_wrong(&loss(FragmentStatus::NotFound, detail))
            }
            AuditOutcome::Damaged { detail } => {
                self.admitted(&subject, FragmentStatus::Damaged, &detail)
            }
        }
    }

    /// The fragment is treated as lost.
    pub(super) fn lost_by_audit(&mut self, loss: &Loss<'_>) -> Result<(), StoreError> {
        let newly_bad = self.note_fragments(loss.provider, &[(loss.piece, loss.status as i32)])?;
        self.tell_damage(loss.provider, newly_bad, loss.detail)
    }

    /// The provider owns to a loss: no lie. It is to look at the rest, and is asked after it. What
    /// that finds is the same loss: it is held against the provider once, and not at all where a
    /// report led here, since those come in heaps after any accident.
    fn admitted(
        &mut self,
        subject: &Subject,
        status: FragmentStatus,
        detail: &str,
    ) -> Result<(), StoreError> {
        let Subject { provider, piece, reported, .. } = *subject;
        count("admitted");
        self.lost_by_audit(&Loss { provider, piece, status, detail })?;
        let now_ms = self.now_ms();
        let is_recent = |last_ms: Option<&u64>| {
            last_ms.is_some_and(|last_ms| now_ms < last_ms + CENSUS_EVERY_MS)
        };
        if !reported && !is_recent(self.audits.loss_ms.get(&provider)) {
            self.audits.loss_ms.insert(provider, now_ms);
            if self.audits.note_admitted(provider, true) {
                return self.distrust(provider, "it lost many of the fragments it was asked for");
            }
        }
        if is_recent(self.audits.census_ms.get(&provider)) {
            return Ok(());
        }
        self.audits.census_ms.insert(provider, now_ms);
        if let Some(conn) = self.members.get(&provider).and_then(|member: &Member| member.conn) {
            self.tell(conn, Down::StartScrub(StartScrub {}));
        }
        self.sweep(provider, None)
    }

    /// A block is there, or is gone.
    pub(super) fn note_pivot(&mut self, key: BlockKey, after: Option<&BlockRecord>) {
        match after.filter(|block| !block.is_inline()) {
            Some(_) => self.audits.pivots.add(key),
            None => self.audits.pivots.remove(&key),
        }
    }
}
