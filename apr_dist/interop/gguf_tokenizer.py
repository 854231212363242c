"""The tokenizer embedded in an APR file as the fields of a GGUF."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from apr_dist.apr.layout import TOKENIZER_TEXT
from apr_dist.apr.metadata import AprMetadata
from apr_dist.corpus.tokenizer_json import parse_tokenizer_json
from apr_dist.errors import UnsupportedModelFile
from apr_dist.interop.pretokenizers import PRE_TOKENIZERS
from apr_dist.parsing import parse_json

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
_SPECIAL_IDS: Final = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
_IRRELEVANT = ("trim_offsets",)  # changes where tokens are said to lie, not what they are


@dataclass(frozen=True)
class GgufTokenizer:
    """What ``tokenizer.ggml.*`` holds: tokens by id up to the embedding's rows, their types, merges."""

    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    special_ids: dict[str, int]


def gguf_tokenizer(metadata: AprMetadata, *, rows: int, where: Path) -> GgufTokenizer | None:
    """The embedded tokenizer for an embedding of ``rows`` rows; None when there is none.

    Rows beyond the vocabulary become unused tokens, as llama.cpp wants one token a row.

    Raises:
        UnsupportedModelFile: it cuts text in a way that GGUF has no name for, or has more tokens than rows.
        TokenizerError: it is malformed or no BPE.
    """
    text = metadata.custom.get(TOKENIZER_TEXT)
    if not isinstance(text, str):
        return None
    facts = parse_tokenizer_json(text.encode(), where=where)
    recorded = parse_json(text)
    vocabulary = facts.effective_vocabulary
    tokens, types = [f"[PAD{index}]" for index in range(rows)], [_UNUSED] * rows
    if max(vocabulary.values(), default=-1) >= rows:
        raise UnsupportedModelFile(
            f"the embedded tokenizer has ids up to {max(vocabulary.values())}",
            where=where,
            expected=f"ids below the {rows} rows of the embedding",
            remedy="embed the tokenizer that belongs to the model",
        )
    special = {one["content"]: bool(one.get("special")) for one in recorded.get("added_tokens") or ()}
    for token, index in vocabulary.items():
        tokens[index] = token
        types[index] = _NORMAL if token not in special else _CONTROL if special[token] else _USER_DEFINED
    stated = metadata.special_tokens or {}
    ids = {
        key: vocabulary[stated[role]] for role, key in _SPECIAL_IDS.items() if stated.get(role) in vocabulary
    }
    return GgufTokenizer(
        _pre_name(recorded, where), tokens, types, [" ".join(merge) for merge in facts.merges], ids
    )


def _pre_name(recorded: Mapping[str, Any], where: Path) -> str:
    """GGUF's name for the way the tokenizer cuts text."""
    outer = recorded.get("pre_tokenizer") or {}
    steps = _plain(outer.get("pretokenizers", [outer]))
    nfc = (recorded.get("normalizer") or {}).get("type") == "NFC"
    for name, known in PRE_TOKENIZERS.items():
        if _plain(list(known.steps)) == steps and known.nfc == nfc:
            return name
    raise UnsupportedModelFile(
        "the embedded tokenizer cuts text in a way that GGUF has no name for",
        where=where,
        expected="the pattern of one of " + ", ".join(PRE_TOKENIZERS),
        remedy="export the model to a Hugging Face folder instead",
    )


def _plain(steps: list[Any]) -> list[dict[str, Any]]:
    return [{key: value for key, value in step.items() if key not in _IRRELEVANT} for step in steps]
