//! The chooser of small swarms: as even as the providers allow, over providers first, then sites,
//! then metapeers; between equals it draws in proportion to free space.
//!
//! It looks at every provider for every fragment, O(N f), and is the only one that puts two fragments
//! of a block on one provider: the others leave it the blocks for which they find too few.

use super::Chooser;
use super::draw::SplitMix;
use super::field::Node;
use super::picks::{Picks, View};

/// As even as possible; crowded where there are too few providers.
#[derive(Clone, Copy, Debug, Default)]
pub struct Spread;

/// A provider that may take fragments.
struct Open {
    node: Node,
    /// Exponentially distributed with rate = free space: the smallest is drawn in proportion.
    draw: f64,
}

/// Those with space for one fragment.
fn open(view: View<'_>, random: &mut SplitMix) -> Vec<Open> {
    let everyone = view.landscape.field().iter();
    let roomy = everyone
        .filter(|(node, _)| view.landscape.field().fits(*node, 1, view.order.fragment_bytes));
    roomy
        .map(|(node, known)| {
            let draw = -(1.0 - random.unit()).ln() / known.free_bytes.max(1) as f64;
            Open { node, draw }
        })
        .collect()
}

/// Who has least of the block.
fn evenest(view: View<'_>, picks: &Picks, open: &[Open]) -> Option<Node> {
    let field = view.landscape.field();
    let fits = |open: &&Open| {
        field.fits(open.node, picks.on(open.node) as u64 + 1, view.order.fragment_bytes)
    };
    let rank = |open: &Open| {
        let place = field.known(open.node).place;
        // In the pool of the unlabelled nobody is known to be close.
        let pooled = place == super::field::PlaceId::POOL;
        let in_place = if pooled { 0 } else { picks.in_place(place) };
        (picks.on(open.node), in_place, picks.in_metapeer_of(open.node, view.metapeers))
    };
    let best = open
        .iter()
        .filter(fits)
        .min_by(|one, other| rank(one).cmp(&rank(other)).then(one.draw.total_cmp(&other.draw)));
    best.map(|open| open.node)
}

impl Chooser for Spread {
    fn name(&self) -> &'static str {
        "spread"
    }

    fn pick(&mut self, view: View<'_>, picks: &mut Picks, random: &mut SplitMix) {
        let open = open(view, random);
        while picks.len() < view.order.code.fragments() {
            let Some(node) = evenest(view, picks, &open) else { return };
            picks.push(view.landscape, view.metapeers, node);
        }
    }

    fn pick_repair(
        &mut self,
        view: View<'_>,
        survivors: &Picks,
        _dead: Option<Node>,
        random: &mut SplitMix,
    ) -> Option<Node> {
        let open = open(view, random);
        evenest(view, survivors, &open)
    }
}
