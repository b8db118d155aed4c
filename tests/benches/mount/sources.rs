//! A source tree, as a tar file and as a git repository: given, or made up. The made-up one is the
//! same in every run: 4,300 files of some 43 MiB, most of them small, nested like a C project.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use us_tests::tree::{Node, scan};

use crate::rows::trees::run;

const FILES: u64 = 4300;
const FOLDERS: u64 = 220;
const WORDS: u64 = 3000;
/// Sizes are 2^n times 1 to 2: so many of 16 files have each n from [`SIZE_LOG_MIN`] on.
const SIZES_OF_16: [u64; 8] = [1, 2, 2, 3, 3, 2, 2, 1];
const SIZE_LOG_MIN: u32 = 8;
/// One file of so many is executable, one is a link to its neighbour.
const EXECUTABLE_OF: u64 = 8;
const LINK_OF: u64 = 200;
/// The author's time of the commit.
const WHEN: &str = "2024-01-01T00:00:00Z";

/// What is unpacked, copied and cloned.
pub(crate) struct Sources {
    pub(crate) tar: PathBuf,
    pub(crate) git: PathBuf,
    /// What the tar file holds.
    pub(crate) nodes: BTreeMap<PathBuf, Node>,
}

impl Sources {
    /// Those given, or made below `folder`.
    pub(crate) fn new(folder: &Path, tar: Option<&Path>, git: Option<&Path>) -> Result<Self> {
        let tree = folder.join("sources");
        fs::create_dir(&tree)?;
        let tar = match tar {
            Some(tar) => {
                let tar = tar.canonicalize().with_context(|| tar.display().to_string())?;
                run("tar", &["xf".as_ref(), tar.as_ref(), "-C".as_ref(), tree.as_ref()])?;
                tar
            }
            None => {
                make(&tree)?;
                let tar = folder.join("sources.tar");
                let what = ["-C".as_ref(), tree.as_os_str(), ".".as_ref()];
                run("tar", &[&["cf".as_ref(), tar.as_os_str()][..], &what[..]].concat())?;
                tar
            }
        };
        let nodes = scan(&tree)?;
        let git = match git {
            Some(git) => git.canonicalize().with_context(|| git.display().to_string())?,
            None => repository(&tree, &folder.join("sources.git"))?,
        };
        fs::remove_dir_all(&tree)?;
        Ok(Self { tar, git, nodes })
    }
}

/// One commit of all of a tree, packed: a clone of loose objects would measure git's compression.
fn repository(tree: &Path, bare: &Path) -> Result<PathBuf> {
    let git = |at: &Path, words: &[&str]| {
        let at = ["-C".as_ref(), at.as_os_str()];
        let words: Vec<&OsStr> = at.into_iter().chain(words.iter().map(OsStr::new)).collect();
        run("git", &words).map(drop)
    };
    git(tree, &["init", "-q", "-b", "main"])?;
    git(tree, &["add", "--all"])?;
    let date = format!("--date={WHEN}");
    let who = ["-c", "user.name=Bench", "-c", "user.email=bench@example.org"];
    git(tree, &[&who[..], &["commit", "-q", "-m", "All", &date]].concat())?;
    let clone = ["clone", "-q", "--bare"].map(OsStr::new);
    run("git", &[&clone[..], &[tree.as_ref(), bare.as_ref()]].concat())?;
    git(bare, &["repack", "-a", "-d", "-q"])?;
    Ok(bare.to_path_buf())
}

/// Numbers that follow from a seed.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % limit
    }

    /// Small numbers are likelier, as words of a language are.
    fn skewed(&mut self, limit: u64) -> u64 {
        let bound = self.below(limit) + 1;
        self.below(bound)
    }
}

fn make(root: &Path) -> Result<()> {
    let mut numbers = Numbers(0x5eed);
    let words: Vec<String> = (0..WORDS).map(|_| word(&mut numbers)).collect();
    let mut folders = vec![root.to_path_buf()];
    for number in 1..FOLDERS {
        let parent = &folders[numbers.skewed(folders.len() as u64) as usize];
        let folder = parent.join(format!("{}-{number}", words[number as usize]));
        fs::create_dir(&folder)?;
        folders.push(folder);
    }
    for number in 0..FILES {
        let folder = &folders[numbers.below(FOLDERS) as usize];
        let name = format!("{}_{number}.c", words[numbers.below(WORDS) as usize]);
        let path = folder.join(&name);
        fs::write(&path, text(&mut numbers, &words))?;
        if number % EXECUTABLE_OF == 0 {
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        }
        if number % LINK_OF == 0 {
            std::os::unix::fs::symlink(name, folder.join(format!("link_{number}")))?;
        }
    }
    Ok(())
}

fn word(numbers: &mut Numbers) -> String {
    let letters = 2 + numbers.below(9);
    (0..letters).map(|_| char::from(b'a' + numbers.skewed(26) as u8)).collect()
}

fn text(numbers: &mut Numbers, words: &[String]) -> String {
    let mut pick = numbers.below(SIZES_OF_16.iter().sum());
    let mut log = SIZE_LOG_MIN;
    for share in SIZES_OF_16 {
        if pick < share {
            break;
        }
        pick -= share;
        log += 1;
    }
    let bytes = (1_u64 << log) + numbers.below(1 << log);
    let mut text = String::with_capacity(bytes as usize);
    while (text.len() as u64) < bytes {
        let indent = numbers.below(4);
        text.extend((0..indent).map(|_| '\t'));
        for _ in 0..1 + numbers.below(9) {
            text.push_str(&words[numbers.skewed(words.len() as u64) as usize]);
            text.push_str([" ", ", ", "(", ") ", " = ", "->"][numbers.below(6) as usize]);
        }
        text.push_str(";\n");
    }
    text
}
