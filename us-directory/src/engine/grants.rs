//! Grants given: what a session, or a provider that rebuilds, shows to providers (us-core::grant).
//!
//! Time goes in *periods*, a fifteenth of how long a grant is good for. They are counted while the
//! directory runs. A period begins when the number behind it, with which the next run begins, is durable:
//! nothing is signed and nobody is told of it before, so that none ever comes twice with less time behind
//! it. A restore begins another incarnation, which voids all grants of the one before.
//!
//! A session's grant is for its volume, and renewed when a third of its time is over. Every grant ends:
//! whoever loses his access keeps what he has for `grant_ms` at most.

use bytes::Bytes;
use us_core::grant::{Grant, GrantKey, Rights};
use us_core::ids::{BlockId, ClusterId, VolumeId};
use us_core::seal::Secret;
use us_core::tls::KeyHash;
use us_proto::v1::provider_down::Event as Down;
use us_proto::v1::{GrantTime, Renewed};

use super::{ConnId, Durability, Engine, Then};
use crate::store::StoreError;

/// Periods a grant is good for, after the one it was signed in.
const PERIODS: u64 = 15;
/// A session's grant is renewed when it is so many periods old.
const RENEW_AFTER: u64 = PERIODS / 3;
/// Where a run's numbers of grants begin.
const RUN_SHIFT: u32 = 32;

/// What signing needs.
#[derive(Debug)]
pub(super) struct Signer {
    key: GrantKey,
    cluster: ClusterId,
    /// The period this run began with.
    first: u64,
    serial: u64,
    /// The last period that was stored, durable or not yet.
    stored: u64,
    /// The present one; none until the first is durable.
    present: Option<u64>,
}

/// What a grant is to be for.
pub(super) struct Wanted<'a> {
    pub volume: VolumeId,
    pub block: Option<BlockId>,
    pub holder: &'a [u8],
    pub rights: Rights,
    /// It must last so much longer than others: what it is for takes that long.
    pub lasts_ms: u64,
}

impl Engine {
    /// Gives grants from now on, signed with the key that follows from the recovery secret.
    ///
    /// # Errors
    /// [`StoreError`] when the store fails.
    pub fn sign_grants(&mut self, secret: &Secret) -> Result<(), StoreError> {
        let Some(cluster) = ClusterId::from_slice(&self.cluster.cluster) else { return Ok(()) };
        let first = self.cluster.periods_end;
        let serial = self.cluster.run << RUN_SHIFT;
        let key = GrantKey::of(secret, cluster);
        self.signer = Some(Signer { key, cluster, first, serial, stored: first, present: None });
        self.store_period(first)
    }

    /// Stores that the next run begins behind this period; it begins when that is durable.
    fn store_period(&mut self, period: u64) -> Result<(), StoreError> {
        self.cluster.periods_end = period + 1;
        let seq = self.commit_cluster(Durability::Durable)?;
        self.then(seq, Then::Period(period))
    }

    fn period_ms(&self) -> u64 {
        (self.config.grant_ms / PERIODS).max(1)
    }

    /// The present period; none where no grants are given, or not yet.
    fn period(&self) -> Option<u64> {
        self.signer.as_ref()?.present
    }

    /// What a provider needs to judge grants: the key, and the time.
    pub(super) fn grant_basis(&self) -> (Bytes, Option<GrantTime>) {
        let Some(signer) = &self.signer else { return (Bytes::new(), None) };
        let time = signer.present.map(|period| self.grant_time(period));
        (signer.key.public().to_vec().into(), time)
    }

    fn grant_time(&self, period: u64) -> GrantTime {
        let (incarnation, period_ms) = (self.cluster.incarnation, self.period_ms());
        GrantTime { incarnation, period, period_ms }
    }

    /// Stores the next period when its time has come.
    pub(super) fn count_periods(&mut self) -> Result<(), StoreError> {
        let passed = self.now_ms() / self.period_ms();
        let Some(signer) = &mut self.signer else { return Ok(()) };
        let period = signer.first + passed;
        if period <= signer.stored {
            return Ok(());
        }
        signer.stored = period;
        self.store_period(period)
    }

    /// A period begins: it is durable. Providers are told.
    pub(super) fn begin_period(&mut self, period: u64) {
        let Some(signer) = &mut self.signer else { return };
        signer.present = Some(period);
        let time = self.grant_time(period);
        let online = self.members.values().filter(|member| member.online);
        let conns: Vec<ConnId> = online.filter_map(|member| member.conn).collect();
        for conn in conns {
            self.tell(conn, Down::GrantTime(time));
        }
    }

    /// A grant; empty where none are given, or the holder has no key.
    pub(super) fn sign(&mut self, wanted: &Wanted<'_>) -> Bytes {
        // Sessions and providers are greeted by commits behind the first period's: there is one.
        let (Some(from), incarnation) = (self.period(), self.cluster.incarnation) else {
            return Bytes::new();
        };
        let until = from + PERIODS + wanted.lasts_ms / self.period_ms();
        let Some(holder) = KeyHash::from_slice(wanted.holder) else { return Bytes::new() };
        let Some(signer) = &mut self.signer else { return Bytes::new() };
        signer.serial += 1;
        metrics::counter!("us_directory_grants_total").increment(1);
        signer.key.sign(&Grant {
            cluster: signer.cluster,
            volume: wanted.volume,
            block: wanted.block,
            holder,
            rights: wanted.rights,
            incarnation,
            from,
            until,
            serial: signer.serial,
        })
    }

    /// A session's grant for its volume.
    pub(super) fn session_grant(&mut self, session: u64) -> Bytes {
        let period = self.period();
        let Some(known) = self.sessions.get_mut(&session) else { return Bytes::new() };
        known.granted = period.unwrap_or_default();
        let (volume, holder) = (known.volume, known.record.key_hash.clone());
        let rights = if known.record.read_only { Rights::Read } else { Rights::ReadWrite };
        self.sign(&Wanted { volume, block: None, holder: &holder, rights, lasts_ms: 0 })
    }

    /// The answer to a renewal: with a fresh grant where the last one is old, or refused.
    pub(super) fn renewed(&mut self, session: u64, refused: bool) -> Renewed {
        let period = self.period().unwrap_or_default();
        let known = self.sessions.get(&session);
        let old = known.is_some_and(|known| known.granted + RENEW_AFTER <= period);
        let grant = if old || refused { self.session_grant(session) } else { Bytes::new() };
        Renewed { grant }
    }
}
