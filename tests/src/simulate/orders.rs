//! What providers do when the directory says something: they take orders, and carry them out when the
//! links have brought the bytes.

use std::collections::BTreeSet;

use anyhow::Context as _;
use us_core::placement::draw::SplitMix;
use us_proto::v1::provider_down::Event as Down;
use us_proto::v1::provider_up::Event as Up;
use us_proto::v1::{
    CheckFragments, CheckReply, DeleteDone, DeleteFragments, FragmentId, FragmentStatus,
    RebuildFragments, RebuildPath, RebuildStatus, Rebuilt, SourceFault,
};

use super::blocks::{Fragment, fragment};
use super::calendar::Happening;
use super::directory::block_number;
use super::links::Transfer;
use super::swarm::Swarm;

/// What a provider is doing.
#[derive(Debug)]
pub(super) struct Order {
    told: RebuildFragments,
    transfer: Transfer,
}

impl Swarm<'_> {
    /// Providers read what they were sent, until nobody has anything more to say.
    pub(super) fn settle(&mut self) -> anyhow::Result<()> {
        loop {
            for conn in std::mem::take(&mut self.directory.ended) {
                if let Some(machine) = self.by_conn.get(&conn).copied() {
                    self.goes(machine)?;
                    self.calendar.note(self.directory.now_ms + 1, Happening::Comes(machine));
                }
            }
            let Some((conn, down)) = self.directory.to_providers.pop_front() else { return Ok(()) };
            let Some(machine) = self.by_conn.get(&conn).copied() else { continue };
            match down {
                Down::Welcome(welcome) => {
                    self.machines[machine].id = welcome.provider;
                    self.machines[machine].cookie = welcome.cookie;
                    self.by_id.insert(welcome.provider, machine);
                    self.checks.known(machine, welcome.provider);
                    self.reports(machine)?;
                }
                Down::Rebuild(order) => self.ordered(machine, order)?,
                Down::CancelRebuild(cancel) => {
                    if let Some(order) = self.machines[machine].orders.remove(&cancel.ticket) {
                        self.broken_off(machine, &order);
                    }
                }
                Down::Check(check) => self.checked(machine, conn, &check)?,
                Down::Delete(delete) => self.deletes(machine, conn, &delete)?,
                _ => {}
            }
        }
    }

    fn checked(&mut self, machine: usize, conn: u64, check: &CheckFragments) -> anyhow::Result<()> {
        let found = &self.machines[machine];
        let status = |id: &FragmentId| match asked(id) {
            Some(asked) if found.spoilt.contains(&asked) => FragmentStatus::Damaged as i32,
            Some(asked) if found.has.contains(&asked) => FragmentStatus::Ok as i32,
            _ => FragmentStatus::NotFound as i32,
        };
        let statuses = check.fragments.iter().map(status).collect();
        self.directory.hear(conn, Up::Checked(CheckReply { query: check.query, statuses }))
    }

    fn deletes(
        &mut self,
        machine: usize,
        conn: u64,
        delete: &DeleteFragments,
    ) -> anyhow::Result<()> {
        let now_ms = self.directory.now_ms;
        for gone in delete.fragments.iter().filter_map(asked) {
            let found = &mut self.machines[machine];
            let spoilt = found.spoilt.remove(&gone);
            if found.has.remove(&gone) && !spoilt {
                // Told to delete the last copy: as much a loss as a fire, and never excused.
                let loss = self.blocks.remove(gone, true, false, now_ms);
                self.check_loss(loss)?;
            }
        }
        self.reports(machine)?;
        self.directory.hear(conn, Up::Deleted(DeleteDone { ticket: delete.ticket }))
    }

    /// An order: when it will be done.
    fn ordered(&mut self, machine: usize, order: RebuildFragments) -> anyhow::Result<()> {
        self.check_order_given(machine, &order)?;
        let ticket = order.ticket;
        let copies = self.is_copy(&order);
        let path = RebuildPath::try_from(order.path).unwrap_or_default();
        let wide = path == RebuildPath::RotatedStar;
        let first = if wide { order.sources.len() } else { order.s as usize };
        let listed = if copies { &order.holders[..1] } else { &order.sources };
        let senders = listed.iter().take(first).filter_map(|source| {
            let at = *self.by_id.get(&source.provider)?;
            (at != machine).then_some((at, self.machines[at].site))
        });
        let senders: Vec<(usize, u32)> = senders.collect();
        let fragments = if copies { 1 } else { senders.len().min(order.s as usize) };
        let bytes = self.fragment_bytes as f64;
        let transfer = Transfer { path, senders, rebuilder: machine, fragments, bytes };
        let done_ms = self.links.begin(&transfer, self.directory.now_ms);
        self.calendar
            .note(done_ms.max(self.directory.now_ms + 1), Happening::Done(machine, ticket));
        let overdue_ms = self.directory.now_ms + order.deadline_ms + 2 * self.scenario.ticks_ms().1;
        self.calendar.note(overdue_ms, Happening::OrderOverdue(machine, ticket));
        self.running += 1;
        self.machines[machine].orders.insert(ticket, Order { told: order, transfer });
        Ok(())
    }

    /// An order ends without having been carried out.
    pub(super) fn broken_off(&mut self, machine: usize, order: &Order) {
        self.running -= 1;
        self.report.failed += 1;
        self.links.cancel(&order.transfer, self.directory.now_ms);
        self.checks.ended(machine, &order.told);
    }

    /// Whether every fragment an order wants is somewhere whole.
    fn is_copy(&self, order: &RebuildFragments) -> bool {
        let here = |wanted: &u32| order.holders.iter().any(|source| source.index == *wanted);
        !order.holders.is_empty() && order.wanted.iter().all(here)
    }

    /// What a source has of an order's block, as the rebuilder finds.
    fn source_status(&self, provider: u32, wanted: Fragment) -> FragmentStatus {
        let Some(found) = self.by_id.get(&provider).map(|at| &self.machines[*at]) else {
            return FragmentStatus::Unspecified;
        };
        match () {
            () if found.conn.is_none() => FragmentStatus::Unspecified,
            () if found.spoilt.contains(&wanted) => FragmentStatus::Damaged,
            () if found.has.contains(&wanted) => FragmentStatus::Ok,
            () => FragmentStatus::NotFound,
        }
    }

    /// A provider has carried out an order, as a real one would, and says so.
    pub(super) fn obeys(&mut self, machine: usize, ticket: u64) -> anyhow::Result<()> {
        let Some(order) = self.machines[machine].orders.remove(&ticket) else { return Ok(()) };
        let order = order.told;
        self.running -= 1;
        self.checks.ended(machine, &order);
        let number = block_number(&order.block).context("an order for no block")?;
        let mut right = BTreeSet::new();
        let mut faults = Vec::new();
        for source in order.holders.iter().chain(&order.sources) {
            let (index, provider) = (source.index, source.provider);
            match self.source_status(provider, fragment(number, index as u8)) {
                FragmentStatus::Ok => {
                    right.insert(index);
                }
                status => {
                    let detail = String::new();
                    faults.push(SourceFault { index, provider, status: status as i32, detail });
                }
            }
        }
        let is_copy = order.wanted.iter().all(|index| right.contains(index));
        let made = is_copy || right.len() >= order.s as usize;
        let status = if made { RebuildStatus::Ok } else { RebuildStatus::Sources };
        if made {
            for index in &order.wanted {
                self.made(machine, fragment(number, *index as u8), is_copy);
            }
        } else {
            self.report.failed += 1;
        }
        let Some(conn) = self.machines[machine].conn else { return Ok(()) };
        self.reports(machine)?;
        let reply = Rebuilt { ticket, status: status as i32, faults, ..Default::default() };
        self.directory.hear(conn, Up::Rebuilt(reply))
    }

    /// A fragment is durable at a provider.
    fn made(&mut self, machine: usize, made: Fragment, is_copy: bool) {
        let found = &mut self.machines[machine];
        let was_spoilt = found.spoilt.remove(&made);
        let is_new = found.has.insert(made);
        if is_new || was_spoilt {
            self.blocks.add(made, true);
        }
        self.report.rebuilt += u64::from(!is_copy);
        self.report.copied += u64::from(is_copy);
        self.checks.moved(made, self.machines[machine].id);
        if let Some(death) = self.wanting.remove(&made) {
            let death = &mut self.report.deaths[death];
            death.left -= 1;
            if death.left == 0 {
                death.whole_ms = Some(self.directory.now_ms);
            }
        }
        let mixed = self.report.fingerprint ^ made ^ self.directory.now_ms.rotate_left(24);
        self.report.fingerprint = SplitMix::new(mixed ^ machine as u64).next();
    }
}

/// The fragment a message names.
fn asked(id: &FragmentId) -> Option<Fragment> {
    Some(fragment(block_number(&id.block)?, u8::try_from(id.index).ok()?))
}
