//! The holders under a seeded simulation: providers that lag, fall silent, go and come back, against
//! a model that knows what each has on its disk.

use std::collections::BTreeSet;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::*;

const CONFIG: CopiesConfig = CopiesConfig { copies: 2, ack_ms: 3_000, window_bytes: 1_000 };

fn provider(number: u32, site: &str) -> OnlineProvider {
    OnlineProvider { provider: number, site: site.into(), eligible: true, held: None }
}

/// A provider as it really is.
#[derive(Default)]
struct Disk {
    online: bool,
    /// It gets messages and does nothing.
    silent: bool,
    /// What is on its way to it.
    coming: VecDeque<Seq>,
    /// What it has stored: the root's commit, and records.
    root: Seq,
    records: BTreeSet<Seq>,
    /// What it has acknowledged and the directory has not yet heard.
    acks: VecDeque<Seq>,
}

impl Disk {
    /// Everything up to here is there.
    fn whole_to(&self) -> Seq {
        let mut seq = self.root;
        while self.records.contains(&(seq + 1)) {
            seq += 1;
        }
        seq
    }
}

struct World {
    copies: Copies,
    disks: BTreeMap<u32, Disk>,
    now_ms: u64,
    written: Seq,
    synced: Seq,
    durable: Seq,
    durable_ms: u64,
    covered: Seq,
}

impl World {
    fn new(providers: u32) -> Self {
        let disks = (1..=providers).map(|id| (id, Disk { online: true, ..Disk::default() }));
        Self {
            copies: Copies::new(CONFIG, 0),
            disks: disks.collect(),
            now_ms: 0,
            written: 0,
            synced: 0,
            durable: 0,
            durable_ms: 0,
            covered: 0,
        }
    }

    fn choose(&mut self) {
        let online = self.disks.iter().filter(|(_, disk)| disk.online);
        let online: Vec<_> = online.map(|(id, _)| provider(*id, "")).collect();
        self.copies.choose(self.now_ms, &online, true);
    }

    fn feed(&mut self) {
        loop {
            let wanting = self.copies.wanting();
            if wanting.is_empty() {
                return;
            }
            for (id, seq, _) in wanting {
                self.copies.sent(self.now_ms, id, seq, 100);
                self.disks.get_mut(&id).unwrap().coming.push_back(seq);
            }
        }
    }

    fn advance(&mut self) {
        let floor = self.copies.floor(self.synced);
        if floor > self.durable || self.durable == self.synced {
            self.durable_ms = self.now_ms;
        }
        self.durable = self.durable.max(floor);
        for id in self.copies.live(self.durable) {
            let whole = self.disks[&id].whole_to();
            assert!(whole >= self.durable, "provider {id} has {whole} of {}", self.durable);
        }
    }

    fn disconnect(&mut self, id: u32) {
        let disk = self.disks.get_mut(&id).unwrap();
        disk.online = false;
        disk.coming.clear();
        disk.acks.clear();
        self.copies.gone(id);
    }

    fn step(&mut self, rng: &mut StdRng) {
        self.now_ms += rng.random_range(0..400);
        let id = rng.random_range(1..=self.disks.len() as u32);
        let disk = self.disks.get_mut(&id).unwrap();
        match rng.random_range(0..100) {
            0..30 => {
                self.written += rng.random_range(1..4);
                self.copies.wrote(self.written);
            }
            30..50 => self.synced = rng.random_range(self.synced..=self.written),
            50..70 if !disk.silent => {
                let count = rng.random_range(0..=disk.coming.len());
                let stored: Vec<Seq> = disk.coming.drain(..count).collect();
                disk.acks.extend(stored.last());
                disk.records.extend(stored);
            }
            70..88 => {
                if let Some(seq) = disk.acks.pop_front() {
                    self.copies.stored(self.now_ms, id, seq);
                }
            }
            88..90 => disk.silent = !disk.silent,
            90..93 => self.disconnect(id),
            93..97 if !disk.online => {
                disk.online = true;
                disk.silent = false;
                // Before anything else it stores the newest root.
                disk.root = self.covered;
                disk.records.retain(|seq| *seq > self.covered);
            }
            97..98 if self.durable > 0 => {
                // A new image: everyone online stores its root before dropping records.
                let covered = self.durable;
                self.covered = covered;
                self.copies.covers(covered);
                for (id, disk) in self.disks.iter_mut().filter(|(_, disk)| disk.online) {
                    disk.root = covered;
                    disk.records.retain(|seq| *seq > covered);
                    disk.coming.retain(|seq| *seq > covered);
                    self.copies.root_stored(*id);
                }
            }
            _ => {}
        }
        self.choose();
        self.feed();
        self.advance();
    }
}

#[test]
fn what_is_durable_is_with_every_live_holder_and_nothing_stalls() {
    for seed in 0..300 {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut world = World::new(rng.random_range(2..7));
        for step in 0..600 {
            world.step(&mut rng);
            let waited = world.now_ms - world.durable_ms;
            // Each given-up holder may cost one acknowledgement time; every provider can be one.
            let bound = CONFIG.ack_ms * (world.disks.len() as u64 + 1) + 1_000;
            assert!(waited <= bound, "seed {seed} step {step}: nothing durable for {waited} ms");
        }
        // Everybody well: two live holders have it all.
        for disk in world.disks.values_mut() {
            (disk.online, disk.silent, disk.root) = (true, false, world.covered);
        }
        world.synced = world.written;
        for _ in 0..200 {
            world.now_ms += 500;
            for (id, disk) in &mut world.disks {
                let last = disk.coming.back().copied();
                disk.records.extend(disk.coming.drain(..));
                disk.acks.clear();
                if let Some(seq) = last {
                    world.copies.stored(world.now_ms, *id, seq);
                }
            }
            world.choose();
            world.feed();
            world.advance();
        }
        assert_eq!(world.durable, world.written, "seed {seed}");
        let wanted = if world.disks.len() >= PROVIDERS_MIN { 2 } else { 0 };
        assert_eq!(world.copies.live(world.durable).len(), wanted, "seed {seed}");
    }
}

#[test]
fn holders_are_chosen_from_different_sites_and_only_among_three() {
    let mut copies = Copies::new(CONFIG, 0);
    let two = [provider(1, "a"), provider(2, "b")];
    copies.choose(0, &two, true);
    assert!(copies.live(0).is_empty(), "two are too few");
    let four = [provider(1, "a"), provider(2, "a"), provider(3, "b"), provider(4, "b")];
    copies.choose(0, &four, true);
    assert_eq!(copies.live(0), [1, 3]);
    copies.refused(0, 3);
    copies.choose(1, &four, true);
    assert_eq!(copies.live(0), [1, 4], "not the one that failed");
    copies.choose(1, &two, true);
    assert_eq!(copies.live(0), [1], "who stays, stays a holder");
}

#[test]
fn a_holder_counts_once_it_has_caught_up_and_stalls_nobody_before() {
    let mut copies = Copies::new(CONFIG, 0);
    copies.wrote(50);
    let three = [provider(1, ""), provider(2, ""), provider(3, "")];
    copies.choose(0, &three, true);
    assert_eq!(copies.floor(50), 50, "nobody has anything, and nobody waits");
    for seq in 1..=10 {
        copies.sent(0, 1, seq, 100);
    }
    assert!(copies.wanting().iter().all(|(id, ..)| *id != 1), "its window is full");
    copies.stored(10, 1, 10);
    for seq in 11..=50 {
        copies.sent(20, 1, seq, 10);
    }
    assert_eq!(copies.floor(50), 10, "all was sent: from now on it is waited for");
    assert!(copies.live(50).is_empty());
    copies.choose(2_000, &three, true);
    assert!(copies.is_holder(1));
    copies.choose(20 + CONFIG.ack_ms + 1, &three, true);
    assert!(!copies.is_holder(1) && copies.floor(50) == 50, "silent for too long");
}

#[test]
fn what_a_returning_holder_still_has_is_not_sent_again() {
    let mut copies = Copies::new(CONFIG, 10);
    copies.wrote(50);
    let mut three = [provider(1, ""), provider(2, ""), provider(3, "")];
    three[0].held = Some((11, 40));
    three[1].held = Some((12, 40));
    copies.choose(0, &three, true);
    let wanting: Vec<_> = copies.wanting().iter().map(|(id, seq, _)| (*id, *seq)).collect();
    assert_eq!(wanting, [(1, 41), (2, 11)]);
}
