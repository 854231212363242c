"""Gate: tokenizer, shards and model speak of the same tokens.

From scratch the tokenizer's vocabulary is the model's. A pretrained model may have reserved rows
beyond its tokenizer (Qwen2.5: 151,665 of 151,936), never fewer.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from apr_dist.errors import VocabularyRefused

ABOVE_MODEL = "FALSIFY-APR-PRETRAIN-ARCH-010"
NOT_EQUAL = "FALSIFY-APR-PRETRAIN-ARCH-006"
SHARD_ID = "FALSIFY-APR-DIST-TRAINER-008"
OTHER_TOKENIZER = "FALSIFY-APR-DIST-TRAINER-009"


def check_tokenizer(*, effective: int, model_vocab: int, from_init: bool, where: Path) -> None:
    """The tokenizer's vocabulary fits the model's rows.

    Args:
        effective: tokens the tokenizer can produce, added ones included.
        model_vocab: rows of the embedding.
        from_init: whether the model comes from a file (then reserved rows are allowed).
        where: the tokenizer.

    Raises:
        VocabularyRefused: too large, or from scratch unequal.
    """
    if effective > model_vocab:
        raise VocabularyRefused(
            f"the tokenizer has {effective:,} tokens and the model {model_vocab:,} rows",
            where=where,
            expected=f"at most {model_vocab:,} tokens",
            remedy="use the tokenizer the model was trained with",
            falsifier=ABOVE_MODEL if from_init else NOT_EQUAL,
        )
    if not from_init and effective != model_vocab:
        raise VocabularyRefused(
            f"the tokenizer has {effective:,} tokens and the new model {model_vocab:,} rows",
            where=where,
            expected="equal numbers when training from scratch",
            remedy="set the model's vocab_size to the tokenizer's, or pass --init",
            falsifier=NOT_EQUAL,
        )


def check_shards(*, max_id: int | None, model_vocab: int, where: Path) -> None:
    """No shard holds a token the model has no row for.

    Raises:
        VocabularyRefused: the largest id is out of range, or nobody recorded it.
    """
    if max_id is None:
        raise VocabularyRefused(
            "the manifest does not record the largest token id",
            where=where,
            expected=f"a recorded largest id below {model_vocab:,}",
            remedy=f"apr-dist tokenize repair-manifest {where}",
            falsifier=SHARD_ID,
        )
    if max_id >= model_vocab:
        raise VocabularyRefused(
            f"the shards hold token id {max_id:,} and the model has {model_vocab:,} rows",
            where=where,
            expected=f"ids below {model_vocab:,}",
            remedy="encode the corpus with this model's tokenizer",
            falsifier=SHARD_ID,
        )


def check_ignored(ids: Sequence[int], *, model_vocab: int) -> None:
    """An id that is to be left out of the loss is one that the model has.

    Raises:
        VocabularyRefused: it is not, so the setting means another vocabulary.
    """
    beyond = [one for one in ids if one >= model_vocab]
    if beyond:
        raise VocabularyRefused(
            f"loader.ignored_ids names {beyond[0]:,} and the model has {model_vocab:,} rows",
            where="--loader.ignored-ids",
            expected=f"ids below {model_vocab:,}",
            remedy="name ids of this model's tokenizer",
        )


def check_same_tokenizer(*, shards_sha256: str | None, tokenizer_sha256: str | None, where: Path) -> None:
    """The shards were encoded by the tokenizer the model comes with, as far as both are recorded.

    Raises:
        VocabularyRefused: two recorded identities that differ.
    """
    if shards_sha256 and tokenizer_sha256 and shards_sha256 != tokenizer_sha256:
        raise VocabularyRefused(
            f"the shards were encoded by tokenizer {shards_sha256[:12]} and this model's is"
            f" {tokenizer_sha256[:12]}",
            where=where,
            expected="shards encoded with the model's own tokenizer",
            remedy="encode the corpus again with this model's tokenizer",
            falsifier=OTHER_TOKENIZER,
        )
