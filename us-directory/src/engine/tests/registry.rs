//! Members and invitations: what survives a crash, who may use what, what a revocation ends.

use us_core::ids::ClusterId;
use us_core::tls::invite::secret_hash;
use us_core::tls::{KeyHash, PeerIdentity, Role};
use us_proto::v1::{EndReason, MemberInfo, OpenSession, Standing};

use super::super::registry::{RegistryAnswer, RegistryQuestion};
use super::*;
use crate::records::InviteRecord;

fn key(byte: u8) -> KeyHash {
    KeyHash::from_bytes([byte; 32])
}

fn peer(byte: u8, role: Role, name: &str) -> PeerIdentity {
    let cluster = ClusterId::from_bytes([7; 16]);
    PeerIdentity { role, name: name.to_owned(), cluster, key_hash: key(byte) }
}

impl World {
    /// Asks as the administrator with key 200.
    fn registry(&mut self, question: RegistryQuestion) -> Answer {
        self.next_conn += 1;
        let by = peer(200, Role::Admin, "ann");
        let question = Question::Registry(question);
        self.event(Event::AskedBy { ask: AskId(self.next_conn), by, question });
        self.answers.pop_back().expect("an answer")
    }

    fn invite(&mut self, uses: u32, expires_ms: u64) -> [u8; 32] {
        let (site, name) = ("attic".to_owned(), String::new());
        let question =
            RegistryQuestion::Invite { role: Role::Provider, site, name, uses, expires_ms };
        match self.registry(question) {
            Answer::Registry(RegistryAnswer::Invited(secret, _)) => secret_hash(&secret),
            other => panic!("{other:?}"),
        }
    }

    fn enroll(&mut self, secret_hash: [u8; 32], byte: u8) -> Result<Vec<u8>, String> {
        let (key_hash, role, name) = (key(byte), Role::Provider, format!("p{byte}"));
        let question = RegistryQuestion::Enroll { secret_hash, key_hash, role, name };
        match self.ask(Question::Registry(question)) {
            Answer::Registry(RegistryAnswer::Enrolled(issue)) => Ok(issue.serial),
            Answer::Refused { detail, .. } => Err(detail),
            other => panic!("{other:?}"),
        }
    }

    fn member(&mut self, byte: u8) -> Option<MemberInfo> {
        match self.registry(RegistryQuestion::Members { after: Vec::new() }) {
            Answer::Registry(RegistryAnswer::Members(members)) => {
                members.into_iter().find(|member| member.key_hash[..] == [byte; 32])
            }
            other => panic!("{other:?}"),
        }
    }

    fn revoke(&mut self, member: &str) -> Answer {
        self.registry(RegistryQuestion::Revoke { member: member.to_owned() })
    }
}

/// A use that was acknowledged is used after a crash at any later moment; one that was not durable was
/// not answered.
#[test]
fn a_use_is_durable_before_it_is_answered() {
    let mut world = World::new();
    let code = world.invite(2, 0);
    let serial = world.enroll(code, 1).unwrap();
    assert_eq!(world.enroll(code, 1).unwrap(), serial, "the same certificate again");
    world.restart(0);
    assert_eq!(world.enroll(code, 1).unwrap(), serial);
    world.enroll(code, 2).unwrap();
    let refusal = world.enroll(code, 3).unwrap_err();
    assert_eq!(world.enroll([9; 32], 3).unwrap_err(), refusal, "the answer tells nothing");
    assert_eq!(world.enroll(code, 2).map(drop), Ok(()), "its answer was lost");
    // Undurable: nobody hears.
    let code = world.invite(1, 0);
    world.auto = false;
    let (key_hash, role, name) = (key(4), Role::Provider, "p4".to_owned());
    let question = RegistryQuestion::Enroll { secret_hash: code, key_hash, role, name };
    world.event(Event::Ask { ask: AskId(9_999), question: Question::Registry(question) });
    assert!(world.answers.is_empty());
    world.auto = true;
    world.restart(0);
    assert!(world.member(4).is_none());
    assert!(world.enroll(code, 5).is_ok(), "the use is still there");
}

#[test]
fn invitations_end_by_the_clusters_clock() {
    let mut world = World::new();
    let code = world.invite(5, 60_000);
    world.pass(59_000);
    world.enroll(code, 1).unwrap();
    world.pass(5_000);
    assert!(world.enroll(code, 2).is_err());
    assert!(world.enroll(code, 1).is_err(), "also for who has used it");
    let left = world.engine.scan_all(&keys::tag(&keys::CLUSTER, b'j')).unwrap();
    assert!(left.is_empty(), "it is forgotten");
}

/// A revoked client: its session is over and durably so, its stream hears why, the list of refused keys
/// has it, before and after a restart.
#[test]
fn a_revocation_ends_what_is_open() {
    let mut world = World::new();
    world.volume("disk", 1, 0);
    let (conn, _, _) = world.provider(50, Bytes::new());
    let mut mount = world.open(1, "disk");
    let other = world.open(2, "disk");
    world.event(Event::Met { peer: peer(1, Role::Client, "laptop") });
    let answer = world.revoke("laptop");
    let Answer::Registry(RegistryAnswer::Revoked { sessions: 1, member, .. }) = answer else {
        panic!("{answer:?}")
    };
    assert_eq!(member.standing(), Standing::Revoked);
    let ended = world.hear_some(mount.conn, |down| match down {
        Down::Ended(ended) => Some(ended.reason()),
        _ => None,
    });
    assert_eq!(ended, Some(EndReason::Revoked));
    let lists = world.to_providers.entry(conn).or_default().iter();
    let list = lists.filter_map(|down| match down {
        PDown::RefusedKeys(list) => Some(list.keys.clone()),
        _ => None,
    });
    assert_eq!(list.last().unwrap(), [Bytes::from(vec![1; 32])]);
    // What it still sends counts for nothing, and what it opens is closed.
    for restarted in [false, true] {
        if restarted {
            world.restart(0);
        }
        let session = mount.session;
        let open = OpenSession { volume: "disk".into(), session, ..Default::default() };
        mount.conn = world.dial(1, open);
        let opened = world.hear_some(mount.conn, |down| match down {
            Down::Opened(opened) => Some(opened.session),
            _ => None,
        });
        assert_eq!(opened, None, "restarted: {restarted}");
        assert_eq!(world.engine.refused_keys().keys, [Bytes::from(vec![1; 32])]);
    }
    let open = OpenSession { volume: "disk".into(), session: other.session, ..Default::default() };
    let conn = world.dial(2, open);
    assert!(matches!(world.hear(conn), Down::Opened(_)), "the other goes on");
}

/// A revoked provider is dead, and its hello is not heard any more.
#[test]
fn a_revoked_provider_is_dead() {
    let mut world = World::new();
    let (_, provider, cookie) = world.provider(3, Bytes::new());
    world.event(Event::Met { peer: peer(3, Role::Provider, "attic") });
    let answer = world.revoke("03030303");
    let Answer::Registry(RegistryAnswer::Revoked { provider: Some((number, 0)), .. }) = answer
    else {
        panic!("{answer:?}")
    };
    assert_eq!(number, provider);
    assert!(world.engine.members[&provider].record.dead);
    assert!(!world.engine.members[&provider].online);
    let conn = world.conn();
    let peer = Peer { key_hash: vec![3; 32], name: "attic".to_owned(), ..Peer::default() };
    world.event(Event::ProviderConnected { conn: ConnId(conn), peer });
    let hello = ProviderHello {
        address: "10.0.0.3:1".into(),
        store: vec![3; 16].into(),
        cookie,
        report: Some(report()),
        ..Default::default()
    };
    world.provider_says(conn, PUp::Hello(hello));
    let heard = world.to_providers.entry(conn).or_default();
    assert!(!heard.iter().any(|down| matches!(down, PDown::Welcome(_))));
    assert!(world.engine.members[&provider].record.dead);
    let code = world.invite(1, 0);
    assert!(world.enroll(code, 3).unwrap_err().contains("revoked"), "a key stays revoked");
}

/// A certificate expires by the cluster's clock unless it is renewed, and who joins again is a member.
#[test]
fn certificates_expire_and_are_renewed() {
    let mut world = World::new();
    world.engine.config.certificate_life_ms = 1_000_000;
    let code = world.invite(3, 0);
    let first = world.enroll(code, 1).unwrap();
    world.enroll(code, 2).unwrap();
    let renew = |world: &mut World, byte: u8| {
        let member = peer(byte, Role::Provider, &format!("p{byte}"));
        match world.ask(Question::Registry(RegistryQuestion::Renew { member })) {
            Answer::Registry(RegistryAnswer::Renewal(issue, again_ms)) => {
                Ok((issue.map(|issue| issue.serial), again_ms))
            }
            Answer::Refused { detail, .. } => Err(detail),
            other => panic!("{other:?}"),
        }
    };
    let (issue, again_ms) = renew(&mut world, 1).unwrap();
    assert_eq!((issue, again_ms), (None, 660_000), "too early");
    world.pass(700_000);
    let (issue, _) = renew(&mut world, 1).unwrap();
    assert_ne!(issue.expect("it is time"), first);
    renew(&mut world, 200).unwrap();
    world.pass(400_000);
    assert_eq!(world.member(1).unwrap().standing(), Standing::Good);
    assert_eq!(world.member(2).unwrap().standing(), Standing::Expired);
    assert_eq!(world.engine.refused_keys().keys, [Bytes::from(vec![2; 32])]);
    assert!(renew(&mut world, 2).is_err());
    let code = world.invite(1, 0);
    world.enroll(code, 2).unwrap();
    assert_eq!(world.member(2).unwrap().standing(), Standing::Good);
    assert!(world.engine.refused_keys().keys.is_empty());
}

/// What somebody ordered and who came and went stays in the log, when everything else is dropped.
#[test]
fn orders_stay_in_the_log() {
    let mut world = World::new();
    world.invite(1, 0);
    world.volume("disk", 1, 0);
    for _ in 0..100_002 {
        world.engine.note_event(super::super::events::EventKind::Damage, 1, String::new()).unwrap();
    }
    let first = world.engine.events(0, 0).unwrap();
    let kinds: Vec<(u64, &str)> =
        first.iter().take(3).map(|event| (event.number, &*event.kind)).collect();
    // The volume, third, was nobody's order, and so were the first damages.
    assert_eq!(kinds, [(1, "member-joined"), (2, "invited"), (6, "damage")]);
    assert!(first[1].by.starts_with("admin ann (c8c8c8c8)"), "{}", first[1].by);
    world.make_durable();
    world.restart(0);
    let newest = world.engine.events(0, 1).unwrap();
    assert_eq!(newest[0].kind, "damage", "holes do not end the log");
}

/// Codes that were used up counted as open until they were over: after 4,096 joins nobody was invited.
#[test]
fn a_used_up_invitation_is_not_open() {
    let mut world = World::new();
    let first = world.invite(1, 60_000);
    world.enroll(first, 1).unwrap();
    let used_up = world.engine.registry.invites[&first[..]].clone();
    let fill = |world: &mut World, uses_left, from: u32| {
        for number in from..from + 4095 {
            let hash = Bytes::copy_from_slice(&[&number.to_le_bytes()[..], &[0; 28]].concat());
            let expires_ms = used_up.expires_ms + 1;
            let invite = InviteRecord { uses_left, expires_ms, ..used_up.clone() };
            world.engine.registry.invites.insert(hash, invite);
        }
    };
    fill(&mut world, 0, 1);
    let code = world.invite(1, 0);
    assert_eq!(
        world.engine.registry.invites.len(),
        4096,
        "the one that is over first is forgotten"
    );
    let stored = world.engine.scan_all(&keys::tag(&keys::CLUSTER, b'j')).unwrap();
    assert_eq!(stored.len(), 1, "in the store too");
    assert!(world.enroll(first, 1).is_err());
    // Open ones count: 4,095 and this one.
    fill(&mut world, 1, 10_000);
    let (role, site, name) = (Role::Client, String::new(), String::new());
    let question = RegistryQuestion::Invite { role, site, name, uses: 1, expires_ms: 0 };
    let refused = world.registry(question.clone());
    assert!(matches!(refused, Answer::Refused { kind: RefusalKind::Busy, .. }), "{refused:?}");
    world.enroll(code, 3).unwrap();
    assert!(matches!(world.registry(question), Answer::Registry(_)), "one is used up");
}

/// Who is revoked by the whole key keeps what is known of him, and a refusal leaves no trace. A key in
/// capital letters replaced its member's record by one of an unknown client.
#[test]
fn a_revocation_by_key_makes_no_ghosts() {
    let mut world = World::new();
    world.event(Event::Met { peer: peer(0xab, Role::Provider, "attic") });
    let digits = "AB".repeat(32);
    let answer = world.revoke(&digits);
    let Answer::Registry(RegistryAnswer::Revoked { member, .. }) = answer else {
        panic!("{answer:?}")
    };
    assert_eq!((&*member.role, &*member.name), ("provider", "attic"));
    // A provider from before the registry is one also when its key is revoked.
    let (_, number, _) = world.provider(0xcd, Bytes::new());
    let answer = world.revoke(&"cd".repeat(32));
    let Answer::Registry(RegistryAnswer::Revoked { member, provider, .. }) = answer else {
        panic!("{answer:?}")
    };
    assert_eq!((&*member.role, &*member.name), ("provider", "provider-205"));
    assert_eq!(provider, Some((number, 0)));
    // Never seen: refused from now on, also after a restart.
    assert!(matches!(world.revoke(&"0e".repeat(32)), Answer::Registry(_)));
    world.restart(0);
    assert_eq!(world.member(0x0e).unwrap().standing(), Standing::Revoked);
    assert!(world.engine.is_refused(&[0x0e; 32]));
    let known = world.engine.registry.members.len();
    for nobody in ["nobody", "0f0f0f0f", "c8c8c8c8", &"C8".repeat(32)] {
        assert!(matches!(world.revoke(nobody), Answer::Refused { .. }), "{nobody}");
    }
    assert_eq!(world.engine.registry.members.len(), known);
    assert_eq!(world.member(200).unwrap().standing(), Standing::Good, "who asks stays");
}

/// After a restore providers hear who was invited since: only that lets somebody in again whom they
/// refused before.
#[test]
fn a_restored_directory_says_who_was_invited_since() {
    let mut world = World::new();
    let code = world.invite(1, 0);
    world.enroll(code, 1).unwrap();
    assert!(world.engine.refused_keys().readmitted.is_empty());
    world.engine.cluster.incarnation = 2;
    world.event(Event::Met { peer: peer(2, Role::Client, "met") });
    world.engine.config.certificate_life_ms = 1_000_000;
    world.pass(700_000);
    let member = peer(2, Role::Client, "met");
    world.ask(Question::Registry(RegistryQuestion::Renew { member }));
    let (conn, _, _) = world.provider(50, Bytes::new());
    let list = |world: &mut World| {
        let lists = world.to_providers.entry(conn).or_default().drain(..);
        let lists = lists.filter_map(|down| match down {
            PDown::RefusedKeys(list) => Some((list.incarnation, list.readmitted)),
            _ => None,
        });
        lists.last()
    };
    assert_eq!(list(&mut world), Some((2, vec![])), "they hear at once that it was restored");
    let code = world.invite(2, 0);
    world.enroll(code, 3).unwrap();
    assert_eq!(list(&mut world), Some((2, vec![vec![3; 32].into()])), "neither met nor renewed");
    world.enroll(code, 4).unwrap();
    world.revoke("p3");
    assert_eq!(list(&mut world), Some((2, vec![vec![4; 32].into()])));
}
