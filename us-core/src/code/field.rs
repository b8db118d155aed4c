//! GF(2^8) with polynomial 0x11D: logarithms, and what multiplication by a constant looks like to
//! each instruction set. The tables are made at compile time; the tests hold them against the crate.

/// x^8 + x^4 + x^3 + x^2 + 1, without its x^8.
const POLYNOMIAL: u8 = 0x1D;

/// Elements but 0: exponents count modulo this.
pub const ORDER: usize = 255;

/// For each c the products of c with 0..16, then with 0x00, 0x10, .. 0xF0: c · x is the sum of two
/// look-ups, each of half a byte.
#[cfg(any(target_arch = "x86_64", test))]
pub static NIBBLES: [[u8; 32]; 256] = {
    let mut tables = [[0; 32]; 256];
    let mut c = 0;
    while c < 256 {
        let mut nibble = 0;
        while nibble < 16 {
            tables[c][nibble] = multiply(c as u8, nibble as u8);
            tables[c][16 + nibble] = multiply(c as u8, (nibble << 4) as u8);
            nibble += 1;
        }
        c += 1;
    }
    tables
};

/// For each c the 8 x 8 bit matrix of x -> c · x, as the affine instruction wants it: byte 7 - i is
/// the mask of the bits of x that sum to bit i of the product.
#[cfg(any(target_arch = "x86_64", test))]
pub static AFFINE: [u64; 256] = {
    let mut matrices = [0; 256];
    let mut c = 0;
    while c < 256 {
        let mut column = 0;
        while column < 8 {
            let product = multiply(c as u8, 1 << column);
            let mut bit = 0;
            while bit < 8 {
                let set = (product >> bit & 1) as u64;
                matrices[c] |= set << ((7 - bit) * 8 + column);
                bit += 1;
            }
            column += 1;
        }
        c += 1;
    }
    matrices
};

/// Powers of the generator 2; [`LOG`] is the inverse.
pub static EXP: [u8; ORDER] = {
    let mut powers = [1; ORDER];
    let mut exponent = 1;
    while exponent < ORDER {
        powers[exponent] = multiply(powers[exponent - 1], 2);
        exponent += 1;
    }
    powers
};

/// The logarithm to base 2 of every element but 0, which has none: 0 stands there.
pub static LOG: [u8; 256] = {
    let mut logarithms = [0; 256];
    let mut exponent = 0;
    while exponent < ORDER {
        logarithms[EXP[exponent] as usize] = exponent as u8;
        exponent += 1;
    }
    logarithms
};

/// The product in the field, by shifting and adding.
const fn multiply(mut a: u8, mut b: u8) -> u8 {
    let mut product = 0;
    while b != 0 {
        if b & 1 != 0 {
            product ^= a;
        }
        let carry = a >> 7;
        a = (a << 1) ^ (carry * POLYNOMIAL);
        b >>= 1;
    }
    product
}

#[cfg(test)]
mod tests {
    use super::*;
    use reed_solomon_erasure::galois_8;

    #[test]
    fn every_product_is_that_of_the_crate() {
        for (c, x) in (0..=255u8).flat_map(|c| (0..=255u8).map(move |x| (c, x))) {
            let product = galois_8::mul(c, x);
            assert_eq!(multiply(c, x), product);
            let nibbles = &NIBBLES[c as usize];
            assert_eq!(nibbles[x as usize & 15] ^ nibbles[16 + (x as usize >> 4)], product);
            let rows = AFFINE[c as usize].to_be_bytes();
            let bits = (0..8).map(|bit| ((rows[bit] & x).count_ones() as u8 & 1) << bit);
            assert_eq!(bits.sum::<u8>(), product);
            if c != 0 && x != 0 {
                let exponent = LOG[c as usize] as usize + LOG[x as usize] as usize;
                assert_eq!(EXP[exponent % ORDER], product);
            }
        }
    }
}
