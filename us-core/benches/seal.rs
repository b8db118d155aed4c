//! How fast blocks are sealed, opened and summed, each against bare AES-GCM or CRC-32C over the
//! same bytes in the same run: the ratio says what our layout, gathering and copying cost.
//!
//! Run: `cargo bench --profile dev -p us-core --bench seal`

use std::hint::black_box;
use std::time::Instant;

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use us_core::fragment::{FingerprintKind, FingerprintList, FragmentSums, crc32c};
use us_core::geometry::{BlockGeometry, Code, TAG_BYTES};
use us_core::ids::VolumeId;
use us_core::seal::{BlockOpener, BlockSealer, FreshBlockId, VolumeKey};

/// The best of several rounds, in GB/s of `bytes`.
fn rate(bytes: usize, mut work: impl FnMut()) -> f64 {
    let rounds = (256 << 20) / bytes.max(1);
    let batch = (rounds / 16).max(1);
    let mut best = f64::INFINITY;
    for _ in 0..16 {
        let start = Instant::now();
        (0..batch).for_each(|_| work());
        best = best.min(start.elapsed().as_secs_f64() / batch as f64);
    }
    bytes as f64 / best / 1e9
}

fn row(name: &str, ours: f64, limit: f64) {
    println!("{name:<44} {ours:>7.2} GB/s  {:>5.2} of the primitive", ours / limit);
}

fn main() {
    let code = Code::new(4, 2).expect("a code");
    let (volume, key) = (VolumeId::generate(), VolumeKey::generate());
    for bytes in [code.block_bytes_max(), 1 << 20, 16 << 10] {
        let geometry = BlockGeometry::new(code, bytes).expect("a geometry");
        let plain = vec![0x5a; bytes];
        let mut sealed = vec![0; code.s() * geometry.fragment_bytes()];
        println!("block of {bytes} bytes, pages of {}", geometry.page_bytes());

        let bare = LessSafeKey::new(UnboundKey::new(&AES_256_GCM, &[1; 32]).expect("a key"));
        let mut pages = vec![0; bytes];
        let limit = rate(bytes, || {
            for page in pages.chunks_mut(geometry.page_bytes()) {
                let nonce = Nonce::assume_unique_for_key([0; 12]);
                let tag = bare.seal_in_place_separate_tag(nonce, Aad::from([0; 32]), page);
                let _ = black_box(tag.expect("sealed"));
            }
        });
        row("  AES-256-GCM, page by page in place", limit, limit);

        let whole = [&plain[..]];
        let pieces: Vec<&[u8]> = plain.chunks(4096 + 1).collect();
        for (name, slices) in
            [("  seal_block, one slice", &whole[..]), ("  seal_block, 4 KiB slices", &pieces)]
        {
            let ours = rate(bytes, || {
                let sealer = BlockSealer::new(&key, volume, FreshBlockId::generate());
                black_box(sealer.seal_block(&geometry, slices, &mut sealed).expect("sealed"));
            });
            row(name, ours, limit);
        }

        let sealer = BlockSealer::new(&key, volume, FreshBlockId::generate());
        let opener = BlockOpener::new(&key, volume, sealer.block());
        sealer.seal_block(&geometry, &whole, &mut sealed).expect("sealed");
        let ours = rate(bytes, || {
            let pages = pages.chunks_mut(geometry.page_bytes());
            for ((page, slot), out) in sealed.chunks(geometry.slot_bytes()).enumerate().zip(pages) {
                opener.open_page_into(&geometry, page, slot, out).expect("opened");
            }
        });
        row("  open_page_into", ours, limit);

        let body = &sealed[..geometry.fragment_bytes()];
        let limit = rate(body.len(), || {
            black_box(crc32c(black_box(body)));
        });
        row("  CRC-32C of a fragment", limit, limit);
        let ours = rate(body.len(), || {
            black_box(FragmentSums::of(&geometry, black_box(body)));
        });
        row("  FragmentSums::of", ours, limit);
        let sums = FragmentSums::of(&geometry, body);
        let ours = rate(body.len(), || {
            let bodies = [(black_box(body), &sums)];
            black_box(FingerprintList::of_bodies(FingerprintKind::Blake3, bodies));
        });
        row("  its fingerprint (BLAKE3)", ours, limit);
    }

    let id = FreshBlockId::generate();
    let block = id.id();
    let (rounds, start) = (100_000, Instant::now());
    (0..rounds).for_each(|_| {
        black_box(BlockOpener::new(&key, volume, block));
    });
    println!(
        "deriving a block key {:>10.2} us",
        start.elapsed().as_secs_f64() * 1e6 / f64::from(rounds)
    );
    let data = vec![1; 4096];
    let start = Instant::now();
    (0..rounds).for_each(|_| {
        let sealer = BlockSealer::new(&key, volume, FreshBlockId::generate());
        black_box(sealer.seal_inline(&[&data]).expect("sealed"));
    });
    println!(
        "seal_inline, {} B {:>10.2} us",
        data.len() + TAG_BYTES,
        start.elapsed().as_secs_f64() * 1e6 / f64::from(rounds)
    );
}
