//! What the prefetch thread does for batches: reading the known order ahead, and gathering or viewing.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::batch::{populate, read_ahead};
use crate::error::Result;
use crate::set::ShardSet;
use crate::shard::OpenShard;
use crate::sizes::to_usize;
use crate::stream::{Orders, Row, Stream};

/// A row that takes longer than this was not in memory; one that was takes about 1 us.
const COLD_ROW: Duration = Duration::from_micros(20);

/// Advice on a row that is in memory takes less than this.
const WARM_ADVICE: Duration = Duration::from_micros(4);

/// Steps without a cold row after which advice is no longer given.
const WARM_STEPS: u32 = 32;

/// Rows that are asked for ahead of the one that is copied, at least: enough to keep a disk busy.
const ROWS_AHEAD: u64 = 64;

/// Tokens that are asked for ahead where they follow each other: enough to read as fast as in order.
const TOKENS_AHEAD: u64 = 4 << 20;

/// Tokens that are asked for in one call, at most.
const SPAN_TOKENS: usize = 1 << 20;

/// Which positions the batches of a rank take.
#[derive(Clone, Copy, Debug)]
pub struct Course {
    /// First position of the first batch.
    pub first: u64,
    /// Positions of a batch.
    pub count: u64,
    /// From one batch's first position to the next one's.
    pub stride: u64,
    /// Batches there are; None when there is no end.
    pub batches: Option<u64>,
    /// Positions that are read together: 1 for rows, more for views of blocks.
    pub step: u64,
}

/// Gives the rows of one batch after the other, having asked the system for those of the next ones.
pub struct Filler {
    stream: Arc<Stream>,
    shards: Arc<ShardSet>,
    course: Course,
    planned: VecDeque<Vec<Row>>,
    planned_steps: u64,
    steps_ahead: usize,
    /// Tokens that are read together.
    span: usize,
    /// Steps that advice will still be given for without a sign that it is needed.
    advise: Arc<AtomicU32>,
    orders: Orders,
    /// Where rows follow each other: who asks for them.
    advisor: Option<Advisor>,
}

impl Filler {
    /// A filler at the beginning of `course`.
    #[must_use]
    pub fn new(stream: Arc<Stream>, shards: Arc<ShardSet>, course: Course) -> Self {
        let sequential = shards.options().sequential;
        let rows = if sequential { TOKENS_AHEAD / stream.width() } else { ROWS_AHEAD };
        let steps_ahead = to_usize(rows.div_ceil(course.count.max(1)).max(2));
        let span = to_usize(course.step * (stream.width() - 1) + 1);
        let advise = Arc::new(AtomicU32::new(WARM_STEPS));
        let advisor = if sequential { Advisor::start(span, Arc::clone(&advise)) } else { None };
        Self {
            stream,
            shards,
            course,
            span,
            planned: VecDeque::new(),
            planned_steps: 0,
            steps_ahead,
            advise,
            orders: Orders::default(),
            advisor,
        }
    }

    /// Makes the next batch of its rows with `make`; None behind the last one.
    pub fn next<T>(&mut self, make: impl FnOnce(&[Row]) -> Result<T>) -> Option<Result<T>> {
        if let Err(error) = self.plan() {
            return Some(Err(error));
        }
        let rows = self.planned.pop_front()?;
        Some(self.fill(&rows, make))
    }

    fn fill<T>(&mut self, rows: &[Row], make: impl FnOnce(&[Row]) -> Result<T>) -> Result<T> {
        if self.advise.load(Ordering::Relaxed) > 0 {
            // On cold storage an I/O error must be an error here, not a fault while copying.
            populate(&self.shards, rows, self.span)?;
            return make(rows);
        }
        let begun = Instant::now();
        let batch = make(rows)?;
        if mean(begun.elapsed(), rows.len()) > COLD_ROW {
            self.advise.store(WARM_STEPS, Ordering::Relaxed);
        }
        Ok(batch)
    }

    /// Works out the rows of the next batches, and advises on them unless they are in memory anyway.
    fn plan(&mut self) -> Result<()> {
        while self.planned.len() <= self.steps_ahead && self.course.batches != Some(self.planned_steps) {
            let first = self.course.first + self.planned_steps * self.course.stride;
            let rows = self.stream.rows_with(first, self.course.count, self.course.step, &mut self.orders)?;
            self.planned_steps += 1;
            if self.advise.load(Ordering::Relaxed) > 0 {
                // A shard that is wrong is reported when its batch is asked for, not before.
                let _ = self.advise_on(&rows);
            }
            self.planned.push_back(rows);
        }
        if let Some(advisor) = &mut self.advisor
            && self.course.batches == Some(self.planned_steps)
        {
            advisor.flush();
        }
        Ok(())
    }

    fn advise_on(&mut self, rows: &[Row]) -> Result<()> {
        if let Some(advisor) = &mut self.advisor {
            return rows.iter().try_for_each(|&row| advisor.ask(&self.shards, row));
        }
        let begun = Instant::now();
        read_ahead(&self.shards, rows, self.span)?;
        note(&self.advise, mean(begun.elapsed(), rows.len()) < WARM_ADVICE);
        Ok(())
    }
}

/// One step nearer to giving no more advice, or back to the beginning.
fn note(advise: &AtomicU32, warm: bool) {
    let left = advise.load(Ordering::Relaxed);
    advise.store(if warm { left.saturating_sub(1) } else { WARM_STEPS }, Ordering::Relaxed);
}

/// Tokens of one shard that follow each other.
struct Span {
    shard: Arc<OpenShard>,
    index: u32,
    start: u64,
    len: usize,
}

impl Span {
    /// Takes `len` tokens from `row` on in, if they follow or overlap and the span stays small.
    fn takes_in(&mut self, row: Row, len: usize) -> bool {
        let follows = row.shard == self.index
            && (self.start..=self.start + self.len as u64).contains(&row.start)
            && self.len < SPAN_TOKENS;
        if follows {
            self.len = self.len.max(to_usize(row.start - self.start) + len);
        }
        follows
    }
}

/// A thread that asks the system to read whole spans: submitting a large read takes as long as copying much
/// of it, so it must not hold up the thread that makes batches.
struct Advisor {
    sender: Option<Sender<Span>>,
    thread: Option<JoinHandle<()>>,
    /// What is not yet asked for, because more of it may follow.
    open: Option<Span>,
    step: usize,
}

impl Advisor {
    /// None where the system starts no thread: then rows are asked for one by one.
    fn start(step: usize, advise: Arc<AtomicU32>) -> Option<Self> {
        let (sender, spans) = channel::<Span>();
        let ask = move || {
            for span in spans {
                let warm = span.shard.is_resident(span.start, span.len);
                if !warm {
                    span.shard.will_need(span.start, span.len);
                }
                note(&advise, warm);
            }
        };
        let thread = std::thread::Builder::new().name("apr-dist-ahead".into()).spawn(ask).ok()?;
        Some(Self { sender: Some(sender), thread: Some(thread), open: None, step })
    }

    fn ask(&mut self, shards: &ShardSet, row: Row) -> Result<()> {
        if self.open.as_mut().is_some_and(|span| span.takes_in(row, self.step)) {
            return Ok(());
        }
        self.flush();
        // Opened, and verified, here: so the thread that makes batches does it once.
        let shard = shards.get(row.shard)?;
        self.open = Some(Span { shard, index: row.shard, start: row.start, len: self.step });
        Ok(())
    }

    fn flush(&mut self) {
        if let (Some(span), Some(sender)) = (self.open.take(), &self.sender) {
            // Refused only by a thread that died: then nothing is read ahead.
            let _ = sender.send(span);
        }
    }
}

impl Drop for Advisor {
    fn drop(&mut self) {
        self.sender = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn mean(time: Duration, rows: usize) -> Duration {
    time / u32::try_from(rows).unwrap_or(u32::MAX).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::{Options, ShardFacts};
    use crate::stream::{Order, SourceFacts};

    #[test]
    fn batches_come_in_order_and_spans_grow_only_by_what_follows() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("a"), vec![0; 4 * 4097]).unwrap();
        let facts = vec![ShardFacts { folder: 0, file: "a".into(), words: 4097, xxh3: None }];
        let part = SourceFacts { id: 0, shard_count: 1, units_per_cycle: 1 };
        let order = Order::Shuffled { seed: 1, block: 8 };
        let stream = Arc::new(Stream::new(&facts, &[part], 16, order).unwrap());
        let options = Options { sequential: true, ..Options::default() };
        let shards = Arc::new(ShardSet::new(vec![folder.path().into()], facts, options).unwrap());
        let course = Course { first: 0, count: 4, stride: 4, batches: Some(64), step: 4 };
        let mut filler = Filler::new(Arc::clone(&stream), Arc::clone(&shards), course);
        for step in 0..64 {
            let rows = filler.next(|rows| Ok(rows.to_vec())).unwrap().unwrap();
            assert_eq!(rows, stream.rows(step * 4, 4, 4).unwrap());
        }
        assert!(filler.next(|_| Ok(())).is_none());

        let shard = shards.get(0).unwrap();
        let mut span = Span { shard, index: 0, start: 64, len: 65 };
        assert!(span.takes_in(Row { shard: 0, start: 128 }, 65));
        assert!(span.takes_in(Row { shard: 0, start: 193 }, 65));
        assert_eq!((span.start, span.len), (64, 194));
        for (shard, start) in [(0, 300), (0, 0), (1, 200)] {
            assert!(!span.takes_in(Row { shard, start }, 65));
        }
        span.len = SPAN_TOKENS;
        assert!(!span.takes_in(Row { shard: 0, start: 200 }, 65));
    }
}
