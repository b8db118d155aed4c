//! Few shared pairs, by looking: for each fragment a few candidates drawn in proportion to free
//! space, of which the one that shares fewest blocks with those already chosen is taken.

use std::collections::HashMap;

use super::Chooser;
use super::draw::SplitMix;
use super::field::{Node, PlaceId};
use super::picks::{Draws, Picks, View};
use super::sites::Credits;

/// How candidates are looked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Tuning {
    /// Candidates for each fragment, d.
    pub candidates: usize,
    /// Candidates for a repair.
    pub repair_candidates: usize,
    /// A newcomer in a dead provider's slot takes its fragments.
    pub inherit: bool,
}

impl Default for Tuning {
    fn default() -> Self {
        Self { candidates: 8, repair_candidates: 32, inherit: true }
    }
}

/// The cheapest of a few candidates.
#[derive(Clone, Debug, Default)]
pub struct Greedy {
    tuning: Tuning,
    credits: HashMap<usize, Credits>,
    quotas: Vec<(PlaceId, usize)>,
}

impl Greedy {
    /// A chooser that looks as `tuning` says.
    pub fn new(tuning: Tuning) -> Self {
        Self { tuning, ..Self::default() }
    }

    /// How it looks.
    pub fn tuning(&self) -> Tuning {
        self.tuning
    }

    /// What each site gets of the next block, in random order; one entry for everyone where sites do
    /// not count.
    pub(super) fn quotas(
        &mut self,
        view: View<'_>,
        random: &mut SplitMix,
    ) -> Vec<(Option<PlaceId>, usize)> {
        let f = view.order.code.fragments();
        let rule = &view.order.rule;
        if rule.fragments_max.is_none() {
            return vec![(None, f)];
        }
        let credits = self.credits.entry(f).or_default();
        credits.quotas(rule, f, random, &mut self.quotas);
        let quotas = self.quotas.iter().filter(|(_, quota)| *quota > 0);
        let mut quotas: Vec<_> = quotas.map(|(place, quota)| (Some(*place), *quota)).collect();
        random.shuffle(&mut quotas);
        quotas
    }

    /// The fragments that found no provider where they should go: anywhere.
    pub(super) fn fill(&self, view: View<'_>, picks: &mut Picks, random: &mut SplitMix) {
        while picks.len() < view.order.code.fragments() {
            let best = picks.cheapest(view, Draws::Everyone, None, self.tuning.candidates, random);
            let Some(node) = best else { return };
            picks.push(view.landscape, view.metapeers, node);
        }
    }
}

impl Chooser for Greedy {
    fn name(&self) -> &'static str {
        "greedy"
    }

    fn pick(&mut self, view: View<'_>, picks: &mut Picks, random: &mut SplitMix) {
        for (place, quota) in self.quotas(view, random) {
            for _ in 0..quota {
                let best = picks.cheapest(view, place.into(), None, self.tuning.candidates, random);
                let Some(node) = best else { break };
                picks.push(view.landscape, view.metapeers, node);
            }
        }
        self.fill(view, picks, random);
    }

    fn pick_repair(
        &mut self,
        view: View<'_>,
        survivors: &Picks,
        dead: Option<Node>,
        random: &mut SplitMix,
    ) -> Option<Node> {
        repair(self.tuning, view, survivors, dead, random)
    }
}

/// The places that may take one more fragment, with their free space; none where sites do not count.
fn open_places(view: View<'_>, survivors: &Picks) -> Vec<(PlaceId, u64)> {
    let rule = &view.order.rule;
    if rule.fragments_max.is_none() {
        return Vec::new();
    }
    let places = view.landscape.field().places();
    let open = places.filter(|(id, place)| {
        survivors.in_place(*id) < rule.most(*id).min(place.usable()) && place.weight() > 0
    });
    open.map(|(id, place)| (id, place.weight())).collect()
}

/// The target of a repair: the heir of the dead provider's slot, else the cheapest candidate.
pub(super) fn repair(
    tuning: Tuning,
    view: View<'_>,
    survivors: &Picks,
    dead: Option<Node>,
    random: &mut SplitMix,
) -> Option<Node> {
    if tuning.inherit
        && let Some(heir) = dead.and_then(|dead| view.metapeers.heir(dead))
        && survivors.allows(view.landscape, view.order, heir)
    {
        return Some(heir);
    }
    let open = open_places(view, survivors);
    let draws = if open.is_empty() { Draws::Everyone } else { Draws::Places(&open) };
    survivors.cheapest(view, draws, None, tuning.repair_candidates, random)
}
