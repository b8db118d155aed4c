//! Who is who: certificates, and the TLS configurations made from them.
//!
//! A cluster has one [`CertificateAuthority`], made with its directory. It issues an [`Identity`] to
//! everyone who takes part; the certificate carries the [`Role`], the name and the cluster. Both
//! sides of every connection show theirs (TLS 1.3 only), and each reads a [`PeerIdentity`] out of
//! the other's. Machines move between addresses, so an address proves nothing: every certificate is
//! valid for the one DNS name [`SERVER_NAME`], and a caller who means one particular peer says so
//! with [`ExpectedPeer`].
//!
//! Invariants:
//! - A `PeerIdentity` exists only for a certificate with exactly one cluster, role and name.
//! - Private keys are wiped from memory when dropped and lie on disk with mode 0600.
//! - Sessions are never resumed: a certificate that is no longer accepted opens no connection.
//!
//! Certificates do not end by date, because wall time decides nothing here (a desktop's clock may be
//! wrong by years): whether one has expired or was revoked is the directory's matter, by its own clock
//! (docs/adr/0002-certificates.md). A newcomer that has none yet pins the authority by an
//! [`InviteCode`] and sends a [`CertificateRequest`] for a key of its own.
//!
//! Callers: `wire` on both ends; `usfs up`, joining and `usctl` for issuing and keeping identities.

mod authority;
mod files;
pub mod invite;
mod join;
mod peer;
mod request;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::RwLock;
use rustls::client::Resumption;
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::version::TLS13;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use zeroize::Zeroizing;

pub use authority::{CertificateAuthority, is_name};
pub use invite::{AuthorityPin, CodeError, InviteCode};
pub use join::{join_client_config, join_server_config};
pub use peer::{ExpectedPeer, KeyHash, PeerIdentity, Role, UnexpectedPeer};
pub use request::{CertificateRequest, OwnKey, REQUEST_BYTES_MAX};

/// The DNS name in every certificate of a cluster.
pub const SERVER_NAME: &str = "us";
/// ALPN of HTTP/2: gRPC.
pub const ALPN_H2: &[u8] = b"h2";
/// ALPN of the framed bulk protocol (`docs/wire.md`).
pub const ALPN_BULK: &[u8] = b"us-bulk/1";
/// ALPN of joining: gRPC for those who have no certificate yet.
pub const ALPN_JOIN: &[u8] = b"us-join/1";
/// ALPN of `/metrics` and `/healthz`.
pub const ALPN_HTTP1: &[u8] = b"http/1.1";
/// The longest name a certificate carries, in bytes (X.520's bound on a common name).
pub const NAME_BYTES_MAX: usize = 64;

const CA_FILE: &str = "ca.pem";
const CERT_FILE: &str = "cert.pem";
const KEY_FILE: &str = "key.pem";

/// What can go wrong with certificates and keys.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file could not be read or written.
    #[error("{action} {}: {source}", path.display())]
    File {
        /// What was being done to it: "read", "write", ...
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// A PEM text holds no certificate or key, or a broken one.
    #[error("{what} is not valid PEM: {detail}")]
    Pem {
        /// Which text.
        what: &'static str,
        /// The parser's reason.
        detail: String,
    },
    /// A certificate does not parse, or lacks what every certificate of a cluster has.
    #[error("certificate refused: {detail}")]
    Certificate {
        /// What is wrong with it.
        detail: &'static str,
    },
    /// A name that cannot stand in a certificate.
    #[error("{name:?} cannot be a name: 1 to {NAME_BYTES_MAX} bytes without control characters")]
    Name {
        /// The name asked for.
        name: String,
    },
    /// The peer showed no certificate.
    #[error("the peer showed no certificate")]
    NoCertificate,
    /// Making or signing a certificate failed.
    #[error("issue a certificate: {0}")]
    Issue(#[from] rcgen::Error),
    /// Key and certificate do not fit together, or TLS refuses them.
    #[error("TLS refuses the identity: {0}")]
    Config(#[from] rustls::Error),
    /// No client verifier can be built from the authority's certificate.
    #[error("TLS refuses the authority: {0}")]
    Verifier(#[from] rustls::client::VerifierBuilderError),
}

/// A certificate, its private key, and the authority whose certificates it trusts. Clones share the
/// certificate: one that is renewed is used by all of them for what they dial and accept from then on.
#[derive(Clone)]
pub struct Identity {
    ca_pem: String,
    certificate: Arc<Renewable>,
    key_pem: Zeroizing<String>,
    own: PeerIdentity,
}

struct Renewable {
    pem: RwLock<Arc<str>>,
    /// How often it was renewed.
    renewals: AtomicU64,
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The key stays out of logs.
        f.debug_tuple("Identity").field(&self.own).finish()
    }
}

impl Identity {
    /// The identity made of these three PEM texts.
    ///
    /// # Errors
    /// [`TlsError::Pem`] or [`TlsError::Certificate`] when the certificate is not one of a cluster.
    pub fn from_pem(
        ca_pem: String,
        cert_pem: String,
        key_pem: Zeroizing<String>,
    ) -> Result<Self, TlsError> {
        let own = PeerIdentity::from_certificate(&certificate(&cert_pem, CERT_FILE)?)?;
        let (pem, renewals) = (RwLock::new(cert_pem.into()), AtomicU64::new(0));
        Ok(Self { ca_pem, certificate: Arc::new(Renewable { pem, renewals }), key_pem, own })
    }

    /// Takes a new certificate of the same authority for the same key and role. Its name may be another: a
    /// member is its key, and what it is called is the directory's word; [`Identity::own`] says the old one
    /// until the next start.
    ///
    /// # Errors
    /// [`TlsError::Certificate`] when it is another's; the old one stays.
    pub fn renew(&self, cert_pem: String) -> Result<(), TlsError> {
        let renewed = Self::from_pem(self.ca_pem.clone(), cert_pem.clone(), self.key_pem.clone())?;
        let name = self.own.name.clone();
        if (PeerIdentity { name, ..renewed.own.clone() }) != self.own {
            return Err(TlsError::Certificate { detail: "it is not for this key and role" });
        }
        // It must also be one that peers will accept.
        let roots = renewed.roots()?;
        let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider()).build()?;
        let now = rustls::pki_types::UnixTime::now();
        verifier.verify_client_cert(&renewed.chain()?[0], &[], now)?;
        *self.certificate.pem.write() = cert_pem.into();
        self.certificate.renewals.fetch_add(1, Ordering::Release);
        Ok(())
    }

    /// Grows with every renewal.
    pub fn renewals(&self) -> u64 {
        self.certificate.renewals.load(Ordering::Acquire)
    }

    /// What an invitation says of the authority.
    ///
    /// # Errors
    /// [`TlsError::Pem`].
    pub fn pin(&self) -> Result<AuthorityPin, TlsError> {
        Ok(AuthorityPin::of(&certificate(&self.ca_pem, CA_FILE)?))
    }

    /// What a peer will read in this identity's certificate.
    pub fn own(&self) -> &PeerIdentity {
        &self.own
    }

    /// The authority's certificate.
    pub fn ca_pem(&self) -> &str {
        &self.ca_pem
    }

    /// The certificate.
    pub fn cert_pem(&self) -> Arc<str> {
        Arc::clone(&self.certificate.pem.read())
    }

    /// The private key (PKCS #8). Never print it.
    pub fn key_pem(&self) -> &Zeroizing<String> {
        &self.key_pem
    }

    /// Writes `ca.pem`, `cert.pem` and `key.pem` into `dir` (made with mode 0700), each whole or not
    /// at all; the certificate last, so that an interrupted save does not look complete.
    ///
    /// # Errors
    /// [`TlsError::File`].
    pub fn save(&self, dir: &Path) -> Result<(), TlsError> {
        files::make_dir(dir)?;
        files::save(dir, KEY_FILE, self.key_pem.as_bytes(), files::SECRET_MODE)?;
        files::save(dir, CA_FILE, self.ca_pem.as_bytes(), files::PUBLIC_MODE)?;
        self.save_certificate(dir)
    }

    /// Writes `cert.pem` alone, after [`Identity::renew`].
    ///
    /// # Errors
    /// [`TlsError::File`].
    pub fn save_certificate(&self, dir: &Path) -> Result<(), TlsError> {
        files::save(dir, CERT_FILE, self.cert_pem().as_bytes(), files::PUBLIC_MODE)
    }

    /// Reads what [`Identity::save`] wrote.
    ///
    /// # Errors
    /// [`TlsError::File`] where a file is missing; [`TlsError::Pem`], [`TlsError::Certificate`].
    pub fn load(dir: &Path) -> Result<Self, TlsError> {
        Self::from_pem(
            files::load(dir, CA_FILE)?.to_string(),
            files::load(dir, CERT_FILE)?.to_string(),
            files::load(dir, KEY_FILE)?,
        )
    }

    /// Whether `dir` holds a saved identity.
    pub fn exists(dir: &Path) -> bool {
        dir.join(CERT_FILE).exists()
    }

    fn chain(&self) -> Result<Vec<CertificateDer<'static>>, TlsError> {
        Ok(vec![certificate(&self.cert_pem(), CERT_FILE)?])
    }

    fn private_key(&self) -> Result<PrivateKeyDer<'static>, TlsError> {
        PrivateKeyDer::from_pem_slice(self.key_pem.as_bytes())
            .map_err(|source| TlsError::Pem { what: KEY_FILE, detail: source.to_string() })
    }

    fn roots(&self) -> Result<Arc<RootCertStore>, TlsError> {
        let mut roots = RootCertStore::empty();
        roots.add(certificate(&self.ca_pem, CA_FILE)?)?;
        Ok(Arc::new(roots))
    }
}

fn certificate(pem: &str, what: &'static str) -> Result<CertificateDer<'static>, TlsError> {
    CertificateDer::from_pem_slice(pem.as_bytes())
        .map_err(|source| TlsError::Pem { what, detail: source.to_string() })
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}

/// The TLS configuration of a server: clients must show a certificate of the same authority.
/// `alpn` lists the protocols spoken, the preferred first.
///
/// # Errors
/// [`TlsError`] when the identity's texts do not make a certificate and its key.
pub fn server_config(identity: &Identity, alpn: &[&[u8]]) -> Result<Arc<ServerConfig>, TlsError> {
    let verifier =
        WebPkiClientVerifier::builder_with_provider(identity.roots()?, provider()).build()?;
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(verifier)
        .with_single_cert(identity.chain()?, identity.private_key()?)?;
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    // For connections that carry frames: `wire::records` seals and opens with them.
    config.enable_secret_extraction = true;
    Ok(Arc::new(config))
}

/// The TLS configuration of a client: the server must show a certificate of the same authority for
/// [`SERVER_NAME`]. Which peer it is, is checked after the handshake ([`ExpectedPeer::check`]).
///
/// # Errors
/// [`TlsError`] when the identity's texts do not make a certificate and its key.
pub fn client_config(identity: &Identity, alpn: &[&[u8]]) -> Result<Arc<ClientConfig>, TlsError> {
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])?
        .with_root_certificates(identity.roots()?)
        .with_client_auth_cert(identity.chain()?, identity.private_key()?)?;
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    config.resumption = Resumption::disabled();
    // As in `server_config`.
    config.enable_secret_extraction = true;
    Ok(Arc::new(config))
}

#[cfg(test)]
mod tests;
