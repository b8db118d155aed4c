//! Grants judged: who, what, when.

use proptest::prelude::*;
use us_core::grant::GrantKey;
use us_core::seal::Secret;
use us_core::tls::KeyHash;

use super::*;

const CLUSTER: ClusterId = ClusterId::from_bytes([1; 16]);
const VOLUME: VolumeId = VolumeId::from_bytes([2; 16]);
const PERIOD_MS: u64 = 1000;

fn key(byte: u8) -> GrantKey {
    GrantKey::of(&Secret::from_bytes([byte; 32].into()), CLUSTER)
}

fn peer(role: Role, byte: u8) -> PeerIdentity {
    let key_hash = KeyHash::from_bytes([byte; 32]);
    PeerIdentity { role, name: "somebody".to_owned(), cluster: CLUSTER, key_hash }
}

fn told(period: u64) -> Told {
    let key = key(1).public();
    Told { key, cluster: CLUSTER, incarnation: 1, period, period_ms: PERIOD_MS }
}

fn grant(rights: Rights, from: u64) -> Grant {
    Grant {
        cluster: CLUSTER,
        volume: VOLUME,
        block: None,
        holder: KeyHash::from_bytes([7; 32]),
        rights,
        incarnation: 1,
        from,
        until: from + 4,
        serial: 1,
    }
}

fn grants(period: u64) -> (tempfile::TempDir, Grants) {
    let dir = tempfile::tempdir().unwrap();
    let grants = Grants::load(dir.path());
    grants.told(told(period)).unwrap();
    (dir, grants)
}

#[test]
fn only_the_holder_with_the_right_may() {
    let (_dir, grants) = grants(10);
    let client = peer(Role::Client, 7);
    let read = key(1).sign(&grant(Rights::Read, 10));
    let write = key(1).sign(&grant(Rights::ReadWrite, 10));
    let admitted = grants.admit(&client, &write, Rights::ReadWrite).unwrap();
    let block = BlockId::from_bytes([3; 16]);
    assert_eq!(admitted.covers(VOLUME, block), Ok(()));
    assert_eq!(admitted.covers(VolumeId::from_bytes([9; 16]), block), Err(Denied::Elsewhere));
    assert!(grants.admit(&client, &read, Rights::Read).is_ok());
    assert_eq!(grants.admit(&client, &read, Rights::ReadWrite), Err(Denied::ReadOnly));
    assert_eq!(grants.admit(&client, &Bytes::new(), Rights::Read), Err(Denied::Missing));
    let other = peer(Role::Client, 8);
    assert_eq!(grants.admit(&other, &write, Rights::Read), Err(Denied::Holder));
    let forged = Err(Denied::Forged(GrantError::Signature));
    let stranger = key(2).sign(&grant(Rights::ReadWrite, 10));
    assert_eq!(grants.admit(&client, &stranger, Rights::Read), forged);
    let mut altered = read.to_vec();
    altered[120] = 3;
    assert_eq!(grants.admit(&client, &altered.into(), Rights::Read), forged);
    let abroad = Grant { cluster: ClusterId::from_bytes([5; 16]), ..grant(Rights::Read, 10) };
    let abroad = key(1).sign(&abroad);
    assert_eq!(grants.admit(&client, &abroad, Rights::Read), Err(Denied::Cluster));
}

#[test]
fn providers_read_with_a_grant_and_never_put() {
    let (_dir, grants) = grants(10);
    let write = key(1).sign(&grant(Rights::ReadWrite, 10));
    let provider = peer(Role::Provider, 7);
    assert!(grants.admit(&provider, &write, Rights::Read).is_ok());
    assert_eq!(
        grants.admit(&provider, &write, Rights::ReadWrite),
        Err(Denied::Role { role: Role::Provider })
    );
    let admin = peer(Role::Admin, 7);
    assert_eq!(grants.admit(&admin, &write, Rights::Read), Err(Denied::Role { role: Role::Admin }));
    let directory = peer(Role::Directory, 9);
    let all = grants.admit(&directory, &Bytes::new(), Rights::ReadWrite);
    assert_eq!(all, Ok(Admitted::Everything));
}

#[test]
fn a_provider_that_was_told_nothing_moves_nothing_and_one_that_was_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let client = peer(Role::Client, 7);
    let present = key(1).sign(&grant(Rights::Read, 100));
    let grants = Grants::load(dir.path());
    assert_eq!(grants.admit(&client, &present, Rights::Read), Err(Denied::NotTold));
    grants.told(told(100)).unwrap();
    drop(grants);
    // Another start, no directory.
    let grants = Grants::load(dir.path());
    assert!(grants.admit(&client, &present, Rights::Read).is_ok());
    let ended = key(1).sign(&grant(Rights::Read, 90));
    let refused = grants.admit(&client, &ended, Rights::Read);
    assert!(matches!(refused, Err(Denied::Expired { until: 94, .. })), "{refused:?}");
    // A damaged file is as none.
    std::fs::write(dir.path().join("grants"), b"damaged").unwrap();
    let grants = Grants::load(dir.path());
    assert_eq!(grants.admit(&client, &present, Rights::Read), Err(Denied::NotTold));
}

/// A start without the directory began again at the period that was told last: what had ended since was
/// honoured anew, after each start.
#[test]
fn what_ended_before_a_start_stays_ended() {
    let (dir, grants) = grants(10);
    let client = peer(Role::Client, 7);
    let ended = key(1).sign(&grant(Rights::Read, 10));
    let later = key(1).sign(&grant(Rights::Read, 12));
    let now_ms = boottime_ms();
    grants.keep(now_ms + 5 * PERIOD_MS).unwrap();
    drop(grants);
    for start in 0..3 {
        let grants = Grants::load(dir.path());
        let refused = grants.admit(&client, &ended, Rights::Read);
        assert_eq!(refused, Err(Denied::Expired { until: 14, present: 15 }), "start {start}");
        assert!(grants.admit(&client, &later, Rights::Read).is_ok(), "start {start}");
    }
    // The directory's word counts all the same: its time stood still.
    let grants = Grants::load(dir.path());
    grants.told(told(13)).unwrap();
    assert!(grants.admit(&client, &ended, Rights::Read).is_ok());
    assert!(Grants::load(dir.path()).admit(&client, &ended, Rights::Read).is_ok());
}

#[test]
fn a_period_is_written_once() {
    let (dir, grants) = grants(10);
    let now_ms = boottime_ms();
    let path = dir.path().join("grants");
    std::fs::remove_file(&path).unwrap();
    grants.keep(now_ms).unwrap();
    assert!(!path.exists(), "what is written is not written again");
    grants.keep(now_ms + PERIOD_MS).unwrap();
    assert_eq!(decode_told(&std::fs::read(&path).unwrap()), Some(told(11)));
    // A disk that fails once is tried again.
    std::fs::remove_dir_all(dir.path()).unwrap();
    assert!(grants.keep(now_ms + 2 * PERIOD_MS).is_err());
    std::fs::create_dir(dir.path()).unwrap();
    grants.keep(now_ms + 2 * PERIOD_MS).unwrap();
    assert_eq!(decode_told(&std::fs::read(&path).unwrap()), Some(told(12)));
}

#[test]
fn time_passes_on_the_own_clock_and_the_directory_has_the_last_word() {
    let mut judge = Judge::new(told(10), 5_000);
    let client = peer(Role::Client, 7);
    let good = grant(Rights::Read, 10);
    let at = |judge: &Judge, now_ms| judge.judge(&good, &client, Rights::Read, now_ms);
    assert_eq!(at(&judge, 5_000), Ok(()));
    assert_eq!(at(&judge, 5_000 + 5 * PERIOD_MS - 1), Ok(()), "the last of its periods");
    let ended = Denied::Expired { until: 14, present: 15 };
    assert_eq!(at(&judge, 5_000 + 5 * PERIOD_MS), Err(ended));
    // The directory was away, its time stood still: what it says counts.
    assert_eq!(at(&Judge::new(told(12), 50_000), 50_000), Ok(()));
    // A later grant shows that time went on; an earlier one shows nothing.
    judge.learn(&grant(Rights::Read, 9), 5_000);
    assert_eq!(judge.present(5_000), 10);
    judge.learn(&grant(Rights::Read, 20), 5_000);
    assert_eq!((judge.present(5_000), judge.present(5_000 + PERIOD_MS)), (20, 21));
    assert!(at(&judge, 5_000).is_err());
    // A restored directory's grants void those from before, whatever their numbers.
    let restored = Grant { incarnation: 2, ..grant(Rights::Read, 3) };
    judge.learn(&restored, 6_000);
    assert_eq!(judge.present(6_000), 3);
    assert_eq!(judge.judge(&restored, &client, Rights::Read, 6_000), Ok(()));
    let before = judge.judge(&grant(Rights::Read, 20), &client, Rights::Read, 6_000);
    assert!(matches!(before, Err(Denied::Expired { .. })), "{before:?}");
}

/// The file as the first version wrote it.
#[test]
fn the_file_stays() {
    let told =
        Told { key: [0x11; 32], incarnation: 2, period: 0x0304, period_ms: 60_000, ..told(0) };
    let mut expected = b"UsGrnt\x01\x00".to_vec();
    expected.extend_from_slice(&[0x11; 32]);
    expected.extend_from_slice(&[1; 16]);
    expected.extend_from_slice(&[2, 0, 0, 0, 0, 0, 0, 0, 4, 3, 0, 0, 0, 0, 0, 0]);
    expected.extend_from_slice(&[0x60, 0xea, 0, 0, 0, 0, 0, 0]);
    let sum = us_core::fragment::crc32c(&expected);
    expected.extend_from_slice(&sum.to_le_bytes());
    assert_eq!(encode_told(&told), expected);
}

proptest! {
    #[test]
    fn what_was_told_comes_back_and_other_bytes_do_not(
        numbers in any::<[u64; 2]>(), period_ms in 1u64.., at in 0usize..84, noise: Vec<u8>,
    ) {
        let [incarnation, period] = numbers;
        let told = Told { incarnation, period, period_ms, ..told(0) };
        let mut bytes = encode_told(&told);
        prop_assert_eq!(decode_told(&bytes), Some(told));
        bytes[at] ^= 1;
        prop_assert_eq!(decode_told(&bytes), None);
        let _ = decode_told(&noise);
    }
}
