//! What nothing names: young, wanted, or garbage; and deletions that are looked at again.

use super::swarm::{DAY_MS, MINUTE_MS, Swarm};
use super::*;
use crate::engine::garbage::{Stray, Verdict};
use crate::records::BlockRecord;

const HOUR_MS: u64 = 3_600_000;

fn judge(swarm: &mut Swarm, key: u8, strays: &[Stray], mend: bool) -> Vec<Verdict> {
    let provider = swarm.disks[&key].id;
    let question = Question::Judge { provider, strays: strays.to_vec(), mend };
    match swarm.world.ask(question) {
        Answer::Verdicts(verdicts) => verdicts,
        other => panic!("{other:?}"),
    }
}

fn stray(swarm: &Swarm, block: &Bytes, index: u8, birth: u64) -> Stray {
    let volume = *swarm.world.engine.volumes.keys().next().unwrap();
    Stray { volume, block: BlockId::from_slice(block).unwrap(), index, birth }
}

/// A provider that holds nothing of the block, by key.
fn outsider(swarm: &Swarm, providers: &[u32]) -> u8 {
    let outside = swarm.disks.iter().find(|(_, disk)| !providers.contains(&disk.id));
    *outside.unwrap().0
}

/// Hours pass with everybody here.
fn grow_old(swarm: &mut Swarm) {
    for _ in 0..3 * 8 {
        swarm.run(500);
        swarm.world.now_ms += HOUR_MS / 8;
    }
    swarm.run(1000);
}

#[test]
fn what_nothing_names_is_garbage_when_it_is_old() {
    let mut swarm = Swarm::new(8);
    swarm.write(4);
    let (block, record) = swarm.records().pop().unwrap();
    let other = outsider(&swarm, &record.providers);
    let own = *swarm.disks.iter().find(|(_, disk)| disk.id == record.providers[0]).unwrap().0;
    let unknown = Bytes::from_static(&[9; 16]);
    let strays = [stray(&swarm, &block, 0, record.birth), stray(&swarm, &unknown, 1, record.birth)];
    assert_eq!(judge(&mut swarm, own, &strays, true), [Verdict::Named, Verdict::Young]);
    assert_eq!(judge(&mut swarm, other, &strays, true), [Verdict::Young, Verdict::Young]);
    grow_old(&mut swarm);
    swarm.disks.get_mut(&other).unwrap().has.insert((block.clone(), 0));
    swarm.disks.get_mut(&other).unwrap().has.insert((unknown, 1));
    // A copy of what lies well where it should, and a fragment of a block that never was.
    assert_eq!(judge(&mut swarm, other, &strays, false), [Verdict::Orphan, Verdict::Orphan]);
    assert_eq!(judge(&mut swarm, other, &strays, true), [Verdict::Orphan, Verdict::Orphan]);
    assert_eq!(judge(&mut swarm, other, &strays, true), [Verdict::Dying, Verdict::Dying]);
    assert_eq!(swarm.world.status().pending_deletes, 2);
    swarm.run(MINUTE_MS);
    assert_eq!((swarm.deletes, swarm.world.status().pending_deletes), (2, 0));
    swarm.check_whole();
    // Births that nobody has given yet are as young as can be.
    let future = [stray(&swarm, &block, 0, 1 << 40)];
    assert_eq!(judge(&mut swarm, other, &future, true), [Verdict::Young]);
}

#[test]
fn the_floor_waits_for_a_mount_that_is_away() {
    let mut swarm = Swarm::new(6);
    swarm.write(1);
    let conn = swarm.mount.conn;
    swarm.world.event(Event::Disconnected { conn: ConnId(conn) });
    for _ in 0..40 {
        swarm.world.pass(HOUR_MS / 8);
    }
    assert_eq!(swarm.world.engine.cluster.births_floor, 0, "it may still commit what it has");
    for _ in 0..24 {
        swarm.world.pass(HOUR_MS);
    }
    assert!(swarm.world.engine.cluster.births_floor > 0, "not for ever");
}

#[test]
fn what_is_committed_late_comes_back_from_the_trash() {
    let mut swarm = Swarm::new(6);
    swarm.write(1);
    let birth = swarm.records()[0].1.birth;
    grow_old(&mut swarm);
    assert!(swarm.world.engine.cluster.births_floor > birth);
    swarm.read();
    swarm.late_birth = Some(birth);
    swarm.write(1);
    let mut asked = 0;
    for disk in swarm.disks.values() {
        for down in swarm.world.to_providers.entry(disk.conn.unwrap()).or_default() {
            if let PDown::Check(check) = down {
                assert!(check.bring_back);
                asked += check.fragments.len();
            }
        }
    }
    assert_eq!(asked, 6);
    swarm.run(MINUTE_MS);
    swarm.check_whole();
    // What is still on its way was not confirmed, and is no damage.
    let on_its_way = BlockRecord {
        s: 4,
        r: 2,
        providers: swarm.records()[0].1.providers.clone(),
        durable: vec![0b1_1111].into(),
        ..Default::default()
    };
    let key = (stray(&swarm, &swarm.records()[0].0, 0, 1).volume, BlockId::from_bytes([5; 16]));
    swarm.world.engine.committed_late(key, &on_its_way);
    let queries = swarm.world.engine.queries.values();
    assert_eq!(queries.map(|query| query.fragments()).sum::<usize>(), 5);
}

#[test]
fn births_that_a_restore_forgot_are_spared() {
    let mut swarm = Swarm::new(8);
    swarm.write(1);
    let (block, record) = swarm.records().pop().unwrap();
    let other = outsider(&swarm, &record.providers);
    let end = swarm.world.engine.cluster.births_end;
    swarm.world.engine.cluster.spare_births(end);
    grow_old(&mut swarm);
    swarm.world.engine.cluster.births_floor = end + 10;
    let unknown = Bytes::from_static(&[9; 16]);
    let strays = [stray(&swarm, &unknown, 1, record.birth), stray(&swarm, &unknown, 2, end + 1)];
    assert_eq!(judge(&mut swarm, other, &strays, true), [Verdict::Spared, Verdict::Orphan]);
    let known = [stray(&swarm, &block, 0, 1)];
    assert_eq!(judge(&mut swarm, other, &known, true), [Verdict::Spared]);
}

#[test]
fn the_only_copy_of_what_a_block_lacks_is_taken_over() {
    let mut swarm = Swarm::new(8);
    swarm.write(1);
    grow_old(&mut swarm);
    let (block, record) = swarm.records().pop().unwrap();
    let other = outsider(&swarm, &record.providers);
    // Its holder has gone, but it is not given up: whoever has the fragment must keep it.
    let holder = *swarm.disks.iter().find(|(_, disk)| disk.id == record.providers[2]).unwrap().0;
    swarm.disks.get_mut(&other).unwrap().has.insert((block.clone(), 2));
    swarm.leave(holder);
    let strays = [stray(&swarm, &block, 2, record.birth)];
    assert_eq!(judge(&mut swarm, other, &strays, true), [Verdict::Busy]);
    swarm.world.now_ms += DAY_MS;
    // Dead, but nothing was made again yet.
    while !swarm.world.engine.members[&record.providers[2]].record.dead {
        swarm.world.pass(500);
        swarm.world.says(swarm.mount.conn, Up::Renew(Renew::default()));
    }
    swarm.read();
    for (key, ticket) in swarm.orders() {
        // The order fails, so that the block waits.
        let conn = swarm.disks[&key].conn.unwrap();
        swarm.disks.get_mut(&key).unwrap().orders.remove(&ticket);
        let status = RebuildStatus::Busy as i32;
        let reply = Rebuilt { ticket, status, ..Default::default() };
        swarm.world.provider_says(conn, PUp::Rebuilt(reply));
    }
    assert_eq!(judge(&mut swarm, other, &strays, true), [Verdict::Wanted]);
    let rebuilds = swarm.rebuilds;
    swarm.run(MINUTE_MS);
    assert_eq!(swarm.rebuilds, rebuilds, "nothing needed to be made");
    swarm.check_whole();
}

#[test]
fn a_deletion_is_looked_at_again_when_it_is_sent() {
    let mut swarm = Swarm::new(7);
    swarm.write(1);
    grow_old(&mut swarm);
    let (block, record) = swarm.records().pop().unwrap();
    let other = outsider(&swarm, &record.providers);
    swarm.disks.get_mut(&other).unwrap().has.insert((block.clone(), 3));
    // Its provider is away when the deletion is told.
    swarm.leave(other);
    let strays = [stray(&swarm, &block, 3, record.birth)];
    assert_eq!(judge(&mut swarm, other, &strays, true), [Verdict::Orphan]);
    assert_eq!(swarm.world.status().pending_deletes, 1);
    // Then the fragment is needed there after all: its place becomes that of the only other provider.
    let volume = strays[0].volume;
    let (from, to) = (record.providers[3], swarm.disks[&other].id);
    let mut tx = swarm.world.engine.tx(volume).unwrap();
    tx.relocate(&strays[0].block, 3, from, to).unwrap();
    let outcome = tx.finish().unwrap();
    let engine = &mut swarm.world.engine;
    engine.commit(outcome.batch, Durability::Applied).unwrap();
    engine.pending_deletes += outcome.graves as i64;
    engine.note_blocks(volume, outcome.blocks);
    swarm.join(other);
    swarm.run(5 * MINUTE_MS);
    assert_eq!(swarm.world.status().pending_deletes, 0);
    assert!(swarm.good(to, &(block, 3)), "it was not deleted");
    swarm.check_whole();
}

#[test]
fn mending_writes_listings_as_the_records_say() {
    let mut swarm = Swarm::new(7);
    swarm.write(2);
    let (block, record) = swarm.records().pop().unwrap();
    let (volume, id) = (stray(&swarm, &block, 0, 0).volume, BlockId::from_slice(&block).unwrap());
    let other = swarm.disks[&outsider(&swarm, &record.providers)].id;
    let mut batch = WriteBatch::new();
    batch.delete(keys::holding(&volume, record.providers[0], &id));
    let wrong = crate::records::HoldingRecord { fragments: vec![1].into(), ..Default::default() };
    batch.put(keys::holding(&volume, other, &id), encode(&wrong));
    swarm.world.engine.commit(batch, Durability::Applied).unwrap();
    let blocks = vec![(id, record.providers[0]), (id, other)];
    let mended = swarm.world.ask(Question::Mend { volume, blocks: blocks.clone() });
    assert!(matches!(mended, Answer::Count(2)), "{mended:?}");
    let again = swarm.world.ask(Question::Mend { volume, blocks });
    assert!(matches!(again, Answer::Count(0)), "{again:?}");
    swarm.check_whole();
}

#[test]
fn retain_lists_take_away_what_writes_and_repairs_left_behind() {
    let mut swarm = Swarm::new(8);
    swarm.write(30);
    grow_old(&mut swarm);
    // Garbage of every kind: of blocks that never were, and second copies of what is well.
    let never = Bytes::from_static(&[9; 16]);
    swarm.births.insert(never.clone(), 3);
    let (block, record) = swarm.records().pop().unwrap();
    let other = outsider(&swarm, &record.providers);
    swarm.disks.get_mut(&other).unwrap().has.insert((block, 1));
    for key in 1..=4 {
        swarm.disks.get_mut(&key).unwrap().has.insert((never.clone(), u32::from(key)));
    }
    // Too young to be judged: it stays.
    let young = Bytes::from_static(&[8; 16]);
    swarm.births.insert(young.clone(), 1 << 40);
    swarm.disks.get_mut(&5).unwrap().has.insert((young.clone(), 0));
    swarm.world.now_ms += 8 * DAY_MS;
    swarm.run(5 * MINUTE_MS);
    assert_eq!((swarm.lists, swarm.deletes), (8, 5), "each had its turn once");
    assert!(swarm.disks.get_mut(&5).unwrap().has.remove(&(young, 0)));
    swarm.check_whole();
    let Answer::Events(events) = swarm.world.ask(Question::Events { after: 0, last: 0 }) else {
        panic!()
    };
    assert!(events.iter().any(|event| event.kind == "garbage"));
    swarm.world.now_ms += 8 * DAY_MS;
    swarm.run(5 * MINUTE_MS);
    assert_eq!((swarm.lists, swarm.deletes), (16, 5), "and nothing is left to take");
}

#[test]
fn a_refused_list_takes_nothing_and_waits_for_its_next_turn() {
    let mut swarm = Swarm::new(6);
    swarm.write(2);
    grow_old(&mut swarm);
    swarm.world.now_ms += 8 * DAY_MS;
    let mut refused = 0;
    for _ in 0..200 {
        swarm.world.pass(500);
        swarm.world.says(swarm.mount.conn, Up::Renew(Renew::default()));
        let conns: Vec<u64> = swarm.disks.values().filter_map(|disk| disk.conn).collect();
        for conn in conns {
            let queue = swarm.world.to_providers.entry(conn).or_default();
            for down in std::mem::take(queue) {
                let PDown::Retain(page) = down else { continue };
                refused += 1;
                let (list, page) = (page.list, page.page);
                let why = "it is empty".to_owned();
                let reply = RetainReply { list, page, refused: why, ..Default::default() };
                swarm.world.provider_says(conn, PUp::Retain(reply));
            }
        }
    }
    assert_eq!((refused, swarm.deletes), (6, 0));
    swarm.check_whole();
}

/// fsx overwrote a small file on a nearly empty volume: what it had replaced lay in graves and in the
/// trash, and the next write was told that there is no space. Providers that are full of trash were
/// even taken for providers that are not there: an `EIO`.
#[test]
fn where_space_comes_back_a_writer_is_told_so() {
    let mut world = World::new();
    world.volume("v", 4, 2);
    let mount = world.open(100, "v");
    (1..=6).for_each(|key| drop(world.provider(key, Bytes::new())));
    // A provider calls itself full while a fragment would still fit.
    let full = ProviderReport { free_bytes: 6 << 20, accepts_puts: false, full: true, ..report() };
    let ask = |world: &mut World, reclaimable_bytes: u64| {
        for (conn, _) in world.providers.clone() {
            let report = ProviderReport { reclaimable_bytes, ..full.clone() };
            world.provider_says(conn, PUp::Report(report));
        }
        world.says(mount.conn, Up::LeasePlacements(LeasePlacements { request: 9, count: 1 }));
        let places = world.hear_some(mount.conn, |down| match down {
            Down::Placements(places) => Some(places.clone()),
            _ => None,
        });
        let places = places.unwrap();
        assert!(places.leases.is_empty());
        world.says(mount.conn, Up::Statfs(StatfsRequest { request: 10 }));
        let space = world.hear_some(mount.conn, |down| match down {
            Down::Statfs(space) => Some(*space),
            _ => None,
        });
        let space = space.unwrap();
        (places.no_space, places.space_comes, space.free_bytes > 1 << 30)
    };
    assert_eq!(ask(&mut world, 0), (true, false, false), "full for good");
    assert_eq!(ask(&mut world, 1 << 32), (true, true, true), "full of trash");
    let (roomy, others) = world.providers.split_at(2);
    let (roomy, others) = (roomy.to_vec(), others.to_vec());
    for (conn, _) in roomy {
        world.provider_says(conn, PUp::Report(report()));
    }
    for (conn, _) in others {
        world.provider_says(conn, PUp::Report(full.clone()));
    }
    world.says(mount.conn, Up::LeasePlacements(LeasePlacements { request: 11, count: 1 }));
    let places = world.hear_some(mount.conn, |down| match down {
        Down::Placements(places) => Some((places.no_space, places.space_comes)),
        _ => None,
    });
    assert_eq!(places, Some((true, false)), "two have room for good, and three are needed");
    let (_, provider) = world.providers[0];
    world.lose_provider(provider);
    assert_eq!(ask(&mut world, 0), (true, false, false));
    for (_, provider) in world.providers.clone().into_iter().skip(2) {
        world.lose_provider(provider);
    }
    assert!(!ask(&mut world, 1 << 32).0, "too few, whatever they clear away");
}
