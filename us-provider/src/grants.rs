//! Who may move fragments: grants, judged.
//!
//! A provider knows the directory's grant key and its present *period* from the directory itself: at
//! the welcome and whenever a period begins. Between, and while the directory is away, it counts on by
//! its own boot clock (which goes on while the machine sleeps; the wall clock says nothing). It writes
//! down each period it has counted to, and after a start goes on from there: a grant that had ended
//! stays ended, and others are honoured until they end. A kill loses less than one period; time in which
//! the provider does not run is not counted, because a boot clock says nothing of an earlier boot. Before
//! it was ever told a key it moves nothing.
//!
//! The directory's word always counts: it may be behind the own counting, because its time stands still
//! while it does not run. A grant that it signed later than the last word shows that time went on.
//!
//! [`Judge`] is the rule, without clock or disk; [`Grants`] is what the service asks. A verified grant
//! is kept by its bytes, so that the next request with it costs one look into a cache.

mod file;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::{Mutex, RwLock};
use quick_cache::sync::Cache;
use tokio_util::sync::CancellationToken;
use us_core::daemon::files::{Access, write_atomic};
use us_core::grant::{GRANT_KEY_BYTES, Grant, GrantError, Rights};
use us_core::ids::{BlockId, ClusterId, VolumeId};
use us_core::tls::{PeerIdentity, Role};

pub use file::{decode_told, encode_told};

/// Verified grants that are kept.
const VERIFIED_MAX: usize = 4096;
/// The shortest time between two looks whether a period has begun, and the one before a directory was
/// heard.
const LOOK_MS: (u64, u64) = (50, 1000);

/// What the directory said of grants.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Told {
    /// Its public key.
    pub key: [u8; GRANT_KEY_BYTES],
    /// Its cluster.
    pub cluster: ClusterId,
    /// Its incarnation.
    pub incarnation: u64,
    /// The period it said it was.
    pub period: u64,
    /// How long a period lasts; more than 0.
    pub period_ms: u64,
}

/// Why a request is not served.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Denied {
    /// Not for this role, whatever it shows.
    #[error("a {role} may not do this with fragments")]
    Role {
        /// The role.
        role: Role,
    },
    /// No directory has said yet which grants count.
    #[error("this provider has not heard from its directory yet which grants count")]
    NotTold,
    /// It shows none.
    #[error("no grant is shown: fragments move only with one of the directory's")]
    Missing,
    /// It shows something else, or an altered one.
    #[error(transparent)]
    Forged(#[from] GrantError),
    /// A grant of another cluster.
    #[error("the grant is of another cluster")]
    Cluster,
    /// Another's grant.
    #[error("the grant is another's: it counts only with the certificate it was given to")]
    Holder,
    /// A read-only grant, and more is wanted.
    #[error("the grant is for reading only")]
    ReadOnly,
    /// Its time is over.
    #[error("the grant has ended (period {until}, it is {present} now)")]
    Expired {
        /// The last period it was good in.
        until: u64,
        /// The present one.
        present: u64,
    },
    /// It speaks of another volume or block.
    #[error("the grant is for another volume or block")]
    Elsewhere,
}

impl Denied {
    /// The value of the metrics' label `reason`.
    pub const fn label(&self) -> &'static str {
        match self {
            Self::Role { .. } => "role",
            Self::NotTold => "not_told",
            Self::Missing => "missing",
            Self::Forged(_) => "forged",
            Self::Cluster => "cluster",
            Self::Holder => "holder",
            Self::ReadOnly => "read_only",
            Self::Expired { .. } => "expired",
            Self::Elsewhere => "elsewhere",
        }
    }
}

/// The rule: whether a grant counts now.
#[derive(Clone, Copy, Debug)]
pub struct Judge {
    told: Told,
    at_ms: u64,
}

impl Judge {
    /// Of one that was told this at `now_ms` of the boot clock.
    pub fn new(told: Told, now_ms: u64) -> Self {
        Self { told, at_ms: now_ms }
    }

    /// The present period, as far as it is known.
    pub fn present(&self, now_ms: u64) -> u64 {
        let passed = now_ms.saturating_sub(self.at_ms) / self.told.period_ms.max(1);
        self.told.period.saturating_add(passed)
    }

    /// How long the present period lasts on.
    fn left_ms(&self, now_ms: u64) -> u64 {
        let period_ms = self.told.period_ms.max(1);
        period_ms - now_ms.saturating_sub(self.at_ms) % period_ms
    }

    /// What it would have to be told at the next start, to go on from here.
    fn counted(&self, now_ms: u64) -> Told {
        Told { period: self.present(now_ms), ..self.told }
    }

    /// Whether a grant that the directory signed shows that more time has passed than is known here.
    pub fn is_news(&self, grant: &Grant, now_ms: u64) -> bool {
        let said = (grant.incarnation, grant.from);
        said > (self.told.incarnation, self.present(now_ms))
    }

    /// Learns the time from such a grant.
    pub fn learn(&mut self, grant: &Grant, now_ms: u64) {
        if self.is_news(grant, now_ms) {
            self.told = Told { incarnation: grant.incarnation, period: grant.from, ..self.told };
            self.at_ms = now_ms;
        }
    }

    /// Whether `peer` may do this with it; what it is for is not asked here.
    ///
    /// # Errors
    /// [`Denied`].
    pub fn judge(
        &self,
        grant: &Grant,
        peer: &PeerIdentity,
        wanted: Rights,
        now_ms: u64,
    ) -> Result<(), Denied> {
        if grant.cluster != self.told.cluster {
            return Err(Denied::Cluster);
        }
        if grant.holder != peer.key_hash {
            return Err(Denied::Holder);
        }
        if !grant.rights.allow(wanted) {
            return Err(Denied::ReadOnly);
        }
        let present = self.present(now_ms);
        if grant.incarnation < self.told.incarnation || grant.until < present {
            return Err(Denied::Expired { until: grant.until, present });
        }
        Ok(())
    }
}

/// What an admitted request may be about.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Admitted {
    /// Anything: the directory asks.
    Everything,
    /// What this grant covers.
    Grant(Arc<Grant>),
}

impl Admitted {
    /// Whether it can be about this block, of whatever volume.
    ///
    /// # Errors
    /// [`Denied::Elsewhere`].
    pub fn may_cover(&self, block: BlockId) -> Result<(), Denied> {
        match self {
            Self::Grant(grant) if !grant.may_cover(block) => Err(Denied::Elsewhere),
            Self::Everything | Self::Grant(_) => Ok(()),
        }
    }

    /// Whether it is about this block of this volume.
    ///
    /// # Errors
    /// [`Denied::Elsewhere`].
    pub fn covers(&self, volume: VolumeId, block: BlockId) -> Result<(), Denied> {
        match self {
            Self::Grant(grant) if !grant.covers(volume, block) => Err(Denied::Elsewhere),
            Self::Everything | Self::Grant(_) => Ok(()),
        }
    }
}

/// The grants of a provider. Clones share what is known.
#[derive(Clone)]
pub struct Grants {
    shared: Arc<Shared>,
}

struct Shared {
    path: PathBuf,
    judge: RwLock<Option<Judge>>,
    /// What the file says; held while it is written.
    written: Mutex<Option<Told>>,
    verified: Cache<Bytes, Arc<Grant>>,
}

impl std::fmt::Debug for Grants {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Grants").field(&*self.shared.judge.read()).finish()
    }
}

impl Grants {
    /// Those of the provider in `data`: it goes on from where it had counted to. Blocks.
    pub fn load(data: &Path) -> Self {
        let path = data.join("grants");
        let told = match std::fs::read(&path) {
            Ok(bytes) => decode_told(&bytes).or_else(|| {
                tracing::warn!(path = %path.display(), "damaged; the directory will say it again");
                None
            }),
            Err(error) => {
                tracing::debug!(path = %path.display(), %error, "not told of grants yet");
                None
            }
        };
        let judge = RwLock::new(told.map(|told| Judge::new(told, boottime_ms())));
        let (written, verified) = (Mutex::new(told), Cache::new(VERIFIED_MAX));
        Self { shared: Arc::new(Shared { path, judge, written, verified }) }
    }

    /// The directory's word: it counts from now on, and is written down. Blocks.
    ///
    /// # Errors
    /// The disk's: it counts all the same, until the next start.
    pub fn told(&self, told: Told) -> std::io::Result<()> {
        let now_ms = boottime_ms();
        let before = self.shared.judge.write().replace(Judge::new(told, now_ms));
        if before.is_none_or(|before| before.told.key != told.key) {
            self.shared.verified.clear();
        }
        self.keep(now_ms)
    }

    /// Writes down the present period, where the file says another. Blocks.
    fn keep(&self, now_ms: u64) -> std::io::Result<()> {
        let mut written = self.shared.written.lock();
        let Some(counted) = self.shared.judge.read().map(|judge| judge.counted(now_ms)) else {
            return Ok(());
        };
        if *written == Some(counted) {
            return Ok(());
        }
        write_atomic(&self.shared.path, &encode_told(&counted), Access::Secret)?;
        *written = Some(counted);
        Ok(())
    }

    /// Writes down each period as it begins, told or counted, until `stop`: one write a period.
    pub async fn keep_counted(self, stop: CancellationToken) {
        loop {
            let left_ms = self.shared.judge.read().map(|judge| judge.left_ms(boottime_ms()));
            let pause = Duration::from_millis(left_ms.unwrap_or(LOOK_MS.1).max(LOOK_MS.0));
            // Cancel-safe: a dropped sleep loses nothing.
            if stop.run_until_cancelled(tokio::time::sleep(pause)).await.is_none() {
                return;
            }
            let grants = self.clone();
            let kept = tokio::task::spawn_blocking(move || grants.keep(boottime_ms())).await;
            if let Ok(Err(error)) = kept {
                tracing::warn!(%error, "how far grants' time has gone is not written down");
            }
        }
    }

    /// Whether `peer` may move fragments of what the answer covers, by what it shows.
    ///
    /// # Errors
    /// [`Denied`].
    pub fn admit(
        &self,
        peer: &PeerIdentity,
        shown: &Bytes,
        wanted: Rights,
    ) -> Result<Admitted, Denied> {
        let role = peer.role;
        match (role, wanted) {
            (Role::Directory, _) => return Ok(Admitted::Everything),
            (Role::Client, _) | (Role::Provider, Rights::Read) => {}
            (Role::Provider | Role::Admin, _) => return Err(Denied::Role { role }),
        }
        let now_ms = boottime_ms();
        let judge = *self.shared.judge.read();
        let judge = judge.ok_or(Denied::NotTold)?;
        let grant = self.verified(shown, &judge)?;
        judge.judge(&grant, peer, wanted, now_ms)?;
        if judge.is_news(&grant, now_ms)
            && let Some(judge) = &mut *self.shared.judge.write()
        {
            judge.learn(&grant, now_ms);
        }
        Ok(Admitted::Grant(grant))
    }

    fn verified(&self, shown: &Bytes, judge: &Judge) -> Result<Arc<Grant>, Denied> {
        if shown.is_empty() {
            return Err(Denied::Missing);
        }
        if let Some(grant) = self.shared.verified.get(shown) {
            return Ok(grant);
        }
        let grant = Arc::new(Grant::open(shown, &judge.told.key)?);
        // A copy: the bytes shown may be a part of a frame that is much larger.
        self.shared.verified.insert(Bytes::copy_from_slice(shown), Arc::clone(&grant));
        Ok(grant)
    }
}

fn boottime_ms() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    now.tv_sec as u64 * 1000 + now.tv_nsec as u64 / 1_000_000
}

#[cfg(test)]
mod tests;
