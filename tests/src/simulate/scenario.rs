//! What is simulated, and what comes out.

use us_core::geometry::{BlockGeometry, Code};
use us_core::placement::{Chooser, Hybrid, record_bytes_max};
use us_directory::engine::EngineConfig;

use super::life::{DAY_MS, HOUR_MS, MINUTE_MS, Presence};
use super::links::Line;

/// A swarm and its fate.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// The words that have `us-simulate` run it again, but for the seed.
    pub name: String,
    /// Decides everything that is not said here.
    pub seed: u64,
    /// Providers to begin with.
    pub peers: usize,
    /// Labelled sites they lie in, in turn; 0: no labels.
    pub sites: usize,
    /// The code of the one volume.
    pub code: Code,
    /// Plaintext of a block.
    pub block_bytes: usize,
    /// Blocks that are written before anything happens.
    pub blocks: usize,
    /// Fragments a provider has space for.
    pub capacity: u64,
    /// Everybody's line.
    pub line: Line,
    /// Whether owners say how fast it is.
    pub states_line: bool,
    /// When machines are on, once everything is written.
    pub presence: Presence,
    /// Mean time to the death of a machine; 0: none dies by itself.
    pub mttf_ms: u64,
    /// Mean time from a death to a newcomer of the same site; 0: nobody comes.
    pub newcomer_ms: u64,
    /// Mean time between fragments that rot, anywhere; 0: none does.
    pub rot_ms: u64,
    /// From rot to its discovery by the scrub, at most.
    pub scrub_ms: u64,
    /// Whole sites that burn down: when, which.
    pub fires: Vec<(u64, usize)>,
    /// Machines that die: when, which.
    pub deaths: Vec<(u64, usize)>,
    /// How long there are faults.
    pub length_ms: u64,
    /// How long there are none, before all has to be well.
    pub calm_ms: u64,
    /// How often the state is noted.
    pub sample_ms: u64,
    /// How long everything a provider held may take to be made again, once it was given up.
    pub repair_within_ms: u64,
    /// Fragments of one block that were lost within this time were lost together: up to r must do no
    /// harm.
    pub window_ms: u64,
    /// Whether anybody is ever given up: without it nothing is repaired, and losses are no failure.
    pub maintained: bool,
    /// Who chooses places.
    pub chooser: fn() -> Box<dyn Chooser>,
    /// The directory's own settings.
    pub engine: EngineConfig,
}

impl Scenario {
    /// A calm swarm on a LAN: what all others are made from.
    ///
    /// # Panics
    /// When the code has no geometry, which every code has.
    pub fn new(name: &str, seed: u64, peers: usize, code: Code, blocks: usize) -> Self {
        let engine = EngineConfig {
            // Streams that break are told; nothing else is expected of a provider.
            report_every_ms: 100 * 365 * DAY_MS,
            // The journal's copies and retain lists are the subject of other tests.
            copies: 0,
            retain_every_ms: 0,
            ..EngineConfig::default()
        };
        let each = (blocks * code.fragments()).div_ceil(peers.max(1)) as u64;
        Self {
            name: name.to_owned(),
            seed,
            peers,
            sites: 0,
            code,
            block_bytes: code.block_bytes_max(),
            blocks,
            capacity: each * 3 / 2 + 64,
            line: Line::LAN,
            states_line: false,
            presence: Presence::Always,
            mttf_ms: 0,
            newcomer_ms: 0,
            rot_ms: 0,
            scrub_ms: 30 * DAY_MS,
            fires: Vec::new(),
            deaths: Vec::new(),
            length_ms: 0,
            calm_ms: 3 * DAY_MS,
            sample_ms: DAY_MS,
            repair_within_ms: DAY_MS,
            window_ms: engine.clocks.dead_ms.max(engine.clocks.newcomer_ms) + DAY_MS,
            maintained: true,
            chooser: || Box::<Hybrid>::default(),
            engine,
        }
    }

    /// The shape of every block.
    pub fn geometry(&self) -> anyhow::Result<BlockGeometry> {
        Ok(BlockGeometry::new(self.code, self.block_bytes)?)
    }

    /// Bytes a provider's owner offers.
    pub fn capacity_bytes(&self) -> anyhow::Result<u64> {
        let largest = BlockGeometry::new(self.code, self.code.block_bytes_max())?;
        Ok(self.capacity * record_bytes_max(largest.fragment_bytes() as u64))
    }

    /// How far apart the directory's ticks are while it repairs, and while it does not.
    pub fn ticks_ms(&self) -> (u64, u64) {
        (10_000, 10 * MINUTE_MS)
    }
}

/// The swarm at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Sample {
    /// When, in milliseconds since the start.
    pub at_ms: u64,
    /// Machines that are on.
    pub online: usize,
    /// Machines that exist.
    pub living: usize,
    /// Blocks that can be read now, 0..1.
    pub readable: f64,
    /// Blocks that are lost.
    pub lost: usize,
    /// The mean of the fragments left of a block.
    pub intact_mean: f64,
    /// The least.
    pub intact_least: usize,
    /// Orders to rebuild or copy since the start.
    pub orders: u64,
    /// Orders under way.
    pub running: usize,
}

/// A machine that died, and its reconstruction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reconstruction {
    /// When it died.
    pub died_ms: u64,
    /// When the directory gave it up.
    pub declared_ms: Option<u64>,
    /// When the last of its fragments was there again.
    pub whole_ms: Option<u64>,
    /// Fragments it held.
    pub fragments: usize,
    /// Those that are not there again.
    pub left: usize,
}

/// What came out.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Report {
    /// The state over time.
    pub samples: Vec<Sample>,
    /// Every machine that died.
    pub deaths: Vec<Reconstruction>,
    /// Providers that were given up and lived.
    pub false_deaths: u64,
    /// Fragments made of others, and copied.
    pub rebuilt: u64,
    /// Fragments copied whole.
    pub copied: u64,
    /// Orders that failed or were taken back.
    pub failed: u64,
    /// Bytes providers sent for repairs.
    pub bytes_sent: f64,
    /// The most that one provider sent.
    pub bytes_sent_max: f64,
    /// The most fragments one provider was asked for at once.
    pub sends_max: usize,
    /// Blocks lost because more than r of their fragments went together: outside the budget.
    pub lost_beyond_budget: u64,
    /// Fragments that were put beside another of their block in one metapeer, or too many in one
    /// site, because there was no other way.
    pub crowded_unavoidably: u64,
    /// The same where there was a better place.
    pub crowded_avoidably: u64,
    /// New blocks that do not lie as they should.
    pub placed_badly: u64,
    /// Fragments that rotted.
    pub rotted: u64,
    /// Events the directory was given.
    pub steps: u64,
    /// A number that two runs of the same scenario have in common, and others have not.
    pub fingerprint: u64,
}

impl Report {
    /// Hours from giving a machine up to the last of its fragments: the mean and the longest.
    pub fn repair_hours(&self) -> (f64, f64) {
        let took = self.deaths.iter().filter_map(|death| {
            Some((death.whole_ms?.saturating_sub(death.declared_ms?)) as f64 / HOUR_MS as f64)
        });
        let took: Vec<f64> = took.collect();
        let sum: f64 = took.iter().sum();
        (sum / took.len().max(1) as f64, took.iter().copied().fold(0.0, f64::max))
    }
}
