//! What the choosers of us-core do to the cost of a death: the tables of docs/placement.md.

use std::path::Path;

use us_core::geometry::Code;
use us_core::placement::draw::SplitMix;
use us_core::placement::lines::{Lines, Rule, lines_bound};
use us_core::placement::{Chooser, Greedy, Hybrid, Lined, Placer, Random, Tuning};

use super::chart::Chart;
use super::swarm::{Cost, Peer, Swarm};
use super::table::Table;

/// Seeds that a mean is taken over.
const SEEDS: u64 = 4;
/// Fragments a provider has in the figures of cost against N and over time.
const FRAGMENTS_A_PEER: usize = 100;
/// What a provider can hold there: a fifth stays free, so that repairs have a choice.
const CAPACITY: u64 = 125;

/// A chooser with its name.
type Contender = (&'static str, fn() -> Box<dyn Chooser>);

const CONTENDERS: [Contender; 4] = [
    ("random", || Box::<Random>::default()),
    ("lines", || Box::new(Lined::new(EIGHT))),
    ("greedy", || Box::new(Greedy::new(EIGHT))),
    ("hybrid", || Box::new(Hybrid::new(EIGHT))),
];
/// How repairs do when nobody inherits.
const WITHOUT_HEIRS: [Contender; 2] = [
    ("greedy, no heirs", || Box::new(Greedy::new(NO_HEIRS))),
    ("hybrid, no heirs", || Box::new(Hybrid::new(NO_HEIRS))),
];
/// d = 8.
const EIGHT: Tuning = Tuning { candidates: 8, repair_candidates: 32, inherit: true };
/// Repairs go to the best of 32, the newcomer in the dead provider's slot or not.
const NO_HEIRS: Tuning = Tuning { candidates: 8, repair_candidates: 32, inherit: false };
/// Repairs go to whoever is drawn.
const CARELESS: Tuning = Tuning { candidates: 8, repair_candidates: 1, inherit: false };
/// Repairs go to the best of eight.
const BEST_OF_8: Tuning = Tuning { candidates: 8, repair_candidates: 8, inherit: false };

/// Makes all figures.
///
/// # Errors
/// When a file cannot be written, or a block finds no place.
pub fn figures(out: &Path) -> anyhow::Result<()> {
    line_counts().publish(out, "lines")?;
    turnover_table()?.publish(out, "turnover")?;
    fill_table()?.publish(out, "fill")?;
    cost_against_size(out)?;
    cost_over_time(out)
}

fn line_counts() -> Table {
    let mut table = Table::new("Lines", ["f", "N", "slide", "modulus", "bound"]);
    let sizes = [(5, 25), (5, 40), (5, 125), (5, 1000), (7, 49), (7, 343), (7, 2058), (31, 961)];
    for (f, n) in sizes.into_iter().chain([(31, 1000)]) {
        let count = |rule| Lines::new(n, f, rule).count().to_string();
        let bound = lines_bound(n, f).to_string();
        let (slide, modulus) = (count(Rule::Slide), count(Rule::Modulus));
        table.row(vec![f.to_string(), n.to_string(), slide, modulus, bound]);
    }
    table
}

// ---------------------------------------------------------------- loaded, and after a turnover

/// A swarm to be filled and turned over.
struct Scenario {
    name: &'static str,
    peers: fn(u64) -> Vec<Peer>,
    /// How full it is made.
    fill: f64,
    site_fragments_max: Option<usize>,
}

const SCENARIOS: [Scenario; 2] = [
    Scenario {
        name: "N=368, 16 equal sites, f=16, s=10",
        peers: |_| equal_sites(368, 16, 100),
        fill: 0.77,
        site_fragments_max: None,
    },
    Scenario {
        name: "N=360, 20 Zipf(0.8) sites, capacities 50/100/200, f=16, s=10, q=4",
        peers: zipf_sites,
        fill: 0.70,
        site_fragments_max: Some(4),
    },
];

impl Scenario {
    /// The swarm with this share of its space used.
    fn filled(
        &self,
        chooser: Box<dyn Chooser>,
        code: Code,
        fill: f64,
        seed: u64,
    ) -> anyhow::Result<Swarm> {
        let peers = (self.peers)(seed);
        let capacity: u64 = peers.iter().map(|peer| peer.capacity).sum();
        let mut placer = Placer::new(chooser);
        if let Some(most) = self.site_fragments_max {
            placer = placer.with_site_fragments_max(most);
        }
        let mut swarm = Swarm::new(placer, code, &peers, seed);
        swarm.fill((capacity as f64 * fill / code.fragments() as f64) as usize)?;
        Ok(swarm)
    }
}

/// How much the loaded figures depend on the fill.
fn fill_table() -> anyhow::Result<Table> {
    let title = "Loaded, by fill: max λ / mean cost a peer (mean of 4 seeds)";
    let mut table = Table::new(title, ["scenario", "fill", "random", "greedy", "hybrid"]);
    let code = Code::new(10, 6)?;
    for scenario in &SCENARIOS {
        for percent in [65, 70, 75, 80, 85] {
            let mut row = vec![scenario.name.to_owned(), format!("{percent} %")];
            for (_, chooser) in CONTENDERS.iter().filter(|(name, _)| *name != "lines") {
                let fill = f64::from(percent) / 100.0;
                let costs: Vec<Cost> = (0..SEEDS)
                    .map(|seed| Ok(scenario.filled(chooser(), code, fill, seed)?.cost()))
                    .collect::<anyhow::Result<_>>()?;
                let cost = Cost::mean_of(&costs);
                row.push(format!("{:.1} / {:.1}", cost.lambda_max, cost.mean));
            }
            table.row(row);
        }
    }
    Ok(table)
}

fn equal_sites(count: usize, sites: usize, capacity: u64) -> Vec<Peer> {
    let site = |number: usize| format!("s{}", number % sites);
    (0..count).map(|number| Peer { site: site(number), capacity }).collect()
}

/// 360 providers of three sizes in 20 sites whose sizes fall off as k^-0.8.
fn zipf_sites(seed: u64) -> Vec<Peer> {
    const SITES: usize = 20;
    const PEERS: usize = 360;
    let weights: Vec<f64> = (1..=SITES).map(|k| (k as f64).powf(-0.8)).collect();
    let total: f64 = weights.iter().sum();
    let mut sizes: Vec<usize> =
        weights.iter().map(|weight| (weight / total * PEERS as f64) as usize).collect();
    let missing = PEERS - sizes.iter().sum::<usize>();
    sizes.iter_mut().take(missing).for_each(|size| *size += 1);
    let mut random = SplitMix::new(seed);
    let sited = sizes.iter().enumerate().flat_map(|(site, size)| vec![site; *size]);
    sited
        .map(|site| Peer {
            site: format!("s{site}"),
            capacity: [50, 100, 200][random.below(3) as usize],
        })
        .collect()
}

fn turnover_table() -> anyhow::Result<Table> {
    let head = [
        "scenario",
        "algorithm",
        "max λ",
        "mean cost a peer",
        "blocks lost with the worst site",
        "placements and repairs said to be degraded",
    ];
    let title = "Loaded → after one full turnover (mean of 4 seeds)";
    let mut table = Table::new(title, head);
    let code = Code::new(10, 6)?;
    for scenario in &SCENARIOS {
        for (name, chooser) in CONTENDERS.into_iter().chain(WITHOUT_HEIRS) {
            let (mut loaded, mut turned) = (Vec::new(), Vec::new());
            for seed in 0..SEEDS {
                let mut swarm = scenario.filled(chooser(), code, scenario.fill, seed)?;
                loaded.push(swarm.cost());
                let victims = swarm.victims();
                swarm.replace(&victims)?;
                turned.push(swarm.cost());
            }
            let (loaded, turned) = (Cost::mean_of(&loaded), Cost::mean_of(&turned));
            let both = |part: fn(&Cost) -> f64, digits: usize| {
                format!("{:.digits$} → {:.digits$}", part(&loaded), part(&turned))
            };
            table.row(vec![
                scenario.name.to_owned(),
                name.to_owned(),
                both(|cost| cost.lambda_max, 1),
                both(|cost| cost.mean, 1),
                both(|cost| 100.0 * cost.lost_with_site, 1) + " %",
                both(|cost| cost.degraded, 0),
            ]);
        }
    }
    Ok(table)
}

// ---------------------------------------------------------------- against N

fn cost_against_size(out: &Path) -> anyhow::Result<()> {
    let head = ["f", "N", "bound", "lines: folds", "lines", "random", "greedy", "hybrid"];
    let title = "Cost of the worst death, 100 fragments a peer (max λ; 1 seed)";
    let mut table = Table::new(title, head);
    let wide: &[usize] = &[100, 200, 350, 500, 700, 961, 1000, 1400, 2000];
    let narrow: &[usize] = &[49, 100, 200, 400, 700, 1000];
    for (code, sizes) in [(Code::new(16, 15)?, wide), (Code::new(4, 3)?, narrow)] {
        let f = code.fragments();
        let mut lines: Vec<Vec<(f64, f64)>> = vec![Vec::new(); 1 + CONTENDERS.len()];
        for n in sizes {
            let blocks = n * FRAGMENTS_A_PEER / f;
            let bound = (FRAGMENTS_A_PEER * (f - 1)).div_ceil(n - 1);
            let folds = (blocks as u64).div_ceil(Lines::new(*n, f, Rule::Modulus).count());
            let peer = Peer { site: String::new(), capacity: CAPACITY };
            lines[0].push((*n as f64, bound as f64));
            let mut costs = Vec::new();
            for (at, (_, chooser)) in CONTENDERS.iter().enumerate() {
                let peers = vec![peer.clone(); *n];
                let mut swarm = Swarm::new(Placer::new(chooser()), code, &peers, 1);
                swarm.fill(blocks)?;
                let cost = swarm.cost().lambda_max;
                lines[at + 1].push((*n as f64, cost));
                costs.push(cost);
            }
            let cells = [f as f64, *n as f64, bound as f64, folds as f64, costs[1], costs[0]];
            let cells = cells.into_iter().chain([costs[2], costs[3]]);
            table.row(cells.map(|cell| cell.to_string()).collect());
        }
        let title = format!("Worst death, f = {f}, 100 fragments a peer");
        let mut chart = Chart::new(&title, "providers N", "fragments one survivor sends", true);
        let names = ["bound"].into_iter().chain(CONTENDERS.iter().map(|(name, _)| *name));
        names.zip(lines).for_each(|(name, points)| chart.line(name, points));
        chart.publish(out, &format!("cost-against-n-f{f}"))?;
    }
    table.publish(out, "cost-against-n")
}

// ---------------------------------------------------------------- over time

/// A way to choose the targets of repairs.
struct Upkeep {
    name: &'static str,
    /// Equal labelled sites, each one metapeer; 0: no labels.
    sites: usize,
    chooser: fn() -> Box<dyn Chooser>,
}

const UPKEEPS: [Upkeep; 7] = [
    Upkeep { name: "random", sites: 0, chooser: || Box::<Random>::default() },
    Upkeep {
        name: "7 metapeers, random targets",
        sites: 7,
        chooser: || Box::new(Lined::new(CARELESS)),
    },
    Upkeep {
        name: "294 metapeers, random targets",
        sites: 294,
        chooser: || Box::new(Lined::new(CARELESS)),
    },
    Upkeep { name: "7, best of 8", sites: 7, chooser: || Box::new(Lined::new(BEST_OF_8)) },
    Upkeep { name: "294, best of 8", sites: 294, chooser: || Box::new(Lined::new(BEST_OF_8)) },
    Upkeep { name: "7, heirs", sites: 7, chooser: || Box::new(Hybrid::new(EIGHT)) },
    Upkeep { name: "294, heirs", sites: 294, chooser: || Box::new(Hybrid::new(EIGHT)) },
];

fn cost_over_time(out: &Path) -> anyhow::Result<()> {
    const PEERS: usize = 2058;
    const STEPS: usize = 8;
    let head = ["repair targets", "0", "1/4", "1/2", "1"];
    let title = "Cost of the worst death over one turnover (f=7, N=2058, 100 fragments a peer)";
    let mut table = Table::new(title, head);
    let mut chart =
        Chart::new("Worst death over time, f = 7, N = 2058", "turnovers", "max λ", false);
    let code = Code::new(4, 3)?;
    for upkeep in &UPKEEPS {
        let peers = if upkeep.sites == 0 {
            vec![Peer { site: String::new(), capacity: CAPACITY }; PEERS]
        } else {
            equal_sites(PEERS, upkeep.sites, CAPACITY)
        };
        let mut swarm = Swarm::new(Placer::new((upkeep.chooser)()), code, &peers, 1);
        swarm.fill(PEERS * FRAGMENTS_A_PEER / code.fragments())?;
        let mut points = vec![(0.0, swarm.cost().lambda_max)];
        let victims = swarm.victims();
        for (step, some) in victims.chunks(PEERS.div_ceil(STEPS)).enumerate() {
            swarm.replace(some)?;
            points.push(((step + 1) as f64 / STEPS as f64, swarm.cost().lambda_max));
        }
        let at = |step: usize| points[step].1.to_string();
        let cells = [0, STEPS / 4, STEPS / 2, STEPS].map(at);
        table.row([upkeep.name.to_owned()].into_iter().chain(cells).collect());
        chart.line(upkeep.name, points);
    }
    chart.publish(out, "cost-over-time")?;
    table.publish(out, "cost-over-time")
}
