//! Where the fragments of a block go.
//!
//! A [`Chooser`] is pure: providers, code and seed in, one provider for each fragment out. The
//! directory calls it for every placement lease. [`Spread`] is the simple implementation; others
//! (lines, hybrid) take its place without a change elsewhere.
//!
//! Invariants of every chooser: the result has s + r entries; only providers that can be reached,
//! take puts and have the space are chosen; whichever w providers vanish, s fragments remain, or
//! there is an error.

use std::collections::HashMap;

use crate::geometry::Code;
use crate::ids::ProviderId;

pub mod draw;
pub mod helpers;
pub mod lines;

/// A provider as a chooser sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Which one.
    pub provider: ProviderId,
    /// Its site's label path; may be empty: then it says nothing about who is close.
    pub site: String,
    /// Its metapeer: providers that may fail together.
    pub metapeer: u32,
    /// What can still be put there.
    pub free_bytes: u64,
    /// Whether it can be reached and takes puts.
    pub usable: bool,
}

/// What is to be placed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlacementRequest {
    /// The block's code.
    pub code: Code,
    /// The most bytes one fragment can take, its record's overhead included.
    pub fragment_bytes: u64,
    /// Decides between equals: the same seed and providers give the same result.
    pub seed: u64,
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

/// Chooses a provider for each fragment of a block.
pub trait Chooser: Send + Sync {
    /// One provider for each of the s + r fragments.
    ///
    /// # Errors
    /// [`PlacementError`] when the write margin cannot be had.
    fn choose(
        &self,
        candidates: &[Candidate],
        request: &PlacementRequest,
    ) -> Result<Vec<ProviderId>, PlacementError>;
}

/// Spreads over distinct providers, then metapeers, then sites, as evenly as they allow; between
/// equals it draws in proportion to free space.
#[derive(Clone, Copy, Debug, Default)]
pub struct Spread;

/// A provider's share of the block that is being placed.
struct Slot<'a> {
    candidate: &'a Candidate,
    /// Exponentially distributed with rate = free space: the smallest is drawn in proportion.
    draw: f64,
    fragments: usize,
}

/// The next number of the splitmix64 sequence.
fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mixed = (*state ^ *state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ mixed >> 31
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

impl Chooser for Spread {
    fn choose(
        &self,
        candidates: &[Candidate],
        request: &PlacementRequest,
    ) -> Result<Vec<ProviderId>, PlacementError> {
        let code = request.code;
        let needed = providers_needed(code);
        let usable = candidates.iter().filter(|candidate| candidate.usable).count();
        if usable < needed {
            let write_margin = code.write_margin();
            return Err(PlacementError::TooFewProviders { usable, needed, code, write_margin });
        }
        let mut state = request.seed;
        let mut slots: Vec<Slot<'_>> = Vec::with_capacity(usable);
        let roomy = |candidate: &&Candidate| {
            candidate.usable && candidate.free_bytes >= request.fragment_bytes
        };
        for candidate in candidates.iter().filter(roomy) {
            let uniform = (next(&mut state) >> 11) as f64 / (1u64 << 53) as f64;
            let draw = -(1.0 - uniform).ln() / candidate.free_bytes.max(1) as f64;
            slots.push(Slot { candidate, draw, fragments: 0 });
        }
        let roomy = slots.len();
        let no_space = PlacementError::NoSpace { roomy, usable, needed, code };
        let mut metapeers: HashMap<u32, usize> = HashMap::new();
        let mut sites: HashMap<&str, usize> = HashMap::new();
        let mut chosen = Vec::with_capacity(code.fragments());
        for _ in 0..code.fragments() {
            let fits = |slot: &&mut Slot<'_>| {
                let fragments = slot.fragments as u64 + 1;
                fragments.saturating_mul(request.fragment_bytes) <= slot.candidate.free_bytes
            };
            let rank = |slot: &Slot<'_>| {
                let site = slot.candidate.site.as_str();
                let in_site = if site.is_empty() { 0 } else { *sites.get(site).unwrap_or(&0) };
                let in_metapeer = *metapeers.get(&slot.candidate.metapeer).unwrap_or(&0);
                (slot.fragments, in_metapeer, in_site)
            };
            let best = slots.iter_mut().filter(fits).min_by(|left, right| {
                rank(left).cmp(&rank(right)).then(left.draw.total_cmp(&right.draw))
            });
            let Some(slot) = best else {
                return Err(no_space);
            };
            slot.fragments += 1;
            chosen.push(slot.candidate.provider);
            *metapeers.entry(slot.candidate.metapeer).or_default() += 1;
            *sites.entry(slot.candidate.site.as_str()).or_default() += 1;
        }
        if margin_holds(code, slots.iter().map(|slot| slot.fragments)) {
            Ok(chosen)
        } else {
            Err(no_space)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn candidates(count: u32) -> Vec<Candidate> {
        (1..=count)
            .map(|provider| Candidate {
                provider: ProviderId(provider),
                site: String::new(),
                metapeer: provider,
                free_bytes: 1 << 30,
                usable: true,
            })
            .collect()
    }

    fn request(s: usize, r: usize, seed: u64) -> PlacementRequest {
        let code = Code::new(s, r).unwrap();
        PlacementRequest { code, fragment_bytes: 1 << 20, seed }
    }

    fn counts(chosen: &[ProviderId]) -> Vec<usize> {
        let mut counts: HashMap<ProviderId, usize> = HashMap::new();
        chosen.iter().for_each(|provider| *counts.entry(*provider).or_default() += 1);
        let mut counts: Vec<usize> = counts.into_values().collect();
        counts.sort_unstable_by(|left, right| right.cmp(left));
        counts
    }

    #[test]
    fn fragments_share_providers_only_where_there_are_too_few() {
        let choose = |count| Spread.choose(&candidates(count), &request(4, 2, 7));
        assert_eq!(counts(&choose(6).unwrap()), [1; 6]);
        assert_eq!(counts(&choose(4).unwrap()), [2, 2, 1, 1]);
        assert_eq!(counts(&choose(3).unwrap()), [2, 2, 2]);
        let error = choose(2).unwrap_err();
        assert!(matches!(error, PlacementError::TooFewProviders { usable: 2, needed: 3, .. }));
    }

    #[test]
    fn sites_share_evenly() {
        let mut twelve = candidates(12);
        for (index, candidate) in twelve.iter_mut().enumerate() {
            candidate.site = ["a", "b", "c"][index % 3].to_owned();
        }
        for seed in 0..50 {
            let chosen = Spread.choose(&twelve, &request(4, 2, seed)).unwrap();
            let in_a = chosen.iter().filter(|provider| provider.0 % 3 == 1).count();
            assert_eq!(in_a, 2);
        }
    }

    #[test]
    fn roomy_providers_get_more() {
        let mut twelve = candidates(12);
        twelve[0].free_bytes <<= 3;
        let mut hits = 0;
        for seed in 0..400 {
            let chosen = Spread.choose(&twelve, &request(2, 1, seed)).unwrap();
            hits += usize::from(chosen.contains(&ProviderId(1)));
        }
        assert!(hits > 200, "{hits} of 400, where an even draw gives 100");
    }

    proptest! {
        #[test]
        fn the_margin_holds_or_there_is_an_error(
            s in 1usize..12, r in 0usize..8, seed: u64,
            shape in proptest::collection::vec((0u64..6, 0u32..5, 0u8..4, any::<bool>()), 0..24),
        ) {
            let request = request(s, r, seed);
            let candidates: Vec<Candidate> = shape
                .iter()
                .enumerate()
                .map(|(index, (free, metapeer, site, usable))| Candidate {
                    provider: ProviderId(index as u32),
                    site: if *site == 0 { String::new() } else { site.to_string() },
                    metapeer: *metapeer,
                    free_bytes: free << 20,
                    usable: *usable,
                })
                .collect();
            let Ok(chosen) = Spread.choose(&candidates, &request) else { return Ok(()); };
            prop_assert_eq!(chosen.len(), s + r);
            let held = counts(&chosen);
            prop_assert!(margin_holds(request.code, held.into_iter()));
            for provider in &chosen {
                let candidate = &candidates[provider.0 as usize];
                let here = chosen.iter().filter(|other| *other == provider).count() as u64;
                prop_assert!(candidate.usable && here << 20 <= candidate.free_bytes);
            }
            prop_assert_eq!(Spread.choose(&candidates, &request).unwrap(), chosen);
        }
    }
}
