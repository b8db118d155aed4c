//! Seeded histories of several mounts and a directory that crashes.
//!
//! Fault budget: the directory dies at any moment and keeps any prefix of its commits that holds
//! what it called durable; messages on broken connections are lost; mounts give leases back late, and
//! all of them come back. Checked: no two mounts ever believe in conflicting leases; what a mount
//! reads under a lease is exactly what all mounts did before; at the end everything is there.

use std::collections::BTreeMap;

use rand::prelude::*;

use super::*;

const MOUNTS: usize = 3;
const STEPS: usize = 400;
const NAMES: [&str; 4] = ["a", "b", "c", "d"];

/// A mount: what it believes to hold, and what it has sent that may have to be sent again.
struct Actor {
    mount: Mount,
    held: BTreeMap<u64, (Level, u64)>,
    recalls: Vec<Recall>,
    log: BTreeMap<u64, Vec<Op>>,
    /// The grants under which it held what it removed.
    let_go: BTreeMap<u64, u64>,
    connected: bool,
}

struct Simulation {
    world: World,
    actors: Vec<Actor>,
    random: StdRng,
    /// The root's names, after everything any mount has done.
    tree: BTreeMap<&'static str, u64>,
    /// What they removed and did not have back.
    trash: BTreeSet<u64>,
}

impl Simulation {
    fn new(seed: u64) -> Self {
        let mut world = World::with_trash_age(0);
        world.volume("v", 4, 2);
        let actors = (0..MOUNTS)
            .map(|index| Actor {
                mount: world.open(index as u8, "v"),
                held: BTreeMap::new(),
                recalls: Vec::new(),
                log: BTreeMap::new(),
                let_go: BTreeMap::new(),
                connected: true,
            })
            .collect();
        world.auto = false;
        let random = StdRng::seed_from_u64(seed);
        Self { world, actors, random, tree: BTreeMap::new(), trash: BTreeSet::new() }
    }

    fn check_leases(&self) {
        let ended = |down: &&Down| matches!(down, Down::Ended(_));
        let said = self.world.to_sessions.values().flatten().find(ended);
        assert!(said.is_none(), "{said:?}");
        let mut holders: BTreeMap<u64, Vec<Level>> = BTreeMap::new();
        for actor in &self.actors {
            for (ino, (level, _)) in &actor.held {
                holders.entry(*ino).or_default().push(*level);
            }
        }
        for (ino, levels) in holders {
            let exclusive = levels.contains(&Level::Exclusive);
            assert!(!exclusive || levels.len() == 1, "inode {ino}: {levels:?}");
        }
    }

    /// The mount reads one message.
    fn read(&mut self, index: usize) {
        let actor = &mut self.actors[index];
        let Some(down) = self.world.heard(actor.mount.conn) else { return };
        match down {
            Down::Fetched(fetched) => {
                for lease in &fetched.leases {
                    let level = Level::from_wire(lease.level);
                    actor.held.insert(lease.ino, (level, lease.grant));
                }
                if fetched.complete && fetched.error == 0 {
                    let listed: BTreeMap<Bytes, u64> = fetched
                        .entries
                        .iter()
                        .map(|entry| (entry.name_hash.clone(), entry.ino))
                        .collect();
                    let expected = self.tree.iter().map(|(name, ino)| (hash(name), *ino)).collect();
                    assert_eq!(listed, expected);
                }
            }
            Down::Recall(recall) => actor.recalls.push(recall),
            Down::Durable(durable) => actor.log.retain(|number, _| *number > durable.number),
            Down::Ended(ended) => panic!("mount {index}: {ended:?}"),
            _ => {}
        }
    }

    fn answer_recall(&mut self, index: usize) {
        let actor = &mut self.actors[index];
        let Some(recall) = actor.recalls.pop() else { return };
        let keep = Level::from_wire(recall.level);
        // What it does not hold it gives back all the same: the directory may not know.
        let held = actor.held.get(&recall.ino).copied();
        let (level, grant) = held.unwrap_or((Level::None, recall.grant));
        let kept = keep.min(level);
        if kept == Level::None {
            actor.held.remove(&recall.ino);
        } else {
            actor.held.insert(recall.ino, (kept, grant));
        }
        let lease = InodeLease { ino: recall.ino, level: kept.to_wire(), open: false, grant };
        self.world.says(actor.mount.conn, Up::LeaseReturn(LeaseReturn { leases: vec![lease] }));
    }

    fn fetch(&mut self, index: usize) {
        let level = [Level::Shared, Level::Exclusive][self.random.random_range(0..2)].to_wire();
        let ino = self.tree.values().copied().choose(&mut self.random);
        let want = match ino.filter(|_| self.random.random_bool(0.4)) {
            Some(ino) => Want::Inode(FetchInode { ino, level }),
            None => {
                Want::Entries(FetchEntries { dir: 1, after_cookie: 0, limit: 64, dir_level: level })
            }
        };
        self.actors[index].mount.want(&mut self.world, want);
    }

    fn exclusive(&self, index: usize, ino: u64) -> bool {
        self.actors[index].held.get(&ino).is_some_and(|(level, _)| *level == Level::Exclusive)
    }

    fn change(&mut self, index: usize) {
        // An answer that was read later would not know this change, although it came before.
        while self
            .world
            .to_sessions
            .get(&self.actors[index].mount.conn)
            .is_some_and(|q| !q.is_empty())
        {
            self.read(index);
        }
        if !self.exclusive(index, 1) {
            return;
        }
        let name = NAMES[self.random.random_range(0..NAMES.len())];
        let back = self.trash.iter().copied().choose(&mut self.random);
        let back = back.filter(|_| self.random.random_bool(0.4));
        let op = match self.tree.get(name).copied() {
            None if back.is_some() => {
                let ino = back.unwrap();
                self.actors[index].held.insert(ino, (Level::Exclusive, 0));
                self.tree.insert(name, ino);
                self.trash.remove(&ino);
                let (name_hash, sealed_name) = (hash(name), hash(name));
                Op::Restore(Restore { dir: 1, name_hash, sealed_name, ino, time: at(300) })
            }
            None => {
                let actor = &mut self.actors[index];
                if actor.mount.next_ino == actor.mount.end_ino {
                    return;
                }
                let ino = actor.mount.ino();
                actor.held.insert(ino, (Level::Exclusive, 0));
                self.tree.insert(name, ino);
                create(1, name, ino, 0o100_644)
            }
            Some(ino) if self.exclusive(index, ino) => {
                let actor = &mut self.actors[index];
                let held = actor.held.remove(&ino);
                actor.let_go.insert(ino, held.map_or(0, |(_, grant)| grant));
                self.tree.remove(name);
                self.trash.insert(ino);
                unlink(1, name, ino, false)
            }
            Some(_) => return,
        };
        let actor = &mut self.actors[index];
        actor.mount.send(&mut self.world, vec![op.clone()]);
        actor.log.insert(actor.mount.batch, vec![op]);
    }

    fn crash(&mut self) {
        let kept = self.random.random_range(0..=self.world.undurable());
        self.world.restart(kept);
        for actor in &mut self.actors {
            actor.connected = false;
            actor.recalls.clear();
        }
    }

    fn reconnect(&mut self, index: usize) {
        let actor = &mut self.actors[index];
        let open = OpenSession {
            volume: "v".to_owned(),
            session: actor.mount.session,
            incarnation: 1,
            ..Default::default()
        };
        actor.mount.conn = self.world.dial(actor.mount.key, open);
        self.world.make_durable();
        let answer = self.world.hear(actor.mount.conn);
        let Down::Opened(opened) = answer else { panic!("mount {index}: {answer:?}") };
        // What it holds, and what it is about to change again.
        let mut claims = actor.held.clone();
        for op in actor.log.range(opened.applied + 1..).flat_map(|(_, ops)| ops) {
            let ino = match op {
                Op::Create(create) => create.ino,
                Op::Unlink(unlink) => unlink.ino,
                Op::Restore(restore) => restore.ino,
                other => panic!("{other:?}"),
            };
            for ino in [1, ino] {
                let grant = actor.let_go.get(&ino).copied().unwrap_or(0);
                let claim = claims.entry(ino).or_insert((Level::None, 0));
                // What it removes and has back in one log it holds under grant 0 by now.
                *claim = (Level::Exclusive, claim.1.max(grant));
            }
        }
        let message = |ino: u64, (level, grant): (Level, u64)| InodeLease {
            ino,
            level: level.to_wire(),
            open: false,
            grant,
        };
        let leases = claims.iter().map(|(ino, lease)| message(*ino, *lease)).collect();
        let reclaim = Reclaim { leases, last: true };
        self.world.says(actor.mount.conn, Up::Reclaim(reclaim));
        let again = actor.log.range(opened.applied + 1..).map(|(number, ops)| Batch {
            number: *number,
            mutations: ops.iter().map(|op| Mutation { op: Some(op.clone()) }).collect(),
            traces: Vec::new(),
        });
        for batch in again.collect::<Vec<_>>() {
            self.world.says(actor.mount.conn, Up::Batch(batch));
        }
        let back = claims.iter().map(|(ino, (_, grant))| {
            let level = actor.held.get(ino).map_or(Level::None, |(level, _)| *level);
            message(*ino, (level, *grant))
        });
        let leases = back.collect();
        self.world.says(actor.mount.conn, Up::LeaseReturn(LeaseReturn { leases }));
        actor.connected = true;
    }

    fn step(&mut self) {
        let index = self.random.random_range(0..MOUNTS);
        if !self.actors[index].connected {
            self.reconnect(index);
            return;
        }
        match self.random.random_range(0..100) {
            0..35 => self.read(index),
            35..55 => self.answer_recall(index),
            55..70 => self.fetch(index),
            70..88 => self.change(index),
            88..93 => self.world.make_durable(),
            93..98 => {
                self.world.now_ms += 50;
                self.world.event(Event::Tick);
            }
            98 => self.crash(),
            _ => {
                let conn = self.actors[index].mount.conn;
                self.world.event(Event::Disconnected { conn: ConnId(conn) });
                self.world.to_sessions.remove(&conn);
                self.actors[index].connected = false;
                self.actors[index].recalls.clear();
            }
        }
    }

    /// Everybody comes back and closes; the tree is what was done.
    fn finish(mut self) {
        self.world.auto = true;
        for index in 0..MOUNTS {
            if !self.actors[index].connected {
                self.reconnect(index);
            }
        }
        self.world.make_durable();
        // Nobody waits for ever: with every recall answered, every question is.
        for round in 0..200 {
            for index in 0..MOUNTS {
                self.read(index);
                self.answer_recall(index);
            }
            if round % 10 == 0 {
                self.world.now_ms += 10;
                self.world.event(Event::Tick);
            }
        }
        assert!(self.world.engine.parked.is_empty(), "{:?}", self.world.engine.parked);
        for index in 0..MOUNTS {
            while self
                .world
                .to_sessions
                .get(&self.actors[index].mount.conn)
                .is_some_and(|q| !q.is_empty())
            {
                self.read(index);
            }
            self.actors[index].held.clear();
            self.world.says(self.actors[index].mount.conn, Up::Close(CloseSession {}));
        }
        let mut last = self.world.open(9, "v");
        let want = FetchEntries { dir: 1, after_cookie: 0, limit: 64, dir_level: 1 };
        last.want(&mut self.world, Want::Entries(want));
        let listed = last.answer(&mut self.world).expect("an answer");
        let listed: BTreeMap<Bytes, u64> =
            listed.entries.iter().map(|entry| (entry.name_hash.clone(), entry.ino)).collect();
        let expected = self.tree.iter().map(|(name, ino)| (hash(name), *ino)).collect();
        assert_eq!(listed, expected);
        let volume = *self.world.engine.volumes.keys().next().unwrap();
        let trash = self.world.engine.scan_all(&keys::tag(&volume, b't')).unwrap();
        let trash: BTreeSet<u64> = trash.iter().map(|(key, _)| keys::last_number(key)).collect();
        assert_eq!(trash, self.trash);
    }
}

#[test]
fn mounts_agree_through_crashes() {
    let full = std::env::var("US_TEST_TIER").is_ok_and(|tier| tier != "quick");
    for seed in 0..if full { 5_000 } else { 200 } {
        let run = std::panic::catch_unwind(|| {
            let mut simulation = Simulation::new(seed);
            for _ in 0..STEPS {
                simulation.step();
                simulation.check_leases();
            }
            simulation.finish();
        });
        assert!(run.is_ok(), "seed {seed}");
    }
}
