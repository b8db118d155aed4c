//! Reconstruction, against providers that really have or have not what they are asked for.
//!
//! Fault budget of the simulation: providers fall silent, come back, come back empty, lose or spoil
//! fragments, answer orders late, wrongly or never, and the directory restarts; never so much at
//! once that a block loses more than r fragments. Checked all the time: every block can still be
//! read from what lies on the disks, no fragment is made from fewer than s others, no block is
//! repaired twice at once, limits are kept. At the end, when faults cease: every fragment lies where
//! its record says and nowhere else, and `status` is well.

use std::collections::{BTreeMap, BTreeSet};

use rand::prelude::*;

use super::*;
use crate::engine::health::count_slice;
use crate::records::{BlockRecord, bit, block_id, decode};

pub(super) type Fragment = (Bytes, u32);

/// A provider and its disk.
#[derive(Default)]
pub(super) struct Disk {
    pub conn: Option<u64>,
    pub id: u32,
    cookie: Bytes,
    pub has: BTreeSet<Fragment>,
    spoilt: BTreeSet<Fragment>,
    /// The pages of a retain list so far.
    keeps: BTreeSet<Fragment>,
    /// Orders it was given and has not answered.
    pub orders: BTreeMap<u64, RebuildFragments>,
}

impl Disk {
    /// As a real provider compares a page with its index.
    fn compare(
        &mut self,
        page: &RetainPage,
        volume: VolumeId,
        births: &BTreeMap<Bytes, u64>,
    ) -> RetainReply {
        let reply = RetainReply { list: page.list, page: page.page, ..Default::default() };
        if page.page == 0 {
            self.keeps.clear();
        }
        for entry in &page.entries {
            let here = (0..6u32).filter(|index| bit(&entry.fragments, *index as usize));
            self.keeps.extend(here.map(|index| (entry.block.clone(), index)));
        }
        if !page.last {
            return reply;
        }
        let beyond = self.has.iter().filter(|fragment| {
            births[&fragment.0] < page.births_below && !self.keeps.contains(fragment)
        });
        let unlisted = beyond.map(|(block, index)| InventoryItem {
            fragment: Some(FragmentId { block: block.clone(), index: *index }),
            volume: Bytes::copy_from_slice(volume.as_bytes()),
            birth: births[block],
            ..Default::default()
        });
        RetainReply { unlisted: unlisted.collect(), done: true, ..reply }
    }
}

pub(super) struct Swarm {
    pub world: World,
    pub mount: Mount,
    pub disks: BTreeMap<u8, Disk>,
    blocks: u64,
    pub rebuilds: u64,
    pub copies: u64,
    pub deletes: u64,
    /// What the next block is committed with, whatever was leased.
    pub late_birth: Option<u64>,
    /// Of blocks, committed or not.
    pub births: BTreeMap<Bytes, u64>,
    /// Retain lists that came whole.
    pub lists: u64,
    /// What leaving providers were told.
    pub heard: Vec<LeaveProgress>,
    /// They report well, take puts, and fail every order.
    broken: BTreeSet<u8>,
    failed_orders: u64,
    /// Of a block.
    pub plaintext_bytes: u32,
}

impl Swarm {
    /// `providers` online, a volume of 4+2.
    pub fn new(providers: u8) -> Self {
        let mut world = World::new();
        world.volume("v", 4, 2);
        let mount = world.open(100, "v");
        let disks = BTreeMap::new();
        let (blocks, rebuilds, copies, deletes) = (0, 0, 0, 0);
        let late_birth = None;
        let mut swarm = Self {
            world,
            mount,
            disks,
            blocks,
            rebuilds,
            copies,
            deletes,
            late_birth,
            births: BTreeMap::new(),
            lists: 0,
            heard: Vec::new(),
            broken: BTreeSet::new(),
            failed_orders: 0,
            plaintext_bytes: 8192,
        };
        swarm.mount.inode(&mut swarm.world, 1, Level::Exclusive).unwrap();
        (1..=providers).for_each(|key| swarm.join(key));
        swarm.count();
        swarm
    }

    pub fn count(&mut self) {
        let (view, mut cursor) = self.world.engine.to_count();
        loop {
            let slice = count_slice(&*view, &mut cursor).unwrap();
            let last = slice.last;
            self.world.event(Event::Counted(slice));
            if last {
                break;
            }
        }
    }

    pub fn join(&mut self, key: u8) {
        let disk = self.disks.entry(key).or_default();
        let (conn, id, cookie) = self.world.provider(key, disk.cookie.clone());
        let disk = self.disks.get_mut(&key).unwrap();
        (disk.conn, disk.id, disk.cookie) = (Some(conn), id, cookie);
    }

    pub fn leave(&mut self, key: u8) {
        let disk = self.disks.get_mut(&key).unwrap();
        if disk.conn.take().is_some() {
            disk.orders.clear();
            let id = disk.id;
            self.world.lose_provider(id);
        }
    }

    /// The disk is replaced by an empty one.
    pub fn wipe(&mut self, key: u8) {
        let disk = self.disks.get_mut(&key).unwrap();
        (disk.has, disk.spoilt) = Default::default();
        disk.cookie = Bytes::new();
    }

    pub fn write(&mut self, count: usize) {
        for _ in 0..count {
            let ask = LeasePlacements { request: 9, count: 1 };
            self.world.says(self.mount.conn, Up::LeasePlacements(ask));
            let leased = self.world.hear_some(self.mount.conn, |down| match down {
                Down::Placements(leased) => Some(leased.clone()),
                _ => None,
            });
            let leased = leased.expect("placements");
            let Some(lease) = leased.leases.first() else { continue };
            self.blocks += 1;
            let mut id = [0; 16];
            id[8..].copy_from_slice(&self.blocks.to_be_bytes());
            let block = Bytes::copy_from_slice(&id);
            for (index, provider) in (0u32..).zip(&lease.providers) {
                let disk = self.disks.values_mut().find(|disk| disk.id == *provider).unwrap();
                disk.has.insert((block.clone(), index));
            }
            let birth = self.late_birth.take().unwrap_or(lease.birth);
            self.births.insert(block.clone(), birth);
            let commit = BlockCommit {
                block: block.clone(),
                s: 4,
                r: 2,
                page_bytes: 4096,
                plaintext_bytes: self.plaintext_bytes,
                birth,
                providers: lease.providers.clone(),
                durable: vec![0b11_1111].into(),
                fingerprint_hash: vec![1; 32].into(),
                ..Default::default()
            };
            let ino = self.mount.ino();
            let extents =
                vec![ExtentWrite { ino, offset: 0, length: 8192, block, ..Default::default() }];
            let growth =
                FileGrowth { ino, size: 8192, mtime: at(3), ctime: at(3), clear_suid: false };
            let name = format!("f{}", self.blocks);
            let data = CommitData { blocks: vec![commit], extents, files: vec![growth] };
            let ops = vec![create(1, &name, ino, 0o100_644), Op::CommitData(data)];
            self.mount.change(&mut self.world, ops);
        }
    }

    pub fn records(&self) -> Vec<(Bytes, BlockRecord)> {
        let volume = *self.world.engine.volumes.keys().next().unwrap();
        let pairs = self.world.engine.scan_all(&keys::tag(&volume, b'b')).unwrap();
        pairs
            .into_iter()
            .map(|(key, value)| (key.slice(keys::HEAD_BYTES..), decode(&key, &value).unwrap()))
            .collect()
    }

    pub fn good(&self, provider: u32, fragment: &Fragment) -> bool {
        let disk = self.disks.values().find(|disk| disk.id == provider).unwrap();
        disk.has.contains(fragment) && !disk.spoilt.contains(fragment)
    }

    /// Providers read what they were sent; orders wait until [`Swarm::obey`].
    pub fn read(&mut self) {
        let volume = *self.world.engine.volumes.keys().next().unwrap();
        for disk in self.disks.values_mut() {
            let Some(conn) = disk.conn else { continue };
            let queue = self.world.to_providers.entry(conn).or_default();
            for down in std::mem::take(queue) {
                match down {
                    PDown::Rebuild(order) => {
                        assert!(disk.orders.insert(order.ticket, order).is_none());
                    }
                    PDown::CancelRebuild(cancel) => {
                        disk.orders.remove(&cancel.ticket);
                    }
                    PDown::Check(check) => {
                        let status = |id: &FragmentId| {
                            let fragment = (id.block.clone(), id.index);
                            match disk.has.contains(&fragment) {
                                true => FragmentStatus::Ok as i32,
                                false => FragmentStatus::NotFound as i32,
                            }
                        };
                        let statuses = check.fragments.iter().map(status).collect();
                        let reply = CheckReply { query: check.query, statuses };
                        self.world.provider_says(conn, PUp::Checked(reply));
                    }
                    PDown::Leaving(said) => self.heard.push(said),
                    PDown::Retain(page) => {
                        let reply = disk.compare(&page, volume, &self.births);
                        self.lists += u64::from(reply.done);
                        self.world.provider_says(conn, PUp::Retain(reply));
                    }
                    PDown::Delete(delete) => {
                        for id in &delete.fragments {
                            self.deletes += 1;
                            disk.has.remove(&(id.block.clone(), id.index));
                            disk.spoilt.remove(&(id.block.clone(), id.index));
                        }
                        let done = DeleteDone { ticket: delete.ticket };
                        self.world.provider_says(conn, PUp::Deleted(done));
                    }
                    _ => {}
                }
            }
        }
    }

    /// A provider carries out an order as a real one would, and says so.
    pub fn obey(&mut self, key: u8, ticket: u64) {
        let disk = self.disks.get_mut(&key).unwrap();
        let (Some(order), Some(conn)) = (disk.orders.remove(&ticket), disk.conn) else { return };
        if self.broken.contains(&key) {
            self.failed_orders += 1;
            let status = RebuildStatus::Io as i32;
            let reply = Rebuilt { ticket, status, ..Default::default() };
            return self.world.provider_says(conn, PUp::Rebuilt(reply));
        }
        let online: BTreeSet<u32> =
            self.disks.values().filter(|d| d.conn.is_some()).map(|d| d.id).collect();
        let mut right = BTreeSet::new();
        let mut faults = Vec::new();
        for source in order.holders.iter().chain(&order.sources) {
            let fragment = (order.block.clone(), source.index);
            let found = self.disks.values().find(|disk| disk.id == source.provider).unwrap();
            let status = match () {
                () if !online.contains(&source.provider) => FragmentStatus::Unspecified,
                () if found.spoilt.contains(&fragment) => FragmentStatus::Damaged,
                () if found.has.contains(&fragment) => FragmentStatus::Ok,
                () => FragmentStatus::NotFound,
            };
            if status == FragmentStatus::Ok {
                right.insert(source.index);
            } else {
                let (index, provider) = (source.index, source.provider);
                let detail = String::new();
                faults.push(SourceFault { index, provider, status: status as i32, detail });
            }
        }
        let is_copy = order.wanted.iter().all(|index| right.contains(index));
        let made = is_copy || right.len() >= order.s as usize;
        let status = if made { RebuildStatus::Ok } else { RebuildStatus::Sources };
        if made {
            self.rebuilds += u64::from(!is_copy);
            self.copies += u64::from(is_copy);
            let disk = self.disks.get_mut(&key).unwrap();
            for index in &order.wanted {
                disk.has.insert((order.block.clone(), *index));
                disk.spoilt.remove(&(order.block.clone(), *index));
            }
        }
        let reply = Rebuilt { ticket, status: status as i32, faults, ..Default::default() };
        self.world.provider_says(conn, PUp::Rebuilt(reply));
    }

    pub fn orders(&self) -> Vec<(u8, u64)> {
        let disks = self.disks.iter();
        disks.flat_map(|(key, disk)| disk.orders.keys().map(|ticket| (*key, *ticket))).collect()
    }

    /// Time passes; orders are carried out at once.
    pub fn run(&mut self, ms: u64) {
        let end_ms = self.world.now_ms + ms;
        while self.world.now_ms < end_ms {
            self.world.pass(500.min(end_ms - self.world.now_ms));
            self.world.says(self.mount.conn, Up::Renew(Renew {}));
            loop {
                self.read();
                let orders = self.orders();
                if orders.is_empty() {
                    break;
                }
                orders.into_iter().for_each(|(key, ticket)| self.obey(key, ticket));
            }
        }
    }

    /// Nothing is lost on the disks, whatever the directory believes.
    fn check_readable(&self) {
        for (block, record) in self.records() {
            let good = self.disks.values().flat_map(|disk| {
                let here = (0..6u32).filter(|index| {
                    let fragment = (block.clone(), *index);
                    disk.has.contains(&fragment) && !disk.spoilt.contains(&fragment)
                });
                here.collect::<Vec<_>>()
            });
            let good: BTreeSet<u32> = good.collect();
            assert!(good.len() >= record.s as usize, "a block is lost: {good:?}");
        }
    }

    /// Every fragment lies where its record says and nowhere else, each on a provider of its own.
    pub fn check_whole(&mut self) {
        let mut expected: BTreeSet<(u32, Fragment)> = BTreeSet::new();
        for (block, record) in self.records() {
            let distinct: BTreeSet<u32> = record.providers.iter().copied().collect();
            assert_eq!(distinct.len(), 6, "crowded: {:?}", record.providers);
            for (index, provider) in record.providers.iter().enumerate() {
                let fragment = (block.clone(), index as u32);
                assert!(bit(&record.durable, index) && self.good(*provider, &fragment));
                expected.insert((*provider, fragment));
            }
            let volume = *self.world.engine.volumes.keys().next().unwrap();
            let id = block_id(&block).unwrap();
            for disk in self.disks.values() {
                let holds = record.providers.contains(&disk.id);
                let key = keys::holding(&volume, disk.id, &id);
                assert_eq!(self.world.engine.store.get(&key).unwrap().is_some(), holds);
            }
        }
        let online = self.disks.values().filter(|disk| disk.conn.is_some());
        let lying = online.flat_map(|disk| disk.has.iter().map(|has| (disk.id, has.clone())));
        let surplus: Vec<_> = lying.filter(|found| !expected.contains(found)).collect();
        assert_eq!(surplus, [], "nothing else takes space");
        let status = self.world.status();
        assert_eq!(status.health, Health::Ok as i32, "{}", status.summary);
        let repair = status.repair.unwrap();
        assert_eq!((repair.queued, repair.running, repair.waiting), (0, 0, 0), "{repair:?}");
    }
}

pub(super) const DAY_MS: u64 = 24 * 3_600_000;
pub(super) const MINUTE_MS: u64 = 60_000;

#[test]
fn what_a_dead_provider_held_is_made_again() {
    let mut swarm = Swarm::new(8);
    swarm.write(40);
    swarm.leave(3);
    swarm.run(10 * MINUTE_MS);
    assert_eq!(swarm.rebuilds, 0, "it is asleep");
    assert_eq!(swarm.world.status().providers[2].state, ProviderState::Dormant as i32);
    swarm.world.now_ms += DAY_MS;
    swarm.run(MINUTE_MS);
    let status = swarm.world.status();
    assert_eq!(status.providers[2].state, ProviderState::Dead as i32);
    assert!(swarm.rebuilds > 0 && swarm.copies == 0);
    swarm.check_whole();
    let Answer::Events(events) = swarm.world.ask(Question::Events { after: 0, last: 0 }) else {
        panic!()
    };
    let kinds: Vec<&str> = events.iter().map(|event| event.kind.as_str()).collect();
    for kind in ["volume-made", "provider-joined", "provider-silent", "provider-dead"] {
        assert!(kinds.contains(&kind), "{kinds:?}");
    }
    assert_eq!(kinds.last(), Some(&"repairs-done"));
    // It comes back after all: what it has too many of goes, and nothing else happens.
    let made = swarm.rebuilds;
    swarm.join(3);
    swarm.run(5 * MINUTE_MS);
    assert_eq!((swarm.rebuilds, swarm.copies), (made, 0));
    swarm.check_whole();
}

/// A provider that said hello again over a living connection kept its orders: their slots were taken
/// until the deadline, and they counted as failed.
#[test]
fn a_rebuilder_that_comes_again_is_asked_again() {
    let mut swarm = Swarm::new(6);
    swarm.write(20);
    swarm.leave(2);
    swarm.wipe(2);
    swarm.join(2);
    while swarm.disks[&2].orders.is_empty() {
        swarm.world.pass(500);
        swarm.read();
    }
    let id = swarm.disks[&2].id;
    let asked = swarm.world.engine.repairs.jobs.at(id);
    assert!(!asked.is_empty());
    let old = swarm.disks[&2].conn.unwrap();
    swarm.world.providers.retain(|(conn, _)| *conn != old);
    swarm.disks.get_mut(&2).unwrap().orders.clear();
    swarm.join(2);
    let now = swarm.world.engine.repairs.jobs.at(id);
    assert!(now.iter().all(|ticket| !asked.contains(ticket)), "{now:?}");
    swarm.run(MINUTE_MS);
    assert_eq!(swarm.world.status().repair.unwrap().failed, 0);
    swarm.check_whole();
}

/// Some providers report well and take puts, but no order to rebuild ends well there (a firewall, a
/// machine that is always busy). The target is a function of the block, so each retry asked the same one
/// again, for ever, and what had to go there stayed without its redundancy.
#[test]
fn a_target_that_fails_is_not_asked_for_ever() {
    let mut swarm = Swarm::new(9);
    swarm.write(60);
    swarm.broken.extend([4, 7]);
    swarm.leave(3);
    swarm.world.now_ms += 2 * DAY_MS;
    swarm.run(10 * MINUTE_MS);
    assert!(swarm.rebuilds > 0 && swarm.failed_orders > 0, "{}", swarm.failed_orders);
    swarm.check_whole();
    // A few orders show what it cannot do; the others are not tried on it.
    assert!(swarm.failed_orders < 40, "{} orders failed", swarm.failed_orders);
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
    const HOUR_MS: u64 = 60 * MINUTE_MS;
    let mut swarm = Swarm::new(20);
    swarm.write(60);
    let pass = |swarm: &mut Swarm, hours: u64| {
        for _ in 0..hours {
            swarm.world.now_ms += HOUR_MS;
            swarm.run(1_000);
        }
    };
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

#[test]
fn a_replaced_disk_is_filled_again_where_it_is() {
    let mut swarm = Swarm::new(6);
    swarm.write(50);
    swarm.leave(2);
    swarm.wipe(2);
    swarm.join(2);
    assert_eq!(swarm.world.status().providers[1].state, ProviderState::Absent as i32, "suspect");
    swarm.run(MINUTE_MS);
    assert_eq!((swarm.rebuilds, swarm.copies), (50, 0));
    swarm.check_whole();
}

#[test]
fn a_damaged_fragment_is_made_again_in_its_place() {
    let mut swarm = Swarm::new(7);
    swarm.write(5);
    let key = *swarm.disks.iter().find(|(_, disk)| !disk.has.is_empty()).unwrap().0;
    let disk = swarm.disks.get_mut(&key).unwrap();
    let (block, index) = disk.has.first().unwrap().clone();
    disk.spoilt.insert((block.clone(), index));
    let conn = disk.conn.unwrap();
    let fragments = vec![FragmentId { block, index }];
    let damage = DamageReport { fragments, detail: "bits".into() };
    swarm.world.provider_says(conn, PUp::Damage(damage));
    assert_eq!(swarm.world.status().blocks.unwrap().damaged_fragments, 1);
    swarm.run(10_000);
    assert_eq!((swarm.rebuilds, swarm.deletes), (1, 0));
    swarm.check_whole();
}

#[test]
fn a_drained_provider_is_emptied_by_copies_and_nothing_is_dropped_early() {
    let mut swarm = Swarm::new(7);
    swarm.write(30);
    let id = swarm.disks[&4].id;
    let held = swarm.disks[&4].has.len();
    let Answer::Count(fragments) = swarm.world.ask(Question::Drain { provider: id, undo: false })
    else {
        panic!()
    };
    assert_eq!(fragments as usize, held);
    swarm.run(10_000);
    assert_eq!((swarm.copies as usize, swarm.rebuilds), (held, 0));
    assert_eq!(swarm.disks[&4].has.len(), held, "readers may still go there");
    swarm.run(2 * MINUTE_MS);
    assert!(swarm.disks[&4].has.is_empty());
    swarm.write(10);
    assert!(swarm.disks[&4].has.is_empty(), "nothing new goes there");
    swarm.check_whole();
    let Answer::Events(events) = swarm.world.ask(Question::Events { after: 0, last: 2 }) else {
        panic!()
    };
    assert_eq!(events.last().unwrap().kind, "drain-done");
}

#[test]
fn crowded_fragments_spread_when_a_newcomer_joins() {
    let mut swarm = Swarm::new(5);
    swarm.write(20);
    assert_eq!(swarm.world.status().blocks.unwrap().crowded, 20);
    swarm.run(MINUTE_MS);
    assert_eq!(swarm.copies, 0, "there is nowhere to go");
    swarm.join(6);
    swarm.run(3 * MINUTE_MS);
    assert_eq!((swarm.copies, swarm.rebuilds), (20, 0));
    swarm.check_whole();
}

#[test]
fn what_if_says_what_would_be_lost() {
    let mut swarm = Swarm::new(6);
    swarm.write(3);
    let mut ask = |without: &[u32]| match swarm
        .world
        .ask(Question::WhatIf { without: without.to_vec() })
    {
        Answer::WhatIf(summary) => Some((summary.readable, summary.by_redundancy.get(&0).copied())),
        _ => None,
    };
    assert_eq!(ask(&[]), Some((3, None)));
    assert_eq!(ask(&[1, 2]), Some((3, Some(3))));
    assert_eq!(ask(&[1, 2, 3]), Some((0, None)));
    assert_eq!(ask(&[99]), None);
}

/// One seed of the simulation.
fn simulate(seed: u64) {
    let mut random = StdRng::seed_from_u64(seed);
    let mut swarm = Swarm::new(9);
    swarm.write(20);
    // Providers whose fragments must not be counted on: at most two at once.
    let mut harmed: BTreeSet<u8> = BTreeSet::new();
    for _ in 0..150 {
        let key = random.random_range(1..=9u8);
        let within_budget = harmed.contains(&key) || harmed.len() < 2;
        match random.random_range(0..100) {
            0..=7 if within_budget => {
                harmed.insert(key);
                swarm.leave(key);
            }
            8..=10 if within_budget => {
                harmed.insert(key);
                swarm.leave(key);
                swarm.wipe(key);
                swarm.join(key);
            }
            11..=13 if within_budget => {
                harmed.insert(key);
                let disk = swarm.disks.get_mut(&key).unwrap();
                let some: Vec<Fragment> =
                    disk.has.iter().choose_multiple(&mut random, 3).into_iter().cloned().collect();
                disk.spoilt.extend(some);
            }
            14..=25 if swarm.disks[&key].conn.is_none() => swarm.join(key),
            26..=30 => {
                let hours = random.random_range(1..30);
                swarm.world.now_ms += hours * 3_600_000;
            }
            31..=33 => {
                let undo = random.random_bool(0.5);
                let provider = swarm.disks[&key].id;
                swarm.world.ask(Question::Drain { provider, undo });
            }
            34..=40 => swarm.write(1),
            _ => {
                // Orders are carried out in any order, some of them not at all.
                swarm.world.pass(random.random_range(50..2_000));
                swarm.world.says(swarm.mount.conn, Up::Renew(Renew {}));
                swarm.read();
                let mut orders = swarm.orders();
                orders.shuffle(&mut random);
                for (key, ticket) in orders {
                    if random.random_bool(0.7) {
                        swarm.obey(key, ticket);
                    } else if random.random_bool(0.2) {
                        swarm.disks.get_mut(&key).unwrap().orders.remove(&ticket);
                    }
                }
                swarm.read();
            }
        }
        swarm.check_readable();
        // Harm is past when everything that the directory can reach has been made good.
        if harmed.len() == 2 && random.random_bool(0.1) {
            heal(&mut swarm);
            harmed.clear();
        }
    }
    heal(&mut swarm);
    swarm.check_whole();
}

/// Everyone is back, damage is found, and there is time.
fn heal(swarm: &mut Swarm) {
    for key in 1..=9 {
        let (id, is_online) = (swarm.disks[&key].id, swarm.disks[&key].conn.is_some());
        swarm.world.ask(Question::Drain { provider: id, undo: true });
        if !is_online {
            swarm.join(key);
        }
        let spoilt = swarm.disks[&key].spoilt.iter();
        let named = spoilt.map(|(block, index)| FragmentId { block: block.clone(), index: *index });
        let damage = DamageReport { fragments: named.collect(), detail: "scrub".into() };
        let conn = swarm.disks[&key].conn.unwrap();
        swarm.world.provider_says(conn, PUp::Damage(damage));
    }
    swarm.run(12 * MINUTE_MS);
}

#[test]
fn seeded_histories_end_whole() {
    for seed in 0..24 {
        println!("seed {seed}");
        simulate(seed);
    }
}

#[test]
fn an_urgent_block_jumps_the_queue_while_the_brake_is_on() {
    use crate::engine::repair::{Jobs, RepairLimits};
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
