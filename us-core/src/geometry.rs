//! How a block's bytes are laid out: the code (s, r), its pages, its fragments.
//!
//! ```text
//! plaintext  | page 0 | page 1 | ...            | last page (may be short) |
//! sealed     | page 0 + tag | page 1 + tag | ...| last page + tag |
//! fragment 0 | slots 0 .. k-1 |   k = ceil(pages / s) slots of page_bytes + 16
//! fragment 1 | slots k .. 2k-1 |
//! ...        missing bytes are zeros: implied, never read from the wire
//! fragment s .. s+r-1: parity
//! ```
//! A page lies whole in one data fragment, so a small read touches one provider.

use std::fmt;
use std::ops::Range;
use std::str::FromStr;

/// Bytes the seal adds to a page (the AES-GCM tag).
pub const TAG_BYTES: usize = 16;
/// The sizes a page can have, largest first.
pub const PAGE_SIZES: [usize; 3] = [16 << 10, 8 << 10, 4 << 10];
/// The largest sealed block: the pages and their tags.
pub const SEALED_BYTES_MAX: usize = 4 << 20;
/// The most fragments a code can have.
pub const FRAGMENTS_MAX: usize = 255;

/// The code of a volume: s data fragments and r parity fragments a block.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Code {
    s: u8,
    r: u8,
}

/// What makes a code or a geometry impossible.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum GeometryError {
    /// Outside 1 ≤ s, s + r ≤ 255.
    #[error(
        "a code needs at least one data fragment and at most 255 fragments in all, not {s}+{r}"
    )]
    Code {
        /// Data fragments asked for.
        s: usize,
        /// Parity fragments asked for.
        r: usize,
    },
    /// A text that is not "S+R".
    #[error("not a code: write it as S+R, for example 4+2")]
    CodeText,
    /// A block of no bytes, or of more than fit.
    #[error("a block of {bytes} bytes: it must hold 1 to {bytes_max}")]
    BlockBytes {
        /// Plaintext bytes asked for.
        bytes: usize,
        /// The most this code can hold.
        bytes_max: usize,
    },
    /// A page size outside [`PAGE_SIZES`].
    #[error("a page of {page_bytes} bytes: only 4096, 8192 and 16384 exist")]
    PageBytes {
        /// The size found.
        page_bytes: usize,
    },
}

impl Code {
    /// A code of `s` data and `r` parity fragments.
    ///
    /// # Errors
    /// [`GeometryError::Code`] unless 1 ≤ s and s + r ≤ 255.
    pub fn new(s: usize, r: usize) -> Result<Self, GeometryError> {
        if s == 0 || s.saturating_add(r) > FRAGMENTS_MAX {
            return Err(GeometryError::Code { s, r });
        }
        Ok(Self { s: s as u8, r: r as u8 })
    }

    /// Data fragments a block: any this many rebuild it.
    pub const fn s(self) -> usize {
        self.s as usize
    }

    /// Parity fragments a block.
    pub const fn r(self) -> usize {
        self.r as usize
    }

    /// All fragments a block, f = s + r.
    pub const fn fragments(self) -> usize {
        self.s as usize + self.r as usize
    }

    /// The write margin w: a block is acknowledged when any w providers may vanish and s durable
    /// fragments remain. Half of r, rounded up; 0 only where there is no parity.
    pub const fn write_margin(self) -> usize {
        (self.r as usize).div_ceil(2)
    }

    /// The most plaintext bytes a block of this code can hold: full 16 KiB pages, the same number in
    /// each data fragment, sealed at most [`SEALED_BYTES_MAX`] (or one page each when s is so large
    /// that they exceed it).
    pub const fn block_bytes_max(self) -> usize {
        let pages = SEALED_BYTES_MAX / (PAGE_SIZES[0] + TAG_BYTES);
        let pages = pages / self.s() * self.s();
        let pages = if pages == 0 { self.s() } else { pages };
        pages * PAGE_SIZES[0]
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}+{}", self.s, self.r)
    }
}

impl FromStr for Code {
    type Err = GeometryError;

    fn from_str(text: &str) -> Result<Self, GeometryError> {
        let (s, r) = text.split_once('+').ok_or(GeometryError::CodeText)?;
        let number = |digits: &str| digits.trim().parse().map_err(|_| GeometryError::CodeText);
        Self::new(number(s)?, number(r)?)
    }
}

/// The shape of one block: everything about its layout that its bytes do not say.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct BlockGeometry {
    code: Code,
    page_bytes: u32,
    plaintext_bytes: u32,
}

impl BlockGeometry {
    /// The geometry of a block of `plaintext_bytes`: the largest page that still fills s fragments.
    ///
    /// # Errors
    /// [`GeometryError::BlockBytes`] for no bytes or more than [`Code::block_bytes_max`].
    pub fn new(code: Code, plaintext_bytes: usize) -> Result<Self, GeometryError> {
        let page_bytes = PAGE_SIZES
            .into_iter()
            .find(|page_bytes| plaintext_bytes.div_ceil(*page_bytes) >= code.s())
            .unwrap_or(PAGE_SIZES[2]);
        Self::with_page(code, plaintext_bytes, page_bytes)
    }

    /// The geometry read back from a stored header.
    ///
    /// # Errors
    /// [`GeometryError`] for sizes that no writer makes.
    pub fn with_page(
        code: Code,
        plaintext_bytes: usize,
        page_bytes: usize,
    ) -> Result<Self, GeometryError> {
        let bytes_max = code.block_bytes_max();
        if plaintext_bytes == 0 || plaintext_bytes > bytes_max {
            return Err(GeometryError::BlockBytes { bytes: plaintext_bytes, bytes_max });
        }
        if !PAGE_SIZES.contains(&page_bytes) {
            return Err(GeometryError::PageBytes { page_bytes });
        }
        Ok(Self { code, page_bytes: page_bytes as u32, plaintext_bytes: plaintext_bytes as u32 })
    }

    /// The code.
    pub const fn code(&self) -> Code {
        self.code
    }

    /// Plaintext bytes a full page holds.
    pub const fn page_bytes(&self) -> usize {
        self.page_bytes as usize
    }

    /// Bytes of a page's slot: the page and its tag.
    pub const fn slot_bytes(&self) -> usize {
        self.page_bytes as usize + TAG_BYTES
    }

    /// Plaintext bytes of the block.
    pub const fn plaintext_bytes(&self) -> usize {
        self.plaintext_bytes as usize
    }

    /// Pages that hold plaintext.
    pub const fn pages(&self) -> usize {
        (self.plaintext_bytes as usize).div_ceil(self.page_bytes as usize)
    }

    /// Slots a fragment has: ceil(pages / s).
    pub const fn fragment_slots(&self) -> usize {
        self.pages().div_ceil(self.code.s())
    }

    /// Bytes of every fragment of the block.
    pub const fn fragment_bytes(&self) -> usize {
        self.fragment_slots() * self.slot_bytes()
    }

    /// Plaintext bytes of page `page`; only the last can be short.
    ///
    /// # Panics
    /// When there is no such page.
    pub fn page_plaintext_bytes(&self, page: usize) -> usize {
        assert!(page < self.pages(), "page {page} of {}", self.pages());
        (self.plaintext_bytes() - page * self.page_bytes()).min(self.page_bytes())
    }

    /// Where page `page` lies: the data fragment, and the slot in it.
    ///
    /// # Panics
    /// When there is no such page.
    pub fn locate_page(&self, page: usize) -> (usize, usize) {
        assert!(page < self.pages(), "page {page} of {}", self.pages());
        (page / self.fragment_slots(), page % self.fragment_slots())
    }

    /// The pages that hold the plaintext bytes `range` (which must lie in the block).
    ///
    /// # Panics
    /// When the range is empty or leaves the block.
    pub fn pages_of(&self, range: Range<usize>) -> Range<usize> {
        assert!(range.start < range.end && range.end <= self.plaintext_bytes(), "{range:?}");
        range.start / self.page_bytes()..range.end.div_ceil(self.page_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn code_text() {
        assert_eq!("4+2".parse(), Ok(Code::new(4, 2).unwrap()));
        assert_eq!("4".parse::<Code>(), Err(GeometryError::CodeText));
        assert_eq!("0+2".parse::<Code>(), Err(GeometryError::Code { s: 0, r: 2 }));
        assert_eq!("200+56".parse::<Code>(), Err(GeometryError::Code { s: 200, r: 56 }));
        assert_eq!(Code::new(10, 4).unwrap().to_string(), "10+4");
    }

    #[test]
    fn small_blocks_take_small_pages() {
        let code = Code::new(4, 2).unwrap();
        let page = |bytes| BlockGeometry::new(code, bytes).unwrap().page_bytes();
        assert_eq!(page(1), 4096);
        assert_eq!(page(16 << 10), 4096);
        assert_eq!(page(32 << 10), 8192);
        assert_eq!(page(64 << 10), 16384);
        assert_eq!(code.block_bytes_max(), 252 * 16384);
        assert!(BlockGeometry::new(code, code.block_bytes_max() + 1).is_err());
    }

    proptest! {
        #[test]
        fn every_page_has_a_slot_of_its_own(
            s in 1usize..40, r in 0usize..5, fill in 0.0f64..1.0,
        ) {
            let code = Code::new(s, r).unwrap();
            let bytes = 1 + ((code.block_bytes_max() - 1) as f64 * fill) as usize;
            let geometry = BlockGeometry::new(code, bytes).unwrap();
            let mut seen = std::collections::HashSet::new();
            let mut total = 0;
            for page in 0..geometry.pages() {
                let (fragment, slot) = geometry.locate_page(page);
                prop_assert!(fragment < s && slot < geometry.fragment_slots());
                prop_assert!(seen.insert((fragment, slot)));
                total += geometry.page_plaintext_bytes(page);
            }
            prop_assert_eq!(total, bytes);
            prop_assert!(geometry.fragment_bytes() * s <= SEALED_BYTES_MAX.max(s * geometry.slot_bytes()));
        }
    }
}
