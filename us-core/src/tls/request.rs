//! A newcomer's key, and the request by which it asks for a certificate. The key never leaves its
//! machine: the request carries the public half and a signature that proves the other.

use std::path::{Path, PathBuf};

use aws_lc_rs::digest::{SHA256, digest};
use rcgen::{
    CertificateParams, CertificateSigningRequestParams, KeyPair, PKCS_ECDSA_P256_SHA256, PublicKey,
    PublicKeyData,
};
use zeroize::Zeroizing;

use super::{KeyHash, TlsError, files};

/// The longest request taken; one of ours has about 250 bytes.
pub const REQUEST_BYTES_MAX: usize = 4096;

/// A key that waits for its certificate: a join that is tried again uses it again.
const WAITING_KEY_FILE: &str = "joining-key.pem";

/// A private key without a certificate.
pub struct OwnKey {
    key: KeyPair,
    pem: Zeroizing<String>,
}

impl std::fmt::Debug for OwnKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The key stays out of logs.
        f.debug_struct("OwnKey").finish_non_exhaustive()
    }
}

impl OwnKey {
    /// The key that waits in `dir`, made (mode 0600, in a folder of mode 0700) where none does.
    ///
    /// # Errors
    /// [`TlsError`].
    pub fn waiting_in(dir: &Path) -> Result<Self, TlsError> {
        if dir.join(WAITING_KEY_FILE).exists() {
            return Self::from_pem(files::load(dir, WAITING_KEY_FILE)?);
        }
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let pem = Zeroizing::new(key.serialize_pem());
        files::make_dir(dir)?;
        files::save(dir, WAITING_KEY_FILE, pem.as_bytes(), files::SECRET_MODE)?;
        Ok(Self { key, pem })
    }

    /// The key no longer waits: it has a certificate.
    ///
    /// # Errors
    /// [`TlsError::File`].
    pub fn no_longer_waits(dir: &Path) -> Result<(), TlsError> {
        let path: PathBuf = dir.join(WAITING_KEY_FILE);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
            Err(source) => Err(TlsError::File { action: "remove", path, source }),
            Ok(()) => Ok(()),
        }
    }

    /// The key of this PEM text.
    ///
    /// # Errors
    /// [`TlsError::Issue`] for another text.
    pub fn from_pem(pem: Zeroizing<String>) -> Result<Self, TlsError> {
        Ok(Self { key: KeyPair::from_pem(&pem)?, pem })
    }

    /// The private key (PKCS #8). Never print it.
    pub fn pem(&self) -> &Zeroizing<String> {
        &self.pem
    }

    /// A request for a certificate, DER.
    ///
    /// # Errors
    /// [`TlsError::Issue`].
    pub fn request(&self) -> Result<Vec<u8>, TlsError> {
        let request = CertificateParams::default().serialize_request(&self.key)?;
        Ok(request.der().to_vec())
    }
}

/// A request whose signature was checked.
#[derive(Debug)]
pub struct CertificateRequest {
    public_key: PublicKey,
    key_hash: KeyHash,
}

impl CertificateRequest {
    /// Reads a request of somebody unknown.
    ///
    /// # Errors
    /// [`TlsError::Certificate`] for anything but a request signed by its own P-256 key.
    pub fn parse(der: &[u8]) -> Result<Self, TlsError> {
        let refused = TlsError::Certificate { detail: "it is no request signed by its own key" };
        if der.len() > REQUEST_BYTES_MAX {
            return Err(refused);
        }
        let Ok(request) = CertificateSigningRequestParams::from_der(&der.into()) else {
            return Err(refused);
        };
        let public_key = request.public_key;
        if public_key.algorithm() != &PKCS_ECDSA_P256_SHA256 {
            return Err(refused);
        }
        let hash = digest(&SHA256, &public_key.subject_public_key_info());
        let key_hash = KeyHash::from_slice(hash.as_ref()).expect("SHA-256 gives 32 bytes");
        Ok(Self { public_key, key_hash })
    }

    /// The hash of its key: who it will be.
    pub fn key_hash(&self) -> KeyHash {
        self.key_hash
    }

    pub(super) fn public_key(&self) -> &PublicKey {
        &self.public_key
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tls::{CertificateAuthority, Identity, Role};

    #[test]
    fn a_key_that_waits_is_used_again_and_gets_its_certificate() {
        let dir = tempfile::tempdir().unwrap();
        let home = dir.path().join("identity");
        let key = OwnKey::waiting_in(&home).unwrap();
        assert_eq!(*OwnKey::waiting_in(&home).unwrap().pem(), *key.pem());
        let request = CertificateRequest::parse(&key.request().unwrap()).unwrap();
        let authority = CertificateAuthority::create().unwrap();
        let pem = authority.sign(&request, Role::Client, "laptop", &[1; 16]).unwrap();
        let ca = authority.ca_pem().to_owned();
        let identity = Identity::from_pem(ca, pem, key.pem().clone()).unwrap();
        assert_eq!(identity.own().key_hash, request.key_hash());
        assert_eq!((identity.own().role, &*identity.own().name), (Role::Client, "laptop"));
        OwnKey::no_longer_waits(&home).unwrap();
        OwnKey::no_longer_waits(&home).unwrap();
        assert_ne!(*OwnKey::waiting_in(&home).unwrap().pem(), *key.pem());
    }

    /// Some bytes beside the key and its signature count for nothing; whatever passes is for the key that
    /// signed it.
    #[test]
    fn an_altered_request_is_none_or_for_the_same_key() {
        let dir = tempfile::tempdir().unwrap();
        let der = OwnKey::waiting_in(dir.path()).unwrap().request().unwrap();
        let own = CertificateRequest::parse(&der).unwrap().key_hash();
        let mut passed = 0;
        for at in 0..der.len() {
            for bit in 0..8 {
                let mut altered = der.clone();
                altered[at] ^= 1 << bit;
                if let Ok(request) = CertificateRequest::parse(&altered) {
                    assert_eq!(request.key_hash(), own, "byte {at}");
                    passed += 1;
                }
            }
            assert!(CertificateRequest::parse(&der[..at]).is_err(), "{at} bytes");
        }
        assert!(passed < 64, "{passed} of {} bits count for nothing", der.len() * 8);
    }
}
