//! Providers and a directory in memory, with faults on demand: for tests, simulation and benches.
//!
//! They keep what they are given and answer as real ones would, except where a fault says
//! otherwise. Nothing is durable.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;
use parking_lot::Mutex;
use tokio::time::{Instant, sleep, timeout_at};

use super::{
    BlockDirectory, BlockInfo, Damage, FragmentFailure, FragmentTransport, PlacementError,
    PlacementLease, SlotRange,
};
use crate::fragment::FragmentRecord;
use crate::geometry::Code;
use crate::ids::{Birth, BlockId, FragmentId, ProviderId};

/// What is wrong with a provider.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Fault {
    /// Nothing.
    #[default]
    None,
    /// Connections are refused.
    Dead,
    /// Requests are never answered.
    Silent,
    /// Every answer takes this much longer.
    Slow(Duration),
    /// Every byte string it sends has one bit changed.
    Lying,
    /// It sends less than was asked for.
    Truncating,
    /// Puts are refused for want of space.
    Full,
    /// Gets are answered "busy".
    Busy,
}

#[derive(Debug, Default)]
struct Stored {
    records: HashMap<(ProviderId, FragmentId), FragmentRecord>,
    /// Records as they were put, where a test has changed or removed them since.
    originals: HashMap<(ProviderId, FragmentId), FragmentRecord>,
    faults: HashMap<ProviderId, Fault>,
    puts: u64,
    put_bytes: u64,
    gets: u64,
    /// Bytes a second of the writer's own line, and until when it is taken.
    line: Option<(u64, Instant)>,
}

/// What a put sends before others on the same line have a turn.
const LINE_QUANTUM: usize = 64 << 10;

/// Providers in memory. Clones are the same providers.
#[derive(Clone, Debug, Default)]
pub struct MemoryProviders {
    stored: Arc<Mutex<Stored>>,
    /// Keep no bytes, for measuring the write path alone.
    forgetful: bool,
}

impl MemoryProviders {
    /// No fragment is stored, nothing is wrong.
    pub fn new() -> Self {
        Self::default()
    }

    /// Providers that acknowledge every put and keep nothing.
    pub fn forgetful() -> Self {
        Self { forgetful: true, ..Self::default() }
    }

    /// From now on this is wrong with the provider.
    pub fn set_fault(&self, provider: ProviderId, fault: Fault) {
        self.stored.lock().faults.insert(provider, fault);
    }

    /// All puts together go over a line of so many bytes a second, shared evenly among them.
    pub fn limit_line(&self, bytes_a_second: u64) {
        self.stored.lock().line = Some((bytes_a_second, Instant::now()));
    }

    /// Bytes of fragments that puts were asked to send so far.
    pub fn put_bytes(&self) -> u64 {
        self.stored.lock().put_bytes
    }

    /// Waits until `bytes` have gone over the line.
    async fn send(&self, mut bytes: usize, deadline: Instant) -> Result<(), FragmentFailure> {
        while bytes > 0 {
            let quantum = bytes.min(LINE_QUANTUM);
            let sent = {
                let mut stored = self.stored.lock();
                let Some((rate, taken)) = &mut stored.line else { return Ok(()) };
                let time = Duration::from_secs_f64(quantum as f64 / *rate as f64);
                *taken = (*taken).max(Instant::now()) + time;
                *taken
            };
            let late = |_| FragmentFailure::Timeout { waited_ms: 0 };
            timeout_at(deadline, tokio::time::sleep_until(sent)).await.map_err(late)?;
            bytes -= quantum;
        }
        Ok(())
    }

    /// Nothing is wrong with any provider any more.
    pub fn heal(&self) {
        self.stored.lock().faults.clear();
    }

    /// Loses a fragment.
    pub fn remove(&self, provider: ProviderId, fragment: FragmentId) {
        let mut stored = self.stored.lock();
        let key = (provider, fragment);
        if let Some(record) = stored.records.remove(&key) {
            stored.originals.entry(key).or_insert(record);
        }
    }

    /// Undoes what was removed or changed of a block.
    pub fn restore(&self, block: BlockId) {
        let mut stored = self.stored.lock();
        let Stored { records, originals, .. } = &mut *stored;
        let of_block = originals.extract_if(|(_, fragment), _| fragment.block == block);
        records.extend(of_block);
    }

    /// Changes a stored fragment's body.
    pub fn change(
        &self,
        provider: ProviderId,
        fragment: FragmentId,
        change: impl FnOnce(&mut Vec<u8>),
    ) {
        let mut stored = self.stored.lock();
        let Stored { records, originals, .. } = &mut *stored;
        let key = (provider, fragment);
        if let Some(record) = records.get_mut(&key) {
            originals.entry(key).or_insert_with(|| record.clone());
            let mut body = record.body.to_vec();
            change(&mut body);
            record.body = body.into();
        }
    }

    /// A stored fragment's body.
    pub fn body(&self, provider: ProviderId, fragment: FragmentId) -> Option<Bytes> {
        self.stored.lock().records.get(&(provider, fragment)).map(|record| record.body.clone())
    }

    /// Gets asked so far.
    pub fn gets(&self) -> u64 {
        self.stored.lock().gets
    }

    /// Puts asked so far.
    pub fn puts(&self) -> u64 {
        self.stored.lock().puts
    }

    fn fault(&self, provider: ProviderId) -> Fault {
        self.stored.lock().faults.get(&provider).copied().unwrap_or_default()
    }

    /// Waits as the fault says; an error where nothing will ever come.
    async fn arrive(fault: Fault, deadline: Instant) -> Result<(), FragmentFailure> {
        let started = Instant::now();
        let delay = match fault {
            Fault::Dead => {
                return Err(FragmentFailure::Unreachable { detail: "refused".to_owned() });
            }
            Fault::Silent => Duration::from_secs(1 << 30),
            Fault::Slow(delay) => delay,
            _ => return Ok(()),
        };
        timeout_at(deadline, sleep(delay)).await.map_err(|_| FragmentFailure::Timeout {
            waited_ms: started.elapsed().as_millis() as u64,
        })
    }

    fn store(&self, provider: ProviderId, record: FragmentRecord) -> Result<(), FragmentFailure> {
        if self.forgetful {
            return Ok(());
        }
        let mut stored = self.stored.lock();
        let key = (provider, record.header.id());
        match stored.records.get(&key) {
            Some(other) if other.body != record.body => {
                Err(FragmentFailure::Refused { detail: "other bytes are stored".to_owned() })
            }
            Some(_) => Ok(()),
            None => {
                stored.records.insert(key, record);
                Ok(())
            }
        }
    }

    fn load(&self, provider: ProviderId, slots: SlotRange) -> Result<Bytes, FragmentFailure> {
        let stored = self.stored.lock();
        let record = stored.records.get(&(provider, slots.fragment));
        let body = &record.ok_or(FragmentFailure::NotFound)?.body;
        let start = slots.first_slot as usize * slots.slot_bytes as usize;
        let end = (start + slots.bytes()).min(body.len());
        Ok(body.slice(start.min(end)..end))
    }
}

impl FragmentTransport for MemoryProviders {
    fn put(
        &self,
        provider: ProviderId,
        record: FragmentRecord,
        deadline: Instant,
    ) -> BoxFuture<'static, Result<(), FragmentFailure>> {
        let this = self.clone();
        {
            let mut stored = this.stored.lock();
            stored.puts += 1;
            stored.put_bytes += record.body.len() as u64;
        }
        async move {
            this.send(record.body.len(), deadline).await?;
            let fault = this.fault(provider);
            Self::arrive(fault, deadline).await?;
            if fault == Fault::Full {
                return Err(FragmentFailure::NoSpace);
            }
            this.store(provider, record)
        }
        .boxed()
    }

    fn get(
        &self,
        provider: ProviderId,
        slots: SlotRange,
        deadline: Instant,
    ) -> BoxFuture<'static, Result<Bytes, FragmentFailure>> {
        let this = self.clone();
        this.stored.lock().gets += 1;
        async move {
            let fault = this.fault(provider);
            Self::arrive(fault, deadline).await?;
            let bytes = this.load(provider, slots)?;
            match fault {
                Fault::Busy => Err(FragmentFailure::Busy),
                Fault::Truncating => Ok(bytes.slice(..bytes.len() / 2)),
                Fault::Lying => {
                    let mut wrong = bytes.to_vec();
                    for slot in wrong.chunks_mut(slots.slot_bytes as usize) {
                        slot[3] ^= 0x10;
                    }
                    Ok(wrong.into())
                }
                _ => Ok(bytes),
            }
        }
        .boxed()
    }

    fn is_reachable(&self, provider: ProviderId) -> bool {
        self.fault(provider) != Fault::Dead
    }
}

#[derive(Debug)]
struct Known {
    providers: Vec<ProviderId>,
    leases: u64,
    leases_max: u64,
    blocks: HashMap<BlockId, BlockInfo>,
    damage: Vec<Damage>,
    located: u64,
}

/// A directory in memory: places fragments in turn on its providers. Clones are the same directory.
#[derive(Clone, Debug)]
pub struct MemoryDirectory {
    code: Code,
    known: Arc<Mutex<Known>>,
}

impl MemoryDirectory {
    /// A directory with these providers.
    pub fn new(code: Code, providers: impl IntoIterator<Item = ProviderId>) -> Self {
        let known = Known {
            providers: providers.into_iter().collect(),
            leases: 0,
            leases_max: u64::MAX,
            blocks: HashMap::new(),
            damage: Vec::new(),
            located: 0,
        };
        Self { code, known: Arc::new(Mutex::new(known)) }
    }

    /// Changes the providers that placements come from.
    pub fn set_providers(&self, providers: impl IntoIterator<Item = ProviderId>) {
        self.known.lock().providers = providers.into_iter().collect();
    }

    /// After `more` further leases there is no space.
    pub fn limit_leases(&self, more: u64) {
        let mut known = self.known.lock();
        known.leases_max = known.leases + more;
    }

    /// Remembers where a block is, for [`BlockDirectory::locate`].
    pub fn commit(&self, block: BlockInfo) {
        self.known.lock().blocks.insert(block.id, block);
    }

    /// How often it was asked where a block is.
    pub fn located(&self) -> u64 {
        self.known.lock().located
    }

    /// The damage reported so far.
    pub fn damage(&self) -> Vec<Damage> {
        self.known.lock().damage.clone()
    }
}

impl BlockDirectory for MemoryDirectory {
    fn lease_placement(&self) -> BoxFuture<'_, Result<PlacementLease, PlacementError>> {
        let mut known = self.known.lock();
        let count = known.providers.len() as u64;
        let lease = if known.leases == known.leases_max {
            Err(PlacementError::NoSpace { detail: "no more leases".to_owned() })
        } else if count == 0 {
            Err(PlacementError::TooFewProviders { detail: "there is none".to_owned() })
        } else {
            known.leases += 1;
            let first = known.leases * self.code.fragments() as u64;
            let at = |index| known.providers[((first + index) % count) as usize];
            Ok(PlacementLease {
                birth: Birth(known.leases),
                providers: (0..self.code.fragments() as u64).map(at).collect(),
                sites: Vec::new(),
            })
        };
        futures::future::ready(lease).boxed()
    }

    fn locate(&self, block: BlockId) -> BoxFuture<'_, Option<BlockInfo>> {
        let mut known = self.known.lock();
        known.located += 1;
        futures::future::ready(known.blocks.get(&block).cloned()).boxed()
    }

    fn report(&self, damage: Damage) {
        self.known.lock().damage.push(damage);
    }
}
