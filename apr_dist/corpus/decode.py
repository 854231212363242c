"""Showing shards back as text, document by document.

Lives here: finding a document in the shards and decoding it with its tokenizer. Boundaries come from
the folder's document index, or, in older folders, from the id that ends documents.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from apr_dist.corpus.tokenizer import LoadedTokenizer, load_tokenizer
from apr_dist.data.flags import are_begins, ids_of
from apr_dist.data.manifest import Manifest, Shard
from apr_dist.errors import ShardError, TokenizerError, UsageError


@dataclass(frozen=True)
class DecodedDocument:
    """One document as text.

    Attributes:
        number: counted from 0 over the whole folder.
        shard: the file it lies in.
        first_token: where it begins in that shard.
        tokens: its length in ids, with its end marker.
        text: decoded, without the end marker.
    """

    number: int
    shard: str
    first_token: int
    tokens: int
    text: str


def decode_documents(
    folder: Path, *, tokenizer: Path | None = None, start: int = 0, count: int | None = None
) -> Iterator[DecodedDocument]:
    """Documents ``start`` to ``start + count`` of a shard folder as text.

    Args:
        folder: a shard folder.
        tokenizer: the tokenizer folder; None for the one the manifest names.
        start: number of the first document.
        count: how many at most; None for all that follow.

    Raises:
        TokenizerError: no tokenizer is known, it cannot be used, or it is not the one the ids came from.
        ShardError: document boundaries cannot be found, or a shard cannot be read.
        ManifestError: the folder cannot be opened.
        UsageError: ``start`` is not among the documents.
    """
    if start < 0 or (count is not None and count < 0):
        raise UsageError(f"documents from {start}, {count} of them", expected="numbers from 0 up")
    manifest = Manifest.load(folder)
    loaded = _tokenizer_of(manifest, tokenizer)
    end_id = manifest.eos_token_id
    if end_id is None and not manifest.has_index:
        end_id = loaded.identity.eos_id
    number = 0
    for shard in manifest.shards:
        if shard.documents is not None and number + shard.documents <= start:
            number += shard.documents
            continue
        ids = _ids(manifest, shard)
        starts = _starts(manifest, shard, ids, end_id)
        ends = np.append(starts, ids.size)[1:]
        for first, end in zip(starts.tolist(), ends.tolist(), strict=True):
            if count is not None and number >= start + count:
                return
            if number >= start:
                words = _without_padding(ids[first:end]) if manifest.flagged else ids[first:end]
                text = loaded.decode(_without_end(ids_of(words), end_id))
                yield DecodedDocument(number, shard.file, first, words.size, text)
            number += 1
    if start >= number:
        raise UsageError(f"document {start} was asked for", where=folder, expected=f"0 to {number - 1}")


def _tokenizer_of(manifest: Manifest, folder: Path | None) -> LoadedTokenizer:
    if folder is None and manifest.tokenizer_dir is None:
        raise TokenizerError(
            "its manifest names no tokenizer", where=manifest.folder, remedy="name one with --tokenizer"
        )
    loaded = load_tokenizer(folder or Path(manifest.tokenizer_dir or ""))
    if manifest.tokenizer is not None and loaded.identity.sha256 != manifest.tokenizer.sha256:
        raise TokenizerError(
            f"it is not the tokenizer the shards were made with (sha256 {loaded.identity.sha256[:16]}...)",
            where=loaded.folder,
            expected=f"sha256 {manifest.tokenizer.sha256[:16]}..., as {manifest.folder} records",
        )
    return loaded


def _ids(manifest: Manifest, shard: Shard) -> NDArray[np.uint32]:
    if not shard.tokens:
        return np.empty(0, dtype=np.uint32)
    return np.memmap(manifest.path_of(shard), dtype="<u4", mode="r", shape=(shard.tokens,))


def _starts(
    manifest: Manifest, shard: Shard, ids: NDArray[np.uint32], end_id: int | None
) -> NDArray[np.int64]:
    if manifest.has_index:
        return manifest.document_starts(shard).astype(np.int64)
    if end_id is None:
        raise ShardError(
            "document boundaries are not recorded and no id ends a document", where=manifest.path_of(shard)
        )
    after = np.flatnonzero(ids == end_id) + 1
    # An older writer put the end id of a shard's last document at the head of the next shard.
    first = [] if ids.size and ids[0] == end_id else [0]
    starts = np.concatenate([first, after]).astype(np.int64)
    return starts[starts < ids.size]


def _without_padding(words: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Words up to the next that begins a span, which is padding."""
    after = np.flatnonzero(are_begins(words[1:]))
    return words[: after[0] + 1] if after.size else words


def _without_end(ids: NDArray[np.uint32], end_id: int | None) -> NDArray[np.uint32]:
    return ids[:-1] if ids.size and end_id is not None and ids[-1] == end_id else ids
