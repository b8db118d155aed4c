//! Words about volumes.

use us_proto::v1;

pub(super) fn created(info: &v1::VolumeInfo) -> String {
    let (s, r) = (info.s, info.r);
    let survives = match r {
        0 => "no provider may be lost".to_owned(),
        1 => "any one provider may be lost".to_owned(),
        r => format!("any {r} providers may be lost"),
    };
    format!("Volume {} is made: {s}+{r}, {survives}.\n", info.name)
}
