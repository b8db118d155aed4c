//! Orders from their receipt to their answer, on a real store.

use std::collections::BTreeMap;
use std::sync::Arc;

use tokio::sync::mpsc;
use us_core::ids::ProviderId;
use us_proto::v1::{RebuildFragments, RebuildPath, RebuildStatus, Rebuilt};

use super::swarm::{Fate, Swarm, Way};
use super::{Block, OWN, PATHS, open};
use crate::guest::{GuestConfig, Pause};
use crate::rebuild::{Ended, RebuildLimits, Rebuilder, Ticket};
use crate::store::{Store, StoreOptions};

struct Setting {
    dir: tempfile::TempDir,
    store: Store,
    pause: Pause,
    rebuilder: Rebuilder,
    endings: mpsc::Receiver<Ended>,
}

/// A machine whose pressure nobody minds.
fn guest() -> GuestConfig {
    GuestConfig {
        repair_cpu_pressure_percent_max: 1000.0,
        repair_io_pressure_percent_max: 1000.0,
        ..GuestConfig::default()
    }
}

impl Setting {
    fn new(swarm: Arc<Swarm>, limits: RebuildLimits) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = open(dir.path());
        Self::with(dir, store, swarm, limits)
    }

    fn with(
        dir: tempfile::TempDir,
        store: Store,
        swarm: Arc<Swarm>,
        limits: RebuildLimits,
    ) -> Self {
        let pause = Pause::load(dir.path());
        let (rebuilder, endings) =
            Rebuilder::new(store.clone(), pause.clone(), guest(), Arc::new(Way(swarm)), limits);
        Self { dir, store, pause, rebuilder, endings }
    }

    fn start(&self, ticket: u64, order: &RebuildFragments) -> Option<Rebuilt> {
        let order = RebuildFragments { ticket, ..order.clone() };
        self.rebuilder.start(Ticket { stream: 1, ticket }, ProviderId(OWN), order)
    }

    async fn end(&mut self) -> Rebuilt {
        self.endings.recv().await.unwrap().rebuilt
    }

    async fn carry_out(&mut self, ticket: u64, order: &RebuildFragments) -> Rebuilt {
        assert_eq!(self.start(ticket, order), None);
        let rebuilt = self.end().await;
        assert_eq!(rebuilt.ticket, ticket);
        rebuilt
    }

    fn check(&self, block: &Block, wanted: &[u8]) {
        for index in wanted {
            let record = &block.records[usize::from(*index)];
            assert!(self.store.read_record(record.header.id()).unwrap() == record.to_bytes());
        }
    }
}

#[tokio::test]
async fn what_is_rebuilt_is_stored_and_an_order_given_twice_costs_nothing() {
    for path in PATHS {
        let block = Block::new(4, 2, 300_000, 1);
        let swarm = block.swarm(&BTreeMap::new());
        let mut setting = Setting::new(swarm, RebuildLimits::default());
        let order = block.order(&[1, 5], path);
        let first = setting.carry_out(1, &order).await;
        assert_eq!(
            (first.status(), first.faults.len()),
            (RebuildStatus::Ok, 0),
            "{}",
            first.detail
        );
        assert!(first.received_bytes > 0);
        setting.check(&block, &[1, 5]);
        let again = setting.carry_out(2, &order).await;
        assert_eq!((again.status(), again.received_bytes), (RebuildStatus::Ok, 0));
        assert_eq!(setting.store.state().fragments, 2);
        // One of them is missing: only that one is made.
        setting.store.delete(vec![block.records[5].header.id()]).await.unwrap();
        let third = setting.carry_out(3, &order).await;
        assert_eq!(third.status(), RebuildStatus::Ok, "{}", third.detail);
        setting.check(&block, &[1, 5]);
        assert_eq!((setting.store.state().fragments, setting.store.state().trashed), (2, 0));
    }
}

#[tokio::test]
async fn the_same_order_twice_at_once_works_once() {
    let block = Block::new(4, 2, 300_000, 1);
    let swarm = block.swarm(&BTreeMap::from([(0, Fate::Slow(50))]));
    let mut setting = Setting::new(swarm, RebuildLimits::default());
    let order = block.order(&[4], RebuildPath::Star);
    for ticket in 1..=3 {
        assert_eq!(setting.start(ticket, &order), None);
    }
    let mut received = Vec::new();
    for _ in 1..=3 {
        let rebuilt = setting.end().await;
        assert_eq!(rebuilt.status(), RebuildStatus::Ok);
        received.push(rebuilt.received_bytes);
    }
    received.sort_unstable();
    assert_eq!(received, [0, 0, 4 * block.geometry.fragment_bytes() as u64]);
    assert_eq!(setting.store.state().fragments, 1);
}

#[tokio::test]
async fn other_bytes_under_the_id_are_left_alone() {
    let block = Block::new(4, 2, 100_000, 1);
    let swarm = block.swarm(&BTreeMap::new());
    let mut setting = Setting::new(Arc::clone(&swarm), RebuildLimits::default());
    // A whole record of the same id that is not the writer's.
    let other =
        Swarm::new(std::iter::once((String::new(), block.records[5].clone(), Fate::Altered)));
    let other = other.record("");
    setting.store.put(other.clone()).await.unwrap();
    let rebuilt = setting.carry_out(1, &block.order(&[5], RebuildPath::Star)).await;
    assert_eq!((rebuilt.status(), rebuilt.received_bytes), (RebuildStatus::Refused, 0));
    let id = block.records[5].header.id();
    assert!(setting.store.read_record(id).unwrap() == other);
    // And an order that makes no sense is refused too.
    let order = RebuildFragments { s: 0, ..block.order(&[4], RebuildPath::Star) };
    assert_eq!(setting.carry_out(2, &order).await.status(), RebuildStatus::Refused);
}

#[tokio::test]
async fn a_damaged_copy_is_replaced() {
    let block = Block::new(4, 2, 300_000, 1);
    let mut setting = Setting::new(block.swarm(&BTreeMap::new()), RebuildLimits::default());
    let record = &block.records[5];
    setting.store.put(record.to_bytes()).await.unwrap();
    let segments = std::fs::read_dir(setting.dir.path().join("segments")).unwrap();
    let path = segments.map(|file| file.unwrap().path()).next().unwrap();
    let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, b"rot", 4096 + 64 + 128 + 40).unwrap();
    let store = setting.store.clone();
    let scrubbed = tokio::task::spawn_blocking(move || store.scrub(None, u64::MAX).unwrap());
    assert_eq!(scrubbed.await.unwrap().damaged, 1);
    let rebuilt = setting.carry_out(1, &block.order(&[5], RebuildPath::Star)).await;
    assert_eq!(rebuilt.status(), RebuildStatus::Ok, "{}", rebuilt.detail);
    setting.check(&block, &[5]);
    let state = setting.store.state();
    assert_eq!((state.fragments, state.damaged), (1, 0));
}

#[tokio::test]
async fn too_many_orders_are_busy_and_a_cancelled_one_makes_room() {
    let block = Block::new(2, 2, 50_000, 1);
    let hang = BTreeMap::from([(0, Fate::Hangs), (1, Fate::Hangs), (2, Fate::Hangs)]);
    let limits =
        RebuildLimits { orders_inflight_max: 1, orders_queued_max: 1, ..Default::default() };
    let mut setting = Setting::new(block.swarm(&hang), limits);
    let order = block.order(&[3], RebuildPath::Star);
    assert_eq!(setting.start(1, &order), None);
    assert_eq!(setting.start(2, &order), None);
    let third = setting.start(3, &order).unwrap();
    assert_eq!((third.ticket, third.status()), (3, RebuildStatus::Busy));
    for ticket in [1, 2] {
        setting.rebuilder.cancel(Ticket { stream: 9, ticket });
        setting.rebuilder.cancel(Ticket { stream: 1, ticket });
        let ended = setting.end().await;
        assert_eq!((ended.ticket, ended.status()), (ticket, RebuildStatus::Busy));
    }
    // Paused, nothing is begun.
    setting.pause.set(true).unwrap();
    assert_eq!(setting.start(4, &order).unwrap().status(), RebuildStatus::Busy);
    setting.pause.set(false).unwrap();
    // Closing ends what is under way, and answers it.
    assert_eq!(setting.start(5, &order), None);
    setting.rebuilder.close().await;
    assert_eq!(setting.end().await.status(), RebuildStatus::Busy);
    assert_eq!(setting.start(6, &order).unwrap().status(), RebuildStatus::Busy);
    assert_eq!(setting.store.state().fragments, 0);
}

#[tokio::test]
async fn a_full_disk_is_told_before_anything_is_pulled() {
    let block = Block::new(2, 2, 2_000_000, 1);
    let dir = tempfile::tempdir().unwrap();
    let options = StoreOptions { capacity_bytes: Some(100_000), ..StoreOptions::default() };
    let store = Store::open(dir.path(), options).unwrap();
    let swarm = block.swarm(&BTreeMap::new());
    let mut setting = Setting::with(dir, store, swarm, RebuildLimits::default());
    let rebuilt = setting.carry_out(1, &block.order(&[3], RebuildPath::Star)).await;
    assert_eq!((rebuilt.status(), rebuilt.received_bytes), (RebuildStatus::NoSpace, 0));
}

#[tokio::test]
async fn with_too_few_sources_nothing_is_stored_and_the_bad_ones_are_named() {
    let block = Block::new(3, 2, 100_000, 1);
    let bad = BTreeMap::from([(0, Fate::Altered), (2, Fate::Missing)]);
    let mut setting = Setting::new(block.swarm(&bad), RebuildLimits::default());
    let rebuilt = setting.carry_out(1, &block.order(&[4], RebuildPath::Star)).await;
    assert_eq!(rebuilt.status(), RebuildStatus::Sources, "{}", rebuilt.detail);
    let named: Vec<u32> = rebuilt.faults.iter().map(|fault| fault.index).collect();
    assert_eq!((named, setting.store.state().fragments), (vec![0, 2], 0));
}
