//! The owner of everything placement knows, and the keeper of its promises.
//!
//! It is told what changes, asks its chooser, checks what the chooser took, spreads the block evenly
//! where the chooser found too few, and says what is lacking.
//!
//! Invariants: those of [`super`]; a block that was promised and then stored is counted once. Fails
//! with [`PlacementError`] where the write margin cannot be had.

use std::collections::HashMap;
use std::fmt;

use super::draw::SplitMix;
use super::field::{Node, PlaceId, ProviderFacts};
use super::landscape::Landscape;
use super::pairs::PairCounters;
use super::picks::{Order, Picks, View};
use super::promises::Promises;
use super::sites::SiteRule;
use super::{
    Chooser, Degraded, Hybrid, Placement, PlacementError, PlacementRequest, RepairRequest,
    RepairTarget, Spread, margin_holds, providers_needed,
};
use crate::geometry::Code;
use crate::ids::ProviderId;

/// Places blocks: the one owner of everything placement knows.
pub struct Placer {
    landscape: Landscape,
    chooser: Box<dyn Chooser>,
    site_fragments_max: Option<usize>,
    promises: Promises,
    /// Blocks stored and placements given, by block width.
    blocks: HashMap<usize, Blocks>,
    picks: Picks,
}

#[derive(Clone, Copy, Debug, Default)]
struct Blocks {
    stored: u64,
    next: u64,
}

impl fmt::Debug for Placer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Placer").field("chooser", &self.chooser.name()).finish_non_exhaustive()
    }
}

impl Default for Placer {
    fn default() -> Self {
        Self::new(Box::<Hybrid>::default())
    }
}

impl Placer {
    /// A swarm of no providers.
    pub fn new(chooser: Box<dyn Chooser>) -> Self {
        Self::with_pairs(chooser, PairCounters::default())
    }

    /// A swarm of no providers, with pair counters of another kind.
    pub fn with_pairs(chooser: Box<dyn Chooser>, pairs: PairCounters) -> Self {
        Self {
            landscape: Landscape::new(pairs),
            chooser,
            site_fragments_max: None,
            promises: Promises::default(),
            blocks: HashMap::new(),
            picks: Picks::default(),
        }
    }

    /// Lets one site hold this many fragments of a block, whatever the code says.
    #[must_use]
    pub fn with_site_fragments_max(mut self, fragments: usize) -> Self {
        self.site_fragments_max = Some(fragments);
        self
    }

    /// The chooser's name.
    pub fn chooser(&self) -> &'static str {
        self.chooser.name()
    }

    /// The swarm as the chooser sees it.
    pub fn landscape(&self) -> &Landscape {
        &self.landscape
    }

    // ------------------------------------------------------------ facts

    /// A provider came, came back, or is different now.
    pub fn upsert(&mut self, facts: &ProviderFacts) {
        self.landscape.upsert(facts);
    }

    /// Only the free space or the usability of a provider changed. One that is not known is ignored.
    pub fn update(&mut self, provider: ProviderId, free_bytes: u64, usable: bool) {
        self.landscape.update(provider, free_bytes, usable);
    }

    /// A provider is given up for dead: the next newcomer of its group takes its slot. It is still
    /// counted where blocks name it, and comes back by an upsert.
    pub fn retire(&mut self, provider: ProviderId) {
        self.landscape.retire(provider);
    }

    /// No block names the provider any more.
    pub fn forget(&mut self, provider: ProviderId) {
        if let Some(node) = self.landscape.field().node(provider) {
            for holders in self.promises.forget(node) {
                self.landscape.pairs_mut().count(&holders, -1);
            }
            self.landscape.forget(provider);
        }
    }

    /// A block is stored on these providers, one for each fragment.
    pub fn placed(&mut self, providers: &[ProviderId]) {
        let blocks = self.blocks.entry(providers.len()).or_default();
        blocks.stored += 1;
        blocks.next = blocks.next.max(blocks.stored);
        let holders = self.holders(providers);
        if !self.promises.keep(&holders) {
            self.landscape.pairs_mut().count(&holders, 1);
        }
    }

    /// `blocks` blocks of before the start are on these providers (one for each fragment): a
    /// background count may tell of them at any time, in any order, while blocks come and go.
    pub fn counted(&mut self, providers: &[ProviderId], blocks: i64) {
        let known = self.blocks.entry(providers.len()).or_default();
        known.stored = known.stored.saturating_add_signed(blocks);
        known.next = known.next.max(known.stored);
        let holders = self.holders(providers);
        let blocks = blocks.clamp(i64::from(i32::MIN), i64::from(i32::MAX)) as i32;
        self.landscape.pairs_mut().count(&holders, blocks);
    }

    /// A block that was on these providers is gone.
    pub fn removed(&mut self, providers: &[ProviderId]) {
        let blocks = self.blocks.entry(providers.len()).or_default();
        blocks.stored = blocks.stored.saturating_sub(1);
        let holders = self.holders(providers);
        self.landscape.pairs_mut().count(&holders, -1);
    }

    /// The fragment `index` of a block that is on `providers` moved to `to`.
    pub fn moved(&mut self, providers: &[ProviderId], index: usize, to: ProviderId) {
        let mut after = providers.to_vec();
        if let Some(provider) = after.get_mut(index) {
            *provider = to;
        }
        let (before, after) = (self.holders(providers), self.holders(&after));
        self.landscape.pairs_mut().count(&before, -1);
        self.landscape.pairs_mut().count(&after, 1);
    }

    /// The known providers among `providers`, each once.
    fn holders(&self, providers: &[ProviderId]) -> Vec<Node> {
        let known = providers.iter().filter_map(|id| self.landscape.field().node(*id));
        let mut holders: Vec<Node> = known.collect();
        holders.sort_unstable();
        holders.dedup();
        holders
    }

    // ------------------------------------------------------------ choosing

    /// One provider for each of the s + r fragments of a new block.
    ///
    /// # Errors
    /// [`PlacementError`] when the write margin cannot be had.
    pub fn choose(&mut self, request: &PlacementRequest) -> Result<Placement, PlacementError> {
        let code = request.code;
        self.check_usable(code)?;
        let order = self.order(code, request.fragment_bytes);
        let mut random = SplitMix::new(request.seed);
        let mut picks = std::mem::take(&mut self.picks);
        picks.clear();
        let chosen = self.pick(&order, &mut picks, &mut random);
        let nodes = picks.nodes().to_vec();
        let degraded = self.degraded(&order, &picks);
        self.picks = picks;
        chosen?;
        let mut nodes = nodes;
        // Data fragments are read more than parity: they must not stick to a site or column.
        random.shuffle(&mut nodes);
        let field = self.landscape.field();
        let providers = nodes.iter().map(|node| field.known(*node).provider).collect();
        self.promise(&nodes);
        self.blocks.entry(code.fragments()).or_default().next = order.number + 1;
        Ok(Placement { providers, degraded })
    }

    /// A provider for a lost fragment of a stored block: the newcomer in the dead provider's slot,
    /// else whoever the chooser takes.
    ///
    /// # Errors
    /// [`PlacementError::NoSpace`] when nobody can take it without the block losing its write margin.
    pub fn choose_repair(
        &mut self,
        request: &RepairRequest<'_>,
    ) -> Result<RepairTarget, PlacementError> {
        let order = self.order(request.code, request.fragment_bytes);
        let mut random = SplitMix::new(request.seed);
        let hidden = self.hide(request.avoid);
        let mut picks = std::mem::take(&mut self.picks);
        picks.clear();
        let target = self.pick_repair(&order, request, &mut picks, &mut random);
        if let Ok(target) = target {
            self.push(&order, &mut picks, target);
        }
        let degraded = self.degraded(&order, &picks);
        self.picks = picks;
        for (provider, free_bytes) in hidden {
            self.landscape.update(provider, free_bytes, true);
        }
        let target = target?;
        let dead = request.holders.get(request.lost).copied();
        let dead = dead.and_then(|dead| self.landscape.field().node(dead));
        let metapeers = self.landscape.metapeers(request.code.fragments());
        let heir = dead.and_then(|dead| metapeers?.heir(dead));
        let provider = self.landscape.field().known(target).provider;
        Ok(RepairTarget { provider, inherited: heir == Some(target), degraded })
    }

    /// Makes providers unusable for a moment; returns what is to be restored.
    fn hide(&mut self, providers: &[ProviderId]) -> Vec<(ProviderId, u64)> {
        let field = self.landscape.field();
        let usable = providers.iter().filter_map(|provider| {
            let known = field.known(field.node(*provider)?);
            (known.present && known.usable).then_some((*provider, known.free_bytes))
        });
        let mut hidden: Vec<(ProviderId, u64)> = usable.collect();
        hidden.sort_unstable();
        hidden.dedup();
        for (provider, free_bytes) in &hidden {
            self.landscape.update(*provider, *free_bytes, false);
        }
        hidden
    }

    fn check_usable(&self, code: Code) -> Result<(), PlacementError> {
        let (needed, usable) = (providers_needed(code), self.landscape.field().usable());
        if usable < needed {
            let write_margin = code.write_margin();
            return Err(PlacementError::TooFewProviders { usable, needed, code, write_margin });
        }
        Ok(())
    }

    fn no_space(&self, order: &Order) -> PlacementError {
        let field = self.landscape.field();
        let roomy = field.iter().filter(|(node, _)| field.fits(*node, 1, order.fragment_bytes));
        let (code, needed) = (order.code, providers_needed(order.code));
        PlacementError::NoSpace { roomy: roomy.count(), usable: field.usable(), needed, code }
    }

    fn order(&mut self, code: Code, fragment_bytes: u64) -> Order {
        self.landscape.form(code.fragments());
        let number = self.blocks.get(&code.fragments()).map_or(0, |blocks| blocks.next);
        let rule = SiteRule::new(self.landscape.field(), code, self.site_fragments_max);
        Order { code, fragment_bytes, number, rule }
    }

    fn push(&self, order: &Order, picks: &mut Picks, node: Node) {
        if let Some(metapeers) = self.landscape.metapeers(order.code.fragments()) {
            picks.push(&self.landscape, metapeers, node);
        }
    }

    fn pick(
        &mut self,
        order: &Order,
        picks: &mut Picks,
        random: &mut SplitMix,
    ) -> Result<(), PlacementError> {
        let f = order.code.fragments();
        let landscape = &self.landscape;
        if let Some(metapeers) = landscape.metapeers(f) {
            let view = View { landscape, metapeers, order };
            if landscape.field().usable() >= f {
                self.chooser.pick(view, picks, random);
            }
            if picks.len() < f {
                picks.clear();
                Spread.pick(view, picks, random);
            }
        }
        let mut nodes = picks.nodes().to_vec();
        nodes.sort_unstable();
        let held = nodes.chunk_by(|one, other| one == other).map(<[Node]>::len);
        if picks.len() == f && margin_holds(order.code, held) {
            Ok(())
        } else {
            Err(self.no_space(order))
        }
    }

    fn pick_repair(
        &mut self,
        order: &Order,
        request: &RepairRequest<'_>,
        picks: &mut Picks,
        random: &mut SplitMix,
    ) -> Result<Node, PlacementError> {
        let landscape = &self.landscape;
        let Some(metapeers) = landscape.metapeers(order.code.fragments()) else {
            return Err(self.no_space(order));
        };
        let mut dead = None;
        for (index, provider) in request.holders.iter().enumerate() {
            let node = landscape.field().node(*provider);
            if index == request.lost {
                dead = node;
            } else if let Some(node) = node {
                picks.push(landscape, metapeers, node);
            }
        }
        let view = View { landscape, metapeers, order };
        let target = self.chooser.pick_repair(view, picks, dead, random);
        let target = target.or_else(|| Spread.pick_repair(view, picks, dead, random));
        let Some(target) = target else { return Err(self.no_space(order)) };
        let mut nodes = picks.nodes().to_vec();
        nodes.push(target);
        nodes.sort_unstable();
        let most = nodes.chunk_by(|one, other| one == other).map(<[Node]>::len).max();
        // A crowded provider must not become so full that the block hangs on it.
        let code = order.code;
        let held = nodes.chunk_by(|one, other| one == other).map(<[Node]>::len);
        if most > Some(1) && nodes.len() == code.fragments() && !margin_holds(code, held) {
            return Err(self.no_space(order));
        }
        Ok(target)
    }

    fn promise(&mut self, nodes: &[Node]) {
        let mut holders = nodes.to_vec();
        holders.sort_unstable();
        holders.dedup();
        self.landscape.pairs_mut().count(&holders, 1);
        if let Some(lapsed) = self.promises.give(&holders) {
            self.landscape.pairs_mut().count(&lapsed, -1);
        }
    }

    fn degraded(&self, order: &Order, picks: &Picks) -> Option<Degraded> {
        let field = self.landscape.field();
        let nodes = picks.nodes();
        let on_provider = nodes.iter().map(|node| picks.on(*node)).max().unwrap_or(0);
        let places = nodes.iter().map(|node| field.known(*node).place);
        let sites = places.filter(|place| *place != PlaceId::POOL);
        let in_site = sites.map(|place| picks.in_place(place)).max().unwrap_or(0);
        let in_site_max = order.rule.fragments_max;
        let degraded = on_provider > 1 || in_site_max.is_some_and(|most| in_site > most);
        degraded.then_some(Degraded { on_provider, in_site, in_site_max })
    }
}
