"""The choices, progress and result of an encoding, as plain facts.

Lives here: what goes into ``encode_corpus`` and what comes out. The work itself lives in ``encode`` and the
rooms it names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from apr_dist.corpus.formats import Problem
from apr_dist.data.manifest import Manifest
from apr_dist.errors import UsageError


class EosPolicy(Enum):
    """Where the document-end id is written."""

    NONE = "none"
    BETWEEN = "between"
    AFTER = "after"


class Normalization(Enum):
    """What is done to a text before the tokenizer sees it."""

    NONE = "none"
    NFC = "nfc"


@dataclass(frozen=True)
class EncodeSettings:
    """The choices of one encoding; see ``encode_corpus`` for each, and ``encode_chat`` for ``chat``.

    Raises:
        UsageError: a number is out of its range.
    """

    output: Path
    shard_tokens: int
    eos_policy: EosPolicy
    normalization: Normalization
    val_fraction: float
    text_key: str | None
    parse_special: bool
    limit_tokens: int | None
    strict: bool
    commit_every_s: float
    chat: Mapping[str, object] | None = None

    def __post_init__(self) -> None:
        if self.shard_tokens < 1:
            raise UsageError(f"--shard-tokens is {self.shard_tokens}", expected="at least 1")
        if not 0.0 <= self.val_fraction < 1.0:
            raise UsageError(
                f"--val-fraction is {self.val_fraction}", expected="from 0 up to, not including, 1"
            )
        if self.limit_tokens is not None and self.limit_tokens < 1:
            raise UsageError(f"--limit-tokens is {self.limit_tokens}", expected="at least 1")

    @property
    def splits(self) -> dict[str, Path]:
        """The parts of the data set and where each one's shards go."""
        if self.val_fraction:
            return {"train": self.output / "train", "validation": self.output / "validation"}
        return {"all": self.output}

    def made_in(self, name: str) -> str:
        """The folder of the work folder that a part's finished shards are in."""
        return name if self.chat is None else f"{name}.rows"

    @property
    def skip_bad(self) -> str:
        """The remedy for a bad record; empty for the usual one."""
        return "" if self.chat is None else "correct the record, or leave such out with --skip-bad-records"

    @property
    def find_text(self) -> str:
        """The remedy where no record is what is encoded."""
        if self.chat is not None:
            return "see which keys the records have, and name their shape with --shape"
        return (
            "name the key that holds the text with --text-key (A.B for B inside A);"
            " conversations are encoded with `apr-dist tokenize encode-chat`"
        )

    def to_json(self) -> dict[str, object]:
        """The choices that the result depends on."""
        return {
            **({} if self.chat is None else {"chat": dict(self.chat)}),
            "shard_tokens": self.shard_tokens,
            "eos_policy": self.eos_policy.value,
            "normalization": self.normalization.value,
            "val_fraction": self.val_fraction,
            "text_key": self.text_key,
            "parse_special": self.parse_special,
            "limit_tokens": self.limit_tokens,
        }


@dataclass(frozen=True)
class EncodeProgress:
    """How far encoding is; handed to the ``progress`` callback about twice a second.

    Attributes:
        documents: encoded so far, in all splits.
        tokens: written so far, in all splits.
        bytes_done: of the sources, as they lie on disk.
        bytes_total: of all sources; 0 for standard input.
        elapsed_s: of this process.
        tokens_per_s: of this process (a resumed run does not count what it found done).
        eta_s: seconds left at this rate, None while it cannot be known.
    """

    documents: int
    tokens: int
    bytes_done: int
    bytes_total: int
    elapsed_s: float
    tokens_per_s: float
    eta_s: float | None


@dataclass(frozen=True)
class EncodeSummary:
    """What an encoding made and what it met.

    Attributes:
        manifests: by split: ``train`` and ``validation``, or ``all``.
        documents: in all splits.
        tokens: in all splits.
        problems: records that are no documents, counted by kind; kinds that did not occur are left out.
        examples: the first few of them that this process met, with file and line.
        lossy_documents: documents with bytes that the vocabulary has no token for.
        lost_bytes: how many such bytes.
        special_texts: special tokens in the texts that were encoded as plain text.
        text_keys: documents by the key their text was found under, where no key was named.
        left_out: files of the corpus's folders that were not read, with the reason.
        notes: what else is worth knowing, one sentence each.
        resumed_tokens: tokens found done from an interrupted run.
        elapsed_s: of this process.
    """

    manifests: Mapping[str, Manifest]
    documents: int
    tokens: int
    problems: Mapping[Problem, int]
    examples: tuple[str, ...]
    lossy_documents: int
    lost_bytes: int
    special_texts: int
    text_keys: Mapping[str, int]
    left_out: Mapping[Path, str]
    notes: tuple[str, ...]
    resumed_tokens: int
    elapsed_s: float

    @property
    def tokens_per_s(self) -> float:
        """Tokens that this process encoded, a second."""
        return (self.tokens - self.resumed_tokens) / max(self.elapsed_s, 1e-9)
