//! Plain values about a set of shards: what its manifest says, how it is used, and what was read.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use crate::latency::Latencies;
use crate::verified::Verified;

/// What a manifest says about one shard.
#[derive(Clone, Debug)]
pub struct ShardFacts {
    /// Which of the set's folders it lies in.
    pub folder: u32,
    /// Plain file name.
    pub file: Box<str>,
    /// Tokens.
    pub words: u64,
    /// xxh3-64 of the content, where the manifest records it.
    pub xxh3: Option<u64>,
}

/// When a shard's content is hashed and compared with the manifest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verify {
    /// Before its first row is handed out.
    FirstTouch,
    /// All of them when the set is opened.
    Open,
    /// Never.
    Off,
}

/// How rows are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Copied out of a map of the file, whose size is looked at every millisecond of use.
    Mmap,
    /// With `pread`: slower when cached, and an error where a map would be a signal.
    Pread,
}

/// How a set of shards is used.
#[derive(Clone, Debug)]
pub struct Options {
    /// When content is hashed.
    pub verify: Verify,
    /// How rows are read.
    pub access: Access,
    /// Shards kept open at once; views keep theirs alive beyond it.
    pub max_open: usize,
    /// An open shard whose file was not looked at for this long is compared with it again.
    pub recheck: Duration,
    /// What was verified on this host already, with [`Verify::FirstTouch`].
    pub verified: Option<Arc<Verified>>,
    /// Whether most of each shard will be read in order (blocks, evaluation) or rows of it at random.
    pub sequential: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            verify: Verify::FirstTouch,
            access: Access::Mmap,
            max_open: 256,
            recheck: Duration::from_secs(1),
            verified: None,
            sequential: false,
        }
    }
}

/// What was read so far.
#[derive(Debug, Default)]
pub struct Counters {
    /// Bytes copied or handed out as views.
    pub bytes: AtomicU64,
    /// Times a shard was opened.
    pub opened: AtomicU64,
    /// Shards whose hash was compared.
    pub verified: AtomicU64,
    /// Times a prefetched batch was not ready when it was asked for.
    pub waits: AtomicU64,
    /// How long the consumer was held up for each batch.
    pub latencies: Latencies,
}
