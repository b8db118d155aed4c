//! Restoring from providers played by the test: wrong keys, gaps, what several have only together.

#![expect(clippy::unwrap_used, reason = "a test: a failure is to stop it where it happens")]

use std::path::{Path, PathBuf};

use futures::StreamExt;
use futures::stream::BoxStream;
use prost::Message;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tonic::{Request, Response, Status};
use us_core::tls::{CertificateAuthority, Role};
use us_core::wire::{Server, ServerLimits};
use us_directory::keys;
use us_directory::records::{ClusterRecord, SessionRecord, encode};
use us_directory::recovery::{
    Manifest, ManifestProvider, RecoveryKit, RunLabel, RunSeal, seal_root,
};
use us_directory::restore::{RestoreOptions, Source, restore};
use us_directory::store::WriteBatch;
use us_directory::store::journal::encode_body;
use us_proto::v1::recovery_page::Content;
use us_proto::v1::recovery_server::{Recovery, RecoveryServer};
use us_proto::v1::{KeptRoot, ReadRecoveryRequest, RecoveryPage, StoreRecords};

/// A provider that has these pages.
#[derive(Clone)]
struct Played(Vec<Content>);

#[tonic::async_trait]
impl Recovery for Played {
    type ReadStream = BoxStream<'static, Result<RecoveryPage, Status>>;

    async fn read(
        &self,
        _request: Request<ReadRecoveryRequest>,
    ) -> Result<Response<Self::ReadStream>, Status> {
        let pages = self.0.clone().into_iter();
        let pages = pages.map(|content| Ok(RecoveryPage { content: Some(content) }));
        Ok(Response::new(futures::stream::iter(pages.collect::<Vec<_>>()).boxed()))
    }
}

struct Swarm {
    dir: tempfile::TempDir,
    kit: RecoveryKit,
    stop: CancellationToken,
    addresses: Vec<String>,
}

impl Swarm {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let kit = RecoveryKit::new(CertificateAuthority::create().unwrap());
        kit.save(&dir.path().join("key")).unwrap();
        Self { dir, kit, stop: CancellationToken::new(), addresses: Vec::new() }
    }

    /// A root that names the providers so far.
    fn root(&self, sequence: u64) -> Content {
        let provider = |(number, address): (usize, &String)| ManifestProvider {
            provider: number as u32 + 1,
            address: address.clone(),
            ..ManifestProvider::default()
        };
        let manifest = Manifest {
            cluster: self.kit.cluster().as_bytes().to_vec().into(),
            incarnation: 1,
            sequence,
            providers: self.addresses.iter().enumerate().map(provider).collect(),
            ..Manifest::default()
        };
        let root = seal_root(self.kit.secret(), [sequence as u8; 16], &manifest.encode_to_vec());
        Content::Root(KeptRoot { sequence, root: root.into(), ..KeptRoot::default() })
    }

    fn records(&self, seqs: impl IntoIterator<Item = u64>) -> Content {
        let label = RunLabel { incarnation: 1, run: 1, first_seq: 1, salt: [2; 16] };
        let seal = RunSeal::new(self.kit.secret(), label.clone());
        let parts = seqs.into_iter().flat_map(|seq| seal.seal(seq, &self.body(seq)));
        Content::Records(StoreRecords { parts: parts.collect(), ..label.message() })
    }

    /// The first record has the counters and a session, the others a key each.
    fn body(&self, seq: u64) -> Vec<u8> {
        let mut batch = WriteBatch::new();
        if seq == 1 {
            let counters = ClusterRecord {
                cluster: self.kit.cluster().as_bytes().to_vec().into(),
                incarnation: 1,
                next_session: 2,
                ..ClusterRecord::default()
            };
            batch.put(keys::cluster(), encode(&counters));
            batch.put(keys::session(1), encode(&SessionRecord::default()));
        } else {
            batch.put(seq.to_be_bytes().to_vec().into(), b"value".to_vec().into());
        }
        encode_body(&batch)
    }

    async fn provider(&mut self, pages: Vec<Content>) {
        let identity = self.kit.authority().issue(Role::Provider, "played").unwrap();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        self.addresses.push(listener.local_addr().unwrap().to_string());
        let routes = Routes::new(RecoveryServer::new(Played(pages)));
        let server = Server::new(&identity, ServerLimits::default()).grpc(routes);
        tokio::spawn(server.serve(listener, self.stop.clone()));
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn options(&self, data: &str, from: &[String]) -> RestoreOptions {
        RestoreOptions {
            data: self.path(data),
            recovery_key: self.path("key"),
            source: Source::Providers(from.to_vec()),
            accept_loss: false,
        }
    }
}

fn is_empty(data: &Path) -> bool {
    std::fs::read_dir(data).unwrap().next().is_none()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gap_is_told_and_restored_only_when_accepted() {
    let mut swarm = Swarm::new();
    let pages = vec![swarm.root(1), swarm.records((1..=3).chain(5..=6))];
    swarm.provider(pages).await;
    let options = swarm.options("data", &swarm.addresses);
    let error = restore(&options).await.unwrap_err().to_string();
    assert!(error.contains("records 4 to 4") && error.contains("--accept-loss"), "{error}");
    assert!(is_empty(&options.data), "nothing is left of the attempt");
    let accepted = RestoreOptions { accept_loss: true, ..options };
    let restored = restore(&accepted).await.unwrap();
    assert_eq!((restored.rebuilt.last_seq, restored.gap.unwrap().last), (3, 6));
    assert_eq!(restored.rebuilt.sessions, 0, "nobody goes on as if nothing had been");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_provider_names_the_others_and_together_they_have_it_all() {
    let mut swarm = Swarm::new();
    let pages = vec![swarm.root(1), swarm.records(1..=3)];
    swarm.provider(pages).await;
    let pages = vec![swarm.root(1), swarm.records(3..=6)];
    swarm.provider(pages).await;
    // The last has no records and the newest root, which names the others and one that is off.
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    swarm.addresses.push(nobody.local_addr().unwrap().to_string());
    drop(nobody);
    let pages = vec![swarm.root(2)];
    swarm.provider(pages).await;
    let from = swarm.addresses[3..].to_vec();
    let restored = restore(&swarm.options("data", &from)).await.unwrap();
    assert_eq!((restored.records, restored.gap, restored.rebuilt.last_seq), (6, None, 6));
    assert_eq!((restored.reached.len(), restored.unreached.len()), (3, 1));
    assert_eq!(restored.rebuilt.sessions, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_key_and_nobody_at_all_are_clear_errors() {
    let mut swarm = Swarm::new();
    let pages = vec![swarm.root(1), swarm.records(1..=3)];
    swarm.provider(pages).await;
    // Made anew with the same authority: the connection works, the seal does not.
    let (ca, key) = (swarm.kit.authority().ca_pem(), swarm.kit.authority().key_pem());
    let authority = CertificateAuthority::from_pem(ca.to_owned(), key.clone()).unwrap();
    RecoveryKit::new(authority).save(&swarm.path("other")).unwrap();
    let options = swarm.options("data", &swarm.addresses);
    let other = RestoreOptions { recovery_key: swarm.path("other"), ..options.clone() };
    let error = restore(&other).await.unwrap_err().to_string();
    assert!(error.contains("does not open the root"), "{error}");
    assert!(is_empty(&options.data));
    let missing = RestoreOptions { recovery_key: swarm.path("none"), ..options.clone() };
    assert!(restore(&missing).await.unwrap_err().to_string().contains("recovery key"));
    let nowhere = swarm.options("data", &["127.0.0.1:1".to_owned()]);
    let error = restore(&nowhere).await.unwrap_err().to_string();
    assert!(error.contains("no provider answered") && error.contains("127.0.0.1:1"), "{error}");
    let mut empty = Swarm::new();
    empty.provider(vec![Content::Root(KeptRoot::default())]).await;
    let error = restore(&empty.options("data", &empty.addresses)).await.unwrap_err().to_string();
    assert!(error.contains("keep no root"), "{error}");
}
