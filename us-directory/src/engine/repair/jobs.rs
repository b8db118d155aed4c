//! Repairs that are under way, and what each provider does for them: pure.

use std::collections::{BTreeMap, HashMap};

use super::queue::BlockKey;

const HOUR_MS: u64 = 3_600_000;
/// How far what is asked of a provider may run ahead of its budget.
pub(super) const AHEAD_MS: u64 = 20_000;

/// How much may be under way at once.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RepairLimits {
    /// Blocks in all.
    pub jobs_max: usize,
    /// Blocks at one rebuilder.
    pub target_jobs_max: usize,
    /// Fragments one provider is asked to send.
    pub sends_max: usize,
    /// Bytes a second one provider is asked to send, over all repairs; 0: no limit but its own.
    pub send_bytes_per_s_max: u64,
    /// Of the uplink that a provider's owner has stated: what repairs may take, in percent.
    pub uplink_percent_max: u64,
    /// After how long an order without answer is given up.
    pub deadline_ms: u64,
}

impl Default for RepairLimits {
    fn default() -> Self {
        Self {
            jobs_max: 256,
            target_jobs_max: 8,
            sends_max: 16,
            send_bytes_per_s_max: 0,
            uplink_percent_max: 50,
            deadline_ms: 120_000,
        }
    }
}

/// One block being repaired.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Job {
    /// The block.
    pub key: BlockKey,
    /// Fragments to make, and whose place the directory had for each when the order left.
    pub wanted: Vec<(u8, u32)>,
    /// Who makes and keeps them.
    pub target: u32,
    /// Fragments it is asked to take, with their holders.
    pub senders: Vec<(u8, u32)>,
    /// Bytes each of them sends.
    pub sent_bytes: u64,
    /// Bytes of one fragment.
    pub fragment_bytes: u64,
    /// When the order left.
    pub begun_ms: u64,
    /// When it is given up.
    pub deadline_ms: u64,
}

/// What repairs cost a provider: fragments and bytes it was asked to send.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Disturbance {
    hour: u64,
    /// In this hour.
    pub fragments: u64,
    /// In this hour.
    pub bytes: u64,
    /// In the worst hour so far.
    pub worst_fragments: u64,
    /// In the worst hour so far.
    pub worst_bytes: u64,
}

impl Disturbance {
    /// As it is in the hour of `now_ms`: an earlier hour counts among the worst only.
    fn at(mut self, now_ms: u64) -> Self {
        self.worst_fragments = self.worst_fragments.max(self.fragments);
        self.worst_bytes = self.worst_bytes.max(self.bytes);
        let hour = now_ms / HOUR_MS;
        if hour != self.hour {
            (self.hour, self.fragments, self.bytes) = (hour, 0, 0);
        }
        self
    }

    fn add(&mut self, now_ms: u64, bytes: u64) {
        if now_ms / HOUR_MS != self.hour {
            *self = self.at(now_ms);
        }
        self.fragments += 1;
        self.bytes += bytes;
    }

    /// What was added at `begun_ms` was never asked for; of an earlier hour that is left as it is.
    fn take_back(&mut self, now_ms: u64, begun_ms: u64, bytes: u64) {
        if now_ms / HOUR_MS == self.hour && begun_ms / HOUR_MS == self.hour {
            self.fragments = self.fragments.saturating_sub(1);
            self.bytes = self.bytes.saturating_sub(bytes);
        }
    }
}

/// A provider's part in what is under way.
#[derive(Clone, Copy, Default, Debug)]
struct Load {
    sends: usize,
    rebuilds: usize,
    /// Under a limit of bytes a second: it has sent as much as it may until then.
    busy_until_ms: u64,
    /// What its owner says it can send, in bytes a second; 0: nothing is said.
    uplink: u64,
    disturbance: Disturbance,
}

impl Load {
    /// Bytes a second it may be asked for; 0: no limit.
    fn budget(&self, limits: &RepairLimits) -> u64 {
        let share = self.uplink.saturating_mul(limits.uplink_percent_max) / 100;
        let share = if self.uplink > 0 { share.max(1) } else { 0 };
        match (limits.send_bytes_per_s_max, share) {
            (0, share) => share,
            (all, 0) => all,
            (all, share) => all.min(share),
        }
    }
}

/// All repairs under way.
#[derive(Debug, Default)]
pub struct Jobs {
    limits: RepairLimits,
    jobs: BTreeMap<u64, Job>,
    tickets: HashMap<BlockKey, u64>,
    loads: HashMap<u32, Load>,
}

impl Jobs {
    /// None under way.
    pub fn new(limits: RepairLimits) -> Self {
        Self { limits, ..Self::default() }
    }

    /// The limits.
    pub fn limits(&self) -> RepairLimits {
        self.limits
    }

    /// Whether one more may begin.
    pub fn has_room(&self) -> bool {
        self.jobs.len() < self.limits.jobs_max
    }

    /// Whether the block is being repaired: never twice at once.
    pub fn is_running(&self, key: &BlockKey) -> bool {
        self.tickets.contains_key(key)
    }

    /// Who is rebuilding fragments of the block.
    pub fn target_of(&self, key: &BlockKey) -> Option<u32> {
        Some(self.jobs.get(self.tickets.get(key)?)?.target)
    }

    /// Whether a provider may rebuild one block more.
    pub fn may_rebuild(&self, provider: u32) -> bool {
        self.loads.get(&provider).is_none_or(|load| load.rebuilds < self.limits.target_jobs_max)
    }

    /// Whether a provider may be asked for one fragment more.
    pub fn may_send(&self, provider: u32, now_ms: u64) -> bool {
        self.loads
            .get(&provider)
            .is_none_or(|load| load.sends < self.limits.sends_max && load.busy_until_ms <= now_ms)
    }

    /// Whether one that [`Jobs::may_send`] may be asked for one fragment more together with others:
    /// what is asked of it runs ahead of its budget by a bounded time.
    pub fn may_queue(&self, provider: u32, now_ms: u64) -> bool {
        let until_ms = now_ms + AHEAD_MS;
        self.loads
            .get(&provider)
            .is_none_or(|load| load.sends < self.limits.sends_max && load.busy_until_ms <= until_ms)
    }

    /// How long a provider's share of its line takes for so many bytes more, behind what it was asked
    /// for before; 0 where nothing is known of its line.
    pub fn sends_for_ms(&self, provider: u32, bytes: u64, now_ms: u64) -> u64 {
        let Some(load) = self.loads.get(&provider) else { return 0 };
        let takes_ms = (bytes * 1000).checked_div(load.budget(&self.limits));
        takes_ms.map_or(0, |takes_ms| load.busy_until_ms.saturating_sub(now_ms) + takes_ms)
    }

    /// Whether a provider has nothing to do for repairs, nor bytes of its line's share to pay for.
    pub fn is_free(&self, provider: u32, now_ms: u64) -> bool {
        let is_free = |load: &Load| load.sends + load.rebuilds == 0 && load.busy_until_ms <= now_ms;
        self.loads.get(&provider).is_none_or(is_free)
    }

    /// A provider is asked for bytes that are no repair's: they take their time of its line's share.
    pub fn charge(&mut self, provider: u32, bytes: u64, now_ms: u64) {
        let Some(load) = self.loads.get_mut(&provider) else { return };
        if let Some(takes_ms) = (bytes * 1000).checked_div(load.budget(&self.limits)) {
            load.busy_until_ms = load.busy_until_ms.max(now_ms) + takes_ms;
        }
    }

    /// What a provider is doing for repairs: the less the sooner it is asked.
    pub fn load(&self, provider: u32) -> usize {
        self.loads.get(&provider).map_or(0, |load| load.sends + load.rebuilds)
    }

    /// Blocks of which it makes fragments.
    pub fn rebuilding(&self, provider: u32) -> usize {
        self.loads.get(&provider).map_or(0, |load| load.rebuilds)
    }

    /// What a provider's owner says of its uplink, in bytes a second; 0: nothing.
    pub fn set_uplink(&mut self, provider: u32, bytes_per_s: u64) {
        if bytes_per_s > 0 || self.loads.contains_key(&provider) {
            self.loads.entry(provider).or_default().uplink = bytes_per_s;
        }
    }

    /// A job begins.
    pub fn begin(&mut self, ticket: u64, job: Job, now_ms: u64) {
        assert!(!self.is_running(&job.key), "two repairs of one block at once");
        for (_, sender) in job.senders.iter().filter(|(_, sender)| *sender != job.target) {
            let load = self.loads.entry(*sender).or_default();
            load.sends += 1;
            load.disturbance.add(now_ms, job.sent_bytes);
            let takes_ms = (job.sent_bytes * 1000).checked_div(load.budget(&self.limits));
            if let Some(takes_ms) = takes_ms {
                load.busy_until_ms = load.busy_until_ms.max(now_ms) + takes_ms;
            }
        }
        self.loads.entry(job.target).or_default().rebuilds += 1;
        self.tickets.insert(job.key, ticket);
        self.jobs.insert(ticket, job);
    }

    /// A job ended, however.
    pub fn end(&mut self, ticket: u64) -> Option<Job> {
        let job = self.jobs.remove(&ticket)?;
        self.tickets.remove(&job.key);
        for (_, sender) in job.senders.iter().filter(|(_, sender)| *sender != job.target) {
            if let Some(load) = self.loads.get_mut(sender) {
                load.sends -= 1;
            }
        }
        if let Some(load) = self.loads.get_mut(&job.target) {
            load.rebuilds -= 1;
        }
        Some(job)
    }

    /// A job that ended had asked nobody for anything: it disturbed nobody, and what is left of its time
    /// on the lines is free.
    pub fn take_back(&mut self, job: &Job, now_ms: u64) {
        for (_, sender) in job.senders.iter().filter(|(_, sender)| *sender != job.target) {
            let Some(load) = self.loads.get_mut(sender) else { continue };
            load.disturbance.take_back(now_ms, job.begun_ms, job.sent_bytes);
            let takes_ms = (job.sent_bytes * 1000).checked_div(load.budget(&self.limits));
            let left_ms = (job.begun_ms + takes_ms.unwrap_or(0)).saturating_sub(now_ms);
            load.busy_until_ms = load.busy_until_ms.saturating_sub(left_ms).max(now_ms);
        }
    }

    /// The job with this ticket.
    pub fn get(&self, ticket: u64) -> Option<&Job> {
        self.jobs.get(&ticket)
    }

    /// Jobs whose rebuilder is `provider`.
    pub fn at(&self, provider: u32) -> Vec<u64> {
        let here = self.jobs.iter().filter(|(_, job)| job.target == provider);
        here.map(|(ticket, _)| *ticket).collect()
    }

    /// Jobs whose time is up.
    pub fn overdue(&self, now_ms: u64) -> Vec<u64> {
        let late = self.jobs.iter().filter(|(_, job)| job.deadline_ms <= now_ms);
        late.map(|(ticket, _)| *ticket).collect()
    }

    /// Orders may take so much longer.
    pub fn wait_longer(&mut self, by_ms: u64) {
        self.jobs.values_mut().for_each(|job| job.deadline_ms += by_ms);
    }

    /// Whether none is under way.
    pub fn is_empty(&self) -> bool {
        self.jobs.is_empty()
    }

    /// How many are under way.
    pub fn len(&self) -> usize {
        self.jobs.len()
    }

    /// What repairs cost a provider in the hour of `now_ms`, and in its worst.
    pub fn disturbance(&self, provider: u32, now_ms: u64) -> Disturbance {
        self.loads.get(&provider).map(|load| load.disturbance).unwrap_or_default().at(now_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use us_core::ids::{BlockId, VolumeId};

    fn job(id: u8, target: u32, senders: &[u32]) -> Job {
        Job {
            key: (VolumeId::from_bytes([1; 16]), BlockId::from_bytes([id; 16])),
            wanted: vec![(0, 9)],
            target,
            senders: senders.iter().enumerate().map(|(at, who)| (at as u8, *who)).collect(),
            sent_bytes: 1000,
            fragment_bytes: 1000,
            begun_ms: 0,
            deadline_ms: 500,
        }
    }

    #[test]
    fn loads_rise_and_fall_with_the_jobs() {
        let limits = RepairLimits { sends_max: 2, target_jobs_max: 1, ..RepairLimits::default() };
        let mut jobs = Jobs::new(limits);
        jobs.begin(1, job(1, 7, &[1, 2, 7]), 0);
        assert!(!jobs.may_rebuild(7) && jobs.may_rebuild(8) && jobs.may_send(1, 0));
        assert_eq!((jobs.load(7), jobs.at(7)), (1, vec![1]), "its own fragment is not sent");
        jobs.begin(2, job(2, 8, &[1]), 0);
        assert!(!jobs.may_send(1, 0));
        assert_eq!(jobs.disturbance(1, 0).bytes, 2000);
        assert_eq!(jobs.disturbance(1, HOUR_MS).bytes, 0);
        assert_eq!(jobs.disturbance(1, HOUR_MS).worst_fragments, 2);
        assert!(jobs.overdue(499).is_empty());
        assert_eq!(jobs.overdue(500), [1, 2]);
        assert!(jobs.end(1).is_some() && jobs.end(1).is_none() && jobs.may_rebuild(7));
        assert_eq!(jobs.load(1), 1);
    }

    #[test]
    fn what_was_never_asked_for_disturbed_nobody() {
        let limits = RepairLimits { send_bytes_per_s_max: 10_000, ..RepairLimits::default() };
        let mut jobs = Jobs::new(limits);
        jobs.begin(1, job(1, 7, &[1, 2]), 0);
        jobs.begin(2, job(2, 7, &[1]), 0);
        let refused = jobs.end(1).unwrap();
        jobs.take_back(&refused, 50);
        let (one, two) = (jobs.disturbance(1, 50), jobs.disturbance(2, 50));
        assert_eq!(
            (one.bytes, one.worst_bytes, two.bytes, two.worst_fragments),
            (1000, 1000, 0, 0)
        );
        // Of its 100 ms on the line 50 were left; provider 1 has another job's too.
        assert!(!jobs.may_send(1, 149) && jobs.may_send(1, 150) && jobs.may_send(2, 50));
        jobs.begin(3, Job { begun_ms: HOUR_MS, ..job(3, 7, &[1]) }, HOUR_MS);
        jobs.take_back(&refused, HOUR_MS);
        let next = jobs.disturbance(1, HOUR_MS);
        assert_eq!((next.bytes, next.worst_bytes), (1000, 1000), "that hour is over");
    }

    #[test]
    fn a_rate_spreads_what_is_asked_of_one_provider() {
        let limits = RepairLimits { send_bytes_per_s_max: 10_000, ..RepairLimits::default() };
        let mut jobs = Jobs::new(limits);
        jobs.begin(1, job(1, 7, &[1]), 0);
        assert!(!jobs.may_send(1, 99) && jobs.may_send(1, 100));
    }

    #[test]
    fn what_else_is_read_takes_its_time_of_the_line_and_disturbs_no_plan() {
        let limits = RepairLimits { uplink_percent_max: 50, ..RepairLimits::default() };
        let mut jobs = Jobs::new(limits);
        jobs.charge(1, 1000, 0);
        assert!(jobs.is_free(1, 0), "nothing is known of its line");
        jobs.set_uplink(1, 20_000);
        jobs.charge(1, 1000, 0);
        assert!(!jobs.is_free(1, 99) && !jobs.may_send(1, 99) && jobs.is_free(1, 100));
        assert_eq!(jobs.disturbance(1, 0).bytes, 0);
        jobs.begin(1, job(1, 7, &[1]), 100);
        assert!(!jobs.is_free(7, 1_000) && !jobs.is_free(1, 1_000), "it rebuilds, it sends");
        jobs.end(1);
        assert!(jobs.is_free(7, 1_000) && !jobs.is_free(1, 199) && jobs.is_free(1, 200));
    }

    #[test]
    fn repairs_take_their_share_of_a_stated_uplink() {
        let limits = RepairLimits { uplink_percent_max: 25, ..RepairLimits::default() };
        let mut jobs = Jobs::new(limits);
        jobs.set_uplink(1, 16_000);
        jobs.begin(1, job(1, 7, &[1, 2]), 0);
        // 1,000 bytes at a quarter of 16,000 a second.
        assert!(!jobs.may_send(1, 249) && jobs.may_send(1, 250) && jobs.may_send(2, 0));
        let limits = RepairLimits { send_bytes_per_s_max: 1000, ..limits };
        let mut jobs = Jobs::new(limits);
        jobs.set_uplink(1, 16_000);
        jobs.begin(1, job(1, 7, &[1, 2]), 0);
        assert!(!jobs.may_send(1, 999) && !jobs.may_send(2, 999) && jobs.may_send(2, 1000));
    }

    #[test]
    #[should_panic(expected = "two repairs of one block")]
    fn a_block_is_never_repaired_twice_at_once() {
        let mut jobs = Jobs::default();
        jobs.begin(1, job(1, 7, &[1]), 0);
        jobs.begin(2, job(1, 8, &[1]), 0);
    }
}
