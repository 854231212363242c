"""An exported GGUF file is read back as an import reads it and compared with what was exported."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from apr_dist.apr.layout import TOKENIZER_TEXT
from apr_dist.apr.reader import AprReader
from apr_dist.corpus.tokenizer_json import parse_tokenizer_json
from apr_dist.errors import OutputError, UnsupportedModelFile
from apr_dist.interop.convert import CHUNK_ELEMENTS
from apr_dist.interop.gguf_file import GgufFile, GgufTensor
from apr_dist.interop.gguf_metadata import read_metadata
from apr_dist.interop.gguf_names import OUTPUT, norm_shift, rotary_projection, split_halves
from apr_dist.interop.gguf_rope import computed_tensors, rope_divisors
from apr_dist.interop.tokenizers import tokenizer_json_from_gguf
from apr_dist.model.config import TransformerConfig
from apr_dist.model.rope_scaling import RopeScaling, RopeScalingType

LARGEST: Final = {"F32": math.inf, "F16": 65_504.0, "Q8_0": 65_504.0 * 127}
"""Largest magnitude that each GGML type holds; Q8_0 by its F16 scale."""

_F16_STEP, _F16_SMALLEST = 2.0**-11, 2.0**-25
_Q8_STEP, _Q8_BLOCK = 0.5 / 127 + 2 * _F16_STEP, 32
_FLOAT_TOLERANCE = 1e-6
_NOT_IN_GGUF = ("family", "sliding_window")  # refused before, where llama.cpp would compute something else


@dataclass(frozen=True)
class Stored:
    """A tensor of a GGUF file: its name there, and the tensors of the source whose rows it holds."""

    gguf: str
    parts: tuple[str, ...]


def refuse_too_large(values: npt.NDArray[np.float32], type_name: str, *, name: str, where: Path) -> None:
    """Refuse a tensor whose values become infinite in the type they are stored as.

    Raises:
        UnsupportedModelFile: they do.
    """
    largest = float(np.abs(values).max(initial=0.0))
    if largest > LARGEST[type_name]:
        raise UnsupportedModelFile(
            f"tensor {name!r} holds {largest:g}, which becomes infinite as {type_name}",
            where=where,
            expected=f"values up to {LARGEST[type_name]:g}",
            remedy="export with --dtype f32",
        )


def check_read_back(
    path: Path, reader: AprReader, names: Mapping[str, Stored], model: TransformerConfig
) -> None:
    """Compare metadata, tokenizer and every tensor of the file at ``path`` with the source.

    Args:
        path: the GGUF file that was written.
        reader: the source.
        names: the tensors that were written, by their Hugging Face names.
        model: what the source states.

    Raises:
        OutputError: something came back as something else.
    """
    with GgufFile(path) as file:
        metadata, family, _ = read_metadata(file)
        back = TransformerConfig.from_metadata(
            metadata.to_mapping(), family=family, where=path, tie_word_embeddings=OUTPUT not in file.tensors
        )
        for key in vars(model).keys() - set(_NOT_IN_GGUF):
            if not _same(key, model, back):
                raise _differs(f"{key} {getattr(model, key)!r} as {getattr(back, key)!r}", reader.path)
        weights = file.tensors.keys() - set(computed_tensors(family.definition.gguf))
        if len(weights) != len(names):
            raise _differs(f"{len(names)} tensors as {len(weights)}", reader.path)
        for stored in names.values():
            _check_tensor(file, file.tensors[stored.gguf], reader, stored.parts, model)
    _check_tokenizer(path, reader)


def _same(key: str, model: TransformerConfig, back: TransformerConfig) -> bool:
    before, after = getattr(model, key), getattr(back, key)
    if key == "rope_scaling":
        return _same_scaling(before, after, model)
    if key == "partial_rotary_factor":  # a file counts dimensions
        return model.rotary_dim == back.rotary_dim
    if isinstance(before, float):
        return math.isclose(before, after, rel_tol=_FLOAT_TOLERANCE)
    return bool(before == after)


def _same_scaling(before: RopeScaling | None, after: RopeScaling | None, model: TransformerConfig) -> bool:
    """Whether two scalings turn alike; Llama 3's may be stated by other factors."""
    divisors = [
        rope_divisors(one, theta=model.rope_theta, head_dim=model.rotary_dim) for one in (before, after)
    ]
    if divisors[0] is not None:
        ones = np.ones(model.rotary_dim // 2, np.float32)
        return bool(np.allclose(divisors[0], ones if divisors[1] is None else divisors[1], rtol=1e-4))
    if before is None or after is None:
        return before is after or (before is not None and before.factor == 1.0)
    if before.rope_type is RopeScalingType.LONGROPE:  # its factor decides the rotation's alone
        before, after = (
            replace(one, factor=1.0, attention_factor=one.rotation_factor) for one in (before, after)
        )
    return before.rope_type is after.rope_type and all(
        one == other or (one is not None and np.allclose(one, other or 0.0, rtol=_FLOAT_TOLERANCE, atol=0.0))
        for one, other in zip(vars(before).values(), vars(after).values(), strict=True)
        if not isinstance(one, str)
    )


def _check_tensor(
    file: GgufFile, tensor: GgufTensor, reader: AprReader, parts: tuple[str, ...], model: TransformerConfig
) -> None:
    name, values = parts[0], [reader.float32(part) for part in parts]
    expected = values[0] if len(values) == 1 else np.concatenate(values)
    expected = expected.reshape(-1, expected.shape[-1])
    permuted = model.family.definition.gguf.permuted and rotary_projection(name) is not None
    whole = len(tensor.shape) == 1
    step = max(1, CHUNK_ELEMENTS // expected.shape[-1] // model.head_dim) * model.head_dim
    for first in range(0, expected.shape[0], step):
        last = min(expected.shape[0], first + step)
        found = file.float32_rows(tensor, first, last)
        if permuted:
            found = split_halves(found.reshape(-1) if whole else found, model.head_dim).reshape(found.shape)
        shift = np.float32(norm_shift(name, model.family.definition.gguf))
        if not _within(expected[first:last] + shift, found, tensor.type_name):
            raise _differs(f"tensor {name!r} with other values", reader.path)
    file.forget(tensor)
    for part in parts:
        reader.forget(part)


def _within(expected: npt.NDArray[np.float32], found: npt.NDArray[np.float32], type_name: str) -> bool:
    if type_name == "F32":
        return np.array_equal(expected, found)
    error = np.abs(found - expected)
    bound: npt.NDArray[Any]
    if type_name == "F16":
        bound = np.abs(expected) * _F16_STEP + _F16_SMALLEST
    else:
        blocks = np.abs(expected).reshape(-1, _Q8_BLOCK).max(axis=1)
        bound = (blocks * _Q8_STEP + _F16_SMALLEST * 127).repeat(_Q8_BLOCK).reshape(expected.shape)
    return bool((error <= bound).all())  # false for what is not finite


def _check_tokenizer(path: Path, reader: AprReader) -> None:
    text = reader.metadata.custom.get(TOKENIZER_TEXT)
    if not isinstance(text, str):
        return
    before = parse_tokenizer_json(text.encode(), where=reader.path)
    after = parse_tokenizer_json(tokenizer_json_from_gguf(path)[0], where=path)
    if before.effective_vocabulary != after.effective_vocabulary:
        raise _differs("the tokenizer with other tokens", reader.path)
    if before.byte_level and before.merges != after.merges:
        raise _differs("the tokenizer with other merges", reader.path)


def _differs(what: str, source: Path) -> OutputError:
    return OutputError(
        f"the GGUF file reads back {what}",
        where=source,
        expected="what the source states",
        remedy="export to a Hugging Face folder instead, and report it",
    )
