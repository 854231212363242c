//! Running ahead: a thread that makes the batches that will be asked for next, into a bounded queue.
//!
//! [`Ring`] is the queue and its thread; what the thread does for batches is [`crate::filler`]'s.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::error::{Error, Result};

#[allow(clippy::struct_excessive_bools, reason = "four independent facts about two threads")]
struct Queue<T> {
    ready: VecDeque<Result<T>>,
    finished: bool,
    closed: bool,
    /// Waking a thread costs microseconds: so only one that sleeps is woken.
    consumer_sleeps: bool,
    maker_sleeps: bool,
}

struct Shared<T> {
    queue: Mutex<Queue<T>>,
    /// Whether a pop would find nothing yet, kept beside the lock: a consumer that looks again and again
    /// must not take the lock from the thread it waits for.
    pending: AtomicBool,
    filled: Condvar,
    drained: Condvar,
}

impl<T> Shared<T> {
    // A panicking maker leaves the queue as it was before or after a push: it stays usable.
    fn lock(&self) -> MutexGuard<'_, Queue<T>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// To be called with the lock held, after each change of what a pop would find.
    fn note(&self, queue: &Queue<T>) {
        self.pending.store(queue.ready.is_empty() && !queue.finished, Ordering::Release);
    }
}

/// What came out of a ring.
#[derive(Debug)]
pub enum Popped<T> {
    /// The next batch.
    Ready(T),
    /// It is not there yet.
    Pending,
    /// There is no next batch.
    Finished,
}

/// At most `depth` finished batches, and the thread that makes them.
pub struct Ring<T> {
    shared: Arc<Shared<T>>,
    thread: Mutex<Option<JoinHandle<()>>>,
    process: u32,
    thread_id: Arc<AtomicU32>,
    low_water: usize,
}

impl<T: Send + 'static> Ring<T> {
    /// Starts a thread that calls `make` until it gives None or an error, at most `depth` ahead.
    ///
    /// # Errors
    /// The system starts no thread.
    pub fn start<F>(depth: usize, mut make: F) -> std::io::Result<Self>
    where
        F: FnMut() -> Option<Result<T>> + Send + 'static,
    {
        let queue = Queue {
            ready: VecDeque::with_capacity(depth),
            finished: false,
            closed: false,
            consumer_sleeps: false,
            maker_sleeps: false,
        };
        let shared = Arc::new(Shared {
            queue: Mutex::new(queue),
            pending: AtomicBool::new(true),
            filled: Condvar::new(),
            drained: Condvar::new(),
        });
        let thread_id = Arc::new(AtomicU32::new(0));
        let (theirs, id) = (Arc::clone(&shared), Arc::clone(&thread_id));
        let thread = std::thread::Builder::new().name("apr-dist-prefetch".into()).spawn(move || {
            let _finish = FinishOnDrop(&theirs);
            id.store(rustix::thread::gettid().as_raw_nonzero().get().cast_unsigned(), Ordering::Relaxed);
            run(&theirs, depth, &mut make);
        })?;
        Ok(Self {
            shared,
            thread: Mutex::new(Some(thread)),
            process: std::process::id(),
            thread_id,
            low_water: depth / 2,
        })
    }

    /// The next batch, waiting at most `patience` for it.
    ///
    /// # Errors
    /// The error that making the batch ended with; nothing follows it.
    pub fn pop(&self, patience: Duration) -> Result<Popped<T>> {
        let mut queue = self.shared.lock();
        if queue.ready.is_empty() && !queue.finished && !patience.is_zero() {
            queue.consumer_sleeps = true;
            let waited = self
                .shared
                .filled
                .wait_timeout_while(queue, patience, |queue| queue.ready.is_empty() && !queue.finished);
            queue = waited.unwrap_or_else(PoisonError::into_inner).0;
            queue.consumer_sleeps = false;
        }
        let popped = queue.ready.pop_front();
        self.shared.note(&queue);
        let finished = queue.finished;
        let wake = queue.maker_sleeps && queue.ready.len() <= self.low_water;
        queue.maker_sleeps &= !wake;
        drop(queue);
        if wake {
            self.shared.drained.notify_one();
        }
        match popped {
            Some(batch) => batch.map(Popped::Ready),
            None if finished => Ok(Popped::Finished),
            None => Ok(Popped::Pending),
        }
    }
}

impl<T> Ring<T> {
    /// True while [`Ring::pop`] would have to wait.
    #[must_use]
    pub fn is_pending(&self) -> bool {
        self.shared.pending.load(Ordering::Acquire)
    }

    /// Page faults of the thread so far: (minor, major); None where the system does not tell.
    #[must_use]
    pub fn faults(&self) -> Option<(u64, u64)> {
        let id = self.thread_id.load(Ordering::Relaxed);
        let stat = std::fs::read_to_string(format!("/proc/self/task/{id}/stat")).ok()?;
        // proc_pid_stat(5); the second field, the name, is the only one that may hold spaces.
        let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(7);
        let minor = fields.next()?.parse().ok()?;
        let major = fields.nth(1)?.parse().ok()?;
        Some((minor, major))
    }

    /// Stops the thread and waits for it; what was made and not popped is dropped.
    pub fn close(&self) {
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(thread) = thread else { return };
        if self.process != std::process::id() {
            // A forked child has a copy of the queue and no thread; a lock may be held for ever.
            std::mem::forget(thread);
            return;
        }
        self.shared.lock().closed = true;
        self.shared.drained.notify_all();
        // A maker that panicked has said so on standard error.
        let _ = thread.join();
        let left = std::mem::take(&mut self.shared.lock().ready);
        drop(left);
    }
}

impl<T> Drop for Ring<T> {
    fn drop(&mut self) {
        self.close();
    }
}

/// Ends the queue when the thread ends, however it ends.
struct FinishOnDrop<'a, T>(&'a Shared<T>);

impl<T> Drop for FinishOnDrop<'_, T> {
    fn drop(&mut self) {
        let mut queue = self.0.lock();
        if std::thread::panicking() {
            queue.ready.push_back(Err(Error::Poisoned));
        }
        queue.finished = true;
        self.0.note(&queue);
        drop(queue);
        self.0.filled.notify_all();
    }
}

fn run<T>(shared: &Shared<T>, depth: usize, make: &mut impl FnMut() -> Option<Result<T>>) {
    loop {
        let mut queue = shared.lock();
        if queue.ready.len() >= depth {
            queue.maker_sleeps = true;
            // Until the queue is low, not until it has one place: fewer wakings, and a run of batches.
            let full = |queue: &mut Queue<T>| queue.maker_sleeps && !queue.closed;
            queue = shared.drained.wait_while(queue, full).unwrap_or_else(PoisonError::into_inner);
        }
        if queue.closed {
            return;
        }
        drop(queue);
        let Some(batch) = make() else { return };
        let failed = batch.is_err();
        let mut queue = shared.lock();
        queue.ready.push_back(batch);
        shared.note(&queue);
        let wake = queue.consumer_sleeps;
        drop(queue);
        if wake {
            shared.filled.notify_one();
        }
        if failed {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    fn counting(depth: usize, end: u64) -> Ring<u64> {
        let mut next = 0..end;
        Ring::start(depth, move || next.next().map(Ok)).unwrap()
    }

    #[test]
    fn batches_come_out_in_order_and_then_end() {
        for depth in 1..5 {
            let ring = counting(depth, 100);
            for expected in 0..100 {
                assert!(matches!(ring.pop(LONG), Ok(Popped::Ready(found)) if found == expected));
            }
            assert!(matches!(ring.pop(LONG), Ok(Popped::Finished)));
        }
    }

    #[test]
    fn no_more_than_depth_batches_are_made_ahead() {
        let made = Arc::new(AtomicU32::new(0));
        let count = Arc::clone(&made);
        let ring = Ring::start(3, move || Some(Ok(count.fetch_add(1, Ordering::SeqCst)))).unwrap();
        for popped in 0..50 {
            assert!(matches!(ring.pop(LONG), Ok(Popped::Ready(_))));
            assert!(made.load(Ordering::SeqCst) <= popped + 1 + 3 + 1);
        }
    }

    #[test]
    fn an_error_comes_out_in_its_place() {
        let mut step = 0;
        let ring = Ring::start(4, move || {
            step += 1;
            Some(if step < 3 { Ok(step) } else { Err(Error::Poisoned) })
        });
        let ring = ring.unwrap();
        assert!(matches!(ring.pop(LONG), Ok(Popped::Ready(1))));
        assert!(matches!(ring.pop(LONG), Ok(Popped::Ready(2))));
        assert!(ring.pop(LONG).is_err());
        assert!(matches!(ring.pop(LONG), Ok(Popped::Finished)));
    }

    #[test]
    fn a_thread_that_panics_is_an_error_not_a_hang() {
        let ring = Ring::<u64>::start(2, || panic!("on purpose")).unwrap();
        assert!(matches!(ring.pop(LONG), Err(Error::Poisoned)));
        assert!(matches!(ring.pop(LONG), Ok(Popped::Finished)));
    }

    #[test]
    fn a_closed_ring_has_let_go_of_everything() {
        let owner = Arc::new(());
        let theirs = Arc::clone(&owner);
        let ring = Ring::start(3, move || Some(Ok(Arc::clone(&theirs)))).unwrap();
        let held = ring.pop(LONG).unwrap();
        ring.close();
        assert_eq!(Arc::strong_count(&owner), 2, "{held:?}");
        assert!(matches!(ring.pop(LONG), Ok(Popped::Finished)));
    }

    #[test]
    fn asking_without_patience_does_not_wait() {
        let (gate, wait) = std::sync::mpsc::channel::<()>();
        let ring = Ring::start(1, move || wait.recv().ok().map(|()| Ok(()))).unwrap();
        assert!(matches!(ring.pop(Duration::ZERO), Ok(Popped::Pending)));
        gate.send(()).unwrap();
        assert!(matches!(ring.pop(LONG), Ok(Popped::Ready(()))));
        drop(gate);
        assert!(matches!(ring.pop(LONG), Ok(Popped::Finished)));
    }

    #[test]
    fn the_thread_tells_its_page_faults() {
        let ring = counting(2, 1000);
        ring.pop(LONG).unwrap();
        assert!(ring.faults().is_some());
    }
}
