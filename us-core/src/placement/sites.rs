//! How many fragments of a block each site gets.
//!
//! The rule counts with two or more labelled sites: then one site holds at most
//! q = max(1, r − w) fragments of a block, fewer where fewer still use the sites' space evenly (1
//! where there are sites enough). What a site should get of a block on the average is its share of
//! the free space, cut off at q; what it did not get is owed to it as credit for the next blocks.
//!
//! Invariants: quotas add up to f where the usable providers allow it; no quota passes the limit; the
//! limit is the least that all f fragments allow where q itself does not. Nothing here fails.

use std::collections::HashMap;

use super::draw::SplitMix;
use super::field::{Field, PlaceId};
use crate::geometry::Code;

/// Of the fragments this share may go to other sites than space alone would choose, to keep more of
/// a block out of one site.
const UNEVEN_MAX: f64 = 0.02;

/// What the sites of a swarm allow a block.
#[derive(Clone, Debug, PartialEq)]
pub struct SiteRule {
    /// The most fragments one site should hold, q; `None` where the rule does not count.
    pub fragments_max: Option<usize>,
    /// The most it will hold: more than q only where the sites are too few or too small.
    pub limit: usize,
    /// Each place that can take fragments: the most of them, and how many on the average.
    pub targets: Vec<Target>,
}

/// What one place is to get.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Target {
    /// The place.
    pub place: PlaceId,
    /// The most fragments of one block.
    pub most: usize,
    /// Its part of the free space, in fragments a block.
    pub mean: f64,
}

/// The q of a code: the most fragments of one block that a whole site may take with it.
pub fn site_fragments_max(code: Code) -> usize {
    code.r().saturating_sub(code.write_margin()).max(1)
}

/// Shares `fragments` out in proportion to weight, no place above its most.
fn fill(targets: &mut [Target], weights: &[u64], fragments: usize) -> f64 {
    let (mut left, mut free) = (fragments as f64, 0.0);
    weights.iter().for_each(|weight| free += *weight as f64);
    targets.iter_mut().for_each(|target| target.mean = -1.0);
    loop {
        let mut changed = false;
        for (target, weight) in targets.iter_mut().zip(weights).filter(|(t, _)| t.mean < 0.0) {
            if left * *weight as f64 >= target.most as f64 * free {
                target.mean = target.most as f64;
                left -= target.mean;
                free -= *weight as f64;
                changed = true;
            }
        }
        if !changed {
            break;
        }
    }
    for (target, weight) in targets.iter_mut().zip(weights).filter(|(t, _)| t.mean < 0.0) {
        target.mean = if free > 0.0 { left * *weight as f64 / free } else { 0.0 };
    }
    targets.iter().map(|target| target.mean).sum()
}

impl SiteRule {
    /// What the sites allow a block of `code` now; `fragments_max` stands in for the code's own q.
    pub fn new(field: &Field, code: Code, fragments_max: Option<usize>) -> Self {
        let f = code.fragments();
        if field.labelled_sites() < 2 {
            return Self { fragments_max: None, limit: f, targets: Vec::new() };
        }
        let places = field.places().filter(|(_, place)| place.weight() > 0);
        let places: Vec<(PlaceId, usize, u64)> =
            places.map(|(id, place)| (id, place.usable(), place.weight())).collect();
        let weights: Vec<u64> = places.iter().map(|(_, _, weight)| *weight).collect();
        let total: f64 = weights.iter().map(|weight| *weight as f64).sum();
        let most = |limit: usize, place: PlaceId, usable: usize| {
            usable.min(if place == PlaceId::POOL { f } else { limit })
        };
        let allowed = fragments_max.unwrap_or_else(|| site_fragments_max(code)).max(1);
        let even = |limit: usize| {
            let kept = places.iter().fold(0.0, |sum, (place, usable, weight)| {
                sum + (most(limit, *place, *usable) as f64).min(f as f64 * *weight as f64 / total)
            });
            kept >= f as f64 * (1.0 - UNEVEN_MAX)
        };
        let holds = |limit: &usize| {
            places.iter().map(|(place, usable, _)| most(*limit, *place, *usable)).sum::<usize>()
                >= f
        };
        let q = (1..allowed).find(|limit| even(*limit) && holds(limit)).unwrap_or(allowed);
        let limit = (q..f).find(holds).unwrap_or(f);
        let targets = places.iter().map(|(place, usable, _)| Target {
            place: *place,
            most: most(limit, *place, *usable),
            mean: 0.0,
        });
        let mut targets: Vec<Target> = targets.collect();
        fill(&mut targets, &weights, f);
        Self { fragments_max: Some(allowed), limit, targets }
    }

    /// The most fragments of one block that `place` may hold.
    pub fn most(&self, place: PlaceId) -> usize {
        if place == PlaceId::POOL || self.fragments_max.is_none() { usize::MAX } else { self.limit }
    }
}

/// What places are owed, for blocks of one width.
#[derive(Clone, Debug, Default)]
pub struct Credits {
    owed: HashMap<PlaceId, f64>,
}

impl Credits {
    /// The quotas of the next block, one for each of the rule's targets: as many fragments as it is
    /// owed, rounded so that they add up to `fragments`.
    pub fn quotas(
        &mut self,
        rule: &SiteRule,
        fragments: usize,
        random: &mut SplitMix,
        quotas: &mut Vec<(PlaceId, usize)>,
    ) {
        quotas.clear();
        let mut order: Vec<(f64, usize)> = Vec::with_capacity(rule.targets.len());
        let mut left = fragments;
        for (at, target) in rule.targets.iter().enumerate() {
            let owed = self.owed.entry(target.place).or_default();
            // A place that could not take what it was owed must not starve the others later.
            *owed = (*owed + target.mean).clamp(-2.0, target.most as f64 + 2.0);
            let quota = (owed.max(0.0) as usize).min(target.most).min(left);
            left -= quota;
            quotas.push((target.place, quota));
            // Places owed about the same must not always take turns in the same company.
            order.push((*owed - quota as f64 + random.unit(), at));
        }
        order.sort_unstable_by(|one, other| other.0.total_cmp(&one.0).then(one.1.cmp(&other.1)));
        while left > 0 {
            let before = left;
            for (_, at) in &order {
                if left > 0 && quotas[*at].1 < rule.targets[*at].most {
                    quotas[*at].1 += 1;
                    left -= 1;
                }
            }
            if left == before {
                break;
            }
        }
        for (place, quota) in quotas.iter() {
            *self.owed.entry(*place).or_default() -= *quota as f64;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::ProviderId;
    use crate::placement::field::ProviderFacts;
    use proptest::prelude::*;

    fn field(sizes: &[usize]) -> Field {
        let mut field = Field::default();
        let mut provider = 0;
        for (site, size) in sizes.iter().enumerate() {
            for _ in 0..*size {
                provider += 1;
                field.upsert(&ProviderFacts {
                    provider: ProviderId(provider),
                    site: format!("s{site}"),
                    address: String::new(),
                    capacity_bytes: 1 << 30,
                    free_bytes: 1 << 30,
                    usable: true,
                });
            }
        }
        field
    }

    #[test]
    fn one_fragment_a_site_where_there_are_sites_enough() {
        let code = Code::new(10, 6).unwrap();
        assert_eq!(SiteRule::new(&field(&[23; 16]), code, None).limit, 1);
        assert_eq!(SiteRule::new(&field(&[46; 8]), code, None).limit, 2);
        // 3 sites of 16 fragments: 6 each, where q is 3.
        let few = SiteRule::new(&field(&[46; 3]), code, None);
        assert_eq!((few.fragments_max, few.limit), (Some(3), 6));
        assert_eq!(SiteRule::new(&field(&[46]), code, None).fragments_max, None);
    }

    proptest! {
        #[test]
        fn quotas_add_up_and_even_out(
            sizes in proptest::collection::vec(1usize..30, 2..12), s in 1usize..10, r in 1usize..8,
        ) {
            let (field, code) = (field(&sizes), Code::new(s, r).unwrap());
            let f = code.fragments();
            let rule = SiteRule::new(&field, code, None);
            let (mut credits, mut random) = (Credits::default(), SplitMix::new(3));
            let (mut quotas, mut sums) = (Vec::new(), vec![0usize; rule.targets.len()]);
            let rounds = 400;
            for _ in 0..rounds {
                credits.quotas(&rule, f, &mut random, &mut quotas);
                let sum: usize = quotas.iter().map(|(_, quota)| quota).sum();
                prop_assert_eq!(sum, f.min(sizes.iter().sum()));
                for ((at, (_, quota)), target) in quotas.iter().enumerate().zip(&rule.targets) {
                    prop_assert!(*quota <= target.most);
                    sums[at] += quota;
                }
            }
            for (sum, target) in sums.iter().zip(&rule.targets) {
                let mean = *sum as f64 / rounds as f64;
                prop_assert!((mean - target.mean).abs() < 0.05, "{mean} for {target:?}");
            }
        }
    }
}
