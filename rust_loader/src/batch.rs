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

/// The bit of a token that begins a conversation, in a flagged shard; see `apr_dist/data/flags.py`.
pub const BEGINS: u32 = 1 << 30;

/// Tokens that are looked at together: few conversations begin, so most of these hold none that does.
const LOOKED_AT: usize = 64;

/// Adds where conversations begin in one row's inputs, counted from `base` on; every row begins one.
fn mark_begins<T: Copy>(inputs: &[T], base: usize, begins: impl Fn(T) -> bool, edges: &mut Vec<i32>) {
    let mut push = |place: usize| edges.push(i32::try_from(place).unwrap_or(i32::MAX));
    push(base);
    for (number, part) in inputs.chunks(LOOKED_AT).enumerate() {
        if part.iter().fold(false, |any, &token| any | begins(token)) {
            let first = number * LOOKED_AT;
            let places = (first..).zip(part).filter(|&(place, &token)| place > 0 && begins(token));
            places.for_each(|(place, _)| push(base + place));
        }
    }
}

/// Where conversations begin in the flattened inputs of the rows in `batch`, each `width` tokens of `kind`,
/// and their end; a row's last token is only a target.
#[must_use]
pub fn edges(batch: &[u8], width: usize, kind: Width) -> Vec<i32> {
    let (mut edges, length) = (Vec::new(), width - 1);
    let rows = match kind {
        Width::Narrow => {
            let rows = bytemuck::cast_slice::<u8, u32>(batch).chunks_exact(width);
            let count = rows.len();
            let begins = |token: u32| token & BEGINS != 0;
            rows.enumerate()
                .for_each(|(row, tokens)| mark_begins(&tokens[..length], row * length, begins, &mut edges));
            count
        }
        Width::Wide => {
            let rows = bytemuck::cast_slice::<u8, i64>(batch).chunks_exact(width);
            let count = rows.len();
            let begins = |token: i64| token & i64::from(BEGINS) != 0;
            rows.enumerate()
                .for_each(|(row, tokens)| mark_begins(&tokens[..length], row * length, begins, &mut edges));
            count
        }
    };
    edges.push(i32::try_from(rows * length).unwrap_or(i32::MAX));
    edges
}

/// As [`edges`], of views whose neighbouring rows share a token.
pub fn view_edges(views: &[View], width: usize) -> Result<Vec<i32>> {
    let (mut edges, mut base, length) = (Vec::new(), 0, width - 1);
    for view in views {
        let tokens = view.copied()?;
        for inputs in tokens[..tokens.len() - 1].chunks_exact(length) {
            mark_begins(inputs, base, |token| token & BEGINS != 0, &mut edges);
            base += length;
        }
    }
    edges.push(i32::try_from(base).unwrap_or(i32::MAX));
    Ok(edges)
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

    #[test]
    fn conversations_are_found_in_gathered_rows_of_both_widths_and_in_views() {
        let folder = tempfile::tempdir().unwrap();
        let mut content: Vec<u32> = (0..901).map(|n| n | 1 << 31).collect();
        for place in [0, 7, 100, 163, 164, 300, 899] {
            content[place] |= BEGINS;
        }
        std::fs::write(folder.path().join("0.bin"), bytemuck::cast_slice::<u32, u8>(&content)).unwrap();
        let facts = vec![ShardFacts { folder: 0, file: "0.bin".into(), words: 901, xxh3: None }];
        let set = ShardSet::new(vec![folder.path().into()], facts, Options::default()).unwrap();
        let rows: Vec<Row> = (0..9).map(|row| Row { shard: 0, start: row * 100 }).collect();
        let expected = [0, 7, 100, 163, 164, 200, 300, 400, 500, 600, 700, 800, 899, 900];
        let (mut narrow, mut wide) = (vec![0_u32; 9 * 101], vec![0_i64; 9 * 101]);
        gather(&set, &rows, 101, &mut narrow).unwrap();
        gather_wide(&set, &rows, 101, &mut wide).unwrap();
        assert_eq!(edges(bytemuck::cast_slice(&narrow), 101, Width::Narrow), expected);
        assert_eq!(edges(bytemuck::cast_slice(&wide), 101, Width::Wide), expected);
        let blocks: Vec<Row> = (0..3).map(|block| Row { shard: 0, start: block * 300 }).collect();
        assert_eq!(view_edges(&views(&set, &blocks, 301).unwrap(), 101).unwrap(), expected);
    }
}
