//! Runs a crate's targets as ordinary tests: over their seeds, over damaged seeds, over random
//! bytes. Included by path, as the targets are.
//!
//! A seed is a file in fuzz/seeds/TARGET/. An input on which the fuzzer once found a bug becomes a
//! seed, and so is tried for ever.

use std::path::PathBuf;

use proptest::prelude::*;
use proptest::test_runner::{TestCaseError, TestRunner};

/// A decoder's target and its name.
pub type Target = (&'static str, fn(&[u8]));

/// The seeds of a target.
fn seeds(target: &str) -> Vec<Vec<u8>> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../fuzz/seeds").join(target);
    let files = std::fs::read_dir(&folder)
        .unwrap_or_else(|error| panic!("seeds of {target}: {error}"))
        .map(|file| std::fs::read(file.expect("a seed").path()).expect("a seed"));
    files.collect()
}

/// Runs a target over bytes made by `bytes`.
pub fn run((name, target): Target, bytes: impl Strategy<Value = Vec<u8>>) {
    let result = TestRunner::new(ProptestConfig::with_cases(300)).run(&bytes, |bytes| {
        std::panic::catch_unwind(|| target(&bytes))
            .map_err(|_| TestCaseError::fail(format!("{name} panicked")))
    });
    result.unwrap_or_else(|error| panic!("{name}: {error}"));
}

/// Every target takes its seeds, and has some.
pub fn seeds_pass(targets: &[Target]) {
    for (name, target) in targets {
        let seeds = seeds(name);
        assert!(!seeds.is_empty(), "no seeds for {name}");
        seeds.iter().for_each(|seed| target(seed));
    }
}

/// Every target takes random bytes.
pub fn random_bytes_pass(targets: &[Target]) {
    for target in targets {
        run(*target, prop::collection::vec(any::<u8>(), 0..600));
    }
}

/// Every target takes seeds with a few bytes changed, and cut.
pub fn damaged_seeds_pass(targets: &[Target]) {
    for target in targets {
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
        run(*target, damaged);
    }
}

/// Every target has its file for the fuzzer, and that file is built.
pub fn targets_are_built(targets: &[Target]) {
    let fuzz = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../fuzz");
    let manifest = std::fs::read_to_string(fuzz.join("Cargo.toml")).expect("fuzz/Cargo.toml");
    for (name, _) in targets {
        let path = format!("fuzz_targets/{name}.rs");
        assert!(fuzz.join(&path).is_file(), "{path} is missing");
        assert!(manifest.contains(&format!("path = \"{path}\"")), "{path} is not in Cargo.toml");
    }
}
