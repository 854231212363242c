"""Tokens added to a model: a tokenizer that knows them, and rows of embedding and head for them.

A new row is the mean of the rows of all tokens that the tokenizer had, so that the model gives a new token
the logit that an average one has. Rows that the model kept in reserve are taken first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from tokenizers import AddedToken, Tokenizer

from apr_dist.apr.layout import TOKENIZER_TEXT
from apr_dist.apr.reader import AprReader
from apr_dist.apr.writer import AprWriter, TensorSpec
from apr_dist.corpus.tokenizer_json import parse_tokenizer_json
from apr_dist.errors import TokenizerError, UsageError
from apr_dist.gates.architecture import EMBEDDING, HEAD
from apr_dist.gates.model_file import prove_model
from apr_dist.interop.convert import encode
from apr_dist.interop.embedding import embed_text, embedded_files

FLAG: Final = "--add-tokens"


@dataclass(frozen=True, kw_only=True)
class NewTokens:
    """What was added.

    Attributes:
        ids: of the new tokens, in the order given.
        rows: of the embedding before and after.
    """

    ids: tuple[int, ...]
    rows: tuple[int, int]


def add_tokens(source: Path, target: Path, tokens: Sequence[str], *, overwrite: bool = False) -> NewTokens:
    """Write an APR file again whose tokenizer knows more tokens, each a special one.

    Args:
        source: APR file with its tokenizer inside.
        target: APR file to make.
        tokens: their texts.
        overwrite: whether ``target`` may exist.

    Raises:
        UsageError: a text is empty, given twice, or a token already.
        TokenizerError: the file has no tokenizer inside, or one that cannot be used.
        GateRefused: training would refuse the result.
        OutputError: the target cannot be written.
    """
    with AprReader(source) as reader:
        model = prove_model(reader).config
        content = embedded_files(reader.metadata, where=source).get(TOKENIZER_TEXT)
        if content is None:
            raise TokenizerError(
                "the model came without a tokenizer that tokens could be added to",
                where=source,
                expected="a tokenizer inside the source",
                remedy=f"give it one (apr-dist stamp --tokenizer), and import it again with {FLAG}",
            )
        known = parse_tokenizer_json(content, where=source).effective_vocabulary
        _check(tokens, known)
        text, ids = _extended(content, tokens)
        rows = max(model.vocab_size, max(ids) + 1)
        metadata = reader.metadata.replace(vocab_size=rows, total_size=None, param_count=None)
        metadata, _ = embed_text(metadata, text, files=metadata.custom.get("apr_dist.files"), where=source)
        growing = {EMBEDDING, HEAD}
        specs = [
            TensorSpec(one.name, one.dtype, (rows, *one.shape[1:]) if one.name in growing else one.shape)
            for one in reader.tensors.values()
        ]
        old = np.fromiter((one for one in known.values() if one < model.vocab_size), np.int64)

        def prove(written: Path) -> None:
            with AprReader(written, verify="structure") as finished:
                prove_model(finished, where=source)

        with AprWriter(
            target, metadata=metadata, tensors=specs, overwrite=overwrite, prove=prove, verbatim=True
        ) as writer:
            for spec in specs:
                if spec.name not in growing:
                    writer.write(spec.name, reader.raw(spec.name))
                else:
                    values = _grown(reader.float32(spec.name), rows, old, ids)
                    writer.append(spec.name, encode(values, spec.dtype, name=spec.name, where=source))
                reader.forget(spec.name)
    return NewTokens(ids=ids, rows=(model.vocab_size, rows))


def _check(tokens: Sequence[str], known: dict[str, int]) -> None:
    for number, token in enumerate(tokens):
        what = None
        if not token.strip():
            what = "is empty"
        elif token in known:
            what = f"is a token already, {known[token]:,}"
        elif token in tokens[:number]:
            what = "is given twice"
        if what is not None:
            raise UsageError(
                f"{token!r} {what}",
                where=FLAG,
                expected="texts that are no token yet, separated by commas",
                remedy="leave it out",
            )


def _extended(content: bytes, tokens: Sequence[str]) -> tuple[bytes, tuple[int, ...]]:
    """The tokenizer with these tokens, and their ids."""
    tokenizer = Tokenizer.from_str(content.decode())
    tokenizer.add_special_tokens([AddedToken(one, special=True, normalized=False) for one in tokens])
    known = tokenizer.get_vocab(with_added_tokens=True)
    return tokenizer.to_str().encode(), tuple(known[one] for one in tokens)


def _grown(matrix: np.ndarray, rows: int, old: np.ndarray, new: Sequence[int]) -> np.ndarray:
    """The matrix ``[rows, hidden]`` with the mean of the old tokens' rows in those of the new ones.

    Rows between, of no token, have the mean too.
    """
    mean = matrix[old].mean(0, dtype=np.float64).astype(np.float32)
    grown = np.empty((rows, matrix.shape[1]), np.float32)
    grown[: len(matrix)], grown[len(matrix) :] = matrix, mean
    grown[list(new)] = mean
    return grown


def split_tokens(text: str | None) -> Iterator[str]:
    """``<a>,<b>``, as a flag gives tokens."""
    return iter(()) if text is None else (one.strip() for one in text.split(","))
