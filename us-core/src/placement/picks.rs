//! The providers of the block that is being placed, and which of them would cost least.
//!
//! Invariants: what is asked of it (is this provider, this metapeer taken? how many in this place?)
//! costs O(1), and beginning a block costs nothing for what the last one left. Nothing here fails.

use super::draw::SplitMix;
use super::field::{Node, PlaceId};
use super::landscape::Landscape;
use super::metapeers::Metapeers;
use super::sites::SiteRule;
use crate::geometry::Code;

/// What is to be placed, for the choosers.
#[derive(Clone, Debug)]
pub struct Order {
    /// The block's code.
    pub code: Code,
    /// The most bytes one fragment can take.
    pub fragment_bytes: u64,
    /// The block's number among those of its width: its place in the lines.
    pub number: u64,
    /// What the sites allow.
    pub rule: SiteRule,
}

/// Marks that are all forgotten at once.
#[derive(Clone, Debug, Default)]
struct Marks {
    epoch: u32,
    marks: Vec<(u32, u32)>,
}

impl Marks {
    fn clear(&mut self) {
        self.epoch = self.epoch.wrapping_add(1);
        if self.epoch == 0 {
            self.marks.clear();
            self.epoch = 1;
        }
    }

    fn get(&self, at: usize) -> u32 {
        self.marks.get(at).filter(|(epoch, _)| *epoch == self.epoch).map_or(0, |(_, count)| *count)
    }

    fn add(&mut self, at: usize) {
        if at >= self.marks.len() {
            self.marks.resize(at + 1, (0, 0));
        }
        let count = self.get(at) + 1;
        self.marks[at] = (self.epoch, count);
    }
}

/// The providers chosen so far.
#[derive(Clone, Debug, Default)]
pub struct Picks {
    nodes: Vec<Node>,
    scales: Vec<f64>,
    taken: Marks,
    metapeers: Marks,
    places: Marks,
}

/// How strongly a few pairs that share many blocks count against many that share few.
fn cost(lambda: u32) -> f64 {
    let square = f64::from(lambda) * f64::from(lambda);
    square * square
}

/// (mean capacity / capacity)⁴: the shared blocks of large providers count less.
fn scale(landscape: &Landscape, node: Node) -> f64 {
    let capacity = landscape.field().known(node).capacity_bytes;
    let ratio = landscape.field().capacity_bytes_mean() / capacity.max(1) as f64;
    if capacity == 0 { 1.0 } else { (ratio * ratio).powi(2) }
}

impl Picks {
    /// Begins another block.
    pub fn clear(&mut self) {
        self.nodes.clear();
        self.scales.clear();
        self.taken.clear();
        self.metapeers.clear();
        self.places.clear();
    }

    /// The providers, in the order they were chosen.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// Fragments chosen so far.
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Whether none is chosen yet.
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// Fragments that `node` has.
    pub fn on(&self, node: Node) -> usize {
        self.taken.get(node.index()) as usize
    }

    /// Fragments in `place`.
    pub fn in_place(&self, place: PlaceId) -> usize {
        self.places.get(place.index()) as usize
    }

    /// Fragments in the metapeer of `node`.
    pub fn in_metapeer_of(&self, node: Node, metapeers: &Metapeers) -> usize {
        metapeers.address(node).map_or(0, |at| self.metapeers.get(at.metapeer) as usize)
    }

    /// Whether a metapeer has a fragment.
    pub fn has_metapeer(&self, metapeer: usize) -> bool {
        self.metapeers.get(metapeer) > 0
    }

    /// Chooses a provider.
    pub fn push(&mut self, landscape: &Landscape, metapeers: &Metapeers, node: Node) {
        self.nodes.push(node);
        self.scales.push(scale(landscape, node));
        self.taken.add(node.index());
        self.places.add(landscape.field().known(node).place.index());
        if let Some(at) = metapeers.address(node) {
            self.metapeers.add(at.metapeer);
        }
    }

    /// Whether a fragment can go to `node`: it has none yet, has space, and its site is not full.
    pub fn allows(&self, landscape: &Landscape, order: &Order, node: Node) -> bool {
        let field = landscape.field();
        self.on(node) == 0
            && field.fits(node, 1, order.fragment_bytes)
            && self.in_place(field.known(node).place) < order.rule.most(field.known(node).place)
    }

    /// What the blocks that `node` shares with those chosen make it cost: the sum over them of
    /// (λ / (capacity · capacity))⁴, capacities relative to the mean.
    pub fn cost(&self, landscape: &Landscape, node: Node) -> f64 {
        self.cost_below(landscape, node, f64::INFINITY)
    }

    /// As [`Picks::cost`], but looks no further than it takes to see that it is above `most`.
    fn cost_below(&self, landscape: &Landscape, node: Node, most: f64) -> f64 {
        let (pairs, own) = (landscape.pairs(), scale(landscape, node));
        let (mut sum, most) = (0.0, most / own);
        for (other, scale) in self.nodes.iter().zip(&self.scales) {
            sum += cost(pairs.get(node, *other)) * scale;
            if sum > most {
                break;
            }
        }
        sum * own
    }

    /// The most blocks that `node` shares with any of those chosen.
    pub fn most_shared(&self, landscape: &Landscape, node: Node) -> u64 {
        let shared = self.nodes.iter().map(|other| landscape.pairs().get(node, *other));
        u64::from(shared.max().unwrap_or(0))
    }

    /// The candidate that costs least; between equals the first one given as `owner`, then the
    /// emptiest, then the least number.
    fn better(&self, landscape: &Landscape, one: Rated, other: Rated) -> Rated {
        let fill = |node: Node| {
            let known = landscape.field().known(node);
            known.free_bytes as f64 / known.capacity_bytes.max(1) as f64
        };
        let order = one.cost.total_cmp(&other.cost).then_with(|| other.owner.cmp(&one.owner));
        let order = order
            .then_with(|| fill(other.node).total_cmp(&fill(one.node)))
            .then_with(|| one.node.cmp(&other.node));
        if order.is_le() { one } else { other }
    }

    /// The cheapest of `owner` (where it is allowed) and `candidates` draws in proportion to free
    /// space, from where `draws` says; of metapeers without a fragment while there are any.
    pub fn cheapest(
        &self,
        view: View<'_>,
        draws: Draws<'_>,
        owner: Option<Node>,
        candidates: usize,
        random: &mut SplitMix,
    ) -> Option<Node> {
        let View { landscape, metapeers, order } = view;
        let fresh = |node: &Node| {
            self.allows(landscape, order, *node) && self.in_metapeer_of(*node, metapeers) == 0
        };
        let owner = owner.filter(fresh);
        let mut best =
            owner.map(|node| Rated { node, cost: self.cost(landscape, node), owner: true });
        let mut found = usize::from(best.is_some());
        for _ in 0..3 * candidates {
            if found >= candidates {
                break;
            }
            let Some(node) = draws.draw(landscape, random).filter(fresh) else { continue };
            found += 1;
            let most = best.map_or(f64::INFINITY, |best| best.cost);
            let one = Rated { node, cost: self.cost_below(landscape, node, most), owner: false };
            best = Some(best.map_or(one, |best| self.better(landscape, best, one)));
        }
        if best.is_none() {
            best = self.cheapest_of_all(view, draws);
        }
        best.map(|best| best.node)
    }

    /// Looks at everyone: draws found nobody, so there are few.
    fn cheapest_of_all(&self, view: View<'_>, draws: Draws<'_>) -> Option<Rated> {
        let View { landscape, metapeers, order } = view;
        let field = landscape.field();
        let everyone = field.places().filter(|(id, _)| draws.has(*id));
        let allowed = everyone
            .flat_map(|(_, place)| place.members().iter().copied())
            .filter(|node| self.allows(landscape, order, *node));
        let rated = allowed.map(|node| {
            let crowd = self.in_metapeer_of(node, metapeers);
            (crowd, Rated { node, cost: self.cost(landscape, node), owner: false })
        });
        let best = rated.reduce(|best, one| match best.0.cmp(&one.0) {
            std::cmp::Ordering::Less => best,
            std::cmp::Ordering::Greater => one,
            std::cmp::Ordering::Equal => (best.0, self.better(landscape, best.1, one.1)),
        });
        best.map(|(_, rated)| rated)
    }
}

/// Whom candidates are drawn from.
#[derive(Clone, Copy, Debug)]
pub enum Draws<'d> {
    /// Everyone.
    Everyone,
    /// One place.
    Place(PlaceId),
    /// Some places, with their free space.
    Places(&'d [(PlaceId, u64)]),
}

impl From<Option<PlaceId>> for Draws<'_> {
    fn from(place: Option<PlaceId>) -> Self {
        place.map_or(Self::Everyone, Self::Place)
    }
}

impl Draws<'_> {
    fn draw(self, landscape: &Landscape, random: &mut SplitMix) -> Option<Node> {
        let field = landscape.field();
        match self {
            Self::Everyone => field.draw(random),
            Self::Place(place) => field.place(place).draw(random),
            Self::Places(places) => {
                let mut left = random.below(places.iter().map(|(_, weight)| weight).sum());
                let drawn = places.iter().find(|(_, weight)| {
                    let here = left < *weight;
                    left = left.wrapping_sub(*weight);
                    here
                });
                drawn.and_then(|(place, _)| field.place(*place).draw(random))
            }
        }
    }

    fn has(self, place: PlaceId) -> bool {
        match self {
            Self::Everyone => true,
            Self::Place(only) => only == place,
            Self::Places(places) => places.iter().any(|(one, _)| *one == place),
        }
    }
}

/// What a block is placed on.
#[derive(Clone, Copy, Debug)]
pub struct View<'v> {
    /// The swarm.
    pub landscape: &'v Landscape,
    /// Its metapeers for this block's width.
    pub metapeers: &'v Metapeers,
    /// What is to be placed.
    pub order: &'v Order,
}

#[derive(Clone, Copy, Debug)]
struct Rated {
    node: Node,
    cost: f64,
    owner: bool,
}
