//! The namespace against two slow and obvious models: a tree of names, and arrays of bytes.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use proptest::prelude::*;
use us_core::geometry::Code;
use us_core::ids::{BlockId, VolumeId};
use us_proto::v1::mutation::Op;
use us_proto::v1::*;

use super::{
    ApplyError, Authority, CHUNK_BYTES, Outcome, S_IFDIR, S_IFREG, TrashRule, Tx, new_root,
};
use crate::keys;
use crate::records::*;
use crate::store::memory::MemoryStore;
use crate::store::{Durability, KeyRange, MetaStore, View};

mod data;
mod names;
mod trash;

const VOLUME: VolumeId = VolumeId::from_bytes([5; 16]);

/// Allows everything; nobody else is there.
struct Anyone;

impl Authority for Anyone {
    fn session(&self) -> u64 {
        1
    }
    fn exclusive(&self, _ino: u64) -> bool {
        true
    }
    fn may_create(&self, _ino: u64) -> bool {
        true
    }
    fn open_elsewhere(&self, _ino: u64) -> Vec<u64> {
        Vec::new()
    }
    fn provider_exists(&self, _provider: u32) -> bool {
        true
    }
    fn birth_given(&self, _birth: u64) -> bool {
        true
    }
    fn next_grant(&self) -> u64 {
        1
    }
}

struct Volume {
    store: MemoryStore,
    trash: TrashRule,
}

impl Volume {
    fn new() -> Self {
        let (mut store, _) = MemoryStore::manual();
        store.commit(new_root(&VOLUME, Timestamp::default()), Durability::Applied).unwrap();
        Self { store, trash: TrashRule::default() }
    }

    fn tx(&self) -> Tx<'_> {
        Tx::new(&self.store, VOLUME, Code::new(2, 1).unwrap(), 7).with_trash(self.trash)
    }

    fn finish(&mut self, outcome: Outcome) {
        self.store.commit(outcome.batch, Durability::Applied).unwrap();
    }

    fn apply(&mut self, ops: Vec<Op>) -> Result<(), ApplyError> {
        let mut tx = self.tx();
        for op in ops {
            tx.apply(&Anyone, &Mutation { op: Some(op) })?;
        }
        let outcome = tx.finish()?;
        self.finish(outcome);
        Ok(())
    }

    fn get<T: prost::Message + Default>(&self, key: &Bytes) -> Option<T> {
        self.store.get(key).unwrap().map(|value| decode(key, &value).unwrap())
    }

    fn scan(&self, prefix: &[u8]) -> Vec<(Bytes, Bytes)> {
        self.store.scan(&KeyRange::prefix(prefix), usize::MAX).unwrap()
    }
}

fn hash(name: u8) -> Bytes {
    vec![name; 16].into()
}

fn create(dir: u64, name: u8, ino: u64, mode: u32) -> Op {
    let (name_hash, sealed_name) = (hash(name), hash(name));
    Op::Create(Create { dir, name_hash, sealed_name, ino, mode, ..Default::default() })
}
