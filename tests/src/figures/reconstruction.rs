//! What a death takes, and what maintenance is worth: placement and its helpers by themselves, and the
//! simulated swarm with the directory's own engine.

use std::path::Path;

use us_core::geometry::Code;
use us_core::placement::helpers::{Rebuild, Senders, assign};
use us_core::placement::{Chooser, Greedy, Hybrid, Placer, Random, Tuning};

use super::chart::Chart;
use super::swarm::{Peer, Swarm};
use super::table::Table;
use crate::simulate::life::{DAY_MS, HOUR_MS, Presence, YEAR_MS};
use crate::simulate::links::Line;
use crate::simulate::scenario::{Report, Scenario};
use crate::simulate::{self, Sample};

/// d = 8.
const EIGHT: Tuning = Tuning { candidates: 8, repair_candidates: 32, inherit: true };
/// A chooser with its name.
type Contender = (&'static str, fn() -> Box<dyn Chooser>);
const CONTENDERS: [Contender; 3] = [
    ("random", || Box::<Random>::default()),
    ("greedy", || Box::new(Greedy::new(EIGHT))),
    ("hybrid", || Box::new(Hybrid::new(EIGHT))),
];

/// Makes all figures.
///
/// # Errors
/// When a file cannot be written, a block finds no place, or a check of the simulator fails.
pub fn figures(out: &Path) -> anyhow::Result<()> {
    dead_peer_hours(out)?;
    worst_site(out)?;
    maintenance(out)?;
    fire(out)?;
    office_week(out)
}

// ---------------------------------------------------------------- hours of a dead peer

/// Fragments a peer has: of 1 MB each, 4 hours of a 128 kb/s uplink.
const FRAGMENTS_A_PEER: usize = 230;
/// Seconds of that uplink for one of them: as long as one of 10 Mb/s takes to receive 78.
const FRAGMENT_S: f64 = 1e6 / Line::ADSL.up;
/// Deaths that a mean is taken over.
const DEATHS: usize = 8;

/// Hours until a dead peer's fragments are made again: where all survivors send all they share with
/// it, and where helpers are chosen.
fn hours_of_a_death(swarm: &Swarm, code: Code, deaths: usize) -> (f64, f64) {
    let (mut all_s, mut chosen_s) = (0.0, 0.0);
    for lost in swarm.deaths(deaths) {
        let mut shared = vec![0u32; swarm.peers_end()];
        let rebuilds: Vec<Rebuild> = lost
            .into_iter()
            .map(|holders| Rebuild { holders, needed: code.s() })
            .inspect(|rebuild| rebuild.holders.iter().for_each(|holder| shared[*holder] += 1))
            .collect();
        let most = shared.iter().copied().max().unwrap_or(0);
        let helped = assign(&Senders::equal(swarm.peers_end()), &rebuilds).busiest();
        all_s += f64::from(most) * FRAGMENT_S;
        chosen_s += helped * FRAGMENT_S;
    }
    let hours = |seconds: f64| seconds / deaths as f64 / 3600.0;
    (hours(all_s), hours(chosen_s))
}

/// One death in the simulated swarm behind the same lines: hours from giving it up to the last
/// fragment. With an heir all of them go to the newcomer, else to everybody.
fn simulated_hours(peers: usize, code: Code, heir: bool) -> anyhow::Result<f64> {
    let blocks = peers * FRAGMENTS_A_PEER / code.fragments();
    let mut scenario = Scenario::new("figure", 1, peers, code, blocks);
    let fragment_bytes = scenario.geometry()?.fragment_bytes() as f64;
    let scale = fragment_bytes / 1e6;
    scenario.line = Line { up: Line::ADSL.up * scale, down: Line::ADSL.down * scale };
    scenario.deaths = vec![(HOUR_MS, 7)];
    scenario.newcomer_ms = if heir { HOUR_MS } else { 0 };
    scenario.length_ms = DAY_MS;
    // What is asked of an uplink is done long before its deadline.
    scenario.engine.repair.sends_max = 4;
    scenario.engine.repair.target_jobs_max = FRAGMENTS_A_PEER;
    scenario.engine.repair.deadline_ms = HOUR_MS;
    let report = simulate::run(&scenario)?;
    Ok(report.repair_hours().1)
}

fn dead_peer_hours(out: &Path) -> anyhow::Result<()> {
    let code = Code::new(16, 15)?;
    let f = code.fragments();
    let head = [
        "N",
        "groups",
        "random, all send",
        "random, helpers",
        "greedy, all send",
        "greedy, helpers",
        "hybrid, all send",
        "hybrid, helpers",
        "simulated, nobody came",
        "simulated, to an heir",
    ];
    let title = "Hours until a dead peer's 230 fragments of 1 MB are made again (f=31, s=16, 128 kb/s \
                 up, 10 Mb/s down)";
    let mut table = Table::new(title, head);
    let mut chart = Chart::new("A dead peer, 230 MB, 128 kb/s up", "providers N", "minutes", true);
    let groups = FRAGMENTS_A_PEER as f64 * FRAGMENT_S / 3600.0;
    let mut lines: Vec<Vec<(f64, f64)>> = vec![Vec::new(); 3 + 2 * CONTENDERS.len()];
    for n in [100, 200, 500, 961, 1400, 2000] {
        let mut row = vec![n.to_string(), format!("{groups:.2}")];
        lines[0].push((n as f64, groups * 60.0));
        for (at, (_, chooser)) in CONTENDERS.iter().enumerate() {
            let capacity = FRAGMENTS_A_PEER as u64 * 5 / 4;
            let peers = vec![Peer { site: String::new(), capacity }; n];
            let mut swarm = Swarm::new(Placer::new(chooser()), code, &peers, 1);
            swarm.fill(n * FRAGMENTS_A_PEER / f)?;
            let (all, chosen) = hours_of_a_death(&swarm, code, DEATHS);
            for (which, hours) in [all, chosen].into_iter().enumerate() {
                lines[1 + 2 * at + which].push((n as f64, hours * 60.0));
                row.push(format!("{hours:.3}"));
            }
        }
        for (at, heir) in [false, true].into_iter().enumerate() {
            let simulated = simulated_hours(n, code, heir)?;
            lines[1 + 2 * CONTENDERS.len() + at].push((n as f64, simulated * 60.0));
            row.push(format!("{simulated:.3}"));
        }
        table.row(row);
    }
    let names = CONTENDERS
        .iter()
        .flat_map(|(name, _)| [format!("{name}, all send"), format!("{name}, helpers")]);
    let names = ["groups of f".to_owned()].into_iter().chain(names);
    let names = names.chain(["simulated", "simulated, heir"].map(str::to_owned));
    names.zip(lines).for_each(|(name, points)| chart.line(&name, points));
    chart.publish(out, "dead-peer-hours")?;
    table.publish(out, "dead-peer-hours")
}

// ---------------------------------------------------------------- the worst site

fn worst_site(out: &Path) -> anyhow::Result<()> {
    let code = Code::new(10, 6)?;
    let title = "Blocks lost with the worst of so many equal sites, % (N=360, f=16, s=10, 70 % full; \
                 mean of 4 seeds)";
    let mut table = Table::new(title, ["sites", "random", "greedy", "hybrid"]);
    let mut chart = Chart::new("Loss with the worst site", "sites", "% of blocks", false);
    let mut lines: Vec<Vec<(f64, f64)>> = vec![Vec::new(); CONTENDERS.len()];
    for sites in [2, 3, 4, 5, 6, 8, 10, 12, 16, 20] {
        let mut row = vec![sites.to_string()];
        for (at, (_, chooser)) in CONTENDERS.iter().enumerate() {
            let mut lost = 0.0;
            for seed in 0..4 {
                let peer = |at: usize| Peer { site: format!("s{}", at % sites), capacity: 100 };
                let peers: Vec<Peer> = (0..360).map(peer).collect();
                let mut swarm = Swarm::new(Placer::new(chooser()), code, &peers, seed);
                swarm.fill(360 * 70 / code.fragments())?;
                lost += 100.0 * swarm.cost().lost_with_site / 4.0;
            }
            lines[at].push((sites as f64, lost));
            row.push(format!("{lost:.1}"));
        }
        table.row(row);
    }
    CONTENDERS.iter().zip(lines).for_each(|((name, _), points)| chart.line(name, points));
    chart.publish(out, "worst-site")?;
    table.publish(out, "worst-site")
}

// ---------------------------------------------------------------- with and without maintenance

fn days(sample: &Sample) -> f64 {
    sample.at_ms as f64 / DAY_MS as f64
}

/// Points of a chart, no more than about 120 of them.
fn points(report: &Report, x: fn(&Sample) -> f64, y: fn(&Sample) -> f64) -> Vec<(f64, f64)> {
    let step = report.samples.len().div_ceil(120).max(1);
    report.samples.iter().step_by(step).map(|sample| (x(sample), y(sample))).collect()
}

fn maintenance(out: &Path) -> anyhow::Result<()> {
    let code = Code::new(10, 6)?;
    let mut scenario = Scenario::new("figure", 1, 200, code, 2_000);
    scenario.sites = 20;
    scenario.mttf_ms = YEAR_MS;
    scenario.newcomer_ms = 2 * DAY_MS;
    scenario.length_ms = 2 * YEAR_MS;
    let kept = simulate::run(&scenario)?;
    scenario.maintained = false;
    scenario.engine.clocks.dead_ms = 1000 * YEAR_MS;
    let left = simulate::run(&scenario)?;
    let title = "Fragments left of a block (200 providers, f=16, s=10, MTTF 1 year)";
    let head = [
        "days",
        "kept: mean",
        "kept: least",
        "kept: lost %",
        "left alone: mean",
        "left alone: least",
        "left alone: lost %",
    ];
    let mut table = Table::new(title, head);
    let lost = |sample: &Sample| 100.0 * sample.lost as f64 / 2_000.0;
    for (one, other) in kept.samples.iter().zip(&left.samples).step_by(30) {
        let cells = [
            days(one),
            one.intact_mean,
            one.intact_least as f64,
            lost(one),
            other.intact_mean,
            other.intact_least as f64,
            lost(other),
        ];
        table.row(cells.map(|cell| format!("{cell:.2}")).to_vec());
    }
    let mut chart = Chart::new("Fragments left of a block", "days", "fragments", false);
    chart.line("kept: mean", points(&kept, days, |sample| sample.intact_mean));
    chart.line("kept: least", points(&kept, days, |sample| sample.intact_least as f64));
    chart.line("left alone: mean", points(&left, days, |sample| sample.intact_mean));
    chart.line("left alone: least", points(&left, days, |sample| sample.intact_least as f64));
    chart.line("s", vec![(0.0, 10.0), (730.0, 10.0)]);
    chart.publish(out, "maintenance")?;
    table.publish(out, "maintenance")
}

// ---------------------------------------------------------------- a fire

fn fire(out: &Path) -> anyhow::Result<()> {
    let code = Code::new(10, 6)?;
    let mut scenario = Scenario::new("figure", 1, 368, code, 2_000);
    scenario.sites = 16;
    scenario.fires = vec![(2 * DAY_MS, 3)];
    scenario.newcomer_ms = 2 * DAY_MS;
    scenario.length_ms = 3 * DAY_MS;
    scenario.calm_ms = scenario.engine.clocks.brake_ms + 4 * DAY_MS;
    scenario.window_ms = scenario.length_ms + scenario.calm_ms;
    scenario.sample_ms = HOUR_MS;
    let report = simulate::run(&scenario)?;
    let title = "A site of 16 burns down on day 2 (368 providers, f=16, s=10)";
    let mut table = Table::new(title, ["days", "mean", "least", "readable %", "lost", "orders"]);
    for sample in report.samples.iter().step_by(12) {
        table.row(vec![
            format!("{:.1}", days(sample)),
            format!("{:.3}", sample.intact_mean),
            sample.intact_least.to_string(),
            format!("{:.1}", 100.0 * sample.readable),
            sample.lost.to_string(),
            sample.orders.to_string(),
        ]);
    }
    let mut chart = Chart::new("A site burns down on day 2", "days", "fragments left", false);
    chart.line("mean", points(&report, days, |sample| sample.intact_mean));
    chart.line("least", points(&report, days, |sample| sample.intact_least as f64));
    chart.line("s", vec![(0.0, 10.0), (14.0, 10.0)]);
    chart.publish(out, "fire")?;
    table.publish(out, "fire")
}

// ---------------------------------------------------------------- an office's week

fn office_week(out: &Path) -> anyhow::Result<()> {
    const PEERS: usize = 300;
    const STAYING: [u64; 3] = [30, 60, 75];
    let title = "A week of an office: share of the blocks that can be read, % (300 providers, f=16, \
                 s=10; so many machines are left on at night)";
    let head = ["hour", "online, 30 % stay", "30 %", "60 %", "75 %", "orders"];
    let mut table = Table::new(title, head);
    let mut chart =
        Chart::new("A week of an office, from Monday", "hours", "% online or readable", false);
    let mut weeks: Vec<Vec<Sample>> = Vec::new();
    for always_on_percent in STAYING {
        let mut scenario = Scenario::new("figure", 1, PEERS, Code::new(10, 6)?, 2_000);
        scenario.sites = 15;
        scenario.presence = Presence::Office { always_on_percent };
        scenario.length_ms = 21 * DAY_MS;
        scenario.sample_ms = HOUR_MS;
        let report = simulate::run(&scenario)?;
        // The third week, when the profiles are believed.
        let hours = |sample: &Sample| sample.at_ms / HOUR_MS;
        let week = report.samples.into_iter().filter(|sample| (336..504).contains(&hours(sample)));
        weeks.push(week.collect());
    }
    let online = |sample: &Sample| 100.0 * sample.online as f64 / PEERS as f64;
    for at in 0..weeks[0].len() {
        let here = &weeks[0][at];
        let readable = |which: usize| format!("{:.1}", 100.0 * weeks[which][at].readable);
        table.row(vec![
            (here.at_ms / HOUR_MS - 336).to_string(),
            format!("{:.1}", online(here)),
            readable(0),
            readable(1),
            readable(2),
            weeks.iter().map(|week| week[at].orders).sum::<u64>().to_string(),
        ]);
    }
    let hour = |sample: &Sample| (sample.at_ms / HOUR_MS - 336) as f64;
    let all = |y: &dyn Fn(&Sample) -> f64, which: usize| -> Vec<(f64, f64)> {
        weeks[which].iter().map(|sample| (hour(sample), y(sample))).collect()
    };
    chart.line("online, 30 % stay", all(&online, 0));
    for (which, staying) in STAYING.iter().enumerate() {
        let readable = |sample: &Sample| 100.0 * sample.readable;
        chart.line(&format!("readable, {staying} %"), all(&readable, which));
    }
    chart.publish(out, "office-week")?;
    table.publish(out, "office-week")
}
