//! GFNI on 32-byte vectors: one affine instruction multiplies 32 bytes by a coefficient.

use std::arch::x86_64::*;
use std::array;
use std::ops::Range;

use super::Output;

/// The most outputs of one pass: with two columns each they leave registers for inputs and products.
pub const OUTPUTS_MAX: usize = 6;
/// Bytes of a vector.
pub const VECTOR_BYTES: usize = 32;

/// Computes the bytes `columns`, a whole number of vectors, of a group of outputs.
///
/// # Safety
/// The machine has GFNI and AVX2. `tables` holds one matrix per output for each input in turn. Every
/// input and output is at least `columns.end` long, and there are at most [`OUTPUTS_MAX`] outputs.
#[target_feature(enable = "gfni,avx2")]
pub unsafe fn pass(
    tables: &[u64],
    inputs: &[&[u8]],
    outputs: &mut [&mut [u8]],
    columns: Range<usize>,
    output: Output,
) {
    macro_rules! group {
        ($($count:literal x $vectors:literal),*) => {
            match outputs.len() {
                $($count => {
                    // SAFETY: passed on from the caller.
                    unsafe { group::<$count, $vectors>(tables, inputs, outputs, columns, output) }
                })*
                count => unreachable!("{count} outputs in a group"),
            }
        };
    }
    group!(1 x 4, 2 x 4, 3 x 2, 4 x 2, 5 x 2, 6 x 2)
}

/// [`pass`] for exactly `G` outputs, in columns of `V` vectors while they last.
///
/// # Safety
/// That of [`pass`].
#[target_feature(enable = "gfni,avx2")]
unsafe fn group<const G: usize, const V: usize>(
    tables: &[u64],
    inputs: &[&[u8]],
    outputs: &mut [&mut [u8]],
    columns: Range<usize>,
    output: Output,
) {
    let outputs: [*mut u8; G] = array::from_fn(|i| outputs[i].as_mut_ptr());
    let mut start = columns.start;
    while columns.end - start >= V * VECTOR_BYTES {
        // SAFETY: V whole vectors from `start` are inside every slice.
        unsafe { column::<G, V>(tables, inputs, &outputs, start, output) };
        start += V * VECTOR_BYTES;
    }
    while columns.end - start >= VECTOR_BYTES {
        // SAFETY: a whole vector from `start` is inside every slice.
        unsafe { column::<G, 1>(tables, inputs, &outputs, start, output) };
        start += VECTOR_BYTES;
    }
}

/// `V` vectors of each of `G` outputs, at byte `start`.
///
/// # Safety
/// That of [`pass`], and every slice holds V whole vectors from `start`.
#[inline]
#[target_feature(enable = "gfni,avx2")]
unsafe fn column<const G: usize, const V: usize>(
    tables: &[u64],
    inputs: &[&[u8]],
    outputs: &[*mut u8; G],
    start: usize,
    output: Output,
) {
    let load = |slice: *const u8| -> [__m256i; V] {
        array::from_fn(|v| {
            // SAFETY: the caller vouches for all V vectors.
            unsafe { _mm256_loadu_si256(slice.add(start + v * VECTOR_BYTES).cast()) }
        })
    };
    let mut sums: [[__m256i; V]; G] = match output {
        Output::Replace => [[_mm256_setzero_si256(); V]; G],
        Output::Add => array::from_fn(|i| load(outputs[i])),
    };
    for (input, tables) in inputs.iter().zip(tables.as_chunks::<G>().0) {
        let input = load(input.as_ptr());
        for i in 0..G {
            let by = _mm256_set1_epi64x(tables[i] as i64);
            for v in 0..V {
                let product = _mm256_gf2p8affine_epi64_epi8::<0>(input[v], by);
                sums[i][v] = _mm256_xor_si256(sums[i][v], product);
            }
        }
    }
    for (output, sums) in outputs.iter().zip(&sums) {
        for (v, sum) in sums.iter().enumerate() {
            // SAFETY: as for the loads.
            unsafe {
                let out = output.add(start + v * VECTOR_BYTES);
                _mm256_storeu_si256(out.cast(), *sum);
            }
        }
    }
}
