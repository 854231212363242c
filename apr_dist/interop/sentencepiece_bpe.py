"""A SentencePiece BPE vocabulary of scored pieces as a tokenizer.json, and back (GGUF's tokenizer ``llama``).

SentencePiece joins the two neighbours whose joined piece has the highest score; a tokenizer.json lists the
pairs in order. The order of the pieces' scores is the order of the merges.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final

SPACE: Final = "\u2581"
"""The letter that stands for a space."""


class TokenType(IntEnum):
    """``tokenizer.ggml.token_type`` of a GGUF."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class AddedToken:
    """A token that is matched as a whole before the text is cut; ``special`` ones carry no text."""

    content: str
    id: int
    special: bool

    def to_json(self) -> dict[str, object]:
        """As the ``added_tokens`` list of a tokenizer.json spells it."""
        matching = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        return {"id": self.id, "content": self.content, **matching, "special": self.special}


def describe_sentencepiece(
    tokens: Sequence[str],
    types: Sequence[int],
    scores: Sequence[float],
    around: Mapping[str, Any] | None,
    *,
    prefixed: bool,
) -> bytes:
    """The tokenizer.json of scored pieces.

    Args:
        tokens: pieces by id.
        types: ``TokenType`` of each.
        scores: of each; the highest is merged first.
        around: post-processor.
        prefixed: whether a space is put before a text.
    """
    kinds = list(zip(tokens, types, strict=True))
    vocabulary = {token: one for one, (token, kind) in enumerate(kinds) if kind != TokenType.UNUSED}
    unknown = next((token for token, kind in kinds if kind == TokenType.UNKNOWN), None)
    whole = (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED)
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    decoders: list[dict[str, Any]] = [back, {"type": "ByteFallback"}, {"type": "Fuse"}]
    if prefixed:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return tokenizer_json(
        vocabulary=vocabulary,
        merges=_merges(kinds, scores),
        added=[
            AddedToken(token, one, kind != TokenType.USER_DEFINED)
            for one, (token, kind) in enumerate(kinds)
            if kind in whole
        ],
        normalizer={
            "type": "Sequence",
            "normalizers": [*([{"type": "Prepend", "prepend": SPACE}] if prefixed else []), replace],
        },
        pre_tokenizer=None,
        post_processor=around,
        decoder={"type": "Sequence", "decoders": decoders},
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=True,
    )


def tokenizer_json(
    *,
    vocabulary: Mapping[str, int],
    merges: Iterable[Sequence[str]],
    added: Iterable[AddedToken],
    normalizer: Mapping[str, Any] | None,
    pre_tokenizer: Mapping[str, Any] | None,
    post_processor: Mapping[str, Any] | None,
    decoder: Mapping[str, Any],
    **model: Any,
) -> bytes:
    """A tokenizer.json of a BPE; ``model`` is what its model states other than nothing or false."""
    plain = {
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
    }
    bpe = {"type": "BPE", **plain, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False, **model}
    description = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [token.to_json() for token in added],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": post_processor,
        "decoder": decoder,
        "model": {**bpe, "vocab": vocabulary, "merges": [list(merge) for merge in merges]},
    }
    return json.dumps(description, ensure_ascii=False).encode()


def _merges(kinds: Sequence[tuple[str, int]], scores: Sequence[float]) -> list[list[str]]:
    """The pairs that make each piece, those of the highest score first.

    User-defined pieces are found whole before anything is merged, so none is made of a pair or part of one.
    """
    ids = {token: one for one, (token, kind) in enumerate(kinds) if kind == TokenType.NORMAL}
    merges: list[list[str]] = []
    for token in sorted(ids, key=lambda one: (-scores[ids[one]], ids[one])):
        pairs = [[token[:place], token[place:]] for place in range(1, len(token))]
        merges += [pair for pair in pairs if pair[0] in ids and pair[1] in ids]
    return merges


@dataclass(frozen=True)
class ScoredPieces:
    """What a GGUF states of a SentencePiece vocabulary besides the tokens themselves."""

    scores: dict[str, float]
    prefixed: bool


def scored_pieces(recorded: Mapping[str, Any], merges: Sequence[tuple[str, str]]) -> ScoredPieces | None:
    """The scores that give these merges; None when the tokenizer.json is none of this kind."""
    model, normalizer = recorded["model"], recorded.get("normalizer") or {}
    steps = normalizer.get("normalizers", [normalizer] if normalizer else [])
    pre = recorded.get("pre_tokenizer") or {}
    prefixed: bool | None = None
    if not pre:
        prefixed = _prefixed(steps)
    elif not steps and {"type": "Metaspace", "replacement": SPACE, "split": False}.items() <= pre.items():
        scheme = str(pre.get("prepend_scheme", "always"))
        prefixed = {"always": True, "first": True, "never": False}.get(scheme)
    if prefixed is None or not model.get("byte_fallback"):
        return None
    scores: dict[str, float] = {}
    last = None
    for left, right in merges:
        piece = left + right
        if piece not in scores:
            scores[piece] = -float(len(scores))
        elif piece != last:
            return None  # two pieces take turns: no score of a piece says so
        last = piece
    return ScoredPieces(scores, prefixed)


def _prefixed(steps: Sequence[Mapping[str, Any]]) -> bool | None:
    """Whether the normalizers put a space before a text; None when they do anything else."""
    prepend = {"type": "Prepend", "prepend": SPACE}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    plain = [dict(step) for step in steps]
    return True if plain == [prepend, replace] else False if plain == [replace] else None
