//! One behaviour a test.

use super::*;
use crate::store::View;

pub(super) const FILE: u32 = 0o100_644;
const DIR: u32 = 0o040_755;

pub(super) fn world() -> World {
    let mut world = World::new();
    world.volume("v", 4, 2);
    world
}

pub(super) fn birth(world: &mut World, mount: &Mount) -> PlacementLease {
    let ask = LeasePlacements { request: 9, count: 1 };
    world.says(mount.conn, Up::LeasePlacements(ask));
    let leased = world.hear_some(mount.conn, |down| match down {
        Down::Placements(leased) => Some(leased.clone()),
        _ => None,
    });
    let leased = leased.expect("placements");
    assert_eq!(leased.error, "");
    leased.leases[0].clone()
}

pub(super) fn block(lease: &PlacementLease, id: u8, durable: u8) -> BlockCommit {
    BlockCommit {
        block: vec![id; 16].into(),
        s: 4,
        r: 2,
        page_bytes: 4096,
        plaintext_bytes: 8192,
        birth: lease.birth,
        providers: lease.providers.clone(),
        durable: vec![durable].into(),
        fingerprint_hash: vec![1; 32].into(),
        ..Default::default()
    }
}

pub(super) fn write(ino: u64, offset: u64, length: u64, block: u8) -> ExtentWrite {
    ExtentWrite { ino, offset, length, block: vec![block; 16].into(), ..Default::default() }
}

/// One slice of the background count; whether it was the last.
fn cursor_done(world: &mut World, view: &dyn View, cursor: &mut health::CountCursor) -> bool {
    let slice = health::count_slice(view, cursor).unwrap();
    let last = slice.last;
    world.event(Event::Counted(slice));
    last
}

pub(super) fn commit(blocks: Vec<BlockCommit>, extents: Vec<ExtentWrite>) -> Op {
    let ino = extents[0].ino;
    let end = extents.iter().map(|extent| extent.offset + extent.length).max().unwrap();
    let files =
        vec![FileGrowth { ino, size: end, mtime: at(300), ctime: at(300), clear_suid: false }];
    Op::CommitData(CommitData { blocks, extents, files })
}

#[test]
fn a_second_mount_sees_what_the_first_closed() {
    let mut world = world();
    let (mut one, mut two) = (world.open(1, "v"), world.open(2, "v"));
    one.inode(&mut world, 1, Level::Exclusive).unwrap();
    let ino = one.ino();
    one.change(&mut world, vec![create(1, "a", ino, FILE)]);
    assert!(two.entry(&mut world, 1, "a").is_none(), "the root is the first mount's");
    let recall = one.recall(&mut world).unwrap();
    assert_eq!((recall.ino, recall.level), (1, Level::Shared.to_wire()));
    one.give_back(&mut world, &recall, false);
    assert!(two.answer(&mut world).is_none(), "the file is the first mount's too");
    let recall = one.recall(&mut world).unwrap();
    assert_eq!(recall.ino, ino);
    one.give_back(&mut world, &recall, false);
    let found = two.answer(&mut world).unwrap();
    assert_eq!((found.entries[0].ino, found.inodes.len(), found.leases.len()), (ino, 2, 2));
}

#[test]
fn nothing_undurable_crosses_a_lease() {
    let mut world = world();
    let (mut one, mut two) = (world.open(1, "v"), world.open(2, "v"));
    one.inode(&mut world, 1, Level::Exclusive).unwrap();
    world.auto = false;
    let ino = one.ino();
    one.change(&mut world, vec![create(1, "a", ino, FILE)]);
    let own = one.inode(&mut world, ino, Level::Exclusive);
    assert!(own.is_some(), "its own changes it sees at once");
    two.inode(&mut world, 1, Level::Shared);
    let recall = one.recall(&mut world).unwrap();
    one.give_back(&mut world, &recall, false);
    assert!(two.answer(&mut world).is_none(), "given back, but not durable");
    world.make_durable();
    assert!(two.answer(&mut world).is_some());
}

#[test]
fn batches_are_applied_once_and_in_order() {
    let mut world = world();
    let mut one = world.open(1, "v");
    one.inode(&mut world, 1, Level::Exclusive).unwrap();
    let ino = one.ino();
    let again = one.clone();
    one.change(&mut world, vec![create(1, "a", ino, FILE)]);
    again.clone().change(&mut world, vec![create(1, "a", ino, FILE)]);
    assert!(world.engine.sessions[&one.session].is_alive());
    one.batch += 1;
    one.send(&mut world, vec![]);
    let ended = world.hear_some(one.conn, |down| match down {
        Down::Ended(ended) => Some(ended.reason),
        _ => None,
    });
    assert_eq!(ended, Some(EndReason::Refused as i32));
}

#[test]
fn a_rule_broken_in_a_batch_drops_it_whole_and_ends_the_session() {
    let mut world = world();
    let (mut one, mut two) = (world.open(1, "v"), world.open(2, "v"));
    one.inode(&mut world, 1, Level::Exclusive).unwrap();
    let (a, b) = (one.ino(), one.ino());
    one.send(&mut world, vec![create(1, "a", a, FILE), create(1, "a", b, FILE)]);
    let ended = world.hear_some(one.conn, |down| match down {
        Down::Ended(ended) => Some(ended.clone()),
        _ => None,
    });
    assert!(ended.unwrap().detail.contains("taken"));
    let found = two.entry(&mut world, 1, "a").unwrap();
    assert_eq!(found.entries[0].ino, 0, "nothing of the batch is there, and its leases are free");
    // Without a lease nothing may be changed either.
    let ino = two.ino();
    two.inode(&mut world, 1, Level::Shared).unwrap();
    let mut three = world.open(3, "v");
    three.inode(&mut world, 1, Level::Exclusive);
    let recall = two.recall(&mut world).unwrap();
    two.give_back(&mut world, &recall, false);
    two.send(&mut world, vec![create(1, "b", ino, FILE)]);
    assert!(!world.engine.sessions.contains_key(&two.session));
}

#[test]
fn a_silent_session_is_fenced_only_when_another_wants_what_it_holds() {
    let mut world = world();
    let (mut one, mut two) = (world.open(1, "v"), world.open(2, "v"));
    one.inode(&mut world, 1, Level::Exclusive).unwrap();
    world.event(Event::Disconnected { conn: ConnId(one.conn) });
    world.pass(100_000);
    assert!(world.engine.sessions[&one.session].is_alive(), "nobody wants anything");
    world.says(two.conn, Up::Renew(Renew::default()));
    world.auto = false;
    let found = two.inode(&mut world, 1, Level::Shared);
    assert!(found.is_none(), "the fence is not durable yet");
    world.pass(50);
    assert!(two.answer(&mut world).is_none(), "the fence is not durable yet");
    world.make_durable();
    assert!(two.answer(&mut world).is_some());
    world.auto = true;
    let answer = one.resume(&mut world, "v");
    let Down::Ended(ended) = answer else { panic!("{answer:?}") };
    assert_eq!(ended.reason, EndReason::Fenced as i32);
}

#[test]
fn a_live_mount_that_gives_nothing_back_makes_the_other_time_out() {
    let mut world = world();
    let (mut one, mut two) = (world.open(1, "v"), world.open(2, "v"));
    one.inode(&mut world, 1, Level::Exclusive).unwrap();
    assert!(two.inode(&mut world, 1, Level::Shared).is_none());
    for _ in 0..10 {
        world.says(one.conn, Up::Renew(Renew::default()));
        world.pass(10_000);
    }
    let answer = two.answer(&mut world).unwrap();
    assert_eq!(answer.error, FetchError::Contended as i32);
    assert!(world.engine.sessions[&one.session].is_alive());
}

#[test]
fn unlinked_but_open_lives_until_it_is_released() {
    let mut world = world();
    let (mut one, mut two) = (world.open(1, "v"), world.open(2, "v"));
    one.inode(&mut world, 1, Level::Exclusive).unwrap();
    let ino = one.ino();
    one.change(&mut world, vec![create(1, "a", ino, FILE)]);
    // The second mount takes both leases; the first says that it has the file open.
    let exclusive = Level::Exclusive.to_wire();
    let (name_hash, dir_level, child_level) = (hash("a"), exclusive, exclusive);
    let want = FetchEntry { dir: 1, name_hash, dir_level, child_level };
    two.want(&mut world, Want::Entry(want));
    for _ in 0..2 {
        let recall = one.recall(&mut world).unwrap();
        let open = recall.ino == ino;
        one.give_back(&mut world, &recall, open);
    }
    assert_eq!(two.answer(&mut world).unwrap().entries[0].ino, ino);
    two.change(&mut world, vec![unlink(1, "a", ino, false)]);
    let volume = world.engine.sessions[&one.session].volume;
    let inode = keys::inode(&volume, ino);
    assert!(world.engine.store.get(&inode).unwrap().is_some());
    one.change(&mut world, vec![Op::Release(Release { ino })]);
    assert!(world.engine.store.get(&inode).unwrap().is_none());
}

#[test]
fn dead_blocks_are_deleted_two_lease_times_later_and_until_confirmed() {
    let mut world = world();
    for key in 1..=6 {
        world.provider(key, Bytes::new());
    }
    let mut one = world.open(1, "v");
    one.inode(&mut world, 1, Level::Exclusive).unwrap();
    let ino = one.ino();
    let lease = birth(&mut world, &one);
    one.change(&mut world, vec![create(1, "a", ino, FILE)]);
    let first = commit(vec![block(&lease, 1, 0b11_1111)], vec![write(ino, 0, 8192, 1)]);
    one.change(&mut world, vec![first]);
    let status = world.status();
    assert_eq!((status.blocks.as_ref().unwrap().total, status.volumes[0].live_bytes), (1, 8192));
    let lease = birth(&mut world, &one);
    let second = commit(vec![block(&lease, 2, 0b11_1111)], vec![write(ino, 0, 8192, 2)]);
    one.change(&mut world, vec![second]);
    let status = world.status();
    assert_eq!((status.blocks.unwrap().total, status.pending_deletes), (1, 1));
    let deletes = |world: &mut World| -> Vec<(u64, DeleteFragments)> {
        let queues = world.to_providers.iter_mut();
        queues
            .flat_map(|(conn, queue)| queue.drain(..).map(|down| (*conn, down)))
            .filter_map(|(conn, down)| match down {
                PDown::Delete(delete) => Some((conn, delete)),
                _ => None,
            })
            .collect()
    };
    for _ in 0..11 {
        world.pass(5_000);
    }
    assert!(deletes(&mut world).is_empty(), "readers may still have the old map");
    world.pass(5_000);
    world.pass(1_000);
    let sent = deletes(&mut world);
    assert_eq!(sent.len(), 6);
    // One provider dies before it confirms; it is told again when it is back.
    let (lost_conn, _) = sent[0].clone();
    for (conn, delete) in &sent[1..] {
        assert_eq!(delete.fragments.len(), 1);
        world.provider_says(*conn, PUp::Deleted(DeleteDone { ticket: delete.ticket }));
    }
    assert_eq!(world.status().pending_deletes, 1);
    // A deletion that failed (a full disk) was never confirmed, and while the stream lived, for weeks,
    // that provider was told of no other either: a full disk could not get empty.
    for _ in 0..13 {
        world.pass(5_000);
    }
    let again = deletes(&mut world);
    assert_eq!(again.iter().map(|(conn, _)| *conn).collect::<Vec<_>>(), [lost_conn]);
    let (_, lost) = *world.providers.iter().find(|(conn, _)| *conn == lost_conn).unwrap();
    let cookie = world.engine.members[&lost].record.cookie.clone();
    let key = world.engine.members[&lost].record.key_hash[0];
    world.lose_provider(lost);
    world.provider(key, cookie);
    let sent = deletes(&mut world);
    assert_eq!(sent.len(), 1);
    let (conn, delete) = &sent[0];
    world.provider_says(*conn, PUp::Deleted(DeleteDone { ticket: delete.ticket }));
    assert_eq!(world.status().pending_deletes, 0);
}

#[test]
fn health_tells_young_fragments_from_missing_ones() {
    let mut world = world();
    for key in 1..=6 {
        world.provider(key, Bytes::new());
    }
    let (view, mut cursor) = world.engine.to_count();
    while !cursor_done(&mut world, &*view, &mut cursor) {}
    let mut one = world.open(1, "v");
    one.inode(&mut world, 1, Level::Exclusive).unwrap();
    let ino = one.ino();
    let lease = birth(&mut world, &one);
    one.change(&mut world, vec![create(1, "a", ino, FILE)]);
    let first = commit(vec![block(&lease, 1, 0b01_1111)], vec![write(ino, 0, 8192, 1)]);
    one.change(&mut world, vec![first]);
    let status = world.status();
    let blocks = status.blocks.unwrap();
    assert_eq!((status.health, blocks.unsettled), (Health::Ok as i32, 1));
    assert_eq!(blocks.by_redundancy[&1], 1);
    // Not confirmed in time: the provider is asked, and has it not.
    for _ in 0..13 {
        world.pass(5_000);
    }
    assert_eq!(world.status().health, Health::Degraded as i32);
    let asked = world.to_providers.iter_mut().find_map(|(conn, queue)| {
        queue.drain(..).find_map(|down| match down {
            PDown::Check(check) => Some((*conn, check)),
            _ => None,
        })
    });
    let (conn, check) = asked.unwrap();
    assert_eq!(check.fragments[0].index, 5);
    let statuses = vec![FragmentStatus::NotFound as i32];
    world.provider_says(conn, PUp::Checked(CheckReply { query: check.query, statuses }));
    let status = world.status();
    let blocks = status.blocks.unwrap();
    assert_eq!((blocks.unsettled, blocks.damaged_fragments), (0, 1));
    // A late put gets there after all.
    let confirmed = FragmentsDurable { block: vec![1; 16].into(), durable: vec![0b10_0000].into() };
    one.change(&mut world, vec![Op::FragmentsDurable(confirmed)]);
    let status = world.status();
    assert_eq!((status.health, status.counting), (Health::Ok as i32, false));
    // Three of six gone: it waits for them to return.
    for provider in lease.providers.iter().take(3) {
        world.lose_provider(*provider);
    }
    let status = world.status();
    assert_eq!(status.health, Health::Unreadable as i32);
    assert_eq!(status.blocks.unwrap().by_redundancy[&-1], 1);
}

/// A disk was called healthy, two of six providers died, and data was unreadable: a provider had been
/// away for a moment when the block was placed, and another held two of its fragments.
#[test]
fn a_crowded_block_is_not_called_healthy() {
    let mut world = world();
    for key in 1..=5 {
        world.provider(key, Bytes::new());
    }
    let (view, mut cursor) = world.engine.to_count();
    while !cursor_done(&mut world, &*view, &mut cursor) {}
    let mut one = world.open(1, "v");
    one.inode(&mut world, 1, Level::Exclusive).unwrap();
    let ino = one.ino();
    let lease = birth(&mut world, &one);
    one.change(&mut world, vec![create(1, "a", ino, FILE)]);
    let full = commit(vec![block(&lease, 1, 0b11_1111)], vec![write(ino, 0, 8192, 1)]);
    one.change(&mut world, vec![full]);
    let status = world.status();
    assert_eq!((status.health, status.counting), (Health::Degraded as i32, false));
    let blocks = status.blocks.unwrap();
    assert_eq!((blocks.crowded, blocks.by_redundancy[&2]), (1, 1));
}

#[test]
fn a_block_below_the_write_margin_is_refused() {
    let mut world = world();
    for key in 1..=6 {
        world.provider(key, Bytes::new());
    }
    let mut one = world.open(1, "v");
    one.inode(&mut world, 1, Level::Exclusive).unwrap();
    let ino = one.ino();
    let lease = birth(&mut world, &one);
    one.change(&mut world, vec![create(1, "a", ino, FILE)]);
    one.send(
        &mut world,
        vec![commit(vec![block(&lease, 1, 0b00_1111)], vec![write(ino, 0, 8192, 1)])],
    );
    let ended = world.hear_some(one.conn, |down| match down {
        Down::Ended(ended) => Some(ended.detail.clone()),
        _ => None,
    });
    assert!(ended.unwrap().contains("write margin"));
}

#[test]
fn a_provider_with_another_cookie_counts_as_absent_until_checked() {
    let mut world = world();
    for key in 1..=6 {
        world.provider(key, Bytes::new());
    }
    let mut one = world.open(1, "v");
    one.inode(&mut world, 1, Level::Exclusive).unwrap();
    let ino = one.ino();
    let lease = birth(&mut world, &one);
    one.change(&mut world, vec![create(1, "a", ino, FILE)]);
    let first = commit(vec![block(&lease, 1, 0b11_1111)], vec![write(ino, 0, 8192, 1)]);
    one.change(&mut world, vec![first]);
    let (_, provider) = world.providers[0];
    world.lose_provider(provider);
    let (conn, again, _) = world.provider(1, vec![99; 16].into());
    assert_eq!(again, provider, "its number belongs to its key");
    assert!(world.engine.members[&provider].record.suspect);
    let check = world.to_providers.get_mut(&conn).unwrap().pop_front();
    let Some(PDown::Check(check)) = check else { panic!("{check:?}") };
    let statuses = vec![FragmentStatus::Ok as i32];
    world.provider_says(conn, PUp::Checked(CheckReply { query: check.query, statuses }));
    assert!(!world.engine.members[&provider].record.suspect);
}

#[test]
fn dead_mounts_are_replaced_without_waiting_for_the_fence() {
    let mut world = world();
    let mut one = world.open(1, "v");
    one.inode(&mut world, 1, Level::Exclusive).unwrap();
    world.restart(0);
    let replaces = vec![one.session];
    let open = OpenSession { volume: "v".to_owned(), replaces, ..Default::default() };
    // Another certificate may not do that.
    let conn = world.dial(2, open.clone());
    assert!(matches!(world.hear(conn), Down::Opened(_)));
    assert!(world.engine.sessions[&one.session].is_alive());
    let conn = world.dial(1, open);
    assert!(matches!(world.hear(conn), Down::Opened(_)));
    let want = FetchInode { ino: 1, level: Level::Exclusive.to_wire() };
    let fetch = Fetch { request: 1, want: Some(Want::Inode(want)), trace: 0 };
    world.says(conn, Up::Fetch(fetch));
    let answered = world.hear_some(conn, |down| matches!(down, Down::Fetched(_)).then_some(()));
    assert!(answered.is_some());
}

#[test]
fn deleted_files_are_freed_in_the_background() {
    let mut world = world();
    let mut one = world.open(1, "v");
    one.inode(&mut world, 1, Level::Exclusive).unwrap();
    let (ino, dir) = (one.ino(), one.ino());
    one.change(&mut world, vec![create(1, "a", ino, FILE), create(1, "d", dir, DIR)]);
    let zeros = |offset: u64| {
        let length = 1 << 30;
        ExtentWrite { ino, offset, length, zero: true, ..Default::default() }
    };
    let all = (0..4).map(|part| zeros(part << 30)).collect();
    one.change(&mut world, vec![commit(vec![], all), unlink(1, "a", ino, false)]);
    let volume = world.engine.sessions[&one.session].volume;
    let map = KeyRange::prefix(&keys::tag(&volume, b'm'));
    assert!(!world.engine.store.scan(&map, 1).unwrap().is_empty());
    for _ in 0..6 {
        world.pass(50);
    }
    assert!(world.engine.store.scan(&map, 1).unwrap().is_empty());
    let doomed = KeyRange::prefix(&keys::tag(&volume, b'k'));
    assert!(world.engine.store.scan(&doomed, 1).unwrap().is_empty());
    assert_eq!(world.status().volumes[0].inodes, 2);
}

#[test]
fn locks_wait_and_end_with_their_session() {
    let mut world = world();
    let (one, two) = (world.open(1, "v"), world.open(2, "v"));
    let lock = |request, wait| LockRequest {
        request,
        ino: 1,
        owner: 1,
        start: 0,
        end: 9,
        kind: LockKind::Write as i32,
        wait,
        wait_ms: 10_000,
        ..Default::default()
    };
    let reply = |world: &mut World, conn| {
        world.hear_some(conn, |down| match down {
            Down::Lock(reply) => Some(reply.granted),
            _ => None,
        })
    };
    world.says(one.conn, Up::Lock(lock(1, false)));
    assert_eq!(reply(&mut world, one.conn), Some(true));
    world.says(two.conn, Up::Lock(lock(1, false)));
    assert_eq!(reply(&mut world, two.conn), Some(false));
    world.says(two.conn, Up::Lock(lock(2, true)));
    assert_eq!(reply(&mut world, two.conn), None);
    world.says(one.conn, Up::Close(CloseSession {}));
    assert_eq!(reply(&mut world, two.conn), Some(true));
}

/// The directory's thread was busy for a minute (a huge truncate), or its machine slept. The first
/// event it took up was a tick, before the reports and renewals that had come meanwhile: every provider
/// was silent, every mount was shut out.
#[test]
fn nobody_is_blamed_for_the_time_the_directory_stood_still() {
    let mut world = world();
    let (conn, ..) = world.provider(1, Bytes::new());
    let (mut one, mut two) = (world.open(1, "v"), world.open(2, "v"));
    assert!(one.inode(&mut world, 1, Level::Exclusive).is_some());
    assert!(two.inode(&mut world, 1, Level::Shared).is_none(), "it is the first mount's");
    let recall = one.recall(&mut world).expect("a recall");
    world.now_ms += 300_000;
    world.engine.stood_still(300_000, world.now_ms);
    world.event(Event::Tick);
    assert!(world.engine.members.values().all(|member| member.online));
    assert!(world.engine.sessions.values().all(|known| known.is_alive()));
    world.provider_says(conn, PUp::Report(report()));
    one.give_back(&mut world, &recall, false);
    assert!(two.answer(&mut world).is_some(), "and its question still waits");
    // Silence is silence again.
    world.now_ms += 60_000;
    world.event(Event::Tick);
    assert!(world.engine.members.values().all(|member| !member.online));
}

/// A truncate of a huge file was one step, one transaction in memory and one record of the journal: above
/// 512 MiB it was acknowledged, and not read back at the next start.
#[test]
fn a_huge_file_is_cut_in_bounded_commits() {
    let mut world = world();
    let mut one = world.open(1, "v");
    one.inode(&mut world, 1, Level::Exclusive).unwrap();
    let ino = one.ino();
    one.change(&mut world, vec![create(1, "a", ino, FILE)]);
    let zeros = |from: u64, chunks: u64| {
        let (offset, length) = (from << 22, chunks << 22);
        ExtentWrite { ino, offset, length, zero: true, ..Default::default() }
    };
    let hole = |from: u64, to: u64| {
        let (offset, length) = (from << 22, (to - from) << 22);
        ExtentWrite { ino, offset, length, ..Default::default() }
    };
    let all = (0..8).map(|part| zeros(part * 250, 250)).collect();
    one.change(&mut world, vec![commit(vec![], all)]);
    let chunks = |world: &World| {
        let volume = world.engine.sessions[&one.session].volume;
        let range = KeyRange::prefix(&keys::tag(&volume, b'm'));
        world.engine.store.scan(&range, usize::MAX).unwrap().len()
    };
    assert_eq!(chunks(&world), 2000);
    let before = world.history.lock().len();
    let mut mount = one.clone();
    mount.change(&mut world, vec![commit(vec![], vec![hole(100, 1000)])]);
    assert_eq!(chunks(&world), 1100);
    let cut = SetAttributes { ino, size: Some(0), ..Default::default() };
    mount.change(&mut world, vec![Op::SetAttributes(cut)]);
    assert_eq!(chunks(&world), 0);
    let commits = world.history.lock()[before..].to_vec();
    assert!(commits.len() >= 2 + 3 + 4, "{} commits", commits.len());
    assert!(commits.iter().all(|commit| commit.len() < 300), "each of them small");
    let found = mount.inode(&mut world, ino, Level::Exclusive).unwrap();
    assert_eq!((found.inodes[0].size, found.inodes[0].allocated_bytes), (0, 0));
}

/// Every fence left a record for ever, and at 16,384 of them nobody could mount any more.
#[test]
fn fenced_sessions_are_forgotten_in_the_end() {
    let mut world = world();
    let mut last = world.open(1, "v").session;
    for _ in 0..1500 {
        let open =
            OpenSession { volume: "v".to_owned(), replaces: vec![last], ..Default::default() };
        let conn = world.dial(1, open);
        let Down::Opened(opened) = world.hear(conn) else { panic!("not opened") };
        last = opened.session;
    }
    assert!(world.engine.sessions.len() < 1100, "{}", world.engine.sessions.len());
    let range = KeyRange::prefix(&keys::tag(&keys::CLUSTER, b's'));
    let stored = world.engine.store.scan(&range, usize::MAX).unwrap().len();
    assert_eq!(stored, world.engine.sessions.len());
    // One that was forgotten is refused as one that was not.
    let open =
        OpenSession { volume: "v".to_owned(), session: 1, incarnation: 1, ..Default::default() };
    let conn = world.dial(1, open);
    let Down::Ended(ended) = world.hear(conn) else { panic!("resumed") };
    assert_eq!(ended.reason, EndReason::Unknown as i32);
}

/// A snapshot of a provider's disk was taken and brought back within one connection: the same store, the
/// same cookie, and everything put since was gone and believed to be there.
#[test]
fn a_provider_whose_records_went_back_counts_as_absent_until_checked() {
    let mut world = world();
    let (conn, provider, cookie) = world.provider(1, Bytes::new());
    let back = |world: &mut World, next_record: u64| {
        let peer = Peer { key_hash: vec![1; 32], name: "one".into(), ..Peer::default() };
        let conn = world.conn();
        world.event(Event::ProviderConnected { conn: ConnId(conn), peer });
        let report = ProviderReport { next_record, ..report() };
        let cookie = world.engine.members[&provider].record.cookie.clone();
        let hello = ProviderHello {
            address: "10.0.0.1:1".into(),
            store: vec![1; 16].into(),
            cookie,
            report: Some(report),
            ..Default::default()
        };
        world.auto = false;
        world.provider_says(conn, PUp::Hello(hello));
        let suspect = world.engine.members[&provider].record.suspect;
        world.auto = true;
        world.make_durable();
        suspect
    };
    assert!(!cookie.is_empty());
    world.provider_says(conn, PUp::Report(ProviderReport { next_record: 70, ..report() }));
    assert!(!back(&mut world, 70));
    assert!(!back(&mut world, 75));
    assert!(!back(&mut world, 0), "one that cannot say");
    assert!(!back(&mut world, 90));
    assert!(back(&mut world, 89));
}

fn claims(leases: Vec<InodeLease>) -> Up {
    Up::Reclaim(Reclaim { leases, last: true })
}

fn exclusive(ino: u64) -> InodeLease {
    InodeLease { ino, level: Level::Exclusive.to_wire(), open: false, grant: 0 }
}

/// A mount claimed the next inode number of another, in the middle of its session; when that other
/// made the file, an assertion on two EXCLUSIVE leases took the directory down, for every volume.
/// Claims are for a session that comes back, and only of what it can have.
#[test]
fn a_mount_claims_only_what_it_can_have_held() {
    let mut world = world();
    let (mut good, bad) = (world.open(1, "v"), world.open(2, "v"));
    let root = good.inode(&mut world, 1, Level::Exclusive);
    assert!(root.is_some());
    let next = good.next_ino;
    world.says(bad.conn, claims(vec![exclusive(next)]));
    let ended = |down: &Down| matches!(down, Down::Ended(_)).then_some(());
    assert_eq!(world.hear_some(bad.conn, ended), Some(()), "out of turn");
    let ino = good.ino();
    good.change(&mut world, vec![create(1, "a", ino, FILE)]);

    // Resumed, it may claim; but not what is not there and is not its to make, ...
    let mut bad = world.open(2, "v");
    world.event(Event::Disconnected { conn: ConnId(bad.conn) });
    assert!(matches!(bad.resume(&mut world, "v"), Down::Opened(_)));
    let (own, next) = (bad.next_ino, good.next_ino);
    world.says(bad.conn, claims(vec![exclusive(next), exclusive(1 << 40), exclusive(own)]));
    assert_eq!(world.hear_some(bad.conn, ended), None);
    let volume = world.engine.sessions[&bad.session].volume;
    let level = |world: &World, ino| world.engine.leases.level(bad.session, &(volume, ino));
    assert_eq!((level(&world, next), level(&world, 1 << 40)), (Level::None, Level::None));
    assert_eq!(level(&world, own), Level::Exclusive);
    let ino = good.ino();
    good.change(&mut world, vec![create(1, "b", ino, FILE)]);

    // ... nor what is there and was never granted: changes that are not durable would cross.
    world.event(Event::Disconnected { conn: ConnId(bad.conn) });
    assert!(matches!(bad.resume(&mut world, "v"), Down::Opened(_)));
    good.give_back(&mut world, &Recall { ino, level: Level::None.to_wire(), grant: 0 }, false);
    world.says(bad.conn, claims(vec![exclusive(ino)]));
    assert_eq!(world.hear_some(bad.conn, ended), Some(()));
    let ino = good.ino();
    good.change(&mut world, vec![create(1, "c", ino, FILE)]);
}

/// A mount that reads only has a file open that another mount removes. Its `Release`, once refused as
/// a change, ended its session.
#[test]
fn a_read_only_session_may_let_go() {
    let mut world = world();
    let open = OpenSession { volume: "v".to_owned(), read_only: true, ..Default::default() };
    let conn = world.dial(5, open);
    let mut batch = |number, op| {
        let mutations = vec![Mutation { op: Some(op) }];
        world.says(conn, Up::Batch(Batch { number, mutations, traces: vec![] }));
        world.hear_some(conn, |down| match down {
            Down::Applied(applied) => Some(Ok(applied.number)),
            Down::Ended(ended) => Some(Err(ended.reason)),
            _ => None,
        })
    };
    assert_eq!(batch(1, Op::Release(Release { ino: 77 })), Some(Ok(1)));
    let change = SetAttributes { ino: 1, mode: Some(0), ..Default::default() };
    assert_eq!(batch(2, Op::SetAttributes(change)), Some(Err(EndReason::Refused as i32)));
}

/// Two mounts that create by turns get ranges that do not join. After 1,024 of them (sixteen million
/// files) the next request once ended the session.
#[test]
fn a_session_never_runs_out_of_ranges_of_inode_numbers() {
    let mut world = world();
    let (mut one, mut two) = (world.open(1, "v"), world.open(2, "v"));
    for _ in 0..1100 {
        one.lease_inodes(&mut world, 1);
        two.lease_inodes(&mut world, 1);
    }
    one.inode(&mut world, 1, Level::Exclusive).unwrap();
    let ino = one.ino();
    one.change(&mut world, vec![create(1, "a", ino, FILE)]);
}

/// A lease was asked back while its mount had no connection. The mount had let go of it already and
/// claimed no more than the open file; who waited for the lease was never told.
#[test]
fn what_a_resumed_session_lets_go_of_is_given_to_who_waits() {
    let mut world = world();
    let (mut one, mut two) = (world.open(1, "v"), world.open(2, "v"));
    assert!(one.inode(&mut world, 1, Level::Exclusive).is_some());
    world.event(Event::Disconnected { conn: ConnId(one.conn) });
    assert!(two.inode(&mut world, 1, Level::Exclusive).is_none(), "it is the first mount's");
    assert!(matches!(one.resume(&mut world, "v"), Down::Opened(_)));
    let nothing = InodeLease { ino: 1, level: Level::None.to_wire(), open: true, grant: 1 << 40 };
    world.says(one.conn, claims(vec![nothing]));
    assert!(two.answer(&mut world).is_some());
}
