"""A Hugging Face ``config.json`` as APR metadata, and back.

The whole configuration is kept beside the typed keys, so that what we have no word for survives a
round trip; on the way back the typed keys win.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from apr_dist.apr.bounded_json import parse_object
from apr_dist.apr.files import map_readonly
from apr_dist.apr.layout import DType
from apr_dist.apr.metadata import AprMetadata
from apr_dist.errors import DamagedModelFile

CONFIG_KEY: Final = "apr_dist.hf_config"
"""Custom metadata key that keeps the whole ``config.json`` of the source."""

_ROPE_SPLIT_HALVES = 2
_SAME_NAME = ("hidden_size", "vocab_size", "intermediate_size", "max_position_embeddings", "rms_norm_eps")
_RENAMED = {
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
}
_CARRIED = ("sliding_window", "use_sliding_window")
_TORCH_NAMES = {DType.F32: "float32", DType.F16: "float16", DType.BF16: "bfloat16"}
_FAMILY_SLUGS = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral"}


def read_config(path: Path) -> dict[str, Any]:
    """The object in a ``config.json``.

    Raises:
        ModelFileMissing: no such file.
        DamagedModelFile: it is no JSON object.
    """
    raw = bytes(map_readonly(path))
    try:
        return parse_object(raw)
    except ValueError as error:
        raise DamagedModelFile(
            f"the configuration cannot be read: {error}",
            where=path,
            expected="a JSON object",
            remedy="copy or download it again",
        ) from error


def metadata_from_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Flat APR metadata from a configuration: who the model is, and every dimension it states.

    Defaults are only filled in where the format itself defines them: as many KV heads as heads, and a
    head of hidden_size / num_heads.
    """
    classes = config.get("architectures")
    architecture = classes[0] if isinstance(classes, list) and classes else None
    model_type = config.get("model_type")
    rope = config.get("rope_parameters")
    rope = rope if isinstance(rope, Mapping) else {}
    values: dict[str, Any] = {
        "model_type": model_type or "",
        "architecture": _FAMILY_SLUGS.get(str(architecture), model_type),
        "hf_architecture": architecture,
        "hf_model_type": model_type,
        **{key: config.get(key) for key in (*_SAME_NAME, *_CARRIED)},
        **{key: config.get(theirs) for key, theirs in _RENAMED.items()},
        "rope_theta": config.get("rope_theta", rope.get("rope_theta")),
        "head_dim": config.get("head_dim"),
        "rope_scaling": _scaling(config.get("rope_scaling") or rope),
        CONFIG_KEY: dict(config),
    }
    heads, hidden = values["num_heads"], values["hidden_size"]
    if type(heads) is int and type(hidden) is int and heads > 0:
        values["num_kv_heads"] = values["num_kv_heads"] or heads
        if values["head_dim"] is None and hidden % heads == 0:
            values["head_dim"] = hidden // heads
    if values["rope_theta"] is not None:
        values["rope_type"] = _ROPE_SPLIT_HALVES
    return {key: value for key, value in values.items() if value is not None}


def _scaling(rope: Mapping[str, Any]) -> dict[str, Any] | None:
    kind = rope.get("rope_type", rope.get("type"))
    if kind in (None, "default"):
        return None
    kept = {key: value for key, value in rope.items() if key not in ("type", "rope_theta")}
    return {"rope_type": kind} | kept


def config_from_metadata(
    metadata: AprMetadata, *, tied: bool, dtype: DType, token_ids: Mapping[str, int]
) -> dict[str, Any]:
    """A ``config.json`` for the model: the kept one where there is one, typed metadata over it."""
    kept = metadata.custom.get(CONFIG_KEY)
    config: dict[str, Any] = dict(kept) if isinstance(kept, Mapping) else {}
    stated: dict[str, Any] = {
        "architectures": [metadata.hf_architecture] if metadata.hf_architecture else None,
        "model_type": metadata.hf_model_type,
        **{key: getattr(metadata, key) for key in _SAME_NAME},
        **{theirs: getattr(metadata, ours) for ours, theirs in _RENAMED.items()},
        **{key: metadata.custom.get(key) for key in _CARRIED},
        "tie_word_embeddings": tied,
    }
    heads, hidden, head_dim = metadata.num_heads, metadata.hidden_size, metadata.head_dim
    if head_dim and ("head_dim" in config or not heads or not hidden or head_dim * heads != hidden):
        stated["head_dim"] = head_dim
    config |= {key: value for key, value in stated.items() if value is not None}
    _state_rope(config, metadata)
    config["dtype" if "dtype" in config else "torch_dtype"] = _TORCH_NAMES[dtype]
    for key, value in token_ids.items():
        config.setdefault(key, value)
    config.setdefault("hidden_act", "silu")
    return config


def _state_rope(config: dict[str, Any], metadata: AprMetadata) -> None:
    scaling = metadata.custom.get("rope_scaling")
    if isinstance(config.get("rope_parameters"), Mapping):  # the spelling of transformers 5
        base = dict(scaling) if isinstance(scaling, Mapping) else {"rope_type": "default"}
        config["rope_parameters"] = base | {"rope_theta": metadata.rope_theta}
        return
    if metadata.rope_theta is not None:
        config["rope_theta"] = metadata.rope_theta
    if isinstance(scaling, Mapping):
        config["rope_scaling"] = dict(scaling)


def tokenizer_config(metadata: AprMetadata) -> dict[str, Any]:
    """A ``tokenizer_config.json`` for a file that carries only the tokenizer itself."""
    special = {role: token for role, token in (metadata.special_tokens or {}).items() if token is not None}
    known = ("bos_token", "eos_token", "unk_token", "pad_token")
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    config |= {role: special[role] for role in known if role in special}
    config |= {"clean_up_tokenization_spaces": False}
    if metadata.max_position_embeddings:
        config["model_max_length"] = metadata.max_position_embeddings
    if metadata.chat_template:
        config["chat_template"] = metadata.chat_template
    return config


def config_text(config: Mapping[str, Any]) -> bytes:
    """The configuration as a file's bytes: indented JSON, keys as given."""
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
