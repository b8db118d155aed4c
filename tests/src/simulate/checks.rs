//! What must hold all the time, and at the end. They count for themselves and look at the machines;
//! of the directory they believe only its records, and those at the end.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use anyhow::{bail, ensure};
use us_core::geometry::Code;
use us_core::ids::ProviderId;
use us_core::placement::record_bytes_max;
use us_core::placement::sites::site_fragments_max;
use us_directory::engine::repair::RepairLimits;
use us_directory::records::bit;
use us_proto::v1::{Health, RebuildFragments, RebuildPath};

use super::blocks::{Fragment, Loss, block_of, fragment};
use super::directory::block_number;
use super::life::{HOUR_MS, Presence};
use super::scenario::Scenario;
use super::swarm::Swarm;

/// How far what a provider is asked to send may run ahead of its rate (docs/configuration.md).
const AHEAD_MS: u64 = 20_000;

/// What the checkers remember.
#[derive(Debug)]
pub(super) struct Checks {
    code: Code,
    limits: RepairLimits,
    /// The provider of every fragment, as it was placed and moved.
    homes: Vec<u32>,
    /// Machines that died, and the number of their death.
    deaths: HashMap<usize, usize>,
    /// Fragments providers were asked for and have not sent.
    sends: HashMap<u32, usize>,
    /// With a limit of bytes a second: until when what a provider was asked for keeps it busy.
    sending_until_ms: HashMap<u32, u64>,
    ids: HashMap<usize, u32>,
    in_repair: HashSet<u32>,
    faulty: bool,
}

impl Checks {
    pub fn new(scenario: &Scenario) -> Self {
        Self {
            code: scenario.code,
            limits: scenario.engine.repair,
            homes: Vec::new(),
            deaths: HashMap::new(),
            sends: HashMap::new(),
            sending_until_ms: HashMap::new(),
            ids: HashMap::new(),
            in_repair: HashSet::new(),
            faulty: false,
        }
    }

    fn place(&self, fragment: Fragment) -> usize {
        let (block, index) = block_of(fragment);
        block as usize * self.code.fragments() + usize::from(index)
    }

    /// A block is stored.
    pub fn placed(&mut self, providers: &[u32]) {
        self.homes.extend(providers);
    }

    /// A fragment has another home.
    pub fn moved(&mut self, moved: Fragment, provider: u32) {
        let place = self.place(moved);
        self.homes[place] = provider;
    }

    /// Where a fragment belongs.
    pub fn home(&self, fragment: Fragment) -> Option<u32> {
        self.homes.get(self.place(fragment)).copied()
    }

    fn home_is(&self, block: u32, index: usize, provider: u32) -> bool {
        self.homes_of(block)[index] == provider
    }

    /// The provider of each fragment of a block.
    fn homes_of(&self, block: u32) -> &[u32] {
        let f = self.code.fragments();
        &self.homes[block as usize * f..(block as usize + 1) * f]
    }

    /// Something went wrong: from now on alarms may be right.
    pub fn fault(&mut self) {
        self.faulty = true;
    }

    pub fn known(&mut self, machine: usize, provider: u32) {
        self.ids.insert(machine, provider);
    }

    pub fn died(&mut self, machine: usize, death: usize) {
        self.deaths.insert(machine, death);
    }

    pub fn death_of(&self, machine: usize) -> Option<usize> {
        self.deaths.get(&machine).copied()
    }

    /// Who is asked first by an order: they are what the limits count.
    fn senders(&self, machine: usize, order: &RebuildFragments) -> Vec<u32> {
        let all_send = order.path == RebuildPath::RotatedStar as i32;
        let (listed, most) = match order.holders.first() {
            Some(_) => (&order.holders, 1),
            None if all_send => (&order.sources, order.sources.len()),
            None => (&order.sources, order.s as usize),
        };
        let target = self.ids.get(&machine).copied();
        let first = listed.iter().take(most).map(|source| source.provider);
        first.filter(|provider| Some(*provider) != target).collect()
    }

    /// An order was answered, taken back, or its provider is gone.
    pub fn ended(&mut self, machine: usize, order: &RebuildFragments) {
        for sender in self.senders(machine, order) {
            if let Some(sends) = self.sends.get_mut(&sender) {
                *sends -= 1;
            }
        }
        if let Some(block) = block_number(&order.block) {
            self.in_repair.remove(&block);
        }
    }
}

impl Swarm<'_> {
    /// A block fell below s fragments: was that within the budget?
    pub(super) fn check_loss(&mut self, loss: Option<Loss>) -> anyhow::Result<()> {
        let Some(loss) = loss.filter(|_| self.scenario.maintained) else { return Ok(()) };
        let r = self.scenario.code.r();
        ensure!(
            loss.lost_together > r,
            "block {} is lost, although no more than {} of its fragments went together: r = {r}",
            loss.block,
            loss.lost_together,
        );
        self.report.lost_beyond_budget += 1;
        Ok(())
    }

    /// What a machine held must be there again by now.
    pub(super) fn check_reconstruction(&mut self, death: usize) -> anyhow::Result<()> {
        let found = self.report.deaths[death];
        if found.left == 0 {
            return Ok(());
        }
        let left = self.unmade(death).filter(|gone| self.can_be_made(*gone)).count();
        ensure!(
            left == 0,
            "{left} of {} fragments of the machine that died after {:.2} days are not there again, \
             {:.1} h after it was given up",
            found.fragments,
            found.died_ms as f64 / (24.0 * HOUR_MS as f64),
            self.scenario.repair_within_ms as f64 / HOUR_MS as f64,
        );
        Ok(())
    }

    /// Whether the block of a fragment still has enough others.
    fn can_be_made(&self, gone: Fragment) -> bool {
        self.blocks.intact(block_of(gone).0) >= self.scenario.code.s()
    }

    /// An order is over in time.
    pub(super) fn check_order(&mut self, machine: usize, ticket: u64) -> anyhow::Result<()> {
        let hangs = self.machines[machine].orders.contains_key(&ticket);
        ensure!(!hangs, "order {ticket} is past its deadline and was not taken back");
        Ok(())
    }

    /// Looks at an order before it is carried out.
    pub(super) fn check_order_given(
        &mut self,
        machine: usize,
        order: &RebuildFragments,
    ) -> anyhow::Result<()> {
        let limits = self.checks.limits;
        ensure!(
            self.checks.faulty,
            "an order to rebuild although nothing ever went wrong: machines only came and went"
        );
        let Some(block) = block_number(&order.block) else { bail!("an order for no block") };
        let sources: BTreeSet<u32> = order.sources.iter().map(|source| source.index).collect();
        let enough = sources.len() >= order.s as usize || !order.holders.is_empty();
        ensure!(enough, "an order with {} sources for s = {}", sources.len(), order.s);
        let wants = |index: &u32| order.wanted.contains(index);
        ensure!(!sources.iter().any(wants), "a fragment is to be made of itself");
        ensure!(self.checks.in_repair.insert(block), "block {block} is repaired twice at once");
        let here = self.machines[machine].orders.len();
        ensure!(here < limits.target_jobs_max, "{} orders at one provider", here + 1);
        let running = self.checks.in_repair.len();
        ensure!(running <= limits.jobs_max, "{running} orders at once");
        let now_ms = self.directory.now_ms;
        let senders = self.checks.senders(machine, order);
        // In a rotated star each sends its part of s fragments.
        let parts =
            if order.path == RebuildPath::RotatedStar as i32 { u64::from(order.s) } else { 0 };
        let bytes = match parts {
            0 => self.fragment_bytes(),
            parts => self.fragment_bytes() * parts / senders.len().max(1) as u64,
        };
        let rate = self.repair_rate();
        for sender in senders {
            let sends = self.checks.sends.entry(sender).or_default();
            *sends += 1;
            ensure!(*sends <= limits.sends_max, "provider {sender} is to send {sends} at once");
            self.report.sends_max = self.report.sends_max.max(*sends);
            if let Some(takes_ms) = (bytes * 1000).checked_div(rate) {
                let until_ms = self.checks.sending_until_ms.entry(sender).or_default();
                // What is asked for may run so far ahead, and no further.
                ensure!(*until_ms <= now_ms + AHEAD_MS, "provider {sender} is over its rate");
                *until_ms = now_ms.max(*until_ms) + takes_ms;
            }
        }
        for wanted in &order.wanted {
            self.check_target(block, *wanted as usize, machine)?;
        }
        Ok(())
    }

    /// Bytes a second one provider may be asked to send, by the limit of all and by its share of
    /// what owners say of their lines; 0: no limit.
    fn repair_rate(&self) -> u64 {
        let limits = self.checks.limits;
        let stated = if self.scenario.states_line { self.scenario.line.up as u64 } else { 0 };
        let share = stated * limits.uplink_percent_max / 100;
        let rates = [limits.send_bytes_per_s_max, share];
        rates.into_iter().filter(|rate| *rate > 0).min().unwrap_or(0)
    }

    /// The homes of a block's fragments but `except`, where they still live.
    fn living_homes(&self, block: u32, except: Option<usize>) -> Vec<u32> {
        let homes = self.checks.homes_of(block).iter().enumerate();
        let others = homes.filter(|(index, _)| Some(*index) != except).map(|(_, home)| *home);
        others.filter(|home| self.machine_of(*home).is_some_and(|m| m.lives)).collect()
    }

    fn machine_of(&self, provider: u32) -> Option<&super::swarm::Machine> {
        self.by_id.get(&provider).map(|at| &self.machines[*at])
    }

    fn metapeer(&self, provider: u32) -> Option<usize> {
        let landscape = self.directory.placer().landscape();
        let node = landscape.field().node(ProviderId(provider))?;
        let metapeers = landscape.metapeers(self.scenario.code.fragments())?;
        metapeers.address(node).map(|address| address.metapeer)
    }

    /// The most fragments of a block that one site should hold.
    fn site_most(&self) -> usize {
        let sites = self.scenario.sites;
        if sites < 2 { usize::MAX } else { site_fragments_max(self.scenario.code) }
    }

    /// How badly fragments on these providers lie: those beyond what their site should hold, and
    /// those in a metapeer that has another.
    fn badness(&self, homes: &[u32]) -> usize {
        let (mut sites, mut metapeers) = (BTreeMap::new(), BTreeMap::new());
        for home in homes {
            if let Some(machine) = self.machine_of(*home) {
                *sites.entry(machine.site).or_insert(0usize) += 1;
            }
            if let Some(metapeer) = self.metapeer(*home) {
                *metapeers.entry(metapeer).or_insert(0usize) += 1;
            }
        }
        let over = sites.values().map(|held| held.saturating_sub(self.site_most())).sum::<usize>();
        over + metapeers.values().map(|held| held - 1).sum::<usize>()
    }

    /// A rebuilt fragment goes where the block lies no worse than it must.
    fn check_target(&mut self, block: u32, wanted: usize, machine: usize) -> anyhow::Result<()> {
        let Some(target) = self.checks.ids.get(&machine).copied() else { return Ok(()) };
        let mut homes = self.living_homes(block, Some(wanted));
        ensure!(!homes.contains(&target), "block {block} is to be crowded on provider {target}");
        let before = self.badness(&homes);
        homes.push(target);
        if self.badness(&homes) == before || self.checks.home_is(block, wanted, target) {
            return Ok(());
        }
        homes.pop();
        let needed = record_bytes_max(self.fragment_bytes());
        for other in 0..self.machines.len() {
            let found = &self.machines[other];
            let fits = found.conn.is_some() && self.free_bytes(other) >= needed;
            let Some(id) = self.checks.ids.get(&other).copied().filter(|_| fits) else { continue };
            if homes.contains(&id) {
                continue;
            }
            homes.push(id);
            if self.badness(&homes) == before {
                self.report.crowded_avoidably += 1;
                return Ok(());
            }
            homes.pop();
        }
        self.report.crowded_unavoidably += 1;
        Ok(())
    }

    /// New blocks lie as they should.
    pub(super) fn check_placements(&mut self) -> anyhow::Result<()> {
        for block in 0..self.blocks.count() as u32 {
            let homes = self.living_homes(block, None);
            let distinct: BTreeSet<u32> = homes.iter().copied().collect();
            let room = self.machines.len() >= self.scenario.code.fragments();
            ensure!(distinct.len() == homes.len() || !room, "block {block} is crowded: {homes:?}");
            self.report.placed_badly += u64::from(self.badness(&homes) > 0);
        }
        Ok(())
    }

    /// A provider was given up although it lives.
    pub(super) fn given_up_alive(&mut self, machine: usize) -> anyhow::Result<()> {
        // At random a machine is away for longer than any clock waits, now and then.
        let regular = !matches!(self.scenario.presence, Presence::Homes { .. });
        ensure!(!regular, "machine {machine} was given up; it was only switched off");
        self.checks.fault();
        Ok(())
    }

    /// No false alarm: while nothing went wrong and everybody is here, all is well.
    pub(super) fn check_health(&mut self) -> anyhow::Result<()> {
        let all_here = self.machines.iter().all(|machine| machine.conn.is_some());
        if self.checks.faulty || !all_here {
            return Ok(());
        }
        let status = self.directory.status()?;
        ensure!(status.health == Health::Ok as i32, "a false alarm: {}", status.summary);
        Ok(())
    }

    /// Everything lies where its record says and nowhere else.
    pub(super) fn check_end(&mut self) -> anyhow::Result<()> {
        let f = self.scenario.code.fragments();
        let mut expected: Vec<BTreeSet<Fragment>> = vec![BTreeSet::new(); self.machines.len()];
        for (block, record) in self.directory.records()? {
            let lost = self.blocks.intact(block) < self.scenario.code.s();
            ensure!(lost || self.blocks.intact(block) == f, "block {block} was not made whole");
            for (index, provider) in record.providers.iter().enumerate() {
                let named = fragment(block, index as u8);
                let Some(at) = self.by_id.get(provider).copied() else {
                    bail!("block {block} names provider {provider}, which does not exist");
                };
                let machine = &self.machines[at];
                let good = machine.has.contains(&named) && !machine.spoilt.contains(&named);
                ensure!(
                    lost || good && bit(&record.durable, index),
                    "fragment {index} of block {block} is not at provider {provider}"
                );
                expected[at].insert(named);
            }
        }
        for (at, machine) in self.machines.iter().enumerate() {
            let surplus = machine.has.difference(&expected[at]).count();
            ensure!(surplus == 0, "{surplus} fragments at machine {at} that no record names");
        }
        let status = self.directory.status()?;
        let lost = self.blocks.lost() > 0;
        ensure!(lost || status.health == Health::Ok as i32, "not well: {}", status.summary);
        let repair = status.repair.unwrap_or_default();
        let left = repair.queued + repair.running + if lost { 0 } else { repair.waiting };
        ensure!(left == 0, "repairs that never end: {repair:?}");
        Ok(())
    }
}
