"""Whether a file's output head is its embedding: what its tensors show, held against what it says."""

from __future__ import annotations

import numpy as np

from apr_dist.apr.reader import AprReader
from apr_dist.errors import ArchitectureRefused

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
CLAIM = "tie_word_embeddings"


def tied_head(reader: AprReader) -> bool:
    """True when there is no separate head, or it holds the embedding's bytes.

    Raises:
        ArchitectureRefused: the metadata claim the opposite of what the tensors show.
    """
    tied = HEAD not in reader.tensors or same_payload(reader, EMBEDDING, HEAD)
    claimed = reader.metadata.custom.get(CLAIM)
    shown = EMBEDDING in reader.tensors
    if shown and HEAD not in reader.tensors and claimed is False:
        raise ArchitectureRefused(
            f"the metadata say the head is its own ({CLAIM} false) but there is no {HEAD}",
            where=reader.path,
            expected=f"{HEAD}, or {CLAIM} true",
            remedy="import the model again from its source",
        )
    if HEAD in reader.tensors and claimed is True and not tied:
        raise ArchitectureRefused(
            f"the metadata tie the head to the embedding, but {HEAD} holds other values",
            where=reader.path,
            expected="one or the other",
            remedy="import the model again from its source",
        )
    return tied and claimed is not False


def same_payload(reader: AprReader, left: str, right: str) -> bool:
    """Whether two tensors have the same dtype, shape and bytes."""
    if left not in reader.tensors or right not in reader.tensors:
        return False
    one, other = reader.tensors[left], reader.tensors[right]
    same_kind = (one.dtype, one.shape) == (other.dtype, other.shape)
    return same_kind and np.array_equal(
        np.frombuffer(reader.raw(left), np.uint8), np.frombuffer(reader.raw(right), np.uint8)
    )
