//! The whole daemon in this process: files on disk, mutual TLS, gRPC, and a restart.

#![expect(clippy::unwrap_used, reason = "a test: a failure is to stop it where it happens")]

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::transport::Channel;
use us_core::daemon::shutdown::Shutdown;
use us_core::tls::{ExpectedPeer, Identity, Role};
use us_core::wire::connect_grpc;
use us_directory::run::{Config, init, issue_identity, run};
use us_proto::v1::admin_client::AdminClient;
use us_proto::v1::fetch::Want;
use us_proto::v1::membership_client::MembershipClient;
use us_proto::v1::mutation::Op;
use us_proto::v1::session_down::Event as Down;
use us_proto::v1::session_up::Event as Up;
use us_proto::v1::sessions_client::SessionsClient;
use us_proto::v1::*;

const DEADLINE: Duration = Duration::from_secs(30);

struct Daemon {
    address: String,
    shutdown: Shutdown,
    task: tokio::task::JoinHandle<anyhow::Result<()>>,
}

async fn start(data: &Path) -> Daemon {
    let shutdown = Shutdown::new();
    let _stale = std::fs::remove_file(data.join("address"));
    let listen = SocketAddr::from(([127, 0, 0, 1], 0));
    let config = Config { data: data.to_owned(), listen, ..Config::default() };
    let task = tokio::spawn(run(config, shutdown.clone()));
    let written = async {
        loop {
            match std::fs::read_to_string(data.join("address")) {
                Ok(address) => return address.trim().to_owned(),
                Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        }
    };
    let address = tokio::time::timeout(DEADLINE, written).await.expect("an address");
    Daemon { address, shutdown, task }
}

impl Daemon {
    async fn stop(self) {
        self.shutdown.request();
        let ended = tokio::time::timeout(DEADLINE, self.task).await;
        ended.expect("it ends").expect("without a panic").expect("without an error");
    }

    async fn dial(&self, identity: &Identity) -> Channel {
        connect_grpc(&self.address, identity, ExpectedPeer::role(Role::Directory)).await.unwrap()
    }
}

struct Stream {
    up: mpsc::Sender<SessionUp>,
    down: Streaming<SessionDown>,
}

impl Stream {
    async fn open(channel: Channel, open: OpenSession) -> Self {
        let (up, queue) = mpsc::channel(16);
        up.send(SessionUp { event: Some(Up::Open(open)) }).await.unwrap();
        let opened = SessionsClient::new(channel).open(ReceiverStream::new(queue)).await;
        Self { up, down: opened.unwrap().into_inner() }
    }

    async fn say(&self, event: Up) {
        self.up.send(SessionUp { event: Some(event) }).await.unwrap();
    }

    async fn hear<T>(&mut self, pick: impl Fn(Down) -> Option<T>) -> T {
        let found = async {
            loop {
                let down = self.down.message().await.unwrap().expect("the stream goes on");
                if let Some(found) = down.event.and_then(&pick) {
                    return found;
                }
            }
        };
        tokio::time::timeout(DEADLINE, found).await.expect("the message")
    }

    async fn opened(&mut self) -> SessionOpened {
        self.hear(|down| match down {
            Down::Opened(opened) => Some(opened),
            Down::Ended(ended) => panic!("{ended:?}"),
            _ => None,
        })
        .await
    }
}

fn identity(data: &Path, role: Role, name: &str) -> Identity {
    let out = data.join(name);
    issue_identity(data, role, name, &out).unwrap();
    Identity::load(&out).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_durable_is_there_after_a_restart() {
    let root = tempfile::tempdir().unwrap();
    let data = root.path().join("directory");
    init(&data).unwrap();
    assert!(init(&data).is_err(), "a second init destroys nothing");
    let admin = identity(&data, Role::Admin, "admin");
    let client = identity(&data, Role::Client, "client");
    let provider = identity(&data, Role::Provider, "provider");
    let daemon = start(&data).await;

    let create = CreateVolumeRequest {
        name: "home".into(),
        s: 4,
        r: 2,
        quota_bytes: 0,
        repair_at: None,
        trash_hours: None,
        access: vec![VolumeAccess {
            key_hash: client.own().key_hash.as_bytes().to_vec().into(),
            read_only: false,
        }],
        ..Default::default()
    };
    let mut asks = AdminClient::new(daemon.dial(&admin).await);
    asks.create_volume(create.clone()).await.unwrap();
    let again = asks.create_volume(create).await.unwrap_err();
    assert_eq!(again.code(), tonic::Code::AlreadyExists);
    let mut stranger = AdminClient::new(daemon.dial(&provider).await);
    let refused = stranger.status(StatusRequest {}).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::PermissionDenied);

    let (up, queue) = mpsc::channel(4);
    let hello = ProviderHello {
        address: "127.0.0.1:1".into(),
        store: vec![1; 16].into(),
        report: Some(ProviderReport { accepts_puts: true, ..Default::default() }),
        ..Default::default()
    };
    let hello = provider_up::Event::Hello(hello);
    up.send(ProviderUp { event: Some(hello) }).await.unwrap();
    let mut members = MembershipClient::new(daemon.dial(&provider).await);
    let joined = members.join(ReceiverStream::new(queue)).await.unwrap();
    let welcome = joined.into_inner().message().await.unwrap().unwrap().event.unwrap();
    assert!(matches!(welcome, provider_down::Event::Welcome(welcome) if welcome.provider == 1));

    let open = OpenSession { volume: "home".into(), ..Default::default() };
    let mut mount = Stream::open(daemon.dial(&client).await, open.clone()).await;
    let opened = mount.opened().await;
    assert_eq!((opened.s, opened.r, opened.volume_key.len()), (4, 2, 32));
    mount.say(Up::LeaseInodes(LeaseInodes { request: 1, count: 10 })).await;
    let first = mount
        .hear(|down| match down {
            Down::Inodes(leased) => Some(leased.first),
            _ => None,
        })
        .await;
    let root_inode = || FetchInode { ino: 1, level: LeaseLevel::Exclusive as i32 };
    let fetch = Fetch { request: 2, want: Some(Want::Inode(root_inode())), trace: 0 };
    mount.say(Up::Fetch(fetch)).await;
    let create = Create {
        dir: 1,
        name_hash: vec![9; 16].into(),
        sealed_name: vec![9; 48].into(),
        ino: first,
        mode: 0o100_644,
        ..Default::default()
    };
    let mutations = vec![Mutation { op: Some(Op::Create(create)) }];
    mount.say(Up::Batch(Batch { number: 1, mutations, traces: Vec::new() })).await;
    mount.say(Up::Sync(Sync {})).await;
    let durable = mount
        .hear(|down| match down {
            Down::Durable(durable) => Some(durable.number),
            Down::Ended(ended) => panic!("{ended:?}"),
            _ => None,
        })
        .await;
    assert_eq!(durable, 1);
    let status = asks.status(StatusRequest {}).await.unwrap().into_inner();
    assert_eq!((status.sessions.len(), status.providers.len()), (1, 1));
    // The whole state, keys and all, is for the directory itself only.
    let refused = asks.backup(BackupRequest {}).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::PermissionDenied);
    let file = root.path().join("backup");
    let made = us_directory::backup::backup(&data, &file).await.unwrap();
    assert!(made.running);
    daemon.stop().await;
    restored_from(&root.path().join("restored"), &data, file).await;

    let daemon = start(&data).await;
    let resume = OpenSession { session: opened.session, incarnation: opened.incarnation, ..open };
    let mut mount = Stream::open(daemon.dial(&client).await, resume).await;
    let again = mount.opened().await;
    assert!(again.resumed && again.applied == 1);
    mount.say(Up::Reclaim(Reclaim { leases: vec![], last: true })).await;
    let want = FetchEntries { dir: 1, after_cookie: 0, limit: 10, dir_level: 1 };
    mount.say(Up::Fetch(Fetch { request: 1, want: Some(Want::Entries(want)), trace: 0 })).await;
    let listed = mount
        .hear(|down| match down {
            Down::Fetched(fetched) => Some(fetched),
            _ => None,
        })
        .await;
    assert_eq!(listed.entries[0].ino, first);
    mount.say(Up::Close(CloseSession {})).await;
    let reason = mount
        .hear(|down| match down {
            Down::Ended(ended) => Some(ended.reason),
            _ => None,
        })
        .await;
    assert_eq!(reason, EndReason::Closed as i32);
    daemon.stop().await;
}

/// A directory rebuilt from a backup of the running one has the volume and the provider, and takes no
/// session of before.
async fn restored_from(restored: &Path, lost: &Path, backup: std::path::PathBuf) {
    use us_directory::restore::{RestoreOptions, Source, restore};
    let options = RestoreOptions {
        data: restored.to_owned(),
        recovery_key: us_directory::run::recovery_key(lost),
        source: Source::Backup(backup),
        accept_loss: false,
    };
    let found = restore(&options).await.unwrap();
    assert_eq!((found.rebuilt.volumes, found.rebuilt.providers, found.rebuilt.sessions), (1, 1, 0));
    let client = identity(restored, Role::Client, "client");
    let admin = identity(restored, Role::Admin, "admin");
    let daemon = start(restored).await;
    let access = SetAccessRequest {
        name: "home".into(),
        client: client.own().key_hash.to_string(),
        level: AccessLevel::Write.into(),
    };
    AdminClient::new(daemon.dial(&admin).await).set_access(access).await.unwrap();
    let resume =
        OpenSession { volume: "home".into(), session: 1, incarnation: 1, ..Default::default() };
    let mut mount = Stream::open(daemon.dial(&client).await, resume).await;
    let ended = mount.hear(|down| match down {
        Down::Ended(ended) => Some(ended),
        _ => None,
    });
    assert_eq!(ended.await.reason, EndReason::Unknown as i32, "another certificate");
    let open = OpenSession { volume: "home".into(), ..Default::default() };
    let mut mount = Stream::open(daemon.dial(&client).await, open).await;
    let opened = mount.opened().await;
    assert!(opened.session > 1 << 16 && opened.incarnation > 1);
    daemon.stop().await;
}
