//! The newcomer's side of joining, and keeping a certificate fresh.
//!
//! ```text
//! code -> TLS, the authority pinned, role directory -> Enroll(secret, request) -> certificate -> disk
//! ```
//! The secret leaves this machine only after the directory has proved who it is. A join whose answer was
//! lost is simply tried again: the key waits on the disk, and the same key with the same code gets its
//! certificate again.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tonic::codegen::http::Uri;
use tonic::transport::{Channel, Endpoint};
use tower::service_fn;
use us_proto::v1::enrollment_client::EnrollmentClient;
use us_proto::v1::renewal_client::RenewalClient;
use us_proto::v1::{EnrollRequest, RenewRequest};

use super::{CONNECT_TIMEOUT, ConnectError, connect_grpc, dial, grpc};
use crate::daemon::joined::Profile;
use crate::tls::{ExpectedPeer, Identity, InviteCode, OwnKey, Role, TlsError, join_client_config};

/// How long the directory may take for one answer.
const ANSWER: Duration = Duration::from_secs(30);
/// The pause after a renewal that failed, and between two at least and at most.
const RETRY: Duration = Duration::from_secs(60);
const AGAIN: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(24 * 3600));

/// Why a join did not work.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// The directory did not prove that it is the one that made the code.
    #[error(
        "{address} is not the directory that made this code; the code was not sent. Check the \
         address, and ask for a new code if somebody may have tampered with it"
    )]
    Imposter {
        /// The address in the code.
        address: String,
    },
    /// No connection.
    #[error("cannot reach the directory of the code: {0}")]
    Connect(#[source] ConnectError),
    /// The directory refuses the code, or the caller.
    #[error("{detail}")]
    Refused {
        /// In its words.
        detail: String,
    },
    /// No answer; the code may have been used, and can be tried again from here.
    #[error("the directory gave no answer ({detail}): run the same command again")]
    NoAnswer {
        /// What happened.
        detail: String,
    },
    /// The folder holds an identity of another cluster.
    #[error(
        "{dir} holds the identity of another cluster: choose another folder, or remove that one"
    )]
    OtherCluster {
        /// The folder.
        dir: String,
    },
    /// The answer makes no sense.
    #[error("the directory's answer cannot be used: {0}")]
    Answer(TlsError),
    /// Key or certificate cannot be made or kept.
    #[error(transparent)]
    Keep(#[from] TlsError),
    /// The profile cannot be kept.
    #[error("write the profile in {dir}: {source}")]
    Profile {
        /// The folder.
        dir: String,
        /// What the system said.
        source: std::io::Error,
    },
}

/// Joins with `code` as `role`; key, certificate and profile lie in `dir` afterwards. Where there is an
/// identity of the same cluster already its key stays: a member that joins again stays itself.
///
/// # Errors
/// [`JoinError`].
pub async fn join(
    code: &InviteCode,
    role: Role,
    name: &str,
    dir: &Path,
) -> Result<Identity, JoinError> {
    let key = own_key(code, dir)?;
    let request = key.request()?;
    let channel = connect(code).await?;
    let enroll = EnrollRequest {
        secret: code.secret.to_vec().into(),
        request: request.into(),
        role: role.as_str().to_owned(),
        name: name.to_owned(),
    };
    let answer = timeout(ANSWER, EnrollmentClient::new(channel).enroll(enroll)).await;
    let reply = match answer {
        Err(_elapsed) => {
            let detail = format!("waited {} s", ANSWER.as_secs());
            return Err(JoinError::NoAnswer { detail });
        }
        Ok(Err(status)) => return Err(refusal(&status)),
        Ok(Ok(reply)) => reply.into_inner(),
    };
    let identity = Identity::from_pem(reply.authority, reply.certificate, key.pem().clone())
        .map_err(JoinError::Answer)?;
    if identity.pin().map_err(JoinError::Answer)? != code.pin || identity.own().role != role {
        let detail = "the certificate is not what was asked for";
        return Err(JoinError::Answer(TlsError::Certificate { detail }));
    }
    // Whether key and certificate fit together.
    crate::tls::client_config(&identity, &[]).map_err(JoinError::Answer)?;
    let profile = Profile { directory: code.address.clone(), site: reply.site };
    let shown = || dir.display().to_string();
    // The certificate comes last: a folder that has one is complete.
    profile.save(dir).map_err(|source| JoinError::Profile { dir: shown(), source })?;
    identity.save(dir)?;
    OwnKey::no_longer_waits(dir)?;
    Ok(identity)
}

/// The key to join with: that of the identity in `dir`, else one that waits there, else a new one.
fn own_key(code: &InviteCode, dir: &Path) -> Result<OwnKey, JoinError> {
    if !Identity::exists(dir) {
        return Ok(OwnKey::waiting_in(dir)?);
    }
    let identity = Identity::load(dir)?;
    if identity.pin()? != code.pin {
        return Err(JoinError::OtherCluster { dir: dir.display().to_string() });
    }
    Ok(OwnKey::from_pem(identity.key_pem().clone())?)
}

fn refusal(status: &tonic::Status) -> JoinError {
    let detail = status.message().to_owned();
    match status.code() {
        tonic::Code::Unavailable
        | tonic::Code::Unknown
        | tonic::Code::Internal
        | tonic::Code::Cancelled
        | tonic::Code::DeadlineExceeded => JoinError::NoAnswer { detail },
        _ => JoinError::Refused { detail },
    }
}

async fn connect(code: &InviteCode) -> Result<Channel, JoinError> {
    let config = join_client_config(code.pin)?;
    let imposter = |error: ConnectError| match error {
        ConnectError::Handshake { address, source } => {
            tracing::debug!(%address, %source, "not the directory");
            JoinError::Imposter { address }
        }
        ConnectError::Identity { address, .. } | ConnectError::Peer { address, .. } => {
            JoinError::Imposter { address }
        }
        other => JoinError::Connect(other),
    };
    let expected = ExpectedPeer::role(Role::Directory);
    // Dialled here and not by the channel: it must not dial again somewhere else on its own.
    let (stream, _) = dial::dial(&code.address, config, expected).await.map_err(imposter)?;
    let mut stream = Some(TokioIo::new(stream));
    let connector = service_fn(move |_: Uri| {
        let stream = stream.take();
        async move { stream.ok_or_else(|| std::io::Error::other("the connection is lost")) }
    });
    Endpoint::from_static("http://us")
        .connect_timeout(CONNECT_TIMEOUT)
        .connect_with_connector(connector)
        .await
        .map_err(|error| {
            let (address, detail) = (code.address.clone(), grpc::innermost(&error));
            JoinError::Connect(ConnectError::Grpc { address, detail })
        })
}

/// Why a certificate could not be renewed now.
#[derive(Debug, thiserror::Error)]
pub enum RenewError {
    /// No connection.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The directory refuses, or does not answer.
    #[error("the directory says: {}", .0.message())]
    Status(#[from] tonic::Status),
    /// The answer cannot be used or kept.
    #[error(transparent)]
    Keep(#[from] TlsError),
    /// No answer.
    #[error("the directory gave no answer")]
    Silent,
}

/// Asks for a new certificate over `channel` and keeps it in `dir` when it is time; when to ask again.
///
/// # Errors
/// [`RenewError`]; the old certificate stays.
pub async fn renew_over(
    channel: Channel,
    identity: &Identity,
    dir: &Path,
) -> Result<Duration, RenewError> {
    let request = OwnKey::from_pem(identity.key_pem().clone())?.request()?;
    let asked = RenewalClient::new(channel).renew(RenewRequest { request: request.into() }).await?;
    let reply = asked.into_inner();
    if !reply.certificate.is_empty() {
        identity.renew(reply.certificate)?;
        let (identity, dir) = (identity.clone(), dir.to_owned());
        let saved = tokio::task::spawn_blocking(move || identity.save_certificate(&dir)).await;
        // A task that does not end well was stopped with the runtime.
        saved.map_err(|_stopped| RenewError::Silent)??;
        tracing::info!("the certificate was renewed");
    }
    Ok(Duration::from_millis(reply.again_ms).clamp(AGAIN.0, AGAIN.1))
}

/// Keeps the certificate in `dir` fresh until `stop`.
pub async fn keep_renewed(
    directory: Arc<str>,
    identity: Identity,
    dir: std::path::PathBuf,
    stop: CancellationToken,
) {
    loop {
        let renewing = async {
            let expected = ExpectedPeer::role(Role::Directory);
            let channel = connect_grpc(&directory, &identity, expected).await?;
            let renewed = timeout(ANSWER, renew_over(channel, &identity, &dir)).await;
            renewed.map_err(|_elapsed| RenewError::Silent)?
        };
        // Cancel-safe: a certificate is kept whole or not at all, and the next start asks again.
        let Some(renewed) = stop.run_until_cancelled(renewing).await else { return };
        let pause = renewed.unwrap_or_else(|error| {
            tracing::debug!(%error, "the certificate was not renewed; trying again");
            RETRY
        });
        // Cancel-safe: a dropped sleep loses nothing.
        if stop.run_until_cancelled(tokio::time::sleep(pause)).await.is_none() {
            return;
        }
    }
}
