//! Words about volumes.

use anyhow::bail;
use us_core::daemon::size::Size;
use us_proto::v1;

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

pub(super) fn created(info: &v1::VolumeInfo) -> String {
    let (s, r) = (info.s, info.r);
    let survives = match r {
        0 => "no provider may be lost".to_owned(),
        1 => "any one provider may be lost".to_owned(),
        r => format!("any {r} providers may be lost"),
    };
    format!("Volume {} is made: {s}+{r}, {survives}.\n", info.name)
}
