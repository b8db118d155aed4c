//! Random operations on the store and on a map; both must always agree, also after it was closed,
//! dropped without closing, or lost its index.

use std::collections::BTreeMap;

use bytes::Bytes;
use proptest::prelude::*;
use us_core::ids::FragmentId;

use super::{TestClock, block_on, options, read_all, sample};
use crate::store::{MaintainLimits, PutOutcome, Store, StoreError};

#[derive(Clone, Debug)]
enum Step {
    Put { number: u64, size: usize, seed: u64 },
    PutMany { first: u64, count: u64 },
    Delete { first: u64, count: u64 },
    Restore { number: u64 },
    Maintain,
    Wait { seconds: u64 },
    Reopen { lose_index: bool },
    Scrub,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0u64..40, 0usize..4, 0u64..2).prop_map(|(number, size, seed)| Step::Put { number, size, seed }),
        2 => (0u64..40, 1u64..20).prop_map(|(first, count)| Step::PutMany { first, count }),
        3 => (0u64..40, 1u64..15).prop_map(|(first, count)| Step::Delete { first, count }),
        1 => (0u64..40).prop_map(|number| Step::Restore { number }),
        3 => Just(Step::Maintain),
        2 => prop_oneof![Just(30u64), Just(100), Just(8 * 24 * 3600)].prop_map(|seconds| Step::Wait { seconds }),
        2 => any::<bool>().prop_map(|lose_index| Step::Reopen { lose_index }),
        1 => Just(Step::Scrub),
    ]
}

const SIZES: [usize; 4] = [100, 5000, 40_000, 200_000];

#[derive(Clone)]
struct Kept {
    record: Bytes,
    trashed_at_s: Option<u64>,
}

struct Pair {
    store: Option<Store>,
    model: BTreeMap<FragmentId, Kept>,
    clock: TestClock,
    dir: tempfile::TempDir,
    punch: bool,
}

impl Pair {
    fn store(&self) -> &Store {
        self.store.as_ref().unwrap()
    }

    fn now_s(&self) -> u64 {
        (options(&self.clock).clock)()
    }

    fn run(&mut self, step: Step) {
        match step {
            Step::Put { number, size, seed } => self.put(number, SIZES[size], seed),
            Step::PutMany { first, count } => self.put_many(first, count),
            Step::Delete { first, count } => {
                let ids: Vec<_> =
                    (first..first + count).map(|number| sample(number, 1, 0).0).collect();
                let now_s = self.now_s();
                let mut expected = 0;
                for id in &ids {
                    if let Some(kept) = self.model.get_mut(id)
                        && kept.trashed_at_s.is_none()
                    {
                        kept.trashed_at_s = Some(now_s);
                        expected += 1;
                    }
                }
                assert_eq!(block_on(self.store().delete(ids)).unwrap(), expected);
            }
            Step::Restore { number } => {
                let id = sample(number, 1, 0).0;
                let kept = self.model.get_mut(&id).filter(|kept| kept.trashed_at_s.is_some());
                let expected = usize::from(kept.is_some());
                kept.into_iter().for_each(|kept| kept.trashed_at_s = None);
                assert_eq!(block_on(self.store().restore(vec![id])).unwrap(), expected);
            }
            Step::Maintain => {
                let keep_s = options(&self.clock).trash_keep_s;
                let now_s = self.now_s();
                self.model.retain(|_, kept| kept.trashed_at_s.is_none_or(|at| at + keep_s > now_s));
                while self.store().maintain(&MaintainLimits::default()).unwrap().did_something() {}
            }
            Step::Wait { seconds } => self.clock.advance(seconds),
            Step::Reopen { lose_index } => self.reopen(lose_index),
            Step::Scrub => {
                let scrubbed = self.store().scrub(None, u64::MAX).unwrap();
                assert_eq!((scrubbed.next, scrubbed.damaged), (None, 0));
            }
        }
        self.compare();
    }

    fn put(&mut self, number: u64, size: usize, seed: u64) {
        let (id, record) = sample(number, size, seed);
        let outcome = self.store().put_blocking(record.clone());
        match self.model.get_mut(&id) {
            None => {
                assert_eq!(outcome.unwrap(), PutOutcome::Stored);
                self.model.insert(id, Kept { record, trashed_at_s: None });
            }
            Some(kept) if kept.record == record => {
                assert_eq!(outcome.unwrap(), PutOutcome::Present);
                kept.trashed_at_s = None;
            }
            Some(_) => assert!(matches!(outcome, Err(StoreError::Refused { .. })), "{outcome:?}"),
        }
    }

    /// At once, so that they share batches; some of them twice.
    fn put_many(&mut self, first: u64, count: u64) {
        let numbers = (first..first + count).chain(first..first + count / 2);
        let records: Vec<_> = numbers.map(|number| sample(number, 5000, 0)).collect();
        let store = self.store().clone();
        let puts = records.iter().map(|(_, record)| store.put(record.clone()));
        let outcomes = block_on(futures::future::join_all(puts));
        for ((id, record), outcome) in records.into_iter().zip(outcomes) {
            match self.model.get_mut(&id) {
                Some(kept) if kept.record != record => {
                    assert!(matches!(outcome, Err(StoreError::Refused { .. })), "{outcome:?}");
                }
                Some(kept) => {
                    outcome.unwrap();
                    kept.trashed_at_s = None;
                }
                None => {
                    outcome.unwrap();
                    self.model.insert(id, Kept { record, trashed_at_s: None });
                }
            }
        }
    }

    fn reopen(&mut self, lose_index: bool) {
        self.store = None;
        if lose_index {
            std::fs::remove_dir_all(self.dir.path().join("index")).unwrap();
        }
        let options =
            crate::store::StoreOptions { punch_holes: self.punch, ..options(&self.clock) };
        let store = Store::open(self.dir.path(), options).unwrap();
        let recovery = store.recovery();
        assert_eq!((recovery.cut_bytes, recovery.unreadable_bytes, recovery.damaged), (0, 0, 0));
        assert!(recovery.set_aside.is_empty());
        self.store = Some(store);
    }

    fn compare(&self) {
        let store = self.store();
        let inventory = store.inventory(None, usize::MAX).unwrap();
        let found: Vec<_> = inventory
            .iter()
            .map(|line| {
                (line.id, (line.entry.trashed_at_s != 0).then_some(line.entry.trashed_at_s))
            })
            .collect();
        let expected: Vec<_> =
            self.model.iter().map(|(id, kept)| (*id, kept.trashed_at_s)).collect();
        assert_eq!(found, expected);
        let state = store.state();
        let live = self.model.values().filter(|kept| kept.trashed_at_s.is_none()).count();
        assert_eq!(state.fragments, live as u64);
        assert_eq!(state.trashed, (self.model.len() - live) as u64);
        for (id, kept) in &self.model {
            let readable = kept.trashed_at_s.is_none_or(|at| at + 60 >= self.now_s());
            match read_all(store, *id) {
                Ok(record) => assert!(readable && record == kept.record, "{id}"),
                Err(StoreError::NotFound { .. }) => assert!(!readable, "{id}"),
                Err(error) => panic!("{id}: {error}"),
            }
            assert_eq!(store.verify(*id).is_ok(), kept.trashed_at_s.is_none());
        }
    }
}

fn run(steps: Vec<Step>, punch: bool) {
    let dir = tempfile::tempdir().unwrap();
    let mut pair =
        Pair { store: None, model: BTreeMap::new(), clock: TestClock::default(), dir, punch };
    std::fs::create_dir_all(pair.dir.path().join("index")).unwrap();
    pair.reopen(true);
    for step in steps {
        pair.run(step);
    }
    pair.run(Step::Reopen { lose_index: true });
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, max_shrink_iters: 200, ..ProptestConfig::default() })]

    #[test]
    fn the_store_is_a_map(steps in prop::collection::vec(step(), 1..40), punch: bool) {
        run(steps, punch);
    }
}

#[test]
fn everything_deleted_gives_everything_back() {
    let mut steps =
        vec![Step::PutMany { first: 0, count: 19 }, Step::Put { number: 30, size: 3, seed: 0 }];
    steps.push(Step::Delete { first: 0, count: 40 });
    steps.push(Step::Wait { seconds: 8 * 24 * 3600 });
    steps.extend([Step::Maintain, Step::Maintain]);
    for punch in [true, false] {
        run(steps.clone(), punch);
    }
}
