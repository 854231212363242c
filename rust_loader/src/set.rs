//! All shards of a stream: a bounded number of open ones, each verified when it is first touched.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::options::{Counters, Options, ShardFacts, Verify};
use crate::shard::OpenShard;
use crate::sizes::to_usize;

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

/// Open shards looked at for the one to close.
const EXAMINED: usize = 64;

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
            if !entry.shard.is_unchanged() {
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
            self.remove(self.stale());
        }
        #[allow(clippy::cast_possible_truncation, reason = "there are fewer places than shards, a u32")]
        let place = self.entries.len() as u32;
        self.places[index as usize] = place;
        self.entries.push(Entry { index, shard, used: self.clock, checked: Instant::now() });
    }

    /// The place that was used longest ago, among all or, of many, among a few in different parts.
    fn stale(&self) -> u32 {
        let count = self.entries.len();
        let step = count.div_ceil(EXAMINED).max(1);
        let begin = to_usize(self.clock) % step;
        let looked_at = self.entries.iter().enumerate().skip(begin).step_by(step);
        let stale = looked_at.min_by_key(|(_, entry)| entry.used).map_or(0, |(place, _)| place);
        #[allow(clippy::cast_possible_truncation, reason = "there are fewer places than shards, a u32")]
        let place = stale as u32;
        place
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
    pub fn get_all(
        &self,
        indices: impl ExactSizeIterator<Item = u32>,
        now: Instant,
    ) -> Result<Vec<Arc<OpenShard>>> {
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
        let shard = OpenShard::open(path, facts.words, &self.options)?;
        self.counters.opened.fetch_add(1, Ordering::Relaxed);
        self.accept(&shard, facts, index)?;
        Ok(shard)
    }

    /// Advises on, and verifies where due, a shard that was just opened. One that changed since it was
    /// accepted is judged by its content, and refused when there is no hash to judge it by.
    fn accept(&self, shard: &OpenShard, facts: &ShardFacts, index: usize) -> Result<()> {
        let digest = shard.identity();
        let before = self.accepted[index].load(Ordering::Acquire);
        let due = before != digest && (self.options.verify != Verify::Off || before != 0);
        let remembered = self.options.verified.as_ref().filter(|_| self.options.verify != Verify::Open);
        let known = |hash| remembered.is_some_and(|verified| verified.holds(digest, hash));
        let hash = facts.xxh3.filter(|&hash| due && !known(hash));
        shard.expect(self.options.sequential || hash.is_some());
        if before == digest {
            return Ok(());
        }
        if let Some(expected) = hash {
            let found = shard.hash()?;
            self.counters.verified.fetch_add(1, Ordering::Relaxed);
            if found != expected {
                return Err(Error::Hash { path: shard.path().to_path_buf(), found, expected });
            }
            if let Some(verified) = self.options.verified.as_ref().filter(|_| shard.is_unchanged()) {
                verified.add(digest, shard.changed_at(), expected);
            }
        } else if before != 0 && facts.xxh3.is_none() {
            return Err(shard.changed("another file took its place, or it was written to".into()));
        }
        self.accepted[index].store(digest, Ordering::Release);
        Ok(())
    }
}

#[cfg(test)]
mod tests;
