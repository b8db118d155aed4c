//! Providers that lie: each harms only itself.

use super::*;

const MAX: ProviderReport = ProviderReport {
    capacity_bytes: u64::MAX,
    used_bytes: u64::MAX,
    free_bytes: u64::MAX,
    fragments: u64::MAX,
    damaged: u64::MAX,
    accepts_puts: true,
    note: String::new(),
    next_record: u64::MAX,
    reclaimable_bytes: u64::MAX,
    full: false,
    leaving: false,
    uplink_bytes_per_s: u64::MAX,
    downlink_bytes_per_s: u64::MAX,
};

/// Six providers, a block on them that provider `liar` never got a fragment of: it is the seventh.
fn world() -> (World, Mount, (u64, u32)) {
    let mut world = World::new();
    world.volume("v", 4, 2);
    for key in 1..=6 {
        world.provider(key, Bytes::new());
    }
    let mut mount = world.open(1, "v");
    mount.inode(&mut world, 1, Level::Exclusive).unwrap();
    let ino = mount.ino();
    let ask = LeasePlacements { request: 9, count: 1 };
    world.says(mount.conn, Up::LeasePlacements(ask));
    let leased = world.hear_some(mount.conn, |down| match down {
        Down::Placements(leased) => Some(leased.leases[0].clone()),
        _ => None,
    });
    let leased = leased.expect("a place");
    let block = BlockCommit {
        block: vec![1; 16].into(),
        s: 4,
        r: 2,
        page_bytes: 4096,
        plaintext_bytes: 8192,
        birth: leased.birth,
        providers: leased.providers.clone(),
        durable: vec![0b01_1111].into(),
        fingerprint_hash: vec![1; 32].into(),
        ..Default::default()
    };
    let extent = ExtentWrite {
        ino,
        offset: 0,
        length: 8192,
        block: block.block.clone(),
        ..Default::default()
    };
    let files = vec![FileGrowth { ino, size: 8192, mtime: at(3), ctime: at(3), clear_suid: false }];
    let data = CommitData { blocks: vec![block], extents: vec![extent], files };
    mount.change(&mut world, vec![create(1, "a", ino, 0o100_644), Op::CommitData(data)]);
    let (conn, provider, _) = world.provider(7, Bytes::new());
    (world, mount, (conn, provider))
}

fn wire(index: u32) -> FragmentId {
    FragmentId { block: vec![1; 16].into(), index }
}

/// The query that asks after the unconfirmed fragment: whom, and its number.
fn query(world: &mut World) -> (u64, u64) {
    for _ in 0..13 {
        world.pass(5_000);
    }
    let asked = world.to_providers.iter_mut().find_map(|(conn, queue)| {
        queue.drain(..).find_map(|down| match down {
            PDown::Check(check) => Some((*conn, check.query)),
            _ => None,
        })
    });
    asked.expect("the directory asks")
}

#[test]
fn a_provider_answers_only_what_it_was_asked() {
    let (mut world, _mount, (liar, _)) = world();
    let (asked, query) = query(&mut world);
    assert_ne!(asked, liar);
    // Whatever it says of another's fragment, the question stays open and the block as it was.
    for status in [FragmentStatus::Ok, FragmentStatus::NotFound, FragmentStatus::Damaged] {
        let statuses = vec![status as i32];
        world.provider_says(liar, PUp::Checked(CheckReply { query, statuses }));
    }
    let blocks = world.status().blocks.unwrap();
    assert_eq!((blocks.by_redundancy.get(&1), blocks.damaged_fragments), (Some(&1), 0));
    let statuses = vec![FragmentStatus::Ok as i32];
    world.provider_says(asked, PUp::Checked(CheckReply { query, statuses }));
    assert_eq!(
        world.status().blocks.unwrap().by_redundancy.get(&2),
        Some(&1),
        "its own answer counts"
    );
}

#[test]
fn claims_about_fragments_of_others_change_nothing() {
    let (mut world, mut mount, (liar, provider)) = world();
    let before = world.status().blocks.unwrap();
    let fragments = (0..300).map(wire).collect();
    let damage = DamageReport { fragments, detail: "all of it".to_owned() };
    world.provider_says(liar, PUp::Damage(damage));
    for number in 0..100 {
        world.provider_says(liar, PUp::Deleted(DeleteDone { ticket: number }));
        let rebuilt = Rebuilt {
            ticket: number,
            status: RebuildStatus::Ok as i32,
            faults: vec![SourceFault {
                index: 0,
                provider: provider - 1,
                status: FragmentStatus::Damaged as i32,
                ..Default::default()
            }],
            ..Default::default()
        };
        world.provider_says(liar, PUp::Rebuilt(rebuilt));
        let unlisted = vec![InventoryItem { fragment: Some(wire(0)), ..Default::default() }];
        let reply =
            RetainReply { list: number, page: 0, unlisted, done: true, ..Default::default() };
        world.provider_says(liar, PUp::Retain(reply));
        let stored =
            RecordsStored { incarnation: 1, run: number, seq: u64::MAX, ..Default::default() };
        world.provider_says(liar, PUp::RecordsStored(stored));
        world.provider_says(liar, PUp::RootStored(RootStored { sequence: u64::MAX }));
    }
    assert_eq!(world.status().blocks.unwrap(), before);
    assert!(mount.inode(&mut world, 1, Level::Exclusive).is_some());
}

#[test]
fn absurd_numbers_break_no_sum() {
    let (mut world, mut mount, (liar, _)) = world();
    for _ in 0..3 {
        world.provider_says(liar, PUp::Report(MAX));
        world.event(Event::Tick);
    }
    let status = world.status();
    assert!(status.capacity_bytes < 1 << 51 && status.used_bytes < 1 << 51, "{status:?}");
    world.says(mount.conn, Up::Statfs(StatfsRequest { request: 5 }));
    let room = world.hear_some(mount.conn, |down| match down {
        Down::Statfs(reply) => Some(*reply),
        _ => None,
    });
    assert!(room.unwrap().free_bytes < 1 << 51);
    // Another says that it is away for ever, and shows a root from the end of time.
    world.provider_says(liar, PUp::Goodbye(ProviderGoodbye { back_in_s: u64::MAX }));
    world.event(Event::Disconnected { conn: ConnId(liar) });
    world.pass(5_000);
    let away = world.status();
    assert!(away.providers.iter().all(|one| one.back_in_s <= 32 * 24 * 3600), "{away:?}");
    let conn = world.conn();
    let peer = Peer { key_hash: vec![9; 32], ..Peer::default() };
    world.event(Event::ProviderConnected { conn: ConnId(conn), peer });
    let hello = ProviderHello {
        address: "10.0.0.9:1".to_owned(),
        store: vec![9; 16].into(),
        report: Some(MAX),
        root_sequence: u64::MAX,
        ..Default::default()
    };
    world.provider_says(conn, PUp::Hello(hello));
    for _ in 0..10 {
        world.pass(5_000);
    }
    assert!(mount.inode(&mut world, 1, Level::Exclusive).is_some());
}
