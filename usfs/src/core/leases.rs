//! Giving leases back: recalls, reclaims after a new connection, and letting go of what is not used.

use us_core::ids::Ino;
use us_core::limits::{LEASES_MESSAGE_MAX, SESSION_LEASES_MAX};
use us_proto::v1;
use us_proto::v1::session_up::Event;

use super::node::{Dentry, Lease, Level, Node};
use super::{Core, Now, Want};
use crate::session::log::LogPosition;

/// From so many inodes on the kernel is asked to forget files that nobody uses, and from so many on
/// directories too. Without leases nothing can be looked up.
pub const KERNEL_NODES_MANY: usize = SESSION_LEASES_MAX / 2;
const KERNEL_NODES_MAX: usize = SESSION_LEASES_MAX / 8 * 7;
/// How long a recall waits for the operation that asked for the lease.
pub const PIN: std::time::Duration = std::time::Duration::from_millis(200);

/// A lease that was given up while the log was not wholly applied. A replay of the log needs it
/// again, for that long.
#[derive(Clone, Copy, Debug)]
pub(super) struct LetGo {
    ino: Ino,
    lease: Lease,
    /// The end of the log then.
    at: LogPosition,
}

/// The directory wants a lease back.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Recall {
    /// Of this inode.
    pub ino: Ino,
    /// What may be kept.
    pub keep: Level,
    /// The newest grant this mount was given. The stream is ordered, so it was seen, also where the
    /// inode (deleted, say) is not known any more.
    pub grant: u64,
}

/// How answering a recall went on.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum FinishedRecall {
    /// The lease is given back.
    Returned,
    /// Data of the inode is still dirty or in flight: flush, and try again.
    Dirty,
    /// An operation that asked for the lease has not used it yet: try again soon.
    Pinned,
}

impl Core {
    /// Takes a recall that nobody answers yet.
    pub fn take_recall(&mut self) -> Option<Recall> {
        self.recalls.pop_front()
    }

    /// A recall arrived; new operations get at most what it leaves from now on, unless the lease
    /// is pinned. Then the task that answers recalls calls [`Core::finish_recall`].
    pub fn begin_recall(&mut self, now: Now, recall: Recall) -> FinishedRecall {
        let Recall { ino, keep, .. } = recall;
        let Some(node) = self.nodes.get_mut(&ino) else { return FinishedRecall::Returned };
        if node.lease.pinned_until.is_some_and(|until| now.boot < until) {
            return FinishedRecall::Pinned;
        }
        node.lease.pinned_until = None;
        node.lease.keep = Some(node.lease.keep.map_or(keep, |other| other.min(keep)));
        if keep < Level::Exclusive && self.has_uncommitted(ino) {
            return FinishedRecall::Dirty;
        }
        FinishedRecall::Returned
    }

    /// Returns the lease down to what the recall leaves, behind everything in the log.
    pub fn finish_recall(&mut self, recall: Recall) -> FinishedRecall {
        let Recall { ino, keep, grant } = recall;
        if keep < Level::Exclusive && self.has_uncommitted(ino) {
            return FinishedRecall::Dirty;
        }
        let node = self.nodes.entry(ino).or_insert_with(Node::unknown);
        node.lease.keep = None;
        let before = node.lease;
        node.lease.level = node.lease.level.min(keep);
        let returned = v1::InodeLease {
            ino: ino.0,
            level: node.lease.level.to_proto(),
            open: node.is_referred(),
            grant: node.lease.grant.max(grant),
        };
        if node.lease.level == Level::None {
            node.told_open = node.is_referred();
            node.drop_cached();
        }
        self.drop_if_gone(ino);
        self.note_let_go(ino, before);
        self.sync_wanted = true;
        self.send(Event::LeaseReturn(v1::LeaseReturn { leases: vec![returned] }));
        FinishedRecall::Returned
    }

    /// Names of `dir` the kernel may have cached, those too that it was told are not there.
    pub fn cached_names(&self, dir: Ino) -> Vec<Box<[u8]>> {
        let names = self.nodes.get(&dir).and_then(|node| node.names.as_deref());
        names.map(|names| names.told().map(Into::into).collect()).unwrap_or_default()
    }

    /// An operation is over: what was pinned for it no longer is.
    pub fn unpin(&mut self, wants: &[Want]) {
        for want in wants {
            let named = match want {
                Want::Entry { dir, name, .. } => self.present(*dir, name),
                _ => None,
            };
            for ino in [Some(want.ino()), named].into_iter().flatten() {
                if let Some(node) = self.nodes.get_mut(&ino) {
                    node.lease.pinned_until = None;
                }
            }
        }
    }

    /// What `name` in `dir` is, where that is known.
    fn present(&self, dir: Ino, name: &[u8]) -> Option<Ino> {
        match self.nodes.get(&dir)?.names.as_deref()?.get(name)? {
            Dentry::Present { ino, .. } => Some(ino),
            Dentry::Absent => None,
        }
    }

    /// A lease is given up behind the log as it is now.
    pub(super) fn note_let_go(&mut self, ino: Ino, lease: Lease) {
        let durable = self.log.durable_position();
        while self.let_go.front().is_some_and(|first| first.at <= durable) {
            self.let_go.pop_front();
        }
        let at = self.log.end();
        if lease.level > Level::None && at > durable {
            self.let_go.push_back(LetGo { ino, lease, at });
        }
    }

    /// The leases held, for a stream that resumes the session, and those that the replay of the log
    /// needs: they are returned again behind it.
    pub fn reclaims(&mut self) -> Vec<v1::Reclaim> {
        let held = |(ino, node): (&Ino, &Node)| {
            let held = node.lease.level > Level::None || node.told_open;
            held.then(|| v1::InodeLease {
                ino: ino.0,
                level: node.lease.level.to_proto(),
                open: node.is_referred(),
                grant: node.lease.grant,
            })
        };
        let mut leases: Vec<_> = self.nodes.iter().filter_map(held).collect();
        let applied = self.log.applied_position();
        let replayed: Vec<_> =
            self.let_go.iter().filter(|gone| gone.at > applied).copied().collect();
        for LetGo { ino, lease, .. } in replayed {
            let now = self.nodes.get(&ino).map(|node| (node.lease, node.is_referred()));
            let (now, open) = now.unwrap_or_default();
            if now.level >= lease.level {
                continue;
            }
            let grant = lease.grant;
            leases.retain(|held| held.ino != ino.0);
            leases.push(v1::InodeLease { ino: ino.0, level: lease.level.to_proto(), open, grant });
            let level = now.level.to_proto();
            let returned = v1::InodeLease { ino: ino.0, level, open, grant: now.grant.max(grant) };
            self.send(Event::LeaseReturn(v1::LeaseReturn { leases: vec![returned] }));
        }
        let mut messages: Vec<_> = leases
            .chunks(LEASES_MESSAGE_MAX)
            .map(|leases| v1::Reclaim { leases: leases.to_vec(), last: false })
            .collect();
        match messages.last_mut() {
            Some(last) => last.last = true,
            None => messages.push(v1::Reclaim { leases: Vec::new(), last: true }),
        }
        messages
    }

    /// Requests that were not answered when the stream broke are asked again on the next one.
    pub fn resend_requests(&mut self) {
        // Leases not returned yet are not reclaimed either; what is pending is asked anew; the rest
        // (questions asked while there was no stream) keeps its place.
        let pending = &self.pending;
        self.outbox.retain(|event| match event {
            Event::LeaseReturn(_) | Event::LeaseInodes(_) => false,
            Event::Fetch(fetch) => !pending.contains_key(&fetch.request),
            _ => true,
        });
        let again: Vec<_> =
            self.pending.iter().map(|(n, asked)| (*n, asked.want.clone(), asked.trace)).collect();
        for (number, want, trace) in again {
            let event = self.fetch_event(number, &want, trace);
            self.send(event);
        }
        if self.inodes_asked {
            self.inodes_asked = false;
            self.ask_inodes();
        }
    }

    /// Names the kernel should forget so that it lets go of inodes: while it holds nearly as many as
    /// the directory gives leases for. Up to `max` of them, of files in directories whose names were
    /// not looked up since the last call; a directory may be somebody's working one, so directories
    /// go only where files are not enough.
    pub fn names_to_forget(&mut self, max: usize) -> Vec<(Ino, Box<[u8]>)> {
        if self.nodes.len() < KERNEL_NODES_MANY {
            return Vec::new();
        }
        let urgent = self.nodes.len() >= KERNEL_NODES_MAX;
        let unused = |node: &Node| node.lookups > 0 && node.handles == 0 && !node.used;
        let mut names = Vec::new();
        for (dir, node) in &self.nodes {
            let Some(known) = node.names.as_deref().filter(|names| !names.order.is_empty()) else {
                continue;
            };
            for (name, dentry) in &known.names {
                let Dentry::Present { ino, .. } = dentry else { continue };
                let Some(child) = self.nodes.get(ino).filter(|child| unused(child)) else {
                    continue;
                };
                if urgent || child.names.is_none() {
                    names.push((*dir, name.clone()));
                }
                if names.len() == max {
                    return names;
                }
            }
        }
        names
    }

    /// Lets go of inodes that nobody used since the last call, while there are too many: answers
    /// whether any was. Their leases are returned behind the log.
    pub fn evict(&mut self, now: Now) -> bool {
        if self.nodes.len() <= self.config.nodes_max {
            return false;
        }
        let excess = self.nodes.len() - self.config.nodes_max;
        let mut idle = Vec::new();
        for (ino, node) in &mut self.nodes {
            if std::mem::take(&mut node.used) || idle.len() >= excess + LEASES_MESSAGE_MAX {
                continue;
            }
            let quiet = !node.is_referred() && node.lease.keep.is_none() && *ino != Ino::ROOT;
            let pinned = node.lease.pinned_until.is_some_and(|until| now.boot < until);
            if quiet && !pinned {
                idle.push(*ino);
            }
        }
        idle.retain(|ino| !self.has_uncommitted(*ino));
        for chunk in idle.chunks(LEASES_MESSAGE_MAX) {
            let mut leases = Vec::with_capacity(chunk.len());
            for ino in chunk {
                let Some(node) = self.nodes.remove(ino) else { continue };
                let (open, level) = (false, Level::None.to_proto());
                leases.push(v1::InodeLease { ino: ino.0, level, open, grant: node.lease.grant });
                self.note_let_go(*ino, node.lease);
            }
            self.send(Event::LeaseReturn(v1::LeaseReturn { leases }));
        }
        !idle.is_empty()
    }
}
