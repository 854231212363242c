//! What Python sees; documented in `apr_dist/_rust_loader.pyi`.

mod dlpack;
mod errors;
mod prefetch;
mod sources;
mod table;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};

use crate::batch::{Buffer, Pool, Width, edges, views};
use crate::error::Result;
use crate::options::Options;
use crate::set::ShardSet;
use crate::shard::View;
use crate::sizes::to_usize;
use crate::stream::{Order, Row, Stream};
use crate::verified::Verified;
use dlpack::Memory;
use sources::{Parts, SourceTuple, parse_access, parse_verify};

/// Free buffers kept for the next batches.
const KEPT_BUFFERS: usize = 8;

#[pyclass(frozen)]
struct TokenStream {
    core: Arc<Core>,
}

/// What the stream and its prefetchers share.
struct Core {
    shards: Arc<ShardSet>,
    stream: Arc<Stream>,
    pool: Arc<Pool>,
    element: Width,
}

#[pymethods]
impl TokenStream {
    #[new]
    #[pyo3(signature = (sources, *, seq_length, shuffle, seed=0, block=1, sample=0, verify="first-touch",
                        access="mmap", max_open=256, recheck_s=1.0, wide=false, verified=None, settle_s=2.0))]
    #[allow(clippy::too_many_arguments, reason = "keywords, named at every call")]
    fn new(
        py: Python<'_>,
        sources: Vec<SourceTuple<'_>>,
        seq_length: u64,
        shuffle: &str,
        seed: u64,
        block: u64,
        sample: u64,
        verify: &str,
        access: &str,
        max_open: usize,
        recheck_s: f64,
        wide: bool,
        verified: Option<PathBuf>,
        settle_s: f64,
    ) -> PyResult<Self> {
        let seconds = |value| {
            Duration::try_from_secs_f64(value).map_err(|error| PyValueError::new_err(error.to_string()))
        };
        let settle = seconds(settle_s)?;
        let order = match shuffle {
            "sequence" => Order::Shuffled { seed, block: 1 },
            "block" => Order::Shuffled { seed, block },
            "none" => Order::InOrder,
            "sample" => Order::Sample { size: sample },
            other => return Err(PyValueError::new_err(format!("unknown shuffle {other:?}"))),
        };
        let options = Options {
            verify: parse_verify(verify)?,
            access: parse_access(access)?,
            max_open,
            recheck: seconds(recheck_s)?,
            // Without it every process verifies for itself.
            verified: verified.and_then(|path| Verified::open(&path, settle).ok()).map(Arc::new),
            sequential: matches!(shuffle, "block" | "none"),
        };
        if seq_length == 0 || block == 0 {
            return Err(PyValueError::new_err("a sequence and a block hold at least one element"));
        }
        let parts = Parts::of(sources)?;
        let core = py.detach(|| -> Result<Core> {
            Ok(Core {
                stream: Arc::new(Stream::new(&parts.facts, &parts.sources, seq_length, order)?),
                shards: Arc::new(ShardSet::new(parts.folders, parts.facts, options)?),
                pool: Pool::new(KEPT_BUFFERS),
                element: if wide { Width::Wide } else { Width::Narrow },
            })
        })?;
        Ok(Self { core: Arc::new(core) })
    }

    #[getter]
    fn dropped_tokens(&self) -> u64 {
        self.core.stream.dropped_tokens()
    }

    #[getter]
    fn length(&self) -> Option<u64> {
        self.core.stream.length()
    }

    fn sequences(&self, source: usize) -> u64 {
        self.core.stream.sequences(source)
    }

    fn progress(&self, positions: u64) -> Vec<(u64, u64)> {
        let progress = self.core.stream.progress(positions);
        progress.into_iter().map(|one| (one.sequences, one.epoch)).collect()
    }

    fn locate(&self, first: u64, count: u64) -> PyResult<Vec<(u32, u64)>> {
        Ok(self.core.stream.rows(first, count, 1)?.into_iter().map(|row| (row.shard, row.start)).collect())
    }

    fn gather(&self, py: Python<'_>, first: u64, count: u64) -> PyResult<Py<PyAny>> {
        let begun = Instant::now();
        let buffer = py.detach(|| self.core.gathered(&self.core.stream.rows(first, count, 1)?))?;
        let capsule = self.core.buffer_memory(buffer, count).into_capsule(py);
        self.core.shards.counters.latencies.record(begun.elapsed());
        capsule
    }

    #[pyo3(signature = (first, count, rows_per_view=None))]
    fn views<'py>(
        &self,
        py: Python<'py>,
        first: u64,
        count: u64,
        rows_per_view: Option<u64>,
    ) -> PyResult<Bound<'py, PyList>> {
        let begun = Instant::now();
        let step = rows_per_view.unwrap_or(1).max(1);
        let views = py.detach(|| self.core.viewed(&self.core.stream.rows(first, count, step)?, step))?;
        let list = self.core.view_list(py, views, rows_per_view);
        self.core.shards.counters.latencies.record(begun.elapsed());
        list
    }

    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let counters = &self.core.shards.counters;
        let stats = PyDict::new(py);
        stats.set_item("bytes", counters.bytes.load(Ordering::Relaxed))?;
        stats.set_item("shards_opened", counters.opened.load(Ordering::Relaxed))?;
        stats.set_item("shards_verified", counters.verified.load(Ordering::Relaxed))?;
        stats.set_item("shards_open", self.core.shards.open_count()?)?;
        stats.set_item("batches", counters.latencies.len())?;
        stats.set_item("waits", counters.waits.load(Ordering::Relaxed))?;
        for (name, per_mille) in [("next_p50_us", 500), ("next_p99_us", 990), ("next_p999_us", 999)] {
            stats.set_item(name, counters.latencies.quantile(per_mille).as_secs_f64() * 1e6)?;
        }
        Ok(stats)
    }
}

impl Core {
    fn gathered(&self, rows: &[Row]) -> Result<Buffer> {
        let mut buffer = self.pool.take(rows.len() * to_usize(self.stream.width()) * self.element.bytes())?;
        self.gather_into(rows, buffer.elements())?;
        Ok(buffer)
    }

    fn gather_into(&self, rows: &[Row], out: &mut [u8]) -> Result<()> {
        self.element.gather(&self.shards, rows, self.stream.width(), out)
    }

    fn width(&self) -> usize {
        to_usize(self.stream.width())
    }

    /// Where conversations begin in a batch of flagged shards; of others nothing is looked at.
    fn edges(&self, batch: &[u8], flagged: bool) -> Vec<i32> {
        if flagged { edges(batch, self.width(), self.element) } else { Vec::new() }
    }

    fn viewed(&self, rows: &[Row], rows_per_view: u64) -> Result<Vec<View>> {
        views(&self.shards, rows, to_usize(rows_per_view * (self.stream.width() - 1) + 1))
    }

    fn buffer_memory(&self, mut buffer: Buffer, count: u64) -> Memory {
        let width = self.stream.width();
        Memory {
            data: buffer.elements::<u8>().as_ptr().cast(),
            bits: self.element_bits(),
            dimensions: 2,
            shape: signed([count, width]),
            strides: signed([width, 1]),
            writable: true,
            owner: Box::new(buffer),
        }
    }

    /// Capsules of views: of rows `[width]`, or of blocks `[rows_per_view, width]`.
    fn view_list<'py>(
        &self,
        py: Python<'py>,
        views: Vec<View>,
        rows_per_view: Option<u64>,
    ) -> PyResult<Bound<'py, PyList>> {
        let width = self.stream.width();
        let list = PyList::empty(py);
        for view in views {
            let (dimensions, shape, strides) = match rows_per_view {
                None => (1, signed([width, 1]), signed([1, 1])),
                Some(rows) => (2, signed([rows, width]), signed([width - 1, 1])),
            };
            view.check()?;
            let data = view.pointer().cast();
            let memory =
                Memory { data, bits: 32, dimensions, shape, strides, writable: false, owner: Box::new(view) };
            list.append(memory.into_capsule(py)?)?;
        }
        Ok(list)
    }

    fn element_bits(&self) -> u8 {
        match self.element {
            Width::Narrow => 32,
            Width::Wide => 64,
        }
    }
}

fn signed(values: [u64; 2]) -> [i64; 2] {
    values.map(u64::cast_signed)
}

#[pymodule]
fn _rust_loader(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<TokenStream>()?;
    module.add_class::<prefetch::Prefetcher>()?;
    module.add_class::<table::ShardTable>()
}
