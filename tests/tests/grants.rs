//! Who may use which volume, and which fragments: against real programs, over real sockets.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::fs;
use std::path::Path;
use std::process::Command;

use bytes::Bytes;
use tokio::time::Instant;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use us_core::fragment::{FingerprintKind, FragmentRecord, records_of_block};
use us_core::geometry::{BlockGeometry, Code};
use us_core::grant::{Grant, GrantKey, Rights};
use us_core::ids::{Birth, BlockId, ClusterId, VolumeId};
use us_core::tls::{ExpectedPeer, Identity, Role};
use us_core::wire::{BulkClient, BulkLimits, connect_grpc};
use us_directory::recovery::RecoveryKit;
use us_proto::v1;
use us_proto::v1::session_down::Event as Down;
use us_proto::v1::session_up::Event as Up;
use us_proto::v1::sessions_client::SessionsClient;
use us_proto::v1::{FragmentStatus, GetItem, GetRequest, PutRequest};
use us_tests::cluster::{Cluster, PATIENCE, Shape, VOLUME, fuse_is_here, programs};
use us_tests::poll;
use us_tests::tree::noise;

fn identity(cluster: &Cluster, name: &str) -> Identity {
    Identity::load(Path::new(&cluster.at(&format!("identity-{name}")))).unwrap()
}

/// Opens a session as `usfs mount` does: what the directory answers first.
async fn open(cluster: &Cluster, identity: &Identity, volume: &str) -> Result<Down, tonic::Status> {
    let address = cluster.directory_address();
    let channel = connect_grpc(&address, identity, ExpectedPeer::role(Role::Directory)).await;
    let (up, messages) = tokio::sync::mpsc::channel(4);
    let open = v1::OpenSession { volume: volume.to_owned(), ..Default::default() };
    up.send(v1::SessionUp { event: Some(Up::Open(open)) }).await.unwrap();
    let mut sessions = SessionsClient::new(channel.unwrap());
    let mut down = sessions.open(ReceiverStream::new(messages)).await?.into_inner();
    let first = down.next().await.expect("an answer")?;
    up.send(v1::SessionUp { event: Some(Up::Close(v1::CloseSession {})) }).await.unwrap();
    Ok(first.event.unwrap())
}

async fn opened(cluster: &Cluster, identity: &Identity, volume: &str) -> v1::SessionOpened {
    match open(cluster, identity, volume).await.unwrap() {
        Down::Opened(opened) => opened,
        other => panic!("{other:?}"),
    }
}

fn record(volume: &[u8]) -> FragmentRecord {
    let geometry = BlockGeometry::new(Code::new(1, 1).unwrap(), 50_000).unwrap();
    let body = |byte: u8| Bytes::from(vec![byte; geometry.fragment_bytes()]);
    let (volume, block) = (VolumeId::from_slice(volume).unwrap(), BlockId::generate());
    records_of_block(
        FingerprintKind::Crc32c,
        volume,
        block,
        Birth(1),
        geometry,
        vec![body(1), body(2)],
    )
    .remove(0)
}

/// One who talks to a provider as a mount does.
struct Caller {
    bulk: BulkClient,
}

impl Caller {
    async fn new(cluster: &Cluster, identity: &Identity) -> Self {
        let address = cluster.provider_address(0);
        let expected = ExpectedPeer::role(Role::Provider);
        let bulk = BulkClient::connect(&address, identity, expected, BulkLimits::default()).await;
        Self { bulk: bulk.unwrap() }
    }

    async fn put(&self, record: &FragmentRecord, grant: &Bytes) -> FragmentStatus {
        let (grant, record) = (grant.clone(), record.to_bytes());
        let put = PutRequest { grant, record, ..PutRequest::default() };
        self.bulk.put(put, Instant::now() + PATIENCE).await.unwrap().status()
    }

    async fn get(&self, record: &FragmentRecord, grant: &Bytes) -> FragmentStatus {
        let id = record.header.id();
        let block = Bytes::copy_from_slice(id.block.as_bytes());
        let fragment = Some(v1::FragmentId { block, index: id.index.into() });
        let items = vec![GetItem { fragment, slots: 1, ..GetItem::default() }];
        let get = GetRequest { grant: grant.clone(), items, ..GetRequest::default() };
        let replies = self.bulk.get(get, Instant::now() + PATIENCE).await.unwrap();
        let reply = replies.all().await.unwrap().remove(0);
        assert!(reply.status() == FragmentStatus::Ok || reply.data.is_empty());
        reply.status()
    }
}

/// Every way to come to fragments without a right to them.
#[test]
fn fragments_move_only_for_the_holder_of_a_good_grant() {
    let mut cluster = Cluster::start(Shape::default());
    // A second run, so that there is a period that has ended.
    cluster.kill_directory();
    cluster.start_directory();
    cluster.wait_online(Shape::default().providers);
    cluster.issue("client", "stranger");
    cluster.usctl(&["volume", "create", "other", "--code", "1+1"]);
    cluster.usctl(&["volume", "allow", "other", &cluster.key_of("client")]);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let [client, stranger, admin, provider] =
            ["client", "stranger", "admin", "provider1"].map(|name| identity(&cluster, name));
        let disk = opened(&cluster, &client, VOLUME).await;
        let other = opened(&cluster, &client, "other").await;
        let (good, elsewhere) = (disk.grant.clone(), other.grant.clone());
        let kept = record(&disk.volume);
        let caller = Caller::new(&cluster, &client).await;
        assert_eq!(caller.put(&kept, &good).await, FragmentStatus::Ok);
        assert_eq!(caller.get(&kept, &good).await, FragmentStatus::Ok);

        // None, an altered one, another volume's, another cluster's, one whose time is over, one from
        // before a restore.
        let mut altered = good.to_vec();
        altered[120] ^= 2;
        let kit = RecoveryKit::load(Path::new(&cluster.at("recovery.key"))).unwrap();
        let signer = GrantKey::of(kit.secret(), kit.cluster());
        let sound = Grant::open(&good, &signer.public()).unwrap();
        assert_eq!((sound.rights, sound.block), (Rights::ReadWrite, None));
        let period = sound.from.checked_sub(1).expect("the period before is over");
        let ended = signer.sign(&Grant { from: 0, until: period, ..sound.clone() });
        let before = signer.sign(&Grant { incarnation: 0, ..sound.clone() });
        // Nothing else of it is wrong: with the same beginning and a later end it is good.
        let old = signer.sign(&Grant { from: 0, ..sound.clone() });
        assert_eq!(caller.get(&kept, &old).await, FragmentStatus::Ok);
        let reading = signer.sign(&Grant { rights: Rights::Read, ..sound.clone() });
        let abroad = GrantKey::of(kit.secret(), ClusterId::from_bytes([1; 16])).sign(&sound);
        let bad = [Bytes::new(), altered.into(), elsewhere, ended, before, abroad];
        let fresh = record(&disk.volume);
        for grant in &bad {
            assert_eq!(caller.put(&fresh, grant).await, FragmentStatus::NoGrant);
            assert_eq!(caller.get(&kept, grant).await, FragmentStatus::NoGrant);
        }
        assert_eq!(caller.put(&fresh, &reading).await, FragmentStatus::NoGrant);
        assert_eq!(caller.get(&kept, &reading).await, FragmentStatus::Ok);
        let thief = Caller::new(&cluster, &stranger).await;
        assert_eq!(thief.get(&kept, &good).await, FragmentStatus::NoGrant);
        assert_eq!(thief.put(&fresh, &good).await, FragmentStatus::NoGrant);

        // A provider that plays a client, an administrator that does.
        let own = signer.sign(&Grant { holder: provider.own().key_hash, ..sound.clone() });
        let playing = Caller::new(&cluster, &provider).await;
        assert_eq!(playing.put(&fresh, &own).await, FragmentStatus::Refused);
        assert_eq!(playing.get(&kept, &good).await, FragmentStatus::NoGrant);
        let refused = open(&cluster, &provider, VOLUME).await.unwrap_err();
        assert_eq!(refused.code(), tonic::Code::PermissionDenied);
        let playing = Caller::new(&cluster, &admin).await;
        assert_eq!(playing.get(&kept, &good).await, FragmentStatus::Refused);
        // Nothing of all that was stored.
        assert_eq!(caller.get(&fresh, &good).await, FragmentStatus::NotFound);
    });
}

/// `usfs mount` with another identity: what it said, when it did not come up.
fn refused_mount(cluster: &Cluster, name: &str, arguments: &[&str]) -> String {
    let point = cluster.at("refused");
    fs::create_dir_all(&point).unwrap();
    let mut command = Command::new(programs().join("usfs"));
    command.arg("mount").arg(format!("{}/{VOLUME}", cluster.directory_address())).arg(&point);
    command.args(["--identity", &cluster.at(&format!("identity-{name}"))]).args(arguments);
    command.env("XDG_DATA_HOME", cluster.at("data")).env("US_DATA", cluster.at("data"));
    let output = command.output().unwrap();
    assert!(!output.status.success());
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_client_mounts_what_it_was_given_and_loses_it_at_once() {
    if !fuse_is_here() {
        return;
    }
    let mut cluster = Cluster::start(Shape::default());
    cluster.issue("client", "reader");
    let content = noise(3, 3_000_000);
    let writer = cluster.mount();
    fs::write(writer.path().join("file"), &content).unwrap();
    fs::File::open(writer.path().join("file")).unwrap().sync_all().unwrap();

    // A foreign volume: the mount says what to do.
    let said = refused_mount(&cluster, "reader", &[]);
    let key = cluster.key_of("reader");
    assert!(said.contains(&format!("usctl volume allow {VOLUME} {key}")), "{said}");
    cluster.usctl(&["volume", "allow", VOLUME, &key, "--read-only"]);
    let said = refused_mount(&cluster, "reader", &[]);
    assert!(said.contains("-o ro"), "{said}");
    let shown = cluster.usctl(&["volume", "show", VOLUME, "--json"]);
    let shown: serde_json::Value = serde_json::from_str(&shown).unwrap();
    assert_eq!(shown["closed"], true);
    assert_eq!(shown["access"].as_array().unwrap().len(), 2, "{shown}");
    let reader = cluster.mount_with(&["-o", "ro", "--identity", &cluster.at("identity-reader")]);
    assert!(fs::read(reader.path().join("file")).unwrap() == content);
    assert!(fs::write(reader.path().join("more"), b"no").is_err());

    // Under an open mount.
    let (code, _) = cluster.usctl_code(&["volume", "deny", VOLUME, &key[..12]]);
    assert_ne!(code, 0, "it asks first");
    cluster.usctl(&["volume", "deny", VOLUME, &key[..12], "--yes"]);
    poll::until("the end of the denied mount", PATIENCE, || match fs::read_dir(reader.path()) {
        Err(_) => Ok(()),
        Ok(_) => Err("it still lists".to_owned()),
    });
    assert!(refused_mount(&cluster, "reader", &["-o", "ro"]).contains("usctl volume allow"));
    // The other goes on, over a restart of the directory too.
    fs::write(writer.path().join("more"), &content).unwrap();
    cluster.kill_directory();
    cluster.start_directory();
    fs::write(writer.path().join("again"), &content).unwrap();
    fs::File::open(writer.path().join("again")).unwrap().sync_all().unwrap();
    assert!(fs::read(writer.path().join("again")).unwrap() == content);
    drop(reader);
    writer.unmount();
}

/// A mount whose grant ends before it is renewed asks for another; nobody who writes sees it.
#[test]
fn a_grant_that_has_ended_is_no_error() {
    if !fuse_is_here() {
        return;
    }
    // It ends with each third of a lease, which is when mounts renew.
    let directory = &["--grant-ms", "1000"];
    let mut cluster = Cluster::start(Shape { directory, ..Shape::default() });
    let mount = cluster.mount();
    for round in 0..40u64 {
        let (path, content) = (mount.path().join(format!("file{round}")), noise(round, 1_000_000));
        fs::write(&path, &content).unwrap();
        fs::File::open(&path).unwrap().sync_all().unwrap();
        assert!(fs::read(&path).unwrap() == content);
    }
    mount.unmount();
    let mount = cluster.mount();
    for round in 0..40u64 {
        let read = fs::read(mount.path().join(format!("file{round}"))).unwrap();
        assert!(read == noise(round, 1_000_000));
    }
    mount.unmount();
}
