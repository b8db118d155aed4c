//! Finds the directory and talks to its Admin service. Every call has a deadline.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use tonic::transport::Channel;
use us_core::ids::BlockId;
use us_core::tls::{ExpectedPeer, Identity, Role};
use us_core::wire::connect_grpc;
use us_core::wire::join::renew_over;
use us_proto::v1;
use us_proto::v1::admin_client::AdminClient;

use super::Senseless;
use crate::places::{self, UpRecord};

/// How long the directory may take for one answer.
const ANSWER: Duration = Duration::from_secs(20);
/// How often a certificate is looked at, and the file that says when it was last.
const RENEWAL_EVERY: Duration = Duration::from_secs(24 * 3600);
const RENEWAL_ASKED: &str = "renewal-asked";
/// How long a check may be silent: it may have to wait for a provider.
const FSCK_SILENCE: Duration = Duration::from_secs(180);
/// The largest answer: the status of some 10^5 providers.
const REPLY_BYTES_MAX: usize = 64 << 20;

/// Which directory, and as whom; what is `None` is found on this machine.
#[derive(Debug, Clone, Default)]
pub struct Target {
    /// "host:port".
    pub directory: Option<String>,
    /// The folder of an identity.
    pub identity: Option<PathBuf>,
}

/// A directory's Admin service.
#[derive(Debug)]
pub struct Admin {
    client: AdminClient<Channel>,
}

/// The address of the directory `target` means, and who we are there.
pub(super) fn resolved(target: &Target) -> anyhow::Result<(String, Identity)> {
    let (directory, identity_dir) = found(target)?;
    let identity = load(&identity_dir)?;
    Ok((directory, identity))
}

fn found(target: &Target) -> anyhow::Result<(String, PathBuf)> {
    let joined = places::joined(Role::Admin).or_else(|| places::joined(Role::Client));
    Ok(resolve(target, joined, UpRecord::find()).map_err(Senseless)?)
}

fn load(identity_dir: &Path) -> anyhow::Result<Identity> {
    let used = || format!("cannot use the identity in {}", identity_dir.display());
    Ok(Identity::load(identity_dir).with_context(used).map_err(Senseless)?)
}

/// A connection with the directory `target` means, its address, and who we are there. A certificate
/// that was not looked at for a day is renewed if it is time.
pub(super) async fn dialled(target: &Target) -> anyhow::Result<(Channel, String, Identity)> {
    let (directory, dir) = found(target)?;
    let identity = load(&dir)?;
    let channel = connect_grpc(&directory, &identity, ExpectedPeer::role(Role::Directory))
        .await
        .with_context(|| {
            format!(
                "the directory at {directory} does not answer: is it running? (`usfs up` or \
                 `us-directory run` starts one)"
            )
        })?;
    renew_now_and_then(&channel, &identity, &dir).await;
    Ok((channel, directory, identity))
}

/// The wall clock only spares questions here: the directory decides whether it is time.
async fn renew_now_and_then(channel: &Channel, identity: &Identity, dir: &Path) {
    let asked = dir.join(RENEWAL_ASKED);
    let modified = std::fs::metadata(&asked).and_then(|data| data.modified());
    let age = modified.ok().and_then(|at| at.elapsed().ok());
    let again = std::fs::read_to_string(&asked).ok().and_then(|text| text.trim().parse().ok());
    let again = again.map_or(RENEWAL_EVERY, Duration::from_secs).min(RENEWAL_EVERY);
    if age.is_some_and(|age| age < again) {
        return;
    }
    let renewed = tokio::time::timeout(ANSWER, renew_over(channel.clone(), identity, dir)).await;
    match renewed {
        Ok(Ok(again)) => {
            // Without the mark it is asked again the next time, which costs little.
            let _ = std::fs::write(&asked, again.as_secs().to_string());
        }
        Ok(Err(error)) => tracing::debug!(%error, "the certificate was not renewed"),
        Err(_elapsed) => tracing::debug!("the certificate was not renewed: no answer"),
    }
}

/// Connects to the directory `target` means.
///
/// # Errors
/// When none is known, or it does not answer; the text says what to do.
pub async fn connect(target: &Target) -> anyhow::Result<Admin> {
    let (channel, ..) = dialled(target).await?;
    let client = AdminClient::new(channel).max_decoding_message_size(REPLY_BYTES_MAX);
    Ok(Admin { client })
}

fn resolve(
    target: &Target,
    joined: Option<(String, PathBuf)>,
    up: Option<UpRecord>,
) -> anyhow::Result<(String, PathBuf)> {
    let of_joined = || Some(joined.as_ref()?.0.clone());
    let directory = target.directory.clone().or_else(of_joined);
    let directory = directory.or_else(|| Some(up.as_ref()?.directory.clone()));
    let Some(directory) = directory else {
        bail!(
            "no directory is known here: start `usfs up`, join one with `usctl join`, or give \
             --directory HOST:PORT (or US_DIRECTORY)"
        );
    };
    let of_up = up.filter(|up| up.directory == directory).map(|up| up.admin_identity);
    let identity = target.identity.clone().or(of_up);
    let Some(identity) = identity.or_else(|| joined.map(|(_, dir)| dir)) else {
        bail!("give --identity DIR (or US_IDENTITY) for the directory at {directory}");
    };
    Ok((directory, identity))
}

impl Admin {
    /// The state of everything.
    ///
    /// # Errors
    /// When the directory does not answer.
    pub async fn status(&mut self) -> anyhow::Result<v1::StatusReply> {
        answer(self.client.status(v1::StatusRequest {})).await
    }

    /// Makes a volume.
    ///
    /// # Errors
    /// When the directory refuses, or does not answer.
    pub async fn create_volume(
        &mut self,
        request: v1::CreateVolumeRequest,
    ) -> anyhow::Result<v1::VolumeInfo> {
        answer(self.client.create_volume(request)).await
    }

    /// Changes a volume's settings.
    ///
    /// # Errors
    /// When the directory refuses, or does not answer.
    pub async fn set_volume(
        &mut self,
        request: v1::SetVolumeRequest,
    ) -> anyhow::Result<v1::VolumeInfo> {
        answer(self.client.set_volume(request)).await
    }

    /// Gives a client access to a volume, or takes it.
    ///
    /// # Errors
    /// When the directory refuses, or does not answer.
    pub async fn set_access(
        &mut self,
        request: v1::SetAccessRequest,
    ) -> anyhow::Result<v1::VolumeInfo> {
        answer(self.client.set_access(request)).await
    }

    /// A volume's key ring.
    ///
    /// # Errors
    /// When the directory refuses, or does not answer.
    pub async fn volume_keys(&mut self, volume: &str) -> anyhow::Result<v1::VolumeKeysReply> {
        let request = v1::VolumeKeysRequest { volume: volume.to_owned() };
        answer(self.client.volume_keys(request)).await
    }

    /// Replaces a volume's key ring.
    ///
    /// # Errors
    /// When the directory refuses: another may have changed it. When it does not answer.
    pub async fn set_volume_keys(
        &mut self,
        request: v1::SetVolumeKeysRequest,
    ) -> anyhow::Result<v1::VolumeKeysReply> {
        answer(self.client.set_volume_keys(request)).await
    }

    /// What lies in a volume's trash; `hear` takes it piece by piece.
    ///
    /// # Errors
    /// When the directory refuses, or does not answer.
    pub async fn trash(
        &mut self,
        volume: &str,
        mut hear: impl FnMut(v1::TrashReply),
    ) -> anyhow::Result<()> {
        let request = v1::TrashRequest { volume: volume.to_owned() };
        let mut stream = answer(self.client.trash(request)).await?;
        while let Some(reply) = within(stream.message()).await? {
            hear(reply);
        }
        Ok(())
    }

    /// Removes things from a volume's trash for ever; what that was.
    ///
    /// # Errors
    /// When the directory refuses, or does not answer.
    pub async fn purge_trash(
        &mut self,
        request: v1::PurgeTrashRequest,
    ) -> anyhow::Result<v1::PurgeTrashReply> {
        answer(self.client.purge_trash(request)).await
    }

    /// The volumes.
    ///
    /// # Errors
    /// When the directory does not answer.
    pub async fn list_volumes(&mut self) -> anyhow::Result<Vec<v1::VolumeInfo>> {
        Ok(answer(self.client.list_volumes(v1::ListVolumesRequest {})).await?.volumes)
    }

    /// The blocks of a file, in no order.
    ///
    /// # Errors
    /// When the directory refuses, or does not answer.
    pub async fn where_is(
        &mut self,
        volume: &str,
        ino: u64,
    ) -> anyhow::Result<Vec<v1::WhereBlock>> {
        let request = v1::WhereRequest { volume: volume.to_owned(), ino };
        let mut stream = answer(self.client.r#where(request)).await?;
        let mut blocks = Vec::new();
        while let Some(block) = within(stream.message()).await? {
            blocks.push(block);
        }
        Ok(blocks)
    }

    /// Looks at every block again.
    ///
    /// # Errors
    /// When the directory refuses, or does not answer.
    pub async fn repair(&mut self) -> anyhow::Result<v1::RepairStatus> {
        answer(self.client.repair(v1::RepairRequest {})).await
    }

    /// Has one provider, or with 0 all, read all they hold; how many were told.
    ///
    /// # Errors
    /// When the directory refuses, or does not answer.
    pub async fn scrub(&mut self, provider: u32) -> anyhow::Result<u32> {
        Ok(answer(self.client.scrub(v1::ScrubRequest { provider })).await?.providers)
    }

    /// Empties a provider, or ends that; how many fragments are there.
    ///
    /// # Errors
    /// When the directory refuses, or does not answer.
    pub async fn drain(&mut self, provider: u32, undo: bool) -> anyhow::Result<u64> {
        Ok(answer(self.client.drain(v1::DrainRequest { provider, undo })).await?.fragments)
    }

    /// Gives a provider up; how many fragments are to be made again.
    ///
    /// # Errors
    /// When the directory refuses, or does not answer.
    pub async fn give_up(&mut self, provider: u32) -> anyhow::Result<u64> {
        Ok(answer(self.client.give_up(v1::GiveUpRequest { provider })).await?.fragments)
    }

    /// Forgets a provider's marks; how many fragments it is asked after.
    ///
    /// # Errors
    /// When the directory refuses, or does not answer.
    pub async fn trust(&mut self, provider: u32) -> anyhow::Result<u64> {
        Ok(answer(self.client.trust(v1::TrustRequest { provider })).await?.fragments)
    }

    /// Checks everything.
    ///
    /// # Errors
    /// When the directory refuses, or does not answer.
    pub async fn fsck(&mut self, request: v1::FsckRequest) -> anyhow::Result<FsckStream> {
        Ok(FsckStream(answer(self.client.fsck(request)).await?))
    }

    /// How blocks would be without some providers.
    ///
    /// # Errors
    /// When the directory refuses, or does not answer.
    pub async fn what_if(
        &mut self,
        without: Vec<u32>,
        files_max: u32,
    ) -> anyhow::Result<v1::WhatIfReply> {
        answer(self.client.what_if(v1::WhatIfRequest { without, files_max })).await
    }

    /// A page of the log.
    ///
    /// # Errors
    /// When the directory refuses, or does not answer.
    pub async fn events(&mut self, after: u64, last: u64) -> anyhow::Result<Vec<v1::ClusterEvent>> {
        Ok(answer(self.client.events(v1::EventsRequest { after, last })).await?.events)
    }

    /// One block.
    ///
    /// # Errors
    /// When there is none, or the directory does not answer.
    pub async fn block(&mut self, block: BlockId) -> anyhow::Result<v1::WhereBlock> {
        let request = v1::BlockRequest { block: block.as_bytes().to_vec().into() };
        answer(self.client.block(request)).await
    }
}

/// What a check says as it goes on.
#[derive(Debug)]
pub struct FsckStream(tonic::Streaming<v1::FsckReply>);

impl FsckStream {
    /// The next word; `None` at the end.
    ///
    /// # Errors
    /// When the directory fails, or falls silent.
    pub async fn next(&mut self) -> anyhow::Result<Option<v1::fsck_reply::Event>> {
        match tokio::time::timeout(FSCK_SILENCE, self.0.message()).await {
            Err(_elapsed) => bail!("the directory fell silent in the middle of the check"),
            Ok(Err(status)) => bail!("the directory says: {}", status.message()),
            Ok(Ok(reply)) => Ok(reply.and_then(|reply| reply.event)),
        }
    }
}

pub(super) async fn answer<T>(
    call: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>,
) -> anyhow::Result<T> {
    within(call).await.map(tonic::Response::into_inner)
}

async fn within<T>(call: impl Future<Output = Result<T, tonic::Status>>) -> anyhow::Result<T> {
    match tokio::time::timeout(ANSWER, call).await {
        Err(_elapsed) => Err(anyhow!("the directory gave no answer in {} s", ANSWER.as_secs())),
        Ok(Err(status)) => Err(anyhow!("the directory says: {}", status.message())),
        Ok(Ok(value)) => Ok(value),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn up() -> UpRecord {
        UpRecord {
            pid: 1,
            data: "/d".into(),
            directory: "127.0.0.1:5".into(),
            admin_identity: "/d/admin".into(),
            client_identity: "/d/client".into(),
            mount_point: "/mnt/usfs".into(),
        }
    }

    #[test]
    fn what_is_given_wins_over_what_runs_here() {
        let none = Target::default();
        assert!(resolve(&none, None, None).unwrap_err().to_string().contains("usfs up"));
        let (directory, identity) = resolve(&none, None, Some(up())).unwrap();
        assert_eq!((directory.as_str(), identity), ("127.0.0.1:5", "/d/admin".into()));
        let joined = || Some(("us.example:7".to_owned(), PathBuf::from("/j/admin")));
        let (directory, identity) = resolve(&none, joined(), Some(up())).unwrap();
        assert_eq!((directory.as_str(), identity), ("us.example:7", "/j/admin".into()));
        let this = Target { directory: Some("127.0.0.1:5".into()), identity: None };
        let (_, identity) = resolve(&this, joined(), Some(up())).unwrap();
        assert_eq!(
            identity,
            PathBuf::from("/d/admin"),
            "that directory is the one of this machine"
        );
        let other = Target { directory: Some("h:1".into()), identity: None };
        let error = resolve(&other, None, Some(up())).unwrap_err().to_string();
        assert!(error.contains("--identity"), "another cluster's key opens nothing: {error}");
        let both = Target { directory: Some("h:1".into()), identity: Some("/i".into()) };
        assert_eq!(resolve(&both, None, Some(up())).unwrap(), ("h:1".into(), "/i".into()));
    }
}
