//! Who takes part: the registry of members and the invitations.
//!
//! A member is a key. It gets into the registry by an invitation, or at its first contact where its
//! certificate was issued beside the directory (`us-directory identity`, `usfs up`, clusters older than
//! the registry): such a certificate is good unless its key was revoked. It leaves by being revoked, for
//! ever, or by expiring: then it may join again with the same key.
//!
//! Invariants:
//! - an invitation's use is durable before a certificate goes out, and one key uses it once;
//! - of a secret only its hash is kept;
//! - a key that is revoked has lost its streams and its sessions when the answer says so, and that it is
//!   revoked is durable; the list of refused keys, with its number, goes to every provider.
//!
//! Time is the cluster's own clock: nothing expires while no directory runs, and no wall clock matters.

use std::collections::BTreeMap;

use bytes::Bytes;
use us_core::tls::{KeyHash, PeerIdentity, Role, is_name};
use us_proto::v1::{InviteInfo, MemberInfo, Standing};

use super::event::{Answer, AskId, RefusalKind};
use super::events::EventKind;
use super::{Durability, Engine, Then};
use crate::keys;
use crate::records::{InviteRecord, JoinedRecord, RegistryRecord, decode, encode};
use crate::store::{StoreError, WriteBatch};

/// Members, revoked ones among them.
const MEMBERS_MAX: usize = 1 << 18;
/// Invitations that are open, and used-up ones that are remembered: who joined by one may ask again.
const INVITES_MAX: usize = 4096;
const USED_UP_MAX: usize = 4096;
/// Members in one answer.
const MEMBERS_PAGE: usize = 1024;
/// Uses of one invitation.
const USES_MAX: u32 = 10_000;
/// How long an invitation is good where nobody says otherwise, and at most.
const INVITE_MS: (u64, u64) = (24 * 3_600_000, 90 * 24 * 3_600_000);
/// Bytes of a secret, and of an invitation's id.
const SECRET_BYTES: usize = us_core::tls::invite::SECRET_BYTES;
const INVITE_ID_BYTES: usize = 4;
/// Hexadecimal digits of a key that are enough to name a member.
const KEY_DIGITS_MIN: usize = 8;
/// The share of a certificate's life after which it is renewed, in percent.
const RENEW_PERCENT: u64 = 66;
/// The longest site of an invitation.
const SITE_BYTES_MAX: usize = 1024;

/// What is asked of the registry.
#[derive(Clone, PartialEq, Debug)]
pub enum RegistryQuestion {
    /// Makes an invitation.
    Invite {
        /// For which role.
        role: Role,
        /// The site newcomers get.
        site: String,
        /// The name they get; empty: their own.
        name: String,
        /// How many may use it; 0: one.
        uses: u32,
        /// How long it is good; 0: a day.
        expires_ms: u64,
    },
    /// The open invitations.
    Invites,
    /// Takes an invitation back.
    CancelInvite {
        /// Its id, or the beginning of it.
        id: Vec<u8>,
    },
    /// A page of the members.
    Members {
        /// Behind this key.
        after: Vec<u8>,
    },
    /// Shuts a member out.
    Revoke {
        /// Its name, or the beginning of its key.
        member: String,
    },
    /// Somebody without certificate has shown a secret.
    Enroll {
        /// The hash of the secret.
        secret_hash: [u8; 32],
        /// The newcomer's key.
        key_hash: KeyHash,
        /// What it wants to be.
        role: Role,
        /// What it calls itself.
        name: String,
    },
    /// A member asks for a new certificate.
    Renew {
        /// The member.
        member: PeerIdentity,
    },
    /// A check that mends begins.
    NoteRepair,
}

/// What the registry answers.
#[derive(Clone, PartialEq)]
pub enum RegistryAnswer {
    /// The secret of a new invitation, and what it is.
    Invited(Vec<u8>, InviteInfo),
    /// The open invitations.
    Invites(Vec<InviteInfo>),
    /// Members.
    Members(Vec<MemberInfo>),
    /// It is shut out.
    Revoked {
        /// Who.
        member: MemberInfo,
        /// Sessions that ended.
        sessions: u32,
        /// Its number as a provider, and the fragments it held.
        provider: Option<(u32, u64)>,
    },
    /// A certificate may be issued.
    Enrolled(Issue),
    /// Whether a certificate is due, and when to ask again.
    Renewal(Option<Issue>, u64),
    /// Done.
    Done,
}

impl std::fmt::Debug for RegistryAnswer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            // The secret stays out of logs.
            Self::Invited(_, invite) => f.debug_tuple("Invited").field(invite).finish(),
            Self::Invites(all) => f.debug_tuple("Invites").field(&all.len()).finish(),
            Self::Members(all) => f.debug_tuple("Members").field(&all.len()).finish(),
            Self::Revoked { member, .. } => f.debug_tuple("Revoked").field(member).finish(),
            Self::Enrolled(issue) => f.debug_tuple("Enrolled").field(issue).finish(),
            Self::Renewal(issue, _) => f.debug_tuple("Renewal").field(issue).finish(),
            Self::Done => f.write_str("Done"),
        }
    }
}

/// What stands in a certificate.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Issue {
    /// The role.
    pub role: Role,
    /// The name.
    pub name: String,
    /// The site of the invitation.
    pub site: String,
    /// The serial number.
    pub serial: Vec<u8>,
}

/// Everybody the cluster knows.
#[derive(Debug, Default)]
pub(super) struct Registry {
    pub members: BTreeMap<KeyHash, JoinedRecord>,
    pub invites: BTreeMap<Bytes, InviteRecord>,
    /// The number of the list of refused keys.
    pub version: u64,
}

fn refused(kind: RefusalKind, detail: impl Into<String>) -> Answer {
    super::admin::refused(kind, detail)
}

/// A member for the log: role, name and the beginning of its key.
pub(super) fn spoken(role: &str, name: &str, key_hash: &KeyHash) -> String {
    format!("{role} {name} ({:.8})", key_hash.to_string())
}

impl Registry {
    /// The clients of this name that are members.
    pub fn clients_called(&self, name: &str) -> Vec<KeyHash> {
        let clients = self.members.iter().filter(|(_, known)| {
            known.name == name && known.role == Role::Client.as_str() && !known.is_refused()
        });
        clients.map(|(key, _)| *key).collect()
    }

    /// How many invitations have no use left.
    fn used_up(&self) -> usize {
        self.invites.values().filter(|invite| invite.uses_left == 0).count()
    }

    /// Of those the one that is over first.
    fn oldest_used_up(&self) -> Option<Bytes> {
        let used_up = self.invites.iter().filter(|(_, invite)| invite.uses_left == 0);
        used_up.min_by_key(|(_, invite)| invite.expires_ms).map(|(hash, _)| hash.clone())
    }

    fn find(&self, member: &str) -> Result<KeyHash, (RefusalKind, String)> {
        let named = self.members.iter().filter(|(_, known)| known.name == member);
        let mut found: Vec<KeyHash> = named.map(|(key, _)| *key).collect();
        let digits = member.len() >= KEY_DIGITS_MIN
            && member.chars().all(|c| c.is_ascii_hexdigit() && !c.is_ascii_uppercase());
        if digits {
            let keys = self.members.keys().filter(|key| key.to_string().starts_with(member));
            found.extend(keys.filter(|key| !found.contains(key)).copied().collect::<Vec<_>>());
        }
        // Those that are out already need not be told apart from the one that is not.
        let standing: Vec<KeyHash> =
            found.iter().filter(|key| !self.members[key].is_revoked()).copied().collect();
        match (&standing[..], &found[..]) {
            ([one], _) | ([], [one, ..]) => Ok(*one),
            ([], []) => {
                let detail = format!("no member is called {member:?}: see `usctl members`");
                Err((RefusalKind::NotFound, detail))
            }
            (several, _) => {
                let keys: Vec<String> =
                    several.iter().map(|key| format!("{:.16}", key.to_string())).collect();
                let detail = format!(
                    "{} members are called {member:?}: name one by its key: {}",
                    several.len(),
                    keys.join(", ")
                );
                Err((RefusalKind::Invalid, detail))
            }
        }
    }
}

impl Engine {
    pub(super) fn load_registry(&mut self) -> Result<(), StoreError> {
        for (key, value) in self.scan_all(&keys::tag(&keys::CLUSTER, b'a'))? {
            let Some(hash) = KeyHash::from_slice(&key[keys::HEAD_BYTES..]) else { continue };
            self.registry.members.insert(hash, decode(&key, &value)?);
        }
        for (key, value) in self.scan_all(&keys::tag(&keys::CLUSTER, b'j'))? {
            let hash = key.slice(keys::HEAD_BYTES..);
            self.registry.invites.insert(hash, decode(&key, &value)?);
        }
        let key = keys::registry();
        let stored = self.store.get(&key)?.map(|value| decode::<RegistryRecord>(&key, &value));
        self.registry.version = stored.transpose()?.unwrap_or_default().version;
        Ok(())
    }

    pub(super) fn ask_registry(
        &mut self,
        ask: AskId,
        question: RegistryQuestion,
    ) -> Result<(), StoreError> {
        let answer = match question {
            RegistryQuestion::Invite { role, site, name, uses, expires_ms } => {
                self.invite(role, site, name, uses, expires_ms)?
            }
            RegistryQuestion::Invites => {
                let invites = self.registry.invites.iter();
                let infos = invites.map(|(hash, invite)| self.invite_info(hash, invite)).collect();
                Answer::Registry(RegistryAnswer::Invites(infos))
            }
            RegistryQuestion::CancelInvite { id } => self.cancel_invite(&id)?,
            RegistryQuestion::Members { after } => self.members_page(&after),
            RegistryQuestion::Revoke { member } => self.revoke(&member)?,
            RegistryQuestion::Enroll { secret_hash, key_hash, role, name } => {
                self.enroll(&secret_hash, key_hash, role, name)?
            }
            RegistryQuestion::Renew { member } => self.renew_member(&member)?,
            RegistryQuestion::NoteRepair => {
                self.note_event(EventKind::CheckMends, 0, String::new())?;
                Answer::Registry(RegistryAnswer::Done)
            }
        };
        // What it says is so when it is durable.
        self.then(self.last_seq, Then::Answer(ask, answer))
    }

    fn invite(
        &mut self,
        role: Role,
        site: String,
        name: String,
        uses: u32,
        expires_ms: u64,
    ) -> Result<Answer, StoreError> {
        let invalid = |detail: &str| Ok(refused(RefusalKind::Invalid, detail));
        if role == Role::Directory {
            return invalid("an invitation is for a provider, a client or an admin");
        }
        if !name.is_empty() && (!is_name(&name) || looks_like_a_key(&name)) {
            return invalid("a member's name has 1 to 64 bytes and no control characters");
        }
        if site.len() > SITE_BYTES_MAX {
            return invalid("the site is too long");
        }
        let (uses, expires_ms) =
            (uses.max(1), if expires_ms == 0 { INVITE_MS.0 } else { expires_ms });
        if uses > USES_MAX || expires_ms > INVITE_MS.1 {
            return invalid(
                "an invitation has at most 10,000 uses, and is good for at most 90 days",
            );
        }
        let used_up = self.registry.used_up();
        if self.registry.invites.len() - used_up >= INVITES_MAX {
            let detail = "too many invitations are open: cancel some (`usctl invite list`)";
            return Ok(refused(RefusalKind::Busy, detail));
        }
        let mut secret = vec![0; SECRET_BYTES];
        self.entropy.fill(&mut secret);
        let hash = Bytes::copy_from_slice(&us_core::tls::invite::secret_hash(&secret));
        let record = InviteRecord {
            role: role.as_str().to_owned(),
            site,
            name,
            uses_left: uses,
            expires_ms: self.clock_ms().saturating_add(expires_ms),
            by: self.asker.clone().unwrap_or_default(),
        };
        let info = self.invite_info(&hash, &record);
        let mut batch = WriteBatch::new();
        batch.put(keys::invite(&hash), encode(&record));
        self.registry.invites.insert(hash, record);
        if let Some(old) = self.registry.oldest_used_up().filter(|_| used_up >= USED_UP_MAX) {
            self.registry.invites.remove(&old);
            batch.delete(keys::invite(&old));
        }
        let detail = format!("{}, uses {uses}, invitation {}", role, hex(&info.id));
        self.note_event(EventKind::Invited, 0, detail)?;
        self.commit(batch, Durability::Durable)?;
        Ok(Answer::Registry(RegistryAnswer::Invited(secret, info)))
    }

    fn invite_info(&self, hash: &[u8], invite: &InviteRecord) -> InviteInfo {
        InviteInfo {
            id: Bytes::copy_from_slice(&hash[..INVITE_ID_BYTES.min(hash.len())]),
            role: invite.role.clone(),
            site: invite.site.clone(),
            name: invite.name.clone(),
            uses_left: invite.uses_left,
            expires_in_ms: invite.expires_ms.saturating_sub(self.clock_ms()),
            by: invite.by.clone(),
        }
    }

    fn cancel_invite(&mut self, id: &[u8]) -> Result<Answer, StoreError> {
        let found = self.registry.invites.keys().filter(|hash| hash.starts_with(id));
        let found: Vec<Bytes> = found.cloned().collect();
        let [hash] = &found[..] else {
            let detail = "no invitation, or more than one, has this id: see `usctl invite list`";
            return Ok(refused(RefusalKind::NotFound, detail));
        };
        self.registry.invites.remove(hash);
        let mut batch = WriteBatch::new();
        batch.delete(keys::invite(hash));
        let detail = format!("invitation {}", hex(&hash[..INVITE_ID_BYTES]));
        self.note_event(EventKind::InviteCancelled, 0, detail)?;
        self.commit(batch, Durability::Durable)?;
        Ok(Answer::Registry(RegistryAnswer::Done))
    }

    fn member_info(&self, key: &KeyHash, member: &JoinedRecord) -> MemberInfo {
        let standing = if member.is_revoked() {
            Standing::Revoked
        } else if member.expired {
            Standing::Expired
        } else {
            Standing::Good
        };
        MemberInfo {
            key_hash: Bytes::copy_from_slice(key.as_bytes()),
            role: member.role.clone(),
            name: member.name.clone(),
            site: member.site.clone(),
            joined_unix_ms: member.joined_unix_ms,
            standing: standing.into(),
            expires_in_ms: member.expires_ms.saturating_sub(self.clock_ms()),
            revoked_unix_ms: member.revoked_unix_ms,
            by: member.by.clone(),
        }
    }

    fn members_page(&self, after: &[u8]) -> Answer {
        let members = self.registry.members.iter();
        let behind =
            members.skip_while(|(key, _)| !after.is_empty() && key.as_bytes()[..] <= *after);
        let page = behind.take(MEMBERS_PAGE).map(|(key, member)| self.member_info(key, member));
        Answer::Registry(RegistryAnswer::Members(page.collect()))
    }

    /// Somebody with a good certificate has connected: one that the registry does not know yet gets
    /// into it.
    pub(super) fn met(&mut self, peer: PeerIdentity) -> Result<(), StoreError> {
        let known = self.registry.members.contains_key(&peer.key_hash);
        if known || peer.role == Role::Directory || self.registry.members.len() >= MEMBERS_MAX {
            return Ok(());
        }
        let record = self.new_member(peer.role, peer.name, String::new(), String::new());
        let detail = spoken(&record.role, &record.name, &peer.key_hash);
        let detail = format!("{detail}, whose certificate was issued beside the directory");
        self.put_member(peer.key_hash, record)?;
        self.note_event(EventKind::MemberJoined, 0, detail)
    }

    fn new_member(&mut self, role: Role, name: String, site: String, by: String) -> JoinedRecord {
        let mut serial = vec![0; 16];
        self.entropy.fill(&mut serial);
        // A serial number is positive.
        serial[0] = serial[0] & 0x7f | 0x40;
        JoinedRecord {
            role: role.as_str().to_owned(),
            name,
            site,
            joined_unix_ms: self.at.unix_ms,
            serial: serial.into(),
            issued_ms: self.clock_ms(),
            expires_ms: self.clock_ms().saturating_add(self.config.certificate_life_ms),
            by,
            ..Default::default()
        }
    }

    fn put_member(&mut self, key: KeyHash, record: JoinedRecord) -> Result<(), StoreError> {
        let mut batch = WriteBatch::new();
        batch.put(keys::joined(key.as_bytes()), encode(&record));
        self.registry.members.insert(key, record);
        self.commit(batch, Durability::Durable)?;
        Ok(())
    }

    fn enroll(
        &mut self,
        secret_hash: &[u8],
        key_hash: KeyHash,
        role: Role,
        name: String,
    ) -> Result<Answer, StoreError> {
        // One answer for all of these: a guess learns nothing.
        let no = || Ok(refused(RefusalKind::NotFound, NO_SUCH_CODE));
        let clock_ms = self.clock_ms();
        let Some(invite) = self.registry.invites.get(secret_hash) else { return no() };
        if invite.expires_ms <= clock_ms {
            return no();
        }
        let known = self.registry.members.get(&key_hash);
        let again =
            known.is_some_and(|member| member.invite == *secret_hash && !member.is_refused());
        if invite.uses_left == 0 && !again {
            return no();
        }
        let invalid = |detail: String| Ok(refused(RefusalKind::Invalid, detail));
        if invite.role != role.as_str() {
            return invalid(format!(
                "this code is for a {}: join with {}",
                invite.role,
                program_of(&invite.role)
            ));
        }
        if known.is_some_and(JoinedRecord::is_revoked) {
            return invalid(
                "this key was revoked: remove the folder of the old identity and join again".into(),
            );
        }
        if let Some(known) = known.filter(|known| known.role != role.as_str()) {
            return invalid(format!("this key is that of a {} already", known.role));
        }
        if let Some(member) = known.filter(|_| again) {
            return Ok(Answer::Registry(RegistryAnswer::Enrolled(issue(role, member))));
        }
        if known.is_none() && self.registry.members.len() >= MEMBERS_MAX {
            return Ok(refused(RefusalKind::Busy, "the cluster has too many members"));
        }
        let name = if invite.name.is_empty() { name } else { invite.name.clone() };
        if !is_name(&name) || looks_like_a_key(&name) {
            let detail =
                "a name has 1 to 64 bytes, no control characters, and is no hexadecimal number";
            return invalid(detail.to_owned());
        }
        let mut invite = invite.clone();
        invite.uses_left -= 1;
        // After a restore providers may refuse keys that nobody here remembers: they hear who was invited.
        let (incarnation, was_out) =
            (self.cluster.incarnation, known.map(JoinedRecord::is_refused));
        let to_tell = was_out == Some(true) || incarnation > 1;
        let mut record = self.new_member(role, name, invite.site.clone(), invite.by.clone());
        record.invite = Bytes::copy_from_slice(secret_hash);
        record.incarnation = incarnation;
        let mut batch = WriteBatch::new();
        batch.put(keys::invite(secret_hash), encode(&invite));
        batch.put(keys::joined(key_hash.as_bytes()), encode(&record));
        self.registry.invites.insert(Bytes::copy_from_slice(secret_hash), invite);
        self.registry.members.insert(key_hash, record.clone());
        let detail = spoken(&record.role, &record.name, &key_hash);
        let detail = format!("{detail}, invitation {}", hex(&secret_hash[..INVITE_ID_BYTES]));
        self.note_event(EventKind::MemberJoined, 0, detail)?;
        if to_tell {
            self.refusals_changed(&mut batch);
        }
        self.commit(batch, Durability::Durable)?;
        Ok(Answer::Registry(RegistryAnswer::Enrolled(issue(role, &record))))
    }

    fn renew_member(&mut self, peer: &PeerIdentity) -> Result<Answer, StoreError> {
        self.met(peer.clone())?;
        let life_ms = self.config.certificate_life_ms;
        let clock_ms = self.clock_ms();
        let Some(member) = self.registry.members.get(&peer.key_hash) else {
            return Ok(Answer::Registry(RegistryAnswer::Renewal(None, life_ms / 100)));
        };
        if member.is_refused() {
            return Ok(refused(RefusalKind::Invalid, us_core::wire::admission::REFUSED));
        }
        let due_ms = member.issued_ms + life_ms / 100 * RENEW_PERCENT;
        if clock_ms < due_ms {
            let again_ms = (due_ms - clock_ms).max(1);
            return Ok(Answer::Registry(RegistryAnswer::Renewal(None, again_ms)));
        }
        let fresh =
            self.new_member(peer.role, member.name.clone(), member.site.clone(), member.by.clone());
        let Some(member) = self.registry.members.get(&peer.key_hash) else {
            return Ok(Answer::Registry(RegistryAnswer::Renewal(None, life_ms / 100)));
        };
        let record = JoinedRecord {
            serial: fresh.serial,
            issued_ms: fresh.issued_ms,
            expires_ms: fresh.expires_ms,
            ..member.clone()
        };
        let issue = issue(peer.role, &record);
        self.put_member(peer.key_hash, record)?;
        Ok(Answer::Registry(RegistryAnswer::Renewal(Some(issue), life_ms / 100 * RENEW_PERCENT)))
    }

    /// What is written down of a key that is revoked before it was ever met: a provider is known from
    /// before there was a registry.
    fn unseen_member(&mut self, key: &KeyHash) -> JoinedRecord {
        let provider = self.provider_of_key.get(&key.as_bytes()[..]);
        let provider = provider.and_then(|provider| self.members.get(provider));
        let (role, name) = match provider {
            Some(member) => (Role::Provider, member.record.name.clone()),
            None => (Role::Client, "unknown".to_owned()),
        };
        self.new_member(role, name, String::new(), String::new())
    }

    fn revoke(&mut self, member: &str) -> Result<Answer, StoreError> {
        let key = match (self.registry.find(member), parse_key(member)) {
            (Ok(key), _) => key,
            // A certificate that was never seen is known to nobody but by its whole key.
            (Err(_), Some(key)) => key,
            (Err((kind, detail)), None) => return Ok(refused(kind, detail)),
        };
        if self.asker_is.as_ref().is_some_and(|asker| asker.key_hash == key) {
            let detail = "nobody revokes the certificate it asks with: ask another administrator";
            return Ok(refused(RefusalKind::Invalid, detail));
        }
        let unix_ms = self.at.unix_ms.max(1);
        let mut record = match self.registry.members.get(&key) {
            Some(record) => record.clone(),
            None => self.unseen_member(&key),
        };
        if record.revoked_unix_ms == 0 {
            record.revoked_unix_ms = unix_ms;
        }
        self.registry.members.insert(key, record.clone());
        let mut batch = WriteBatch::new();
        batch.put(keys::joined(key.as_bytes()), encode(&record));
        let detail = spoken(&record.role, &record.name, &key);
        self.refusals_changed(&mut batch);
        self.commit(batch, Durability::Durable)?;
        self.note_event(EventKind::MemberRevoked, 0, detail)?;
        let sessions = self.shut_out(&key, "its certificate was revoked")?;
        let provider = self.provider_of_key.get(&key.as_bytes()[..]).copied();
        let provider = provider.filter(|provider| self.members.contains_key(provider));
        let provider = provider.map(|provider| (provider, self.fragments_at(provider)));
        if let Some((provider, _)) = provider {
            // Nothing it says is believed any more: what it held is made again elsewhere.
            if self.members.get(&provider).is_some_and(|member| !member.record.dead) {
                self.declare_dead(provider)?;
            }
        }
        let member = self.member_info(&key, &self.registry.members[&key]);
        Ok(Answer::Registry(RegistryAnswer::Revoked { member, sessions, provider }))
    }

    /// Lets go of invitations that are over, and of members whose certificates have expired.
    pub(super) fn registry_chore(&mut self) -> Result<(), StoreError> {
        /// Handled in one slow tick.
        const SLICE: usize = 256;
        let clock_ms = self.clock_ms();
        let mut batch = WriteBatch::new();
        let over = self.registry.invites.iter().filter(|(_, invite)| invite.expires_ms <= clock_ms);
        let over: Vec<Bytes> = over.take(SLICE).map(|(hash, _)| hash.clone()).collect();
        for hash in over {
            batch.delete(keys::invite(&hash));
            self.registry.invites.remove(&hash);
        }
        let expired = self.registry.members.iter();
        let expired = expired.filter(|(_, one)| !one.is_refused() && one.expires_ms <= clock_ms);
        let expired: Vec<KeyHash> = expired.take(SLICE).map(|(key, _)| *key).collect();
        for key in &expired {
            let Some(record) = self.registry.members.get_mut(key) else { continue };
            record.expired = true;
            batch.put(keys::joined(key.as_bytes()), encode(record));
            let detail = spoken(&record.role, &record.name, key);
            self.note_event(EventKind::MemberExpired, 0, detail)?;
        }
        if !expired.is_empty() {
            self.refusals_changed(&mut batch);
        }
        if !batch.is_empty() {
            self.commit(batch, Durability::Applied)?;
        }
        for key in expired {
            self.shut_out(&key, "its certificate has expired")?;
        }
        Ok(())
    }
}

/// What everybody hears whose code is not good, whatever the reason.
const NO_SUCH_CODE: &str =
    "this code is not good: it is wrong, used up, expired or cancelled. Ask for a new one";

fn issue(role: Role, member: &JoinedRecord) -> Issue {
    let (name, site) = (member.name.clone(), member.site.clone());
    Issue { role, name, site, serial: member.serial.to_vec() }
}

fn program_of(role: &str) -> &'static str {
    match role {
        "provider" => "us-provider join",
        "admin" => "usctl join",
        _ => "usfs join",
    }
}

/// Whether a name could be taken for the beginning of a key.
fn looks_like_a_key(name: &str) -> bool {
    name.len() >= KEY_DIGITS_MIN && name.bytes().all(|byte| byte.is_ascii_hexdigit())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A whole key hash as 64 hexadecimal digits.
fn parse_key(text: &str) -> Option<KeyHash> {
    if text.len() != 64 || !text.is_ascii() {
        return None;
    }
    let pair = |at: usize| u8::from_str_radix(&text[2 * at..2 * at + 2], 16).ok();
    let bytes: Option<Vec<u8>> = (0..32).map(pair).collect();
    KeyHash::from_slice(&bytes?)
}
