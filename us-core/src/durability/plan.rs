//! Which code, and how lazy a repair, a swarm needs: the planner.
//!
//! The model is a birth-death chain of one block's durable fragments. Each holder dies at rate
//! 1/MTTF. When s + r0 are left the repair begins; it takes a time of mean `repair` (the clock that
//! declares the dead, mostly), exponentially distributed, and makes all that is lacking again. The
//! block is lost when fewer than s are left before that. Being *unreadable* is something else: the
//! fragments exist, but too many of their holders are off at the moment.
//!
//! A repair of m lost fragments moves s + m - 1: one rebuilder takes s and hands on the others.
//!
//! Source: PLACEMENT figures of the Us papers (GP2PC 2005), reproduced by the tests.

use super::loss_probability;
use crate::geometry::{Code, FRAGMENTS_MAX};

/// What is known of the swarm.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Churn {
    /// Mean time to the death of a provider, in years.
    pub mttf_years: f64,
    /// Mean time from the loss that begins a repair to its end, in years.
    pub repair_years: f64,
    /// The share of the time a provider is online.
    pub presence: f64,
}

/// What a code with a laziness costs and gives.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Outlook {
    /// The code.
    pub code: Code,
    /// Repair begins when s + r0 fragments are left; r - 1 is eager.
    pub r0: usize,
    /// Probability that a block is lost in a year.
    pub loss_a_year: f64,
    /// Probability that a block cannot be read at a moment.
    pub unreadable: f64,
    /// Fragments moved for a block in a year.
    pub fragments_a_year: f64,
    /// The same in blocks' worth of data: fragments divided by s.
    pub traffic_a_year: f64,
}

impl Outlook {
    /// Stored bytes for each byte of data.
    pub fn space(&self) -> f64 {
        self.code.fragments() as f64 / self.code.s() as f64
    }
}

/// Why there is no outlook, or no plan.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
pub enum PlanError {
    /// The laziness leaves nothing to repair from.
    #[error("r0 = {r0} makes no sense with {r} parity fragments: it is at most r - 1")]
    Laziness {
        /// As asked for.
        r0: usize,
        /// Parity fragments.
        r: usize,
    },
    /// A number is out of its range.
    #[error("{what} must be {range}")]
    Range {
        /// Which.
        what: &'static str,
        /// What it can be.
        range: &'static str,
    },
    /// No code of so many fragments reaches the target.
    #[error(
        "no code of at most {fragments_max} fragments reaches this: more providers, a higher \
         presence or a faster repair are needed"
    )]
    Unreachable {
        /// The most fragments a block may have.
        fragments_max: usize,
    },
}

impl Churn {
    fn check(&self) -> Result<(), PlanError> {
        let positive = |value: f64| value.is_finite() && value > 0.0;
        let range = "more than 0";
        if !positive(self.mttf_years) {
            return Err(PlanError::Range { what: "the mean time to failure", range });
        }
        if !positive(self.repair_years) {
            return Err(PlanError::Range { what: "the time of a repair", range });
        }
        if !(self.presence > 0.0 && self.presence <= 1.0) {
            let range = "more than 0 and at most 1";
            return Err(PlanError::Range { what: "the presence", range });
        }
        Ok(())
    }

    /// What `code` with laziness `r0` costs and gives in such a swarm.
    ///
    /// # Errors
    /// [`PlanError`] when `r0` is r or more, or the churn is out of range.
    pub fn outlook(&self, code: Code, r0: usize) -> Result<Outlook, PlanError> {
        self.check()?;
        let (s, r, f) = (code.s(), code.r(), code.fragments());
        if r == 0 {
            let loss_a_year = 1.0 - (-(s as f64) / self.mttf_years).exp();
            let unreadable = loss_probability(s, &vec![self.presence; s]);
            let none = 0.0;
            let (fragments_a_year, traffic_a_year) = (none, none);
            return Ok(Outlook {
                code,
                r0: 0,
                loss_a_year,
                unreadable,
                fragments_a_year,
                traffic_a_year,
            });
        }
        if r0 >= r {
            return Err(PlanError::Laziness { r0, r });
        }
        let (death, repair) = (1.0 / self.mttf_years, 1.0 / self.repair_years);
        // Time spent with n fragments left, in one cycle from whole to whole.
        let falling = (s + r0 + 1..=f).map(|left| (left, 1.0 / (left as f64 * death)));
        let mut cycle_years: f64 = falling.clone().map(|(_, years)| years).sum();
        let mut unreadable: f64 =
            falling.map(|(left, years)| years * self.unreadable(s, left)).sum();
        // From s + r0 on the repair races with further deaths.
        let (mut reached, mut moved) = (1.0, 0.0);
        for left in (s..=s + r0).rev() {
            let rate = left as f64 * death + repair;
            cycle_years += reached / rate;
            unreadable += reached / rate * self.unreadable(s, left);
            let repaired = reached * repair / rate;
            moved += repaired * (s + (f - left) - 1) as f64;
            reached *= left as f64 * death / rate;
        }
        let cycles = 1.0 / cycle_years;
        let fragments_a_year = moved * cycles;
        Ok(Outlook {
            code,
            r0,
            loss_a_year: (reached * cycles).min(1.0),
            unreadable: (unreadable * cycles).min(1.0),
            fragments_a_year,
            traffic_a_year: fragments_a_year / s as f64,
        })
    }

    /// The probability that fewer than s of `left` holders are online.
    fn unreadable(&self, s: usize, left: usize) -> f64 {
        loss_probability(s, &vec![self.presence; left])
    }

    /// The codes and lazinesses that reach the target, for each s the one with the least parity and,
    /// of its lazinesses, the laziest; the least space first.
    ///
    /// # Errors
    /// [`PlanError::Unreachable`] when there is none of at most `fragments_max` fragments.
    pub fn plan(&self, target: &Target, fragments_max: usize) -> Result<Vec<Outlook>, PlanError> {
        self.check()?;
        let fragments_max = fragments_max.min(FRAGMENTS_MAX);
        let mut plans = Vec::new();
        for s in 1..fragments_max {
            if let Some(plan) = self.least_parity(s, target, fragments_max) {
                plans.push(plan);
            }
        }
        plans.sort_by(|left, right| {
            let traffic = left.traffic_a_year.total_cmp(&right.traffic_a_year);
            left.space().total_cmp(&right.space()).then(traffic)
        });
        if plans.is_empty() { Err(PlanError::Unreachable { fragments_max }) } else { Ok(plans) }
    }

    fn least_parity(&self, s: usize, target: &Target, fragments_max: usize) -> Option<Outlook> {
        for r in 1..=fragments_max - s {
            let code = Code::new(s, r).ok()?;
            // The laziest that will do: all outlooks get worse with laziness.
            let reached = |r0: &usize| {
                self.outlook(code, *r0).is_ok_and(|outlook| target.is_reached(&outlook))
            };
            if let Some(r0) = (0..r).find(reached) {
                return self.outlook(code, r0).ok();
            }
        }
        None
    }
}

/// What is wanted of a block.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Target {
    /// The most that the probability of its loss in a year may be.
    pub loss_a_year: f64,
    /// The most that the probability of its being unreadable at a moment may be.
    pub unreadable: f64,
}

impl Target {
    fn is_reached(&self, outlook: &Outlook) -> bool {
        outlook.loss_a_year <= self.loss_a_year && outlook.unreadable <= self.unreadable
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const YEAR: Churn = Churn { mttf_years: 1.0, repair_years: 1.0 / 365.0, presence: 1.0 };

    fn outlook(s: usize, r: usize, r0: usize) -> Outlook {
        YEAR.outlook(Code::new(s, r).unwrap(), r0).unwrap()
    }

    /// The figures of the slides, to the digits they have.
    #[test]
    fn laziness_costs_what_the_slides_say() {
        let table = [(16, 15, 14, 460.0, 8e-18), (16, 15, 8, 87.0, 1e-11), (16, 15, 4, 60.0, 5e-7)];
        for (s, r, r0, traffic, loss) in table {
            let found = outlook(s, r, r0);
            assert!((found.fragments_a_year / traffic - 1.0).abs() < 0.02, "{found:?}");
            assert!((found.loss_a_year / loss - 1.0).abs() < 0.1, "{found:?}");
        }
        let (eager, lazy) = (outlook(4, 3, 2).loss_a_year, outlook(4, 3, 1).loss_a_year);
        assert!(eager > 1.5e-5 && eager < 2.5e-5, "{eager}");
        assert!(lazy > 4e-4 && lazy < 5.5e-4, "{lazy}");
    }

    /// The chain, event by event.
    fn walk(churn: Churn, code: Code, r0: usize, years: f64, seed: u64) -> (f64, f64) {
        use rand::prelude::*;
        let mut random = rand::rngs::StdRng::seed_from_u64(seed);
        let mut draw = |rate: f64| -(1.0 - random.random::<f64>()).ln() / rate;
        let (mut left, mut at, mut losses, mut moved) = (code.fragments(), 0.0, 0.0, 0.0);
        while at < years {
            let death = draw(left as f64 / churn.mttf_years);
            let repairing = left <= code.s() + r0;
            let repair = if repairing { draw(1.0 / churn.repair_years) } else { f64::INFINITY };
            at += death.min(repair);
            if repair < death {
                moved += (code.s() + code.fragments() - left - 1) as f64;
                left = code.fragments();
            } else {
                left -= 1;
            }
            if left < code.s() {
                losses += 1.0;
                left = code.fragments();
            }
        }
        (losses / years, moved / years)
    }

    #[test]
    fn the_formulas_agree_with_a_walk_of_the_chain() {
        // A swarm so bad that losses are seen.
        let churn = Churn { mttf_years: 0.1, repair_years: 0.03, presence: 1.0 };
        for (s, r, r0) in [(4, 2, 1), (4, 2, 0), (3, 5, 2), (6, 3, 2)] {
            let code = Code::new(s, r).unwrap();
            let found = churn.outlook(code, r0).unwrap();
            let (losses, moved) = walk(churn, code, r0, 20_000.0, 7);
            // In the walk a lost block begins anew: its rate is the formula's before the cap.
            let close = |left: f64, right: f64| (left / right - 1.0).abs() < 0.05;
            assert!(close(moved, found.fragments_a_year), "{found:?} {moved}");
            assert!(losses > 1.0 || close(losses, found.loss_a_year), "{found:?} {losses}");
        }
    }

    #[test]
    fn a_plan_reaches_its_target_with_the_least_parity() {
        let churn = Churn { presence: 0.6, ..YEAR };
        let target = Target { loss_a_year: 1e-6, unreadable: 1e-3 };
        let plans = churn.plan(&target, 40).unwrap();
        for plan in &plans {
            assert!(target.is_reached(plan));
            let (s, r) = (plan.code.s(), plan.code.r());
            let less = Code::new(s, r - 1).unwrap();
            let eager = r.checked_sub(2).map(|r0| churn.outlook(less, r0).unwrap());
            assert!(eager.is_none_or(|outlook| !target.is_reached(&outlook)), "{plan:?}");
        }
        assert!(plans.windows(2).all(|pair| pair[0].space() <= pair[1].space()));
        let hopeless = Churn { presence: 0.01, ..YEAR };
        assert_eq!(hopeless.plan(&target, 10), Err(PlanError::Unreachable { fragments_max: 10 }));
        assert!(YEAR.outlook(Code::new(4, 2).unwrap(), 2).is_err());
    }
}
