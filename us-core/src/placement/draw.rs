//! Seeded draws: the generator, a tree that draws in proportion to weights, a hasher for numbers.
//!
//! Invariants: the same seed gives the same numbers on every machine; a weight of zero is never
//! drawn. Nothing here fails.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

/// The splitmix64 generator (Steele, Lea, Flood 2014): small, fast, and seeded by one number.
#[derive(Clone, Debug)]
pub struct SplitMix(u64);

impl SplitMix {
    /// The sequence of `seed`.
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next 64 bits.
    pub const fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    /// A number below `end`; 0 when `end` is 0. Biased by less than end / 2^64.
    pub const fn below(&mut self, end: u64) -> u64 {
        ((self.next() as u128 * end as u128) >> 64) as u64
    }

    /// A number in 0..1.
    pub fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Puts `items` in random order (Fisher, Yates).
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for end in (1..items.len()).rev() {
            items.swap(end, self.below(end as u64 + 1) as usize);
        }
    }
}

/// Mixes the one small number a table's key is made of; not for keys that strangers choose.
#[derive(Clone, Copy, Debug, Default)]
pub struct NumberHasher(u64);

impl Hasher for NumberHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.write_u64(u64::from(*byte)));
    }

    fn write_u32(&mut self, number: u32) {
        self.write_u64(u64::from(number));
    }

    fn write_u64(&mut self, number: u64) {
        let mixed = (self.0 ^ number).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = mixed ^ mixed >> 32;
    }
}

/// A table whose keys are numbers of our own.
pub type NumberMap<K, V> = HashMap<K, V, BuildHasherDefault<NumberHasher>>;

/// Weights by position, drawn in proportion in O(log n) and changed in O(log n) (Fenwick 1994).
#[derive(Clone, Debug, Default)]
pub struct Fenwick {
    weights: Vec<u64>,
    /// `sums[i]` is the sum of the weights (i & (i + 1))..=i; as many as the next power of two.
    sums: Vec<u64>,
    total: u64,
}

impl Fenwick {
    /// Positions 0..len exist.
    pub fn len(&self) -> usize {
        self.weights.len()
    }

    /// Whether there is no position.
    pub fn is_empty(&self) -> bool {
        self.weights.is_empty()
    }

    /// The sum of all weights.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// The weight at `position`.
    ///
    /// # Panics
    /// When there is no such position.
    pub fn get(&self, position: usize) -> u64 {
        self.weights[position]
    }

    /// Adds a position at the end.
    pub fn push(&mut self, weight: u64) {
        let position = self.weights.len();
        if position == self.sums.len() {
            let twice = (2 * self.sums.len()).max(1);
            self.sums.resize(twice, 0);
            // The new last sum spans all positions.
            self.sums[twice - 1] = self.total;
        }
        self.weights.push(0);
        self.set(position, weight);
    }

    /// Removes the last position.
    pub fn pop(&mut self) {
        if let Some(last) = self.weights.len().checked_sub(1) {
            self.set(last, 0);
            self.weights.pop();
        }
    }

    /// Changes the weight at `position`.
    ///
    /// # Panics
    /// When there is no such position, or when the sum of all weights would pass 2^64.
    pub fn set(&mut self, position: usize, weight: u64) {
        let old = std::mem::replace(&mut self.weights[position], weight);
        self.total = (self.total - old).checked_add(weight).expect("weights fit 64 bits");
        let mut at = position;
        while at < self.sums.len() {
            self.sums[at] = self.sums[at] - old + weight;
            at |= at + 1;
        }
    }

    /// A position, drawn in proportion to its weight; `None` when all weights are zero.
    pub fn draw(&self, random: &mut SplitMix) -> Option<usize> {
        if self.total == 0 {
            return None;
        }
        let mut left = random.below(self.total);
        let mut position = 0;
        let mut step = self.sums.len() >> 1;
        // Without branches: which way it goes cannot be predicted.
        while step > 0 {
            let sum = self.sums[position + step - 1];
            let right = sum <= left;
            left -= if right { sum } else { 0 };
            position += if right { step } else { 0 };
            step >>= 1;
        }
        Some(position)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_tree_agrees_with_a_plain_list(
            steps in proptest::collection::vec((0u8..4, 0usize..40, 0u64..9), 1..120), seed: u64,
        ) {
            let (mut tree, mut plain) = (Fenwick::default(), Vec::<u64>::new());
            for (what, at, weight) in steps {
                match what {
                    0 | 1 => { tree.push(weight); plain.push(weight); }
                    2 => { tree.pop(); plain.pop(); }
                    _ if !plain.is_empty() => {
                        let at = at % plain.len();
                        tree.set(at, weight);
                        plain[at] = weight;
                    }
                    _ => {}
                }
                let total: u64 = plain.iter().sum();
                prop_assert_eq!(tree.total(), total);
                let mut twin = SplitMix::new(seed);
                let drawn = tree.draw(&mut SplitMix::new(seed));
                let mut left = twin.below(total);
                let expected = (total > 0).then(|| plain.iter().position(|weight| {
                    let here = left < *weight;
                    left = left.wrapping_sub(*weight);
                    here
                }));
                prop_assert_eq!(drawn, expected.flatten());
            }
        }
    }

    #[test]
    fn draws_are_in_proportion() {
        let mut tree = Fenwick::default();
        [1u64, 0, 3].into_iter().for_each(|weight| tree.push(weight));
        let mut random = SplitMix::new(5);
        let mut hits = [0; 3];
        (0..4000).filter_map(|_| tree.draw(&mut random)).for_each(|at| hits[at] += 1);
        assert!(hits[1] == 0 && (850..1150).contains(&hits[0]), "{hits:?}");
    }
}
