//! How long transfers take: every provider has an uplink and a downlink, each used by one transfer
//! after the other in the order they were asked for. No latency, no loss.

use us_proto::v1::RebuildPath;

/// A line to a provider, in bytes a second.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Line {
    /// From it.
    pub up: f64,
    /// To it.
    pub down: f64,
}

impl Line {
    /// 100 Mb/s both ways.
    pub const LAN: Self = Self { up: 12_500_000.0, down: 12_500_000.0 };
    /// 128 kb/s up, 10 Mb/s down.
    pub const ADSL: Self = Self { up: 16_000.0, down: 1_250_000.0 };
}

/// When a provider's links are free again.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Busy {
    up_ms: f64,
    down_ms: f64,
}

/// What one rebuild moves.
#[derive(Clone, Debug)]
pub struct Transfer {
    /// How.
    pub path: RebuildPath,
    /// Providers that send, as indexes, with the number of their site. Not the rebuilder itself.
    pub senders: Vec<(usize, u32)>,
    /// Who makes the fragment.
    pub rebuilder: usize,
    /// Fragments it needs: fewer than senders, where those take turns.
    pub fragments: usize,
    /// Of one fragment.
    pub bytes: f64,
}

impl Transfer {
    /// Of a star: what is received, and what each sender sends.
    fn bytes_of_a_star(&self) -> (f64, f64) {
        let all = self.bytes * self.fragments as f64;
        (all, all / self.senders.len().max(1) as f64)
    }
}

/// All links.
#[derive(Clone, Debug)]
pub struct Links {
    line: Line,
    busy: Vec<Busy>,
    /// Bytes each has sent.
    pub sent: Vec<f64>,
}

impl Links {
    /// Links of one kind.
    pub fn new(line: Line) -> Self {
        Self { line, busy: Vec::new(), sent: Vec::new() }
    }

    fn grow(&mut self, provider: usize) {
        if provider >= self.busy.len() {
            self.busy.resize(provider + 1, Busy::default());
            self.sent.resize(provider + 1, 0.0);
        }
    }

    fn send(&mut self, from: usize, now_ms: f64, bytes: f64) -> f64 {
        self.grow(from);
        let busy = &mut self.busy[from];
        busy.up_ms = busy.up_ms.max(now_ms) + bytes / self.line.up * 1000.0;
        self.sent[from] += bytes;
        busy.up_ms
    }

    fn receive(&mut self, to: usize, now_ms: f64, bytes: f64) -> f64 {
        self.grow(to);
        let busy = &mut self.busy[to];
        busy.down_ms = busy.down_ms.max(now_ms) + bytes / self.line.down * 1000.0;
        busy.down_ms
    }

    /// A chain of partial sums: every link of it carries one fragment, all at the same time.
    fn chain(&mut self, nodes: &[usize], now_ms: f64, bytes: f64) -> f64 {
        nodes.iter().for_each(|node| self.grow(*node));
        let hops = || nodes.windows(2).map(|pair| (pair[0], pair[1]));
        let begin_ms = hops().fold(now_ms, |latest, (from, to)| {
            latest.max(self.busy[from].up_ms).max(self.busy[to].down_ms)
        });
        let end_ms = begin_ms + bytes / self.line.up.min(self.line.down) * 1000.0;
        for (from, to) in hops() {
            self.busy[from].up_ms = end_ms;
            self.busy[to].down_ms = end_ms;
            self.sent[from] += bytes;
        }
        end_ms
    }

    /// Begins a transfer; returns when it ends.
    pub fn begin(&mut self, transfer: &Transfer, now_ms: u64) -> u64 {
        let (now_ms, bytes) = (now_ms as f64, transfer.bytes);
        let senders = &transfer.senders;
        let end_ms = match transfer.path {
            RebuildPath::Chain => {
                let nodes = senders.iter().map(|(node, _)| *node).chain([transfer.rebuilder]);
                self.chain(&nodes.collect::<Vec<_>>(), now_ms, bytes)
            }
            RebuildPath::Sites => {
                let mut sites: Vec<u32> = senders.iter().map(|(_, site)| *site).collect();
                sites.sort_unstable();
                sites.dedup();
                let mut end_ms = now_ms;
                for site in sites {
                    let here = senders.iter().filter(|(_, at)| *at == site).map(|(node, _)| *node);
                    let nodes: Vec<usize> = here.chain([transfer.rebuilder]).collect();
                    end_ms = end_ms.max(self.chain(&nodes, now_ms, bytes));
                }
                end_ms
            }
            RebuildPath::Unspecified | RebuildPath::Star | RebuildPath::RotatedStar => {
                let (all, each) = transfer.bytes_of_a_star();
                let sent = senders.iter().map(|(node, _)| self.send(*node, now_ms, each));
                let sent_ms = sent.fold(now_ms, f64::max);
                sent_ms.max(self.receive(transfer.rebuilder, now_ms, all))
            }
        };
        end_ms.ceil() as u64
    }
}

impl Links {
    /// A transfer is broken off: what was not sent yet is not sent. Those behind it keep the times
    /// they were given; those to come are sooner. (A chain is not worth the trouble.)
    pub fn cancel(&mut self, transfer: &Transfer, now_ms: u64) {
        if matches!(transfer.path, RebuildPath::Chain | RebuildPath::Sites) {
            return;
        }
        let (now_ms, (all, each)) = (now_ms as f64, transfer.bytes_of_a_star());
        for (sender, _) in &transfer.senders {
            let busy = &mut self.busy[*sender];
            let saved_ms = (each / self.line.up * 1000.0).min((busy.up_ms - now_ms).max(0.0));
            busy.up_ms -= saved_ms;
            self.sent[*sender] -= saved_ms / 1000.0 * self.line.up;
        }
        self.grow(transfer.rebuilder);
        let busy = &mut self.busy[transfer.rebuilder];
        let saved_ms = (all / self.line.down * 1000.0).min((busy.down_ms - now_ms).max(0.0));
        busy.down_ms -= saved_ms;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Seconds one rebuild of a 1 MB fragment takes on idle lines.
    fn seconds(line: Line, path: RebuildPath, senders: usize, fragments: usize) -> f64 {
        let senders: Vec<(usize, u32)> = (0..senders).map(|at| (at, at as u32 % 4)).collect();
        let (rebuilder, bytes) = (99, 1e6);
        let transfer = Transfer { path, senders, rebuilder, fragments, bytes };
        Links::new(line).begin(&transfer, 0) as f64 / 1000.0
    }

    /// The figures of PLACEMENT.md: LAN star 1.28 s, chain 0.08 s and more; ADSL star 62 s.
    #[test]
    fn paths_take_what_they_should() {
        use RebuildPath::{Chain, RotatedStar, Sites, Star};
        assert!((seconds(Line::LAN, Star, 16, 16) - 1.28).abs() < 0.01);
        assert!((seconds(Line::LAN, Chain, 16, 16) - 0.08).abs() < 0.01);
        assert!((seconds(Line::LAN, Sites, 16, 16) - 0.32).abs() < 0.01);
        assert!((seconds(Line::ADSL, Star, 16, 16) - 62.5).abs() < 0.01);
        assert!((seconds(Line::ADSL, Chain, 16, 16) - 62.5).abs() < 0.01);
        let rotated = seconds(Line::ADSL, RotatedStar, 30, 16);
        assert!((rotated - 62.5 * 16.0 / 30.0).abs() < 0.01);
    }

    #[test]
    fn a_busy_uplink_makes_the_next_wait() {
        let mut links = Links::new(Line { up: 1000.0, down: 1e9 });
        let (path, fragments, bytes) = (RebuildPath::Star, 1, 1000.0);
        let transfer = Transfer { path, senders: vec![(1, 0)], rebuilder: 2, fragments, bytes };
        assert_eq!((links.begin(&transfer, 0), links.begin(&transfer, 500)), (1000, 2000));
        assert_eq!(links.begin(&transfer, 9000), 10_000);
        links.cancel(&transfer, 9400);
        assert_eq!((links.begin(&transfer, 9400), links.sent[1]), (10_400, 3400.0));
    }
}
