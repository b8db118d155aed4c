//! A whole record: header, body, trailer.

use bytes::{Bytes, BytesMut};

use super::{
    FingerprintKind, FingerprintList, FragmentError, FragmentHeader, FragmentSums, FragmentTrailer,
    HEADER_BYTES,
};
use crate::geometry::BlockGeometry;
use crate::ids::{Birth, BlockId, FragmentId, VolumeId};

/// One fragment as it is stored and sent.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FragmentRecord {
    /// Which fragment this is.
    pub header: FragmentHeader,
    /// Its slots. Shared, never copied.
    pub body: Bytes,
    /// Its sums and the fingerprints of its block.
    pub trailer: FragmentTrailer,
}

/// The bytes of a record in three pieces, ready for a vectored write.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RecordParts {
    /// The encoded header.
    pub header: [u8; HEADER_BYTES],
    /// The body.
    pub body: Bytes,
    /// The encoded trailer.
    pub trailer: Bytes,
}

impl RecordParts {
    /// Bytes of the three together.
    pub fn record_bytes(&self) -> usize {
        self.header.len() + self.body.len() + self.trailer.len()
    }

    /// The three in the order in which they are written.
    pub fn slices(&self) -> [&[u8]; 3] {
        [&self.header, &self.body, &self.trailer]
    }
}

impl FragmentRecord {
    /// The record of a body that was computed from other fragments: the one the writer made, or
    /// none. `fingerprints` is a list whose hash the caller has compared with the block's.
    ///
    /// # Errors
    /// [`FragmentError::Length`] and [`FragmentError::Fingerprint`] for a body that is not the
    /// writer's.
    pub fn rebuilt(
        header: FragmentHeader,
        body: Bytes,
        fingerprints: FingerprintList,
    ) -> Result<Self, FragmentError> {
        if body.len() != header.fragment_bytes() {
            let (expected, found) = (header.fragment_bytes(), body.len());
            return Err(FragmentError::Length { part: "body", expected, found });
        }
        let sums = FragmentSums::of(&header.geometry(), &body);
        fingerprints.check_summed(header.id().index, &body, &sums)?;
        let trailer = FragmentTrailer { slot_sums: sums.slots, fingerprints };
        Ok(Self { header, body, trailer })
    }

    /// The record's bytes in one run, as a put carries them.
    ///
    /// # Panics
    /// As [`FragmentRecord::to_parts`].
    pub fn to_bytes(&self) -> Bytes {
        let parts = self.to_parts();
        let mut bytes = BytesMut::with_capacity(parts.record_bytes());
        parts.slices().into_iter().for_each(|slice| bytes.extend_from_slice(slice));
        bytes.freeze()
    }

    /// The record's bytes; the body is shared.
    ///
    /// # Panics
    /// When header, body and trailer do not belong together.
    pub fn to_parts(&self) -> RecordParts {
        assert_eq!(self.body.len(), self.header.fragment_bytes(), "the header's body");
        RecordParts {
            header: self.header.encode(),
            body: self.body.clone(),
            trailer: self.trailer.encode(&self.header).into(),
        }
    }

    /// Reads a record without copying its body. Header and trailer are checked; the body is not:
    /// call [`FragmentRecord::verify_body`].
    ///
    /// # Errors
    /// [`FragmentError`] unless `bytes` are exactly one record.
    pub fn decode(bytes: Bytes) -> Result<Self, FragmentError> {
        let header = FragmentHeader::decode(&bytes)?;
        if bytes.len() != header.record_bytes() {
            let (expected, found) = (header.record_bytes(), bytes.len());
            return Err(FragmentError::Length { part: "record", expected, found });
        }
        let body_end = HEADER_BYTES + header.fragment_bytes();
        let trailer = FragmentTrailer::decode(&header, &bytes[body_end..])?;
        Ok(Self { header, body: bytes.slice(HEADER_BYTES..body_end), trailer })
    }

    /// Checks every byte of the body ([`FragmentTrailer::verify_body`]).
    ///
    /// # Errors
    /// [`FragmentError`] naming the first damage found.
    pub fn verify_body(&self) -> Result<(), FragmentError> {
        self.trailer.verify_body(&self.header, &self.body)
    }

    /// Checks slots read from this record ([`FragmentTrailer::verify_slots`]).
    ///
    /// # Errors
    /// [`FragmentError`] naming the first damage found.
    pub fn verify_slots(&self, first_slot: usize, bytes: &[u8]) -> Result<(), FragmentError> {
        self.trailer.verify_slots(&self.header, first_slot, bytes)
    }
}

/// The records of one block, from the bodies of all its f fragments in order. Their fingerprint
/// list, of this kind, is the same in each: its hash goes into the block's commit.
///
/// # Panics
/// When there are not f bodies of `geometry.fragment_bytes()` each.
pub fn records_of_block(
    kind: FingerprintKind,
    volume: VolumeId,
    block: BlockId,
    birth: Birth,
    geometry: BlockGeometry,
    bodies: Vec<Bytes>,
) -> Vec<FragmentRecord> {
    assert_eq!(bodies.len(), geometry.code().fragments(), "a body for each fragment");
    let sums: Vec<_> = bodies.iter().map(|body| FragmentSums::of(&geometry, body)).collect();
    let summed = bodies.iter().map(AsRef::as_ref).zip(&sums);
    let fingerprints = FingerprintList::of_bodies(kind, summed);
    let fragments = bodies.into_iter().zip(sums).zip(0u8..);
    fragments
        .map(|((body, sums), index)| FragmentRecord {
            header: FragmentHeader::new(volume, FragmentId { block, index }, birth, geometry, kind)
                .expect("the code has a fragment for each body"),
            body,
            trailer: FragmentTrailer { slot_sums: sums.slots, fingerprints: fingerprints.clone() },
        })
        .collect()
}
