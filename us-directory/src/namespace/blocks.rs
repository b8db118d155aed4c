//! Blocks: their commit, what providers confirm of them, and their death.

use us_core::geometry::BlockGeometry;
use us_core::ids::BlockId;
use us_proto::v1::{BlockCommit, FragmentsDurable};

use super::{ApplyError, Authority, INLINE_BYTES_MAX, Rule, Tx, at_most};
use crate::keys;
use crate::records::{BlockRecord, GraveRecord, HoldingRecord, bit, with_bit};
use crate::store::StoreError;

/// Whether s durable fragments remain, whichever `margin` providers vanish.
pub fn margin_holds(providers: &[u32], durable: &[u8], s: usize, margin: usize) -> bool {
    let mut held = std::collections::BTreeMap::<u32, usize>::new();
    for (index, provider) in providers.iter().enumerate() {
        *held.entry(*provider).or_default() += usize::from(bit(durable, index));
    }
    let mut held: Vec<usize> = held.into_values().collect();
    held.sort_unstable_by(|left, right| right.cmp(left));
    held.iter().skip(margin).sum::<usize>() >= s
}

/// The bitmap of the fragments that `provider` holds.
fn held_by(providers: &[u32], provider: u32) -> bytes::Bytes {
    let held = providers.iter().enumerate().filter(|(_, holder)| **holder == provider);
    held.fold(bytes::Bytes::new(), |bitmap, (index, _)| with_bit(&bitmap, index, true))
}

impl Tx<'_> {
    pub(super) fn commit_block(
        &mut self,
        who: &dyn Authority,
        commit: &BlockCommit,
    ) -> Result<(), ApplyError> {
        let block = BlockId::from_slice(&commit.block).ok_or(Rule::Malformed { field: "block" })?;
        if self.block(&block)?.is_some() || self.unreferenced.contains(&block) {
            return Err(Rule::BlockExists { block }.into());
        }
        at_most("fingerprint_hash", commit.fingerprint_hash.len(), 32)?;
        at_most("inline", commit.inline.len(), INLINE_BYTES_MAX)?;
        if commit.inline.is_empty() {
            self.check_coded(who, &block, commit)?;
        } else {
            let sizes = commit.plaintext_bytes as usize;
            if sizes == 0 || sizes > commit.inline.len() || !commit.providers.is_empty() {
                return Err(Rule::Geometry { block }.into());
            }
            self.count("inline_blocks", 1);
            self.count("inline_bytes", commit.inline.len() as i64);
        }
        let record = BlockRecord {
            s: commit.s,
            r: commit.r,
            page_bytes: commit.page_bytes,
            plaintext_bytes: commit.plaintext_bytes,
            birth: commit.birth,
            providers: commit.providers.clone(),
            durable: commit.durable.clone(),
            fingerprint_kind: commit.fingerprint_kind,
            fingerprint_hash: commit.fingerprint_hash.clone(),
            inline: commit.inline.clone(),
            ..Default::default()
        };
        let mut providers = commit.providers.clone();
        providers.sort_unstable();
        providers.dedup();
        for provider in providers {
            let record = HoldingRecord {
                fragments: held_by(&commit.providers, provider),
                ..Default::default()
            };
            self.put(keys::holding(&self.volume, provider, &block), &record);
        }
        self.set_block(&block, Some(record))?;
        self.unreferenced.insert(block);
        self.count("blocks", 1);
        self.count("stored_bytes", i64::from(commit.plaintext_bytes));
        Ok(())
    }

    fn check_coded(
        &self,
        who: &dyn Authority,
        block: &BlockId,
        commit: &BlockCommit,
    ) -> Result<(), Rule> {
        let block = *block;
        let code = self.code;
        let geometry = BlockGeometry::with_page(
            code,
            commit.plaintext_bytes as usize,
            commit.page_bytes as usize,
        );
        let same_code = (commit.s as usize, commit.r as usize) == (code.s(), code.r());
        let fragments = code.fragments();
        let bitmap_fits = commit.durable.len() <= fragments.div_ceil(8)
            && (fragments..commit.durable.len() * 8).all(|index| !bit(&commit.durable, index));
        if !same_code || geometry.is_err() || commit.providers.len() != fragments || !bitmap_fits {
            return Err(Rule::Geometry { block });
        }
        if !who.birth_given(commit.birth) {
            return Err(Rule::Birth { block, birth: commit.birth });
        }
        if let Some(provider) = commit.providers.iter().find(|id| !who.provider_exists(**id)) {
            return Err(Rule::NoProvider { block, provider: *provider });
        }
        if !margin_holds(&commit.providers, &commit.durable, code.s(), code.write_margin()) {
            return Err(Rule::WriteMargin { block });
        }
        Ok(())
    }

    /// Late fragments have been confirmed. A block that is gone meanwhile is no error.
    pub(super) fn fragments_durable(
        &mut self,
        confirmed: &FragmentsDurable,
    ) -> Result<(), ApplyError> {
        let block =
            BlockId::from_slice(&confirmed.block).ok_or(Rule::Malformed { field: "block" })?;
        let Some(record) = self.block_mut(&block)? else {
            return Ok(());
        };
        for index in 0..record.providers.len() {
            if bit(&confirmed.durable, index) {
                record.durable = with_bit(&record.durable, index, true);
                record.missing = with_bit_cleared(&record.missing, index);
            }
        }
        Ok(())
    }

    /// Fragment `index` is durable at provider `to` now, if it was still expected at `from` until now;
    /// what lies at `from` gets a grave. A block that is gone meanwhile leaves a grave at `to`.
    /// Returns whether the place changed or was confirmed.
    pub fn relocate(
        &mut self,
        block: &BlockId,
        index: usize,
        from: u32,
        to: u32,
    ) -> Result<bool, StoreError> {
        let Some(record) = self.block_mut(block)? else {
            self.bury_fragment(block, index, to)?;
            return Ok(false);
        };
        if record.providers.get(index) != Some(&from) {
            if record.providers.get(index) != Some(&to) {
                self.bury_fragment(block, index, to)?;
            }
            return Ok(false);
        }
        record.providers[index] = to;
        record.durable = with_bit(&record.durable, index, true);
        record.damaged = with_bit_cleared(&record.damaged, index);
        record.missing = with_bit_cleared(&record.missing, index);
        let providers = record.providers.clone();
        if from != to {
            for provider in [from, to] {
                let key = keys::holding(&self.volume, provider, block);
                match held_by(&providers, provider) {
                    none if none.is_empty() => self.delete(key),
                    fragments => self.put(key, &HoldingRecord { fragments, ..Default::default() }),
                }
            }
            self.bury_fragment(block, index, from)?;
        }
        Ok(true)
    }

    /// A fragment may lie at `provider`, where an order to make it was given up: it goes unless the
    /// record names it there.
    pub fn bury_stray(
        &mut self,
        block: &BlockId,
        index: usize,
        provider: u32,
    ) -> Result<(), StoreError> {
        let named = self.block(block)?.and_then(|record| record.providers.get(index).copied());
        if named == Some(provider) { Ok(()) } else { self.bury_fragment(block, index, provider) }
    }

    /// Writes anew which fragments of a block its providers, and `provider`, hold by its record, and
    /// ends it where nothing refers to it. Returns whether anything was wrong.
    ///
    /// # Errors
    /// [`ApplyError`] when the store fails.
    pub fn mend_block(&mut self, block: &BlockId, provider: u32) -> Result<bool, ApplyError> {
        let record = self.block(block)?.cloned();
        let mut providers = record.as_ref().map_or_else(Vec::new, |known| known.providers.clone());
        let named = providers.clone();
        providers.push(provider);
        providers.sort_unstable();
        providers.dedup();
        let mut mended = false;
        for provider in providers.into_iter().filter(|provider| *provider != 0) {
            let key = keys::holding(&self.volume, provider, block);
            let right = held_by(&named, provider);
            let listed: Option<HoldingRecord> = self.read(&key)?;
            if listed.map(|held| held.fragments).unwrap_or_default() == right {
                continue;
            }
            mended = true;
            match right.is_empty() {
                true => self.delete(key),
                false => {
                    let right = HoldingRecord { fragments: right, ..Default::default() };
                    self.put(key, &right);
                }
            }
        }
        if record.is_some_and(|record| record.references == 0) {
            self.unreferenced.insert(*block);
            self.bury()?;
            mended = true;
        }
        Ok(mended)
    }

    /// One fragment lies where no record names it: it goes when it is due.
    fn bury_fragment(
        &mut self,
        block: &BlockId,
        index: usize,
        provider: u32,
    ) -> Result<(), StoreError> {
        // A grave names one provider for an index; a second one has its grave a millisecond later.
        let mut due_ms = self.due_ms();
        let (key, known) = loop {
            let key = keys::grave(due_ms, block);
            let known: Option<GraveRecord> = self.read(&key)?;
            let there = known.as_ref().and_then(|grave| grave.providers.get(index));
            if there.is_none_or(|there| *there == 0 || *there == provider) {
                break (key, known);
            }
            due_ms += 1;
        };
        let is_new = known.is_none();
        let volume = bytes::Bytes::copy_from_slice(self.volume.as_bytes());
        let mut grave = known.unwrap_or(GraveRecord { providers: Vec::new(), volume });
        if grave.providers.len() <= index {
            grave.providers.resize(index + 1, 0);
        }
        grave.providers[index] = provider;
        self.put(key, &grave);
        self.graves += u64::from(is_new);
        Ok(())
    }

    /// Ends blocks that nothing refers to any more: the record goes, and a grave says which
    /// fragments are to be deleted when readers can no longer have the old map.
    pub(super) fn bury(&mut self) -> Result<(), ApplyError> {
        for block in std::mem::take(&mut self.unreferenced) {
            let Some(record) = self.block(&block)?.filter(|record| record.references == 0) else {
                continue;
            };
            let (providers, inline) = (record.providers.clone(), record.inline.len());
            let plaintext_bytes = record.plaintext_bytes;
            self.set_block(&block, None)?;
            self.count("blocks", -1);
            self.count("stored_bytes", -i64::from(plaintext_bytes));
            if inline > 0 {
                self.count("inline_blocks", -1);
                self.count("inline_bytes", -(inline as i64));
                continue;
            }
            for provider in &providers {
                self.delete(keys::holding(&self.volume, *provider, &block));
            }
            // Fragments that moved may have their grave in the same millisecond.
            let mut due_ms = self.due_ms();
            while self.read::<GraveRecord>(&keys::grave(due_ms, &block))?.is_some() {
                due_ms += 1;
            }
            let key = keys::grave(due_ms, &block);
            self.put(key, &GraveRecord { providers, ..Default::default() });
            self.graves += 1;
        }
        Ok(())
    }
}

/// The bitmap with a bit cleared, without growing it; empty where no bit is left.
pub fn with_bit_cleared(bitmap: &bytes::Bytes, index: usize) -> bytes::Bytes {
    if !bit(bitmap, index) {
        return bitmap.clone();
    }
    let cleared = with_bit(bitmap, index, false);
    if cleared.iter().all(|byte| *byte == 0) { bytes::Bytes::new() } else { cleared }
}
