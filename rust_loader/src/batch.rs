//! Batches: gathering rows into one buffer, and buffers that come back when their last user is done.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use bytemuck::{Pod, Zeroable};

use crate::error::Result;
use crate::mapping::Place;
use crate::set::ShardSet;
use crate::shard::{OpenShard, View};
use crate::sizes::to_usize;
use crate::stream::Row;

/// Rows gathered at a time: as many shards may be held open beyond the set's limit.
const GATHER_CHUNK: usize = 32;

/// Copies `rows`, each `width` tokens, one after the other into `out`.
///
/// # Panics
/// When `out` is not `rows.len() * width` long.
pub fn gather(shards: &ShardSet, rows: &[Row], width: usize, out: &mut [u32]) -> Result<()> {
    gather_with(shards, rows, width, out, OpenShard::read)
}

/// As [`gather`], widened to 64 bits.
///
/// # Panics
/// When `out` is not `rows.len() * width` long.
pub fn gather_wide(shards: &ShardSet, rows: &[Row], width: usize, out: &mut [i64]) -> Result<()> {
    gather_with(shards, rows, width, out, OpenShard::read_wide)
}

fn gather_with<T>(
    shards: &ShardSet,
    rows: &[Row],
    width: usize,
    out: &mut [T],
    read: impl Fn(&OpenShard, u64, &mut [T], Place) -> Result<()>,
) -> Result<()> {
    assert_eq!(out.len(), rows.len() * width, "the buffer has another size than its rows");
    for (rows, out) in rows.chunks(GATHER_CHUNK).zip(out.chunks_mut(GATHER_CHUNK * width)) {
        let now = Instant::now();
        let open = shards.get_all(rows.iter().map(|row| row.shard), now)?;
        for shard in &open {
            shard.look(now)?;
        }
        for (i, (row, words)) in rows.iter().zip(out.chunks_exact_mut(width)).enumerate() {
            // The last row has no next one: its own lines are there already.
            let next = if i + 1 < rows.len() { i + 1 } else { i };
            read(&open[i], row.start, words, open[next].place(rows[next].start, width))?;
        }
    }
    count_bytes(shards, rows.len() * width);
    Ok(())
}

/// Views of `span` tokens from each of `rows` on. Empty when the set maps nothing.
pub fn views(shards: &ShardSet, rows: &[Row], span: usize) -> Result<Vec<View>> {
    let mut views = Vec::with_capacity(rows.len());
    for row in rows {
        views.extend(shards.get(row.shard)?.view(row.start, span)?);
    }
    count_bytes(shards, views.len() * span);
    Ok(views)
}

/// Asks the system to read `span` tokens from each of `rows` on, without waiting for them.
pub fn read_ahead(shards: &ShardSet, rows: &[Row], span: usize) -> Result<()> {
    for row in rows {
        shards.get(row.shard)?.will_need(row.start, span);
    }
    Ok(())
}

/// Reads and maps `span` tokens from each of `rows` on, so that touching them cannot fail for want of the
/// storage.
pub fn populate(shards: &ShardSet, rows: &[Row], span: usize) -> Result<()> {
    for row in rows {
        shards.get(row.shard)?.populate(row.start, span)?;
    }
    Ok(())
}

fn count_bytes(shards: &ShardSet, words: usize) {
    let bytes = words * size_of::<u32>();
    shards.counters.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
}

/// Memory comes in cache lines, so that a buffer is aligned for every element and for copies.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C, align(64))]
struct Line([u64; 8]);

/// Buffers waiting to be used again.
#[derive(Debug)]
pub struct Pool {
    free: Mutex<Vec<Box<[Line]>>>,
    keep: usize,
}

impl Pool {
    /// A pool that keeps at most `keep` free buffers.
    #[must_use]
    pub fn new(keep: usize) -> Arc<Self> {
        Arc::new(Self { free: Mutex::default(), keep })
    }

    /// A buffer of `bytes`, with whatever it last held.
    pub fn take(self: &Arc<Self>, bytes: usize) -> Result<Buffer> {
        let lines = bytes.div_ceil(size_of::<Line>());
        let mut free = self.free.lock()?;
        let place = free.iter().position(|buffer| buffer.len() == lines);
        let known = place.map(|place| free.swap_remove(place));
        drop(free);
        let lines = known.unwrap_or_else(|| bytemuck::allocation::zeroed_slice_box(lines));
        Ok(Buffer { lines, bytes, pool: Arc::clone(self) })
    }
}

/// A batch's memory; goes back to its pool when dropped.
#[derive(Debug)]
pub struct Buffer {
    lines: Box<[Line]>,
    bytes: usize,
    pool: Arc<Pool>,
}

impl Buffer {
    /// The buffer's bytes, as elements of any plain type.
    pub fn elements<T: Pod>(&mut self) -> &mut [T] {
        bytemuck::cast_slice_mut(&mut bytemuck::cast_slice_mut::<Line, u8>(&mut self.lines)[..self.bytes])
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // Runs wherever the last tensor dies, also in a forked child, where another thread of the
        // parent may have held the lock for ever: so it must not wait.
        if let Ok(mut free) = self.pool.free.try_lock()
            && free.len() < self.pool.keep
        {
            free.push(std::mem::take(&mut self.lines));
        }
    }
}

/// The type of a gathered batch's elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Width {
    /// 32 bits, as in the shards.
    Narrow,
    /// 64 bits, for consumers on this machine that index with nothing else.
    Wide,
}

impl Width {
    /// Bytes of an element.
    #[must_use]
    pub fn bytes(self) -> usize {
        match self {
            Self::Narrow => size_of::<u32>(),
            Self::Wide => size_of::<i64>(),
        }
    }

    /// Gathers `rows` into `out`, which holds exactly their bytes and is aligned for the element.
    pub fn gather(self, shards: &ShardSet, rows: &[Row], width: u64, out: &mut [u8]) -> Result<()> {
        match self {
            Self::Narrow => gather(shards, rows, to_usize(width), bytemuck::cast_slice_mut(out)),
            Self::Wide => gather_wide(shards, rows, to_usize(width), bytemuck::cast_slice_mut(out)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::{Options, ShardFacts};

    fn shards(folder: &std::path::Path, count: u32, words: u32) -> ShardSet {
        let mut facts = Vec::new();
        for shard in 0..count {
            let content: Vec<u32> = (0..words).map(|n| shard << 16 | n).collect();
            let file = format!("{shard}.bin");
            std::fs::write(folder.join(&file), bytemuck::cast_slice::<u32, u8>(&content)).unwrap();
            facts.push(ShardFacts { folder: 0, file: file.into(), words: u64::from(words), xxh3: None });
        }
        ShardSet::new(vec![folder.to_path_buf()], facts, Options { max_open: 4, ..Options::default() })
            .unwrap()
    }

    #[test]
    fn many_rows_of_many_shards_arrive_in_order_narrow_and_wide() {
        let folder = tempfile::tempdir().unwrap();
        let set = shards(folder.path(), 50, 100);
        let rows: Vec<Row> = (0..100).map(|i| Row { shard: i * 7 % 50, start: u64::from(i % 90) }).collect();
        let (mut narrow, mut wide) = (vec![0; 100 * 9], vec![0; 100 * 9]);
        read_ahead(&set, &rows, 9).unwrap();
        populate(&set, &rows, 9).unwrap();
        gather(&set, &rows, 9, &mut narrow).unwrap();
        gather_wide(&set, &rows, 9, &mut wide).unwrap();
        for (row, words) in rows.iter().zip(narrow.chunks(9)) {
            for (offset, &word) in (0..).zip(words) {
                assert_eq!(u64::from(word), u64::from(row.shard << 16) + row.start + offset);
            }
        }
        assert!(narrow.iter().zip(&wide).all(|(&narrow, &wide)| i64::from(narrow) == wide));
        assert_eq!(set.counters.bytes.load(Ordering::Relaxed), 2 * 100 * 9 * 4);
    }

    #[test]
    fn a_buffer_comes_back_only_when_its_user_is_done() {
        let pool = Pool::new(1);
        let mut first = pool.take(100).unwrap();
        let place = first.elements::<u8>().as_ptr();
        assert_eq!(place.addr() % 64, 0);
        let mut second = pool.take(100).unwrap();
        assert_ne!(second.elements::<u8>().as_ptr(), place);
        drop(first);
        drop(second);
        assert_eq!(pool.take(100).unwrap().elements::<u8>().as_ptr(), place);
    }

    #[test]
    fn views_cover_their_rows_to_the_last_token() {
        let folder = tempfile::tempdir().unwrap();
        let set = shards(folder.path(), 1, 9);
        assert_eq!(views(&set, &[Row { shard: 0, start: 0 }], 9).unwrap().len(), 1);
        let rows = [Row { shard: 0, start: 0 }, Row { shard: 0, start: 4 }];
        assert_eq!(views(&set, &rows, 5).unwrap().len(), 2);
    }
}
