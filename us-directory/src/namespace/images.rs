//! The blocks of the directory's own image: each is referred to by the run it belongs to, so that it
//! lives, is counted and dies as any other block.

use us_core::ids::BlockId;
use us_proto::v1::BlockCommit;

use super::{ApplyError, Authority, Rule, Tx};
use crate::recovery::ImageRun;

impl Tx<'_> {
    /// Adds the blocks of a run.
    ///
    /// # Errors
    /// [`ApplyError`] when a block breaks a rule or the store fails.
    pub fn commit_image_run(
        &mut self,
        who: &dyn Authority,
        run: u64,
        blocks: &[BlockCommit],
    ) -> Result<(), ApplyError> {
        for commit in blocks {
            self.commit_block(who, commit)?;
            let block =
                BlockId::from_slice(&commit.block).ok_or(Rule::Malformed { field: "block" })?;
            self.refer(&block, run, 0, i64::from(commit.plaintext_bytes))?;
        }
        self.bury()
    }

    /// Lets go of the blocks of a run; those it was the last to refer to are dead. A block that is
    /// gone already is no error.
    ///
    /// # Errors
    /// [`ApplyError`] when the store fails.
    pub fn drop_image_run(&mut self, run: &ImageRun) -> Result<(), ApplyError> {
        for block in &run.blocks {
            let id = BlockId::from_slice(&block.block).ok_or(Rule::Malformed { field: "block" })?;
            if self.block(&id)?.is_some() {
                self.refer(&id, run.number, 0, -i64::from(block.plaintext_bytes))?;
            }
        }
        self.bury()
    }
}
