//! The erasure code: systematic Reed-Solomon over GF(2^8), polynomial 0x11D.
//!
//! A block is s data fragments and r parity fragments of one length. Fragment i is a fixed linear
//! combination of the data fragments, byte by byte: row i of the generator matrix, which is the one
//! of the crate `reed-solomon-erasure` and never changes (stored fragments depend on it).
//!
//! ```text
//!             | 1 . . . |   data 0        indices 0 .. s-1: the data itself
//! generator = | . 1 . . | x data 1
//! s + r rows  | . . 1 . |   data 2
//! s columns   | . . . 1 |   data 3
//!             | g g g g |                 indices s .. s+r-1: parity
//! ```
//!
//! Invariants:
//! - every kernel gives the bytes the crate gives;
//! - any s distinct fragments determine all others; fewer give an error, never bytes;
//! - the code works byte by byte, so every operation also works on equal ranges of the fragments.
//!
//! The block pipeline encodes and reconstructs; repair asks for coefficients and lets the helpers
//! [`combine`] what they hold into partial sums. Nothing here does I/O, and errors come only from
//! arguments that do not fit together.

mod field;
mod generator;
mod kernel;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use crate::geometry::{Code, FRAGMENTS_MAX};
pub use kernel::Kernel;
use kernel::{Matrix, Output};

/// What makes arguments of the code unusable. None is worth a retry with the same arguments.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CodeError {
    /// Fewer fragments than any reconstruction needs.
    #[error("only {have} fragments of the block are present: rebuilding it needs any {need}")]
    TooFewFragments {
        /// Fragments given.
        have: usize,
        /// Fragments needed: s.
        need: usize,
    },
    /// Not one slice per data fragment.
    #[error("{found} data fragments given: the code has {expected}")]
    DataCount {
        /// Slices given.
        found: usize,
        /// Slices needed: s.
        expected: usize,
    },
    /// Not one slice per parity fragment.
    #[error("{found} parity fragments given: the code has {expected}")]
    ParityCount {
        /// Slices given.
        found: usize,
        /// Slices needed: r.
        expected: usize,
    },
    /// Not one coefficient per fragment.
    #[error("{coefficients} coefficients given for {fragments} fragments")]
    CoefficientCount {
        /// Coefficients given.
        coefficients: usize,
        /// Fragments given.
        fragments: usize,
    },
    /// A fragment whose length differs from that of the first one.
    #[error("fragment {index} has {bytes} bytes where the others have {expected}")]
    Length {
        /// The fragment's index in the block, or its place in the list where it has no index.
        index: usize,
        /// Its bytes.
        bytes: usize,
        /// The bytes of the first fragment given.
        expected: usize,
    },
    /// An index the code does not have.
    #[error("there is no fragment {index}: the code has {fragments}, counted from 0")]
    NoSuchFragment {
        /// The index given.
        index: usize,
        /// Fragments of the code: s + r.
        fragments: usize,
    },
    /// One index given twice.
    #[error("fragment {index} is given twice")]
    Duplicate {
        /// The index.
        index: usize,
    },
}

/// One code, ready for use: its generator matrix, laid out for this machine's fastest kernel.
///
/// Cheap to clone (one reference count), and made in microseconds.
#[derive(Clone, Debug)]
pub struct ErasureCode {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    code: Code,
    kernel: Kernel,
    /// The parity rows of the generator.
    encoder: Matrix,
}

impl ErasureCode {
    /// The code with the fastest kernel of this machine.
    pub fn new(code: Code) -> Self {
        Self::with_kernel(code, Kernel::detect())
    }

    /// The code with a kernel of the caller's choice, for tests and measurements.
    pub fn with_kernel(code: Code, kernel: Kernel) -> Self {
        let data: Vec<usize> = (0..code.s()).collect();
        let parity_rows = generator::rows(code.s()..code.fragments(), &data);
        let encoder = Matrix::new(kernel, code.s(), parity_rows);
        Self { inner: Arc::new(Inner { code, kernel, encoder }) }
    }

    /// The code's s and r.
    pub fn code(&self) -> Code {
        self.inner.code
    }

    /// The kernel in use.
    pub fn kernel(&self) -> Kernel {
        self.inner.kernel
    }

    /// Computes the r parity fragments of the s data fragments in `data`, in the order of their
    /// indices. All slices have one length, which may be 0 or odd. It is fastest (by up to a half)
    /// when all lie alike relative to 64-byte cache lines.
    ///
    /// # Errors
    /// [`CodeError::DataCount`], [`CodeError::ParityCount`] and [`CodeError::Length`] when the slices
    /// do not fit the code; `parity` is then untouched.
    pub fn encode(&self, data: &[&[u8]], parity: &mut [&mut [u8]]) -> Result<(), CodeError> {
        let code = self.inner.code;
        if data.len() != code.s() {
            return Err(CodeError::DataCount { found: data.len(), expected: code.s() });
        }
        if parity.len() != code.r() {
            return Err(CodeError::ParityCount { found: parity.len(), expected: code.r() });
        }
        let lengths = data.iter().map(|d| d.len()).chain(parity.iter().map(|p| p.len()));
        check_lengths(lengths.enumerate())?;
        self.inner.encoder.apply(data, parity, Output::Replace);
        Ok(())
    }

    /// Rebuilds the fragments `wanted` (data or parity, by index) from the first s of `present`.
    ///
    /// Only the wanted fragments are computed. All slices have one length; they may be equal ranges
    /// of longer fragments.
    ///
    /// # Errors
    /// [`CodeError::TooFewFragments`] with fewer than s present; [`CodeError::NoSuchFragment`],
    /// [`CodeError::Duplicate`] (also within `wanted`) and [`CodeError::Length`] for lists that make
    /// no sense. The wanted slices are then untouched.
    pub fn reconstruct(
        &self,
        present: &[(usize, &[u8])],
        wanted: &mut [(usize, &mut [u8])],
    ) -> Result<(), CodeError> {
        let Inner { code, kernel, .. } = &*self.inner;
        self.check_indices(present.iter().map(|(index, _)| *index))?;
        self.check_indices(wanted.iter().map(|(index, _)| *index))?;
        let lengths = present.iter().map(|(index, bytes)| (*index, bytes.len()));
        check_lengths(lengths.chain(wanted.iter().map(|(index, bytes)| (*index, bytes.len()))))?;
        let helpers = present
            .get(..code.s())
            .ok_or(CodeError::TooFewFragments { have: present.len(), need: code.s() })?;
        let (helpers, inputs): (Vec<usize>, Vec<&[u8]>) = helpers.iter().copied().unzip();
        let (wanted, mut outputs): (Vec<usize>, Vec<&mut [u8]>) =
            wanted.iter_mut().map(|(index, bytes)| (*index, &mut **bytes)).unzip();
        let rows = generator::rows(wanted, &helpers);
        Matrix::new(*kernel, code.s(), rows).apply(&inputs, &mut outputs, Output::Replace);
        Ok(())
    }

    /// The coefficients c, one for each of the first s `helpers`, with which fragment `wanted` =
    /// Σ c_i · fragment `helpers[i]`. The sum may be taken in any parts and any order ([`combine`]).
    ///
    /// # Errors
    /// [`CodeError::TooFewFragments`] with fewer than s helpers; [`CodeError::NoSuchFragment`] and
    /// [`CodeError::Duplicate`] for lists that make no sense.
    pub fn coefficients(&self, wanted: usize, helpers: &[usize]) -> Result<Vec<u8>, CodeError> {
        let code = self.inner.code;
        self.check_indices([wanted].into_iter())?;
        self.check_indices(helpers.iter().copied())?;
        let helpers = helpers
            .get(..code.s())
            .ok_or(CodeError::TooFewFragments { have: helpers.len(), need: code.s() })?;
        Ok(generator::rows([wanted], helpers))
    }

    fn check_indices(&self, indices: impl Iterator<Item = usize>) -> Result<(), CodeError> {
        let fragments = self.inner.code.fragments();
        let mut seen = [false; FRAGMENTS_MAX];
        for index in indices {
            if index >= fragments {
                return Err(CodeError::NoSuchFragment { index, fragments });
            }
            if std::mem::replace(&mut seen[index], true) {
                return Err(CodeError::Duplicate { index });
            }
        }
        Ok(())
    }
}

/// Sets `out` to Σ `coefficients[i]` · `fragments[i]` over GF(2^8), byte by byte; to zeros when there
/// are none. Needs no code: whoever holds fragments of a block can take its part of a sum.
///
/// # Errors
/// [`CodeError::CoefficientCount`] and [`CodeError::Length`]; `out` is then untouched.
pub fn combine(coefficients: &[u8], fragments: &[&[u8]], out: &mut [u8]) -> Result<(), CodeError> {
    Kernel::detect().combine(coefficients, fragments, out)
}

/// Adds Σ `coefficients[i]` · `fragments[i]` to `out`, so that sums can be taken part by part, in any
/// order. See [`combine`].
///
/// # Errors
/// [`CodeError::CoefficientCount`] and [`CodeError::Length`]; `out` is then untouched.
pub fn combine_into(
    coefficients: &[u8],
    fragments: &[&[u8]],
    out: &mut [u8],
) -> Result<(), CodeError> {
    Kernel::detect().combine_into(coefficients, fragments, out)
}

impl Kernel {
    /// [`combine`] with this kernel.
    ///
    /// # Errors
    /// Those of [`combine`].
    pub fn combine(
        self,
        coefficients: &[u8],
        fragments: &[&[u8]],
        out: &mut [u8],
    ) -> Result<(), CodeError> {
        sum(self, coefficients, fragments, out, Output::Replace)
    }

    /// [`combine_into`] with this kernel.
    ///
    /// # Errors
    /// Those of [`combine_into`].
    pub fn combine_into(
        self,
        coefficients: &[u8],
        fragments: &[&[u8]],
        out: &mut [u8],
    ) -> Result<(), CodeError> {
        sum(self, coefficients, fragments, out, Output::Add)
    }
}

fn sum(
    kernel: Kernel,
    coefficients: &[u8],
    fragments: &[&[u8]],
    out: &mut [u8],
    output: Output,
) -> Result<(), CodeError> {
    if coefficients.len() != fragments.len() {
        return Err(CodeError::CoefficientCount {
            coefficients: coefficients.len(),
            fragments: fragments.len(),
        });
    }
    for (index, fragment) in fragments.iter().enumerate() {
        if fragment.len() != out.len() {
            let (bytes, expected) = (fragment.len(), out.len());
            return Err(CodeError::Length { index, bytes, expected });
        }
    }
    let matrix = Matrix::new(kernel, fragments.len(), coefficients.to_vec());
    matrix.apply(fragments, &mut [out], output);
    Ok(())
}

/// Checks that all (index, bytes) have the length of the first.
fn check_lengths(mut lengths: impl Iterator<Item = (usize, usize)>) -> Result<(), CodeError> {
    let Some((_, expected)) = lengths.next() else { return Ok(()) };
    match lengths.find(|(_, bytes)| *bytes != expected) {
        Some((index, bytes)) => Err(CodeError::Length { index, bytes, expected }),
        None => Ok(()),
    }
}
