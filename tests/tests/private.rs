//! Private volumes on real processes: what opens them and what does not, what others learn of them, and
//! that everything which keeps the bytes safe works without a key.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;
use us_core::keyring::{KeyRing, SlotSecret};
use us_proto::v1::{SetVolumeKeysRequest, VolumeKeysReply, VolumeKeysRequest};
use us_tests::admin::{is_whole, provider};
use us_tests::cluster::{Cluster, PATIENCE, Shape, fuse_is_here, is_mounted};
use us_tests::poll;
use us_tests::tree::noise;

const VAULT: &str = "vault";
const PASSPHRASE: &str = "zebra umbrella 4711";
/// Something that would be seen.
const MARKER: &str = "TopSecretMarkerOfThePlaintext";

/// The words that open the volume in a mount.
fn with(kind: &str, file: &str) -> String {
    format!("{kind}={file}")
}

/// A file of the cluster's folder with a secret in it.
fn secret_file(cluster: &Cluster, name: &str, secret: &str) -> String {
    let path = cluster.at(name);
    fs::write(&path, format!("{secret}\n")).expect("a file");
    path
}

fn create(cluster: &Cluster, arguments: &[&str]) -> Value {
    let all = [&["volume", "create", VAULT, "--private", "--json"], arguments].concat();
    let made = serde_json::from_str(&cluster.usctl(&all)).expect("JSON");
    allow(cluster, VAULT);
    made
}

fn allow(cluster: &Cluster, volume: &str) {
    cluster.usctl(&["volume", "allow", volume, &cluster.key_of("client")]);
}

fn keys(cluster: &Cluster, arguments: &[&str]) -> (i32, Value) {
    let all = [&["volume", "keys", VAULT], arguments, &["--json"]].concat();
    let (code, text) = cluster.usctl_code(&all);
    (code, serde_json::from_str(&text).unwrap_or_default())
}

fn kinds(slots: &Value) -> Vec<(u64, String)> {
    let slots = slots["slots"].as_array().expect("slots").iter();
    let kind = |slot: &Value| slot["kind"].as_str().expect("a kind").to_owned();
    slots.map(|slot| (slot["slot"].as_u64().expect("a number"), kind(slot))).collect()
}

/// Tries to mount with these options: the exit code, and what was said.
fn refused(cluster: &Cluster, volume: &str, options: &str) -> (Option<i32>, String) {
    refused_at(cluster, &cluster.directory_address(), volume, options)
}

/// As [`refused`], with this spelling of the directory's address.
fn refused_at(
    cluster: &Cluster,
    directory: &str,
    volume: &str,
    options: &str,
) -> (Option<i32>, String) {
    let at = cluster.at("refused");
    let source = format!("{directory}/{volume}");
    let mut arguments = vec!["mount", &source, &at];
    if !options.is_empty() {
        arguments.extend(["-o", options]);
    }
    let mut command = cluster.usfs(&arguments);
    let mut child = command.stderr(Stdio::piped()).spawn().expect("it starts");
    poll::until("the mount to be refused", PATIENCE, || {
        if is_mounted(Path::new(&at)) {
            child.kill().expect("its own child");
            let _ = rustix::mount::unmount(at.as_str(), rustix::mount::UnmountFlags::DETACH);
            panic!("it was mounted with {options:?}");
        }
        child.try_wait().expect("its own child").ok_or_else(|| "it still runs".to_owned())
    });
    let output = child.wait_with_output().expect("its own child");
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
}

fn write_everything(at: &Path) {
    fs::create_dir_all(at.join(format!("{MARKER}-folder/inner"))).expect("folders");
    let big = at.join(format!("{MARKER}-folder/{MARKER}-big"));
    fs::write(&big, MARKER.repeat(100_000)).expect("a write");
    File::open(&big).and_then(|file| file.sync_all()).expect("a sync");
    // So small that it stays in the directory.
    let small = at.join(format!("{MARKER}-small"));
    fs::write(&small, MARKER).expect("a write");
    File::open(&small).and_then(|file| file.sync_all()).expect("a sync");
    symlink(format!("{MARKER}-small"), at.join("link")).expect("a link");
    let value = format!("{MARKER}-value");
    rustix::fs::setxattr(
        &small,
        format!("user.{MARKER}"),
        value.as_bytes(),
        rustix::fs::XattrFlags::empty(),
    )
    .expect("an xattr");
}

fn read_everything(at: &Path) {
    let big = fs::read(at.join(format!("{MARKER}-folder/{MARKER}-big"))).expect("bytes");
    assert!(big == MARKER.repeat(100_000).as_bytes());
    assert_eq!(fs::read(at.join(format!("{MARKER}-small"))).expect("bytes"), MARKER.as_bytes());
    let target = fs::read_link(at.join("link")).expect("a target");
    assert_eq!(target, PathBuf::from(format!("{MARKER}-small")));
}

fn reply(cluster: &Cluster, volume: &str) -> VolumeKeysReply {
    let request = VolumeKeysRequest { volume: volume.to_owned() };
    cluster.admin().call(async |client| client.volume_keys(request).await).expect("an answer")
}

fn set_ring(cluster: &Cluster, volume: &str, ring: &[u8]) -> VolumeKeysReply {
    let version = reply(cluster, volume).version;
    let (volume, key_ring) = (volume.to_owned(), ring.to_vec().into());
    let request = SetVolumeKeysRequest { volume, version, key_ring };
    let mut admin = cluster.admin();
    admin.call(async |client| client.set_volume_keys(request).await).expect("an answer")
}

#[test]
fn a_private_volume_opens_with_its_secrets_and_with_nothing_else() {
    if !fuse_is_here() {
        return;
    }
    let mut cluster = Cluster::start(Shape { providers: 3, code: "2+1", ..Shape::default() });
    let right = secret_file(&cluster, "right", PASSPHRASE);
    let recovery = cluster.at("recovery");
    let code = ["--code", "2+1"];
    let opened = ["--passphrase-file", &right, "--recovery-key-file", &recovery];
    let made = create(&cluster, &[&code[..], &opened[..]].concat());
    assert_eq!((&made["private"], &made["recovery_key"]), (&Value::Bool(true), &Value::Null));
    assert_eq!(fs::metadata(&recovery).expect("a key").mode() & 0o777, 0o600);

    let mount = cluster.mount_volume(VAULT, &["-o", &with("passphrase_file", &right)]);
    write_everything(mount.path());
    let other = cluster.mount_volume(VAULT, &["-o", &with("recovery_key_file", &recovery)]);
    read_everything(other.path());
    fs::write(other.path().join("from the other"), b"seen").expect("a write");
    assert_eq!(fs::read(mount.path().join("from the other")).expect("bytes"), b"seen");
    let found = mount.path().join(format!("{MARKER}-folder/{MARKER}-big"));
    let places = cluster.usctl(&["where", found.to_str().expect("text"), "--json"]);
    assert!(places.contains("\"durable\": true"), "`where` needs no key: {places}");
    other.unmount();
    mount.unmount();

    // Nothing else opens it, and each says why.
    let wrong = secret_file(&cluster, "wrong", "zebra umbrella 4712");
    let (code, said) = refused(&cluster, VAULT, &with("passphrase_file", &wrong));
    assert!(code == Some(77) && said.contains("wrong passphrase"), "{code:?} {said}");
    let (code, said) = refused(&cluster, VAULT, "");
    assert!(code == Some(1) && said.contains("is private and needs its passphrase"), "{said}");
    let (code, said) = refused(&cluster, VAULT, &with("key_file", &cluster.at("nothing")));
    assert!(code == Some(1) && said.contains("nothing"), "{said}");
    let (code, _) =
        keys(&cluster, &["add", "--passphrase-file", &wrong, "--new-passphrase-file", &right]);
    assert_eq!(code, 77);

    // Slots come and go; the bytes stay as they are.
    let key = cluster.at("key");
    let new = ["add", "--passphrase-file", &right, "--new-key-file", &key, "--label", "attic"];
    let (code, slots) = keys(&cluster, &new);
    assert_eq!((code, slots["slots"][2]["label"].as_str()), (0, Some("attic")));
    let meta = fs::metadata(&key).expect("a key file");
    assert_eq!((meta.len(), meta.mode() & 0o777), (32, 0o600));
    let next = secret_file(&cluster, "next", "another umbrella 4711");
    let change = ["change", "--passphrase-file", &right, "--new-passphrase-file", &next];
    let (code, slots) = keys(&cluster, &change);
    let wanted = [(2, "recovery key"), (3, "key file"), (4, "passphrase")];
    let wanted: Vec<_> = wanted.map(|(slot, kind)| (slot, kind.to_owned())).into();
    assert_eq!((code, kinds(&slots)), (0, wanted));
    assert_eq!(slots["slots"][2]["memory_kib"], 128 << 10);
    let (code, _) = refused(&cluster, VAULT, &with("passphrase_file", &right));
    assert_eq!(code, Some(77), "the old passphrase");
    assert_ne!(keys(&cluster, &["remove", "2"]).0, 0, "it asks for --yes");
    assert_eq!(keys(&cluster, &["remove", "2", "--yes"]).0, 0);
    let (code, said) = refused(&cluster, VAULT, &with("recovery_key_file", &recovery));
    assert!(code == Some(77) && said.contains("wrong recovery key"), "{said}");
    for words in [with("key_file", &key), with("passphrase_file", &next)] {
        let mount = cluster.mount_volume(VAULT, &["-o", &words]);
        read_everything(mount.path());
        mount.unmount();
    }
    assert_eq!(keys(&cluster, &["remove", "4", "--yes"]).0, 0);
    let (code, _) = keys(&cluster, &["remove", "3", "--yes"]);
    assert_eq!(code, 64, "the last slot stays");
    assert_eq!(kinds(&keys(&cluster, &["list"]).1), [(3, "key file".to_owned())]);
    assert_eq!(cluster.usctl_code(&["volume", "keys", "disk", "list"]).0, 64, "a managed one");
}

#[test]
fn a_passphrase_is_asked_for_at_a_terminal_and_taken_from_the_environment() {
    if !fuse_is_here() {
        return;
    }
    let mut cluster = Cluster::start(Shape { providers: 3, code: "2+1", ..Shape::default() });
    let arguments = ["volume", "create", VAULT, "--private", "--code", "2+1", "--json"];
    let made = cluster.usctl_command(&arguments).env("US_PASSPHRASE", PASSPHRASE).output();
    let made: Value = serde_json::from_slice(&made.expect("it starts").stdout).expect("JSON");
    let recovery = made["recovery_key"].as_str().expect("it is offered").to_owned();
    assert_eq!(recovery.len(), 47, "{recovery}");
    allow(&cluster, VAULT);

    // In the background the one that has the terminal asks. What is typed is not shown.
    let at = cluster.at("asked");
    let usfs = us_tests::cluster::programs().join("usfs");
    let source = format!("{}/{VAULT}", cluster.directory_address());
    let mount = format!("{} mount --background {source} {at}", usfs.display());
    let typed = |text: &str| {
        let mut script = Command::new("script");
        script.args(["-qec", &mount, "/dev/null"]).stdin(Stdio::piped()).stdout(Stdio::piped());
        script.env("US_DATA", cluster.at("data")).env("US_IDENTITY", cluster.at("identity-client"));
        script.env_remove("US_PASSPHRASE");
        let mut child = script.spawn().expect("script (util-linux) is there");
        // What is typed ahead of the question would be shown by the terminal, not by us.
        let mut shown = child.stdout.take().expect("piped");
        let mut seen = Vec::new();
        while !String::from_utf8_lossy(&seen).contains("Passphrase of volume vault: ") {
            let mut byte = [0];
            let got = std::io::Read::read(&mut shown, &mut byte).expect("its words");
            assert_ne!(got, 0, "it ended: {}", String::from_utf8_lossy(&seen));
            seen.push(byte[0]);
        }
        // The question comes a moment before the terminal is told to show nothing.
        let script = child.id();
        let children = fs::read_to_string(format!("/proc/{script}/task/{script}/children"));
        let children = children.expect("it has a child");
        let asking = children.split_whitespace().next().expect("it has a child").to_owned();
        let terminal = fs::read_link(format!("/proc/{asking}/fd/0")).expect("a terminal");
        poll::until("the terminal to show nothing", PATIENCE, || {
            let said = Command::new("stty").arg("-F").arg(&terminal).arg("-a").output();
            let said = said.map_err(|error| error.to_string())?;
            let said = String::from_utf8_lossy(&said.stdout).into_owned();
            said.contains(" -echo ").then_some(()).ok_or(said)
        });
        let mut stdin = child.stdin.take().expect("piped");
        writeln!(stdin, "{text}").expect("typed");
        std::io::Read::read_to_end(&mut shown, &mut seen).expect("its words");
        drop(stdin);
        let status = child.wait().expect("it ends");
        (status.code(), String::from_utf8_lossy(&seen).into_owned())
    };
    let (code, shown) = typed("not the passphrase");
    assert_eq!(code, Some(77), "{shown}");
    for secret in [PASSPHRASE, &recovery] {
        let (code, shown) = typed(secret);
        assert_eq!(code, Some(0), "{shown}");
        assert!(!shown.contains(secret), "what is typed is not shown");
        fs::write(Path::new(&at).join("a"), b"bytes").expect("a write");
        let umount = cluster.usfs(&["umount", &at, "--flush"]).output().expect("it starts");
        assert!(umount.status.success(), "{umount:?}");
    }
    let mount = cluster.mount_volume(
        VAULT,
        &["-o", &{
            let file = secret_file(&cluster, "right", PASSPHRASE);
            with("passphrase_file", &file)
        }],
    );
    assert_eq!(fs::read(mount.path().join("a")).expect("bytes"), b"bytes");
    mount.unmount();
}

/// What a directory that lies could do, done to a real mount.
#[test]
fn a_lying_directory_gets_no_plaintext_and_wastes_no_machine() {
    if !fuse_is_here() {
        return;
    }
    let mut cluster = Cluster::start(Shape { providers: 3, code: "2+1", ..Shape::default() });
    let right = secret_file(&cluster, "right", PASSPHRASE);
    let opened = ["--passphrase-file", &right, "--no-recovery-key", "--code", "2+1"];
    create(&cluster, &opened);
    cluster.usctl(&[&["volume", "create", "second", "--private"], &opened[..]].concat());
    allow(&cluster, "second");
    let words = with("passphrase_file", &right);
    let mount = cluster.mount_volume(VAULT, &["-o", &words]);
    mount.unmount();

    // "It is managed, and this is its key."
    for options in [words.as_str(), "private"] {
        let (code, said) = refused(&cluster, "disk", options);
        assert!(code == Some(1) && said.contains("volume disk is managed"), "{said}");
    }
    // Without an option too, once it was private here.
    let pins = PathBuf::from(cluster.at("data/private"));
    let pin = fs::read_dir(&pins).expect("pins").next().expect("one").expect("a file").path();
    let text = pin.to_str().expect("text").to_owned();
    fs::copy(&pin, text.replace(VAULT, "disk")).expect("a copy");
    let (code, said) = refused(&cluster, "disk", "");
    assert!(code == Some(1) && said.contains("the directory is lying"), "{said}");
    // By another spelling of the directory's address too.
    let address = cluster.directory_address();
    let port = address.rsplit(':').next().expect("a port");
    let (code, said) = refused_at(&cluster, &format!("localhost:{port}"), "disk", "");
    assert!(code == Some(1) && said.contains("the directory is lying"), "{said}");
    // Another private volume by the name of this one.
    fs::copy(&pin, text.replace(VAULT, "second")).expect("a copy");
    let (code, said) = refused(&cluster, "second", &words);
    assert!(code == Some(1) && said.contains("the directory is lying"), "{said}");

    // The ring of another volume that the same passphrase opens.
    let own = reply(&cluster, VAULT).key_ring;
    let version = set_ring(&cluster, VAULT, &reply(&cluster, "second").key_ring).version;
    let (code, said) = refused(&cluster, VAULT, &words);
    assert!(code == Some(1) && said.contains("the key ring of another"), "{said}");
    // A ring that would take all memory there is, or a year.
    for (at, value) in [(36, u32::MAX), (40, 1 << 30)] {
        let mut absurd = own.to_vec();
        absurd[at..at + 4].copy_from_slice(&u32::to_le_bytes(value));
        let end = absurd.len() - 4;
        let sum = us_core::fragment::crc32c(&absurd[..end]);
        absurd[end..].copy_from_slice(&sum.to_le_bytes());
        set_ring(&cluster, VAULT, &absurd);
        let (code, said) = refused(&cluster, VAULT, &words);
        assert!(code == Some(1) && said.contains("KiB of memory in"), "{said}");
    }
    // Two administrators at once: one is told.
    let stale = SetVolumeKeysRequest { volume: VAULT.into(), version, key_ring: own.clone() };
    let told = cluster.admin().call(async |client| client.set_volume_keys(stale).await);
    assert!(told.expect_err("stale").contains("another has changed the key slots"));
    set_ring(&cluster, VAULT, &own);
    cluster.mount_volume(VAULT, &["-o", &words]).unmount();
}

/// All files below `folder`.
fn files(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("an entry").path();
        let kind = fs::symlink_metadata(&path).expect("metadata").file_type();
        if kind.is_dir() {
            files(&path, found);
        } else if kind.is_file() {
            found.push(path);
        }
    }
}

fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let bits = |at: usize| {
        (0..6).fold(0, |value, bit| {
            let bit = at * 6 + bit;
            let byte = bytes.get(bit / 8).copied().unwrap_or(0);
            value << 1 | usize::from(byte >> (7 - bit % 8) & 1)
        })
    };
    // Without the end, which depends on what follows.
    (0..bytes.len() * 8 / 6).map(|at| char::from(DIGITS[bits(at)])).collect()
}

/// Which of these lie in some file of the cluster, apart from the files of `skip`.
fn seen<'n>(
    cluster: &Cluster,
    needles: &BTreeMap<&'n str, Vec<u8>>,
    skip: &[&str],
) -> BTreeMap<&'n str, Vec<PathBuf>> {
    let mut all = Vec::new();
    files(Path::new(&cluster.at("")), &mut all);
    let skip: Vec<PathBuf> = skip.iter().map(PathBuf::from).collect();
    all.retain(|path| !skip.contains(path));
    let mut found: BTreeMap<&str, Vec<PathBuf>> = BTreeMap::new();
    for path in all {
        let bytes = fs::read(&path).unwrap_or_default();
        for (name, needle) in needles {
            if memmem(&bytes, needle) {
                found.entry(name).or_default().push(path.clone());
            }
        }
    }
    found
}

fn memmem(bytes: &[u8], needle: &[u8]) -> bool {
    let (first, rest) = needle.split_first().expect("not empty");
    let mut at = 0;
    while let Some(next) = bytes[at..].iter().position(|byte| byte == first) {
        at += next + 1;
        if bytes[at..].starts_with(rest) {
            return true;
        }
    }
    false
}

/// The thief with a provider's disk, the curious directory, whoever reads the logs; and all that keeps
/// bytes safe, without a key.
#[test]
fn nobody_else_learns_a_byte_and_everything_works_without_the_key() {
    if !fuse_is_here() {
        return;
    }
    // Everything is old enough for the trash.
    let directory = &["--trash-age-ms", "0"];
    let shape = Shape { providers: 5, code: "2+1", directory, ..Shape::default() };
    let mut cluster = Cluster::start_logging(shape, "debug");
    let right = secret_file(&cluster, "right", PASSPHRASE);
    let (key, recovery) = (cluster.at("key"), cluster.at("recovery"));
    let opened = ["--new-key-file", &key, "--recovery-key-file", &recovery, "--code", "2+1"];
    create(&cluster, &opened);
    let add = ["add", "--key-file", &key, "--new-passphrase-file", &right];
    assert_eq!(keys(&cluster, &add).0, 0);
    let words = with("passphrase_file", &right);
    let mount = cluster.mount_volume(VAULT, &["-o", &words]);
    write_everything(mount.path());
    let removed = mount.path().join(format!("{MARKER}-removed"));
    fs::write(&removed, noise(5, 300_000)).expect("a write");
    File::open(&removed).and_then(|file| file.sync_all()).expect("a sync");
    cluster.wait_settled();

    // The trash: names come with the key, and with nothing else.
    fs::remove_file(mount.path().join(format!("{MARKER}-removed"))).expect("rm");
    let list = ["trash", "list", VAULT, "--json", "--passphrase-file", &right];
    let listed = poll::until("what was removed is listed", PATIENCE, || {
        let listed: Value = serde_json::from_str(&cluster.usctl(&list)).expect("JSON");
        let path = listed[0]["path"].as_str().map(str::to_owned);
        path.ok_or(listed.to_string())
    });
    assert_eq!(listed, format!("{MARKER}-removed"));
    let (code, _) = cluster.usctl_code(&["trash", "list", VAULT]);
    assert_eq!(code, 64);
    assert_eq!(cluster.usctl_code(&["trash", "list"]).0, 0, "the others can be listed");
    let wrong = secret_file(&cluster, "wrong", "not the passphrase");
    let mut other = list;
    other[5] = &wrong;
    assert_eq!(cluster.usctl_code(&other).0, 77);
    cluster.usctl(&["trash", "restore", VAULT, &listed, "--key-file", &key]);
    let back = fs::read(mount.path().join(&listed)).expect("it is back");
    assert!(back == noise(5, 300_000));
    fs::remove_file(mount.path().join(&listed)).expect("rm");
    poll::until("it is purged by its age alone", PATIENCE, || {
        let purge = ["trash", "purge", VAULT, "--all", "--yes", "--json"];
        let (code, text) = cluster.usctl_code(&purge);
        let purged: Value = serde_json::from_str(&text).unwrap_or_default();
        (code == 0 && purged["files"] == 1).then_some(()).ok_or(text)
    });

    // Repair, scrub and fsck see no key.
    assert_eq!(cluster.usctl_code(&["fsck"]).0, 0);
    cluster.kill_provider(0);
    let status = cluster.admin().status().expect("a status");
    let lost = provider(&status, "provider0").expect("it is known").provider.to_string();
    cluster.usctl(&["give-up", &lost, "--yes"]);
    cluster.usctl(&["scrub"]);
    let mut admin = cluster.admin();
    poll::until("repaired", PATIENCE * 3, || is_whole(&admin.status()?, 1));
    read_everything(mount.path());
    mount.unmount();

    // The directory is lost and rebuilt: the slots are there.
    cluster.wait_copies(2);
    cluster.lose_directory();
    cluster.restore_directory(1);
    cluster.start_directory();
    let mount = cluster.mount_volume(VAULT, &["-o", &with("recovery_key_file", &recovery)]);
    read_everything(mount.path());
    mount.unmount();

    // Who looks at every disk and every log finds nothing; but what is no secret is found by the same
    // search: the volume's name, and the key of the managed volume, at the directory.
    let reply = reply(&cluster, VAULT);
    let ring = KeyRing::decode(&reply.key_ring).expect("a ring");
    let secret = SlotSecret::Passphrase(PASSPHRASE.as_bytes().to_vec().into());
    let volume_key = ring.open(&secret).expect("the key").0.expose().to_vec();
    let key_file = fs::read(&key).expect("a key file");
    let recovery_text = fs::read_to_string(&recovery).expect("a key").trim().to_owned();
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let needles = BTreeMap::from([
        ("the passphrase", PASSPHRASE.as_bytes().to_vec()),
        ("the passphrase in hex", hex(PASSPHRASE.as_bytes()).into_bytes()),
        ("the passphrase in base64", base64(PASSPHRASE.as_bytes()).into_bytes()),
        ("the volume key", volume_key.clone()),
        ("the volume key in hex", hex(&volume_key).into_bytes()),
        ("the volume key in base64", base64(&volume_key).into_bytes()),
        ("the volume key as debug shows it", format!("{volume_key:?}").into_bytes()),
        ("the key file", key_file.clone()),
        ("the key file in hex", hex(&key_file).into_bytes()),
        ("the recovery key", recovery_text.into_bytes()),
    ]);
    let own = [right.as_str(), &key, &recovery];
    assert_eq!(seen(&cluster, &needles, &own), BTreeMap::new());
    // At this level the mounts' own logs name files; nobody else's do.
    let logs: Vec<String> = (0..3).map(|mount| cluster.at(&format!("mount{mount}.log"))).collect();
    let logs: Vec<&str> = logs.iter().map(String::as_str).collect();
    let plain = BTreeMap::from([("names and contents", MARKER.as_bytes().to_vec())]);
    assert_eq!(seen(&cluster, &plain, &logs), BTreeMap::new());
    let open = BTreeMap::from([("the volume's name", VAULT.as_bytes().to_vec())]);
    let found = seen(&cluster, &open, &[]);
    let directory = PathBuf::from(cluster.at("directory"));
    assert!(found.values().flatten().any(|path| path.starts_with(&directory)), "{found:?}");
}
