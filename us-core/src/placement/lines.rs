//! Pseudo-affine lines: a large family of f-subsets of 0..N, two meeting in at most one element
//! (Randriamaro, Soyez, Utard, Wlazinski, GP2PC 2005).
//!
//! ```text
//! LINES(S, f):  n = |S|; stop if n < f;  m = the rule's modulus, at most n / f
//!   no m: floor(n / f) disjoint lines of consecutive elements
//!   S = | C_0: m | C_1: m | ... | C_(f-1): m | rest |
//!   m² lines { C_0[a] } ∪ { C_j[(i + (j-1) a) mod m] : j = 1..f-1 },   a, i in 0..m
//!   then LINES(C_j, f) for every j, then LINES(rest, f)
//! ```
//! Nothing is materialised. Every C_j has the same length, so the recursion is described by one
//! entry for each *length* that occurs (a few dozen); finding line k walks one path through it.
//!
//! Inside a line of metapeers, [`slot_at`] says which slot each column gives to the n-th block.
//!
//! Invariants: two lines share at most one element; below f² elements the family collapses to
//! disjoint groups, which is why the choosers do not use it there. Nothing here fails.

use std::collections::BTreeMap;

/// Which moduli the lines may use.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Rule {
    /// The greatest prime p with f ≤ p ≤ n / f: the rule of the published tables.
    Slide,
    /// The greatest m ≤ n / f whose least prime factor is at least f − 1: never fewer lines.
    Modulus,
}

/// How a set of one length is cut.
#[derive(Clone, Copy, Debug)]
struct Cut {
    /// 0: disjoint lines of consecutive elements.
    modulus: usize,
    /// Lines in all, recursion included.
    lines: u64,
}

/// The family of lines over 0..N.
#[derive(Clone, Debug)]
pub struct Lines {
    elements: usize,
    fragments: usize,
    cuts: BTreeMap<usize, Cut>,
}

fn least_prime_factor(number: usize) -> usize {
    let root = number.isqrt();
    (2..=root).find(|divisor| number.is_multiple_of(*divisor)).unwrap_or(number)
}

fn is_prime(number: usize) -> bool {
    number >= 2 && least_prime_factor(number) == number
}

/// The least prime that is at least `floor`.
pub fn prime_at_least(floor: usize) -> usize {
    (floor.max(2)..).find(|number| is_prime(*number)).expect("there is always a greater prime")
}

fn modulus(elements: usize, fragments: usize, rule: Rule) -> usize {
    if fragments < 2 {
        return 0;
    }
    let admissible = |m: &usize| match rule {
        Rule::Slide => is_prime(*m) && *m >= fragments,
        Rule::Modulus => least_prime_factor(*m) >= (fragments - 1).max(2),
    };
    (2..=elements / fragments).rev().find(admissible).unwrap_or(0)
}

impl Lines {
    /// The lines of `fragments` elements each over 0..`elements`.
    ///
    /// # Panics
    /// When `fragments` is 0.
    pub fn new(elements: usize, fragments: usize, rule: Rule) -> Self {
        assert!(fragments > 0, "a line has elements");
        let mut lines = Self { elements, fragments, cuts: BTreeMap::new() };
        lines.cut(elements, rule);
        lines
    }

    /// Describes the sets of one length; returns their lines.
    fn cut(&mut self, elements: usize, rule: Rule) -> u64 {
        if elements < self.fragments {
            return 0;
        }
        if let Some(cut) = self.cuts.get(&elements) {
            return cut.lines;
        }
        let modulus = modulus(elements, self.fragments, rule);
        let lines = if modulus == 0 {
            (elements / self.fragments) as u64
        } else {
            let columns = self.fragments as u64 * self.cut(modulus, rule);
            let rest = self.cut(elements - self.fragments * modulus, rule);
            (modulus as u64).pow(2) + columns + rest
        };
        self.cuts.insert(elements, Cut { modulus, lines });
        lines
    }

    fn lines_of(&self, elements: usize) -> u64 {
        self.cuts.get(&elements).map_or(0, |cut| cut.lines)
    }

    /// Elements N.
    pub fn elements(&self) -> usize {
        self.elements
    }

    /// Elements a line, f.
    pub fn fragments(&self) -> usize {
        self.fragments
    }

    /// Lines in all.
    pub fn count(&self) -> u64 {
        self.lines_of(self.elements)
    }

    /// Line `k`: f ascending elements of 0..N; `None` from [`Lines::count`] on.
    pub fn line(&self, k: u64) -> Option<Vec<usize>> {
        let mut line = Vec::with_capacity(self.fragments);
        self.find(k, false, &mut line).then_some(line)
    }

    /// Puts the `k`-th of the same lines in another order into `line`, which is cleared first; false
    /// when there is no such line. Lines that follow each other are disjoint, m at a time (for a
    /// prime m ≥ f, and about so for others), so that a family used in part is used evenly.
    pub fn even_line_into(&self, k: u64, line: &mut Vec<usize>) -> bool {
        self.find(k, true, line)
    }

    fn find(&self, mut k: u64, even: bool, line: &mut Vec<usize>) -> bool {
        line.clear();
        let (mut start, mut elements) = (0, self.elements);
        loop {
            let Some(cut) = self.cuts.get(&elements).filter(|cut| k < cut.lines) else {
                return false;
            };
            let modulus = cut.modulus;
            if modulus == 0 {
                let first = start + k as usize * self.fragments;
                line.extend(first..first + self.fragments);
                return true;
            }
            let squares = (modulus as u64).pow(2);
            if k < squares {
                let (high, low) = (k as usize / modulus, k as usize % modulus);
                // For one `high` after the other, a runs and i with it: no column meets twice.
                let (a, i) = if even { (low, (low + high) % modulus) } else { (high, low) };
                line.push(start + a);
                let others = 1..self.fragments;
                line.extend(others.map(|j| start + j * modulus + (i + (j - 1) * a) % modulus));
                return true;
            }
            k -= squares;
            let column_lines = self.lines_of(modulus);
            let columns = self.fragments as u64 * column_lines;
            if k < columns {
                let f = self.fragments as u64;
                let (column, at) =
                    if even { (k % f, k / f) } else { (k / column_lines, k % column_lines) };
                start += column as usize * modulus;
                (k, elements) = (at, modulus);
            } else {
                start += self.fragments * modulus;
                (k, elements) = (k - columns, elements - self.fragments * modulus);
            }
        }
    }

    /// All lines, in order.
    pub fn iter(&self) -> impl Iterator<Item = Vec<usize>> {
        (0..self.count()).map_while(|k| self.line(k))
    }
}

/// An upper bound on the lines of any such family: Schönheim's and Johnson's
/// ⌊N/f · ⌊(N−1)/(f−1)⌋⌋ and, below f² elements, the tighter ⌊N(f−1)/(f²−N)⌋.
pub fn lines_bound(elements: usize, fragments: usize) -> u64 {
    let (n, f) = (elements as u64, fragments as u64);
    if f == 0 || n < f {
        return 0;
    }
    if f == 1 {
        return n;
    }
    let johnson = n * ((n - 1) / (f - 1)) / f;
    if n < f * f { johnson.min(n * (f - 1) / (f * f - n)) } else { johnson }
}

/// The modulus for the slots of `columns` metapeers with at most `slots` slots each: a prime that is
/// at least both.
pub fn slot_modulus(slots: usize, columns: usize) -> usize {
    prime_at_least(slots.max(columns))
}

/// The slot that `column` gives to the `number`-th block of a line: (i + a · column) mod `modulus`
/// with a = number div modulus, i = number mod modulus. With a prime modulus and columns below it,
/// any two of modulus² numbers agree in at most one column.
pub fn slot_at(number: u64, column: usize, modulus: usize) -> usize {
    let (number, modulus) = (number as usize, modulus);
    let a = number / modulus % modulus;
    (number % modulus + a * column) % modulus
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The recursion as it is written down, on explicit sets.
    fn naive(set: &[usize], f: usize, rule: Rule, lines: &mut Vec<Vec<usize>>) {
        if set.len() < f {
            return;
        }
        let m = modulus(set.len(), f, rule);
        if m == 0 {
            lines.extend(set.chunks_exact(f).map(<[usize]>::to_vec));
            return;
        }
        let column = |j: usize| &set[j * m..(j + 1) * m];
        for a in 0..m {
            for i in 0..m {
                let others = (1..f).map(|j| column(j)[(i + (j - 1) * a) % m]);
                lines.push(std::iter::once(column(0)[a]).chain(others).collect());
            }
        }
        (0..f).for_each(|j| naive(column(j), f, rule, lines));
        naive(&set[f * m..], f, rule, lines);
    }

    /// Two lines share two elements exactly if some pair lies in both.
    fn check_meetings(lines: &Lines) {
        let n = lines.elements();
        let mut met = vec![false; n * n];
        for line in lines.iter() {
            assert!(line.is_sorted_by(|left, right| left < right) && line[line.len() - 1] < n);
            for (at, low) in line.iter().enumerate() {
                for high in &line[at + 1..] {
                    let pair = &mut met[low * n + high];
                    assert!(!std::mem::replace(pair, true), "{low} and {high} meet twice");
                }
            }
        }
    }

    #[test]
    fn two_lines_meet_at_most_once() {
        for f in 1..=12 {
            for n in (0..150).chain([169, 210, 256, 289]) {
                for rule in [Rule::Slide, Rule::Modulus] {
                    let lines = Lines::new(n, f, rule);
                    check_meetings(&lines);
                    assert!(lines.count() <= lines_bound(n, f), "f={f} N={n}");
                    assert_eq!(lines.line(lines.count()), None);
                }
            }
        }
    }

    #[test]
    fn lines_are_those_of_the_recursion() {
        for (f, n) in [(1, 7), (2, 9), (3, 40), (4, 61), (5, 125), (5, 137), (7, 200)] {
            for rule in [Rule::Slide, Rule::Modulus] {
                let mut expected = Vec::new();
                naive(&(0..n).collect::<Vec<_>>(), f, rule, &mut expected);
                assert_eq!(Lines::new(n, f, rule).iter().collect::<Vec<_>>(), expected);
            }
        }
    }

    #[test]
    fn the_even_order_has_the_same_lines_and_uses_all_evenly() {
        for (f, n) in [(1, 7), (3, 40), (5, 125), (5, 137), (7, 200), (7, 343)] {
            let lines = Lines::new(n, f, Rule::Modulus);
            let (mut all, mut line) = (Vec::new(), Vec::new());
            let mut used = vec![0usize; n];
            for k in 0..lines.count() {
                assert!(lines.even_line_into(k, &mut line));
                all.push(line.clone());
                line.iter().for_each(|element| used[*element] += 1);
                let in_family = &used[..n / f * f];
                if f > 1 && n == 343 && k < 49 * 49 {
                    let (most, least) = (in_family.iter().max(), in_family.iter().min());
                    assert!(most.unwrap() - least.unwrap() <= 1);
                }
            }
            assert!(!lines.even_line_into(lines.count(), &mut line));
            all.sort_unstable();
            let mut printed: Vec<Vec<usize>> = lines.iter().collect();
            printed.sort_unstable();
            assert_eq!(all, printed);
        }
    }

    #[test]
    fn the_printed_table() {
        let lines = Lines::new(40, 5, Rule::Slide);
        let from_one = |k| -> Vec<usize> {
            lines.line(k).unwrap().iter().map(|element| element + 1).collect()
        };
        assert_eq!(from_one(0), [1, 8, 15, 22, 29]);
        assert_eq!(from_one(1), [1, 9, 16, 23, 30]);
        assert_eq!(from_one(7), [2, 8, 16, 24, 32]);
        assert_eq!(from_one(2 * 7 + 6), [3, 14, 16, 25, 34]);
    }

    #[test]
    fn the_published_counts() {
        for (f, n, slide, modulus, bound) in [
            (5, 25, 30, 30, 30),
            (5, 40, 55, 55, 72),
            (5, 125, 551, 775, 775),
            (5, 1000, 47_807, 47_807, 49_800),
            (7, 49, 56, 56, 56),
            (7, 343, 2253, 2793, 2793),
            (7, 2058, 97_862, 97_862, 100_548),
            (31, 961, 992, 992, 992),
            (31, 1000, 993, 993, 1064),
        ] {
            assert_eq!(Lines::new(n, f, Rule::Slide).count(), slide, "slide f={f} N={n}");
            assert_eq!(Lines::new(n, f, Rule::Modulus).count(), modulus, "modulus f={f} N={n}");
            assert_eq!(lines_bound(n, f), bound, "bound f={f} N={n}");
        }
    }

    #[test]
    fn blocks_of_a_line_share_at_most_one_slot() {
        for (slots, columns) in [(1, 4), (3, 5), (7, 7), (8, 3), (11, 11)] {
            let modulus = slot_modulus(slots, columns);
            let all: Vec<Vec<usize>> = (0..(modulus * modulus) as u64)
                .map(|number| (0..columns).map(|j| slot_at(number, j, modulus)).collect())
                .collect();
            for (at, one) in all.iter().enumerate() {
                for other in &all[at + 1..] {
                    let shared = one.iter().zip(other).filter(|(left, right)| left == right);
                    assert!(shared.count() <= 1);
                }
            }
        }
    }
}
