//! The packed counts against plain ones.

use proptest::prelude::*;

use super::*;
use crate::records::with_bit;

/// As it was written first: one signature after another, plainly.
fn add_plainly(
    totals: &mut Totals,
    signature: &Signature,
    count: u64,
    reach: &impl Fn(u32) -> Reach,
) {
    use FragmentState::{Durable, Gone, Late, Pending};
    let (mut reachable, mut expected, mut pending, mut young) = (0i64, 0i64, false, 0i64);
    let (mut kept, mut sound) = (0i64, 0i64);
    let (mut crowded, mut previous) = (false, None);
    for (provider, state) in &signature.fragments {
        let at = reach(*provider);
        *totals.fragments.entry(*provider).or_default() += count;
        crowded |= previous == Some(*provider);
        previous = Some(*provider);
        match state {
            Durable => {
                reachable += i64::from(at.reachable);
                kept += i64::from(at.expected);
                sound += i64::from(at.reachable && at.expected);
            }
            Pending => young += i64::from(at.reachable && at.expected),
            Late => {}
            Gone => {
                *totals.damaged.entry(*provider).or_default() += count;
                totals.summary.damaged_fragments += count;
            }
        }
        pending |= matches!(state, Pending | Late);
        expected += i64::from(*state != Gone && at.expected);
    }
    let s = i64::from(signature.s);
    let fragments = signature.fragments.len() as i64;
    // A distrusted provider's fragments can be read, and are nothing to spare.
    let left = if reachable < s { -1 } else { (sound - s).max(0) as i32 };
    let summary = &mut totals.summary;
    summary.total += count;
    *summary.by_redundancy.entry(left).or_default() += count;
    let durable = (kept - s).max(-1) as i32;
    *summary.by_durability.entry(durable).or_default() += count;
    summary.unsettled += if pending { count } else { 0 };
    summary.crowded += if crowded { count } else { 0 };
    if left >= 0 {
        summary.readable += count;
    } else if expected >= s {
        summary.waiting += count;
    } else {
        summary.lost += count;
    }
    if sound + young < fragments || crowded {
        totals.degraded += count;
    }
}

#[derive(Clone, Debug)]
struct Case {
    block: BlockRecord,
    late: bool,
    add: bool,
}

fn case() -> impl Strategy<Value = Case> {
    let providers = prop::collection::vec(1u32..9, 6);
    (providers, any::<[u8; 3]>(), any::<bool>(), prop::bool::weighted(0.7)).prop_map(
        |(providers, [durable, damaged, missing], late, add)| {
            let bits = |byte: u8| {
                (0..6).fold(bytes::Bytes::new(), |bitmap, index| {
                    with_bit(&bitmap, index, byte >> index & 1 == 1)
                })
            };
            let block = BlockRecord {
                s: 4,
                r: 2,
                providers,
                durable: bits(durable | 0b11_0000),
                damaged: bits(damaged & missing & 0b1111),
                missing: bits(missing & durable & 0b0011),
                ..Default::default()
            };
            Case { block, late, add }
        },
    )
}

proptest! {
    #[test]
    fn packed_counts_are_plain_ones(
        cases in prop::collection::vec(case(), 1..80),
        reaches in any::<[u8; 9]>(),
    ) {
        let mut counts = Counts::default();
        let mut plain: Vec<(Signature, u64)> = Vec::new();
        for case in cases {
            let signature = Signature::of(&case.block, case.late);
            let known = plain.iter().position(|(known, _)| *known == signature);
            match (case.add, known) {
                (true, Some(at)) => plain[at].1 += 1,
                (true, None) => plain.push((signature, 1)),
                (false, Some(at)) => {
                    plain[at].1 -= 1;
                    if plain[at].1 == 0 {
                        plain.swap_remove(at);
                    }
                }
                (false, None) => continue,
            }
            if case.add {
                counts.add(&case.block, case.late);
            } else {
                counts.remove(&case.block, case.late);
            }
        }
        let reach = |provider: u32| {
            let bits = reaches[provider as usize];
            // Most that are reachable count.
            Reach { reachable: bits & 1 == 1, expected: bits & 2 > 0 || bits & 5 == 1 }
        };
        let mut expected = Totals::default();
        for (signature, count) in &plain {
            add_plainly(&mut expected, signature, *count, &reach);
        }
        let found = counts.totals(reach);
        prop_assert_eq!(counts.signatures(), plain.len());
        prop_assert_eq!(counts.has_crowds(), expected.summary.crowded > 0);
        prop_assert_eq!(found, expected);
    }
}
