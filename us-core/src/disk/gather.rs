//! Fetching pages of one block: data fragments first, parity where it helps.
//!
//! ```text
//! ask the data fragments for the wanted slots
//!   answered, seal holds        -> the page lands
//!   NOT_FOUND, or nobody left   -> locate the block once more, ask the new places
//!   failed, wrong               -> the fragment is lost: rebuild its pages' rows
//!   nothing by the p95          -> the fragment is late: rebuild too, and take what comes first;
//!                                  without budget for that: at the longest patience
//! rebuild a row: ask others until s slots are there; if the result fails its seal, ask all
//! nobody left to ask, and s fragments may still be there -> a pause, and again until the deadline
//! ```

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;
use futures::stream::{FuturesUnordered, StreamExt};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, sleep_until, timeout_at};

use super::slots::{Opening, Rebuilt, Row};
use super::{
    BlockInfo, Damage, FragmentBits, FragmentFailure, FragmentLoss, ReadError, Shared, SlotRange,
    permits_for,
};

/// Below this many bytes pages are opened where they arrive: a trip to the CPU pool costs more.
const INLINE_CPU_BYTES: usize = 64 << 10;
/// The first pause before those who could not be asked are asked again, and the longest.
const AGAIN_AFTER: Range<Duration> = Duration::from_millis(100)..Duration::from_secs(2);

/// An answered get.
struct Answer {
    fragment: usize,
    slots: Range<usize>,
    /// The place that was asked, for telling an old place from a new one.
    place: crate::ids::ProviderId,
    result: Result<Opened, FragmentFailure>,
    elapsed: Duration,
}

/// The slots that came, and the pages opened from them.
struct Opened {
    bytes: Bytes,
    pages: Vec<(usize, Option<Bytes>)>,
}

/// A get under way.
struct Asked {
    slots: Range<usize>,
    asked_at: Instant,
    late_at: Instant,
    late: bool,
    /// The bytes are here and only wait to be opened: the provider did its part.
    arrived: Arc<AtomicBool>,
}

impl Asked {
    fn is_awaited(&self) -> bool {
        !self.late && !self.arrived.load(Ordering::Relaxed)
    }
}

/// One read of some pages of one block, from asking to reporting.
pub(super) struct Gather {
    shared: Arc<Shared>,
    info: BlockInfo,
    opening: Arc<Opening>,
    deadline: Instant,
    /// Pages that have not landed.
    wanted: BTreeSet<usize>,
    rows: BTreeMap<usize, Row>,
    running: FuturesUnordered<BoxFuture<'static, Answer>>,
    asked: BTreeMap<usize, Vec<Asked>>,
    /// Fragments that cannot be used.
    lost: BTreeMap<usize, FragmentFailure>,
    /// Rows in which a rebuild failed its seal: everybody is asked.
    contested: BTreeSet<usize>,
    /// Pages and the fragments they were rebuilt from: not tried again with the same.
    tried: HashSet<(usize, FragmentBits)>,
    located: bool,
    /// The pause before the next round, once nobody is left to ask.
    pause: Duration,
    rebuild_permit: Option<OwnedSemaphorePermit>,
}

impl Gather {
    pub fn new(shared: Arc<Shared>, info: BlockInfo, pages: BTreeSet<usize>) -> Self {
        let deadline = Instant::now() + shared.config.read_deadline;
        let opening = Arc::new(shared.opening(&info));
        Self {
            shared,
            info,
            opening,
            deadline,
            wanted: pages,
            rows: BTreeMap::new(),
            running: FuturesUnordered::new(),
            asked: BTreeMap::new(),
            lost: BTreeMap::new(),
            contested: BTreeSet::new(),
            tried: HashSet::new(),
            located: false,
            pause: AGAIN_AFTER.start,
            rebuild_permit: None,
        }
    }

    /// Fetches the pages; they go to `land` as they come. Damage is reported by
    /// [`Gather::report`], after the reader was served.
    ///
    /// # Errors
    /// [`ReadError`] for the pages that did not land.
    pub async fn run(
        &mut self,
        mut land: impl FnMut(Vec<(usize, Bytes)>),
    ) -> Result<(), ReadError> {
        let mut by_fragment: BTreeMap<usize, BTreeSet<usize>> = BTreeMap::new();
        for page in &self.wanted {
            let (fragment, slot) = self.info.geometry.locate_page(*page);
            by_fragment.entry(fragment).or_default().insert(slot);
        }
        for (fragment, slots) in by_fragment {
            self.ask(fragment, &slots);
        }
        while !self.wanted.is_empty() {
            self.help().await?;
            let late_at = self.asked.values().flatten().filter(|asked| asked.is_awaited());
            let late_at = late_at.map(|asked| asked.late_at).min();
            // Every branch is cancel-safe: gets stay in `running`, sleeps are made anew. Answers
            // first: a provider is not late because this task was.
            tokio::select! {
                biased;
                Some(answer) = self.running.next() => self.answered(answer, &mut land).await,
                () = sleep_until(late_at.unwrap_or(self.deadline)), if late_at.is_some() => {
                    self.mark_late();
                }
                () = sleep_until(self.deadline) => return Err(self.out_of_time()),
            }
            self.rebuild(&mut land).await?;
        }
        Ok(())
    }

    /// Tells the directory about damage, and remembers who did not answer. A fragment that is not
    /// there and was never said to be durable is still on its way: no damage.
    pub fn report(self) {
        for (fragment, asked) in &self.asked {
            let late = asked.iter().filter(|asked| asked.late).map(|asked| asked.asked_at).max();
            if let Some(asked_at) = late {
                let provider = self.info.providers[*fragment];
                self.shared.latencies.lock().outrun(provider, asked_at);
            }
        }
        self.shared.look_for_moved(&self.info, &self.lost, self.located);
        for (fragment, failure) in self.lost {
            let on_its_way =
                failure == FragmentFailure::NotFound && !self.info.durable.contains(fragment);
            if failure.is_damage() && !on_its_way {
                let (provider, block) = (self.info.providers[fragment], self.info.id);
                tracing::warn!(%block, fragment, %provider, %failure, "fragment damaged");
                let fragment = self.info.fragment(fragment);
                self.shared.directory.report(Damage { fragment, provider, failure });
            }
        }
    }

    /// Asks for slots of a fragment, in runs.
    fn ask(&mut self, fragment: usize, slots: &BTreeSet<usize>) {
        let mut run: Option<Range<usize>> = None;
        for slot in slots {
            match &mut run {
                Some(run) if run.end == *slot => run.end += 1,
                _ => {
                    let before = run.replace(*slot..slot + 1);
                    before.into_iter().for_each(|run| self.ask_run(fragment, run));
                }
            }
        }
        run.into_iter().for_each(|run| self.ask_run(fragment, run));
    }

    fn ask_run(&mut self, fragment: usize, slots: Range<usize>) {
        let range = SlotRange {
            fragment: self.info.fragment(fragment),
            first_slot: slots.start as u32,
            slots: slots.len() as u32,
            slot_bytes: self.info.geometry.slot_bytes() as u32,
        };
        let place = self.info.providers[fragment];
        let bounds = &self.shared.config.hedge_after;
        let patience = self.shared.latencies.lock().hedge_after(place, range.bytes(), bounds);
        let started = Instant::now();
        let arrived = Arc::new(AtomicBool::new(false));
        let asked = Asked {
            slots: slots.clone(),
            asked_at: started,
            late_at: started + patience,
            late: false,
            arrived: Arc::clone(&arrived),
        };
        self.asked.entry(fragment).or_default().push(asked);
        let get = self.shared.transport.get(place, range, self.deadline);
        let (shared, opening) = (Arc::clone(&self.shared), Arc::clone(&self.opening));
        // Helpers of a rebuild are not opened: their pages are not wanted.
        let wanted: Vec<usize> = slots
            .clone()
            .filter_map(|slot| opening.page_at(fragment, slot))
            .filter(|page| self.wanted.contains(page))
            .collect();
        let first_slot = slots.start;
        let answer = async move {
            let result = get.await;
            arrived.store(true, Ordering::Relaxed);
            let elapsed = started.elapsed();
            let result = match result {
                Ok(bytes) if bytes.len() != range.bytes() => {
                    Err(FragmentFailure::Length { expected: range.bytes(), found: bytes.len() })
                }
                Ok(bytes) => Ok(open_run(&shared, opening, first_slot, wanted, bytes).await),
                Err(failure) => Err(failure),
            };
            Answer { fragment, slots, place, result, elapsed }
        };
        self.running.push(answer.boxed());
    }

    async fn answered(&mut self, answer: Answer, land: &mut impl FnMut(Vec<(usize, Bytes)>)) {
        let Answer { fragment, slots, place, result, elapsed } = answer;
        if let Some(asked) = self.asked.get_mut(&fragment) {
            asked.retain(|asked| asked.slots != slots);
        }
        match result {
            Ok(opened) => {
                let bytes = opened.bytes.len();
                self.shared.latencies.lock().answered(place, bytes, elapsed, Instant::now());
                self.arrived(fragment, slots, opened, land);
            }
            Err(FragmentFailure::NotFound) if !self.located => {
                let moved = self.locate().await;
                if let Some(fresh) = &moved {
                    self.info.durable = fresh.durable;
                }
                match moved {
                    Some(fresh) if fresh.providers[fragment] != place => {
                        self.info = fresh;
                        self.ask(fragment, &slots.collect());
                    }
                    _ => self.lose(fragment, FragmentFailure::NotFound),
                }
            }
            // Asked at its old place before the block was located again.
            Err(FragmentFailure::NotFound) if self.info.providers[fragment] != place => {
                self.ask(fragment, &slots.collect());
            }
            Err(failure) => {
                let mut latencies = self.shared.latencies.lock();
                latencies.missed(place);
                if failure.may_pass() {
                    latencies.away(place, Instant::now());
                }
                drop(latencies);
                self.lose(fragment, failure);
            }
        }
    }

    fn arrived(
        &mut self,
        fragment: usize,
        slots: Range<usize>,
        opened: Opened,
        land: &mut impl FnMut(Vec<(usize, Bytes)>),
    ) {
        let mut good = Vec::with_capacity(opened.pages.len());
        for (page, plaintext) in opened.pages {
            match plaintext {
                Some(plaintext) => good.push((page, plaintext)),
                None => self.lose(fragment, FragmentFailure::Lying { page }),
            }
        }
        self.land(good, land);
        if self.lost.contains_key(&fragment) {
            return;
        }
        let slot_bytes = self.info.geometry.slot_bytes();
        for (at, slot) in slots.enumerate() {
            let bytes = opened.bytes.slice(at * slot_bytes..(at + 1) * slot_bytes);
            let bytes = self.opening.normal(fragment, slot, bytes);
            self.rows.entry(slot).or_default().slots.insert(fragment, bytes);
        }
    }

    fn land(&mut self, mut pages: Vec<(usize, Bytes)>, land: &mut impl FnMut(Vec<(usize, Bytes)>)) {
        pages.retain(|(page, _)| self.wanted.remove(page));
        if !pages.is_empty() {
            land(pages);
        }
    }

    /// The fragment is of no use; what came of it neither.
    fn lose(&mut self, fragment: usize, failure: FragmentFailure) {
        self.lost.entry(fragment).or_insert(failure);
        self.rows.values_mut().for_each(|row| drop(row.slots.remove(&fragment)));
    }

    /// Marks what is late, as far as others may be asked for it; the rest gets more time.
    fn mark_late(&mut self) {
        let (now, longest) = (Instant::now(), self.shared.config.hedge_after.end);
        let slot_bytes = self.info.geometry.slot_bytes();
        let mut latencies = self.shared.latencies.lock();
        for (fragment, asked) in &mut self.asked {
            let provider = self.info.providers[*fragment];
            let due = asked.iter_mut().filter(|asked| asked.is_awaited() && asked.late_at <= now);
            for asked in due {
                let until = asked.asked_at + longest;
                let bytes = asked.slots.len() * slot_bytes;
                asked.late = until <= now || latencies.may_hedge(provider, bytes);
                if !asked.late {
                    asked.late_at = until;
                }
            }
        }
    }

    /// Whether a slot was asked for, has not come, and is still expected soon.
    fn is_expected(&self, fragment: usize, slot: usize) -> bool {
        let asked = self.asked.get(&fragment).into_iter().flatten();
        asked.clone().any(|asked| asked.slots.contains(&slot) && !asked.late)
    }

    fn is_asked(&self, fragment: usize, slot: usize) -> bool {
        let mut asked = self.asked.get(&fragment).into_iter().flatten();
        asked.any(|asked| asked.slots.contains(&slot))
    }

    /// Where the directory says that the block is now; asked once.
    async fn locate(&mut self) -> Option<BlockInfo> {
        self.located = true;
        let fresh = self.shared.directory.locate(self.info.id).await;
        fresh.filter(|fresh| {
            fresh.geometry == self.info.geometry
                && fresh.providers.len() == self.info.providers.len()
        })
    }

    /// Nobody is left to ask: fragments that lie elsewhere now are lost no more. Says whether there
    /// are any.
    async fn find_moved(&mut self) -> bool {
        if self.located {
            return false;
        }
        let Some(fresh) = self.locate().await else { return false };
        let before = self.lost.len();
        let (old, new) = (&self.info.providers, &fresh.providers);
        self.lost.retain(|fragment, _| old[*fragment] == new[*fragment]);
        let has_moved = self.lost.len() < before;
        self.info = fresh;
        has_moved
    }

    /// The rows of wanted pages whose own fragment is lost or late.
    fn rows_in_need(&self) -> BTreeMap<usize, Vec<usize>> {
        let mut rows: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        for page in &self.wanted {
            let (fragment, slot) = self.info.geometry.locate_page(*page);
            if self.lost.contains_key(&fragment) || !self.is_expected(fragment, slot) {
                rows.entry(slot).or_default().push(*page);
            }
        }
        rows
    }

    /// Asks others for the rows in need, so that s slots of each are there or expected.
    async fn help(&mut self) -> Result<(), ReadError> {
        loop {
            let rows = self.rows_in_need();
            if rows.is_empty() {
                return Ok(());
            }
            self.ask_others(&rows).await?;
            if !self.running.is_empty() {
                return Ok(());
            }
            if !self.find_moved().await && !self.pause().await {
                return Err(self.lost_error());
            }
        }
    }

    /// Nobody is left to ask. Waits a little and forgets what may have passed meanwhile; `false`
    /// where that cannot help: too many fragments are gone, or those who are away have been for
    /// longer than a read may wait.
    async fn pause(&mut self) -> bool {
        let now = Instant::now();
        let code = self.info.geometry.code();
        let gone = self.lost.values().filter(|failure| !failure.may_pass()).count();
        let until = now + self.pause;
        if code.fragments() - gone < code.s() || until >= self.deadline {
            return false;
        }
        let patience = self.shared.config.read_deadline;
        let hopeless = {
            let latencies = self.shared.latencies.lock();
            let away = self.lost.iter().filter(|(_, failure)| failure.may_pass());
            let away = away.map(|(fragment, _)| self.info.providers[*fragment]);
            let long = |since: Instant| now.saturating_duration_since(since) >= patience;
            away.filter(|at| latencies.failing_since(*at).is_none_or(|since| !long(since))).count()
                == 0
        };
        if hopeless {
            return false;
        }
        sleep_until(until).await;
        self.pause = (self.pause * 2).min(AGAIN_AFTER.end);
        self.lost.retain(|_, failure| !failure.may_pass());
        self.located = false;
        true
    }

    async fn ask_others(&mut self, rows: &BTreeMap<usize, Vec<usize>>) -> Result<(), ReadError> {
        self.acquire_rebuild(rows.len()).await?;
        let code = self.info.geometry.code();
        let mut ranked: Vec<usize> = (0..code.fragments()).collect();
        {
            let latencies = self.shared.latencies.lock();
            let bytes = rows.len() * self.info.geometry.slot_bytes();
            ranked.sort_by_cached_key(|fragment| {
                let provider = self.info.providers[*fragment];
                let known = self.info.durable.contains(*fragment);
                let reachable = self.shared.transport.is_reachable(provider);
                (!reachable, !known, latencies.rank(provider, bytes))
            });
        }
        let mut asks: BTreeMap<usize, BTreeSet<usize>> = BTreeMap::new();
        for slot in rows.keys().copied() {
            self.fill_padding(slot);
            let row = self.rows.entry(slot).or_default().slots.keys().copied().collect();
            let row: BTreeSet<usize> = row;
            let expected = (0..code.fragments())
                .filter(|at| !row.contains(at) && !self.lost.contains_key(at))
                .filter(|at| self.is_expected(*at, slot));
            let mut missing = code.s().saturating_sub(row.len() + expected.count());
            if self.contested.contains(&slot) {
                missing = code.fragments();
            }
            let fresh = ranked.iter().filter(|at| {
                !self.lost.contains_key(at) && !row.contains(at) && !self.is_asked(**at, slot)
            });
            for fragment in fresh.take(missing) {
                asks.entry(*fragment).or_default().insert(slot);
            }
        }
        for (fragment, slots) in asks {
            self.ask(fragment, &slots);
        }
        Ok(())
    }

    /// Padding of data fragments is zeros: implied, not asked for.
    fn fill_padding(&mut self, slot: usize) {
        let slot_bytes = self.info.geometry.slot_bytes();
        for fragment in 0..self.info.geometry.code().s() {
            if self.opening.is_padding(fragment, slot) {
                let row = self.rows.entry(slot).or_default();
                row.slots.entry(fragment).or_insert_with(|| vec![0; slot_bytes].into());
            }
        }
    }

    /// Rebuilding holds more bytes than reading; they are waited for once, apart from those of
    /// reads, so that no two reads wait for each other.
    async fn acquire_rebuild(&mut self, rows: usize) -> Result<(), ReadError> {
        if self.rebuild_permit.is_none() {
            let fragments = self.info.geometry.code().fragments();
            let bytes = rows * fragments * self.info.geometry.slot_bytes();
            let units = permits_for(bytes, self.shared.config.read_bytes_max);
            let permits = Arc::clone(&self.shared.rebuild_permits);
            let permit = timeout_at(self.deadline, permits.acquire_many_owned(units)).await;
            let permit = permit.map_err(|_| self.shared.overloaded(self.info.id))?;
            self.rebuild_permit = Some(permit.map_err(|_| ReadError::Closed)?);
        }
        Ok(())
    }

    /// Rebuilds what can be rebuilt from the slots that are there.
    async fn rebuild(
        &mut self,
        land: &mut impl FnMut(Vec<(usize, Bytes)>),
    ) -> Result<(), ReadError> {
        let s = self.info.geometry.code().s();
        let mut jobs: Vec<(usize, usize, usize, Row)> = Vec::new();
        for (slot, pages) in self.rows_in_need() {
            let Some(row) = self.rows.get(&slot).filter(|row| row.slots.len() >= s) else {
                continue;
            };
            let mut present = FragmentBits::EMPTY;
            row.slots.keys().for_each(|fragment| present.insert(*fragment));
            for page in pages {
                let (fragment, _) = self.info.geometry.locate_page(page);
                if self.tried.insert((page, present)) {
                    jobs.push((page, fragment, slot, row.clone()));
                }
            }
        }
        if jobs.is_empty() {
            return Ok(());
        }
        let opening = Arc::clone(&self.opening);
        let bytes = jobs.len() * self.info.geometry.slot_bytes();
        let run = move || -> Vec<(usize, usize, Rebuilt)> {
            let rebuild = |(page, fragment, slot, row): (usize, usize, usize, Row)| {
                (page, slot, opening.rebuild(fragment, slot, &row))
            };
            jobs.into_iter().map(rebuild).collect()
        };
        let rebuilt = if bytes <= INLINE_CPU_BYTES {
            run()
        } else {
            self.shared.cpu.run(run).await.ok_or(ReadError::Closed)?
        };
        let mut good = Vec::with_capacity(rebuilt.len());
        for (page, slot, Rebuilt { page: rebuilt, liars }) in rebuilt {
            match rebuilt {
                Some(rebuilt) => {
                    self.shared.keep_sealed(self.info.id, page, || rebuilt.sealed);
                    good.push((page, rebuilt.plaintext));
                }
                None => drop(self.contested.insert(slot)),
            }
            liars.into_iter().for_each(|(fragment, failure)| self.lose(fragment, failure));
        }
        self.land(good, land);
        Ok(())
    }

    fn losses(&self) -> Vec<FragmentLoss> {
        let losses = self.lost.iter().map(|(fragment, failure)| FragmentLoss {
            fragment: self.info.fragment(*fragment),
            provider: self.info.providers[*fragment],
            failure: failure.clone(),
        });
        losses.collect()
    }

    /// Nobody is left to ask.
    fn lost_error(&self) -> ReadError {
        let code = self.info.geometry.code();
        let have = code.fragments() - self.lost.len();
        let losses = self.losses();
        if have >= code.s() {
            return ReadError::Tampered { block: self.info.id, losses };
        }
        ReadError::Lost { block: self.info.id, needed: code.s(), have, losses }
    }

    fn out_of_time(&mut self) -> ReadError {
        let waited_ms = self.shared.config.read_deadline.as_millis() as u64;
        let silent: Vec<usize> = self
            .asked
            .iter()
            .filter(|(_, asked)| !asked.is_empty())
            .map(|(fragment, _)| *fragment)
            .collect();
        for fragment in silent {
            self.lost.entry(fragment).or_insert(FragmentFailure::Timeout { waited_ms });
        }
        let code = self.info.geometry.code();
        let have = code.fragments() - self.lost.len();
        let losses = self.losses();
        ReadError::Lost { block: self.info.id, needed: code.s(), have, losses }
    }
}

/// Opens the wanted pages of slots that came, on the CPU pool where there are many.
async fn open_run(
    shared: &Shared,
    opening: Arc<Opening>,
    first_slot: usize,
    wanted: Vec<usize>,
    bytes: Bytes,
) -> Opened {
    let cpu_bytes = wanted.len() * opening.geometry.slot_bytes();
    let (slots, its) = (bytes.clone(), Arc::clone(&opening));
    let open = move || -> Vec<(usize, Option<Bytes>)> {
        let slot_bytes = opening.geometry.slot_bytes();
        let pages = wanted.into_iter().map(|page| {
            let (_, slot) = opening.geometry.locate_page(page);
            let start = (slot - first_slot) * slot_bytes;
            (page, opening.open(page, &slots[start..start + slot_bytes]))
        });
        pages.collect()
    };
    let pages = if cpu_bytes <= INLINE_CPU_BYTES {
        open()
    } else {
        // Without a runtime nobody waits for the pages any more.
        shared.cpu.run(open).await.unwrap_or_default()
    };
    for (page, _) in pages.iter().filter(|(_, plaintext)| plaintext.is_some()) {
        shared.keep_sealed(its.opener.block(), *page, || {
            let (_, slot) = its.geometry.locate_page(*page);
            let start = (slot - first_slot) * its.geometry.slot_bytes();
            // A copy: what waits to be written must not keep all that came with it.
            Bytes::copy_from_slice(&bytes[start..start + its.sealed_bytes(*page)])
        });
    }
    Opened { bytes, pages }
}
