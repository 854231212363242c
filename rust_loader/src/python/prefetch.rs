//! The prefetch ring as Python sees it.

use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use pyo3::exceptions::{PyOSError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use super::dlpack::Foreign;
use super::{Core, TokenStream};
use crate::batch::{Buffer, view_edges};
use crate::error::Result;
use crate::filler::{Course, Filler};
use crate::ring::{Popped, Ring};
use crate::shard::View;
use crate::stream::Row;

/// Python's signals (an interrupt at the keyboard) are looked at this often while waiting.
const PATIENCE: Duration = Duration::from_millis(100);

/// How long the consumer looks for a batch before it sleeps.
const SPIN: Duration = Duration::from_micros(20);

/// A batch as the thread leaves it.
enum Made {
    Buffer(Buffer),
    Views(Vec<View>),
    /// The consumer's own buffer was filled; the consumer has the tensor.
    Filled,
}

#[pyclass(frozen)]
pub struct Prefetcher {
    core: Arc<Core>,
    ring: Ring<(Made, Vec<i32>)>,
    /// Where conversations begin in the batch that was handed out last.
    edges: Mutex<Vec<i32>>,
    count: u64,
    rows_per_view: Option<u64>,
    buffers: Option<Mutex<Option<Sender<Foreign>>>>,
}

#[pymethods]
impl Prefetcher {
    #[new]
    #[pyo3(signature = (stream, *, first, count, stride, depth, batches=None, rows_per_view=None, buffers=None,
                        flagged=false))]
    #[allow(clippy::too_many_arguments, reason = "keywords, named at every call")]
    fn new(
        stream: &TokenStream,
        first: u64,
        count: u64,
        stride: u64,
        depth: usize,
        batches: Option<u64>,
        rows_per_view: Option<u64>,
        buffers: Option<Vec<Bound<'_, PyAny>>>,
        flagged: bool,
    ) -> PyResult<Self> {
        let core = Arc::clone(&stream.core);
        let step = rows_per_view.unwrap_or(1).max(1);
        let course = Course { first, count, stride, batches, step };
        let mut filler = Filler::new(Arc::clone(&core.stream), Arc::clone(&core.shards), course);
        let (sender, receiver) = channel();
        let external = buffers.is_some();
        for capsule in buffers.into_iter().flatten() {
            send(&sender, Foreign::from_capsule(&capsule, core.element_bits())?)?;
        }
        let theirs = Arc::clone(&core);
        let make = move |rows: &[Row]| {
            if rows_per_view.is_some() {
                let views = theirs.viewed(rows, step)?;
                let edges = if flagged { view_edges(&views, theirs.width())? } else { Vec::new() };
                return Ok((Made::Views(views), edges));
            }
            let mut buffer = theirs.gathered(rows)?;
            let edges = theirs.edges(buffer.elements(), flagged);
            Ok((Made::Buffer(buffer), edges))
        };
        let theirs = Arc::clone(&core);
        let ring = if external {
            Ring::start(depth, move || fill_foreign(&receiver, &mut filler, &theirs, flagged))
        } else {
            Ring::start(depth, move || filler.next(&make))
        };
        let ring = ring.map_err(|error| PyOSError::new_err(format!("no prefetch thread: {error}")))?;
        let buffers = external.then(|| Mutex::new(Some(sender)));
        Ok(Self { core, ring, edges: Mutex::default(), count, rows_per_view, buffers })
    }

    /// The next batch: one capsule, a list of views, or True when the oldest buffer was filled; None
    /// behind the last batch. `buffer` takes the place of the one that was filled.
    #[pyo3(signature = (buffer=None))]
    fn next<'py>(
        &self,
        py: Python<'py>,
        buffer: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Option<Bound<'py, PyAny>>> {
        let begun = Instant::now();
        if let (Some(capsule), Some(sender)) = (buffer, &self.buffers) {
            let foreign = Foreign::from_capsule(capsule, self.core.element_bits())?;
            match &*sender.lock().unwrap_or_else(PoisonError::into_inner) {
                Some(sender) => send(sender, foreign)?,
                None => return Ok(None),
            }
        }
        let Some((made, edges)) = self.wait(py)? else { return Ok(None) };
        *self.edges.lock().unwrap_or_else(PoisonError::into_inner) = edges;
        let batch = match made {
            Made::Buffer(buffer) => {
                self.core.buffer_memory(buffer, self.count).into_capsule(py)?.into_bound(py)
            }
            Made::Views(views) => self.core.view_list(py, views, self.rows_per_view)?.into_any(),
            Made::Filled => true.into_pyobject(py)?.to_owned().into_any(),
        };
        self.core.shards.counters.latencies.record(begun.elapsed());
        Ok(Some(batch))
    }

    /// Where conversations begin in the inputs of the latest batch, and its end: i32 in native order.
    fn edges<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        let edges = self.edges.lock().unwrap_or_else(PoisonError::into_inner);
        PyBytes::new(py, bytemuck::cast_slice(&edges))
    }

    /// Minor and major page faults of the prefetch thread so far.
    fn faults(&self) -> Option<(u64, u64)> {
        self.ring.faults()
    }

    fn close(&self, py: Python<'_>) {
        py.detach(|| self.shut());
    }
}

impl Prefetcher {
    fn wait(&self, py: Python<'_>) -> PyResult<Option<(Made, Vec<i32>)>> {
        let mut popped = self.ring.pop(Duration::ZERO)?;
        if matches!(popped, Popped::Pending) {
            self.core.shards.counters.waits.fetch_add(1, Ordering::Relaxed);
        }
        // A batch that is being copied is there sooner than a sleeping thread wakes up.
        let begun = Instant::now();
        if matches!(popped, Popped::Pending) {
            while self.ring.is_pending() && begun.elapsed() < SPIN {
                std::hint::spin_loop();
            }
            popped = self.ring.pop(Duration::ZERO)?;
        }
        loop {
            match popped {
                Popped::Ready(made) => return Ok(Some(made)),
                Popped::Finished => return Ok(None),
                Popped::Pending => popped = py.detach(|| self.ring.pop(PATIENCE))?,
            }
            py.check_signals()?;
        }
    }

    fn shut(&self) {
        if let Some(sender) = &self.buffers {
            // The thread may be waiting for a buffer: this tells it that none will come.
            sender.lock().unwrap_or_else(PoisonError::into_inner).take();
        }
        self.ring.close();
    }
}

impl Drop for Prefetcher {
    fn drop(&mut self) {
        // The thread may be letting go of a tensor, which can need the interpreter.
        Python::attach(|py| py.detach(|| self.shut()));
    }
}

fn fill_foreign(
    receiver: &Receiver<Foreign>,
    filler: &mut Filler,
    core: &Core,
    flagged: bool,
) -> Option<Result<(Made, Vec<i32>)>> {
    let mut buffer = receiver.recv().ok()?;
    filler.next(|rows| {
        core.gather_into(rows, buffer.bytes())?;
        Ok((Made::Filled, core.edges(buffer.bytes(), flagged)))
    })
}

fn send(sender: &Sender<Foreign>, buffer: Foreign) -> PyResult<()> {
    sender.send(buffer).map_err(|_| PyValueError::new_err("the prefetcher has ended"))
}
