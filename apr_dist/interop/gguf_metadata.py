"""A GGUF file's key-value fields as APR metadata: architecture, dimensions, provenance, special tokens."""

from __future__ import annotations

from typing import Any

import numpy as np

from apr_dist.apr.metadata import AprMetadata
from apr_dist.errors import DamagedModelFile, UnsupportedModelFile
from apr_dist.interop.convert import shortest_float
from apr_dist.interop.gguf_file import GgufFile
from apr_dist.interop.gguf_names import EMBEDDING, HF_CLASSES

_ROPE_SPLIT_HALVES = 2
_DEFAULT_ROPE_THETA = 10000.0  # what llama.cpp assumes when the field is absent
_SPECIAL_TOKENS = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "pad_token": "padding",
}


def read_metadata(file: GgufFile) -> tuple[AprMetadata, tuple[str, ...]]:
    """Metadata for the APR file, and notes on what had to be assumed.

    Raises:
        UnsupportedModelFile: an architecture, mixture of experts, or rotary variant that is not read.
        DamagedModelFile: a required field is missing or of the wrong kind.
    """
    architecture = file.fields.get("general.architecture")
    if architecture not in HF_CLASSES:
        raise UnsupportedModelFile(
            f"the GGUF file's architecture is {architecture!r}",
            where=file.path,
            expected="one of " + ", ".join(HF_CLASSES),
            remedy="import a model of one of these architectures",
        )
    if file.fields.get(f"{architecture}.expert_count"):
        raise UnsupportedModelFile(
            f"the GGUF file is a mixture of {file.fields[f'{architecture}.expert_count']} experts",
            where=file.path,
            expected="a dense decoder",
        )
    values, notes = _dimensions(file, architecture)
    values |= {
        "model_type": architecture,
        "architecture": architecture,
        "hf_architecture": HF_CLASSES[architecture],
        "hf_model_type": architecture,
        "original_format": "gguf",
        "rope_type": _ROPE_SPLIT_HALVES,
    }
    values |= _provenance(file) | _tokens(file)
    return AprMetadata.from_mapping({key: value for key, value in values.items() if value is not None}), notes


def _dimensions(file: GgufFile, architecture: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    def integer(key: str, default: int | None = None) -> int:
        return _integer(file, f"{architecture}.{key}", default)

    hidden, heads = integer("embedding_length"), integer("attention.head_count")
    head_dim = integer("attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if integer(key, head_dim) != head_dim:
            raise UnsupportedModelFile(
                f"the GGUF file's {architecture}.{key} is {integer(key)}",
                where=file.path,
                expected=f"{head_dim}, the size of a head",
            )
    embedding = file.tensors.get(EMBEDDING)
    notes: tuple[str, ...] = ()
    theta = file.fields.get(f"{architecture}.rope.freq_base")
    if theta is None:
        theta, notes = _DEFAULT_ROPE_THETA, (f"no rope.freq_base: {_DEFAULT_ROPE_THETA:g} was assumed",)
    values = {
        "hidden_size": hidden,
        "num_layers": integer("block_count"),
        "num_heads": heads,
        "num_kv_heads": integer("attention.head_count_kv", heads),
        "vocab_size": embedding.shape[0] if embedding else None,
        "intermediate_size": integer("feed_forward_length"),
        "max_position_embeddings": integer("context_length"),
        "rope_theta": shortest_float(_number(file, "rope.freq_base", theta)),
        "rms_norm_eps": shortest_float(
            _number(
                file,
                f"{architecture}.attention.layer_norm_rms_epsilon",
                file.fields.get(f"{architecture}.attention.layer_norm_rms_epsilon"),
            )
        ),
        "head_dim": head_dim,
        "rope_scaling": _rope_scaling(file, architecture),
    }
    return values, notes


def _rope_scaling(file: GgufFile, architecture: str) -> dict[str, Any] | None:
    """The rotary scaling in Hugging Face's terms; None without one."""
    prefix = f"{architecture}.rope.scaling."
    kind = file.fields.get(f"{prefix}type", "none")
    if kind == "none" and "rope_freqs.weight" not in file.tensors:
        return None
    if kind not in ("linear", "yarn"):
        found = "rope_freqs.weight" if kind == "none" else kind
        raise UnsupportedModelFile(
            f"the GGUF file scales its rotary embedding by {found!r}",
            where=file.path,
            expected="none, linear or yarn scaling",
            remedy="import the model from its Hugging Face folder, whose config.json states the scaling",
        )
    factor = shortest_float(_number(file, f"{prefix}factor", file.fields.get(f"{prefix}factor")))
    scaling: dict[str, Any] = {"rope_type": kind, "factor": factor}
    original = file.fields.get(f"{prefix}original_context_length")
    if original is not None:
        scaling["original_max_position_embeddings"] = int(original)
    return scaling


def _provenance(file: GgufFile) -> dict[str, Any]:
    def text(*keys: str) -> str | None:
        found = (file.fields.get(f"general.{key}") for key in keys)
        return next((value for value in found if isinstance(value, str) and value), None)

    return {
        "name": text("name", "basename"),
        "description": text("description"),
        "author": text("author", "organization"),
        "license": text("license"),
        "version": text("version"),
        "source": text("source.huggingface.repository", "source.repo_url", "repo_url", "url")
        or file.path.name,
    }


def _tokens(file: GgufFile) -> dict[str, Any]:
    tokens = file.fields.get("tokenizer.ggml.tokens")
    special: dict[str, Any] = {}
    if isinstance(tokens, list):
        for key, field in _SPECIAL_TOKENS.items():
            index = file.fields.get(f"tokenizer.ggml.{field}_token_id")
            if isinstance(index, int) and 0 <= index < len(tokens):
                special[key] = tokens[index]
        known = set(tokens)
        chatml = {"im_start_token": "<|im_start|>", "im_end_token": "<|im_end|>"}
        special |= {key: token for key, token in chatml.items() if token in known}
    template = file.fields.get("tokenizer.chat_template")
    template = template if isinstance(template, str) else None
    return {
        "chat_template": template,
        "chat_format": "chatml" if template and "<|im_start|>" in template else None,
        "special_tokens": special or None,
    }


def _integer(file: GgufFile, key: str, default: int | None) -> int:
    value = file.fields.get(key, default)
    if isinstance(value, np.ndarray):  # one value a layer
        values = set(value.tolist())
        if len(values) != 1:
            raise UnsupportedModelFile(
                f"the GGUF file's {key} differs from layer to layer",
                where=file.path,
                expected="layers of one shape",
            )
        value = values.pop()
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise _bad_field(file, key, value, "a positive integer")
    return value


def _number(file: GgufFile, key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise _bad_field(file, key, value, "a positive number")
    return float(value)


def _bad_field(file: GgufFile, key: str, value: Any, expected: str) -> DamagedModelFile:
    return DamagedModelFile(
        f"the GGUF field {key} is {'missing' if value is None else repr(value)[:60]}",
        where=file.path,
        expected=expected,
        remedy="export the model again from its Hugging Face folder",
    )
