//! The check of the directory's own records: nothing to say of what the engine wrote, and each kind of
//! damage is named.

use us_proto::v1::{FsckKind, FsckSummary};

use super::swarm::Swarm;
use super::*;
use crate::fsck::Found;
use crate::fsck::maps::Maps;
use crate::holdings::Holdings;
use crate::records::{BlockRecord, HoldingRecord, ReferenceRecord, bit};

fn check(swarm: &Swarm) -> (Vec<Found>, FsckSummary) {
    let engine = &swarm.world.engine;
    let view = engine.store.snapshot();
    let mut seen = FsckSummary::default();
    let mut found = Vec::new();
    for volume in engine.volumes.keys() {
        let mut maps = Maps { view: &*view, volume: *volume, has_files: true, seen: &mut seen };
        let mut sink = |one: Found| {
            found.push(one);
            true
        };
        maps.check(&mut sink, &mut |_| true).unwrap();
    }
    (found, seen)
}

pub(super) fn kinds(swarm: &Swarm) -> Vec<FsckKind> {
    let mut kinds: Vec<FsckKind> = check(swarm).0.iter().map(|found| found.kind).collect();
    kinds.sort_unstable();
    kinds.dedup();
    kinds
}

pub(super) fn change(swarm: &mut Swarm, change: impl FnOnce(&mut WriteBatch)) {
    let mut batch = WriteBatch::new();
    change(&mut batch);
    swarm.world.engine.commit(batch, Durability::Applied).unwrap();
}

#[test]
fn what_the_engine_wrote_is_without_a_finding() {
    let mut swarm = Swarm::new(8);
    swarm.write(30);
    let ino = swarm.mount.ino();
    swarm.mount.change(&mut swarm.world, vec![create(1, "empty", ino, 0o100_644)]);
    swarm.leave(2);
    swarm.wipe(2);
    swarm.join(2);
    swarm.run(60_000);
    let (found, seen) = check(&swarm);
    assert_eq!(found, []);
    assert_eq!((seen.blocks, seen.extents), (30, 30));
    assert_eq!(seen.holdings, 30 * 6);
}

#[test]
fn each_kind_of_damage_is_named() {
    let volume = |swarm: &Swarm| *swarm.world.engine.volumes.keys().next().unwrap();
    let damage = |name: &str, spoil: &dyn Fn(&VolumeId, BlockId, &BlockRecord, &mut WriteBatch)| {
        let mut swarm = Swarm::new(7);
        swarm.write(3);
        let (block, record) = swarm.records().pop().unwrap();
        let (volume, id) = (volume(&swarm), BlockId::from_slice(&block).unwrap());
        change(&mut swarm, |batch| spoil(&volume, id, &record, batch));
        let found = kinds(&swarm);
        assert!(!found.is_empty(), "{name}");
        found
    };
    let gone = damage("a block is gone", &|volume, block, _, batch| {
        batch.delete(keys::block(volume, &block));
    });
    assert!(gone.contains(&FsckKind::DanglingExtent) && gone.contains(&FsckKind::WrongHolding));
    assert!(gone.contains(&FsckKind::WrongReference) && gone.contains(&FsckKind::WrongUsage));
    let short = damage("a block is shorter", &|volume, block, record, batch| {
        let record = BlockRecord { plaintext_bytes: 100, ..record.clone() };
        batch.put(keys::block(volume, &block), encode(&record));
    });
    assert_eq!(short, [FsckKind::DanglingExtent, FsckKind::WrongUsage]);
    let counted = damage("a count is wrong", &|volume, block, record, batch| {
        let record = BlockRecord { references: 2, ..record.clone() };
        batch.put(keys::block(volume, &block), encode(&record));
    });
    assert_eq!(counted, [FsckKind::WrongCount]);
    let stray = damage("a reference too many", &|volume, block, _, batch| {
        let reference = encode(&ReferenceRecord { bytes: 5 });
        batch.put(keys::reference(volume, &block, 77, 0), reference);
    });
    assert!(stray.contains(&FsckKind::WrongReference) && stray.contains(&FsckKind::WrongCount));
    let listed = damage("a holding too many", &|volume, block, record, batch| {
        let other = (1..8).find(|id| !record.providers.contains(id)).unwrap();
        let held = HoldingRecord { fragments: vec![1].into(), ..Default::default() };
        batch.put(keys::holding(volume, other, &block), encode(&held));
    });
    assert_eq!(listed, [FsckKind::WrongHolding]);
    let unlisted = damage("a holding is missing", &|volume, block, record, batch| {
        batch.delete(keys::holding(volume, record.providers[0], &block));
    });
    assert_eq!(unlisted, [FsckKind::WrongHolding]);
}

#[test]
fn a_block_that_no_file_refers_to_is_ended_by_mending() {
    let mut swarm = Swarm::new(6);
    swarm.write(2);
    let (block, record) = swarm.records().pop().unwrap();
    let volume = *swarm.world.engine.volumes.keys().next().unwrap();
    // The map and the reference are gone, the block stayed.
    let forgotten = BlockRecord { references: 0, live_bytes: 0, ..record };
    let id = BlockId::from_slice(&block).unwrap();
    let view = swarm.world.engine.store.snapshot();
    let range = KeyRange::prefix(&keys::references(&volume, &id));
    let (reference, _) = view.scan(&range, 1).unwrap().pop().unwrap();
    let ino = keys::last_number(&reference[..reference.len() - 8]);
    change(&mut swarm, |batch| {
        batch.put(keys::block(&volume, &id), encode(&forgotten));
        batch.delete(reference);
        batch.delete(keys::chunk(&volume, ino, 0));
    });
    assert!(kinds(&swarm).contains(&FsckKind::UnreferencedBlock));
    let mended = swarm.world.ask(Question::Mend { volume, blocks: vec![(id, 0)] });
    assert!(matches!(mended, Answer::Count(1)), "{mended:?}");
    assert!(!kinds(&swarm).contains(&FsckKind::UnreferencedBlock));
    swarm.run(5 * 60_000);
    assert_eq!(swarm.deletes, 6, "its fragments go as those of any dead block");
}

#[test]
fn holdings_come_in_the_order_of_the_providers_index() {
    let mut swarm = Swarm::new(7);
    swarm.write(300);
    swarm.world.volume("other", 4, 2);
    let engine = &swarm.world.engine;
    let volumes: Vec<VolumeId> = engine.volumes.keys().copied().collect();
    let provider = swarm.disks[&4].id;
    let mut holdings = Holdings::new(engine.store.snapshot(), volumes, provider).unwrap();
    let mut found = Vec::new();
    while let Some(held) = holdings.next_block().unwrap() {
        let indexes = (0..6u32).filter(|index| bit(&held.fragments, *index as usize));
        let block = Bytes::copy_from_slice(held.block.as_bytes());
        found.extend(indexes.map(|index| (block.clone(), index)));
    }
    let has: Vec<_> = swarm.disks[&4].has.iter().cloned().collect();
    assert_eq!(found, has);
}
