//! `usctl volume create --private` and `usctl volume keys`: what opens a private volume. The key is made
//! and wrapped here; the directory only ever sees the ring.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, bail};
use serde_json::{Value, json};
use us_core::daemon::size::Size;
use us_core::ids::VolumeId;
use us_core::keyring::{Cost, KeyRing, KeySlot, NewSlot, RecoveryKey, SlotSecret};
use us_core::seal::VolumeKey;
use us_proto::v1;
use zeroize::Zeroizing;

use crate::ctl::act::utc_time;
use crate::ctl::connect::{Admin, Target, connect};
use crate::ctl::{JsonArgs, Senseless, print};
use crate::unlock::{
    Keys, NewFile, NewSecretArgs, NotPrivate, PrivateKey, SecretArgs, Terminal, long_enough,
    write_new_secret,
};

/// Flags of `usctl volume create` for a private volume.
#[derive(Debug, clap::Args)]
pub struct PrivateArgs {
    /// Make it private: only a passphrase or key that stays with you opens it
    #[arg(long, help_heading = "Private volumes")]
    private: bool,
    /// A file with its passphrase; without any of these you are asked
    #[arg(long, value_name = "FILE", requires = "private", group = "opens")]
    #[arg(help_heading = "Private volumes")]
    passphrase_file: Option<PathBuf>,
    /// A key file that is there already
    #[arg(long, value_name = "FILE", requires = "private", group = "opens")]
    #[arg(help_heading = "Private volumes")]
    key_file: Option<PathBuf>,
    /// A new key file, made here; it must not be there yet
    #[arg(long, value_name = "FILE", requires = "private", group = "opens")]
    #[arg(help_heading = "Private volumes")]
    new_key_file: Option<PathBuf>,
    /// Write the recovery key into this file, which must not be there yet, instead of printing it
    #[arg(long, value_name = "FILE", requires = "private", group = "recovery")]
    #[arg(help_heading = "Private volumes")]
    recovery_key_file: Option<PathBuf>,
    /// Make no recovery key
    #[arg(long, requires = "private", group = "recovery")]
    #[arg(help_heading = "Private volumes")]
    no_recovery_key: bool,
}

/// A private volume that is about to be made.
pub(in crate::ctl) struct Made {
    pub volume: VolumeId,
    pub ring: KeyRing,
    /// To be told its owner, once.
    pub recovery: Option<Zeroizing<String>>,
    files: Vec<NewFile>,
}

impl Made {
    /// The directory has the ring: the files that open it stay.
    pub fn keep_files(&mut self) {
        self.files.drain(..).for_each(NewFile::keep);
    }
}

impl PrivateArgs {
    /// The ring of a new volume, if it is to be private.
    pub(in crate::ctl) fn make(&self, name: &str) -> anyhow::Result<Option<Made>> {
        if !self.private {
            return Ok(None);
        }
        let (secret, file) = self.secret(name).map_err(Senseless)?;
        let (volume, key) = (VolumeId::generate(), VolumeKey::generate());
        let mut made =
            Made { volume, ring: KeyRing::new(volume), recovery: None, files: vec![file] };
        add(&mut made.ring, &key, &secret, "")?;
        if !self.no_recovery_key {
            let recovery = RecoveryKey::generate();
            let text = recovery.to_text();
            add(&mut made.ring, &key, &SlotSecret::Recovery(recovery), "")?;
            match &self.recovery_key_file {
                None => made.recovery = Some(text),
                Some(path) => made.files.push(write_recovery(path.clone(), &text)?),
            }
        }
        Ok(Some(made))
    }

    fn secret(&self, name: &str) -> anyhow::Result<(SlotSecret, NewFile)> {
        if let Some(path) = &self.new_key_file {
            let new_key_file = Some(path.clone());
            return NewSecretArgs { new_key_file, ..Default::default() }.secret(name, &Terminal);
        }
        let (passphrase_file, key_file) = (self.passphrase_file.clone(), self.key_file.clone());
        let args = SecretArgs { passphrase_file, key_file, recovery_key_file: None };
        if args.is_silent() {
            return Ok((long_enough(args.secret(name, &Terminal)?)?, NewFile::none()));
        }
        NewSecretArgs::default().secret(name, &Terminal)
    }
}

fn write_recovery(path: PathBuf, text: &str) -> anyhow::Result<NewFile> {
    write_new_secret(&path, Zeroizing::new(format!("{text}\n")).as_bytes())
        .map_err(|error| Senseless(error).into())
}

/// Wraps the key once more. The cost is always that of new passphrases.
fn add(
    ring: &mut KeyRing,
    key: &VolumeKey,
    secret: &SlotSecret,
    label: &str,
) -> anyhow::Result<u32> {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let new = NewSlot { secret, label, cost: Cost::NEW, unix_s: since.as_secs() };
    ring.add(key, &new).map_err(|error| Senseless(error.into()).into())
}

/// What its owner is told about the recovery key.
pub(in crate::ctl) fn recovery_text(key: &str) -> String {
    format!(
        "Recovery key, shown this once (print it, keep it safe; `usctl volume keys … remove` takes \
         it back):\n\n    {key}\n\nWho loses the passphrase, the key file and this has lost the \
         data: nobody can open the volume then.\n"
    )
}

/// Flags of `usctl volume keys`.
#[derive(Debug, clap::Args)]
pub struct KeysArgs {
    /// The volume
    volume: String,
    #[command(subcommand)]
    command: KeysCommand,
}

#[derive(Debug, clap::Subcommand)]
enum KeysCommand {
    /// List what opens it: the slots, not the secrets
    List(JsonArgs),
    /// Let one more passphrase or key open it
    Add {
        #[command(flatten)]
        known: SecretArgs,
        #[command(flatten)]
        new: NewSecretArgs,
        /// Make a recovery key, and write it into this file, which must not be there yet
        #[arg(long, value_name = "FILE", group = "new", help_heading = "Private volumes")]
        new_recovery_key_file: Option<PathBuf>,
        /// What the slot is called, for people
        #[arg(long, value_name = "TEXT", default_value = "")]
        label: String,
        #[command(flatten)]
        json: JsonArgs,
    },
    /// Put a new passphrase or key into the place of one that is known
    Change {
        #[command(flatten)]
        known: SecretArgs,
        #[command(flatten)]
        new: NewSecretArgs,
        #[command(flatten)]
        json: JsonArgs,
    },
    /// Take a slot away: what opened it opens nothing any more
    Remove {
        /// Its number in the list
        slot: u32,
        /// Yes, it is not needed any more
        #[arg(long)]
        yes: bool,
        #[command(flatten)]
        json: JsonArgs,
    },
}

/// A ring as it is, and whose.
struct Known {
    keys: Keys,
    ring: KeyRing,
}

async fn known(admin: &mut Admin, volume: &str) -> anyhow::Result<Known> {
    let keys = Keys::from_reply(&admin.volume_keys(volume).await?)?;
    match keys.ring.clone() {
        Some(ring) => Ok(Known { keys, ring }),
        None => {
            let error = anyhow::anyhow!("volume {volume} is managed: it has no key slots");
            Err(Senseless(error).into())
        }
    }
}

impl Known {
    /// The volume's key and the slot that held it.
    async fn open(&self, args: &SecretArgs) -> anyhow::Result<(PrivateKey, u32)> {
        let secret = args.secret(&self.keys.name, &Terminal).map_err(Senseless)?;
        self.keys.open(Arc::new(secret)).await
    }

    /// Has the directory keep the ring as it is now.
    async fn store(self, admin: &mut Admin, json: JsonArgs) -> anyhow::Result<()> {
        let request = v1::SetVolumeKeysRequest {
            volume: self.keys.volume.to_string(),
            version: self.keys.version,
            key_ring: self.ring.encode().into(),
        };
        let reply = admin.set_volume_keys(request).await?;
        let stored = Keys::from_reply(&reply)?;
        let ring = stored.ring.context(NotPrivate { volume: stored.name.clone() })?;
        show(json, &stored.name, stored.version, &ring)
    }
}

pub(in crate::ctl) async fn run(target: &Target, args: KeysArgs) -> anyhow::Result<()> {
    let mut admin = connect(target).await?;
    let mut known = known(&mut admin, &args.volume).await?;
    match args.command {
        KeysCommand::List(json) => show(json, &known.keys.name, known.keys.version, &known.ring),
        KeysCommand::Add { known: secret, new, new_recovery_key_file, label, json } => {
            let (key, _) = known.open(&secret).await?;
            let (made, file) = match new_recovery_key_file {
                None => new.secret(&known.keys.name, &Terminal).map_err(Senseless)?,
                Some(path) => {
                    let recovery = RecoveryKey::generate();
                    let file = write_recovery(path, &recovery.to_text())?;
                    (SlotSecret::Recovery(recovery), file)
                }
            };
            add(&mut known.ring, &key.key, &made, &label)?;
            known.store(&mut admin, json).await?;
            file.keep();
            Ok(())
        }
        KeysCommand::Change { known: secret, new, json } => {
            let (key, slot) = known.open(&secret).await?;
            let (made, file) = new.secret(&known.keys.name, &Terminal).map_err(Senseless)?;
            let old = known.ring.slots().iter().find(|known| known.id() == slot);
            let label = old.map(KeySlot::label).unwrap_or_default().to_owned();
            known.ring = known.ring.without(slot);
            add(&mut known.ring, &key.key, &made, &label)?;
            known.store(&mut admin, json).await?;
            file.keep();
            Ok(())
        }
        KeysCommand::Remove { slot, yes, json } => {
            let gone = known.ring.remove(slot).map_err(|error| Senseless(error.into()))?;
            if !yes {
                let (kind, name) = (gone.kind(), &known.keys.name);
                bail!("the {kind} of slot {slot} would open {name} no more: say --yes if so");
            }
            known.store(&mut admin, json).await
        }
    }
}

fn show(json: JsonArgs, volume: &str, version: u64, ring: &KeyRing) -> anyhow::Result<()> {
    let slots: Vec<Value> = ring.slots().iter().map(slot_json).collect();
    let value = json!({ "volume": volume, "version": version, "slots": slots });
    print(json, &value, || ring.slots().iter().map(slot_line).collect())
}

fn slot_json(slot: &KeySlot) -> Value {
    json!({
        "slot": slot.id(),
        "kind": slot.kind().to_string(),
        "label": slot.label(),
        "made_unix_s": slot.made_unix_s(),
        "memory_kib": slot.cost().map(|cost| cost.memory_kib),
        "passes": slot.cost().map(|cost| cost.passes),
    })
}

fn slot_line(slot: &KeySlot) -> String {
    let made = utc_time(slot.made_unix_s().saturating_mul(1000));
    let mut line = format!("{:>4}  {:<12}  made {made}", slot.id(), slot.kind().to_string());
    if let Some(cost) = slot.cost() {
        let memory = Size(u64::from(cost.memory_kib) << 10);
        let _ = write!(line, "  argon2id {memory}, {} passes", cost.passes);
    }
    if !slot.label().is_empty() {
        let _ = write!(line, "  {}", slot.label());
    }
    line.push('\n');
    line
}
