//! Shards: opening, checking against the manifest, verifying once, reading rows, and a bounded
//! cache of open ones.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use crate::error::{Error, Result};
use crate::latency::Latencies;
use crate::mapping::Mapping;

const WORD: u64 = size_of::<u32>() as u64;
const HASH_CHUNK: usize = 1 << 20;

/// Tokens that are brought into memory together where blocks are read: 64 KiB.
const GRANULE: usize = 1 << 14;

/// Every so many views, the system is asked whether what was brought into memory is still there.
const LOOK_EVERY: u64 = 16;

/// What a manifest says about one shard.
#[derive(Clone, Debug)]
pub struct ShardFacts {
    /// Which of the set's folders it lies in.
    pub folder: u32,
    /// Plain file name.
    pub file: Box<str>,
    /// Tokens.
    pub words: u64,
    /// xxh3-64 of the content, where the manifest records it.
    pub xxh3: Option<u64>,
}

/// When a shard's content is hashed and compared with the manifest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verify {
    /// Before its first row is handed out.
    FirstTouch,
    /// All of them when the set is opened.
    Open,
    /// Never.
    Off,
}

/// How rows are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Copied out of a map of the file; the size is checked before every row.
    Mmap,
    /// With `pread`: slower when cached, and an error where a map would be a signal.
    Pread,
}

/// How a set of shards is used.
#[derive(Clone, Debug)]
pub struct Options {
    /// When content is hashed.
    pub verify: Verify,
    /// How rows are read.
    pub access: Access,
    /// Shards kept open at once; views keep theirs alive beyond it.
    pub max_open: usize,
    /// An open shard whose file was not looked at for this long is compared with it again.
    pub recheck: Duration,
    /// Whether most of each shard will be read in order (blocks, evaluation) or rows of it at random.
    pub sequential: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            verify: Verify::FirstTouch,
            access: Access::Mmap,
            max_open: 256,
            recheck: Duration::from_secs(1),
            sequential: false,
        }
    }
}

/// What was read so far.
#[derive(Debug, Default)]
pub struct Counters {
    /// Bytes copied or handed out as views.
    pub bytes: AtomicU64,
    /// Times a shard was opened.
    pub opened: AtomicU64,
    /// Shards whose hash was compared.
    pub verified: AtomicU64,
    /// Times a prefetched batch was not ready when it was asked for.
    pub waits: AtomicU64,
    /// How long the consumer was held up for each batch.
    pub latencies: Latencies,
}

/// What tells a file from one that took its place or was written to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    bytes: u64,
    modified: (i64, i64),
}

impl Stamp {
    fn of(metadata: &std::fs::Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            bytes: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
        }
    }

    /// A digest that is never 0, which stands for "not known".
    fn digest(self) -> u64 {
        let (seconds, nanoseconds) = self.modified;
        let fields =
            [self.device, self.inode, self.bytes, seconds.cast_unsigned(), nanoseconds.cast_unsigned()];
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
    /// Kept where blocks are read; rows here and there are looked up in the page tables instead.
    seen: Option<Seen>,
}

impl OpenShard {
    /// Copies the tokens from `start` on into `row`.
    pub fn read(&self, start: u64, row: &mut [u32]) -> Result<()> {
        if let Some(map) = &self.map {
            self.check_size()?;
            map.copy_to(to_usize(start), row);
            return Ok(());
        }
        let bytes = bytemuck::cast_slice_mut(row);
        self.file.read_exact_at(bytes, start * WORD).map_err(|error| self.read_error(error))
    }

    /// Copies the tokens from `start` on into `row`, widened to 64 bits.
    pub fn read_wide(&self, start: u64, row: &mut [i64]) -> Result<()> {
        if let Some(map) = &self.map {
            self.check_size()?;
            map.widen_to(to_usize(start), row);
            return Ok(());
        }
        let mut narrow = vec![0_u32; row.len()];
        self.read(start, &mut narrow)?;
        for (wide, word) in row.iter_mut().zip(narrow) {
            *wide = i64::from(word);
        }
        Ok(())
    }

    /// Asks the CPU for a row that will be read next.
    pub fn prefetch(&self, start: u64, len: usize) {
        if let Some(map) = &self.map {
            map.prefetch(to_usize(start), len);
        }
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

    /// Looks at the file's size: a map of a truncated file must not be touched.
    ///
    /// `lseek` is the cheapest question with that answer (about 0.1 us against 0.45 us of `fstat`).
    /// Between it and the copy a writer has about a microsecond; `Access::Pread` leaves none.
    fn check_size(&self) -> Result<()> {
        let found = seek(&self.file, SeekFrom::End(0)).map_err(|error| self.read_error(error.into()))?;
        if found == self.bytes {
            return Ok(());
        }
        Err(self.changed(format!("it held {} bytes and now holds {found}", self.bytes)))
    }

    fn changed(&self, what: String) -> Error {
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
    fn hash(&self) -> Result<u64> {
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

    /// Address of the first token. Null only for shards without a map, which give no views.
    #[must_use]
    pub fn pointer(&self) -> *const u32 {
        self.shard.map.as_ref().map_or(std::ptr::null(), |map| map.pointer(self.start, self.len))
    }
}

struct Entry {
    index: u32,
    shard: Arc<OpenShard>,
    used: u64,
    checked: Instant,
}

/// The open shards, and for every shard its place among them: looked up for every row, so not hashed.
struct Cache {
    entries: Vec<Entry>,
    places: Vec<u32>,
    clock: u64,
}

const NOT_OPEN: u32 = u32::MAX;

impl Cache {
    fn of(shards: usize) -> Self {
        Self { entries: Vec::new(), places: vec![NOT_OPEN; shards], clock: 0 }
    }

    /// The open shard, or None when it is not open or its file is no longer the one that was opened.
    fn find(&mut self, index: u32, now: Instant, recheck: Duration) -> Option<Arc<OpenShard>> {
        self.clock += 1;
        let place = self.places[index as usize];
        let entry = self.entries.get_mut(place as usize)?;
        entry.used = self.clock;
        if now.saturating_duration_since(entry.checked) >= recheck {
            let metadata = std::fs::metadata(&entry.shard.path);
            if !metadata.is_ok_and(|metadata| Stamp::of(&metadata) == entry.shard.stamp) {
                self.remove(place);
                return None;
            }
            entry.checked = now;
        }
        Some(Arc::clone(&entry.shard))
    }

    fn insert(&mut self, index: u32, shard: Arc<OpenShard>, max_open: usize) {
        self.clock += 1;
        // Another thread may have opened it meanwhile: the newer one stays.
        self.remove(self.places[index as usize]);
        while self.entries.len() >= max_open.max(1) {
            let oldest = (0..).zip(&self.entries).min_by_key(|(_, entry)| entry.used);
            let Some((place, _)) = oldest else { break };
            self.remove(place);
        }
        #[allow(clippy::cast_possible_truncation, reason = "there are fewer places than shards, a u32")]
        let place = self.entries.len() as u32;
        self.places[index as usize] = place;
        self.entries.push(Entry { index, shard, used: self.clock, checked: Instant::now() });
    }

    fn remove(&mut self, place: u32) {
        if place as usize >= self.entries.len() {
            return;
        }
        let removed = self.entries.swap_remove(place as usize);
        self.places[removed.index as usize] = NOT_OPEN;
        if let Some(moved) = self.entries.get(place as usize) {
            self.places[moved.index as usize] = place;
        }
    }

    fn clear(&mut self) {
        self.entries.clear();
        self.places.fill(NOT_OPEN);
    }
}

/// All shards of a stream, at most `max_open` of them open.
pub struct ShardSet {
    folders: Vec<PathBuf>,
    facts: Vec<ShardFacts>,
    options: Options,
    cache: Mutex<Cache>,
    /// Digest of the stamp under which a shard was last accepted, 0 before that.
    accepted: Vec<AtomicU64>,
    /// What was read so far.
    pub counters: Counters,
}

impl ShardSet {
    /// A set of `facts` lying in `folders`; reads nothing unless `verify` is [`Verify::Open`].
    pub fn new(folders: Vec<PathBuf>, facts: Vec<ShardFacts>, options: Options) -> Result<Self> {
        let accepted: Vec<_> = facts.iter().map(|_| AtomicU64::new(0)).collect();
        let set = Self {
            folders,
            facts,
            options,
            cache: Mutex::new(Cache::of(accepted.len())),
            accepted,
            counters: Counters::default(),
        };
        if set.options.verify == Verify::Open {
            for index in 0..set.facts.len() {
                set.open(&set.facts[index], index)?;
            }
        }
        Ok(set)
    }

    /// What the manifest says about each shard.
    #[must_use]
    pub fn facts(&self) -> &[ShardFacts] {
        &self.facts
    }

    /// How the set is used.
    #[must_use]
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// Shards open now.
    pub fn open_count(&self) -> Result<usize> {
        Ok(self.cache.lock()?.entries.len())
    }

    /// Where shard `index` lies.
    #[must_use]
    pub fn path(&self, index: u32) -> PathBuf {
        let facts = &self.facts[index as usize];
        self.folders[facts.folder as usize].join(&*facts.file)
    }

    /// Shard `index`, opened, checked and verified.
    pub fn get(&self, index: u32) -> Result<Arc<OpenShard>> {
        let known = self.cache.lock()?.find(index, Instant::now(), self.options.recheck);
        known.map_or_else(|| self.get_anew(index), Ok)
    }

    /// The shards at `indices`, in that order.
    pub fn get_all(&self, indices: impl ExactSizeIterator<Item = u32>) -> Result<Vec<Arc<OpenShard>>> {
        let now = Instant::now();
        let mut shards = Vec::with_capacity(indices.len());
        let mut cache = self.cache.lock()?;
        for index in indices {
            if let Some(shard) = cache.find(index, now, self.options.recheck) {
                shards.push(shard);
            } else {
                drop(cache);
                shards.push(self.get_anew(index)?);
                cache = self.cache.lock()?;
            }
        }
        Ok(shards)
    }

    /// Opens without holding the lock: hashing a shard must not keep others from their open ones.
    fn get_anew(&self, index: u32) -> Result<Arc<OpenShard>> {
        let facts = &self.facts[index as usize];
        let opened = match self.open(facts, index as usize) {
            Err(Error::Limit { .. }) => {
                self.cache.lock()?.clear();
                self.open(facts, index as usize)?
            }
            other => other?,
        };
        let shard = Arc::new(opened);
        self.cache.lock()?.insert(index, Arc::clone(&shard), self.options.max_open);
        Ok(shard)
    }

    fn open(&self, facts: &ShardFacts, index: usize) -> Result<OpenShard> {
        let path = self.folders[facts.folder as usize].join(&*facts.file);
        let file = File::open(&path).map_err(|error| open_error(&path, error))?;
        let metadata = file.metadata().map_err(|error| open_error(&path, error))?;
        let bytes = facts.words * WORD;
        if metadata.len() != bytes {
            return Err(Error::Size { path, found: metadata.len(), expected: bytes });
        }
        let map = match self.options.access {
            Access::Mmap if bytes > 0 => {
                let map = Mapping::new(&file, to_usize(facts.words)).map_err(|e| open_error(&path, e))?;
                Some(map)
            }
            _ => None,
        };
        let seen = map.as_ref().filter(|_| self.options.sequential).map(Seen::nothing_of);
        let stamp = Stamp::of(&metadata);
        let shard = OpenShard { path, file, map, bytes, stamp, seen };
        self.counters.opened.fetch_add(1, Ordering::Relaxed);
        self.accept(&shard, facts, index)?;
        Ok(shard)
    }

    /// Advises on, and verifies where due, a shard that was just opened. One that changed since it was
    /// accepted is judged by its content, and refused when there is no hash to judge it by.
    fn accept(&self, shard: &OpenShard, facts: &ShardFacts, index: usize) -> Result<()> {
        let digest = shard.stamp.digest();
        let before = self.accepted[index].load(Ordering::Acquire);
        let hash = facts.xxh3.filter(|_| self.options.verify != Verify::Off);
        if let Some(map) = &shard.map {
            if self.options.sequential || (hash.is_some() && before != digest) {
                map.expect_all();
            } else {
                map.expect_random();
            }
        }
        if before == digest {
            return Ok(());
        }
        if let Some(expected) = hash {
            let found = shard.hash()?;
            self.counters.verified.fetch_add(1, Ordering::Relaxed);
            if found != expected {
                return Err(Error::Hash { path: shard.path.clone(), found, expected });
            }
        } else if before != 0 {
            return Err(shard.changed("another file took its place, or it was written to".into()));
        }
        self.accepted[index].store(digest, Ordering::Release);
        Ok(())
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

/// Sizes and offsets fit: the crate only builds where addresses have 64 bits.
#[allow(clippy::cast_possible_truncation, reason = "usize has 64 bits, see lib.rs")]
pub(crate) const fn to_usize(value: u64) -> usize {
    value as usize
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    struct Fixture {
        folder: tempfile::TempDir,
        facts: Vec<ShardFacts>,
    }

    impl Fixture {
        /// Shards of the given sizes; token n of shard s is `s * 1000 + n`.
        fn new(sizes: &[u32]) -> Self {
            let folder = tempfile::tempdir().unwrap();
            let mut facts = Vec::new();
            for (shard, &size) in (0_u32..).zip(sizes) {
                let words: Vec<u32> = (0..size).map(|n| shard * 1000 + n).collect();
                let bytes: &[u8] = bytemuck::cast_slice(&words);
                let file = format!("shard-{shard:05}.bin");
                fs::write(folder.path().join(&file), bytes).unwrap();
                let (words, xxh3) = (u64::from(size), Some(xxh3_64(bytes)));
                facts.push(ShardFacts { folder: 0, file: file.into(), words, xxh3 });
            }
            Self { folder, facts }
        }

        fn set(&self, options: Options) -> ShardSet {
            ShardSet::new(vec![self.folder.path().to_path_buf()], self.facts.clone(), options).unwrap()
        }

        fn path(&self, shard: usize) -> PathBuf {
            self.folder.path().join(&*self.facts[shard].file)
        }
    }

    fn both_ways(mut check: impl FnMut(Options)) {
        for access in [Access::Mmap, Access::Pread] {
            check(Options { access, recheck: Duration::ZERO, ..Options::default() });
        }
    }

    #[test]
    fn rows_are_read_narrow_and_wide() {
        both_ways(|options| {
            let set = Fixture::new(&[50, 80]);
            let shard = set.set(options).get(1).unwrap();
            let (mut narrow, mut wide) = ([0; 3], [0; 3]);
            shard.read(77, &mut narrow).unwrap();
            shard.read_wide(77, &mut wide).unwrap();
            assert_eq!(narrow, [1077, 1078, 1079]);
            assert_eq!(wide, [1077, 1078, 1079]);
        });
    }

    #[test]
    fn a_truncated_shard_is_an_error_of_the_open_one_and_of_the_next_one() {
        both_ways(|options| {
            let fixture = Fixture::new(&[50_000]);
            let set = fixture.set(options);
            let shard = set.get(0).unwrap();
            File::options().write(true).open(fixture.path(0)).unwrap().set_len(100).unwrap();
            let mut row = [0; 10];
            assert!(matches!(shard.read(49_000, &mut row), Err(Error::Changed { .. })));
            assert!(matches!(shard.populate(49_000, 10), Err(Error::Changed { .. }) | Ok(())));
            assert!(matches!(set.get(0), Err(Error::Size { found: 100, .. })));
        });
    }

    #[test]
    fn a_replaced_shard_is_judged_by_its_content() {
        both_ways(|options| {
            let fixture = Fixture::new(&[50]);
            let set = fixture.set(options);
            let content = fs::read(fixture.path(0)).unwrap();
            let old = set.get(0).unwrap();
            for (content, fits) in [(content, true), (vec![0; 200], false)] {
                let fresh = fixture.folder.path().join("fresh");
                fs::write(&fresh, content).unwrap();
                fs::rename(&fresh, fixture.path(0)).unwrap();
                assert_eq!(set.get(0).is_ok(), fits);
            }
            let mut row = [0; 2];
            old.read(48, &mut row).unwrap();
            assert_eq!(row, [48, 49], "the replaced file lives on for those who hold it");
        });
    }

    #[test]
    fn without_a_hash_a_replaced_shard_is_refused() {
        let mut fixture = Fixture::new(&[50]);
        fixture.facts[0].xxh3 = None;
        let set = fixture.set(Options { recheck: Duration::ZERO, ..Options::default() });
        set.get(0).unwrap();
        fs::remove_file(fixture.path(0)).unwrap();
        fs::write(fixture.path(0), vec![0; 200]).unwrap();
        assert!(matches!(set.get(0), Err(Error::Changed { .. })));
    }

    #[test]
    fn a_wrong_hash_is_an_error_unless_nobody_looks() {
        let mut fixture = Fixture::new(&[50]);
        fixture.facts[0].xxh3 = Some(1);
        let folders = vec![fixture.folder.path().to_path_buf()];
        let open = Options { verify: Verify::Open, ..Options::default() };
        assert!(matches!(ShardSet::new(folders, fixture.facts.clone(), open), Err(Error::Hash { .. })));
        assert!(matches!(fixture.set(Options::default()).get(0), Err(Error::Hash { expected: 1, .. })));
        assert!(fixture.set(Options { verify: Verify::Off, ..Options::default() }).get(0).is_ok());
    }

    #[test]
    fn the_least_recently_used_shard_makes_room() {
        let fixture = Fixture::new(&[50; 4]);
        let set = fixture.set(Options { max_open: 2, ..Options::default() });
        for index in [0, 1, 0, 2, 0, 3] {
            set.get(index).unwrap();
            assert!(set.open_count().unwrap() <= 2);
        }
        let opened = set.counters.opened.load(Ordering::Relaxed);
        set.get(0).unwrap();
        assert_eq!(set.counters.opened.load(Ordering::Relaxed), opened, "0 was used most recently but one");
        assert_eq!(opened, 4);
        assert_eq!(set.counters.verified.load(Ordering::Relaxed), 4);
    }

    #[test]
    fn a_view_holds_its_map_when_the_set_is_gone() {
        let fixture = Fixture::new(&[50]);
        let view = fixture.set(Options::default()).get(0).unwrap().view(10, 5).unwrap().unwrap();
        drop(fixture);
        let shard = &view.shard;
        let mut row = [0; 5];
        shard.map.as_ref().unwrap().copy_to(view.start, &mut row);
        assert_eq!(row, [10, 11, 12, 13, 14]);
        assert_eq!(view.pointer(), shard.map.as_ref().unwrap().pointer(10, 5));
    }

    #[test]
    fn rows_read_with_pread_have_no_views() {
        let fixture = Fixture::new(&[50]);
        let set = fixture.set(Options { access: Access::Pread, ..Options::default() });
        assert!(set.get(0).unwrap().view(0, 5).unwrap().is_none());
    }

    #[test]
    fn a_missing_shard_and_a_folder_in_its_place_are_errors() {
        let fixture = Fixture::new(&[50, 50]);
        fs::remove_file(fixture.path(0)).unwrap();
        fs::remove_file(fixture.path(1)).unwrap();
        fs::create_dir(fixture.path(1)).unwrap();
        let set = fixture.set(Options::default());
        assert!(matches!(set.get(0), Err(Error::Missing { .. })));
        assert!(set.get(1).is_err());
    }
}
