//! Metapeers: balanced groups of close providers, and the numbered slots in them.
//!
//! One [`Metapeers`] serves one block width f. Each group of close providers (a labelled site, a
//! subnet of unlabelled ones) is cut into metapeers of about the same size; providers of which
//! nothing is known are metapeers by themselves. A slot is an address (metapeer, number): a newcomer
//! takes the slot of a dead provider of its group, so that it can inherit its fragments and no line
//! changes.
//!
//! The size aimed at is N / f where N ≥ f² (lines need f metapeers of at least f slots), else
//! N / 2f: then metapeers only keep close providers apart, and more of them leave more choice.
//!
//! Invariants: every present provider has exactly one slot; a metapeer never spans two groups; a
//! group's metapeers differ in size (slots of the dead included) by an eighth, but at least by one; a
//! join moves nobody, a death neither, and a departure without heir at most one, except where metapeers are cut or dissolved, which moves the fewest
//! that even them out. Nothing here fails.

use std::collections::{BTreeMap, HashMap};

use super::field::{Field, Group, Node};

/// Where a provider sits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct SlotAddress {
    /// The metapeer's number.
    pub metapeer: usize,
    /// The slot in it.
    pub slot: usize,
}

#[derive(Clone, Copy, Debug, Default)]
struct Slot {
    now: Option<Node>,
    /// The dead provider whose fragments wait for whoever takes the slot.
    before: Option<Node>,
}

/// One metapeer.
#[derive(Clone, Debug)]
pub struct Metapeer {
    group: Group,
    slots: Vec<Slot>,
    occupied: usize,
    /// Vacant slots that wait for an heir.
    mourned: usize,
}

impl Metapeer {
    /// The group of close providers it is a part of.
    pub fn group(&self) -> Group {
        self.group
    }

    /// Slots, vacant ones included.
    pub fn slots(&self) -> usize {
        self.slots.len()
    }

    /// Providers in it.
    pub fn occupied(&self) -> usize {
        self.occupied
    }

    /// Its size when metapeers are compared: an heir will come.
    fn size(&self) -> usize {
        self.occupied + self.mourned
    }

    /// Who sits in `slot`, if there is such a slot and anyone does.
    pub fn occupant(&self, slot: usize) -> Option<Node> {
        self.slots.get(slot).and_then(|slot| slot.now)
    }
}

#[derive(Clone, Debug, Default)]
struct Cuts {
    metapeers: Vec<usize>,
    members: usize,
}

/// The metapeers for blocks of one width.
#[derive(Clone, Debug)]
pub struct Metapeers {
    fragments: usize,
    metapeers: Vec<Metapeer>,
    groups: BTreeMap<Group, Cuts>,
    address: Vec<Option<SlotAddress>>,
    heirs: HashMap<Node, Node>,
    /// Providers that have a slot, and those of them of which it is known who is close.
    seated: usize,
    grouped: usize,
    /// `seated` and the number of groups when the sizes were last decided.
    formed: (usize, usize),
    moves: u64,
    changes: u64,
    version: u64,
}

impl Metapeers {
    /// The metapeers of all present providers, for blocks of `fragments` fragments.
    pub fn new(field: &Field, fragments: usize) -> Self {
        let mut metapeers = Self {
            fragments: fragments.max(1),
            metapeers: Vec::new(),
            groups: BTreeMap::new(),
            address: Vec::new(),
            heirs: HashMap::new(),
            seated: 0,
            grouped: 0,
            formed: (0, 0),
            moves: 0,
            changes: 0,
            version: 0,
        };
        field.iter().for_each(|(node, known)| metapeers.sit(node, known.group));
        metapeers.form();
        metapeers.moves = 0;
        metapeers
    }

    /// Fragments a block, f.
    pub fn fragments(&self) -> usize {
        self.fragments
    }

    /// How many metapeers there are.
    pub fn len(&self) -> usize {
        self.metapeers.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.metapeers.is_empty()
    }

    /// All metapeers; a metapeer's number is its place here.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &Metapeer> {
        self.metapeers.iter()
    }

    /// A metapeer.
    ///
    /// # Panics
    /// When there is no such one.
    pub fn get(&self, metapeer: usize) -> &Metapeer {
        &self.metapeers[metapeer]
    }

    /// The metapeers of a group.
    pub fn of_group(&self, group: Group) -> &[usize] {
        self.groups.get(&group).map_or(&[], |cuts| &cuts.metapeers)
    }

    /// Where a provider sits.
    pub fn address(&self, node: Node) -> Option<SlotAddress> {
        self.address.get(node.index()).copied().flatten()
    }

    /// Who took the slot of a dead provider and is still there.
    pub fn heir(&self, dead: Node) -> Option<Node> {
        let mut heir = *self.heirs.get(&dead)?;
        for _ in 0..self.heirs.len() {
            match self.heirs.get(&heir) {
                Some(next) => heir = *next,
                None => break,
            }
        }
        self.address(heir).map(|_| heir)
    }

    /// Providers that were moved to another metapeer since the start.
    pub fn moves(&self) -> u64 {
        self.moves
    }

    /// Changes whenever anyone takes or leaves a slot.
    pub fn changes(&self) -> u64 {
        self.changes
    }

    /// Changes whenever the shape (metapeers, slots) does.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// The most slots a metapeer has.
    pub fn slots_max(&self) -> usize {
        self.metapeers.iter().map(Metapeer::slots).max().unwrap_or(0)
    }

    /// Whether f metapeers are about as full (nine tenths) as the fullest.
    pub fn are_even(&self) -> bool {
        let fullest = self.metapeers.iter().map(Metapeer::occupied).max().unwrap_or(0);
        let full = self.metapeers.iter().filter(|metapeer| metapeer.occupied * 10 >= fullest * 9);
        full.count() >= self.fragments
    }

    /// A provider came (or came back).
    pub fn join(&mut self, node: Node, group: Group) {
        self.heirs.remove(&node);
        self.sit(node, group);
        self.upkeep(group);
    }

    /// A provider went; where it is `dead`, whoever takes its slot is its heir.
    pub fn leave(&mut self, node: Node, dead: bool) {
        let Some(address) = self.address(node) else { return };
        let group = self.metapeers[address.metapeer].group;
        self.stand_up(node, dead);
        self.upkeep(group);
    }

    /// A dead provider is no longer referred to.
    pub fn forget(&mut self, node: Node) {
        self.leave(node, false);
        let heir = self.heirs.remove(&node);
        match heir {
            Some(heir) => {
                self.heirs.values_mut().filter(|next| **next == node).for_each(|next| *next = heir);
            }
            None => self.heirs.retain(|_, next| *next != node),
        }
        let mut shrunk = Vec::new();
        for metapeer in &mut self.metapeers {
            for slot in metapeer.slots.iter_mut().filter(|slot| slot.before == Some(node)) {
                slot.before = None;
                metapeer.mourned -= 1;
                shrunk.push(metapeer.group);
            }
        }
        shrunk.into_iter().for_each(|group| self.upkeep(group));
    }

    // ------------------------------------------------------------ seats

    /// Gives a newcomer a slot: that of a dead provider, else one in the smallest metapeer.
    fn sit(&mut self, node: Node, group: Group) {
        let cuts = self.groups.entry(group).or_default();
        cuts.members += 1;
        self.seated += 1;
        self.grouped += usize::from(group != Group::Alone);
        let metapeer = if group == Group::Alone {
            self.open_alone()
        } else {
            let (all, size) = (cuts.metapeers.iter().copied(), size_in(&self.metapeers));
            let mourned = all.clone().filter(|at| self.metapeers[*at].mourned > 0);
            mourned.min_by_key(&size).or_else(|| all.min_by_key(&size))
        };
        let metapeer = metapeer.unwrap_or_else(|| self.add_metapeer(group));
        self.occupy(metapeer, node, true);
    }

    /// The metapeer of one provider that was vacated last, if there is any.
    fn open_alone(&self) -> Option<usize> {
        let cuts = self.groups.get(&Group::Alone)?;
        // The newcomer is counted already.
        if cuts.members > cuts.metapeers.len() {
            return None;
        }
        cuts.metapeers.iter().rev().copied().find(|at| self.metapeers[*at].occupied == 0)
    }

    fn add_metapeer(&mut self, group: Group) -> usize {
        self.metapeers.push(Metapeer { group, slots: Vec::new(), occupied: 0, mourned: 0 });
        let metapeer = self.metapeers.len() - 1;
        self.groups.entry(group).or_default().metapeers.push(metapeer);
        self.version += 1;
        metapeer
    }

    fn occupy(&mut self, metapeer: usize, node: Node, inherits: bool) {
        let seats = &mut self.metapeers[metapeer];
        // Whoever only moves leaves the slots of the dead to newcomers.
        let vacant = |mourned: bool| {
            let fits = |slot: &Slot| slot.now.is_none() && slot.before.is_some() == mourned;
            seats.slots.iter().position(fits)
        };
        let heir = if inherits { vacant(true) } else { None };
        let slot = heir.or_else(|| vacant(false)).unwrap_or_else(|| {
            seats.slots.push(Slot::default());
            self.version += 1;
            seats.slots.len() - 1
        });
        let before = seats.slots[slot].before.take();
        seats.slots[slot].now = Some(node);
        seats.occupied += 1;
        seats.mourned -= usize::from(before.is_some());
        self.changes += 1;
        if let Some(before) = before.filter(|before| *before != node) {
            self.heirs.insert(before, node);
        }
        if node.index() >= self.address.len() {
            self.address.resize(node.index() + 1, None);
        }
        self.address[node.index()] = Some(SlotAddress { metapeer, slot });
    }

    fn stand_up(&mut self, node: Node, dead: bool) {
        let Some(SlotAddress { metapeer, slot }) =
            self.address.get_mut(node.index()).and_then(Option::take)
        else {
            return;
        };
        let seats = &mut self.metapeers[metapeer];
        seats.slots[slot] = Slot { now: None, before: dead.then_some(node) };
        seats.occupied -= 1;
        seats.mourned += usize::from(dead);
        self.changes += 1;
        self.seated -= 1;
        self.grouped -= usize::from(seats.group != Group::Alone);
        if let Some(cuts) = self.groups.get_mut(&seats.group) {
            cuts.members -= 1;
        }
    }

    /// Moves one provider between two metapeers of a group: the last one, so that its slot can go.
    fn transfer(&mut self, from: usize, to: usize) {
        let seats = &mut self.metapeers[from];
        let last = seats.slots.iter_mut().rev().find(|slot| slot.now.is_some());
        let Some(node) = last.and_then(|slot| slot.now.take()) else {
            // Only the dead are left: they wait for heirs no longer.
            seats.slots.clear();
            seats.mourned = 0;
            self.version += 1;
            return;
        };
        seats.occupied -= 1;
        while seats.slots.last().is_some_and(|slot| slot.now.is_none() && slot.before.is_none()) {
            seats.slots.pop();
        }
        self.moves += 1;
        self.version += 1;
        self.occupy(to, node, false);
    }

    // ------------------------------------------------------------ sizes

    /// The size aimed at.
    fn size_wanted(&self) -> f64 {
        let (n, f) = (self.grouped as f64, self.fragments as f64);
        let size = if n >= f * f { n / f } else { n / (2.0 * f) };
        size.max(1.0)
    }

    /// How many metapeers a group of `members` is cut into.
    fn cuts_wanted(&self, group: Group, members: usize, size: f64) -> usize {
        if group == Group::Alone {
            return members;
        }
        let cuts = (members as f64 / size - 0.25).ceil() as usize;
        cuts.clamp(1, members.max(1))
    }

    /// After a change in one group.
    fn upkeep(&mut self, group: Group) {
        let (seated, groups) = self.formed;
        let grown = self.seated.abs_diff(seated) * 5 > seated;
        if grown || self.groups.len() != groups && self.groups.len() < 4 * self.fragments {
            return self.form();
        }
        if self.groups.get(&group).is_some_and(|cuts| cuts.members == 0) {
            self.resize(group, 0);
        } else if group != Group::Alone {
            if self.of_group(group).is_empty() {
                self.resize(group, 1);
            }
            self.level(group, true);
        }
    }

    /// Decides all sizes anew.
    fn form(&mut self) {
        let total = |size: f64| -> usize {
            let groups = self.groups.iter();
            groups.map(|(group, cuts)| self.cuts_wanted(*group, cuts.members, size)).sum()
        };
        let mut size = self.size_wanted();
        while size > 1.0 && total(size) < self.fragments {
            size = (size * 0.95).max(1.0);
        }
        let groups = self.groups.iter().filter(|(group, _)| **group != Group::Alone);
        let wanted: Vec<(Group, usize)> = groups
            .map(|(group, cuts)| match cuts.members {
                0 => (*group, 0),
                members => (*group, self.cuts_wanted(*group, members, size)),
            })
            .collect();
        for (group, cuts) in wanted {
            self.resize(group, cuts);
            self.compact(group);
            self.level(group, false);
        }
        self.drop_vacant_alone();
        self.formed = (self.seated, self.groups.len());
    }

    /// Where more than a quarter of the metapeers of one are vacant, they go.
    fn drop_vacant_alone(&mut self) {
        let Some(cuts) = self.groups.get(&Group::Alone) else { return };
        if cuts.members * 4 >= cuts.metapeers.len() * 3 {
            return;
        }
        let mut vacant = cuts.metapeers.clone();
        vacant.retain(|at| self.metapeers[*at].occupied == 0);
        vacant.sort_unstable();
        // From the end, so that no number still to be removed changes.
        vacant.into_iter().rev().for_each(|metapeer| self.remove_metapeer(metapeer));
    }

    /// Adds empty metapeers to a group, or dissolves its smallest; 0 removes the group.
    fn resize(&mut self, group: Group, wanted: usize) {
        while self.of_group(group).len() < wanted {
            self.add_metapeer(group);
        }
        while self.of_group(group).len() > wanted {
            let all = self.of_group(group);
            let size = size_in(&self.metapeers);
            let Some(smallest) = all.iter().copied().min_by_key(size) else { break };
            while self.metapeers[smallest].occupied > 0 {
                let others = self.of_group(group).iter().copied().filter(|at| *at != smallest);
                let Some(to) = others.min_by_key(size_in(&self.metapeers)) else { break };
                self.transfer(smallest, to);
            }
            self.remove_metapeer(smallest);
        }
        if wanted == 0 {
            self.groups.remove(&group);
        }
    }

    fn remove_metapeer(&mut self, metapeer: usize) {
        let group = self.metapeers[metapeer].group;
        if let Some(cuts) = self.groups.get_mut(&group) {
            cuts.metapeers.retain(|at| *at != metapeer);
        }
        let last = self.metapeers.len() - 1;
        self.metapeers.swap_remove(metapeer);
        self.version += 1;
        let Some(moved) = self.metapeers.get(metapeer) else { return };
        if let Some(cuts) = self.groups.get_mut(&moved.group) {
            cuts.metapeers.iter_mut().filter(|at| **at == last).for_each(|at| *at = metapeer);
        }
        for (slot, occupant) in moved.slots.iter().enumerate() {
            if let Some(node) = occupant.now {
                self.address[node.index()] = Some(SlotAddress { metapeer, slot });
            }
        }
    }

    /// Where more than a quarter of a metapeer's slots are vacant, they go.
    fn compact(&mut self, group: Group) {
        let all = self.groups.get(&group).map(|cuts| cuts.metapeers.clone()).unwrap_or_default();
        for metapeer in all {
            let seats = &mut self.metapeers[metapeer];
            if seats.occupied * 4 >= seats.slots.len() * 3 {
                continue;
            }
            seats.slots.retain(|slot| slot.now.is_some());
            seats.mourned = 0;
            for (slot, occupant) in seats.slots.iter().enumerate() {
                if let Some(node) = occupant.now {
                    self.address[node.index()] = Some(SlotAddress { metapeer, slot });
                }
            }
            self.version += 1;
        }
    }

    /// Evens a group's metapeers out: until they differ by at most one, or, `gently`, once and only
    /// where they differ by more than their slack.
    fn level(&mut self, group: Group, gently: bool) {
        while let Some((largest, smallest)) = self.uneven(group, gently) {
            self.transfer(largest, smallest);
        }
    }

    /// The largest and the smallest metapeer of a group, where they differ by too much.
    fn uneven(&self, group: Group, gently: bool) -> Option<(usize, usize)> {
        let size = size_in(&self.metapeers);
        let largest = self.of_group(group).iter().copied().max_by_key(&size)?;
        let smallest = self.of_group(group).iter().copied().min_by_key(&size)?;
        let (most, least) = (size(&largest), size(&smallest));
        let allowed = if gently { slack(least) } else { 1 };
        (most > least + allowed).then_some((largest, smallest))
    }
}

/// How much larger than one of `least` providers a metapeer of the group may be.
fn slack(least: usize) -> usize {
    (least / 8).max(1)
}

fn size_in(metapeers: &[Metapeer]) -> impl Fn(&usize) -> usize {
    |at| metapeers[*at].size()
}

#[cfg(test)]
mod tests;
