//! The journal's copies, the root and the image, as providers and mounts see them.

use us_core::seal::Secret;

use super::*;
use crate::engine::keeping::ImageContent;
use crate::recovery::{ImageBlock, ImageRun, Manifest, open_root};

const FILE: u32 = 0o100_644;

struct Keeping {
    world: World,
    secret: Secret,
    conns: Vec<u64>,
    roots: Vec<StoreRoot>,
    records: Vec<(u64, u64)>,
}

impl Keeping {
    fn new(providers: u8) -> Self {
        let mut world = World::new();
        let secret = Secret::generate();
        world.engine.keep(secret.clone()).unwrap();
        world.make_durable();
        world.volume("v", 4, 2);
        let mut keeping =
            Self { world, secret, conns: Vec::new(), roots: Vec::new(), records: Vec::new() };
        for key in 1..=providers {
            let (conn, ..) = keeping.world.provider(key, Bytes::new());
            keeping.conns.push(conn);
        }
        keeping.world.pass(500);
        keeping.serve_all();
        keeping
    }

    /// A provider does what it was told; whether there was anything.
    fn serve(&mut self, conn: u64) -> bool {
        let messages = std::mem::take(self.world.to_providers.entry(conn).or_default());
        let any = !messages.is_empty();
        for message in messages {
            match message {
                PDown::StoreRecords(records) => {
                    let whole = records.parts.iter().rfind(|part| part.last).unwrap().seq;
                    self.records.extend(records.parts.iter().map(|part| (conn, part.seq)));
                    let (incarnation, run) = (records.incarnation, records.run);
                    let error = String::new();
                    let stored = RecordsStored { incarnation, run, seq: whole, error };
                    self.world.provider_says(conn, PUp::RecordsStored(stored));
                }
                PDown::StoreRoot(root) => {
                    let sequence = root.sequence;
                    self.roots.push(root);
                    self.world.provider_says(conn, PUp::RootStored(RootStored { sequence }));
                }
                _ => {}
            }
        }
        any
    }

    fn serve_all(&mut self) {
        let mut any = true;
        while std::mem::take(&mut any) {
            for conn in self.conns.clone() {
                any |= self.serve(conn);
            }
        }
    }

    fn copies(&mut self) -> Vec<u32> {
        let journal = self.world.status().journal.unwrap();
        assert_eq!(journal.copies as usize, journal.holders.len());
        journal.holders
    }

    fn is_durable(&mut self, mount: &Mount) -> bool {
        let durable = self.world.hear_some(mount.conn, |down| match down {
            Down::Durable(durable) => Some(durable.number),
            _ => None,
        });
        durable == Some(mount.batch)
    }

    fn writer(&mut self) -> Mount {
        let mut mount = self.opened(9);
        mount.inode(&mut self.world, 1, Level::Exclusive).unwrap();
        mount
    }

    /// Opens a session while the holders answer.
    fn opened(&mut self, key: u8) -> Mount {
        let open = OpenSession { volume: "v".into(), ..Default::default() };
        let conn = self.world.dial(key, open);
        self.serve_all();
        let Down::Opened(opened) = self.world.hear(conn) else { panic!("not opened") };
        self.world.says(conn, Up::LeaseInodes(LeaseInodes { request: 1, count: 1000 }));
        self.serve_all();
        let leased = self.world.hear_some(conn, |down| match down {
            Down::Inodes(leased) => Some(leased.first),
            _ => None,
        });
        let next_ino = leased.expect("inode numbers");
        let session = opened.session;
        Mount { key, conn, session, batch: 0, next_ino, end_ino: next_ino + 1000, request: 0 }
    }

    fn plan(&mut self) -> ImagePlan {
        match self.world.ask(Question::PlanImage) {
            Answer::Plan(Some(plan)) => plan,
            other => panic!("{other:?}"),
        }
    }

    fn image(&mut self, number: u64, first_seq: u64, last_seq: u64, id: u8) -> BlockCommit {
        self.world
            .event(Event::Ask { ask: AskId(7), question: Question::LeaseForImage { count: 1 } });
        self.serve_all();
        let Some(Answer::Placements(leased)) = self.world.answers.pop_front() else { panic!() };
        let lease = &leased.leases[0];
        let block = BlockCommit {
            block: vec![id; 16].into(),
            s: 4,
            r: 2,
            page_bytes: 4096,
            plaintext_bytes: 8192,
            birth: lease.birth,
            providers: lease.providers.clone(),
            durable: vec![0x3f].into(),
            fingerprint_hash: vec![1; 32].into(),
            ..Default::default()
        };
        let blocks = vec![ImageBlock::from(&block)];
        let run = ImageRun { number, first_seq, last_seq, bytes: 100, blocks };
        let question = Question::CommitImage { run, blocks: vec![block.clone()] };
        self.world.event(Event::Ask { ask: AskId(8), question });
        block
    }

    fn newest_root(&self) -> Manifest {
        use prost::Message;
        let root = self.roots.iter().max_by_key(|root| root.sequence).unwrap();
        let manifest = open_root(&self.secret, &root.root).unwrap();
        Manifest::decode(&manifest[..]).unwrap()
    }
}

#[test]
fn what_is_durable_is_stored_by_two_providers_first() {
    let mut keeping = Keeping::new(3);
    assert_eq!(keeping.copies(), [1, 2]);
    let mut mount = keeping.writer();
    let ino = mount.ino();
    mount.change(&mut keeping.world, vec![create(1, "a", ino, FILE)]);
    assert!(!keeping.is_durable(&mount), "the own disk has it, nobody else");
    let conns = keeping.conns.clone();
    keeping.serve(conns[0]);
    assert!(!keeping.is_durable(&mount), "one of two");
    keeping.serve(conns[1]);
    assert!(keeping.is_durable(&mount));
    let third = keeping.records.iter().filter(|(conn, _)| *conn == conns[2]).count();
    assert_eq!(third, 0, "who holds no copy is sent none");
    for conn in &conns[..2] {
        let seqs: Vec<u64> =
            keeping.records.iter().filter(|(at, _)| at == conn).map(|(_, seq)| *seq).collect();
        let wanted: Vec<u64> = (1..=keeping.world.engine.last_seq).collect();
        assert_eq!(seqs, wanted, "every record from the first on, in order, once");
    }
}

#[test]
fn a_silent_holder_is_replaced_and_durability_goes_on() {
    let mut keeping = Keeping::new(4);
    let mut mount = keeping.writer();
    let ino = mount.ino();
    mount.change(&mut keeping.world, vec![create(1, "a", ino, FILE)]);
    let conns = keeping.conns.clone();
    keeping.serve(conns[1]);
    for _ in 0..8 {
        keeping.world.pass(500);
        for conn in &conns[1..] {
            keeping.serve(*conn);
        }
    }
    assert!(keeping.is_durable(&mount), "the silent one is waited for no longer");
    assert_eq!(keeping.copies(), [2, 3]);
    // With all of them gone it is what one disk is.
    for provider in 1..=4 {
        keeping.world.lose_provider(provider);
    }
    let ino = mount.ino();
    mount.change(&mut keeping.world, vec![create(1, "b", ino, FILE)]);
    assert!(keeping.is_durable(&mount));
    assert!(keeping.copies().is_empty());
}

#[test]
fn a_provider_that_refuses_records_is_replaced_at_once() {
    let mut keeping = Keeping::new(3);
    let (incarnation, run) = (1, keeping.world.engine.cluster.run);
    let error = "no room".to_owned();
    let refused = RecordsStored { incarnation, run, seq: 0, error };
    let conn = keeping.conns[0];
    keeping.world.provider_says(conn, PUp::RecordsStored(refused));
    keeping.serve_all();
    assert_eq!(keeping.copies(), [2, 3]);
}

#[test]
fn two_providers_are_too_few_for_copies() {
    let mut keeping = Keeping::new(2);
    assert!(keeping.copies().is_empty());
    let mut mount = keeping.writer();
    let ino = mount.ino();
    mount.change(&mut keeping.world, vec![create(1, "a", ino, FILE)]);
    assert!(keeping.is_durable(&mount));
    assert!(!keeping.roots.is_empty(), "the root goes to everyone all the same");
}

#[test]
fn an_image_takes_the_place_of_records_and_old_blocks_go_behind_the_new_root() {
    let mut keeping = Keeping::new(6);
    keeping.world.engine.config.image_bytes = 0;
    let plan = keeping.plan();
    assert!(matches!(plan.content, ImageContent::Base(_)));
    let first = keeping.image(plan.number, 0, plan.last_seq, 1);
    keeping.serve_all();
    assert!(matches!(keeping.world.answers.pop_front(), Some(Answer::Done)));
    let root = keeping.newest_root();
    assert_eq!((root.covers_seq, root.runs.len()), (plan.last_seq, 1));
    assert_eq!(root.runs[0].blocks[0].block, first.block);
    assert_eq!(root.providers.len(), 6);
    assert_eq!(keeping.copies().len(), 2);
    let status = keeping.world.status();
    assert_eq!(status.blocks.unwrap().total, 1, "health counts the image's blocks too");

    let delta = keeping.plan();
    let ImageContent::Delta { first_seq } = delta.content else { panic!("{delta:?}") };
    assert_eq!(first_seq, plan.last_seq + 1);
    keeping.image(delta.number, first_seq, delta.last_seq, 2);
    keeping.serve_all();
    keeping.world.answers.clear();
    assert_eq!(keeping.newest_root().runs.len(), 2);

    // A run that does not follow is refused.
    keeping.image(delta.number + 1, first_seq, delta.last_seq, 3);
    assert!(matches!(keeping.world.answers.pop_back(), Some(Answer::Refused { .. })));
    keeping.world.answers.clear();

    let seq = keeping.world.engine.last_seq;
    let third = keeping.image(delta.number + 1, 0, seq, 4);
    keeping.world.pass(500);
    keeping.world.pass(500);
    assert_eq!(keeping.world.status().blocks.unwrap().total, 3, "nobody has the new root yet");
    keeping.serve_all();
    assert!(matches!(keeping.world.answers.pop_front(), Some(Answer::Done)));
    keeping.world.pass(500);
    keeping.serve_all();
    let status = keeping.world.status();
    assert_eq!((status.blocks.unwrap().total, status.pending_deletes), (1, 2));
    let root = keeping.newest_root();
    assert_eq!(root.runs[0].blocks[0].block, third.block);
}

#[test]
fn the_directorys_own_volume_is_hidden() {
    let mut keeping = Keeping::new(0);
    let id = keeping.world.engine.keeping.as_ref().unwrap().volume;
    for volume in [".directory".to_owned(), id.to_string()] {
        let open = OpenSession { volume, ..Default::default() };
        let conn = keeping.world.dial(3, open);
        let Down::Ended(ended) = keeping.world.hear(conn) else { panic!("it opened") };
        assert_eq!(ended.reason, EndReason::NoVolume as i32);
    }
    let Answer::Volumes(volumes) = keeping.world.ask(Question::ListVolumes) else { panic!() };
    assert_eq!(volumes.iter().map(|v| v.name.as_str()).collect::<Vec<_>>(), ["v"]);
    let delete = Question::DeleteVolume { name: ".directory".into() };
    assert!(matches!(keeping.world.ask(delete), Answer::Refused { .. }));
}

#[test]
fn a_session_goes_on_behind_a_restore_only_with_all_it_was_told() {
    let mut world = World::new();
    world.volume("v", 4, 2);
    let mut mounts = [world.open(1, "v"), world.open(2, "v"), world.open(3, "v")];
    mounts[0].inode(&mut world, 1, Level::Exclusive).unwrap();
    let ino = mounts[0].ino();
    mounts[0].change(&mut world, vec![create(1, "a", ino, FILE)]);
    world.restart(0);
    world.engine.cluster.incarnation = 2;
    world.engine.cluster.sessions_lost_below = mounts[2].session;
    let mut resume = |mount: &Mount, durable: u64, incarnation: u64| {
        let (volume, session) = ("v".to_owned(), mount.session);
        let open = OpenSession { volume, session, incarnation, durable, ..Default::default() };
        let conn = world.dial(mount.key, open);
        world.hear(conn)
    };
    let ended = resume(&mounts[0], 1, 1);
    assert!(matches!(&ended, Down::Ended(end) if end.detail.contains("restored")), "{ended:?}");
    let [_, _, third] = &mounts;
    let opened = resume(third, 0, 1);
    assert!(matches!(&opened, Down::Opened(o) if o.resumed && o.incarnation == 2), "{opened:?}");
    let ended = resume(third, 9, 1);
    assert!(matches!(&ended, Down::Ended(end) if end.detail.contains("batch 9")), "{ended:?}");
    let opened = resume(third, 0, 3);
    assert!(matches!(opened, Down::Ended(_)), "a later incarnation than this: {opened:?}");
}
