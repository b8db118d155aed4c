//! The end of a record: the sums of the body's slots and the fingerprints of the block.

use super::sums::body_sum;
use super::{FingerprintList, FragmentError, FragmentHeader, crc32c};

/// What follows a fragment's body. Only meaningful with the header of the same record.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FragmentTrailer {
    /// CRC-32C of each slot, in order.
    pub slot_sums: Vec<u32>,
    /// The fingerprints of all fragments of the block.
    pub fingerprints: FingerprintList,
}

impl FragmentTrailer {
    /// The trailer's bytes.
    ///
    /// # Panics
    /// When the trailer belongs to a block of another geometry than `header` says.
    pub fn encode(&self, header: &FragmentHeader) -> Vec<u8> {
        assert_eq!(self.slot_sums.len(), header.slots(), "one sum a slot");
        assert_eq!(self.fingerprints.kind(), header.fingerprint_kind());
        let mut bytes = Vec::with_capacity(header.trailer_bytes());
        for sum in &self.slot_sums {
            bytes.extend_from_slice(&sum.to_le_bytes());
        }
        bytes.extend_from_slice(self.fingerprints.as_bytes());
        let sum = crc32c(&bytes);
        bytes.extend_from_slice(&sum.to_le_bytes());
        assert_eq!(bytes.len(), header.trailer_bytes(), "one fingerprint a fragment");
        bytes
    }

    /// Reads the trailer of the record that begins with `header`.
    ///
    /// # Errors
    /// [`FragmentError::Length`] unless there are exactly `header.trailer_bytes()`,
    /// [`FragmentError::TrailerSum`] when they are damaged.
    pub fn decode(header: &FragmentHeader, bytes: &[u8]) -> Result<Self, FragmentError> {
        let expected = header.trailer_bytes();
        let (content, sum) = match bytes.split_last_chunk() {
            Some((content, sum)) if bytes.len() == expected => (content, u32::from_le_bytes(*sum)),
            _ => {
                let found = bytes.len();
                return Err(FragmentError::Length { part: "trailer", expected, found });
            }
        };
        let computed = crc32c(content);
        if sum != computed {
            return Err(FragmentError::TrailerSum { id: header.id(), found: sum, computed });
        }
        let (sums, fingerprints) = content.split_at(4 * header.slots());
        let (sums, _) = sums.as_chunks();
        Ok(Self {
            slot_sums: sums.iter().copied().map(u32::from_le_bytes).collect(),
            fingerprints: FingerprintList::decode(
                header.fingerprint_kind(),
                header.geometry().code(),
                fingerprints,
            )?,
        })
    }

    /// As [`FragmentTrailer::decode`], for whoever believes only the list with this hash.
    ///
    /// # Errors
    /// As there, and [`FragmentError::OtherList`].
    pub fn decode_listed(
        header: &FragmentHeader,
        list_hash: &[u8; 32],
        bytes: &[u8],
    ) -> Result<Self, FragmentError> {
        let trailer = Self::decode(header, bytes)?;
        let is_the_blocks = trailer.fingerprints.hash() == *list_hash;
        is_the_blocks.then_some(trailer).ok_or(FragmentError::OtherList { id: header.id() })
    }

    /// Checks whole slots, `first_slot` the first of them.
    ///
    /// # Errors
    /// [`FragmentError::SlotSum`] for the first damaged slot, [`FragmentError::Length`] when the
    /// bytes are not whole slots, [`FragmentError::NoSuchSlot`] when they pass the fragment's end.
    pub fn verify_slots(
        &self,
        header: &FragmentHeader,
        first_slot: usize,
        bytes: &[u8],
    ) -> Result<(), FragmentError> {
        let slot_bytes = header.geometry().slot_bytes();
        let slots = bytes.len() / slot_bytes;
        if slots * slot_bytes != bytes.len() {
            let (expected, found) = (slots * slot_bytes, bytes.len());
            return Err(FragmentError::Length { part: "slots", expected, found });
        }
        let end_slot = first_slot.saturating_add(slots);
        let Some(sums) = self.slot_sums.get(first_slot..end_slot) else {
            let slots = self.slot_sums.len();
            return Err(FragmentError::NoSuchSlot { id: header.id(), first_slot, end_slot, slots });
        };
        for (slot, (found, content)) in
            (first_slot..).zip(sums.iter().zip(bytes.chunks_exact(slot_bytes)))
        {
            let computed = crc32c(content);
            if *found != computed {
                let id = header.id();
                return Err(FragmentError::SlotSum { id, slot, found: *found, computed });
            }
        }
        Ok(())
    }

    /// Checks a whole body: every slot against its sum, and where the fragment's own fingerprint is
    /// a CRC-32C, the slots' sums against that. Reads each byte once. This finds accidents; whoever
    /// believes nobody compares the fingerprints too ([`FingerprintList::check`]).
    ///
    /// # Errors
    /// As [`FragmentTrailer::verify_slots`], and [`FragmentError::Fingerprint`] when the slots hold
    /// together but are not those of this fragment.
    pub fn verify_body(&self, header: &FragmentHeader, body: &[u8]) -> Result<(), FragmentError> {
        if body.len() != header.fragment_bytes() {
            let (expected, found) = (header.fragment_bytes(), body.len());
            return Err(FragmentError::Length { part: "body", expected, found });
        }
        self.verify_slots(header, 0, body)?;
        let body_crc = body_sum(header.geometry().slot_bytes(), &self.slot_sums);
        self.fingerprints.check_crc(header.id().index, body_crc)
    }
}
