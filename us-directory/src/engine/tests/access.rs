//! Who may use a volume, and what grants say.

use us_core::grant::{Grant, GrantKey, Rights};
use us_core::ids::ClusterId;
use us_core::seal::Secret;

use super::*;

fn secret() -> Secret {
    Secret::from_bytes([9; 32].into())
}

fn key() -> [u8; 32] {
    GrantKey::of(&secret(), ClusterId::from_bytes([7; 16])).public()
}

/// A world with a closed volume "v" and six providers, that signs grants.
fn world() -> World {
    let mut world = World::new();
    world.engine.sign_grants(&secret()).unwrap();
    for key in 101..=106 {
        world.provider(key, Bytes::new());
    }
    let maker = Some(Peer { admin: true, ..Peer::default() });
    let made = Question::CreateVolume {
        name: "v".to_owned(),
        s: 4,
        r: 2,
        quota_bytes: 0,
        repair_at: None,
        trash_hours: None,
        maker,
        access: Vec::new(),
        private: None,
    };
    let Answer::Volume(info) = world.ask(made) else { panic!() };
    assert!(info.closed && info.access.is_empty());
    world
}

fn hex(key: u8) -> String {
    format!("{key:02x}").repeat(32)
}

fn set(world: &mut World, client: &str, level: AccessLevel) -> Answer {
    let (name, client) = ("v".to_owned(), client.to_owned());
    world.ask(Question::SetAccess { name, client, level })
}

fn allow(world: &mut World, client: &str, level: AccessLevel) -> VolumeInfo {
    match set(world, client, level) {
        Answer::Volume(info) => info,
        other => panic!("{other:?}"),
    }
}

fn refusal(answer: Answer) -> RefusalKind {
    match answer {
        Answer::Refused { kind, .. } => kind,
        other => panic!("{other:?}"),
    }
}

/// The first answer to a session that `key` wants.
fn try_open(world: &mut World, key: u8, read_only: bool) -> Result<SessionOpened, SessionEnded> {
    let open = OpenSession { volume: "v".to_owned(), read_only, ..Default::default() };
    let conn = world.dial(key, open);
    match world.hear(conn) {
        Down::Opened(opened) => Ok(opened),
        Down::Ended(ended) => Err(ended),
        other => panic!("{other:?}"),
    }
}

fn ended(world: &mut World, conn: u64) -> Option<SessionEnded> {
    world.hear_some(conn, |down| match down {
        Down::Ended(ended) => Some(ended.clone()),
        _ => None,
    })
}

#[test]
fn a_client_has_the_volumes_it_was_given_and_no_others() {
    let mut world = world();
    let refused = try_open(&mut world, 2, false).unwrap_err();
    assert_eq!(refused.reason(), EndReason::Denied);
    assert!(refused.detail.contains(&format!("usctl volume allow v {}", hex(2))), "{refused:?}");
    let info = allow(&mut world, &hex(2), AccessLevel::Write);
    assert_eq!(info.access, [VolumeAccess { key_hash: vec![2; 32].into(), read_only: false }]);
    let opened = try_open(&mut world, 2, false).unwrap();
    let grant = Grant::open(&opened.grant, &key()).unwrap();
    assert_eq!((grant.rights, grant.block), (Rights::ReadWrite, None));
    assert_eq!(grant.holder.as_bytes(), &[2; 32]);
    assert_eq!(grant.volume.as_bytes()[..], opened.volume[..]);
    assert!(try_open(&mut world, 3, true).is_err(), "another client");
    // Its trash names the files and their key.
    let asker = Peer { key_hash: vec![3; 32], ..Peer::default() };
    let look = |asker| Question::TrashBasis { volume: "v".to_owned(), asker };
    assert_eq!(refusal(world.ask(look(asker))), RefusalKind::Denied);
    let asker = Peer { key_hash: vec![2; 32], ..Peer::default() };
    assert!(matches!(world.ask(look(asker)), Answer::TrashBasis(_)));
    // An administrator has all; the list survives a restart.
    let (conn, peer) = (world.conn(), Peer { admin: true, ..Peer::default() });
    world.event(Event::SessionConnected { conn: ConnId(conn), peer });
    let open = OpenSession { volume: "v".to_owned(), ..Default::default() };
    world.says(conn, Up::Open(open));
    assert!(matches!(world.hear(conn), Down::Opened(_)));
    world.restart(0);
    assert!(try_open(&mut world, 3, false).is_err());
    assert!(try_open(&mut world, 2, false).is_ok());
}

#[test]
fn a_denied_client_is_out_at_once() {
    let mut world = world();
    allow(&mut world, &hex(2), AccessLevel::Write);
    allow(&mut world, &hex(3), AccessLevel::Write);
    let (mut two, mut three) = (world.open(2, "v"), world.open(3, "v"));
    assert_eq!(refusal(set(&mut world, "0202", AccessLevel::None)), RefusalKind::Invalid);
    assert_eq!(refusal(set(&mut world, "04040404", AccessLevel::None)), RefusalKind::NotFound);
    assert_eq!(refusal(set(&mut world, &hex(4), AccessLevel::None)), RefusalKind::NotFound);
    allow(&mut world, "02020202", AccessLevel::None);
    let end = ended(&mut world, two.conn).expect("its session ends");
    assert_eq!(end.reason(), EndReason::Denied);
    let again = two.resume(&mut world, "v");
    assert!(
        matches!(&again, Down::Ended(ended) if ended.reason() == EndReason::Denied),
        "{again:?}"
    );
    // The other's goes on.
    three.inode(&mut world, 1, Level::Exclusive).unwrap();
    let ino = three.ino();
    three.change(&mut world, vec![create(1, "a", ino, 0o100_644)]);
}

#[test]
fn one_that_may_read_changes_nothing_and_holds_nothing_for_itself() {
    let mut world = world();
    allow(&mut world, &hex(2), AccessLevel::Write);
    let two = world.open(2, "v");
    allow(&mut world, &hex(2), AccessLevel::Read);
    assert!(ended(&mut world, two.conn).is_some(), "it could write");
    let refused = try_open(&mut world, 2, false).unwrap_err();
    assert!(refused.detail.contains("-o ro"), "{refused:?}");
    let open = OpenSession { volume: "v".to_owned(), read_only: true, ..Default::default() };
    let asks = [
        Up::LeasePlacements(LeasePlacements { request: 1, count: 1 }),
        Up::LeaseInodes(LeaseInodes { request: 1, count: 1 }),
        Up::Batch(Batch {
            number: 1,
            mutations: vec![Mutation { op: Some(create(1, "a", 2, 0o100_644)) }],
            traces: Vec::new(),
        }),
    ];
    for ask in asks {
        let conn = world.dial(2, open.clone());
        let opened = world.hear(conn);
        let Down::Opened(opened) = opened else { panic!("{opened:?}") };
        assert_eq!(Grant::open(&opened.grant, &key()).unwrap().rights, Rights::Read);
        let want = Want::Inode(FetchInode { ino: 1, level: Level::Exclusive.to_wire() });
        let fetch = Fetch { request: 1, want: Some(want), trace: 0 };
        world.says(conn, Up::Fetch(fetch));
        let fetched = world.hear_some(conn, |down| match down {
            Down::Fetched(fetched) => Some(fetched.clone()),
            _ => None,
        });
        assert_eq!(fetched.unwrap().leases[0].level(), LeaseLevel::Shared);
        world.says(conn, ask);
        assert_eq!(ended(&mut world, conn).unwrap().reason(), EndReason::Refused);
    }
}

#[test]
fn a_volume_from_before_is_open_until_the_first_is_allowed() {
    let mut world = World::new();
    world.volume("v", 4, 2);
    assert!(try_open(&mut world, 2, false).is_ok());
    assert_eq!(refusal(set(&mut world, &hex(2), AccessLevel::None)), RefusalKind::Busy);
    let three = world.open(3, "v");
    assert!(allow(&mut world, &hex(2), AccessLevel::Write).closed);
    assert!(ended(&mut world, three.conn).is_some(), "it is for those it was given to");
    assert!(try_open(&mut world, 3, false).is_err());
    assert!(try_open(&mut world, 2, false).is_ok());
}

/// The grant in the answer to a renewal.
fn renewed(world: &mut World, conn: u64, refused: bool) -> Option<Grant> {
    world.says(conn, Up::Renew(Renew { grant: refused }));
    let renewed = world.hear_some(conn, |down| match down {
        Down::Renewed(renewed) => Some(renewed.grant.clone()),
        _ => None,
    });
    let grant = renewed.expect("an answer");
    (!grant.is_empty()).then(|| Grant::open(&grant, &key()).unwrap())
}

#[test]
fn grants_are_renewed_in_time_and_their_time_never_goes_back() {
    let mut world = world();
    allow(&mut world, &hex(2), AccessLevel::Write);
    let opened = try_open(&mut world, 2, false).unwrap();
    let conn = world.next_conn;
    let first = Grant::open(&opened.grant, &key()).unwrap();
    assert!(renewed(&mut world, conn, false).is_none(), "it is fresh");
    let asked = renewed(&mut world, conn, true).expect("a provider refused it");
    assert!(asked.serial > first.serial);
    // A third of its time later.
    let grant_ms = EngineConfig::default().grant_ms;
    let mut fresh = None;
    for _ in 0..30 {
        world.pass(grant_ms / 90 + 1);
        fresh = fresh.or(renewed(&mut world, conn, false));
    }
    let fresh = fresh.expect("a renewal");
    assert!(fresh.from > first.from && fresh.from <= first.from + 6, "{fresh:?}");
    assert_eq!(fresh.until - fresh.from, first.until - first.from);
    // Providers hear each period.
    let queue = world.to_providers.values_mut().next().unwrap();
    let told: Vec<u64> = queue
        .drain(..)
        .filter_map(|down| match down {
            PDown::GrantTime(time) => Some(time.period),
            _ => None,
        })
        .collect();
    assert!(told.len() > 3 && told.is_sorted(), "{told:?}");
    // A new run begins where this one has not been.
    world.restart(0);
    world.engine.sign_grants(&secret()).unwrap();
    let again = try_open(&mut world, 2, false).unwrap();
    let again = Grant::open(&again.grant, &key()).unwrap();
    assert!(again.from > *told.last().unwrap(), "{} {told:?}", again.from);
    assert!(again.serial > fresh.serial);
}
