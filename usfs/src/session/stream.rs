//! The task that owns the connection with the directory.
//!
//! ```text
//! connect -> Open -> Opened -> reclaim, replay -> serve: send | receive | renew -> broken
//!    ^                                                                               |
//!    +---- wait (100 ms, doubling up to 5 s) <---------------------------------------+
//! ```
//! After an end of the session (fenced, refused, unknown) the task writes the rescue file and stops.

use std::collections::VecDeque;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use us_proto::v1;
use us_proto::v1::session_down::Event as Down;
use us_proto::v1::session_up::Event as Up;

use super::{DirectoryLink, LinkStream, SessionError};
use crate::fs::shared::Shared;

/// How long the directory may take to open a session.
const OPEN_TIMEOUT: Duration = Duration::from_secs(10);
/// The first pause after a failed connection, and the longest.
const PAUSE_MIN: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(5);
/// How long changes that nobody waits for are gathered.
const GATHER: Duration = Duration::from_millis(4);
/// Messages taken from the core at once.
const OUTGOING_MAX: usize = 64;

/// A stream whose session is open, and when the directory was asked to open it (CLOCK_BOOTTIME).
pub(crate) struct OpenStream {
    pub link: LinkStream,
    pub opened: v1::SessionOpened,
    pub asked_at: Duration,
}

/// Connects and opens or resumes a session.
pub(crate) async fn open(
    link: &dyn DirectoryLink,
    open: v1::OpenSession,
    now: impl Fn() -> Duration,
) -> Result<OpenStream, SessionError> {
    let opening = async {
        let mut stream = link.connect().await?;
        let asked_at = now();
        let message = v1::SessionUp { event: Some(Up::Open(open)) };
        let gone = || SessionError::Unreachable { detail: "the stream closed".to_owned() };
        stream.up.send(message).await.map_err(|_| gone())?;
        let answer = stream.down.next().await.ok_or_else(gone)??;
        match answer.event {
            Some(Down::Opened(opened)) => Ok(OpenStream { link: stream, opened, asked_at }),
            Some(Down::Ended(ended)) => Err(SessionError::Ended {
                reason: v1::EndReason::try_from(ended.reason).unwrap_or_default().as_str_name(),
                detail: ended.detail,
            }),
            other => Err(SessionError::Protocol {
                detail: format!("{} came before the session was open", name_of(other.as_ref())),
            }),
        }
    };
    let waited_ms = OPEN_TIMEOUT.as_millis() as u64;
    let timeout = tokio::time::timeout(OPEN_TIMEOUT, opening).await;
    timeout.unwrap_or(Err(SessionError::Timeout { waited_ms }))
}

fn name_of(event: Option<&Down>) -> &'static str {
    match event {
        None => "an empty message",
        Some(Down::Opened(_)) => "Opened",
        Some(Down::Applied(_)) => "Applied",
        Some(Down::Durable(_)) => "Durable",
        Some(Down::Fetched(_)) => "Fetched",
        Some(Down::Recall(_)) => "Recall",
        Some(Down::Placements(_)) => "PlacementsLeased",
        Some(Down::Inodes(_)) => "InodesLeased",
        Some(Down::Lock(_)) => "LockReply",
        Some(Down::Statfs(_)) => "StatfsReply",
        Some(Down::Providers(_)) => "ProviderTable",
        Some(Down::Renewed(_)) => "Renewed",
        Some(Down::Clean(_)) => "CleanBlocks",
        Some(Down::Ended(_)) => "SessionEnded",
        Some(Down::RecallLocks(_)) => "RecallLocks",
    }
}

/// Serves an open session until `stop`, across disconnects.
pub(crate) async fn run(
    shared: Arc<Shared>,
    link: Arc<dyn DirectoryLink>,
    first: OpenStream,
    reopen: v1::OpenSession,
    stop: CancellationToken,
) {
    let mut reopen = v1::OpenSession { session: first.opened.session, ..reopen };
    let mut next = Some((first, Vec::new()));
    let mut pause = PAUSE_MIN;
    loop {
        if let Some((stream, claims)) = next.take() {
            pause = PAUSE_MIN;
            reopen.incarnation = stream.opened.incarnation;
            // Cancel-safe: a stream that is dropped is a disconnect, and the mount is stopping.
            let broken = tokio::select! {
                broken = serve(&shared, stream, claims) => broken,
                () = stop.cancelled() => return,
            };
            shared.disconnected();
            reopen.durable = shared.lock().core.log().durable_number();
            match broken {
                SessionError::Ended { reason, .. }
                    if reason == v1::EndReason::Closed.as_str_name() =>
                {
                    return shared.end("closed".to_owned());
                }
                SessionError::Ended { .. } | SessionError::Protocol { .. } => {
                    shared.session_ended(&broken.to_string()).await;
                    return;
                }
                SessionError::Unreachable { .. } | SessionError::Timeout { .. } => {
                    tracing::warn!(error = %broken, "lost the directory; connecting again");
                }
            }
        }
        // Cancel-safe: connecting leaves nothing behind, sleeping neither.
        let opened = tokio::select! {
            opened = open(&*link, reopen.clone(), || shared.now().boot) => opened,
            () = stop.cancelled() => return,
        };
        match opened.and_then(|stream| shared.resume(stream)) {
            Ok(resumed) => next = Some(resumed),
            Err(error) if error.is_final() => {
                shared.session_ended(&error.to_string()).await;
                return;
            }
            Err(error) => {
                tracing::debug!(%error, "the directory is not reachable yet");
                tokio::select! {
                    () = tokio::time::sleep(pause) => {}
                    () = stop.cancelled() => return,
                }
                pause = (pause * 2).min(PAUSE_MAX);
            }
        }
    }
}

/// Times at which `Renew`s were sent that are not answered yet.
type Renewals = Mutex<VecDeque<Duration>>;

async fn serve(shared: &Shared, stream: OpenStream, claims: Vec<Up>) -> SessionError {
    let OpenStream { link: LinkStream { up, mut down }, opened, .. } = stream;
    let renewals = Renewals::default();
    let lease = Duration::from_millis(u64::from(opened.lease_ms));
    // Cancel-safe: the first to end breaks the stream, and a broken stream loses what is under way
    // in any case; the next one replays.
    tokio::select! {
        broken = send(shared, &up, claims) => broken,
        broken = receive(shared, &mut down, lease, &renewals) => broken,
        broken = renew(shared, &up, lease, &renewals) => broken,
    }
}

async fn push(up: &mpsc::Sender<v1::SessionUp>, event: Up) -> Result<(), SessionError> {
    let closed = SessionError::Unreachable { detail: "the stream closed".to_owned() };
    up.send(v1::SessionUp { event: Some(event) }).await.map_err(|_| closed)
}

async fn send(shared: &Shared, up: &mpsc::Sender<v1::SessionUp>, claims: Vec<Up>) -> SessionError {
    for claim in claims {
        if let Err(error) = push(up, claim).await {
            return error;
        }
    }
    let mut outgoing = Vec::new();
    loop {
        {
            let mut state = shared.lock();
            state.gathering = false;
            state.core.take_outgoing(OUTGOING_MAX, &mut outgoing);
        }
        if outgoing.is_empty() {
            // A wake between the look and the wait is kept by the notifier.
            shared.outgoing.notified().await;
            gather(shared).await;
        }
        for event in outgoing.drain(..) {
            if let Err(error) = push(up, event).await {
                return error;
            }
        }
    }
}

/// Waits a moment for more of what nobody waits for: changes travel together then, and cost the
/// directory and its copies one step instead of one each.
async fn gather(shared: &Shared) {
    let mut over = pin!(tokio::time::sleep(GATHER));
    loop {
        {
            let mut state = shared.lock();
            if state.core.is_urgent() {
                return;
            }
            state.gathering = true;
        }
        // Cancel-safe: a dropped sleep loses nothing, and a wake that was heard is looked at.
        tokio::select! {
            () = &mut over => return,
            () = shared.outgoing.notified() => {}
        }
    }
}

async fn receive(
    shared: &Shared,
    down: &mut futures::stream::BoxStream<'static, Result<v1::SessionDown, SessionError>>,
    lease: Duration,
    renewals: &Renewals,
) -> SessionError {
    loop {
        let event = match down.next().await {
            None => {
                return SessionError::Unreachable { detail: "the directory hung up".to_owned() };
            }
            Some(Err(error)) => return error,
            Some(Ok(message)) => message.event,
        };
        match event {
            Some(Down::Ended(ended)) => {
                return SessionError::Ended {
                    reason: v1::EndReason::try_from(ended.reason).unwrap_or_default().as_str_name(),
                    detail: ended.detail,
                };
            }
            Some(Down::Renewed(renewed)) => {
                let asked_at = renewals.lock().pop_front();
                if let Some(asked_at) = asked_at {
                    shared.trust_until(asked_at + lease - margin(lease));
                }
                shared.new_grant(&renewed.grant);
            }
            Some(event) => shared.on_down(event),
            None => {}
        }
    }
}

/// How much earlier than the directory a mount stops believing its leases.
pub(crate) fn margin(lease: Duration) -> Duration {
    lease / 10
}

async fn renew(
    shared: &Shared,
    up: &mpsc::Sender<v1::SessionUp>,
    lease: Duration,
    renewals: &Renewals,
) -> SessionError {
    loop {
        // Cancel-safe: a wish for a grant that was not heard stays, a sleep loses nothing.
        let grant = tokio::select! {
            () = tokio::time::sleep(lease / 3) => false,
            () = shared.grant_wanted() => true,
        };
        renewals.lock().push_back(shared.now().boot);
        if let Err(error) = push(up, Up::Renew(v1::Renew { grant })).await {
            return error;
        }
        let unanswered = renewals.lock().len();
        // Three thirds of a lease without an answer: the connection is dead, whatever TCP says.
        if unanswered > 3 {
            return SessionError::Timeout { waited_ms: lease.as_millis() as u64 };
        }
    }
}
