//! The providers as the choosers see them: numbered densely, grouped into places, drawable in
//! proportion to free space.
//!
//! A *place* is what the site rule counts: place 0 is the pool of all unlabelled providers, every
//! other place is one labelled site. Facts change one provider at a time, in O(log N); nothing is
//! rebuilt for a placement.
//!
//! Invariants: a provider keeps its [`Node`] from its first upsert until it is forgotten; a place's
//! members are exactly its present providers; a weight is zero unless its provider is usable and has
//! space. Nothing here fails.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use super::draw::{Fenwick, NumberMap, SplitMix};
use crate::ids::ProviderId;

/// A provider's dense number, for tables. Given again only after the provider was forgotten.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Node(pub(super) u32);

impl Node {
    /// As an index.
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

/// A place's number; 0 is the pool of the unlabelled.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct PlaceId(u32);

impl PlaceId {
    /// The unlabelled providers.
    pub const POOL: Self = Self(0);

    /// As an index.
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

/// What the directory knows of a provider.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProviderFacts {
    /// Which one.
    pub provider: ProviderId,
    /// Its site's label path; empty: it says nothing about who is close.
    pub site: String,
    /// Its address, as `host:port`; stands in for a label where it is an IP address.
    pub address: String,
    /// What it gives to the swarm in all.
    pub capacity_bytes: u64,
    /// What can still be put there.
    pub free_bytes: u64,
    /// Whether it can be reached and takes puts.
    pub usable: bool,
}

/// Which providers are close to each other.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Group {
    /// A labelled site.
    Site(PlaceId),
    /// Unlabelled, in one subnet: the first 24 bits of IPv4, 64 of IPv6.
    Subnet(u64),
    /// Nothing is known: each of these is by itself.
    Alone,
}

/// One provider.
#[derive(Clone, Debug)]
pub struct Known {
    /// Which one.
    pub provider: ProviderId,
    /// Where the site rule counts it.
    pub place: PlaceId,
    /// Whom it is close to.
    pub group: Group,
    /// What it gives in all, in bytes.
    pub capacity_bytes: u64,
    /// What can still be put there, in bytes.
    pub free_bytes: u64,
    /// It can be reached and takes puts.
    pub usable: bool,
    /// Not retired.
    pub present: bool,
    /// Where it stands among its place's members.
    seat: usize,
}

/// One place.
#[derive(Clone, Debug, Default)]
pub struct Place {
    label: String,
    members: Vec<Node>,
    weights: Fenwick,
    usable: usize,
}

impl Place {
    /// The site's label; empty for the pool.
    pub fn label(&self) -> &str {
        &self.label
    }

    /// Its present providers, in no particular order.
    pub fn members(&self) -> &[Node] {
        &self.members
    }

    /// How many of them are usable.
    pub fn usable(&self) -> usize {
        self.usable
    }

    /// Their free space together, in the unit of draws.
    pub fn weight(&self) -> u64 {
        self.weights.total()
    }

    /// One of its usable providers, in proportion to free space.
    pub fn draw(&self, random: &mut SplitMix) -> Option<Node> {
        self.weights.draw(random).map(|seat| self.members[seat])
    }
}

/// What an upsert did.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Upserted {
    /// The provider's number.
    pub node: Node,
    /// It was not present, or its group is another now.
    pub joined: bool,
    /// The group it left, if it was present.
    pub left: Option<Group>,
}

/// The providers.
#[derive(Clone, Debug)]
pub struct Field {
    known: Vec<Option<Known>>,
    by_id: NumberMap<ProviderId, Node>,
    vacant: Vec<Node>,
    places: Vec<Place>,
    by_label: BTreeMap<String, PlaceId>,
    vacant_places: Vec<PlaceId>,
    everyone: Fenwick,
    usable: usize,
    present: usize,
    capacity_bytes: u128,
    capacity_bytes_mean: f64,
    capacity_changes: u64,
}

impl Default for Field {
    fn default() -> Self {
        Self {
            known: Vec::new(),
            by_id: NumberMap::default(),
            vacant: Vec::new(),
            places: vec![Place::default()],
            by_label: BTreeMap::new(),
            vacant_places: Vec::new(),
            everyone: Fenwick::default(),
            usable: 0,
            present: 0,
            capacity_bytes: 0,
            capacity_bytes_mean: 0.0,
            capacity_changes: 0,
        }
    }
}

/// The subnet of `address`, where it says anything about who is close.
fn subnet(address: &str) -> Option<u64> {
    let ip = match address.parse::<SocketAddr>() {
        Ok(address) => address.ip(),
        Err(_) => address.parse::<IpAddr>().ok()?,
    };
    match ip.to_canonical() {
        IpAddr::V4(ip) if ip.is_loopback() || ip.is_unspecified() || ip.is_link_local() => None,
        IpAddr::V4(ip) => Some(u64::from(ip.to_bits() >> 8)),
        IpAddr::V6(ip) if ip.is_loopback() || ip.is_unspecified() => None,
        IpAddr::V6(ip) if ip.is_unicast_link_local() => None,
        // No subnet of IPv6 in use begins with the 40 zeros of those of IPv4.
        IpAddr::V6(ip) => Some((ip.to_bits() >> 64) as u64),
    }
}

/// Free space in the unit of draws, KiB; at most a PiB counts, so that no sum overflows.
fn weight(known: &Known) -> u64 {
    const WEIGHT_MAX: u64 = 1 << 40;
    let bytes = if known.usable && known.present { known.free_bytes } else { 0 };
    if bytes == 0 { 0 } else { (bytes >> 10).clamp(1, WEIGHT_MAX) }
}

impl Field {
    /// The number of a provider that was not forgotten.
    pub fn node(&self, provider: ProviderId) -> Option<Node> {
        self.by_id.get(&provider).copied()
    }

    /// What is known of a provider.
    ///
    /// # Panics
    /// When it was forgotten.
    pub fn known(&self, node: Node) -> &Known {
        self.known[node.index()].as_ref().expect("only forgotten nodes are unknown")
    }

    /// All numbers given so far are below this.
    pub fn nodes_end(&self) -> usize {
        self.known.len()
    }

    /// Present providers.
    pub fn present(&self) -> usize {
        self.present
    }

    /// Usable providers.
    pub fn usable(&self) -> usize {
        self.usable
    }

    /// The mean capacity of a present provider, in bytes.
    pub fn capacity_bytes_mean(&self) -> f64 {
        self.capacity_bytes_mean
    }

    /// Changes whenever anyone's capacity does.
    pub fn capacity_changes(&self) -> u64 {
        self.capacity_changes
    }

    /// Whether nine tenths of the providers have about (within a fifth) the mean capacity.
    pub fn capacities_are_even(&self) -> bool {
        let mean = self.capacity_bytes_mean;
        let even = self.iter().filter(|(_, known)| {
            let capacity = known.capacity_bytes as f64;
            capacity >= 0.8 * mean && capacity <= 1.2 * mean
        });
        even.count() * 10 >= self.present * 9
    }

    /// The free share of the usable providers' space together, 0..1, from what draws know.
    pub fn free_mean(&self) -> f64 {
        (self.weight() as f64 * 1024.0 / (self.capacity_bytes as f64).max(1.0)).min(1.0)
    }

    /// The present providers, by number.
    pub fn iter(&self) -> impl Iterator<Item = (Node, &Known)> {
        let numbered = self.known.iter().enumerate();
        let known = numbered.filter_map(|(at, known)| Some((Node(at as u32), known.as_ref()?)));
        known.filter(|(_, known)| known.present)
    }

    /// A place.
    ///
    /// # Panics
    /// When no provider ever had it.
    pub fn place(&self, place: PlaceId) -> &Place {
        &self.places[place.index()]
    }

    /// All places; some may be empty.
    pub fn places(&self) -> impl Iterator<Item = (PlaceId, &Place)> {
        self.places.iter().enumerate().map(|(at, place)| (PlaceId(at as u32), place))
    }

    /// How many labelled sites have usable providers.
    pub fn labelled_sites(&self) -> usize {
        self.places[1..].iter().filter(|place| place.usable > 0).count()
    }

    /// The free space of all usable providers, in the unit of draws.
    pub fn weight(&self) -> u64 {
        self.everyone.total()
    }

    /// Any usable provider, in proportion to free space.
    pub fn draw(&self, random: &mut SplitMix) -> Option<Node> {
        self.everyone.draw(random).map(|at| Node(at as u32))
    }

    /// Whether `fragments` more fragments can be put there.
    pub fn fits(&self, node: Node, fragments: u64, fragment_bytes: u64) -> bool {
        self.known[node.index()].as_ref().is_some_and(|known| {
            known.present
                && known.usable
                && fragments.saturating_mul(fragment_bytes) <= known.free_bytes
        })
    }

    /// Takes what is now known of a provider; a retired one comes back by it.
    pub fn upsert(&mut self, facts: &ProviderFacts) -> Upserted {
        let place = self.place_of(&facts.site);
        let group = if place != PlaceId::POOL {
            Group::Site(place)
        } else {
            subnet(&facts.address).map_or(Group::Alone, Group::Subnet)
        };
        let node = self.node(facts.provider).unwrap_or_else(|| self.number(facts.provider));
        let old = self.known[node.index()].as_ref();
        let left = old.filter(|old| old.present).map(|old| old.group);
        if left != Some(group) {
            self.stand_up(node);
            self.known[node.index()] = Some(Known {
                provider: facts.provider,
                place,
                group,
                capacity_bytes: 0,
                free_bytes: 0,
                usable: false,
                present: true,
                seat: self.places[place.index()].members.len(),
            });
            let seats = &mut self.places[place.index()];
            seats.members.push(node);
            seats.weights.push(0);
            self.present += 1;
        }
        self.set_capacity(node, facts.capacity_bytes);
        self.update(node, facts.free_bytes, facts.usable);
        Upserted { node, joined: left != Some(group), left: left.filter(|left| *left != group) }
    }

    /// Only the space or the usability of a provider changed.
    pub fn update(&mut self, node: Node, free_bytes: u64, usable: bool) {
        let Some(known) = self.known[node.index()].as_mut().filter(|known| known.present) else {
            return;
        };
        known.free_bytes = free_bytes;
        let was = std::mem::replace(&mut known.usable, usable);
        let (weight, place, seat) = (weight(known), known.place, known.seat);
        let place = &mut self.places[place.index()];
        place.weights.set(seat, weight);
        self.everyone.set(node.index(), weight);
        place.usable = place.usable + usize::from(usable) - usize::from(was);
        self.usable = self.usable + usize::from(usable) - usize::from(was);
    }

    /// The provider is dead: it is no longer present, but its number still stands for it in blocks.
    /// Returns the number and the group it left, if it was present.
    pub fn retire(&mut self, provider: ProviderId) -> Option<(Node, Group)> {
        let node = self.node(provider)?;
        let group = self.known(node).group;
        self.stand_up(node).then_some((node, group))
    }

    /// No block refers to the provider any more; its number may be given again.
    pub fn forget(&mut self, provider: ProviderId) -> Option<Node> {
        let node = self.by_id.remove(&provider)?;
        self.stand_up(node);
        self.known[node.index()] = None;
        self.vacant.push(node);
        Some(node)
    }

    fn set_capacity(&mut self, node: Node, capacity_bytes: u64) {
        let Some(known) = &mut self.known[node.index()] else { return };
        let old = std::mem::replace(&mut known.capacity_bytes, capacity_bytes);
        self.capacity_changes += u64::from(old != capacity_bytes);
        self.capacity_bytes = self.capacity_bytes - u128::from(old) + u128::from(capacity_bytes);
        self.note_mean();
    }

    fn note_mean(&mut self) {
        self.capacity_bytes_mean = self.capacity_bytes as f64 / self.present.max(1) as f64;
    }

    fn number(&mut self, provider: ProviderId) -> Node {
        let node = self.vacant.pop().unwrap_or_else(|| {
            self.known.push(None);
            self.everyone.push(0);
            Node((self.known.len() - 1) as u32)
        });
        self.by_id.insert(provider, node);
        node
    }

    fn place_of(&mut self, label: &str) -> PlaceId {
        let label = label.trim_matches('/');
        if label.is_empty() {
            return PlaceId::POOL;
        }
        if let Some(place) = self.by_label.get(label) {
            return *place;
        }
        let place = self.vacant_places.pop().unwrap_or_else(|| {
            self.places.push(Place::default());
            PlaceId((self.places.len() - 1) as u32)
        });
        self.places[place.index()].label = label.to_owned();
        self.by_label.insert(label.to_owned(), place);
        place
    }

    /// Takes a present provider out of its place; false when it was not present.
    fn stand_up(&mut self, node: Node) -> bool {
        if !self.known[node.index()].as_ref().is_some_and(|known| known.present) {
            return false;
        }
        self.update(node, 0, false);
        self.set_capacity(node, 0);
        let Some(known) = &mut self.known[node.index()] else { return false };
        known.present = false;
        let (place_id, seat) = (known.place, known.seat);
        self.present -= 1;
        self.note_mean();
        let place = &mut self.places[place_id.index()];
        let last = place.members.len() - 1;
        place.weights.set(seat, place.weights.get(last));
        place.weights.pop();
        place.members.swap_remove(seat);
        if let Some(moved) = place.members.get(seat)
            && let Some(moved) = &mut self.known[moved.index()]
        {
            moved.seat = seat;
        }
        if place.members.is_empty() && place_id != PlaceId::POOL {
            self.by_label.remove(&std::mem::take(&mut place.label));
            self.vacant_places.push(place_id);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn subnets_that_say_nothing_are_none() {
        assert_eq!(subnet("10.1.2.3:7000"), subnet("10.1.2.77:1"));
        assert_ne!(subnet("10.1.2.3:7000"), subnet("10.1.3.3:7000"));
        assert_eq!(subnet("[2001:db8::1]:1"), subnet("[2001:db8::2]:9"));
        assert_ne!(subnet("[2001:db8::1]:1"), subnet("[2001:db8:0:1::1]:1"));
        assert_eq!(subnet("[::ffff:10.1.2.3]:1"), subnet("10.1.2.3:1"));
        for silent in ["127.0.0.1:1", "[::1]:1", "0.0.0.0:1", "fe80::1", "box.local:1", ""] {
            assert_eq!(subnet(silent), None, "{silent}");
        }
    }

    proptest! {
        #[test]
        fn places_and_weights_follow_the_facts(
            steps in proptest::collection::vec(
                (0u32..12, 0u8..8, 0u8..4, 0u64..9, any::<bool>()), 1..80),
        ) {
            let mut field = Field::default();
            let mut plain: BTreeMap<u32, ProviderFacts> = BTreeMap::new();
            for (id, what, site, free, usable) in steps {
                let provider = ProviderId(id);
                match what {
                    0 => { field.retire(provider); plain.remove(&id); }
                    1 => { field.forget(provider); plain.remove(&id); }
                    _ => {
                        let site = if site == 0 { String::new() } else { format!("s{site}") };
                        let facts = ProviderFacts {
                            provider, site, address: String::new(), capacity_bytes: free << 21,
                            free_bytes: free << 20, usable,
                        };
                        field.upsert(&facts);
                        plain.insert(id, facts);
                    }
                }
                let kib = |facts: &ProviderFacts| if facts.usable { facts.free_bytes >> 10 } else { 0 };
                prop_assert_eq!(field.weight(), plain.values().map(kib).sum::<u64>());
                prop_assert_eq!(field.present(), plain.len());
                prop_assert_eq!(field.usable(), plain.values().filter(|facts| facts.usable).count());
                for (_, place) in field.places() {
                    let mut here: Vec<u32> =
                        place.members().iter().map(|node| field.known(*node).provider.0).collect();
                    here.sort_unstable();
                    let there = plain.values().filter(|facts| facts.site == place.label());
                    let weight: u64 = there.clone().map(kib).sum();
                    // Emptied places lose their label and look like a second, empty pool.
                    if !here.is_empty() || !place.label().is_empty() {
                        prop_assert_eq!(here, there.map(|facts| facts.provider.0).collect::<Vec<_>>());
                        prop_assert_eq!(place.weight(), weight);
                    }
                }
            }
        }
    }
}
