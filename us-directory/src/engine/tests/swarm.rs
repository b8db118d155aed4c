//! A swarm around the engine: providers that really have or have not what they are asked for, and obey
//! when the test says so.

use std::collections::{BTreeMap, BTreeSet};

use super::*;
use crate::engine::health::count_slice;
use crate::records::{BlockRecord, bit, decode};

pub(super) const DAY_MS: u64 = 24 * 3_600_000;
pub(super) const MINUTE_MS: u64 = 60_000;

pub(super) type Fragment = (Bytes, u32);

/// A provider and its disk.
#[derive(Default)]
pub(super) struct Disk {
    pub conn: Option<u64>,
    pub id: u32,
    cookie: Bytes,
    pub has: BTreeSet<Fragment>,
    pub spoilt: BTreeSet<Fragment>,
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
    pub broken: BTreeSet<u8>,
    pub failed_orders: u64,
    /// They say that they have whatever they are asked after.
    pub liars: BTreeSet<u8>,
    /// How often providers were told to scrub.
    pub scrubs: u64,
    /// Of a block.
    pub plaintext_bytes: u32,
    /// Of a file.
    pub file_bytes: u64,
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
            liars: BTreeSet::new(),
            scrubs: 0,
            plaintext_bytes: 8192,
            file_bytes: 8192,
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
                fingerprint_kind: 2,
                fingerprint_hash: vec![1; 32].into(),
                ..Default::default()
            };
            let ino = self.mount.ino();
            let extents =
                vec![ExtentWrite { ino, length: self.file_bytes, block, ..Default::default() }];
            let growth = FileGrowth {
                ino,
                size: self.file_bytes,
                mtime: at(3),
                ctime: at(3),
                clear_suid: false,
            };
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
        for (key, disk) in &mut self.disks {
            let Some(conn) = disk.conn else { continue };
            let is_liar = self.liars.contains(key);
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
                            match is_liar || disk.has.contains(&fragment) {
                                true => FragmentStatus::Ok as i32,
                                false => FragmentStatus::NotFound as i32,
                            }
                        };
                        let statuses = check.fragments.iter().map(status).collect();
                        let reply = CheckReply { query: check.query, statuses };
                        self.world.provider_says(conn, PUp::Checked(reply));
                    }
                    PDown::StartScrub(_) => self.scrubs += 1,
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
            self.world.says(self.mount.conn, Up::Renew(Renew::default()));
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
    pub fn check_readable(&self) {
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
            let id = BlockId::from_slice(&block).unwrap();
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
