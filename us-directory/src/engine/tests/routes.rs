//! By which way repairs go, and what they ask of whom: the engine's orders, by the lines it knows.

use std::collections::BTreeMap;

use us_core::placement::helpers::{Rebuild, Senders, assign};

use super::swarm::{DAY_MS, MINUTE_MS, Swarm};
use super::*;

/// A whole block in 4+2.
const BLOCK_BYTES: u32 = 4_128_768;

/// A provider with fragments dies; the first orders that leave then.
fn orders_after_a_death(swarm: &mut Swarm) -> Vec<RebuildFragments> {
    let held =
        |id: u32| swarm.records().iter().filter(|(_, block)| block.providers.contains(&id)).count();
    let victim = swarm.disks.iter().max_by_key(|(_, disk)| held(disk.id)).map(|(key, _)| *key);
    swarm.leave(victim.unwrap());
    swarm.run(10 * MINUTE_MS);
    swarm.world.now_ms += DAY_MS;
    while swarm.orders().is_empty() {
        swarm.world.pass(500);
        swarm.world.says(swarm.mount.conn, Up::Renew(Renew::default()));
        swarm.read();
    }
    swarm.disks.values().flat_map(|disk| disk.orders.values().cloned()).collect()
}

#[test]
fn lines_say_by_which_way_fragments_travel() {
    let lan = 1_250_000;
    let cases = [
        (0, 0, 12, RebuildPath::Star),
        // Helpers of many blocks are chosen together; a block that is alone is shared by all of them.
        (16_000, lan, 12, RebuildPath::Star),
        (16_000, lan, 1, RebuildPath::RotatedStar),
        (lan, lan, 12, RebuildPath::Chain),
    ];
    for (up, down, blocks, path) in cases {
        let mut swarm = Swarm::new(8);
        swarm.plaintext_bytes = BLOCK_BYTES;
        swarm.write(blocks);
        swarm.world.line = (up, down);
        let orders = orders_after_a_death(&mut swarm);
        assert!(orders.iter().all(|order| order.path() == path), "{up} {down}: {orders:?}");
        swarm.run(30 * MINUTE_MS);
        swarm.check_whole();
    }
}

#[test]
fn helpers_are_chosen_for_many_blocks_together() {
    let mut swarm = Swarm::new(8);
    swarm.write(20);
    let orders = orders_after_a_death(&mut swarm);
    let mut sends: BTreeMap<u32, usize> = BTreeMap::new();
    for order in &orders {
        for source in &order.sources[..4] {
            *sends.entry(source.provider).or_default() += 1;
        }
    }
    // Seven are left, and each block leaves a choice of four of five.
    let fair = (4 * orders.len()).div_ceil(7);
    assert!(orders.len() > 8 && sends.values().all(|one| *one <= fair + 1), "{fair}: {sends:?}");
}

/// So many orders are refused by rebuilders that have other things to do.
fn refuse_orders(swarm: &mut Swarm, count: usize) {
    let mut refused = 0;
    while refused < count {
        swarm.world.pass(500);
        swarm.world.says(swarm.mount.conn, Up::Renew(Renew::default()));
        swarm.read();
        for (key, ticket) in swarm.orders().into_iter().take(count - refused) {
            let disk = swarm.disks.get_mut(&key).unwrap();
            disk.orders.remove(&ticket);
            let (conn, status) = (disk.conn.unwrap(), RebuildStatus::Busy as i32);
            let reply = Rebuilt { ticket, status, ..Default::default() };
            swarm.world.provider_says(conn, PUp::Rebuilt(reply));
            refused += 1;
        }
    }
}

/// The busiest was sometimes asked for one fragment more than the best choice gives: helpers of blocks
/// that had to wait were chosen again, one block at a time, among those that happened to be free; and
/// what a busy rebuilder had refused still counted as asked for.
#[test]
fn slow_lines_are_asked_for_no_more_than_the_best_choice() {
    for (providers, busy) in [(9, 0), (12, 0), (20, 0), (9, 6), (20, 6)] {
        let mut swarm = Swarm::new(providers);
        swarm.plaintext_bytes = BLOCK_BYTES;
        swarm.write(usize::from(providers) * 2);
        swarm.world.line = (16 << 10, 1 << 30);
        let victim = swarm.disks[&3].id;
        let rebuilds: Vec<Rebuild> = swarm
            .records()
            .iter()
            .filter(|(_, block)| block.providers.contains(&victim))
            .map(|(_, block)| {
                let others = block.providers.iter().filter(|one| **one != victim);
                Rebuild { holders: others.map(|one| *one as usize).collect(), needed: 4 }
            })
            .collect();
        let most = assign(&Senders::equal(usize::from(providers) + 1), &rebuilds).busiest();
        swarm.leave(3);
        swarm.run(10 * MINUTE_MS);
        swarm.world.now_ms += DAY_MS;
        refuse_orders(&mut swarm, busy);
        // Status says what this hour asked of each.
        let (mut asked, mut this_hour) = (BTreeMap::<u32, u64>::new(), BTreeMap::new());
        for _ in 0..300 {
            swarm.run(MINUTE_MS);
            for provider in swarm.world.status().providers {
                let (now, number) = (provider.repair_sent_bytes, provider.provider);
                let last = this_hour.insert(number, now).unwrap_or(0);
                *asked.entry(number).or_default() += if now < last { now } else { now - last };
            }
        }
        swarm.check_whole();
        let fragment_bytes = u64::from(BLOCK_BYTES) * 257 / 256 / 4;
        // Four for each, or three where the rebuilder holds one itself.
        let sent: u64 = asked.values().map(|bytes| bytes / fragment_bytes).sum();
        assert!(sent >= 3 * rebuilds.len() as u64, "{sent} for {}", rebuilds.len());
        let busiest = asked.values().max().unwrap() / fragment_bytes;
        assert!(
            busiest as f64 <= most,
            "{providers}, {busy}: {busiest} of {most} at best: {asked:?}"
        );
    }
}

#[test]
fn a_stated_uplink_is_shared_with_its_owner() {
    let mut swarm = Swarm::new(8);
    swarm.plaintext_bytes = BLOCK_BYTES;
    swarm.write(20);
    swarm.world.line = (128 << 10, 1 << 30);
    orders_after_a_death(&mut swarm);
    swarm.run(MINUTE_MS);
    // Half of it: a fragment of a MiB takes 16 s; what is asked may run 20 s ahead.
    let status = swarm.world.status();
    let sent: Vec<u64> = status.providers.iter().map(|one| one.repair_sent_bytes >> 20).collect();
    assert!(sent.iter().all(|mib| *mib <= (60 + 20) / 16 + 1), "{sent:?}");
    assert!(status.repair.unwrap().queued > 0, "it takes its time");
    swarm.run(30 * MINUTE_MS);
    swarm.check_whole();
}
