//! The trash as mounts and administrators see it: its end, its yielding, and restores beside leases.

use super::swarm::{MINUTE_MS, Swarm};
use super::*;
use crate::engine::placement::fragment_bytes_max;
use crate::engine::trash::low_mark;
use crate::inspect::trash::list_trash;
use crate::namespace::Purged;
use crate::records::UsageRecord;

const HOUR_MS: u64 = 3_600_000;

fn restore(dir: u64, name: &str, ino: u64) -> Op {
    let (name_hash, sealed_name) = (hash(name), hash(name));
    Op::Restore(Restore { dir, name_hash, sealed_name, ino, time: at(300) })
}

/// What lies in the trash of "v", and the directories that are told beside it.
fn listed(world: &mut World) -> (Vec<u64>, Vec<u64>) {
    let basis =
        match world.ask(Question::TrashBasis { volume: "v".to_owned(), asker: Peer::default() }) {
            Answer::TrashBasis(basis) => basis,
            other => panic!("{other:?}"),
        };
    let (mut entries, mut folders) = (Vec::new(), Vec::new());
    list_trash(&basis, |reply| {
        entries.extend(reply.entries.iter().map(|entry| entry.ino));
        folders.extend(reply.folders.iter().map(|folder| folder.ino));
        true
    })
    .unwrap();
    (entries, folders)
}

fn purge(world: &mut World, inos: Vec<u64>) -> Purged {
    match world.ask(Question::PurgeTrash { volume: "v".to_owned(), inos }) {
        Answer::Purged(purged) => purged,
        other => panic!("{other:?}"),
    }
}

fn set_hours(world: &mut World, hours: u32) {
    let question = Question::SetVolume {
        name: "v".to_owned(),
        repair_at: None,
        quota_bytes: None,
        trash_hours: Some(hours),
    };
    assert!(matches!(world.ask(question), Answer::Volume(info) if info.trash_hours == hours));
}

fn statfs(swarm: &mut Swarm) -> StatfsReply {
    swarm.world.says(swarm.mount.conn, Up::Statfs(StatfsRequest { request: 5 }));
    let reply = swarm.world.hear_some(swarm.mount.conn, |down| match down {
        Down::Statfs(reply) => Some(*reply),
        _ => None,
    });
    reply.expect("an answer")
}

/// So many files that are old enough, removed one after another.
fn removed(files: u64) -> (Swarm, Vec<u64>) {
    let mut swarm = Swarm::new(6);
    (swarm.plaintext_bytes, swarm.file_bytes) = (1 << 20, 1 << 20);
    let first = swarm.mount.next_ino;
    swarm.write(files as usize);
    swarm.run(20_000);
    let inos: Vec<u64> = (first..first + files).collect();
    for (number, ino) in (1..).zip(&inos) {
        swarm.world.now_ms += 1;
        swarm.mount.change(&mut swarm.world, vec![unlink(1, &format!("f{number}"), *ino, false)]);
    }
    assert_eq!(listed(&mut swarm.world).0, inos);
    (swarm, inos)
}

#[test]
fn what_was_removed_is_kept_for_its_hours_and_then_goes() {
    let (mut swarm, inos) = removed(3);
    set_hours(&mut swarm.world, 2);
    assert_eq!(swarm.world.status().volumes[0].trash_bytes, 3 << 20);
    swarm.world.now_ms += 2 * HOUR_MS - MINUTE_MS;
    swarm.run(MINUTE_MS / 2);
    assert_eq!(listed(&mut swarm.world).0, inos, "not before their time");
    assert_eq!(swarm.deletes, 0);
    swarm.run(4 * MINUTE_MS);
    assert_eq!(listed(&mut swarm.world).0, [0u64; 0]);
    assert_eq!((swarm.deletes, swarm.records().len()), (18, 0), "their blocks are dead");
}

/// Time in which no directory runs does not count, and nothing is forgotten over a restart.
#[test]
fn the_trash_outlives_a_restart() {
    let mut world = World::with_trash_age(0);
    world.volume("v", 4, 2);
    let mut mount = world.open(1, "v");
    mount.inode(&mut world, 1, Level::Exclusive).unwrap();
    let ino = mount.ino();
    mount.change(&mut world, vec![create(1, "a", ino, 0o100_644)]);
    mount.change(&mut world, vec![unlink(1, "a", ino, false)]);
    assert_eq!(listed(&mut world).0, [ino]);
    world.restart(0);
    assert_eq!(listed(&mut world).0, [ino]);
    world.pass(1000);
    assert_eq!(listed(&mut world).0, [ino]);
    set_hours(&mut world, 0);
    world.pass(1000);
    assert_eq!(listed(&mut world).0, [0u64; 0], "0 hours: nothing is kept");
}

#[test]
fn purging_frees_blocks_and_passes_over_what_is_not_there() {
    let (mut swarm, inos) = removed(4);
    assert_eq!(super::checks::kinds(&swarm), []);
    let purged = purge(&mut swarm.world, vec![inos[1], inos[1], 1, 999, inos[3]]);
    assert_eq!(purged, Purged { files: 2, stored_bytes: 2 << 20 });
    assert_eq!(listed(&mut swarm.world).0, [inos[0], inos[2]]);
    swarm.run(3 * MINUTE_MS);
    assert_eq!((swarm.deletes, swarm.records().len()), (12, 2));
    let unknown = Question::PurgeTrash { volume: "w".to_owned(), inos: vec![] };
    assert!(matches!(swarm.world.ask(unknown), Answer::Refused { .. }));
}

/// The oldest first, and no more than what is missing, though providers show it only minutes later.
#[test]
fn the_trash_yields_to_need() {
    let (mut swarm, inos) = removed(16);
    let code = Code::new(4, 2).unwrap();
    swarm.run(MINUTE_MS);
    assert_eq!(listed(&mut swarm.world).0, inos, "there is space enough");
    let low = low_mark(&swarm.world.engine.space(code));
    // Two blocks of 4 MiB are missing: eight files of 1 MiB.
    swarm.world.free_bytes = (low - 2) * fragment_bytes_max(code);
    swarm.run(6000);
    let left = listed(&mut swarm.world).0;
    assert_eq!(left.len(), 7, "nine files for two blocks with their envelopes: {left:?}");
    assert_eq!(left, inos[9..], "the oldest are gone");
    swarm.run(MINUTE_MS);
    assert_eq!(listed(&mut swarm.world).0, left, "what is on its way is reckoned in");
    let told = swarm.world.ask(Question::Events { after: 0, last: 0 });
    let Answer::Events(events) = told else { panic!("{told:?}") };
    assert_eq!(events.iter().filter(|event| event.kind == "trash-yields").count(), 1);
    swarm.run(2 * MINUTE_MS);
    assert!(listed(&mut swarm.world).0.is_empty(), "no more room came of it: more goes");
}

/// No provider has room.
fn fill(swarm: &mut Swarm) {
    swarm.world.free_bytes = 0;
    for (conn, _) in swarm.world.providers.clone() {
        let capacity_bytes = swarm.world.capacity_bytes;
        let full = ProviderReport { free_bytes: 0, capacity_bytes, ..report() };
        swarm.world.provider_says(conn, PUp::Report(full));
    }
}

/// The mount asks for a place.
fn lease(swarm: &mut Swarm) -> PlacementsLeased {
    let ask = LeasePlacements { request: 9, count: 1 };
    swarm.world.says(swarm.mount.conn, Up::LeasePlacements(ask));
    let leased = swarm.world.hear_some(swarm.mount.conn, |down| match down {
        Down::Placements(leased) => Some(leased.clone()),
        _ => None,
    });
    leased.expect("an answer")
}

/// Copies of a file that is still there keep no block for themselves. What is purged was believed to free
/// its size minutes later, so a writer on a full disk waited for minutes, one slice of the trash after another.
#[test]
fn trash_that_frees_nothing_is_gone_through_at_once() {
    let mut swarm = Swarm::new(6);
    let block_bytes = Code::new(4, 2).unwrap().block_bytes_max() as u64;
    (swarm.plaintext_bytes, swarm.file_bytes) = (block_bytes as u32, block_bytes);
    swarm.write(1);
    let (block, _) = swarm.records().pop().unwrap();
    let copies: Vec<u64> = (0..200).map(|_| swarm.mount.ino()).collect();
    let names: Vec<String> = copies.iter().map(|ino| format!("copy {ino}")).collect();
    for (name, ino) in names.iter().zip(&copies) {
        let (ino, length, block) = (*ino, block_bytes, block.clone());
        let extents = vec![ExtentWrite { ino, length, block, ..Default::default() }];
        let files = vec![FileGrowth { ino, size: length, ..Default::default() }];
        let data = CommitData { extents, files, ..Default::default() };
        let ops = vec![create(1, name, ino, 0o100_644), Op::CommitData(data)];
        swarm.mount.change(&mut swarm.world, ops);
    }
    swarm.run(20_000);
    for (name, ino) in names.iter().zip(&copies) {
        swarm.mount.change(&mut swarm.world, vec![unlink(1, name, *ino, false)]);
    }
    assert_eq!(listed(&mut swarm.world).0.len(), 200);
    // A small swarm: 64 blocks are made room for at once.
    swarm.world.capacity_bytes = 100 * fragment_bytes_max(Code::new(4, 2).unwrap());
    swarm.run(10_000);
    fill(&mut swarm);
    let first = lease(&mut swarm);
    assert!(first.no_space && first.space_comes, "{first:?}");
    let mut seconds = 0;
    while lease(&mut swarm).space_comes {
        swarm.run(1000);
        seconds += 1;
        assert!(seconds < 60, "{} of it are left", listed(&mut swarm.world).0.len());
    }
    assert!(listed(&mut swarm.world).0.is_empty(), "all of it was looked at");
    assert_eq!(swarm.records().len(), 1);
}

/// A volume at its quota finds no place however much is free. That pressed on the trash of every volume.
#[test]
fn a_quota_that_is_used_up_empties_nobodys_trash() {
    let (mut swarm, inos) = removed(16);
    let made = NewVolume { quota_bytes: 1, ..NewVolume::named("q", 4, 2) }.into();
    assert!(matches!(swarm.world.ask(made), Answer::Volume(_)));
    let greedy = swarm.world.open(99, "q");
    let mut refused = 0;
    for _ in 0..100 {
        let ask = LeasePlacements { request: 9, count: 32 };
        swarm.world.says(greedy.conn, Up::LeasePlacements(ask));
        let leased = swarm.world.hear_some(greedy.conn, |down| match down {
            Down::Placements(leased) => Some(leased.no_space),
            _ => None,
        });
        refused += u32::from(leased.unwrap());
        swarm.run(1000);
    }
    assert!(refused > 50, "{refused}");
    assert_eq!(listed(&mut swarm.world).0, inos);
}

/// A mount that finds no place hears that space comes, and the trash goes at once.
#[test]
fn a_full_swarm_waits_for_the_trash_before_it_says_so() {
    let (mut swarm, inos) = removed(2);
    fill(&mut swarm);
    swarm.world.engine.trash.bytes = 2 << 20;
    assert_eq!(listed(&mut swarm.world).0, inos);
    let leased = lease(&mut swarm);
    assert!(leased.no_space && leased.space_comes, "{leased:?}");
    swarm.run(1000);
    assert!(listed(&mut swarm.world).0.is_empty());
}

#[test]
fn the_trash_counts_as_free_and_not_against_a_quota() {
    let (mut swarm, _) = removed(8);
    let code = Code::new(4, 2).unwrap();
    let room = swarm.world.engine.space(code);
    let before = statfs(&mut swarm);
    let block_bytes = code.block_bytes_max() as u64;
    assert_eq!(before.free_bytes, (room.free_blocks + 1) * block_bytes, "one more of 4 MiB");
    let question = Question::SetVolume {
        name: "v".to_owned(),
        repair_at: None,
        quota_bytes: Some(4 << 20),
        trash_hours: None,
    };
    assert!(matches!(swarm.world.ask(question), Answer::Volume(_)));
    let now = statfs(&mut swarm);
    assert_eq!((now.total_bytes, now.free_bytes, now.inodes), (4 << 20, 4 << 20, 1));
}

/// The directory is taken from the mount that holds it, and that mount sees what came back.
#[test]
fn a_restore_is_seen_by_mounts_that_know_the_directory() {
    let mut world = World::with_trash_age(0);
    world.volume("v", 4, 2);
    let mut one = world.open(1, "v");
    one.inode(&mut world, 1, Level::Exclusive).unwrap();
    let (dir, file) = (one.ino(), one.ino());
    one.change(&mut world, vec![create(1, "d", dir, 0o040_755)]);
    one.change(&mut world, vec![create(dir, "a", file, 0o100_644)]);
    one.change(&mut world, vec![unlink(dir, "a", file, false)]);
    assert_ne!(one.inode(&mut world, file, Level::Shared).unwrap().error, 0, "it is gone");
    let mut two = world.open(2, "v");
    assert_eq!(listed(&mut world), (vec![file], vec![dir]));
    let want = FetchEntry {
        dir,
        name_hash: hash("a"),
        dir_level: Level::Exclusive.to_wire(),
        child_level: Level::Shared.to_wire(),
    };
    two.want(&mut world, Want::Entry(want));
    assert!(two.answer(&mut world).is_none(), "the other has it");
    let recall = one.recall(&mut world).unwrap();
    assert_eq!((recall.ino, recall.level), (dir, Level::None.to_wire()));
    one.give_back(&mut world, &recall, false);
    assert_eq!(two.answer(&mut world).unwrap().entries[0].ino, 0);
    two.change(&mut world, vec![restore(dir, "a", file)]);
    // What it took out is its own, as if it had made it.
    two.change(
        &mut world,
        vec![Op::SetAttributes(SetAttributes { ino: file, ..Default::default() })],
    );
    one.entry(&mut world, dir, "a");
    while let Some(recall) = two.recall(&mut world) {
        two.give_back(&mut world, &recall, false);
    }
    assert_eq!(one.answer(&mut world).unwrap().entries[0].ino, file);
}

#[test]
fn a_restore_without_the_directory_ends_the_session() {
    let mut world = World::with_trash_age(0);
    world.volume("v", 4, 2);
    let mut one = world.open(1, "v");
    one.inode(&mut world, 1, Level::Exclusive).unwrap();
    let file = one.ino();
    one.change(&mut world, vec![create(1, "a", file, 0o100_644)]);
    one.change(&mut world, vec![unlink(1, "a", file, false)]);
    let mut two = world.open(2, "v");
    two.send(&mut world, vec![restore(1, "a", file)]);
    let ended = world.hear_some(two.conn, |down| matches!(down, Down::Ended(_)).then_some(()));
    assert!(ended.is_some());
    assert_eq!(listed(&mut world).0, [file]);
}

/// A mount that did not hear that its removal was applied claims the inode again, to replay that. Were
/// it believed it would hold what others have had back meanwhile; were it refused, its session would end.
#[test]
fn a_claim_of_the_time_before_a_restore_is_passed_over() {
    for restart in [false, true] {
        let mut world = World::with_trash_age(0);
        world.volume("v", 4, 2);
        let mut one = world.open(1, "v");
        one.inode(&mut world, 1, Level::Exclusive).unwrap();
        let file = one.ino();
        one.change(&mut world, vec![create(1, "a", file, 0o100_644)]);
        one.change(&mut world, vec![unlink(1, "a", file, false)]);
        one.give_back(&mut world, &Recall { ino: 1, level: 0, grant: u64::MAX }, false);
        let conn = one.conn;
        world.event(Event::Disconnected { conn: ConnId(conn) });
        let mut two = world.open(2, "v");
        two.inode(&mut world, 1, Level::Exclusive).unwrap();
        two.change(&mut world, vec![restore(1, "a", file)]);
        if restart {
            world.restart(0);
            let Down::Opened(_) = two.resume(&mut world, "v") else { panic!("resumed") };
            let lease = |ino| InodeLease { ino, level: 2, open: false, grant: 0 };
            let leases = vec![InodeLease { grant: u64::MAX, ..lease(1) }, lease(file)];
            world.says(two.conn, Up::Reclaim(Reclaim { leases, last: true }));
        }
        let Down::Opened(_) = one.resume(&mut world, "v") else { panic!("resumed") };
        let lease = InodeLease { ino: file, level: 2, open: false, grant: 0 };
        world.says(one.conn, Up::Reclaim(Reclaim { leases: vec![lease], last: true }));
        let ended = world.hear_some(one.conn, |down| matches!(down, Down::Ended(_)).then_some(()));
        assert!(ended.is_none(), "restart {restart}");
        let set = SetAttributes { ino: file, ..Default::default() };
        two.change(&mut world, vec![Op::SetAttributes(set)]);
    }
}

/// A session that ends takes its open files with it: to the trash.
#[test]
fn what_a_dead_mount_had_open_goes_to_the_trash() {
    let mut world = World::with_trash_age(0);
    world.volume("v", 4, 2);
    let mut one = world.open(1, "v");
    one.inode(&mut world, 1, Level::Exclusive).unwrap();
    let file = one.ino();
    one.change(&mut world, vec![create(1, "a", file, 0o100_644)]);
    one.change(&mut world, vec![unlink(1, "a", file, true)]);
    assert!(listed(&mut world).0.is_empty());
    world.says(one.conn, Up::Close(CloseSession {}));
    assert_eq!(listed(&mut world).0, [file]);
}

#[test]
fn a_deleted_volume_takes_its_trash_along() {
    let (mut swarm, _) = removed(3);
    swarm.world.says(swarm.mount.conn, Up::Close(CloseSession {}));
    let asked = Question::DeleteVolume { name: "v".to_owned() };
    assert!(matches!(swarm.world.ask(asked), Answer::Done));
    let deletes = |world: &mut World| {
        let pairs = world.engine.scan_all(&keys::tag(&keys::CLUSTER, b'q')).unwrap();
        world.pass(500);
        pairs.len()
    };
    let most = (0..6 * 60).map(|_| deletes(&mut swarm.world)).max();
    assert_eq!(most, Some(18), "its fragments are to be deleted");
    assert_eq!(swarm.world.status().blocks.unwrap().total, 0);
}

#[test]
fn a_check_sees_what_the_trash_lists_wrongly() {
    let (swarm, inos) = removed(2);
    let volume = *swarm.world.engine.volumes.keys().next().unwrap();
    let view = swarm.world.engine.store.snapshot();
    let first = KeyRange::prefix(&keys::tag(&volume, b't'));
    let (line, _) = view.scan(&first, 1).unwrap().pop().unwrap();
    let spoil = |change: &dyn Fn(&mut WriteBatch)| {
        let (mut swarm, _) = removed(2);
        super::checks::change(&mut swarm, change);
        super::checks::kinds(&swarm)
    };
    assert_eq!(spoil(&|batch| batch.delete(line.clone())), [FsckKind::WrongUsage]);
    assert_eq!(spoil(&|batch| batch.delete(keys::inode(&volume, inos[0]))), [FsckKind::WrongUsage]);
    let usage = UsageRecord { trash_files: 3, ..swarm.world.engine.usage(&volume).unwrap() };
    let spoilt = spoil(&|batch| batch.put(keys::usage(&volume), encode(&usage)));
    assert_eq!(spoilt, [FsckKind::WrongUsage]);
}
