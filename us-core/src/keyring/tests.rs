//! Rings open with what they were made with, and with nothing else.

use proptest::prelude::*;

use super::*;
use crate::fragment::crc32c;

/// As cheap as argon2id takes it: what is tested is not how long it takes.
const CHEAP: Cost = Cost { memory_kib: 8, passes: 1, lanes: 1 };

fn passphrase(text: &str) -> SlotSecret {
    SlotSecret::Passphrase(Zeroizing::new(text.as_bytes().to_vec()))
}

fn new(secret: &SlotSecret) -> NewSlot<'_> {
    NewSlot { secret, label: "laptop", cost: CHEAP, unix_s: 7 }
}

/// A ring with one slot of each kind, its key, and what opens them.
fn ring() -> (KeyRing, VolumeKey, [SlotSecret; 3]) {
    let secrets = [
        passphrase("correct horse"),
        SlotSecret::KeyFile(Zeroizing::new([9; 32])),
        SlotSecret::Recovery(RecoveryKey::generate()),
    ];
    let (mut ring, key) = (KeyRing::new(VolumeId::generate()), VolumeKey::generate());
    for (at, secret) in secrets.iter().enumerate() {
        assert_eq!(ring.add(&key, &new(secret)).unwrap(), at as u32 + 1);
    }
    (ring, key, secrets)
}

fn wrong(kind: SlotKind) -> KeyRingError {
    KeyRingError::Wrong { kind }
}

#[test]
fn each_secret_opens_its_slot_and_no_other_secret_does() {
    let (ring, key, secrets) = ring();
    let ring = KeyRing::decode(&ring.encode()).unwrap();
    for (at, secret) in secrets.iter().enumerate() {
        let (opened, slot) = ring.open(secret).unwrap();
        assert_eq!((opened.expose(), slot), (key.expose(), at as u32 + 1));
    }
    let others = [
        passphrase("Correct horse"),
        passphrase(""),
        SlotSecret::KeyFile(Zeroizing::new([8; 32])),
        SlotSecret::Recovery(RecoveryKey::generate()),
    ];
    for other in &others {
        assert_eq!(ring.open(other).err(), Some(wrong(other.kind())));
    }
    // The same bytes as another kind of secret are another secret.
    assert!(ring.open(&SlotSecret::Passphrase(Zeroizing::new(vec![9; 32]))).is_err());
    assert!(!format!("{ring:?} {secrets:?} {key:?}").contains("horse"));
}

#[test]
fn a_ring_of_another_volume_opens_nothing() {
    let (mut ring, _, secrets) = ring();
    ring.volume = VolumeId::generate();
    for secret in &secrets {
        assert_eq!(ring.open(secret).err(), Some(wrong(secret.kind())));
    }
}

#[test]
fn what_a_slot_says_of_itself_is_bound() {
    let (ring, _, secrets) = ring();
    let changes: [fn(&mut KeySlot); 5] = [
        |slot| slot.id += 10,
        |slot| slot.label = "attic".into(),
        |slot| slot.made_unix_s += 1,
        |slot| slot.salt[0] ^= 1,
        |slot| slot.wrapped[47] ^= 1,
    ];
    for change in changes {
        let mut changed = ring.clone();
        changed.slots.iter_mut().for_each(change);
        for secret in &secrets {
            assert_eq!(changed.open(secret).err(), Some(wrong(secret.kind())));
        }
    }
    let mut cheaper = ring;
    cheaper.slots[0].cost.memory_kib *= 2;
    assert_eq!(cheaper.open(&secrets[0]).err(), Some(wrong(SlotKind::Passphrase)));
}

#[test]
fn slots_come_and_go_and_the_last_stays() {
    let (mut ring, key, secrets) = ring();
    assert_eq!(ring.remove(7), Err(KeyRingError::NoSlot { slot: 7 }));
    assert_eq!(ring.remove(1).unwrap().kind(), SlotKind::Passphrase);
    assert!(ring.open(&secrets[0]).is_err() && ring.open(&secrets[1]).is_ok());
    let again = passphrase("another");
    assert_eq!(ring.add(&key, &new(&again)), Ok(4));
    assert_eq!(ring.open(&again).unwrap().0.expose(), key.expose());
    ring.remove(2).unwrap();
    ring.remove(3).unwrap();
    assert_eq!(ring.remove(4), Err(KeyRingError::Last));
    let long = "x".repeat(65);
    for label in [long.as_str(), "a\nb"] {
        assert_eq!(ring.add(&key, &NewSlot { label, ..new(&again) }), Err(KeyRingError::Label));
    }
    let file = SlotSecret::KeyFile(Zeroizing::new([1; 32]));
    while ring.slots().len() < SLOTS_MAX {
        ring.add(&key, &new(&file)).unwrap();
    }
    assert_eq!(ring.add(&key, &new(&file)), Err(KeyRingError::Full));
    assert_eq!(KeyRing::decode(&ring.encode()), Ok(ring));
}

/// The bytes with their sum put right.
fn mended(mut bytes: Vec<u8>) -> Vec<u8> {
    let end = bytes.len() - 4;
    let sum = crc32c(&bytes[..end]);
    bytes[end..].copy_from_slice(&sum.to_le_bytes());
    bytes
}

/// A directory could have every mount take all its memory, or work for a year.
#[test]
fn absurd_costs_are_refused_before_they_are_paid() {
    let (ring, key, secrets) = ring();
    let good = ring.encode();
    for (at, value) in
        [(36, u32::MAX), (36, MEMORY_KIB_MAX + 1), (36, 7), (40, 17), (40, 0), (44, 5)]
    {
        let mut bytes = good.clone();
        bytes[at..at + 4].copy_from_slice(&u32::to_le_bytes(value));
        let refused = KeyRing::decode(&mended(bytes));
        assert!(matches!(refused, Err(KeyRingError::Cost { .. })), "{at} {value}: {refused:?}");
    }
    // Each slot alone is affordable, all together are not.
    let mut many = KeyRing::new(ring.volume());
    for _ in 0..2 {
        many.add(&key, &new(&secrets[0])).unwrap();
    }
    many.slots.iter_mut().for_each(|slot| {
        slot.cost = Cost { memory_kib: MEMORY_KIB_MAX, passes: 9, lanes: 1 };
    });
    assert!(matches!(KeyRing::decode(&many.encode()), Err(KeyRingError::Cost { .. })));
    let greedy = Cost { passes: 17, ..CHEAP };
    let refused = many.add(&key, &NewSlot { cost: greedy, ..new(&secrets[0]) });
    assert!(matches!(refused, Err(KeyRingError::Cost { .. })));
    assert!(Cost::NEW.check().is_ok());
}

#[test]
fn a_ring_is_whole_or_none() {
    let good = ring().0.encode();
    assert!(good.len() <= RING_BYTES_MAX);
    for cut in 0..good.len() {
        assert!(KeyRing::decode(&good[..cut]).is_err());
    }
    for at in 0..good.len() {
        let mut bytes = good.clone();
        bytes[at] ^= 0x10;
        assert!(KeyRing::decode(&bytes).is_err(), "byte {at}");
    }
    let mut later = good.clone();
    later[8] = 2;
    assert_eq!(KeyRing::decode(&mended(later)), Err(KeyRingError::Version { version: 2 }));
    let mut twice = good.clone();
    let second = 28 + 60 + 6 + 48;
    twice.copy_within(28..32, second);
    let refused = KeyRing::decode(&mended(twice));
    assert_eq!(refused, Err(KeyRingError::Format { detail: "two slots have one number" }));
    assert!(KeyRing::decode(&[good, vec![0]].concat()).is_err());
}

#[test]
fn a_recovery_key_is_read_as_people_type_it() {
    let key = RecoveryKey::generate();
    let text = key.to_text();
    assert_eq!((text.len(), text.matches('-').count()), (47, 7));
    let typed = text.to_lowercase().replace('-', " ").replace('0', "o").replace('1', "l");
    let read: RecoveryKey = typed.parse().unwrap();
    assert_eq!(read.expose(), key.expose());
    assert_eq!(text.replacen('-', "u", 1).parse::<RecoveryKey>().err(), {
        Some(RecoveryTextError::Character { found: 'u' })
    });
    let short = "ABCDE".parse::<RecoveryKey>();
    assert_eq!(short.err(), Some(RecoveryTextError::Length { digits: 5 }));
    let longer = format!("{}-ABCDE", *text).parse::<RecoveryKey>();
    assert_eq!(longer.err(), Some(RecoveryTextError::Length { digits: 45 }));
}

proptest! {
    #[test]
    fn a_recovery_key_survives_paper_and_no_slip_of_the_pen(
        secret: [u8; RECOVERY_BYTES], at in 0..40usize, by in 1..32usize,
    ) {
        let key = RecoveryKey::from_bytes(secret.into());
        let text = key.to_text();
        let read: RecoveryKey = text.parse().unwrap();
        prop_assert_eq!(read.expose(), &secret[..]);
        // One letter wrong is found, but for one in 2^24 of the slips that hit the secret.
        const DIGITS: &[u8] = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ";
        let mut bytes = text.as_bytes().to_vec();
        let place = at + at / 5;
        let digit = DIGITS.iter().position(|digit| *digit == bytes[place]).unwrap();
        bytes[place] = DIGITS[(digit + by) % 32];
        let slipped = String::from_utf8(bytes).unwrap();
        prop_assert_eq!(slipped.parse::<RecoveryKey>().err(), Some(RecoveryTextError::Check));
    }
}
