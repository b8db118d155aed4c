//! The directory dies at any commit; mounts come back, say what they held, and replay.

use super::*;

/// What a mount acknowledged as durable is there after a crash that keeps only the durable prefix;
/// what it replays is there too; and nobody gets a lease before it has said what it holds.
#[test]
fn a_mount_replays_what_the_crash_took() {
    for kept in 0..4 {
        let mut world = World::new();
        world.volume("v", 4, 2);
        let mut one = world.open(1, "v");
        let mut two = world.open(2, "v");
        one.inode(&mut world, 1, Level::Exclusive).unwrap();
        let inos: Vec<u64> = (0..4).map(|_| one.ino()).collect();
        let names = ["a", "b", "c", "d"];
        let ops: Vec<Op> =
            names.iter().zip(&inos).map(|(name, ino)| create(1, name, *ino, 0o100_644)).collect();
        one.change(&mut world, vec![ops[0].clone()]);
        world.auto = false;
        for op in &ops[1..] {
            one.change(&mut world, vec![op.clone()]);
        }
        let undurable = world.undurable();
        assert_eq!(undurable, 3);
        world.auto = true;
        world.restart(kept.min(undurable));
        let Down::Opened(opened) = two.resume(&mut world, "v") else { panic!("resumed") };
        assert!(opened.resumed);
        world.says(two.conn, Up::Reclaim(Reclaim { leases: vec![], last: true }));
        assert!(two.entry(&mut world, 1, "a").is_none(), "the first mount may hold it");
        let Down::Opened(opened) = one.resume(&mut world, "v") else { panic!("resumed") };
        assert_eq!(opened.applied, 1 + kept.min(undurable) as u64);
        let lease = |ino: u64, grant| InodeLease {
            ino,
            level: Level::Exclusive.to_wire(),
            open: false,
            grant,
        };
        let mut leases: Vec<InodeLease> = inos.iter().map(|ino| lease(*ino, 0)).collect();
        leases.push(lease(1, 1 << 40));
        world.says(one.conn, Up::Reclaim(Reclaim { leases, last: true }));
        // The second mount's question was parked all the while; now it recalls.
        let recall = one.recall(&mut world).expect("a recall");
        one.batch = opened.applied;
        for op in &ops[opened.applied as usize..] {
            one.change(&mut world, vec![op.clone()]);
        }
        one.give_back(&mut world, &recall, false);
        while let Some(recall) = one.recall(&mut world) {
            one.give_back(&mut world, &recall, false);
        }
        let found = two.answer(&mut world).expect("an answer");
        assert_eq!(found.entries[0].ino, inos[0]);
        world.says(one.conn, Up::Close(CloseSession {}));
        let want = FetchEntries { dir: 1, after_cookie: 0, limit: 100, dir_level: 1 };
        two.want(&mut world, Want::Entries(want));
        let listed = two.answer(&mut world).unwrap();
        let listed: Vec<u64> = listed.entries.iter().map(|entry| entry.ino).collect();
        assert_eq!(listed, inos);
    }
}

/// After a restart births, inode numbers and sessions go on behind everything ever given.
#[test]
fn numbers_are_never_given_twice() {
    let mut world = World::new();
    world.volume("v", 4, 2);
    let (mut births, mut inos, mut sessions) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..4 {
        for key in 1..=6 {
            world.provider(key, Bytes::new());
        }
        let mut mount = world.open(round, "v");
        sessions.push(mount.session);
        inos.push(mount.ino());
        world.says(mount.conn, Up::LeasePlacements(LeasePlacements { request: 1, count: 3 }));
        let leased = world.hear_some(mount.conn, |down| match down {
            Down::Placements(leased) => Some(leased.clone()),
            _ => None,
        });
        births.extend(leased.unwrap().leases.iter().map(|lease| lease.birth));
        world.restart(0);
    }
    for numbers in [&births, &inos, &sessions] {
        assert!(numbers.is_sorted_by(|left, right| left < right), "{numbers:?}");
    }
}
