//! Python's description of sources and choices, as this crate's types.

use std::path::PathBuf;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::options::{Access, ShardFacts, Verify};
use crate::stream::SourceFacts;

use super::table::ShardTable;

/// Folder, shards (a manifest's table, or file names, tokens and hashes), identity, and units per cycle of
/// one source.
///
/// Lists of numbers, not a list of tuples: Python's collector would walk a hundred thousand of those.
#[derive(FromPyObject)]
#[allow(clippy::type_complexity, reason = "what Python passes, described above")]
pub enum SourceTuple<'py> {
    Table((PathBuf, Bound<'py, ShardTable>, u64, u64)),
    Lists((PathBuf, Vec<String>, Vec<u64>, Vec<Option<u64>>, u64, u64)),
}

/// The sources taken apart: their shards lie one after the other.
#[derive(Default)]
pub struct Parts {
    /// One folder a source.
    pub folders: Vec<PathBuf>,
    /// Every shard of every source.
    pub facts: Vec<ShardFacts>,
    /// How many of them are whose.
    pub sources: Vec<SourceFacts>,
}

impl Parts {
    /// Takes `sources` apart.
    pub fn of(sources: Vec<SourceTuple<'_>>) -> PyResult<Self> {
        let mut parts = Self::default();
        for source in sources {
            let folder = u32::try_from(parts.folders.len())?;
            let before = parts.facts.len();
            let facts = |file, words, xxh3| ShardFacts { folder, file, words, xxh3 };
            let (path, id, units_per_cycle) = match source {
                SourceTuple::Table((path, table, id, units)) => {
                    let lines = table.get().lines.iter();
                    parts.facts.extend(lines.map(|line| facts(line.file.clone(), line.tokens, line.xxh3)));
                    (path, id, units)
                }
                SourceTuple::Lists((path, files, tokens, hashes, id, units)) => {
                    if files.len() != tokens.len() || files.len() != hashes.len() {
                        return Err(PyValueError::new_err("one name, size and hash a shard"));
                    }
                    let shards = files.into_iter().zip(tokens).zip(hashes);
                    let shards =
                        shards.map(|((file, words), xxh3)| facts(file.into_boxed_str(), words, xxh3));
                    parts.facts.extend(shards);
                    (path, id, units)
                }
            };
            let shard_count = u32::try_from(parts.facts.len() - before)?;
            parts.folders.push(path);
            parts.sources.push(SourceFacts { id, shard_count, units_per_cycle });
        }
        Ok(parts)
    }
}

/// The first of `files` in `folder` that is not a regular file (no link) of its size: its index, and the
/// size found, None where there is no such file. None when all are as they should be.
#[pyfunction]
#[allow(clippy::needless_pass_by_value, reason = "what PyO3 makes of the arguments")]
pub fn first_misfit(
    py: Python<'_>,
    folder: PathBuf,
    files: Vec<String>,
    sizes: Vec<u64>,
) -> Option<(usize, Option<u64>)> {
    py.detach(|| {
        files.iter().zip(sizes).enumerate().find_map(|(index, (file, size))| match std::fs::symlink_metadata(
            folder.join(file),
        ) {
            Ok(metadata) if metadata.is_file() && metadata.len() == size => None,
            Ok(metadata) => Some((index, Some(metadata.len()))),
            Err(_) => Some((index, None)),
        })
    })
}

/// `verify` by name.
pub fn parse_verify(verify: &str) -> PyResult<Verify> {
    match verify {
        "first-touch" => Ok(Verify::FirstTouch),
        "open" => Ok(Verify::Open),
        "off" => Ok(Verify::Off),
        other => Err(PyValueError::new_err(format!("unknown verify {other:?}"))),
    }
}

/// `access` by name.
pub fn parse_access(access: &str) -> PyResult<Access> {
    match access {
        "mmap" => Ok(Access::Mmap),
        "pread" => Ok(Access::Pread),
        other => Err(PyValueError::new_err(format!("unknown access {other:?}"))),
    }
}
