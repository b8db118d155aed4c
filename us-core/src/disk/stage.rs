//! Pages that were read ahead and that nobody has asked for yet.
//!
//! They are apart from the cache: a stream must not push out what is read again and again, and what is
//! read again and again must not push out a stream's pages before they are read (which then were
//! fetched twice). A page leaves when it is read, or when its stream was left for a while. What does
//! not fit is not read ahead.
//!
//! What was taken is remembered in the order of arrival no longer than the oldest page that was not:
//! a few seconds.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use super::read::PageKey;

/// A page that nobody asked for in this time goes.
const STALE_AFTER: Duration = Duration::from_secs(5);

/// The pages read ahead. Pure: times come from the caller.
#[derive(Debug)]
pub(super) struct Stage {
    bytes_max: usize,
    /// Of the pages here.
    bytes: usize,
    /// Of the pages on their way.
    coming_bytes: usize,
    pages: HashMap<PageKey, (Bytes, Instant)>,
    /// In the order in which they came; those that were taken are skipped.
    order: VecDeque<(PageKey, Instant)>,
}

impl Stage {
    /// Holds up to `bytes_max`, what is on its way included.
    pub fn new(bytes_max: usize) -> Self {
        let (pages, order) = (HashMap::new(), VecDeque::new());
        Self { bytes_max, bytes: 0, coming_bytes: 0, pages, order }
    }

    /// Keeps room for `bytes` that are to be read ahead; false where there is none.
    pub fn expect(&mut self, bytes: usize, now: Instant) -> bool {
        while let Some((key, came_at)) = self.order.front().copied() {
            let here = self.pages.get(&key).is_some_and(|(_, at)| *at == came_at);
            let stale = now.saturating_duration_since(came_at) >= STALE_AFTER;
            if here && !stale {
                break;
            }
            self.order.pop_front();
            if here {
                self.take(&key);
            }
        }
        let fits = self.bytes + self.coming_bytes + bytes <= self.bytes_max;
        self.coming_bytes += if fits { bytes } else { 0 };
        fits
    }

    /// A page came for which there was room kept.
    pub fn land(&mut self, key: PageKey, page: Bytes, now: Instant) {
        self.give_up(page.len());
        self.bytes += page.len();
        self.order.push_back((key, now));
        if let Some((before, _)) = self.pages.insert(key, (page, now)) {
            self.bytes -= before.len();
        }
    }

    /// Pages of so many bytes do not come.
    pub fn give_up(&mut self, bytes: usize) {
        self.coming_bytes = self.coming_bytes.saturating_sub(bytes);
    }

    /// A page, if it is here.
    pub fn get(&self, key: &PageKey) -> Option<Bytes> {
        self.pages.get(key).map(|(page, _)| page.clone())
    }

    /// The page was read: it leaves.
    pub fn take(&mut self, key: &PageKey) {
        if let Some((page, _)) = self.pages.remove(key) {
            self.bytes -= page.len();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::BlockId;

    fn key(page: u32) -> PageKey {
        (BlockId::from_bytes([7; 16]), page)
    }

    #[test]
    fn what_is_read_makes_room_and_what_is_not_stays_until_it_is_stale() {
        let mut stage = Stage::new(40);
        let now = Instant::now();
        for page in 0..4 {
            assert!(stage.expect(10, now));
            stage.land(key(page), Bytes::from(vec![page as u8; 10]), now);
        }
        assert!(!stage.expect(1, now), "full");
        assert_eq!(stage.get(&key(1)).unwrap()[0], 1);
        stage.take(&key(1));
        assert_eq!(stage.get(&key(1)), None);
        assert!(stage.expect(10, now));
        assert!(!stage.expect(1, now), "room is kept for what is on its way");
        stage.give_up(10);
        assert!(stage.expect(10, now));
        stage.land(key(9), Bytes::from(vec![9; 10]), now);
        let later = now + STALE_AFTER;
        assert!(stage.expect(20, later), "a stream that was left makes room");
        assert_eq!((stage.get(&key(0)), stage.get(&key(9))), (None, None));
    }

    /// One page that nobody took, at the front of a stage that was never full, had every page behind
    /// it remembered for ever.
    #[test]
    fn what_was_taken_is_not_remembered_for_long() {
        let mut stage = Stage::new(1000);
        let begun = Instant::now();
        for number in 0..100_000u32 {
            let now = begun + Duration::from_millis(u64::from(number));
            assert!(stage.expect(10, now));
            stage.land(key(number), Bytes::from_static(&[0; 10]), now);
            if number % 20_000 != 7 {
                stage.take(&key(number));
            }
        }
        let most = STALE_AFTER.as_millis() as usize + 2;
        assert!(stage.order.len() <= most && stage.pages.len() <= 1, "{}", stage.order.len());
    }

    #[test]
    fn counts_never_drift() {
        let mut stage = Stage::new(1000);
        let now = Instant::now();
        for round in 0..500u32 {
            assert!(stage.expect(10, now), "{round}");
            stage.land(key(round % 7), Bytes::from_static(&[0; 10]), now);
            stage.take(&key((round + 3) % 7));
            stage.take(&key(round % 7));
        }
        (0..7).for_each(|page| stage.take(&key(page)));
        assert_eq!((stage.bytes, stage.coming_bytes), (0, 0));
        assert!(stage.expect(1, now) && stage.order.is_empty(), "nothing taken is remembered");
    }
}
