//! The wire messages and services of Us, generated from `proto/us/v1/*.proto`. Every field is
//! documented there.

/// Version 1 of the protocol.
#[expect(missing_docs, reason = "generated; the .proto files document every field")]
#[expect(clippy::allow_attributes_without_reason, reason = "generated code carries bare allows")]
pub mod v1 {
    tonic::include_proto!("us.v1");
}
