//! The swarm under virtual time: the directory's own engine, with its state machine, repair queue and
//! placer, against providers that really have or have not what they are asked for.
//!
//! ```text
//!            calendar (time, order)                directory (the engine, a store in memory)
//! comes, goes, dies, burns, rots --+             +--> Welcome, Rebuild, Check, Delete --+
//! newcomers, ticks, samples -------+--> swarm ---+                                      |
//! transfers that end (links) ------+      ^   hello, report, Rebuilt, Damage            |
//!                                         +---------------------------------------------+
//! ```
//! One seed is one history. Years pass in minutes: nothing happens between two entries of the calendar.
//!
//! *Fault budget.* Machines come and go, all at once too; they die with their disks, one by one or a
//! whole site together; fragments rot and are found by a later scrub. Within `window_ms` no block
//! loses more than r fragments; what loses more is counted and is no failure.
//!
//! *Checked all the time* ([`checks`]): within the budget no block is lost; every order ends, and
//! everything a dead machine held is there again in time; no fragment lies beside another of its block
//! in one metapeer, nor too many in one site, while there is a better place; what a provider is asked
//! for stays within the limits; no block is repaired twice at once; while nothing is wrong `status`
//! says so and nothing is repaired; nobody is given up by an evening. *At the end*: every fragment
//! lies where its record says and nowhere else, and `status` is well.

mod blocks;
mod calendar;
mod checks;
pub mod directory;
pub mod life;
pub mod links;
mod orders;
pub mod scenario;
pub mod scenarios;
mod swarm;

use std::fmt::Write as _;

use anyhow::Context as _;

pub use scenario::{Report, Sample, Scenario};
use swarm::Swarm;

/// Runs a scenario to its end.
///
/// # Errors
/// When a check fails: the error says which, when, and how to have the same history again.
pub fn run(scenario: &Scenario) -> anyhow::Result<Report> {
    let rerun = || {
        let (name, seed) = (&scenario.name, scenario.seed);
        format!(
            "scenario {name}, seed {seed}; again: cargo run --release -p us-tests --bin \
             us-simulate -- run {name} --seed {seed}"
        )
    };
    Swarm::live(scenario).with_context(rerun)
}

/// The samples as comma-separated values, one line each.
pub fn samples_csv(samples: &[Sample]) -> String {
    let head = "hours,online,living,readable,lost,fragments_mean,fragments_least,orders,running\n";
    samples.iter().fold(head.to_owned(), |mut csv, sample| {
        let hours = sample.at_ms as f64 / life::HOUR_MS as f64;
        // Writing to a string cannot fail.
        let _ = writeln!(
            csv,
            "{hours:.2},{},{},{:.6},{},{:.4},{},{},{}",
            sample.online,
            sample.living,
            sample.readable,
            sample.lost,
            sample.intact_mean,
            sample.intact_least,
            sample.orders,
            sample.running,
        );
        csv
    })
}
