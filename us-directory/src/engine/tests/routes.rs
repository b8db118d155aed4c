//! By which way repairs go, and what they ask of whom: the engine's orders, by the lines it knows.

use std::collections::BTreeMap;

use super::repair::Swarm;
use super::*;

/// A whole block in 4+2.
const BLOCK_BYTES: u32 = 4_128_768;
const DAY_MS: u64 = 24 * 3_600_000;
const MINUTE_MS: u64 = 60_000;

/// A provider dies; the first orders that leave then.
fn orders_after_a_death(swarm: &mut Swarm) -> Vec<RebuildFragments> {
    swarm.leave(3);
    swarm.run(10 * MINUTE_MS);
    swarm.world.now_ms += DAY_MS;
    while swarm.orders().is_empty() {
        swarm.world.pass(500);
        swarm.world.says(swarm.mount.conn, Up::Renew(Renew {}));
        swarm.read();
    }
    swarm.disks.values().flat_map(|disk| disk.orders.values().cloned()).collect()
}

#[test]
fn lines_say_by_which_way_fragments_travel() {
    let lan = 1_250_000;
    let cases = [
        (0, 0, RebuildPath::Star),
        (16_000, lan, RebuildPath::RotatedStar),
        (lan, lan, RebuildPath::Chain),
    ];
    for (up, down, path) in cases {
        let mut swarm = Swarm::new(8);
        swarm.plaintext_bytes = BLOCK_BYTES;
        swarm.write(12);
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
