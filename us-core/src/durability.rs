//! How long a block can be expected to live: what repair is ordered by, and codes are chosen by
//! ([`plan`]).
//!
//! Pure arithmetic over the hazards of the block's holders. A holder's *hazard* is the rate at which
//! it dies for good, in deaths a second; holders die independently of each other, which placement is
//! there to make nearly true. Called by the directory's repair queue and by the planner.

pub mod plan;

/// What stands for "as good as never", so that orders and sums stay finite: 10^12 years.
pub const FOREVER_S: f64 = 3.15e19;

/// The expected seconds until fewer than `s` of the holders are alive, when nothing is repaired.
///
/// With n holders of equal hazard h the time to the k-th death is h⁻¹ · Σ 1/(n-i), i < k. For
/// unequal hazards the sum is taken over the hazards left when the holders die in the order of their
/// hazards, the likeliest first: this is exact for equal ones and an upper bound for others that
/// keeps the order of blocks that differ in holders or in number.
///
/// 0 when fewer than `s` are left already.
pub fn expected_time_to_loss_s(s: usize, hazards: &mut [f64]) -> f64 {
    if hazards.len() < s {
        return 0.0;
    }
    hazards.sort_unstable_by(|left, right| right.total_cmp(left));
    let mut left: f64 = hazards.iter().sum();
    let mut expected = 0.0;
    for hazard in hazards.iter().take(hazards.len() - s + 1) {
        if left <= 1.0 / FOREVER_S {
            return FOREVER_S;
        }
        expected += 1.0 / left;
        left -= hazard;
    }
    expected.min(FOREVER_S)
}

/// The probability that fewer than `s` of the holders are alive at the end, when holder i is with
/// probability `survival[i]`. Exact (Poisson binomial), in O(n · s).
pub fn loss_probability(s: usize, survival: &[f64]) -> f64 {
    // alive[k]: the probability that exactly k are alive; s and more are not told apart.
    let mut alive = vec![0.0; s + 1];
    alive[0] = 1.0;
    for lives in survival {
        for count in (0..=s).rev() {
            let stays = if count == s { alive[s] } else { alive[count] * (1.0 - lives) };
            let comes = if count == 0 { 0.0 } else { alive[count - 1] * lives };
            alive[count] = stays + comes;
        }
    }
    alive[..s].iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn equal_hazards_give_the_harmonic_sum() {
        let year = 365.25 * 86_400.0;
        let mut six = [1.0 / year; 6];
        let expected = year * (1.0 / 6.0 + 1.0 / 5.0 + 1.0 / 4.0);
        let found = expected_time_to_loss_s(4, &mut six);
        assert!((found / expected - 1.0).abs() < 1e-12, "{found} {expected}");
        assert_eq!(expected_time_to_loss_s(4, &mut [1.0; 3]), 0.0);
        assert_eq!(expected_time_to_loss_s(1, &mut [0.0; 3]), FOREVER_S);
    }

    /// All 2^n outcomes, one by one.
    fn slow(s: usize, survival: &[f64]) -> f64 {
        let outcomes = 0u32..1 << survival.len();
        let lost = outcomes.filter(|alive| (alive.count_ones() as usize) < s);
        lost.map(|alive| {
            let each = survival.iter().enumerate();
            each.map(|(at, lives)| if alive >> at & 1 == 1 { *lives } else { 1.0 - lives })
                .product::<f64>()
        })
        .sum()
    }

    proptest! {
        #[test]
        fn losses_are_those_of_all_outcomes(
            s in 0usize..8, survival in proptest::collection::vec(0.0f64..=1.0, 0..10),
        ) {
            let (fast, slow) = (loss_probability(s, &survival), slow(s, &survival));
            prop_assert!((fast - slow).abs() < 1e-9, "{} {}", fast, slow);
        }

        #[test]
        fn a_holder_more_is_never_worse_and_a_worse_holder_never_better(
            s in 1usize..6, hazards in proptest::collection::vec(1e-9f64..1e-3, 6..12),
            at in 0usize..6, factor in 1.0f64..1e4,
        ) {
            let time = |hazards: &[f64]| expected_time_to_loss_s(s, &mut hazards.to_vec());
            let all = time(&hazards);
            prop_assert!(time(&hazards[1..]) <= all * (1.0 + 1e-9));
            let mut worse = hazards.clone();
            worse[at] *= factor;
            prop_assert!(time(&worse) <= all * (1.0 + 1e-9));
        }
    }
}
