//! How well blocks are spread over providers and sites, said aloud: in status, in the log, as a figure.

use us_core::ids::ProviderId;
use us_core::placement::Degraded;
use us_proto::v1::PlacementStatus;

use super::Engine;
use super::events::EventKind;
use crate::store::StoreError;

/// How long places must have been good for the log to say so.
const GOOD_MS: u64 = 60_000;

/// What is known of the places chosen lately.
#[derive(Debug, Default)]
pub(super) struct Spread {
    /// The last one that was worse than it should be, and when it was chosen.
    last: Option<(Degraded, u64)>,
    /// When the last good one was chosen.
    good_ms: u64,
    /// Places chosen that were worse than they should be.
    pub blocks: u64,
    /// The log says that places are worse than they should be.
    pub told: bool,
}

impl Engine {
    /// A place was chosen.
    pub(super) fn note_spread(&mut self, degraded: Option<Degraded>) {
        let now_ms = self.now_ms();
        match degraded {
            Some(degraded) => {
                self.spread.blocks += 1;
                self.spread.last = Some((degraded, now_ms));
            }
            None => self.spread.good_ms = now_ms,
        }
    }

    /// Tells the log when places become worse than they should be, and when they are good again.
    pub(super) fn tell_spread(&mut self) -> Result<(), StoreError> {
        let Some((degraded, at_ms)) = self.spread.last else { return Ok(()) };
        let is_good = self.spread.good_ms > at_ms + GOOD_MS;
        if self.spread.told && is_good {
            self.spread.told = false;
            self.spread.last = None;
            let detail = "blocks are spread as they should be again".to_owned();
            return self.note_event(EventKind::Placement, 0, detail);
        }
        if !self.spread.told && !is_good {
            self.spread.told = true;
            let detail = format!("blocks are spread badly: {degraded}");
            return self.note_event(EventKind::Placement, 0, detail);
        }
        Ok(())
    }

    /// The fragments of a block of the volume with the most blocks: its metapeers are shown.
    pub(super) fn width_shown(&self) -> usize {
        let known = self.volumes.values().map(|volume| volume.code.fragments());
        let formed = known.filter(|width| self.placer.landscape().metapeers(*width).is_some());
        formed.max().unwrap_or(0)
    }

    /// The number of the metapeer a provider is in, from 1; 0: in none.
    pub(super) fn metapeer_of(&self, provider: u32, width: usize) -> u32 {
        let landscape = self.placer.landscape();
        let node = landscape.field().node(ProviderId(provider));
        let seat = node.and_then(|node| landscape.metapeers(width)?.address(node));
        seat.map_or(0, |seat| seat.metapeer as u32 + 1)
    }

    pub(super) fn placement_status(&self) -> PlacementStatus {
        let width = self.width_shown();
        let formed = self.placer.landscape().metapeers(width);
        let sizes = || formed.into_iter().flat_map(|all| all.iter()).map(|one| one.occupied());
        let last = self.spread.last.filter(|_| self.spread.told);
        PlacementStatus {
            degraded: last.is_some(),
            detail: last.map(|(degraded, _)| degraded.to_string()).unwrap_or_default(),
            degraded_blocks: self.spread.blocks,
            fragments: width as u32,
            metapeers: formed.map_or(0, |all| all.len() as u32),
            smallest: sizes().min().unwrap_or(0) as u32,
            largest: sizes().max().unwrap_or(0) as u32,
        }
    }
}
