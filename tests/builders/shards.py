"""Shard folders with known content: token n of shard s is a number that says where it stands."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from apr_dist.data.manifest import Manifest, Shard

SHARD_STRIDE = 1_000_000


def tokens_of(shard: int, count: int, *, source: int = 0) -> NDArray[np.uint32]:
    """[count] ids that name their place: ``source * 10**8 + shard * 10**6 + n``."""
    return np.arange(count, dtype=np.uint32) + np.uint32(source * 100_000_000 + shard * SHARD_STRIDE)


def build_shards(
    folder: Path, counts: Sequence[int], *, source: int = 0, hashed: bool = True, eos_id: int | None = None
) -> Manifest:
    """A folder of shards of ``counts`` tokens with its manifest."""
    arrays = [tokens_of(index, count, source=source) for index, count in enumerate(counts)]
    return build_shards_of(folder, arrays, hashed=hashed, eos_id=eos_id)


def build_shards_of(
    folder: Path, arrays: Sequence[NDArray[np.uint32]], *, hashed: bool = True, eos_id: int | None = None
) -> Manifest:
    """A folder of shards that hold ``arrays``, with its manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = []
    for index, array in enumerate(arrays):
        content = array.astype("<u4").tobytes()
        name = f"shard-{index:05d}.bin"
        (folder / name).write_bytes(content)
        digest = xxhash.xxh3_64_hexdigest(content) if hashed else None
        shards.append(Shard(file=name, tokens=array.size, bytes=len(content), xxh3_64=digest))
    manifest = Manifest(
        folder=folder, shards=tuple(shards), vocab_size=None, tokenizer=None, eos_token_id=eos_id
    )
    manifest.write()
    return Manifest.load(folder)


def build_sparse_shards(folder: Path, *, shards: int, tokens: int) -> Manifest:
    """Shards of ``tokens`` zeros that take no disk space."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for index in range(shards):
        path = folder / f"shard-{index:05d}.bin"
        with path.open("wb") as file:
            file.truncate(tokens * 4)
        entries.append(Shard(file=path.name, tokens=tokens, bytes=tokens * 4))
    return Manifest(folder=folder, shards=tuple(entries), vocab_size=None, tokenizer=None)
