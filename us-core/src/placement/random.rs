//! The reference that knows nothing of pairs or sites: distinct providers drawn in proportion to
//! free space.

use super::Chooser;
use super::draw::SplitMix;
use super::field::Node;
use super::picks::{Picks, View};

/// Draws for each fragment, before whoever is left is taken.
const DRAWS_MAX: usize = 64;

/// Distinct providers, drawn in proportion to free space.
#[derive(Clone, Copy, Debug, Default)]
pub struct Random;

/// One allowed provider, drawn; where draws find none, any.
fn draw(view: View<'_>, picks: &Picks, random: &mut SplitMix) -> Option<Node> {
    let field = view.landscape.field();
    let free =
        |node: &Node| picks.on(*node) == 0 && field.fits(*node, 1, view.order.fragment_bytes);
    let drawn = (0..DRAWS_MAX).find_map(|_| field.draw(random).filter(free));
    drawn.or_else(|| field.iter().map(|(node, _)| node).find(free))
}

impl Chooser for Random {
    fn name(&self) -> &'static str {
        "random"
    }

    fn pick(&mut self, view: View<'_>, picks: &mut Picks, random: &mut SplitMix) {
        while picks.len() < view.order.code.fragments() {
            let Some(node) = draw(view, picks, random) else { return };
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
        draw(view, survivors, random)
    }
}
