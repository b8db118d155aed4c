//! The cleaner's choice, beside mounts that come, go and hold leases.

use us_proto::v1::CleanBlocks;

use super::swarm::{MINUTE_MS, Swarm};
use super::*;

/// Files of 1 MiB, each in a block of its own that had 4 MiB when it was written.
fn quarter_full(blocks: usize) -> Swarm {
    let mut swarm = Swarm::new(6);
    let block_bytes = Code::new(4, 2).unwrap().block_bytes_max();
    (swarm.plaintext_bytes, swarm.file_bytes) = (block_bytes as u32, 1 << 20);
    swarm.write(blocks);
    swarm
}

fn order(world: &mut World, mount: &Mount) -> Option<CleanBlocks> {
    world.hear_some(mount.conn, |down| match down {
        Down::Clean(order) => Some(order.clone()),
        _ => None,
    })
}

fn inos(order: &CleanBlocks) -> Vec<u64> {
    let mut inos: Vec<u64> = order.chunks.iter().map(|chunk| chunk.ino).collect();
    inos.sort_unstable();
    inos
}

/// The mount has written everything of a file somewhere else.
fn rewrite(world: &mut World, mount: &mut Mount, inos: &[u64]) {
    for ino in inos {
        let zeros = ExtentWrite { ino: *ino, length: 1 << 20, zero: true, ..Default::default() };
        let data = CommitData { extents: vec![zeros], ..Default::default() };
        mount.change(world, vec![Op::CommitData(data)]);
    }
}

#[test]
fn what_is_mostly_dead_is_written_anew_by_one_mount_at_a_time() {
    let mut swarm = quarter_full(40);
    let first = swarm.mount.next_ino - 40;
    swarm.run(20_000);
    assert!(order(&mut swarm.world, &swarm.mount).is_none(), "blocks are let alone for a while");
    swarm.run(15_000);
    let told = order(&mut swarm.world, &swarm.mount).unwrap();
    assert_eq!((told.blocks.len(), told.chunks.len()), (32, 32), "32 MiB at once");
    let named = inos(&told);
    assert!(named.iter().all(|ino| (first..first + 40).contains(ino)));
    swarm.run(20_000);
    assert!(order(&mut swarm.world, &swarm.mount).is_none(), "one order at a time");
    // All but the last of it: that one is left alone when the order's time is over, the rest is done.
    let mut mount = swarm.mount.clone();
    rewrite(&mut swarm.world, &mut mount, &named[..31]);
    swarm.run(MINUTE_MS);
    let next = order(&mut swarm.world, &mount).unwrap();
    let expected: Vec<u64> = (first..first + 40).filter(|ino| !named.contains(ino)).collect();
    assert_eq!(inos(&next), expected, "not what was left as it was");
    rewrite(&mut swarm.world, &mut mount, &expected);
    swarm.run(MINUTE_MS);
    assert!(order(&mut swarm.world, &mount).is_none(), "3 MiB are not worth it");
    assert_eq!(swarm.records().len(), 1);
}

/// The mount that was asked went; a restart forgot the order and finds the blocks when it counts.
#[test]
fn an_order_is_given_again_when_its_mount_or_the_directory_goes() {
    let mut swarm = quarter_full(8);
    let other = swarm.world.open(2, "v");
    swarm.run(40_000);
    let told = order(&mut swarm.world, &swarm.mount).unwrap();
    assert!(order(&mut swarm.world, &other).is_none(), "the mount that has the files");
    swarm.world.says(swarm.mount.conn, Up::Close(CloseSession {}));
    swarm.run(2_000);
    let again = order(&mut swarm.world, &other).unwrap();
    assert_eq!(inos(&again), inos(&told));

    swarm.world.make_durable();
    swarm.world.restart(0);
    let mut other = other;
    assert!(matches!(other.resume(&mut swarm.world, "v"), Down::Opened(_)));
    swarm.count();
    swarm.world.pass(2_000);
    assert_eq!(inos(&order(&mut swarm.world, &other).unwrap()), inos(&told));
}

/// What another mount is changing, what only the trash has, and volumes mounted for reading alone.
#[test]
fn nobody_is_disturbed_for_it() {
    let mut swarm = quarter_full(8);
    let first = swarm.mount.next_ino - 8;
    let mut mount = swarm.mount.clone();
    let mut other = swarm.world.open(2, "v");
    // Another mount has a file for itself.
    let key = (*swarm.world.engine.volumes.keys().next().unwrap(), first);
    swarm.world.engine.leases.forget(mount.session, &key);
    let (level, ..) = swarm.world.engine.leases.grant(other.session, &key, Level::Exclusive);
    assert_eq!(level, Level::Exclusive);
    // One file is in the trash, all of its block with it.
    swarm.run(15_000);
    mount.change(&mut swarm.world, vec![unlink(1, "f2", first + 1, false)]);
    swarm.run(30_000);
    // Each cleans what it has itself.
    let told = order(&mut swarm.world, &other).unwrap();
    assert_eq!(inos(&told), [first]);
    assert!(order(&mut swarm.world, &mount).is_none());
    rewrite(&mut swarm.world, &mut other, &[first]);
    swarm.run(MINUTE_MS);
    let told = order(&mut swarm.world, &mount).unwrap();
    assert_eq!(inos(&told), (first + 2..first + 8).collect::<Vec<_>>(), "not what the trash has");
}

#[test]
fn a_volume_that_is_full_of_what_lives_is_let_alone() {
    let mut swarm = Swarm::new(6);
    let block_bytes = Code::new(4, 2).unwrap().block_bytes_max();
    swarm.plaintext_bytes = block_bytes as u32;
    swarm.file_bytes = block_bytes as u64 * 9 / 10;
    swarm.write(60);
    swarm.run(2 * MINUTE_MS);
    assert!(order(&mut swarm.world, &swarm.mount).is_none());
    // One more file of which little lives does not make the volume worth it.
    swarm.file_bytes = 1 << 20;
    swarm.write(1);
    swarm.run(2 * MINUTE_MS);
    assert!(order(&mut swarm.world, &swarm.mount).is_none());
}
