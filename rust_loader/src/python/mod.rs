//! What Python sees; documented in `apr_dist/_rust_loader.pyi`.

mod dlpack;
mod errors;

use std::any::Any;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};

use crate::batch::{Buffer, Pool, gather};
use crate::error::Result;
use crate::shard::{Access, Options, ShardFacts, ShardSet, Verify, View, to_usize};
use crate::stream::{Order, Row, SourceFacts, Stream};
use dlpack::Memory;

/// Free buffers kept for the next batches.
const KEPT_BUFFERS: usize = 8;

/// Name, tokens and hash of one shard.
type ShardTuple = (String, u64, Option<u64>);

/// Folder, shards, identity and units per cycle of one source.
type SourceTuple = (PathBuf, Vec<ShardTuple>, u64, u64);

#[pyclass(frozen)]
struct TokenStream {
    shards: Arc<ShardSet>,
    stream: Arc<Stream>,
    pool: Arc<Pool<u32>>,
}

#[pymethods]
impl TokenStream {
    #[new]
    #[pyo3(signature = (sources, *, seq_length, shuffle, seed=0, block=1, sample=0,
                        verify="first-touch", access="mmap", max_open=256, recheck_s=1.0))]
    #[allow(clippy::too_many_arguments, reason = "keywords, named at every call")]
    fn new(
        py: Python<'_>,
        sources: Vec<SourceTuple>,
        seq_length: u64,
        shuffle: &str,
        seed: u64,
        block: u64,
        sample: u64,
        verify: &str,
        access: &str,
        max_open: usize,
        recheck_s: f64,
    ) -> PyResult<Self> {
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
            recheck: Duration::try_from_secs_f64(recheck_s)
                .map_err(|error| PyValueError::new_err(error.to_string()))?,
            sequential: matches!(shuffle, "block" | "none"),
        };
        if seq_length == 0 || block == 0 {
            return Err(PyValueError::new_err("a sequence and a block hold at least one element"));
        }
        let (folders, facts, parts) = flatten(sources)?;
        py.detach(|| {
            let stream = Stream::new(&facts, &parts, seq_length, order)?;
            let shards = ShardSet::new(folders, facts, options)?;
            Ok(Self { shards: Arc::new(shards), stream: Arc::new(stream), pool: Pool::new(KEPT_BUFFERS) })
        })
    }

    #[getter]
    fn dropped_tokens(&self) -> u64 {
        self.stream.dropped_tokens()
    }

    #[getter]
    fn length(&self) -> Option<u64> {
        self.stream.length()
    }

    fn sequences(&self, source: usize) -> u64 {
        self.stream.sequences(source)
    }

    fn progress(&self, positions: u64) -> Vec<(u64, u64)> {
        let progress = self.stream.progress(positions);
        progress.into_iter().map(|one| (one.sequences, one.epoch)).collect()
    }

    fn locate(&self, first: u64, count: u64) -> PyResult<Vec<(u32, u64)>> {
        Ok(self.rows(first, count)?.into_iter().map(|row| (row.shard, row.start)).collect())
    }

    fn gather(&self, py: Python<'_>, first: u64, count: u64) -> PyResult<Py<PyAny>> {
        let buffer = py.detach(|| self.gathered(first, count))?;
        buffer_memory(buffer, &[count, self.stream.width()]).into_capsule(py)
    }

    /// Views of `count` sequences: rows `[width]`, or blocks `[rows_per_view, width]`.
    #[pyo3(signature = (first, count, rows_per_view=None))]
    fn views<'py>(
        &self,
        py: Python<'py>,
        first: u64,
        count: u64,
        rows_per_view: Option<u64>,
    ) -> PyResult<Bound<'py, PyList>> {
        let views = py.detach(|| self.view_all(first, count, rows_per_view.unwrap_or(1)))?;
        let list = PyList::empty(py);
        for view in views {
            list.append(self.view_memory(view, rows_per_view).into_capsule(py)?)?;
        }
        Ok(list)
    }

    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let counters = &self.shards.counters;
        let stats = PyDict::new(py);
        stats.set_item("bytes", counters.bytes.load(Ordering::Relaxed))?;
        stats.set_item("shards_opened", counters.opened.load(Ordering::Relaxed))?;
        stats.set_item("shards_verified", counters.verified.load(Ordering::Relaxed))?;
        stats.set_item("shards_open", self.shards.open_count()?)?;
        Ok(stats)
    }
}

impl TokenStream {
    fn rows(&self, first: u64, count: u64) -> Result<Vec<Row>> {
        let mut rows = Vec::new();
        self.stream.rows(first, count, &mut rows)?;
        Ok(rows)
    }

    fn gathered(&self, first: u64, count: u64) -> Result<Buffer<u32>> {
        let rows = self.rows(first, count)?;
        let width = to_usize(self.stream.width());
        let mut buffer = self.pool.take(rows.len() * width)?;
        gather(&self.shards, &rows, width, buffer.words())?;
        Ok(buffer)
    }

    fn view_all(&self, first: u64, count: u64, rows_per_view: u64) -> Result<Vec<View>> {
        let step = self.stream.width() - 1;
        let len = to_usize(rows_per_view * step + 1);
        let mut views = Vec::new();
        for row in self.rows(first, count)?.into_iter().step_by(to_usize(rows_per_view)) {
            let view = self.shards.get(row.shard)?.view(row.start, len)?;
            views.extend(view);
            self.shards.counters.bytes.fetch_add(len as u64 * 4, Ordering::Relaxed);
        }
        Ok(views)
    }

    fn view_memory(&self, view: View, rows_per_view: Option<u64>) -> Memory {
        let width = self.stream.width();
        let (shape, strides) = match rows_per_view {
            None => (vec![width], vec![1]),
            Some(rows) => (vec![rows, width], vec![width - 1, 1]),
        };
        Memory {
            data: view.pointer().cast(),
            bits: 32,
            shape: signed(&shape),
            strides: signed(&strides),
            writable: false,
            owner: Box::new(view),
        }
    }
}

fn buffer_memory(mut buffer: Buffer<u32>, shape: &[u64]) -> Memory {
    let data = buffer.words().as_ptr().cast();
    let owner: Box<dyn Any + Send> = Box::new(buffer);
    Memory { data, bits: 32, shape: signed(shape), strides: signed(&[shape[1], 1]), writable: true, owner }
}

fn signed(values: &[u64]) -> Box<[i64]> {
    values.iter().map(|value| value.cast_signed()).collect()
}

fn parse_verify(verify: &str) -> PyResult<Verify> {
    match verify {
        "first-touch" => Ok(Verify::FirstTouch),
        "open" => Ok(Verify::Open),
        "off" => Ok(Verify::Off),
        other => Err(PyValueError::new_err(format!("unknown verify {other:?}"))),
    }
}

fn parse_access(access: &str) -> PyResult<Access> {
    match access {
        "mmap" => Ok(Access::Mmap),
        "pread" => Ok(Access::Pread),
        other => Err(PyValueError::new_err(format!("unknown access {other:?}"))),
    }
}

fn flatten(sources: Vec<SourceTuple>) -> PyResult<(Vec<PathBuf>, Vec<ShardFacts>, Vec<SourceFacts>)> {
    let mut folders = Vec::new();
    let mut facts = Vec::new();
    let mut parts = Vec::new();
    for (folder, shards, id, units_per_cycle) in sources {
        let index = u32::try_from(folders.len())?;
        folders.push(folder);
        parts.push(SourceFacts { id, shard_count: u32::try_from(shards.len())?, units_per_cycle });
        facts.extend(shards.into_iter().map(|(file, words, xxh3)| ShardFacts {
            folder: index,
            file: file.into_boxed_str(),
            words,
            xxh3,
        }));
    }
    Ok((folders, facts, parts))
}

#[pymodule]
fn _rust_loader(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<TokenStream>()
}
