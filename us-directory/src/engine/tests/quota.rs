//! Quotas against a client that does not keep to them.

use super::super::quota::{LEASES_MAX, LEFT_FREE, LEFT_MAX, SLACK_BLOCKS};
use super::*;

/// A full block of 4+2.
const BLOCK_BYTES: u32 = 252 * (16 << 10);
const QUOTA_BLOCKS: u64 = 100;

fn world(quota_bytes: u64) -> World {
    let mut world = World::new();
    for key in 101..=106 {
        world.provider(key, Bytes::new());
    }
    let made =
        NewVolume { quota_bytes, trash_hours: Some(0), ..NewVolume::named("v", 4, 2) }.into();
    assert!(matches!(world.ask(made), Answer::Volume(_)));
    world
}

fn lease(world: &mut World, mount: &Mount, count: u32) -> PlacementsLeased {
    world.says(mount.conn, Up::LeasePlacements(LeasePlacements { request: 9, count }));
    let leased = world.hear_some(mount.conn, |down| match down {
        Down::Placements(leased) => Some(leased.clone()),
        _ => None,
    });
    leased.expect("an answer")
}

fn lease_all(world: &mut World, mount: &Mount) -> Vec<PlacementLease> {
    let mut all = Vec::new();
    loop {
        let leased = lease(world, mount, 256);
        if leased.leases.is_empty() {
            assert!(leased.no_space && !leased.error.is_empty(), "{leased:?}");
            return all;
        }
        all.extend(leased.leases);
    }
}

/// The commit of a full block whose id begins with `number` and one.
fn whole_block(mut id: [u8; 16], number: u64, lease: &PlacementLease) -> BlockCommit {
    id[..8].copy_from_slice(&(number + 1).to_le_bytes());
    BlockCommit {
        block: Bytes::copy_from_slice(&id),
        s: 4,
        r: 2,
        page_bytes: 16384,
        plaintext_bytes: BLOCK_BYTES,
        birth: lease.birth,
        providers: lease.providers.clone(),
        durable: vec![0b11_1111].into(),
        fingerprint_hash: vec![1; 32].into(),
        ..Default::default()
    }
}

/// Commits a whole block as the file's `at`th.
fn store(mount: &mut Mount, world: &mut World, ino: u64, at: u64, lease: &PlacementLease) {
    let block = whole_block([0; 16], at, lease);
    let id = block.block.clone();
    let (offset, length) = (at * u64::from(BLOCK_BYTES), u64::from(BLOCK_BYTES));
    let extents = vec![ExtentWrite { ino, offset, length, block: id, ..Default::default() }];
    let size = offset + length;
    let files =
        vec![FileGrowth { ino, size, mtime: at_time(), ctime: at_time(), clear_suid: false }];
    let blocks = vec![block];
    mount.send(world, vec![Op::CommitData(CommitData { blocks, extents, files })]);
}

fn at_time() -> Option<Timestamp> {
    super::at(300)
}

fn file(mount: &mut Mount, world: &mut World) -> u64 {
    mount.inode(world, 1, Level::Exclusive).unwrap();
    let ino = mount.ino();
    mount.change(world, vec![create(1, "a", ino, 0o100_644)]);
    ino
}

fn is_ended(world: &mut World, mount: &Mount) -> bool {
    let ended = world.hear_some(mount.conn, |down| match down {
        Down::Ended(ended) => Some(ended.detail.clone()),
        _ => None,
    });
    ended.is_some_and(|detail| {
        assert!(detail.contains("quota"), "{detail}");
        true
    })
}

#[test]
fn one_that_leases_for_ever_comes_to_an_end() {
    let mut world = world(0);
    let (greedy, other) = (world.open(1, "v"), world.open(2, "v"));
    assert_eq!(lease_all(&mut world, &greedy).len(), LEASES_MAX);
    assert_eq!(lease(&mut world, &other, 32).leases.len(), 32, "others go on");
    // What was never committed is garbage after a time, and its places are free.
    let age_ms = EngineConfig::default().garbage_age_ms;
    world.pass(age_ms / 2);
    assert!(lease(&mut world, &greedy, 1).leases.is_empty());
    for conn in [greedy.conn, other.conn] {
        world.says(conn, Up::Renew(Renew::default()));
    }
    world.pass(age_ms / 2 + 1000);
    assert_eq!(lease(&mut world, &greedy, 256).leases.len(), 256);
}

#[test]
fn leases_end_with_the_quota_and_come_back_with_space() {
    let mut world = world(QUOTA_BLOCKS * u64::from(BLOCK_BYTES));
    let mut one = world.open(1, "v");
    let two = world.open(2, "v");
    let ino = file(&mut one, &mut world);
    let leased = lease_all(&mut world, &one);
    assert_eq!(leased.len() as u64, QUOTA_BLOCKS + SLACK_BLOCKS);
    assert!(lease(&mut world, &two, 1).leases.is_empty(), "the quota is the volume's");
    // Stored is as good as leased.
    for (at, lease) in (0..).zip(leased.iter().take(50)) {
        store(&mut one, &mut world, ino, at, lease);
    }
    assert!(!is_ended(&mut world, &one));
    assert!(lease(&mut world, &one, 1).leases.is_empty());
    // What is cut off can be leased again.
    let shrink = SetAttributes { ino, size: Some(0), ctime: at_time(), ..Default::default() };
    one.change(&mut world, vec![Op::SetAttributes(shrink)]);
    world.pass(1_000);
    assert_eq!(lease_all(&mut world, &one).len(), 50);
}

#[test]
fn commits_beyond_the_quota_end_the_session() {
    let mut world = world(QUOTA_BLOCKS * u64::from(BLOCK_BYTES));
    let mut one = world.open(1, "v");
    let ino = file(&mut one, &mut world);
    // One place, named again and again.
    let lease = lease(&mut world, &one, 1).leases.remove(0);
    for at in 0..QUOTA_BLOCKS + SLACK_BLOCKS {
        store(&mut one, &mut world, ino, at, &lease);
    }
    assert!(!is_ended(&mut world, &one), "up to there it is honoured");
    store(&mut one, &mut world, ino, QUOTA_BLOCKS + SLACK_BLOCKS, &lease);
    assert!(is_ended(&mut world, &one));
    let live = world.status().volumes[0].live_bytes;
    assert_eq!(live, (QUOTA_BLOCKS + SLACK_BLOCKS) * u64::from(BLOCK_BYTES));
}

/// Blocks of which one byte is referred to are stored whole.
#[test]
fn blocks_for_nothing_are_counted_too() {
    let mut world = world(u64::from(BLOCK_BYTES));
    let mut one = world.open(1, "v");
    let ino = file(&mut one, &mut world);
    let lease = lease(&mut world, &one, 1).leases.remove(0);
    let mut stored = 0;
    while stored < 1000 {
        let block = whole_block([1; 16], stored, &lease);
        let id = block.block.clone();
        let extent =
            ExtentWrite { ino, offset: stored, length: 1, block: id, ..Default::default() };
        let commit = CommitData { blocks: vec![block], extents: vec![extent], files: Vec::new() };
        one.send(&mut world, vec![Op::CommitData(commit)]);
        if is_ended(&mut world, &one) {
            break;
        }
        stored += 1;
    }
    assert_eq!(stored, 8 + SLACK_BLOCKS);
}

/// Who leased places and unmounted had them for nothing: the next session began at none.
#[test]
fn places_of_sessions_that_ended_count_on() {
    let mut world = world(QUOTA_BLOCKS * u64::from(BLOCK_BYTES));
    let other = world.open(2, "v");
    let mut left = 0;
    let last = loop {
        let one = world.open(1, "v");
        let leased = lease_all(&mut world, &one).len();
        if leased == 0 {
            break one;
        }
        left += leased;
        world.says(one.conn, Up::Close(CloseSession {}));
    };
    assert_eq!(left as u64, LEFT_FREE as u64 + QUOTA_BLOCKS + SLACK_BLOCKS);
    assert!(lease(&mut world, &other, 1).leases.is_empty(), "the quota is the volume's");
    // Until nothing can be young under them any more.
    let age_ms = EngineConfig::default().garbage_age_ms;
    for _ in 0..2 {
        world.pass(age_ms / 2 + 1000);
        for conn in [other.conn, last.conn] {
            world.says(conn, Up::Renew(Renew::default()));
        }
    }
    assert_eq!(lease_all(&mut world, &last).len() as u64, QUOTA_BLOCKS + SLACK_BLOCKS);
}

/// Without a quota too: what one client's sessions leave is bounded.
#[test]
fn sessions_opened_and_closed_in_turns_lease_no_more() {
    let mut world = world(0);
    let other = world.open(2, "v");
    let mut rounds = 0;
    loop {
        let one = world.open(1, "v");
        if lease(&mut world, &one, 1).leases.is_empty() {
            break;
        }
        lease_all(&mut world, &one);
        world.says(one.conn, Up::Close(CloseSession {}));
        rounds += 1;
    }
    assert_eq!(rounds, LEFT_MAX / LEASES_MAX);
    assert_eq!(lease(&mut world, &other, 32).leases.len(), 32, "others go on");
}
