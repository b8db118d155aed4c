//! Placements and repairs, in microseconds: `cargo bench -p us-core --bench placement`.
//!
//! A swarm of N equal providers in equal sites (or without sites) is filled with blocks; then each
//! chooser places more of them, telling the placer of every block and of the space it took, as the
//! directory does. The best of several rounds counts: the machine may be shared. The last columns
//! compare with the random chooser of the same run.

use std::time::Instant;

use clap::Parser;
use us_core::geometry::Code;
use us_core::ids::ProviderId;
use us_core::placement::pairs::{DENSE_NODES_MAX, PairCounters};
use us_core::placement::{
    Chooser, Greedy, Hybrid, Lined, PlacementRequest, Placer, ProviderFacts, Random, RepairRequest,
    Tuning,
};

const FRAGMENT_BYTES: u64 = 1 << 20;
const CAPACITY_BYTES: u64 = 4096 * FRAGMENT_BYTES;

/// Measures placement.
#[derive(Parser)]
struct Options {
    /// Providers.
    #[arg(long, default_values_t = [1000])]
    providers: Vec<u32>,
    /// The code, as S+R.
    #[arg(long, default_value = "10+6")]
    code: String,
    /// Labelled sites; 0: no provider has a label.
    #[arg(long, default_values_t = [0, 20])]
    sites: Vec<u32>,
    /// Blocks stored before the measurement.
    #[arg(long, default_value_t = 4000)]
    stored: usize,
    /// Placements a round.
    #[arg(long, default_value_t = 250)]
    placements: usize,
    /// Rounds; the best one counts.
    #[arg(long, default_value_t = 40)]
    rounds: usize,
    /// Given by `cargo bench`; means nothing here.
    #[arg(long, hide = true)]
    bench: bool,
}

/// A placer with the free space of its providers.
struct Subject {
    placer: Placer,
    code: Code,
    free: Vec<u64>,
    blocks: Vec<Vec<ProviderId>>,
    seed: u64,
}

impl Subject {
    fn new(
        chooser: Box<dyn Chooser>,
        dense_nodes_max: usize,
        providers: u32,
        sites: u32,
        code: Code,
    ) -> Self {
        let pairs = PairCounters::with_dense_nodes_max(dense_nodes_max);
        let mut placer = Placer::with_pairs(chooser, pairs);
        for number in 0..providers {
            let site = if sites == 0 { String::new() } else { format!("s{}", number % sites) };
            placer.upsert(&ProviderFacts {
                provider: ProviderId(number),
                site,
                address: String::new(),
                capacity_bytes: CAPACITY_BYTES,
                free_bytes: CAPACITY_BYTES,
                usable: true,
            });
        }
        let free = vec![CAPACITY_BYTES; providers as usize];
        Self { placer, code, free, blocks: Vec::new(), seed: 0 }
    }

    fn place(&mut self) {
        self.seed += 1;
        let request =
            PlacementRequest { code: self.code, fragment_bytes: FRAGMENT_BYTES, seed: self.seed };
        let placement = self.placer.choose(&request).expect("there is space");
        for provider in &placement.providers {
            let free = &mut self.free[provider.0 as usize];
            *free -= FRAGMENT_BYTES;
            self.placer.update(*provider, *free, true);
        }
        self.placer.placed(&placement.providers);
        self.blocks.push(placement.providers);
    }

    /// Looks for a target of one fragment of each of the last `count` blocks.
    fn look_for_targets(&mut self, count: usize) {
        for block in self.blocks.iter().rev().take(count) {
            self.seed += 1;
            let request = RepairRequest {
                code: self.code,
                fragment_bytes: FRAGMENT_BYTES,
                holders: block,
                lost: self.seed as usize % block.len(),
                avoid: &[],
                seed: self.seed,
            };
            self.placer.choose_repair(&request).expect("there is space");
        }
    }
}

fn choosers() -> [(&'static str, Box<dyn Chooser>); 6] {
    let tuning = |candidates| Tuning { candidates, ..Tuning::default() };
    [
        ("random", Box::<Random>::default()),
        ("lines", Box::<Lined>::default()),
        ("greedy, d = 8", Box::new(Greedy::new(tuning(8)))),
        ("greedy, d = 16", Box::new(Greedy::new(tuning(16)))),
        ("hybrid, d = 8", Box::new(Hybrid::new(tuning(8)))),
        ("hybrid, d = 16", Box::new(Hybrid::new(tuning(16)))),
    ]
}

/// The best time of a placement and of a repair, in microseconds.
fn measure(options: &Options, mut subject: Subject) -> (f64, f64) {
    (0..options.stored).for_each(|_| subject.place());
    let (mut place, mut repair) = (f64::INFINITY, f64::INFINITY);
    for _ in 0..options.rounds {
        let start = Instant::now();
        (0..options.placements).for_each(|_| subject.place());
        place = place.min(start.elapsed().as_secs_f64());
        let start = Instant::now();
        subject.look_for_targets(options.placements);
        repair = repair.min(start.elapsed().as_secs_f64());
    }
    let each = 1e6 / options.placements as f64;
    (place * each, repair * each)
}

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    let code: Code = options.code.parse()?;
    println!("µs a call on one core, code {code}; (x) is the ratio to random in the same run\n");
    println!("| N | sites | pairs | chooser | placement | repair target |");
    println!("|--:|--:|---|---|--:|--:|");
    for providers in &options.providers {
        for sites in &options.sites {
            for (pairs, dense_nodes_max) in [("dense", DENSE_NODES_MAX), ("sparse", 0)] {
                let mut random = None;
                for (name, chooser) in choosers() {
                    let subject = Subject::new(chooser, dense_nodes_max, *providers, *sites, code);
                    let (place, repair) = measure(&options, subject);
                    let (base, base_repair) = *random.get_or_insert((place, repair));
                    println!(
                        "| {providers} | {sites} | {pairs} | {name} | {place:.1} ({:.1}) | \
                         {repair:.1} ({:.1}) |",
                        place / base,
                        repair / base_repair
                    );
                }
            }
        }
    }
    Ok(())
}
