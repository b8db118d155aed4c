use std::os::unix::fs::PermissionsExt;

use super::*;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_rustls::{TlsAcceptor, TlsConnector};

#[test]
fn identities_and_authorities_survive_the_disk() {
    let dir = tempfile::tempdir().unwrap();
    let ca = CertificateAuthority::create().unwrap();
    ca.save(&dir.path().join("ca")).unwrap();
    let ca = CertificateAuthority::load(&dir.path().join("ca")).unwrap();
    let home = dir.path().join("a/b");
    assert!(!Identity::exists(&home));
    let identity = ca.issue(Role::Provider, "kitchen").unwrap();
    identity.save(&home).unwrap();
    // Again over the old one.
    identity.save(&home).unwrap();
    let loaded = Identity::load(&home).unwrap();
    assert_eq!(loaded.own(), identity.own());
    assert_eq!(loaded.own().role, Role::Provider);
    assert_eq!(loaded.own().name, "kitchen");
    assert_eq!(loaded.own().cluster, ca.cluster());
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&home.join("key.pem")), 0o600);
    assert_eq!(mode(&home), 0o700);
    assert_eq!(mode(&dir.path().join("ca/ca-key.pem")), 0o600);
}

#[test]
fn strange_names_are_refused() {
    let ca = CertificateAuthority::create().unwrap();
    for name in ["", "a\nb", &"x".repeat(65)] {
        assert!(matches!(ca.issue(Role::Client, name), Err(TlsError::Name { .. })));
    }
    assert_eq!(ca.issue(Role::Client, "O=x, CN=é").unwrap().own().name, "O=x, CN=é");
}

#[test]
fn an_expectation_compares_what_it_knows() {
    let ca = CertificateAuthority::create().unwrap();
    let one = ca.issue(Role::Provider, "same name").unwrap();
    let other = ca.issue(Role::Provider, "same name").unwrap();
    let expected = ExpectedPeer::key(Role::Provider, one.own().key_hash);
    assert_eq!(expected.check(one.own()), Ok(()));
    assert!(expected.check(other.own()).is_err());
    assert_eq!(ExpectedPeer::default().check(other.own()), Ok(()));
    assert!(ExpectedPeer::role(Role::Directory).check(one.own()).is_err());
}

#[test]
fn a_certificate_from_elsewhere_is_no_peer() {
    let key = rcgen::generate_simple_self_signed(vec!["us".to_owned()]).unwrap();
    assert!(PeerIdentity::from_certificate(key.cert.der()).is_err());
    assert!(PeerIdentity::from_certificate(&CertificateDer::from(vec![1, 2, 3])).is_err());
}

/// One handshake over an in-memory pipe; each side says what it saw.
async fn handshake(
    server: Arc<ServerConfig>,
    client: Arc<ClientConfig>,
) -> (io::Result<PeerIdentity>, io::Result<PeerIdentity>) {
    let (near, far) = tokio::io::duplex(64 << 10);
    let accept = async move {
        let mut stream = TlsAcceptor::from(server).accept(far).await?;
        let peer = PeerIdentity::from_chain(stream.get_ref().1.peer_certificates());
        stream.write_all(b"!").await?;
        stream.flush().await?;
        Ok(peer.unwrap())
    };
    let connect = async move {
        let name = ServerName::try_from(SERVER_NAME).unwrap();
        let mut stream = TlsConnector::from(client).connect(name, near).await?;
        let peer = PeerIdentity::from_chain(stream.get_ref().1.peer_certificates());
        // In TLS 1.3 the client learns of a refusal at its first read.
        stream.read_u8().await?;
        Ok(peer.unwrap())
    };
    tokio::join!(accept, connect)
}

#[tokio::test]
async fn both_sides_know_each_other() {
    let ca = CertificateAuthority::create().unwrap();
    let server = ca.issue(Role::Directory, "attic").unwrap();
    let client = ca.issue(Role::Client, "laptop").unwrap();
    let (by_server, by_client) = handshake(
        server_config(&server, &[ALPN_H2]).unwrap(),
        client_config(&client, &[ALPN_H2]).unwrap(),
    )
    .await;
    assert_eq!(&by_server.unwrap(), client.own());
    assert_eq!(&by_client.unwrap(), server.own());
}

#[tokio::test]
async fn another_authority_is_refused_on_both_sides() {
    let ours = CertificateAuthority::create().unwrap();
    let theirs = CertificateAuthority::create().unwrap();
    let server = ours.issue(Role::Directory, "attic").unwrap();
    let stranger = theirs.issue(Role::Client, "laptop").unwrap();
    let (by_server, by_client) = handshake(
        server_config(&server, &[ALPN_H2]).unwrap(),
        client_config(&stranger, &[ALPN_H2]).unwrap(),
    )
    .await;
    assert!(by_server.is_err() && by_client.is_err());

    // The stranger trusts our authority, but its certificate is still not ours.
    let forged = Identity::from_pem(
        ours.ca_pem().to_owned(),
        stranger.cert_pem().to_string(),
        stranger.key_pem().clone(),
    )
    .unwrap();
    let (by_server, by_client) = handshake(
        server_config(&server, &[ALPN_H2]).unwrap(),
        client_config(&forged, &[ALPN_H2]).unwrap(),
    )
    .await;
    assert!(by_server.is_err() && by_client.is_err());
}

#[tokio::test]
async fn a_client_without_certificate_is_refused() {
    let ca = CertificateAuthority::create().unwrap();
    let server = ca.issue(Role::Directory, "attic").unwrap();
    let anonymous = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .unwrap()
        .with_root_certificates(server.roots().unwrap())
        .with_no_client_auth();
    let (by_server, by_client) =
        handshake(server_config(&server, &[]).unwrap(), Arc::new(anonymous)).await;
    assert!(by_server.is_err() && by_client.is_err());
}

#[tokio::test]
async fn protocols_must_agree() {
    let ca = CertificateAuthority::create().unwrap();
    let server = ca.issue(Role::Provider, "attic").unwrap();
    let client = ca.issue(Role::Client, "laptop").unwrap();
    let (by_server, by_client) = handshake(
        server_config(&server, &[ALPN_H2, ALPN_BULK]).unwrap(),
        client_config(&client, &[b"us-bulk/2"]).unwrap(),
    )
    .await;
    assert!(by_server.is_err() && by_client.is_err());
}

/// A member whose name the directory had changed (it joined anew with another one) refused each renewal
/// until its certificate expired.
#[test]
fn a_renewal_is_for_the_same_key_and_role_whatever_the_name() {
    let ca = CertificateAuthority::create().unwrap();
    let identity = ca.issue(Role::Client, "laptop").unwrap();
    let request = |of: &Identity| {
        let bytes = OwnKey::from_pem(of.key_pem().clone()).unwrap().request().unwrap();
        CertificateRequest::parse(&bytes).unwrap()
    };
    let signed = |ca: &CertificateAuthority, of: &Identity, role, name: &str| {
        ca.sign(&request(of), role, name, &[0x41; 16]).unwrap()
    };
    identity.renew(signed(&ca, &identity, Role::Client, "laptop")).unwrap();
    identity.renew(signed(&ca, &identity, Role::Client, "ann's laptop")).unwrap();
    assert_eq!(identity.renewals(), 2);
    let kept = identity.cert_pem();
    let other = ca.issue(Role::Client, "laptop").unwrap();
    let stranger = CertificateAuthority::create().unwrap();
    for wrong in [
        signed(&ca, &identity, Role::Admin, "laptop"),
        signed(&ca, &other, Role::Client, "laptop"),
        signed(&stranger, &identity, Role::Client, "laptop"),
    ] {
        assert!(identity.renew(wrong).is_err());
    }
    assert_eq!(identity.cert_pem(), kept, "the last good one stays");
    let dir = tempfile::tempdir().unwrap();
    identity.save(dir.path()).unwrap();
    assert_eq!(Identity::load(dir.path()).unwrap().own().name, "ann's laptop");
}
