//! What can go wrong with shards: each kind with the value found and the value expected.

use std::path::PathBuf;

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// A shard that cannot be used as the manifest describes it, or a request that cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file is not there.
    #[error("{}: the shard is missing", path.display())]
    Missing {
        /// The shard.
        path: PathBuf,
    },
    /// The file holds another number of bytes than the manifest records.
    #[error("{}: the shard holds {found} bytes, the manifest says {expected}", path.display())]
    Size {
        /// The shard.
        path: PathBuf,
        /// Bytes in the file.
        found: u64,
        /// Bytes in the manifest.
        expected: u64,
    },
    /// The content's hash is not the recorded one.
    #[error("{}: the content hashes to {found:016x}, the manifest says {expected:016x}", path.display())]
    Hash {
        /// The shard.
        path: PathBuf,
        /// xxh3-64 of the file.
        found: u64,
        /// xxh3-64 in the manifest.
        expected: u64,
    },
    /// The file was truncated or written to after it was opened.
    #[error("{}: the shard changed while it was in use ({what})", path.display())]
    Changed {
        /// The shard.
        path: PathBuf,
        /// Which property changed, with both values.
        what: String,
    },
    /// The operating system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// The shard.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The process may not open or map more files.
    #[error("{}: no more files can be opened or mapped ({source})", path.display())]
    Limit {
        /// The shard.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// No shard holds a whole sequence.
    #[error("a sequence takes {needed} tokens and the longest shard holds {longest}")]
    TooShort {
        /// Tokens that one unit of the order takes from one shard.
        needed: u64,
        /// Tokens of the longest shard.
        longest: u64,
    },
    /// A position behind the end of an order that does not wrap.
    #[error("position {position} is behind the last of {length} sequences")]
    End {
        /// The position asked for.
        position: u64,
        /// Sequences in the order.
        length: u64,
    },
    /// A thread of this crate died; nothing it shared can be trusted.
    #[error("the loader's state was left inconsistent by a failed thread")]
    Poisoned,
}

impl<T> From<std::sync::PoisonError<T>> for Error {
    fn from(_: std::sync::PoisonError<T>) -> Self {
        Self::Poisoned
    }
}
