//! Maps that come along with the map of another file.

use us_core::limits::SIBLINGS_MAX;

use super::basics::{FILE, birth, block, commit, world, write};
use super::*;

fn map(world: &mut World, mount: &mut Mount, ino: u64, siblings: Vec<u64>) -> Fetched {
    let level = Level::Shared.to_wire();
    let want = FetchMap { ino, first_chunk: 0, chunks: 1, level, siblings };
    mount.want(world, Want::Map(want));
    mount.answer(world).expect("an answer")
}

#[test]
fn only_maps_under_a_lease_come_along_and_nothing_is_recalled_for_them() {
    let mut world = world();
    (1..=6).for_each(|key| drop(world.provider(key, Bytes::new())));
    let (mut one, mut two) = (world.open(1, "v"), world.open(2, "v"));
    one.inode(&mut world, 1, Level::Exclusive).unwrap();
    let lease = birth(&mut world, &one);
    let inos: Vec<u64> = (0..4).map(|_| one.ino()).collect();
    let creates = inos.iter().map(|ino| create(1, &format!("f{ino}"), *ino, FILE)).collect();
    one.change(&mut world, creates);
    // One block for all of them; the last has no bytes.
    let extents: Vec<_> = inos[..3].iter().map(|ino| write(*ino, 0, 2000, 1)).collect();
    one.change(&mut world, vec![commit(vec![block(&lease, 1, 0b11_1111)], extents)]);
    let found = map(&mut world, &mut one, inos[0], vec![inos[1], inos[3], 99_999]);
    let of = |found: &Fetched| -> Vec<(u64, usize, bool)> {
        let extents = |map: &SiblingMap| map.chunk.as_ref().map_or(0, |map| map.extents.len());
        found.siblings.iter().map(|map| (map.ino, extents(map), map.complete)).collect()
    };
    assert_eq!(of(&found), [(inos[1], 1, true), (inos[3], 0, true)], "99,999 is nobody's");
    assert_eq!((found.chunks.len(), found.blocks.len()), (1, 1), "one block, told once");

    // The other mount gets the lease of one of them, and so a map of that one alone.
    two.inode(&mut world, inos[1], Level::Shared);
    let recall = one.recall(&mut world).unwrap();
    one.give_back(&mut world, &recall, false);
    two.answer(&mut world).expect("it is given");
    two.inode(&mut world, inos[2], Level::Shared);
    let recall = one.recall(&mut world).unwrap();
    one.give_back(&mut world, &recall, false);
    two.answer(&mut world).expect("it is given");
    let found = map(&mut world, &mut two, inos[1], inos.clone());
    assert_eq!(of(&found), [(inos[2], 1, true)]);
    assert!(one.recall(&mut world).is_none(), "nothing is recalled for what comes along");
}

/// What an fsync put into the directory itself comes with the map: as many as a message holds.
#[test]
fn siblings_whose_bytes_lie_in_the_directory_come_up_to_a_mebibyte() {
    let mut world = world();
    let mut one = world.open(1, "v");
    one.inode(&mut world, 1, Level::Exclusive).unwrap();
    let inos: Vec<u64> = (0..100).map(|_| one.ino()).collect();
    let creates = inos.iter().map(|ino| create(1, &format!("f{ino}"), *ino, FILE)).collect();
    one.change(&mut world, creates);
    for (at, ino) in inos.iter().enumerate() {
        let inline = BlockCommit {
            block: vec![at as u8; 16].into(),
            plaintext_bytes: 16_000,
            inline: vec![9; 16_016].into(),
            ..Default::default()
        };
        one.change(&mut world, vec![commit(vec![inline], vec![write(*ino, 0, 16_000, at as u8)])]);
    }
    let found = map(&mut world, &mut one, inos[0], inos[1..].to_vec());
    assert_eq!(found.siblings.len(), (1 << 20) / 16_016);
    assert_eq!(found.blocks.len(), found.siblings.len() + 1);
}

#[test]
fn so_many_come_along_and_no_more() {
    let mut world = world();
    let mut one = world.open(1, "v");
    one.inode(&mut world, 1, Level::Exclusive).unwrap();
    let inos: Vec<u64> = (0..SIBLINGS_MAX + 10).map(|_| one.ino()).collect();
    let creates = inos.iter().map(|ino| create(1, &format!("f{ino}"), *ino, FILE)).collect();
    one.change(&mut world, creates);
    let found = map(&mut world, &mut one, inos[0], inos[1..=SIBLINGS_MAX].to_vec());
    assert_eq!(found.siblings.len(), SIBLINGS_MAX);
    let twice = vec![inos[0], inos[1], inos[1], inos[2], inos[1]];
    assert_eq!(map(&mut world, &mut one, inos[0], twice).siblings.len(), 2, "each once");
    let refused = map(&mut world, &mut one, inos[0], inos[1..=SIBLINGS_MAX + 1].to_vec());
    assert_eq!(refused.error, FetchError::Invalid as i32);
}
