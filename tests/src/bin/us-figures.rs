//! `us-figures`: makes the tables and charts of the documentation from the real code.

use std::path::PathBuf;

use anyhow::Context as _;
use clap::{Parser, Subcommand};
use us_tests::figures;

/// Makes the tables and charts of the documentation.
#[derive(Parser)]
struct Options {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// What placement does to the cost of a death, and what reconstruction takes: docs/placement.md.
    Placement {
        /// Where the CSV and SVG files go; made if it is missing.
        #[arg(long)]
        out: PathBuf,
    },
}

fn main() -> anyhow::Result<()> {
    let Options { what: What::Placement { out } } = Options::parse();
    std::fs::create_dir_all(&out).with_context(|| format!("making {}", out.display()))?;
    figures::placement::figures(&out)?;
    figures::reconstruction::figures(&out)
}
