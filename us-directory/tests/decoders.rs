//! Every decoder survives every byte: the fuzzer's targets, run as ordinary tests over their seeds,
//! over damaged seeds and over random bytes.

#[path = "../../fuzz/src/us_directory.rs"]
mod targets;
#[path = "../../fuzz/src/trial.rs"]
mod trial;

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
