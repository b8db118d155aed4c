//! The code against the crate that defines it, every kernel against every other.

use proptest::prelude::*;
use reed_solomon_erasure::galois_8::{self, ReedSolomon};

use super::*;

/// Bytes without a pattern, the same for the same seed.
fn noise(bytes: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    std::iter::repeat_with(next).take(bytes).collect()
}

/// All fragments of a block of noise, the parity by the crate.
fn fragments(code: Code, bytes: usize, seed: u64) -> Vec<Vec<u8>> {
    let data = (0..code.s()).map(|i| noise(bytes, seed + i as u64));
    let mut fragments: Vec<Vec<u8>> = data.chain((0..code.r()).map(|_| vec![0; bytes])).collect();
    if bytes > 0 && code.r() > 0 {
        ReedSolomon::new(code.s(), code.r()).unwrap().encode(&mut fragments).unwrap();
    }
    fragments
}

fn slices(fragments: &[Vec<u8>]) -> Vec<&[u8]> {
    fragments.iter().map(Vec::as_slice).collect()
}

fn slices_mut(fragments: &mut [Vec<u8>]) -> Vec<&mut [u8]> {
    fragments.iter_mut().map(Vec::as_mut_slice).collect()
}

fn code(s: usize, r: usize) -> Code {
    Code::new(s, r).unwrap()
}

/// Encodes with every kernel from and to slices `shift` bytes off their alignment, and checks the
/// parity and the bytes on both sides of it.
fn check_encode(code: Code, bytes: usize, shift: usize) {
    let expected = fragments(code, bytes, bytes as u64 + 7);
    let shifted = |fragment: &Vec<u8>| [&vec![0xEE; shift][..], fragment, &[0xEE; 70]].concat();
    let data: Vec<Vec<u8>> = expected[..code.s()].iter().map(shifted).collect();
    let data: Vec<&[u8]> = data.iter().map(|data| &data[shift..][..bytes]).collect();
    for kernel in Kernel::available() {
        let mut buffers = vec![vec![0xEE; shift + bytes + 70]; code.r()];
        let mut parity: Vec<&mut [u8]> =
            buffers.iter_mut().map(|buffer| &mut buffer[shift..][..bytes]).collect();
        ErasureCode::with_kernel(code, kernel).encode(&data, &mut parity).unwrap();
        for (i, (buffer, expected)) in buffers.iter().zip(&expected[code.s()..]).enumerate() {
            assert!(*buffer == shifted(expected), "{kernel}, {code}, {bytes} bytes, parity {i}");
        }
    }
}

#[test]
fn every_kernel_encodes_every_short_length_as_the_crate_does() {
    println!("kernels: {}", Kernel::available().map(Kernel::name).collect::<Vec<_>>().join(", "));
    for (s, r) in [(1, 1), (4, 2), (10, 4), (3, 5), (5, 13)] {
        for bytes in 0..=200 {
            check_encode(code(s, r), bytes, bytes % 64);
        }
    }
}

#[test]
fn every_number_of_outputs_is_computed() {
    for r in 0..=40 {
        check_encode(code(7, r), 1000, 3);
        check_encode(code(60, r), 1700, 0);
    }
}

proptest! {
    // A case checks every kernel, over many kilobytes.
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn every_kernel_encodes_as_the_crate_does(
        s in 1usize..=254, r in 1usize..=254, bytes in 0usize..3000, shift in 0usize..64,
    ) {
        let r = 1 + (r - 1) % (255 - s);
        check_encode(code(s, r), bytes, shift);
    }

    #[test]
    fn every_kernel_encodes_large_usual_codes_as_the_crate_does(
        s in 1usize..=20, r in 1usize..=12, bytes in 3000usize..100_000, shift in 0usize..64,
    ) {
        check_encode(code(s, r), bytes, shift);
    }

    #[test]
    fn any_loss_is_rebuilt(
        s in 1usize..=60, r in 1usize..=30, bytes in 1usize..2000, order in any::<u64>(),
    ) {
        let expected = fragments(code(s, r), bytes, order);
        let mut indices: Vec<usize> = (0..s + r).collect();
        indices.sort_by_key(|index| (*index as u64 + 1).wrapping_mul(order | 1).rotate_left(17));
        for kernel in Kernel::available() {
            check_reconstruct(&ErasureCode::with_kernel(code(s, r), kernel), &expected, &indices);
        }
    }

    #[test]
    fn partial_sums_in_any_parts_and_order_give_the_fragment(
        s in 2usize..=20, r in 1usize..=11, bytes in 0usize..2000,
        cut in 0.0f64..1.0, wanted in 0.0f64..1.0, backwards in any::<bool>(),
    ) {
        let expected = fragments(code(s, r), bytes, 3);
        let wanted = (wanted * (s + r) as f64) as usize;
        let mut helpers: Vec<usize> = (0..s + r).filter(|index| *index != wanted).collect();
        if backwards {
            helpers.reverse();
        }
        helpers.truncate(s);
        for kernel in Kernel::available() {
            let erasure_code = ErasureCode::with_kernel(code(s, r), kernel);
            let coefficients = erasure_code.coefficients(wanted, &helpers).unwrap();
            let held: Vec<&[u8]> = helpers.iter().map(|h| expected[*h].as_slice()).collect();
            let cut = 1 + (cut * (s - 1) as f64) as usize;
            let (mut direct, mut sum, mut added) =
                (vec![0xEE; bytes], vec![0xEE; bytes], vec![0; bytes]);
            kernel.combine(&coefficients, &held, &mut direct).unwrap();
            prop_assert_eq!(&direct, &expected[wanted]);
            kernel.combine(&coefficients[cut..], &held[cut..], &mut sum).unwrap();
            kernel.combine_into(&coefficients[..cut], &held[..cut], &mut sum).unwrap();
            prop_assert_eq!(&sum, &direct);
            for i in (0..s).rev() {
                kernel.combine_into(&coefficients[i..=i], &held[i..=i], &mut added).unwrap();
            }
            prop_assert_eq!(&added, &direct);
        }
    }
}

/// Rebuilds all fragments but the first s of `indices` from those, and each of them alone.
fn check_reconstruct(erasure_code: &ErasureCode, expected: &[Vec<u8>], indices: &[usize]) {
    let (present, lost) = indices.split_at(erasure_code.code().s());
    let bytes = expected[0].len();
    let given: Vec<(usize, &[u8])> =
        present.iter().map(|index| (*index, expected[*index].as_slice())).collect();
    let rebuild = |wanted: &[usize]| {
        let mut rebuilt = vec![vec![0xEE; bytes]; wanted.len()];
        let mut list: Vec<(usize, &mut [u8])> =
            wanted.iter().copied().zip(rebuilt.iter_mut().map(Vec::as_mut_slice)).collect();
        erasure_code.reconstruct(&given, &mut list).unwrap();
        for (index, rebuilt) in wanted.iter().zip(rebuilt) {
            assert!(
                rebuilt == expected[*index],
                "{:?} rebuilds {index} from {present:?}",
                erasure_code.code()
            );
        }
    };
    rebuild(lost);
    lost.chunks(1).for_each(rebuild);
}

#[test]
fn every_loss_pattern_of_every_small_code_is_rebuilt() {
    for (s, r) in (1..=10).flat_map(|s| (0..=10 - s).map(move |r| (s, r))) {
        let expected = fragments(code(s, r), 67, 1);
        let f = s + r;
        for kernel in Kernel::available() {
            let erasure_code = ErasureCode::with_kernel(code(s, r), kernel);
            for pattern in (0u32..1 << f).filter(|pattern| pattern.count_ones() as usize == s) {
                let is_present = |index: &usize| pattern >> index & 1 == 1;
                let (present, lost): (Vec<usize>, Vec<usize>) = (0..f).partition(is_present);
                check_reconstruct(&erasure_code, &expected, &[present, lost].concat());
            }
        }
    }
}

#[test]
fn coefficients_give_every_fragment_from_every_helper_set_of_a_small_code() {
    let (s, r) = (4, 3);
    let erasure_code = ErasureCode::new(code(s, r));
    let expected = fragments(code(s, r), 33, 9);
    for pattern in (0u32..1 << (s + r)).filter(|pattern| pattern.count_ones() as usize == s) {
        let helpers: Vec<usize> = (0..s + r).filter(|index| pattern >> index & 1 == 1).collect();
        for (wanted, expected_bytes) in expected.iter().enumerate() {
            let coefficients = erasure_code.coefficients(wanted, &helpers).unwrap();
            let mut sum = vec![0; 33];
            for (coefficient, helper) in coefficients.iter().zip(&helpers) {
                galois_8::mul_slice_xor(*coefficient, &expected[*helper], &mut sum);
            }
            assert_eq!(&sum, expected_bytes, "{wanted} from {helpers:?}");
            assert_eq!(coefficients.len(), s);
        }
    }
}

#[test]
fn fewer_than_s_fragments_are_an_error_and_never_bytes() {
    for (s, r) in [(1, 3), (4, 2), (10, 4), (20, 11)] {
        let erasure_code = ErasureCode::new(code(s, r));
        let expected = fragments(code(s, r), 100, 5);
        let present: Vec<(usize, &[u8])> =
            (r + 1..s + r).map(|index| (index, expected[index].as_slice())).collect();
        let mut out = vec![0xEE; 100];
        let error = CodeError::TooFewFragments { have: s - 1, need: s };
        assert_eq!(erasure_code.reconstruct(&present, &mut [(0, &mut out)]), Err(error));
        assert_eq!(out, vec![0xEE; 100]);
        let helpers: Vec<usize> = (r + 1..s + r).collect();
        assert_eq!(erasure_code.coefficients(0, &helpers), Err(error));
    }
}

#[test]
fn more_than_s_fragments_are_as_good_as_s() {
    let erasure_code = ErasureCode::new(code(3, 2));
    let expected = fragments(code(3, 2), 50, 2);
    let present: Vec<(usize, &[u8])> =
        [4, 0, 3, 2].map(|index| (index, expected[index].as_slice())).to_vec();
    let mut rebuilt = vec![vec![0; 50]; 2];
    let [one, two] = &mut rebuilt[..] else { unreachable!() };
    erasure_code.reconstruct(&present, &mut [(1, one), (2, two)]).unwrap();
    assert_eq!(rebuilt, expected[1..3]);
    erasure_code.reconstruct(&present, &mut []).unwrap();
}

#[test]
fn arguments_that_do_not_fit_are_refused_untouched() {
    let erasure_code = ErasureCode::new(code(3, 2));
    let expected = fragments(code(3, 2), 50, 2);
    let data = slices(&expected[..3]);
    let mut parity = vec![vec![0xEE; 50]; 2];
    let refused = erasure_code.encode(&data[..2], &mut slices_mut(&mut parity));
    assert_eq!(refused, Err(CodeError::DataCount { found: 2, expected: 3 }));
    let refused = erasure_code.encode(&data, &mut slices_mut(&mut parity[..1]));
    assert_eq!(refused, Err(CodeError::ParityCount { found: 1, expected: 2 }));
    let ragged = [data[0], &data[1][..49], data[2]];
    let refused = erasure_code.encode(&ragged, &mut slices_mut(&mut parity));
    assert_eq!(refused, Err(CodeError::Length { index: 1, bytes: 49, expected: 50 }));

    let mut out = vec![0xEE; 50];
    let present: Vec<(usize, &[u8])> = [0, 3, 4].map(|i| (i, expected[i].as_slice())).to_vec();
    let mut reconstruct = |present: &[(usize, &[u8])], wanted| {
        erasure_code.reconstruct(present, &mut [(wanted, &mut out[..])])
    };
    let missing = CodeError::NoSuchFragment { index: 5, fragments: 5 };
    assert_eq!(reconstruct(&present, 5), Err(missing));
    assert_eq!(reconstruct(&[present[0], (5, present[1].1), present[2]], 1), Err(missing));
    let twice = [present[0], present[1], present[1], present[2]];
    assert_eq!(reconstruct(&twice, 1), Err(CodeError::Duplicate { index: 3 }));
    let ragged = [present[0], present[1], (4, &expected[4][1..])];
    let error = CodeError::Length { index: 4, bytes: 49, expected: 50 };
    assert_eq!(reconstruct(&ragged, 1), Err(error));
    assert_eq!(erasure_code.coefficients(5, &[0, 1, 2]), Err(missing));
    let duplicate = CodeError::Duplicate { index: 1 };
    assert_eq!(erasure_code.coefficients(0, &[1, 1, 2]), Err(duplicate));

    let error = CodeError::CoefficientCount { coefficients: 1, fragments: 3 };
    assert_eq!(combine(&[1], &data, &mut out), Err(error));
    let error = CodeError::Length { index: 1, bytes: 49, expected: 50 };
    let ragged = [data[0], &data[1][..49], data[2]];
    assert_eq!(combine_into(&[1, 2, 3], &ragged, &mut out), Err(error));
    assert_eq!(out, vec![0xEE; 50]);
    assert_eq!(parity, vec![vec![0xEE; 50]; 2]);
}

#[test]
fn an_empty_sum_is_zero_and_adds_nothing() {
    for kernel in Kernel::available() {
        let mut out = vec![0xEE; 50];
        kernel.combine_into(&[], &[], &mut out).unwrap();
        assert_eq!(out, vec![0xEE; 50]);
        kernel.combine(&[], &[], &mut out).unwrap();
        assert_eq!(out, vec![0; 50]);
    }
}
