//! One match from the store's errors to the wire's statuses, and the small conversions.

use us_core::disk::FragmentFailure;
use us_core::ids::FragmentId;
use us_proto::v1::{self, FragmentStatus};

use crate::store::{InventoryEntry, StoreError};

/// What an error is called on the wire.
pub fn status_of(error: &StoreError) -> FragmentStatus {
    match error {
        StoreError::NotFound { .. } => FragmentStatus::NotFound,
        StoreError::Damaged { .. } => FragmentStatus::Damaged,
        StoreError::Refused { .. } => FragmentStatus::Refused,
        StoreError::NoSpace { .. } => FragmentStatus::NoSpace,
        StoreError::Io { .. } | StoreError::Segment(_) | StoreError::Index(_) => FragmentStatus::Io,
        StoreError::Invalid(_) | StoreError::Combine(_) | StoreError::Request { .. } => {
            FragmentStatus::Invalid
        }
        StoreError::Closed | StoreError::Busy => FragmentStatus::Busy,
    }
}

/// What another provider's failure is called on the wire; UNSPECIFIED where it did not answer.
pub const fn failure_status(failure: &FragmentFailure) -> FragmentStatus {
    match failure {
        FragmentFailure::NotFound => FragmentStatus::NotFound,
        FragmentFailure::Damaged { .. }
        | FragmentFailure::Lying { .. }
        | FragmentFailure::Inconsistent { .. }
        | FragmentFailure::Length { .. } => FragmentStatus::Damaged,
        FragmentFailure::Refused { .. } => FragmentStatus::Refused,
        FragmentFailure::NoGrant { .. } => FragmentStatus::NoGrant,
        FragmentFailure::NoSpace => FragmentStatus::NoSpace,
        FragmentFailure::Io { .. } => FragmentStatus::Io,
        FragmentFailure::Invalid { .. } => FragmentStatus::Invalid,
        FragmentFailure::Busy => FragmentStatus::Busy,
        FragmentFailure::Unreachable { .. }
        | FragmentFailure::UnknownProvider
        | FragmentFailure::Timeout { .. } => FragmentStatus::Unspecified,
    }
}

/// The value of the metrics' label `status`.
pub fn label(status: FragmentStatus) -> &'static str {
    match status {
        FragmentStatus::Unspecified => "unspecified",
        FragmentStatus::Ok => "ok",
        FragmentStatus::NotFound => "not_found",
        FragmentStatus::Damaged => "damaged",
        FragmentStatus::Refused => "refused",
        FragmentStatus::NoSpace => "no_space",
        FragmentStatus::Io => "io",
        FragmentStatus::Invalid => "invalid",
        FragmentStatus::Busy => "busy",
        FragmentStatus::NoGrant => "no_grant",
    }
}

/// An id as it is sent.
pub fn wire_id(id: FragmentId) -> v1::FragmentId {
    v1::FragmentId { block: id.block.as_bytes().to_vec().into(), index: id.index.into() }
}

/// A line of the inventory as it is sent.
pub fn inventory_item(line: &InventoryEntry) -> v1::InventoryItem {
    v1::InventoryItem {
        fragment: Some(wire_id(line.id)),
        volume: line.entry.volume.as_bytes().to_vec().into(),
        birth: line.entry.birth.0,
        fragment_bytes: line.entry.fragment_bytes,
        trashed: line.entry.trashed_at_s != 0,
    }
}
