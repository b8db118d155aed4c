//! Figures and tables that the documentation shows, made by the real code from a seed.
//!
//! `cargo run --release -p us-tests --bin us-figures -- placement --out DIR` prints its tables as
//! markdown and writes them as CSV, with line charts as SVG. The same seed gives the same files.

pub mod chart;
pub mod placement;
pub mod reconstruction;
pub mod swarm;
pub mod table;
