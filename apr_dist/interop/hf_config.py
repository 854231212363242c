"""A Hugging Face ``config.json`` as APR metadata, and back.

Every key is read, known to change nothing, or refused by its name: the tables are in the family's file and
in ``model.families``. The whole configuration is kept beside the typed keys, so that what we have no word
for survives a round trip; on the way back the typed keys win.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from apr_dist.apr.bounded_json import parse_object
from apr_dist.apr.files import map_readonly
from apr_dist.apr.layout import HF_CONFIG, DType
from apr_dist.apr.metadata import AprMetadata
from apr_dist.errors import ArchitectureRefused, DamagedModelFile
from apr_dist.interop.hf_rope import ROPE_KEYS, read_rope, state_rope
from apr_dist.model.config import SPLIT_HALVES, TransformerConfig
from apr_dist.model.families import (
    FULL_ATTENTION,
    HF_KEYS,
    SLIDING_ATTENTION,
    Effect,
    Family,
    Key,
    family_of_model_type,
    layer_kinds,
    rope_layers,
)
from apr_dist.model.rope_scaling import INCOMPLETE_METADATA, refuse_key

_TORCH_NAMES = {DType.F32: "float32", DType.F16: "float16", DType.BF16: "bfloat16"}
_INTERVAL = "no_rope_layer_interval"
_PATTERN = "sliding_window_pattern"
_OWN_CODE = (*ROPE_KEYS, "tie_word_embeddings", "sliding_window", "layer_types", "no_rope_layers")


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


def metadata_from_config(config: Mapping[str, Any], *, where: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Flat APR metadata from a configuration, and notes on what was assumed or left out.

    An absent key has the value that ``transformers`` gives it for that family.

    Raises:
        ArchitectureRefused: another family, a key that nobody here knows, or a value that is not computed.
    """
    family = _family(config, where)
    keys = {**HF_KEYS, **family.definition.hf_keys}
    notes = _check_keys(config, keys, family, where)
    defaults = family.definition.hf_defaults
    stated = {key: config.get(key, default) for key, default in defaults.items()}
    values: dict[str, Any] = {
        "model_type": family.hf_model_type,
        "architecture": family.value,
        "hf_architecture": family.hf_architecture,
        "hf_model_type": family.hf_model_type,
        **{ours: stated[key] for key, rule in keys.items() if (ours := _plain(key, rule)) and key in stated},
        "rope_type": SPLIT_HALVES,
        **_windows(config, family, stated, where),
        **_without_rope(config, family, stated, where),
        HF_CONFIG: _kept(config, keys),
    }
    values |= read_rope(config, family, stated, where)
    if values["num_kv_heads"] is None:
        values["num_kv_heads"] = values["num_heads"]
    values["attention_bias"] = values.get("attention_bias") or None
    values = {key: value for key, value in values.items() if value is not None}
    values["head_dim"] = TransformerConfig.from_metadata(
        values, family=family, where=where, tie_word_embeddings=True
    ).head_dim
    return values, (*_assumed(config, family), *notes)


def _kept(config: Mapping[str, Any], keys: Mapping[str, Key]) -> dict[str, Any]:
    """What of a configuration an export states again: keys that are known, and the writer's own."""
    return {
        key: value
        for key, value in config.items()
        if (not keys[key].dropped if key in keys else value is None or key.startswith("_"))
    }


def _plain(key: str, rule: Key) -> str | None:
    """Our key that the value becomes as it is."""
    return None if key in _OWN_CODE else rule.ours


def _family(config: Mapping[str, Any], where: Path) -> Family:
    """The family of the configuration's model type, which its class must be as well."""
    model_type, classes = config.get("model_type"), config.get("architectures")
    claimed = [model_type] if model_type is not None else list(classes or ())
    family = next(
        (
            one
            for one in Family
            if one is family_of_model_type(str(model_type))
            or (not model_type and [one.hf_architecture] == claimed)
        ),
        None,
    )
    if family is None or (classes and family.hf_architecture not in classes):
        named = "model_type" if family is None and model_type is not None else "architectures"
        raise ArchitectureRefused(
            f"{named} is {str(config.get(named))[:100]!r}, which is not one this decoder can be",
            where=where,
            expected="one of "
            + ", ".join(
                f"{one.hf_model_type} ({one.hf_architecture})" for one in ([family] if family else Family)
            ),
            remedy="start from a model of one of these families",
            falsifier=INCOMPLETE_METADATA,
        )
    return family


def _check_keys(
    config: Mapping[str, Any], keys: Mapping[str, Key], family: Family, where: Path
) -> tuple[str, ...]:
    """Refuse keys that are unknown or ask for something else; notes on those that are left out."""
    unknown = [
        key
        for key, value in config.items()
        if key not in keys and value is not None and not key.startswith("_")
    ]
    if unknown:
        raise ArchitectureRefused(
            f"config.json states {', '.join(map(repr, unknown))}, and it is not known what that changes",
            where=where,
            expected=f"keys that a {family} model is known to have",
            remedy="if they change neither what is computed nor its tokens, remove them from config.json",
            falsifier=INCOMPLETE_METADATA,
        )
    notes = []
    for key, value in config.items():
        rule = keys.get(key)
        if rule is None or value is None or rule.accepts(value):
            continue
        if rule.effect is Effect.CHECKED:
            expected = " or ".join(map(json.dumps, rule.accepted)) or "null"
            raise refuse_key(key, value, f"{expected}: {rule.why}", where=where)
        if rule.effect is Effect.LEFT_OUT:
            notes.append(f"{key} is left out: {rule.why}")
    return tuple(notes)


def _assumed(config: Mapping[str, Any], family: Family) -> tuple[str, ...]:
    """What the configuration does not state and ``transformers`` assumes, in one note."""
    absent = {
        key: value
        for key, value in family.definition.hf_defaults.items()
        if key not in config and value not in (None, False) and not key.endswith("_token_id")
    }
    if any(isinstance(config.get(key), Mapping) for key in ("rope_parameters", "rope_scaling")):
        absent.pop("rope_theta", None)
    elif family.definition.rope_default:
        absent |= {
            "rope_theta": family.definition.rope_default["rope_theta"],
            "rope_type": family.definition.rope_default["rope_type"],
        }
    if not absent:
        return ()
    listed = ", ".join(f"{key} {value}" for key, value in absent.items())
    return (f"config.json does not state what {family} models have by default: {listed}",)


def _windows(
    config: Mapping[str, Any], family: Family, stated: Mapping[str, Any], where: Path
) -> dict[str, Any]:
    """The window in tokens, where the family has one, and the layers that have it, where not all do."""
    facts = family.definition
    window: int | None = stated.get("sliding_window") if facts.sliding_window else None
    kinds, layers = config.get("layer_types"), stated["num_hidden_layers"]
    count = layers if type(layers) is int else 0
    if facts.full_every is None:
        kind = FULL_ATTENTION if window is None else SLIDING_ATTENTION
        if kinds is not None and kinds != [kind] * count:
            raise refuse_key(
                "layer_types", _shortened(kinds), f"{kind} for each of the {layers} layers", where=where
            )
        return {"sliding_window": window}
    if kinds is None:
        every = config.get(_PATTERN, facts.full_every) if _PATTERN in facts.hf_keys else facts.full_every
        if type(every) is not int or every < 1:
            raise refuse_key(_PATTERN, every, "a positive integer", where=where)
        kinds = list(layer_kinds(count, every))
    return {"sliding_window": window, "layer_types": kinds}


def _without_rope(
    config: Mapping[str, Any], family: Family, stated: Mapping[str, Any], where: Path
) -> dict[str, Any]:
    """Which layers rotate, where the family has some that do not."""
    every = family.definition.no_rope_every
    if every is None:
        return {}
    listed, layers = config.get("no_rope_layers"), stated["num_hidden_layers"]
    if listed is None:
        every = config.get(_INTERVAL, every)
        if type(every) is not int or every < 1:
            raise refuse_key(_INTERVAL, every, "a positive integer", where=where)
        listed = list(rope_layers(layers if type(layers) is int else 0, every))
    return {"no_rope_layers": listed}


def _shortened(kinds: object) -> object:
    return list(dict.fromkeys(map(str, kinds))) if isinstance(kinds, list) else kinds


def config_from_metadata(
    metadata: AprMetadata,
    model: TransformerConfig,
    *,
    dtype: DType,
    token_ids: Mapping[str, Any],
    where: Path,
) -> dict[str, Any]:
    """A ``config.json`` for the model: the kept one where there is one, what the file states over it.

    Read back as an import reads it, it must give the same model.

    Raises:
        ArchitectureRefused: it does not.
    """
    family = model.family
    kept = metadata.custom.get(HF_CONFIG)
    keys, defaults = {**HF_KEYS, **family.definition.hf_keys}, family.definition.hf_defaults
    config = _kept(kept if isinstance(kept, Mapping) else {}, keys)
    config |= {"architectures": [family.hf_architecture], "model_type": family.hf_model_type}
    for key in defaults:
        rule = keys[key]
        if rule.ours is None or key in ROPE_KEYS:
            continue
        value = getattr(model, rule.ours)
        value = list(value) if isinstance(value, tuple) else value
        derived = key == "head_dim" and not family.definition.head_dim_stated
        if key in config or not derived or model.query_size != model.hidden_size:
            config[key] = value
    state_rope(config, model)
    config["dtype" if "dtype" in config else "torch_dtype"] = _TORCH_NAMES[dtype]
    for key, value in token_ids.items():
        config.setdefault(key, value)
    config.setdefault("hidden_activation" if "hidden_activation" in keys else "hidden_act", model.activation)
    _check_read_back(config, model, where)
    return config


def _check_read_back(config: Mapping[str, Any], model: TransformerConfig, where: Path) -> None:
    values, _ = metadata_from_config(config, where=where)
    back = TransformerConfig.from_metadata(
        values, family=model.family, where=where, tie_word_embeddings=bool(config["tie_word_embeddings"])
    )
    if back != model:
        differing = [key for key in vars(model) if getattr(model, key) != getattr(back, key)]
        raise ArchitectureRefused(
            f"a config.json cannot state {', '.join(differing)} of this model",
            where=where,
            expected="a configuration that gives the same model when it is read",
            remedy="keep the model as an APR file",
            falsifier=INCOMPLETE_METADATA,
        )


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
