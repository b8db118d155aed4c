//! Every decoder survives every byte: the fuzzer's targets, run as ordinary tests over their seeds,
//! over damaged seeds and over random bytes.

#[path = "../../fuzz/src/us_core.rs"]
mod targets;
#[path = "../../fuzz/src/trial.rs"]
mod trial;

use proptest::prelude::*;
use targets::TARGETS;

#[test]
fn seeds_pass() {
    trial::seeds_pass(&TARGETS);
}

#[test]
fn random_bytes_pass() {
    trial::random_bytes_pass(&TARGETS);
}

#[test]
fn damaged_seeds_pass() {
    trial::damaged_seeds_pass(&TARGETS);
}

#[test]
fn targets_are_built() {
    trial::targets_are_built(&TARGETS);
}

/// Trailers of the right length for their geometry, which random bytes hardly ever have.
#[test]
fn trailers_of_the_right_length_pass() {
    let sizes = (1u8..20, 0u8..10, 0u8..4, any::<u8>(), prop_oneof![Just(4usize), Just(16)]);
    let bytes = sizes.prop_flat_map(|(s, r, slots, index, fingerprint)| {
        let trailer_bytes = 4 * (1 + usize::from(slots)) + fingerprint * usize::from(s + r) + 4;
        prop::collection::vec(any::<u8>(), trailer_bytes)
            .prop_map(move |trailer| [&[s, r, slots, index][..], &trailer].concat())
    });
    trial::run(("fragment_trailer", targets::fragment_trailer), bytes);
}
