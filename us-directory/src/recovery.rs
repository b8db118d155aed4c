//! What brings a directory back that has lost its disk: the recovery key, and what is sealed with it.
//!
//! ```text
//! recovery key --HKDF--> records of one run   on the providers that hold copies of the journal
//!              --HKDF--> root                 on every provider: where the image lies
//!              --HKDF--> volume key           of the image's blocks
//!              --HKDF--> backup               files made by `us-directory backup`
//! ```
//! Providers and whoever finds a backup learn nothing but sizes and numbers. Whoever has the key can
//! read all managed volumes and own the cluster. docs/formats.md draws the bytes.
//!
//! Pure, but for reading and writing the key's file.

mod kit;
mod manifest;
mod sealed;

pub use kit::{KitError, RecoveryKit};
pub use manifest::{ImageBlock, ImageRun, Manifest, ManifestProvider, RootRecord};
pub use sealed::{PART_BYTES_MAX, RunLabel, RunSeal, open_root, seal_root};

use us_core::ids::{ClusterId, VolumeId};
use us_core::seal::{Secret, VolumeKey};

/// The name of the volume whose blocks are the directory's image. No user's volume begins with '.'.
pub const IMAGE_VOLUME_NAME: &str = ".directory";

/// The id of the image's volume: the cluster's, with its bits turned over.
pub fn image_volume(cluster: &[u8; 16]) -> VolumeId {
    VolumeId::from_bytes(cluster.map(|byte| !byte))
}

/// The key of the image's volume.
pub fn image_key(secret: &Secret, cluster: &ClusterId) -> VolumeKey {
    secret.volume_key(&[b"us directory image 1", cluster.as_bytes()])
}
