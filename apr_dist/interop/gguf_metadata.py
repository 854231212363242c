"""Metadata of a GGUF file as APR metadata: who the model is, its dimensions, its tokens.

Every key is read, known to change nothing, or refused by its name; the tables are in the family's file and
in ``model.families``. Keys outside ``general``, the architecture and ``tokenizer`` are their writers' own:
llama.cpp reads none of them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from apr_dist.apr.metadata import AprMetadata
from apr_dist.errors import DamagedModelFile, UnsupportedModelFile
from apr_dist.interop.convert import shortest_float
from apr_dist.interop.embedding import END_IDS_KEY
from apr_dist.interop.gguf_file import GgufFile
from apr_dist.interop.gguf_names import EMBEDDING, ROPE_FACTORS
from apr_dist.interop.gguf_rope import LONG_FACTORS, read_rope_scaling
from apr_dist.model.config import SPLIT_HALVES
from apr_dist.model.families import (
    FULL_ATTENTION,
    GGUF_KEYS,
    SLIDING_ATTENTION,
    TOKENIZER_KEYS,
    Effect,
    Family,
    GgufForm,
    family_of_gguf,
    layer_kinds,
    rope_layers,
)

_DEFAULT_ROPE_THETA = 10000.0  # what llama.cpp assumes when the field is absent
_SPECIAL_TOKENS = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "pad_token": "padding",
}
_ENDS = ("eos", "eot", "eom")
_OUTPUT_BIAS = "attn_output.bias"
WINDOW, WINDOW_PATTERN = "attention.sliding_window", "attention.sliding_window_pattern"
"""Tokens of the window, and which layers have it: one entry a layer, or every how many the last has none."""


def read_metadata(file: GgufFile) -> tuple[AprMetadata, Family, tuple[str, ...]]:
    """Metadata for the APR file, the family it is read as, and notes on what had to be assumed.

    Raises:
        UnsupportedModelFile: an architecture, a key or a value that is not read.
        DamagedModelFile: a required field is missing or of the wrong kind.
    """
    architecture = file.fields.get("general.architecture")
    family = family_of_gguf(architecture, file.fields)
    if family is None:
        read = {one.definition.gguf.architecture for one in Family if one.definition.gguf.imported}
        raise UnsupportedModelFile(
            f"the GGUF file's architecture is {architecture!r}",
            where=file.path,
            expected="one of " + ", ".join(sorted(read)),
            remedy="import a model of one of these architectures",
        )
    _check_keys(file, family)
    values, notes = _dimensions(file, family)
    values |= {
        "model_type": family.hf_model_type,
        "architecture": family.value,
        "hf_architecture": family.hf_architecture,
        "hf_model_type": family.hf_model_type,
        "original_format": "gguf",
        "rope_type": SPLIT_HALVES,
    }
    values |= _provenance(file) | _tokens(file)
    metadata = AprMetadata.from_mapping({key: value for key, value in values.items() if value is not None})
    return metadata, family, notes


def _check_keys(file: GgufFile, family: Family) -> None:
    """Refuse every key whose effect is not known, and every value that asks for something else."""
    form = family.definition.gguf
    tables = {
        f"{form.architecture}.": {**GGUF_KEYS, **form.keys},
        "tokenizer.": TOKENIZER_KEYS,
    }
    for key, value in file.fields.items():
        prefix = next((one for one in tables if key.startswith(one)), None)
        if prefix is None or key.startswith("tokenizer.chat_template."):
            continue
        rule = tables[prefix].get(key.removeprefix(prefix))
        if rule is None:
            raise UnsupportedModelFile(
                f"the GGUF file states {key}, and it is not known what that changes",
                where=file.path,
                expected=f"keys that a {family} model is known to have",
                remedy="import the model from its Hugging Face folder",
            )
        if rule.effect is Effect.CHECKED and not rule.accepts(_plain(value)):
            raise UnsupportedModelFile(
                f"the GGUF file's {key} is {_plain(value)!r}",
                where=file.path,
                expected=f"{' or '.join(map(json.dumps, rule.accepted))}: {rule.why}",
                remedy="import a model that is computed so",
            )
    if file.fields.get("split.count", 0) not in (0, 1):
        raise UnsupportedModelFile(
            f"the GGUF file is one of {file.fields['split.count']} parts",
            where=file.path,
            expected="a file that holds the whole model",
            remedy="merge the parts first, with llama.cpp's gguf-split --merge",
        )


def _plain(value: Any) -> Any:
    """An array whose values are all the same as that value."""
    if isinstance(value, np.ndarray) and len(set(value.tolist())) == 1:
        return value.tolist()[0]
    return value


def _dimensions(file: GgufFile, family: Family) -> tuple[dict[str, Any], tuple[str, ...]]:
    architecture = family.definition.gguf.architecture
    fields = {
        key.removeprefix(f"{architecture}."): value
        for key, value in file.fields.items()
        if key.startswith(f"{architecture}.")
    }

    def integer(key: str, default: int | None = None) -> int:
        return _integer(file, f"{architecture}.{key}", default)

    hidden, heads = integer("embedding_length"), integer("attention.head_count")
    head_dim = integer("attention.key_length", hidden // heads)
    facts = family.definition
    partial = "partial_rotary_factor" in facts.options
    rotated = integer("rope.dimension_count", head_dim)
    for key in ("attention.value_length", *(() if partial else ("rope.dimension_count",))):
        if integer(key, head_dim) != head_dim:
            raise UnsupportedModelFile(
                f"the GGUF file's {architecture}.{key} is {integer(key)}",
                where=file.path,
                expected=f"{head_dim}, the size of a head",
            )
    embedding = file.tensors.get(EMBEDDING)
    notes: tuple[str, ...] = ()
    theta = facts.gguf.absent.get("rope_theta", _DEFAULT_ROPE_THETA)
    if "rope.freq_base" not in fields:
        notes = (f"no rope.freq_base: {theta:g} was assumed",)
    eps = "attention.layer_norm_rms_epsilon"
    values: dict[str, Any] = {
        "hidden_size": hidden,
        "num_layers": integer("block_count"),
        "num_heads": heads,
        "num_kv_heads": integer("attention.head_count_kv", heads),
        "vocab_size": embedding.shape[0] if embedding else None,
        "intermediate_size": integer("feed_forward_length"),
        "max_position_embeddings": integer("context_length"),
        "rope_theta": _number(file, f"{architecture}.rope.freq_base", fields, theta),
        "rms_norm_eps": _number(file, f"{architecture}.{eps}", fields, None),
        "head_dim": head_dim,
    }
    if facts.optional_attention_bias and f"blk.0.{_OUTPUT_BIAS}" in file.tensors:
        values["attention_bias"] = True
    if partial and rotated != head_dim:
        values["partial_rotary_factor"] = _share(rotated, head_dim)
    values |= _options(file, family, fields, values)
    scaling = read_rope_scaling(
        fields,
        _rope_divisors(file, family),
        _long_factors(file, family),
        theta=values["rope_theta"],
        head_dim=rotated,
        positions=values["max_position_embeddings"],
        where=file.path,
    )
    return values | {"rope_scaling": scaling and scaling.to_mapping()}, notes


def _options(
    file: GgufFile, family: Family, fields: Mapping[str, Any], values: Mapping[str, Any]
) -> dict[str, Any]:
    """What the family's own keys state, and what llama.cpp computes without a key."""
    facts = family.definition
    form, found = facts.gguf, dict[str, Any]()
    for key, rule in form.keys.items():
        if rule.ours == "sliding_window":
            stated = fields.get(key, form.absent.get(rule.ours, 0))
            found[rule.ours] = None if stated == 0 else _integer(file, f"{form.architecture}.{key}", stated)
        elif rule.ours is not None:
            absent = form.absent.get(rule.ours)
            stated = fields.get(key, absent)
            unset = stated is None or (absent is None and stated == 0.0)
            found[rule.ours] = None if unset else _number(file, f"{form.architecture}.{key}", fields, absent)
    layers = values["num_layers"]
    if facts.full_every is not None:
        every = 1 if found["sliding_window"] is None else facts.full_every
        found["layer_types"] = _layers_stated(file, fields, layers) or list(layer_kinds(layers, every))
    if facts.local_rope:
        found.setdefault("rope_local_theta", values["rope_theta"])
    if facts.no_rope_every is not None:
        found["no_rope_layers"] = list(rope_layers(layers, facts.no_rope_every))
    if "attention_multiplier" in facts.options and found.get("attention_multiplier") is None:
        found["attention_multiplier"] = float(values["head_dim"]) ** -0.5
    if "query_pre_attn_scalar" in facts.options:
        found["query_pre_attn_scalar"] = query_scalar(form, layers, values)
    return found


def _layers_stated(file: GgufFile, fields: Mapping[str, Any], layers: int) -> list[str] | None:
    """The kinds of layers that a file lists, or of which it states every how many the last has no window."""
    pattern = fields.get(WINDOW_PATTERN)
    if pattern is None:
        return None
    if isinstance(pattern, np.ndarray) and pattern.shape == (layers,):
        return [SLIDING_ATTENTION if one else FULL_ATTENTION for one in pattern.tolist()]
    if type(pattern) is not int or pattern < 1:
        raise _bad_field(
            file, WINDOW_PATTERN, pattern, f"a positive integer, or one entry for each of {layers} layers"
        )
    return list(layer_kinds(layers, pattern))


def _share(rotated: int, head_dim: int) -> float:
    """The part of a head that is rotated, as a number by which the count comes out again."""
    share = rotated / head_dim
    return share if int(head_dim * share) == rotated else math.nextafter(share, 1.0)


def query_scalar(form: GgufForm, layers: int, sizes: Mapping[str, Any]) -> int:
    """By the square root of which llama.cpp divides scores of the architecture; a file has no word for it."""
    if layers == form.wide_queries_at:
        return int(sizes["hidden_size"]) // int(sizes["num_heads"])
    return int(sizes["head_dim"])


def _rope_divisors(file: GgufFile, family: Family) -> Any:
    """What frequencies are divided by, where that architecture reads it."""
    tensor = file.tensors.get(ROPE_FACTORS)
    if tensor is None or not family.definition.gguf.rope_factors:
        return None
    return file.float32_rows(tensor, 0, tensor.rows).reshape(-1)


def _long_factors(file: GgufFile, family: Family) -> dict[str, tuple[float, ...]] | None:
    """LongRoPE's factors, where that architecture reads them and the file has any."""
    if not family.definition.gguf.long_factors or not file.tensors.keys() & set(LONG_FACTORS.values()):
        return None
    found = {}
    for ours, name in LONG_FACTORS.items():
        tensor = file.tensors.get(name)
        if tensor is None:
            raise _bad_field(file, name, None, "a tensor, as its counterpart is there")
        values = file.float32_rows(tensor, 0, tensor.rows).reshape(-1).tolist()
        found[ours] = tuple(map(shortest_float, values))
    return found


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
    ends: list[int] = []
    ids: dict[str, int] = {}
    if isinstance(tokens, list):
        ids = {
            field: index
            for field in (*_SPECIAL_TOKENS.values(), *_ENDS)
            if isinstance(index := file.fields.get(f"tokenizer.ggml.{field}_token_id"), int)
            and 0 <= index < len(tokens)
        }
        special = {role: tokens[ids[field]] for role, field in _SPECIAL_TOKENS.items() if field in ids}
        ends = list(dict.fromkeys(ids[field] for field in _ENDS if field in ids))
        known = set(tokens)
        chatml = {"im_start_token": "<|im_start|>", "im_end_token": "<|im_end|>"}
        special |= {key: token for key, token in chatml.items() if token in known}
    template = file.fields.get("tokenizer.chat_template")
    template = template if isinstance(template, str) else None
    return {
        "chat_template": template,
        "chat_format": "chatml" if template and "<|im_start|>" in template else None,
        "special_tokens": special or None,
        END_IDS_KEY: ends if ends and ends != [ids.get("eos")] else None,
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


def _number(file: GgufFile, key: str, fields: Mapping[str, Any], default: float | None) -> float:
    value = fields.get(key.partition(".")[2], default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise _bad_field(file, key, value, "a positive number")
    return shortest_float(float(value))


def _bad_field(file: GgufFile, key: str, value: Any, expected: str) -> DamagedModelFile:
    return DamagedModelFile(
        f"the GGUF field {key} is {'missing' if value is None else repr(value)[:60]}",
        where=file.path,
        expected=expected,
        remedy="export the model again from its Hugging Face folder",
    )
