//! Layered configuration: defaults < TOML file < `US_*` environment < flags.
//!
//! A program's configuration is one struct with `#[serde(default, deny_unknown_fields)]`, `Default`
//! and `Serialize`. Its flags are a clap struct of `Option`s with the same field names (or one that
//! serialises to them), so a flag not given says nothing. A key nobody knows is refused in every
//! layer: a typing error never passes for a setting.

use std::io;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;
use toml::{Table, Value};

/// Where the layers above the defaults come from.
#[derive(Clone, Copy, Debug)]
pub struct Layers<'a, F> {
    /// The TOML file; must exist where it is given.
    pub file: Option<&'a Path>,
    /// `US_PROVIDER_` takes the key `capacity` from `US_PROVIDER_CAPACITY` and the key `up` of the
    /// table `limits` from `US_PROVIDER_LIMITS__UP`. `None`: the environment is not read.
    pub environment_prefix: Option<&'a str>,
    /// The flags: what it serialises to wins, what it leaves out (`None`) says nothing.
    pub flags: F,
}

/// A configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file is not TOML.
    #[error("{} is not TOML", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: Box<toml::de::Error>,
    },
    /// A layer holds a key nobody knows or a value of the wrong kind.
    #[error("wrong setting in {layer}")]
    Setting {
        /// The file's path, "the environment" or "the flags".
        layer: String,
        /// Which and why.
        source: Box<toml::de::Error>,
    },
    /// The defaults or flags cannot be written as TOML: a fault of the program.
    #[error("the configuration's own types do not serialise")]
    Types(#[from] toml::ser::Error),
}

/// Reads the configuration `C` through its layers.
///
/// # Errors
/// [`ConfigError`], which names the layer at fault.
pub fn load<C, F>(layers: &Layers<'_, F>) -> Result<C, ConfigError>
where
    C: Default + Serialize + DeserializeOwned,
    F: Serialize,
{
    let environment = layers.environment_prefix.map(|prefix| {
        let entries = std::env::vars().filter_map(|(name, value)| {
            Some((name.strip_prefix(prefix)?.to_ascii_lowercase(), value))
        });
        entries.collect::<Vec<_>>()
    });
    load_from(layers.file, environment.unwrap_or_default(), &layers.flags)
}

fn load_from<C, F>(
    file: Option<&Path>,
    environment: Vec<(String, String)>,
    flags: &F,
) -> Result<C, ConfigError>
where
    C: Default + Serialize + DeserializeOwned,
    F: Serialize,
{
    let defaults = Table::try_from(C::default())?;
    let mut merged = defaults.clone();
    if let Some(path) = file {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        let table: Table = toml::from_str(&text).map_err(|source| ConfigError::Syntax {
            path: path.to_owned(),
            source: Box::new(source),
        })?;
        merged = add_layer::<C>(merged, table, &path.display().to_string())?;
    }
    let table = environment_table(&defaults, environment);
    merged = add_layer::<C>(merged, table, "the environment")?;
    merged = add_layer::<C>(merged, Table::try_from(flags)?, "the flags")?;
    into_config(merged, "the flags")
}

/// Each layer is checked by itself on top of those below, so that the error names it.
fn add_layer<C: DeserializeOwned>(
    mut below: Table,
    layer: Table,
    name: &str,
) -> Result<Table, ConfigError> {
    if layer.is_empty() {
        return Ok(below);
    }
    merge(&mut below, layer);
    into_config::<C>(below.clone(), name)?;
    Ok(below)
}

fn into_config<C: DeserializeOwned>(table: Table, layer: &str) -> Result<C, ConfigError> {
    Value::Table(table).try_into().map_err(|source| ConfigError::Setting {
        layer: layer.to_owned(),
        source: Box::new(source),
    })
}

fn merge(below: &mut Table, above: Table) {
    for (key, value) in above {
        match (below.get_mut(&key), value) {
            (Some(Value::Table(below)), Value::Table(above)) => merge(below, above),
            (_, value) => {
                below.insert(key, value);
            }
        }
    }
}

fn environment_table(defaults: &Table, environment: Vec<(String, String)>) -> Table {
    let mut table = Table::new();
    for (name, text) in environment {
        let keys: Vec<&str> = name.split("__").collect();
        let Some((last, tables)) = keys.split_last() else { continue };
        let default = tables
            .iter()
            .try_fold(defaults, |table, key| table.get(*key)?.as_table())
            .and_then(|table| table.get(*last));
        let mut place = &mut table;
        for key in tables {
            let inner = place.entry(*key).or_insert_with(|| Value::Table(Table::new()));
            if !inner.is_table() {
                *inner = Value::Table(Table::new());
            }
            place = inner.as_table_mut().expect("it was made a table above");
        }
        place.insert((*last).to_owned(), environment_value(default, text));
    }
    table
}

/// A text stays a text where the default is one; elsewhere it is read as a TOML value if it is one.
fn environment_value(default: Option<&Value>, text: String) -> Value {
    if matches!(default, Some(Value::String(_))) {
        return Value::String(text);
    }
    toml::from_str::<Table>(&format!("value = {text}"))
        .ok()
        .filter(|table| table.len() == 1)
        .and_then(|mut table| table.remove("value"))
        .unwrap_or(Value::String(text))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::daemon::size::Size;
    use serde::Deserialize;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    #[serde(default, deny_unknown_fields)]
    struct Limits {
        up: Size,
        classes: Vec<String>,
    }

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    #[serde(default, deny_unknown_fields)]
    struct Config {
        name: String,
        capacity: Size,
        threads: u32,
        site: Option<String>,
        limits: Limits,
    }

    impl Default for Limits {
        fn default() -> Self {
            Self { up: Size(1 << 20), classes: Vec::new() }
        }
    }

    impl Default for Config {
        fn default() -> Self {
            Self {
                name: "here".into(),
                capacity: Size(100),
                threads: 2,
                site: None,
                limits: Limits::default(),
            }
        }
    }

    #[derive(Serialize, Default)]
    struct Flags {
        capacity: Option<Size>,
        threads: Option<u32>,
    }

    fn load_text(file: &str, environment: &[(&str, &str)], flags: Flags) -> Result<Config, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.toml");
        std::fs::write(&path, file).unwrap();
        let environment =
            environment.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect();
        load_from(Some(&path), environment, &flags).map_err(|error| {
            let source = std::error::Error::source(&error).map(ToString::to_string);
            format!("{error}: {}", source.unwrap_or_default())
        })
    }

    #[test]
    fn the_higher_layer_wins() {
        let config = load_text(
            "capacity = '10G'\nthreads = 3\n[limits]\nup = 5",
            &[("threads", "4"), ("name", "7"), ("site", "campus"), ("limits__classes", "['a']")],
            Flags { capacity: Some(Size(9)), ..Flags::default() },
        )
        .unwrap();
        let limits = Limits { up: Size(5), classes: vec!["a".into()] };
        let site = Some("campus".into());
        assert_eq!(
            config,
            Config { name: "7".into(), capacity: Size(9), threads: 4, site, limits }
        );
        assert_eq!(load_text("", &[], Flags::default()).unwrap(), Config::default());
    }

    #[test]
    fn what_nobody_knows_is_refused() {
        let wrong = load_text("capacty = 5", &[], Flags::default()).unwrap_err();
        assert!(wrong.contains("config.toml") && wrong.contains("capacty"), "{wrong}");
        let wrong = load_text("", &[("limits__down", "5")], Flags::default()).unwrap_err();
        assert!(wrong.contains("environment") && wrong.contains("down"), "{wrong}");
        let wrong = load_text("threads = 'many'", &[], Flags::default()).unwrap_err();
        assert!(wrong.contains("config.toml"), "{wrong}");
        let wrong = load_text("threads = = 2", &[], Flags::default()).unwrap_err();
        assert!(wrong.contains("not TOML"), "{wrong}");
        let missing = Layers {
            file: Some(Path::new("/nowhere/us.toml")),
            environment_prefix: None,
            flags: Flags::default(),
        };
        assert!(matches!(load::<Config, _>(&missing), Err(ConfigError::Read { .. })));
    }
}
