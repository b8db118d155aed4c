//! The gRPC services: each adapts streams and calls to events and questions of the engine.
//!
//! Roles come from the peer's certificate: providers may join, clients may open sessions and ask,
//! administrators may do all. Whatever a peer sends, it costs at most its own connection.

mod looks;

use std::pin::Pin;
use std::sync::Arc;

use futures::{Stream, StreamExt};
use tokio::sync::Semaphore;
use tokio_stream::wrappers::ReceiverStream;
use tonic::service::Routes;
use tonic::{Request, Response, Status, Streaming};
use us_core::ids::VolumeId;
use us_core::tls::{Identity, PeerIdentity, Role};
use us_core::wire::peer_of;
use us_proto::v1::admin_server::{Admin, AdminServer};
use us_proto::v1::membership_server::{Membership, MembershipServer};
use us_proto::v1::sessions_server::{Sessions, SessionsServer};
use us_proto::v1::{
    BackupChunk, BackupRequest, BlockRequest, CreateVolumeRequest, DeleteVolumeReply,
    DeleteVolumeRequest, DrainReply, DrainRequest, EventsReply, EventsRequest, FsckReply,
    FsckRequest, GiveUpReply, GiveUpRequest, ListVolumesReply, ListVolumesRequest, ProviderDown,
    ProviderUp, PurgeTrashReply, PurgeTrashRequest, RepairRequest, RepairStatus, ScrubReply,
    ScrubRequest, SessionDown, SessionUp, SetAccessRequest, SetVolumeKeysRequest, SetVolumeRequest,
    StatusReply, StatusRequest, TrashReply, TrashRequest, TrustReply, TrustRequest, VolumeInfo,
    VolumeKeysReply, VolumeKeysRequest, WhatIfReply, WhatIfRequest, WhereBlock, WhereRequest,
};

use self::looks::Looks;
use crate::engine::registry::RegistryQuestion;
use crate::engine::{
    Answer, Event, NewVolume, Peer, PrivateVolume, Question, RefusalKind, StateSnapshot,
};
use crate::fsck::Fsck;
use crate::image::ImageWriter;
use crate::inspect::trash::list_trash;
use crate::inspect::{files_lost, find_block, where_file};
use crate::namespace::Purged;
use crate::shell::{Directory, Gone};

/// The largest message taken: a batch of 4 MiB and what goes with it.
const MESSAGE_BYTES_MAX: usize = 8 << 20;
/// The largest message sent: a map of 256 chunks of 1024 extents, and the blocks; a root.
pub const ANSWER_BYTES_MAX: usize = 32 << 20;
/// Blocks of `where` that wait for the caller to read them.
const WHERE_QUEUE_MAX: usize = 64;
/// Pages of a trash that wait for the caller to read them.
const TRASH_QUEUE_MAX: usize = 4;
/// Providers one what-if leaves out, and files it names.
const WHAT_IF_PROVIDERS_MAX: usize = 4096;
const WHAT_IF_FILES_MAX: u32 = 10_000;

/// Checks of everything at once, and findings that wait for the caller to read them.
const CHECKS_MAX: usize = 1;
const FSCK_QUEUE_MAX: usize = 256;
/// Pieces of a backup that wait for the caller to read them, and their size.
const BACKUP_QUEUE_MAX: usize = 8;
const BACKUP_CHUNK_BYTES: usize = 1 << 20;

type Down<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// All services of the directory.
#[derive(Clone, Debug)]
pub struct Service {
    pub(crate) directory: Directory,
    identity: Identity,
    checks: Arc<Semaphore>,
    looks: Looks,
}

impl Service {
    /// The services of this directory, which shows `identity` to providers.
    pub fn new(directory: Directory, identity: Identity) -> Self {
        Self {
            directory,
            identity,
            checks: Arc::new(Semaphore::new(CHECKS_MAX)),
            looks: Looks::default(),
        }
    }

    /// As routes for [`us_core::wire::Server::grpc`].
    pub fn routes(&self) -> Routes {
        let sessions = SessionsServer::new(self.clone())
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(ANSWER_BYTES_MAX);
        let membership = MembershipServer::new(self.clone())
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(ANSWER_BYTES_MAX);
        let admin = AdminServer::new(self.clone()).max_encoding_message_size(ANSWER_BYTES_MAX);
        Routes::new(sessions).add_service(membership).add_service(admin)
    }

    async fn ask_count(&self, who: &PeerIdentity, question: Question) -> Result<u64, Status> {
        match self.ask_by(who, question).await? {
            Answer::Count(count) => Ok(count),
            other => Err(unexpected(&other)),
        }
    }

    /// The stored state, with the volumes of which `who` may know.
    async fn ask_snapshot(&self, who: &PeerIdentity) -> Result<StateSnapshot, Status> {
        match self.ask_by(who, Question::Snapshot).await? {
            Answer::Snapshot(snapshot) => Ok(snapshot),
            other => Err(unexpected(&other)),
        }
    }

    async fn ask_keys(
        &self,
        who: &PeerIdentity,
        question: Question,
    ) -> Result<Response<VolumeKeysReply>, Status> {
        match self.ask_by(who, question).await? {
            Answer::VolumeKeys(keys) => Ok(Response::new(keys)),
            other => Err(unexpected(&other)),
        }
    }

    pub(crate) async fn ask(&self, question: Question) -> Result<Answer, Status> {
        answered(self.directory.ask(question).await?)
    }

    /// Asks in somebody's name: the log says whose order it was.
    pub(crate) async fn ask_by(
        &self,
        who: &PeerIdentity,
        question: Question,
    ) -> Result<Answer, Status> {
        answered(self.directory.ask_by(who.clone(), question).await?)
    }
}

fn answered(answer: Answer) -> Result<Answer, Status> {
    match answer {
        Answer::Refused { kind, detail } => Err(match kind {
            RefusalKind::NotFound => Status::not_found(detail),
            RefusalKind::Exists => Status::already_exists(detail),
            RefusalKind::Invalid => Status::invalid_argument(detail),
            RefusalKind::Busy => Status::failed_precondition(detail),
            RefusalKind::Denied => Status::permission_denied(detail),
        }),
        answer => Ok(answer),
    }
}

impl From<Gone> for Status {
    fn from(gone: Gone) -> Self {
        Self::unavailable(gone.to_string())
    }
}

/// The caller, if its role is one of `roles`.
pub(crate) fn allowed<T>(request: &Request<T>, roles: &[Role]) -> Result<PeerIdentity, Status> {
    let peer = peer_of(request)?;
    if roles.contains(&peer.role) {
        return Ok(peer.clone());
    }
    let what = "is not for the role of this certificate";
    Err(Status::permission_denied(format!("this call {what} ({})", peer.role)))
}

fn peer(identity: &PeerIdentity) -> Peer {
    Peer {
        key_hash: identity.key_hash.as_bytes().to_vec(),
        name: identity.name.clone(),
        admin: identity.role == Role::Admin,
    }
}

/// What makes the volume private that is asked for, if it is to be.
fn private_volume(request: &CreateVolumeRequest) -> Result<Option<PrivateVolume>, Status> {
    if request.private_volume.is_empty() && request.key_ring.is_empty() {
        return Ok(None);
    }
    let volume = VolumeId::from_slice(&request.private_volume)
        .ok_or_else(|| Status::invalid_argument("the id of a private volume has 16 bytes"))?;
    Ok(Some(PrivateVolume { volume, key_ring: request.key_ring.clone() }))
}

pub(crate) fn unexpected(answer: &Answer) -> Status {
    Status::internal(format!("an answer to another question: {answer:?}"))
}

/// Feeds a stream's messages to the engine until either side ends it.
async fn pump<T: Send + 'static>(
    directory: Directory,
    conn: crate::engine::ConnId,
    ended: tokio_util::sync::CancellationToken,
    mut up: Streaming<T>,
    event: impl Fn(T) -> Event + Send,
) {
    // Cancel-safe: once cancelled the stream is dropped.
    while let Some(Some(Ok(message))) = ended.run_until_cancelled(up.next()).await {
        if directory.event(event(message)).await.is_err() {
            return;
        }
    }
    directory.detach(conn).await;
}

#[tonic::async_trait]
impl Sessions for Service {
    type OpenStream = Down<SessionDown>;

    async fn open(
        &self,
        request: Request<Streaming<SessionUp>>,
    ) -> Result<Response<Self::OpenStream>, Status> {
        let identity = allowed(&request, &[Role::Client, Role::Admin])?;
        let attached = self.directory.attach_session();
        let conn = attached.conn;
        let connected = Event::SessionConnected { conn, peer: peer(&identity) };
        self.directory.event(connected).await?;
        let event = move |up| Event::Session { conn, up };
        let up = request.into_inner();
        tokio::spawn(pump(self.directory.clone(), conn, attached.ended, up, event));
        Ok(Response::new(Box::pin(ReceiverStream::new(attached.down).map(Ok))))
    }
}

#[tonic::async_trait]
impl Membership for Service {
    type JoinStream = Down<ProviderDown>;

    async fn join(
        &self,
        request: Request<Streaming<ProviderUp>>,
    ) -> Result<Response<Self::JoinStream>, Status> {
        let identity = allowed(&request, &[Role::Provider])?;
        let attached = self.directory.attach_provider();
        let conn = attached.conn;
        let connected = Event::ProviderConnected { conn, peer: peer(&identity) };
        self.directory.event(connected).await?;
        let event = move |up| Event::Provider { conn, up };
        let up = request.into_inner();
        tokio::spawn(pump(self.directory.clone(), conn, attached.ended, up, event));
        Ok(Response::new(Box::pin(ReceiverStream::new(attached.down).map(Ok))))
    }
}

#[tonic::async_trait]
impl Admin for Service {
    type WhereStream = Down<WhereBlock>;
    type BackupStream = Down<BackupChunk>;
    type FsckStream = Down<FsckReply>;
    type TrashStream = Down<TrashReply>;

    async fn status(
        &self,
        request: Request<StatusRequest>,
    ) -> Result<Response<StatusReply>, Status> {
        let who = allowed(&request, &[Role::Client, Role::Admin])?;
        match self.ask_by(&who, Question::Status).await? {
            Answer::Status(status) => Ok(Response::new(*status)),
            other => Err(unexpected(&other)),
        }
    }

    async fn create_volume(
        &self,
        request: Request<CreateVolumeRequest>,
    ) -> Result<Response<VolumeInfo>, Status> {
        let who = allowed(&request, &[Role::Client, Role::Admin])?;
        let request = request.into_inner();
        let private = private_volume(&request)?;
        let CreateVolumeRequest { name, s, r, quota_bytes, repair_at, trash_hours, access, .. } =
            request;
        let maker = Some(peer(&who));
        let volume =
            NewVolume { name, s, r, quota_bytes, repair_at, trash_hours, maker, access, private };
        match self.ask_by(&who, volume.into()).await? {
            Answer::Volume(info) => Ok(Response::new(info)),
            other => Err(unexpected(&other)),
        }
    }

    async fn set_volume(
        &self,
        request: Request<SetVolumeRequest>,
    ) -> Result<Response<VolumeInfo>, Status> {
        let who = allowed(&request, &[Role::Admin])?;
        let SetVolumeRequest { name, repair_at, quota_bytes, trash_hours } = request.into_inner();
        let question = Question::SetVolume { name, repair_at, quota_bytes, trash_hours };
        match self.ask_by(&who, question).await? {
            Answer::Volume(info) => Ok(Response::new(info)),
            other => Err(unexpected(&other)),
        }
    }

    async fn set_access(
        &self,
        request: Request<SetAccessRequest>,
    ) -> Result<Response<VolumeInfo>, Status> {
        let who = allowed(&request, &[Role::Admin])?;
        let request = request.into_inner();
        let level = request.level();
        let SetAccessRequest { name, client, .. } = request;
        match self.ask_by(&who, Question::SetAccess { name, client, level }).await? {
            Answer::Volume(info) => Ok(Response::new(info)),
            other => Err(unexpected(&other)),
        }
    }

    async fn volume_keys(
        &self,
        request: Request<VolumeKeysRequest>,
    ) -> Result<Response<VolumeKeysReply>, Status> {
        let who = allowed(&request, &[Role::Client, Role::Admin])?;
        let (volume, asker) = (request.into_inner().volume, peer(&who));
        self.ask_keys(&who, Question::VolumeKeys { volume, asker }).await
    }

    async fn set_volume_keys(
        &self,
        request: Request<SetVolumeKeysRequest>,
    ) -> Result<Response<VolumeKeysReply>, Status> {
        let who = allowed(&request, &[Role::Admin])?;
        let SetVolumeKeysRequest { volume, version, key_ring } = request.into_inner();
        self.ask_keys(&who, Question::SetVolumeKeys { volume, version, key_ring }).await
    }

    async fn list_volumes(
        &self,
        request: Request<ListVolumesRequest>,
    ) -> Result<Response<ListVolumesReply>, Status> {
        let who = allowed(&request, &[Role::Client, Role::Admin])?;
        match self.ask_by(&who, Question::ListVolumes).await? {
            Answer::Volumes(volumes) => Ok(Response::new(ListVolumesReply { volumes })),
            other => Err(unexpected(&other)),
        }
    }

    async fn delete_volume(
        &self,
        request: Request<DeleteVolumeRequest>,
    ) -> Result<Response<DeleteVolumeReply>, Status> {
        let who = allowed(&request, &[Role::Admin])?;
        let name = request.into_inner().name;
        match self.ask_by(&who, Question::DeleteVolume { name }).await? {
            Answer::Done => Ok(Response::new(DeleteVolumeReply {})),
            other => Err(unexpected(&other)),
        }
    }

    async fn r#where(
        &self,
        request: Request<WhereRequest>,
    ) -> Result<Response<Self::WhereStream>, Status> {
        let who = allowed(&request, &[Role::Client, Role::Admin])?;
        let (look, asker) = (self.looks.begin(&who)?, peer(&who));
        let ask = request.into_inner();
        // Who may look into the trash may look where the bytes of a file lie.
        self.ask(Question::TrashBasis { volume: ask.volume.clone(), asker }).await?;
        let snapshot = self.ask_snapshot(&who).await?;
        let (blocks, stream) = tokio::sync::mpsc::channel(WHERE_QUEUE_MAX);
        tokio::task::spawn_blocking(move || {
            let sent = where_file(&snapshot, &ask.volume, ask.ino, |block| {
                blocks.blocking_send(Ok(block)).is_ok()
            });
            if let Err(error) = sent {
                let _gone = blocks.blocking_send(Err(error.into()));
            }
            drop(look);
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }

    async fn backup(
        &self,
        request: Request<BackupRequest>,
    ) -> Result<Response<Self::BackupStream>, Status> {
        // Only the directory itself: it is all keys of all volumes.
        allowed(&request, &[Role::Directory])?;
        let (view, seq) = match self.ask(Question::Backup).await? {
            Answer::Backup(view, seq) => (view, seq),
            other => return Err(unexpected(&other)),
        };
        let (chunks, stream) = tokio::sync::mpsc::channel(BACKUP_QUEUE_MAX);
        tokio::task::spawn_blocking(move || {
            let mut writer = ImageWriter::new(0, seq);
            let written = writer.write_view(&*view, BACKUP_CHUNK_BYTES, |data| {
                chunks.blocking_send(Ok(BackupChunk { data })).is_ok()
            });
            if let Err(error) = written {
                let _gone = chunks.blocking_send(Err(Status::internal(error.to_string())));
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }

    async fn block(&self, request: Request<BlockRequest>) -> Result<Response<WhereBlock>, Status> {
        let who = allowed(&request, &[Role::Client, Role::Admin])?;
        let look = self.looks.begin(&who)?;
        let block = request.into_inner().block;
        let snapshot = self.ask_snapshot(&who).await?;
        let found = tokio::task::spawn_blocking(move || find_block(&snapshot, &block));
        let found = found.await.map_err(|error| Status::internal(error.to_string()))??;
        drop(look);
        Ok(Response::new(found))
    }

    async fn drain(&self, request: Request<DrainRequest>) -> Result<Response<DrainReply>, Status> {
        let who = allowed(&request, &[Role::Admin])?;
        let DrainRequest { provider, undo } = request.into_inner();
        let fragments = self.ask_count(&who, Question::Drain { provider, undo }).await?;
        Ok(Response::new(DrainReply { fragments }))
    }

    async fn give_up(
        &self,
        request: Request<GiveUpRequest>,
    ) -> Result<Response<GiveUpReply>, Status> {
        let who = allowed(&request, &[Role::Admin])?;
        let provider = request.into_inner().provider;
        let fragments = self.ask_count(&who, Question::GiveUp { provider }).await?;
        Ok(Response::new(GiveUpReply { fragments }))
    }

    async fn trust(&self, request: Request<TrustRequest>) -> Result<Response<TrustReply>, Status> {
        let who = allowed(&request, &[Role::Admin])?;
        let provider = request.into_inner().provider;
        let fragments = self.ask_count(&who, Question::Trust { provider }).await?;
        Ok(Response::new(TrustReply { fragments }))
    }

    async fn repair(
        &self,
        request: Request<RepairRequest>,
    ) -> Result<Response<RepairStatus>, Status> {
        allowed(&request, &[Role::Admin])?;
        match self.ask(Question::Repair).await? {
            Answer::Repair(status) => Ok(Response::new(status)),
            other => Err(unexpected(&other)),
        }
    }

    async fn scrub(&self, request: Request<ScrubRequest>) -> Result<Response<ScrubReply>, Status> {
        let who = allowed(&request, &[Role::Admin])?;
        let provider = request.into_inner().provider;
        let providers = self.ask_count(&who, Question::Scrub { provider }).await? as u32;
        Ok(Response::new(ScrubReply { providers }))
    }

    async fn what_if(
        &self,
        request: Request<WhatIfRequest>,
    ) -> Result<Response<WhatIfReply>, Status> {
        let who = allowed(&request, &[Role::Client, Role::Admin])?;
        let look = self.looks.begin(&who)?;
        let WhatIfRequest { without, files_max } = request.into_inner();
        if without.len() > WHAT_IF_PROVIDERS_MAX {
            return Err(Status::invalid_argument("at most 4096 providers can be left out"));
        }
        let summary = match self.ask(Question::WhatIf { without: without.clone() }).await? {
            Answer::WhatIf(summary) => summary,
            other => return Err(unexpected(&other)),
        };
        let unreadable = summary.total - summary.readable;
        let mut reply = WhatIfReply {
            unreadable,
            endangered: summary.by_redundancy.get(&0).copied().unwrap_or(0),
            by_redundancy: summary.by_redundancy,
            total: summary.total,
            ..Default::default()
        };
        if unreadable > 0 && files_max > 0 {
            let snapshot = self.ask_snapshot(&who).await?;
            let files_max = files_max.min(WHAT_IF_FILES_MAX) as usize;
            let found =
                tokio::task::spawn_blocking(move || files_lost(&snapshot, &without, files_max));
            (reply.files, reply.more_files) =
                found.await.map_err(|error| Status::internal(error.to_string()))??;
        }
        drop(look);
        Ok(Response::new(reply))
    }

    async fn fsck(
        &self,
        request: Request<FsckRequest>,
    ) -> Result<Response<Self::FsckStream>, Status> {
        let who = allowed(&request, &[Role::Admin])?;
        let FsckRequest { repair, findings_max } = request.into_inner();
        if repair {
            let note = Question::Registry(RegistryQuestion::NoteRepair);
            self.ask_by(&who, note).await?;
        }
        let Ok(permit) = Arc::clone(&self.checks).try_acquire_owned() else {
            return Err(Status::resource_exhausted("a check is running already"));
        };
        let (replies, stream) = tokio::sync::mpsc::channel(FSCK_QUEUE_MAX);
        let (directory, identity) = (self.directory.clone(), self.identity.clone());
        let fsck = Fsck { directory, identity, repair, findings_max, replies };
        tokio::task::spawn_blocking(move || {
            fsck.run();
            drop(permit);
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }

    async fn trash(
        &self,
        request: Request<TrashRequest>,
    ) -> Result<Response<Self::TrashStream>, Status> {
        // Those who may open a session on the volume, which gives them its key too.
        let who = allowed(&request, &[Role::Client, Role::Admin])?;
        let (look, asker) = (self.looks.begin(&who)?, peer(&who));
        let volume = request.into_inner().volume;
        let basis = match self.ask(Question::TrashBasis { volume, asker }).await? {
            Answer::TrashBasis(basis) => basis,
            other => return Err(unexpected(&other)),
        };
        let (replies, stream) = tokio::sync::mpsc::channel(TRASH_QUEUE_MAX);
        tokio::task::spawn_blocking(move || {
            let told = list_trash(&basis, |reply| replies.blocking_send(Ok(reply)).is_ok());
            if let Err(error) = told {
                let _gone = replies.blocking_send(Err(Status::internal(error.to_string())));
            }
            drop(look);
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }

    async fn purge_trash(
        &self,
        request: Request<PurgeTrashRequest>,
    ) -> Result<Response<PurgeTrashReply>, Status> {
        let who = allowed(&request, &[Role::Admin])?;
        let PurgeTrashRequest { volume, inos } = request.into_inner();
        match self.ask_by(&who, Question::PurgeTrash { volume, inos }).await? {
            Answer::Purged(Purged { files, stored_bytes }) => {
                Ok(Response::new(PurgeTrashReply { files, stored_bytes }))
            }
            other => Err(unexpected(&other)),
        }
    }

    async fn events(
        &self,
        request: Request<EventsRequest>,
    ) -> Result<Response<EventsReply>, Status> {
        let who = allowed(&request, &[Role::Client, Role::Admin])?;
        let EventsRequest { after, last } = request.into_inner();
        match self.ask_by(&who, Question::Events { after, last }).await? {
            Answer::Events(events) => Ok(Response::new(EventsReply { events })),
            other => Err(unexpected(&other)),
        }
    }
}
