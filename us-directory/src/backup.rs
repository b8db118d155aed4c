//! Backups: the whole state in one sealed file.
//!
//! ```text
//! header (64 bytes) | frame | frame | ... | last frame
//! header   0  magic "USBACKUP"   8  version u32 = 1   12  CRC-32C with this field zero
//!         16  cluster (16 bytes)  32  salt (16 bytes)  48  zeros
//! frame    0  bytes of the rest u32   4  CRC-32C of the rest   8  sealed: at most 1 MiB and the seal
//! ```
//! The frames are sealed with the recovery key, in order; the last says that it is. Together they are
//! an image stream (`image.rs`). A backup can lie anywhere: without the recovery key it says nothing.
//!
//! A running directory is asked for a consistent state with its own identity; of a stopped one the
//! store is opened.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use us_core::daemon::files::{DirLock, LockError};
use us_core::fragment::crc32c;
use us_core::ids::ClusterId;
use us_core::seal::{PieceKey, PieceNumber, Secret};
use us_core::tls::{ExpectedPeer, Identity, Role};
use us_core::wire::connect_grpc;
use us_proto::v1::BackupRequest;
use us_proto::v1::admin_client::AdminClient;

use crate::image::{ImageReader, ImageWriter, RunRange};
use crate::recovery::RecoveryKit;
use crate::run::{identity_dir, recovery_key};
use crate::store::embedded::{EmbeddedOptions, EmbeddedStore};
use crate::store::{MetaStore, WriteBatch};

const MAGIC: [u8; 8] = *b"USBACKUP";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 64;
const FRAME_BYTES: usize = 1 << 20;

/// Why a backup cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    /// The disk failed.
    #[error("{action} the backup: {source}")]
    Io {
        /// What was being done.
        action: &'static str,
        /// The system's answer.
        source: std::io::Error,
    },
    /// It is no backup, of a version not known, damaged or cut short.
    #[error("the backup is damaged: {detail}")]
    Damaged {
        /// What is wrong.
        detail: String,
    },
    /// It is of another cluster than the key.
    #[error("the backup is of cluster {found}, the recovery key of cluster {key}")]
    OtherCluster {
        /// The backup's.
        found: ClusterId,
        /// The key's.
        key: ClusterId,
    },
    /// The key does not fit.
    #[error("the recovery key does not open this backup: it was made with another key")]
    WrongKey,
}

fn damaged(detail: impl ToString) -> BackupError {
    BackupError::Damaged { detail: detail.to_string() }
}

fn frame_key(secret: &Secret, header: &[u8; HEADER_BYTES]) -> PieceKey {
    secret.pieces(&[b"us backup 1", &header[16..48]])
}

/// Writes the frames of a backup.
pub struct BackupWriter<W> {
    out: W,
    key: PieceKey,
    buffer: Vec<u8>,
    frames: u64,
}

impl<W: Write> BackupWriter<W> {
    /// Begins a backup.
    ///
    /// # Errors
    /// What the system says.
    pub fn new(
        mut out: W,
        cluster: &ClusterId,
        secret: &Secret,
        salt: [u8; 16],
    ) -> std::io::Result<Self> {
        let mut header = [0; HEADER_BYTES];
        header[..8].copy_from_slice(&MAGIC);
        header[8..12].copy_from_slice(&VERSION.to_le_bytes());
        header[16..32].copy_from_slice(cluster.as_bytes());
        header[32..48].copy_from_slice(&salt);
        let sum = crc32c(&header);
        header[12..16].copy_from_slice(&sum.to_le_bytes());
        out.write_all(&header)?;
        let key = frame_key(secret, &header);
        Ok(Self { out, key, buffer: Vec::new(), frames: 0 })
    }

    /// Adds bytes of the stream.
    ///
    /// # Errors
    /// What the system says.
    pub fn push(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.buffer.extend_from_slice(bytes);
        while self.buffer.len() > FRAME_BYTES {
            let rest = self.buffer.split_off(FRAME_BYTES);
            let frame = std::mem::replace(&mut self.buffer, rest);
            self.frame(&frame, false)?;
        }
        Ok(())
    }

    /// Ends the backup.
    ///
    /// # Errors
    /// What the system says.
    pub fn finish(mut self) -> std::io::Result<W> {
        let frame = std::mem::take(&mut self.buffer);
        self.frame(&frame, true)?;
        Ok(self.out)
    }

    fn frame(&mut self, plaintext: &[u8], last: bool) -> std::io::Result<()> {
        let number = PieceNumber { number: self.frames, part: u32::from(last) };
        let sealed = self.key.seal(number, &MAGIC, plaintext);
        self.frames += 1;
        self.out.write_all(&(sealed.len() as u32).to_le_bytes())?;
        self.out.write_all(&crc32c(&sealed).to_le_bytes())?;
        self.out.write_all(&sealed)
    }
}

/// Reads a backup and gives its batches to `sink`.
///
/// # Errors
/// [`BackupError`], or what `sink` says.
pub fn read_backup<E: From<BackupError>>(
    mut input: impl Read,
    kit: &RecoveryKit,
    mut sink: impl FnMut(WriteBatch) -> Result<(), E>,
) -> Result<RunRange, E> {
    let io = |source| BackupError::Io { action: "reading", source };
    let mut header = [0; HEADER_BYTES];
    input.read_exact(&mut header).map_err(|_| damaged("it has no header"))?;
    let sum = u32::from_le_bytes(header[12..16].try_into().expect("4 bytes"));
    let mut unsummed = header;
    unsummed[12..16].fill(0);
    if header[..8] != MAGIC || crc32c(&unsummed) != sum {
        return Err(damaged("its header does not hold").into());
    }
    if header[8..12] != VERSION.to_le_bytes() {
        return Err(damaged("its version is not known here").into());
    }
    let found = ClusterId::from_bytes(header[16..32].try_into().expect("16 bytes"));
    if found != kit.cluster() {
        return Err(BackupError::OtherCluster { found, key: kit.cluster() }.into());
    }
    let key = frame_key(kit.secret(), &header);
    let mut reader = ImageReader::new();
    for number in 0.. {
        let mut head = [0; 8];
        input.read_exact(&mut head).map_err(|_| damaged("it ends early"))?;
        let bytes = u32::from_le_bytes(head[..4].try_into().expect("4 bytes")) as usize;
        let sum = u32::from_le_bytes(head[4..].try_into().expect("4 bytes"));
        if bytes > FRAME_BYTES + PieceKey::SEAL_BYTES {
            return Err(damaged("a frame is too long").into());
        }
        let mut sealed = vec![0; bytes];
        input.read_exact(&mut sealed).map_err(|_| damaged("it ends early"))?;
        if crc32c(&sealed) != sum {
            return Err(damaged(format!("the sum of frame {number} does not hold")).into());
        }
        let open = |part| key.open(PieceNumber { number, part }, &MAGIC, &sealed);
        let (plaintext, last) = match open(0) {
            Some(plaintext) => (plaintext, false),
            None => (open(1).ok_or(BackupError::WrongKey)?, true),
        };
        for batch in reader.push(&plaintext).map_err(damaged)? {
            sink(batch)?;
        }
        if last {
            break;
        }
    }
    let mut more = [0; 1];
    if input.read(&mut more).map_err(io)? > 0 {
        return Err(damaged("bytes behind its end").into());
    }
    Ok(reader.end().map_err(damaged)?)
}

/// What a backup holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BackedUp {
    /// Bytes of the file.
    pub bytes: u64,
    /// Whether the directory was running.
    pub running: bool,
}

/// Writes a backup of the directory in `data` to `out`, which must not exist.
///
/// # Errors
/// When there is no directory, it does not answer, or a disk fails.
pub async fn backup(data: &Path, out: &Path) -> anyhow::Result<BackedUp> {
    if out.exists() {
        bail!("{} exists: a backup never replaces a file", out.display());
    }
    let kit = RecoveryKit::load(&recovery_key(data))
        .with_context(|| format!("{}: start the directory once, it makes one", data.display()))?;
    let temporary = temporary(out)?;
    let made = write_backup(data, &kit, &temporary).await;
    let made = made.and_then(|made| {
        std::fs::rename(&temporary, out)?;
        let parent = out.parent().filter(|parent| !parent.as_os_str().is_empty());
        File::open(parent.unwrap_or(Path::new(".")))?.sync_all()?;
        Ok(made)
    });
    if made.is_err() {
        let _there_is_none = std::fs::remove_file(&temporary);
    }
    made.with_context(|| format!("writing {}", out.display()))
}

fn temporary(out: &Path) -> anyhow::Result<PathBuf> {
    let name = out.file_name().with_context(|| format!("{} names no file", out.display()))?;
    let mut hidden = std::ffi::OsString::from(".");
    hidden.push(name);
    hidden.push(format!(".{}.new", std::process::id()));
    Ok(out.with_file_name(hidden))
}

async fn write_backup(data: &Path, kit: &RecoveryKit, path: &Path) -> anyhow::Result<BackedUp> {
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    let mut salt = [0; 16];
    getrandom::fill(&mut salt).context("the system gives no randomness")?;
    let writer = BackupWriter::new(file, &kit.cluster(), kit.secret(), salt)?;
    let running = match DirLock::take(data) {
        Ok(lock) => {
            let data = data.to_owned();
            let stopped = move || {
                let written = write_stopped(&data, writer);
                drop(lock);
                written
            };
            tokio::task::spawn_blocking(stopped).await??;
            false
        }
        Err(LockError::InUse { .. }) => {
            write_running(data, writer).await?;
            true
        }
        Err(error) => return Err(error.into()),
    };
    Ok(BackedUp { bytes: std::fs::metadata(path)?.len(), running })
}

fn write_stopped(data: &Path, mut writer: BackupWriter<File>) -> anyhow::Result<()> {
    let sink = std::sync::Arc::new(|_| {});
    let store = EmbeddedStore::open(&data.join("store"), EmbeddedOptions::default(), sink)?;
    let mut stream = ImageWriter::new(0, store.facts().seq);
    let mut failed = None;
    stream.write_view(&*store.snapshot(), FRAME_BYTES, |piece| {
        failed = writer.push(&piece).err();
        failed.is_none()
    })?;
    if let Some(error) = failed {
        return Err(error.into());
    }
    Ok(writer.finish()?.sync_all()?)
}

async fn write_running(data: &Path, mut writer: BackupWriter<File>) -> anyhow::Result<()> {
    let address = std::fs::read_to_string(data.join("address"))
        .context("the directory runs, but has not said where it listens")?;
    let identity = Identity::load(&identity_dir(data))?;
    let expected = ExpectedPeer::role(Role::Directory);
    let channel = connect_grpc(address.trim(), &identity, expected).await?;
    let mut chunks = AdminClient::new(channel).backup(BackupRequest {}).await?.into_inner();
    // The stream says itself whether it is whole.
    let mut check = ImageReader::new();
    while let Some(chunk) = chunks.message().await? {
        check.push(&chunk.data)?;
        writer.push(&chunk.data)?;
    }
    check.end().context("the directory's answer")?;
    Ok(writer.finish()?.sync_all()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use us_core::tls::CertificateAuthority;

    fn sample(kit: &RecoveryKit) -> Vec<u8> {
        let mut writer =
            BackupWriter::new(Vec::new(), &kit.cluster(), kit.secret(), [5; 16]).unwrap();
        let mut stream = ImageWriter::new(0, 9);
        let mut batch = WriteBatch::new();
        batch.put(b"key".to_vec().into(), vec![7; 3 << 20].into());
        stream.push(&batch);
        stream.finish();
        writer.push(&stream.take_rest()).unwrap();
        writer.finish().unwrap()
    }

    fn read(bytes: &[u8], kit: &RecoveryKit) -> Result<(RunRange, usize), BackupError> {
        let mut batches = 0;
        let range = read_backup(bytes, kit, |_| {
            batches += 1;
            Ok::<_, BackupError>(())
        })?;
        Ok((range, batches))
    }

    #[test]
    fn a_backup_opens_with_its_key_only_and_whole_only() {
        let kit = RecoveryKit::new(CertificateAuthority::create().unwrap());
        let bytes = sample(&kit);
        let range = RunRange { first_seq: 0, last_seq: 9 };
        assert_eq!(read(&bytes, &kit).unwrap(), (range, 1));
        let stranger = RecoveryKit::new(CertificateAuthority::create().unwrap());
        assert!(matches!(read(&bytes, &stranger), Err(BackupError::OtherCluster { .. })));
        let authority = CertificateAuthority::from_pem(
            kit.authority().ca_pem().to_owned(),
            kit.authority().key_pem().clone(),
        );
        let again = RecoveryKit::new(authority.unwrap());
        assert!(matches!(read(&bytes, &again), Err(BackupError::WrongKey)));
        for cut in [0, 10, 64, 70, 2 << 20, bytes.len() - 1] {
            assert!(matches!(read(&bytes[..cut], &kit), Err(BackupError::Damaged { .. })), "{cut}");
        }
        for at in [0, 9, 20, 40, 65, 69, 100, bytes.len() - 1] {
            let mut changed = bytes.clone();
            changed[at] ^= 1;
            assert!(read(&changed, &kit).is_err(), "byte {at}");
        }
    }
}
