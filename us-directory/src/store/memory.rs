//! The engine of tests and simulations: a persistent map in memory. Every commit counts as durable
//! at once, unless the store was made with [`MemoryStore::manual`], where the test says when.

use std::sync::Arc;

use bytes::Bytes;
use imbl::OrdMap;
use parking_lot::Mutex;

use super::{
    Durability, DurableSink, KeyRange, MetaStore, Pair, Progress, Seq, StoreError, StoreFacts,
    View, WriteBatch, journal,
};

/// A store that lies in memory.
pub struct MemoryStore {
    map: OrdMap<Bytes, Bytes>,
    seq: Seq,
    sink: Option<DurableSink>,
    history: Option<Arc<Mutex<Vec<WriteBatch>>>>,
}

impl MemoryStore {
    /// An empty store. `sink` hears of every commit at once.
    pub fn new(sink: DurableSink) -> Self {
        Self { map: OrdMap::new(), seq: 0, sink: Some(sink), history: None }
    }

    /// An empty store that never says anything is durable, and the list of its batches: a crash is
    /// simulated by [`MemoryStore::replay`] of a prefix of them.
    pub fn manual() -> (Self, Arc<Mutex<Vec<WriteBatch>>>) {
        let history = Arc::new(Mutex::new(Vec::new()));
        let store = Self { map: OrdMap::new(), seq: 0, sink: None, history: Some(history.clone()) };
        (store, history)
    }

    /// A manual store that holds what these batches left.
    pub fn replay(batches: Vec<WriteBatch>) -> (Self, Arc<Mutex<Vec<WriteBatch>>>) {
        let (mut store, history) = Self::manual();
        for batch in batches {
            store.apply(batch);
        }
        (store, history)
    }

    fn apply(&mut self, batch: WriteBatch) {
        self.seq += 1;
        if let Some(history) = &self.history {
            history.lock().push(batch.clone());
        }
        for (key, value) in batch {
            match value {
                Some(value) => self.map.insert(key, value),
                None => self.map.remove(&key),
            };
        }
    }
}

#[derive(Clone)]
struct MemorySnapshot(OrdMap<Bytes, Bytes>);

fn scan(map: &OrdMap<Bytes, Bytes>, range: &KeyRange, limit: usize) -> Vec<Pair> {
    let bounds = range.bounds();
    bounds
        .map(|bounds| map.range::<_, [u8]>(bounds))
        .into_iter()
        .flatten()
        .take(limit)
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect()
}

impl View for MemorySnapshot {
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, StoreError> {
        Ok(self.0.get(key).cloned())
    }

    fn scan(&self, range: &KeyRange, limit: usize) -> Result<Vec<Pair>, StoreError> {
        Ok(scan(&self.0, range, limit))
    }
}

impl View for MemoryStore {
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, StoreError> {
        Ok(self.map.get(key).cloned())
    }

    fn scan(&self, range: &KeyRange, limit: usize) -> Result<Vec<Pair>, StoreError> {
        Ok(scan(&self.map, range, limit))
    }
}

impl MetaStore for MemoryStore {
    fn snapshot(&self) -> Arc<dyn View> {
        Arc::new(MemorySnapshot(self.map.clone()))
    }

    fn commit(&mut self, batch: WriteBatch, _durability: Durability) -> Result<Seq, StoreError> {
        if !batch.is_empty() {
            self.apply(batch);
        }
        if let Some(sink) = &self.sink {
            sink(Ok(Progress { written: self.seq, synced: self.seq }));
        }
        Ok(self.seq)
    }

    fn facts(&self) -> StoreFacts {
        StoreFacts { seq: self.seq, journal_bytes: 0 }
    }

    fn first_record(&self) -> Seq {
        if self.history.is_some() { 1 } else { self.seq + 1 }
    }

    fn records(&self, from: Seq, bytes_max: usize) -> Result<Vec<(Seq, Bytes)>, StoreError> {
        let Some(history) = &self.history else { return Ok(Vec::new()) };
        let history = history.lock();
        let (mut records, mut bytes) = (Vec::new(), 0);
        for (index, batch) in history.iter().enumerate().skip(from.max(1) as usize - 1) {
            if !records.is_empty() && bytes >= bytes_max {
                break;
            }
            let body = journal::encode_body(batch);
            bytes += body.len();
            records.push((index as Seq + 1, body.into()));
        }
        Ok(records)
    }

    fn record_bytes(&self, _from: Seq) -> u64 {
        0
    }

    fn keep_records(&self, _from: Seq) -> Result<(), StoreError> {
        Ok(())
    }
}
