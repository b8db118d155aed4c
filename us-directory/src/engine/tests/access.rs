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
    let made = NewVolume { maker, ..NewVolume::named("v", 4, 2) }.into();
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

/// Grants were signed for a period that was not yet on the disk: after a crash its number came again, and
/// what had ended in it counted anew.
#[test]
fn a_period_is_durable_before_anything_is_signed_with_it() {
    let mut world = world();
    allow(&mut world, &hex(2), AccessLevel::Write);
    try_open(&mut world, 2, false).unwrap();
    let conn = world.next_conn;
    let first = renewed(&mut world, conn, true).unwrap();
    world.to_providers.clear();
    world.auto = false;
    let period_ms = EngineConfig::default().grant_ms / 15;
    world.pass(period_ms + 1);
    assert!(world.undurable() > 0, "the new period is on its way to the disk");
    let early = renewed(&mut world, conn, true).unwrap();
    assert_eq!(early.from, first.from, "the period before goes on");
    let time = |down: &PDown| matches!(down, PDown::GrantTime(_));
    assert!(!world.to_providers.values().flatten().any(time), "nobody is told of it");
    world.make_durable();
    let late = renewed(&mut world, conn, true).unwrap();
    assert_eq!(late.from, first.from + 1);
    assert!(world.to_providers.values().all(|queue| queue.iter().any(time)), "all are told");
    // A crash before the next is durable: the next run begins behind all that was signed.
    world.pass(period_ms);
    let last = renewed(&mut world, conn, true).unwrap();
    world.auto = true;
    world.restart(0);
    world.engine.sign_grants(&secret()).unwrap();
    let again = try_open(&mut world, 2, false).unwrap();
    let again = Grant::open(&again.grant, &key()).unwrap();
    assert!(again.from > last.from, "{} after {}", again.from, last.from);
}

/// A run's first period is no exception: until it is durable nothing is signed.
#[test]
fn nothing_is_signed_before_the_first_period_is_durable() {
    let mut world = World::new();
    world.auto = false;
    world.engine.sign_grants(&secret()).unwrap();
    assert_eq!(world.engine.grant_basis().1, None);
    world.make_durable();
    assert!(world.engine.grant_basis().1.is_some());
}

/// A volume of this name, made by the holder of `key`, who is a client or an administrator.
fn make(world: &mut World, name: &str, key: u8, admin: bool) -> Answer {
    let maker = Peer { key_hash: vec![key; 32], name: format!("maker-{key}"), admin };
    world.ask(NewVolume { maker: Some(maker), ..NewVolume::named(name, 4, 2) }.into())
}

/// One client could make all the 1,024 volumes there can be.
#[test]
fn volumes_of_one_client_are_bounded() {
    let mut world = world();
    for at in 0..VOLUMES_OF_ONE_MAX {
        let made = make(&mut world, &format!("v{at}"), 2, false);
        assert!(matches!(made, Answer::Volume(_)), "{at}: {made:?}");
    }
    assert_eq!(refusal(make(&mut world, "more", 2, false)), RefusalKind::Busy);
    world.restart(0);
    assert_eq!(refusal(make(&mut world, "more", 2, false)), RefusalKind::Busy);
    assert!(matches!(make(&mut world, "other", 3, false), Answer::Volume(_)), "another client");
    for at in 0..=VOLUMES_OF_ONE_MAX {
        let made = make(&mut world, &format!("admins-{at}"), 2, true);
        assert!(matches!(made, Answer::Volume(_)), "{at}: {made:?}");
    }
    // One that is gone makes room.
    world.ask(Question::DeleteVolume { name: "v0".to_owned() });
    world.pass(10_000);
    assert!(matches!(make(&mut world, "more", 2, false), Answer::Volume(_)));
}

/// What a question by this member is answered with.
fn ask_as(world: &mut World, role: us_core::tls::Role, key: u8, question: Question) -> Answer {
    let cluster = ClusterId::from_bytes([7; 16]);
    let key_hash = us_core::tls::KeyHash::from_bytes([key; 32]);
    let by = us_core::tls::PeerIdentity { role, name: "asks".to_owned(), cluster, key_hash };
    world.event(Event::AskedBy { ask: AskId(77), by, question });
    world.answers.pop_back().expect("an answer")
}

/// Every client saw the names and access lists of all volumes, and what happened to them.
#[test]
fn a_client_sees_of_volumes_only_those_it_may_open() {
    use us_core::tls::Role;
    let mut world = world();
    make(&mut world, "own", 2, false);
    make(&mut world, "others", 3, false);
    make(&mut world, "gone", 3, false);
    world.ask(Question::DeleteVolume { name: "gone".to_owned() });
    world.pass(10_000);
    allow(&mut world, &hex(2), AccessLevel::Read);
    let (_own, _other) = (world.open(2, "own"), world.open(3, "others"));
    let seen = |world: &mut World, role, key| {
        let mut seen = Vec::new();
        let Answer::Volumes(volumes) = ask_as(world, role, key, Question::ListVolumes) else {
            panic!()
        };
        seen.push(volumes.into_iter().map(|info| info.name).collect::<BTreeSet<_>>());
        let Answer::Snapshot(state) = ask_as(world, role, key, Question::Snapshot) else {
            panic!()
        };
        seen.push(state.volumes.into_iter().map(|(_, name)| name).collect());
        let Answer::Status(status) = ask_as(world, role, key, Question::Status) else { panic!() };
        seen.push(status.volumes.into_iter().map(|info| info.name).collect());
        seen.push(status.sessions.into_iter().map(|session| session.volume).collect());
        let question = Question::Events { after: 0, last: 0 };
        let Answer::Events(events) = ask_as(world, role, key, question) else { panic!() };
        let about = events.iter().filter(|event| event.kind.starts_with("volume-"));
        let name = |detail: &str| detail.split([' ', ':']).next().unwrap_or_default().to_owned();
        seen.push(about.map(|event| name(&event.detail)).collect());
        assert!(events.iter().any(|event| event.kind == "provider-joined"), "all else is shown");
        let join = |names: BTreeSet<String>| names.into_iter().collect::<Vec<_>>().join(" ");
        seen.into_iter().map(join).collect::<Vec<String>>()
    };
    let client = seen(&mut world, Role::Client, 2);
    assert_eq!(client, ["own v", "own v", "own v", "own", "own v"]);
    assert_eq!(
        seen(&mut world, Role::Client, 3),
        ["others", "others", "others", "others", "others"]
    );
    let nobody = seen(&mut world, Role::Client, 4);
    assert!(nobody.iter().all(String::is_empty), "{nobody:?}");
    let admin = seen(&mut world, Role::Admin, 2);
    assert_eq!(admin[0], "others own v");
    assert_eq!((&*admin[3], &*admin[4]), ("others own", "gone others own v"));
    // An event that names a volume without saying which is one of all.
    let record =
        crate::records::EventRecord { kind: 12, detail: "old".into(), ..Default::default() };
    let mut batch = WriteBatch::new();
    batch.put(keys::event(world.engine.next_event), encode(&record));
    world.engine.next_event += 1;
    world.engine.commit(batch, Durability::Durable).unwrap();
    assert_eq!(seen(&mut world, Role::Client, 3)[4], "others");
    assert!(seen(&mut world, Role::Admin, 3)[4].contains("old"));
}

/// A page of the log of which a client is shown nothing is not its end.
#[test]
fn a_log_full_of_others_volumes_goes_on() {
    use us_core::tls::Role;
    let mut world = world();
    let id = *world.engine.volumes.keys().next().unwrap();
    for _ in 0..3000 {
        let kind = super::super::events::EventKind::VolumeChanged;
        world.engine.note_volume_event(kind, &id, "v: changed".to_owned()).unwrap();
    }
    world.provider(99, Bytes::new());
    let question = Question::Events { after: 20, last: 0 };
    let Answer::Events(events) = ask_as(&mut world, Role::Client, 9, question) else { panic!() };
    assert!(events.iter().any(|event| event.number > 3000), "{}", events.len());
}
