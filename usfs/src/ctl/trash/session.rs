//! A short session with the directory, as a mount without a kernel: it takes the leases it needs, changes
//! names, and gives back what others want behind its changes. It caches nothing.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure};
use futures::StreamExt;
use us_core::ids::Ino;
use us_core::name::NameKey;
use us_core::tls::{ExpectedPeer, Identity, Role};
use us_proto::v1;
use us_proto::v1::fetch::Want;
use us_proto::v1::mutation::Op;
use us_proto::v1::session_down::Event as Down;
use us_proto::v1::session_up::Event as Up;

use crate::session::grpc::GrpcLink;
use crate::session::{LinkStream, stream};

/// How long the directory may take: longer than it waits for another mount's lease.
const PATIENCE: Duration = Duration::from_secs(120);
/// Renewals while it is waited for.
const RENEW_EVERY: Duration = Duration::from_secs(5);
/// Changes in one batch.
const BATCH_MAX: usize = 256;
/// Inode numbers leased at once.
const INODES: u32 = 64;

/// A name that is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Found {
    pub ino: u64,
    pub is_dir: bool,
}

/// An open session.
pub(super) struct Session {
    link: LinkStream,
    names: NameKey,
    batch: u64,
    queued: Vec<v1::Mutation>,
    recalls: VecDeque<v1::Recall>,
    inodes: std::ops::Range<u64>,
    request: u64,
    /// Directories whose leases were given back.
    pub given_back: Vec<u64>,
}

impl Session {
    /// Opens a session on a volume.
    pub async fn open(
        directory: String,
        identity: Identity,
        volume: &str,
        names: NameKey,
    ) -> anyhow::Result<Self> {
        let link = GrpcLink::new(directory, identity, ExpectedPeer::role(Role::Directory));
        let (volume, host) = (volume.to_owned(), "usctl trash".to_owned());
        let open = v1::OpenSession { volume, host, ..Default::default() };
        let begun = Instant::now();
        let opened = stream::open(&link, open, || begun.elapsed()).await?;
        Ok(Self {
            link: opened.link,
            names,
            batch: 0,
            queued: Vec::new(),
            recalls: VecDeque::new(),
            inodes: 0..0,
            request: 0,
            given_back: Vec::new(),
        })
    }

    async fn send(&mut self, event: Up) -> anyhow::Result<()> {
        let sent = self.link.up.send(v1::SessionUp { event: Some(event) }).await;
        ensure!(sent.is_ok(), "the directory hung up");
        Ok(())
    }

    /// The next message that `pick` wants. What is recalled meanwhile is given back at once where no change
    /// waits to be sent: two sessions may each ask for what the other has.
    async fn hear<T>(&mut self, pick: impl Fn(Down) -> Option<T>) -> anyhow::Result<T> {
        let until = Instant::now() + PATIENCE;
        loop {
            let Ok(message) = tokio::time::timeout(RENEW_EVERY, self.link.down.next()).await else {
                ensure!(Instant::now() < until, "the directory gave no answer");
                self.send(Up::Renew(v1::Renew::default())).await?;
                continue;
            };
            match message.transpose()?.and_then(|message| message.event) {
                None => bail!("the directory hung up"),
                Some(Down::Ended(ended)) => bail!("the directory says: {}", ended.detail),
                Some(Down::Recall(recall)) if self.queued.is_empty() => {
                    self.give_back(&recall).await?;
                }
                Some(Down::Recall(recall)) => self.recalls.push_back(recall),
                Some(other) => {
                    if let Some(wanted) = pick(other) {
                        return Ok(wanted);
                    }
                }
            }
        }
    }

    /// Has every change so far applied, then gives back what others want.
    pub async fn flush(&mut self) -> anyhow::Result<()> {
        if !self.queued.is_empty() {
            self.batch += 1;
            let (number, mutations) = (self.batch, std::mem::take(&mut self.queued));
            self.send(Up::Batch(v1::Batch { number, mutations, traces: Vec::new() })).await?;
            self.hear(|down| matches!(down, Down::Applied(a) if a.number >= number).then_some(()))
                .await?;
        }
        while let Some(recall) = self.recalls.pop_front() {
            self.give_back(&recall).await?;
        }
        Ok(())
    }

    /// Gives a lease back, behind every change that was sent.
    async fn give_back(&mut self, recall: &v1::Recall) -> anyhow::Result<()> {
        let (ino, grant) = (recall.ino, recall.grant);
        let level = v1::LeaseLevel::None.into();
        let lease = v1::InodeLease { ino, level, open: false, grant };
        self.send(Up::LeaseReturn(v1::LeaseReturn { leases: vec![lease] })).await?;
        self.given_back.push(ino);
        Ok(())
    }

    /// What a name in a directory is. The directory is this session's afterwards, as far as `level` says,
    /// until it is given back at a flush.
    pub async fn lookup(
        &mut self,
        dir: u64,
        name: &[u8],
        level: v1::LeaseLevel,
    ) -> anyhow::Result<Option<Found>> {
        self.flush().await?;
        if self.inodes.is_empty() {
            // Before the directory is held: what is recalled while it is waited for is given back.
            self.lease_inodes().await?;
        }
        let want = Want::Entry(v1::FetchEntry {
            dir,
            name_hash: self.names.name_hash(Ino(dir), name).to_vec().into(),
            dir_level: level.into(),
            child_level: v1::LeaseLevel::Shared.into(),
        });
        self.request += 1;
        let request = self.request;
        self.send(Up::Fetch(v1::Fetch { request, want: Some(want), trace: 0 })).await?;
        let fetched = self
            .hear(|down| match down {
                Down::Fetched(fetched) if fetched.request == request => Some(fetched),
                _ => None,
            })
            .await?;
        ensure!(fetched.error == 0, "the directory says: {}", fetched.detail);
        let removed = fetched.inodes.iter().any(|inode| inode.ino == dir && inode.nlink == 0);
        ensure!(!removed, "a folder on the way was removed meanwhile");
        let ino = fetched.entries.first().map_or(0, |entry| entry.ino);
        let inode = fetched.inodes.iter().find(|inode| inode.ino == ino);
        let is_dir = inode.is_some_and(|inode| inode.mode & 0o170_000 == 0o040_000);
        Ok((ino != 0).then_some(Found { ino, is_dir }))
    }

    /// Takes `ino` out of the trash, as `name` in `dir`, which must be this session's.
    pub async fn restore(&mut self, dir: u64, name: &[u8], ino: u64) -> anyhow::Result<()> {
        let (name_hash, sealed_name) = self.seal(dir, name)?;
        let time = Some(now());
        let restore = v1::Restore { dir, name_hash, sealed_name, ino, time };
        self.append(Op::Restore(restore)).await
    }

    /// Makes a directory, as `name` in `dir`, which must be this session's.
    pub async fn make_dir(
        &mut self,
        dir: u64,
        name: &[u8],
        (uid, gid): (u32, u32),
    ) -> anyhow::Result<u64> {
        let Some(ino) = self.inodes.next() else { bail!("the directory leases no inodes") };
        let (name_hash, sealed_name) = self.seal(dir, name)?;
        let create = v1::Create {
            dir,
            name_hash,
            sealed_name,
            ino,
            mode: 0o040_755,
            uid,
            gid,
            time: Some(now()),
            ..Default::default()
        };
        self.append(Op::Create(create)).await?;
        Ok(ino)
    }

    async fn lease_inodes(&mut self) -> anyhow::Result<()> {
        self.request += 1;
        let request = self.request;
        self.send(Up::LeaseInodes(v1::LeaseInodes { request, count: INODES })).await?;
        let leased = self
            .hear(|down| match down {
                Down::Inodes(leased) if leased.request == request => Some(leased),
                _ => None,
            })
            .await?;
        self.inodes = leased.first..leased.first + u64::from(leased.count);
        Ok(())
    }

    async fn append(&mut self, op: Op) -> anyhow::Result<()> {
        self.queued.push(v1::Mutation { op: Some(op) });
        if self.queued.len() >= BATCH_MAX { self.flush().await } else { Ok(()) }
    }

    fn seal(&self, dir: u64, name: &[u8]) -> anyhow::Result<(bytes::Bytes, bytes::Bytes)> {
        let hash = self.names.name_hash(Ino(dir), name).to_vec();
        Ok((hash.into(), self.names.seal_name(Ino(dir), name)?.into()))
    }

    /// Waits until every change is durable, and ends the session.
    pub async fn close(mut self) -> anyhow::Result<()> {
        self.flush().await?;
        let number = self.batch;
        if number > 0 {
            self.send(Up::Sync(v1::Sync {})).await?;
            self.hear(|down| matches!(down, Down::Durable(d) if d.number >= number).then_some(()))
                .await?;
        }
        self.send(Up::Close(v1::CloseSession {})).await?;
        // Its end is the answer; what is durable stays, whatever that says.
        let _ended = self.hear(|_| None::<()>).await;
        Ok(())
    }
}

fn now() -> v1::Timestamp {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let since = since.unwrap_or_default();
    v1::Timestamp { seconds: since.as_secs() as i64, nanos: since.subsec_nanos() }
}
