//! How many blocks each pair of providers shares: λ.
//!
//! The cost of losing x is at most max over y of λ(x, y): what one survivor must send. Up to
//! [`DENSE_NODES_MAX`] providers the counters lie in one triangle (4 bytes a pair: 33 MB at most);
//! above, only pairs that share blocks are kept.
//!
//! Blocks may be taken back before they were counted (a block is deleted while those of before the
//! start are still being counted): a counter below zero reads as zero and is right in the end.
//!
//! Invariants: λ(x, y) = λ(y, x); a provider's own pair is not counted. Nothing here fails.

use super::draw::NumberMap;
use super::field::Node;

/// The most providers whose counters lie in a triangle.
pub const DENSE_NODES_MAX: usize = 4096;

type PairMap = NumberMap<u64, i32>;

#[derive(Clone, Debug)]
enum Store {
    /// λ of nodes low < high at high (high − 1) / 2 + low.
    Dense(Vec<i32>),
    /// Only counters that are not zero.
    Sparse(PairMap),
}

/// The counters.
#[derive(Clone, Debug)]
pub struct PairCounters {
    store: Store,
    dense_nodes_max: usize,
}

impl Default for PairCounters {
    fn default() -> Self {
        Self::with_dense_nodes_max(DENSE_NODES_MAX)
    }
}

const fn triangle(nodes: usize) -> usize {
    nodes * nodes.saturating_sub(1) / 2
}

fn ordered(one: Node, other: Node) -> (usize, usize) {
    (one.index().min(other.index()), one.index().max(other.index()))
}

const fn sparse_key(low: usize, high: usize) -> u64 {
    (high as u64) << 32 | low as u64
}

impl PairCounters {
    /// No counter yet; they become sparse above `dense_nodes_max` providers.
    pub fn with_dense_nodes_max(dense_nodes_max: usize) -> Self {
        Self { store: Store::Dense(Vec::new()), dense_nodes_max }
    }

    /// Whether the counters lie in a triangle.
    pub fn is_dense(&self) -> bool {
        matches!(self.store, Store::Dense(_))
    }

    /// Blocks that both store.
    #[inline]
    pub fn get(&self, one: Node, other: Node) -> u32 {
        let (low, high) = ordered(one, other);
        let counter = match &self.store {
            Store::Dense(counters) if low < high => counters.get(triangle(high) + low),
            Store::Sparse(counters) if low < high => counters.get(&sparse_key(low, high)),
            _ => None,
        };
        counter.map_or(0, |counter| (*counter).max(0) as u32)
    }

    /// Counts `blocks` more (or fewer) blocks with these holders, each named once.
    pub fn count(&mut self, holders: &[Node], blocks: i32) {
        for (at, one) in holders.iter().enumerate() {
            for other in &holders[at + 1..] {
                self.change(*one, *other, blocks);
            }
        }
    }

    /// Nothing is known of a node any more: its number may be given to another provider.
    pub fn clear(&mut self, node: Node, nodes: usize) {
        for other in 0..nodes {
            let (low, high) = (node.index().min(other), node.index().max(other));
            match &mut self.store {
                Store::Dense(counters) => {
                    let known = (low < high).then(|| counters.get_mut(triangle(high) + low));
                    if let Some(counter) = known.flatten() {
                        *counter = 0;
                    }
                }
                Store::Sparse(counters) => {
                    counters.remove(&sparse_key(low, high));
                }
            }
        }
    }

    #[inline]
    fn change(&mut self, one: Node, other: Node, blocks: i32) {
        let (low, high) = ordered(one, other);
        if low == high {
            return;
        }
        if let Store::Dense(counters) = &mut self.store {
            let at = triangle(high) + low;
            if let Some(counter) = counters.get_mut(at) {
                *counter = counter.saturating_add(blocks);
                return;
            }
            if high < self.dense_nodes_max {
                // Grown in steps, so that a growing swarm does not copy the triangle each time.
                let nodes = (high + 1).next_multiple_of(64).min(self.dense_nodes_max);
                counters.resize(triangle(nodes), 0);
                counters[at] = blocks;
                return;
            }
            self.become_sparse();
        }
        let Store::Sparse(counters) = &mut self.store else { return };
        let key = sparse_key(low, high);
        let counter = counters.entry(key).or_default();
        *counter = counter.saturating_add(blocks);
        if *counter == 0 {
            counters.remove(&key);
        }
    }

    fn become_sparse(&mut self) {
        let Store::Dense(counters) = &self.store else { return };
        let (mut sparse, mut at) = (PairMap::default(), 0);
        for high in 1.. {
            if at >= counters.len() {
                break;
            }
            for low in 0..high {
                if counters[at] != 0 {
                    sparse.insert(sparse_key(low, high), counters[at]);
                }
                at += 1;
            }
        }
        self.store = Store::Sparse(sparse);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn counters_agree_with_a_plain_map(
            blocks in proptest::collection::vec(
                (proptest::collection::btree_set(0u32..24, 1..7), any::<bool>(), 0u32..24), 1..60),
            dense_nodes_max in 0usize..32,
        ) {
            let mut counters = PairCounters::with_dense_nodes_max(dense_nodes_max);
            let mut stored: Vec<Vec<Node>> = Vec::new();
            for (holders, remove, to) in blocks {
                let mut holders: Vec<Node> = holders.into_iter().map(Node).collect();
                if remove {
                    counters.count(&holders, -2);
                    counters.count(&holders, 2);
                    continue;
                }
                counters.count(&holders, 1);
                if !holders.contains(&Node(to)) {
                    counters.count(&holders, -1);
                    holders[0] = Node(to);
                    counters.count(&holders, 1);
                }
                stored.push(holders);
            }
            let forgotten = Node(3);
            counters.clear(forgotten, 24);
            for one in (0..24).map(Node) {
                for other in (0..24).map(Node) {
                    let both = |block: &&Vec<Node>| block.contains(&one) && block.contains(&other);
                    let counted = one != other && one != forgotten && other != forgotten;
                    let expected = stored.iter().filter(both).count() * usize::from(counted);
                    prop_assert_eq!(counters.get(one, other) as usize, expected);
                }
            }
        }
    }
}
