//! A manifest's shard list, held here until Python asks for single shards.

use std::path::PathBuf;

use pyo3::exceptions::{PyIndexError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::table::{Line, first_misfit, listed_twice, parse};

/// The fields of a shard, in the order that a manifest gives them.
type Fields = (
    String,
    u64,
    u64,
    Option<String>,
    Option<String>,
    Option<u32>,
    Option<u32>,
    Option<u64>,
    Option<String>,
    Option<String>,
    Option<u64>,
);

#[pyclass(frozen)]
pub struct ShardTable {
    pub lines: Vec<Line>,
}

#[pymethods]
impl ShardTable {
    /// The table in `content`, None when it has none, and the other keys as JSON.
    #[staticmethod]
    fn parse<'py>(
        py: Python<'py>,
        content: &Bound<'py, PyBytes>,
    ) -> PyResult<(Bound<'py, PyBytes>, Option<Self>)> {
        let content = content.as_bytes();
        let recorded = py.detach(|| parse(content)).map_err(PyValueError::new_err)?;
        let head = serde_json::to_vec(&recorded).map_err(|error| PyValueError::new_err(error.to_string()))?;
        Ok((PyBytes::new(py, &head), recorded.lines.map(|lines| Self { lines })))
    }

    fn __len__(&self) -> usize {
        self.lines.len()
    }

    fn fields(&self, index: usize) -> PyResult<Fields> {
        let line = self.lines.get(index).ok_or_else(|| PyIndexError::new_err(index))?;
        Ok((
            line.file.to_string(),
            line.tokens,
            line.bytes,
            line.xxh3_64.map(|hash| hash.to_string()),
            line.sha256.map(|hash| hash.to_string()),
            line.min_id,
            line.max_id,
            line.documents,
            line.index_xxh3_64.map(|hash| hash.to_string()),
            line.fingerprints_xxh3_64.map(|hash| hash.to_string()),
            line.targets,
        ))
    }

    #[getter]
    fn total_tokens(&self) -> u128 {
        self.lines.iter().map(|line| u128::from(line.tokens)).sum()
    }

    #[getter]
    fn longest(&self) -> u64 {
        self.lines.iter().map(|line| line.tokens).max().unwrap_or(0)
    }

    /// Sequences of `seq_length` tokens in one pass: neighbours share the token that is only a target.
    fn sequences(&self, seq_length: u64) -> u64 {
        self.lines.iter().map(|line| line.tokens.saturating_sub(1) / seq_length.max(1)).sum()
    }

    /// Hash and tokens, one shard a line; None when a hash is not recorded.
    fn identity(&self, py: Python<'_>) -> Option<Py<PyBytes>> {
        let text = py.detach(|| {
            let lines = self.lines.iter().map(|line| Some(format!("{} {}", line.sha256?, line.tokens)));
            lines.collect::<Option<Vec<_>>>().map(|lines| lines.join("\n"))
        })?;
        Some(PyBytes::new(py, text.as_bytes()).unbind())
    }

    fn listed_twice(&self) -> Option<&str> {
        listed_twice(&self.lines)
    }

    fn has_broken_size(&self) -> bool {
        self.lines.iter().any(|line| line.tokens.checked_mul(4) != Some(line.bytes))
    }

    #[allow(clippy::needless_pass_by_value, reason = "what PyO3 makes of the argument")]
    fn first_misfit(&self, py: Python<'_>, folder: PathBuf) -> Option<(usize, Option<u64>)> {
        py.detach(|| first_misfit(&folder, &self.lines))
    }
}
