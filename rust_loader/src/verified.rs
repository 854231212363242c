//! What was verified on this host already, shared by its processes through a file that only grows.
//!
//! An entry is a digest of a file's identity (device, inode, size, both times) and of the hash that its
//! content had. A file that changes has another identity, so an entry never has to be taken back.

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use xxhash_rust::xxh3::xxh3_64;

const ENTRY: usize = size_of::<u64>();

/// The file and what was read of it.
#[derive(Debug)]
pub struct Verified {
    file: File,
    settle: Duration,
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    digests: HashSet<u64>,
    /// Bytes of the file that were read.
    read: u64,
}

impl Verified {
    /// Opens or makes the file at `path`. A shard is remembered only when it was last changed at least
    /// `settle` ago: a change within the grain of the file system's clock would go unnoticed.
    pub fn open(path: &Path, settle: Duration) -> io::Result<Self> {
        let file = File::options().read(true).append(true).create(true).open(path)?;
        Ok(Self { file, settle, known: Mutex::default() })
    }

    /// Whether the shard of this identity was found to have the content `hash` stands for, and is as it was then.
    pub(crate) fn holds(&self, identity: u64, hash: u64) -> bool {
        let digest = digest(identity, hash);
        let Ok(mut known) = self.known.lock() else { return false };
        known.digests.contains(&digest)
            || (self.read_on(&mut known).is_ok() && known.digests.contains(&digest))
    }

    /// Remembers that the shard of this identity, changed last at `changed_at` in seconds of the epoch, has
    /// the content `hash` stands for. What cannot be written is verified again.
    pub(crate) fn add(&self, identity: u64, changed_at: i64, hash: u64) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let changed = Duration::from_secs(u64::try_from(changed_at + 1).unwrap_or(u64::MAX));
        if now.checked_sub(changed).is_none_or(|age| age < self.settle) {
            return;
        }
        let digest = digest(identity, hash);
        // One write of a few bytes to a file opened for appending is never torn or mixed with another's.
        if io::Write::write_all(&mut &self.file, &digest.to_le_bytes()).is_ok()
            && let Ok(mut known) = self.known.lock()
        {
            known.digests.insert(digest);
        }
    }

    /// Reads what was appended since.
    fn read_on(&self, known: &mut Known) -> io::Result<()> {
        let mut entries = [0; 512 * ENTRY];
        loop {
            let found = self.file.read_at(&mut entries, known.read)?;
            let whole = found / ENTRY * ENTRY;
            let words = entries[..whole].chunks_exact(ENTRY).filter_map(|word| word.try_into().ok());
            known.digests.extend(words.map(u64::from_le_bytes));
            known.read += whole as u64;
            if whole < entries.len() {
                return Ok(());
            }
        }
    }
}

fn digest(identity: u64, hash: u64) -> u64 {
    xxh3_64(bytemuck::cast_slice(&[identity, hash]))
}
