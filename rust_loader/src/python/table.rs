//! A manifest's shard list, held here until Python asks for single shards.

use std::path::PathBuf;

use pyo3::exceptions::PyIndexError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::table::{Line, all_fit, parse};

/// The fields of a shard, in the order that a manifest gives them.
type Fields =
    (String, u64, u64, Option<String>, Option<String>, Option<u32>, Option<u32>, Option<u64>, Option<String>);

#[pyclass(frozen)]
pub struct ShardTable {
    pub lines: Vec<Line>,
}

#[pymethods]
impl ShardTable {
    /// The table in `content`, and the length of what stands before it.
    #[staticmethod]
    #[allow(clippy::needless_pass_by_value, reason = "what PyO3 makes of the argument")]
    fn parse(py: Python<'_>, content: &Bound<'_, PyBytes>) -> Option<(usize, Self)> {
        let content = content.as_bytes();
        py.detach(|| parse(content)).map(|(head, lines)| (head, Self { lines }))
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
            line.xxh3.map(|hash| format!("{hash:016x}")),
            line.sha256.map(|hash| hex(&hash)),
            line.min_id,
            line.max_id,
            line.documents,
            line.index_xxh3.map(|hash| format!("{hash:016x}")),
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

    /// Hash and tokens, one shard a line; None when a hash is not recorded.
    fn identity(&self, py: Python<'_>) -> Option<Py<PyBytes>> {
        let text = py.detach(|| {
            let mut text = String::with_capacity(self.lines.len() * 80);
            for line in &self.lines {
                if !text.is_empty() {
                    text.push('\n');
                }
                push_hex(&mut text, &line.sha256?);
                text.push(' ');
                text.push_str(&line.tokens.to_string());
            }
            Some(text)
        })?;
        Some(PyBytes::new(py, text.as_bytes()).unbind())
    }

    #[allow(clippy::needless_pass_by_value, reason = "what PyO3 makes of the argument")]
    fn all_fit(&self, py: Python<'_>, folder: PathBuf) -> bool {
        py.detach(|| all_fit(&folder, &self.lines))
    }
}

fn hex(words: &[u64]) -> String {
    let mut text = String::with_capacity(words.len() * 16);
    push_hex(&mut text, words);
    text
}

fn push_hex(text: &mut String, words: &[u64]) {
    for word in words {
        for place in (0..16).rev() {
            let digit = word >> (4 * place) & 15;
            text.push(char::from(b"0123456789abcdef"[usize::try_from(digit).unwrap_or(0)]));
        }
    }
}
