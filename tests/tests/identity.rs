//! Nobody gets in: outsiders, members of another cluster, members in another's role, members no more.
//! Real processes, real sockets.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::fs;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::runtime::Runtime;
use tokio_rustls::TlsConnector;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Code;
use tonic::transport::{Channel, Endpoint};
use us_core::tls::{
    ALPN_BULK, ALPN_H2, ALPN_JOIN, AuthorityPin, CertificateAuthority, ExpectedPeer, Identity,
    Role, client_config, join_client_config,
};
use us_core::wire::{BulkClient, BulkLimits, connect_grpc};
use us_proto::v1::admin_client::AdminClient;
use us_proto::v1::enrollment_client::EnrollmentClient;
use us_proto::v1::fragments_client::FragmentsClient;
use us_proto::v1::membership_client::MembershipClient;
use us_proto::v1::registry_client::RegistryClient;
use us_proto::v1::renewal_client::RenewalClient;
use us_proto::v1::sessions_client::SessionsClient;
use us_proto::v1::*;
use us_tests::cluster::{Cluster, Mount, PATIENCE, Shape, VOLUME, fuse_is_here};
use us_tests::joining::{member, members};
use us_tests::poll;

const ANSWER: Duration = Duration::from_secs(20);

fn identity(cluster: &Cluster, role: &str, name: &str) -> Identity {
    let folder = cluster.at(&format!("identity-{name}"));
    if !Path::new(&folder).exists() {
        cluster.issue(role, name);
    }
    Identity::load(Path::new(&folder)).unwrap()
}

async fn dial(address: &str, identity: &Identity, role: Role) -> Channel {
    connect_grpc(address, identity, ExpectedPeer::role(role)).await.unwrap()
}

/// A TLS connection as somebody would make it who is not one of our programs; fails at the handshake
/// or, as TLS 1.3 has it, at the first read.
async fn outside(address: &str, config: Arc<ClientConfig>) -> std::io::Result<u8> {
    let tcp = TcpStream::connect(address).await?;
    let name = ServerName::try_from("us").unwrap();
    let mut tls = TlsConnector::from(config).connect(name, tcp).await?;
    // An HTTP/2 server answers this with its settings.
    tls.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await?;
    tls.flush().await?;
    tls.read_u8().await
}

/// A client's configuration without certificate, or with one of another cluster, that believes the
/// server all the same.
fn without_certificate(pin: AuthorityPin, alpn: &[u8]) -> Arc<ClientConfig> {
    let mut config = ClientConfig::clone(&join_client_config(pin).unwrap());
    config.alpn_protocols = vec![alpn.to_vec()];
    Arc::new(config)
}

fn forged(trusted: &Identity, role: Role) -> Identity {
    let theirs = CertificateAuthority::create().unwrap().issue(role, "stranger").unwrap();
    let (cert, key) = (theirs.cert_pem().to_string(), theirs.key_pem().clone());
    Identity::from_pem(trusted.ca_pem().to_owned(), cert, key).unwrap()
}

/// An outsider without certificate, one with another cluster's, and the one door that opens without:
/// behind it there is joining and nothing else.
#[test]
fn outsiders_stay_outside() {
    let cluster = Cluster::start(Shape { providers: 1, code: "1+0", ..Shape::default() });
    let client = identity(&cluster, "client", "client");
    let pin = client.pin().unwrap();
    let (directory, provider) = (cluster.directory_address(), cluster.provider_address(0));
    Runtime::new().unwrap().block_on(async {
        // That what follows fails for want of a certificate, and not of anything else.
        outside(&directory, client_config(&client, &[ALPN_H2]).unwrap()).await.unwrap();
        outside(&provider, client_config(&client, &[ALPN_H2]).unwrap()).await.unwrap();
        for address in [&directory, &provider] {
            for alpn in [ALPN_H2, ALPN_BULK, b"http/1.1"] {
                let anonymous = without_certificate(pin, alpn);
                assert!(outside(address, anonymous).await.is_err(), "{address} {alpn:?}");
            }
            // Joining beside another protocol is no way around it.
            let mut both = ClientConfig::clone(&without_certificate(pin, ALPN_JOIN));
            both.alpn_protocols.push(ALPN_H2.to_vec());
            assert!(outside(address, Arc::new(both)).await.is_err(), "{address}");
            for role in [Role::Client, Role::Admin, Role::Provider, Role::Directory] {
                let forged = forged(&client, role);
                let stranger = client_config(&forged, &[ALPN_H2]).unwrap();
                assert!(outside(address, stranger).await.is_err(), "{address} {role}");
            }
        }
        assert!(outside(&provider, without_certificate(pin, ALPN_JOIN)).await.is_err());
        newcomer_reaches_joining_only(&directory, pin).await;
    });
}

async fn newcomer_reaches_joining_only(directory: &str, pin: AuthorityPin) {
    let address = directory.to_owned();
    let connector = tower::service_fn(move |_| {
        let address = address.clone();
        async move {
            let tcp = TcpStream::connect(address).await?;
            let config = join_client_config(pin).unwrap();
            let name = ServerName::try_from("us").unwrap();
            TlsConnector::from(config).connect(name, tcp).await.map(TokioIo::new)
        }
    });
    let channel = Endpoint::from_static("http://us").connect_with_connector(connector).await;
    let channel = channel.unwrap();
    let refused = EnrollmentClient::new(channel.clone()).enroll(EnrollRequest::default()).await;
    assert_eq!(refused.unwrap_err().code(), Code::InvalidArgument, "joining itself answers");
    let code = |status: tonic::Status| status.code();
    let status = AdminClient::new(channel.clone()).status(StatusRequest {}).await;
    assert_eq!(code(status.unwrap_err()), Code::Unimplemented);
    let members = RegistryClient::new(channel.clone()).members(MembersRequest::default()).await;
    assert_eq!(code(members.unwrap_err()), Code::Unimplemented);
    let renew = RenewalClient::new(channel.clone()).renew(RenewRequest::default()).await;
    assert_eq!(code(renew.unwrap_err()), Code::Unimplemented);
    let open = SessionsClient::new(channel.clone()).open(tokio_stream::empty()).await;
    assert_eq!(code(open.unwrap_err()), Code::Unimplemented);
    let join = MembershipClient::new(channel).join(tokio_stream::empty()).await;
    assert_eq!(code(join.unwrap_err()), Code::Unimplemented);
}

fn denied<T: std::fmt::Debug>(what: &str, answer: Result<T, tonic::Status>) {
    assert_eq!(answer.expect_err(what).code(), Code::PermissionDenied, "{what}");
}

/// A provider that acts as a client or an administrator, a client that acts as a provider or an
/// administrator, and an administrator that acts as a provider.
#[test]
fn everyone_keeps_to_its_role() {
    let cluster = Cluster::start(Shape { providers: 1, code: "1+0", ..Shape::default() });
    let provider = identity(&cluster, "provider", "provider0");
    let client = identity(&cluster, "client", "client");
    let admin = identity(&cluster, "admin", "admin");
    let (directory, store) = (cluster.directory_address(), cluster.provider_address(0));
    Runtime::new().unwrap().block_on(async {
        for (own, who) in [(&provider, "provider"), (&client, "client"), (&admin, "admin")] {
            let channel = dial(&directory, own, Role::Directory).await;
            let mut calls = AdminClient::new(channel.clone());
            let mut registry = RegistryClient::new(channel.clone());
            if who != "admin" {
                let drain = DrainRequest { provider: 1, undo: false };
                denied(who, calls.drain(drain).await);
                denied(who, calls.give_up(GiveUpRequest { provider: 1 }).await);
                denied(who, calls.trust(TrustRequest { provider: 1 }).await);
                let name = VOLUME.to_owned();
                denied(who, calls.delete_volume(DeleteVolumeRequest { name: name.clone() }).await);
                denied(
                    who,
                    calls.set_volume(SetVolumeRequest { name, ..Default::default() }).await,
                );
                denied(who, calls.fsck(FsckRequest::default()).await);
                let invite = InviteRequest { role: "admin".into(), ..Default::default() };
                denied(who, registry.invite(invite).await);
                denied(who, registry.invites(InvitesRequest {}).await);
                denied(who, registry.cancel_invite(CancelInviteRequest::default()).await);
                denied(who, registry.members(MembersRequest::default()).await);
                let revoke = RevokeRequest { member: "admin".into() };
                denied(who, registry.revoke(revoke).await);
            }
            denied(who, calls.backup(BackupRequest {}).await);
            if who != "provider" {
                let mut membership = MembershipClient::new(channel.clone());
                let stream = membership.join(tokio_stream::empty());
                denied(who, stream.await);
                continue;
            }
            denied(who, calls.status(StatusRequest {}).await);
            denied(who, calls.list_volumes(ListVolumesRequest {}).await);
            denied(who, calls.events(EventsRequest::default()).await);
            let (up, queue) = tokio::sync::mpsc::channel(1);
            let open = OpenSession { volume: VOLUME.into(), ..Default::default() };
            let open = session_up::Event::Open(open);
            up.send(SessionUp { event: Some(open) }).await.unwrap();
            denied(who, SessionsClient::new(channel).open(ReceiverStream::new(queue)).await);
        }
        for own in [&provider, &client] {
            let channel = dial(&store, own, Role::Provider).await;
            let listed = FragmentsClient::new(channel).inventory(InventoryRequest::default()).await;
            denied("inventory", listed);
        }
    });
}

fn write_at(mount: &Mount, name: &str, bytes: &[u8]) -> std::io::Result<()> {
    let mut file = fs::File::create(mount.path().join(name))?;
    file.write_all(bytes)?;
    file.sync_all()
}

/// A laptop that is revoked while its mount is open: what it reads and writes fails with an error, at the
/// directory and at the providers, also those that start again while the directory is away. Others go
/// on.
#[test]
fn a_revoked_laptop_with_an_open_mount() {
    if !fuse_is_here() {
        return;
    }
    let mut cluster = Cluster::start(Shape { providers: 3, code: "2+1", ..Shape::default() });
    let stolen = identity(&cluster, "client", "laptop");
    cluster.usctl(&["volume", "allow", us_tests::cluster::VOLUME, &cluster.key_of("laptop")]);
    let good = cluster.mount();
    let folder = cluster.at("identity-laptop");
    let point = Path::new(&cluster.at("laptop")).to_path_buf();
    fs::create_dir(&point).unwrap();
    let own = cluster.at("laptop-data");
    let laptop = cluster.mount_as(&point, "laptop", &own, &["--identity", &folder]);
    write_at(&good, "mine", &vec![1; 2 << 20]).unwrap();
    write_at(&laptop, "theirs", &vec![2; 2 << 20]).unwrap();
    cluster.wait_settled();
    let runtime = Runtime::new().unwrap();
    let expected = ExpectedPeer::role(Role::Provider);
    let bulk = |identity: &Identity, address: &str| {
        let limits = BulkLimits::default();
        runtime.block_on(BulkClient::connect(address, identity, expected, limits))
    };
    let open = bulk(&stolen, &cluster.provider_address(0)).unwrap();
    let mine = bulk(&identity(&cluster, "client", "client"), &cluster.provider_address(0)).unwrap();

    let (code, _) = cluster.usctl_code(&["revoke", "laptop"]);
    assert_eq!(code, 64, "without --yes nothing is done");
    assert_eq!(member(&cluster, "laptop").unwrap()["standing"], "good");
    let said = cluster.usctl(&["revoke", "laptop", "--yes"]);
    assert!(said.contains("1 of its mounts ended"), "{said}");
    assert_eq!(member(&cluster, "laptop").unwrap()["standing"], "revoked");

    poll::until("the laptop's mount to fail", PATIENCE, || {
        let written = write_at(&laptop, "more", b"x");
        let read = fs::read(laptop.path().join("mine"));
        let failed = written.is_err() && read.is_err();
        failed.then_some(()).ok_or(format!("{written:?} {:?}", read.map(|bytes| bytes.len())))
    });
    write_at(&good, "after", b"still here").unwrap();
    assert_eq!(fs::read(good.path().join("theirs")).unwrap(), vec![2; 2 << 20]);
    assert!(!good.path().join("more").exists());
    poll::until("its connection with a provider to be cut", PATIENCE, || {
        open.is_closed().then_some(()).ok_or("it is open".to_owned())
    });
    assert!(!mine.is_closed(), "others keep theirs");
    refused_by_directory(&cluster, &runtime, &stolen);
    refused_by_provider(&cluster, &runtime, &stolen, 0);

    // The providers remember, and so does the directory.
    cluster.kill_directory();
    for number in 0..3 {
        cluster.kill_provider(number);
        cluster.start_provider(number);
        poll::until("the provider to answer", PATIENCE, || {
            let address = cluster.provider_address(number);
            std::net::TcpStream::connect(address).map_err(|error| error.to_string())
        });
        refused_by_provider(&cluster, &runtime, &stolen, number);
    }
    cluster.start_directory();
    refused_by_directory(&cluster, &runtime, &stolen);
    cluster.wait_online(3);
    write_at(&good, "later", b"and on").unwrap();
    let events = cluster.usctl(&["events", "--last", "200"]);
    let revoked = events.lines().find(|line| line.contains("member-revoked")).unwrap();
    assert!(
        revoked.contains("client laptop (") && revoked.contains("by admin admin ("),
        "{revoked}"
    );
    drop(laptop);
    good.unmount();
}

/// The directory lets it in as far as TLS and says why no further.
fn refused_by_directory(cluster: &Cluster, runtime: &Runtime, who: &Identity) {
    let address = cluster.directory_address();
    // A connection that was made before it was refused may still be cut under the question.
    let refusal = poll::until("a word of the directory", PATIENCE, || {
        runtime.block_on(async {
            let channel = connect_grpc(&address, who, ExpectedPeer::role(Role::Directory)).await;
            let mut admin = AdminClient::new(channel.map_err(|error| error.to_string())?);
            let asked = admin.list_volumes(ListVolumesRequest {});
            match tokio::time::timeout(ANSWER, asked).await.map_err(|error| error.to_string())? {
                Err(status) if status.code() == Code::Unavailable => Err(status.to_string()),
                answer => Ok(answer),
            }
        })
    });
    let refusal = refusal.unwrap_err();
    assert!(refusal.message().contains("revoked"), "{refusal}");
    assert_eq!(refusal.code(), Code::Unauthenticated);
}

/// Whoever is let in as far as TLS is cut off before its first request is read, by a provider that answers
/// others.
fn refused_by_provider(cluster: &Cluster, runtime: &Runtime, who: &Identity, number: usize) {
    let address = cluster.provider_address(number);
    let answers = |who: &Identity| -> Result<(), String> {
        let expected = ExpectedPeer::role(Role::Provider);
        let fragment = FragmentId { block: vec![1; 16].into(), index: 0 };
        let item = GetItem { fragment: Some(fragment), slots: 1, ..Default::default() };
        let get = GetRequest { items: vec![item], ..Default::default() };
        runtime.block_on(async {
            let connecting = BulkClient::connect(&address, who, expected, BulkLimits::default());
            let client = connecting.await.map_err(|error| error.to_string())?;
            let deadline = tokio::time::Instant::now() + ANSWER;
            let mut replies = client.get(get, deadline).await.map_err(|error| error.to_string())?;
            let reply = replies.next().await.ok_or("it gave no reply")?;
            reply.map(drop).map_err(|error| error.to_string())
        })
    };
    let good = identity(cluster, "client", "client");
    poll::until("the provider to answer another", PATIENCE, || answers(&good));
    let refused = answers(who);
    assert!(refused.is_err(), "provider {number} answers {}", who.own());
    assert_eq!(answers(&good), Ok(()), "it was there all the time");
}

/// A provider that is revoked ends, stays out, and what it held is made again elsewhere.
#[test]
fn a_revoked_provider_is_out_and_nothing_is_lost() {
    if !fuse_is_here() {
        return;
    }
    let mut cluster = Cluster::start(Shape { providers: 4, code: "2+1", ..Shape::default() });
    let mount = cluster.mount();
    write_at(&mount, "file", &vec![5; 12 << 20]).unwrap();
    cluster.wait_settled();
    let said = cluster.usctl(&["revoke", "provider1", "--yes", "--json"]);
    let said: serde_json::Value = serde_json::from_str(&said).unwrap();
    assert!(said["fragments"].as_u64().unwrap() > 0, "{said}");
    let status = poll::until("the provider to end", PATIENCE, || {
        cluster.provider_ended(1).ok_or("it still runs".to_owned())
    });
    assert_eq!(status.code(), Some(3), "{}", cluster.log("provider1"));
    let mut admin = cluster.admin();
    poll::until("everything to be whole without it", Duration::from_secs(180), || {
        let status = admin.status()?;
        us_tests::admin::is_whole(&status, 1)?;
        let gone = us_tests::admin::provider(&status, "provider1").ok_or("it is not listed")?;
        let given_up = gone.state() == ProviderState::Dead && gone.fragments == 0;
        given_up.then_some(()).ok_or(format!("{gone:?}"))
    });
    assert_eq!(fs::read(mount.path().join("file")).unwrap(), vec![5; 12 << 20]);
    cluster.kill_provider(1);
    cluster.start_provider(1);
    let status = poll::until("it to be refused", PATIENCE, || {
        cluster.provider_ended(1).ok_or("it still runs".to_owned())
    });
    assert_eq!(status.code(), Some(3), "{}", cluster.log("provider1"));
    assert!(cluster.log("provider1").contains("revoked"));
    mount.unmount();
}

/// Nobody locks itself out, a name that two have is asked back, and a key that was never seen can be
/// revoked by all its digits.
#[test]
fn whom_a_revocation_means() {
    let cluster = Cluster::start(Shape { providers: 0, code: "1+0", ..Shape::default() });
    let (code, _) = cluster.usctl_code(&["revoke", "admin", "--yes"]);
    assert_eq!(code, 4);
    assert_eq!(member(&cluster, "admin").unwrap()["standing"], "good");
    let (code, _) = cluster.usctl_code(&["revoke", "nobody", "--yes"]);
    assert_eq!(code, 4);
    let runtime = Runtime::new().unwrap();
    let never = identity(&cluster, "client", "never-seen");
    cluster.usctl(&["revoke", &never.own().key_hash.to_string(), "--yes"]);
    refused_by_directory(&cluster, &runtime, &never);
    let code =
        us_tests::joining::invite(&cluster, &["--role", "client", "--name", "twin", "--uses", "2"]);
    us_tests::joining::must_join(&cluster, "usfs", &code, &cluster.at("a"));
    us_tests::joining::must_join(&cluster, "usfs", &code, &cluster.at("b"));
    let (code, _) = cluster.usctl_code(&["revoke", "twin", "--yes"]);
    assert_eq!(code, 4, "which of them");
    let twins = || members(&cluster).into_iter().filter(|one| one["name"] == "twin");
    let key = twins().next().unwrap()["key"].as_str().unwrap()[..16].to_owned();
    cluster.usctl(&["revoke", &key, "--yes"]);
    assert_eq!(twins().filter(|one| one["standing"] == "revoked").count(), 1);
    // Now the name is that of one.
    cluster.usctl(&["revoke", "twin", "--yes"]);
    assert_eq!(twins().filter(|one| one["standing"] == "revoked").count(), 2);
}

/// Certificates renew themselves: the mount's, the provider's and usctl's are others after a while, and
/// everything works far beyond the life of the first. Who does not renew is out.
#[test]
fn certificates_renew_themselves() {
    if !fuse_is_here() {
        return;
    }
    let mut cluster = Cluster::start(Shape {
        providers: 1,
        code: "1+0",
        directory: &["--certificate-life-ms", "20000"],
        ..Shape::default()
    });
    let idle = identity(&cluster, "client", "idle");
    let runtime = Runtime::new().unwrap();
    runtime.block_on(async {
        let channel = dial(&cluster.directory_address(), &idle, Role::Directory).await;
        AdminClient::new(channel).list_volumes(ListVolumesRequest {}).await.unwrap();
    });
    let mount = cluster.mount();
    write_at(&mount, "file", &vec![1; 1 << 20]).unwrap();
    let certificate =
        |name: &str| fs::read_to_string(cluster.at(&format!("identity-{name}/cert.pem"))).unwrap();
    let names = ["client", "provider0", "admin"];
    let mut known = names.map(certificate);
    for round in 0..2 {
        poll::until("every certificate to be another", PATIENCE, || {
            // usctl renews when it is used.
            cluster.status()?;
            let now = names.map(certificate);
            let all = now.iter().zip(&known).all(|(new, old)| new != old);
            all.then(|| known = now).ok_or(format!("round {round}"))
        });
    }
    poll::until("who did nothing to be out", PATIENCE, || {
        let idle = member(&cluster, "idle").unwrap();
        (idle["standing"] == "expired").then_some(()).ok_or(idle.to_string())
    });
    refused_by_directory(&cluster, &runtime, &idle);
    write_at(&mount, "later", &vec![2; 1 << 20]).unwrap();
    assert_eq!(fs::read(mount.path().join("file")).unwrap(), vec![1; 1 << 20]);
    cluster.wait_online(1);
    mount.unmount();
    // With a new code the same key is a member again.
    let code = us_tests::joining::invite(&cluster, &["--role", "client", "--name", "idle"]);
    let data = cluster.at("idle");
    let folder = Path::new(&data).join("joined/client");
    idle.save(&folder).unwrap();
    us_tests::joining::must_join(&cluster, "usfs", &code, &data);
    assert_eq!(Identity::load(&folder).unwrap().own().key_hash, idle.own().key_hash);
    assert_eq!(member(&cluster, "idle").unwrap()["standing"], "good");
}
