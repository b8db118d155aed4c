//! Reading: what is here first, then flights that concurrent readers share.
//!
//! A flight fetches some pages of one block. A reader claims the pages that nobody fetches yet and
//! takes that flight along, so that it needs no task; it waits for those that somebody else fetches,
//! and takes each as it lands. When a reader goes away its flight goes on in a task: others may wait
//! for it. What is read ahead flies in a task from the start, and lands on the stage.
//!
//! The cache keeps the pages of which a part was handed out: the rest may be asked for next. A page
//! handed out whole goes to the kernel's cache, and needs no second place.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::future::poll_fn;
use std::ops::Range;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, watch};
use tokio::time::{Instant, timeout};
use tokio_util::task::TaskTracker;

use super::gather::Gather;
use super::slots::Opening;
use super::{Around, BlockInfo, FragmentFailure, ReadError, Shared, permits_for};
use crate::code::ErasureCode;
use crate::daemon::logging::RequestId;
use crate::ids::BlockId;
use crate::seal::BlockOpener;

/// How long the places of a block are believed though one of its providers is away.
const LOCATE_AGAIN: Duration = Duration::from_secs(30);

/// A page of a block.
pub(super) type PageKey = (BlockId, u32);

/// Pages on their way, shared by those who wait for them.
pub(super) struct Flight {
    landed: Mutex<HashMap<usize, Bytes>>,
    /// How many pages have landed; and, at the end, how it ended.
    progress: watch::Sender<(usize, Option<Result<(), ReadError>>)>,
}

/// The flights under way, by page.
pub(super) type Flights = Mutex<HashMap<PageKey, Arc<Flight>>>;

/// Weighs a cached page by its bytes and what the cache spends on it.
#[derive(Clone)]
pub(super) struct PageWeight;

impl quick_cache::Weighter<PageKey, Bytes> for PageWeight {
    fn weight(&self, _key: &PageKey, page: &Bytes) -> u64 {
        page.len() as u64 + 128
    }
}

/// Where a reader gets a page from.
enum Source {
    Here(Bytes),
    Flight(Arc<Flight>),
}

impl Shared {
    /// A page that needs no flight.
    fn at_hand(&self, block: BlockId, page: usize) -> Option<Bytes> {
        let key = (block, page as u32);
        self.cache.get(&key).or_else(|| self.stage.lock().get(&key))
    }

    pub(super) async fn read(
        self: &Arc<Self>,
        block: &BlockInfo,
        range: Range<usize>,
        around: Around,
    ) -> Result<Vec<Bytes>, ReadError> {
        self.check_range(block, &range)?;
        if let Some(sealed) = &block.inline {
            let page = self.open_inline(block, sealed)?;
            return Ok(vec![page.slice(range)]);
        }
        let pages = block.geometry.pages_of(range.clone());
        let mut sources: BTreeMap<usize, Source> = BTreeMap::new();
        let mut missing = BTreeSet::new();
        for page in pages.clone() {
            match self.at_hand(block.id, page) {
                Some(bytes) => drop(sources.insert(page, Source::Here(bytes))),
                None => drop(missing.insert(page)),
            }
        }
        let (joined, claimed) = self.join_or_claim(block, missing);
        sources.extend(joined.into_iter().map(|(page, flight)| (page, Source::Flight(flight))));
        let mut own = Own { flight: None, tasks: self.tasks.clone() };
        if let Some((flight, mut pages)) = claimed {
            let around = self.around(block, &pages, around);
            let on_board = pages.iter().map(|page| (*page, Source::Flight(Arc::clone(&flight))));
            sources.extend(on_board);
            let around = self.board(block, &flight, around);
            pages.extend(&around);
            let boarded = Boarded { pages, around, permit: None };
            own.flight = Some(self.flight(block.clone(), flight, boarded).boxed());
        }
        let mut pieces = Vec::with_capacity(sources.len());
        for (page, source) in sources {
            let bytes = match source {
                Source::Here(bytes) => bytes,
                Source::Flight(flight) => own.with(flight.page(page)).await?,
            };
            let start = page * block.geometry.page_bytes();
            let from = range.start.saturating_sub(start);
            let to = (range.end - start).min(bytes.len());
            let (key, part) = ((block.id, page as u32), to - from < bytes.len());
            self.stage.lock().take(&key);
            if part && self.cache.peek(&key).is_none() {
                self.cache.insert(key, bytes.clone());
            }
            pieces.push(bytes.slice(from..to));
        }
        Ok(pieces)
    }

    pub(super) fn prefetch(self: &Arc<Self>, block: &BlockInfo, range: Range<usize>) {
        if block.inline.is_some() || self.check_range(block, &range).is_err() {
            return;
        }
        let pages = block.geometry.pages_of(range);
        let missing: BTreeSet<usize> =
            pages.filter(|page| self.at_hand(block.id, *page).is_none()).collect();
        let units = self.flight_units(block, missing.len());
        let Ok(permit) = Arc::clone(&self.read_permits).try_acquire_many_owned(units) else {
            return;
        };
        let bytes_of = |page: &usize| block.geometry.page_plaintext_bytes(*page);
        let wanted: usize = missing.iter().map(bytes_of).sum();
        if missing.is_empty() || !self.stage.lock().expect(wanted, Instant::now()) {
            return;
        }
        let (joined, claimed) = self.join_or_claim(block, missing);
        // Room was kept for what others bring too.
        self.stage.lock().give_up(joined.iter().map(|(page, _)| bytes_of(page)).sum());
        if let Some((flight, pages)) = claimed {
            let boarded = Boarded { pages, around: BTreeSet::new(), permit: Some(permit) };
            self.tasks.spawn(self.flight(block.clone(), flight, boarded));
        }
    }

    /// Pages beside the `missing` ones that one get of the same fragment brings along: those of the
    /// aligned run around each that are not here.
    fn around(
        &self,
        block: &BlockInfo,
        missing: &BTreeSet<usize>,
        around: Around,
    ) -> BTreeSet<usize> {
        let geometry = &block.geometry;
        let bytes = match (around, missing.first()) {
            (Around::Nothing, _) | (_, None) => 0,
            (Around::Bytes(bytes), _) => bytes,
            (Around::Neighbours, Some(page)) => self.neighbours.lock().missed(block.id, *page),
        };
        let run = bytes / geometry.page_bytes();
        if run < 2 || missing.len() > run {
            return BTreeSet::new();
        }
        let runs = missing.iter().flat_map(|page| {
            let (fragment, slot) = geometry.locate_page(*page);
            let first = fragment * geometry.fragment_slots();
            let start = first + slot / run * run;
            let end = (start + run).min(first + geometry.fragment_slots());
            start..end.min(geometry.pages())
        });
        let runs: BTreeSet<usize> = runs.collect();
        if let (Around::Neighbours, Some(last)) = (around, runs.last()) {
            self.neighbours.lock().brought(block.id, last + 1);
        }
        runs.into_iter()
            .filter(|page| !missing.contains(page) && self.at_hand(block.id, *page).is_none())
            .collect()
    }

    /// Takes along those of `pages` that nobody fetches yet.
    fn board(
        &self,
        block: &BlockInfo,
        flight: &Arc<Flight>,
        mut pages: BTreeSet<usize>,
    ) -> BTreeSet<usize> {
        if !pages.is_empty() {
            let mut flights = self.flights.lock();
            pages.retain(|page| match flights.entry((block.id, *page as u32)) {
                Entry::Occupied(_) => false,
                Entry::Vacant(free) => {
                    free.insert(Arc::clone(flight));
                    true
                }
            });
        }
        pages
    }

    fn check_range(&self, block: &BlockInfo, range: &Range<usize>) -> Result<(), ReadError> {
        if self.closed.is_cancelled() {
            return Err(ReadError::Closed);
        }
        let bytes = block.plaintext_bytes();
        if range.start >= range.end || range.end > bytes {
            let (start, end) = (range.start, range.end);
            return Err(ReadError::Range { block: block.id, start, end, bytes });
        }
        Ok(())
    }

    fn open_inline(&self, block: &BlockInfo, sealed: &[u8]) -> Result<Bytes, ReadError> {
        let tampered = ReadError::InlineTampered { block: block.id };
        let key = (block.id, 0);
        if let Some(page) = self.cache.get(&key) {
            return Ok(page);
        }
        let opener = BlockOpener::new(&self.key, self.volume, block.id);
        let page = Bytes::from(opener.open_inline(sealed).map_err(|_| tampered.clone())?);
        if page.len() != block.plaintext_bytes() {
            return Err(tampered);
        }
        self.cache.insert(key, page.clone());
        Ok(page)
    }

    /// Divides pages into those that a flight already brings and those that a new one shall.
    #[expect(clippy::type_complexity, reason = "two lists, each used once")]
    fn join_or_claim(
        &self,
        block: &BlockInfo,
        missing: BTreeSet<usize>,
    ) -> (Vec<(usize, Arc<Flight>)>, Option<(Arc<Flight>, BTreeSet<usize>)>) {
        if missing.is_empty() {
            return (Vec::new(), None);
        }
        let mut flights = self.flights.lock();
        let mut joined = Vec::new();
        let mut claimed = BTreeSet::new();
        for page in missing {
            match flights.get(&(block.id, page as u32)) {
                Some(flight) => joined.push((page, Arc::clone(flight))),
                None => drop(claimed.insert(page)),
            }
        }
        if claimed.is_empty() {
            return (joined, None);
        }
        let landed = Mutex::new(HashMap::new());
        let flight = Arc::new(Flight { landed, progress: watch::Sender::new((0, None)) });
        for page in &claimed {
            flights.insert((block.id, *page as u32), Arc::clone(&flight));
        }
        (joined, Some((flight, claimed)))
    }

    fn flight_units(&self, block: &BlockInfo, pages: usize) -> u32 {
        // Slots as they come, and pages as they are opened.
        permits_for(2 * pages * block.geometry.slot_bytes(), self.config.read_bytes_max)
    }

    /// A flight, from taking its permits to its landing: on the stage where it has its permit
    /// already, because nobody waits for it.
    fn flight(
        self: &Arc<Self>,
        block: BlockInfo,
        flight: Arc<Flight>,
        boarded: Boarded,
    ) -> impl Future<Output = ()> + Send + 'static {
        let shared = Arc::clone(self);
        let Boarded { mut pages, around, permit } = boarded;
        let units = self.flight_units(&block, pages.len());
        let geometry = block.geometry;
        RequestId::carried(async move {
            // Clears up even when the runtime drops the task half-way.
            let mut landing = Landing {
                shared: Arc::clone(&shared),
                block: block.id,
                ahead: permit.is_some(),
                around,
                left: pages
                    .iter()
                    .map(|page| (*page, geometry.page_plaintext_bytes(*page)))
                    .collect(),
                flight,
            };
            let _permit = match permit {
                Some(permit) => permit,
                None => match shared.read_permit(block.id, units).await {
                    Ok(permit) => permit,
                    Err(error) => return landing.end(Err(error)),
                },
            };
            let here = shared.on_this_disk(&block, &mut pages).await;
            if !here.is_empty() {
                landing.land(here);
            }
            if pages.is_empty() {
                return landing.end(Ok(()));
            }
            let closed = shared.closed.clone();
            let mut gather = Gather::new(shared, block, pages);
            // Cancel-safe: a read that is cut off has only lost its answers.
            let result = tokio::select! {
                result = gather.run(|pages| landing.land(pages)) => result,
                () = closed.cancelled() => Err(ReadError::Closed),
            };
            landing.end(result);
            gather.report();
        })
    }

    /// Takes out of `pages` those that this machine's disk has, opened.
    async fn on_this_disk(
        &self,
        block: &BlockInfo,
        pages: &mut BTreeSet<usize>,
    ) -> Vec<(usize, Bytes)> {
        let Some(sealed) = &self.sealed else { return Vec::new() };
        let known = |page: &usize| sealed.knows(&(block.id, *page as u32));
        let known: Vec<usize> = pages.iter().copied().filter(known).collect();
        if known.is_empty() {
            return Vec::new();
        }
        let (sealed, opening, id) = (sealed.clone(), self.opening(block), block.id);
        let load = move || -> Vec<(usize, Bytes)> {
            let open = |page: usize| {
                let (key, bytes) = ((id, page as u32), opening.sealed_bytes(page));
                let opened = opening.open(page, &sealed.load(&key, bytes)?);
                if opened.is_none() {
                    sealed.forget(&key, bytes);
                }
                Some((page, opened?))
            };
            known.into_iter().filter_map(open).collect()
        };
        // Without a runtime nobody waits for the pages any more.
        let here = tokio::task::spawn_blocking(load).await.unwrap_or_default();
        for (page, _) in &here {
            pages.remove(page);
        }
        here
    }

    /// Keeps a page that passed its seal on this machine's disk, where that is wanted.
    pub(super) fn keep_sealed(&self, block: BlockId, page: usize, sealed: impl FnOnce() -> Bytes) {
        if let Some(pages) = &self.sealed {
            pages.keep((block, page as u32), sealed());
        }
    }

    async fn read_permit(
        &self,
        block: BlockId,
        units: u32,
    ) -> Result<OwnedSemaphorePermit, ReadError> {
        let permits = Arc::clone(&self.read_permits).acquire_many_owned(units);
        let permit = timeout(self.config.read_deadline, permits).await;
        permit.map_err(|_| self.overloaded(block))?.map_err(|_| ReadError::Closed)
    }

    pub(super) fn overloaded(&self, block: BlockId) -> ReadError {
        let waited_ms = self.config.read_deadline.as_millis() as u64;
        ReadError::Overloaded { block, waited_ms }
    }

    /// A fragment whose provider is away may have been made again elsewhere: asks where the block
    /// is now, apart from the read, so that the next one need not rebuild.
    pub(super) fn look_for_moved(
        self: &Arc<Self>,
        block: &BlockInfo,
        lost: &BTreeMap<usize, FragmentFailure>,
        located: bool,
    ) {
        let away =
            |failure: &FragmentFailure| failure.may_pass() && *failure != FragmentFailure::Busy;
        if located || self.closed.is_cancelled() || !lost.values().any(away) {
            return;
        }
        let Ok(permit) = Arc::clone(&self.locate_permits).try_acquire_owned() else { return };
        let now = Instant::now();
        let asked = self.located.get(&block.id).filter(|at| now < *at + LOCATE_AGAIN);
        if asked.is_some() {
            return;
        }
        self.located.insert(block.id, now);
        let (shared, block) = (Arc::clone(self), block.id);
        self.tasks.spawn(RequestId::carried(async move {
            let _permit = permit;
            // Cancel-safe: the answer only refreshes a cache.
            tokio::select! {
                _ = shared.directory.locate(block) => {}
                () = shared.closed.cancelled() => {}
            }
        }));
    }

    /// What opening and rebuilding a block needs.
    pub(super) fn opening(&self, block: &BlockInfo) -> Opening {
        let code = block.geometry.code();
        let code = if code == self.code.code() {
            self.code.clone()
        } else {
            let mut others = self.other_codes.lock();
            others.entry(code).or_insert_with(|| ErasureCode::new(code)).clone()
        };
        let opener = BlockOpener::new(&self.key, self.volume, block.id);
        Opening { geometry: block.geometry, code, opener }
    }
}

impl Flight {
    /// Waits for a page. Cancel-safe.
    async fn page(&self, page: usize) -> Result<Bytes, ReadError> {
        let mut progress = self.progress.subscribe();
        loop {
            let end = progress.borrow_and_update().1.clone();
            if let Some(bytes) = self.landed.lock().get(&page) {
                return Ok(bytes.clone());
            }
            match end {
                Some(Err(error)) => return Err(error),
                // A flight that ended well has landed all its pages.
                Some(Ok(())) => return Err(ReadError::Closed),
                None => {}
            }
            progress.changed().await.map_err(|_| ReadError::Closed)?;
        }
    }
}

/// The flight of one reader, which polls it along with what it waits for.
struct Own {
    flight: Option<BoxFuture<'static, ()>>,
    tasks: TaskTracker,
}

impl Own {
    /// `work`, while the flight goes on.
    async fn with<T>(&mut self, work: impl Future<Output = T>) -> T {
        let mut work = pin!(work);
        poll_fn(|cx| {
            if self.flight.as_mut().is_some_and(|flight| flight.as_mut().poll(cx).is_ready()) {
                self.flight = None;
            }
            work.as_mut().poll(cx)
        })
        .await
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        // Without a runtime the flight ends here, and whoever waits for it learns that.
        if let (Some(flight), Ok(runtime)) = (self.flight.take(), Handle::try_current()) {
            self.tasks.spawn_on(flight, &runtime);
        }
    }
}

/// What a flight brings.
struct Boarded {
    /// All of it.
    pages: BTreeSet<usize>,
    /// Those of the pages that nobody asked for and the cache shall keep.
    around: BTreeSet<usize>,
    /// Where it was taken before.
    permit: Option<OwnedSemaphorePermit>,
}

/// Takes pages out of the flight plan: each as it lands, the rest at the end.
struct Landing {
    shared: Arc<Shared>,
    block: BlockId,
    /// Whether its pages go on the stage.
    ahead: bool,
    /// The pages nobody asked for: the cache keeps them.
    around: BTreeSet<usize>,
    /// The pages that have not landed, and their bytes.
    left: BTreeMap<usize, usize>,
    flight: Arc<Flight>,
}

impl Landing {
    /// Pages are there: readers are woken once for all of them.
    fn land(&mut self, pages: Vec<(usize, Bytes)>) {
        let count = pages.len();
        for (page, _) in &pages {
            self.left.remove(page);
        }
        if self.ahead {
            let (mut stage, now) = (self.shared.stage.lock(), Instant::now());
            for (page, bytes) in &pages {
                stage.land((self.block, *page as u32), bytes.clone(), now);
            }
        }
        for (page, bytes) in pages.iter().filter(|(page, _)| self.around.contains(page)) {
            self.shared.cache.insert((self.block, *page as u32), bytes.clone());
        }
        let keys: Vec<PageKey> = pages.iter().map(|(page, _)| (self.block, *page as u32)).collect();
        self.flight.landed.lock().extend(pages);
        {
            let mut flights = self.shared.flights.lock();
            keys.iter().for_each(|key| drop(flights.remove(key)));
        }
        self.flight.progress.send_modify(|(landed, _)| *landed += count);
    }

    fn end(mut self, result: Result<(), ReadError>) {
        self.forget();
        self.flight.progress.send_modify(|(_, end)| *end = Some(result));
    }

    fn forget(&mut self) {
        let left = std::mem::take(&mut self.left);
        if self.ahead {
            self.shared.stage.lock().give_up(left.values().sum());
        }
        let mut flights = self.shared.flights.lock();
        for page in left.into_keys() {
            flights.remove(&(self.block, page as u32));
        }
    }
}

impl Drop for Landing {
    fn drop(&mut self) {
        self.forget();
        self.flight.progress.send_if_modified(|(_, end)| {
            let dropped = end.is_none();
            end.get_or_insert(Err(ReadError::Closed));
            dropped
        });
    }
}
