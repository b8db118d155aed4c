//! Byte-range locks as mounts ask for them: kept by a mount that is alone, recalled, said again.

use super::*;

fn lock(owner: u64, kind: LockKind, bytes: std::ops::RangeInclusive<u64>) -> LockRequest {
    LockRequest {
        request: owner,
        ino: 1,
        owner,
        start: *bytes.start(),
        end: *bytes.end(),
        kind: kind as i32,
        may_keep: true,
        ..Default::default()
    }
}

fn held(owner: u64, kind: LockKind, bytes: std::ops::RangeInclusive<u64>) -> HeldLock {
    let (start, end) = (*bytes.start(), *bytes.end());
    HeldLock { owner, start, end, kind: kind as i32, pid: 0 }
}

fn says(mount: &Mount, world: &mut World, locks: Vec<HeldLock>, kept: bool) {
    let said = us_proto::v1::Locks { ino: 1, locks, kept, unchanged: false };
    world.says(mount.conn, Up::Locks(said));
}

fn reply(world: &mut World, mount: &Mount) -> Option<LockReply> {
    world.hear_some(mount.conn, |down| match down {
        Down::Lock(reply) => Some(*reply),
        _ => None,
    })
}

fn is_recalled(world: &mut World, mount: &Mount) -> bool {
    let recall = |down: &Down| matches!(down, Down::RecallLocks(_)).then_some(());
    world.hear_some(mount.conn, recall).is_some()
}

fn is_ended(world: &mut World, conn: u64) -> bool {
    world.hear_some(conn, |down| matches!(down, Down::Ended(_)).then_some(())).is_some()
}

fn world() -> World {
    let mut world = World::new();
    world.volume("v", 4, 2);
    world
}

#[test]
fn a_mount_that_is_alone_keeps_the_locks_until_another_asks() {
    let mut world = world();
    let (one, two) = (world.open(1, "v"), world.open(2, "v"));
    world.says(one.conn, Up::Lock(lock(1, LockKind::Write, 0..=9)));
    let granted = reply(&mut world, &one).unwrap();
    assert!(granted.granted && granted.keep);
    // What it does with them is not known here: even what was free is not given, and not told free.
    world.says(two.conn, Up::Lock(lock(5, LockKind::Read, 50..=50)));
    let test = LockRequest { request: 6, test: true, ..lock(6, LockKind::Read, 50..=50) };
    world.says(two.conn, Up::Lock(test));
    assert_eq!(reply(&mut world, &two), None);
    assert!(is_recalled(&mut world, &one) && !is_recalled(&mut world, &one), "once");
    says(&one, &mut world, vec![held(2, LockKind::Write, 50..=59)], false);
    let (first, second) = (reply(&mut world, &two).unwrap(), reply(&mut world, &two).unwrap());
    for refused in [first, second] {
        assert!(!refused.granted && !refused.undecided && !refused.keep);
        assert_eq!((refused.blocking_start, refused.blocking_end), (50, 59));
    }
    // The first lock went while it was kept.
    world.says(two.conn, Up::Lock(lock(5, LockKind::Read, 0..=9)));
    let granted = reply(&mut world, &two).unwrap();
    assert!(granted.granted && !granted.keep, "the first mount has one");
}

#[test]
fn who_asks_does_not_keep() {
    let mut world = world();
    let (one, two) = (world.open(1, "v"), world.open(2, "v"));
    let old = LockRequest { may_keep: false, ..lock(1, LockKind::Read, 0..=0) };
    world.says(one.conn, Up::Lock(old));
    assert!(!reply(&mut world, &one).unwrap().keep, "it does not know how to");
    world.says(one.conn, Up::Lock(lock(1, LockKind::Read, 0..=9)));
    assert!(reply(&mut world, &one).unwrap().keep);
    world.says(one.conn, Up::Lock(lock(1, LockKind::Unlock, 0..=4)));
    assert!(!reply(&mut world, &one).unwrap().keep, "a release makes nobody keep anything");
    world.says(two.conn, Up::Lock(lock(5, LockKind::Write, 0..=4)));
    assert!(reply(&mut world, &two).unwrap().granted);
    assert!(!is_recalled(&mut world, &one));
}

#[test]
fn what_cannot_be_kept_ends_the_session() {
    let mut world = world();
    let (one, two) = (world.open(1, "v"), world.open(2, "v"));
    world.says(one.conn, Up::Lock(lock(1, LockKind::Read, 0..=9)));
    assert!(reply(&mut world, &one).unwrap().keep);
    // Another has locks of which this one did not hear.
    says(&two, &mut world, vec![held(1, LockKind::Read, 50..=50)], false);
    assert!(is_ended(&mut world, two.conn));
    let three = world.open(3, "v");
    says(&three, &mut world, vec![], true);
    assert!(is_ended(&mut world, three.conn), "it never kept them");
    let four = world.open(4, "v");
    let bad = vec![held(1, LockKind::Read, 5..=9), held(1, LockKind::Read, 9..=9)];
    says(&four, &mut world, bad, false);
    assert!(is_ended(&mut world, four.conn), "an owner's locks overlap");
}

/// A file whose locks are as many as can be is refused one more at once, and one that waits is told
/// when its turn comes: both were asked again without end.
#[test]
fn one_lock_too_many_is_an_answer() {
    let mut world = world();
    let (one, two) = (world.open(1, "v"), world.open(2, "v"));
    let max = us_core::range_locks::FILE_LOCKS_MAX as u64;
    let all = (0..max).map(|at| held(1, LockKind::Write, 2 * at..=2 * at)).collect();
    says(&one, &mut world, all, false);
    world.says(two.conn, Up::Lock(lock(5, LockKind::Write, 1..=1)));
    let refused = reply(&mut world, &two).unwrap();
    assert!(refused.too_many && !refused.granted && !refused.keep);
    let waits = LockRequest { wait: true, wait_ms: 9_000, ..lock(5, LockKind::Write, 0..=1) };
    world.says(two.conn, Up::Lock(waits));
    assert_eq!(reply(&mut world, &two), None);
    let wide = LockRequest { request: 7, ..lock(1, LockKind::Unlock, 0..=0) };
    world.says(one.conn, Up::Lock(wide));
    assert!(reply(&mut world, &two).unwrap().granted);
}

/// After a restart nobody is given a lock before all have said theirs; who does not come back is shut
/// out, and who said that he keeps a file's locks was never asked anything.
#[test]
fn locks_wait_for_mounts_that_have_not_come_back() {
    let mut world = world();
    let (mut one, two) = (world.open(1, "v"), world.open(2, "v"));
    world.says(one.conn, Up::Lock(lock(1, LockKind::Write, 0..=9)));
    assert!(reply(&mut world, &one).unwrap().keep);
    world.restart(0);
    assert!(matches!(one.resume(&mut world, "v"), Down::Opened(_)));
    says(&one, &mut world, vec![held(1, LockKind::Write, 0..=4)], true);
    world.says(one.conn, Up::Reclaim(Reclaim { leases: vec![], last: true }));
    // The second mount is dead. A third wants what the first keeps, and something else.
    let three = world.open(3, "v");
    world.says(three.conn, Up::Lock(lock(5, LockKind::Write, 0..=0)));
    let other = LockRequest { ino: 9, request: 6, ..lock(5, LockKind::Write, 0..=0) };
    world.says(three.conn, Up::Lock(other));
    assert!(is_recalled(&mut world, &one));
    says(&one, &mut world, vec![held(1, LockKind::Write, 0..=4)], false);
    assert_eq!(reply(&mut world, &three), None, "the second mount may have more");
    world.pass(30_000);
    for mount in [&one, &three] {
        world.says(mount.conn, Up::Renew(Renew::default()));
    }
    world.pass(20_000);
    let (first, second) = (reply(&mut world, &three).unwrap(), reply(&mut world, &three).unwrap());
    let mut answers = [first, second];
    answers.sort_unstable_by_key(|reply| reply.request);
    assert!(!answers[0].granted && answers[0].blocking_end == 4, "{answers:?}");
    assert!(answers[1].granted, "{answers:?}");
    assert!(world.engine.sessions[&two.session].record.fenced);
}

/// A keep that the mount never heard of, or did not take up, is over when it has said all it holds.
#[test]
fn a_keep_that_was_lost_keeps_nobody_out() {
    let mut world = world();
    let (mut one, two) = (world.open(1, "v"), world.open(2, "v"));
    let test = LockRequest { test: true, ..lock(1, LockKind::Write, 0..=9) };
    world.says(one.conn, Up::Lock(test));
    world.event(Event::Disconnected { conn: ConnId(one.conn) });
    world.says(two.conn, Up::Lock(lock(5, LockKind::Write, 0..=0)));
    assert_eq!(reply(&mut world, &two), None);
    assert!(matches!(one.resume(&mut world, "v"), Down::Opened(_)));
    world.says(one.conn, Up::Reclaim(Reclaim { leases: vec![], last: true }));
    assert!(reply(&mut world, &two).unwrap().granted);
}

/// One session could make the directory remember locks on any number of files.
#[test]
fn locks_of_one_session_are_bounded_over_all_files() {
    use us_core::range_locks::{FILE_LOCKS_MAX, SESSION_LOCKS_MAX};
    let mut world = world();
    let (one, two) = (world.open(1, "v"), world.open(2, "v"));
    let mut request = 0;
    let mut asks = |world: &mut World, mount: &Mount, ino, at: u64, may_keep| {
        request += 1;
        let wanted = lock(1, LockKind::Write, 2 * at..=2 * at);
        world.says(mount.conn, Up::Lock(LockRequest { ino, request, may_keep, ..wanted }));
        reply(world, mount).expect("an answer")
    };
    // A file in which nothing but a kept lock lies counts as two.
    assert!(asks(&mut world, &one, 1, 0, true).keep);
    let files = (SESSION_LOCKS_MAX / FILE_LOCKS_MAX) as u64;
    let mut granted = 2;
    for ino in 10..10 + files {
        let mut all: Vec<HeldLock> = Vec::new();
        while all.len() < FILE_LOCKS_MAX && granted < SESSION_LOCKS_MAX - 3 {
            let at = 2 * all.len() as u64;
            all.push(held(1, LockKind::Write, at..=at));
            granted += 1;
        }
        let said = us_proto::v1::Locks { ino, locks: all, kept: false, unchanged: false };
        world.says(one.conn, Up::Locks(said));
    }
    for at in 0..3 {
        assert!(asks(&mut world, &one, 99, at, false).granted);
    }
    let refused = asks(&mut world, &one, 99, 3, true);
    assert!(refused.too_many && !refused.granted && !refused.keep);
    assert!(asks(&mut world, &two, 99, 3, false).granted, "another has its own");
    // A release that makes two of one lock is one more too; others make room.
    let middle = LockRequest { ino: 99, request: 70, ..lock(1, LockKind::Unlock, 0..=0) };
    world.says(one.conn, Up::Lock(middle));
    assert!(reply(&mut world, &one).unwrap().granted);
    assert!(asks(&mut world, &one, 98, 0, false).granted);
    assert!(asks(&mut world, &one, 98, 1, false).too_many);
    // With the session all of it is forgotten.
    world.says(one.conn, Up::Close(CloseSession {}));
    let (mut again, locks) = (world.open(1, "v"), &world.engine.locks);
    assert_eq!(format!("{locks:?}").matches("kept: Some").count(), 0);
    again.batch = 0;
    assert!(asks(&mut world, &again, 98, 1, false).granted);
}

/// What a mount says it has is bounded too: any number of files could be filled that way.
#[test]
fn what_is_said_without_bounds_ends_the_session() {
    let mut world = world();
    let one = world.open(1, "v");
    let max = us_core::range_locks::FILE_LOCKS_MAX as u64;
    let all: Vec<_> = (0..max).map(|at| held(1, LockKind::Write, 2 * at..=2 * at)).collect();
    for ino in 1..=8 {
        let said = us_proto::v1::Locks { ino, locks: all.clone(), kept: false, unchanged: false };
        world.says(one.conn, Up::Locks(said));
        assert!(!is_ended(&mut world, one.conn), "file {ino}");
    }
    says(&one, &mut world, all.clone(), false);
    assert!(!is_ended(&mut world, one.conn), "the same again is no more");
    let said =
        us_proto::v1::Locks { ino: 9, locks: all[..1].to_vec(), kept: false, unchanged: false };
    world.says(one.conn, Up::Locks(said));
    assert!(is_ended(&mut world, one.conn));
}

/// A client that may only read could hold write locks, for which others then waited.
#[test]
fn a_read_only_session_has_no_write_locks() {
    let mut world = world();
    let other = world.open(2, "v");
    let read_only = || OpenSession { volume: "v".into(), read_only: true, ..Default::default() };
    let reader = |world: &mut World| {
        let conn = world.dial(1, read_only());
        assert!(matches!(world.hear(conn), Down::Opened(_)));
        conn
    };
    // It may read, and ask who would be in the way.
    let conn = reader(&mut world);
    world.says(conn, Up::Lock(LockRequest { may_keep: false, ..lock(1, LockKind::Read, 0..=9) }));
    let test = LockRequest { test: true, may_keep: false, ..lock(2, LockKind::Write, 0..=9) };
    world.says(conn, Up::Lock(test));
    assert!(!is_ended(&mut world, conn));
    for says in [
        Up::Lock(lock(1, LockKind::Write, 20..=29)),
        Up::Locks(us_proto::v1::Locks {
            ino: 1,
            locks: vec![held(1, LockKind::Write, 20..=29)],
            kept: false,
            unchanged: false,
        }),
    ] {
        let conn = reader(&mut world);
        world.says(conn, says);
        assert!(is_ended(&mut world, conn));
    }
    world.says(other.conn, Up::Lock(lock(5, LockKind::Write, 20..=29)));
    assert!(reply(&mut world, &other).unwrap().granted, "nothing is in its way");
}
