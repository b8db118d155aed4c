//! TLS for those who have no certificate yet: the newcomer shows none, and believes a server only when
//! its chain ends in the authority that its invitation pins.
//!
//! The server answers such a handshake only under [`ALPN_JOIN`](super::ALPN_JOIN), and serves nothing
//! but joining there. It shows the authority's certificate too, since the newcomer has only its hash.

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::NoServerSessionStorage;
use rustls::version::TLS13;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, ServerConfig,
    SignatureScheme,
};

use super::{ALPN_JOIN, AuthorityPin, CA_FILE, Identity, TlsError, certificate, provider};

/// The TLS configuration of a newcomer. Which role the server has, is checked after the handshake
/// ([`ExpectedPeer::check`](super::ExpectedPeer::check)): every member's certificate is for the same
/// DNS name.
///
/// # Errors
/// [`TlsError`].
pub fn join_client_config(pin: AuthorityPin) -> Result<Arc<ClientConfig>, TlsError> {
    let provider = provider();
    let verifier = Arc::new(PinnedAuthority { pin, provider: Arc::clone(&provider) });
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_no_client_auth();
    config.alpn_protocols = vec![ALPN_JOIN.to_vec()];
    config.resumption = Resumption::disabled();
    Ok(Arc::new(config))
}

/// The directory's TLS configuration for newcomers.
///
/// # Errors
/// [`TlsError`] when the identity's texts do not make a certificate and its key.
pub fn join_server_config(identity: &Identity) -> Result<Arc<ServerConfig>, TlsError> {
    let mut chain = identity.chain()?;
    chain.push(certificate(&identity.ca_pem, CA_FILE)?);
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])?
        .with_no_client_auth()
        .with_single_cert(chain, identity.private_key()?)?;
    config.alpn_protocols = vec![ALPN_JOIN.to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}

/// Believes certificates of the authority with one pin.
#[derive(Debug)]
struct PinnedAuthority {
    pin: AuthorityPin,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for PinnedAuthority {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let unknown = || rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer);
        let mut shown = intermediates.iter();
        let authority = shown.find(|shown| AuthorityPin::of(shown) == self.pin);
        let authority = authority.ok_or_else(unknown)?;
        let mut roots = RootCertStore::empty();
        roots.add(authority.clone().into_owned())?;
        let provider = Arc::clone(&self.provider);
        let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider)
            .build()
            .map_err(|_| unknown())?;
        verifier.verify_server_cert(end_entity, &[], server_name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let known = &self.provider.signature_verification_algorithms;
        verify_tls12_signature(message, cert, dss, known)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let known = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, cert, dss, known)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
