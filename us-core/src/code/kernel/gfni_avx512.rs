//! GFNI on 64-byte vectors: one affine instruction multiplies 64 bytes by a coefficient, one
//! three-way exclusive or adds two products to a sum. The last bytes go through masked vectors.
//!
//! Stores are ordinary ones. Non-temporal stores made encoding 4 MiB a quarter faster when measured
//! alone, but parity is read again at once (checksum, send) and would come back from memory.

use std::arch::x86_64::*;
use std::array;
use std::ops::Range;

use super::Output;

/// The most outputs of one pass: with two columns each they leave registers for inputs and products.
pub const OUTPUTS_MAX: usize = 12;
/// Bytes of a vector.
pub const VECTOR_BYTES: usize = 64;
/// How far ahead inputs are called into the first-level cache: worth 5 % where the second-level
/// cache feeds the loop (hardware does it late with many short streams), and nothing elsewhere.
const PREFETCH_BYTES: usize = 512;

/// Computes the bytes `columns` of a group of outputs.
///
/// # Safety
/// The machine has GFNI, AVX-512F and AVX-512BW. `tables` holds one matrix per output for each input
/// in turn. Every input and output is at least `columns.end` long, and there are at most
/// [`OUTPUTS_MAX`] outputs.
#[target_feature(enable = "gfni,avx512f,avx512bw")]
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
    group!(1 x 8, 2 x 4, 3 x 4, 4 x 4, 5 x 4, 6 x 3, 7 x 2, 8 x 2, 9 x 2, 10 x 2, 11 x 2, 12 x 2)
}

/// [`pass`] for exactly `G` outputs, in columns of `V` vectors while they last.
///
/// # Safety
/// That of [`pass`].
#[target_feature(enable = "gfni,avx512f,avx512bw")]
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
        unsafe { column::<G, V>(tables, inputs, &outputs, start, u64::MAX, output) };
        start += V * VECTOR_BYTES;
    }
    while start < columns.end {
        let rest = columns.end - start;
        let mask = if rest >= VECTOR_BYTES { u64::MAX } else { (1 << rest) - 1 };
        // SAFETY: the mask covers the bytes from `start` to the end of the columns, no more.
        unsafe { column::<G, 1>(tables, inputs, &outputs, start, mask, output) };
        start += VECTOR_BYTES;
    }
}

/// `V` vectors of each of `G` outputs, at byte `start`; only the bytes in `mask` are touched.
///
/// # Safety
/// That of [`pass`], and every slice reaches to the last byte of `mask` in the last vector.
#[inline]
#[target_feature(enable = "gfni,avx512f,avx512bw")]
unsafe fn column<const G: usize, const V: usize>(
    tables: &[u64],
    inputs: &[&[u8]],
    outputs: &[*mut u8; G],
    start: usize,
    mask: u64,
    output: Output,
) {
    let load = |slice: *const u8| -> [__m512i; V] {
        array::from_fn(|v| {
            // SAFETY: the caller vouches for the bytes in `mask` of all V vectors.
            unsafe { _mm512_maskz_loadu_epi8(mask, slice.add(start + v * VECTOR_BYTES).cast()) }
        })
    };
    let fetch = |input: &[u8]| -> [__m512i; V] {
        for v in 0..V {
            let ahead = input.as_ptr().wrapping_add(start + v * VECTOR_BYTES + PREFETCH_BYTES);
            _mm_prefetch::<_MM_HINT_T0>(ahead.cast());
        }
        load(input.as_ptr())
    };
    let mut sums: [[__m512i; V]; G] = match output {
        Output::Replace => [[_mm512_setzero_si512(); V]; G],
        Output::Add => array::from_fn(|i| load(outputs[i])),
    };
    let (pairs, last) = inputs.as_chunks::<2>();
    let (pairs_by, last_by) = tables.as_chunks::<G>().0.as_chunks::<2>();
    for ([a, b], [by_a, by_b]) in pairs.iter().zip(pairs_by) {
        let (a, b) = (fetch(a), fetch(b));
        for i in 0..G {
            let by_a = _mm512_set1_epi64(by_a[i] as i64);
            let by_b = _mm512_set1_epi64(by_b[i] as i64);
            for v in 0..V {
                let a = _mm512_gf2p8affine_epi64_epi8::<0>(a[v], by_a);
                let b = _mm512_gf2p8affine_epi64_epi8::<0>(b[v], by_b);
                sums[i][v] = _mm512_ternarylogic_epi64::<0x96>(sums[i][v], a, b);
            }
        }
    }
    for (a, by) in last.iter().zip(last_by) {
        let a = fetch(a);
        for i in 0..G {
            let by = _mm512_set1_epi64(by[i] as i64);
            for v in 0..V {
                let a = _mm512_gf2p8affine_epi64_epi8::<0>(a[v], by);
                sums[i][v] = _mm512_xor_si512(sums[i][v], a);
            }
        }
    }
    for (output, sums) in outputs.iter().zip(&sums) {
        for (v, sum) in sums.iter().enumerate() {
            // SAFETY: as for the loads.
            unsafe {
                let out = output.add(start + v * VECTOR_BYTES);
                _mm512_mask_storeu_epi8(out.cast(), mask, *sum);
            }
        }
    }
}
