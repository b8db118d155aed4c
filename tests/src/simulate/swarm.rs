//! The machines: their disks, their comings and goings, and how they answer the directory.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use anyhow::Context as _;
use bytes::Bytes;
use us_core::placement::draw::SplitMix;
use us_core::placement::record_bytes_max;
use us_proto::v1::provider_up::Event as Up;
use us_proto::v1::{DamageReport, FragmentId, ProviderHello, ProviderReport};

use super::blocks::{Blocks, Fragment, block_of, fragment};
use super::calendar::{Calendar, Happening};
use super::checks::Checks;
use super::directory::{Directory, block_id};
use super::life::{HOUR_MS, Habit, MINUTE_MS, exponential};
use super::links::Links;
use super::orders::Order;
use super::scenario::{Reconstruction, Report, Sample, Scenario};

/// A machine.
#[derive(Debug)]
pub(super) struct Machine {
    pub id: u32,
    pub site: u32,
    habit: Habit,
    pub conn: Option<u64>,
    pub cookie: Bytes,
    pub lives: bool,
    pub has: BTreeSet<Fragment>,
    pub spoilt: BTreeSet<Fragment>,
    pub orders: BTreeMap<u64, Order>,
}

/// The whole of it.
pub(super) struct Swarm<'s> {
    pub scenario: &'s Scenario,
    pub directory: Directory,
    pub random: SplitMix,
    pub calendar: Calendar,
    pub machines: Vec<Machine>,
    pub by_id: HashMap<u32, usize>,
    pub by_conn: HashMap<u64, usize>,
    pub blocks: Blocks,
    pub links: Links,
    pub fragment_bytes: u64,
    capacity_bytes: u64,
    pub checks: Checks,
    /// Fragments that went with a machine: the number of its death.
    pub wanting: HashMap<Fragment, usize>,
    pub report: Report,
    pub running: usize,
    heard_event: u64,
    calm: bool,
}

impl<'s> Swarm<'s> {
    /// Fills a swarm, lets time pass over it, and looks at what is left.
    pub(super) fn live(scenario: &'s Scenario) -> anyhow::Result<Report> {
        let mut swarm = Self::new(scenario)?;
        swarm.load().context("while it was filled")?;
        swarm.begin();
        let end_ms = swarm.directory.now_ms + scenario.length_ms + scenario.calm_ms;
        while let Some((at_ms, what)) = swarm.calendar.take_next() {
            if at_ms > end_ms {
                break;
            }
            swarm.directory.now_ms = at_ms;
            let when =
                || format!("after {:.2} days: {what:?}", at_ms as f64 / (24.0 * HOUR_MS as f64));
            swarm.happens(what).and_then(|()| swarm.settle()).with_context(when)?;
        }
        swarm.end()
    }

    fn new(scenario: &'s Scenario) -> anyhow::Result<Self> {
        let directory =
            Directory::new(scenario.seed, scenario.engine, (scenario.chooser)(), scenario.code)?;
        Ok(Self {
            scenario,
            directory,
            random: SplitMix::new(scenario.seed ^ 0x5157_a1b2),
            calendar: Calendar::default(),
            machines: Vec::new(),
            by_id: HashMap::new(),
            by_conn: HashMap::new(),
            blocks: Blocks::new(scenario.code, scenario.window_ms),
            links: Links::new(scenario.line),
            fragment_bytes: scenario.geometry()?.fragment_bytes() as u64,
            capacity_bytes: scenario.capacity_bytes()?,
            checks: Checks::new(scenario),
            wanting: HashMap::new(),
            report: Report::default(),
            running: 0,
            heard_event: 0,
            calm: false,
        })
    }

    /// Everybody joins, and the blocks are written.
    fn load(&mut self) -> anyhow::Result<()> {
        for number in 0..self.scenario.peers {
            let site = number.checked_rem(self.scenario.sites).unwrap_or(0) as u32;
            let machine = self.buy(site);
            self.comes(machine)?;
        }
        let geometry = self.scenario.geometry()?;
        self.directory.mount()?;
        let mut left = self.scenario.blocks;
        while left > 0 {
            let mut touched = BTreeSet::new();
            let (blocks, machines) = (&mut self.blocks, &mut self.machines);
            let (by_id, checks) = (&self.by_id, &mut self.checks);
            let at_once = left.min(self.scenario.peers);
            left -= self.directory.write(at_once, geometry, |number, providers| {
                blocks.push();
                checks.placed(providers);
                for (index, provider) in providers.iter().enumerate() {
                    let stored = fragment(number, index as u8);
                    if let Some(at) = by_id.get(provider) {
                        machines[*at].has.insert(stored);
                        touched.insert(*at);
                    }
                    blocks.add(stored, true);
                }
            })?;
            for machine in touched {
                self.reports(machine)?;
            }
        }
        self.directory.unmount()?;
        self.settle()?;
        // Promises of leases fade with the reports.
        (0..self.machines.len()).try_for_each(|machine| self.reports(machine))?;
        self.directory.tick()?;
        self.settle()?;
        self.check_placements()
    }

    /// Puts into the calendar what is going to happen by itself.
    fn begin(&mut self) {
        let (now_ms, scenario) = (self.directory.now_ms, self.scenario);
        self.calendar.note(now_ms, Happening::Sample);
        self.calendar.note(now_ms + scenario.ticks_ms().1, Happening::Tick);
        for machine in 0..self.machines.len() {
            self.fate(machine);
            if !self.machines[machine].habit.begins_on() {
                // The offices are left before the first morning.
                let at_ms = now_ms + self.random.below(MINUTE_MS);
                self.calendar.note(at_ms, Happening::Goes(machine));
            } else {
                self.plan_going(machine);
            }
        }
        for (at_ms, site) in &scenario.fires {
            self.calendar.note(now_ms + at_ms, Happening::Fire(*site as u32));
        }
        for (at_ms, machine) in &scenario.deaths {
            self.calendar.note(now_ms + at_ms, Happening::Dies(*machine));
        }
        self.plan_rot();
        self.calendar.note(now_ms + scenario.length_ms, Happening::Calm);
        if scenario.maintained {
            let roll_ms = now_ms + scenario.length_ms + scenario.calm_ms;
            self.calendar.note(roll_ms.saturating_sub(4 * HOUR_MS), Happening::Roll);
        }
    }

    fn plan_rot(&mut self) {
        if self.scenario.rot_ms > 0 && !self.calm {
            let at_ms = self.directory.now_ms + exponential(&mut self.random, self.scenario.rot_ms);
            self.calendar.note(at_ms, Happening::Rot);
        }
    }

    /// A new machine, its disk empty.
    fn buy(&mut self, site: u32) -> usize {
        let habit = self.scenario.presence.habit(&mut self.random);
        self.machines.push(Machine {
            id: 0,
            site,
            habit,
            conn: None,
            cookie: Bytes::new(),
            lives: true,
            has: BTreeSet::new(),
            spoilt: BTreeSet::new(),
            orders: BTreeMap::new(),
        });
        self.machines.len() - 1
    }

    /// When a machine dies.
    fn fate(&mut self, machine: usize) {
        if self.scenario.mttf_ms > 0 && !self.calm {
            let after_ms = exponential(&mut self.random, self.scenario.mttf_ms);
            self.calendar.note(self.directory.now_ms + after_ms, Happening::Dies(machine));
        }
    }

    fn plan_going(&mut self, machine: usize) {
        let habit = self.machines[machine].habit;
        if let Some(at_ms) = habit.goes(self.directory.now_ms, &mut self.random) {
            self.calendar.note(at_ms, Happening::Goes(machine));
        }
    }

    fn happens(&mut self, what: Happening) -> anyhow::Result<()> {
        match what {
            Happening::Tick => self.tick()?,
            Happening::Sample => self.sample()?,
            Happening::Goes(machine) => {
                let habit = self.machines[machine].habit;
                if self.machines[machine].lives && habit != Habit::Stays {
                    self.goes(machine)?;
                    let at_ms = habit.comes(self.directory.now_ms, &mut self.random);
                    self.calendar.note(at_ms, Happening::Comes(machine));
                }
            }
            Happening::Comes(machine) if self.machines[machine].lives => {
                self.comes(machine)?;
                self.plan_going(machine);
            }
            Happening::Dies(machine) if !self.calm => self.dies(machine)?,
            Happening::Newcomer(site) => {
                let machine = self.buy(site);
                self.comes(machine)?;
                self.fate(machine);
                self.plan_going(machine);
            }
            Happening::Fire(site) => {
                self.checks.fault();
                let here = |at: &usize| self.machines[*at].site == site && self.machines[*at].lives;
                let burnt: Vec<usize> = (0..self.machines.len()).filter(here).collect();
                burnt.into_iter().try_for_each(|machine| self.dies(machine))?;
            }
            Happening::Done(machine, ticket) => self.obeys(machine, ticket)?,
            Happening::Rot => self.rot(),
            Happening::Found(machine, found) => self.found(machine, found)?,
            Happening::Overdue(death) => self.check_reconstruction(death)?,
            Happening::OrderOverdue(machine, ticket) => self.check_order(machine, ticket)?,
            Happening::Calm => self.calm = true,
            Happening::Roll => self.roll()?,
            Happening::Dies(_) | Happening::Comes(_) => {}
        }
        Ok(())
    }

    fn tick(&mut self) -> anyhow::Result<()> {
        self.directory.tick()?;
        let (busy_ms, idle_ms) = self.scenario.ticks_ms();
        let wait_ms = if self.directory.is_repairing() { busy_ms } else { idle_ms };
        self.calendar.note(self.directory.now_ms + wait_ms, Happening::Tick);
        self.read_log()
    }

    /// Deaths as the directory sees them.
    fn read_log(&mut self) -> anyhow::Result<()> {
        loop {
            let events = self.directory.events(self.heard_event)?;
            let Some(last) = events.last() else { return Ok(()) };
            self.heard_event = last.number;
            for event in events.iter().filter(|event| event.kind == "provider-dead") {
                let Some(machine) = self.by_id.get(&event.provider).copied() else { continue };
                if self.machines[machine].lives {
                    self.report.false_deaths += 1;
                    self.given_up_alive(machine)?;
                }
                let now_ms = self.directory.now_ms;
                if let Some(death) = self.checks.death_of(machine) {
                    self.report.deaths[death].declared_ms = Some(now_ms);
                    let due_ms = now_ms + self.scenario.repair_within_ms;
                    self.calendar.note(due_ms, Happening::Overdue(death));
                }
            }
        }
    }

    fn sample(&mut self) -> anyhow::Result<()> {
        let now_ms = self.directory.now_ms;
        let (intact_mean, intact_least) = self.blocks.intact_mean_and_least();
        let blocks = self.blocks.count().max(1) as f64;
        self.report.samples.push(Sample {
            at_ms: now_ms,
            online: self.machines.iter().filter(|machine| machine.conn.is_some()).count(),
            living: self.machines.iter().filter(|machine| machine.lives).count(),
            readable: self.blocks.readable() as f64 / blocks,
            lost: self.blocks.lost(),
            intact_mean,
            intact_least,
            orders: self.report.rebuilt + self.report.copied,
            running: self.running,
        });
        self.calendar.note(now_ms + self.scenario.sample_ms, Happening::Sample);
        self.check_health()
    }

    // ------------------------------------------------------------ machines

    fn comes(&mut self, machine: usize) -> anyhow::Result<()> {
        if !self.machines[machine].lives || self.machines[machine].conn.is_some() {
            return Ok(());
        }
        let key = machine as u32 + 1;
        let conn = self.directory.dial(key)?;
        let mut store = [0; 16];
        store[..4].copy_from_slice(&key.to_be_bytes());
        let report = self.facts(machine);
        let found = &mut self.machines[machine];
        found.conn = Some(conn);
        self.by_conn.insert(conn, machine);
        for has in found.has.difference(&found.spoilt) {
            self.blocks.reach(*has);
        }
        let site = match self.scenario.sites {
            0 => String::new(),
            _ => format!("s{}", found.site),
        };
        let hello = ProviderHello {
            address: format!("p{key}:1"),
            site,
            store: Bytes::copy_from_slice(&store),
            cookie: found.cookie.clone(),
            report: Some(report),
            ..Default::default()
        };
        self.directory.hear(conn, Up::Hello(hello))?;
        self.settle()
    }

    pub(super) fn goes(&mut self, machine: usize) -> anyhow::Result<()> {
        let found = &mut self.machines[machine];
        let Some(conn) = found.conn.take() else { return Ok(()) };
        self.by_conn.remove(&conn);
        for has in found.has.difference(&found.spoilt) {
            self.blocks.unreach(*has);
        }
        for order in std::mem::take(&mut found.orders).into_values() {
            self.broken_off(machine, &order);
        }
        self.directory.hang_up(conn)
    }

    fn dies(&mut self, machine: usize) -> anyhow::Result<()> {
        if !self.machines[machine].lives {
            return Ok(());
        }
        self.checks.fault();
        self.goes(machine)?;
        let now_ms = self.directory.now_ms;
        let found = &mut self.machines[machine];
        found.lives = false;
        let (has, spoilt) = (std::mem::take(&mut found.has), std::mem::take(&mut found.spoilt));
        let site = found.site;
        let death = self.report.deaths.len();
        let mut held = 0;
        for gone in has {
            if !spoilt.contains(&gone) {
                let loss = self.blocks.remove(gone, false, true, now_ms);
                self.check_loss(loss)?;
            }
            if self.checks.home(gone) == Some(self.machines[machine].id) {
                held += 1;
                if let Some(before) = self.wanting.insert(gone, death) {
                    // It had not even been made again.
                    self.report.deaths[before].left -= 1;
                }
            }
        }
        self.report.deaths.push(Reconstruction {
            died_ms: now_ms,
            fragments: held,
            left: held,
            ..Default::default()
        });
        self.checks.died(machine, death);
        if self.scenario.newcomer_ms > 0 {
            let after_ms = exponential(&mut self.random, self.scenario.newcomer_ms);
            self.calendar.note(now_ms + after_ms, Happening::Newcomer(site));
        }
        Ok(())
    }

    /// Everybody who lives is switched on and stays.
    fn roll(&mut self) -> anyhow::Result<()> {
        for machine in 0..self.machines.len() {
            self.machines[machine].habit = Habit::Stays;
            self.comes(machine)?;
        }
        // What rotted and was not found is found now.
        for machine in 0..self.machines.len() {
            for found in self.machines[machine].spoilt.clone() {
                self.found(machine, found)?;
            }
        }
        Ok(())
    }

    /// One of all fragments rots.
    fn rot(&mut self) {
        self.plan_rot();
        let machine = self.random.below(self.machines.len() as u64) as usize;
        let held = self.machines[machine].has.len() as u64;
        let at = self.random.below(held) as usize;
        let Some(rotten) = self.machines[machine].has.iter().nth(at).copied() else { return };
        let (block, _) = block_of(rotten);
        // The budget: rot alone never takes a block to its last fragments.
        let spare = self.blocks.intact(block) > self.scenario.code.s() + 1;
        if self.calm || !spare || !self.machines[machine].spoilt.insert(rotten) {
            return;
        }
        self.checks.fault();
        let now_ms = self.directory.now_ms;
        let reachable = self.machines[machine].conn.is_some();
        self.report.rotted += 1;
        self.blocks.remove(rotten, reachable, true, now_ms);
        let found_ms = now_ms + self.random.below(self.scenario.scrub_ms);
        self.calendar.note(found_ms, Happening::Found(machine, rotten));
    }

    fn found(&mut self, machine: usize, rotten: Fragment) -> anyhow::Result<()> {
        let Some(conn) = self.machines[machine].conn else {
            if self.machines[machine].lives {
                let later_ms = self.directory.now_ms + HOUR_MS;
                self.calendar.note(later_ms, Happening::Found(machine, rotten));
            }
            return Ok(());
        };
        if !self.machines[machine].spoilt.contains(&rotten) {
            return Ok(());
        }
        let fragments = vec![Self::named(rotten)];
        let damage = DamageReport { fragments, detail: "scrub".to_owned() };
        self.directory.hear(conn, Up::Damage(damage))
    }

    fn named(fragment: Fragment) -> FragmentId {
        let (block, index) = block_of(fragment);
        let block = block_id(block);
        FragmentId { block, index: u32::from(index) }
    }

    pub(super) fn fragment_bytes(&self) -> u64 {
        self.fragment_bytes
    }

    pub(super) fn free_bytes(&self, machine: usize) -> u64 {
        self.facts(machine).free_bytes
    }

    /// Fragments that went with the machine of this death and are not there again.
    pub(super) fn unmade(&self, death: usize) -> impl Iterator<Item = Fragment> + '_ {
        let here = self.wanting.iter().filter(move |(_, by)| **by == death);
        here.map(|(gone, _)| *gone)
    }

    fn facts(&self, machine: usize) -> ProviderReport {
        let held = self.machines[machine].has.len() as u64;
        let used_bytes = held * record_bytes_max(self.fragment_bytes);
        let stated = |rate: f64| if self.scenario.states_line { rate as u64 } else { 0 };
        ProviderReport {
            capacity_bytes: self.capacity_bytes,
            used_bytes,
            free_bytes: self.capacity_bytes.saturating_sub(used_bytes),
            fragments: held,
            damaged: self.machines[machine].spoilt.len() as u64,
            accepts_puts: true,
            uplink_bytes_per_s: stated(self.scenario.line.up),
            downlink_bytes_per_s: stated(self.scenario.line.down),
            ..ProviderReport::default()
        }
    }

    pub(super) fn reports(&mut self, machine: usize) -> anyhow::Result<()> {
        let Some(conn) = self.machines[machine].conn else { return Ok(()) };
        let report = self.facts(machine);
        self.directory.hear(conn, Up::Report(report))
    }

    fn end(mut self) -> anyhow::Result<Report> {
        if self.scenario.maintained {
            self.check_end()?;
        }
        self.report.bytes_sent = self.links.sent.iter().sum();
        self.report.bytes_sent_max = self.links.sent.iter().copied().fold(0.0, f64::max);
        self.report.steps = self.directory.steps;
        Ok(self.report)
    }
}
