//! How fast the erasure code is, against the crate that defines it, our own portable kernel and a
//! copy of the same bytes.
//!
//! `cargo bench -p us-core --bench code` prints everything in about a minute; `-- --help` tells how
//! to ask for less. All contenders of a row run in turns in one process, and the best round of each
//! counts. GB/s (10^9) are of data in: the s data fragments. The copy moves half of the bytes that
//! an encode touches to the other half, so that both work in caches of the same size. All buffers
//! lie on 64-byte lines unless `--stagger-bytes` says otherwise.

use std::hint::black_box;
use std::time::{Duration, Instant};

use clap::Parser;
use reed_solomon_erasure::galois_8::ReedSolomon;
use us_core::code::{ErasureCode, Kernel};
use us_core::geometry::Code;

/// Time a contender gets in one round.
const SLICE: Duration = Duration::from_millis(6);
/// A contender this far over its time sits out the remaining rounds, after its second.
const TIME_MAX: Duration = Duration::from_millis(250);
/// Fragments of the table of fixed costs.
const SMALL_BYTES: usize = 64;

/// Measures the erasure code.
#[derive(Parser)]
struct Options {
    /// Codes to measure, as S+R.
    #[arg(long = "code", default_values_t = ["4+2", "10+4", "20+11", "3+5"].map(str::to_owned))]
    codes: Vec<String>,
    /// Block sizes (all data fragments together) in KiB.
    #[arg(long = "block-kib", default_values_t = [256, 1 << 10, 4 << 10, 64 << 10])]
    blocks_kib: Vec<usize>,
    /// The kernel to measure, by name; the fastest of this machine unless given.
    #[arg(long)]
    kernel: Option<String>,
    /// Rounds; the best one counts.
    #[arg(long, default_value_t = 15)]
    rounds: usize,
    /// Moves each fragment this many bytes further off its 64-byte line than the one before.
    #[arg(long, default_value_t = 0)]
    stagger_bytes: usize,
    /// Leave out the slow contenders: the portable kernel and the crate.
    #[arg(long)]
    fast_only: bool,
    /// Given by `cargo bench`; means nothing here.
    #[arg(long, hide = true)]
    bench: bool,
}

/// Slices of one length in one allocation, the first on a 64-byte line.
struct Buffers {
    memory: Vec<u8>,
    lead: usize,
    stride: usize,
    bytes: usize,
}

impl Buffers {
    const LINE_BYTES: usize = 64;

    fn new(count: usize, bytes: usize, stagger_bytes: usize) -> Self {
        let stride = bytes.next_multiple_of(Self::LINE_BYTES) + stagger_bytes;
        let memory: Vec<u8> = (0..count * stride + Self::LINE_BYTES)
            .map(|i| (i.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 40) as u8)
            .collect();
        let lead = memory.as_ptr().align_offset(Self::LINE_BYTES);
        Self { memory, lead, stride, bytes }
    }

    fn slices(&self) -> Vec<&[u8]> {
        let chunks = self.memory[self.lead..].chunks_exact(self.stride);
        chunks.map(|chunk| &chunk[..self.bytes]).collect()
    }

    fn slices_mut(&mut self) -> Vec<&mut [u8]> {
        let chunks = self.memory[self.lead..].chunks_exact_mut(self.stride);
        chunks.map(|chunk| &mut chunk[..self.bytes]).collect()
    }
}

/// One code at one block size, with room for all inputs and results.
struct Subject {
    code: Code,
    own: ErasureCode,
    portable: ErasureCode,
    oracle: ReedSolomon,
    data: Buffers,
    parity: Buffers,
    rebuilt: Buffers,
    copy: Buffers,
}

impl Subject {
    fn new(code: Code, block_bytes: usize, kernel: Kernel, stagger_bytes: usize) -> Self {
        let bytes = block_bytes.div_ceil(code.s());
        Self {
            code,
            own: ErasureCode::with_kernel(code, kernel),
            portable: ErasureCode::with_kernel(code, Kernel::PORTABLE),
            oracle: ReedSolomon::new(code.s(), code.r()).expect("a valid code"),
            data: Buffers::new(code.s(), bytes, stagger_bytes),
            parity: Buffers::new(code.r(), bytes, stagger_bytes),
            rebuilt: Buffers::new(code.r(), bytes, stagger_bytes),
            copy: Buffers::new(2, bytes * code.fragments() / 2, 0),
        }
    }

    fn memcpy(&mut self) {
        let mut copy = self.copy.slices_mut();
        let [from, to] = &mut copy[..] else { unreachable!("two buffers") };
        to.copy_from_slice(black_box(from));
        black_box(copy);
    }

    fn encode(&mut self, portable: bool) {
        let erasure_code = if portable { &self.portable } else { &self.own };
        let mut parity = self.parity.slices_mut();
        erasure_code
            .encode(black_box(&self.data.slices()), &mut parity)
            .expect("the slices fit the code");
        black_box(parity);
    }

    fn encode_by_crate(&mut self) {
        let mut parity = self.parity.slices_mut();
        self.oracle
            .encode_sep(black_box(&self.data.slices()), &mut parity)
            .expect("the slices fit the code");
        black_box(parity);
    }

    /// Rebuilds the first `losses` fragments from the s that follow.
    fn decode(&mut self, losses: usize) {
        let fragments = self.data.slices().into_iter().chain(self.parity.slices());
        let present: Vec<(usize, &[u8])> =
            fragments.enumerate().skip(losses).take(self.code.s()).collect();
        let rebuilt = self.rebuilt.slices_mut().into_iter();
        let mut wanted: Vec<(usize, &mut [u8])> = rebuilt.take(losses).enumerate().collect();
        self.own.reconstruct(black_box(&present), &mut wanted).expect("s are present");
        black_box(wanted);
    }

    fn decode_by_crate(&mut self, losses: usize) {
        let fragments = self.data.slices_mut().into_iter().chain(self.parity.slices_mut());
        let mut fragments: Vec<(&mut [u8], bool)> =
            fragments.enumerate().map(|(i, fragment)| (fragment, i >= losses)).collect();
        self.oracle.reconstruct(black_box(&mut fragments)).expect("s are present");
    }

    /// Stops the program when what is measured is wrong.
    fn check(&mut self) {
        self.encode(false);
        let losses = self.code.r();
        self.decode(losses);
        let fragments = [self.data.slices(), self.parity.slices()].concat();
        assert!(self.oracle.verify(&fragments).expect("the slices fit the code"));
        assert!(self.rebuilt.slices() == fragments[..losses]);
    }
}

/// What takes turns in a row.
#[derive(Clone, Copy)]
enum Contender {
    Memcpy,
    Encode,
    DecodeOne,
    DecodeAll,
    PortableEncode,
    CrateEncode,
    CrateDecodeOne,
    CrateDecodeAll,
}

impl Contender {
    const ALL: [Self; 8] = [
        Self::Memcpy,
        Self::Encode,
        Self::DecodeOne,
        Self::DecodeAll,
        Self::PortableEncode,
        Self::CrateEncode,
        Self::CrateDecodeOne,
        Self::CrateDecodeAll,
    ];
    /// The first this many are not slow.
    const FAST: usize = 4;

    fn run(self, subject: &mut Subject) {
        let r = subject.code.r();
        match self {
            Self::Memcpy => subject.memcpy(),
            Self::Encode => subject.encode(false),
            Self::DecodeOne => subject.decode(1),
            Self::DecodeAll => subject.decode(r),
            Self::PortableEncode => subject.encode(true),
            Self::CrateEncode => subject.encode_by_crate(),
            Self::CrateDecodeOne => subject.decode_by_crate(1),
            Self::CrateDecodeAll => subject.decode_by_crate(r),
        }
    }

    fn bytes(self, subject: &Subject) -> usize {
        match self {
            Self::Memcpy => subject.copy.bytes,
            _ => subject.data.bytes * subject.code.s(),
        }
    }
}

/// The best time of one run of each contender, in seconds.
fn measure(subject: &mut Subject, contenders: &[Contender], rounds: usize) -> Vec<f64> {
    let mut best = vec![f64::INFINITY; contenders.len()];
    let mut spent = vec![Duration::ZERO; contenders.len()];
    for round in 0..rounds {
        for (i, contender) in contenders.iter().enumerate() {
            if round >= 2 && spent[i] >= TIME_MAX {
                continue;
            }
            contender.run(subject);
            let (start, mut runs) = (Instant::now(), 0);
            while start.elapsed() < SLICE {
                contender.run(subject);
                runs += 1;
            }
            best[i] = best[i].min(start.elapsed().as_secs_f64() / f64::from(runs));
            spent[i] += start.elapsed();
        }
    }
    best
}

fn size(kib: usize) -> String {
    if kib < 1 << 10 { format!("{kib} KiB") } else { format!("{} MiB", kib >> 10) }
}

fn print_throughput(options: &Options, codes: &[Code], kernel: Kernel) {
    println!("GB/s of data in; (x) is the ratio to memcpy in the same row\n");
    println!(
        "| code | block | memcpy | encode | decode 1 | decode r | portable encode | crate encode \
         | crate decode 1 | crate decode r |"
    );
    println!("|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|");
    let contenders = &Contender::ALL[..];
    let contenders = if options.fast_only { &contenders[..Contender::FAST] } else { contenders };
    for code in codes {
        for kib in &options.blocks_kib {
            let mut subject = Subject::new(*code, kib << 10, kernel, options.stagger_bytes);
            subject.check();
            let best = measure(&mut subject, contenders, options.rounds);
            let rates = contenders.iter().zip(best);
            let rates = rates.map(|(c, seconds)| c.bytes(&subject) as f64 / seconds / 1e9);
            let rates: Vec<f64> = rates.collect();
            print!("| {code} | {} | {:.1} |", size(*kib), rates[0]);
            for rate in &rates[1..] {
                print!(" {rate:.1} ({:.2}) |", rate / rates[0]);
            }
            println!();
        }
    }
}

fn print_fixed_costs(codes: &[Code], kernel: Kernel, rounds: usize) {
    println!("\nFixed costs, µs: fragments of {SMALL_BYTES} bytes\n");
    println!("| code | make the code | encode | decode 1 | decode r |");
    println!("|---|--:|--:|--:|--:|");
    for code in codes {
        let mut subject = Subject::new(*code, SMALL_BYTES * code.s(), kernel, 0);
        let start = Instant::now();
        black_box(ErasureCode::with_kernel(*code, kernel));
        let make = start.elapsed().as_secs_f64() * 1e6;
        print!("| {code} | {make:.1} |");
        for seconds in measure(&mut subject, &Contender::ALL[1..Contender::FAST], rounds) {
            print!(" {:.2} |", seconds * 1e6);
        }
        println!();
    }
}

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    let named = |name: &str| Kernel::available().find(|kernel| kernel.name() == name);
    let kernel = match &options.kernel {
        None => Kernel::detect(),
        Some(name) => named(name)
            .ok_or_else(|| anyhow::anyhow!("this machine has no kernel named {name:?}"))?,
    };
    let codes: Vec<Code> =
        options.codes.iter().map(|code| code.parse()).collect::<Result<_, _>>()?;
    let names: Vec<&str> = Kernel::available().map(Kernel::name).collect();
    println!("kernel {kernel}; this machine has {}\n", names.join(", "));
    print_throughput(&options, &codes, kernel);
    print_fixed_costs(&codes, kernel, options.rounds);
    Ok(())
}
