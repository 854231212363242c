//! Batches: gathering rows into one buffer, and buffers that come back when their last user is done.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use crate::error::Result;
use crate::shard::{OpenShard, ShardSet};
use crate::stream::Row;

/// Rows gathered at a time: as many shards are held open beyond the set's limit.
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
    read: impl Fn(&OpenShard, u64, &mut [T]) -> Result<()>,
) -> Result<()> {
    assert_eq!(out.len(), rows.len() * width, "the buffer has another size than its rows");
    for (rows, out) in rows.chunks(GATHER_CHUNK).zip(out.chunks_mut(GATHER_CHUNK * width)) {
        let open = rows.iter().map(|row| shards.get(row.shard)).collect::<Result<Vec<_>>>()?;
        for (i, (row, words)) in rows.iter().zip(out.chunks_exact_mut(width)).enumerate() {
            if let (Some(next), Some(shard)) = (rows.get(i + 1), open.get(i + 1)) {
                shard.prefetch(next.start, width);
            }
            read(&open[i], row.start, words)?;
        }
    }
    let bytes = rows.len() * width * size_of::<u32>();
    shards.counters.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    Ok(())
}

/// Buffers waiting to be used again.
#[derive(Debug)]
pub struct Pool<T> {
    free: Mutex<Vec<Box<[T]>>>,
    keep: usize,
}

impl<T: Clone + Default> Pool<T> {
    /// A pool that keeps at most `keep` free buffers.
    #[must_use]
    pub fn new(keep: usize) -> Arc<Self> {
        Arc::new(Self { free: Mutex::default(), keep })
    }

    /// A buffer of `len` words, with whatever it last held.
    pub fn take(self: &Arc<Self>, len: usize) -> Result<Buffer<T>> {
        let mut free = self.free.lock()?;
        let place = free.iter().position(|words| words.len() == len);
        let words = place.map(|place| free.swap_remove(place));
        drop(free);
        Ok(Buffer {
            words: words.unwrap_or_else(|| vec![T::default(); len].into_boxed_slice()),
            pool: Arc::clone(self),
        })
    }
}

/// A batch's memory; goes back to its pool when dropped.
#[derive(Debug)]
pub struct Buffer<T> {
    words: Box<[T]>,
    pool: Arc<Pool<T>>,
}

impl<T> Buffer<T> {
    /// The words, to fill or to hand on.
    pub fn words(&mut self) -> &mut [T] {
        &mut self.words
    }
}

impl<T> Drop for Buffer<T> {
    fn drop(&mut self) {
        // Runs wherever the last tensor dies, also in a forked child, where another thread of the
        // parent may have held the lock for ever: so it must not wait.
        if let Ok(mut free) = self.pool.free.try_lock()
            && free.len() < self.pool.keep
        {
            free.push(std::mem::take(&mut self.words));
        }
    }
}
