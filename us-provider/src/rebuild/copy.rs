//! Copies: a wanted fragment that somebody still holds is taken as it is, one fragment moved instead
//! of s; what cannot be had so is made of others.

use std::sync::Arc;

use us_core::disk::FetchedSlots;
use us_core::fragment::{FragmentRecord, FragmentTrailer};
use us_proto::v1::SourceFault;

use super::order::Source;
use super::work::{Fault, Shown, Work, examine, off_runtime};

impl Work {
    /// The missing fragments that their holders gave whole and right. They are missing no more.
    pub(super) async fn copies(&mut self) -> Vec<FragmentRecord> {
        let order = Arc::clone(&self.order);
        let mut records = Vec::new();
        for holder in &order.holders {
            if !self.missing.contains(&holder.index) {
                continue;
            }
            match self.copy(holder).await {
                Ok(record) => {
                    self.missing.retain(|index| *index != holder.index);
                    self.list.get_or_insert_with(|| record.trailer.fingerprints.clone());
                    records.push(record);
                }
                Err(fault) => {
                    tracing::debug!(block = %order.block, index = holder.index, ?fault, "no copy");
                    self.holder_faults.push(SourceFault {
                        index: holder.index.into(),
                        provider: holder.provider.0,
                        status: fault.status.into(),
                        detail: fault.detail,
                    });
                }
            }
        }
        records
    }

    async fn copy(&mut self, holder: &Source) -> Result<FragmentRecord, Fault> {
        let slots = 0..self.order.geometry.fragment_slots();
        let at = self.reserve_from(holder, &slots);
        let fetched = self.fetch_from(holder, slots.clone(), at).await?;
        if holder.place.is_some() {
            self.received_bytes += fetched.data.len() as u64;
            self.note_sent(holder.provider, fetched.data.len(), at.elapsed());
        }
        let (order, index) = (Arc::clone(&self.order), holder.index);
        let checked = off_runtime(move || {
            let FetchedSlots { header, trailer, data } = fetched;
            match examine(&order, index, &slots, &header, &trailer, &data) {
                Ok(Shown::List(_)) => {
                    let header = order.header(index);
                    let trailer = FragmentTrailer::decode(&header, &trailer);
                    let trailer = trailer.map_err(|error| error.to_string())?;
                    let record = FragmentRecord { header, body: data, trailer };
                    record.verify_body().map_err(|error| error.to_string())?;
                    Ok(record)
                }
                Ok(Shown::Doubtful(detail)) | Err(detail) => Err(detail),
            }
        });
        match checked.await {
            Some(checked) => checked.map_err(Fault::damaged),
            None => Err(Fault::new(us_proto::v1::FragmentStatus::Unspecified, "stopped")),
        }
    }
}
