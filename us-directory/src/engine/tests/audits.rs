//! Audits under simulated time: who does not keep is found within the stated time and stops
//! counting; who does keep, sleeps, is slandered or is overtaken by events gets no mark.

use super::swarm::{DAY_MS, MINUTE_MS, Swarm};
use super::*;
use crate::engine::distrust::MARKS_MAX;

/// docs/security.md: who kept nothing is distrusted within this time, with 99 %.
const ALL_DROPPED_MS: u64 = 84 * MINUTE_MS;
/// The same of one who dropped a tenth.
const TENTH_DROPPED_MS: u64 = 14 * 60 * MINUTE_MS;
/// Providers report every two seconds, and mounts renew within thirty.
const STEP_MS: u64 = 5_000;

/// A swarm with the job that reads; what it was given is answered one step later.
struct Audited {
    swarm: Swarm,
    /// Outcomes told, by kind.
    right: u64,
    told: u64,
}

impl Audited {
    fn new(providers: u8, blocks: usize) -> Self {
        let mut swarm = Swarm::new(providers);
        swarm.write(blocks);
        let mut audited = Self { swarm, right: 0, told: 0 };
        audited.ask();
        audited
    }

    fn ask(&mut self) {
        let question = Question::NextAudit;
        self.swarm.world.event(Event::Ask { ask: AskId(9), question });
    }

    fn tell(&mut self, ticket: u64, outcome: AuditOutcome) {
        self.told += 1;
        self.right += u64::from(outcome == AuditOutcome::Right);
        let answer = self.swarm.world.ask(Question::Audited { ticket, outcome });
        assert!(matches!(answer, Answer::Done));
    }

    /// What reading the fragment would show.
    fn outcome(&self, plan: &AuditPlan) -> AuditOutcome {
        let block = Bytes::copy_from_slice(plan.header.id().block.as_bytes());
        let fragment = |place: &AuditPlace| (block.clone(), u32::from(place.index));
        let own = fragment(&plan.place);
        let holder = self.swarm.disks.iter().find(|(_, d)| d.id == plan.place.provider.provider);
        let (key, disk) = holder.expect("a provider");
        match () {
            () if disk.conn.is_none() => AuditOutcome::Silent,
            () if !disk.has.contains(&own) => AuditOutcome::Missing,
            () if !disk.spoilt.contains(&own) => AuditOutcome::Right,
            () if !self.swarm.liars.contains(key) => {
                AuditOutcome::Damaged { detail: "a bad sector".to_owned() }
            }
            () => {
                let good =
                    |place: &AuditPlace| self.swarm.good(place.provider.provider, &fragment(place));
                let is_witnessed = plan.witnesses.iter().any(good);
                AuditOutcome::Wrong { detail: "other bytes".to_owned(), is_witnessed }
            }
        }
    }

    /// The next fragment that the job is given.
    fn plan(&mut self) -> AuditPlan {
        for _ in 0..10_000 {
            if let Some(plan) = self.swarm.world.audits.pop_front() {
                self.ask();
                return plan;
            }
            self.swarm.run(STEP_MS);
        }
        panic!("no audit");
    }

    fn step(&mut self, ms: u64) {
        let plans = std::mem::take(&mut self.swarm.world.audits);
        self.swarm.run(ms);
        for plan in plans {
            let outcome = self.outcome(&plan);
            self.tell(plan.ticket, outcome);
            self.ask();
            self.swarm.read();
        }
    }

    fn run(&mut self, ms: u64) {
        (0..ms / STEP_MS).for_each(|_| self.step(STEP_MS));
    }

    /// Runs until it is so; how long that took.
    fn run_until(&mut self, at_most_ms: u64, mut done: impl FnMut(&mut Self) -> bool) -> u64 {
        let begun_ms = self.swarm.world.now_ms;
        while !done(self) {
            let took_ms = self.swarm.world.now_ms - begun_ms;
            assert!(took_ms < at_most_ms, "not within {at_most_ms} ms");
            self.step(STEP_MS);
        }
        self.swarm.world.now_ms - begun_ms
    }

    fn status_of(&mut self, key: u8) -> ProviderStatus {
        let id = self.swarm.disks[&key].id;
        let status = self.swarm.world.status();
        status.providers.into_iter().find(|provider| provider.provider == id).expect("known")
    }

    fn marks(&mut self) -> Vec<u32> {
        let providers = self.swarm.world.status().providers;
        providers.iter().map(|provider| provider.found_wrong).collect()
    }

    fn events(&mut self, kind: &str) -> usize {
        let Answer::Events(events) =
            self.swarm.world.ask(Question::Events { after: 0, last: 10_000 })
        else {
            panic!("no events");
        };
        events.iter().filter(|event| event.kind == kind).count()
    }

    /// A reader says that the provider gave wrong bytes.
    fn report(&mut self, provider: u32, (block, index): (Bytes, u32)) {
        let damage = Damage {
            fragment: Some(FragmentId { block, index }),
            provider,
            status: FragmentStatus::Damaged as i32,
            detail: "its seal fails".to_owned(),
        };
        self.swarm.world.says(self.swarm.mount.conn, Up::Damage(damage));
    }

    /// Claims everything and keeps only what is not picked.
    fn lie(&mut self, key: u8, drops: impl Fn(usize) -> bool) {
        self.swarm.liars.insert(key);
        let disk = self.swarm.disks.get_mut(&key).unwrap();
        let kept = std::mem::take(&mut disk.has).into_iter().enumerate();
        disk.has = kept.filter(|(at, _)| !drops(*at)).map(|(_, fragment)| fragment).collect();
    }

    /// The fragment of a plan, as disks know it.
    fn fragment(plan: &AuditPlan) -> (Bytes, u32) {
        let block = Bytes::copy_from_slice(plan.header.id().block.as_bytes());
        (block, u32::from(plan.place.index))
    }

    fn key_of(&self, plan: &AuditPlan) -> u8 {
        let id = plan.place.provider.provider;
        *self.swarm.disks.iter().find(|(_, disk)| disk.id == id).expect("a provider").0
    }
}

/// What a distrusted provider held is elsewhere, and every block whole without it.
fn check_does_not_count(audited: &mut Audited, liar: u8) {
    let status = audited.status_of(liar);
    assert!(status.distrusted && !status.accepts_puts);
    assert!(status.found_wrong >= MARKS_MAX, "{status:?}");
    audited.run_until(30 * MINUTE_MS, |audited| {
        let id = audited.swarm.disks[&liar].id;
        audited.swarm.records().iter().all(|(_, record)| !record.providers.contains(&id))
    });
    audited.run(10 * MINUTE_MS);
    let kept = std::mem::take(&mut audited.swarm.disks.get_mut(&liar).unwrap().has);
    assert!(kept.is_empty(), "it was told to delete what it had: {kept:?}");
    audited.swarm.check_whole();
    audited.swarm.write(5);
    let id = audited.swarm.disks[&liar].id;
    let named = audited.swarm.records().iter().any(|(_, record)| record.providers.contains(&id));
    assert!(!named, "nothing new goes there");
    assert_eq!(audited.events("provider-distrusted"), 1);
}

#[test]
fn who_kept_nothing_is_found_within_the_stated_time_and_stops_counting() {
    let mut audited = Audited::new(8, 60);
    audited.lie(3, |_| true);
    audited.run_until(ALL_DROPPED_MS, |audited| audited.status_of(3).distrusted);
    check_does_not_count(&mut audited, 3);
    let marks: u32 = audited.marks().iter().sum();
    assert_eq!(marks, audited.status_of(3).found_wrong, "nobody else has a mark");
}

#[test]
fn who_dropped_a_tenth_is_found_within_the_stated_time_and_stops_counting() {
    let mut audited = Audited::new(8, 120);
    audited.lie(3, |at| at % 10 == 4);
    audited.run_until(TENTH_DROPPED_MS, |audited| audited.status_of(3).distrusted);
    check_does_not_count(&mut audited, 3);
}

#[test]
fn who_forges_bytes_is_found_too() {
    let mut audited = Audited::new(8, 40);
    audited.swarm.liars.insert(3);
    let disk = audited.swarm.disks.get_mut(&3).unwrap();
    disk.spoilt = disk.has.clone();
    audited.run_until(ALL_DROPPED_MS, |audited| audited.status_of(3).distrusted);
    assert_eq!(audited.status_of(3).found_wrong, MARKS_MAX);
}

/// Half of them go home every evening and come back every morning, one stays away over a weekend.
#[test]
fn an_honest_swarm_that_sleeps_gets_no_mark_in_a_month() {
    const LONG_STEP_MS: u64 = 25_000;
    let mut audited = Audited::new(10, 60);
    let mut wrote = 0;
    for hour in 0..30 * 24u64 {
        match hour % 24 {
            8 => (1..=5).filter(|key| hour / 24 % 7 < 5 || *key != 1).for_each(|key| {
                if audited.swarm.disks[&key].conn.is_none() {
                    audited.swarm.join(key);
                }
            }),
            // In the middle of an audit, as it may be.
            18 => (1..=5).for_each(|key| audited.swarm.leave(key)),
            12 if hour < 10 * 24 => {
                audited.swarm.write(3);
                wrote += 3;
            }
            _ => {}
        }
        for _ in 0..3_600_000 / LONG_STEP_MS {
            let plans = std::mem::take(&mut audited.swarm.world.audits);
            audited.swarm.world.pass(LONG_STEP_MS);
            audited.swarm.world.says(audited.swarm.mount.conn, Up::Renew(Renew::default()));
            for plan in plans {
                let outcome = audited.outcome(&plan);
                audited.tell(plan.ticket, outcome);
                audited.ask();
            }
            audited.swarm.read();
            let orders = audited.swarm.orders();
            orders.into_iter().for_each(|(key, ticket)| audited.swarm.obey(key, ticket));
        }
    }
    assert!(wrote > 0);
    assert!(audited.right > 20_000, "{} audits", audited.right);
    assert_eq!(audited.marks(), [0; 10]);
    assert_eq!(audited.events("provider-distrusted") + audited.events("damage"), 0);
}

#[test]
fn each_provider_is_asked_about_as_often_as_stated_whatever_it_holds() {
    let mut audited = Audited::new(6, 30);
    audited.swarm.join(7);
    audited.swarm.write(1);
    let mut of_each: BTreeMap<u8, u64> = BTreeMap::new();
    for _ in 0..DAY_MS / STEP_MS {
        let asked: Vec<u8> =
            audited.swarm.world.audits.iter().map(|plan| audited.key_of(plan)).collect();
        asked.into_iter().for_each(|key| *of_each.entry(key).or_default() += 1);
        audited.step(STEP_MS);
    }
    // 144 a day and provider, 12 the spread of chance.
    let seventh = audited.swarm.disks[&7].has.len();
    let expected = if seventh == 0 { 6 } else { 7 };
    assert_eq!(of_each.len(), expected);
    assert!(of_each.values().all(|times| (96..192).contains(times)), "{of_each:?}");
}

#[test]
fn slander_costs_an_audit_and_makes_no_mark() {
    let mut audited = Audited::new(8, 40);
    let honest = audited.swarm.disks[&3].id;
    let held: Vec<(Bytes, u32)> = audited.swarm.disks[&3].has.iter().cloned().collect();
    assert!(held.len() > 10);
    for fragment in &held {
        audited.report(honest, fragment.clone());
    }
    let damaged = audited.swarm.world.status().blocks.unwrap().damaged_fragments;
    assert_eq!(damaged, held.len() as u64, "treated as lost at once");
    audited.run(5 * MINUTE_MS);
    assert!(audited.told > 0, "the directory looks for itself");
    assert!(audited.told <= held.len() as u64 + 10, "once each: {}", audited.told);
    assert_eq!(audited.told, audited.right);
    assert_eq!((audited.marks(), audited.status_of(3).distrusted), (vec![0; 8], false));
    audited.swarm.check_whole();
}

#[test]
fn reports_of_one_and_of_all_are_bounded() {
    use crate::engine::audit::Reporter;
    let mut world = World::new();
    let piece = |number: u64| {
        let mut block = [0; 16];
        block[8..].copy_from_slice(&number.to_be_bytes());
        (VolumeId::from_bytes([1; 16]), BlockId::from_bytes(block), 0)
    };
    (0..500).for_each(|at| world.engine.audit_soon(1, piece(at), Reporter::Session(7)));
    assert_eq!(world.engine.reports_waiting(), 64);
    (0..64).for_each(|at| world.engine.audit_soon(1, piece(at), Reporter::Provider(7)));
    assert_eq!(world.engine.reports_waiting(), 64, "known");
    for at in 0..5_000 {
        world.engine.audit_soon(1, piece(1_000 + at), Reporter::Session(8 + at / 10));
    }
    assert_eq!(world.engine.reports_waiting(), 1024);
}

/// A reader is right about a liar: the mark comes from the audit that follows.
#[test]
fn a_report_about_a_liar_is_looked_at_at_once() {
    let mut audited = Audited::new(6, 10);
    audited.swarm.liars.insert(3);
    let disk = audited.swarm.disks.get_mut(&3).unwrap();
    disk.spoilt = disk.has.clone();
    let (provider, fragment) = (disk.id, disk.has.first().cloned().unwrap());
    // Nobody else may take the fragment: it stays where it is meanwhile.
    audited.swarm.world.engine.config.audit_every_ms = 0;
    audited.report(provider, fragment);
    for _ in 0..4 {
        audited.swarm.world.pass(500);
        // Rebuilders wait; the liar answers.
        audited.swarm.read();
    }
    let plan = audited.swarm.world.audits.pop_front().expect("an audit");
    let outcome = audited.outcome(&plan);
    assert!(matches!(outcome, AuditOutcome::Wrong { is_witnessed: true, .. }));
    audited.tell(plan.ticket, outcome);
    assert_eq!(audited.status_of(3).found_wrong, 1);
}

#[test]
fn a_block_that_is_deleted_under_its_audit_makes_no_mark() {
    let mut audited = Audited::new(6, 1);
    let none = Question::SetVolume {
        name: "v".to_owned(),
        repair_at: None,
        quota_bytes: None,
        trash_hours: Some(0),
    };
    audited.swarm.world.ask(none);
    let plan = audited.plan();
    let file = audited.swarm.mount.ino() - 1;
    let ops = vec![unlink(1, "f1", file, false)];
    audited.swarm.mount.change(&mut audited.swarm.world, ops);
    audited.swarm.run(MINUTE_MS);
    assert!(audited.swarm.records().is_empty(), "the block is gone");
    audited.tell(plan.ticket, AuditOutcome::Missing);
    assert_eq!(audited.marks(), [0; 6]);
    assert_eq!(audited.events("damage"), 0);
}

#[test]
fn a_fragment_that_moves_under_its_audit_makes_no_mark() {
    let mut audited = Audited::new(8, 10);
    let plan = audited.plan();
    let provider = plan.place.provider.provider;
    audited.swarm.world.ask(Question::Drain { provider, undo: false });
    audited.swarm.run(MINUTE_MS);
    let wrong = AuditOutcome::Wrong { detail: "old".to_owned(), is_witnessed: true };
    audited.tell(plan.ticket, wrong);
    assert_eq!(audited.marks(), [0; 8]);
    audited.swarm.check_readable();
}

#[test]
fn who_came_back_under_its_audit_gets_no_mark() {
    let mut audited = Audited::new(6, 10);
    let plan = audited.plan();
    let key = audited.key_of(&plan);
    audited.swarm.leave(key);
    audited.swarm.join(key);
    audited.tell(plan.ticket, AuditOutcome::Missing);
    assert_eq!(audited.marks(), [0; 6]);
}

/// A writer that commits what it did not write cannot frame all who hold it.
#[test]
fn without_a_witness_there_is_no_mark() {
    let mut audited = Audited::new(8, 20);
    for _ in 0..6 {
        let plan = audited.plan();
        let wrong = AuditOutcome::Wrong { detail: "other".to_owned(), is_witnessed: false };
        audited.tell(plan.ticket, wrong);
    }
    assert_eq!(audited.marks(), [0; 8]);
    assert!(audited.events("damage") > 0, "it is treated as lost");
}

/// What it admits is damage and no lie; it is told to look at the rest. But whoever goes on losing what
/// it takes does not keep, whatever it says.
#[test]
fn an_admission_is_no_lie_and_many_of_them_stop_counting() {
    let mut audited = Audited::new(8, 40);
    let bad = audited.plan();
    let key = audited.key_of(&bad);
    let spoil = AuditOutcome::Damaged { detail: "a bad sector".to_owned() };
    audited.tell(bad.ticket, spoil);
    audited.swarm.run(MINUTE_MS);
    assert_eq!((audited.marks(), audited.swarm.scrubs), (vec![0; 8], 1));
    assert_eq!(audited.events("damage"), 1);
    audited.swarm.check_whole();
    // Its own scrub finds more: no audit, no mark.
    let disk = &audited.swarm.disks[&key];
    let fragments = disk.has.iter().take(5).cloned();
    let fragments = fragments.map(|(block, index)| FragmentId { block, index }).collect();
    let conn = disk.conn.unwrap();
    let report = DamageReport { fragments, detail: "scrub".to_owned() };
    audited.swarm.world.provider_says(conn, PUp::Damage(report));
    audited.run(30 * MINUTE_MS);
    assert_eq!((audited.marks(), audited.status_of(key).distrusted), (vec![0; 8], false));
    // Now whatever it takes is damaged soon, and it says so each time.
    audited.run_until(3 * ALL_DROPPED_MS, |audited| {
        let disk = audited.swarm.disks.get_mut(&key).unwrap();
        disk.spoilt = disk.has.clone();
        audited.status_of(key).distrusted
    });
    assert_eq!(audited.marks(), [0; 8], "it never lied");
}

/// A disk had an accident, and everybody who comes by says so: that is one loss. In a swarm just as
/// large as a stripe a distrusted provider would leave no room to mend it.
#[test]
fn an_accident_is_one_loss_however_many_report_it() {
    let mut audited = Audited::new(6, 20);
    let disk = audited.swarm.disks.get_mut(&3).unwrap();
    disk.spoilt = disk.has.clone();
    let (provider, spoilt) = (disk.id, disk.spoilt.clone());
    assert!(spoilt.len() > 2 * MARKS_MAX as usize);
    for fragment in spoilt {
        audited.report(provider, fragment);
    }
    let mut owned_to = 0;
    for _ in 0..40 {
        audited.swarm.world.pass(500);
        // Rebuilders wait; the provider answers.
        audited.swarm.read();
        for plan in std::mem::take(&mut audited.swarm.world.audits) {
            let outcome = audited.outcome(&plan);
            owned_to += u32::from(matches!(outcome, AuditOutcome::Damaged { .. }));
            audited.tell(plan.ticket, outcome);
            audited.ask();
        }
    }
    assert!(owned_to > MARKS_MAX, "{owned_to}");
    audited.run(180 * MINUTE_MS);
    assert!(audited.swarm.scrubs > 0, "it owned to it, and is to look at the rest");
    assert_eq!((audited.marks(), audited.status_of(3).distrusted), (vec![0; 6], false));
    audited.swarm.check_whole();
}

/// Reports open no window in which nothing counts: whoever goes on losing what it takes is found though
/// somebody reports one of its losses all the time, and praise of what is right clears nothing.
#[test]
fn reports_neither_hide_losses_nor_clear_them() {
    let mut audited = Audited::new(8, 40);
    let mut steps = 0;
    audited.run_until(3 * ALL_DROPPED_MS, |audited| {
        let disk = audited.swarm.disks.get_mut(&3).unwrap();
        let right = disk.has.first().cloned();
        disk.spoilt =
            disk.has.iter().filter(|held| Some(*held) != right.as_ref()).cloned().collect();
        let (provider, bad) = (disk.id, disk.spoilt.first().cloned());
        steps += 1;
        if steps % 24 == 0 {
            for fragment in right.into_iter().chain(bad) {
                audited.report(provider, fragment);
            }
        }
        audited.status_of(3).distrusted
    });
    assert_eq!(audited.marks(), [0; 8], "it never lied");
}

#[test]
fn what_a_marked_provider_lost_is_made_elsewhere_and_there_only_where_nobody_else_is() {
    for (providers, elsewhere) in [(7, true), (6, false)] {
        let mut audited = Audited::new(providers, 10);
        let plan = audited.plan();
        let (key, fragment) = (audited.key_of(&plan), Audited::fragment(&plan));
        audited.swarm.liars.insert(key);
        audited.swarm.disks.get_mut(&key).unwrap().has.remove(&fragment);
        audited.tell(plan.ticket, AuditOutcome::Missing);
        let id = audited.swarm.disks[&key].id;
        audited.run_until(30 * MINUTE_MS, |audited| {
            let records = audited.swarm.records();
            let (_, record) = records.iter().find(|(block, _)| *block == fragment.0).unwrap();
            let holder = record.providers[fragment.1 as usize];
            bit_is_well(record, fragment.1 as usize) && (holder != id) == elsewhere
        });
        assert_eq!(audited.status_of(key).found_wrong, 1);
        assert!(!audited.status_of(key).distrusted, "one is not enough");
    }
}

fn bit_is_well(record: &crate::records::BlockRecord, index: usize) -> bool {
    use crate::records::bit;
    bit(&record.durable, index) && !bit(&record.damaged, index) && !bit(&record.missing, index)
}

#[test]
fn one_block_counts_once() {
    let mut audited = Audited::new(6, 1);
    for _ in 0..6 {
        let plan = audited.plan();
        let wrong = AuditOutcome::Wrong { detail: "other".to_owned(), is_witnessed: true };
        audited.tell(plan.ticket, wrong);
        audited.run(10 * MINUTE_MS);
    }
    assert!(audited.marks().iter().all(|marks| *marks <= 1), "{:?}", audited.marks());
}

#[test]
fn marks_outlive_the_directory_and_only_trust_takes_them_back() {
    let mut audited = Audited::new(8, 40);
    audited.lie(3, |_| true);
    audited.run_until(2 * ALL_DROPPED_MS, |audited| audited.status_of(3).distrusted);
    audited.swarm.world.restart(0);
    let key_hash = Bytes::from(vec![3; 32]);
    let known = |world: &World| {
        let id = world.engine.provider_of_key[&key_hash];
        world.engine.members[&id].record.clone()
    };
    assert!(known(&audited.swarm.world).distrusted);
    let (_, id, _) = audited.swarm.world.provider(3, Bytes::new());
    assert!(known(&audited.swarm.world).distrusted, "coming back changes nothing");
    let answer = audited.swarm.world.ask(Question::Trust { provider: id });
    assert!(matches!(answer, Answer::Count(_)), "{answer:?}");
    let record = known(&audited.swarm.world);
    assert_eq!((record.distrusted, record.found_wrong, record.suspect), (false, 0, true));
    let again = audited.swarm.world.ask(Question::Trust { provider: id });
    assert!(matches!(again, Answer::Refused { kind: RefusalKind::Invalid, .. }));
    let nobody = audited.swarm.world.ask(Question::Trust { provider: 999 });
    assert!(matches!(nobody, Answer::Refused { kind: RefusalKind::NotFound, .. }));
}

#[test]
fn who_is_trusted_again_counts_when_it_was_asked_after_all_and_is_found_again_if_it_lies_on() {
    let mut audited = Audited::new(8, 60);
    audited.lie(3, |_| true);
    audited.run_until(2 * ALL_DROPPED_MS, |audited| audited.status_of(3).distrusted);
    let provider = audited.swarm.disks[&3].id;
    audited.swarm.liars.remove(&3);
    audited.swarm.world.ask(Question::Trust { provider });
    audited.run(MINUTE_MS);
    let status = audited.status_of(3);
    assert!(status.accepts_puts && status.found_wrong == 0, "{status:?}");
    audited.swarm.write(40);
    audited.run(5 * MINUTE_MS);
    assert!(!audited.swarm.disks[&3].has.is_empty(), "new blocks go there");
    audited.swarm.check_whole();
    audited.lie(3, |_| true);
    audited.run_until(2 * ALL_DROPPED_MS, |audited| audited.status_of(3).distrusted);
    assert_eq!(audited.events("provider-distrusted"), 2);
    assert_eq!(audited.events("provider-trusted"), 1);
}

/// Saying "busy" is no way out: after some times it is read from as by anybody.
#[test]
fn who_is_always_busy_is_asked_all_the_same() {
    let mut audited = Audited::new(6, 10);
    let mut asked_when_idle = Vec::new();
    for _ in 0..3 * 60 * MINUTE_MS / STEP_MS {
        audited.swarm.world.pass(STEP_MS);
        let conn = audited.swarm.disks[&3].conn.unwrap();
        let queue = audited.swarm.world.to_providers.entry(conn).or_default();
        for down in std::mem::take(queue) {
            let PDown::Check(check) = down else { continue };
            asked_when_idle.push(check.when_idle);
            let status = if check.when_idle { FragmentStatus::Busy } else { FragmentStatus::Ok };
            let reply = CheckReply { query: check.query, statuses: vec![status as i32] };
            audited.swarm.world.provider_says(conn, PUp::Checked(reply));
        }
        audited.swarm.read();
        for plan in std::mem::take(&mut audited.swarm.world.audits) {
            audited.tell(plan.ticket, AuditOutcome::Right);
            audited.ask();
        }
    }
    let first = asked_when_idle.iter().position(|when_idle| !when_idle);
    assert_eq!(first, Some(6), "{asked_when_idle:?}");
}

/// While fragments were made again over slow lines, an audit asked one that was sending for a fragment
/// more: its line was busy half as long again.
#[test]
fn audits_at_random_wait_for_repairs_and_not_for_ever() {
    const EVERY_MS: u64 = 60_000;
    let mut audited = Audited::new(7, 40);
    audited.swarm.world.engine.config.audit_every_ms = EVERY_MS;
    let dead = 3;
    audited.swarm.leave(dead);
    let others = audited.swarm.disks.iter().filter(|(key, _)| **key != dead);
    let others: BTreeSet<u32> = others.map(|(_, disk)| disk.id).collect();
    // Nobody carries out its orders: who is busy stays so, until they are given up.
    let (mut busy_since, mut waited) = (BTreeMap::<u32, u64>::new(), BTreeSet::new());
    for _ in 0..2 * DAY_MS / STEP_MS {
        audited.swarm.world.pass(STEP_MS);
        audited.swarm.world.says(audited.swarm.mount.conn, Up::Renew(Renew::default()));
        audited.swarm.read();
        let now_ms = audited.swarm.world.now_ms;
        while let Some(plan) = audited.swarm.world.audits.pop_front() {
            audited.tell(plan.ticket, AuditOutcome::Right);
            audited.ask();
            let provider = plan.place.provider.provider;
            let Some(since_ms) = busy_since.get(&provider) else { continue };
            let passed_ms = now_ms - since_ms;
            assert!(passed_ms >= EVERY_MS, "{provider} after {passed_ms} ms");
            waited.insert(provider);
        }
        let jobs = &audited.swarm.world.engine.repairs.jobs;
        for provider in &others {
            match jobs.is_free(*provider, now_ms) {
                true => busy_since.remove(provider),
                false => Some(*busy_since.entry(*provider).or_insert(now_ms)),
            };
        }
        if waited == others {
            return;
        }
    }
    panic!("{waited:?} of {others:?}");
}

#[test]
fn bytes_a_second_are_bounded() {
    let mut audited = Audited::new(8, 40);
    audited.swarm.world.engine.config.audit_every_ms = 1_000;
    audited.swarm.world.engine.config.audit_kib_per_s = 1;
    (0..20 * 60).for_each(|_| audited.step(500));
    // A fragment of these is one slot of 4 KiB and a little: one in four seconds.
    assert!((100..160).contains(&audited.told), "{}", audited.told);
}

/// Once the lowest numbers took every byte there was, as soon as these did not do for all: a provider
/// with a high number was never audited.
#[test]
fn where_bytes_are_few_every_provider_has_its_turn() {
    let mut audited = Audited::new(8, 40);
    audited.swarm.world.engine.config.audit_every_ms = 1_000;
    audited.swarm.world.engine.config.audit_kib_per_s = 1;
    let mut turns: BTreeMap<u32, u32> = BTreeMap::new();
    for _ in 0..40 {
        for _ in 0..8 {
            *turns.entry(audited.plan().place.provider.provider).or_default() += 1;
        }
    }
    let (fewest, most) = (turns.values().min(), turns.values().max());
    assert!(turns.len() == 8 && fewest >= Some(&35) && most <= Some(&45), "{turns:?}");
}
