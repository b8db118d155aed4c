//! Who adds up what: the shape of partial sums, without I/O.
//!
//! ```text
//! chain   rebuilder <- n0 <- n1 <- n2 ...          each adds its own part to what it receives
//! sites   rebuilder <- n0 <- n1, n2, n3            one sum for each site
//!                   <- n4 <- n5
//! ```
//! A chain longer than [`COMBINE_DEPTH_MAX`] is several; a site with more than
//! [`COMBINE_UPSTREAMS_MAX`] others besides its head as well.

use std::collections::BTreeMap;
use std::ops::Range;

use bytes::Bytes;
use us_proto::v1::{CombineItem, CombineRequest, CombineUpstream};

use super::order::{Order, Source};
use crate::service::wire_id;

/// Requests inside each other.
pub const COMBINE_DEPTH_MAX: usize = 32;
/// Upstreams of one request.
pub const COMBINE_UPSTREAMS_MAX: usize = 64;

/// A source that adds the sums of others to its own part.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Node {
    /// Its position in the order.
    pub source: usize,
    /// Those whose sums it adds.
    pub upstreams: Vec<Node>,
}

/// The sources one after the other.
pub fn chain(sources: &[usize]) -> Vec<Node> {
    let links = sources.chunks(COMBINE_DEPTH_MAX).map(|sources| {
        let end = None;
        sources.iter().rev().fold(end, |upstream: Option<Node>, source| {
            Some(Node { source: *source, upstreams: upstream.into_iter().collect() })
        })
    });
    links.flatten().collect()
}

/// The sources of each site below one of them. Who names no site stands alone.
pub fn sites(sources: &[usize], order: &Order) -> Vec<Node> {
    let mut heads: Vec<Node> = Vec::new();
    for source in sources.iter().copied() {
        let site = &order.sources[source].site;
        let head = heads.iter_mut().find(|head| {
            !site.is_empty()
                && order.sources[head.source].site == *site
                && head.upstreams.len() < COMBINE_UPSTREAMS_MAX
        });
        let node = Node { source, upstreams: Vec::new() };
        match head {
            Some(head) => head.upstreams.push(node),
            None => heads.push(node),
        }
    }
    heads
}

impl Node {
    /// What to ask of this node, so that it answers the sum of its whole tree. Each who asks shows
    /// its own grant: the rebuilder the order's, a node the one that the order has for it.
    pub fn request(
        &self,
        order: &Order,
        coefficients: &BTreeMap<usize, u8>,
        slots: &Range<usize>,
    ) -> CombineRequest {
        self.request_of(order, &order.grant, coefficients, slots)
    }

    fn request_of(
        &self,
        order: &Order,
        grant: &Bytes,
        coefficients: &BTreeMap<usize, u8>,
        slots: &Range<usize>,
    ) -> CombineRequest {
        let own = &order.sources[self.source].grant;
        let upstreams = self.upstreams.iter().filter_map(|node| {
            let place = order.sources[node.source].place.as_ref()?;
            Some(CombineUpstream {
                address: place.address.clone(),
                key_hash: place.key_hash.as_bytes().to_vec().into(),
                request: Some(node.request_of(order, own, coefficients, slots)),
            })
        });
        let item = CombineItem {
            fragment: Some(wire_id(order.id(order.sources[self.source].index))),
            coefficient: coefficients.get(&self.source).copied().unwrap_or_default().into(),
        };
        CombineRequest {
            grant: grant.clone(),
            items: vec![item],
            first_slot: slots.start as u32,
            slots: slots.len() as u32,
            upstreams: upstreams.collect(),
            ..CombineRequest::default()
        }
    }

    /// The nodes of the tree, each after its upstreams.
    pub fn members(&self) -> Vec<&Node> {
        let mut members: Vec<&Node> = self.upstreams.iter().flat_map(Node::members).collect();
        members.push(self);
        members
    }

    /// The source of this tree with this index.
    pub fn find(&self, index: u32, sources: &[Source]) -> Option<usize> {
        let members = self.members();
        let found = members.iter().find(|node| u32::from(sources[node.source].index) == index);
        found.map(|node| node.source)
    }

    /// Nodes above each other.
    pub fn depth(&self) -> usize {
        1 + self.upstreams.iter().map(Node::depth).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn members(forest: &[Node]) -> Vec<usize> {
        let members = forest.iter().flat_map(Node::members);
        let mut sources: Vec<usize> = members.map(|node| node.source).collect();
        sources.sort_unstable();
        sources
    }

    proptest! {
        #[test]
        fn a_chain_takes_each_source_once(count in 0usize..255) {
            let sources: Vec<usize> = (0..count).collect();
            let forest = chain(&sources);
            prop_assert_eq!(members(&forest), sources);
            prop_assert_eq!(forest.len(), count.div_ceil(COMBINE_DEPTH_MAX));
            prop_assert!(forest.iter().all(|node| node.depth() <= COMBINE_DEPTH_MAX));
        }
    }

    #[test]
    fn a_chain_ends_with_the_last_source() {
        let forest = chain(&[3, 1, 2]);
        assert_eq!((forest[0].source, forest[0].upstreams[0].source), (3, 1));
        let order: Vec<usize> = forest[0].members().iter().map(|node| node.source).collect();
        assert_eq!(order, [2, 1, 3], "upstreams first");
    }
}
