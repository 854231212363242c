"""What a checkpoint says about itself: the metadata in ``checkpoint.apr`` and the facts beside it.

The file is a complete APR v2 model: dimensions, family, tie and provenance travel in its metadata,
and nothing in it depends on the clock or on where it was written.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apr_dist.apr.layout import TOKENIZER_TEXT
from apr_dist.apr.metadata import AprMetadata
from apr_dist.corpus.tokenizer import load_tokenizer
from apr_dist.errors import AprDistError
from apr_dist.gates.adapters import BASE_BITS, STATED
from apr_dist.interop.adapter_files import peft_config
from apr_dist.interop.embedding import embed_tokenizer
from apr_dist.model.adapters import Adapter
from apr_dist.model.config import TransformerConfig


@dataclass(frozen=True, kw_only=True)
class CheckpointFacts:
    """What INV-TRAIN-002 requires next to every checkpoint; losses in nats per token.

    ``epoch`` is that contract's name for the number of the newest evaluation.
    """

    epoch: int
    step: int
    train_loss: float | None
    val_loss: float | None
    train_ppl: float | None
    val_ppl: float | None
    optimizer_state_sha: str
    wall_seconds: float
    tokens_seen: int
    grad_norm_max: float


def perplexity(loss: float | None) -> float | None:
    """exp(loss), or None where there is no loss or it overflows."""
    return math.exp(loss) if loss is not None and loss < 700 else None


def checkpoint_metadata(
    config: TransformerConfig, source: AprMetadata | None, provenance: Mapping[str, Any]
) -> AprMetadata:
    """Metadata of a checkpoint: the init file's own, the model's dimensions, and where it came from.

    Args:
        config: the model that was trained.
        source: metadata of the init file, kept except for when that file was made; None from scratch.
        provenance: values of the ``apr_dist.*`` keys, without that prefix.
    """
    kept = {} if source is None else source.replace(created_at=None, quantization=None).to_mapping()
    stamped = {
        key: value for key, value in config.to_metadata().items() if key not in kept or key in _DERIVED
    }
    ours = {f"apr_dist.{key}": value for key, value in provenance.items() if value is not None}
    values = {**kept, **stamped, **ours, "model_type": kept.get("model_type") or config.family.value}
    return AprMetadata.from_mapping(values)


def adapter_metadata(
    config: TransformerConfig, adapter: Adapter, provenance: Mapping[str, Any]
) -> AprMetadata:
    """Metadata of an adapter's checkpoint: what it is, of which base, and where it came from.

    Args:
        config: the base's architecture.
        adapter: what was trained.
        provenance: values of the ``apr_dist.*`` keys, without that prefix; ``base_digest`` among them.
    """
    ours = {f"apr_dist.{key}": value for key, value in provenance.items() if value is not None}
    stated = {STATED: peft_config(adapter, config), BASE_BITS: adapter.base_bits, "model_type": "adapter"}
    return AprMetadata.from_mapping({**config.to_metadata(), **ours, **stated})


def with_tokenizer(
    source: AprMetadata | None, folder: Path | None, warn: Callable[[str], None]
) -> AprMetadata | None:
    """Metadata of the init file with the tokenizer that the run trains with, unless one is inside.

    Args:
        source: metadata of the init file; None from scratch.
        folder: the tokenizer folder; None if no file of the tokenizer is known.
        warn: is told why a tokenizer cannot be embedded; the run is not stopped.
    """
    if folder is None or (source is not None and TOKENIZER_TEXT in source.custom):
        return source
    metadata = source or AprMetadata.from_mapping({})
    try:
        if metadata.special_tokens is None and (special := _special_tokens(folder)):
            metadata = metadata.replace(special_tokens=special)
        metadata, notes = embed_tokenizer(metadata, folder)
    except AprDistError as error:
        warn(f"checkpoints of this run have no tokenizer inside: {error}")
        return source
    for note in notes:
        warn(note)
    return metadata


def _special_tokens(folder: Path) -> dict[str, str]:
    """Texts of the special tokens by role, as the folder's identity names their ids."""
    loaded = load_tokenizer(folder)
    ids = {"bos_token": loaded.identity.bos_id, "eos_token": loaded.identity.eos_id}
    found = {role: loaded.tokenizer.id_to_token(one) for role, one in ids.items() if one is not None}
    return {role: text for role, text in found.items() if text}


_DERIVED = {"tie_word_embeddings", "head_dim", "rope_type"}
"""Keys where what was really trained wins over what the init file said or left out."""


def json_bytes(value: Any) -> bytes:
    """A value as indented JSON with a final newline."""
    return (json.dumps(value, indent=2) + "\n").encode()
