//! The directory's Admin service as a test asks it: one connection, no process a question.

use std::path::Path;
use std::time::Duration;

use tokio::runtime::{Builder, Runtime};
use tonic::transport::Channel;
use tonic::{Response, Status};
use us_core::tls::{ExpectedPeer, Identity, Role};
use us_core::wire::connect_grpc;
use us_proto::v1::admin_client::AdminClient;
use us_proto::v1::{ProviderStatus, StatusReply, StatusRequest};

/// The largest answer.
const REPLY_BYTES_MAX: usize = 64 << 20;
/// An answer must come in this time.
const ANSWER: Duration = Duration::from_secs(20);

/// A connection with the directory; made again where it broke.
#[derive(Debug)]
pub struct Admin {
    runtime: Runtime,
    address: String,
    identity: Identity,
    client: Option<AdminClient<Channel>>,
}

impl Admin {
    /// For the directory at `address`, with the identity in a folder.
    ///
    /// # Panics
    /// When the identity is of no use.
    pub fn new(address: String, identity: &Path) -> Self {
        let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
        let identity = Identity::load(identity).expect("an identity");
        Self { runtime, address, identity, client: None }
    }

    /// The state of everything.
    ///
    /// # Errors
    /// Why the directory did not answer.
    pub fn status(&mut self) -> Result<StatusReply, String> {
        self.call(async |client| client.status(StatusRequest {}).await)
    }

    /// Any call of the service.
    ///
    /// # Errors
    /// Why it was refused, or not answered.
    pub fn call<T>(
        &mut self,
        ask: impl AsyncFnOnce(&mut AdminClient<Channel>) -> Result<Response<T>, Status>,
    ) -> Result<T, String> {
        let (address, identity) = (&self.address, &self.identity);
        let known = self.client.take();
        let answer = self.runtime.block_on(async {
            let mut client = match known {
                Some(client) => client,
                None => {
                    let expected = ExpectedPeer::role(Role::Directory);
                    let channel = connect_grpc(address, identity, expected).await;
                    let channel = channel.map_err(|error| error.to_string())?;
                    AdminClient::new(channel).max_decoding_message_size(REPLY_BYTES_MAX)
                }
            };
            let asked = tokio::time::timeout(ANSWER, ask(&mut client)).await;
            let reply = asked.map_err(|_| "no answer".to_owned())?;
            let reply = reply.map_err(|status| status.to_string())?.into_inner();
            Ok::<_, String>((client, reply))
        });
        let (client, reply) = answer?;
        self.client = Some(client);
        Ok(reply)
    }
}

/// A provider of a status, by its name.
pub fn provider<'s>(status: &'s StatusReply, name: &str) -> Option<&'s ProviderStatus> {
    status.providers.iter().find(|provider| provider.name == name)
}

/// Whether every block has all its fragments, `r` to spare, on providers that live, and nothing is
/// under way that could find otherwise.
///
/// # Errors
/// What is missing.
pub fn is_whole(status: &StatusReply, r: i32) -> Result<(), String> {
    let repair = status.repair.unwrap_or_default();
    let blocks = status.blocks.clone().unwrap_or_default();
    let idle = repair.queued + repair.running + repair.waiting == 0 && !repair.scanning;
    let lacking = blocks.by_durability.keys().any(|left| *left != r);
    let whole = idle && !lacking && !status.counting && blocks.unsettled == 0;
    whole.then_some(()).ok_or_else(|| format!("{repair:?} {blocks:?}"))
}
