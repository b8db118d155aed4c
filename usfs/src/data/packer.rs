//! Which dirty bytes make the next block.
//!
//! Wanted properties, in this order: a stream's full blocks go first and alone, so that a file read
//! sequentially lies in few blocks; what somebody waits for goes before what is merely old; a block
//! holds whole files where they fit; nothing stays dirty longer than its age allows.

use std::collections::{BTreeMap, BTreeSet};

use us_core::ids::Ino;

/// Files looked at for one that still fits into a block with little room.
const FIT_LOOKS_MAX: usize = 64;

/// Limits of packing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PackerLimits {
    /// Plaintext bytes of a full block.
    pub block_bytes_max: u64,
    /// How long a byte may stay dirty.
    pub age_ms_max: u64,
}

/// What the packer knows of one file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DirtyFacts {
    /// Dirty bytes.
    pub dirty_bytes: u64,
    /// The longest known run of them without gaps.
    pub run_bytes: u64,
    /// When the oldest became dirty, on the owner's clock.
    pub since_ms: u64,
    /// Somebody waits until they are durable (fsync, recall).
    pub wanted: bool,
}

/// A file's part in the next block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PackItem {
    /// The file.
    pub ino: Ino,
    /// How many of its dirty bytes.
    pub bytes: u64,
}

/// The dirty files of a mount, ordered by what should be stored next.
#[derive(Debug)]
pub struct Packer {
    limits: PackerLimits,
    facts: BTreeMap<Ino, DirtyFacts>,
    dirty_bytes: u64,
    /// Files with a run of a whole block, oldest first. As the other sets: (since_ms, ino).
    runs: BTreeSet<(u64, Ino)>,
    /// Files with a whole block of dirty bytes.
    full: BTreeSet<(u64, Ino)>,
    wanted: BTreeSet<(u64, Ino)>,
    all: BTreeSet<(u64, Ino)>,
}

impl Packer {
    /// No file is dirty.
    pub fn new(limits: PackerLimits) -> Self {
        Self {
            limits,
            facts: BTreeMap::new(),
            dirty_bytes: 0,
            runs: BTreeSet::new(),
            full: BTreeSet::new(),
            wanted: BTreeSet::new(),
            all: BTreeSet::new(),
        }
    }

    /// Dirty bytes of all files.
    pub fn dirty_bytes(&self) -> u64 {
        self.dirty_bytes
    }

    /// The file's dirty bytes changed; none left takes it out.
    pub fn update(&mut self, ino: Ino, facts: DirtyFacts) {
        if let Some(old) = self.facts.remove(&ino) {
            let key = (old.since_ms, ino);
            self.dirty_bytes -= old.dirty_bytes;
            for set in [&mut self.runs, &mut self.full, &mut self.wanted, &mut self.all] {
                set.remove(&key);
            }
        }
        if facts.dirty_bytes == 0 {
            return;
        }
        let key = (facts.since_ms, ino);
        self.dirty_bytes += facts.dirty_bytes;
        self.facts.insert(ino, facts);
        self.all.insert(key);
        if facts.wanted {
            self.wanted.insert(key);
        }
        if facts.dirty_bytes >= self.limits.block_bytes_max {
            self.full.insert(key);
        }
        if facts.run_bytes >= self.limits.block_bytes_max {
            self.runs.insert(key);
        }
    }

    /// When the oldest dirty byte must be stored.
    pub fn due_ms(&self) -> Option<u64> {
        self.all.first().map(|(since_ms, _)| since_ms.saturating_add(self.limits.age_ms_max))
    }

    /// The next block's contents; `None` while nothing needs to be stored yet. `pressure`: memory
    /// is short, so store what there is. Changes nothing: the owner seals, then calls
    /// [`Packer::update`].
    pub fn next(&self, now_ms: u64, pressure: bool) -> Option<Vec<PackItem>> {
        let block_bytes_max = self.limits.block_bytes_max;
        if let Some((_, ino)) = self.runs.first().or_else(|| self.full.first()) {
            return Some(vec![PackItem { ino: *ino, bytes: block_bytes_max }]);
        }
        let due = self.due_ms().is_some_and(|due_ms| due_ms <= now_ms);
        let enough = self.dirty_bytes >= block_bytes_max;
        if self.all.is_empty() || !(due || enough || pressure || !self.wanted.is_empty()) {
            return None;
        }
        Some(self.pack())
    }

    /// What is wanted, then what is oldest. No single file fills a block here.
    fn pack(&self) -> Vec<PackItem> {
        let mut left = self.limits.block_bytes_max;
        let mut items = Vec::new();
        for (_, ino) in &self.wanted {
            let bytes = self.facts[ino].dirty_bytes.min(left);
            if bytes == 0 {
                return items;
            }
            left -= bytes;
            items.push(PackItem { ino: *ino, bytes });
        }
        let mut looks = 0;
        for (_, ino) in &self.all {
            let facts = &self.facts[ino];
            if facts.wanted {
                continue;
            }
            if facts.dirty_bytes <= left {
                left -= facts.dirty_bytes;
                items.push(PackItem { ino: *ino, bytes: facts.dirty_bytes });
            } else {
                looks += 1;
            }
            if left == 0 || looks == FIT_LOOKS_MAX {
                break;
            }
        }
        items
    }
}
