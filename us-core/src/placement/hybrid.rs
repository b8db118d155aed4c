//! Pseudo-affine lines: by themselves ([`Lined`]), and as the first candidate of the greedy pick
//! ([`Hybrid`]).

use std::collections::HashMap;

use super::Chooser;
use super::draw::SplitMix;
use super::field::{Group, Node, PlaceId};
use super::greedy::{Greedy, Tuning, repair};
use super::lineup::{Column, Lineup};
use super::picks::{Draws, Picks, View};

/// Lines for several block widths.
#[derive(Clone, Debug, Default)]
struct Lineups {
    by_width: HashMap<usize, Lineup>,
    columns: Vec<Column>,
}

impl Lineups {
    fn refreshed(&mut self, view: View<'_>) -> &mut Lineup {
        let lineup = self.by_width.entry(view.metapeers.fragments()).or_default();
        lineup.refresh(view.metapeers);
        lineup
    }

    /// The columns of block `number` that have an owner who may take a fragment, in random order;
    /// `None` where there are no lines.
    fn owners(
        &mut self,
        view: View<'_>,
        picks: &Picks,
        number: u64,
        random: &mut SplitMix,
    ) -> Option<&[Column]> {
        let mut columns = std::mem::take(&mut self.columns);
        let any = self.refreshed(view).columns(view.metapeers, number, &mut columns);
        columns.retain(|column| {
            column.owner.is_some_and(|owner| picks.allows(view.landscape, view.order, owner))
        });
        random.shuffle(&mut columns);
        self.columns = columns;
        any.then_some(&self.columns)
    }
}

/// The place that counts a metapeer.
fn place_of(view: View<'_>, column: &Column) -> PlaceId {
    match view.metapeers.get(column.metapeer).group() {
        Group::Site(place) => place,
        Group::Subnet(_) | Group::Alone => PlaceId::POOL,
    }
}

/// Lines, each slot's owner taking its fragment whatever it costs: a reference.
#[derive(Clone, Debug, Default)]
pub struct Lined {
    lineups: Lineups,
    /// Numbers whose lines met a vacant slot, by block width.
    skipped: HashMap<usize, u64>,
    fallback: Greedy,
}

impl Lined {
    /// Lines; `tuning` says how repairs find their target, and what happens where a slot stays
    /// vacant.
    pub fn new(tuning: Tuning) -> Self {
        Self { fallback: Greedy::new(tuning), ..Self::default() }
    }
}

impl Chooser for Lined {
    fn name(&self) -> &'static str {
        "lines"
    }

    fn pick(&mut self, view: View<'_>, picks: &mut Picks, random: &mut SplitMix) {
        let f = view.order.code.fragments();
        let tries = self.lineups.refreshed(view).tries();
        let skipped = self.skipped.entry(f).or_default();
        for attempt in 0..tries {
            let number = view.order.number + *skipped;
            let Some(columns) = self.lineups.owners(view, picks, number, random) else { break };
            if columns.len() >= f || attempt + 1 == tries {
                for owner in columns.iter().filter_map(|column| column.owner) {
                    if picks.len() < f && picks.allows(view.landscape, view.order, owner) {
                        picks.push(view.landscape, view.metapeers, owner);
                    }
                }
                if picks.len() == f {
                    return;
                }
            }
            if attempt + 1 < tries {
                picks.clear();
                *skipped += 1;
            }
        }
        self.fallback.fill(view, picks, random);
    }

    fn pick_repair(
        &mut self,
        view: View<'_>,
        survivors: &Picks,
        dead: Option<Node>,
        random: &mut SplitMix,
    ) -> Option<Node> {
        repair(self.fallback.tuning(), view, survivors, dead, random)
    }
}

/// Numbers passed over at most for a line without vacant slots.
const TRIES_MAX: u64 = 1024;
/// How far the folds may be ahead of the blocks that two providers share on the average: further,
/// and the lines are too few for what they promise to be good.
const FOLDS_AHEAD_MAX: f64 = 1.1;
/// How much fuller than the mean an owner may be, as a share of its capacity, and still be taken
/// without looking at others.
const FULLER_MAX: f64 = 0.2;

/// The most folds for the blocks placed so far: from the blocks that two providers of different
/// metapeers share on the average.
fn folds_max(view: View<'_>) -> f64 {
    let (f, n) = (view.order.code.fragments() as f64, view.landscape.field().present() as f64);
    let pairs = n * n * (1.0 - 1.0 / view.metapeers.len().max(2) as f64);
    FOLDS_AHEAD_MAX * view.order.number as f64 * f * (f - 1.0) / pairs.max(1.0) + 0.5
}

/// What a block width's metapeers are like, as of one of their changes.
#[derive(Clone, Copy, Debug, Default)]
struct Form {
    /// Of the metapeers and of the capacities.
    changes: (u64, u64),
    /// Lines are used.
    lined: bool,
    /// Most lines have no vacant slot.
    whole: bool,
    /// Numbers passed over.
    skipped: u64,
}

/// The default: greedy, and where f even metapeers can be formed of f² providers or more of about the
/// same capacity, the owner of the line's slot is the first candidate.
///
/// An owner who shares no more blocks with anyone chosen than there were folds before is what the
/// lines are for, and is taken at once, unless it is much fuller than others or the folds pass faster
/// than shared blocks must add up; else it competes with the candidates of the greedy pick.
#[derive(Clone, Debug, Default)]
pub struct Hybrid {
    lineups: Lineups,
    greedy: Greedy,
    forms: HashMap<usize, Form>,
}

impl Hybrid {
    /// A chooser that looks as `tuning` says.
    pub fn new(tuning: Tuning) -> Self {
        Self { greedy: Greedy::new(tuning), ..Self::default() }
    }

    fn form(&mut self, view: View<'_>) -> Form {
        let (f, field) = (view.order.code.fragments(), view.landscape.field());
        let changes = (view.metapeers.changes(), field.capacity_changes());
        let unknown = Form { changes: (u64::MAX, 0), ..Form::default() };
        let form = self.forms.entry(f).or_insert(unknown);
        if form.changes != changes {
            let lined = field.present() >= f * f
                && view.metapeers.are_even()
                && field.capacities_are_even();
            let whole = lined && self.lineups.refreshed(view).is_mostly_whole(view.metapeers);
            *form = Form { changes, lined, whole, skipped: form.skipped };
        }
        *form
    }

    /// Puts the owners of the block's line into `owners`; returns the line's fold.
    fn owners(
        &mut self,
        view: View<'_>,
        picks: &Picks,
        form: Form,
        random: &mut SplitMix,
        owners: &mut Vec<Column>,
    ) -> u64 {
        let f = view.order.code.fragments();
        let first = view.order.number + form.skipped;
        let tries = if form.whole { self.lineups.refreshed(view).tries() } else { 1 };
        let tries = tries.min(TRIES_MAX);
        for number in first..first + tries {
            let columns = self.lineups.owners(view, picks, number, random).unwrap_or_default();
            // Where no line is whole, the first of them is as good as any.
            if number == first || columns.len() >= f {
                owners.clear();
                owners.extend_from_slice(columns);
            }
            if columns.len() >= f {
                if let Some(known) = self.forms.get_mut(&f) {
                    known.skipped += number - first;
                }
                return self.lineups.refreshed(view).fold_of(number);
            }
        }
        self.lineups.refreshed(view).fold_of(first)
    }

    /// The owner, if it keeps what the lines promise; else the cheapest of it and the candidates.
    fn choose(
        &self,
        view: View<'_>,
        picks: &Picks,
        place: Option<PlaceId>,
        owner: Option<Node>,
        fold: Option<u64>,
        random: &mut SplitMix,
    ) -> Option<Node> {
        let field = view.landscape.field();
        let keeps = |owner: &Node| {
            let known = field.known(*owner);
            let free = known.free_bytes as f64 / known.capacity_bytes.max(1) as f64;
            free >= field.free_mean() - FULLER_MAX
                && picks.allows(view.landscape, view.order, *owner)
                && picks.in_metapeer_of(*owner, view.metapeers) == 0
                && fold.is_some_and(|fold| picks.most_shared(view.landscape, *owner) <= fold)
        };
        owner.filter(keeps).or_else(|| {
            picks.cheapest(view, Draws::from(place), owner, self.greedy.tuning().candidates, random)
        })
    }
}

impl Chooser for Hybrid {
    fn name(&self) -> &'static str {
        "hybrid"
    }

    fn pick(&mut self, view: View<'_>, picks: &mut Picks, random: &mut SplitMix) {
        let form = self.form(view);
        if !form.lined {
            return self.greedy.pick(view, picks, random);
        }
        let mut owners = Vec::with_capacity(view.order.code.fragments());
        let fold = self.owners(view, picks, form, random, &mut owners);
        let fold = Some(fold).filter(|fold| *fold as f64 <= folds_max(view));
        if self.lineups.refreshed(view).is_columns() {
            for (place, quota) in self.greedy.quotas(view, random) {
                let here = |column: &&Column| place.is_none_or(|at| place_of(view, column) == at);
                let mut owners = owners.iter().filter(here);
                for _ in 0..quota {
                    let owner = owners.next().and_then(|column| column.owner);
                    let best = self.choose(view, picks, place, owner, fold, random);
                    let Some(node) = best else { break };
                    picks.push(view.landscape, view.metapeers, node);
                }
            }
        } else {
            let ruled = view.order.rule.fragments_max.is_some();
            for column in &owners {
                let place = ruled.then(|| place_of(view, column));
                let full = place.is_some_and(|at| picks.in_place(at) >= view.order.rule.most(at));
                if full || picks.len() == view.order.code.fragments() {
                    continue;
                }
                if let Some(node) = self.choose(view, picks, place, column.owner, fold, random) {
                    picks.push(view.landscape, view.metapeers, node);
                }
            }
        }
        self.greedy.fill(view, picks, random);
    }

    fn pick_repair(
        &mut self,
        view: View<'_>,
        survivors: &Picks,
        dead: Option<Node>,
        random: &mut SplitMix,
    ) -> Option<Node> {
        repair(self.greedy.tuning(), view, survivors, dead, random)
    }
}
