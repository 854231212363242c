//! Errors of this crate as the exceptions of `apr_dist.errors`.

use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::error::Error;

const TRUNCATED: &str = "FALSIFY-APR-DIST-LOADER-005";
const ALTERED: &str = "FALSIFY-APR-DIST-LOADER-006";
const EXHAUSTED: &str = "FALSIFY-APR-DIST-LOADER-009";
const CHANGED: &str = "FALSIFY-APR-DIST-LOADER-010";

/// The parts that every error of the project has.
#[derive(Default)]
struct Parts {
    kind: &'static str,
    what: String,
    place: Option<String>,
    expected: Option<String>,
    remedy: Option<String>,
    falsifier: Option<&'static str>,
}

impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        Python::attach(|py| raise(py, parts(&error)).unwrap_or_else(|failure| failure))
    }
}

fn raise(py: Python<'_>, parts: Parts) -> PyResult<PyErr> {
    let keywords = PyDict::new(py);
    keywords.set_item("where", parts.place)?;
    keywords.set_item("expected", parts.expected)?;
    keywords.set_item("remedy", parts.remedy)?;
    keywords.set_item("falsifier", parts.falsifier)?;
    let class = py.import("apr_dist.errors")?.getattr(parts.kind)?;
    Ok(PyErr::from_value(class.call((parts.what,), Some(&keywords))?))
}

fn parts(error: &Error) -> Parts {
    match error {
        Error::Missing { path }
        | Error::Size { path, .. }
        | Error::Hash { path, .. }
        | Error::Changed { path, .. }
        | Error::Io { path, .. }
        | Error::Limit { path, .. } => shard_parts(error, path),
        Error::TooShort { needed, longest } => Parts {
            kind: "DataError",
            what: format!("the longest shard holds {longest} tokens"),
            expected: Some(format!("at least {needed} for one sequence or block of them")),
            remedy: Some("shorten the sequence, or encode the corpus into larger shards".into()),
            ..Parts::default()
        },
        Error::End { position, length } => Parts {
            kind: "StreamExhausted",
            what: format!("sequence {position} was asked for and the stream holds {length}"),
            falsifier: Some(EXHAUSTED),
            ..Parts::default()
        },
        Error::Poisoned => Parts {
            kind: "DataError",
            what: error.to_string(),
            remedy: Some("open the loader again".into()),
            ..Parts::default()
        },
    }
}

fn shard_parts(error: &Error, path: &std::path::Path) -> Parts {
    let folder = path.parent().unwrap_or(path).display();
    let repair = format!("apr-dist tokenize repair-manifest {folder}");
    let (what, expected, remedy, falsifier) = match error {
        Error::Size { found, expected, .. } => (
            format!("the shard holds {found} bytes ({} tokens)", found / 4),
            Some(format!("{expected} bytes ({} tokens), as the manifest says", expected / 4)),
            format!("restore the shard, or accept it as it is with `{repair}`"),
            TRUNCATED,
        ),
        Error::Hash { found, expected, .. } => (
            format!("the shard's content hashes to {found:016x}"),
            Some(format!("xxh3-64 {expected:016x}, as the manifest says")),
            format!("restore the shard, or accept it as it is with `{repair}`"),
            ALTERED,
        ),
        Error::Changed { what, .. } => (
            format!("the shard changed while it was in use: {what}"),
            Some("shards that stay as they are while a run reads them".into()),
            "write new shards to another folder, and start from the last checkpoint".into(),
            CHANGED,
        ),
        Error::Limit { source, .. } => (
            format!("no more shards can be opened or mapped ({source})"),
            None,
            "raise `ulimit -n`, or lower `max_open_shards`".into(),
            TRUNCATED,
        ),
        Error::Io { source, .. } if source.kind() == std::io::ErrorKind::PermissionDenied => (
            "the shard may not be read (permission denied)".into(),
            Some("files that the user of this run may read".into()),
            format!("chmod u+r {}, or run as their owner", path.display()),
            TRUNCATED,
        ),
        Error::Io { source, .. } => (
            format!("the shard cannot be read ({source})"),
            None,
            "check the storage under it".into(),
            TRUNCATED,
        ),
        _ => ("the shard is missing".into(), None, format!("restore it, or `{repair}`"), TRUNCATED),
    };
    Parts {
        kind: "ShardError",
        what,
        place: Some(path.display().to_string()),
        expected,
        remedy: Some(remedy),
        falsifier: Some(falsifier),
    }
}
