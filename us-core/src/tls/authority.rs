//! The cluster's certificate authority.

use std::path::Path;

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, SerialNumber,
};
use zeroize::Zeroizing;

use super::{
    AuthorityPin, CA_FILE, CertificateRequest, Identity, NAME_BYTES_MAX, Role, SERVER_NAME,
    TlsError, files, peer,
};
use crate::ids::ClusterId;

const CA_KEY_FILE: &str = "ca-key.pem";

/// Issues the certificates of one cluster. Its key is the root of all trust there: it stays with
/// the directory.
pub struct CertificateAuthority {
    cluster: ClusterId,
    ca_pem: String,
    key_pem: Zeroizing<String>,
    issuer: Issuer<'static, KeyPair>,
}

impl std::fmt::Debug for CertificateAuthority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The key stays out of logs.
        f.debug_tuple("CertificateAuthority").field(&self.cluster).finish()
    }
}

impl CertificateAuthority {
    /// A new authority, and with it a new cluster.
    ///
    /// # Errors
    /// [`TlsError::Issue`] when the key cannot be made.
    pub fn create() -> Result<Self, TlsError> {
        let cluster = ClusterId::generate();
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::OrganizationName, cluster.to_string());
        params.distinguished_name.push(DnType::CommonName, "us certificate authority");
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let ca_pem = params.self_signed(&key)?.pem();
        let key_pem = Zeroizing::new(key.serialize_pem());
        Ok(Self { cluster, ca_pem, key_pem, issuer: Issuer::new(params, key) })
    }

    /// Writes `ca.pem` and `ca-key.pem` (mode 0600) into `dir`, made with mode 0700.
    ///
    /// # Errors
    /// [`TlsError::File`].
    pub fn save(&self, dir: &Path) -> Result<(), TlsError> {
        files::make_dir(dir)?;
        files::save(dir, CA_KEY_FILE, self.key_pem.as_bytes(), files::SECRET_MODE)?;
        files::save(dir, CA_FILE, self.ca_pem.as_bytes(), files::PUBLIC_MODE)
    }

    /// Reads what [`CertificateAuthority::save`] wrote.
    ///
    /// # Errors
    /// [`TlsError::File`] where a file is missing; [`TlsError::Certificate`] when `ca.pem` names no
    /// cluster; [`TlsError::Issue`] when the files do not parse.
    pub fn load(dir: &Path) -> Result<Self, TlsError> {
        Self::from_pem(files::load(dir, CA_FILE)?.to_string(), files::load(dir, CA_KEY_FILE)?)
    }

    /// The authority made of these two PEM texts.
    ///
    /// # Errors
    /// As [`CertificateAuthority::load`], but for files.
    pub fn from_pem(ca_pem: String, key_pem: Zeroizing<String>) -> Result<Self, TlsError> {
        let cluster = peer::cluster_of(&super::certificate(&ca_pem, CA_FILE)?)?;
        let issuer = Issuer::from_ca_cert_pem(&ca_pem, KeyPair::from_pem(&key_pem)?)?;
        Ok(Self { cluster, ca_pem, key_pem, issuer })
    }

    /// Whether `dir` holds a saved authority.
    pub fn exists(dir: &Path) -> bool {
        dir.join(CA_FILE).exists()
    }

    /// The cluster.
    pub fn cluster(&self) -> ClusterId {
        self.cluster
    }

    /// The authority's certificate: what everyone trusts.
    pub fn ca_pem(&self) -> &str {
        &self.ca_pem
    }

    /// Its private key (PKCS #8). Never print it.
    pub fn key_pem(&self) -> &Zeroizing<String> {
        &self.key_pem
    }

    /// A new key and a certificate for it.
    ///
    /// # Errors
    /// [`TlsError::Name`] for a name no certificate can carry; [`TlsError::Issue`].
    pub fn issue(&self, role: Role, name: &str) -> Result<Identity, TlsError> {
        let params = self.subject(role, name)?;
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let certificate = params.signed_by(&key, &self.issuer)?;
        let key_pem = Zeroizing::new(key.serialize_pem());
        Identity::from_pem(self.ca_pem.clone(), certificate.pem(), key_pem)
    }
    /// A certificate for the key of a request. Nothing else of the request is believed.
    ///
    /// # Errors
    /// [`TlsError::Name`]; [`TlsError::Issue`].
    pub fn sign(
        &self,
        request: &CertificateRequest,
        role: Role,
        name: &str,
        serial: &[u8],
    ) -> Result<String, TlsError> {
        let mut params = self.subject(role, name)?;
        params.serial_number = Some(SerialNumber::from_slice(serial));
        Ok(params.signed_by(request.public_key(), &self.issuer)?.pem())
    }

    /// What an invitation says of this authority.
    ///
    /// # Errors
    /// [`TlsError::Pem`].
    pub fn pin(&self) -> Result<AuthorityPin, TlsError> {
        Ok(AuthorityPin::of(&super::certificate(&self.ca_pem, CA_FILE)?))
    }

    fn subject(&self, role: Role, name: &str) -> Result<CertificateParams, TlsError> {
        if !is_name(name) {
            return Err(TlsError::Name { name: name.to_owned() });
        }
        let mut params = CertificateParams::new(vec![SERVER_NAME.to_owned()])?;
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::OrganizationName, self.cluster.to_string());
        params.distinguished_name.push(DnType::OrganizationalUnitName, role.as_str());
        params.distinguished_name.push(DnType::CommonName, name);
        params.use_authority_key_identifier_extension = true;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        // Everyone both dials and is dialled.
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        Ok(params)
    }
}

/// Whether a certificate can carry this name.
pub fn is_name(name: &str) -> bool {
    !name.is_empty() && name.len() <= NAME_BYTES_MAX && !name.chars().any(char::is_control)
}
