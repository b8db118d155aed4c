//! Which records count: pure.
//!
//! Every start of the directory is a run, and its records say with which commit it began. What an
//! earlier run wrote from there on was torn off by a crash and never became part of the state: a
//! later run *voids* it, whoever kept it. Of what is left the prefix without a gap is the journal.

use std::collections::BTreeMap;

use bytes::Bytes;

use crate::recovery::RunLabel;
use crate::store::Seq;

/// Records of many providers, by run.
pub type Runs = BTreeMap<RunLabel, BTreeMap<Seq, Bytes>>;

/// Records that are known to have been there and are missing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Gap {
    /// The first that is missing.
    pub first: Seq,
    /// The first behind it that is there.
    pub next: Seq,
    /// The last that is there.
    pub last: Seq,
}

impl std::fmt::Display for Gap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "records {} to {} of the journal are missing, while later ones up to {} are there",
            self.first,
            self.next - 1,
            self.last
        )
    }
}

/// The journal as far as it can be put together.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Merged {
    /// From the root's next on, without a gap.
    pub records: Vec<(Seq, Bytes)>,
    /// What follows a gap is lost.
    pub gap: Option<Gap>,
}

/// Puts the records behind `covers` together.
pub fn merge(runs: Runs, covers: Seq) -> Merged {
    let mut valid: BTreeMap<Seq, Bytes> = BTreeMap::new();
    let mut void_from = Seq::MAX;
    // From the latest run back: each voids what earlier ones have from its first on.
    for (label, records) in runs.into_iter().rev() {
        for (seq, body) in records {
            if seq > covers && seq < void_from {
                valid.entry(seq).or_insert(body);
            }
        }
        void_from = void_from.min(label.first_seq);
    }
    let mut merged = Merged::default();
    let last = valid.keys().next_back().copied();
    for (expected, (seq, body)) in (covers + 1..).zip(valid) {
        if seq != expected {
            merged.gap = last.map(|last| Gap { first: expected, next: seq, last });
            break;
        }
        merged.records.push((seq, body));
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn label(incarnation: u64, run: u64, first_seq: Seq) -> RunLabel {
        RunLabel { incarnation, run, first_seq, salt: [0; 16] }
    }

    fn records(seqs: impl Iterator<Item = Seq>, of: &str) -> BTreeMap<Seq, Bytes> {
        seqs.map(|seq| (seq, Bytes::from(format!("{of}{seq}")))).collect()
    }

    fn text(merged: &Merged) -> Vec<String> {
        merged.records.iter().map(|(_, b)| String::from_utf8(b.to_vec()).unwrap()).collect()
    }

    #[test]
    fn a_later_run_voids_what_was_torn_off() {
        let runs = Runs::from([
            (label(1, 1, 1), records(1..=8, "a")),
            (label(1, 2, 6), records(6..=7, "b")),
        ]);
        let merged = merge(runs, 3);
        assert_eq!(text(&merged), ["a4", "a5", "b6", "b7"]);
        assert_eq!(merged.gap, None, "a8 is no record any more");
        // A later incarnation voids too, whatever its run's number.
        let runs = Runs::from([
            (label(1, 9, 1), records(1..=8, "a")),
            (label(2, 3, 5), records(3..=5, "c")),
        ]);
        assert_eq!(text(&merge(runs, 2)), ["c3", "c4", "c5"]);
    }

    #[test]
    fn a_gap_ends_the_prefix_and_is_told() {
        let seqs = (4..=5).chain(8..=10);
        let merged = merge(Runs::from([(label(1, 1, 1), records(seqs, "a"))]), 3);
        assert_eq!(text(&merged), ["a4", "a5"]);
        let gap = merged.gap.unwrap();
        assert_eq!(gap, Gap { first: 6, next: 8, last: 10 });
        assert!(gap.to_string().contains("records 6 to 7"), "{gap}");
        let merged = merge(Runs::from([(label(1, 1, 1), records(5..=6, "a"))]), 3);
        assert_eq!(merged.gap, Some(Gap { first: 4, next: 5, last: 6 }));
        assert_eq!(merge(Runs::new(), 3), Merged::default());
    }

    proptest! {
        /// A directory that crashes and loses torn tails, providers that each have some of what was
        /// sent: what any of them has without a gap is the true journal.
        #[test]
        fn what_is_merged_is_what_the_directory_had(
            starts in prop::collection::vec((1u64..12, 0u64..4), 1..5),
            have in prop::collection::vec(any::<u16>(), 1..4),
        ) {
            let mut truth: Vec<Bytes> = Vec::new();
            let mut sent: Vec<(RunLabel, BTreeMap<Seq, Bytes>)> = Vec::new();
            for (run, (writes, torn)) in starts.iter().enumerate() {
                let keep = truth.len().saturating_sub(*torn as usize);
                truth.truncate(keep);
                let label = label(1, run as u64, truth.len() as Seq + 1);
                for number in 0..*writes {
                    truth.push(Bytes::from(format!("{run}.{number}")));
                }
                let all = (1..).zip(truth.iter().cloned()).collect();
                sent.push((label, all));
            }
            let mut runs = Runs::new();
            for (provider, bits) in have.iter().enumerate() {
                for (run, (label, records)) in sent.iter().enumerate() {
                    // The last run is always heard of by everyone: its first record is its start.
                    let upto = records.len() * ((bits >> (run * 3) & 7) as usize + 1) / 8;
                    let first = label.first_seq as usize;
                    let upto = if run + 1 == sent.len() { upto.max(first) } else { upto };
                    let kept = records.iter().take(upto).map(|(s, b)| (*s, b.clone()));
                    runs.entry(label.clone()).or_default().extend(kept);
                    let _ = provider;
                }
            }
            // A run that nobody has a record of says nothing.
            runs.retain(|_, records| !records.is_empty());
            let merged = merge(runs, 0);
            for (seq, body) in &merged.records {
                prop_assert_eq!(body, &truth[*seq as usize - 1]);
            }
            prop_assert_eq!(merged.gap, None);
        }
    }
}
