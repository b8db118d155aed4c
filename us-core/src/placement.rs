//! Where the fragments of a block go.
//!
//! A [`Placer`] knows the providers and which of them share blocks, and keeps the promises below; a
//! [`Chooser`] in it says whom it would take. The directory owns one placer, tells it what changes
//! (a provider came, has less space, died; a block was stored, moved, deleted), and asks it for every
//! placement lease and every repair. Pure: no clock, no I/O, no randomness but the request's seed.
//!
//! ```text
//! field      providers, sites, free space      metapeers  balanced groups, slots, heirs
//! pairs      λ: blocks two providers share     sites      q, and what each site gets
//! lines      the pseudo-affine family          lineup     lines over metapeers and slots
//! choosers   random | lines | greedy | hybrid (the default) | spread (small swarms, crowding)
//! helpers    who sends what when a block is rebuilt         paths  star, chain or sums of sites
//! ```
//! The algorithm is that of Randriamaro, Soyez, Utard and Wlazinski (GP2PC 2005, ISPDC 2005, GPC
//! 2007), completed; docs/placement.md explains it and shows what it does.
//!
//! Invariants of every placement, whatever the chooser: it has s + r entries; only providers that can
//! be reached, take puts and have the space are chosen; whichever w providers vanish, s fragments
//! remain, or there is an error; it is crowded only where there are too few providers; what one site
//! holds beyond its rule is said.

use std::fmt;

use crate::geometry::Code;
use crate::ids::ProviderId;

pub mod draw;
pub mod field;
mod greedy;
pub mod helpers;
mod hybrid;
mod landscape;
pub mod lines;
mod lineup;
pub mod metapeers;
pub mod pairs;
pub mod paths;
mod picks;
mod placer;
mod promises;
mod random;
pub mod sites;
mod spread;
#[cfg(test)]
mod tests;

use draw::SplitMix;
use field::Node;
pub use field::ProviderFacts;
pub use greedy::{Greedy, Tuning};
pub use hybrid::{Hybrid, Lined};
pub use landscape::Landscape;
pub use lineup::{Column, Lineup};
pub use picks::{Draws, Order, Picks, View};
pub use placer::Placer;
pub use random::Random;
pub use spread::Spread;

/// What is to be placed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlacementRequest {
    /// The block's code.
    pub code: Code,
    /// The most bytes one fragment can take, its record's overhead included.
    pub fragment_bytes: u64,
    /// Decides between equals: the same seed and history give the same result.
    pub seed: u64,
}

/// Where a block goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    /// The provider of each of the s + r fragments.
    pub providers: Vec<ProviderId>,
    /// What it lacks, for people.
    pub degraded: Option<Degraded>,
}

/// A fragment that is to be put elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RepairRequest<'r> {
    /// The block's code.
    pub code: Code,
    /// The most bytes one fragment can take, its record's overhead included.
    pub fragment_bytes: u64,
    /// The provider of each of the block's fragments, the lost one included.
    pub holders: &'r [ProviderId],
    /// Which fragment is lost.
    pub lost: usize,
    /// Providers that are not to take it (too slow, too busy).
    pub avoid: &'r [ProviderId],
    /// Decides between equals.
    pub seed: u64,
}

/// Where a rebuilt fragment goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RepairTarget {
    /// The provider.
    pub provider: ProviderId,
    /// It took the dead provider's slot.
    pub inherited: bool,
    /// What the block lacks then, for people.
    pub degraded: Option<Degraded>,
}

/// What a placement lacks although it keeps the write margin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Degraded {
    /// The most fragments of the block on one provider: above 1, it is crowded.
    pub on_provider: usize,
    /// The most fragments of the block in one labelled site.
    pub in_site: usize,
    /// The most there should be, q; `None` where the swarm has fewer than two labelled sites.
    pub in_site_max: Option<usize>,
}

impl fmt::Display for Degraded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.on_provider > 1 {
            write!(f, "one provider holds {} fragments of a block", self.on_provider)?;
        }
        let over = self.in_site_max.filter(|most| self.in_site > *most);
        if let Some(most) = over {
            let and = if self.on_provider > 1 { "; " } else { "" };
            let held = self.in_site;
            write!(f, "{and}one site holds {held} fragments of a block where {most} are allowed")?;
        }
        Ok(())
    }
}

/// Why a block cannot be placed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PlacementError {
    /// Not enough providers for the write margin, whatever their space.
    #[error(
        "{usable} providers can be reached; a {code} block that is to survive the loss of \
         {write_margin} needs at least {needed}"
    )]
    TooFewProviders {
        /// Providers that can be reached.
        usable: usize,
        /// The fewest that would do.
        needed: usize,
        /// The code.
        code: Code,
        /// Providers that may vanish.
        write_margin: usize,
    },
    /// There are enough providers, but too few of them have space.
    #[error(
        "{roomy} of {usable} reachable providers have space for a fragment; a {code} block needs \
         at least {needed}"
    )]
    NoSpace {
        /// Providers with space.
        roomy: usize,
        /// Providers that can be reached.
        usable: usize,
        /// The fewest that would do.
        needed: usize,
        /// The code.
        code: Code,
    },
}

/// Says whom it would take; the [`Placer`] keeps the promises.
pub trait Chooser: Send {
    /// Its name, as people select it.
    fn name(&self) -> &'static str;

    /// Adds providers to `picks` (empty at first) until it has f. May stop short: then the block is
    /// spread as evenly as the providers allow.
    fn pick(&mut self, view: View<'_>, picks: &mut Picks, random: &mut SplitMix);

    /// Who takes a fragment of a block whose other fragments are on `survivors`; `dead` had it.
    fn pick_repair(
        &mut self,
        view: View<'_>,
        survivors: &Picks,
        dead: Option<Node>,
        random: &mut SplitMix,
    ) -> Option<Node>;
}

/// Header, slot sums and trailer of a fragment's record, and what aligns it, at most.
const RECORD_OVERHEAD_BYTES: u64 = 16 << 10;

/// The most bytes a fragment of `fragment_bytes` takes at a provider.
pub const fn record_bytes_max(fragment_bytes: u64) -> u64 {
    fragment_bytes + RECORD_OVERHEAD_BYTES
}

/// The choosers by name.
///
/// Returns `None` for a name that no chooser has.
pub fn chooser(name: &str) -> Option<Box<dyn Chooser>> {
    Some(match name {
        "hybrid" => Box::<Hybrid>::default(),
        "greedy" => Box::<Greedy>::default(),
        "lines" => Box::<Lined>::default(),
        "random" => Box::<Random>::default(),
        "spread" => Box::<Spread>::default(),
        _ => return None,
    })
}

/// Whether s fragments remain when the `code.write_margin()` fullest of `held` vanish.
fn margin_holds(code: Code, held: impl Iterator<Item = usize>) -> bool {
    let mut held: Vec<usize> = held.collect();
    held.sort_unstable_by(|left, right| right.cmp(left));
    held.iter().skip(code.write_margin()).sum::<usize>() >= code.s()
}

/// The fewest providers over which a block of this code, spread evenly, keeps its write margin.
pub fn providers_needed(code: Code) -> usize {
    let fragments = code.fragments();
    let even = |providers: usize| {
        let (each, more) = (fragments / providers, fragments % providers);
        (0..providers).map(move |index| each + usize::from(index < more))
    };
    (1..=fragments).find(|providers| margin_holds(code, even(*providers))).unwrap_or(fragments)
}
