//! The kernel of every machine: the crate's look-up tables, a strip at a time. It also finishes the
//! last bytes for vector kernels that work in whole vectors only.

use std::ops::Range;

use reed_solomon_erasure::galois_8::mul_slice_xor;

use super::Output;

/// Bytes of one output finished before the next: inputs stay in the second-level cache meanwhile.
const STRIP_BYTES: usize = 4 << 10;

/// Computes the bytes `columns` of all outputs; `coefficients` has a row per output.
pub fn apply(
    coefficients: &[u8],
    inputs: &[&[u8]],
    outputs: &mut [&mut [u8]],
    columns: Range<usize>,
    output: Output,
) {
    for start in columns.clone().step_by(STRIP_BYTES) {
        let strip = start..columns.end.min(start + STRIP_BYTES);
        for (i, out) in outputs.iter_mut().enumerate() {
            let out = &mut out[strip.clone()];
            if output == Output::Replace {
                out.fill(0);
            }
            let row = &coefficients[i * inputs.len()..][..inputs.len()];
            for (coefficient, input) in row.iter().zip(inputs) {
                mul_slice_xor(*coefficient, &input[strip.clone()], out);
            }
        }
    }
}
