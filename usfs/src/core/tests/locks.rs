//! Byte-range locks: what is kept here, when it no longer is, and what a lost answer leaves.

use us_core::range_locks::{FILE_LOCKS_MAX, SESSION_LOCKS_MAX};
use us_proto::v1::LockKind::{Read, Unlock, Write};
use us_proto::v1::{LockKind, LockReply, LockRequest};

use super::super::locks::{LockAsk, LockEvent, LockOutcome, Locked, OwnLock};
use super::*;

const FILE: Ino = Ino(7);

fn lock(by: u64, kind: LockKind, bytes: std::ops::RangeInclusive<u64>) -> OwnLock {
    OwnLock { by, start: *bytes.start(), end: *bytes.end(), kind, pid: 1 }
}

fn ask(core: &mut Core, number: u64, wanted: OwnLock, wait_ms: u32) -> Vec<LockOutcome> {
    ask_at(core, at(1), number, wanted, wait_ms)
}

fn ask_at(
    core: &mut Core,
    now: Now,
    number: u64,
    wanted: OwnLock,
    wait_ms: u32,
) -> Vec<LockOutcome> {
    let ask = LockAsk { wanted, test: false, wait_ms };
    outcomes(core.step_locks(now, LockEvent::Asked { number, ino: FILE, ask }))
}

fn outcomes(locked: Locked) -> Vec<LockOutcome> {
    locked.done.into_iter().map(|(_, outcome)| outcome).collect()
}

fn granted(request: u64, keep: bool) -> LockReply {
    LockReply { request, granted: true, keep, ..LockReply::default() }
}

fn hears(core: &mut Core, reply: LockReply) -> Vec<LockOutcome> {
    match core.on_down(at(1), Down::Lock(reply)) {
        Some(Effect::Locked(locked)) => outcomes(locked),
        other => panic!("{other:?}"),
    }
}

fn recall_locks(core: &mut Core) {
    core.on_down(at(1), Down::RecallLocks(v1::RecallLocks { ino: FILE.0 }));
}

fn requests(core: &mut Core) -> Vec<LockRequest> {
    let request = |event| match event {
        Up::Lock(request) => Some(request),
        _ => None,
    };
    outgoing(core).into_iter().filter_map(request).collect()
}

/// A core that keeps the locks of the file, of which it has the first.
fn alone() -> Core {
    let mut core = core();
    assert_eq!(ask(&mut core, 1, lock(1, Write, 0..=9), 0), []);
    assert_eq!(hears(&mut core, granted(1, true)), [LockOutcome::Granted]);
    assert!(core.locks().keeps(FILE));
    outgoing(&mut core);
    core
}

#[test]
fn alone_with_a_file_nobody_is_asked() {
    let mut core = alone();
    let blocking = LockOutcome::InTheWay(lock(1, Write, 0..=9));
    assert_eq!(ask(&mut core, 2, lock(2, Read, 5..=5), 0), [blocking]);
    assert_eq!(ask(&mut core, 3, lock(2, Read, 5..=5), 1000), [], "it waits");
    assert_eq!(ask(&mut core, 4, lock(3, Read, 5..=6), 1000), []);
    let both = [LockOutcome::Granted; 3];
    assert_eq!(ask(&mut core, 5, lock(1, Unlock, 0..=u64::MAX), 0), both);
    assert_eq!(ask(&mut core, 6, lock(1, Write, 5..=5), 1000), []);
    let given_up = core.step_locks(at(1), LockEvent::GivenUp { number: 6 });
    assert_eq!(outcomes(given_up), [LockOutcome::InTheWay(lock(2, Read, 5..=5))]);
    assert_eq!(outgoing(&mut core), []);
}

#[test]
fn a_recall_is_answered_with_all_and_what_waits_is_asked_for() {
    let mut core = alone();
    assert_eq!(ask(&mut core, 2, lock(1, Unlock, 0..=4), 0), [LockOutcome::Granted]);
    assert_eq!(ask(&mut core, 3, lock(2, Write, 0..=9), 1000), []);
    recall_locks(&mut core);
    let sent = outgoing(&mut core);
    let [Up::Locks(said), Up::Lock(asked)] = &sent[..] else { panic!("{sent:?}") };
    assert_eq!((said.ino, said.kept, said.unchanged, asked.request), (7, false, false, 3));
    let held = v1::HeldLock { owner: 1, start: 5, end: 9, kind: Write as i32, pid: 1 };
    assert_eq!(said.locks, [held]);
    // Where nothing is kept the answer is that nothing is new.
    recall_locks(&mut core);
    let sent = outgoing(&mut core);
    assert!(matches!(&sent[..], [Up::Locks(said)] if said.unchanged), "{sent:?}");
}

#[test]
fn an_answer_to_a_question_before_a_recall_lets_nobody_keep_anything() {
    let mut core = core();
    ask(&mut core, 1, lock(1, Write, 0..=9), 0);
    recall_locks(&mut core);
    assert_eq!(hears(&mut core, granted(1, true)), [LockOutcome::Granted]);
    assert!(!core.locks().keeps(FILE));
    // Nor one behind which another is on its way.
    ask(&mut core, 2, lock(1, Write, 20..=29), 0);
    ask(&mut core, 3, lock(2, Write, 30..=39), 0);
    hears(&mut core, granted(2, true));
    assert!(!core.locks().keeps(FILE));
    hears(&mut core, granted(3, true));
    assert!(core.locks().keeps(FILE));
}

#[test]
fn nothing_is_granted_here_while_the_session_is_not_trusted() {
    let mut core = alone();
    assert_eq!(ask_at(&mut core, at(30_000), 2, lock(2, Write, 20..=29), 0), []);
    let sent = outgoing(&mut core);
    assert!(matches!(&sent[..], [Up::Locks(_), Up::Lock(_)]), "{sent:?}");
    // What is given up is given up.
    let mut core = alone();
    let freed = ask_at(&mut core, at(30_000), 2, lock(1, Unlock, 0..=9), 0);
    assert_eq!(freed, [LockOutcome::Granted]);
}

#[test]
fn a_file_that_nobody_has_open_is_not_kept() {
    let mut core = alone();
    ask(&mut core, 2, lock(1, Unlock, 0..=u64::MAX), 0);
    core.step_locks(at(1), LockEvent::Closed(FILE));
    let sent = outgoing(&mut core);
    assert!(matches!(&sent[..], [Up::Locks(said)] if said.locks.is_empty()), "{sent:?}");
    assert!(!core.locks().keeps(FILE));
    assert_eq!(core.claim_locks(), [], "the file is forgotten");
}

/// Who gave up waiting was told that it failed: what was granted after that is taken back, and what
/// the owner asks meanwhile is asked behind it.
#[test]
fn what_is_granted_too_late_is_taken_back() {
    let mut core = core();
    ask(&mut core, 1, lock(1, Read, 2..=5), 0);
    hears(&mut core, granted(1, false));
    ask(&mut core, 2, lock(1, Write, 0..=9), 1000);
    core.step_locks(at(1), LockEvent::GivenUp { number: 2 });
    assert_eq!(ask(&mut core, 3, lock(1, Write, 7..=7), 0), []);
    outgoing(&mut core);
    let mut put_back = Vec::new();
    assert_eq!(hears(&mut core, granted(2, false)), []);
    for _ in 0..3 {
        let sent = requests(&mut core);
        put_back.extend(sent.iter().map(|sent| (sent.start, sent.end, sent.kind())));
        assert_eq!(hears(&mut core, granted(sent[0].request, false)), []);
    }
    assert_eq!(put_back, [(0, 1, Unlock), (2, 5, Read), (6, 9, Unlock)]);
    let sent = requests(&mut core);
    assert_eq!(sent.iter().map(|sent| sent.request).collect::<Vec<_>>(), [3]);
    assert_eq!(core.locks().held(FILE), [lock(1, Read, 2..=5)]);
}

/// A release whose answer was lost may have been done: another mount may have the bytes by now.
#[test]
fn a_new_stream_begins_with_all_locks_and_asks_again() {
    let mut core = core();
    ask(&mut core, 1, lock(1, Write, 0..=9), 0);
    hears(&mut core, granted(1, false));
    ask(&mut core, 2, lock(1, Unlock, 0..=4), 0);
    ask(&mut core, 3, lock(2, Write, 50..=59), 1000);
    ask(&mut core, 4, lock(3, Write, 60..=69), 0);
    core.step_locks(at(1), LockEvent::GivenUp { number: 4 });
    outgoing(&mut core);
    let claims = core.claim_locks();
    let [Up::Locks(said)] = &claims[..] else { panic!("{claims:?}") };
    let bytes: Vec<_> = said.locks.iter().map(|held| (held.owner, held.start, held.end)).collect();
    assert_eq!((bytes, said.kept), (vec![(1, 5, 9)], false));
    let again: Vec<u64> = requests(&mut core).iter().map(|sent| sent.request).collect();
    assert_eq!(again, [2, 3], "nobody waits for the last");
    // What is kept goes on being kept.
    let mut core = alone();
    let claims = core.claim_locks();
    assert!(matches!(&claims[..], [Up::Locks(said)] if said.kept), "{claims:?}");
    assert!(core.locks().keeps(FILE));
}

#[test]
fn one_lock_too_many_is_an_error() {
    let mut core = alone();
    for at in 0..FILE_LOCKS_MAX as u64 - 1 {
        let wanted = lock(2, Write, 100 + 2 * at..=100 + 2 * at);
        assert_eq!(ask(&mut core, at + 2, wanted, 0), [LockOutcome::Granted]);
    }
    assert_eq!(ask(&mut core, 1 << 20, lock(3, Write, 50..=50), 0), [LockOutcome::TooMany]);
    assert_eq!(ask(&mut core, 1 << 21, lock(1, Unlock, 5..=5), 0), [LockOutcome::TooMany]);
    recall_locks(&mut core);
    let sent = outgoing(&mut core);
    assert!(matches!(&sent[..], [Up::Locks(said)] if said.locks.len() == FILE_LOCKS_MAX));
}

/// A release that waited behind a request that was given up, and was given up itself, was forgotten: the
/// lock stayed for ever.
#[test]
fn a_release_that_nobody_waits_for_is_done() {
    let free = lock(1, Unlock, 0..=u64::MAX);
    let given_up_behind = || {
        let mut core = core();
        ask(&mut core, 1, lock(1, Write, 0..=9), 0);
        hears(&mut core, granted(1, false));
        ask(&mut core, 2, lock(1, Write, 20..=29), 1000);
        core.step_locks(at(1), LockEvent::GivenUp { number: 2 });
        ask(&mut core, 3, free, 0);
        core.step_locks(at(1), LockEvent::GivenUp { number: 3 });
        outgoing(&mut core);
        core
    };
    let mut core = given_up_behind();
    hears(&mut core, LockReply { request: 2, ..LockReply::default() });
    let sent = requests(&mut core);
    assert_eq!(
        sent.iter().map(|sent| (sent.request, sent.kind())).collect::<Vec<_>>(),
        [(3, Unlock)]
    );
    hears(&mut core, granted(3, false));
    assert_eq!(core.locks().held(FILE), []);
    // Nor is it where the stream breaks.
    let mut core = given_up_behind();
    let claims = core.claim_locks();
    assert!(matches!(&claims[..], [Up::Locks(said)] if said.locks.is_empty()), "{claims:?}");
    assert_eq!(requests(&mut core), []);
}

/// A mount that keeps the locks of many files itself had no bound, and the directory has one.
#[test]
fn locks_of_all_files_together_are_bounded() {
    let mut core = core();
    let mut numbers = 0..;
    let mut next = || numbers.next().unwrap();
    let ask_of = |core: &mut Core, number, ino, wanted| {
        let ask = LockAsk { wanted, test: false, wait_ms: 0 };
        outcomes(core.step_locks(at(1), LockEvent::Asked { number, ino: Ino(ino), ask }))
    };
    // Four files are kept, each with its lock: of the fifth there is one lock less.
    let files = SESSION_LOCKS_MAX / FILE_LOCKS_MAX;
    let mut room = SESSION_LOCKS_MAX;
    for ino in 0..=files as u64 {
        let first = next();
        assert!(ask_of(&mut core, first, 10 + ino, lock(1, Write, 0..=0)).is_empty());
        assert_eq!(hears(&mut core, granted(first, true)), [LockOutcome::Granted]);
        room -= 2;
    }
    for ino in 0..=files as u64 {
        for byte in 1..FILE_LOCKS_MAX as u64 {
            let wanted = lock(1, Write, 2 * byte..=2 * byte);
            let outcome = ask_of(&mut core, next(), 10 + ino, wanted);
            let expected = if room > 0 { LockOutcome::Granted } else { LockOutcome::TooMany };
            assert_eq!(outcome, [expected], "file {ino}, byte {byte}");
            room = room.saturating_sub(1);
            if expected == LockOutcome::TooMany {
                break;
            }
        }
    }
    // What is released, or no longer kept, makes room.
    let all = lock(1, Unlock, 0..=u64::MAX);
    assert_eq!(ask_of(&mut core, next(), 10, all), [LockOutcome::Granted]);
    let again = ask_of(&mut core, next(), 14, lock(1, Write, 99_999..=99_999));
    assert_eq!(again, [LockOutcome::Granted]);
}

/// A read-only mount asks nobody for a write lock; whether one is in the way it may ask.
#[test]
fn a_read_only_mount_has_no_write_locks() {
    let mut core = core();
    core.config.read_only = true;
    assert_eq!(ask(&mut core, 1, lock(1, Write, 0..=0), 9), [LockOutcome::ReadOnly]);
    assert!(outgoing(&mut core).is_empty());
    let test = LockAsk { wanted: lock(1, Write, 0..=0), test: true, wait_ms: 0 };
    core.step_locks(at(1), LockEvent::Asked { number: 2, ino: FILE, ask: test });
    ask(&mut core, 3, lock(1, Read, 0..=0), 0);
    assert_eq!(requests(&mut core).len(), 2);
}
