//! What the wire costs: CPU seconds a GB over both ends, GB/s, and CPU microseconds a small call.
//!
//! Six provider processes (this program, started again) on loopback, mutual TLS, one client. The
//! transports take turns, so that a disturbance of the machine meets all of them; each figure is the
//! median of the rounds. Fragments live in memory: no disk, no checksums, no seal is measured.
//!
//! `cargo bench -p us-tests --bench wire` (about 90 s). The result is in
//! `docs/adr/0001-bulk-transport.md`.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use futures::StreamExt;
use futures::stream::{BoxStream, FuturesUnordered};
use tokio::net::{TcpListener, TcpStream};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use tonic::{Request, Response, Status, Streaming};
use us_core::tls::{CertificateAuthority, ExpectedPeer, Identity, PeerIdentity, Role};
use us_core::wire::{
    BulkClient, BulkLimits, BulkService, GRPC_MESSAGE_BYTES_MAX, Http2Windows, Server,
    ServerLimits, connect_grpc_with, grpc_get, grpc_put, unsecured,
};
use us_proto::v1::fragments_client::FragmentsClient;
use us_proto::v1::fragments_server::{Fragments, FragmentsServer};
use us_proto::v1::{
    CombineReply, CombineRequest, FragmentId, FragmentStatus, GetItem, GetReply, GetRequest,
    InventoryPage, InventoryRequest, PutReply, PutRequest, VerifyReply, VerifyRequest,
};
use us_tests::worker::{Worker, answer, median, own_cpu};

const PROVIDERS: usize = 6;
const ROUNDS: usize = 3;
const CASE_TIME: Duration = Duration::from_millis(1_000);
const CALL_DEADLINE: Duration = Duration::from_secs(20);
/// The unit in which a get of the benchmark asks for bytes.
const SLOT_BYTES: usize = 4 << 10;
const PROVIDER_FLAG: &str = "--wire-bench-provider";

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().collect();
    match arguments.iter().position(|argument| argument == PROVIDER_FLAG) {
        Some(at) => provider(Path::new(arguments.get(at + 1).context("no directory")?)),
        None => measure(),
    }
}

// ---------------------------------------------------------------- the provider processes

/// Fragments in memory: puts are dropped, gets are slices of one buffer.
struct Memory(Bytes);

impl BulkService for Memory {
    async fn put(&self, _peer: &PeerIdentity, _put: PutRequest) -> PutReply {
        PutReply { status: FragmentStatus::Ok.into(), ..PutReply::default() }
    }

    fn get(&self, _peer: &PeerIdentity, get: GetRequest) -> BoxStream<'static, GetReply> {
        let memory = self.0.clone();
        let replies = get.items.into_iter().enumerate().map(move |(item, wanted)| GetReply {
            item: item as u32,
            status: FragmentStatus::Ok.into(),
            data: memory.slice(..wanted.slots as usize * SLOT_BYTES),
            ..GetReply::default()
        });
        futures::stream::iter(replies).boxed()
    }
}

struct Grpc(Arc<Memory>);

#[tonic::async_trait]
impl Fragments for Grpc {
    type PutStream = BoxStream<'static, Result<PutReply, Status>>;
    type GetStream = BoxStream<'static, Result<GetReply, Status>>;
    type InventoryStream = BoxStream<'static, Result<InventoryPage, Status>>;

    async fn put(
        &self,
        request: Request<Streaming<PutRequest>>,
    ) -> Result<Response<Self::PutStream>, Status> {
        grpc_put(Arc::clone(&self.0), request)
    }

    async fn get(&self, request: Request<GetRequest>) -> Result<Response<Self::GetStream>, Status> {
        grpc_get(&*self.0, request)
    }

    async fn combine(&self, _: Request<CombineRequest>) -> Result<Response<CombineReply>, Status> {
        Err(Status::unimplemented("not measured"))
    }

    async fn inventory(
        &self,
        _: Request<InventoryRequest>,
    ) -> Result<Response<Self::InventoryStream>, Status> {
        Err(Status::unimplemented("not measured"))
    }

    async fn verify(&self, _: Request<VerifyRequest>) -> Result<Response<VerifyReply>, Status> {
        Err(Status::unimplemented("not measured"))
    }
}

fn fragments(memory: &Arc<Memory>) -> FragmentsServer<Grpc> {
    FragmentsServer::new(Grpc(Arc::clone(memory)))
        .max_decoding_message_size(GRPC_MESSAGE_BYTES_MAX)
        .max_encoding_message_size(GRPC_MESSAGE_BYTES_MAX)
}

/// Serves on three ports (TLS with large windows, TLS with standard windows, plain frames), prints
/// them, then answers each line of standard input with the CPU time used so far.
#[tokio::main]
async fn provider(home: &Path) -> Result<()> {
    let identity = Identity::load(home)?;
    let memory = Arc::new(Memory(vec![0x5a; 1 << 20].into()));
    let stop = CancellationToken::new();
    let mut ports = Vec::new();
    for http2 in [Http2Windows::default(), Http2Windows::STANDARD] {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        ports.push(listener.local_addr()?.port().to_string());
        let server = Server::new(&identity, ServerLimits { http2, ..ServerLimits::default() })
            .grpc(tonic::service::Routes::new(fragments(&memory)))
            .bulk(Arc::clone(&memory));
        tokio::spawn(server.serve(listener, stop.clone()));
    }
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    ports.push(listener.local_addr()?.port().to_string());
    tokio::spawn(plain(listener, memory, identity.own().clone(), stop.clone()));
    tokio::task::spawn_blocking(move || answer(&ports.join(" "))).await?
}

async fn plain(
    listener: TcpListener,
    memory: Arc<Memory>,
    peer: PeerIdentity,
    stop: CancellationToken,
) -> Result<()> {
    loop {
        let (tcp, _) = listener.accept().await?;
        tcp.set_nodelay(true)?;
        let (memory, peer, stop) = (Arc::clone(&memory), peer.clone(), stop.clone());
        tokio::spawn(async move {
            unsecured::serve_plain(memory, peer, tcp, BulkLimits::default(), stop).await;
        });
    }
}

// ---------------------------------------------------------------- the client

struct Provider {
    worker: Worker,
    ports: Vec<u16>,
}

impl Provider {
    fn start(home: &Path) -> Result<Self> {
        let (worker, said) = Worker::start(PROVIDER_FLAG, home)?;
        let ports: Vec<u16> = said.split(' ').map(str::parse).collect::<Result<_, _>>()?;
        ensure!(ports.len() == 3, "the provider printed {said:?}");
        Ok(Self { worker, ports })
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Transport {
    FramedPlain,
    FramedTls,
    GrpcLarge,
    GrpcStandard,
}

const TRANSPORTS: [(Transport, &str); 4] = [
    (Transport::FramedPlain, "frames, plain TCP (limit)"),
    (Transport::FramedTls, "frames, TLS"),
    (Transport::GrpcLarge, "gRPC, TLS, large windows"),
    (Transport::GrpcStandard, "gRPC, TLS, standard"),
];

#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    Put,
    Get,
}

#[derive(Clone, Copy)]
struct Case {
    direction: Direction,
    bytes: usize,
    inflight: usize,
}

const CASES: [Case; 6] = [
    Case { direction: Direction::Put, bytes: 1 << 20, inflight: 1 },
    Case { direction: Direction::Put, bytes: 1 << 20, inflight: 8 },
    Case { direction: Direction::Get, bytes: 1 << 20, inflight: 1 },
    Case { direction: Direction::Get, bytes: 1 << 20, inflight: 8 },
    Case { direction: Direction::Put, bytes: 4 << 10, inflight: 8 },
    Case { direction: Direction::Get, bytes: 4 << 10, inflight: 8 },
];

#[derive(Clone)]
enum Link {
    Framed(BulkClient),
    Grpc(FragmentsClient<Channel>),
}

impl Link {
    async fn open(transport: Transport, provider: &Provider, identity: &Identity) -> Result<Self> {
        let address = |port: usize| format!("127.0.0.1:{}", provider.ports[port]);
        let expected = ExpectedPeer::role(Role::Provider);
        let grpc = async |port: usize, windows: Http2Windows| -> Result<Self> {
            let channel = connect_grpc_with(&address(port), identity, expected, windows).await?;
            let client = FragmentsClient::new(channel)
                .max_decoding_message_size(GRPC_MESSAGE_BYTES_MAX)
                .max_encoding_message_size(GRPC_MESSAGE_BYTES_MAX);
            Ok(Self::Grpc(client))
        };
        let limits = BulkLimits::default();
        match transport {
            Transport::FramedPlain => {
                let address: SocketAddr = address(2).parse()?;
                let tcp = TcpStream::connect(address).await?;
                tcp.set_nodelay(true)?;
                Ok(Self::Framed(unsecured::connect_plain(tcp, identity.own().clone(), limits)))
            }
            Transport::FramedTls => {
                let client = BulkClient::connect(&address(0), identity, expected, limits).await?;
                Ok(Self::Framed(client))
            }
            Transport::GrpcLarge => grpc(0, Http2Windows::default()).await,
            Transport::GrpcStandard => grpc(1, Http2Windows::STANDARD).await,
        }
    }

    /// Keeps `case.inflight` calls under way until `until`; returns the calls answered.
    async fn load(self, case: Case, payload: Bytes, until: Instant) -> Result<u64> {
        match (&self, case.direction) {
            (Self::Grpc(client), Direction::Put) => {
                grpc_puts(client.clone(), case, payload, until).await
            }
            _ => {
                let workers: FuturesUnordered<_> = (0..case.inflight)
                    .map(|_| tokio::spawn(self.clone().worker(case, payload.clone(), until)))
                    .collect();
                let counts: Vec<_> = workers.collect().await;
                counts.into_iter().try_fold(0, |sum, count| Ok(sum + count??))
            }
        }
    }

    async fn worker(mut self, case: Case, payload: Bytes, until: Instant) -> Result<u64> {
        let mut calls = 0;
        while Instant::now() < until {
            let deadline = (Instant::now() + CALL_DEADLINE).into();
            match (&mut self, case.direction) {
                (Self::Framed(client), Direction::Put) => {
                    let put = PutRequest { record: payload.clone(), ..PutRequest::default() };
                    let reply = client.put(put, deadline).await?;
                    ensure!(reply.status() == FragmentStatus::Ok, "put failed");
                }
                (Self::Framed(client), Direction::Get) => {
                    let mut replies = client.get(wanted(case.bytes), deadline).await?;
                    while let Some(reply) = replies.next().await {
                        ensure!(reply?.data.len() == case.bytes, "short reply");
                    }
                }
                (Self::Grpc(client), _) => {
                    let mut replies = client.get(wanted(case.bytes)).await?.into_inner();
                    while let Some(reply) = replies.message().await? {
                        ensure!(reply.data.len() == case.bytes, "short reply");
                    }
                }
            }
            calls += 1;
        }
        Ok(calls)
    }
}

fn wanted(bytes: usize) -> GetRequest {
    let fragment = Some(FragmentId { block: Bytes::from_static(&[7; 16]), index: 0 });
    let slots = (bytes / SLOT_BYTES) as u32;
    GetRequest {
        items: vec![GetItem { fragment, first_slot: 0, slots, trailer: false, trace: 0 }],
        ..GetRequest::default()
    }
}

/// All puts of one provider on one bidirectional stream, as the service is meant.
async fn grpc_puts(
    mut client: FragmentsClient<Channel>,
    case: Case,
    payload: Bytes,
    until: Instant,
) -> Result<u64> {
    let put = PutRequest { record: payload, ..PutRequest::default() };
    let (sender, receiver) = tokio::sync::mpsc::channel(case.inflight);
    for _ in 0..case.inflight {
        sender.send(put.clone()).await?;
    }
    let mut replies = client.put(ReceiverStream::new(receiver)).await?.into_inner();
    let mut sender = Some(sender);
    let mut calls = 0;
    while let Some(reply) = replies.message().await? {
        ensure!(reply.status() == FragmentStatus::Ok, "put failed");
        calls += 1;
        match &sender {
            Some(open) if Instant::now() < until => open.send(put.clone()).await?,
            _ => sender = None,
        }
    }
    Ok(calls)
}

// ---------------------------------------------------------------- the measurement

#[derive(Clone, Copy)]
struct Sample {
    cpu_s: f64,
    wall_s: f64,
    calls: u64,
}

struct Bench {
    providers: Vec<Provider>,
    identity: Identity,
}

impl Bench {
    fn cpu(&mut self) -> Result<Duration> {
        let workers = self.providers.iter_mut().map(|provider| &mut provider.worker);
        workers.map(Worker::cpu).try_fold(own_cpu(), |sum, cpu| Ok(sum + cpu?))
    }

    async fn run(&mut self, transport: Transport, case: Case) -> Result<Sample> {
        let mut links = Vec::new();
        for provider in &self.providers {
            links.push(Link::open(transport, provider, &self.identity).await?);
        }
        let payload = Bytes::from(vec![0xa5; case.bytes]);
        let (cpu, start) = (self.cpu()?, Instant::now());
        let loads: Vec<_> = links
            .iter()
            .map(|link| tokio::spawn(link.clone().load(case, payload.clone(), start + CASE_TIME)))
            .collect();
        let mut calls = 0;
        for load in loads {
            calls += load.await??;
        }
        let wall_s = start.elapsed().as_secs_f64();
        let cpu_s = (self.cpu()? - cpu).as_secs_f64();
        Ok(Sample { cpu_s, wall_s, calls })
    }
}

#[tokio::main]
async fn measure() -> Result<()> {
    let home = tempfile::tempdir()?;
    let authority = CertificateAuthority::create()?;
    let homes: Vec<PathBuf> =
        (0..PROVIDERS).map(|number| home.path().join(number.to_string())).collect();
    for home in &homes {
        authority.issue(Role::Provider, "bench")?.save(home)?;
    }
    let providers = homes.iter().map(|home| Provider::start(home)).collect::<Result<_>>()?;
    let mut bench = Bench { providers, identity: authority.issue(Role::Client, "bench")? };
    let mut samples = vec![vec![Vec::new(); CASES.len()]; TRANSPORTS.len()];
    for round in 0..ROUNDS {
        for (number, case) in CASES.into_iter().enumerate() {
            for (row, (transport, _)) in TRANSPORTS.into_iter().enumerate() {
                samples[row][number].push(bench.run(transport, case).await?);
            }
        }
        eprintln!("round {} of {ROUNDS} done", round + 1);
    }
    print_table(&samples);
    Ok(())
}

fn print_table(samples: &[Vec<Vec<Sample>>]) {
    let figure = |row: usize, case: usize, of: &dyn Fn(&Sample) -> f64| {
        median(samples[row][case].iter().map(of))
    };
    println!("CPU seconds a GB over both ends (x the limit), GB/s; {PROVIDERS} providers");
    println!("| 1 MiB fragments | put, 1 each | put, 8 each | get, 1 each | get, 8 each |");
    println!("|---|---|---|---|---|");
    for (row, (_, name)) in TRANSPORTS.into_iter().enumerate() {
        print!("| {name} |");
        for (number, case) in CASES.into_iter().enumerate().take(4) {
            let bytes = case.bytes as f64 / 1e9;
            let cost = |row| figure(row, number, &|s| s.cpu_s / (s.calls as f64 * bytes));
            let rate = figure(row, number, &|s| s.calls as f64 * bytes / s.wall_s);
            print!(" {:.2} ({:.1} x), {rate:.2} |", cost(row), cost(row) / cost(0));
        }
        println!();
    }
    println!("\nCPU microseconds a call over both ends (x the limit), thousand calls a second");
    println!("| 4 KiB, 8 in flight each | put | get |");
    println!("|---|---|---|");
    for (row, (_, name)) in TRANSPORTS.into_iter().enumerate() {
        print!("| {name} |");
        for number in 4..CASES.len() {
            let cost = |row| figure(row, number, &|s| s.cpu_s * 1e6 / s.calls as f64);
            let rate = figure(row, number, &|s| s.calls as f64 / 1e3 / s.wall_s);
            print!(" {:.0} ({:.1} x), {rate:.0} |", cost(row), cost(row) / cost(0));
        }
        println!();
    }
}
