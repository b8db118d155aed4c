//! Who is let in, beyond the certificate: keys that are refused, and the notice of who came.
//!
//! A [`Door`] is held by whoever knows which keys are members no more; a server asks its [`Admission`].
//! A key that gets onto the list loses what it has open: framed connections and new ones at once; a gRPC
//! connection answers every call with `UNAUTHENTICATED` and is cut after [`FAREWELL`], so that its
//! owner learns why instead of dialling for ever.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};

use crate::tls::{KeyHash, PeerIdentity, Role};

/// How long a refused peer is told so.
pub const FAREWELL: Duration = Duration::from_secs(2);
/// What a refused peer is told.
pub const REFUSED: &str = "this certificate was revoked or has expired: join again with a new code";

/// Keys that are members no more.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RefusedKeys(Arc<HashSet<KeyHash>>);

impl FromIterator<KeyHash> for RefusedKeys {
    fn from_iter<T: IntoIterator<Item = KeyHash>>(keys: T) -> Self {
        Self(Arc::new(keys.into_iter().collect()))
    }
}

/// Where the list of refused keys is set.
#[derive(Debug, Clone)]
pub struct Door {
    refused: watch::Sender<RefusedKeys>,
}

impl Door {
    /// A door that refuses these keys.
    pub fn new(refused: RefusedKeys) -> Self {
        Self { refused: watch::Sender::new(refused) }
    }

    /// Refuses these keys from now on, and no others.
    pub fn refuse(&self, keys: RefusedKeys) {
        self.refused.send_replace(keys);
    }

    /// For a server.
    pub fn admission(&self) -> Admission {
        Admission { refused: self.refused.subscribe(), met: None }
    }
}

/// A server's side of a [`Door`].
#[derive(Debug, Clone)]
pub struct Admission {
    refused: watch::Receiver<RefusedKeys>,
    met: Option<mpsc::Sender<PeerIdentity>>,
}

impl Default for Admission {
    /// Refuses nobody.
    fn default() -> Self {
        Door::new(RefusedKeys::default()).admission()
    }
}

impl Admission {
    /// Says on this channel who connects; where it is full, or nobody listens, it says nothing.
    #[must_use]
    pub fn telling(mut self, met: mpsc::Sender<PeerIdentity>) -> Self {
        self.met = Some(met);
        self
    }

    /// Somebody has connected.
    pub(super) fn met(&self, peer: &PeerIdentity) {
        if let Some(met) = &self.met {
            let _full = met.try_send(peer.clone());
        }
    }

    /// Whether this peer is refused now. The directory itself never is.
    pub fn refuses(&self, peer: &PeerIdentity) -> bool {
        peer.role != Role::Directory && self.refused.borrow().0.contains(&peer.key_hash)
    }

    /// Waits until this peer is refused. Cancel-safe.
    pub async fn refused(&self, peer: &PeerIdentity) {
        let mut refused = self.refused.clone();
        let is_on = |keys: &RefusedKeys| keys.0.contains(&peer.key_hash);
        let on_list = peer.role != Role::Directory && refused.wait_for(is_on).await.is_ok();
        if !on_list {
            // Nobody can refuse it any more.
            std::future::pending::<()>().await;
        }
    }
}
