//! What every chooser looks at: the providers, the pair counters, the metapeers of each block width.
//!
//! Invariants: metapeers know exactly the present providers of the field; pair counters name only
//! providers that were not forgotten. Nothing here fails.

use super::field::{Field, Node, ProviderFacts};
use super::metapeers::Metapeers;
use super::pairs::PairCounters;
use crate::ids::ProviderId;

/// Block widths whose metapeers are kept; the one used longest ago makes room.
const FORMATIONS_MAX: usize = 8;

/// The swarm as the choosers see it.
#[derive(Clone, Debug, Default)]
pub struct Landscape {
    field: Field,
    pairs: PairCounters,
    /// The last used first.
    formations: Vec<Metapeers>,
}

impl Landscape {
    /// No provider yet; pair counters as given.
    pub fn new(pairs: PairCounters) -> Self {
        Self { pairs, ..Self::default() }
    }

    /// The providers.
    pub fn field(&self) -> &Field {
        &self.field
    }

    /// How many blocks two providers share.
    pub fn pairs(&self) -> &PairCounters {
        &self.pairs
    }

    pub(super) fn pairs_mut(&mut self) -> &mut PairCounters {
        &mut self.pairs
    }

    /// The metapeers for blocks of `fragments`, if [`Landscape::form`] was asked for them.
    pub fn metapeers(&self, fragments: usize) -> Option<&Metapeers> {
        self.formations.iter().find(|metapeers| metapeers.fragments() == fragments)
    }

    /// Sees to it that there are metapeers for blocks of `fragments`.
    pub fn form(&mut self, fragments: usize) {
        let known = self.formations.iter().position(|known| known.fragments() == fragments);
        match known {
            Some(at) => self.formations[..=at].rotate_right(1),
            None => {
                self.formations.truncate(FORMATIONS_MAX - 1);
                self.formations.insert(0, Metapeers::new(&self.field, fragments));
            }
        }
    }

    pub(super) fn upsert(&mut self, facts: &ProviderFacts) -> Node {
        let upserted = self.field.upsert(facts);
        if upserted.joined {
            let group = self.field.known(upserted.node).group;
            for metapeers in &mut self.formations {
                metapeers.leave(upserted.node, false);
                metapeers.join(upserted.node, group);
            }
        }
        upserted.node
    }

    pub(super) fn update(&mut self, provider: ProviderId, free_bytes: u64, usable: bool) {
        if let Some(node) = self.field.node(provider) {
            self.field.update(node, free_bytes, usable);
        }
    }

    pub(super) fn retire(&mut self, provider: ProviderId) {
        if let Some((node, _)) = self.field.retire(provider) {
            self.formations.iter_mut().for_each(|metapeers| metapeers.leave(node, true));
        }
    }

    pub(super) fn forget(&mut self, provider: ProviderId) {
        let Some(node) = self.field.forget(provider) else { return };
        self.formations.iter_mut().for_each(|metapeers| metapeers.forget(node));
        self.pairs.clear(node, self.field.nodes_end());
    }
}
