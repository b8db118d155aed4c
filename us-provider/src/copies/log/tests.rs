//! The log of records: what was acknowledged survives, what was torn does not show, and nothing goes
//! before something else has it.

use super::*;

const LIMIT: u64 = 1 << 30;

fn label(incarnation: u64, run: u64, first_seq: u64) -> Label {
    Label { incarnation, run, first_seq, salt: [run as u8; 16] }
}

fn part(seq: u64, part: u32, last: bool, bytes: usize) -> RecordPart {
    RecordPart { seq, part, last, sealed: vec![seq as u8; bytes].into() }
}

fn records(label: Label, seqs: std::ops::RangeInclusive<u64>) -> StoreRecords {
    label.message(seqs.map(|seq| part(seq, 0, true, 100)).collect())
}

fn root(covers_seq: u64, label: Label) -> StoreRoot {
    StoreRoot {
        sequence: 1,
        covers_seq,
        incarnation: label.incarnation,
        run: label.run,
        run_first_seq: label.first_seq,
        ..StoreRoot::default()
    }
}

struct Here {
    data: tempfile::TempDir,
    log: RecordLog,
}

impl Here {
    fn new() -> Self {
        let data = tempfile::tempdir().unwrap();
        let log = RecordLog::open(&dir_of(data.path()), LIMIT).unwrap();
        Self { data, log }
    }

    fn again(&mut self) {
        self.log = RecordLog::open(&dir_of(self.data.path()), LIMIT).unwrap();
    }

    fn store(&mut self, label: Label, seqs: std::ops::RangeInclusive<u64>) -> u64 {
        let stored = self.log.append(&records(label, seqs)).unwrap();
        self.log.sync().unwrap();
        stored
    }

    /// Everything that can be read back, as (run, seq, part).
    fn read(&self) -> Vec<(u64, u64, u32)> {
        let mut reading = Reading::new(self.data.path()).unwrap();
        let mut found = Vec::new();
        while let Some(message) = reading.next_message().unwrap() {
            let run = message.run;
            found.extend(message.parts.iter().map(|part| (run, part.seq, part.part)));
        }
        found
    }

    fn files(&self) -> Vec<PathBuf> {
        let dir = dir_of(self.data.path());
        numbers(&dir).unwrap().into_iter().map(|number| path_of(&dir, number)).collect()
    }
}

fn run_of(run: u64, seqs: std::ops::RangeInclusive<u64>) -> Vec<(u64, u64, u32)> {
    seqs.map(|seq| (run, seq, 0)).collect()
}

#[test]
fn records_survive_a_restart_and_are_not_stored_twice() {
    let mut here = Here::new();
    let one = label(1, 1, 1);
    assert_eq!(here.store(one, 1..=5), 5);
    assert_eq!(here.store(one, 4..=8), 8, "what it has is acknowledged, not written again");
    here.again();
    let held = here.log.held().unwrap();
    assert_eq!((held.run, held.first_seq, held.last_seq), (1, 1, 8));
    assert_eq!(here.store(one, 9..=10), 10);
    assert_eq!(here.read(), run_of(1, 1..=10));
    assert_eq!(here.files().len(), 2, "a start begins a file");
}

#[test]
fn a_torn_tail_is_cut_wherever_it_was_torn() {
    let mut here = Here::new();
    here.store(label(1, 1, 1), 1..=3);
    let path = here.files().pop().unwrap();
    let with_zeros = fs::read(&path).unwrap();
    here.again();
    let whole = fs::read(&path).unwrap();
    assert!(with_zeros.starts_with(&whole) && with_zeros.len() > whole.len());
    let frame = (whole.len() - HEADER_BYTES) / 3;
    for (cut, zeros) in (HEADER_BYTES..whole.len()).flat_map(|cut| [(cut, 0), (cut, 9999)]) {
        fs::write(&path, [&whole[..cut], &vec![0; zeros]].concat()).unwrap();
        here.again();
        let left = ((cut - HEADER_BYTES) / frame) as u64;
        assert_eq!(here.read(), run_of(1, 1..=left), "cut at {cut}");
        let held = here.log.held().map(|held| held.last_seq);
        assert_eq!(held, (left > 0).then_some(left));
        assert_eq!(fs::metadata(&path).unwrap().len(), (HEADER_BYTES as u64) + left * frame as u64);
        // It goes on behind the cut.
        assert_eq!(here.store(label(1, 1, 1), left + 1..=4), 4);
        assert_eq!(here.read(), run_of(1, 1..=4));
        for path in here.files() {
            fs::remove_file(path).unwrap();
        }
    }
}

#[test]
fn a_flipped_bit_ends_its_file_and_hides_no_other() {
    let mut here = Here::new();
    here.store(label(1, 1, 1), 1..=3);
    here.again();
    here.store(label(1, 1, 1), 4..=6);
    let path = here.files()[0].clone();
    let mut bytes = fs::read(&path).unwrap();
    let at = bytes.len() - 150;
    bytes[at] ^= 1;
    fs::write(&path, bytes).unwrap();
    here.again();
    assert_eq!(here.read(), [run_of(1, 1..=1), run_of(1, 4..=6)].concat());
}

#[test]
fn a_root_lets_covered_and_void_records_go() {
    let mut here = Here::new();
    let one = label(1, 1, 1);
    here.store(one, 1..=4);
    here.again();
    here.store(one, 5..=9);
    here.log.drop_covered(&root(4, one));
    assert_eq!(here.read(), run_of(1, 5..=9));
    here.log.drop_covered(&root(8, one));
    assert_eq!(here.read(), run_of(1, 5..=9), "record 9 is not covered");
    // A later run began at 7: of the earlier one 5 and 6 count, and the root covers them.
    here.log.drop_covered(&root(6, label(1, 2, 7)));
    assert_eq!(here.read(), []);
    assert_eq!(here.store(label(1, 2, 7), 7..=8), 8, "it goes on in a new file");
    // A directory with an old state does not make a later one's records go.
    here.log.drop_covered(&root(7, one));
    assert_eq!(here.read(), run_of(2, 7..=8));
}

#[test]
fn a_run_goes_when_a_later_one_has_repeated_it() {
    let mut here = Here::new();
    here.store(label(1, 1, 1), 3..=9);
    let two = label(1, 2, 8);
    here.store(two, 3..=6);
    here.log.drop_superseded();
    assert_eq!(here.read().len(), 7 + 4, "7 is only in the first run");
    here.store(two, 7..=7);
    here.log.drop_superseded();
    assert_eq!(here.read(), run_of(2, 3..=7));
    // A run that begins behind leaves what it does not have.
    let three = label(2, 1, 8);
    here.store(three, 5..=9);
    here.log.drop_superseded();
    assert_eq!(here.read().len(), 5 + 5);
}

#[test]
fn long_records_come_in_parts_and_count_when_whole() {
    let mut here = Here::new();
    let one = label(1, 1, 1);
    let message = one.message(vec![part(1, 0, true, 10), part(2, 0, false, 1000)]);
    assert_eq!(here.log.append(&message).unwrap(), 1);
    here.log.sync().unwrap();
    here.again();
    assert_eq!(here.log.held().unwrap().last_seq, 1);
    let message = one.message(vec![part(2, 0, false, 1000), part(2, 1, true, 1000)]);
    assert_eq!(here.log.append(&message).unwrap(), 2);
    let message = one.message(vec![part(5, 0, true, 10)]);
    assert_eq!(here.log.append(&message).unwrap(), 5, "a new stretch, behind a root");
    here.log.sync().unwrap();
    assert_eq!(here.log.held().map(|held| (held.first_seq, held.last_seq)), Some((5, 5)));
}

#[test]
fn above_its_limit_it_refuses_clearly_and_goes_on_below() {
    let data = tempfile::tempdir().unwrap();
    let mut log = RecordLog::open(&dir_of(data.path()), 2_000).unwrap();
    let one = label(1, 1, 1);
    assert_eq!(log.append(&records(one, 1..=10)).unwrap(), 10);
    log.sync().unwrap();
    let error = log.append(&records(one, 11..=20)).unwrap_err();
    assert!(matches!(error, LogError::Full { limit: 2_000, .. }), "{error}");
    assert!(error.to_string().contains("directory_copies"), "{error}");
    log.drop_covered(&root(10, one));
    assert_eq!(log.append(&records(one, 11..=20)).unwrap(), 20);
    let nonsense = StoreRecords { salt: vec![1].into(), ..records(one, 21..=21) };
    assert!(matches!(log.append(&nonsense), Err(LogError::Invalid { .. })));
}

/// A provider was killed before the fdatasync of records it had taken; the next run said it had them,
/// the directory acknowledged on its word, and the power took them. Now a start syncs what it reads.
#[test]
fn what_a_start_says_it_holds_survives_the_power() {
    let mut here = Here::new();
    here.store(label(1, 1, 1), 1..=5);
    let path = here.files().pop().unwrap();
    let bytes = fs::metadata(&path).unwrap().len();
    let platter = disk::Platter::hold(here.data.path()).unwrap();
    platter.unsynced_behind(&path, bytes - 200);
    here.again();
    assert_eq!(here.log.held().unwrap().last_seq, 5);
    platter.cut(|_| true).unwrap();
    assert_eq!(here.read(), run_of(1, 1..=5));
}
