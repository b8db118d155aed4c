//! What `--json` prints. Field names are those of proto/us/v1/admin.proto; states and health are
//! words; ids are hexadecimal.

use std::collections::{BTreeMap, HashMap};

use serde_json::{Map, Value, json};
use us_proto::v1;

use super::act::repair_json;

/// Process ids of local providers, by name.
pub(super) type Pids = BTreeMap<String, i32>;

pub(super) fn health_word(health: v1::Health) -> &'static str {
    match health {
        v1::Health::Unspecified => "unknown",
        v1::Health::Ok => "ok",
        v1::Health::Degraded => "degraded",
        v1::Health::Unreadable => "unreadable",
        v1::Health::Lost => "lost",
    }
}

pub(super) fn state_word(state: v1::ProviderState) -> &'static str {
    match state {
        v1::ProviderState::Unspecified => "unknown",
        v1::ProviderState::Online => "online",
        v1::ProviderState::Absent => "absent",
        v1::ProviderState::Dormant => "dormant",
        v1::ProviderState::Dead => "dead",
    }
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

pub(super) fn status(reply: &v1::StatusReply) -> Value {
    let blocks = reply.blocks.clone().unwrap_or_default();
    let journal = reply.journal.clone().unwrap_or_default();
    json!({
        "health": health_word(reply.health()),
        "summary": reply.summary,
        "counting": reply.counting,
        "cluster": reply.cluster,
        "uptime_s": reply.uptime_s,
        "capacity_bytes": reply.capacity_bytes,
        "used_bytes": reply.used_bytes,
        "placement": placement(&reply.placement.clone().unwrap_or_default()),
        "blocks": {
            "total": blocks.total,
            "inline": blocks.inline,
            "by_redundancy": counts(&blocks.by_redundancy),
            "readable": blocks.readable,
            "waiting": blocks.waiting,
            "lost": blocks.lost,
            "unsettled": blocks.unsettled,
            "crowded": blocks.crowded,
            "damaged_fragments": blocks.damaged_fragments,
            "live_bytes": blocks.live_bytes,
            "stored_bytes": blocks.stored_bytes,
            "by_durability": counts(&blocks.by_durability),
        },
        "repair": repair_json(&reply.repair.unwrap_or_default()),
        "braked": reply.braked,
        "providers": providers(&reply.providers, &Pids::new()),
        "volumes": reply.volumes.iter().map(volume).collect::<Vec<_>>(),
        "sessions": reply.sessions.iter().map(session).collect::<Vec<_>>(),
        "pending_deletes": reply.pending_deletes,
        "journal": {
            "sequence": journal.sequence,
            "copies": journal.copies,
            "holders": journal.holders,
            "image_sequence": journal.image_sequence,
            "bytes": journal.bytes,
        },
    })
}

fn placement(placement: &v1::PlacementStatus) -> Value {
    json!({
        "degraded": placement.degraded,
        "detail": placement.detail,
        "degraded_blocks": placement.degraded_blocks,
        "fragments": placement.fragments,
        "metapeers": placement.metapeers,
        "smallest": placement.smallest,
        "largest": placement.largest,
    })
}

fn counts(counts: &HashMap<i32, u64>) -> Map<String, Value> {
    counts.iter().map(|(left, count)| (left.to_string(), json!(count))).collect()
}

pub(super) fn providers(providers: &[v1::ProviderStatus], pids: &Pids) -> Value {
    let one = |provider: &v1::ProviderStatus| {
        let mut value = json!({
            "provider": provider.provider,
            "name": provider.name,
            "address": provider.address,
            "site": provider.site,
            "metapeer": provider.metapeer,
            "state": state_word(provider.state()),
            "capacity_bytes": provider.capacity_bytes,
            "used_bytes": provider.used_bytes,
            "free_bytes": provider.free_bytes,
            "fragments": provider.fragments,
            "damaged": provider.damaged,
            "last_seen_s": provider.last_seen_s,
            "accepts_puts": provider.accepts_puts,
            "note": provider.note,
            "draining": provider.draining,
            "back_in_s": provider.back_in_s,
            "repair_sent_fragments": provider.repair_sent_fragments,
            "repair_sent_bytes": provider.repair_sent_bytes,
            "repair_worst_fragments": provider.repair_worst_fragments,
            "repair_worst_bytes": provider.repair_worst_bytes,
            "reclaimable_bytes": provider.reclaimable_bytes,
            "found_wrong": provider.found_wrong,
            "distrusted": provider.distrusted,
        });
        if let Some(pid) = pids.get(&provider.name) {
            value["pid"] = json!(pid);
        }
        value
    };
    providers.iter().map(one).collect()
}

pub(super) fn volume(volume: &v1::VolumeInfo) -> Value {
    json!({
        "volume": hex(&volume.volume),
        "name": volume.name,
        "code": format!("{}+{}", volume.s, volume.r),
        "inodes": volume.inodes,
        "live_bytes": volume.live_bytes,
        "blocks": volume.blocks,
        "private": volume.private,
        "quota_bytes": volume.quota_bytes,
        "repair_at": volume.repair_at,
        "trash_hours": volume.trash_hours,
        "trash_files": volume.trash_files,
        "trash_bytes": volume.trash_bytes,
        "closed": volume.closed,
        "access": volume.access.iter().map(|client| json!({
            "client": hex(&client.key_hash),
            "read_only": client.read_only,
        })).collect::<Vec<_>>(),
    })
}

fn session(session: &v1::SessionStatus) -> Value {
    json!({
        "session": session.session,
        "host": session.host,
        "volume": session.volume,
        "connected": session.connected,
        "leases": session.leases,
        "undurable_batches": session.undurable_batches,
    })
}

pub(super) fn block(block: &v1::WhereBlock) -> Value {
    let fragment = |fragment: &v1::WhereFragment| {
        json!({
            "index": fragment.index,
            "provider": fragment.provider,
            "state": state_word(fragment.state()),
            "durable": fragment.durable,
            "damaged": fragment.damaged,
        })
    };
    let range = |range: &v1::FileRange| {
        json!({
            "offset": range.offset,
            "length": range.length,
            "block_offset": range.block_offset,
        })
    };
    json!({
        "block": hex(&block.block),
        "volume": hex(&block.volume),
        "code": format!("{}+{}", block.s, block.r),
        "plaintext_bytes": block.plaintext_bytes,
        "live_bytes": block.live_bytes,
        "inline": block.inline,
        "fragments": block.fragments.iter().map(fragment).collect::<Vec<_>>(),
        "ranges": block.ranges.iter().map(range).collect::<Vec<_>>(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_scripts_read_is_there() {
        let reply = v1::StatusReply {
            health: v1::Health::Degraded.into(),
            blocks: Some(v1::BlockSummary {
                total: 3,
                by_redundancy: [(2, 2), (-1, 1)].into(),
                ..Default::default()
            }),
            providers: vec![v1::ProviderStatus {
                name: "provider0".into(),
                state: v1::ProviderState::Online.into(),
                ..Default::default()
            }],
            ..Default::default()
        };
        let value = status(&reply);
        assert_eq!(value["health"], "degraded");
        assert_eq!(value["blocks"]["total"], 3);
        assert_eq!(value["blocks"]["by_redundancy"]["2"], 2);
        assert_eq!(value["blocks"]["by_redundancy"]["-1"], 1);
        assert_eq!(value["providers"][0]["state"], "online");
        assert_eq!(value["counting"], false);
        let pids = Pids::from([("provider0".to_owned(), 77)]);
        assert_eq!(providers(&reply.providers, &pids)[0]["pid"], 77);
    }
}
