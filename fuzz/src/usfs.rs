//! What the fuzzer, and the ordinary tests, do with texts nobody vouches for: one function for each
//! parser of `usfs`. Each must return, whatever the bytes: no panic, no overflow, no large
//! allocation.
//!
//! `usfs/tests/decoders.rs` runs each over its seeds and random bytes; the targets in
//! `fuzz_targets/` run them under libFuzzer.

use bytes::Bytes;
use us_core::disk::BlockInfo;
use us_core::ids::BlockId;
use usfs::core::acl::Acl;
use usfs::fuse::kernel::parse_mount;
use usfs::mount::Options;
use usfs::places::{UpRecord, parse_pids};

/// A parser's target, by the name under which its seeds lie in `fuzz/seeds/`.
pub type Target = (&'static str, fn(&[u8]));

/// All targets of this file.
pub const TARGETS: [Target; 5] = [
    ("mount_options", mount_options),
    ("mount_table", mount_table),
    ("up_files", up_files),
    ("block_info", block_info),
    ("acl", acl),
];

/// What `-o` gives.
pub fn mount_options(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    match Options::parse(&[text.to_owned()]) {
        Ok(options) => {
            let twice = Options::parse(&[text.to_owned(), text.to_owned()]);
            assert_eq!(twice, Ok(options), "said twice is said once");
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

/// Lines of the kernel's table of mounts.
pub fn mount_table(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    for line in text.lines() {
        if let Some(entry) = parse_mount(line) {
            assert!(!entry.device.contains(' ') && !entry.kind.contains(' '));
        }
    }
}

/// The files `up.json` and `pids` of `usfs up`.
pub fn up_files(bytes: &[u8]) {
    if let Some(pids) = parse_pids(bytes) {
        let text = serde_json::to_vec(&pids).expect("a map of numbers");
        assert_eq!(parse_pids(&text), Some(pids));
    }
    if let Some(record) = UpRecord::parse(bytes) {
        let text = serde_json::to_vec(&record).expect("paths that were text");
        assert_eq!(UpRecord::parse(&text), Some(record));
    }
}

/// What the directory says of a block.
pub fn block_info(bytes: &[u8]) {
    let Ok(message) = prost::Message::decode(Bytes::copy_from_slice(bytes)) else { return };
    block_of(&message);
    let block = Bytes::copy_from_slice(BlockId::from_bytes([7; 16]).as_bytes());
    block_of(&us_proto::v1::BlockInfo { block, fingerprint_hash: vec![1; 32].into(), ..message });
}

fn block_of(message: &us_proto::v1::BlockInfo) {
    let Some(info) = BlockInfo::from_proto(message) else { return };
    assert_eq!(info.plaintext_bytes(), message.plaintext_bytes as usize);
    assert!(info.inline.is_some() || info.providers.len() == info.geometry.code().fragments());
}

/// The value of an attribute that is to be a POSIX ACL.
pub fn acl(bytes: &[u8]) {
    let Some(acl) = Acl::parse(bytes) else { return };
    let encoded = acl.to_bytes();
    // Bits of permissions that do not exist are dropped.
    assert_eq!(encoded.len(), bytes.len());
    assert_eq!(Acl::parse(&encoded).as_ref(), Some(&acl));
    assert!(acl.mode() <= 0o777);
    let _ = acl.is_mode_only();
}
