//! The promises of every placement, for every chooser.

use std::collections::{BTreeMap, HashMap};

use proptest::prelude::*;

use super::*;

const CHOOSERS: [&str; 5] = ["hybrid", "greedy", "lines", "random", "spread"];

fn facts(provider: u32, site: &str, free_bytes: u64, usable: bool) -> ProviderFacts {
    ProviderFacts {
        provider: ProviderId(provider),
        site: site.to_owned(),
        address: String::new(),
        capacity_bytes: free_bytes,
        free_bytes,
        usable,
    }
}

fn placer(name: &str, providers: impl IntoIterator<Item = ProviderFacts>) -> Placer {
    let mut placer = Placer::new(chooser(name).unwrap());
    providers.into_iter().for_each(|facts| placer.upsert(&facts));
    placer
}

fn unlabelled(name: &str, count: u32) -> Placer {
    placer(name, (1..=count).map(|provider| facts(provider, "", 1 << 30, true)))
}

fn request(s: usize, r: usize, seed: u64) -> PlacementRequest {
    PlacementRequest { code: Code::new(s, r).unwrap(), fragment_bytes: 1 << 20, seed }
}

fn counts(chosen: &[ProviderId]) -> Vec<usize> {
    let mut counts: HashMap<ProviderId, usize> = HashMap::new();
    chosen.iter().for_each(|provider| *counts.entry(*provider).or_default() += 1);
    let mut counts: Vec<usize> = counts.into_values().collect();
    counts.sort_unstable_by(|left, right| right.cmp(left));
    counts
}

#[test]
fn fragments_share_providers_only_where_there_are_too_few() {
    for name in CHOOSERS {
        let choose = |count| unlabelled(name, count).choose(&request(4, 2, 7));
        let even = choose(6).unwrap();
        assert_eq!((counts(&even.providers), even.degraded), (vec![1; 6], None), "{name}");
        let crowded = choose(4).unwrap();
        assert_eq!(counts(&crowded.providers), [2, 2, 1, 1]);
        assert_eq!(crowded.degraded.map(|degraded| degraded.on_provider), Some(2));
        assert_eq!(counts(&choose(3).unwrap().providers), [2, 2, 2]);
        let error = choose(2).unwrap_err();
        assert!(matches!(error, PlacementError::TooFewProviders { usable: 2, needed: 3, .. }));
    }
}

#[test]
fn sites_share_evenly() {
    for name in ["hybrid", "greedy", "spread"] {
        let sites = ["a", "b", "c"];
        let twelve =
            (1..=12).map(|provider| facts(provider, sites[provider as usize % 3], 1 << 30, true));
        let mut placer = placer(name, twelve);
        for seed in 0..50 {
            let placement = placer.choose(&request(4, 2, seed)).unwrap();
            let in_a = placement.providers.iter().filter(|provider| provider.0 % 3 == 1).count();
            assert_eq!(in_a, 2, "{name}");
            // Two fragments in a site leave nothing for another loss: that is said.
            let degraded = placement.degraded.unwrap();
            assert_eq!((degraded.in_site, degraded.in_site_max), (2, Some(1)));
        }
    }
}

#[test]
fn roomy_providers_get_more() {
    for name in ["hybrid", "greedy", "random", "spread"] {
        let twelve = (1..=12).map(|provider| {
            facts(provider, "", if provider == 1 { 1 << 33 } else { 1 << 30 }, true)
        });
        let mut placer = placer(name, twelve);
        let mut hits = 0;
        for seed in 0..400 {
            let chosen = placer.choose(&request(2, 1, seed)).unwrap().providers;
            hits += usize::from(chosen.contains(&ProviderId(1)));
        }
        assert!(hits > 200, "{name}: {hits} of 400, where an even draw gives 100");
    }
}

#[test]
fn a_promise_that_is_kept_counts_once() {
    let mut placer = unlabelled("hybrid", 12);
    let placement = placer.choose(&request(4, 2, 1)).unwrap();
    let field = placer.landscape().field();
    let (one, other) = (placement.providers[0], placement.providers[1]);
    let (one, other) = (field.node(one).unwrap(), field.node(other).unwrap());
    assert_eq!(placer.landscape().pairs().get(one, other), 1);
    placer.placed(&placement.providers);
    assert_eq!(placer.landscape().pairs().get(one, other), 1);
    placer.placed(&placement.providers);
    assert_eq!(placer.landscape().pairs().get(one, other), 2);
    placer.removed(&placement.providers);
    placer.removed(&placement.providers);
    assert_eq!(placer.landscape().pairs().get(one, other), 0);
}

#[test]
fn promises_that_lapse_count_no_more() {
    let mut placer = unlabelled("random", 5);
    for seed in 0..9000 {
        placer.choose(&request(4, 1, seed)).unwrap();
    }
    let (one, other) = (ProviderId(1), ProviderId(2));
    let field = placer.landscape().field();
    let (one, other) = (field.node(one).unwrap(), field.node(other).unwrap());
    assert_eq!(placer.landscape().pairs().get(one, other), 8192);
}

#[test]
fn a_newcomer_inherits() {
    let providers =
        (0..64).map(|provider| facts(provider, &format!("s{}", provider % 4), 1 << 30, true));
    let mut placer = placer("hybrid", providers);
    let placement = placer.choose(&request(2, 2, 1)).unwrap();
    placer.placed(&placement.providers);
    let dead = placement.providers[2];
    placer.retire(dead);
    placer.upsert(&facts(100, &format!("s{}", dead.0 % 4), 1 << 30, true));
    let code = Code::new(2, 2).unwrap();
    let holders = &placement.providers;
    let mut repair =
        RepairRequest { code, fragment_bytes: 1, holders, lost: 2, avoid: &[], seed: 1 };
    let target = placer.choose_repair(&repair).unwrap();
    assert_eq!((target.provider, target.inherited), (ProviderId(100), true));
    assert_eq!(target.degraded, None);
    let avoid = [ProviderId(100)];
    repair.avoid = &avoid;
    let other = placer.choose_repair(&repair).unwrap();
    assert!(!other.inherited && other.provider.0 % 4 == dead.0 % 4, "{other:?}");
    placer.moved(holders, 2, other.provider);
    let field = placer.landscape().field();
    let pair = |one: ProviderId, other: ProviderId| {
        placer.landscape().pairs().get(field.node(one).unwrap(), field.node(other).unwrap())
    };
    assert_eq!((pair(dead, holders[0]), pair(other.provider, holders[0])), (0, 1));
}

/// A swarm: free MiB, site (0: unlabelled) and usability of each provider.
fn swarm(providers: usize) -> impl Strategy<Value = Vec<ProviderFacts>> {
    let provider = (0u64..6, 0u8..4, any::<bool>());
    proptest::collection::vec(provider, 0..providers).prop_map(|shape| {
        let numbered = shape.into_iter().enumerate();
        let facts = numbered.map(|(number, (free, site, usable))| {
            let site = if site == 0 { String::new() } else { site.to_string() };
            facts(number as u32, &site, free << 20, usable)
        });
        facts.collect()
    })
}

proptest! {
    #[test]
    fn the_margin_holds_or_there_is_an_error(
        s in 1usize..12, r in 0usize..8, seed: u64, providers in swarm(24),
    ) {
        let request = request(s, r, seed);
        for name in CHOOSERS {
            let mut placer = placer(name, providers.clone());
            let Ok(placement) = placer.choose(&request) else { continue };
            let chosen = placement.providers;
            prop_assert_eq!(chosen.len(), s + r);
            let held = counts(&chosen);
            let roomy = providers.iter().filter(|p| p.usable && p.free_bytes >= 1 << 20).count();
            prop_assert_eq!(held.len(), roomy.min(s + r));
            prop_assert!(margin_holds(request.code, held.into_iter()));
            for provider in &chosen {
                let facts = &providers[provider.0 as usize];
                let here = chosen.iter().filter(|other| *other == provider).count() as u64;
                prop_assert!(facts.usable && here << 20 <= facts.free_bytes);
            }
            let mut twin = self::placer(name, providers.clone());
            prop_assert_eq!(twin.choose(&request).unwrap().providers, chosen);
        }
    }

    /// Where the sites allow it, a whole site may die: no block loses more than r fragments.
    #[test]
    fn a_whole_site_may_die(
        sizes in proptest::collection::vec(1usize..12, 2..9), s in 1usize..9, r in 1usize..7,
        seed: u64,
    ) {
        let (f, code) = (s + r, Code::new(s, r).unwrap());
        prop_assume!(sizes.iter().map(|size| (*size).min(r)).sum::<usize>() >= f);
        for name in ["hybrid", "greedy", "spread"] {
            let sited = sizes.iter().enumerate().flat_map(|(site, size)| vec![site; *size]);
            let sited: Vec<usize> = sited.collect();
            let providers = sited.iter().enumerate();
            let providers = providers.map(|(number, site)| {
                facts(number as u32, &format!("s{site}"), 1 << 34, true)
            });
            let mut placer = placer(name, providers);
            let mut blocks = Vec::new();
            for block in 0..30 {
                let placement = placer.choose(&request(s, r, seed ^ block)).unwrap();
                placer.placed(&placement.providers);
                blocks.push(placement);
            }
            for block in &blocks {
                let mut in_site: BTreeMap<usize, usize> = BTreeMap::new();
                for provider in &block.providers {
                    *in_site.entry(sited[provider.0 as usize]).or_default() += 1;
                }
                let most = in_site.values().copied().max().unwrap();
                prop_assert!(most <= r, "{name}: {in_site:?}");
                let q = sites::site_fragments_max(code);
                prop_assert_eq!(block.degraded.is_some(), most > q);
            }
        }
    }

    /// Repairs keep what placements promise.
    #[test]
    fn repairs_keep_the_promises(
        s in 1usize..6, r in 1usize..5, seed: u64, providers in swarm(30), victim in 0usize..10,
    ) {
        let request = request(s, r, seed);
        for name in CHOOSERS {
            let mut placer = placer(name, providers.clone());
            let Ok(placement) = placer.choose(&request) else { continue };
            let lost = victim % (s + r);
            let dead = placement.providers[lost];
            placer.placed(&placement.providers);
            placer.retire(dead);
            let repair = RepairRequest {
                code: request.code, fragment_bytes: request.fragment_bytes,
                holders: &placement.providers, lost, avoid: &[], seed,
            };
            let Ok(target) = placer.choose_repair(&repair) else { continue };
            let facts = &providers[target.provider.0 as usize];
            prop_assert!(target.provider != dead && facts.usable && facts.free_bytes >= 1 << 20);
            let free = providers.iter().filter(|p| {
                p.usable && p.free_bytes >= 1 << 20 && !placement.providers.contains(&p.provider)
            });
            let crowds = placement.providers.contains(&target.provider);
            prop_assert_eq!(crowds, free.count() == 0, "{}", name);
        }
    }
}
