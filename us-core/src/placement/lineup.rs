//! Pseudo-affine lines over metapeers: which provider the n-th block of a swarm would use in each
//! column.
//!
//! ```text
//! metapeers  each one provider        LINES over them; one block a line
//!            M ≥ f²                   LINES over them, round after round; in a line, column j
//!                                     takes slot (i + a j) mod m, m prime ≥ slots, f
//!            f ≤ M < f²               all M are columns: metapeer c takes slot (i + a c) mod m,
//!                                     m prime ≥ slots, M; any f of them make the block
//!            M < f                    no lines
//! ```
//! The third row is LINES with f columns when M = f. With more, the family of f-subsets of M < f²
//! would collapse to disjoint groups; the slots alone keep two blocks of one fold from meeting
//! twice, whichever f metapeers each takes. When all numbers are used, a fold is over: the next one
//! begins with fresh permutations of metapeers and slots.
//!
//! Invariant: two blocks of one fold meet in at most one slot. Nothing here fails.

use super::draw::SplitMix;
use super::field::Node;
use super::lines::{Lines, Rule, slot_at, slot_modulus};
use super::metapeers::Metapeers;

/// How blocks are numbered.
#[derive(Clone, Debug)]
enum Shape {
    /// Too few metapeers.
    None,
    /// LINES over the metapeers, and a plane of slots in each line.
    Lines(Lines),
    /// One line through all metapeers.
    Columns,
}

/// A column of a block: a metapeer and, where the slot is not vacant, its owner.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Column {
    /// The metapeer.
    pub metapeer: usize,
    /// Who sits in the slot.
    pub owner: Option<Node>,
}

/// The lines over the metapeers of one block width.
#[derive(Clone, Debug)]
pub struct Lineup {
    version: Option<u64>,
    shape: Shape,
    modulus: usize,
    fold: u64,
    metapeers: Vec<usize>,
    /// The slot a column's n-th stands for, by metapeer: slot = (n + shift) mod modulus permuted.
    slots: Vec<Vec<u32>>,
    line: Vec<usize>,
}

impl Default for Lineup {
    fn default() -> Self {
        Self {
            version: None,
            shape: Shape::None,
            modulus: 1,
            fold: 0,
            metapeers: Vec::new(),
            slots: Vec::new(),
            line: Vec::new(),
        }
    }
}

impl Lineup {
    /// Brings the lines up to date with the metapeers; cheap when their shape did not change.
    pub fn refresh(&mut self, metapeers: &Metapeers) {
        if self.version == Some(metapeers.version()) {
            return;
        }
        self.version = Some(metapeers.version());
        let (count, f) = (metapeers.len(), metapeers.fragments());
        let slots = metapeers.slots_max();
        (self.shape, self.modulus) = if count < f || slots == 0 {
            (Shape::None, 1)
        } else if slots == 1 {
            (Shape::Lines(Lines::new(count, f, Rule::Modulus)), 1)
        } else if count >= f * f {
            (Shape::Lines(Lines::new(count, f, Rule::Modulus)), slot_modulus(slots, f))
        } else {
            (Shape::Columns, slot_modulus(slots, count))
        };
        self.permute(count, self.fold);
    }

    /// Blocks in a fold; 0 where there are no lines.
    pub fn fold_blocks(&self) -> u64 {
        match &self.shape {
            Shape::None => 0,
            Shape::Lines(lines) => lines.count() * (self.modulus as u64).pow(2),
            Shape::Columns => (self.modulus as u64).pow(2),
        }
    }

    /// The fold of block `number`: within it, two blocks meet in at most one slot.
    pub fn fold_of(&self, number: u64) -> u64 {
        number / self.fold_blocks().max(1)
    }

    /// Whether most lines have no vacant slot, so that it is better to pass over one that has.
    pub fn is_mostly_whole(&self, metapeers: &Metapeers) -> bool {
        let seats = (metapeers.len() * self.modulus).max(1) as f64;
        let occupied: usize = metapeers.iter().map(super::metapeers::Metapeer::occupied).sum();
        (occupied as f64 / seats).powi(metapeers.fragments() as i32) >= 0.5
    }

    /// How many consecutive numbers try every slot of a column once.
    pub fn tries(&self) -> u64 {
        self.modulus as u64
    }

    /// Whether every block goes through all metapeers, to choose among them.
    pub fn is_columns(&self) -> bool {
        matches!(self.shape, Shape::Columns)
    }

    /// Puts the columns of block `number` into `columns`, which is cleared first; false where there
    /// are no lines.
    pub fn columns(
        &mut self,
        metapeers: &Metapeers,
        number: u64,
        columns: &mut Vec<Column>,
    ) -> bool {
        columns.clear();
        let blocks = self.fold_blocks();
        if blocks == 0 {
            return false;
        }
        if number / blocks != self.fold {
            self.fold = number / blocks;
            self.permute(self.metapeers.len(), self.fold);
        }
        let (number, m) = (number % blocks, self.modulus as u64);
        match &self.shape {
            Shape::None => return false,
            Shape::Lines(lines) => {
                let count = lines.count();
                // Lines that follow each other begin with different slots.
                let (squares, i) = (number / count / m * m, number / count + number % count);
                let inner = squares + i % m;
                if !lines.even_line_into(number % count, &mut self.line) {
                    return false;
                }
                for (column, element) in self.line.iter().enumerate() {
                    let metapeer = self.metapeers[*element];
                    columns.push(self.column(metapeers, metapeer, column, inner));
                }
            }
            Shape::Columns => {
                for (column, metapeer) in self.metapeers.iter().enumerate() {
                    columns.push(self.column(metapeers, *metapeer, column, number));
                }
            }
        }
        true
    }

    fn column(&self, metapeers: &Metapeers, metapeer: usize, at: usize, number: u64) -> Column {
        let slot = if self.modulus == 1 {
            0
        } else {
            let slot = slot_at(number, at, self.modulus);
            self.slots.get(metapeer).map_or(slot, |slots| slots[slot] as usize)
        };
        Column { metapeer, owner: metapeers.get(metapeer).occupant(slot) }
    }

    /// The order of metapeers and slots in a fold; in the first everything is in its place.
    fn permute(&mut self, count: usize, fold: u64) {
        self.metapeers = (0..count).collect();
        self.slots = Vec::new();
        if fold == 0 {
            return;
        }
        let mut random = SplitMix::new(fold.wrapping_mul(0xd1b5_4a32_d192_ed03));
        random.shuffle(&mut self.metapeers);
        if self.modulus > 1 {
            let slots = (0..count).map(|_| {
                let mut slots: Vec<u32> = (0..self.modulus as u32).collect();
                random.shuffle(&mut slots);
                slots
            });
            self.slots = slots.collect();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::ProviderId;
    use crate::placement::field::{Field, ProviderFacts};

    /// `sites` labelled sites of `size` each; 0 sites: `size` providers without label.
    fn metapeers(sites: u32, size: u32, fragments: usize) -> Metapeers {
        let mut field = Field::default();
        for number in 0..sites.max(1) * size {
            let site = if sites == 0 { String::new() } else { format!("s{}", number % sites) };
            field.upsert(&ProviderFacts {
                provider: ProviderId(number),
                site,
                address: String::new(),
                capacity_bytes: 1 << 30,
                free_bytes: 1 << 30,
                usable: true,
            });
        }
        Metapeers::new(&field, fragments)
    }

    #[test]
    fn blocks_of_a_fold_meet_at_most_once() {
        for (sites, size, f) in [(0, 60, 5), (4, 4, 4), (7, 5, 5), (30, 2, 5), (3, 20, 6)] {
            let metapeers = metapeers(sites, size, f);
            let mut lineup = Lineup::default();
            lineup.refresh(&metapeers);
            let blocks = lineup.fold_blocks();
            assert!(blocks > 0, "{sites} sites of {size}");
            for fold in [0, 1] {
                let mut met = std::collections::HashSet::new();
                let mut columns = Vec::new();
                for number in fold * blocks..(fold + 1) * blocks {
                    assert!(lineup.columns(&metapeers, number, &mut columns));
                    let owners: Vec<Node> = columns.iter().filter_map(|c| c.owner).collect();
                    for (at, one) in owners.iter().enumerate() {
                        for other in &owners[at + 1..] {
                            assert!(met.insert((one.min(other).index(), one.max(other).index())));
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn too_few_metapeers_have_no_lines() {
        let metapeers = metapeers(0, 4, 5);
        let mut lineup = Lineup::default();
        lineup.refresh(&metapeers);
        assert!(!lineup.columns(&metapeers, 0, &mut Vec::new()));
    }
}
