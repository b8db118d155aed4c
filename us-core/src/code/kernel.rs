//! The hot loops: matrices over GF(2^8) times columns of bytes, one implementation per instruction
//! set, chosen when the program runs.
//!
//! Every vector kernel walks the fragments in columns of a few cache lines. It loads each input line
//! once and keeps all outputs of the column in registers; where there are more outputs than
//! registers hold they are computed in groups, strip by strip, so that a group finds the inputs in
//! the first-level cache.
//!
//! Invariants: a [`Kernel`] exists only for instructions this machine has; [`Matrix::apply`] checks
//! every length before a loop that trusts it.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod gfni_avx2;
#[cfg(target_arch = "x86_64")]
mod gfni_avx512;
mod portable;

use std::fmt;
use std::ops::Range;

#[cfg(target_arch = "x86_64")]
use super::field;

/// An implementation of the hot loops that this machine can run.
///
/// All give the same bytes. A value is proof that the instructions are there.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Kernel(Implementation);

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Implementation {
    #[cfg(target_arch = "x86_64")]
    GfniAvx512,
    #[cfg(target_arch = "x86_64")]
    GfniAvx2,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    Portable,
}

impl Kernel {
    /// The fastest kernel of this machine.
    pub fn detect() -> Self {
        Self::available().next().expect("the portable kernel runs everywhere")
    }

    /// The kernel every machine can run.
    pub const PORTABLE: Self = Self(Implementation::Portable);

    /// All kernels of this machine, fastest first.
    pub fn available() -> impl Iterator<Item = Self> {
        let all = [
            #[cfg(target_arch = "x86_64")]
            Implementation::GfniAvx512,
            #[cfg(target_arch = "x86_64")]
            Implementation::GfniAvx2,
            #[cfg(target_arch = "x86_64")]
            Implementation::Avx2,
            Implementation::Portable,
        ];
        all.into_iter().filter(|implementation| implementation.runs_here()).map(Self)
    }

    /// The instruction set, in lower case: `gfni-avx512`, `gfni-avx2`, `avx2` or `portable`.
    pub const fn name(self) -> &'static str {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Implementation::GfniAvx512 => "gfni-avx512",
            #[cfg(target_arch = "x86_64")]
            Implementation::GfniAvx2 => "gfni-avx2",
            #[cfg(target_arch = "x86_64")]
            Implementation::Avx2 => "avx2",
            Implementation::Portable => "portable",
        }
    }
}

impl fmt::Display for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl Implementation {
    fn runs_here(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::GfniAvx512 => {
                is_x86_feature_detected!("gfni")
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
            }
            #[cfg(target_arch = "x86_64")]
            Self::GfniAvx2 => is_x86_feature_detected!("gfni") && is_x86_feature_detected!("avx2"),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => is_x86_feature_detected!("avx2"),
            Self::Portable => true,
        }
    }
}

/// What happens to the bytes an output already holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Output {
    /// They are replaced.
    Replace,
    /// The result is added to them.
    Add,
}

/// A matrix of coefficients, laid out for one kernel.
#[derive(Debug)]
pub struct Matrix {
    inputs: usize,
    outputs: usize,
    /// Row by row: one row of `inputs` coefficients per output.
    coefficients: Vec<u8>,
    tables: Tables,
}

/// The coefficients as the kernel reads them: group after group of outputs, and inside a group
/// input after input, so that the hot loop reads them in order.
#[derive(Debug)]
enum Tables {
    #[cfg(target_arch = "x86_64")]
    GfniAvx512(Groups<u64>),
    #[cfg(target_arch = "x86_64")]
    GfniAvx2(Groups<u64>),
    #[cfg(target_arch = "x86_64")]
    Avx2(Groups<[u8; 32]>),
    Portable,
}

/// Tables of all coefficients, in groups of `width` outputs (the last group may be smaller).
#[cfg(target_arch = "x86_64")]
#[derive(Debug)]
struct Groups<T> {
    width: usize,
    tables: Vec<T>,
}

/// Bytes of input a strip has when the outputs need several groups: half of a small L1 cache.
#[cfg(target_arch = "x86_64")]
const STRIP_BYTES: usize = 24 << 10;
/// The fewest bytes of one fragment in a strip; a multiple of all columns.
#[cfg(target_arch = "x86_64")]
const STRIP_COLUMN_BYTES: usize = 512;

#[cfg(target_arch = "x86_64")]
impl<T: Copy> Groups<T> {
    fn new(coefficients: &[u8], inputs: usize, outputs_max: usize, table: &[T; 256]) -> Self {
        if coefficients.is_empty() {
            return Self { width: 1, tables: Vec::new() };
        }
        let outputs = coefficients.len() / inputs;
        // As even as possible: 13 outputs of at most 12 are 7 and 6.
        let width = outputs.div_ceil(outputs.div_ceil(outputs_max));
        let mut tables = Vec::with_capacity(coefficients.len());
        for rows in coefficients.chunks(width * inputs) {
            for input in 0..inputs {
                let column = rows.chunks_exact(inputs).map(|row| row[input]);
                tables.extend(column.map(|c| table[c as usize]));
            }
        }
        Self { width, tables }
    }

    /// Calls `pass(tables, outputs, strip)` for each group in each strip of `columns`.
    fn for_each(
        &self,
        inputs: usize,
        outputs: &mut [&mut [u8]],
        columns: Range<usize>,
        mut pass: impl FnMut(&[T], &mut [&mut [u8]], Range<usize>),
    ) {
        let strip_bytes = if outputs.len() <= self.width {
            columns.len().max(1)
        } else {
            (STRIP_BYTES / inputs).next_multiple_of(STRIP_COLUMN_BYTES)
        };
        for start in columns.clone().step_by(strip_bytes) {
            let strip = start..columns.end.min(start + strip_bytes);
            let groups = self.tables.chunks(self.width * inputs);
            for (tables, outputs) in groups.zip(outputs.chunks_mut(self.width)) {
                pass(tables, outputs, strip.clone());
            }
        }
    }
}

impl Matrix {
    /// Lays out `coefficients`: row by row, one row of `inputs` per output. With no inputs there is
    /// one output, the empty sum.
    pub fn new(kernel: Kernel, inputs: usize, coefficients: Vec<u8>) -> Self {
        let outputs = coefficients.len().checked_div(inputs).unwrap_or(1);
        assert_eq!(coefficients.len(), inputs * outputs, "whole rows");
        let tables = match kernel.0 {
            #[cfg(target_arch = "x86_64")]
            Implementation::GfniAvx512 => Tables::GfniAvx512(Groups::new(
                &coefficients,
                inputs,
                gfni_avx512::OUTPUTS_MAX,
                &field::AFFINE,
            )),
            #[cfg(target_arch = "x86_64")]
            Implementation::GfniAvx2 => Tables::GfniAvx2(Groups::new(
                &coefficients,
                inputs,
                gfni_avx2::OUTPUTS_MAX,
                &field::AFFINE,
            )),
            #[cfg(target_arch = "x86_64")]
            Implementation::Avx2 => {
                Tables::Avx2(Groups::new(&coefficients, inputs, avx2::OUTPUTS_MAX, &field::NIBBLES))
            }
            Implementation::Portable => Tables::Portable,
        };
        Self { inputs, outputs, coefficients, tables }
    }

    /// Sets (or adds to) each output its row's sum over the inputs.
    ///
    /// # Panics
    /// Unless there are as many slices as the matrix has columns and rows, all of one length.
    pub fn apply(&self, inputs: &[&[u8]], outputs: &mut [&mut [u8]], output: Output) {
        assert_eq!(inputs.len(), self.inputs, "one input per column");
        assert_eq!(outputs.len(), self.outputs, "one output per row");
        let bytes = outputs.first().map_or(0, |output| output.len());
        assert!(outputs.iter().all(|output| output.len() == bytes), "outputs of one length");
        if outputs.is_empty() || bytes == 0 {
            return;
        }
        assert!(inputs.iter().all(|input| input.len() == bytes), "inputs as long as outputs");
        if inputs.is_empty() {
            return portable::apply(&[], inputs, outputs, 0..bytes, output);
        }
        let scalar: [Range<usize>; 2] = match &self.tables {
            #[cfg(target_arch = "x86_64")]
            Tables::GfniAvx512(groups) => {
                let [head, body, tail] = split(outputs[0], gfni_avx512::VECTOR_BYTES);
                for columns in [head, body.start..tail.end] {
                    groups.for_each(self.inputs, outputs, columns, |tables, outputs, strip| {
                        // SAFETY: the Kernel this matrix was made for proves the instructions are
                        // there; all slices have one length (asserted above), and strips end there.
                        unsafe { gfni_avx512::pass(tables, inputs, outputs, strip, output) }
                    });
                }
                [0..0, 0..0]
            }
            #[cfg(target_arch = "x86_64")]
            Tables::GfniAvx2(groups) => {
                let [head, body, tail] = split(outputs[0], gfni_avx2::VECTOR_BYTES);
                groups.for_each(self.inputs, outputs, body, |tables, outputs, strip| {
                    // SAFETY: as above, and body and strips are whole vectors.
                    unsafe { gfni_avx2::pass(tables, inputs, outputs, strip, output) }
                });
                [head, tail]
            }
            #[cfg(target_arch = "x86_64")]
            Tables::Avx2(groups) => {
                let [head, body, tail] = split(outputs[0], avx2::VECTOR_BYTES);
                groups.for_each(self.inputs, outputs, body, |tables, outputs, strip| {
                    // SAFETY: as above, and body and strips are whole vectors.
                    unsafe { avx2::pass(tables, inputs, outputs, strip, output) }
                });
                [head, tail]
            }
            Tables::Portable => [0..bytes, 0..0],
        };
        for columns in scalar {
            portable::apply(&self.coefficients, inputs, outputs, columns, output);
        }
    }
}

/// Where vectors lie in columns as long as `out`: before the first aligned one, the whole aligned
/// ones, the rest.
///
/// Stores that straddle cache lines cost up to a third of the throughput. Outputs usually lie alike,
/// so what aligns one aligns all.
#[cfg(target_arch = "x86_64")]
fn split(out: &[u8], vector_bytes: usize) -> [Range<usize>; 3] {
    let head = out.as_ptr().align_offset(vector_bytes).min(out.len());
    let tail = out.len() - (out.len() - head) % vector_bytes;
    [0..head, head..tail, tail..out.len()]
}
