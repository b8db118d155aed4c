//! Tables for people.

use comfy_table::{CellAlignment, Table, presets};
use us_core::daemon::size::{Size, human_duration};
use us_proto::v1;

use super::act::{full_name, provider_note};
use super::json::{Pids, state_word};

fn table<const N: usize>(header: [&str; N], right: &[usize]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_header(header);
    for column in right {
        if let Some(column) = table.column_mut(*column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}

fn text(table: &Table) -> String {
    if table.row_count() == 0 {
        return String::from("none\n");
    }
    table.lines().map(|line| format!("{}\n", line.trim_end())).collect()
}

pub(super) fn providers(providers: &[v1::ProviderStatus], pids: &Pids) -> String {
    let header =
        ["PROVIDER", "STATE", "USED", "CAPACITY", "FREE", "FRAGMENTS", "SEEN", "WHERE", "NOTE"];
    let mut table = table(header, &[2, 3, 4, 5]);
    let mut ordered: Vec<_> = providers.iter().collect();
    // provider10 after provider9.
    ordered.sort_by_key(|provider| (provider.name.len(), provider.name.clone()));
    for provider in ordered {
        let seen = match provider.state() {
            v1::ProviderState::Online => "now".to_owned(),
            _ => {
                let ago = std::time::Duration::from_secs(provider.last_seen_s);
                format!("{} ago", human_duration(ago))
            }
        };
        let mut place = provider.address.clone();
        if !provider.site.is_empty() {
            place.push_str(&format!(" ({})", provider.site));
        }
        if let Some(pid) = pids.get(&provider.name) {
            place.push_str(&format!(" pid {pid}"));
        }
        table.add_row([
            full_name(provider),
            state_word(provider.state()).to_owned(),
            Size(provider.used_bytes).to_string(),
            Size(provider.capacity_bytes).to_string(),
            Size(provider.free_bytes).to_string(),
            provider.fragments.to_string(),
            seen,
            place,
            provider_note(provider),
        ]);
    }
    text(&table)
}

pub(super) fn provider_name(provider: &v1::ProviderStatus) -> String {
    if provider.name.is_empty() { format!("#{}", provider.provider) } else { provider.name.clone() }
}

pub(super) fn volumes(volumes: &[v1::VolumeInfo]) -> String {
    let header = ["VOLUME", "CODE", "FILES", "DATA", "TRASH", "BLOCKS", "QUOTA", "ACCESS"];
    let mut table = table(header, &[2, 3, 4, 5, 6]);
    for volume in volumes {
        let quota = match volume.quota_bytes {
            0 => "none".to_owned(),
            bytes => Size(bytes).to_string(),
        };
        table.add_row([
            volume.name.clone(),
            format!("{}+{}", volume.s, volume.r),
            volume.inodes.to_string(),
            Size(volume.live_bytes.saturating_sub(volume.trash_bytes)).to_string(),
            Size(volume.trash_bytes).to_string(),
            volume.blocks.to_string(),
            quota,
            super::access::word(volume),
        ]);
    }
    text(&table)
}

/// What lies in the trash: number, volume, size, when and by whom it was removed, time left, path.
pub(super) fn trash(lines: Vec<[String; 7]>) -> String {
    let header = ["ID", "VOLUME", "SIZE", "REMOVED", "BY", "LEFT", "PATH"];
    let mut table = table(header, &[0, 2]);
    for line in lines {
        table.add_row(line);
    }
    text(&table)
}

pub(super) fn sessions(sessions: &[v1::SessionStatus]) -> String {
    let mut table = table(["MOUNT", "VOLUME", "STATE", "LEASES"], &[3]);
    for session in sessions {
        table.add_row([
            session.host.clone(),
            session.volume.clone(),
            if session.connected { "connected" } else { "silent" }.to_owned(),
            session.leases.to_string(),
        ]);
    }
    text(&table)
}
