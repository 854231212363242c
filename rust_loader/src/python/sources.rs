//! Python's description of sources and choices, as this crate's types.

use std::path::PathBuf;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::options::{Access, ShardFacts, Verify};
use crate::stream::SourceFacts;

use super::table::ShardTable;

/// Folder, its shards, identity, and units per cycle of one source.
pub type SourceTuple<'py> = (PathBuf, Bound<'py, ShardTable>, u64, u64);

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
            let (path, table, id, units_per_cycle) = source;
            let folder = u32::try_from(parts.folders.len())?;
            let before = parts.facts.len();
            parts.facts.extend(table.get().lines.iter().map(|line| ShardFacts {
                folder,
                file: line.file.clone(),
                words: line.tokens,
                xxh3: line.xxh3_64.map(|hash| hash.0[0]),
            }));
            let shard_count = u32::try_from(parts.facts.len() - before)?;
            parts.folders.push(path);
            parts.sources.push(SourceFacts { id, shard_count, units_per_cycle });
        }
        Ok(parts)
    }
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
