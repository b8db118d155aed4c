//! The shell of membership: dials the directory, carries out what [`Member`] says, dials again.

use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use us_core::ids::FragmentId;
use us_core::tls::{ExpectedPeer, Identity, Role};
use us_core::wire::{ConnectError, connect_grpc};
use us_proto::v1::membership_client::MembershipClient;
use us_proto::v1::provider_up::Event as Up;
use us_proto::v1::{FragmentStatus, InventoryItem, ProviderReport, ProviderUp, RetainPage};

use super::refused::RefusedList;
use super::retain::Retaining;
use super::{About, Effect, FileError, MESSAGE_BYTES_MAX, Member, MembershipFiles};
use crate::copies::Copies;
use crate::grants::Grants;
use crate::guest::{GuestConfig, Pause, Pressure, ScrubRequests, may_work};
use crate::leave::Leave;
use crate::rebuild::{Ended, Rebuilder};
use crate::service::{inventory_item, status_of};
use crate::store::{Store, StoreError};

/// Messages waiting to be sent. Who sends waits when there are more.
const OUTBOX: usize = 64;
/// How often the state is looked at for changes that cannot wait.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// The directory must answer the call within this time.
const JOIN_TIMEOUT: Duration = Duration::from_secs(10);
/// A message that cannot be handed over in this time: the stream is dead.
const SEND_TIMEOUT: Duration = Duration::from_secs(20);
/// The last words get this long.
const GOODBYE_TIMEOUT: Duration = Duration::from_secs(1);
/// How often a deletion is tried again that failed for want of space.
const DELETE_RETRIES: usize = 3;
/// Damaged fragments named after a welcome, at most; the rest come as scrub finds them again.
const DAMAGE_MAX: usize = 65_536;
/// With less than this free, puts are not accepted: a fragment and its segment may not fit.
const FREE_BYTES_MIN: u64 = 8 << 20;

/// What the link works with.
#[derive(Clone, Debug)]
pub struct LinkConfig {
    /// The directory's address, host:port.
    pub directory: String,
    /// Our certificate.
    pub identity: Identity,
    /// What we say of ourselves.
    pub about: About,
}

/// Who does what the directory says.
#[derive(Debug)]
pub struct Hands {
    /// Deletes, checks, says how it is.
    pub store: Store,
    /// Hears which grants count.
    pub grants: Grants,
    /// The owner's pause, which the directory is told.
    pub pause: Pause,
    /// When background work may run.
    pub guest: GuestConfig,
    /// The owner's word that it leaves.
    pub leave: Leave,
    /// Rebuilds.
    pub rebuilder: Rebuilder,
    /// How orders to rebuild ended.
    pub endings: mpsc::Receiver<Ended>,
    /// Scrubs.
    pub scrub: ScrubRequests,
    /// What is kept of the directory's state.
    pub copies: Copies,
    /// Who is let in no more.
    pub refused: RefusedList,
}

/// Why the link ended for good.
#[derive(Debug, thiserror::Error)]
pub enum LinkEnd {
    /// The directory does not want this provider.
    #[error("the directory refuses this provider: {reason}")]
    Refused {
        /// In its words.
        reason: String,
    },
    /// It has let go of this provider, as its owner wished.
    #[error("this provider has left")]
    Left,
    /// What it gave us cannot be kept.
    #[error(transparent)]
    Files(#[from] FileError),
}

/// Why one stream ended; the next try follows.
#[derive(Debug, thiserror::Error)]
enum Lost {
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error("the directory ended the stream: {0}")]
    Status(#[from] tonic::Status),
    #[error("the directory closed the stream")]
    Closed,
    #[error("the directory did not answer in time")]
    Silent,
}

/// How one stream ended.
enum StreamEnd {
    Lost(Lost),
    Stopped,
    Final(LinkEnd),
}

impl<E: Into<Lost>> From<E> for StreamEnd {
    fn from(error: E) -> Self {
        match error.into() {
            Lost::Status(status) if status.code() == tonic::Code::Unauthenticated => {
                Self::Final(LinkEnd::Refused { reason: status.message().to_owned() })
            }
            lost => Self::Lost(lost),
        }
    }
}

/// Stays joined until `stop`; says goodbye then.
///
/// # Errors
/// [`LinkEnd`] when trying again makes no sense.
pub async fn run(config: LinkConfig, hands: Hands, stop: CancellationToken) -> Result<(), LinkEnd> {
    let files = MembershipFiles::new(hands.store.dir());
    let joined = files.load_joined_or_new()?;
    let member = Member::new(config.about.clone(), joined);
    let retaining = Retaining::default();
    let mut link = Link { config, hands, files, member, retaining };
    loop {
        // Not cancelled inside: `stream` watches `stop` itself and says goodbye.
        match link.stream(&stop).await {
            Err(StreamEnd::Lost(lost)) => {
                let wait = link.member.disconnected(random_share());
                metrics::gauge!("us_provider_joined").set(0.0);
                tracing::warn!(
                    directory = %link.config.directory, error = %lost, wait_ms = wait.as_millis(),
                    "not joined; trying again"
                );
                // Cancel-safe: a dropped sleep loses nothing.
                if stop.run_until_cancelled(tokio::time::sleep(wait)).await.is_none() {
                    return Ok(());
                }
            }
            Err(StreamEnd::Stopped) => return Ok(()),
            Err(StreamEnd::Final(end)) => return Err(end),
            Ok(never) => match never {},
        }
    }
}

struct Link {
    config: LinkConfig,
    hands: Hands,
    files: MembershipFiles,
    member: Member,
    retaining: Retaining,
}

impl Link {
    /// One stream, from the dial to its end.
    async fn stream(
        &mut self,
        stop: &CancellationToken,
    ) -> Result<std::convert::Infallible, StreamEnd> {
        let (outbox, messages) = mpsc::channel(OUTBOX);
        let held = self.hands.copies.held().await;
        let hello = self.member.connected(Instant::now(), self.report(), held);
        send(&outbox, hello).await?;
        let dial = async {
            let (address, identity) = (&self.config.directory, &self.config.identity);
            let channel =
                connect_grpc(address, identity, ExpectedPeer::role(Role::Directory)).await?;
            let mut client =
                MembershipClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX);
            let join = client.join(ReceiverStream::new(messages)).await?;
            Ok::<_, Lost>(join.into_inner())
        };
        // Cancel-safe: a dial that is dropped has changed nothing here.
        let dialled = stop.run_until_cancelled(tokio::time::timeout(JOIN_TIMEOUT, dial)).await;
        let mut inbox = dialled.ok_or(StreamEnd::Stopped)?.map_err(|_elapsed| Lost::Silent)??;
        let mut look = tokio::time::interval(LOOK_EVERY);
        look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            // Cancel-safe, all four: `message` keeps what it has read in the stream, an ending not
            // received stays in its channel, a dropped tick comes again, and the token stays
            // cancelled.
            tokio::select! {
                () = stop.cancelled() => {
                    self.say_goodbye(&outbox, &mut inbox).await;
                    return Err(StreamEnd::Stopped);
                }
                message = inbox.message() => {
                    let event = message?.ok_or(Lost::Closed)?.event;
                    for effect in event.map(|event| self.member.received(event)).unwrap_or_default() {
                        self.carry_out(effect, &outbox).await?;
                    }
                }
                Some(ended) = self.hands.endings.recv() => {
                    if let Some(message) = self.member.rebuilt(ended) {
                        send(&outbox, message).await?;
                    }
                }
                _ = look.tick() => self.look(&outbox).await?,
            }
        }
    }

    /// Reports what is due.
    async fn look(&mut self, outbox: &mpsc::Sender<ProviderUp>) -> Result<(), StreamEnd> {
        let report = self.report();
        if let Some(message) = self.member.tick(Instant::now(), &report) {
            send(outbox, message).await?;
        }
        if self.member.is_welcome() {
            for message in Member::damage(&self.hands.store.take_fresh_damage()) {
                send(outbox, message).await?;
            }
        }
        Ok(())
    }

    async fn say_goodbye(
        &self,
        outbox: &mpsc::Sender<ProviderUp>,
        inbox: &mut tonic::Streaming<us_proto::v1::ProviderDown>,
    ) {
        let farewell = async {
            send(outbox, Member::goodbye()).await.ok()?;
            // The directory closes the stream when it has heard us.
            while inbox.message().await.ok()?.is_some() {}
            Some(())
        };
        if tokio::time::timeout(GOODBYE_TIMEOUT, farewell).await.is_err() {
            tracing::debug!("the directory did not answer the goodbye");
        }
    }

    async fn carry_out(
        &mut self,
        effect: Effect,
        outbox: &mpsc::Sender<ProviderUp>,
    ) -> Result<(), StreamEnd> {
        match effect {
            Effect::Stop { reason } => Err(StreamEnd::Final(LinkEnd::Refused { reason })),
            Effect::KeepJoined(joined) => {
                let (files, provider) = (self.files.clone(), joined.provider);
                let kept = tokio::task::spawn_blocking(move || files.keep_joined(&joined)).await;
                // A task that does not end well was stopped with the runtime.
                kept.map_err(|_stopped| StreamEnd::Stopped)?
                    .map_err(|error| StreamEnd::Final(error.into()))?;
                metrics::gauge!("us_provider_joined").set(1.0);
                tracing::info!(provider, directory = %self.config.directory, "joined");
                Ok(())
            }
            Effect::KeepGrants(told) => {
                let grants = self.hands.grants.clone();
                let kept = tokio::task::spawn_blocking(move || grants.told(told)).await;
                // A task that does not end well was stopped with the runtime.
                if let Err(error) = kept.map_err(|_stopped| StreamEnd::Stopped)? {
                    tracing::warn!(%error, "a start without the directory will refuse all grants");
                }
                Ok(())
            }
            Effect::ReportAllDamage => {
                let damaged = self.blocking(|store| store.damaged(DAMAGE_MAX)).await?;
                self.hands.store.take_fresh_damage();
                for message in Member::damage(&damaged.unwrap_or_default()) {
                    send(outbox, message).await?;
                }
                Ok(())
            }
            Effect::Delete { ticket, ids } => match self.delete(ids).await {
                Ok(deleted) => {
                    metrics::counter!("us_provider_deleted_total").increment(deleted as u64);
                    send(outbox, Member::deleted(ticket)).await
                }
                Err(error) => {
                    // It hears nothing and asks again after a minute.
                    tracing::error!(%error, ticket, "deletion failed; the directory asks again");
                    Ok(())
                }
            },
            Effect::Check { query, ids, bring_back, when_idle } => {
                let statuses = if when_idle && self.is_busy().await {
                    vec![FragmentStatus::Busy; ids.len()]
                } else {
                    self.check(ids, bring_back).await?
                };
                send(outbox, Member::checked(query, &statuses)).await
            }
            Effect::Rebuild { ticket, own, order } => {
                let refused = self.hands.rebuilder.start(ticket, own, *order);
                let ended = refused.map(|rebuilt| Ended { stream: ticket.stream, rebuilt });
                match ended.and_then(|ended| self.member.rebuilt(ended)) {
                    Some(message) => send(outbox, message).await,
                    None => Ok(()),
                }
            }
            Effect::Leaving(said) => {
                let leave = self.hands.leave.clone();
                let heard = tokio::task::spawn_blocking(move || leave.heard(said)).await;
                // A task that does not end well was stopped with the runtime.
                match heard.map_err(|_stopped| StreamEnd::Stopped)? {
                    Ok(false) => Ok(()),
                    Ok(true) => Err(StreamEnd::Final(LinkEnd::Left)),
                    Err(error) => {
                        tracing::error!(%error, "cannot keep that this provider has left");
                        Err(StreamEnd::Final(LinkEnd::Left))
                    }
                }
            }
            Effect::Retain(page) => {
                let found = self.retain(&page).await?;
                for message in Member::retain(&page, &found) {
                    send(outbox, message).await?;
                }
                Ok(())
            }
            Effect::CancelRebuild(ticket) => {
                self.hands.rebuilder.cancel(ticket);
                Ok(())
            }
            Effect::Refuse(list) => {
                let mut refused = self.hands.refused.clone();
                let taken = tokio::task::spawn_blocking(move || {
                    let kept = refused.take(&list);
                    (refused, kept)
                });
                // A task that does not end well was stopped with the runtime.
                let (refused, kept) = taken.await.map_err(|_stopped| StreamEnd::Stopped)?;
                self.hands.refused = refused;
                if let Err(error) = kept {
                    tracing::error!(%error, "a restart would let revoked members in again");
                }
                Ok(())
            }
            Effect::Scrub => {
                self.hands.scrub.ask();
                Ok(())
            }
            Effect::KeepRoot(root) => {
                self.hands.copies.keep_root(root, outbox.clone()).await;
                Ok(())
            }
            Effect::KeepRecords(records) => {
                self.hands.copies.keep_records(records, outbox.clone()).await;
                Ok(())
            }
        }
    }

    /// Deletes; on a full disk once more, alone: then no put is in the batch that does not fit.
    async fn delete(&self, ids: Vec<FragmentId>) -> Result<usize, StoreError> {
        let mut result = self.hands.store.delete(ids.clone()).await;
        for _ in 0..DELETE_RETRIES {
            if !matches!(result, Err(StoreError::NoSpace { .. })) {
                break;
            }
            result = self.hands.store.delete(ids.clone()).await;
        }
        result
    }

    /// What is here beyond a list, when its last page has come.
    async fn retain(
        &mut self,
        page: &RetainPage,
    ) -> Result<Result<Option<Vec<InventoryItem>>, String>, StreamEnd> {
        let held = self.hands.copies.held().await.records;
        let (page, mut retaining) = (page.clone(), std::mem::take(&mut self.retaining));
        let (retaining, found) = self
            .blocking(move |store| {
                let found = retaining.page(store, held.as_ref(), &page);
                (retaining, found)
            })
            .await?;
        self.retaining = retaining;
        Ok(match found {
            Ok(unlisted) => Ok(unlisted.map(|all| all.iter().map(inventory_item).collect())),
            Err(error) => {
                tracing::warn!(%error, "a retain list is not followed");
                Err(error.to_string())
            }
        })
    }

    /// Whether background work has to wait. The owner's pause is not asked: reading goes on.
    async fn is_busy(&self) -> bool {
        let guest = self.hands.guest;
        let gate = move || may_work(&guest, false, Pressure::of("cpu"), Pressure::of("io"));
        tokio::task::spawn_blocking(gate).await.is_ok_and(|may| may.is_err())
    }

    /// How fragments are; what is wanted and lies in the trash comes back.
    async fn check(
        &self,
        ids: Vec<Option<FragmentId>>,
        bring_back: bool,
    ) -> Result<Vec<FragmentStatus>, StreamEnd> {
        let asked = ids.clone();
        let check = move |store: &Store| -> Vec<FragmentStatus> {
            asked.iter().map(|id| check_one(store, *id)).collect()
        };
        let statuses = self.blocking(check.clone()).await?;
        let found = ids.iter().zip(&statuses);
        let missing = found.filter(|(_, status)| **status == FragmentStatus::NotFound);
        let missing: Vec<FragmentId> = missing.filter_map(|(id, _)| *id).collect();
        if !bring_back || missing.is_empty() {
            return Ok(statuses);
        }
        match self.hands.store.restore(missing).await {
            Ok(0) => Ok(statuses),
            Ok(restored) => {
                tracing::info!(restored, "fragments brought back from the trash");
                self.blocking(check).await
            }
            Err(error) => {
                tracing::error!(%error, "fragments stay in the trash");
                Ok(statuses)
            }
        }
    }

    async fn blocking<T: Send + 'static>(
        &self,
        ask: impl FnOnce(&Store) -> T + Send + 'static,
    ) -> Result<T, StreamEnd> {
        let store = self.hands.store.clone();
        // A task that does not end well was stopped with the runtime.
        tokio::task::spawn_blocking(move || ask(&store)).await.map_err(|_| StreamEnd::Stopped)
    }

    fn report(&self) -> ProviderReport {
        let (uplink_bytes_per_s, downlink_bytes_per_s) = self.member.about.line;
        let report = report(&self.hands.store, &self.hands.pause, &self.hands.leave);
        ProviderReport { uplink_bytes_per_s, downlink_bytes_per_s, ..report }
    }
}

/// What the provider says of itself now.
pub(crate) fn report(store: &Store, pause: &Pause, leave: &Leave) -> ProviderReport {
    let state = store.state();
    let (note, full) = if pause.is_on() {
        ("paused by its owner".to_owned(), false)
    } else if let Some(trouble) = state.trouble {
        (trouble, false)
    } else if state.free_bytes < FREE_BYTES_MIN {
        ("full".to_owned(), true)
    } else {
        (String::new(), false)
    };
    ProviderReport {
        capacity_bytes: state.capacity_bytes,
        used_bytes: state.used_bytes,
        free_bytes: state.free_bytes,
        reclaimable_bytes: state.trashed_bytes,
        fragments: state.fragments,
        damaged: state.damaged,
        accepts_puts: note.is_empty(),
        full,
        note,
        next_record: state.next_record,
        leaving: leave.is_on(),
        ..ProviderReport::default()
    }
}

fn check_one(store: &Store, id: Option<FragmentId>) -> FragmentStatus {
    let result = id.map_or(Err(StoreError::Request { detail: "no such id" }), |id| store.check(id));
    result.map_or_else(|error| status_of(&error), |()| FragmentStatus::Ok)
}

async fn send(outbox: &mpsc::Sender<ProviderUp>, event: Up) -> Result<(), StreamEnd> {
    let message = ProviderUp { event: Some(event) };
    match outbox.send_timeout(message, SEND_TIMEOUT).await {
        Ok(()) => Ok(()),
        Err(mpsc::error::SendTimeoutError::Timeout(_)) => Err(Lost::Silent.into()),
        Err(mpsc::error::SendTimeoutError::Closed(_)) => Err(Lost::Closed.into()),
    }
}

fn random_share() -> f64 {
    let mut bytes = [0u8; 4];
    // Without randomness the wait is merely the same for all.
    let _ = getrandom::fill(&mut bytes);
    f64::from(u32::from_le_bytes(bytes)) / f64::from(u32::MAX)
}
