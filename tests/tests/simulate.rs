//! The simulated swarm: every scenario over seeds, with all checks; few in the quick tier, many in the
//! full one. A failure names the seed and the command that has it again.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use us_tests::simulate::scenarios::{Scale, named};
use us_tests::simulate::{self, Report};
use us_tests::tier;

/// Runs a scenario over the seeds of the tier; returns the reports.
fn histories(name: &str, quick: u32, full: u32) -> Vec<Report> {
    let first = tier::seed();
    let seeds = first..first + u64::from(tier::rounds(quick, full, 20 * full));
    let one = |seed| simulate::run(&named(name, seed, Scale::Small).unwrap());
    seeds.map(|seed| one(seed).unwrap_or_else(|error| panic!("{error:#}"))).collect()
}

#[test]
fn a_swarm_outlives_its_machines() {
    for report in histories("churn", 3, 40) {
        assert!(report.deaths.len() > 10 && report.rotted > 10, "{report:?}");
        assert!(report.rebuilt > 100 && report.lost_beyond_budget == 0);
    }
}

#[test]
fn an_evening_is_no_repair_storm() {
    for report in histories("office", 3, 40) {
        assert_eq!((report.rebuilt, report.copied, report.false_deaths), (0, 0, 0));
        let nights = report.samples.iter().filter(|sample| sample.online < 25).count();
        assert!(nights > 100, "the office is left in the evening");
    }
}

#[test]
fn machines_that_come_and_go_at_random_keep_everything() {
    for report in histories("homes", 2, 40) {
        assert!(report.lost_beyond_budget == 0 && report.rebuilt > 0, "{report:?}");
    }
}

#[test]
fn a_fire_takes_a_site_and_nothing_else() {
    for report in histories("fire", 2, 40) {
        assert!(report.deaths.len() >= 16 && report.lost_beyond_budget == 0, "{report:?}");
    }
}

#[test]
fn slow_uplinks_are_enough() {
    for report in histories("adsl", 1, 10) {
        assert!(report.rebuilt > 500 && report.lost_beyond_budget == 0, "{report:?}");
    }
}

#[test]
fn an_office_without_a_block_is_no_trouble_either() {
    for report in histories("membership", 1, 10) {
        assert_eq!((report.rebuilt, report.false_deaths), (0, 0));
    }
}

#[test]
fn one_seed_is_one_history() {
    for name in ["churn", "homes", "fire"] {
        let run = |seed| simulate::run(&named(name, seed, Scale::Small).unwrap()).unwrap();
        let (one, again, other) = (run(5), run(5), run(6));
        assert!(one == again, "{name}");
        assert_ne!(one.fingerprint, other.fingerprint);
    }
}
