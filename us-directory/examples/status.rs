//! How long a status takes: the engine's own answer, with blocks placed at random, each with places
//! of its own, and with blocks placed as the directory places them.
//!
//! `cargo run --release -p us-directory --example status -- 10000000 1000 random` (or `placed`).

use std::collections::HashMap;
use std::time::Instant;

use anyhow::{Context, bail};
use us_core::geometry::Code;
use us_core::ids::ProviderId;
use us_core::placement::{Hybrid, PlacementRequest, Placer, ProviderFacts, Spread};
use us_directory::engine::health::{CountedSlice, Signature};
use us_directory::engine::{
    Answer, AskId, ConnId, Effect, Engine, EngineConfig, Event, Moment, Peer, Question,
    SystemEntropy,
};
use us_directory::records::BlockRecord;
use us_directory::store::memory::MemoryStore;
use us_proto::v1::{ProviderHello, ProviderReport, ProviderUp, provider_up};

const SLICE: u64 = 65_536;
const ASKS: usize = 9;
const FRAGMENTS: usize = 6;

/// A small generator of random numbers: what is measured is not it.
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }
}

fn resident_mib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
    kib.unwrap_or(0) >> 10
}

fn report() -> ProviderReport {
    ProviderReport {
        capacity_bytes: 1 << 40,
        free_bytes: 1 << 39,
        accepts_puts: true,
        ..Default::default()
    }
}

struct World {
    engine: Engine,
    now_ms: u64,
}

impl World {
    fn step(&mut self, event: Event) -> anyhow::Result<Vec<Effect>> {
        self.now_ms += 1;
        Ok(self.engine.step(Moment { now_ms: self.now_ms, unix_ms: 0 }, event)?)
    }

    fn join(&mut self, number: u64) -> anyhow::Result<()> {
        let conn = ConnId(number);
        let key_hash = [number.to_be_bytes(); 4].concat();
        let peer = Peer { key_hash, name: format!("provider{number}"), ..Peer::default() };
        self.step(Event::ProviderConnected { conn, peer })?;
        let hello = ProviderHello {
            address: format!("10.{}.{}.1:1", number / 256, number % 256),
            store: vec![7; 16].into(),
            report: Some(report()),
            ..Default::default()
        };
        let up = ProviderUp { event: Some(provider_up::Event::Hello(hello)) };
        self.step(Event::Provider { conn, up })?;
        self.step(Event::Durable { seq: u64::MAX >> 1 })?;
        Ok(())
    }
}

/// Places of blocks: at random, or as the directory chooses them.
fn places(
    kind: &str,
    providers: u64,
) -> anyhow::Result<Box<dyn FnMut() -> anyhow::Result<Vec<u32>>>> {
    let mut random = Random(0x2545_f491_4f6c_dd1d);
    if kind == "random" {
        return Ok(Box::new(move || {
            let mut chosen: Vec<u32> = Vec::with_capacity(FRAGMENTS);
            while chosen.len() < FRAGMENTS {
                let provider = random.below(providers) as u32 + 1;
                if !chosen.contains(&provider) {
                    chosen.push(provider);
                }
            }
            Ok(chosen)
        }));
    }
    if kind != "placed" {
        bail!("places are random or placed, not {kind:?}");
    }
    let mut placer = Placer::new(Box::<Hybrid>::default());
    for number in 1..=providers {
        placer.upsert(&ProviderFacts {
            provider: ProviderId(number as u32),
            site: String::new(),
            address: format!("10.{}.{}.1:1", number / 256, number % 256),
            capacity_bytes: 1 << 40,
            free_bytes: 1 << 39,
            usable: true,
        });
    }
    let code = Code::new(4, 2)?;
    Ok(Box::new(move || {
        let seed = random.below(u64::MAX);
        let request = PlacementRequest { code, fragment_bytes: 1 << 20, seed };
        Ok(placer.choose(&request)?.providers.iter().map(|provider| provider.0).collect())
    }))
}

fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let blocks: u64 = arguments.next().context("how many blocks")?.parse()?;
    let providers: u64 = arguments.next().context("how many providers")?.parse()?;
    let kind = arguments.next().unwrap_or_else(|| "random".to_owned());
    let (store, _history) = MemoryStore::manual();
    // The chooser is not measured: the plainest.
    let chooser = Box::<Spread>::default();
    let config = EngineConfig::default();
    let entropy = Box::new(SystemEntropy);
    let engine = Engine::start(Box::new(store), config, entropy, chooser, [7; 16])?;
    let mut world = World { engine, now_ms: 0 };
    for number in 1..=providers {
        world.join(number)?;
    }
    let empty_mib = resident_mib();
    let mut place = places(&kind, providers)?;
    let began = Instant::now();
    let mut left = blocks;
    while left > 0 {
        let many = left.min(SLICE);
        left -= many;
        let mut signatures: HashMap<Signature, i64> = HashMap::new();
        for _ in 0..many {
            let record = BlockRecord {
                s: 4,
                r: 2,
                providers: place()?,
                durable: vec![0b11_1111].into(),
                ..Default::default()
            };
            *signatures.entry(Signature::of(&record, false)).or_default() += 1;
        }
        let slice = CountedSlice { signatures, last: left == 0, ..Default::default() };
        world.step(Event::Counted(slice))?;
    }
    println!(
        "{blocks} blocks, {providers} providers, {kind}: counted in {:.1} s",
        began.elapsed().as_secs_f64()
    );
    let mut took_ms = Vec::new();
    let mut summary = String::new();
    for ask in 0..ASKS {
        let began = Instant::now();
        let question = Question::Status;
        let effects = world.step(Event::Ask { ask: AskId(ask as u64), question })?;
        took_ms.push(began.elapsed().as_secs_f64() * 1000.0);
        for effect in effects {
            if let Effect::Answer { answer: Answer::Status(status), .. } = effect {
                let blocks = status.blocks.unwrap_or_default();
                summary = format!(
                    "{}; {} of {} readable; {} providers",
                    status.summary,
                    blocks.readable,
                    blocks.total,
                    status.providers.len()
                );
            }
        }
    }
    took_ms.sort_by(f64::total_cmp);
    let signatures = world.engine.gauges()["us_directory_signatures"];
    println!(
        "status: {:.0} ms in the middle, {:.0} ms at worst of {ASKS}; {signatures} signatures; \
         {} MiB more than before the count",
        took_ms[ASKS / 2],
        took_ms[ASKS - 1],
        resident_mib().saturating_sub(empty_mib)
    );
    println!("{summary}");
    Ok(())
}
