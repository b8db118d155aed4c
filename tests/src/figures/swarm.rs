//! A simulated swarm under the real choosers: it fills, providers die and are replaced, and what one
//! death would cost is counted from the blocks' locations, not from the placer's own counters.
//!
//! Deterministic from its seed. Space is counted in fragments of one size.

use std::collections::HashMap;

use anyhow::Context as _;
use us_core::geometry::Code;
use us_core::ids::ProviderId;
use us_core::placement::draw::SplitMix;
use us_core::placement::{PlacementRequest, Placer, ProviderFacts, RepairRequest};

/// Bytes of the one fragment size.
const FRAGMENT_BYTES: u64 = 1 << 20;

/// A provider to begin with.
#[derive(Clone, Debug)]
pub struct Peer {
    /// Its site's label; may be empty.
    pub site: String,
    /// What it can hold, in fragments.
    pub capacity: u64,
}

#[derive(Clone, Debug)]
struct Held {
    peer: Peer,
    fragments: Vec<(usize, usize)>,
}

/// What the death of one provider, or of one site, would cost.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Cost {
    /// The most blocks any two providers share.
    pub lambda_max: f64,
    /// The mean over providers of the most blocks one other shares with it.
    pub mean: f64,
    /// The share of the blocks that would be lost with the worst site, 0..1.
    pub lost_with_site: f64,
    /// Placements and repairs that said they are degraded.
    pub degraded: f64,
}

impl Cost {
    /// The mean of several.
    pub fn mean_of(costs: &[Self]) -> Self {
        let mean = |part: fn(&Self) -> f64| {
            costs.iter().map(part).sum::<f64>() / costs.len().max(1) as f64
        };
        Self {
            lambda_max: mean(|cost| cost.lambda_max),
            mean: mean(|cost| cost.mean),
            lost_with_site: mean(|cost| cost.lost_with_site),
            degraded: mean(|cost| cost.degraded),
        }
    }
}

/// The swarm.
#[derive(Debug)]
pub struct Swarm {
    placer: Placer,
    code: Code,
    random: SplitMix,
    blocks: Vec<Vec<ProviderId>>,
    held: HashMap<ProviderId, Held>,
    next: u32,
    degraded: u64,
}

impl Swarm {
    /// A swarm of `peers` without blocks.
    pub fn new(placer: Placer, code: Code, peers: &[Peer], seed: u64) -> Self {
        let mut swarm = Self {
            placer,
            code,
            random: SplitMix::new(seed),
            blocks: Vec::new(),
            held: HashMap::new(),
            next: 0,
            degraded: 0,
        };
        peers.iter().for_each(|peer| swarm.join(peer.clone()));
        swarm
    }

    fn join(&mut self, peer: Peer) {
        let provider = ProviderId(self.next);
        self.next += 1;
        self.placer.upsert(&ProviderFacts {
            provider,
            site: peer.site.clone(),
            address: String::new(),
            capacity_bytes: peer.capacity * FRAGMENT_BYTES,
            free_bytes: peer.capacity * FRAGMENT_BYTES,
            usable: true,
        });
        self.held.insert(provider, Held { peer, fragments: Vec::new() });
    }

    fn put(&mut self, provider: ProviderId, block: usize, index: usize) {
        let Some(held) = self.held.get_mut(&provider) else { return };
        held.fragments.push((block, index));
        let free = held.peer.capacity.saturating_sub(held.fragments.len() as u64);
        self.placer.update(provider, free * FRAGMENT_BYTES, true);
    }

    /// Stores `blocks` more blocks.
    ///
    /// # Errors
    /// When they find no place.
    pub fn fill(&mut self, blocks: usize) -> anyhow::Result<()> {
        for _ in 0..blocks {
            let seed = self.random.next();
            let request =
                PlacementRequest { code: self.code, fragment_bytes: FRAGMENT_BYTES, seed };
            let block = self.blocks.len();
            let placement =
                self.placer.choose(&request).with_context(|| format!("placing block {block}"))?;
            self.degraded += u64::from(placement.degraded.is_some());
            self.placer.placed(&placement.providers);
            for (index, provider) in placement.providers.iter().enumerate() {
                self.put(*provider, block, index);
            }
            self.blocks.push(placement.providers);
        }
        Ok(())
    }

    /// The providers of now, in random order.
    pub fn victims(&mut self) -> Vec<ProviderId> {
        let mut victims: Vec<ProviderId> = self.held.keys().copied().collect();
        victims.sort_unstable();
        self.random.shuffle(&mut victims);
        victims
    }

    /// Each of `victims` dies, is replaced by a newcomer of its site and size, and its fragments are
    /// rebuilt, before the next one dies.
    ///
    /// # Errors
    /// When a fragment finds no place.
    pub fn replace(&mut self, victims: &[ProviderId]) -> anyhow::Result<()> {
        for victim in victims {
            let Some(dead) = self.held.remove(victim) else { continue };
            self.placer.retire(*victim);
            self.join(dead.peer);
            for (block, index) in dead.fragments {
                let seed = self.random.next();
                let holders = &self.blocks[block];
                let target = self
                    .placer
                    .choose_repair(&RepairRequest {
                        code: self.code,
                        fragment_bytes: FRAGMENT_BYTES,
                        holders,
                        lost: index,
                        avoid: &[],
                        seed,
                    })
                    .with_context(|| format!("repairing block {block}"))?;
                self.degraded += u64::from(target.degraded.is_some());
                self.placer.moved(holders, index, target.provider);
                self.blocks[block][index] = target.provider;
                self.put(target.provider, block, index);
            }
            self.placer.forget(*victim);
        }
        Ok(())
    }

    /// Providers are numbered below this.
    pub fn peers_end(&self) -> usize {
        self.next as usize
    }

    /// What would have to be rebuilt if one of `count` providers, evenly chosen, died: for each of its
    /// blocks the other holders.
    pub fn deaths(&self, count: usize) -> Vec<Vec<Vec<usize>>> {
        let mut providers: Vec<ProviderId> = self.held.keys().copied().collect();
        providers.sort_unstable();
        let step = (providers.len() / count.max(1)).max(1);
        let victims = providers.iter().step_by(step).take(count);
        let others = |victim: ProviderId, block: usize| -> Vec<usize> {
            let holders = self.blocks[block].iter().filter(|holder| **holder != victim);
            holders.map(|holder| holder.0 as usize).collect()
        };
        let lost = |victim: &ProviderId| {
            let fragments = self.held[victim].fragments.iter();
            fragments.map(|(block, _)| others(*victim, *block)).collect()
        };
        victims.map(lost).collect()
    }

    /// What a death would cost now.
    pub fn cost(&self) -> Cost {
        let mut providers: Vec<ProviderId> = self.held.keys().copied().collect();
        providers.sort_unstable();
        let index: HashMap<ProviderId, usize> =
            providers.iter().enumerate().map(|(at, provider)| (*provider, at)).collect();
        let count = providers.len();
        let mut shared = vec![0u32; count * count];
        for block in &self.blocks {
            for one in block {
                for other in block.iter().filter(|other| *other != one) {
                    shared[index[one] * count + index[other]] += 1;
                }
            }
        }
        let costs = shared.chunks(count.max(1)).map(|row| row.iter().copied().max().unwrap_or(0));
        let costs: Vec<f64> = costs.map(f64::from).collect();
        Cost {
            lambda_max: costs.iter().copied().fold(0.0, f64::max),
            mean: costs.iter().sum::<f64>() / count.max(1) as f64,
            lost_with_site: self.lost_with_site(),
            degraded: self.degraded as f64,
        }
    }

    /// The share of blocks that lose more than r fragments with the worst site.
    fn lost_with_site(&self) -> f64 {
        let mut lost: HashMap<&str, usize> = HashMap::new();
        for block in &self.blocks {
            let mut in_site: HashMap<&str, usize> = HashMap::new();
            for provider in block {
                let site = self.held[provider].peer.site.as_str();
                if !site.is_empty() {
                    *in_site.entry(site).or_default() += 1;
                }
            }
            for (site, _) in in_site.into_iter().filter(|(_, held)| *held > self.code.r()) {
                *lost.entry(site).or_default() += 1;
            }
        }
        lost.values().copied().max().unwrap_or(0) as f64 / self.blocks.len().max(1) as f64
    }
}
