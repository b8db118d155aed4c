//! The documentation and `deploy/` hold to the code: keys, defaults, metrics, tests that are named,
//! sample configurations, alerts, the dashboard; and the sources to what docs/security.md says of them.
//! Nothing is started here.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use toml::{Table, Value};
use us_directory::run::Config as DirectoryConfig;
use us_provider::config::ProviderConfig;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn text(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// All files with this ending below a folder of the workspace.
fn files(folder: &str, ending: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![root().join(folder)];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == ending) {
                found.push(path);
            }
        }
    }
    found
}

/// The names of the fields of a struct, as its source says.
fn fields(source: &str, name: &str) -> Vec<String> {
    let start = source.find(&format!("struct {name} {{\n")).expect("the struct");
    let body = &source[start..start + source[start..].find("\n}").expect("its end")];
    let lines = body.lines().skip(1).map(str::trim);
    let fields = lines.filter(|line| !line.starts_with("//") && !line.starts_with('#'));
    let names = fields.map(|line| line.split(':').next().unwrap_or_default());
    names
        .map(|name| name.trim_start_matches("pub(super) ").trim_start_matches("pub ").into())
        .collect()
}

/// The rows of the tables in a section of a page, cell by cell.
fn rows<'a>(page: &'a str, section: &str) -> Vec<Vec<&'a str>> {
    let start = page.find(&format!("\n## {section}\n")).expect("the section") + 1;
    let section = &page[start..];
    let section = section[3..].find("\n## ").map_or(section, |end| &section[..end + 3]);
    let rows = section.lines().filter_map(|line| line.strip_prefix("| ")?.strip_suffix(" |"));
    rows.map(|line| line.split(" | ").map(str::trim).collect()).collect()
}

fn unquoted(cell: &str) -> &str {
    cell.trim_matches('`')
}

/// Checks each key of a configuration: its row, its variable, its flag, its default.
fn check_keys(section: &str, keys: &[String], prefix: &str, defaults: &Table, flagless: &[&str]) {
    let page = text("docs/configuration.md");
    let rows = rows(&page, section);
    let documented: Vec<&str> = rows.iter().map(|row| unquoted(row[0])).collect();
    for key in keys {
        let row = rows.iter().find(|row| unquoted(row[0]) == key);
        let row = row.unwrap_or_else(|| panic!("{key} of {section} is not in {documented:?}"));
        let variable = format!("{prefix}{}", key.replace('.', "__").to_uppercase());
        assert_eq!(unquoted(row[2]), variable, "the variable of {key}");
        let flag = format!("--{}", key.replace('_', "-"));
        let has_flag = !flagless.contains(&key.as_str());
        assert_eq!(unquoted(row[1]) == flag, has_flag, "the flag of {key}");
        let default = key.split('.').try_fold(Value::Table(defaults.clone()), |value, key| {
            value.as_table()?.get(key).cloned()
        });
        match default {
            None => assert!(!row[3].starts_with('`') || key == "identity", "{key}: {row:?}"),
            Some(Value::String(empty)) if empty.is_empty() => assert_eq!(row[3], "empty", "{key}"),
            Some(Value::String(text)) => assert!(row[3].contains(&format!("`{text}`")), "{key}"),
            Some(value) => assert_eq!(unquoted(row[3]), value.to_string(), "default of {key}"),
        }
    }
    for key in documented.iter().filter(|key| **key != "key" && !key.starts_with("---")) {
        assert!(keys.iter().any(|known| known == key), "{key} of {section} does not exist");
    }
}

#[test]
fn every_key_of_the_directory_is_documented() {
    let keys = fields(&text("us-directory/src/run.rs"), "Config");
    let defaults = Table::try_from(DirectoryConfig::default()).unwrap();
    check_keys("us-directory", &keys, "US_DIRECTORY_", &defaults, &[]);
}

#[test]
fn every_key_of_the_provider_is_documented() {
    let mut keys = fields(&text("us-provider/src/config.rs"), "ProviderConfig");
    keys.retain(|key| key != "guest");
    let guest = fields(&text("us-provider/src/guest.rs"), "GuestConfig");
    keys.extend(guest.iter().map(|key| format!("guest.{key}")));
    let config = ProviderConfig { data: "/var/lib/us/provider".into(), ..Default::default() };
    let defaults = Table::try_from(config).unwrap();
    let flagless: Vec<&str> = keys
        .iter()
        .map(String::as_str)
        .filter(|key| {
            key.starts_with("guest.")
                || ["index_cache", "trash_keep_hours", "directory_copies"].contains(key)
        })
        .collect();
    check_keys("us-provider", &keys, "US_PROVIDER_", &defaults, &flagless);
}

#[test]
fn every_key_of_a_disk_of_up_and_every_mount_option_is_documented() {
    let page = text("docs/configuration.md");
    for key in fields(&text("usfs/src/up/state.rs"), "Settings") {
        assert!(page.contains(&format!("| `{key}` |")), "{key} of up.toml");
    }
    // The words that the parser itself knows.
    let parser = text("usfs/src/mount/options.rs");
    let parser = &parser[..parser.find("#[cfg(test)]").unwrap()];
    let known = parser.lines().flat_map(|line| {
        let line = line.trim().trim_start_matches("| ");
        let words = line.split(" => ").next().unwrap().split(" | ");
        words.filter_map(|word| word.strip_prefix('"')?.strip_suffix('"')).collect::<Vec<_>>()
    });
    let known: BTreeSet<&str> = known.collect();
    assert!(known.len() > 20, "{known:?}");
    for word in known {
        assert!(page.contains(&format!("`{word}`")), "mount option {word}");
    }
    let options = parser.split("Some((\"").skip(1).map(|rest| rest.split('"').next().unwrap());
    for option in options.collect::<BTreeSet<_>>() {
        assert!(page.contains(&format!("`{option}=")), "mount option {option}");
    }
}

/// The names of metrics in the source: what its macros are given, and every text that looks so.
fn metrics_in_source() -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for folder in ["us-core/src", "us-directory/src", "us-provider/src", "usfs/src"] {
        for path in files(folder, "rs") {
            let source = fs::read_to_string(&path).unwrap();
            let source = source.split("#[cfg(test)]\nmod tests {").next().unwrap();
            for quoted in source.split('"').skip(1).step_by(2) {
                let prefixes = ["us_directory_", "us_provider_", "us_fuse_", "us_core_"];
                let plain = quoted.chars().all(|c| c.is_ascii_lowercase() || c == '_');
                if plain && prefixes.iter().any(|prefix| quoted.starts_with(prefix)) {
                    names.insert(quoted.to_string());
                }
            }
            for kind in ["counter!(", "gauge!(", "histogram!("] {
                for rest in source.split(&format!("metrics::{kind}")).skip(1) {
                    if let Some(name) = rest.trim_start().strip_prefix('"') {
                        names.insert(name.split('"').next().unwrap().to_string());
                    }
                }
            }
        }
    }
    names
}

/// The metrics of docs/metrics.md and their types.
fn metrics_in_docs() -> BTreeMap<String, String> {
    let page = text("docs/metrics.md");
    let rows = page.lines().filter_map(|line| line.strip_prefix("| `")?.strip_suffix(" |"));
    let cells = rows.map(|line| line.split(" | ").collect::<Vec<_>>());
    cells.map(|row| (unquoted(row[0]).to_string(), row[1].to_string())).collect()
}

#[test]
fn every_metric_is_documented_and_every_documented_metric_exists() {
    let source = metrics_in_source();
    let docs = metrics_in_docs();
    assert!(source.len() > 30, "{source:?}");
    let undocumented: Vec<_> = source.iter().filter(|name| !docs.contains_key(*name)).collect();
    assert!(undocumented.is_empty(), "not in docs/metrics.md: {undocumented:?}");
    let gone: Vec<_> = docs.keys().filter(|name| !source.contains(*name)).collect();
    assert!(gone.is_empty(), "only in docs/metrics.md: {gone:?}");
    for (name, kind) in &docs {
        let wanted = match name {
            name if name.ends_with("_total") => "counter",
            name if name.ends_with("_seconds") => "summary",
            _ => "gauge",
        };
        assert_eq!(kind, wanted, "{name}");
    }
}

/// What looks like one of our metrics in a text.
fn metrics_named(text: &str) -> BTreeSet<&str> {
    let words = text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
    words.filter(|word| word.starts_with("us_") || word.starts_with("process_")).collect()
}

#[test]
fn alerts_and_dashboard_use_metrics_that_exist() {
    let docs = metrics_in_docs();
    for path in ["deploy/prometheus/us-alerts.yml", "deploy/grafana/us.json"] {
        let text = text(path);
        let names = metrics_named(&text);
        assert!(names.len() > 5, "{path}: {names:?}");
        for name in names {
            assert!(docs.contains_key(name), "{path} names {name}");
        }
    }
    let dashboard: serde_json::Value =
        serde_json::from_str(&text("deploy/grafana/us.json")).unwrap();
    for panel in dashboard["panels"].as_array().unwrap() {
        assert!(!panel["targets"].as_array().unwrap().is_empty(), "{}", panel["title"]);
    }
    let alerts = text("deploy/prometheus/us-alerts.yml");
    let count = |word: &str| alerts.lines().filter(|line| line.trim().starts_with(word)).count();
    assert!(count("- alert:") > 5);
    for part in ["expr:", "for:", "severity:", "summary:"] {
        assert_eq!(count(part), count("- alert:"), "each alert has one {part}");
    }
}

#[test]
fn sample_configurations_are_taken() {
    let directory: DirectoryConfig =
        toml::from_str(&text("deploy/config/us-directory.toml")).unwrap();
    directory.check().unwrap();
    assert!(!directory.metrics.is_empty());
    for path in ["deploy/config/us-provider.toml", "deploy/config/us-provider-user.toml"] {
        let provider: ProviderConfig = toml::from_str(&text(path)).unwrap();
        assert!(provider.directory.is_some() && provider.capacity.is_some(), "{path}");
    }
    let line = text("deploy/fstab.example");
    let line = line.lines().find(|line| !line.starts_with('#')).unwrap();
    let options = line.split_whitespace().nth(3).unwrap().to_string();
    usfs::mount::Options::parse(&[options]).unwrap();
    let unit = text("deploy/systemd/system/mnt-us.mount");
    let options = unit.lines().find_map(|line| line.strip_prefix("Options=")).unwrap();
    usfs::mount::Options::parse(&[options.to_string()]).unwrap();
}

#[test]
fn units_start_what_exists_and_a_provider_is_a_guest() {
    let page = text("docs/configuration.md");
    let units = files("deploy/systemd", "service");
    assert_eq!(units.len(), 4);
    for path in units {
        let unit = fs::read_to_string(&path).unwrap();
        let start = unit.lines().find_map(|line| line.strip_prefix("ExecStart=")).unwrap();
        for flag in start.split(' ').filter(|word| word.starts_with("--")) {
            assert!(page.contains(&format!("`{flag}`")), "{}: {flag}", path.display());
        }
        if start.contains("us-provider") {
            for line in ["Nice=19", "IOSchedulingClass=idle", "CPUWeight=idle"] {
                assert!(unit.lines().any(|has| has == line), "{}: {line}", path.display());
            }
        }
        if start.contains("us-provider") || start.contains("us-directory") {
            assert!(unit.contains("\nNoNewPrivileges=yes\n"), "{}", path.display());
        }
    }
}

/// Names of all functions in the tests and sources of the workspace.
fn functions() -> BTreeSet<String> {
    let folders = ["us-core", "us-directory", "us-provider", "usfs", "tests"];
    let mut names = BTreeSet::new();
    for path in folders.iter().flat_map(|folder| files(folder, "rs")) {
        let source = fs::read_to_string(path).unwrap();
        for rest in source.split("fn ").skip(1) {
            let end = rest.find(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
            names.insert(rest[..end.unwrap_or(rest.len())].to_string());
        }
    }
    names
}

#[test]
fn invariants_name_files_and_tests_that_exist() {
    let page = text("docs/invariants.md");
    let functions = functions();
    let mut ids = BTreeSet::new();
    let rows = page.lines().filter_map(|line| line.strip_prefix("| ")?.strip_suffix(" |"));
    for row in rows.filter(|row| !row.starts_with("id ")) {
        let cells: Vec<_> = row.split(" | ").collect();
        assert_eq!(cells.len(), 4, "{row}");
        assert!(ids.insert(cells[0]), "{} twice", cells[0]);
        for path in cells[2].split('`').filter(|word| word.contains('/')) {
            assert!(root().join(path).is_file(), "{}: {path}", cells[0]);
        }
        for test in cells[3].split('`').skip(1).step_by(2) {
            let exists = functions.contains(test) || root().join(test).is_file();
            assert!(exists, "{}: no test {test}", cells[0]);
        }
    }
    assert!(ids.len() > 30);
}

/// What leads to connections without TLS is there for tests and benchmarks: it is made in two files, and
/// nothing a program is built from names it.
#[test]
fn no_program_speaks_without_tls() {
    let made_in =
        ["us-core/src/disk/links.rs", "us-core/src/wire.rs"].map(|path| root().join(path));
    let helpers = ["client.rs", "served.rs"].map(|name| root().join("us-core/src/wire").join(name));
    let folders = ["us-core/src", "us-directory/src", "us-provider/src", "usfs/src"];
    let sources = folders.iter().flat_map(|folder| files(folder, "rs"));
    let sources: Vec<_> = sources
        .filter(|path| {
            let is_test = path.ends_with("tests.rs")
                || path.parent().is_some_and(|folder| folder.ends_with("tests"));
            !is_test && !made_in.contains(path)
        })
        .collect();
    assert!(sources.len() > 100);
    for path in sources {
        let source = fs::read_to_string(&path).unwrap();
        assert!(!source.contains("unsecured"), "{}", path.display());
        let plain = ["connect_plain", "dial_plain", "serve_plain"];
        let plain = plain.iter().any(|name| source.contains(name));
        assert!(!plain || helpers.contains(&path), "{}", path.display());
    }
}
