//! What one identity may hold of a server, over all its connections: a client that floods takes its own
//! share and nobody else's.
//!
//! Connections beyond the share are closed as soon as the certificate was read; gRPC calls beyond it are
//! answered with `RESOURCE_EXHAUSTED` before their message is read; everything else waits inside the share,
//! because whoever is over it is not read from. A share exists as long as one of its
//! connections does.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::BulkLimits;
use super::frame_io::byte_limit;
use crate::tls::{KeyHash, PeerIdentity};

/// What one identity may hold at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShareLimits {
    /// Connections.
    pub connections_max: usize,
    /// gRPC calls under way, streams among them; each may hold one message.
    pub calls_max: usize,
    /// Gets in frames that are answered at once; each may hold one fragment.
    pub gets_served_max: usize,
    /// Bytes of bodies received in frames and not yet consumed.
    pub received_bytes_max: usize,
    /// Bytes of bodies queued for sending in frames: what a peer that never reads can hold.
    pub queued_bytes_max: usize,
}

impl Default for ShareLimits {
    fn default() -> Self {
        Self {
            connections_max: 64,
            calls_max: 256,
            gets_served_max: 64,
            received_bytes_max: 64 << 20,
            queued_bytes_max: 64 << 20,
        }
    }
}

/// One identity's share.
#[derive(Debug)]
pub(super) struct Share {
    connections: Arc<Semaphore>,
    pub calls: Arc<Semaphore>,
    pub gets: Arc<Semaphore>,
    pub received: Arc<Semaphore>,
    pub queued: Arc<Semaphore>,
}

impl Share {
    pub(super) fn new(limits: ShareLimits) -> Self {
        Self {
            connections: Arc::new(Semaphore::new(limits.connections_max)),
            calls: Arc::new(Semaphore::new(limits.calls_max)),
            gets: Arc::new(Semaphore::new(limits.gets_served_max)),
            received: byte_limit(limits.received_bytes_max),
            queued: byte_limit(limits.queued_bytes_max),
        }
    }
}

impl Share {
    /// The share of a peer with one connection, by that connection's limits.
    pub(super) fn alone(limits: &BulkLimits) -> Self {
        Self::new(ShareLimits {
            connections_max: 1,
            calls_max: 1,
            gets_served_max: limits.gets_served_max,
            received_bytes_max: limits.received_bytes_max,
            queued_bytes_max: limits.queued_bytes_max,
        })
    }
}

/// The shares of those who are connected.
#[derive(Debug)]
pub(super) struct Shares {
    limits: ShareLimits,
    known: Mutex<HashMap<KeyHash, Weak<Share>>>,
}

impl Shares {
    pub fn new(limits: ShareLimits) -> Self {
        Self { limits, known: Mutex::default() }
    }

    /// A connection's place in its identity's share; `None`: it has as many as it may.
    pub fn enter(&self, peer: &PeerIdentity) -> Option<(Arc<Share>, OwnedSemaphorePermit)> {
        let mut known = self.known.lock();
        let share = known.get(&peer.key_hash).and_then(Weak::upgrade).unwrap_or_else(|| {
            // Those without connections are swept when somebody new comes.
            known.retain(|_, share| share.strong_count() > 0);
            let share = Arc::new(Share::new(self.limits));
            known.insert(peer.key_hash, Arc::downgrade(&share));
            share
        });
        let place = Arc::clone(&share.connections).try_acquire_owned().ok()?;
        Some((share, place))
    }
}

/// What counts as one address: an IPv4 address, or an IPv6 network of 64 bits, which one household has.
pub fn network_of(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => IpAddr::V6(Ipv6Addr::from_bits(v6.to_bits() >> 64 << 64)),
        v4 => v4,
    }
}

/// Handshakes under way of each network ([`network_of`]): one that never finishes them keeps only its own
/// away.
#[derive(Debug)]
pub(super) struct Handshakes {
    max: usize,
    under_way: Mutex<HashMap<IpAddr, usize>>,
}

/// One handshake's place.
#[derive(Debug)]
pub(super) struct Shaking {
    all: Arc<Handshakes>,
    network: IpAddr,
}

impl Handshakes {
    pub fn new(max: usize) -> Arc<Self> {
        Arc::new(Self { max, under_way: Mutex::default() })
    }

    /// A place for one more of this address's network; `None`: it has too many.
    pub fn begin(self: &Arc<Self>, address: IpAddr) -> Option<Shaking> {
        let network = network_of(address);
        let mut under_way = self.under_way.lock();
        let count = under_way.entry(network).or_default();
        if *count >= self.max {
            return None;
        }
        *count += 1;
        Some(Shaking { all: Arc::clone(self), network })
    }
}

impl Drop for Shaking {
    fn drop(&mut self) {
        let mut under_way = self.all.under_way.lock();
        if let Some(count) = under_way.get_mut(&self.network) {
            *count -= 1;
            if *count == 0 {
                under_way.remove(&self.network);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Who has a network of IPv6 has 2^64 addresses: one for each handshake that never ends.
    #[test]
    fn a_network_of_ipv6_counts_as_one_address() {
        let handshakes = Handshakes::new(3);
        let address = |text: &str| text.parse::<IpAddr>().unwrap();
        let home = ["2001:db8:1:2::1", "2001:db8:1:2::2", "2001:db8:1:2:ffff:ffff:ffff:ffff"];
        let held: Vec<_> = home.map(|text| handshakes.begin(address(text))).into_iter().collect();
        assert!(held.iter().all(Option::is_some));
        assert!(
            handshakes.begin(address("2001:db8:1:2::7")).is_none(),
            "the fourth of one network"
        );
        assert!(handshakes.begin(address("2001:db8:1:3::1")).is_some(), "the neighbour's");
        // An address of IPv4 is one, however it is written.
        let v4 =
            ["10.0.0.1", "::ffff:10.0.0.1", "10.0.0.1"].map(|text| handshakes.begin(address(text)));
        assert!(v4.iter().all(Option::is_some) && handshakes.begin(address("10.0.0.1")).is_none());
        assert!(handshakes.begin(address("10.0.0.2")).is_some());
        drop((held, v4));
        assert!(handshakes.under_way.lock().is_empty(), "nothing is remembered");
        assert!(handshakes.begin(address("2001:db8:1:2::7")).is_some());
    }
}
