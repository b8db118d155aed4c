//! Who sends what when blocks are rebuilt: any s of a block's live holders will do, and which s
//! decides how long the busiest uplink is busy.
//!
//! [`assign`] gives each block the s holders that are least loaded at that moment, then moves sends
//! from the busiest provider towards idle ones, through other blocks where need be, until no such
//! move lowers the busiest. With equal uplinks what remains is the optimum: a load that cannot be
//! lowered along any chain of moves is minimal (the augmenting paths of bipartite semi-matchings;
//! Harvey, Ladner, Lovász, Tamir 2006).
//!
//! The *rotated star* cuts each block into slices and treats each as a block of its own, so that all
//! live holders share the sending: [`rotated_star`].
//!
//! Invariants: a block's helpers are distinct and are holders of it; a block with fewer than s live
//! holders gets none. Pure; nothing here fails.

use std::collections::VecDeque;

/// Moves tried at most, as a multiple of the sends: a guard, never reached by equal uplinks.
const MOVES_PER_SEND_MAX: usize = 8;

/// Providers that can send, by index.
#[derive(Clone, Debug, PartialEq)]
pub struct Senders {
    /// Fragments each has to send already.
    pub queued: Vec<f64>,
    /// Uplinks, in any one unit (fragments a second, say). One of 0 or less sends only if it must.
    pub uplinks: Vec<f64>,
}

impl Senders {
    /// Idle senders of equal uplinks.
    pub fn equal(count: usize) -> Self {
        Self { queued: vec![0.0; count], uplinks: vec![1.0; count] }
    }
}

/// A block (or slice) to be rebuilt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rebuild {
    /// Its live holders, as indexes of senders, each once.
    pub holders: Vec<usize>,
    /// How many of them must send.
    pub needed: usize,
}

/// Who sends.
#[derive(Clone, Debug, PartialEq)]
pub struct Assignment {
    /// For each rebuild its helpers; empty where there are too few live holders.
    pub helpers: Vec<Vec<usize>>,
    /// When each sender is done: what it has to send over its uplink.
    pub loads: Vec<f64>,
}

impl Assignment {
    /// When the last sender is done.
    pub fn busiest(&self) -> f64 {
        self.loads.iter().copied().fold(0.0, f64::max)
    }
}

/// The uplink of a sender that has none: it comes last, and still not never.
const NO_UPLINK: f64 = 1e-9;

struct Plan<'p> {
    rebuilds: &'p [Rebuild],
    /// Fragments to send, by sender.
    sends: Vec<f64>,
    uplinks: Vec<f64>,
    unit: f64,
    /// For each rebuild, which of its holders send.
    active: Vec<Vec<bool>>,
    /// The rebuilds a sender holds something of, and where it stands among the holders.
    held: Vec<Vec<(usize, usize)>>,
}

impl Plan<'_> {
    fn load(&self, sender: usize) -> f64 {
        self.sends[sender] / self.uplinks[sender]
    }

    fn load_with_one_more(&self, sender: usize) -> f64 {
        (self.sends[sender] + self.unit) / self.uplinks[sender]
    }

    /// Gives each rebuild its least loaded holders.
    fn start(&mut self) {
        for (at, rebuild) in self.rebuilds.iter().enumerate() {
            if rebuild.holders.len() < rebuild.needed {
                continue;
            }
            let mut order: Vec<usize> = (0..rebuild.holders.len()).collect();
            let load = |seat: &usize| self.load_with_one_more(rebuild.holders[*seat]);
            order.sort_by(|one, other| load(one).total_cmp(&load(other)));
            for seat in &order[..rebuild.needed] {
                self.active[at][*seat] = true;
                self.sends[rebuild.holders[*seat]] += self.unit;
            }
        }
    }

    /// Moves one send off `busiest`, along the shortest chain of rebuilds to a sender that stays
    /// below the load of `busiest`; false where there is none.
    fn relieve(&mut self, busiest: usize) -> bool {
        let high = self.load(busiest);
        // How the search came to a sender: from whom, by which rebuild, the seats of both.
        let mut from: Vec<Option<(usize, usize, usize, usize)>> = vec![None; self.sends.len()];
        let mut queue = VecDeque::from([busiest]);
        let mut end = None;
        'search: while let Some(sender) = queue.pop_front() {
            for (rebuild, seat) in &self.held[sender] {
                if !self.active[*rebuild][*seat] {
                    continue;
                }
                for (other_seat, other) in self.rebuilds[*rebuild].holders.iter().enumerate() {
                    let seen = *other == busiest || from[*other].is_some();
                    if seen || self.active[*rebuild][other_seat] {
                        continue;
                    }
                    from[*other] = Some((sender, *rebuild, *seat, other_seat));
                    if self.load_with_one_more(*other) < high * (1.0 - 1e-9) {
                        end = Some(*other);
                        break 'search;
                    }
                    queue.push_back(*other);
                }
            }
        }
        let Some(end) = end else { return false };
        let mut at = end;
        self.sends[end] += self.unit;
        while let Some((sender, rebuild, seat, other_seat)) = from[at] {
            self.active[rebuild][seat] = false;
            self.active[rebuild][other_seat] = true;
            at = sender;
        }
        self.sends[at] -= self.unit;
        true
    }

    fn balance(&mut self) {
        let sends: usize = self.rebuilds.iter().map(|rebuild| rebuild.needed).sum();
        for _ in 0..MOVES_PER_SEND_MAX * sends {
            let busy = (0..self.sends.len()).filter(|sender| {
                self.held[*sender].iter().any(|(rebuild, seat)| self.active[*rebuild][*seat])
            });
            let busiest = busy.max_by(|one, other| self.load(*one).total_cmp(&self.load(*other)));
            if !busiest.is_some_and(|busiest| self.relieve(busiest)) {
                return;
            }
        }
    }
}

/// Chooses the helpers of all rebuilds; each send is `unit` fragments.
fn assign_units(senders: &Senders, rebuilds: &[Rebuild], unit: f64) -> Assignment {
    let mut held = vec![Vec::new(); senders.queued.len()];
    for (at, rebuild) in rebuilds.iter().enumerate() {
        for (seat, holder) in rebuild.holders.iter().enumerate() {
            held[*holder].push((at, seat));
        }
    }
    let mut plan = Plan {
        rebuilds,
        sends: senders.queued.clone(),
        uplinks: senders.uplinks.iter().map(|uplink| uplink.max(NO_UPLINK)).collect(),
        unit,
        active: rebuilds.iter().map(|rebuild| vec![false; rebuild.holders.len()]).collect(),
        held,
    };
    plan.start();
    plan.balance();
    let chosen = rebuilds.iter().zip(&plan.active).map(|(rebuild, active)| {
        let sending = rebuild.holders.iter().zip(active).filter(|(_, active)| **active);
        sending.map(|(holder, _)| *holder).collect()
    });
    let helpers = chosen.collect();
    let loads = (0..plan.sends.len()).map(|sender| plan.load(sender)).collect();
    Assignment { helpers, loads }
}

/// Chooses the helpers of all rebuilds: a star, each helper sending its whole fragment.
///
/// # Panics
/// When a holder is no index of `senders`, or its two lists differ in length.
pub fn assign(senders: &Senders, rebuilds: &[Rebuild]) -> Assignment {
    assert_eq!(senders.queued.len(), senders.uplinks.len(), "one uplink a sender");
    assign_units(senders, rebuilds, 1.0)
}

/// Chooses the helpers of each of `slices` slices of every rebuild: entry b · slices + t is slice t of
/// rebuild b. As many slices as live holders let each send s / (f − 1) of a fragment.
///
/// # Panics
/// As [`assign`]; and when `slices` is 0.
pub fn rotated_star(senders: &Senders, rebuilds: &[Rebuild], slices: usize) -> Assignment {
    assert!(slices > 0, "a fragment has slices");
    assert_eq!(senders.queued.len(), senders.uplinks.len(), "one uplink a sender");
    let sliced: Vec<Rebuild> =
        rebuilds.iter().flat_map(|rebuild| std::iter::repeat_n(rebuild, slices)).cloned().collect();
    assign_units(senders, &sliced, 1.0 / slices as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The least busiest load over all assignments, by trying every one.
    fn optimum(rebuilds: &[Rebuild], sends: &mut Vec<f64>, uplinks: &[f64]) -> f64 {
        let Some((rebuild, rest)) = rebuilds.split_first() else {
            let loads = sends.iter().zip(uplinks).map(|(sends, uplink)| sends / uplink);
            return loads.fold(0.0, f64::max);
        };
        let holders = &rebuild.holders;
        let mut best = f64::INFINITY;
        for set in 0u32..1 << holders.len() {
            if set.count_ones() as usize != rebuild.needed {
                continue;
            }
            let chosen = || (0..holders.len()).filter(|seat| set >> seat & 1 == 1);
            chosen().for_each(|seat| sends[holders[seat]] += 1.0);
            best = best.min(optimum(rest, sends, uplinks));
            chosen().for_each(|seat| sends[holders[seat]] -= 1.0);
        }
        best
    }

    fn rebuilds() -> impl Strategy<Value = Vec<Rebuild>> {
        let holders = proptest::sample::subsequence((0..7).collect::<Vec<usize>>(), 1..6);
        let rebuild = (holders, 0usize..6).prop_map(|(holders, needed)| {
            let needed = 1 + needed % holders.len();
            Rebuild { holders, needed }
        });
        proptest::collection::vec(rebuild, 1..6)
    }

    proptest! {
        #[test]
        fn equal_uplinks_are_used_optimally(
            rebuilds in rebuilds(), queued in proptest::collection::vec(0u8..4, 7),
        ) {
            let queued: Vec<f64> = queued.into_iter().map(f64::from).collect();
            let senders = Senders { queued: queued.clone(), uplinks: vec![1.0; 7] };
            let assignment = assign(&senders, &rebuilds);
            for (rebuild, helpers) in rebuilds.iter().zip(&assignment.helpers) {
                prop_assert_eq!(helpers.len(), rebuild.needed);
                prop_assert!(helpers.iter().all(|helper| rebuild.holders.contains(helper)));
            }
            let best = optimum(&rebuilds, &mut queued.clone(), &[1.0; 7]);
            prop_assert_eq!(assignment.busiest(), best);
        }

        #[test]
        fn unequal_uplinks_cost_at_most_one_fragment_more(
            rebuilds in rebuilds(), uplinks in proptest::collection::vec(1u8..5, 7),
        ) {
            let uplinks: Vec<f64> = uplinks.into_iter().map(f64::from).collect();
            let senders = Senders { queued: vec![0.0; 7], uplinks: uplinks.clone() };
            let assignment = assign(&senders, &rebuilds);
            let best = optimum(&rebuilds, &mut vec![0.0; 7], &uplinks);
            prop_assert!(assignment.busiest() <= best + 1.0);
        }
    }

    #[test]
    fn a_block_with_too_few_holders_has_no_helpers() {
        let rebuild = Rebuild { holders: vec![0, 1], needed: 3 };
        assert_eq!(assign(&Senders::equal(2), &[rebuild]).helpers, [Vec::<usize>::new()]);
    }

    #[test]
    fn a_rotated_star_halves_the_uplink_time() {
        // f = 31, s = 16: 30 live holders, each sends 16/30 of a fragment.
        let rebuild = Rebuild { holders: (0..30).collect(), needed: 16 };
        let senders = Senders::equal(30);
        assert_eq!(assign(&senders, std::slice::from_ref(&rebuild)).busiest(), 1.0);
        let rotated = rotated_star(&senders, &[rebuild], 30);
        assert!((rotated.busiest() - 16.0 / 30.0).abs() < 1e-9);
        assert!(rotated.helpers.iter().all(|helpers| helpers.len() == 16));
    }
}
