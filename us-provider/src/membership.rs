//! The provider's one stream with the directory.
//!
//! [`Member`] is the protocol: it takes what happened and says what to do; it does no I/O.
//! [`link::run`] is the shell around it: it dials, keeps files, asks the store, and dials again for
//! ever when the stream ends.
//!
//! Invariants:
//! - The directory's cookie is durable before anything that follows the welcome is done (rule 12).
//! - A store that belongs to one cluster never serves another.
//! - `DeleteDone`, `RootStored` and `RecordsStored` are sent after the deletion, the root, the records
//!   are durable; a deletion that fails is not answered, and the directory asks again.
//! - `Rebuilt` is sent once for each ticket, on the stream that brought it, or not at all.

mod files;
mod link;
pub mod refused;
pub mod retain;

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use us_core::ids::{ClusterId, FragmentId, ProviderId};
use us_proto::v1::provider_down::Event as Down;
use us_proto::v1::provider_up::Event as Up;
use us_proto::v1::{
    CheckReply, DamageReport, DeleteDone, FragmentStatus, GrantTime, InventoryItem, LeaveProgress,
    ProviderGoodbye, ProviderHello, ProviderReport, ProviderWelcome, RebuildFragments, RefusedKeys,
    RetainPage, RetainReply, StoreRecords, StoreRoot,
};

use crate::copies::Held;
use crate::grants::Told;
use crate::rebuild::{Ended, Ticket};
use crate::service::{id_of, wire_id};

pub use files::{
    FileError, Joined, MembershipFiles, decode_joined, decode_root, encode_joined, encode_root,
};
pub(crate) use link::report;
pub use link::{Hands, LinkConfig, LinkEnd, run};

/// The largest message taken from the directory: a root, or records.
pub const MESSAGE_BYTES_MAX: usize = 32 << 20;
/// Fragments named in one message.
const IDS_MAX: usize = 4096;
/// Heartbeats before the directory said how often it wants them.
const REPORT_EVERY: Duration = Duration::from_secs(2);
/// Bounds of what the directory may ask for.
const REPORT_EVERY_RANGE: (Duration, Duration) =
    (Duration::from_millis(50), Duration::from_secs(60));
/// The first wait after a lost stream; doubles up to the last.
const RETRY_FIRST: Duration = Duration::from_millis(200);
/// The longest wait between two tries.
const RETRY_MAX: Duration = Duration::from_secs(15);

/// What this provider says of itself when it joins.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct About {
    /// Where clients reach it.
    pub address: String,
    /// Its site, a label path; may be empty.
    pub site: String,
    /// The id of its store.
    pub store: [u8; 16],
    /// What its owner says of the line, up and down, in bytes a second; 0: nothing.
    pub line: (u64, u64),
}

/// What the shell is to do, in this order.
#[derive(Clone, PartialEq, Debug)]
pub enum Effect {
    /// Make this durable before the next effect.
    KeepJoined(Joined),
    /// Judge grants by this from now on, and write it down.
    KeepGrants(Told),
    /// Send [`Member::damage`] of everything known to be damaged.
    ReportAllDamage,
    /// Put these into the trash, then send [`Member::deleted`].
    Delete {
        /// The directory's number for it.
        ticket: u64,
        /// The fragments.
        ids: Vec<FragmentId>,
    },
    /// Look for these, then send [`Member::checked`].
    Check {
        /// The directory's number for it.
        query: u64,
        /// The fragments; `None` for one whose id makes no sense.
        ids: Vec<Option<FragmentId>>,
        /// Take those that lie in the trash out of it first.
        bring_back: bool,
        /// Say that the machine is busy where it is too busy for background work.
        when_idle: bool,
    },
    /// Make this root durable, then say so.
    KeepRoot(StoreRoot),
    /// Make these records durable, then say so.
    KeepRecords(StoreRecords),
    /// The owner hears how far the leaving is; after the last word the link ends.
    Leaving(LeaveProgress),
    /// Compare this page with what is here, then answer it.
    Retain(Box<RetainPage>),
    /// Carry this order out, then give its end to [`Member::rebuilt`].
    Rebuild {
        /// Its number.
        ticket: Ticket,
        /// Who we are: a source with this number is on the own disk.
        own: ProviderId,
        /// The order.
        order: Box<RebuildFragments>,
    },
    /// End this order.
    CancelRebuild(Ticket),
    /// Read everything once, now.
    Scrub,
    /// Let nobody with these keys in, and keep the list.
    Refuse(RefusedKeys),
    /// End for good: the directory does not want this provider, or this is another cluster.
    Stop {
        /// Why, for people.
        reason: String,
    },
}

/// The protocol of one provider, over all its streams.
#[derive(Clone, Debug)]
pub struct Member {
    about: About,
    joined: Option<Joined>,
    /// What the directory said of grants.
    told: Option<Told>,
    /// Whether the directory has welcomed the present stream.
    is_welcome: bool,
    report_every: Duration,
    reported: Option<(Instant, ProviderReport)>,
    failures: u32,
    /// The number of the present stream.
    stream: u64,
    /// Orders of the present stream that are not answered.
    rebuilds: BTreeSet<u64>,
}

impl Member {
    /// A provider that joined before as `joined`, or never.
    pub fn new(about: About, joined: Option<Joined>) -> Self {
        Self {
            about,
            joined,
            told: None,
            is_welcome: false,
            report_every: REPORT_EVERY,
            reported: None,
            failures: 0,
            stream: 0,
            rebuilds: BTreeSet::new(),
        }
    }

    /// The first message of a new stream; `held` is what is kept of the directory's own state.
    pub fn connected(&mut self, now: Instant, report: ProviderReport, held: Held) -> Up {
        self.is_welcome = false;
        self.stream += 1;
        self.rebuilds.clear();
        self.reported = Some((now, report.clone()));
        Up::Hello(ProviderHello {
            address: self.about.address.clone(),
            site: self.about.site.clone(),
            store: self.about.store.to_vec().into(),
            cookie: self.joined.as_ref().map(|joined| joined.cookie.clone()).unwrap_or_default(),
            report: Some(report),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            root_sequence: held.root_sequence,
            records: held.records,
        })
    }

    /// The directory sent something.
    pub fn received(&mut self, event: Down) -> Vec<Effect> {
        match event {
            Down::Welcome(welcome) => {
                if let Some(joined) = &self.joined
                    && joined.cluster != welcome.cluster
                {
                    return vec![Effect::Stop {
                        reason: "this store belongs to another cluster: give the provider a new \
                                 data directory, or join it to its own directory"
                            .to_owned(),
                    }];
                }
                self.told = told_of(&welcome);
                let joined = Joined {
                    provider: welcome.provider,
                    cookie: welcome.cookie,
                    cluster: welcome.cluster,
                };
                self.joined = Some(joined.clone());
                self.is_welcome = true;
                self.failures = 0;
                let asked = Duration::from_millis(welcome.report_every_ms);
                if !asked.is_zero() {
                    self.report_every = asked.clamp(REPORT_EVERY_RANGE.0, REPORT_EVERY_RANGE.1);
                }
                let grants = self.told.map(Effect::KeepGrants);
                let effects = [Some(Effect::KeepJoined(joined)), grants];
                effects.into_iter().flatten().chain([Effect::ReportAllDamage]).collect()
            }
            Down::Refused(refused) => vec![Effect::Stop { reason: refused.reason }],
            // Nothing is done for a directory that has not said who we are to it.
            Down::Delete(_)
            | Down::Check(_)
            | Down::StoreRoot(_)
            | Down::StoreRecords(_)
            | Down::Rebuild(_)
            | Down::CancelRebuild(_)
            | Down::StartScrub(_)
            | Down::Retain(_)
            | Down::Leaving(_)
            | Down::RefusedKeys(_)
            | Down::GrantTime(_)
                if !self.is_welcome =>
            {
                Vec::new()
            }
            Down::Rebuild(order) => self.rebuild(order),
            Down::CancelRebuild(cancel) => {
                let ticket = Ticket { stream: self.stream, ticket: cancel.ticket };
                vec![Effect::CancelRebuild(ticket)]
            }
            Down::RefusedKeys(list) => vec![Effect::Refuse(list)],
            Down::GrantTime(time) => {
                self.told = self.told.and_then(|told| at_time(told, &time));
                self.told.map(Effect::KeepGrants).into_iter().collect()
            }
            Down::StartScrub(_) => vec![Effect::Scrub],
            Down::Leaving(said) => vec![Effect::Leaving(said)],
            Down::Retain(page) => vec![Effect::Retain(Box::new(page))],
            Down::Delete(delete) => {
                let ids = delete.fragments.iter().filter_map(id_of).take(IDS_MAX).collect();
                vec![Effect::Delete { ticket: delete.ticket, ids }]
            }
            Down::Check(check) => {
                let ids = check.fragments.iter().map(id_of).take(IDS_MAX).collect();
                let (bring_back, when_idle) = (check.bring_back, check.when_idle);
                vec![Effect::Check { query: check.query, ids, bring_back, when_idle }]
            }
            Down::StoreRoot(root) => vec![Effect::KeepRoot(root)],
            Down::StoreRecords(records) => vec![Effect::KeepRecords(records)],
        }
    }

    /// An order; nothing where the same ticket is already under way, since one answer is due.
    fn rebuild(&mut self, order: RebuildFragments) -> Vec<Effect> {
        let ticket = Ticket { stream: self.stream, ticket: order.ticket };
        let Some(joined) = &self.joined else { return Vec::new() };
        if !self.rebuilds.insert(order.ticket) {
            return Vec::new();
        }
        let own = ProviderId(joined.provider);
        vec![Effect::Rebuild { ticket, own, order: Box::new(order) }]
    }

    /// An order ended: what to say, unless the stream that brought it is gone.
    pub fn rebuilt(&mut self, ended: Ended) -> Option<Up> {
        let is_due = ended.stream == self.stream
            && self.is_welcome
            && self.rebuilds.remove(&ended.rebuilt.ticket);
        is_due.then_some(Up::Rebuilt(ended.rebuilt))
    }

    /// Time has passed, or something changed: a report where one is due, or where it tells
    /// something that cannot wait.
    pub fn tick(&mut self, now: Instant, report: &ProviderReport) -> Option<Up> {
        if !self.is_welcome {
            return None;
        }
        let is_due = self.reported.as_ref().is_none_or(|(at, last)| {
            now.duration_since(*at) >= self.report_every || cannot_wait(last, report)
        });
        is_due.then(|| {
            self.reported = Some((now, report.clone()));
            Up::Report(report.clone())
        })
    }

    /// Whether the directory has welcomed the present stream.
    pub fn is_welcome(&self) -> bool {
        self.is_welcome
    }

    /// How often the directory wants reports.
    pub fn report_every(&self) -> Duration {
        self.report_every
    }

    /// The stream ended: how long to wait before the next try. `jitter` is random in 0..1, so that
    /// providers that lost the same directory do not all come back at once.
    pub fn disconnected(&mut self, jitter: f64) -> Duration {
        self.is_welcome = false;
        let doubled = RETRY_FIRST.saturating_mul(1 << self.failures.min(16));
        self.failures = self.failures.saturating_add(1);
        doubled.min(RETRY_MAX).mul_f64(0.5 + jitter.clamp(0.0, 1.0) / 2.0)
    }

    /// Messages that name damaged fragments.
    pub fn damage(ids: &[FragmentId]) -> impl Iterator<Item = Up> {
        ids.chunks(IDS_MAX).map(|ids| {
            Up::Damage(DamageReport {
                fragments: ids.iter().copied().map(wire_id).collect(),
                detail: "its sums do not hold".to_owned(),
            })
        })
    }

    /// The deletion with this ticket is durable.
    pub fn deleted(ticket: u64) -> Up {
        Up::Deleted(DeleteDone { ticket })
    }

    /// The answer to a check.
    pub fn checked(query: u64, statuses: &[FragmentStatus]) -> Up {
        let statuses = statuses.iter().copied().map(i32::from).collect();
        Up::Checked(CheckReply { query, statuses })
    }

    /// Answers to a page: what is here and not in the list, or nothing yet, or why not.
    pub fn retain(
        page: &RetainPage,
        found: &Result<Option<Vec<InventoryItem>>, String>,
    ) -> Vec<Up> {
        let reply = RetainReply { list: page.list, page: page.page, ..Default::default() };
        let replies = match found {
            Err(refused) => vec![RetainReply { refused: refused.clone(), ..reply }],
            Ok(None) => vec![reply],
            Ok(Some(unlisted)) if unlisted.is_empty() => vec![RetainReply { done: true, ..reply }],
            Ok(Some(unlisted)) => {
                let pages = unlisted.chunks(IDS_MAX);
                let last = pages.len() - 1;
                let part = |(at, unlisted): (usize, &[InventoryItem])| RetainReply {
                    unlisted: unlisted.to_vec(),
                    done: at == last,
                    ..reply.clone()
                };
                pages.enumerate().map(part).collect()
            }
        };
        replies.into_iter().map(Up::Retain).collect()
    }

    /// The last message.
    pub fn goodbye() -> Up {
        Up::Goodbye(ProviderGoodbye { back_in_s: 0 })
    }
}

/// What a welcome says of grants; `None`: none that can count.
fn told_of(welcome: &ProviderWelcome) -> Option<Told> {
    let cluster = ClusterId::from_slice(&welcome.cluster)?;
    let key = welcome.grant_key[..].try_into().ok()?;
    let told = Told { key, cluster, incarnation: 0, period: 0, period_ms: 0 };
    at_time(told, welcome.grant_time.as_ref()?)
}

fn at_time(told: Told, time: &GrantTime) -> Option<Told> {
    let GrantTime { incarnation, period, period_ms } = *time;
    (period_ms > 0).then_some(Told { incarnation, period, period_ms, ..told })
}

/// Whether the directory should know at once: it would place blocks where they are refused.
fn cannot_wait(last: &ProviderReport, now: &ProviderReport) -> bool {
    last.accepts_puts != now.accepts_puts
        || last.damaged != now.damaged
        || last.leaving != now.leaving
        || now.free_bytes < last.free_bytes / 2
        || (now.full && now.reclaimable_bytes > last.reclaimable_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use us_proto::v1::{
        CancelRebuild, DeleteFragments, ProviderRefused, ProviderWelcome, Rebuilt, StartScrub,
    };

    fn member() -> Member {
        let about = About {
            address: "here:1".into(),
            site: "campus/b".into(),
            store: [5; 16],
            line: (0, 0),
        };
        Member::new(about, None)
    }

    fn welcome(cluster: &'static [u8]) -> Down {
        Down::Welcome(ProviderWelcome {
            provider: 4,
            cookie: Bytes::from_static(b"cookie"),
            report_every_ms: 500,
            grant_key: Bytes::new(),
            cluster: Bytes::from_static(cluster),
            grant_time: None,
        })
    }

    fn delete() -> Down {
        let id = FragmentId { block: us_core::ids::BlockId::from_bytes([1; 16]), index: 2 };
        Down::Delete(DeleteFragments { ticket: 9, fragments: vec![wire_id(id)] })
    }

    #[test]
    fn the_cookie_is_kept_first_and_shown_next_time() {
        let mut member = member();
        let now = Instant::now();
        let Up::Hello(hello) = member.connected(now, ProviderReport::default(), Held::default())
        else {
            panic!()
        };
        assert!(hello.cookie.is_empty());
        assert_eq!(member.received(delete()), [], "nothing is done before the welcome");
        let effects = member.received(welcome(b"ours"));
        assert!(matches!(&effects[0], Effect::KeepJoined(joined) if joined.provider == 4));
        assert!(matches!(&member.received(delete())[..], [Effect::Delete { ticket: 9, .. }]));
        member.disconnected(0.5);
        let Up::Hello(hello) = member.connected(now, ProviderReport::default(), Held::default())
        else {
            panic!()
        };
        assert_eq!(&hello.cookie[..], b"cookie");
        assert!(matches!(&member.received(welcome(b"others"))[..], [Effect::Stop { .. }]));
        let refused = Down::Refused(ProviderRefused { reason: "no".into() });
        assert_eq!(member.received(refused), [Effect::Stop { reason: "no".into() }]);
    }

    #[test]
    fn reports_come_in_time_and_at_once_when_it_matters() {
        let mut member = member();
        let now = Instant::now();
        let report = ProviderReport { accepts_puts: true, ..ProviderReport::default() };
        member.connected(now, report.clone(), Held::default());
        assert_eq!(member.tick(now + Duration::from_secs(100), &report), None, "not welcome yet");
        member.received(welcome(b"ours"));
        assert_eq!(member.tick(now + Duration::from_millis(400), &report), None);
        assert!(member.tick(now + Duration::from_millis(500), &report).is_some());
        assert_eq!(member.tick(now + Duration::from_millis(600), &report), None);
        let full = ProviderReport { accepts_puts: false, ..report };
        assert!(member.tick(now + Duration::from_millis(600), &full).is_some());
    }

    #[test]
    fn it_tries_again_for_ever_ever_more_slowly() {
        let mut member = member();
        let waits: Vec<_> = (0..100).map(|_| member.disconnected(1.0)).collect();
        assert!(waits.windows(2).all(|pair| pair[0] <= pair[1]));
        assert_eq!((waits[0], waits[99]), (RETRY_FIRST, RETRY_MAX));
        assert!(member.disconnected(0.0) >= RETRY_MAX / 2);
        member.connected(Instant::now(), ProviderReport::default(), Held::default());
        member.received(welcome(b"ours"));
        assert_eq!(member.disconnected(1.0), RETRY_FIRST);
    }

    #[test]
    fn each_order_is_answered_once_on_its_own_stream() {
        let mut member = member();
        let order =
            |ticket| Down::Rebuild(RebuildFragments { ticket, ..RebuildFragments::default() });
        let ended =
            |stream, ticket| Ended { stream, rebuilt: Rebuilt { ticket, ..Rebuilt::default() } };
        let now = Instant::now();
        member.connected(now, ProviderReport::default(), Held::default());
        for early in [order(1), Down::StartScrub(StartScrub {})] {
            assert_eq!(member.received(early), [], "nothing is done before the welcome");
        }
        member.received(welcome(b"ours"));
        let effects = member.received(order(1));
        let [Effect::Rebuild { ticket, own, .. }] = &effects[..] else { panic!("{effects:?}") };
        assert_eq!((*ticket, *own), (Ticket { stream: 1, ticket: 1 }, ProviderId(4)));
        assert_eq!(member.received(order(1)), [], "it is under way");
        assert_eq!(member.rebuilt(ended(1, 2)), None, "never ordered");
        assert!(matches!(member.rebuilt(ended(1, 1)), Some(Up::Rebuilt(_))));
        assert_eq!(member.rebuilt(ended(1, 1)), None, "answered");
        member.received(order(5));
        let cancel = member.received(Down::CancelRebuild(CancelRebuild { ticket: 5 }));
        assert_eq!(cancel, [Effect::CancelRebuild(Ticket { stream: 1, ticket: 5 })]);
        // The stream breaks; the next one may use the same numbers.
        member.disconnected(0.5);
        assert_eq!(member.rebuilt(ended(1, 5)), None);
        member.connected(now, ProviderReport::default(), Held::default());
        member.received(welcome(b"ours"));
        member.received(order(5));
        assert_eq!(member.rebuilt(ended(1, 5)), None, "of the stream before");
        assert!(member.rebuilt(ended(2, 5)).is_some());
        assert_eq!(member.received(Down::StartScrub(StartScrub {})), [Effect::Scrub]);
    }
}
