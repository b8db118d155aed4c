//! One request, one id in the logs of every process it passes through: the mount, the directory, the
//! providers.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;

use us_tests::cluster::{Cluster, PATIENCE, Shape, fuse_is_here};
use us_tests::poll;
use us_tests::tree::noise;

const FILTER: &str = "info,us_core=debug,us_directory=debug,us_provider=debug,usfs=debug";
const PROVIDERS: usize = 3;

/// The ids in the lines of `log` that hold all of `words`.
fn ids(log: &str, words: &[&str]) -> BTreeSet<String> {
    let plain = without_colours(log);
    let lines = plain.lines().filter(|line| words.iter().all(|word| line.contains(word)));
    lines
        .filter_map(|line| {
            let (_, rest) = line.split_once("request=")?;
            Some(rest.chars().take_while(char::is_ascii_hexdigit).collect())
        })
        .filter(|id: &String| id.len() == 16 && id != "0000000000000000")
        .collect()
}

fn without_colours(log: &str) -> String {
    let mut parts = log.split('\u{1b}');
    let mut plain = parts.next().unwrap_or_default().to_string();
    for part in parts {
        plain.push_str(part.split_once('m').map_or("", |(_, text)| text));
    }
    plain
}

/// Ids that the mount logs with `of_mount`, the directory with `of_directory`, and at least
/// `providers` of the providers with `of_providers`.
fn told(
    cluster: &Cluster,
    mount: &str,
    of_mount: &str,
    of_directory: Option<&str>,
    of_providers: &str,
    providers: usize,
) -> Result<(), String> {
    let asked = ids(&cluster.log(mount), &[&format!("operation=\"{of_mount}\""), "asked"]);
    let directory =
        of_directory.map(|word| ids(&cluster.log("directory"), &[word])).unwrap_or_default();
    let stores: Vec<_> = (0..PROVIDERS)
        .map(|number| ids(&cluster.log(&format!("provider{number}")), &[of_providers]))
        .collect();
    let found = asked.iter().any(|id| {
        let seen = stores.iter().filter(|store| store.contains(id)).count();
        seen >= providers && (of_directory.is_none() || directory.contains(id))
    });
    found.then_some(()).ok_or_else(|| format!("{asked:?}; {directory:?}; {stores:?}"))
}

#[test]
fn one_search_tells_the_story_of_a_request() {
    if !fuse_is_here() {
        return;
    }
    let shape = Shape { providers: PROVIDERS, code: "2+1", ..Shape::default() };
    let mut cluster = Cluster::start_logging(shape, FILTER);
    let mount = cluster.mount();
    let bytes = noise(1, 1_000_000);
    let mut written = 0;
    // The background may be faster than an fsync: then the block goes under an id of its own.
    poll::until("an fsync in every log", PATIENCE, || {
        let mut file = fs::File::create(mount.path().join(format!("file{written}"))).unwrap();
        written += 1;
        file.write_all(&bytes).unwrap();
        file.sync_all().unwrap();
        told(&cluster, "mount0", "fsync", Some("applied"), " put ", 2)
    });
    mount.unmount();

    let mount = cluster.mount();
    assert_eq!(fs::read(mount.path().join("file0")).unwrap(), bytes);
    poll::until("a read in the providers' logs", PATIENCE, || {
        told(&cluster, "mount1", "read", None, " get ", 1)
    });
    let looked_up = ids(&cluster.log("mount1"), &["operation=\"lookup\"", "asked"]);
    let fetched = ids(&cluster.log("directory"), &["fetched"]);
    assert!(looked_up.intersection(&fetched).next().is_some(), "{looked_up:?}; {fetched:?}");
    mount.unmount();
}
