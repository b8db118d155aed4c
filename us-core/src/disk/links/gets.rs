//! The gets of one provider: one that finds a free turn is sent by itself, those that wait for one
//! are sent together.

use std::sync::{Arc, Weak};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::time::{Instant, timeout};
use us_proto::v1::{self, GetItem, GetReply, GetRequest};

use super::{FetchedSlots, Inner, Link, status_result};
use crate::daemon::logging::RequestId;
use crate::disk::{FragmentFailure, SlotRange};
use crate::wire::{BulkClient, BulkError, GET_ITEMS_MAX};

/// Connections are not closed sooner, whatever the configuration says.
const IDLE_MIN: Duration = Duration::from_millis(10);

/// A get.
pub(super) struct Wanted {
    pub slots: SlotRange,
    /// Whether header and trailer are wanted too.
    pub record: bool,
    pub deadline: Instant,
    /// Whom it is for.
    pub request: RequestId,
    /// What is shown for it.
    pub grant: Bytes,
}

impl Wanted {
    fn item(&self) -> GetItem {
        GetItem {
            fragment: Some(v1::FragmentId {
                block: self.slots.fragment.block.as_bytes().to_vec().into(),
                index: self.slots.fragment.index.into(),
            }),
            first_slot: self.slots.first_slot,
            slots: self.slots.slots,
            trailer: self.record,
            trace: self.request.0,
        }
    }
}

/// A get in a provider's queue.
pub(super) struct Waiting {
    pub wanted: Wanted,
    pub answer: oneshot::Sender<Result<FetchedSlots, FragmentFailure>>,
}

/// Takes gets from a provider's queue and sends them together.
pub(super) struct Dispatch {
    pub inner: Arc<Inner>,
    pub link: Weak<Link>,
    pub turns: Arc<Semaphore>,
    pub queue: mpsc::Receiver<Waiting>,
}

impl Dispatch {
    /// The next get; closes the connections of a provider of which nothing is asked for long.
    async fn next(&mut self) -> Option<Waiting> {
        let Some(idle) = self.inner.config.idle else { return self.queue.recv().await };
        loop {
            // Cancel-safe: a receive that is dropped has taken nothing.
            match timeout(idle.max(IDLE_MIN), self.queue.recv()).await {
                Ok(waiting) => return waiting,
                Err(_elapsed) => {
                    // Gets that found a turn passed by the queue.
                    let link = self.link.upgrade()?;
                    if link.used.lock().elapsed() >= idle {
                        link.disconnect();
                    }
                }
            }
        }
    }

    pub async fn run(mut self) {
        let config = self.inner.config;
        let mut held: Option<Waiting> = None;
        loop {
            let first = match held.take() {
                Some(waiting) => waiting,
                None => match self.next().await {
                    Some(waiting) => waiting,
                    None => return,
                },
            };
            // While all are in flight, what comes meanwhile gathers in the queue.
            let Ok(permit) = Arc::clone(&self.turns).acquire_owned().await else { return };
            let mut bytes = first.wanted.slots.bytes();
            let mut batch = vec![first];
            while batch.len() < GET_ITEMS_MAX {
                let Ok(next) = self.queue.try_recv() else { break };
                if next.answer.is_closed() {
                    continue;
                }
                // One request shows one grant.
                let other = next.wanted.grant != batch[0].wanted.grant;
                if other || bytes + next.wanted.slots.bytes() > config.get_bytes_max {
                    held = Some(next);
                    break;
                }
                bytes += next.wanted.slots.bytes();
                batch.push(next);
            }
            let Some(link) = self.link.upgrade() else { return };
            let inner = Arc::clone(&self.inner);
            tokio::spawn(async move {
                fetch(&inner, &link, batch).await;
                drop(permit);
            });
        }
    }
}

/// Sends one Get for all of `batch` and gives each its answer as it comes.
async fn fetch(inner: &Inner, link: &Link, mut batch: Vec<Waiting>) {
    batch.retain(|waiting| !waiting.answer.is_closed());
    let Some(deadline) = batch.iter().map(|waiting| waiting.wanted.deadline).max() else { return };
    let items = batch.iter().map(|waiting| waiting.wanted.item()).collect();
    let grant = batch.first().map(|waiting| waiting.wanted.grant.clone()).unwrap_or_default();
    let request = GetRequest { request: 0, grant, items };
    let mut waiting: Vec<Option<Waiting>> = batch.into_iter().map(Some).collect();
    let result = exchange(inner, link, request, deadline, &mut waiting).await;
    let failure = result.err().unwrap_or_else(unanswered);
    for waiting in waiting.into_iter().flatten() {
        // Refused only where the reader is gone.
        let _ = waiting.answer.send(Err(failure.clone()));
    }
}

fn unanswered() -> FragmentFailure {
    FragmentFailure::Unreachable { detail: "it left the item unanswered".to_owned() }
}

/// Sends one get by itself. Dropping it tells the provider that nobody wants the answer.
pub(super) async fn ask(
    link: &Link,
    client: &BulkClient,
    wanted: &Wanted,
) -> Result<FetchedSlots, FragmentFailure> {
    let grant = wanted.grant.clone();
    let request = GetRequest { request: 0, grant, items: vec![wanted.item()] };
    let broke = |error: BulkError| link.broke(&error);
    let mut replies = client.get(request, wanted.deadline).await.map_err(broke)?;
    let reply = replies.next().await.ok_or_else(unanswered)?.map_err(broke)?;
    reply_result(reply, &wanted.slots)
}

async fn exchange(
    inner: &Inner,
    link: &Link,
    request: GetRequest,
    deadline: Instant,
    waiting: &mut [Option<Waiting>],
) -> Result<(), FragmentFailure> {
    let client = link.client(inner, 0, deadline).await?;
    let mut replies = client.get(request, deadline).await.map_err(|error| link.broke(&error))?;
    loop {
        // Cancel-safe, both: a reply not taken stays with the connection, and who has gone stays
        // gone. Dropping the replies tells the provider that nobody wants the rest.
        let reply = tokio::select! {
            reply = replies.next() => reply,
            () = abandoned(waiting) => return Ok(()),
        };
        let Some(reply) = reply else { return Ok(()) };
        let reply = reply.map_err(|error| link.broke(&error))?;
        let Some(waiting) = waiting.get_mut(reply.item as usize).and_then(Option::take) else {
            continue;
        };
        let result = reply_result(reply, &waiting.wanted.slots);
        let _ = waiting.answer.send(result);
    }
}

/// Ends when nobody waits for any of these.
async fn abandoned(waiting: &mut [Option<Waiting>]) {
    for waiting in waiting.iter_mut().flatten() {
        waiting.answer.closed().await;
    }
}

fn reply_result(reply: GetReply, slots: &SlotRange) -> Result<FetchedSlots, FragmentFailure> {
    status_result(reply.status(), reply.detail)?;
    let (expected, found) = (slots.bytes(), reply.data.len());
    if expected == found {
        Ok(FetchedSlots { header: reply.header, trailer: reply.trailer, data: reply.data })
    } else {
        Err(FragmentFailure::Length { expected, found })
    }
}
