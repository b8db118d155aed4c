//! By which way the fragments of one rebuild travel: a star, a rotated star, a chain or sums site by
//! site, from what the lines of those who take part give. Pure, with a model of the time each takes.
//!
//! ```text
//! star     every helper sends its fragment:     max(B / up of the slowest, s B / down, trunks)
//! rotated  every holder sends s / n of one:     max(s B / (n up) of the slowest, s B / down, trunks)
//! sites    sums inside each site, then across:  (a + b) / m + max(a, b) (m - 1) / m
//! chain    a sum handed on in m slices:         sum of the links' slice times + (m - 1) x the slowest's
//! ```
//! B is the fragment, a what the sums inside the sites take as a whole, b what they take from there to
//! the rebuilder. A link is as fast as the slowest of the sender's uplink, the receiver's downlink and,
//! between sites, both trunks. Every helper sends one fragment by any of them (a rotated star's less):
//! what differs is where bytes pile up.
//!
//! Called by the directory with what it knows of the lines. A line it knows nothing of is as fast as any.

use std::collections::HashMap;

/// Slots that travel together in a partial sum, at most.
const SLICE_SLOTS_MAX: usize = 32;
/// Slices of a sum for each link of its longest chain: the last link idles for 1/4 of a fragment's
/// time at most.
const SLICES_A_LINK: usize = 4;
/// And of any sum.
const SLICES_MIN: usize = 8;
/// What a request of a sum costs at each node, in seconds: calls, a read, a hop through the network.
const HOP_S: f64 = 0.001;
/// A path is taken only where it is this much quicker than a simpler one: a chain breaks wherever one
/// of its links does.
const GAIN_MIN: f64 = 0.8;

/// What a provider's line gives, in bytes a second. `f64::INFINITY` where nobody knows.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Line {
    /// What it can send.
    pub up: f64,
    /// What it can receive.
    pub down: f64,
    /// Its site; those without one are each a site of their own.
    pub site: Option<u32>,
}

impl Line {
    /// A line nobody knows anything of.
    pub const UNKNOWN: Self = Self { up: f64::INFINITY, down: f64::INFINITY, site: None };
}

/// What a site's connection with the other sites gives, in bytes a second.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Trunk {
    /// Out of the site.
    pub up: f64,
    /// Into it.
    pub down: f64,
}

/// One rebuild.
#[derive(Clone, Debug)]
pub struct Task<'t> {
    /// Fragments that are needed.
    pub s: usize,
    /// Bytes of one.
    pub fragment_bytes: f64,
    /// Slots of one: no slice is smaller.
    pub slots: usize,
    /// Who makes the fragment again.
    pub rebuilder: Line,
    /// Who can send, those that should be asked first in front.
    pub holders: &'t [Line],
    /// Trunks of the sites that are known to be thin.
    pub trunks: &'t HashMap<u32, Trunk>,
}

/// The ways, the simplest first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Way {
    /// s whole fragments.
    Star,
    /// Of every holder the same share.
    RotatedStar,
    /// One sum for each site.
    Sites,
    /// One sum, handed from holder to holder.
    Chain,
}

/// How one rebuild is to go.
#[derive(Clone, PartialEq, Debug)]
pub struct Plan {
    /// The way.
    pub way: Way,
    /// All holders, by index of the task's: the first s are asked (of a rotated star all), in this
    /// order (of a chain: the one next to the rebuilder first); the others stand by.
    pub order: Vec<usize>,
    /// What the model says it takes.
    pub seconds: f64,
}

/// Slots of a slice, where sums of fragments of `slots` slots pass through up to `links` nodes.
pub fn slice_slots(slots: usize, links: usize) -> usize {
    slots.div_ceil((SLICES_A_LINK * links).max(SLICES_MIN)).clamp(1, SLICE_SLOTS_MAX)
}

impl Task<'_> {
    fn trunk(&self, site: Option<u32>) -> Trunk {
        let known = site.and_then(|site| self.trunks.get(&site).copied());
        known.unwrap_or(Trunk { up: f64::INFINITY, down: f64::INFINITY })
    }

    fn is_near(one: Option<u32>, other: Option<u32>) -> bool {
        one.is_some() && one == other
    }

    /// What goes from one to another in a second.
    fn link(&self, from: &Line, to: &Line) -> f64 {
        let rate = from.up.min(to.down);
        if Self::is_near(from.site, to.site) {
            return rate;
        }
        rate.min(self.trunk(from.site).up).min(self.trunk(to.site).down)
    }

    /// How long it takes until each of these has sent its bytes to the rebuilder, all at once.
    fn converge(&self, sent: impl Iterator<Item = (usize, f64)>) -> f64 {
        let (mut arrive, mut cross, mut longest) = (0.0, 0.0, 0.0f64);
        let mut leave: HashMap<u32, f64> = HashMap::new();
        for (holder, bytes) in sent {
            let line = &self.holders[holder];
            longest = longest.max(bytes / line.up);
            arrive += bytes;
            if !Self::is_near(line.site, self.rebuilder.site) {
                cross += bytes;
                if let Some(site) = line.site {
                    *leave.entry(site).or_default() += bytes;
                }
            }
        }
        for (site, bytes) in leave {
            longest = longest.max(bytes / self.trunk(Some(site)).up);
        }
        let trunk_s: f64 = cross / self.trunk(self.rebuilder.site).down;
        longest.max(arrive / self.rebuilder.down).max(trunk_s)
    }

    fn slices(&self, links: usize) -> f64 {
        self.slots.max(1).div_ceil(slice_slots(self.slots.max(1), links)) as f64
    }

    /// How long a way takes with its holders in this order.
    pub fn seconds(&self, way: Way, order: &[usize]) -> f64 {
        let bytes = self.fragment_bytes;
        let helpers = &order[..self.s.min(order.len())];
        match way {
            Way::Star => self.converge(helpers.iter().map(|holder| (*holder, bytes))),
            Way::RotatedStar => {
                let share = bytes * self.s as f64 / order.len().max(1) as f64;
                self.converge(order.iter().map(|holder| (*holder, share)))
            }
            Way::Chain => self.chain_seconds(helpers),
            Way::Sites => self.sites_seconds(helpers),
        }
    }

    fn chain_seconds(&self, helpers: &[usize]) -> f64 {
        let slices = self.slices(helpers.len());
        let slice = self.fragment_bytes / slices;
        let (mut all, mut slowest) = (0.0, 0.0f64);
        let mut to = &self.rebuilder;
        for helper in helpers {
            let from = &self.holders[*helper];
            let takes = slice / self.link(from, to) + HOP_S;
            all += takes;
            slowest = slowest.max(takes);
            to = from;
        }
        all + (slices - 1.0) * slowest
    }

    fn sites_seconds(&self, helpers: &[usize]) -> f64 {
        let slices = self.slices(2);
        let mut heads: Vec<(usize, usize)> = Vec::new();
        let mut inside = 0.0f64;
        for helper in helpers {
            let line = &self.holders[*helper];
            let head = heads
                .iter_mut()
                .find(|(head, _)| Self::is_near(self.holders[*head].site, line.site));
            match head {
                Some((_, members)) => {
                    *members += 1;
                    inside = inside.max(self.fragment_bytes / line.up);
                }
                None => heads.push((*helper, 0)),
            }
        }
        for (head, members) in &heads {
            let arrives = self.fragment_bytes * *members as f64;
            inside = inside.max(arrives / self.holders[*head].down);
        }
        let across = self.converge(heads.iter().map(|(head, _)| (*head, self.fragment_bytes)));
        let hops = 2.0 * HOP_S * slices;
        (inside + across) / slices + inside.max(across) * (slices - 1.0) / slices + hops
    }

    /// Holders in the orders that are worth a look, each with the ways it is meant for: as the caller
    /// wants them; site by site, the rebuilder's first, then those with most holders; by what they
    /// can send to the rebuilder; the same site by site; by what they can pass on.
    fn orders(&self) -> [(&'static [Way], Vec<usize>); 5] {
        let all: Vec<usize> = (0..self.holders.len()).collect();
        let line = |holder: &usize| &self.holders[*holder];
        let worth = |holder: &usize| self.link(line(holder), &self.rebuilder);
        let mut quick = all.clone();
        quick.sort_by(|one, other| worth(other).total_cmp(&worth(one)));
        let passes = |holder: &usize| {
            let (line, trunk) = (line(holder), self.trunk(line(holder).site));
            line.up.min(line.down).min(trunk.up).min(trunk.down)
        };
        let mut passing = all.clone();
        passing.sort_by(|one, other| passes(other).total_cmp(&passes(one)));
        // The far end of a chain receives nothing: who can only send belongs there.
        let far = self.s.saturating_sub(1).min(passing.len());
        passing[far..].sort_by(|one, other| worth(other).total_cmp(&worth(one)));
        let mut held: HashMap<u32, usize> = HashMap::new();
        for site in self.holders.iter().filter_map(|holder| holder.site) {
            *held.entry(site).or_default() += 1;
        }
        let by_site = |order: &[usize]| {
            let mut order = order.to_vec();
            order.sort_by_key(|holder| {
                let site = line(holder).site;
                let held = site.and_then(|site| held.get(&site)).copied().unwrap_or(1);
                (!Self::is_near(site, self.rebuilder.site), std::cmp::Reverse(held), site)
            });
            order
        };
        let (wanted_by_site, quick_by_site) = (by_site(&all), by_site(&quick));
        [
            (&[Way::Star, Way::RotatedStar], all),
            (&[Way::Sites, Way::Chain], wanted_by_site),
            (&[Way::Star, Way::Sites, Way::Chain], quick),
            (&[Way::Star, Way::Sites, Way::Chain], quick_by_site),
            (&[Way::Chain], passing),
        ]
    }
}

/// Chooses the way and the holders of a rebuild. Among equals the caller's order stays, and the
/// simpler way is taken. `None` with fewer than s holders.
pub fn plan(task: &Task<'_>) -> Option<Plan> {
    if task.s == 0 || task.holders.len() < task.s {
        return None;
    }
    let mut best: Vec<Plan> = Vec::with_capacity(4);
    for (ways, order) in task.orders() {
        for way in ways.iter().copied() {
            let found = best.iter_mut().find(|plan| plan.way == way);
            let seconds = task.seconds(way, &order);
            match found {
                Some(known) if seconds < known.seconds * GAIN_MIN => {
                    *known = Plan { way, order: order.clone(), seconds };
                }
                Some(_) => {}
                None => best.push(Plan { way, order: order.clone(), seconds }),
            }
        }
    }
    best.sort_by_key(|plan| plan.way);
    let simplest = best.into_iter().reduce(|chosen, other| {
        if other.seconds < chosen.seconds * GAIN_MIN { other } else { chosen }
    });
    simplest.filter(|plan| !plan.seconds.is_nan())
}

#[cfg(test)]
mod tests;
