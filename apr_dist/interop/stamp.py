"""Rewriting what a file states about itself (``stamp``): metadata changed, tensor bytes copied."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression

from apr_dist.apr.layout import TOKENIZER_TEXT, Flag
from apr_dist.apr.metadata import KEYS, AprMetadata
from apr_dist.apr.reader import AprReader
from apr_dist.apr.writer import AprWriter, TensorSpec
from apr_dist.corpus.chat_template import ChatTemplate
from apr_dist.errors import TokenizerError, UsageError
from apr_dist.gates.model_file import prove_model
from apr_dist.interop.chat_settings import with_template
from apr_dist.interop.convert import Progress, one_by_one
from apr_dist.interop.embedding import embed_tokenizer

_UNTYPED = ("tie_word_embeddings", "attention_bias")
"""Keys of an architecture that the format keeps among the custom ones."""

_LICENSES = ("license", "data_license")


@dataclass(frozen=True, kw_only=True)
class Changes:
    """What a person may state of a file; None is left as it is."""

    architecture: str | None = None
    """family slug, such as qwen2."""
    hf_architecture: str | None = None
    """Hugging Face class name, such as Qwen2ForCausalLM."""
    hf_model_type: str | None = None
    """Hugging Face model_type, such as qwen2."""
    hidden_size: int | None = None
    """width of the residual stream."""
    num_layers: int | None = None
    """number of decoder blocks."""
    num_heads: int | None = None
    """query heads."""
    num_kv_heads: int | None = None
    """key and value heads."""
    head_dim: int | None = None
    """size of a head."""
    vocab_size: int | None = None
    """rows of the embedding."""
    intermediate_size: int | None = None
    """width inside the MLP."""
    max_position_embeddings: int | None = None
    """longest sequence the model was made for, in tokens."""
    rope_theta: float | None = None
    """base of the rotary frequencies."""
    rms_norm_eps: float | None = None
    """epsilon of the norms."""
    tie_word_embeddings: bool | None = None
    """whether the output head is the embedding."""
    attention_bias: bool | None = None
    """whether q, k, v and o projections add biases, where the family leaves that open."""
    license: str | None = None
    """SPDX expression of the weights' licence."""
    data_source: str | None = None
    """what the weights were trained on."""
    data_license: str | None = None
    """SPDX expression of that data's licence."""


@dataclass(frozen=True, kw_only=True)
class StampSummary:
    """What a stamping changed: key, value before (None when absent), value after."""

    source: Path
    target: Path
    changes: tuple[tuple[str, Any, Any], ...]
    tokenizer_embedded: bool
    tensor_count: int
    size_bytes: int
    notes: tuple[str, ...]


def stamp_file(
    source: Path,
    target: Path,
    *,
    changes: Mapping[str, Any],
    tokenizer: Path | None = None,
    chat_template: Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> StampSummary:
    """Write ``source`` again with some metadata changed.

    Args:
        source: APR file.
        target: APR file to make.
        changes: typed metadata keys (and ``_UNTYPED`` ones) with new values; None is left alone.
        tokenizer: folder whose tokenizer is put into the file.
        chat_template: Jinja file that becomes the model's chat template.
        overwrite: whether ``target`` may exist.
        progress: told how far the writing is.

    Raises:
        UsageError: nothing would change, a key is not a typed one, or a license is no SPDX expression.
        ModelFileError: the source cannot be read.
        GateRefused: training would refuse the file even with the changes.
        TokenizerError: the folder holds no tokenizer that can be embedded, or the template is malformed.
        OutputError: the target cannot be written.
    """
    wanted = _checked(changes)
    with AprReader(source) as reader:
        before = reader.metadata
        custom = dict(before.custom) | {key: wanted[key] for key in wanted if key in _UNTYPED}
        after = AprMetadata.from_mapping(before.to_mapping() | wanted).replace(custom=custom)
        old, new = before.to_mapping(), after.to_mapping()
        changed = tuple((key, old.get(key), new[key]) for key in wanted if old.get(key) != new[key])
        notes: tuple[str, ...] = ()
        if tokenizer is not None:
            _check_tokenizer(tokenizer)
            after, notes = embed_tokenizer(after, tokenizer)
        if chat_template is not None:
            old_template = after.chat_template
            after = with_template(after, _read_template(chat_template))
            changed += (("chat_template", _shown(old_template), _shown(after.chat_template)),)
        if after == before:
            raise UsageError(
                "there is nothing to change" if not wanted else "the file says all of this already",
                where=source,
                expected="at least one key with another value, or a tokenizer",
            )
        prove_model(reader, metadata=after)
        _copy(reader, target, after, overwrite, progress)
    return StampSummary(
        source=Path(source),
        target=Path(target),
        changes=changed,
        tokenizer_embedded=tokenizer is not None,
        tensor_count=len(reader.tensors),
        size_bytes=Path(target).stat().st_size,
        notes=notes,
    )


def _read_template(path: Path) -> str:
    try:
        text = path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(
            f"the chat template cannot be read ({error})", where=path, expected="a Jinja file in UTF-8"
        ) from error
    ChatTemplate(text=text, where=path)  # its checks
    return text


def _shown(template: str | None) -> str | None:
    return None if template is None else f"{len(template):,} characters"


def _check_tokenizer(folder: Path) -> None:
    if not (folder / TOKENIZER_TEXT).is_file():
        raise TokenizerError(
            f"there is no {TOKENIZER_TEXT} in it",
            where=folder,
            expected="a tokenizer folder",
            remedy="make one with apr-dist tokenize import-hf",
        )


def _copy(
    reader: AprReader, target: Path, metadata: AprMetadata, overwrite: bool, progress: Progress | None
) -> None:
    specs = [TensorSpec(entry.name, entry.dtype, entry.shape) for entry in reader.tensors.values()]
    flags = reader.header.flags | Flag.ROW_MAJOR
    with AprWriter(
        target, metadata=metadata, tensors=specs, flags=flags, overwrite=overwrite, verbatim=True
    ) as writer:
        for name in one_by_one(reader.tensors, progress):
            writer.write(name, reader.raw(name))
            reader.forget(name)


def _checked(changes: Mapping[str, Any]) -> dict[str, Any]:
    wanted = {key: value for key, value in changes.items() if value is not None}
    for key in wanted:
        if key not in (*KEYS, *_UNTYPED):
            raise UsageError(f"{key!r} is no metadata key of the format", expected=", ".join(KEYS))
    for key in _LICENSES:
        if key in wanted:
            wanted[key] = spdx(wanted[key], key=key)
    return wanted


def spdx(expression: str, *, key: str) -> str:
    """A license as the canonical spelling of its SPDX expression.

    Raises:
        UsageError: it is none.
    """
    try:
        return str(canonicalize_license_expression(expression))
    except InvalidLicenseExpression as error:
        raise UsageError(
            f"{key} {expression!r} is no SPDX license expression",
            expected="an identifier of the SPDX list, such as Apache-2.0, MIT or CC-BY-4.0",
            remedy="for a license of its own kind, name it LicenseRef-something",
        ) from error
