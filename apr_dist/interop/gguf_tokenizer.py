"""The tokenizer embedded in an APR file as the fields of a GGUF."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from apr_dist.apr.layout import TOKENIZER_TEXT
from apr_dist.apr.metadata import AprMetadata
from apr_dist.corpus.tokenizer_json import parse_tokenizer_json
from apr_dist.errors import UnsupportedModelFile
from apr_dist.interop.chat_settings import stop_ids
from apr_dist.interop.post_processor import TextEnds, text_ends
from apr_dist.interop.pretokenizers import PRE_TOKENIZERS
from apr_dist.interop.sentencepiece_bpe import ScoredPieces, TokenType, scored_pieces
from apr_dist.parsing import parse_json

_FURTHER_ENDS: Final = ("eot_token_id", "eom_token_id")
_SPECIAL_IDS: Final = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_UNMERGED = -1e6
"""Score of a piece that no merge makes."""
_IRRELEVANT = ("trim_offsets",)  # changes where tokens are said to lie, not what they are


@dataclass(frozen=True, kw_only=True)
class GgufTokenizer:
    """What ``tokenizer.ggml.*`` holds: tokens by id up to the embedding's rows, and how they join.

    ``pre`` and ``merges`` belong to a byte-level BPE, ``scores`` to a SentencePiece vocabulary.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str] | None
    scores: list[float] | None
    special_ids: dict[str, int]
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool


def gguf_tokenizer(
    metadata: AprMetadata, *, rows: int, prefer: Sequence[str] = (), where: Path
) -> GgufTokenizer | None:
    """The embedded tokenizer for an embedding of ``rows`` rows; None when there is none.

    Of several names for the way it cuts text, the first of ``prefer`` is taken.

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
    if max(vocabulary.values(), default=-1) >= rows:
        raise UnsupportedModelFile(
            f"the embedded tokenizer has ids up to {max(vocabulary.values())}",
            where=where,
            expected=f"ids below the {rows} rows of the embedding",
            remedy="embed the tokenizer that belongs to the model",
        )
    pieces = None if facts.byte_level else scored_pieces(recorded, facts.merges)
    special = {one["content"]: bool(one.get("special")) for one in recorded.get("added_tokens") or ()}
    unknown = recorded["model"].get("unk_token") if pieces else None
    tokens, types = [f"[PAD{index}]" for index in range(rows)], [int(TokenType.UNUSED)] * rows
    for token, index in vocabulary.items():
        tokens[index] = token
        types[index] = TokenType.UNKNOWN if token == unknown else _type_of(token, special, pieces)
    ids, ends = _special_ids(metadata, vocabulary, where), _text_ends(recorded, where)
    ids |= {
        key: vocabulary[token]
        for key, token in (("bos_token_id", ends.begin), ("eos_token_id", ends.end))
        if token is not None and token in vocabulary
    }
    return GgufTokenizer(
        model="llama" if pieces else "gpt2",
        pre="default" if pieces else _pre_name(recorded, prefer, where),
        tokens=tokens,
        types=types,
        merges=None if pieces else [" ".join(merge) for merge in facts.merges],
        scores=[pieces.scores.get(token, _UNMERGED) for token in tokens] if pieces else None,
        special_ids=ids,
        add_bos=ends.begin is not None,
        add_eos=ends.end is not None,
        add_space_prefix=pieces.prefixed if pieces else False,
    )


def _type_of(token: str, special: Mapping[str, bool], pieces: ScoredPieces | None) -> int:
    if token in special:
        return TokenType.CONTROL if special[token] else TokenType.USER_DEFINED
    return TokenType.BYTE if pieces and _BYTE.fullmatch(token) else TokenType.NORMAL


def _special_ids(metadata: AprMetadata, vocabulary: Mapping[str, int], where: Path) -> dict[str, int]:
    """Ids by GGUF's names: those that the metadata name, and further ends of a text."""
    stated = metadata.special_tokens or {}
    ids = {
        key: vocabulary[stated[role]] for role, key in _SPECIAL_IDS.items() if stated.get(role) in vocabulary
    }
    ends = list(stop_ids(metadata, where))
    if ends and "eos_token_id" not in ids:
        ids["eos_token_id"] = ends[0]
    further = [one for one in ends if one != ids.get("eos_token_id")]
    if len(further) > len(_FURTHER_ENDS):
        raise UnsupportedModelFile(
            f"a text ends with any of the tokens {', '.join(map(str, ends))}, and GGUF has keys for three",
            where=where,
            expected="at most three ids that end a text",
            remedy="export with --to huggingface, or list fewer under eos_token_id of the source's"
            " generation_config.json and import it again",
        )
    return ids | dict(zip(_FURTHER_ENDS, further, strict=False))


def _text_ends(recorded: Mapping[str, Any], where: Path) -> TextEnds:
    ends = text_ends(recorded)
    if ends is None:
        raise UnsupportedModelFile(
            "the embedded tokenizer puts tokens around a text in a way that GGUF has no word for",
            where=where,
            expected="at most one token before and one after",
            remedy="export the model to a Hugging Face folder instead",
        )
    return ends


def _pre_name(recorded: Mapping[str, Any], prefer: Sequence[str], where: Path) -> str:
    """GGUF's name for the way the tokenizer normalises and cuts text."""
    outer = recorded.get("pre_tokenizer") or {}
    steps = _plain(outer.get("pretokenizers", [outer]))
    ignore_merges = bool(recorded["model"].get("ignore_merges"))
    normalizer = recorded.get("normalizer") or {}
    kinds = [one.get("type") for one in normalizer.get("normalizers", [normalizer] if normalizer else [])]
    for name in dict.fromkeys((*prefer, *PRE_TOKENIZERS)):
        known = PRE_TOKENIZERS[name]
        same = _plain(list(known.steps)) == steps and known.ignore_merges == ignore_merges
        if same and kinds == (["NFC"] if known.nfc else []):
            return name
    raise UnsupportedModelFile(
        f"the embedded tokenizer cuts text{' after ' + ', '.join(map(str, kinds)) if kinds else ''} in a way"
        " that GGUF has no name for",
        where=where,
        expected="the pattern and normalisation of one of " + ", ".join(PRE_TOKENIZERS),
        remedy="export the model to a Hugging Face folder instead",
    )


def _plain(steps: list[Any]) -> list[dict[str, Any]]:
    return [{key: value for key, value in step.items() if key not in _IRRELEVANT} for step in steps]
