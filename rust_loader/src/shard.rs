//! One shard: opening it, checking it against the manifest, and reading its rows. Which shards are open
//! is [`crate::set`]'s to say.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use crate::error::{Error, Result};
use crate::mapping::{Mapping, Place};
use crate::options::{Access, Options};
use crate::sizes::to_usize;

const WORD: u64 = size_of::<u32>() as u64;
const HASH_CHUNK: usize = 1 << 20;

/// Tokens that are brought into memory together where blocks are read: 64 KiB.
const GRANULE: usize = 1 << 14;

/// A shard whose size was seen less than this ago is copied from without another look.
const LOOKED_LATELY: Duration = Duration::from_millis(1);

/// Every so many views, the system is asked whether what was brought into memory is still there.
const LOOK_EVERY: u64 = 16;

/// What tells a file from one that took its place or was written to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    bytes: u64,
    modified: (i64, i64),
    /// Set by the system at every change, so that nobody can put it back.
    changed: (i64, i64),
}

impl Stamp {
    fn of(metadata: &std::fs::Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            bytes: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }

    /// A digest that is never 0, which stands for "not known".
    fn digest(self) -> u64 {
        let (modified, changed) = (self.modified, self.changed);
        let times = [modified.0, modified.1, changed.0, changed.1].map(i64::cast_unsigned);
        let fields = [self.device, self.inode, self.bytes, times[0], times[1], times[2], times[3]];
        xxh3_64(bytemuck::cast_slice(&fields)) | 1
    }
}

/// What of a shard was brought into memory through this map.
#[derive(Debug)]
struct Seen {
    granules: Vec<AtomicBool>,
    looks: AtomicU64,
}

impl Seen {
    fn nothing_of(map: &Mapping) -> Self {
        let granules = (0..map.words().div_ceil(GRANULE)).map(|_| AtomicBool::new(false)).collect();
        Self { granules, looks: AtomicU64::new(0) }
    }
}

/// One open shard. Views hold an `Arc` of it, so its map outlives them.
#[derive(Debug)]
pub struct OpenShard {
    path: PathBuf,
    file: File,
    map: Option<Mapping>,
    bytes: u64,
    stamp: Stamp,
    opened: Instant,
    /// When its size was last looked at, in nanoseconds from `opened` on.
    looked: AtomicU64,
    /// Kept where blocks are read; rows here and there are looked up in the page tables instead.
    seen: Option<Seen>,
}

impl OpenShard {
    /// Opens and maps the shard at `path`, which must hold `words` tokens.
    pub(crate) fn open(path: PathBuf, words: u64, options: &Options) -> Result<Self> {
        let file = File::open(&path).map_err(|error| open_error(&path, error))?;
        let metadata = file.metadata().map_err(|error| open_error(&path, error))?;
        let bytes = words * WORD;
        if metadata.len() != bytes {
            return Err(Error::Size { path, found: metadata.len(), expected: bytes });
        }
        let map = match options.access {
            Access::Mmap if bytes > 0 => {
                Some(Mapping::new(&file, to_usize(words)).map_err(|error| open_error(&path, error))?)
            }
            _ => None,
        };
        let seen = map.as_ref().filter(|_| options.sequential).map(Seen::nothing_of);
        let stamp = Stamp::of(&metadata);
        let (opened, looked) = (Instant::now(), AtomicU64::new(0));
        Ok(Self { path, file, map, bytes, stamp, opened, looked, seen })
    }

    /// Whether the file at its path is still the one that was opened, and as it was.
    pub(crate) fn is_unchanged(&self) -> bool {
        !self.is_lost()
            && std::fs::metadata(&self.path).is_ok_and(|metadata| Stamp::of(&metadata) == self.stamp)
    }

    /// Tells the file, as it was opened, from any other; never 0.
    pub(crate) fn identity(&self) -> u64 {
        self.stamp.digest()
    }

    /// When it was changed last, in seconds of the epoch.
    pub(crate) fn changed_at(&self) -> i64 {
        self.stamp.changed.0
    }

    /// Where it lies.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Says how its tokens will be read: all of them, or some here and there.
    pub(crate) fn expect(&self, all: bool) {
        match &self.map {
            Some(map) if all => map.expect_all(),
            Some(map) => map.expect_random(),
            None => {}
        }
    }

    /// Copies the tokens from `start` on into `row`; the CPU fetches those at `ahead` meanwhile, see
    /// [`Self::place`].
    pub fn read(&self, start: u64, row: &mut [u32], ahead: Place) -> Result<()> {
        if let Some(map) = &self.map {
            let whole = map.copy_to(to_usize(start), row, ahead);
            return self.judge(whole, row.last() == Some(&0));
        }
        let bytes = bytemuck::cast_slice_mut(row);
        self.file.read_exact_at(bytes, start * WORD).map_err(|error| self.read_error(error))
    }

    /// As [`Self::read`], widened to 64 bits.
    pub fn read_wide(&self, start: u64, row: &mut [i64], ahead: Place) -> Result<()> {
        if let Some(map) = &self.map {
            let whole = map.widen_to(to_usize(start), row, ahead);
            return self.judge(whole, row.last() == Some(&0));
        }
        let mut narrow = vec![0_u32; row.len()];
        self.read(start, &mut narrow, ahead)?;
        for (wide, word) in row.iter_mut().zip(narrow) {
            *wide = i64::from(word);
        }
        Ok(())
    }

    /// What a copied row is worth. Behind the end of a shortened file its last page holds zeros, and touching
    /// them is no fault: so a row that ends with one is believed only while the file has its size.
    fn judge(&self, whole: bool, ends_with_zero: bool) -> Result<()> {
        match (whole, ends_with_zero) {
            (false, _) => Err(self.lost()),
            (true, true) => self.compare_size(),
            (true, false) => Ok(()),
        }
    }

    /// Where `len` tokens from `start` on lie in memory, to be fetched while others are copied.
    pub fn place(&self, start: u64, len: usize) -> Place {
        self.map.as_ref().map_or(Place::NOWHERE, |map| map.place(to_usize(start), len))
    }

    /// Looks at the file's size, unless that was done a moment before `now`. Copies need it only to name a
    /// truncated shard early: one that is cut off later ends in an error as well, see `mapping`.
    pub fn look(&self, now: Instant) -> Result<()> {
        let at = u64::try_from(now.saturating_duration_since(self.opened).as_nanos()).unwrap_or(u64::MAX);
        let since = at.saturating_sub(self.looked.load(Ordering::Relaxed));
        if self.map.is_none() || u128::from(since) < LOOKED_LATELY.as_nanos() {
            return Ok(());
        }
        self.check_size()?;
        self.looked.store(at, Ordering::Relaxed);
        Ok(())
    }

    /// Asks the system to read a row that will be wanted soon, without waiting.
    pub fn will_need(&self, start: u64, len: usize) {
        if let Some(map) = &self.map {
            map.will_need(to_usize(start), len);
        } else {
            use rustix::fs::{Advice, fadvise};
            let length = std::num::NonZeroU64::new(len as u64 * WORD);
            // Only advice: where it is refused, the read itself will wait instead.
            let _ = fadvise(&self.file, start * WORD, length, Advice::WillNeed);
        }
    }

    /// True when the tokens are known to be in memory; never without a map.
    pub fn is_resident(&self, start: u64, len: usize) -> bool {
        self.map.as_ref().is_some_and(|map| map.resident(to_usize(start), len))
    }

    /// Brings `len` tokens from `start` on into memory and hands them out where they lie.
    ///
    /// A view trusts the storage: a file that is truncated afterwards takes the pages away. None when
    /// rows are read with `pread`.
    pub fn view(self: Arc<Self>, start: u64, len: usize) -> Result<Option<View>> {
        if self.map.is_none() {
            return Ok(None);
        }
        self.ensure_resident(start, len)?;
        Ok(Some(View { shard: self, start: to_usize(start), len }))
    }

    /// As [`Self::populate`], unless the tokens are known to be in memory.
    fn ensure_resident(&self, start: u64, len: usize) -> Result<()> {
        let Some(map) = &self.map else { return Ok(()) };
        let Some(seen) = &self.seen else {
            return if map.resident(to_usize(start), len) {
                self.check_size()
            } else {
                self.populate(start, len)
            };
        };
        let (first, end) = (to_usize(start) / GRANULE, (to_usize(start) + len).div_ceil(GRANULE));
        let looks = seen.looks.fetch_add(1, Ordering::Relaxed);
        if looks.is_multiple_of(LOOK_EVERY) && !map.resident(to_usize(start), len) {
            // Memory is short and pages were taken away: so nothing is known any more.
            seen.granules.iter().for_each(|granule| granule.store(false, Ordering::Relaxed));
        }
        if seen.granules[first..end].iter().all(|granule| granule.load(Ordering::Relaxed)) {
            return self.check_size();
        }
        let whole = (end * GRANULE).min(map.words()) - first * GRANULE;
        self.populate((first * GRANULE) as u64, whole)?;
        seen.granules[first..end].iter().for_each(|granule| granule.store(true, Ordering::Relaxed));
        Ok(())
    }

    /// Reads and maps a row. What a later access would turn into a signal is an error here.
    pub fn populate(&self, start: u64, len: usize) -> Result<()> {
        let Some(map) = &self.map else { return Ok(()) };
        self.check_size()?;
        map.populate(to_usize(start), len).map_err(|error| self.read_error(error))
    }

    fn is_lost(&self) -> bool {
        self.map.as_ref().is_some_and(Mapping::is_lost)
    }

    /// What to say of a lost map: that the file is shorter, or else that it could not be read.
    fn lost(&self) -> Error {
        let why = || self.changed("a part of it that is mapped cannot be read".into());
        self.compare_size().map_or_else(|error| error, |()| why())
    }

    /// Looks at the file's size, and whether the map is lost.
    fn check_size(&self) -> Result<()> {
        if self.is_lost() { Err(self.lost()) } else { self.compare_size() }
    }

    /// `lseek` is the cheapest question about a size (about 0.1 us against 0.45 us of `fstat`).
    fn compare_size(&self) -> Result<()> {
        let found = seek(&self.file, SeekFrom::End(0)).map_err(|error| self.read_error(error.into()))?;
        if found == self.bytes {
            return Ok(());
        }
        Err(self.changed(format!("it held {} bytes and now holds {found}", self.bytes)))
    }

    pub(crate) fn changed(&self, what: String) -> Error {
        Error::Changed { path: self.path.clone(), what }
    }

    fn read_error(&self, error: io::Error) -> Error {
        let truncated = error.kind() == ErrorKind::UnexpectedEof
            || error.raw_os_error() == Some(Errno::FAULT.raw_os_error());
        if truncated {
            return self.changed(format!("it no longer holds the {} bytes it had", self.bytes));
        }
        Error::Io { path: self.path.clone(), source: error }
    }

    /// xxh3-64 of the content, read with `pread` so that a truncation meanwhile is an error.
    pub(crate) fn hash(&self) -> Result<u64> {
        if let Some(map) = &self.map {
            // Pages that come in through the map arrive as large ones; the hash then finds them.
            map.populate(0, map.words()).map_err(|error| self.read_error(error))?;
        }
        let mut hasher = Xxh3::new();
        let mut chunk = vec![0; HASH_CHUNK.min(to_usize(self.bytes))];
        let mut at = 0;
        while at < self.bytes {
            let part = &mut chunk[..to_usize(self.bytes - at).min(HASH_CHUNK)];
            self.file.read_exact_at(part, at).map_err(|error| self.read_error(error))?;
            hasher.update(part);
            at += part.len() as u64;
        }
        Ok(hasher.digest())
    }
}

/// Tokens of a shard where they lie in its map, which lives as long as this.
#[derive(Clone, Debug)]
pub struct View {
    shard: Arc<OpenShard>,
    start: usize,
    len: usize,
}

impl View {
    /// Looks at the file's size again: a view may have waited before it is handed out.
    pub fn check(&self) -> Result<()> {
        self.shard.check_size()
    }

    /// A copy of the tokens; one that is truncated meanwhile is an error.
    pub fn copied(&self) -> Result<Vec<u32>> {
        let mut tokens = vec![0; self.len];
        self.shard.read(self.start as u64, &mut tokens, Place::NOWHERE)?;
        Ok(tokens)
    }

    /// Address of the first token. Null only for shards without a map, which give no views.
    #[must_use]
    pub fn pointer(&self) -> *const u32 {
        self.shard.map.as_ref().map_or(std::ptr::null(), |map| map.pointer(self.start, self.len))
    }
}

fn open_error(path: &Path, source: io::Error) -> Error {
    let path = path.to_path_buf();
    let limits = [Errno::MFILE, Errno::NFILE, Errno::NOMEM].map(Errno::raw_os_error);
    match source.raw_os_error() {
        _ if source.kind() == ErrorKind::NotFound => Error::Missing { path },
        Some(code) if limits.contains(&code) => Error::Limit { path, source },
        _ => Error::Io { path, source },
    }
}
