//! Where the fragments of one block go, try by try: pure.
//!
//! Every fragment has one current place. Until the block is acknowledged a place that fails or is
//! slow is given up for another; afterwards places are fixed, because the commit names them, and a
//! fragment that does not get to its place is the business of repair.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    Acknowledge, FragmentBits, FragmentFailure, FragmentLoss, PlacementLease, Retry, SiteNumber,
    StoreError, margin_holds,
};
use crate::geometry::Code;
use crate::ids::{BlockId, FragmentId, ProviderId};

/// Placement leases one block may take for replacements.
const EXTRA_LEASES_MAX: usize = 4;

/// What to do about a fragment whose place failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Replacement {
    /// Put it there.
    Put(ProviderId),
    /// Take another placement lease, and ask again.
    Lease,
    /// There is nobody left to ask.
    Nobody,
}

/// The state of one block's puts.
#[derive(Debug)]
pub(super) struct Placing {
    block: BlockId,
    code: Code,
    acknowledge: Acknowledge,
    /// The place of each fragment.
    pub providers: Vec<ProviderId>,
    /// Fragments that are durable at their place.
    pub durable: FragmentBits,
    /// Providers that failed for this block: not asked again.
    failed: BTreeSet<ProviderId>,
    /// Providers that may be asked, with their sites, as they were leased.
    candidates: Vec<(ProviderId, SiteNumber)>,
    /// The most fragments that the directory gave one labelled site of any lease.
    site_most: usize,
    /// Places that were given up for being slow: the fragment may still get there.
    slow: BTreeSet<(usize, ProviderId)>,
    extra_leases: usize,
    losses: BTreeMap<(usize, ProviderId), FragmentFailure>,
}

impl Placing {
    pub fn new(
        block: BlockId,
        code: Code,
        acknowledge: Acknowledge,
        lease: &PlacementLease,
    ) -> Self {
        let mut placing = Self {
            block,
            code,
            acknowledge,
            candidates: Vec::new(),
            site_most: 1,
            slow: BTreeSet::new(),
            providers: lease.providers.clone(),
            durable: FragmentBits::EMPTY,
            failed: BTreeSet::new(),
            extra_leases: 0,
            losses: BTreeMap::new(),
        };
        placing.leased(lease);
        placing
    }

    /// An error when the margin would not hold with every fragment at its place.
    pub fn check(&self) -> Result<(), StoreError> {
        let all = FragmentBits::all(self.code.fragments());
        if margin_holds(self.code, &self.providers, &all) { Ok(()) } else { Err(self.too_few()) }
    }

    /// Fragment `index` is durable at `provider`. Before the acknowledgement that is its place now;
    /// afterwards it counts only at the place that was committed.
    pub fn stored(&mut self, index: usize, provider: ProviderId, acknowledged: bool) {
        if self.durable.contains(index) || (acknowledged && self.providers[index] != provider) {
            return;
        }
        self.providers[index] = provider;
        self.durable.insert(index);
    }

    /// A put failed.
    pub fn failed(&mut self, index: usize, provider: ProviderId, failure: FragmentFailure) {
        if failure.retry() != Retry::SamePeerLater {
            self.failed.insert(provider);
        }
        self.slow.remove(&(index, provider));
        self.losses.insert((index, provider), failure);
    }

    /// A put takes too long: the provider gets nothing more of this block.
    pub fn slow(&mut self, index: usize, provider: ProviderId, waited_ms: u64) {
        self.failed.insert(provider);
        self.slow.insert((index, provider));
        self.losses.insert((index, provider), FragmentFailure::Timeout { waited_ms });
    }

    /// Whether the block may be acknowledged.
    pub fn is_acknowledged(&self) -> bool {
        let holds = margin_holds(self.code, &self.providers, &self.durable);
        match self.acknowledge {
            Acknowledge::Margin => holds,
            Acknowledge::Full => holds && self.is_settled(),
        }
    }

    /// Whether every fragment is durable.
    pub fn is_settled(&self) -> bool {
        self.durable.count() == self.code.fragments()
    }

    /// More providers to choose from. What the lease gives one site is what a site may hold now.
    pub fn leased(&mut self, lease: &PlacementLease) {
        let sites = lease.sites.iter().copied().chain(std::iter::repeat(SiteNumber::UNLABELLED));
        let mut held: BTreeMap<SiteNumber, usize> = BTreeMap::new();
        for (provider, site) in lease.providers.iter().copied().zip(sites) {
            if site != SiteNumber::UNLABELLED {
                *held.entry(site).or_default() += 1;
            }
            if self.candidates.iter().all(|(known, _)| *known != provider) {
                self.candidates.push((provider, site));
            }
        }
        self.site_most = held.into_values().fold(self.site_most, usize::max);
    }

    /// Fragments but `index` that are in `site`, or may still get there.
    fn in_site(&self, index: usize, site: SiteNumber) -> usize {
        if site == SiteNumber::UNLABELLED {
            return 0;
        }
        let is_here = |provider: &ProviderId| self.candidates.contains(&(*provider, site));
        let others = self.providers.iter().enumerate().filter(|(at, _)| *at != index);
        let held = others.filter(|(at, place)| {
            let slow = self.slow.range((*at, ProviderId(0))..=(*at, ProviderId(u32::MAX)));
            let may_come = || slow.map(|(_, place)| place).any(is_here);
            is_here(place) || !self.durable.contains(*at) && may_come()
        });
        held.count()
    }

    /// Where to put fragment `index` now: where the fewest fragments of the block are, at the
    /// provider and in its site.
    pub fn replace(&mut self, index: usize) -> Replacement {
        let held = |provider: ProviderId| {
            let others = self.providers.iter().enumerate();
            others.filter(|(at, place)| *at != index && **place == provider).count()
        };
        let usable = self.candidates.iter().filter(|(provider, _)| !self.failed.contains(provider));
        let ranked = usable
            .map(|(provider, site)| ((held(*provider), self.in_site(index, *site)), *provider));
        // Of equals the first one leased: leases spread what they give.
        let best = ranked.min_by_key(|(rank, _)| *rank);
        match best {
            Some(((0, in_site), provider)) if in_site < self.site_most => {
                self.providers[index] = provider;
                Replacement::Put(provider)
            }
            _ if self.extra_leases < EXTRA_LEASES_MAX => {
                self.extra_leases += 1;
                Replacement::Lease
            }
            Some((_, provider)) => {
                self.providers[index] = provider;
                Replacement::Put(provider)
            }
            None => Replacement::Nobody,
        }
    }

    /// No more leases are to be had.
    pub fn no_more_leases(&mut self) {
        self.extra_leases = EXTRA_LEASES_MAX;
    }

    /// Why the block cannot be stored, once nothing more can be done.
    pub fn hopeless(&self) -> StoreError {
        let full = |failure: &FragmentFailure| matches!(failure, FragmentFailure::NoSpace);
        if self.losses.values().any(full) {
            return StoreError::NoSpace { block: self.block };
        }
        self.too_few()
    }

    fn too_few(&self) -> StoreError {
        let live = self.providers.iter().filter(|provider| !self.failed.contains(provider));
        StoreError::TooFewProviders {
            block: self.block,
            providers: live.collect::<BTreeSet<_>>().len(),
            margin: self.code.write_margin(),
            needed: self.code.s(),
        }
    }

    /// The margin was not reached in time.
    pub fn timeout(&self) -> StoreError {
        let losses = self.losses.iter().map(|((index, provider), failure)| FragmentLoss {
            fragment: FragmentId { block: self.block, index: *index as u8 },
            provider: *provider,
            failure: failure.clone(),
        });
        StoreError::Timeout {
            block: self.block,
            durable: self.durable.count(),
            fragments: self.code.fragments(),
            losses: losses.collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::Birth;

    fn placing(places: [u32; 6]) -> Placing {
        let block = BlockId::from_bytes([1; 16]);
        let code = Code::new(4, 2).unwrap();
        Placing::new(block, code, Acknowledge::Margin, &lease(&places, &[]))
    }

    fn lease(places: &[u32], sites: &[u32]) -> PlacementLease {
        PlacementLease {
            birth: Birth(1),
            providers: places.iter().copied().map(ProviderId).collect(),
            sites: sites.iter().copied().map(SiteNumber).collect(),
        }
    }

    #[test]
    fn a_failed_place_is_given_up_for_an_empty_one() {
        let mut placing = placing([1, 2, 3, 4, 5, 6]);
        placing.failed(2, ProviderId(3), FragmentFailure::NoSpace);
        assert_eq!(placing.replace(2), Replacement::Lease);
        placing.leased(&lease(&[3, 9], &[]));
        assert_eq!(placing.replace(2), Replacement::Put(ProviderId(9)));
    }

    #[test]
    fn where_nobody_is_empty_fragments_share_a_provider() {
        let mut placing = placing([1, 2, 3, 4, 5, 6]);
        placing.failed(0, ProviderId(1), FragmentFailure::NoSpace);
        placing.no_more_leases();
        assert_eq!(placing.replace(0), Replacement::Put(ProviderId(2)));
        (0..5).for_each(|index| placing.stored(index, placing.providers[index], false));
        assert!(!placing.is_acknowledged(), "provider 2 holds two of the five");
        placing.stored(5, ProviderId(6), false);
        assert!(placing.is_acknowledged());
    }

    /// Providers of five sites died under load, and fragments went to whoever had the least number:
    /// three of one block lay in one site, whose loss with r = 2 left the block unreadable.
    #[test]
    fn a_failed_place_is_given_up_for_one_in_an_emptier_site() {
        let block = BlockId::from_bytes([1; 16]);
        let first = lease(&[1, 6, 2, 3, 4, 5], &[1, 1, 2, 3, 4, 5]);
        let code = Code::new(4, 2).unwrap();
        let mut placing = Placing::new(block, code, Acknowledge::Margin, &first);
        placing.failed(2, ProviderId(2), FragmentFailure::Busy);
        placing.slow(2, ProviderId(2), 900);
        assert_eq!(placing.replace(2), Replacement::Lease);
        // Site 1 is full; of the others site 2 has nothing else of the block.
        placing.leased(&lease(&[11, 13, 12], &[1, 3, 2]));
        assert_eq!(placing.replace(2), Replacement::Put(ProviderId(12)));
        // Provider 2 may still store its fragment: site 2 counts as if it held it.
        placing.slow(3, ProviderId(3), 900);
        assert_eq!(placing.replace(3), Replacement::Put(ProviderId(13)));
        placing.failed(3, ProviderId(13), FragmentFailure::NoSpace);
        placing.failed(3, ProviderId(12), FragmentFailure::NoSpace);
        placing.leased(&lease(&[14, 15], &[1, 4]));
        assert_eq!(placing.replace(3), Replacement::Put(ProviderId(15)));
    }

    #[test]
    fn a_full_site_takes_one_more_only_where_no_lease_names_another() {
        let block = BlockId::from_bytes([1; 16]);
        let first = lease(&[1, 2, 3, 4, 5, 6], &[1, 2, 3, 4, 5, 6]);
        let code = Code::new(4, 2).unwrap();
        let mut placing = Placing::new(block, code, Acknowledge::Margin, &first);
        placing.slow(0, ProviderId(1), 900);
        for _ in 0..EXTRA_LEASES_MAX {
            assert_eq!(placing.replace(0), Replacement::Lease);
            placing.leased(&lease(&[12], &[2]));
        }
        assert_eq!(placing.replace(0), Replacement::Put(ProviderId(12)));
        // The directory knows now that a site is gone: it gives two to another.
        let mut placing = Placing::new(block, code, Acknowledge::Margin, &first);
        placing.slow(0, ProviderId(1), 900);
        assert_eq!(placing.replace(0), Replacement::Lease);
        placing.leased(&lease(&[12, 22], &[2, 2]));
        assert_eq!(placing.replace(0), Replacement::Put(ProviderId(12)));
    }

    #[test]
    fn after_the_acknowledgement_only_the_committed_place_counts() {
        let mut placing = placing([1, 2, 3, 4, 5, 6]);
        placing.stored(0, ProviderId(9), true);
        assert!(!placing.durable.contains(0));
        placing.stored(0, ProviderId(9), false);
        assert_eq!(placing.providers[0], ProviderId(9));
    }

    #[test]
    fn one_provider_alone_is_too_few() {
        assert!(matches!(
            placing([1; 6]).check(),
            Err(StoreError::TooFewProviders { providers: 1, margin: 1, needed: 4, .. })
        ));
        assert_eq!(placing([1, 2, 3, 4, 1, 2]).check(), Ok(()));
    }
}
