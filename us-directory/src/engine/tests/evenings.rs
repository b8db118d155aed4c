//! Providers that fall silent together: an evening, a weekend, and what may not wait for their return.

use std::collections::BTreeSet;

use super::swarm::{DAY_MS, MINUTE_MS, Swarm};
use super::*;
use crate::engine::presence::Clocks;
use crate::engine::repair::{Jobs, RepairLimits};
use crate::records::BlockRecord;

const HOUR_MS: u64 = 60 * MINUTE_MS;

/// Hours pass.
fn pass(swarm: &mut Swarm, hours: u64) {
    for _ in 0..hours {
        swarm.world.now_ms += HOUR_MS;
        swarm.run(1_000);
    }
}

#[test]
fn eighty_percent_go_home_and_come_back_and_nothing_is_repaired() {
    let mut swarm = Swarm::new(20);
    swarm.write(60);
    for evening in 0..3 {
        (1..=16).for_each(|key| swarm.leave(key));
        swarm.run(MINUTE_MS);
        swarm.world.now_ms += (14 + 40 * evening) * 3_600_000;
        swarm.run(MINUTE_MS);
        let status = swarm.world.status();
        assert_eq!(status.blocks.unwrap().lost, 0);
        (1..=16).for_each(|key| swarm.join(key));
        swarm.run(MINUTE_MS);
        assert_eq!((swarm.rebuilds, swarm.copies), (0, 0), "evening {evening}");
    }
    swarm.check_whole();
}

/// Found by the simulated office: once most were back on Monday, the few that came later had not
/// fallen silent with many any more, and were given up at once.
#[test]
fn who_is_late_on_monday_is_not_dead_before_tuesday() {
    let mut swarm = Swarm::new(20);
    swarm.write(60);
    (1..=16).for_each(|key| swarm.leave(key));
    pass(&mut swarm, 62);
    assert_eq!(swarm.world.status().braked, 16);
    (2..=16).for_each(|key| swarm.join(key));
    pass(&mut swarm, 8);
    let status = swarm.world.status();
    assert_eq!(status.providers[0].state, ProviderState::Dormant as i32);
    assert_eq!((status.braked, swarm.rebuilds, swarm.copies), (1, 0, 0));
    pass(&mut swarm, 16);
    let status = swarm.world.status();
    assert_eq!(status.providers[0].state, ProviderState::Dead as i32);
    assert_eq!(status.braked, 0);
    assert!(swarm.rebuilds > 0);
    swarm.check_whole();
}

/// Found by the simulated office of 10,000: so many went that not all were looked at while they were
/// away, and one whose turn came when the others were back had gone alone.
#[test]
fn an_evening_is_an_evening_however_many_go() {
    let mut swarm = Swarm::new(120);
    (1..=100).for_each(|key| swarm.leave(key));
    swarm.run(MINUTE_MS);
    swarm.world.now_ms += DAY_MS;
    // Once they are looked at.
    swarm.world.pass(500);
    assert_eq!(swarm.world.status().braked, 100);
    (1..=99).for_each(|key| swarm.join(key));
    pass(&mut swarm, 20);
    assert_eq!(swarm.world.status().providers[99].state, ProviderState::Dormant as i32);
}

/// Found by the simulated office in which most stay on: too few went for the brake, and those that did
/// were given up on their first Saturday, when nothing was known of their week.
#[test]
fn a_few_that_go_home_for_their_first_weekend_are_not_dead() {
    let mut swarm = Swarm::new(40);
    swarm.world.engine.config.clocks = Clocks::default();
    swarm.write(60);
    (1..=5).for_each(|key| swarm.leave(key));
    pass(&mut swarm, 63);
    let status = swarm.world.status();
    assert_eq!((status.braked, swarm.rebuilds, swarm.copies), (0, 0, 0));
    (1..=4).for_each(|key| swarm.join(key));
    pass(&mut swarm, 10);
    assert_eq!(swarm.world.status().providers[4].state, ProviderState::Dead as i32);
    assert!(swarm.rebuilds > 0);
    swarm.check_whole();
}

#[test]
fn an_urgent_block_jumps_the_queue_while_the_brake_is_on() {
    let mut swarm = Swarm::new(20);
    // One block at a time; with 4 of 6 fragments left a block lives 15 h, with 5 of them 27 h.
    swarm.world.engine.config.clocks.mttf_ms = 60 * 3_600_000;
    swarm.world.engine.repairs.jobs =
        Jobs::new(RepairLimits { jobs_max: 1, ..RepairLimits::default() });
    swarm.write(60);
    (1..=5).for_each(|key| swarm.leave(key));
    swarm.run(MINUTE_MS);
    swarm.world.now_ms += DAY_MS + 3_600_000;
    swarm.run(MINUTE_MS);
    assert_eq!((swarm.world.status().braked, swarm.rebuilds), (5, 0));
    let here: BTreeSet<u32> =
        swarm.disks.values().filter(|disk| disk.conn.is_some()).map(|disk| disk.id).collect();
    let whole = |record: &BlockRecord| record.providers.iter().all(|id| here.contains(id));
    let mut blocks: Vec<_> = swarm.records();
    blocks.retain(|(_, record)| whole(record));
    assert!(blocks.len() >= 6, "{} blocks are all here", blocks.len());
    let urgent = blocks.pop().unwrap();
    let spoil = |swarm: &mut Swarm, (block, record): &(Bytes, BlockRecord), index: usize| {
        let holder = record.providers[index];
        let disk = swarm.disks.values_mut().find(|disk| disk.id == holder).unwrap();
        disk.spoilt.insert((block.clone(), index as u32));
        let fragment = FragmentId { block: block.clone(), index: index as u32 };
        let damage = DamageReport { fragments: vec![fragment], ..Default::default() };
        let conn = disk.conn.unwrap();
        swarm.world.provider_says(conn, PUp::Damage(damage));
    };
    for block in &blocks {
        spoil(&mut swarm, block, 0);
    }
    swarm.world.pass(500);
    swarm.read();
    let [(key, ticket)] = swarm.orders()[..] else { panic!("{:?}", swarm.orders()) };
    assert_eq!(swarm.world.status().repair.unwrap().urgent, 0);
    spoil(&mut swarm, &urgent, 1);
    spoil(&mut swarm, &urgent, 4);
    let repair = swarm.world.status().repair.unwrap();
    assert_eq!((repair.urgent, repair.running), (1, 1), "{repair:?}");
    swarm.obey(key, ticket);
    swarm.read();
    let [(key, ticket)] = swarm.orders()[..] else { panic!("{:?}", swarm.orders()) };
    let order = &swarm.disks[&key].orders[&ticket];
    assert_eq!(order.block, urgent.0, "before all that waited longer");
    assert_eq!(swarm.world.status().braked, 5);
    swarm.run(MINUTE_MS);
    assert_eq!(swarm.rebuilds, blocks.len() as u64 + 2, "what is lost, and nothing of the evening");
    (1..=5).for_each(|key| swarm.join(key));
    swarm.run(MINUTE_MS);
    swarm.check_whole();
}
