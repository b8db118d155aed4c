//! The gRPC services of the registry: joining for those without certificate, renewing for members,
//! inviting and revoking for administrators.
//!
//! [`EnrollService`] is the one door to the directory that opens without a certificate. What a stranger
//! can make it do is bounded: [`Tries`] before anything is parsed, one small message, one question.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use parking_lot::Mutex;
use tonic::service::Routes;
use tonic::{Request, Response, Status};
use us_core::tls::invite::{SECRET_BYTES, secret_hash};
use us_core::tls::{CertificateAuthority, CertificateRequest, REQUEST_BYTES_MAX, Role};
use us_core::wire::{CallerAddress, network_of, peer_of};
use us_proto::v1::enrollment_server::{Enrollment, EnrollmentServer};
use us_proto::v1::registry_server::{Registry, RegistryServer};
use us_proto::v1::renewal_server::{Renewal, RenewalServer};
use us_proto::v1::{
    CancelInviteReply, CancelInviteRequest, EnrollReply, EnrollRequest, InviteReply, InviteRequest,
    InvitesReply, InvitesRequest, MembersReply, MembersRequest, RenewReply, RenewRequest,
    RevokeReply, RevokeRequest,
};

use crate::engine::registry::{Issue, RegistryAnswer, RegistryQuestion};
use crate::engine::{Answer, Question};
use crate::service::{Service, allowed, unexpected};

/// The largest message of these services.
const MESSAGE_BYTES_MAX: usize = 2 * REQUEST_BYTES_MAX;

/// How often joining may be tried: so many at once, and so many a second from then on.
const FROM_ONE_ADDRESS: Allowance = Allowance { at_once: 10.0, a_second: 0.2 };
const FROM_ALL: Allowance = Allowance { at_once: 200.0, a_second: 20.0 };
/// Addresses that are remembered.
const ADDRESSES_MAX: usize = 4096;

#[derive(Clone, Copy, Debug)]
struct Allowance {
    at_once: f64,
    a_second: f64,
}

/// What is left of an allowance.
#[derive(Clone, Copy, Debug)]
struct Left {
    tries: f64,
    at_ms: u64,
}

impl Left {
    fn now(self, allowance: Allowance, now_ms: u64) -> Self {
        let passed = now_ms.saturating_sub(self.at_ms) as f64 / 1000.0;
        let tries = (self.tries + passed * allowance.a_second).min(allowance.at_once);
        Self { tries, at_ms: now_ms }
    }
}

/// Counts tries to join, by address and in all.
#[derive(Debug)]
struct Tries {
    all: Left,
    by_address: HashMap<IpAddr, Left>,
}

impl Tries {
    fn new() -> Self {
        let all = Left { tries: FROM_ALL.at_once, at_ms: 0 };
        Self { all, by_address: HashMap::new() }
    }

    /// Whether one more try is taken now.
    fn take(&mut self, address: IpAddr, now_ms: u64) -> bool {
        let address = network_of(address);
        let full =
            |left: &Left| left.now(FROM_ONE_ADDRESS, now_ms).tries >= FROM_ONE_ADDRESS.at_once;
        if !self.by_address.contains_key(&address) && self.by_address.len() >= ADDRESSES_MAX {
            // Who has not tried for long is like one that never did.
            self.by_address.retain(|_, left| !full(left));
            if self.by_address.len() >= ADDRESSES_MAX {
                return false;
            }
        }
        self.all = self.all.now(FROM_ALL, now_ms);
        let fresh = Left { tries: FROM_ONE_ADDRESS.at_once, at_ms: now_ms };
        let own = self.by_address.entry(address).or_insert(fresh);
        *own = own.now(FROM_ONE_ADDRESS, now_ms);
        if own.tries < 1.0 || self.all.tries < 1.0 {
            return false;
        }
        own.tries -= 1.0;
        self.all.tries -= 1.0;
        true
    }
}

/// Joining.
#[derive(Clone)]
pub struct EnrollService {
    service: Service,
    authority: Arc<CertificateAuthority>,
    tries: Arc<Mutex<Tries>>,
    started: Instant,
}

impl EnrollService {
    /// Certificates of `authority`, as the directory behind `service` decides.
    pub fn new(service: Service, authority: Arc<CertificateAuthority>) -> Self {
        let (tries, started) = (Arc::new(Mutex::new(Tries::new())), Instant::now());
        Self { service, authority, tries, started }
    }

    /// For [`us_core::wire::Server::join`].
    pub fn newcomers(&self) -> Routes {
        let service = EnrollmentServer::new(self.clone());
        Routes::new(service.max_decoding_message_size(MESSAGE_BYTES_MAX))
    }

    /// Adds the services for members.
    pub fn members(&self, routes: Routes) -> Routes {
        let renewal = RenewalServer::new(self.clone());
        let registry = RegistryServer::new(self.service.clone());
        routes
            .add_service(renewal.max_decoding_message_size(MESSAGE_BYTES_MAX))
            .add_service(registry.max_decoding_message_size(MESSAGE_BYTES_MAX))
    }

    async fn sign(&self, request: CertificateRequest, issue: Issue) -> Result<String, Status> {
        let authority = Arc::clone(&self.authority);
        let signing = tokio::task::spawn_blocking(move || {
            authority.sign(&request, issue.role, &issue.name, &issue.serial)
        });
        let signed = signing.await.map_err(|error| Status::internal(error.to_string()))?;
        signed.map_err(|error| Status::internal(error.to_string()))
    }
}

async fn parse(request: Bytes) -> Result<CertificateRequest, Status> {
    let parsing = tokio::task::spawn_blocking(move || CertificateRequest::parse(&request));
    let parsed = parsing.await.map_err(|error| Status::internal(error.to_string()))?;
    parsed.map_err(|error| Status::invalid_argument(error.to_string()))
}

fn role(text: &str) -> Result<Role, Status> {
    text.parse().map_err(|_| Status::invalid_argument("a role is provider, client or admin"))
}

#[tonic::async_trait]
impl Enrollment for EnrollService {
    async fn enroll(
        &self,
        request: Request<EnrollRequest>,
    ) -> Result<Response<EnrollReply>, Status> {
        let caller = request.extensions().get::<CallerAddress>();
        let caller =
            caller.ok_or_else(|| Status::unauthenticated("joining has a door of its own"))?;
        let now_ms = self.started.elapsed().as_millis() as u64;
        if !self.tries.lock().take(caller.0.ip(), now_ms) {
            metrics::counter!("us_directory_joins_total", "result" => "limited").increment(1);
            return Err(Status::resource_exhausted("too many tries: wait a minute, then again"));
        }
        let address = caller.0;
        let EnrollRequest { secret, request, role: wanted, name } = request.into_inner();
        if secret.len() != SECRET_BYTES {
            return Err(Status::invalid_argument("a secret has 10 bytes"));
        }
        let (secret_hash, wanted) = (secret_hash(&secret), role(&wanted)?);
        let request = parse(request).await?;
        let key_hash = request.key_hash();
        let question = RegistryQuestion::Enroll { secret_hash, key_hash, role: wanted, name };
        let answer = self.service.ask(Question::Registry(question)).await;
        let result = if answer.is_ok() { "joined" } else { "refused" };
        metrics::counter!("us_directory_joins_total", "result" => result).increment(1);
        tracing::info!(%address, result, "somebody asked to join");
        let issue = match answer.map_err(refusal)? {
            Answer::Registry(RegistryAnswer::Enrolled(issue)) => issue,
            other => return Err(unexpected(&other)),
        };
        let site = issue.site.clone();
        let certificate = self.sign(request, issue).await?;
        let authority = self.authority.ca_pem().to_owned();
        Ok(Response::new(EnrollReply { certificate, authority, site }))
    }
}

/// A code that is not good is not "not found": the caller is not allowed in.
fn refusal(status: Status) -> Status {
    match status.code() {
        tonic::Code::NotFound => Status::permission_denied(status.message()),
        _ => status,
    }
}

#[tonic::async_trait]
impl Renewal for EnrollService {
    async fn renew(&self, request: Request<RenewRequest>) -> Result<Response<RenewReply>, Status> {
        let member = peer_of(&request)?.clone();
        let request = parse(request.into_inner().request).await?;
        if request.key_hash() != member.key_hash {
            let detail = "a certificate is renewed for its own key only";
            return Err(Status::permission_denied(detail));
        }
        let question = RegistryQuestion::Renew { member };
        match self.service.ask(Question::Registry(question)).await? {
            Answer::Registry(RegistryAnswer::Renewal(issue, again_ms)) => {
                let certificate = match issue {
                    Some(issue) => self.sign(request, issue).await?,
                    None => String::new(),
                };
                Ok(Response::new(RenewReply { certificate, again_ms }))
            }
            other => Err(unexpected(&other)),
        }
    }
}

impl Service {
    async fn registry<T>(
        &self,
        request: &Request<T>,
        question: RegistryQuestion,
    ) -> Result<RegistryAnswer, Status> {
        let who = allowed(request, &[Role::Admin])?;
        match self.ask_by(&who, Question::Registry(question)).await? {
            Answer::Registry(answer) => Ok(answer),
            other => Err(unexpected(&other)),
        }
    }
}

fn odd(answer: RegistryAnswer) -> Status {
    unexpected(&Answer::Registry(answer))
}

#[tonic::async_trait]
impl Registry for Service {
    async fn invite(
        &self,
        request: Request<InviteRequest>,
    ) -> Result<Response<InviteReply>, Status> {
        allowed(&request, &[Role::Admin])?;
        let InviteRequest { role: wanted, site, name, uses, expires_ms } =
            request.get_ref().clone();
        let role = role(&wanted)?;
        let question = RegistryQuestion::Invite { role, site, name, uses, expires_ms };
        match self.registry(&request, question).await? {
            RegistryAnswer::Invited(secret, invite) => {
                Ok(Response::new(InviteReply { secret: secret.into(), invite: Some(invite) }))
            }
            other => Err(odd(other)),
        }
    }

    async fn invites(
        &self,
        request: Request<InvitesRequest>,
    ) -> Result<Response<InvitesReply>, Status> {
        match self.registry(&request, RegistryQuestion::Invites).await? {
            RegistryAnswer::Invites(invites) => Ok(Response::new(InvitesReply { invites })),
            other => Err(odd(other)),
        }
    }

    async fn cancel_invite(
        &self,
        request: Request<CancelInviteRequest>,
    ) -> Result<Response<CancelInviteReply>, Status> {
        let id = request.get_ref().id.to_vec();
        match self.registry(&request, RegistryQuestion::CancelInvite { id }).await? {
            RegistryAnswer::Done => Ok(Response::new(CancelInviteReply {})),
            other => Err(odd(other)),
        }
    }

    async fn members(
        &self,
        request: Request<MembersRequest>,
    ) -> Result<Response<MembersReply>, Status> {
        let after = request.get_ref().after.to_vec();
        match self.registry(&request, RegistryQuestion::Members { after }).await? {
            RegistryAnswer::Members(members) => Ok(Response::new(MembersReply { members })),
            other => Err(odd(other)),
        }
    }

    async fn revoke(
        &self,
        request: Request<RevokeRequest>,
    ) -> Result<Response<RevokeReply>, Status> {
        let member = request.get_ref().member.clone();
        match self.registry(&request, RegistryQuestion::Revoke { member }).await? {
            RegistryAnswer::Revoked { member, sessions, provider } => {
                let (provider, fragments) = provider.unwrap_or_default();
                let member = Some(member);
                Ok(Response::new(RevokeReply { member, sessions, provider, fragments }))
            }
            other => Err(odd(other)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn v4(last: u8) -> IpAddr {
        IpAddr::from([192, 0, 2, last])
    }

    #[test]
    fn one_address_tries_ten_times_and_then_slowly() {
        let mut tries = Tries::new();
        let taken = (0..100).filter(|_| tries.take(v4(1), 0)).count();
        assert_eq!(taken, 10);
        assert!(tries.take(v4(2), 0), "another is not held up by it");
        assert!(!tries.take(v4(1), 4_000) && tries.take(v4(1), 5_000));
        let mapped = "::ffff:192.0.2.1".parse().unwrap();
        assert!(!tries.take(mapped, 5_000), "it is the same address");
    }

    #[test]
    fn a_crowd_of_addresses_is_bounded() {
        let mut tries = Tries::new();
        let address = |n: u32| IpAddr::from(n.to_be_bytes());
        let taken = (0..10_000).filter(|n| tries.take(address(*n), 0)).count();
        assert!(taken == 200 && tries.by_address.len() <= ADDRESSES_MAX, "{taken}");
        assert!(!tries.take(address(20_000), 0));
        // Those that did not try again are forgotten, and everybody can join.
        assert!(tries.take(address(20_000), 60_000));
        let network = |last: u16| IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, last]);
        let taken = (0..100).filter(|last| tries.take(network(*last), 120_000)).count();
        assert_eq!(taken, 10, "one network");
    }
}
