//! The generator matrix, and the rows that express one fragment by others.
//!
//! Invariant: any s rows of the generator are independent, so every square part of its parity rows
//! can be inverted. That makes recovery cheap: with m data fragments missing among the helpers only
//! an m x m system is solved, whatever s is, and no decode matrix needs to be kept.

use reed_solomon_erasure::galois_8::{self, ReedSolomon};

use crate::geometry::Code;

/// The generator matrix of a code; only its parity rows are stored.
#[derive(Debug)]
pub struct Generator {
    s: usize,
    /// r rows of s coefficients.
    parity: Vec<u8>,
}

impl Generator {
    /// The matrix of the crate: its parity of the s unit vectors.
    pub fn new(code: Code) -> Self {
        let (s, r) = (code.s(), code.r());
        if r == 0 {
            return Self { s, parity: Vec::new() };
        }
        // Data fragment j is the unit vector e_j, so byte j of parity fragment i is coefficient (i, j).
        let mut fragments = vec![vec![0; s]; s + r];
        for (j, fragment) in fragments[..s].iter_mut().enumerate() {
            fragment[j] = 1;
        }
        ReedSolomon::new(s, r)
            .and_then(|oracle| oracle.encode(&mut fragments))
            .expect("a Code has 1..=255 fragments, and these are of one length");
        Self { s, parity: fragments[s..].concat() }
    }

    /// The r parity rows, s coefficients each.
    pub fn parity_rows(&self) -> Vec<u8> {
        self.parity.clone()
    }

    /// The coefficient of data fragment `data` in fragment `index`.
    fn coefficient(&self, index: usize, data: usize) -> u8 {
        match index.checked_sub(self.s) {
            Some(parity) => self.parity[parity * self.s + data],
            None => u8::from(index == data),
        }
    }

    /// One row per wanted fragment: its coefficients over the s `helpers`, in their order.
    ///
    /// Let M be the data fragments that no helper is and P the helpers that are parity: |M| = |P|.
    /// A fragment w is Σ w_j · data j. Helpers P tell the missing data through the square matrix A
    /// (rows P, columns M of the generator), so with u = w_M · A⁻¹ the coefficient of helper p in P
    /// is u_p, and that of a data helper d is w_d + Σ_p u_p · g_pd.
    pub fn recovery_rows(&self, wanted: &[usize], helpers: &[usize]) -> Vec<u8> {
        assert_eq!(helpers.len(), self.s, "a recovery takes exactly s helpers");
        let parity: Vec<usize> = helpers.iter().copied().filter(|h| *h >= self.s).collect();
        let missing: Vec<usize> = (0..self.s).filter(|d| !helpers.contains(d)).collect();
        assert_eq!(parity.len(), missing.len(), "helpers are distinct");
        let m = missing.len();
        let known = parity.iter().flat_map(|p| missing.iter().map(|d| self.coefficient(*p, *d)));
        let inverse = invert(known.collect(), m);

        let mut rows = vec![0; wanted.len() * self.s];
        let mut u = vec![0; m];
        for (row, w) in rows.chunks_exact_mut(self.s).zip(wanted) {
            u.fill(0);
            for (k, d) in missing.iter().enumerate() {
                galois_8::mul_slice_xor(self.coefficient(*w, *d), &inverse[k * m..][..m], &mut u);
            }
            let mut p = 0;
            for (coefficient, helper) in row.iter_mut().zip(helpers) {
                if *helper >= self.s {
                    *coefficient = u[p];
                    p += 1;
                    continue;
                }
                let terms = parity.iter().zip(&u);
                *coefficient = terms
                    .map(|(p, u)| galois_8::mul(*u, self.coefficient(*p, *helper)))
                    .fold(self.coefficient(*w, *helper), galois_8::add);
            }
        }
        rows
    }
}

/// The inverse of an m x m matrix, row by row, by Gauss-Jordan elimination.
///
/// # Panics
/// When the matrix is singular, which no square part of the parity rows is.
fn invert(mut matrix: Vec<u8>, m: usize) -> Vec<u8> {
    // Each row is a row of the matrix, then the same row of the identity.
    let width = 2 * m;
    let mut rows = vec![0; m * width];
    for (i, row) in rows.chunks_exact_mut(width.max(1)).enumerate() {
        row[..m].copy_from_slice(&matrix[i * m..][..m]);
        row[m + i] = 1;
    }
    let mut pivot_row = vec![0; width];
    for pivot in 0..m {
        let at = |row: usize| row * width + pivot;
        let swap = (pivot..m).find(|row| rows[at(*row)] != 0).expect("the matrix is not singular");
        let scale = galois_8::div(1, rows[at(swap)]);
        galois_8::mul_slice(scale, &rows[swap * width..][..width], &mut pivot_row);
        rows.copy_within(pivot * width..(pivot + 1) * width, swap * width);
        rows[pivot * width..][..width].copy_from_slice(&pivot_row);
        for (i, row) in rows.chunks_exact_mut(width).enumerate() {
            if i != pivot && row[pivot] != 0 {
                galois_8::mul_slice_xor(row[pivot], &pivot_row, row);
            }
        }
    }
    for (i, row) in rows.chunks_exact(width.max(1)).enumerate() {
        matrix[i * m..][..m].copy_from_slice(&row[m..]);
    }
    matrix
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_generator_starts_with_the_identity_and_has_known_parity() {
        let generator = Generator::new(Code::new(4, 2).unwrap());
        assert_eq!(generator.coefficient(2, 2), 1);
        assert_eq!(generator.coefficient(2, 3), 0);
        // Stored fragments depend on these: they never change.
        assert_eq!(generator.parity_rows(), [0x1b, 0x1c, 0x12, 0x14, 0x1c, 0x1b, 0x14, 0x12]);
        assert!(Generator::new(Code::new(3, 0).unwrap()).parity_rows().is_empty());
    }

    #[test]
    fn an_inverse_undoes_its_matrix() {
        // A zero in the first pivot forces a swap.
        let matrix = vec![0, 3, 1, 7, 0, 2, 5, 5, 9];
        let inverse = invert(matrix.clone(), 3);
        for (i, j) in (0..3).flat_map(|i| (0..3).map(move |j| (i, j))) {
            let product = (0..3)
                .map(|k| galois_8::mul(matrix[i * 3 + k], inverse[k * 3 + j]))
                .fold(0, galois_8::add);
            assert_eq!(product, u8::from(i == j));
        }
        assert!(invert(Vec::new(), 0).is_empty());
    }
}
