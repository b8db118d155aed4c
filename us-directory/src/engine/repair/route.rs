//! From whom a repair takes its bytes, and by which way.
//!
//! Helpers are chosen for many blocks together, so that no uplink has more to do than it must
//! ([`helpers::assign`]); then, block by block, the way that the lines make quickest
//! ([`paths::plan`]).

use std::collections::{BTreeMap, HashMap};

use us_core::placement::helpers::{self, Rebuild, Senders};
use us_core::placement::paths::{self, Line, Task, Trunk, Way};
use us_proto::v1::RebuildPath;

use super::URGENT_S;
use super::begin::Ready;
use crate::engine::Engine;

/// Fragments by which what was asked before may set two holders apart.
const BEFORE_MAX: f64 = 16.0;

/// A fragment and its holder.
pub(super) type Place = (u8, u32);

/// Whom to ask, and how.
#[derive(Debug)]
pub(super) struct Route {
    pub path: RebuildPath,
    /// Those that send.
    pub senders: Vec<Place>,
    /// Those that stand by.
    pub standby: Vec<Place>,
    /// What each of the senders sends.
    pub sent_bytes: u64,
}

/// For how long helpers stay chosen for a block that cannot begin, beside what their lines take.
const PLANNED_MS: u64 = 60_000;
/// Blocks whose helpers are remembered.
pub(super) const PLANNED_MAX: usize = 1024;

/// The helpers chosen for a block. Chosen anew each time a block has to wait, they would be those that
/// happen to be free, and what was balanced over many blocks would be lost.
#[derive(Debug)]
pub(super) struct Planned {
    helpers: Vec<Place>,
    until_ms: u64,
}

/// A rate that was seen, without its noise.
fn rough(rate: f64) -> f64 {
    rate.max(1.0).log2().round().exp2()
}

/// When the last sender is done where every holder of a block sends the same share.
fn shared_by_all(senders: &Senders, rebuilds: &[Rebuild]) -> f64 {
    let mut queued = senders.queued.clone();
    for rebuild in rebuilds {
        let share = rebuild.needed as f64 / rebuild.holders.len().max(1) as f64;
        rebuild.holders.iter().for_each(|holder| queued[*holder] += share);
    }
    let done = queued.iter().zip(&senders.uplinks).map(|(queued, uplink)| queued / uplink);
    done.fold(0.0, f64::max)
}

impl Engine {
    /// The helpers that were chosen for a block before, where they still can be.
    fn planned(&self, ready: &Ready) -> Option<&[Place]> {
        let planned = self.repairs.planned.get(&ready.key)?;
        let is_source = |place: &Place| ready.sources().any(|source| source == *place);
        let stands = planned.until_ms > self.now_ms() && planned.helpers.iter().all(is_source);
        stands.then_some(&planned.helpers)
    }

    /// Whether one of the helpers chosen for a block has to do other things first.
    pub(super) fn planned_are_busy(&self, ready: &Ready) -> bool {
        let may_queue = |place: &Place| self.repairs.jobs.may_queue(place.1, self.now_ms());
        self.planned(ready).is_some_and(|planned| !planned.iter().all(may_queue))
    }

    /// Remembers who was chosen for a block, with the fragments that each has to send for all blocks.
    /// What is urgent takes who is free.
    fn plan(&mut self, ready: &Ready, helpers: &[Place], sends: &HashMap<u32, u64>) {
        let (now_ms, planned) = (self.now_ms(), &mut self.repairs.planned);
        let needed = ready.block.s as usize;
        if ready.is_move() || helpers.len() < needed || ready.found.rank_s() <= URGENT_S {
            return;
        }
        if planned.len() >= PLANNED_MAX {
            planned.retain(|_, planned| planned.until_ms > now_ms);
        }
        if planned.len() >= PLANNED_MAX
            || planned.get(&ready.key).is_some_and(|p| p.until_ms > now_ms)
        {
            return;
        }
        let (jobs, bytes) = (&self.repairs.jobs, ready.geometry.fragment_bytes() as u64);
        let helpers = helpers.to_vec();
        let takes_ms = helpers.iter().map(|(_, helper)| {
            let fragments = sends.get(helper).copied().unwrap_or(1);
            jobs.sends_for_ms(*helper, bytes * fragments, now_ms)
        });
        let until_ms = now_ms + PLANNED_MS + takes_ms.max().unwrap_or(0) * 3 / 2;
        planned.insert(ready.key, Planned { helpers, until_ms });
    }

    /// For each block those of its holders that may be asked, the helpers chosen for it first.
    pub(super) fn with_helpers(&mut self, ready: Vec<Ready>) -> Vec<(Ready, Vec<Place>)> {
        let now_ms = self.now_ms();
        let jobs = &self.repairs.jobs;
        let free: Vec<Vec<Place>> = ready
            .iter()
            .map(|ready| {
                let sources = ready.sources();
                sources.filter(|(_, provider)| jobs.may_queue(*provider, now_ms)).collect()
            })
            .collect();
        let eligible: Vec<&[Place]> = ready
            .iter()
            .zip(&free)
            .map(|(ready, free)| self.planned(ready).unwrap_or(free))
            .collect();
        let mut numbers: BTreeMap<u32, usize> = BTreeMap::new();
        for (_, provider) in eligible.iter().copied().flatten().chain(free.iter().flatten()) {
            let next = numbers.len();
            numbers.entry(*provider).or_insert(next);
        }
        let mut senders = Senders::equal(numbers.len());
        // What was asked of each in this hour counts too, else whoever has just sent is asked again
        // before those who have not. Boundedly: one that joined late need not make up for all of it.
        let bytes = ready.iter().map(|ready| ready.geometry.fragment_bytes()).max().unwrap_or(1);
        let asked = |provider: &u32| jobs.disturbance(*provider, now_ms).bytes as f64;
        let least = numbers.keys().map(asked).fold(f64::INFINITY, f64::min);
        for (provider, number) in &numbers {
            let before = (asked(provider) - least) / bytes.max(1) as f64;
            senders.queued[*number] = jobs.rebuilding(*provider) as f64 + before.min(BEFORE_MAX);
        }
        // Uplinks count where all are known: an unknown one is neither slow nor fast.
        let ups = numbers.iter().map(|(provider, number)| (number, self.uplink(*provider)));
        if ups.clone().all(|(_, up)| up.is_finite()) {
            ups.for_each(|(number, up)| senders.uplinks[*number] = up);
        }
        let rebuilds: Vec<Rebuild> = ready
            .iter()
            .zip(&eligible)
            .map(|(ready, eligible)| {
                let mut holders: Vec<usize> =
                    eligible.iter().map(|(_, provider)| numbers[provider]).collect();
                holders.sort_unstable();
                holders.dedup();
                let needed = if ready.is_move() { 0 } else { ready.block.s as usize };
                Rebuild { needed: needed.min(holders.len()), holders }
            })
            .collect();
        let assignment = helpers::assign(&senders, &rebuilds);
        // A block that is alone is made again soonest when all its holders share the sending. Of many
        // that would ask more of some than the best choice of s for each.
        let is_alone = rebuilds.len() == 1;
        let is_shared = is_alone && shared_by_all(&senders, &rebuilds) <= assignment.busiest();
        let mut sends: HashMap<u32, u64> = HashMap::new();
        for (provider, number) in &numbers {
            let chosen = assignment.helpers.iter().flatten().filter(|helper| *helper == number);
            sends.insert(*provider, chosen.count() as u64);
        }
        let widths: Vec<usize> = ready
            .iter()
            .zip(&rebuilds)
            .map(|(ready, rebuild)| match self.planned(ready) {
                Some(planned) => planned.len(),
                None if is_shared || rebuild.needed == 0 => usize::MAX,
                None => rebuild.needed,
            })
            .collect();
        let chosen = assignment.helpers.into_iter().zip(widths);
        let sorted = free.into_iter().zip(chosen).map(|(mut free, (chosen, width))| {
            free.sort_by_key(|(index, provider)| {
                let is_chosen = chosen.contains(&numbers[provider]);
                (!is_chosen, jobs.load(*provider), *index)
            });
            free.truncate(width);
            free
        });
        let with_helpers: Vec<(Ready, Vec<Place>)> = ready.into_iter().zip(sorted).collect();
        for (ready, helpers) in &with_helpers {
            self.plan(ready, helpers, &sends);
        }
        with_helpers
    }

    /// What a provider can send in a second, as far as it is known.
    fn uplink(&self, provider: u32) -> f64 {
        let now_ms = self.now_ms();
        let up = self.repairs.rates.up(provider, now_ms);
        up.map_or(f64::INFINITY, rough)
    }

    /// What a provider's line gives. What else it has to do is left to [`Engine::with_helpers`]: counted
    /// here too, it would undo what was balanced there.
    fn line(&self, provider: u32, sites: &mut HashMap<String, u32>) -> Line {
        let rates = &self.repairs.rates;
        let rate = |rate: Option<f64>| rate.map_or(f64::INFINITY, rough);
        let site = self.members.get(&provider).map_or("", |member| member.record.site.as_str());
        let next = sites.len() as u32;
        let site = (!site.is_empty()).then(|| *sites.entry(site.to_owned()).or_insert(next));
        let now_ms = self.now_ms();
        Line {
            up: rate(rates.up(provider, now_ms)),
            down: rate(rates.down(provider, now_ms)),
            site,
        }
    }

    /// The way for one block, with `helpers` in the order in which they should be asked. `None` where
    /// they are too few just now.
    pub(super) fn route(&self, ready: &Ready, helpers: Vec<Place>, target: u32) -> Option<Route> {
        let (s, fragment_bytes) = (ready.block.s as usize, ready.geometry.fragment_bytes() as u64);
        let busy: Vec<Place> = ready.sources().filter(|place| !helpers.contains(place)).collect();
        if ready.is_move() {
            // A whole copy of what is wanted: nothing else is asked, the others stand by.
            let holder = ready.block.providers[usize::from(ready.index)];
            if !self.repairs.jobs.may_send(holder, self.now_ms()) {
                return None;
            }
            return Some(Route {
                path: RebuildPath::Star,
                senders: vec![(ready.index, holder)],
                standby: helpers.into_iter().chain(busy).collect(),
                sent_bytes: fragment_bytes,
            });
        }
        let mut sites: HashMap<String, u32> = HashMap::new();
        let rebuilder = self.line(target, &mut sites);
        let holders: Vec<Line> =
            helpers.iter().map(|(_, provider)| self.line(*provider, &mut sites)).collect();
        let now_ms = self.now_ms();
        let trunks: HashMap<u32, Trunk> = sites
            .iter()
            .map(|(site, number)| {
                let (up, down) = self.repairs.rates.trunk(site, now_ms);
                let rate = |rate: Option<f64>| rate.map_or(f64::INFINITY, rough);
                (*number, Trunk { up: rate(up), down: rate(down) })
            })
            .collect();
        let plan = paths::plan(&Task {
            s,
            fragment_bytes: fragment_bytes as f64,
            slots: ready.geometry.fragment_slots(),
            rebuilder,
            holders: &holders,
            trunks: &trunks,
        })?;
        let mut senders: Vec<Place> = match plan.way {
            // Those that were chosen for many blocks together: what one block would like best would
            // undo that.
            Way::Star => helpers,
            Way::RotatedStar | Way::Sites | Way::Chain => {
                plan.order.iter().map(|at| helpers[*at]).collect()
            }
        };
        let (path, sending) = match plan.way {
            Way::Star => (RebuildPath::Star, s),
            Way::RotatedStar => (RebuildPath::RotatedStar, senders.len()),
            Way::Sites => (RebuildPath::Sites, s),
            Way::Chain => (RebuildPath::Chain, s),
        };
        let mut standby = senders.split_off(sending);
        if plan.way != Way::RotatedStar {
            standby.extend(busy);
        }
        let sent_bytes = fragment_bytes * s as u64 / sending as u64;
        Some(Route { path, senders, standby, sent_bytes })
    }
}
