"""The tokenizer of a chat: special tokens that the template writes are tokens, those in a message are text.

A guard character, inserted into what messages contain wherever they could spell a special token, keeps the
tokenizer from finding one there. What it finds then is the template's own; between those, text is encoded
without the guards and without special tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from apr_dist.errors import CorpusError, TokenizerError
from apr_dist.parsing import parse_json

_GUARDS = [chr(code) for code in range(0x10FF00, 0x10FF40)]
"""Private characters of the last plane; the first that does not occur is the guard of a conversation."""


@dataclass(frozen=True)
class EncodedText:
    """Tokens of a text and the characters that each stands for.

    Attributes:
        ids: [tokens] u32.
        starts: [tokens] first character of each.
        ends: [tokens] character after the last of each.
        is_special: [tokens] whether it is a special token.
    """

    ids: NDArray[np.uint32]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    is_special: NDArray[np.bool_]


class ChatTokenizer:
    """A tokenizer with what conversations need from it.

    Attributes:
        tokenizer: reads special tokens as such.
        special_ids: ids of the special tokens.
        vocabulary_size: one more than the largest id.
        turn_ends: by digest of a template, what ends a turn under it; see `ChatTemplate.turn_end`.

    Args:
        content: text of a ``tokenizer.json``.
        special_tokens: special tokens by role; those of the vocabulary are special, as for ``transformers``.
        where: what errors call it.

    Raises:
        TokenizerError: the tokenizers library refuses it.
    """

    def __init__(
        self, content: str | bytes, *, special_tokens: Mapping[str, str] | None = None, where: Path | str = ""
    ) -> None:
        self._content, self._roles, self._where = content, dict(special_tokens or {}), where
        self.tokenizer = self._opened()
        added = self.tokenizer.get_added_tokens_decoder()
        special = {token.content: one for one, token in added.items() if token.special and token.content}
        self.special_ids = frozenset(special.values())
        self.turn_ends: dict[str, int | None] = {}
        self.vocabulary_size = max([*self.tokenizer.get_vocab().values(), *added], default=-1) + 1
        self._special = np.array(sorted(self.special_ids), dtype=np.int64)
        longest_first = sorted(special, key=lambda text: (-len(text), text))
        self._single = [text for text in longest_first if len(text) == 1]
        several = [re.escape(text) for text in longest_first if len(text) > 1]
        self._inside = re.compile(f"(?=(?:{'|'.join(several) or '(?!)'}))(.)", re.DOTALL)
        cuts = [(text, at) for text in longest_first for at in range(1, len(text))]
        self._beginnings = tuple({text[:at] for text, at in cuts})
        self._endings = tuple({text[at:] for text, at in cuts})

    @cached_property
    def _plain(self) -> Tokenizer:
        """As ``tokenizer``, with special tokens read as text."""
        tokenizer = self._opened()
        tokenizer.encode_special_tokens = True
        return tokenizer

    @cached_property
    def _continuing(self) -> Tokenizer:
        """As ``_plain``, for text that does not stand first."""
        tokenizer = self._opened(_without_prefix)
        tokenizer.encode_special_tokens = True
        return tokenizer

    def _opened(self, change: Callable[[Any], Any] = lambda description: description) -> Tokenizer:
        try:
            description = parse_json(self._content)
            description |= {"post_processor": None, "truncation": None, "padding": None}
            tokenizer = Tokenizer.from_str(json.dumps(change(description)))
        except Exception as error:  # the library raises bare Exception for a malformed file
            raise TokenizerError(f"the tokenizers library refuses it ({error})", where=self._where) from error
        if getattr(tokenizer.model, "dropout", None) is not None:
            tokenizer.model.dropout = None
        known = [token for token in self._roles.values() if tokenizer.token_to_id(token) is not None]
        tokenizer.add_special_tokens(list(dict.fromkeys(known)))
        return tokenizer

    def id_of(self, token: str) -> int | None:
        """The id of a token, None if there is none."""
        found = self.tokenizer.token_to_id(token)
        return None if found is None else int(found)

    def encode(self, text: str) -> EncodedText:
        """Encode a text in which no guard stands: special tokens become their ids."""
        return self._facts(self.tokenizer.encode(text, add_special_tokens=False))

    def encode_plain(self, text: str) -> NDArray[np.uint32]:
        """Ids of a text in which special tokens are text."""
        return np.array(self._plain.encode(text, add_special_tokens=False).ids, dtype=np.uint32)

    def guard_for(self, texts: Iterable[str]) -> str:
        """A character that occurs in none of the texts."""
        used = set().union(*texts)
        return next(guard for guard in _GUARDS if guard not in used)

    def guarded(self, value: Any, guard: str, where: str) -> Any:
        """A JSON value whose texts spell no special token, alone or with what stands around them.

        Raises:
            CorpusError: a special token is a single character, which nothing can be put into.
        """
        if isinstance(value, str):
            for text in self._single:
                if text in value:
                    raise CorpusError(
                        f"a message contains {text!r}, which is a special token of one character",
                        where=where,
                        remedy="take it out of the message, or read special tokens as such: --parse-special",
                    )
            marked = self._inside.sub(rf"\1{guard}", value)
            marked += guard if value.endswith(self._beginnings) else ""
            return guard + marked if value.startswith(self._endings) else marked
        if isinstance(value, dict):
            return {
                self.guarded(key, guard, where): self.guarded(item, guard, where)
                for key, item in value.items()
            }
        if isinstance(value, list | tuple):
            return [self.guarded(item, guard, where) for item in value]
        return value

    def encode_guarded(self, text: str, guard: str, where: str) -> EncodedText:
        """Encode a rendered chat whose messages are guarded.

        Each piece between the template's special tokens is encoded as it is where it stands; that this gives
        the same as encoding in one go is verified on the text itself, guards included.

        Raises:
            CorpusError: it does not, or plain text encodes to a special token.
        """
        whole = self.encode(text)
        pieces = self._pieces(text, whole, guard=None)
        if not np.array_equal(_joined(pieces).ids, whole.ids):
            raise CorpusError(
                "a message spells a special token, and this tokenizer encodes text otherwise where it is"
                " divided",
                where=where,
                remedy="take the special token out of the message, or read it as such: --parse-special",
            )
        found = _joined(self._pieces(text, whole, guard=guard))
        if np.any(np.isin(found.ids, self._special) & ~found.is_special):
            raise CorpusError(
                "a message spells a special token, and its plain text encodes to that same token",
                where=where,
                remedy="take the special token out of the message, or read it as such: --parse-special",
            )
        return found

    def _pieces(self, text: str, whole: EncodedText, *, guard: str | None) -> list[EncodedText]:
        found: list[EncodedText] = []
        begin = 0
        for at in [*np.flatnonzero(whole.is_special).tolist(), None]:
            end = len(text) if at is None else int(whole.starts[at])
            if end > begin:
                found.append(self._piece(text, begin, end, guard))
            if at is not None:
                found.append(EncodedText(*(part[at : at + 1] for part in _parts(whole))))
                begin = int(whole.ends[at])
        return found

    def _piece(self, text: str, begin: int, end: int, guard: str | None) -> EncodedText:
        """Tokens of ``text[begin:end]`` without guards, with the characters that they have in ``text``."""
        piece = text[begin:end]
        kept = np.arange(begin, end + 1)
        if guard is not None and guard in piece:
            kept = np.array([*(begin + at for at, letter in enumerate(piece) if letter != guard), end])
            piece = piece.replace(guard, "")
        encode = (self._continuing if begin else self._plain).encode
        facts = self._facts(encode(piece, add_special_tokens=False))
        ends = np.where(facts.ends > facts.starts, kept[np.maximum(facts.ends - 1, 0)] + 1, kept[facts.ends])
        return EncodedText(facts.ids, kept[facts.starts], ends, np.zeros(len(facts.ids), dtype=bool))

    def _facts(self, encoding: Encoding) -> EncodedText:
        ids = np.array(encoding.ids, dtype=np.uint32)
        offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        return EncodedText(ids, offsets[:, 0], offsets[:, 1], np.isin(ids, self._special))


def _parts(text: EncodedText) -> tuple[NDArray[Any], ...]:
    return text.ids, text.starts, text.ends, text.is_special


def _joined(pieces: list[EncodedText]) -> EncodedText:
    if not pieces:
        empty = np.zeros(0, dtype=np.int64)
        return EncodedText(empty.astype(np.uint32), empty, empty, empty.astype(bool))
    return EncodedText(*(np.concatenate(parts) for parts in zip(*map(_parts, pieces), strict=True)))


def _without_prefix(part: Any) -> Any:
    """A tokenizer that puts nothing before a text, for text that does not stand first."""
    if isinstance(part, dict):
        changed = {key: _without_prefix(value) for key, value in part.items() if key not in ("model",)}
        if part.get("type") == "Metaspace" and part.get("prepend_scheme") == "first":
            changed["prepend_scheme"] = "never"
        return changed | ({"model": part["model"]} if "model" in part else {})
    return [_without_prefix(one) for one in part] if isinstance(part, list) else part
