//! The daemon's configuration: defaults < TOML file < `US_PROVIDER_*` environment < flags.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use us_core::daemon::http::MetricsAddress;
use us_core::daemon::size::Size;

use crate::guest::GuestConfig;
use crate::store::StoreOptions;

/// The prefix of the environment's settings.
pub const ENVIRONMENT_PREFIX: &str = "US_PROVIDER_";

/// Segments of a store that may become large.
const SEGMENT_BYTES_MAX: u64 = 256 << 20;
/// Segments of a store that stays small, so that space is given back in small pieces.
const SEGMENT_BYTES_MIN: u64 = 16 << 20;
/// A store has about as many segments when it is full, at least.
const SEGMENTS_MIN: u64 = 64;

/// What `us-provider run` works with.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ProviderConfig {
    /// The folder of the store and everything that belongs to it.
    pub data: PathBuf,
    /// The directory's address, host:port.
    pub directory: Option<String>,
    /// The folder of the certificate; `identity` in the data folder where it is not given.
    pub identity: Option<PathBuf>,
    /// The address to listen on; port 0 takes any.
    pub listen: SocketAddr,
    /// What clients dial, where it is not the address listened on.
    pub advertise: Option<String>,
    /// Bytes fragments may take in all.
    pub capacity: Option<Size>,
    /// Bytes that stay free on the disk, whatever the capacity.
    pub reserve: Size,
    /// The site, a label path such as campus/building.
    pub site: String,
    /// Where /metrics and /healthz are served; none: not served.
    pub metrics: Option<MetricsAddress>,
    /// Memory of the index.
    pub index_cache: Size,
    /// How many hours a deleted fragment can be restored.
    pub trash_keep_hours: u32,
    /// The most bytes that copies of the directory's journal may take, beside the capacity.
    pub directory_copies: Size,
    /// What the machine's line can send, in KiB a second; 0: not said.
    pub uplink_kib_per_s: u64,
    /// What it can receive.
    pub downlink_kib_per_s: u64,
    /// How the daemon gives way to the machine's owner.
    pub guest: GuestConfig,
}

impl Default for ProviderConfig {
    fn default() -> Self {
        Self {
            data: default_data(),
            directory: None,
            identity: None,
            listen: SocketAddr::from(([0, 0, 0, 0], 7602)),
            advertise: None,
            capacity: None,
            reserve: Size(5 << 30),
            site: String::new(),
            metrics: None,
            index_cache: Size(32 << 20),
            trash_keep_hours: 7 * 24,
            directory_copies: Size(1 << 30),
            uplink_kib_per_s: 0,
            downlink_kib_per_s: 0,
            guest: GuestConfig::default(),
        }
    }
}

impl ProviderConfig {
    /// Where the certificate lies.
    pub fn identity_dir(&self) -> PathBuf {
        self.identity.clone().unwrap_or_else(|| self.data.join("identity"))
    }

    /// How the store is to work.
    pub fn store_options(&self) -> StoreOptions {
        let segment_bytes = self.capacity.map_or(SEGMENT_BYTES_MAX, |capacity| {
            (capacity.bytes() / SEGMENTS_MIN).clamp(SEGMENT_BYTES_MIN, SEGMENT_BYTES_MAX)
        });
        StoreOptions {
            capacity_bytes: self.capacity.map(Size::bytes),
            reserve_bytes: self.reserve.bytes(),
            segment_bytes,
            trash_keep_s: u64::from(self.trash_keep_hours) * 3600,
            index_cache_bytes: self.index_cache.bytes(),
            ..StoreOptions::default()
        }
    }
}

/// `/var/lib/us/provider` for root, else `us/provider` in the user's data folder.
pub fn default_data() -> PathBuf {
    if rustix::process::geteuid().is_root() {
        return PathBuf::from("/var/lib/us/provider");
    }
    let folder = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    let data = folder("XDG_DATA_HOME").map(PathBuf::from);
    let home = || folder("HOME").map(|home| Path::new(&home).join(".local/share"));
    data.or_else(home).unwrap_or_default().join("us/provider")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configuration_is_text_and_back() {
        let config = ProviderConfig { capacity: Some(Size(1 << 40)), ..ProviderConfig::default() };
        let text = toml::to_string(&config).unwrap();
        assert_eq!(toml::from_str::<ProviderConfig>(&text).unwrap(), config);
        assert!(toml::from_str::<ProviderConfig>("capacty = '1G'").is_err());
        assert_eq!(config.store_options().segment_bytes, SEGMENT_BYTES_MAX);
        let small = ProviderConfig { capacity: Some(Size(1 << 20)), ..config };
        assert_eq!(small.store_options().segment_bytes, SEGMENT_BYTES_MIN);
    }
}
