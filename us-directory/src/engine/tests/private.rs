//! Private volumes: rings come and go whole, and no key is here.

use us_core::ids::VolumeId;

use super::*;

fn create(name: &str, volume: VolumeId, key_ring: &[u8]) -> NewVolume {
    let key_ring = Bytes::copy_from_slice(key_ring);
    let private = Some(PrivateVolume { volume, key_ring });
    NewVolume { private, ..NewVolume::named(name, 4, 2) }
}

fn keys(world: &mut World, volume: &str) -> VolumeKeysReply {
    let asker = Peer { admin: true, ..Peer::default() };
    match world.ask(Question::VolumeKeys { volume: volume.to_owned(), asker }) {
        Answer::VolumeKeys(keys) => keys,
        other => panic!("{other:?}"),
    }
}

fn set(world: &mut World, volume: &str, version: u64, key_ring: &[u8]) -> Answer {
    let (volume, key_ring) = (volume.to_owned(), Bytes::copy_from_slice(key_ring));
    world.ask(Question::SetVolumeKeys { volume, version, key_ring })
}

fn refusal(answer: Answer) -> RefusalKind {
    match answer {
        Answer::Refused { kind, .. } => kind,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_private_volume_has_a_ring_and_no_key() {
    let mut world = World::new();
    let id = VolumeId::from_bytes([9; 16]);
    let made = world.ask(create("vault", id, b"ring").into());
    assert!(matches!(made, Answer::Volume(VolumeInfo { private: true, .. })), "{made:?}");
    world.volume("disk", 4, 2);
    let open = OpenSession { volume: "vault".into(), ..Default::default() };
    let conn = world.dial(1, open);
    match world.hear(conn) {
        Down::Opened(opened) => {
            assert_eq!((opened.volume.as_ref(), opened.volume_key.len()), (&[9; 16][..], 0));
        }
        other => panic!("{other:?}"),
    }
    let known = keys(&mut world, "vault");
    assert_eq!((known.private, known.version, known.key_ring.as_ref()), (true, 1, &b"ring"[..]));
    assert_eq!(known, keys(&mut world, &id.to_string()), "by its id too");
    let managed = keys(&mut world, "disk");
    assert_eq!((managed.private, managed.version, managed.key_ring.len()), (false, 0, 0));

    // Only a ring that follows the one that is there, and only of a private volume.
    let second = set(&mut world, "vault", 1, b"second");
    assert!(matches!(second, Answer::VolumeKeys(VolumeKeysReply { version: 2, .. })));
    assert_eq!(refusal(set(&mut world, "vault", 1, b"other")), RefusalKind::Busy);
    assert_eq!(refusal(set(&mut world, "disk", 0, b"ring")), RefusalKind::Invalid);
    assert_eq!(refusal(set(&mut world, "none", 1, b"ring")), RefusalKind::NotFound);
    assert_eq!(refusal(set(&mut world, "vault", 2, b"")), RefusalKind::Invalid);
    let large = vec![0; us_core::keyring::RING_BYTES_MAX + 1];
    assert_eq!(refusal(set(&mut world, "vault", 2, &large)), RefusalKind::Invalid);
    // An id is one volume's, and none is the cluster's own.
    assert_eq!(refusal(world.ask(create("again", id, b"ring").into())), RefusalKind::Exists);
    for own in [VolumeId::from_bytes([0; 16]), crate::recovery::image_volume(&[7; 16])] {
        assert_eq!(refusal(world.ask(create("own", own, b"ring").into())), RefusalKind::Exists);
    }
    let none = VolumeId::from_bytes([8; 16]);
    assert_eq!(refusal(world.ask(create("none", none, b"").into())), RefusalKind::Invalid);

    world.restart(0);
    let known = keys(&mut world, "vault");
    assert_eq!((known.version, known.key_ring.as_ref()), (2, &b"second"[..]));
}

/// The ring lets whoever has it try passphrases: it is for those who may open the volume.
#[test]
fn a_key_ring_is_for_those_the_volume_was_given_to() {
    let mut world = World::new();
    let maker = Some(Peer { admin: true, ..Peer::default() });
    let access = vec![VolumeAccess { key_hash: vec![7; 32].into(), read_only: true }];
    let volume = create("p", VolumeId::from_bytes([5; 16]), b"ring");
    let made = world.ask(NewVolume { maker, access, ..volume }.into());
    assert!(matches!(made, Answer::Volume(_)));
    let mut ask = |key: u8| {
        let asker = Peer { key_hash: vec![key; 32], ..Peer::default() };
        world.ask(Question::VolumeKeys { volume: "p".to_owned(), asker })
    };
    assert!(matches!(ask(7), Answer::VolumeKeys(_)), "it may read");
    assert!(matches!(ask(8), Answer::Refused { kind: RefusalKind::Denied, .. }));
}
