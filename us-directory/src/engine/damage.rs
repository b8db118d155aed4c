//! What is said of damage: by the provider that has it, and by readers of another's.
//!
//! Said is believed so far as the fragment counts as lost. Whose fault it is, the directory finds
//! out for itself ([`super::audit`]).

use us_core::ids::{BlockId, VolumeId};
use us_proto::v1::{DamageReport, FragmentStatus};

use super::Engine;
use super::audit::Reporter;
use super::events::EventKind;
use super::members::{FRAGMENTS_A_MESSAGE, text};
use crate::keys;
use crate::store::StoreError;

impl Engine {
    /// Tells the log of damage that was not known before.
    pub(super) fn tell_damage(
        &mut self,
        provider: u32,
        newly_bad: usize,
        detail: &str,
    ) -> Result<(), StoreError> {
        if newly_bad == 0 {
            return Ok(());
        }
        let detail = format!("{newly_bad} fragments: {}", text(detail.to_owned()));
        self.note_event(EventKind::Damage, provider, detail)
    }

    /// A provider says that fragments it holds are damaged.
    pub(super) fn provider_damage(
        &mut self,
        provider: u32,
        damage: &DamageReport,
    ) -> Result<(), StoreError> {
        let volumes: Vec<VolumeId> = self.volumes.keys().copied().collect();
        let mut found = Vec::new();
        for fragment in damage.fragments.iter().take(FRAGMENTS_A_MESSAGE) {
            let (Some(block), Ok(index)) =
                (BlockId::from_slice(&fragment.block), u8::try_from(fragment.index))
            else {
                continue;
            };
            for volume in &volumes {
                if self.store.get(&keys::block(volume, &block))?.is_some() {
                    found.push(((*volume, block, index), FragmentStatus::Damaged as i32));
                }
            }
        }
        let newly_bad = self.note_fragments(provider, &found)?;
        self.tell_damage(provider, newly_bad, &damage.detail)
    }

    /// A reader could not use a fragment. Wrong bytes are believed (the reader has the keys) and
    /// looked at, for whose fault it is; a missing one is asked of its provider first.
    pub(super) fn client_damage(
        &mut self,
        session: u64,
        damage: &us_proto::v1::Damage,
    ) -> Result<(), StoreError> {
        let Some(volume) = self.sessions.get(&session).map(|known| known.volume) else {
            return Ok(());
        };
        let fragment = damage.fragment.clone().unwrap_or_default();
        let (Some(block), Ok(index)) =
            (BlockId::from_slice(&fragment.block), u8::try_from(fragment.index))
        else {
            return self.refuse(session, "damage of what is no fragment".to_owned());
        };
        let piece = (volume, block, index);
        let provider = damage.provider;
        tracing::warn!(session, provider, %block, index, detail = %damage.detail, "read damage");
        match FragmentStatus::try_from(damage.status) {
            Ok(FragmentStatus::Damaged) => {
                let newly_bad = self.note_fragments(provider, &[(piece, damage.status)])?;
                self.audit_soon(provider, piece, Reporter::Session(session));
                self.tell_damage(provider, newly_bad, &damage.detail)
            }
            Ok(FragmentStatus::NotFound) => {
                self.query(provider, vec![piece], None);
                Ok(())
            }
            _ => Ok(()),
        }
    }
}
