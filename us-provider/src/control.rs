//! The owner's way into the running daemon: a Unix socket in the data folder that only the owner of
//! the folder can reach. One line of JSON asks, one answers.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio_util::sync::CancellationToken;

use crate::guest::Pause;
use crate::leave::{Leave, Progress};
use crate::membership::report;
use crate::store::Store;

/// The longest request or answer.
const LINE_BYTES_MAX: u64 = 64 << 10;
/// A conversation ends after this time, finished or not.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Conversations at once.
const CONVERSATIONS_MAX: usize = 16;
/// The longest path a Unix socket can have.
const PATH_BYTES_MAX: usize = 107;

/// What the owner can ask.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// How is it?
    Status,
    /// No new fragments and no background work until resumed.
    Pause,
    /// On with it.
    Resume,
    /// Move everything elsewhere, then be a provider no more.
    Leave,
    /// Stay after all.
    Stay,
}

/// What the daemon answers.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "result", rename_all = "snake_case")]
pub enum Answer {
    /// It is done; this is the state after it.
    Ok(Box<Status>),
    /// It is not.
    Error {
        /// Why.
        message: String,
    },
}

/// How the daemon is.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Status {
    /// The version of the program.
    pub version: String,
    /// Its process.
    pub pid: u32,
    /// The id of its store.
    pub store: String,
    /// Where clients reach it.
    pub address: String,
    /// Its directory.
    pub directory: String,
    /// Whether its owner paused it.
    pub paused: bool,
    /// How far its leaving is; absent: it stays.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub leaving: Option<Progress>,
    /// Whether it takes fragments now.
    pub accepts_puts: bool,
    /// Why it does not.
    pub note: String,
    /// Bytes it may take.
    pub capacity_bytes: u64,
    /// Bytes it takes.
    pub used_bytes: u64,
    /// Bytes it still may take.
    pub free_bytes: u64,
    /// Fragments it keeps.
    pub fragments: u64,
    /// Fragments in the trash.
    pub trashed: u64,
    /// Fragments known to be damaged.
    pub damaged: u64,
}

/// What the socket's answers are made of.
#[derive(Clone, Debug)]
pub struct Controlled {
    /// The store.
    pub store: Store,
    /// The pause.
    pub pause: Pause,
    /// The leaving.
    pub leave: Leave,
    /// Where clients reach us.
    pub address: String,
    /// Our directory.
    pub directory: String,
}

impl Controlled {
    fn answer(&self, request: Request) -> Answer {
        let changed = match request {
            Request::Status => Ok(()),
            Request::Pause => self.pause.set(true),
            Request::Resume => self.pause.set(false),
            Request::Leave => self.leave.set(true),
            Request::Stay => self.leave.set(false),
        };
        match changed {
            Ok(()) => Answer::Ok(Box::new(self.status())),
            Err(error) => Answer::Error { message: format!("cannot keep what was said: {error}") },
        }
    }

    fn status(&self) -> Status {
        let state = self.store.state();
        let report = report(&self.store, &self.pause, &self.leave);
        let store = self.store.id().iter().map(|byte| format!("{byte:02x}")).collect();
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            store,
            address: self.address.clone(),
            directory: self.directory.clone(),
            paused: self.pause.is_on(),
            leaving: self.leave.progress(),
            accepts_puts: report.accepts_puts,
            note: report.note,
            capacity_bytes: state.capacity_bytes,
            used_bytes: state.used_bytes,
            free_bytes: state.free_bytes,
            fragments: state.fragments,
            trashed: state.trashed,
            damaged: state.damaged,
        }
    }
}

/// Where the socket of a data folder is.
pub fn socket_path(data: &Path) -> PathBuf {
    data.join("control.sock")
}

/// Binds the socket. The caller holds the folder's lock, so one that is there is a dead daemon's.
///
/// # Errors
/// What the system says; also when the path is too long for a socket.
pub fn bind(data: &Path) -> io::Result<UnixListener> {
    let path = socket_path(data);
    if path.as_os_str().len() > PATH_BYTES_MAX {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "the path is too long for a socket",
        ));
    }
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        Ok(()) | Err(_) => {}
    }
    let listener = UnixListener::bind(&path)?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Answers until `stop`.
pub async fn serve(listener: UnixListener, controlled: Controlled, stop: CancellationToken) {
    let room = Arc::new(tokio::sync::Semaphore::new(CONVERSATIONS_MAX));
    // Cancel-safe: a dropped accept leaves the connection in the queue.
    while let Some(accepted) = stop.run_until_cancelled(listener.accept()).await {
        let Ok((stream, _)) = accepted else {
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let Ok(permit) = Arc::clone(&room).acquire_owned().await else { return };
        let controlled = controlled.clone();
        tokio::spawn(async move {
            let conversation = tokio::time::timeout(TIMEOUT, converse(stream, controlled));
            if let Ok(Err(error)) = conversation.await {
                tracing::debug!(%error, "a conversation on the control socket failed");
            }
            drop(permit);
        });
    }
}

async fn converse(mut stream: UnixStream, controlled: Controlled) -> io::Result<()> {
    let mut line = String::new();
    let (reading, mut writing) = stream.split();
    BufReader::new(reading).take(LINE_BYTES_MAX).read_line(&mut line).await?;
    let answer = match serde_json::from_str(&line) {
        Ok(request) => tokio::task::spawn_blocking(move || controlled.answer(request)).await?,
        Err(error) => Answer::Error { message: format!("not a request: {error}") },
    };
    let mut text = serde_json::to_vec(&answer)?;
    text.push(b'\n');
    writing.write_all(&text).await
}

/// Asks the daemon that runs on `data`. Blocks.
///
/// # Errors
/// When none runs there, or it does not answer.
pub fn ask(data: &Path, request: Request) -> io::Result<Answer> {
    use std::io::{BufRead, Read, Write};
    let mut stream = std::os::unix::net::UnixStream::connect(socket_path(data))?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    let mut text = serde_json::to_vec(&request)?;
    text.push(b'\n');
    stream.write_all(&text)?;
    let mut line = String::new();
    std::io::BufReader::new(stream).take(LINE_BYTES_MAX).read_line(&mut line)?;
    Ok(serde_json::from_str(&line)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::StoreOptions;

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn the_owner_pauses_and_resumes() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path(), StoreOptions::default()).unwrap();
        let controlled = Controlled {
            store,
            pause: Pause::load(dir.path()),
            leave: Leave::load(dir.path()),
            address: "127.0.0.1:1".into(),
            directory: "127.0.0.1:2".into(),
        };
        let stop = CancellationToken::new();
        let listener = bind(dir.path()).unwrap();
        let serving = tokio::spawn(serve(listener, controlled.clone(), stop.clone()));
        let ask = |request| {
            let data = dir.path().to_owned();
            tokio::task::spawn_blocking(move || ask(&data, request).unwrap())
        };
        let Answer::Ok(status) = ask(Request::Status).await.unwrap() else { panic!() };
        assert!(!status.paused && status.accepts_puts);
        let Answer::Ok(status) = ask(Request::Pause).await.unwrap() else { panic!() };
        assert!(status.paused && !status.accepts_puts && controlled.pause.is_on());
        let Answer::Ok(status) = ask(Request::Resume).await.unwrap() else { panic!() };
        assert!(!status.paused && status.leaving.is_none());
        let Answer::Ok(status) = ask(Request::Leave).await.unwrap() else { panic!() };
        assert!(status.leaving.is_some() && controlled.leave.is_on());
        let Answer::Ok(status) = ask(Request::Stay).await.unwrap() else { panic!() };
        assert!(status.leaving.is_none());
        stop.cancel();
        serving.await.unwrap();
    }
}
