//! Giving providers up: the clocks of [`super::presence`] applied to the members, and what is learnt of
//! their week.

use us_core::ids::ProviderId;

use super::events::EventKind;
use super::members::{Member, member_batch};
use super::presence::Silences;
use super::{Durability, Engine, presence};
use crate::keys;
use crate::records::encode;
use crate::store::{StoreError, WriteBatch};

impl Engine {
    /// Gives up providers whose time has come, unless many fell silent together.
    pub(super) fn check_clocks(&mut self) -> Result<(), StoreError> {
        /// Providers declared dead in one slow tick.
        const DEATHS_MAX: usize = 16;
        let (clock_ms, clocks) = (self.clock_ms(), self.config.clocks);
        self.tell_silent()?;
        let due = self.members.iter().filter(|(_, member)| member.is_due(clock_ms, &clocks));
        let due: Vec<u32> = due.map(|(provider, _)| *provider).collect();
        if due.is_empty() {
            return Ok(());
        }
        // All that are due are looked at together: looked at later, when the others are back, one that
        // went with them would be alone.
        let living = self.members.values().filter(|member| !member.record.dead);
        let silences = Silences::new(living.map(Member::silence));
        let (held, alone): (Vec<u32>, Vec<u32>) = due.into_iter().partition(|provider| {
            self.members.get(provider).is_some_and(|member| {
                let since_ms = member.record.silent_since_ms;
                clock_ms < since_ms + clocks.brake_ms
                    && silences.is_departure(&member.record.site, since_ms, &clocks)
            })
        });
        let mut batch = WriteBatch::new();
        for provider in held {
            let Some(member) = self.members.get_mut(&provider) else { continue };
            member.braked = true;
            // Its clock begins anew: who is late when the others are back has a day of its own.
            member.record.back_at_ms = clock_ms;
            batch.put(keys::provider(provider), encode(&member.record));
        }
        if !batch.is_empty() {
            self.commit(batch, Durability::Applied)?;
        }
        alone.into_iter().take(DEATHS_MAX).try_for_each(|provider| self.declare_dead(provider))
    }

    /// Providers that are silent beyond their time and not given up, because many fell silent together.
    pub(super) fn braked(&self) -> usize {
        let silent = self.members.values().filter(|member| !member.online && !member.record.dead);
        silent.filter(|member| member.braked).count()
    }

    /// Notes who has been silent for longer than a moment.
    fn tell_silent(&mut self) -> Result<(), StoreError> {
        /// More than so many at once are one event.
        const TOLD_ONE_BY_ONE_MAX: usize = 8;
        let (clock_ms, absent_ms) = (self.clock_ms(), self.config.clocks.absent_ms);
        let mut silent = Vec::new();
        for (provider, member) in &mut self.members {
            let since_ms = member.record.silent_since_ms;
            let is_silent = !member.online && !member.record.dead && since_ms > 0;
            if is_silent && clock_ms >= since_ms + absent_ms && !member.told_silent {
                member.told_silent = true;
                silent.push((*provider, member.record.name.clone()));
            }
        }
        if silent.len() > TOLD_ONE_BY_ONE_MAX {
            let detail = format!("{} providers fell silent", silent.len());
            return self.note_event(EventKind::ProviderSilent, 0, detail);
        }
        for (provider, name) in silent {
            self.note_event(EventKind::ProviderSilent, provider, name)?;
        }
        Ok(())
    }

    /// Declares a provider dead: what it held is made again elsewhere.
    pub(super) fn declare_dead(&mut self, provider: u32) -> Result<(), StoreError> {
        let Some(member) = self.members.get_mut(&provider) else { return Ok(()) };
        member.record.dead = true;
        let batch = member_batch(provider, &member.record);
        let name = member.record.name.clone();
        self.commit(batch, Durability::Applied)?;
        self.repairs.unwell.insert(provider);
        self.placer.retire(ProviderId(provider));
        self.note_event(EventKind::ProviderDead, provider, name)?;
        self.push_provider(provider);
        self.scan_holdings(provider);
        Ok(())
    }

    /// Learns from the hour that has passed when each provider is usually on.
    pub(super) fn learn_presence(&mut self) -> Result<(), StoreError> {
        let hour = self.at.unix_ms / 3_600_000;
        if self.learnt_hour == hour {
            return Ok(());
        }
        let whole = self.learnt_hour + 1 == hour;
        let learnt = presence::hour_of_week(self.learnt_hour * 3_600_000);
        let first = std::mem::replace(&mut self.learnt_hour, hour) == 0;
        let mut batch = WriteBatch::new();
        for (provider, member) in &mut self.members {
            let share =
                std::mem::take(&mut member.online_ticks) as f64 / self.hour_ticks.max(1) as f64;
            // Of an hour that no directory saw whole nothing is known.
            let is_news = whole && !first && !member.record.dead;
            if is_news && presence::learn(&mut member.record, learnt, share.min(1.0)) {
                batch.put(keys::provider(*provider), encode(&member.record));
            }
        }
        self.hour_ticks = 0;
        if !batch.is_empty() {
            self.commit(batch, Durability::Applied)?;
        }
        Ok(())
    }

    /// Counts this slow tick into the hour.
    pub(super) fn count_presence(&mut self) {
        self.hour_ticks += 1;
        for member in self.members.values_mut().filter(|member| member.is_reachable()) {
            member.online_ticks += 1;
        }
    }
}
