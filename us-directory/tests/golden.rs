//! What a restore reads, of format 1: it must load for ever, and be written as it was.
//!
//! `US_UPDATE_GOLDEN=1 cargo test -p us-directory --test golden` writes the samples of a new format;
//! never over an old one's.

#![expect(clippy::unwrap_used, reason = "a test: a failure is to stop it where it happens")]

use std::path::{Path, PathBuf};

use us_core::tls::CertificateAuthority;
use us_directory::backup::{BackupError, BackupWriter, read_backup};
use us_directory::image::{ImageWriter, RunRange};
use us_directory::recovery::{RecoveryKit, RunLabel, RunSeal, open_root, seal_root};
use us_directory::store::WriteBatch;

fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden").join(name)
}

fn updating() -> bool {
    std::env::var_os("US_UPDATE_GOLDEN").is_some()
}

fn kit() -> RecoveryKit {
    static ONE_AT_A_TIME: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let _turn = ONE_AT_A_TIME.lock().unwrap();
    let path = path("recovery-1.key");
    if updating() && !path.exists() {
        RecoveryKit::new(CertificateAuthority::create().unwrap()).save(&path).unwrap();
    }
    RecoveryKit::load(&path).unwrap()
}

fn check(name: &str, bytes: &[u8]) {
    if updating() {
        std::fs::write(path(name), bytes).unwrap();
    }
    assert!(bytes == std::fs::read(path(name)).unwrap(), "{name}: the format changed: new version");
}

fn batch() -> WriteBatch {
    let mut batch = WriteBatch::new();
    batch.put(b"a key".to_vec().into(), b"its value".to_vec().into());
    batch.put(b"another".to_vec().into(), vec![7; 300].into());
    batch.delete(b"gone".to_vec().into());
    batch
}

#[test]
fn keys_are_written_as_they_were() {
    let kit = kit();
    let text = std::fs::read_to_string(path("recovery-1.key")).unwrap();
    assert!(*kit.to_text() == text);
}

#[test]
fn backups_and_the_image_streams_in_them() {
    let kit = kit();
    let mut stream = ImageWriter::new(3, 9);
    stream.push(&batch());
    stream.finish();
    let mut writer = BackupWriter::new(Vec::new(), &kit.cluster(), kit.secret(), [5; 16]).unwrap();
    writer.push(&stream.take_rest()).unwrap();
    check("backup-1.bin", &writer.finish().unwrap());
    let mut found = Vec::new();
    let range = read_backup(&std::fs::read(path("backup-1.bin")).unwrap()[..], &kit, |batch| {
        found.push(batch);
        Ok::<_, BackupError>(())
    });
    assert_eq!(range.unwrap(), RunRange { first_seq: 3, last_seq: 9 });
    assert_eq!(found, [batch()]);
}

#[test]
fn roots_and_records() {
    let kit = kit();
    let label = RunLabel { incarnation: 2, run: 7, first_seq: 100, salt: [6; 16] };
    let seal = RunSeal::new(kit.secret(), label);
    let part = seal.seal(101, b"a record's body").remove(0);
    let root = seal_root(kit.secret(), [4; 16], b"a manifest");
    check("root-1.bin", &root);
    check("record-1.bin", &part.sealed);
    let opened = open_root(kit.secret(), &std::fs::read(path("root-1.bin")).unwrap());
    assert_eq!(opened.as_deref(), Some(&b"a manifest"[..]));
    assert_eq!(seal.open(&part).as_deref(), Some(&b"a record's body"[..]));
}
