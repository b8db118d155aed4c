//! Volumes: making them, and words about them.

pub(super) mod keys;

use anyhow::bail;
use us_core::daemon::size::Size;
use us_proto::v1;

use super::JsonArgs;
use super::connect::{Target, connect};

/// Refuses a laziness that the code does not have.
pub(super) fn check_repair_at(repair_at: Option<u32>, r: u32) -> anyhow::Result<()> {
    match repair_at {
        Some(at) if at >= r.max(1) => {
            bail!("--repair-at {at}: with {r} parity fragments it can be 0 to {}", r.max(1) - 1)
        }
        _ => Ok(()),
    }
}

pub(super) fn changed(info: &v1::VolumeInfo) -> String {
    let quota = match info.quota_bytes {
        0 => "no quota".to_owned(),
        bytes => format!("a quota of {}", Size(bytes)),
    };
    let trash = match info.trash_hours {
        0 => "what is removed is gone".to_owned(),
        hours => format!("what is removed can be had back for {hours} h"),
    };
    let (name, at) = (&info.name, info.repair_at);
    format!(
        "Volume {name}: blocks are repaired when no more than {at} can be lost; {quota}; {trash}.\n"
    )
}

/// Makes a volume, private if `private` says so, and tells of it.
pub(super) async fn create(
    target: &Target,
    mut request: v1::CreateVolumeRequest,
    private: &keys::PrivateArgs,
    json: JsonArgs,
) -> anyhow::Result<()> {
    let name = request.name.clone();
    let mut made = private.make(&name)?;
    if let Some(made) = &made {
        request.private_volume = made.volume.as_bytes().to_vec().into();
        request.key_ring = made.ring.encode().into();
    }
    let info = connect(target).await?.create_volume(request).await?;
    let mut value = super::json::volume(&info);
    let recovery = made.as_mut().and_then(|made| {
        made.keep_files();
        made.recovery.take()
    });
    if made.is_some_and(|made| info.volume != made.volume.as_bytes()[..] || !info.private) {
        bail!("the directory made another volume than was asked for: do not use {name}");
    }
    if let Some(key) = &recovery {
        value["recovery_key"] = key.as_str().into();
    }
    super::print(json, &value, || {
        let recovery = recovery.as_ref().map(|key| keys::recovery_text(key));
        created(&info) + &recovery.unwrap_or_default()
    })
}

pub(super) fn created(info: &v1::VolumeInfo) -> String {
    let (s, r) = (info.s, info.r);
    let survives = match r {
        0 => "no provider may be lost".to_owned(),
        1 => "any one provider may be lost".to_owned(),
        r => format!("any {r} providers may be lost"),
    };
    let private = if info.private { "private, " } else { "" };
    format!("Volume {} is made: {private}{s}+{r}, {survives}.\n", info.name)
}
