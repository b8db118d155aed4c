//! Metapeers stay whole, even and quiet, whatever comes and goes.

use proptest::prelude::*;

use super::*;
use crate::ids::ProviderId;
use crate::placement::field::ProviderFacts;

fn facts(number: u32, site: &str, address: &str) -> ProviderFacts {
    ProviderFacts {
        provider: ProviderId(number),
        site: site.to_owned(),
        address: address.to_owned(),
        capacity_bytes: 1 << 30,
        free_bytes: 1 << 30,
        usable: true,
    }
}

/// The field and its metapeers, moved together.
struct World {
    field: Field,
    metapeers: Metapeers,
}

impl World {
    fn new(fragments: usize) -> Self {
        let field = Field::default();
        let metapeers = Metapeers::new(&field, fragments);
        Self { field, metapeers }
    }

    fn join(&mut self, facts: &ProviderFacts) -> Node {
        let upserted = self.field.upsert(facts);
        if upserted.joined {
            self.metapeers.leave(upserted.node, false);
            self.metapeers.join(upserted.node, self.field.known(upserted.node).group);
        }
        upserted.node
    }

    fn die(&mut self, number: u32) {
        if let Some((node, _)) = self.field.retire(ProviderId(number)) {
            self.metapeers.leave(node, true);
        }
    }

    fn check(&self) {
        let mut sizes: BTreeMap<Group, Vec<usize>> = BTreeMap::new();
        for (number, metapeer) in self.metapeers.iter().enumerate() {
            let occupants = (0..metapeer.slots()).filter_map(|slot| {
                let node = metapeer.occupant(slot)?;
                assert_eq!(self.field.known(node).group, metapeer.group());
                assert_eq!(
                    self.metapeers.address(node),
                    Some(SlotAddress { metapeer: number, slot })
                );
                Some(node)
            });
            let count = occupants.count();
            assert_eq!(count, metapeer.occupied());
            let mourned = |slot: &&Slot| slot.now.is_none() && slot.before.is_some();
            assert_eq!(metapeer.slots.iter().filter(mourned).count(), metapeer.mourned);
            assert!(self.metapeers.of_group(metapeer.group()).contains(&number));
            sizes.entry(metapeer.group()).or_default().push(metapeer.size());
        }
        for (group, sizes) in sizes {
            let (most, least) = (*sizes.iter().max().unwrap(), *sizes.iter().min().unwrap());
            let even = group == Group::Alone || most <= least + slack(least);
            assert!(even && most > 0, "{group:?}: {sizes:?}");
        }
        let seated: usize = self.metapeers.iter().map(Metapeer::occupied).sum();
        assert_eq!(seated, self.field.present());
    }
}

#[test]
fn equal_sites_become_equal_metapeers() {
    for (sites, size, f, expected) in [(16, 23, 16, 16), (8, 46, 16, 16), (5, 80, 16, 20)] {
        let mut world = World::new(f);
        for number in 0..sites * size {
            world.join(&facts(number, &format!("s{}", number % sites), ""));
        }
        world.check();
        assert_eq!(world.metapeers.len(), expected, "{sites} sites of {size}");
        assert!(world.metapeers.are_even());
    }
}

#[test]
fn subnets_stand_in_for_labels_and_the_rest_stand_alone() {
    let mut world = World::new(4);
    for number in 0..24 {
        world.join(&facts(number, "", &format!("10.0.{}.{number}:1", number % 4)));
    }
    assert_eq!(world.metapeers.len(), 4);
    for number in 24..30 {
        world.join(&facts(number, "", "127.0.0.1:9"));
    }
    world.check();
    assert_eq!(world.metapeers.of_group(Group::Alone).len(), 6);
}

#[test]
fn a_newcomer_takes_the_slot_of_the_dead() {
    let mut world = World::new(4);
    for number in 0..64 {
        world.join(&facts(number, &format!("s{}", number % 4), ""));
    }
    let dead = world.field.node(ProviderId(9)).unwrap();
    let slot = world.metapeers.address(dead).unwrap();
    world.die(9);
    assert_eq!(world.metapeers.heir(dead), None);
    let elsewhere = world.join(&facts(100, "s2", ""));
    assert_ne!(world.metapeers.address(elsewhere).unwrap().metapeer, slot.metapeer);
    let heir = world.join(&facts(101, "s1", ""));
    assert_eq!(world.metapeers.address(heir), Some(slot));
    assert_eq!(world.metapeers.heir(dead), Some(heir));
    // The heir's heir stands for both; back from the dead, it has a slot of its own.
    world.die(101);
    let second = world.join(&facts(102, "s1", ""));
    assert_eq!(world.metapeers.heir(dead), Some(second));
    world.join(&facts(9, "s1", ""));
    assert_eq!(world.metapeers.heir(dead), None);
    assert_eq!(world.metapeers.heir(heir), Some(second));
    world.check();
}

#[test]
fn a_turnover_moves_few() {
    let mut world = World::new(16);
    for number in 0..368 {
        world.join(&facts(number, &format!("s{}", number % 16), ""));
    }
    let before = world.metapeers.moves();
    for number in 0..368 {
        world.die(number);
        world.join(&facts(1000 + number, &format!("s{}", number % 16), ""));
    }
    world.check();
    assert_eq!(world.metapeers.moves(), before);
}

#[test]
fn every_newcomer_of_a_site_is_an_heir() {
    let mut world = World::new(16);
    let site = |number: u32| format!("s{}", (f64::from(number) * 1.7).sqrt() as u32);
    for number in 0..360 {
        world.join(&facts(number, &site(number), ""));
    }
    for number in 0..360 {
        let dead = world.field.node(ProviderId(number)).unwrap();
        let alone = world.metapeers.of_group(world.field.known(dead).group).len() == 1
            && world.field.place(world.field.known(dead).place).members().len() == 1;
        world.die(number);
        let heir = world.join(&facts(1000 + number, &site(number), ""));
        assert!(alone || world.metapeers.heir(dead) == Some(heir), "{number}");
    }
}

proptest! {
    #[test]
    fn whatever_comes_and_goes(
        f in 1usize..9,
        steps in proptest::collection::vec((0u32..90, 0u8..5, 0u32..7), 1..300),
    ) {
        let mut world = World::new(f);
        let mut changes = 0;
        for (number, what, site) in steps {
            match what {
                0 => world.die(number),
                1 => {
                    if let Some(node) = world.field.forget(ProviderId(number)) {
                        world.metapeers.forget(node);
                    }
                }
                _ => {
                    let (site, address) = match site {
                        0 => (String::new(), "127.0.0.1:1".to_owned()),
                        1 | 2 => (String::new(), format!("10.0.{site}.1:1")),
                        _ => (format!("s{site}"), String::new()),
                    };
                    world.join(&facts(number, &site, &address));
                }
            }
            changes += 1;
            world.check();
        }
        // Cutting anew at every fifth of growth moves each provider a few times, not each time.
        prop_assert!(world.metapeers.moves() <= 2 * changes + 20, "{}", world.metapeers.moves());
    }
}
