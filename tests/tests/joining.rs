//! Joining: codes, what they are good for and what they are not, with the real programs.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tonic::{Request, Response, Status};
use us_core::tls::{CertificateAuthority, Identity, Role};
use us_core::wire::{Server, ServerLimits};
use us_proto::v1::enrollment_server::{Enrollment, EnrollmentServer};
use us_proto::v1::{EnrollReply, EnrollRequest};
use us_tests::cluster::{Cluster, PATIENCE, Shape, fuse_is_here};
use us_tests::joining::{at_address, invite, member, members, must_join, must_not_join};
use us_tests::poll;

fn directory_alone() -> Cluster {
    Cluster::start(Shape { providers: 0, code: "2+1", ..Shape::default() })
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

/// Ends with the test, however that ends.
struct Daemon(std::process::Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn run_provider(cluster: &Cluster, data: &str) -> Daemon {
    let log = fs::File::options().create(true).append(true).open(format!("{data}.log")).unwrap();
    let mut command = cluster.program("us-provider");
    // Neither the directory nor the identity is said: joining left them.
    command.args(["run", "--data", data, "--listen", "127.0.0.1:0", "--reserve", "0"]);
    command.args(["--capacity", "4G"]).stdout(log.try_clone().unwrap()).stderr(log);
    Daemon(command.spawn().unwrap())
}

/// The whole way of the issue: invited and joined through the programs alone, providers store, a client
/// mounts, an administrator looks; and the registry is there after a restart of the directory.
#[test]
fn all_three_roles_join_and_work() {
    let mut cluster = directory_alone();
    let code = invite(&cluster, &["--role", "provider", "--uses", "3", "--site", "attic"]);
    let data: Vec<String> = (0..3).map(|number| cluster.at(&format!("joined{number}"))).collect();
    for data in &data {
        must_join(&cluster, "us-provider", &code, data);
        let identity = Path::new(data).join("identity");
        assert_eq!(mode(&identity.join("key.pem")), 0o600);
        assert_eq!((mode(&identity), mode(Path::new(data))), (0o700, 0o700));
        assert!(!identity.join("joining-key.pem").exists());
    }
    let _providers: Vec<Daemon> = data.iter().map(|data| run_provider(&cluster, data)).collect();
    cluster.wait_online(3);
    let status = cluster.status().unwrap();
    let sites = status["providers"].as_array().unwrap().iter();
    assert!(sites.clone().all(|one| one["site"] == "attic"), "{status}");

    let (client, admin) = (cluster.at("client"), cluster.at("admin"));
    let code = invite(&cluster, &["--role", "client", "--name", "laptop"]);
    must_join(&cluster, "usfs", &code, &client);
    assert_eq!(mode(&Path::new(&client).join("joined/client/key.pem")), 0o600);
    let code = invite(&cluster, &["--role", "admin", "--name", "ann"]);
    must_join(&cluster, "usctl", &code, &admin);
    assert_eq!(mode(&Path::new(&admin).join("joined/admin/key.pem")), 0o600);
    assert_eq!(mode(&Path::new(&admin).join("joined/admin")), 0o700);

    // No --directory and no --identity: the profile says both.
    let usctl = |cluster: &Cluster| {
        let mut usctl: Command = cluster.program("usctl");
        usctl.env("US_DATA", &admin).args(["members", "--json"]);
        let output = usctl.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice::<Vec<serde_json::Value>>(&output.stdout).unwrap()
    };
    if fuse_is_here() {
        let point = Path::new(&cluster.at("mnt")).to_path_buf();
        fs::create_dir(&point).unwrap();
        cluster.usctl(&["volume", "allow", us_tests::cluster::VOLUME, "laptop"]);
        let mount = cluster.mount_as(&point, "laptop", &client, &[]);
        fs::write(point.join("file"), vec![7; 3 << 20]).unwrap();
        mount.unmount();
        cluster.wait_settled();
        let mount = cluster.mount_as(&point, "laptop", &client, &[]);
        assert_eq!(fs::read(point.join("file")).unwrap(), vec![7; 3 << 20]);
        mount.unmount();
    }
    let before = usctl(&cluster);
    let named = |name: &str| before.iter().find(|one| one["name"] == name).unwrap();
    assert_eq!(
        (&named("laptop")["role"], &named("laptop")["standing"]),
        (&"client".into(), &"good".into())
    );
    assert!(named("ann")["by"].as_str().unwrap().starts_with("admin admin ("));
    assert_eq!(before.iter().filter(|one| one["role"] == "provider").count(), 3);

    cluster.kill_directory();
    cluster.start_directory();
    assert_eq!(usctl(&cluster).len(), before.len());
    let events = cluster.usctl(&["events", "--json", "--last", "100"]);
    let events: Vec<serde_json::Value> =
        events.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let by_admin = |kind: &str| {
        let mut found = events.iter().filter(|event| event["kind"] == kind);
        found.any(|event| event["by"].as_str().unwrap().starts_with("admin admin ("))
    };
    assert!(by_admin("invited") && by_admin("volume-made"), "{events:?}");
    let joined = events.iter().filter(|event| event["kind"] == "member-joined");
    assert_eq!(
        joined.filter(|event| event["detail"].to_string().contains("invitation")).count(),
        5
    );
}

const NOT_GOOD: &str = "wrong, used up, expired or cancelled";

/// Wrong, used-up, expired and cancelled codes: all get the same answer, and leave nothing behind.
#[test]
fn codes_that_are_not_good_say_nothing() {
    let cluster = directory_alone();
    let at = |name: &str| cluster.at(name);
    let good = invite(&cluster, &["--role", "client"]);
    // A typing error is told without asking anybody.
    let first = if good.starts_with('7') { "8" } else { "7" };
    let typo = format!("{first}{}", &good[1..]);
    assert!(must_not_join(&cluster, "usfs", &typo, &at("typo")).contains("typing error"));
    // A made-up secret for this directory.
    let wrong: us_core::tls::InviteCode = good.parse().unwrap();
    let wrong = us_core::tls::InviteCode { secret: [9; 10].into(), ..wrong };
    let wrong = wrong.reveal().to_string();
    assert!(must_not_join(&cluster, "usfs", &wrong, &at("wrong")).contains(NOT_GOOD));
    assert!(!Path::new(&at("wrong")).join("joined/client/cert.pem").exists());
    // For another role it is not used up.
    let said = must_not_join(&cluster, "us-provider", &good, &at("role"));
    assert!(said.contains("usfs join"), "{said}");
    must_join(&cluster, "usfs", &good, &at("one"));
    assert!(must_not_join(&cluster, "usfs", &good, &at("two")).contains(NOT_GOOD));

    let cancelled = invite(&cluster, &["--role", "client"]);
    let list = cluster.usctl(&["invite", "list", "--json"]);
    let list: Vec<serde_json::Value> = serde_json::from_str(&list).unwrap();
    let open: Vec<_> = list.iter().filter(|one| one["uses_left"] == 1).collect();
    assert_eq!(open.len(), 1, "{list:?}");
    cluster.usctl(&["invite", "cancel", open[0]["id"].as_str().unwrap()]);
    assert!(must_not_join(&cluster, "usfs", &cancelled, &at("three")).contains(NOT_GOOD));

    let short = invite(&cluster, &["--role", "client", "--expires", "1s"]);
    poll::until("the invitation to be over", PATIENCE, || {
        let list = cluster.usctl(&["invite", "list", "--json"]);
        let open: Vec<serde_json::Value> = serde_json::from_str(&list).unwrap();
        let is_over = open.iter().all(|one| one["uses_left"] == 0);
        is_over.then_some(()).ok_or(list)
    });
    assert!(must_not_join(&cluster, "usfs", &short, &at("four")).contains(NOT_GOOD));
    assert!(members(&cluster).iter().filter(|one| one["role"] == "client").count() == 1);
}

/// A join whose answer was lost: the key waits, and the same code gives it its certificate again, though
/// it is used up for everybody else.
#[test]
fn a_join_that_was_not_answered_is_tried_again() {
    let cluster = directory_alone();
    let code = invite(&cluster, &["--role", "client", "--name", "laptop"]);
    let data = cluster.at("laptop");
    must_join(&cluster, "usfs", &code, &data);
    let folder = Path::new(&data).join("joined/client");
    let key = Identity::load(&folder).unwrap().own().key_hash;
    // As it was before the answer came.
    fs::rename(folder.join("key.pem"), folder.join("joining-key.pem")).unwrap();
    for name in ["cert.pem", "ca.pem", "joined.toml"] {
        fs::remove_file(folder.join(name)).unwrap();
    }
    must_join(&cluster, "usfs", &code, &data);
    let again = Identity::load(&folder).unwrap();
    assert_eq!((again.own().key_hash, &*again.own().name), (key, "laptop"));
    let said = must_not_join(&cluster, "usfs", &code, &cluster.at("other"));
    assert!(said.contains(NOT_GOOD), "{said}");
    assert_eq!(members(&cluster).iter().filter(|one| one["name"] == "laptop").count(), 1);
}

/// Counts what reaches it.
#[derive(Clone, Default)]
struct Imposter(Arc<AtomicUsize>);

#[tonic::async_trait]
impl Enrollment for Imposter {
    async fn enroll(
        &self,
        _request: Request<EnrollRequest>,
    ) -> Result<Response<EnrollReply>, Status> {
        self.0.fetch_add(1, Ordering::Relaxed);
        Err(Status::permission_denied("got it"))
    }
}

/// A man in the middle: with another authority, and with the certificate of a member that is not the
/// directory. Neither ever sees the secret.
#[test]
fn an_imposter_is_not_told_the_secret() {
    let cluster = directory_alone();
    let code = invite(&cluster, &["--role", "client"]);
    cluster.issue("provider", "mallory");
    let other = CertificateAuthority::create().unwrap();
    let member = Identity::load(Path::new(&cluster.at("identity-mallory"))).unwrap();
    let ours = Identity::load(Path::new(&cluster.at("directory/identity"))).unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let cases = [
        (other.issue(Role::Directory, "directory").unwrap(), true),
        (member, true),
        // The same server with the directory's own identity is talked to: it is the identity that
        // makes the difference.
        (ours, false),
    ];
    for (identity, is_imposter) in cases {
        let (imposter, stop) = (Imposter::default(), CancellationToken::new());
        let routes = Routes::new(EnrollmentServer::new(imposter.clone()));
        let server = Server::new(&identity, ServerLimits::default()).join(routes);
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let serving = runtime.spawn(server.serve(listener, stop.clone()));
        let said = must_not_join(&cluster, "usfs", &at_address(&code, &address), &cluster.at("x"));
        let wanted = if is_imposter { "not the directory that made this code" } else { "got it" };
        assert!(said.contains(wanted), "{said}");
        assert_eq!(imposter.0.load(Ordering::Relaxed), usize::from(!is_imposter));
        stop.cancel();
        runtime.block_on(serving).unwrap().unwrap();
    }
    // The code is as good as before.
    must_join(&cluster, "usfs", &code, &cluster.at("x"));
    assert!(member_is_good(&cluster, "client"));
}

fn member_is_good(cluster: &Cluster, role: &str) -> bool {
    members(cluster).iter().any(|one| one["role"] == role && one["standing"] == "good")
}

/// One address may not guess for ever; the directory says so, and others join meanwhile only if they
/// come from elsewhere (here nobody does).
#[test]
fn guessing_is_slowed_down() {
    let cluster = directory_alone();
    let good = invite(&cluster, &["--role", "client"]);
    let base: us_core::tls::InviteCode = good.parse().unwrap();
    let mut limited = false;
    for guess in 0..30u8 {
        let wrong = us_core::tls::InviteCode { secret: [guess; 10].into(), ..base.clone() };
        let said = must_not_join(&cluster, "usfs", &wrong.reveal(), &cluster.at("guess"));
        limited = said.contains("too many tries");
        assert!(limited || said.contains(NOT_GOOD), "{said}");
        if limited {
            break;
        }
    }
    assert!(limited, "thirty guesses in a row");
    assert!(member(&cluster, "client").is_none());
}
