//! The generator matrix: the coefficients that express one fragment by s others.
//!
//! The crate's matrix is a Vandermonde matrix made systematic. So there is, for each byte place, one
//! polynomial over GF(2^8) of degree below s whose value at the point i is the byte of fragment i,
//! data and parity alike, and the coefficients of any fragment over any s others are those of
//! Lagrange's interpolation. Encoding is the case where the s others are the data; nothing is
//! inverted and no matrix is kept. The tests hold this against the crate's own parity of unit
//! vectors.

use super::field::{EXP, LOG, ORDER};

/// One row per wanted fragment: its coefficients over the `helpers`, in their order.
///
/// The coefficient of helper h in fragment w is Π (w - k) / (h - k) over all other helpers k. It is
/// taken in logarithms, in s² + s · wanted look-ups. Helpers must be distinct.
pub fn rows(wanted: impl IntoIterator<Item = usize>, helpers: &[usize]) -> Vec<u8> {
    let point = |index: usize| u8::try_from(index).expect("a code has at most 255 fragments");
    let helpers: Vec<u8> = helpers.iter().map(|helper| point(*helper)).collect();
    // Subtraction is exclusive or. That the logarithm of 0 stands as 0 leaves out the factor h - h.
    let log_difference = |a: u8, b: u8| usize::from(LOG[usize::from(a ^ b)]);
    let log_product = |a: u8| helpers.iter().map(|k| log_difference(a, *k)).sum::<usize>() % ORDER;
    let log_weights: Vec<usize> = helpers.iter().map(|h| log_product(*h)).collect();

    let mut rows = Vec::new();
    for w in wanted.into_iter().map(point) {
        if helpers.contains(&w) {
            rows.extend(helpers.iter().map(|h| u8::from(*h == w)));
            continue;
        }
        let log_node = log_product(w);
        let terms = helpers.iter().zip(&log_weights);
        rows.extend(terms.map(|(h, log_weight)| {
            let log_divisor = log_weight + log_difference(w, *h);
            EXP[(log_node + 2 * ORDER - log_divisor) % ORDER]
        }));
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;
    use reed_solomon_erasure::galois_8::ReedSolomon;

    /// The parity rows of the crate: its parity of the unit vectors.
    fn rows_of_the_crate(s: usize, r: usize) -> Vec<u8> {
        // Byte j of data fragment j is 1, so byte j of parity fragment i is coefficient (i, j).
        let mut fragments = vec![vec![0; s]; s + r];
        for (j, fragment) in fragments[..s].iter_mut().enumerate() {
            fragment[j] = 1;
        }
        ReedSolomon::new(s, r).unwrap().encode(&mut fragments).unwrap();
        fragments[s..].concat()
    }

    #[test]
    fn the_parity_rows_are_those_of_the_crate() {
        // The rows of a smaller r are the first ones. The crate takes seconds for large s.
        for s in (1..=40).chain([63, 64, 100, 127, 128, 200, 253, 254]) {
            let data: Vec<usize> = (0..s).collect();
            for r in [1, 255 - s] {
                assert!(rows(s..s + r, &data) == rows_of_the_crate(s, r), "{s}+{r}");
            }
        }
    }

    #[test]
    fn the_parity_of_stored_fragments_never_changes() {
        assert_eq!(rows(4..6, &[0, 1, 2, 3]), [0x1b, 0x1c, 0x12, 0x14, 0x1c, 0x1b, 0x14, 0x12]);
    }
}
