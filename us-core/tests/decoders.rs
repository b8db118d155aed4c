//! Every decoder survives every byte: the fuzzer's targets, run as ordinary tests over their seeds,
//! over damaged seeds and over random bytes.
//!
//! A seed is a file in fuzz/seeds/TARGET/. An input on which the fuzzer once found a bug becomes a
//! seed, and so is tried for ever.

use std::path::PathBuf;

use proptest::prelude::*;
use proptest::test_runner::{TestCaseError, TestRunner};

#[path = "../../fuzz/src/us_core.rs"]
mod targets;

use targets::{TARGETS, Target};

/// The seeds of a target.
fn seeds(target: &str) -> Vec<Vec<u8>> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../fuzz/seeds").join(target);
    let files = std::fs::read_dir(&folder)
        .unwrap_or_else(|error| panic!("seeds of {target}: {error}"))
        .map(|file| std::fs::read(file.expect("a seed").path()).expect("a seed"));
    files.collect()
}

/// Runs a target over bytes made by `bytes`.
fn run((name, target): Target, bytes: impl Strategy<Value = Vec<u8>>) {
    let result = TestRunner::new(ProptestConfig::with_cases(300)).run(&bytes, |bytes| {
        std::panic::catch_unwind(|| target(&bytes))
            .map_err(|_| TestCaseError::fail(format!("{name} panicked")))
    });
    result.unwrap_or_else(|error| panic!("{name}: {error}"));
}

#[test]
fn seeds_pass() {
    for (name, target) in TARGETS {
        let seeds = seeds(name);
        assert!(!seeds.is_empty(), "no seeds for {name}");
        seeds.iter().for_each(|seed| target(seed));
    }
}

#[test]
fn random_bytes_pass() {
    for target in TARGETS {
        run(target, prop::collection::vec(any::<u8>(), 0..600));
    }
}

#[test]
fn damaged_seeds_pass() {
    for target in TARGETS {
        let seed = prop::sample::select(seeds(target.0));
        let damage = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4);
        let damaged = (seed, damage, any::<prop::sample::Index>(), any::<bool>()).prop_map(
            |(mut bytes, damage, cut, is_cut)| {
                if bytes.is_empty() {
                    return bytes;
                }
                for (at, byte) in damage {
                    let at = at.index(bytes.len());
                    bytes[at] = byte;
                }
                if is_cut {
                    bytes.truncate(cut.index(bytes.len()));
                }
                bytes
            },
        );
        run(target, damaged);
    }
}

/// Trailers of the right length for their geometry, which random bytes hardly ever have.
#[test]
fn trailers_of_the_right_length_pass() {
    let sizes = (1u8..20, 0u8..10, 0u8..4, any::<u8>());
    let bytes = sizes.prop_flat_map(|(s, r, slots, index)| {
        let trailer_bytes = 4 * (1 + usize::from(slots)) + 4 * usize::from(s + r) + 4;
        prop::collection::vec(any::<u8>(), trailer_bytes)
            .prop_map(move |trailer| [&[s, r, slots, index][..], &trailer].concat())
    });
    run(("fragment_trailer", targets::fragment_trailer), bytes);
}
