"""Metadata of an APR file: typed keys, custom keys beside them, and their JSON.

Facts only: what the keys mean for a model is the model layer's business, and which family a file
claims is decided there too.
"""

from __future__ import annotations

import dataclasses
import json
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

from apr_dist.apr.bounded_json import parse_object
from apr_dist.apr.layout import DAMAGED
from apr_dist.errors import DamagedModelFile

BOGUS_ARCHITECTURE: Final = "FALSIFY-APR-PRETRAIN-INIT-005"
"""Falsifier of a refusal of architecture metadata of the wrong kind."""

ALIASES: Final[Mapping[str, tuple[str, ...]]] = {
    "hidden_size": ("hidden_dim", "d_model", "n_embd"),
    "num_layers": ("num_hidden_layers", "n_layers", "n_layer"),
    "num_heads": ("num_attention_heads", "n_heads", "n_head"),
    "num_kv_heads": ("num_key_value_heads", "n_kv_heads"),
    "vocab_size": ("n_vocab",),
    "intermediate_size": ("ffn_dim", "intermediate_dim", "n_inner"),
    "max_position_embeddings": ("max_seq_len", "context_length", "n_ctx"),
    "rms_norm_eps": ("layer_norm_eps", "norm_eps"),
}
"""Other spellings in the wild, in the order they are tried. Read, never written."""

_NULL_WHEN_ABSENT = ("license", "data_source", "data_license")
_ALWAYS: Mapping[str, Any] = {"model_type": "", "total_size": 0, "param_count": 0}


@dataclass(frozen=True, kw_only=True)
class AprMetadata:
    """Everything an APR file says about itself; ``None`` means the file does not say.

    Attributes are the keys of the format in the order they are written. ``custom`` holds every other
    top-level key (``tie_word_embeddings``, ``tokenizer.*``, ``apr_dist.*``, unknown ones) in the
    order it is written after them.
    """

    model_type: str | None = None
    name: str | None = None
    description: str | None = None
    author: str | None = None
    license: str | None = None
    data_source: str | None = None
    data_license: str | None = None
    version: str | None = None
    source: str | None = None
    original_format: str | None = None
    created_at: str | None = None
    total_size: int | None = None
    param_count: int | None = None
    quantization: Mapping[str, Any] | None = None
    sharding: Mapping[str, Any] | None = None
    chat_template: str | None = None
    chat_format: str | None = None
    special_tokens: Mapping[str, Any] | None = None
    architecture: str | None = None
    hf_architecture: str | None = None
    hf_model_type: str | None = None
    hidden_size: int | None = None
    num_layers: int | None = None
    num_heads: int | None = None
    num_kv_heads: int | None = None
    vocab_size: int | None = None
    intermediate_size: int | None = None
    max_position_embeddings: int | None = None
    rope_theta: float | None = None
    rope_type: int | None = None
    rms_norm_eps: float | None = None
    head_dim: int | None = None
    num_experts: int | None = None
    num_experts_per_tok: int | None = None
    moe_intermediate_size: int | None = None
    custom: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, raw: bytes, *, where: Path | None = None) -> Self:
        """Metadata from a file's JSON: aliases promoted, the last of repeated keys wins.

        Custom keys keep the order they have in the file.

        Raises:
            DamagedModelFile: not one JSON object within the bounds of ``bounded_json``, or a typed
                key holds a value of another kind.
        """
        try:
            values = parse_object(raw)
        except ValueError as error:
            raise DamagedModelFile(
                f"the metadata cannot be read: {error}",
                where=where,
                expected="one JSON object, UTF-8, nested at most 128 deep",
                remedy="copy or download the file again, or write it again with its producer",
                falsifier=DAMAGED,
            ) from error
        return cls._build(values, where)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """Metadata from a flat mapping of typed and custom keys; custom keys are sorted."""
        typed = {key: value for key, value in values.items() if key in KEYS}
        custom = {key: values[key] for key in sorted(values.keys() - KEYS)}
        return cls._build(typed | custom, None)

    @classmethod
    def _build(cls, values: dict[str, Any], where: Path | None) -> Self:
        _promote_aliases(values)
        typed: dict[str, Any] = {}
        for key, kind in KEYS.items():
            value = values.pop(key, None)
            if value is not None:
                typed[key] = _checked(key, value, kind, where)
        return cls(**typed, custom=values)

    def dump(self) -> bytes:
        """The JSON of a file: compact, typed keys in table order, absent ones left out, custom after.

        ``license``, ``data_source`` and ``data_license`` are written as null when absent;
        ``model_type``, ``total_size`` and ``param_count`` as empty or zero.
        """
        flat: dict[str, Any] = {}
        for key in KEYS:
            value = getattr(self, key)
            if value is None:
                value = _ALWAYS.get(key)
            if value is not None or key in _NULL_WHEN_ABSENT:
                flat[key] = dict(value) if isinstance(value, Mapping) else value
        flat.update(self.custom)
        return json.dumps(flat, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()

    def to_mapping(self) -> dict[str, Any]:
        """Everything that is set, typed and custom, as one flat dictionary in written order."""
        typed = {key: getattr(self, key) for key in KEYS if getattr(self, key) is not None}
        return typed | dict(self.custom)

    def replace(self, **changes: Any) -> Self:
        """A copy with some typed keys, or the whole of ``custom``, changed."""
        return dataclasses.replace(self, **changes)

    def with_custom(self, changes: Mapping[str, Any]) -> Self:
        """A copy with custom keys set (or removed, where the value is None); new ones come last, sorted."""
        merged = dict(self.custom)
        for key in sorted(changes):
            if changes[key] is None:
                merged.pop(key, None)
            else:
                merged[key] = changes[key]
        return self.replace(custom=merged)


def _kind(annotation: str) -> type[Any]:
    kinds = {"str": str, "int": int, "float": float, "Mapping[str, Any]": dict}
    return kinds[annotation.removesuffix(" | None")]


KEYS: Final[Mapping[str, type[Any]]] = {
    item.name: _kind(str(item.type)) for item in dataclasses.fields(AprMetadata) if item.name != "custom"
}
"""Typed keys in written order, each with the Python type of its value."""


def _promote_aliases(values: dict[str, Any]) -> None:
    for key, aliases in ALIASES.items():
        for alias in aliases:
            value = values.pop(alias, None)
            if values.get(key) is None and value is not None:
                values[key] = value


def _checked(key: str, value: Any, kind: type[Any], where: Path | None) -> Any:
    if kind is float and type(value) is int and abs(value) < 1 << 64:
        value = float(value)
    if type(value) is kind and (type(value) is not int or 0 <= value < 1 << 64):
        return value
    names = {str: "a string", int: "an integer from 0 to 2^64-1", float: "a number", dict: "an object"}
    raise DamagedModelFile(
        f"metadata key {key!r} holds {reprlib.repr(value)}",
        where=where,
        expected=names[kind],
        remedy="write the file again with its producer",
        falsifier=BOGUS_ARCHITECTURE if list(KEYS).index(key) >= _FIRST_ARCHITECTURE_KEY else DAMAGED,
    )


_FIRST_ARCHITECTURE_KEY = list(KEYS).index("architecture")
