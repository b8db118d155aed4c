//! The real program against a directory played by the test: joining, serving, deleting, refusals,
//! a second daemon, kill -9.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::stream::BoxStream;
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tonic::{Request, Response, Status, Streaming};
use us_core::ids::{BlockId, VolumeId};
use us_core::tls::{CertificateAuthority, ExpectedPeer, Identity, Role};
use us_core::wire::{BulkClient, BulkLimits, Server, ServerLimits, connect_grpc};
use us_proto::v1::fragments_client::FragmentsClient;
use us_proto::v1::membership_server::{Membership, MembershipServer};
use us_proto::v1::provider_down::Event as Down;
use us_proto::v1::provider_up::Event as Up;
use us_proto::v1::recovery_client::RecoveryClient;
use us_proto::v1::recovery_page::Content;
use us_proto::v1::{
    CancelRebuild, CheckFragments, CombineItem, CombineRequest, DeleteFragments, FragmentId,
    FragmentStatus, GetItem, GetRequest, GrantTime, InventoryRequest, ProviderDown,
    ProviderRefused, ProviderUp, ProviderWelcome, PutRequest, ReadRecoveryRequest,
    RebuildFragments, RebuildPath, RebuildStatus, Rebuilt, RecordPart, StartScrub, StoreRecords,
    StoreRoot, VerifyRequest,
};
use us_provider::grants::Told;
use us_provider::guest::Pressure;

#[path = "../samples/record.rs"]
mod record;
#[path = "../samples/swarm.rs"]
mod swarm;
use record::{sample, sample_id, sample_volume};
use swarm::{SampleBlock, Serving, Swarm, grant_for, told};

const PATIENCE: Duration = Duration::from_secs(60);

/// Looks until there is something.
async fn eventually<T>(what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let mut ticks = tokio::time::interval(Duration::from_millis(10));
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(Instant::now() < deadline, "never seen: {what}");
        ticks.tick().await;
    }
}

/// The way to a provider.
type Line = mpsc::Sender<Result<ProviderDown, Status>>;

/// The directory: keeps what providers say, and says to the last one what the test tells it.
#[derive(Clone, Default)]
struct Played {
    heard: Arc<Mutex<Vec<Up>>>,
    line: Arc<Mutex<Option<Line>>>,
    refuse: Arc<Mutex<Option<String>>>,
    told: Arc<Mutex<Option<Told>>>,
}

#[tonic::async_trait]
impl Membership for Played {
    type JoinStream = BoxStream<'static, Result<ProviderDown, Status>>;

    async fn join(
        &self,
        request: Request<Streaming<ProviderUp>>,
    ) -> Result<Response<Self::JoinStream>, Status> {
        let (line, answers) = mpsc::channel(16);
        let mut incoming = request.into_inner();
        let first = match self.refuse.lock().clone() {
            Some(reason) => Down::Refused(ProviderRefused { reason }),
            None => Down::Welcome(ProviderWelcome {
                provider: 7,
                cookie: Bytes::from_static(b"cookie"),
                report_every_ms: 100,
                ..self.basis()
            }),
        };
        line.send(Ok(ProviderDown { event: Some(first) })).await.unwrap();
        *self.line.lock() = Some(line);
        let played = self.clone();
        tokio::spawn(async move {
            while let Some(Ok(message)) = incoming.next().await {
                let event = message.event.unwrap();
                let is_goodbye = matches!(event, Up::Goodbye(_));
                played.heard.lock().push(event);
                if is_goodbye {
                    *played.line.lock() = None;
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(answers))))
    }
}

impl Played {
    /// What a welcome says of the cluster and its grants.
    fn basis(&self) -> ProviderWelcome {
        let told = self.told.lock().expect("the setting has a cluster");
        let Told { incarnation, period, period_ms, .. } = told;
        ProviderWelcome {
            grant_key: told.key.to_vec().into(),
            cluster: told.cluster.as_bytes().to_vec().into(),
            grant_time: Some(GrantTime { incarnation, period, period_ms }),
            ..ProviderWelcome::default()
        }
    }

    async fn say(&self, event: Down) {
        let line = self.line.lock().clone().expect("a provider is here");
        line.send(Ok(ProviderDown { event: Some(event) })).await.unwrap();
    }

    /// Waits for a message that `wanted` takes; forgets it and what came before.
    async fn hear<T>(&self, what: &str, wanted: impl Fn(&Up) -> Option<T>) -> T {
        let look = async || {
            let mut heard = self.heard.lock();
            let found = heard.iter().enumerate().find_map(|(at, up)| Some((at, wanted(up)?)));
            let (at, value) = found?;
            heard.drain(..=at);
            Some(value)
        };
        eventually(what, look).await
    }
}

struct Setting {
    dir: tempfile::TempDir,
    played: Played,
    directory: String,
    client: Identity,
    admin: Identity,
    provider: Identity,
    stop: CancellationToken,
}

impl Setting {
    async fn new() -> Self {
        Self::of(&CertificateAuthority::create().unwrap()).await
    }

    async fn of(authority: &CertificateAuthority) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let issue = |role, name| authority.issue(role, name).unwrap();
        let provider = issue(Role::Provider, "one");
        provider.save(&dir.path().join("identity")).unwrap();
        let played = Played::default();
        *played.told.lock() = Some(told(provider.own().cluster));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let directory = listener.local_addr().unwrap().to_string();
        let stop = CancellationToken::new();
        let identity = issue(Role::Directory, "directory");
        let routes = Routes::new(MembershipServer::new(played.clone()));
        let server = Server::new(&identity, ServerLimits::default()).grpc(routes);
        tokio::spawn(server.serve(listener, stop.clone()));
        let (client, admin) = (issue(Role::Client, "mount"), issue(Role::Admin, "admin"));
        Self { dir, played, directory, client, admin, provider, stop }
    }

    /// What the mount shows for the sample fragments.
    fn grant(&self) -> Bytes {
        grant_for(&self.client, sample_volume(), None)
    }

    /// The order, as the directory gives it to this provider.
    fn order(&self, ticket: u64, order: RebuildFragments) -> Down {
        let volume = VolumeId::from_slice(&order.volume).unwrap();
        let grant = grant_for(&self.provider, volume, BlockId::from_slice(&order.block));
        Down::Rebuild(RebuildFragments { ticket, grant, ..order })
    }

    fn data(&self) -> std::path::PathBuf {
        self.dir.path().join("data")
    }

    fn provider(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_us-provider"));
        command.args(["run", "--listen", "127.0.0.1:0", "--reserve", "0", "--capacity", "1G"]);
        command.args(["--directory", &self.directory, "--site", "campus/b"]);
        command.arg("--data").arg(self.data());
        command.arg("--identity").arg(self.dir.path().join("identity"));
        command.stdout(Stdio::null());
        // Tests run on busy machines.
        command.env("US_PROVIDER_GUEST__REPAIR_CPU_PRESSURE_PERCENT_MAX", "1000.0");
        command.env("US_PROVIDER_GUEST__REPAIR_IO_PRESSURE_PERCENT_MAX", "1000.0");
        command.env("US_PROVIDER_GUEST__CPU_PRESSURE_PERCENT_MAX", "1000.0");
        command.env("US_PROVIDER_GUEST__IO_PRESSURE_PERCENT_MAX", "1000.0");
        command
    }

    async fn rebuilt(&self, ticket: u64) -> Rebuilt {
        let rebuilt = self.played.hear("an order's end", |up| match up {
            Up::Rebuilt(rebuilt) => Some(rebuilt.clone()),
            _ => None,
        });
        let rebuilt = rebuilt.await;
        assert_eq!(rebuilt.ticket, ticket);
        rebuilt
    }

    /// What the provider says of fragments.
    async fn checked(&self, check: CheckFragments) -> Vec<FragmentStatus> {
        let query = check.query;
        self.played.say(Down::Check(check)).await;
        let checked = self.played.hear("a check's answer", |up| match up {
            Up::Checked(reply) if reply.query == query => Some(reply.clone()),
            _ => None,
        });
        checked.await.statuses().collect()
    }

    /// Starts the program and waits for its hello.
    async fn start(&self) -> (Child, us_proto::v1::ProviderHello) {
        self.start_as(self.provider()).await
    }

    async fn start_as(&self, mut command: Command) -> (Child, us_proto::v1::ProviderHello) {
        let child = command.spawn().unwrap();
        let hello = self.played.hear("a hello", |up| match up {
            Up::Hello(hello) => Some(hello.clone()),
            _ => None,
        });
        let hello = hello.await;
        // It judges grants when it has written down what the welcome says of them.
        let is_there = async || self.data().join("grants").exists().then_some(());
        eventually("what it was told", is_there).await;
        (child, hello)
    }
}

async fn end(mut child: Child) -> ExitStatus {
    tokio::task::spawn_blocking(move || child.wait().unwrap()).await.unwrap()
}

fn terminate(child: &Child) {
    let pid = rustix::process::Pid::from_child(child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
}

fn wire(number: u64) -> FragmentId {
    us_provider::service::wire_id(sample_id(number))
}

async fn put(client: &BulkClient, grant: &Bytes, number: u64) -> (Bytes, FragmentStatus) {
    let (_, record) = sample(number, 100_000, 0);
    let grant = grant.clone();
    let put = PutRequest { request: number, record: record.clone(), ..PutRequest::default() };
    let request = PutRequest { grant, ..put };
    let reply = client.put(request, tokio::time::Instant::now() + PATIENCE).await.unwrap();
    (record, reply.status())
}

async fn get(client: &BulkClient, grant: &Bytes, number: u64) -> us_proto::v1::GetReply {
    let item = GetItem { fragment: Some(wire(number)), trailer: true, ..GetItem::default() };
    let grant = grant.clone();
    let request = GetRequest { request: 1, items: vec![item], grant };
    let replies = client.get(request, tokio::time::Instant::now() + PATIENCE).await.unwrap();
    replies.all().await.unwrap().remove(0)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_can_wait_waits_while_the_machine_is_busy() {
    if Pressure::of("cpu").is_none() {
        eprintln!("not run: this kernel does not tell how busy the machine is");
        return;
    }
    let setting = Setting::new().await;
    let mut command = setting.provider();
    // Every machine is busier than that.
    command.env("US_PROVIDER_GUEST__CPU_PRESSURE_PERCENT_MAX", "-1.0");
    let (child, _) = setting.start_as(command).await;
    let fragments = vec![wire(1)];
    let check = CheckFragments { query: 1, fragments, when_idle: true, ..Default::default() };
    assert_eq!(setting.checked(check.clone()).await, [FragmentStatus::Busy]);
    let check = CheckFragments { query: 2, when_idle: false, ..check };
    assert_eq!(setting.checked(check).await, [FragmentStatus::NotFound]);
    terminate(&child);
    assert!(end(child).await.success());
    setting.stop.cancel();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_provider_joins_serves_and_deletes() {
    let setting = Setting::new().await;
    let (child, hello) = setting.start().await;
    assert_eq!((hello.site.as_str(), hello.store.len(), hello.cookie.len()), ("campus/b", 16, 0));
    assert!(hello.report.unwrap().accepts_puts);
    let address = std::fs::read_to_string(setting.data().join("address")).unwrap();
    assert_eq!(address, hello.address);
    let expected = ExpectedPeer::role(Role::Provider);
    let client = BulkClient::connect(&address, &setting.client, expected, BulkLimits::default());
    let client = client.await.unwrap();
    let (record, status) = put(&client, &setting.grant(), 1).await;
    assert_eq!(status, FragmentStatus::Ok);
    assert_eq!(
        put(&client, &setting.grant(), 1).await.1,
        FragmentStatus::Ok,
        "write-once: the same bytes again"
    );
    let reply = get(&client, &setting.grant(), 1).await;
    assert_eq!(reply.status(), FragmentStatus::Ok);
    assert_eq!([&reply.header[..], &reply.data[..], &reply.trailer[..]].concat(), record);
    assert_eq!(get(&client, &setting.grant(), 2).await.status(), FragmentStatus::NotFound);
    over_grpc(&setting, &address).await;
    // The directory checks, deletes, keeps a root.
    let check =
        CheckFragments { query: 5, fragments: vec![wire(1), wire(2)], ..Default::default() };
    let found = [FragmentStatus::Ok, FragmentStatus::NotFound];
    assert_eq!(setting.checked(check).await, found);
    let root = StoreRoot { sequence: 3, root: Bytes::from_static(b"root"), ..StoreRoot::default() };
    setting.played.say(Down::StoreRoot(root)).await;
    setting.played.hear("the root", |up| matches!(up, Up::RootStored(_)).then_some(())).await;
    let kept = std::fs::read(setting.data().join("root")).unwrap();
    let kept = us_provider::membership::decode_root(&kept).unwrap();
    assert_eq!(kept, (3, Bytes::from_static(b"root")));
    let delete = DeleteFragments { ticket: 9, fragments: vec![wire(1), wire(2)] };
    setting.played.say(Down::Delete(delete)).await;
    setting.played.hear("the deletion", |up| matches!(up, Up::Deleted(_)).then_some(())).await;
    let report = setting.played.hear("a report of it", |up| match up {
        Up::Report(report) if report.fragments == 0 => Some(report.clone()),
        _ => None,
    });
    assert!(report.await.used_bytes > 100_000, "the trash still takes space");
    // What a restored directory still knows comes back.
    let check = CheckFragments {
        query: 6,
        fragments: vec![wire(1), wire(2)],
        bring_back: true,
        ..Default::default()
    };
    assert_eq!(setting.checked(check).await, found);
    assert_eq!(get(&client, &setting.grant(), 1).await.status(), FragmentStatus::Ok);
    terminate(&child);
    setting.played.hear("a goodbye", |up| matches!(up, Up::Goodbye(_)).then_some(())).await;
    assert!(end(child).await.success());
    setting.stop.cancel();
}

fn records(seqs: std::ops::RangeInclusive<u64>) -> StoreRecords {
    let part = |seq| RecordPart { seq, part: 0, last: true, sealed: vec![seq as u8; 200].into() };
    let salt = vec![1; 16].into();
    let parts = seqs.map(part).collect();
    StoreRecords { incarnation: 1, run: 4, run_first_seq: 1, salt, parts }
}

/// Everything the provider gives back: its root, and the numbers of its records.
async fn recovered(setting: &Setting, identity: &Identity) -> Result<(Bytes, Vec<u64>), Status> {
    let address = std::fs::read_to_string(setting.data().join("address")).unwrap();
    let expected = ExpectedPeer::role(Role::Provider);
    let channel = connect_grpc(&address, identity, expected).await.unwrap();
    let mut pages = RecoveryClient::new(channel).read(ReadRecoveryRequest {}).await?.into_inner();
    let (mut root, mut seqs) = (Bytes::new(), Vec::new());
    while let Some(page) = pages.message().await? {
        match page.content.unwrap() {
            Content::Root(kept) => root = kept.root,
            Content::Records(records) => seqs.extend(records.parts.iter().map(|part| part.seq)),
        }
    }
    Ok((root, seqs))
}

/// Records are durable before they are acknowledged: a kill takes none, the next hello says what is
/// there, and a root lets them go.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn records_of_the_directory_survive_a_kill_and_go_with_a_root() {
    let setting = Setting::new().await;
    let (mut child, hello) = setting.start().await;
    assert_eq!((hello.records, hello.root_sequence), (None, 0));
    for (seqs, last) in [(1..=40, 40), (41..=41, 41)] {
        setting.played.say(Down::StoreRecords(records(seqs))).await;
        let stored = setting.played.hear("records stored", |up| match up {
            Up::RecordsStored(stored) if stored.seq == last => Some(stored.clone()),
            _ => None,
        });
        let stored = stored.await;
        assert_eq!((stored.run, stored.error.as_str()), (4, ""));
    }
    child.kill().unwrap();
    end(child).await;
    let (child, hello) = setting.start().await;
    let held = hello.records.unwrap();
    assert_eq!((held.run, held.first_seq, held.last_seq), (4, 1, 41));
    let refused = recovered(&setting, &setting.client).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::PermissionDenied);
    let (root, seqs) = recovered(&setting, &setting.admin).await.unwrap();
    assert!(root.is_empty() && seqs == (1..=41).collect::<Vec<_>>());
    let root = StoreRoot {
        sequence: 8,
        root: Bytes::from_static(b"sealed"),
        covers_seq: 41,
        incarnation: 1,
        run: 4,
        run_first_seq: 1,
    };
    setting.played.say(Down::StoreRoot(root)).await;
    setting.played.hear("the root", |up| matches!(up, Up::RootStored(_)).then_some(())).await;
    // Behind the root, which is acknowledged before records go.
    setting.played.say(Down::StoreRecords(records(42..=43))).await;
    setting.played.hear("more", |up| matches!(up, Up::RecordsStored(_)).then_some(())).await;
    let (root, seqs) = recovered(&setting, &setting.admin).await.unwrap();
    assert_eq!((&root[..], seqs), (&b"sealed"[..], vec![42, 43]));
    terminate(&child);
    assert!(end(child).await.success());
    setting.stop.cancel();
}

async fn over_grpc(setting: &Setting, address: &str) {
    let expected = ExpectedPeer::role(Role::Provider);
    let channel = connect_grpc(address, &setting.client, expected).await.unwrap();
    let mut client = FragmentsClient::new(channel);
    let item = CombineItem { fragment: Some(wire(1)), coefficient: 1 };
    let grant = setting.grant();
    let request =
        CombineRequest { items: vec![item], slots: 1, grant, ..CombineRequest::default() };
    let sum = client.combine(request).await.unwrap().into_inner();
    assert_eq!(sum.data, sample(1, 100_000, 0).1[128..128 + 16_400]);
    let refused = client.inventory(InventoryRequest::default()).await;
    assert_eq!(refused.unwrap_err().code(), tonic::Code::PermissionDenied);
    let channel = connect_grpc(address, &setting.admin, expected).await.unwrap();
    let mut admin = FragmentsClient::new(channel);
    let mut pages = admin.inventory(InventoryRequest::default()).await.unwrap().into_inner();
    let page = pages.message().await.unwrap().unwrap();
    assert_eq!((page.items.len(), page.items[0].birth), (1, 1));
    assert!(pages.message().await.unwrap().is_none());
    let request = VerifyRequest { fragments: vec![wire(1), wire(8)] };
    let statuses = admin.verify(request).await.unwrap().into_inner();
    let statuses: Vec<_> = statuses.statuses().collect();
    assert_eq!(statuses, [FragmentStatus::Ok, FragmentStatus::NotFound]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_provider_comes_back_as_itself() {
    let setting = Setting::new().await;
    let (mut child, first) = setting.start().await;
    let address = std::fs::read_to_string(setting.data().join("address")).unwrap();
    let expected = ExpectedPeer::role(Role::Provider);
    let client = BulkClient::connect(&address, &setting.client, expected, BulkLimits::default());
    assert_eq!(put(&client.await.unwrap(), &setting.grant(), 1).await.1, FragmentStatus::Ok);
    // A second daemon on the same store is refused.
    let second = setting.provider().stderr(Stdio::piped()).spawn().unwrap();
    let output = tokio::task::spawn_blocking(|| second.wait_with_output().unwrap()).await.unwrap();
    assert_eq!(output.status.code(), Some(4));
    assert!(String::from_utf8_lossy(&output.stderr).contains("in use"));
    control(&setting.data());
    child.kill().unwrap();
    end(child).await;
    let (child, again) = setting.start().await;
    assert_eq!((again.store, &again.cookie[..]), (first.store, &b"cookie"[..]));
    let report = again.report.unwrap();
    assert_eq!(report.fragments, 1);
    assert!(!report.accepts_puts, "the pause survives: {}", report.note);
    terminate(&child);
    assert!(end(child).await.success());
}

fn control(data: &Path) {
    let run = |command: &str| {
        let mut program = Command::new(env!("CARGO_BIN_EXE_us-provider"));
        let output = program.arg(command).arg("--data").arg(data).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    assert!(run("status").contains("taking fragments"));
    run("pause");
    assert!(run("status").contains("paused by its owner"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refused_provider_says_why_and_ends() {
    let setting = Setting::new().await;
    *setting.played.refuse.lock() = Some("no room in this cluster".into());
    let child = setting.provider().stderr(Stdio::piped()).spawn().unwrap();
    let output = tokio::task::spawn_blocking(|| child.wait_with_output().unwrap()).await.unwrap();
    assert_eq!(output.status.code(), Some(3));
    assert!(String::from_utf8_lossy(&output.stderr).contains("no room in this cluster"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn its_figures_are_served() {
    let setting = Setting::new().await;
    let folder = tempfile::tempdir().unwrap();
    let socket = &folder.path().join("metrics");
    let mut command = setting.provider();
    // The environment is a layer below the flags.
    let address = format!("unix:{}", socket.display());
    let child = command.env("US_PROVIDER_METRICS", address).spawn().unwrap();
    setting.played.hear("a hello", |up| matches!(up, Up::Hello(_)).then_some(())).await;
    assert!(fetch(socket, "/healthz").await.contains("ok"));
    eventually("figures", async || {
        fetch(socket, "/metrics").await.contains("us_provider_free_bytes").then_some(())
    })
    .await;
    terminate(&child);
    assert!(end(child).await.success());
}

async fn fetch(socket: &Path, path: &str) -> String {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut stream = tokio::net::UnixStream::connect(socket).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: us\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

/// Answers no get.
#[derive(Clone)]
struct Hanging(us_provider::service::FragmentService);

impl us_core::wire::BulkService for Hanging {
    async fn put(
        &self,
        peer: &us_core::tls::PeerIdentity,
        request: PutRequest,
    ) -> us_proto::v1::PutReply {
        self.0.put(peer, request).await
    }

    fn get(
        &self,
        _peer: &us_core::tls::PeerIdentity,
        _request: GetRequest,
    ) -> BoxStream<'static, us_proto::v1::GetReply> {
        Box::pin(tokio_stream::pending())
    }
}

#[tonic::async_trait]
impl Serving for Hanging {
    async fn combine(&self, reply: us_proto::v1::CombineReply) -> us_proto::v1::CombineReply {
        reply
    }
}

/// The daemon rebuilds as the directory says; killed in the middle, it is ordered again and leaves
/// neither half a fragment nor two.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_daemon_rebuilds_is_cancelled_is_killed_and_rebuilds_again() {
    let mut swarm = Swarm::start(6).await;
    let block = SampleBlock::new(4, 2, 1_000_000, 1);
    swarm.put(&block, |_, record| Some(record.clone())).await;
    let setting = Setting::of(swarm.authority()).await;
    let (mut child, _) = setting.start().await;
    let order = |swarm: &Swarm, ticket, wanted: u8| {
        let order = swarm.order(&block, &[wanted], RebuildPath::Star);
        setting.order(ticket, order)
    };
    setting.played.say(order(&swarm, 1, 5)).await;
    let rebuilt = setting.rebuilt(1).await;
    assert_eq!(rebuilt.status(), RebuildStatus::Ok, "{}", rebuilt.detail);
    assert_eq!(rebuilt.received_bytes, 4 * block.geometry.fragment_bytes() as u64);
    // Three of five sources hang: the order neither ends nor fails before its deadline.
    for number in [0, 1, 2] {
        swarm.replace(number, Hanging).await;
    }
    setting.played.say(order(&swarm, 2, 4)).await;
    setting.played.say(Down::CancelRebuild(CancelRebuild { ticket: 2 })).await;
    assert_eq!(setting.rebuilt(2).await.status(), RebuildStatus::Busy);
    setting.played.say(order(&swarm, 3, 4)).await;
    // The loop still answers while the order hangs.
    let id = us_provider::service::wire_id(block.records[5].header.id());
    let check = CheckFragments { query: 8, fragments: vec![id], ..Default::default() };
    setting.played.say(Down::Check(check)).await;
    let checked = setting.played.hear("the check", |up| match up {
        Up::Checked(reply) => Some(reply.statuses().collect::<Vec<_>>()),
        _ => None,
    });
    assert_eq!(checked.await, [FragmentStatus::Ok]);
    child.kill().unwrap();
    end(child).await;
    for number in [0, 1, 2] {
        swarm.replace(number, |service| service).await;
    }
    let (child, again) = setting.start().await;
    assert_eq!(again.report.unwrap().fragments, 1, "no half fragment");
    setting.played.say(order(&swarm, 3, 4)).await;
    let rebuilt = setting.rebuilt(3).await;
    assert_eq!(rebuilt.status(), RebuildStatus::Ok, "{}", rebuilt.detail);
    setting.played.say(order(&swarm, 4, 4)).await;
    assert_eq!(setting.rebuilt(4).await.received_bytes, 0);
    let report = setting.played.hear("a report of both", |up| match up {
        Up::Report(report) if report.fragments > 1 => Some(report.clone()),
        _ => None,
    });
    assert_eq!(report.await.fragments, 2, "each once");
    terminate(&child);
    assert!(end(child).await.success());
    // What is on its disk is what the writer put.
    let store = us_provider::store::Store::open(&setting.data(), Default::default()).unwrap();
    for index in [4, 5] {
        let record = &block.records[index];
        assert!(store.read_record(record.header.id()).unwrap() == record.to_bytes());
    }
}

/// A scrub is ordered; what it finds is reported, and a new copy ends the report.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_ordered_scrub_reports_and_a_rebuild_heals() {
    let swarm = Swarm::start(3).await;
    let block = SampleBlock::new(2, 1, 100_000, 1);
    swarm.put(&block, |_, record| Some(record.clone())).await;
    let setting = Setting::of(swarm.authority()).await;
    let (child, _) = setting.start().await;
    let order = |ticket| {
        let order = swarm.order(&block, &[2], RebuildPath::Star);
        setting.order(ticket, order)
    };
    setting.played.say(order(1)).await;
    assert_eq!(setting.rebuilt(1).await.status(), RebuildStatus::Ok);
    let mut segments = std::fs::read_dir(setting.data().join("segments")).unwrap();
    let path = segments.next().unwrap().unwrap().path();
    let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, b"rot", 4096 + 64 + 128 + 9).unwrap();
    setting.played.say(Down::StartScrub(StartScrub {})).await;
    let damaged = setting.played.hear("the damage", |up| match up {
        Up::Damage(damage) => Some(damage.fragments.clone()),
        _ => None,
    });
    let id = us_provider::service::wire_id(block.records[2].header.id());
    assert_eq!(damaged.await, [id]);
    setting.played.say(order(2)).await;
    let rebuilt = setting.rebuilt(2).await;
    assert_eq!(rebuilt.status(), RebuildStatus::Ok, "{}", rebuilt.detail);
    assert!(rebuilt.received_bytes > 0);
    let healed = setting.played.hear("a report without damage", |up| match up {
        Up::Report(report) if report.damaged == 0 => Some(report.fragments),
        _ => None,
    });
    assert_eq!(healed.await, 1);
    terminate(&child);
    assert!(end(child).await.success());
}

/// A provider that was started again without its directory counted from the period it was told last: what
/// had ended meanwhile was honoured anew, after each start.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_provider_goes_on_from_where_it_had_counted_to() {
    let setting = Setting::new().await;
    let cluster = setting.provider.own().cluster;
    *setting.played.told.lock() = Some(Told { period_ms: 20, ..told(cluster) });
    let first = told(cluster).period;
    let counted = || {
        let kept = std::fs::read(setting.data().join("grants")).unwrap();
        us_provider::grants::decode_told(&kept).unwrap().period
    };
    let reaches = async |period| {
        let what = format!("that it counts to {period}");
        eventually(&what, async || (counted() >= period).then_some(())).await;
    };
    let (mut child, _) = setting.start().await;
    reaches(first + 10).await;
    // The directory is away from now on.
    setting.stop.cancel();
    for _start in 0..2 {
        child.kill().unwrap();
        end(child).await;
        let reached = counted();
        child = setting.provider().spawn().unwrap();
        reaches(reached + 10).await;
    }
    assert!(counted() >= first + 30);
    terminate(&child);
    assert!(end(child).await.success());
}
