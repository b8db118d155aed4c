//! What is really there: for every fragment how many intact copies of it lie on disks that exist, and
//! how many of those can be reached. The directory never sees this; the checkers believe nothing else.

use std::collections::{BTreeMap, VecDeque};

use us_core::geometry::Code;

/// A fragment: block number times 256 plus index.
pub type Fragment = u64;

/// The fragment `index` of a block.
pub const fn fragment(block: u32, index: u8) -> Fragment {
    (block as u64) << 8 | index as u64
}

/// The block and the index of a fragment.
pub const fn block_of(fragment: Fragment) -> (u32, u8) {
    ((fragment >> 8) as u32, fragment as u8)
}

/// A block that fell below s intact fragments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Loss {
    /// Its number.
    pub block: u32,
    /// How many of its fragments were lost within the window of the fault budget.
    pub lost_together: usize,
}

/// All blocks.
#[derive(Debug)]
pub struct Blocks {
    code: Code,
    /// Intact copies of each fragment, and those of them that are reachable.
    copies: Vec<[u8; 2]>,
    /// Of each block: its fragments with an intact copy, and with a reachable one.
    distinct: Vec<[u8; 2]>,
    /// When fragments of a block were lost, within the window.
    losses: BTreeMap<u32, VecDeque<u64>>,
    window_ms: u64,
    readable: usize,
    lost: usize,
    /// How many blocks have so many fragments.
    by_intact: Vec<usize>,
}

impl Blocks {
    /// None yet. Fragments lost within `window_ms` of each other are lost together.
    pub fn new(code: Code, window_ms: u64) -> Self {
        Self {
            code,
            copies: Vec::new(),
            distinct: Vec::new(),
            losses: BTreeMap::new(),
            window_ms,
            readable: 0,
            lost: 0,
            by_intact: vec![0; code.fragments() + 1],
        }
    }

    /// One more, without fragments yet.
    pub fn push(&mut self) {
        self.copies.extend(vec![[0; 2]; self.code.fragments()]);
        self.distinct.push([0; 2]);
        self.by_intact[0] += 1;
        self.lost += 1;
    }

    fn at(&self, fragment: Fragment) -> (usize, usize) {
        let (block, index) = block_of(fragment);
        (block as usize, block as usize * self.code.fragments() + index as usize)
    }

    /// A copy of a fragment is there now; `reachable`: so is its holder.
    pub fn add(&mut self, fragment: Fragment, reachable: bool) {
        let (block, place) = self.at(fragment);
        self.copies[place][0] += 1;
        if self.copies[place][0] == 1 {
            let intact = usize::from(self.distinct[block][0]);
            self.distinct[block][0] += 1;
            self.by_intact[intact] -= 1;
            self.by_intact[intact + 1] += 1;
            self.lost -= usize::from(intact + 1 == self.code.s());
        }
        if reachable {
            self.reach(fragment);
        }
    }

    /// A copy can be reached again.
    pub fn reach(&mut self, fragment: Fragment) {
        let (block, place) = self.at(fragment);
        self.copies[place][1] += 1;
        if self.copies[place][1] == 1 {
            self.distinct[block][1] += 1;
            self.readable += usize::from(usize::from(self.distinct[block][1]) == self.code.s());
        }
    }

    /// A copy cannot be reached any more.
    pub fn unreach(&mut self, fragment: Fragment) {
        let (block, place) = self.at(fragment);
        self.copies[place][1] -= 1;
        if self.copies[place][1] == 0 {
            self.readable -= usize::from(usize::from(self.distinct[block][1]) == self.code.s());
            self.distinct[block][1] -= 1;
        }
    }

    /// A copy is gone for good; `harm`: by a fault, not because it was one too many. Says if that was
    /// one fragment too many.
    pub fn remove(
        &mut self,
        fragment: Fragment,
        reachable: bool,
        harm: bool,
        now_ms: u64,
    ) -> Option<Loss> {
        if reachable {
            self.unreach(fragment);
        }
        let (block, place) = self.at(fragment);
        self.copies[place][0] -= 1;
        if self.copies[place][0] > 0 {
            return None;
        }
        let intact = usize::from(self.distinct[block][0]);
        self.distinct[block][0] -= 1;
        self.by_intact[intact] -= 1;
        self.by_intact[intact - 1] += 1;
        let number = block as u32;
        if harm {
            let losses = self.losses.entry(number).or_default();
            losses.push_back(now_ms);
            while losses.front().is_some_and(|at| at + self.window_ms < now_ms) {
                losses.pop_front();
            }
        }
        if intact != self.code.s() {
            return None;
        }
        self.lost += 1;
        let lost_together = self.losses.get(&number).map_or(0, VecDeque::len);
        Some(Loss { block: number, lost_together })
    }

    /// Blocks in all.
    pub fn count(&self) -> usize {
        self.distinct.len()
    }

    /// Blocks of which s fragments can be reached.
    pub fn readable(&self) -> usize {
        self.readable
    }

    /// Blocks of which fewer than s fragments are left anywhere.
    pub fn lost(&self) -> usize {
        self.lost
    }

    /// Distinct fragments of a block that are left.
    pub fn intact(&self, block: u32) -> usize {
        usize::from(self.distinct[block as usize][0])
    }

    /// Whether an intact copy of the fragment is left.
    #[cfg(test)]
    fn has(&self, fragment: Fragment) -> bool {
        self.copies[self.at(fragment).1][0] > 0
    }

    /// The mean of the fragments left of a block, and the least.
    pub fn intact_mean_and_least(&self) -> (f64, usize) {
        let weighed: usize = self.by_intact.iter().enumerate().map(|(left, n)| left * n).sum();
        let least = self.by_intact.iter().position(|blocks| *blocks > 0).unwrap_or(0);
        (weighed as f64 / self.count().max(1) as f64, least)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_is_counted() {
        let mut blocks = Blocks::new(Code::new(2, 1).unwrap(), 10);
        blocks.push();
        assert_eq!((blocks.lost(), blocks.readable()), (1, 0));
        (0..3).for_each(|index| blocks.add(fragment(0, index), true));
        assert_eq!((blocks.lost(), blocks.readable(), blocks.intact(0)), (0, 1, 3));
        // A second copy makes no third fragment.
        blocks.add(fragment(0, 2), false);
        assert_eq!(blocks.remove(fragment(0, 2), true, true, 0), None);
        assert_eq!((blocks.intact(0), blocks.readable(), blocks.has(fragment(0, 2))), (3, 1, true));
        blocks.unreach(fragment(0, 1));
        assert_eq!((blocks.readable(), blocks.lost()), (0, 0));
        assert_eq!(blocks.remove(fragment(0, 2), false, true, 5), None);
        assert_eq!(blocks.intact_mean_and_least(), (2.0, 2));
        // The first loss is long past when the last comes.
        let loss = blocks.remove(fragment(0, 0), true, true, 20);
        assert_eq!(loss, Some(Loss { block: 0, lost_together: 1 }));
        assert_eq!(blocks.lost(), 1);
    }
}
