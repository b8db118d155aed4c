//! Providers played in memory: each holds one fragment and behaves as its fate says.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;
use parking_lot::Mutex;
use tokio::time::{Instant, sleep, sleep_until};
use us_core::code::combine_into;
use us_core::disk::{FetchedSlots, FragmentFailure, ProviderAddress, SlotRange};
use us_core::fragment::{FragmentRecord, FragmentSums, crc32c};
use us_core::ids::ProviderId;
use us_proto::v1::{CombineReply, CombineRequest, FragmentStatus};

use crate::rebuild::Peers;

/// How a provider behaves.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum Fate {
    /// As it should.
    #[default]
    Honest,
    /// Holds other bytes, with sums and a fingerprint list that fit them.
    Altered,
    /// Holds other bytes with the same CRC-32C, so that even the block's own list fits.
    Forged,
    /// Holds the right bytes under another list.
    OtherList,
    /// Holds the right bytes and adds up wrongly.
    WrongSums,
    /// Has nothing.
    Missing,
    /// Says that its copy is damaged.
    Damaged,
    /// Never answers.
    Hangs,
    /// Answers after a time.
    Slow(u64),
    /// Sends too little.
    Short,
}

impl Fate {
    /// Whether a star gets right bytes of it in the end.
    pub fn has_right_bytes(self) -> bool {
        match self {
            Self::Honest | Self::OtherList | Self::WrongSums | Self::Slow(_) => true,
            Self::Altered
            | Self::Forged
            | Self::Missing
            | Self::Damaged
            | Self::Hangs
            | Self::Short => false,
        }
    }
}

struct Node {
    record: FragmentRecord,
    fate: Fate,
}

/// What a node has sent.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Sent {
    /// Slots asked for by gets and sent.
    pub slots: usize,
    /// Sums sent.
    pub sums: usize,
}

/// All nodes, by address.
pub struct Swarm {
    nodes: HashMap<String, Node>,
    sent: Mutex<HashMap<String, Sent>>,
}

/// A difference that CRC-32C does not see: the polynomial itself, lowest bit first.
const UNSEEN: u64 = 1 | 0x82f6_3b78 << 1;

fn altered(record: &FragmentRecord, fate: Fate) -> FragmentRecord {
    let mut record = record.clone();
    let mut body = record.body.to_vec();
    match fate {
        // Each in another way: like errors could cancel out.
        Fate::Altered => {
            let index = u64::from(record.header.id().index) + 1;
            let noise = index.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes();
            body[8..16].iter_mut().zip(noise).for_each(|(to, bit)| *to ^= bit);
        }
        Fate::Forged => {
            let before = crc32c(&body);
            let at = 16 + 8 * usize::from(record.header.id().index);
            let bits = UNSEEN.to_le_bytes();
            body[at..at + 8].iter_mut().zip(bits).for_each(|(to, bit)| *to ^= bit);
            assert_eq!(crc32c(&body), before, "the forgery is not seen");
        }
        _ => {}
    }
    record.body = body.into();
    if matches!(fate, Fate::Altered | Fate::OtherList) {
        let sums = FragmentSums::of(&record.header.geometry(), &record.body);
        let index = record.header.id().index;
        let mut list = record.trailer.fingerprints.with(index, &record.body, &sums);
        if fate == Fate::OtherList {
            let other = vec![1; record.body.len()];
            let other_sums = FragmentSums::of(&record.header.geometry(), &other);
            list = list.with(u8::from(index == 0), &other, &other_sums);
        }
        record.trailer.slot_sums = sums.slots;
        record.trailer.fingerprints = list;
    }
    record
}

impl Swarm {
    pub fn new(nodes: impl Iterator<Item = (String, FragmentRecord, Fate)>) -> Self {
        let nodes = nodes.map(|(address, record, fate)| {
            (address, Node { record: altered(&record, fate), fate })
        });
        Self { nodes: nodes.collect(), sent: Mutex::default() }
    }

    pub fn sent(&self, address: &str) -> Sent {
        self.sent.lock().get(address).copied().unwrap_or_default()
    }

    /// The record a node holds.
    pub fn record(&self, address: &str) -> Bytes {
        self.nodes[address].record.to_bytes()
    }

    fn count(&self, address: &str, slots: usize, sums: usize) {
        let mut sent = self.sent.lock();
        let sent = sent.entry(address.to_owned()).or_default();
        *sent = Sent { slots: sent.slots + slots, sums: sent.sums + sums };
    }

    fn read(
        &self,
        address: &str,
        first: usize,
        slots: usize,
    ) -> Result<FetchedSlots, FragmentFailure> {
        let node = &self.nodes[address];
        match node.fate {
            Fate::Missing => return Err(FragmentFailure::NotFound),
            Fate::Damaged => return Err(FragmentFailure::Damaged { detail: "rot".into() }),
            _ => {}
        }
        let slot_bytes = node.record.header.geometry().slot_bytes();
        let parts = node.record.to_parts();
        let mut data = node.record.body.slice(first * slot_bytes..(first + slots) * slot_bytes);
        if node.fate == Fate::Short {
            data.truncate(data.len().saturating_sub(1));
        }
        let header = Bytes::copy_from_slice(&parts.header);
        Ok(FetchedSlots { header, trailer: parts.trailer, data })
    }

    async fn delay(fate: Fate, deadline: Instant) {
        match fate {
            Fate::Hangs => sleep_until(deadline + Duration::from_secs(3600)).await,
            Fate::Slow(ms) => sleep(Duration::from_millis(ms)).await,
            _ => {}
        }
    }

    fn sum(
        self: Arc<Self>,
        address: String,
        request: CombineRequest,
        deadline: Instant,
    ) -> BoxFuture<'static, Result<CombineReply, FragmentFailure>> {
        let late = FragmentFailure::Timeout { waited_ms: 0 };
        let answer = async move {
            let fate = self.nodes[&address].fate;
            Self::delay(fate, deadline).await;
            let item = &request.items[0];
            let (first, slots) = (request.first_slot as usize, request.slots as usize);
            let failed = |status: FragmentStatus, fault| CombineReply {
                status: status.into(),
                fault,
                ..CombineReply::default()
            };
            let own = match self.read(&address, first, slots) {
                Ok(read) => read.data,
                Err(failure) => {
                    let status = crate::service::failure_status(&failure);
                    return Ok(failed(status, item.fragment.clone()));
                }
            };
            let mut total = vec![0; own.len()];
            combine_into(&[item.coefficient as u8], &[&own], &mut total).unwrap();
            for upstream in request.upstreams {
                let inner = upstream.request.unwrap();
                let named = inner.items[0].fragment.clone();
                let deadline = deadline - Duration::from_millis(20);
                let asked = Arc::clone(&self).sum(upstream.address, inner, deadline);
                match asked.await {
                    Ok(reply) if reply.status() != FragmentStatus::Ok => return Ok(reply),
                    Ok(reply) if reply.data.len() != total.len() => {
                        return Ok(failed(FragmentStatus::Damaged, named));
                    }
                    Ok(reply) => combine_into(&[1], &[&reply.data], &mut total).unwrap(),
                    Err(_) => return Ok(failed(FragmentStatus::Unspecified, named)),
                }
            }
            if fate == Fate::WrongSums {
                total[3] ^= 1;
            }
            self.count(&address, 0, 1);
            let (status, data) = (FragmentStatus::Ok.into(), total.into());
            Ok(CombineReply { status, data, ..CombineReply::default() })
        };
        async move { tokio::time::timeout_at(deadline, answer).await.unwrap_or(Err(late)) }.boxed()
    }
}

/// A way into the swarm.
pub struct Way(pub Arc<Swarm>);

impl Peers for Way {
    fn fetch(
        &self,
        _provider: ProviderId,
        place: &ProviderAddress,
        _grant: Bytes,
        slots: SlotRange,
        deadline: Instant,
    ) -> BoxFuture<'static, Result<FetchedSlots, FragmentFailure>> {
        let (swarm, address) = (Arc::clone(&self.0), place.address.clone());
        async move {
            let answer = async {
                Swarm::delay(swarm.nodes[&address].fate, deadline).await;
                let (first, count) = (slots.first_slot as usize, slots.slots as usize);
                let read = swarm.read(&address, first, count)?;
                swarm.count(&address, count, 0);
                Ok(read)
            };
            let late = FragmentFailure::Timeout { waited_ms: 0 };
            tokio::time::timeout_at(deadline, answer).await.unwrap_or(Err(late))
        }
        .boxed()
    }

    fn combine(
        &self,
        place: &ProviderAddress,
        request: CombineRequest,
        deadline: Instant,
    ) -> BoxFuture<'static, Result<CombineReply, FragmentFailure>> {
        Arc::clone(&self.0).sum(place.address.clone(), request, deadline)
    }
}
