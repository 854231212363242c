"""The Rust core of the loader: which sequence stands where, and batches of them.

Positions are sequences of the endless stream, counted from 0. Errors are those of
``apr_dist.errors``: ``ShardError`` for a shard that is missing, of another size, of other content or
changed while in use; ``StreamExhausted`` behind the end of an order that does not wrap.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

Capsule: TypeAlias = Any
"""A DLPack capsule of int32 in CPU memory, for ``torch.utils.dlpack.from_dlpack``."""

SourceFacts: TypeAlias = tuple[Path, ShardTable, int, int]
"""A source: folder; its shards; a number that tells its order from that of other sources; units per cycle."""

class ShardTable:
    """A manifest's shard list, kept without a Python object a shard."""

    @property
    def total_tokens(self) -> int: ...
    @property
    def longest(self) -> int:
        """Tokens of the longest shard."""

    @staticmethod
    def parse(content: bytes) -> tuple[bytes, ShardTable | None]:
        """The keys of a manifest but ``shards``, as JSON, and its shards; None when it lists none.

        ValueError, naming the key, when the text is malformed.
        """

    def __len__(self) -> int: ...
    def fields(
        self, index: int
    ) -> tuple[
        str,
        int,
        int,
        str | None,
        str | None,
        int | None,
        int | None,
        int | None,
        str | None,
        str | None,
        int | None,
    ]:
        """The fields of a ``Shard``, in its order."""

    def sequences(self, seq_length: int) -> int:
        """Sequences in one pass over the shards."""

    def identity(self) -> bytes | None:
        """SHA-256 and tokens, a line a shard; None when a hash is not recorded."""

    def listed_twice(self) -> str | None:
        """The first file name that stands in the list twice."""

    def has_broken_size(self) -> bool:
        """Whether a recorded size is not that of its tokens."""

    def first_misfit(self, folder: Path) -> tuple[int, int | None] | None:
        """The first shard that is not a regular file (no link) of its size, and the size it has."""

class TokenStream:
    """Shards as one stream of sequences of ``seq_length + 1`` tokens; any thread may use it.

    Args:
        sources: what to read, with its units in every cycle of the mixture.
        seq_length: tokens predicted per sequence.
        shuffle: ``sequence`` or ``block``: for ever; ``none`` or ``sample``: once.
        seed: of the order.
        block: consecutive sequences that ``block`` keeps together.
        sample: size of the fixed sample.
        verify: when shards are hashed and compared with the manifest.
        access: how rows are read.
        max_open: shards kept open at once.
        recheck_s: an open shard not looked at for this long is compared with its file again.
        wide: gather into int64 instead of int32.
        verified: file of what processes of this host verified; None: only this one counts.
        settle_s: what was changed later than this before it was verified is not remembered there.
    """

    def __new__(
        cls,
        sources: Sequence[SourceFacts],
        *,
        seq_length: int,
        shuffle: Literal["sequence", "block", "none", "sample"],
        seed: int = 0,
        block: int = 1,
        sample: int = 0,
        verify: Literal["first-touch", "open", "off"] = "first-touch",
        access: Literal["mmap", "pread"] = "mmap",
        max_open: int = 256,
        recheck_s: float = 1.0,
        wide: bool = False,
        verified: Path | None = None,
        settle_s: float = 2.0,
    ) -> TokenStream: ...
    @property
    def dropped_tokens(self) -> int:
        """Tokens that no sequence holds: the ends of shards."""
    @property
    def length(self) -> int | None:
        """Sequences in the stream; None when it wraps for ever."""
    def sequences(self, source: int) -> int:
        """Sequences in one epoch of a source."""
    def progress(self, positions: int) -> list[tuple[int, int]]:
        """Per source: sequences handed out, and whole epochs of it, after ``positions`` sequences."""
    def locate(self, first: int, count: int) -> list[tuple[int, int]]:
        """(shard, first token) of the sequences at ``count`` positions from ``first`` on."""
    def gather(self, first: int, count: int) -> Capsule:
        """The sequences at ``count`` positions, copied: [count, seq_length + 1]."""
    def views(self, first: int, count: int, rows_per_view: int | None = None) -> list[Capsule]:
        """Views of the maps, without a copy; a view keeps its map alive.

        One [seq_length + 1] a row, or one [rows_per_view, seq_length + 1] with strides (seq_length, 1).
        """
    def stats(self) -> dict[str, int | float]:
        """What was read so far, and how long batches took to hand over."""

class Prefetcher:
    """A thread that makes consecutive batches of a stream, at most ``depth`` ahead.

    Args:
        stream: what to read.
        first: position of the first batch's first sequence.
        count: sequences of a batch.
        stride: positions from one batch to the next.
        depth: batches kept ready.
        batches: how many there are; None: no end.
        rows_per_view: make views of that many rows; None: gather.
        buffers: gather into these instead of own buffers: capsules of contiguous, writable host memory
            that nobody touches until they are filled, in order. At least ``depth`` of them.
        flagged: find where conversations begin in each batch.
    """

    def __new__(
        cls,
        stream: TokenStream,
        *,
        first: int,
        count: int,
        stride: int,
        depth: int,
        batches: int | None = None,
        rows_per_view: int | None = None,
        buffers: Sequence[Capsule] | None = None,
        flagged: bool = False,
    ) -> Prefetcher: ...
    def next(self, buffer: Capsule | None = None) -> Any:
        """The next batch: a capsule, a list of views, or True when the oldest buffer was filled.

        None behind the last. ``buffer`` takes the place of the one that was filled. An error that the
        thread met comes out in the place of its batch, and nothing after it.
        """
    def edges(self) -> bytes:
        """Where conversations begin in the inputs of the latest batch, and its end: i32, native order."""
    def faults(self) -> tuple[int, int] | None:
        """Minor and major page faults of the thread so far."""
    def close(self) -> None:
        """Stop the thread and wait for it."""
