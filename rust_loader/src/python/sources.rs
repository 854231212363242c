//! Python's description of sources and choices, as this crate's types.

use std::path::PathBuf;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::shard::{Access, ShardFacts, Verify};
use crate::stream::SourceFacts;

/// Name, tokens and hash of one shard.
type ShardTuple = (String, u64, Option<u64>);

/// Folder, shards, identity and units per cycle of one source.
pub type SourceTuple = (PathBuf, Vec<ShardTuple>, u64, u64);

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
    pub fn of(sources: Vec<SourceTuple>) -> PyResult<Self> {
        let mut parts = Self::default();
        for (path, shards, id, units_per_cycle) in sources {
            let folder = u32::try_from(parts.folders.len())?;
            parts.folders.push(path);
            parts.sources.push(SourceFacts {
                id,
                shard_count: u32::try_from(shards.len())?,
                units_per_cycle,
            });
            parts.facts.extend(shards.into_iter().map(|(file, words, xxh3)| ShardFacts {
                folder,
                file: file.into_boxed_str(),
                words,
                xxh3,
            }));
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
