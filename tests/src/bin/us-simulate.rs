//! `us-simulate`: runs a swarm under virtual time, with the directory's own engine.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::Context as _;
use clap::{Parser, Subcommand};
use us_tests::simulate::scenarios::{NAMES, Scale, named};
use us_tests::simulate::{self, Report};

/// Runs a swarm under virtual time, with the directory's own engine.
#[derive(Parser)]
struct Options {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// The scenarios there are.
    List,
    /// Runs a scenario; fails where a check does.
    Run {
        /// Which.
        scenario: String,
        /// The first seed.
        #[arg(long, default_value_t = 1)]
        seed: u64,
        /// So many seeds, one after the other.
        #[arg(long, default_value_t = 1)]
        seeds: u64,
        /// As large as the scenario is meant to be: minutes.
        #[arg(long)]
        full: bool,
        /// Writes the samples as CSV.
        #[arg(long)]
        csv: Option<PathBuf>,
    },
}

fn main() -> anyhow::Result<()> {
    match Options::parse().what {
        What::List => NAMES.iter().for_each(|(name, what)| println!("{name:<12}{what}")),
        What::Run { scenario, seed, seeds, full, csv } => {
            let scale = if full { Scale::Full } else { Scale::Small };
            for seed in seed..seed + seeds {
                let began = Instant::now();
                let scenario = named(&scenario, seed, scale)?;
                let report = simulate::run(&scenario)?;
                print(seed, began.elapsed().as_secs_f64(), &report);
                if let Some(path) = &csv {
                    let text = simulate::samples_csv(&report.samples);
                    std::fs::write(path, text)
                        .with_context(|| format!("writing {}", path.display()))?;
                }
            }
        }
    }
    Ok(())
}

fn print(seed: u64, took_s: f64, report: &Report) {
    let (mean, longest) = report.repair_hours();
    let least = report.samples.iter().map(|sample| sample.readable).fold(1.0, f64::min);
    println!(
        "seed {seed}: {took_s:.1} s, {} steps; {} died, {} given up alive; {} rebuilt, {} copied, {} \
         failed; repair {mean:.2} h, at most {longest:.2} h; readable at least {:.2} %; lost beyond \
         the budget {}; beside another: {} unavoidably, {} avoidably; placed badly {}; at most {} \
         sends at once; fingerprint {:016x}",
        report.steps,
        report.deaths.len(),
        report.false_deaths,
        report.rebuilt,
        report.copied,
        report.failed,
        100.0 * least,
        report.lost_beyond_budget,
        report.crowded_unavoidably,
        report.crowded_avoidably,
        report.placed_badly,
        report.sends_max,
        report.fingerprint,
    );
}
