//! The work itself, under a clock that costs nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use proptest::prelude::*;
use tokio::time::Instant;
use us_core::fragment::{FingerprintKind, FragmentRecord};
use us_core::ids::ProviderId;
use us_proto::v1::{FragmentStatus, RebuildFragments, RebuildPath, SourceFault};

use super::swarm::{Fate, Swarm, Way};
use super::{Block, OWN, PATHS, open};
use crate::rebuild::order::Order;
use crate::rebuild::work::{Short, Work};
use crate::store::Store;

/// What came of an order.
struct Ended {
    result: Result<Vec<FragmentRecord>, Short>,
    faults: Vec<SourceFault>,
    received_bytes: u64,
}

/// A runtime in which waiting takes no time.
fn paused() -> tokio::runtime::Runtime {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    builder.enable_all().start_paused(true).build().unwrap()
}

/// Carries an order out; time passes as fast as it can.
fn work(store: &Store, swarm: &Arc<Swarm>, order: &RebuildFragments) -> Ended {
    let order = Arc::new(Order::check(order, ProviderId(OWN)).unwrap());
    paused().block_on(async {
        let (deadline, missing) = (Instant::now() + order.deadline, order.wanted.clone());
        let way = Arc::new(Way(Arc::clone(swarm)));
        let mut work = Work::new(order, store.clone(), way, missing, deadline);
        let result = work.run().await;
        Ended { result, faults: work.wire_faults(), received_bytes: work.received_bytes }
    })
}

fn check_right(block: &Block, wanted: &[u8], ended: &Ended) {
    let records =
        ended.result.as_ref().unwrap_or_else(|short| panic!("{short}: {:?}", ended.faults));
    assert_eq!(records.len(), wanted.len());
    for (index, record) in wanted.iter().zip(records) {
        assert!(record.to_bytes() == block.records[usize::from(*index)].to_bytes(), "{index}");
    }
}

/// Some fragments of a block of this size.
fn wanted_of(fragments: usize, count: usize, seed: u64) -> Vec<u8> {
    let mut order: Vec<u8> = (0..fragments as u8).collect();
    order.sort_by_key(|index| (u64::from(*index) + 1).wrapping_mul(seed | 1) % 251);
    let mut wanted = order[..count].to_vec();
    wanted.sort_unstable();
    wanted
}

fn fate() -> impl Strategy<Value = Fate> {
    prop_oneof![
        Just(Fate::Altered),
        Just(Fate::OtherList),
        Just(Fate::WrongSums),
        Just(Fate::Missing),
        Just(Fate::Damaged),
        Just(Fate::Hangs),
        (1u64..3000).prop_map(Fate::Slow),
        Just(Fate::Short),
    ]
}

fn kind() -> impl Strategy<Value = FingerprintKind> {
    prop_oneof![Just(FingerprintKind::Crc32c), Just(FingerprintKind::Blake3)]
}

fn config() -> ProptestConfig {
    let cases = match std::env::var("US_TEST_TIER").as_deref() {
        Ok("full" | "soak") => 1000,
        _ => 64,
    };
    ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() }
}

#[test]
fn every_path_gives_the_writers_records_whatever_the_code_allows_to_go_wrong() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    proptest!(config(), |(
        s in 1usize..=12, r in 1usize..=12, bytes in 1usize..400_000, seed: u64,
        many in 0usize..3, path in 0usize..4, own in any::<Option<u8>>(),
        fates in prop::collection::vec(fate(), 12), kind in kind(),
    )| {
        let block = Block::of_kind(kind, s, r, bytes, seed);
        let wanted = wanted_of(s + r, 1 + many.min(r - 1), seed);
        let mut order = block.order(&wanted, PATHS[path]);
        // As many bad ones as there are to spare, anywhere among the sources.
        let spare = order.sources.len() - s;
        let mut bad: BTreeMap<u8, Fate> = BTreeMap::new();
        let at = |number: usize| (seed as usize).wrapping_add(number * 5) % order.sources.len();
        for (number, fate) in fates.into_iter().enumerate().take(spare) {
            bad.insert(order.sources[at(number)].index as u8, fate);
        }
        // One of them may be on the own disk.
        if let Some(own) = own {
            let source = &mut order.sources[usize::from(own) % (s + r - wanted.len())];
            if !bad.contains_key(&(source.index as u8)) {
                source.provider = OWN;
                store.put_blocking(block.records[source.index as usize].to_bytes()).unwrap();
            }
        }
        let ended = work(&store, &block.swarm(&bad), &order);
        check_right(&block, &wanted, &ended);
        for fault in &ended.faults {
            // Nobody is accused who did nothing. A chain's node that has to wait for a slow one
            // may look slow itself.
            let fate = bad.get(&(fault.index as u8)).copied().unwrap_or_default();
            let innocent = matches!(fate, Fate::Honest | Fate::Slow(_));
            let only_late = fault.status() == FragmentStatus::Unspecified;
            prop_assert!(!innocent || only_late, "{fault:?} {fate:?}");
        }
    });
}

#[test]
fn one_right_source_too_few_is_an_error_and_never_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    proptest!(config(), |(
        s in 1usize..=12, r in 1usize..=12, bytes in 1usize..300_000, seed: u64, path in 0usize..4,
        fates in prop::collection::vec(fate(), 24), kind in kind(),
    )| {
        let block = Block::of_kind(kind, s, r, bytes, seed);
        let wanted = wanted_of(s + r, 1, seed);
        let order = block.order(&wanted, PATHS[path]);
        let count = order.sources.len();
        let good: BTreeSet<usize> =
            (0..s - 1).map(|number| ((seed as usize) % count + number) % count).collect();
        let bad: BTreeMap<u8, Fate> = order.sources.iter().enumerate()
            .filter(|(at, _)| !good.contains(at))
            .map(|(at, source)| {
                let fate = match fates[at] {
                    fate if fate.has_right_bytes() => Fate::Altered,
                    fate => fate,
                };
                (source.index as u8, fate)
            })
            .collect();
        let ended = work(&store, &block.swarm(&bad), &order);
        prop_assert!(ended.result.is_err());
        prop_assert!(!ended.faults.is_empty());
    });
}

#[test]
fn as_much_is_moved_as_each_path_promises() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    for (s, r, bytes) in [(4, 2, 4 << 20), (4, 2, 70_001), (10, 4, 3_000_000), (1, 3, 100_000)] {
        for many in 1..=2 {
            let block = Block::new(s, r, bytes, 7);
            let wanted = wanted_of(s + r, many, 9);
            let slots = block.geometry.fragment_slots();
            let fragment = block.geometry.fragment_bytes() as u64;
            let moved = |path| {
                let (swarm, order) = (block.swarm(&BTreeMap::new()), block.order(&wanted, path));
                let ended = work(&store, &swarm, &order);
                check_right(&block, &wanted, &ended);
                assert_eq!(ended.faults, []);
                let sent = order.sources.iter().map(|source| swarm.sent(&source.address).slots);
                (ended.received_bytes, sent.collect::<Vec<_>>())
            };
            let (received, sent) = moved(RebuildPath::Star);
            assert_eq!(received, s as u64 * fragment);
            assert!(sent.iter().all(|sent| [0, slots].contains(sent)), "{sent:?}");
            let (received, sent) = moved(RebuildPath::RotatedStar);
            assert_eq!(received, s as u64 * fragment);
            let share = (slots * s).div_ceil(s + r - many);
            assert!(sent.iter().all(|sent| *sent <= share), "{sent:?} {share}");
            let (received, sent) = moved(RebuildPath::Chain);
            assert_eq!(received, many as u64 * fragment, "one fragment arrives for each");
            assert_eq!(sent, vec![0; s + r - many]);
            let (received, _) = moved(RebuildPath::Sites);
            assert!(received <= 3 * many as u64 * fragment, "one fragment a site");
        }
    }
}

#[test]
fn who_adds_up_wrongly_is_named_and_gone_around() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    for path in [RebuildPath::Chain, RebuildPath::Sites] {
        for liar in 0..5u8 {
            let block = Block::new(5, 3, 200_000, 3);
            let bad = BTreeMap::from([(liar, Fate::WrongSums)]);
            let ended = work(&store, &block.swarm(&bad), &block.order(&[7], path));
            check_right(&block, &[7], &ended);
            let [fault] = &ended.faults[..] else { panic!("{:?}", ended.faults) };
            assert_eq!((fault.index, fault.status()), (liar.into(), FragmentStatus::Damaged));
        }
    }
}

/// A checksum can be forged. Then every source looks right, and what they give together does not:
/// the forger is found where there is one source more than needed.
#[test]
fn a_forged_checksum_is_found_by_contradiction() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    for path in PATHS {
        for forger in 0..5u8 {
            let block = Block::new(4, 3, 200_000, 3);
            let bad = BTreeMap::from([(forger, Fate::Forged)]);
            let ended = work(&store, &block.swarm(&bad), &block.order(&[6], path));
            check_right(&block, &[6], &ended);
            let named: Vec<_> =
                ended.faults.iter().map(|fault| (fault.index, fault.status())).collect();
            let forged = [(u32::from(forger), FragmentStatus::Damaged)];
            // The slot in question may not have been asked of the forger.
            let unseen = forger == 4 || path == RebuildPath::RotatedStar;
            assert!(named == forged || (unseen && named.is_empty()), "{path:?} {named:?}");
            // With none to spare it is an error, and never bytes.
            let mut order = block.order(&[6], path);
            order.sources.truncate(5);
            order.sources.remove(usize::from(forger == 0));
            let ended = work(&store, &block.swarm(&bad), &order);
            assert!(ended.result.is_err(), "{path:?} {forger}");
        }
    }
}

/// With the fingerprints that new blocks have the same forgery is no riddle: whoever sends it is known at
/// once, by its own bytes, with none to spare too.
#[test]
fn a_forged_checksum_is_seen_by_the_fingerprint() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    for path in PATHS {
        for forger in 0..4u8 {
            let block = Block::of_kind(FingerprintKind::Blake3, 4, 3, 200_000, 3);
            let bad = BTreeMap::from([(forger, Fate::Forged)]);
            let mut order = block.order(&[6], path);
            order.sources.truncate(5);
            let ended = work(&store, &block.swarm(&bad), &order);
            check_right(&block, &[6], &ended);
            let named: Vec<_> =
                ended.faults.iter().map(|fault| (fault.index, fault.status())).collect();
            let forged = [(u32::from(forger), FragmentStatus::Damaged)];
            // The slot in question may not have been asked of the forger.
            let unseen = path == RebuildPath::RotatedStar && named.is_empty();
            assert!(named == forged || unseen, "{path:?} {named:?}");
            // As many forgers as leave s right ones: found one by one.
            let forgers = BTreeMap::from([(forger, Fate::Forged), (forger ^ 1, Fate::Forged)]);
            let ended = work(&store, &block.swarm(&forgers), &block.order(&[6], path));
            check_right(&block, &[6], &ended);
            // One too few is an error, and never bytes.
            order.sources.retain(|source| source.index != u32::from(forger == 0));
            let ended = work(&store, &block.swarm(&bad), &order);
            assert!(ended.result.is_err(), "{path:?} {forger}");
        }
    }
}

#[test]
fn a_chain_goes_around_who_fails_and_names_it() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    for (fate, status) in [
        (Fate::Missing, FragmentStatus::NotFound),
        (Fate::Damaged, FragmentStatus::Damaged),
        (Fate::Hangs, FragmentStatus::Unspecified),
        (Fate::Short, FragmentStatus::Damaged),
    ] {
        for path in [RebuildPath::Chain, RebuildPath::Sites] {
            for at in 0..4u8 {
                let block = Block::new(4, 3, 300_000, 5);
                let swarm = block.swarm(&BTreeMap::from([(at, fate)]));
                let ended = work(&store, &swarm, &block.order(&[6], path));
                check_right(&block, &[6], &ended);
                let [fault] = &ended.faults[..] else { panic!("{fate:?} {:?}", ended.faults) };
                assert_eq!((fault.index, fault.status()), (at.into(), status));
                // Two stood by, so a second chain was enough: no whole fragment was pulled. Only who
                // sends too little looks as if the others sent too much, which they deny.
                let pulled = (0..6u8).map(|at| swarm.sent(&super::address(at).address).slots);
                assert!(pulled.sum::<usize>() == 0 || fate == Fate::Short, "{fate:?} at {at}");
            }
        }
    }
}

#[test]
fn a_rate_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    for path in PATHS {
        let block = Block::new(4, 2, 1 << 20, 5);
        let order = block.order(&[5], path);
        let fragment = block.geometry.fragment_bytes() as u64;
        let order = RebuildFragments { bytes_per_s_max: fragment, ..order };
        let order = Arc::new(Order::check(&order, ProviderId(OWN)).unwrap());
        paused().block_on(async {
            let begun = Instant::now();
            let way = Arc::new(Way(block.swarm(&BTreeMap::new())));
            let deadline = begun + order.deadline;
            let mut work = Work::new(order, store.clone(), way, vec![5], deadline);
            assert!(work.run().await.is_ok());
            // Whatever is under way at first may come at once; the rest takes its time.
            let least = (work.received_bytes.saturating_sub(fragment)) / fragment;
            assert!(begun.elapsed().as_secs() + 1 > least, "{path:?} {:?}", begun.elapsed());
            assert!(work.faults.is_empty(), "waiting for its turn is no fault: {:?}", work.faults);
        });
    }
}

#[test]
fn a_fragment_that_leaves_is_copied_and_made_of_others_where_its_holder_lies() {
    let block = Block::new(4, 2, 300_000, 5);
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let fragment_bytes = block.geometry.fragment_bytes() as u64;
    let fates = [
        (Fate::default(), 1, 0),
        (Fate::Missing, 4, 1),
        (Fate::Damaged, 4, 1),
        (Fate::Altered, 5, 1),
    ];
    for (fate, moved, faults) in fates {
        let swarm = block.swarm(&BTreeMap::from([(3, fate)]));
        let ended = work(&store, &swarm, &block.order_copy(3, 3));
        check_right(&block, &[3], &ended);
        assert_eq!((ended.received_bytes, ended.faults.len()), (moved * fragment_bytes, faults));
        assert!(ended.faults.iter().all(|fault| fault.provider == 3), "{:?}", ended.faults);
    }
    // Nothing else is there: the copy needs nobody.
    let mut alone = block.order_copy(3, 3);
    alone.sources.clear();
    let ended = work(&store, &block.swarm(&BTreeMap::new()), &alone);
    check_right(&block, &[3], &ended);
    let gone = block.swarm(&BTreeMap::from([(3, Fate::Missing)]));
    assert!(work(&store, &gone, &alone).result.is_err());
}
