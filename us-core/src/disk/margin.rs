//! The write margin: how many fragments remain, whichever providers vanish.

use std::collections::HashMap;

use super::FragmentBits;
use crate::geometry::Code;
use crate::ids::ProviderId;

/// Durable fragments that remain after the worst loss of `margin` providers: those that hold the
/// most durable fragments. `providers` has one entry a fragment.
pub fn durable_after_loss(
    providers: &[ProviderId],
    durable: &FragmentBits,
    margin: usize,
) -> usize {
    let mut held: HashMap<ProviderId, usize> = HashMap::new();
    for (index, provider) in providers.iter().enumerate() {
        if durable.contains(index) {
            *held.entry(*provider).or_default() += 1;
        }
    }
    let mut counts: Vec<usize> = held.into_values().collect();
    counts.sort_unstable();
    counts.iter().rev().skip(margin).sum()
}

/// Whether a block may be acknowledged: whichever w providers vanish, s durable fragments remain.
pub fn margin_holds(code: Code, providers: &[ProviderId], durable: &FragmentBits) -> bool {
    durable_after_loss(providers, durable, code.write_margin()) >= code.s()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The least that remains, over every choice of `margin` providers.
    fn brute_force(providers: &[ProviderId], durable: &FragmentBits, margin: usize) -> usize {
        let mut distinct = providers.to_vec();
        distinct.sort_unstable();
        distinct.dedup();
        let remaining = |lost: u32| {
            let is_lost = |provider| {
                let at = distinct.binary_search(provider).unwrap();
                lost >> at & 1 == 1
            };
            let fragments = providers.iter().enumerate();
            fragments.filter(|(index, at)| durable.contains(*index) && !is_lost(at)).count()
        };
        (0..1u32 << distinct.len())
            .filter(|lost| lost.count_ones() as usize <= margin)
            .map(remaining)
            .min()
            .unwrap()
    }

    proptest! {
        #[test]
        fn worst_loss_is_the_worst(
            providers in prop::collection::vec(0u32..7, 1..14),
            durable: u16,
            margin in 0usize..5,
        ) {
            let providers: Vec<_> = providers.into_iter().map(ProviderId).collect();
            let mut bits = FragmentBits::from_bytes(&durable.to_le_bytes());
            (providers.len()..16).for_each(|index| bits.remove(index));
            prop_assert_eq!(
                durable_after_loss(&providers, &bits, margin),
                brute_force(&providers, &bits, margin)
            );
        }
    }

    #[test]
    fn crowded_placements_hold_while_enough_remain() {
        let code = Code::new(4, 2).unwrap();
        let places = |ids: [u32; 6]| ids.map(ProviderId);
        let all = FragmentBits::all(6);
        assert!(margin_holds(code, &places([1, 2, 3, 4, 1, 2]), &all));
        assert!(!margin_holds(code, &places([1, 1, 1, 2, 2, 2]), &all));
        assert!(!margin_holds(code, &places([1; 6]), &all));
        assert!(margin_holds(code, &places([1, 2, 3, 4, 5, 6]), &FragmentBits::all(5)));
        assert!(!margin_holds(code, &places([1, 2, 3, 4, 5, 6]), &FragmentBits::all(4)));
        let bare = Code::new(3, 0).unwrap();
        assert!(margin_holds(bare, &places([1; 6])[..3], &FragmentBits::all(3)));
    }
}
