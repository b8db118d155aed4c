//! The scenarios that have a name.

use us_core::geometry::Code;

use super::life::{DAY_MS, HOUR_MS, Presence, YEAR_MS};
use super::links::Line;
use super::scenario::Scenario;

/// How large a scenario is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scale {
    /// Some seconds in a test.
    Small,
    /// As large as it is meant to be: minutes.
    Full,
}

/// The names and what they are.
pub const NAMES: [(&str, &str); 6] = [
    ("churn", "machines die one by one, are replaced, and fragments rot, for a year"),
    ("office", "an office by day, a few machines by night, for three weeks"),
    ("homes", "machines that are on and off at random, and die, for a month"),
    ("fire", "whole sites burn down while machines die"),
    ("adsl", "the death of machines behind 128 kb/s uplinks"),
    ("membership", "an office without a block: comings and goings alone"),
];

/// The scenario of this name.
///
/// # Errors
/// When there is none.
pub fn named(name: &str, seed: u64, scale: Scale) -> anyhow::Result<Scenario> {
    let mut scenario = match name {
        "churn" => churn(seed, scale)?,
        "office" => office(seed, scale)?,
        "homes" => homes(seed, scale)?,
        "fire" => fire(seed, scale)?,
        "adsl" => adsl(seed, scale)?,
        "membership" => membership(seed, scale)?,
        other => {
            let names: Vec<&str> = NAMES.iter().map(|(name, _)| *name).collect();
            anyhow::bail!("there is no scenario {other:?}: there are {}", names.join(", "))
        }
    };
    if scale == Scale::Full {
        scenario.name += " --full";
    }
    Ok(scenario)
}

fn churn(seed: u64, scale: Scale) -> anyhow::Result<Scenario> {
    let (peers, blocks, length_ms) = match scale {
        Scale::Small => (60, 300, 60 * DAY_MS),
        Scale::Full => (10_000, 62_500, YEAR_MS),
    };
    let mut scenario = Scenario::new("churn", seed, peers, Code::new(10, 6)?, blocks);
    scenario.sites = if scale == Scale::Small { 6 } else { 40 };
    scenario.mttf_ms = YEAR_MS / if scale == Scale::Small { 4 } else { 1 };
    scenario.newcomer_ms = 2 * DAY_MS;
    scenario.rot_ms = if scale == Scale::Small { 12 * HOUR_MS } else { HOUR_MS };
    scenario.length_ms = length_ms;
    Ok(scenario)
}

fn office(seed: u64, scale: Scale) -> anyhow::Result<Scenario> {
    let (peers, blocks) = match scale {
        Scale::Small => (50, 200),
        Scale::Full => (10_000, 62_500),
    };
    let mut scenario = Scenario::new("office", seed, peers, Code::new(10, 6)?, blocks);
    scenario.sites = 5;
    scenario.presence = Presence::Office { always_on_percent: 30 };
    scenario.length_ms = 21 * DAY_MS;
    scenario.sample_ms = HOUR_MS;
    Ok(scenario)
}

fn homes(seed: u64, scale: Scale) -> anyhow::Result<Scenario> {
    let (peers, blocks) = match scale {
        Scale::Small => (60, 200),
        Scale::Full => (2_000, 12_500),
    };
    let mut scenario = Scenario::new("homes", seed, peers, Code::new(6, 10)?, blocks);
    scenario.presence = Presence::Homes { on_ms: 12 * HOUR_MS, off_ms: 4 * HOUR_MS };
    scenario.mttf_ms = YEAR_MS / 2;
    scenario.newcomer_ms = DAY_MS;
    scenario.rot_ms = 12 * HOUR_MS;
    scenario.length_ms = 30 * DAY_MS;
    scenario.repair_within_ms = 3 * DAY_MS;
    scenario.window_ms = 5 * DAY_MS;
    Ok(scenario)
}

fn fire(seed: u64, scale: Scale) -> anyhow::Result<Scenario> {
    let (peers, blocks) = match scale {
        Scale::Small => (64, 250),
        Scale::Full => (2_000, 12_500),
    };
    let mut scenario = Scenario::new("fire", seed, peers, Code::new(10, 6)?, blocks);
    scenario.sites = 8;
    scenario.mttf_ms = YEAR_MS;
    scenario.newcomer_ms = 2 * DAY_MS;
    scenario.fires = vec![(5 * DAY_MS, 2), (30 * DAY_MS, 5)];
    scenario.length_ms = 45 * DAY_MS;
    // The brake takes a fire for a departure at first.
    scenario.window_ms = scenario.engine.clocks.brake_ms + 3 * DAY_MS;
    scenario.calm_ms = scenario.engine.clocks.brake_ms + 3 * DAY_MS;
    Ok(scenario)
}

fn adsl(seed: u64, scale: Scale) -> anyhow::Result<Scenario> {
    let (peers, blocks) = match scale {
        Scale::Small => (60, 200),
        Scale::Full => (1_000, 3_226),
    };
    let mut scenario = Scenario::new("adsl", seed, peers, Code::new(16, 15)?, blocks);
    scenario.line = Line::ADSL;
    scenario.mttf_ms = 20 * peers as u64 * HOUR_MS;
    scenario.newcomer_ms = DAY_MS;
    scenario.length_ms = 20 * DAY_MS;
    Ok(scenario)
}

fn membership(seed: u64, scale: Scale) -> anyhow::Result<Scenario> {
    let peers = if scale == Scale::Small { 500 } else { 100_000 };
    let mut scenario = Scenario::new("membership", seed, peers, Code::new(10, 6)?, 0);
    scenario.capacity = 1000;
    scenario.sites = 50;
    scenario.presence = Presence::Office { always_on_percent: 20 };
    scenario.mttf_ms = YEAR_MS;
    scenario.newcomer_ms = 2 * DAY_MS;
    scenario.length_ms = 7 * DAY_MS;
    scenario.sample_ms = HOUR_MS;
    Ok(scenario)
}
