use std::collections::HashMap;

use proptest::prelude::*;

use super::*;

/// A megabyte a fragment, in slots of 4 KiB.
const BYTES: f64 = 1_000_000.0;
const SLOTS: usize = 245;
const LAN: f64 = 12_500_000.0;

fn line(up: f64, down: f64, site: Option<u32>) -> Line {
    Line { up, down, site }
}

fn task<'t>(
    s: usize,
    rebuilder: Line,
    holders: &'t [Line],
    trunks: &'t HashMap<u32, Trunk>,
) -> Task<'t> {
    Task { s, fragment_bytes: BYTES, slots: SLOTS, rebuilder, holders, trunks }
}

fn no_trunks() -> HashMap<u32, Trunk> {
    HashMap::new()
}

#[test]
fn on_a_lan_a_chain_is_s_times_quicker() {
    let (trunks, line) = (no_trunks(), line(LAN, LAN, None));
    let holders = vec![line; 30];
    let task = task(16, line, &holders, &trunks);
    let all: Vec<usize> = (0..30).collect();
    assert!((task.seconds(Way::Star, &all) - 1.28).abs() < 0.001);
    let plan = plan(&task).unwrap();
    assert_eq!(plan.way, Way::Chain);
    assert!(plan.seconds < 0.2, "{}", plan.seconds);
}

#[test]
fn on_adsl_a_chain_is_of_no_use() {
    let (trunks, line) = (no_trunks(), line(16_000.0, 1_250_000.0, None));
    let holders = vec![line; 16];
    let task = task(16, line, &holders, &trunks);
    let all: Vec<usize> = (0..16).collect();
    assert!((task.seconds(Way::Star, &all) - 62.5).abs() < 0.1);
    let chain = task.seconds(Way::Chain, &all);
    assert!((76.0..79.0).contains(&chain), "the slides' 77 s: {chain}");
    assert_eq!(plan(&task).unwrap().way, Way::Star);
    // With holders to spare each sends less: f = 31.
    let holders = vec![line; 30];
    let spread = plan(&Task { holders: &holders, ..task }).unwrap();
    assert_eq!((spread.way, spread.order.len()), (Way::RotatedStar, 30));
    assert!((spread.seconds - 62.5 * 16.0 / 30.0).abs() < 0.1, "{}", spread.seconds);
}

#[test]
fn between_sites_one_fragment_a_site_crosses() {
    // Four sites of four on LANs; 8 Mb/s out of each, 80 Mb/s in.
    let holders: Vec<Line> = (0..16).map(|at| line(LAN, LAN, Some(at % 4))).collect();
    let trunks = (0..4).map(|site| (site, Trunk { up: 1e6, down: 1e7 })).collect();
    let task = task(12, line(LAN, LAN, Some(0)), &holders, &trunks);
    let chosen = plan(&task).unwrap();
    assert_eq!(chosen.way, Way::Sites);
    let sites = |order: &[usize]| {
        let mut sites: Vec<u32> = order[..12].iter().filter_map(|at| holders[*at].site).collect();
        sites.sort_unstable();
        sites.dedup();
        sites.len()
    };
    assert_eq!(sites(&chosen.order), 3, "three whole sites are enough");
    let all: Vec<usize> = (0..16).collect();
    assert!(task.seconds(Way::Star, &all) > 2.0 * chosen.seconds);
}

#[test]
fn what_is_not_known_is_a_star_in_the_callers_order() {
    let (trunks, holders) = (no_trunks(), vec![Line::UNKNOWN; 5]);
    let chosen = plan(&task(4, Line::UNKNOWN, &holders, &trunks)).unwrap();
    assert_eq!((chosen.way, chosen.order, chosen.seconds), (Way::Star, vec![0, 1, 2, 3, 4], 0.0));
    assert_eq!(plan(&task(6, Line::UNKNOWN, &holders, &trunks)), None);
}

#[test]
fn a_slow_line_is_left_out_and_stays_last() {
    let trunks = no_trunks();
    let mut holders = vec![line(LAN, LAN, None); 6];
    holders[1].up = 10_000.0;
    let chosen = plan(&task(4, line(LAN, LAN, None), &holders, &trunks)).unwrap();
    assert!(!chosen.order[..4].contains(&1), "{chosen:?}");
    // Where nobody can be left out a slow line is what it is.
    let chosen = plan(&task(6, line(LAN, LAN, None), &holders, &trunks)).unwrap();
    assert_eq!(chosen.way, Way::Star);
    assert!((chosen.seconds - 100.0).abs() < 0.1);
}

#[test]
fn a_slice_is_never_nothing_and_never_too_much() {
    for slots in 1..400 {
        for links in 0..40 {
            let slice = slice_slots(slots, links);
            assert!((1..=SLICE_SLOTS_MAX).contains(&slice));
            // Rounding leaves half of what is aimed at, at worst.
            assert!(2 * slots.div_ceil(slice) >= slots.min(4 * links));
        }
    }
}

/// The chain, slice by slice and link by link: a slice leaves a node when it has come there whole and
/// the one before it has left.
fn chain_simulated(task: &Task<'_>, helpers: &[usize]) -> f64 {
    let slices = task.slices(helpers.len()) as usize;
    let mut there = vec![0.0f64; slices];
    for (at, from) in helpers.iter().enumerate().rev() {
        let to = if at == 0 { task.rebuilder } else { task.holders[helpers[at - 1]] };
        let takes = BYTES / slices as f64 / task.link(&task.holders[*from], &to) + HOP_S;
        let mut free = 0.0f64;
        for slice in &mut there {
            free = free.max(*slice) + takes;
            *slice = free;
        }
    }
    there.last().copied().unwrap_or(0.0)
}

/// Every ordered choice of `take` of `of`.
fn arrangements(of: usize, take: usize) -> Vec<Vec<usize>> {
    if take == 0 {
        return vec![Vec::new()];
    }
    let shorter = arrangements(of, take - 1);
    let longer = shorter.into_iter().flat_map(|one| {
        let free: Vec<usize> = (0..of).filter(|next| !one.contains(next)).collect();
        free.into_iter().map(move |next| one.iter().copied().chain([next]).collect())
    });
    longer.collect()
}

/// The quickest of all ways with all choices and orders of helpers.
fn best_of_all(task: &Task<'_>) -> f64 {
    let all: Vec<usize> = (0..task.holders.len()).collect();
    let ways = [Way::Star, Way::Sites, Way::Chain];
    let some = arrangements(task.holders.len(), task.s);
    let some = some.iter().flat_map(|order| ways.map(|way| task.seconds(way, order)));
    some.fold(task.seconds(Way::RotatedStar, &all), f64::min)
}

fn rate() -> impl Strategy<Value = f64> {
    prop::sample::select(vec![16_000.0, 128_000.0, 1_250_000.0, LAN, 10.0 * LAN])
}

fn lines(sites: u32) -> impl Strategy<Value = Vec<Line>> {
    let site = prop::option::of(0..sites.max(1));
    let one = (rate(), rate(), site)
        .prop_map(move |(up, down, site)| line(up, down, site.filter(|_| sites > 0)));
    prop::collection::vec(one, 2..7)
}

proptest! {
    #[test]
    fn a_chain_takes_what_its_slices_take(holders in lines(0), rebuilder in lines(0)) {
        let trunks = no_trunks();
        let task = task(holders.len(), rebuilder[0], &holders, &trunks);
        let helpers: Vec<usize> = (0..holders.len()).collect();
        let (model, slow) = (task.chain_seconds(&helpers), chain_simulated(&task, &helpers));
        prop_assert!((model - slow).abs() <= 1e-6 * slow, "{model} {slow}");
    }

    /// Without sites: nothing is quicker than what is chosen by more than what simplicity may cost,
    /// taken twice (once for the order, once for the way).
    #[test]
    fn nothing_is_much_quicker(holders in lines(0), rebuilder in lines(0), s in 1usize..5) {
        let trunks = no_trunks();
        let task = task(s.min(holders.len()), rebuilder[0], &holders, &trunks);
        let chosen = plan(&task).unwrap();
        prop_assert_eq!(chosen.seconds, task.seconds(chosen.way, &chosen.order));
        let best = best_of_all(&task);
        prop_assert!(chosen.seconds * GAIN_MIN * GAIN_MIN * GAIN_MIN <= best + 0.01, "{} {best}", chosen.seconds);
    }

    /// With sites and trunks the orders are guesses; they are good ones.
    #[test]
    fn between_sites_it_is_no_worse_than_four_times_the_best(
        holders in lines(3), rebuilder in lines(3), s in 1usize..5,
        ups in prop::collection::vec(rate(), 3), downs in prop::collection::vec(rate(), 3),
    ) {
        let trunk = |site: u32| Trunk { up: ups[site as usize], down: downs[site as usize] };
        let trunks = (0..3).map(|site| (site, trunk(site))).collect();
        let task = task(s.min(holders.len()), rebuilder[0], &holders, &trunks);
        let chosen = plan(&task).unwrap();
        let mut named = chosen.order.clone();
        named.sort_unstable();
        prop_assert_eq!(named, (0..holders.len()).collect::<Vec<_>>());
        let best = best_of_all(&task);
        prop_assert!(chosen.seconds <= 4.0 * best + 0.05, "{chosen:?} {best}");
    }
}
