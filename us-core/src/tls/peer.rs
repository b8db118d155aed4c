//! Who a certificate belongs to.
//!
//! The subject is `O=<cluster, 32 hexadecimal digits>, OU=<role>, CN=<name>`, each exactly once.

use std::fmt;
use std::str::FromStr;

use aws_lc_rs::digest::{SHA256, digest};
use rustls::pki_types::CertificateDer;
use x509_parser::certificate::X509Certificate;
use x509_parser::prelude::FromDer;
use x509_parser::x509::AttributeTypeAndValue;

use super::TlsError;
use crate::ids::ClusterId;

/// What a certificate allows its owner to be.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Role {
    /// The directory itself.
    Directory,
    /// Stores fragments.
    Provider,
    /// Mounts volumes.
    Client,
    /// Administers the cluster (`usctl`).
    Admin,
}

impl Role {
    /// The word in the certificate.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Directory => "directory",
            Self::Provider => "provider",
            Self::Client => "client",
            Self::Admin => "admin",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Role {
    type Err = TlsError;

    fn from_str(text: &str) -> Result<Self, TlsError> {
        [Self::Directory, Self::Provider, Self::Client, Self::Admin]
            .into_iter()
            .find(|role| role.as_str() == text)
            .ok_or(TlsError::Certificate { detail: "its role is not one of ours" })
    }
}

/// SHA-256 of a certificate's SubjectPublicKeyInfo: what stays the same when a certificate is issued
/// again for the same key.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct KeyHash([u8; 32]);

impl KeyHash {
    /// The hash with these bytes.
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The hash in `bytes`; `None` unless there are exactly 32.
    pub fn from_slice(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }

    /// The 32 bytes.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Display for KeyHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for KeyHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KeyHash({self})")
    }
}

/// Who is at the other end, as its certificate says. Handlers of gRPC find it among the extensions
/// of their request; the bulk service is given it.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct PeerIdentity {
    /// What it may be.
    pub role: Role,
    /// Its name, for people. Two peers may have the same.
    pub name: String,
    /// The cluster that issued the certificate.
    pub cluster: ClusterId,
    /// Its key: what tells two peers apart.
    pub key_hash: KeyHash,
}

impl PeerIdentity {
    /// Reads a certificate that TLS has already verified.
    ///
    /// # Errors
    /// [`TlsError::Certificate`] when a part of the subject is missing, doubled or strange.
    pub fn from_certificate(der: &CertificateDer<'_>) -> Result<Self, TlsError> {
        let certificate = parse(der)?;
        let subject = certificate.subject();
        let key_hash = digest(&SHA256, certificate.public_key().raw);
        Ok(Self {
            role: only(subject.iter_organizational_unit())?.parse()?,
            name: only(subject.iter_common_name())?.to_owned(),
            cluster: cluster(&certificate)?,
            key_hash: KeyHash::from_slice(key_hash.as_ref()).expect("SHA-256 gives 32 bytes"),
        })
    }

    /// The peer of a finished handshake.
    ///
    /// # Errors
    /// [`TlsError::NoCertificate`]; [`TlsError::Certificate`].
    pub fn from_chain(chain: Option<&[CertificateDer<'_>]>) -> Result<Self, TlsError> {
        let leaf = chain.and_then(|chain| chain.first()).ok_or(TlsError::NoCertificate)?;
        Self::from_certificate(leaf)
    }
}

impl fmt::Display for PeerIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {:?} (key {:.16})", self.role, self.name, self.key_hash.to_string())
    }
}

/// Reads the cluster out of a certificate's subject; the authority's own has one too.
pub(super) fn cluster_of(der: &CertificateDer<'_>) -> Result<ClusterId, TlsError> {
    cluster(&parse(der)?)
}

fn cluster(certificate: &X509Certificate<'_>) -> Result<ClusterId, TlsError> {
    only(certificate.subject().iter_organization())?
        .parse()
        .map_err(|_| TlsError::Certificate { detail: "it names no cluster" })
}

fn parse<'a>(der: &'a CertificateDer<'_>) -> Result<X509Certificate<'a>, TlsError> {
    match X509Certificate::from_der(der) {
        Ok((_, certificate)) => Ok(certificate),
        Err(_) => Err(TlsError::Certificate { detail: "it is not an X.509 certificate" }),
    }
}

fn only<'a>(
    mut attributes: impl Iterator<Item = &'a AttributeTypeAndValue<'a>>,
) -> Result<&'a str, TlsError> {
    match (attributes.next(), attributes.next()) {
        (Some(one), None) => one
            .as_str()
            .map_err(|_| TlsError::Certificate { detail: "a part of its subject is not text" }),
        _ => Err(TlsError::Certificate {
            detail: "its subject must have one cluster, one role and one name",
        }),
    }
}

/// What a caller knows about the peer it means. The default accepts every peer of the cluster.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ExpectedPeer {
    /// The role it must have.
    pub role: Option<Role>,
    /// The key it must have.
    pub key_hash: Option<KeyHash>,
}

/// Another peer than the one meant answered at this address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("expected {expected}, found {found}: the address may belong to another machine now")]
pub struct UnexpectedPeer {
    /// Who was meant.
    pub expected: ExpectedPeer,
    /// Who answered.
    pub found: PeerIdentity,
}

impl ExpectedPeer {
    /// Any peer with this role.
    pub const fn role(role: Role) -> Self {
        Self { role: Some(role), key_hash: None }
    }

    /// The one peer with this role and key.
    pub const fn key(role: Role, key_hash: KeyHash) -> Self {
        Self { role: Some(role), key_hash: Some(key_hash) }
    }

    /// Whether `found` is the peer that was meant.
    ///
    /// # Errors
    /// [`UnexpectedPeer`] when it is not.
    pub fn check(&self, found: &PeerIdentity) -> Result<(), UnexpectedPeer> {
        let role = self.role.is_none_or(|role| role == found.role);
        let key = self.key_hash.is_none_or(|key_hash| key_hash == found.key_hash);
        if role && key {
            return Ok(());
        }
        Err(UnexpectedPeer { expected: *self, found: found.clone() })
    }
}

impl fmt::Display for ExpectedPeer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.role {
            Some(role) => write!(f, "a {role}")?,
            None => f.write_str("a peer")?,
        }
        match self.key_hash {
            Some(key_hash) => write!(f, " with key {:.16}", key_hash.to_string()),
            None => Ok(()),
        }
    }
}
