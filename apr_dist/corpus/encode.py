"""From a corpus of texts to shard folders: the public call, and what it writes about the result.

What conversations have in common with texts is in ``encode_job``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from apr_dist.atomic_files import write_atomically
from apr_dist.cores import usable_cores
from apr_dist.corpus.encode_facts import (
    EncodeProgress,
    EncodeSettings,
    EncodeSummary,
    EosPolicy,
    Normalization,
)
from apr_dist.corpus.encode_job import Given, describe_sources, run_job
from apr_dist.corpus.encoding_pool import EncodingPool
from apr_dist.corpus.encoding_run import EncodingRun
from apr_dist.corpus.publish import SOURCES_NAME
from apr_dist.corpus.sources import Sources
from apr_dist.corpus.tokenizer import LoadedTokenizer, load_tokenizer
from apr_dist.data.manifest import Manifest, Shard
from apr_dist.errors import ShardError, TokenizerError
from apr_dist.parsing import printable
from apr_dist.version import __version__

__all__ = ["EncodeProgress", "EncodeSummary", "EosPolicy", "Normalization", "encode_corpus"]


def encode_corpus(
    *,
    sources: Sequence[Path],
    tokenizer: Path,
    output: Path,
    shard_tokens: int = 1_000_000,
    eos_policy: EosPolicy = EosPolicy.BETWEEN,
    normalization: Normalization = Normalization.NONE,
    val_fraction: float = 0.0,
    text_key: str | None = None,
    parse_special: bool = False,
    skip_unreadable: bool = False,
    globs: Sequence[str] | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    strict: bool = False,
    limit_tokens: int | None = None,
    progress: Callable[[EncodeProgress], None] | None = None,
    commit_every_s: float = 1.0,
) -> EncodeSummary:
    """Encode documents into u32 shards with a manifest; the same bytes for any number of workers.

    A run that was killed goes on where it was when the same call is made again. Nothing appears under
    the final names before everything is written.

    Args:
        sources: files, folders, or ``-`` for JSONL on standard input (which cannot be resumed).
        tokenizer: a tokenizer folder.
        output: the shard folder; with ``val_fraction`` it gets ``train/`` and ``validation/``.
        shard_tokens: a shard closes after the document that reaches this many tokens.
        eos_policy: where the tokenizer's document-end id is written.
        normalization: of the text before the tokenizer sees it.
        val_fraction: share of documents, by hash of their text, that go to ``validation``; equal texts
            always go to the same side.
        text_key: JSON key or column of the text (``a.b``: ``b`` inside ``a``); None: ``content``, or else
            ``text``.
        parse_special: the text of a special token becomes its id, as in chats rendered to text.
        skip_unreadable: leave out files that cannot be read; every file is read once more to know.
        globs: which files of a folder are taken; None for the corpus formats.
        workers: tokenizing threads; None for one a CPU this process may use.
        overwrite: replace a finished data set, or drop an interrupted one of another configuration.
        strict: the first bad record stops it.
        limit_tokens: stop after the document that reaches this many tokens in all.
        progress: called about twice a second, and once at the end.
        commit_every_s: about how much work a kill may cost, in seconds.

    Raises:
        CorpusError: a source cannot be read, or (strict) a record is bad; what was done before it stays
            done. Or a split got no document: the other one is published.
        TokenizerError: the tokenizer cannot be used, or has no document-end id and one is wanted.
        OutputError: the output exists, belongs to another process or configuration, or cannot be written.
        UsageError: a number is out of its range.
    """
    settings = EncodeSettings(
        output=output,
        shard_tokens=shard_tokens,
        eos_policy=eos_policy,
        normalization=normalization,
        val_fraction=val_fraction,
        text_key=text_key,
        parse_special=parse_special,
        limit_tokens=limit_tokens,
        strict=strict,
        commit_every_s=commit_every_s,
    )
    given = Given(
        sources=sources,
        globs=globs,
        skip_unreadable=skip_unreadable,
        overwrite=overwrite,
        workers=workers,
    )
    listed = given.listed(output)
    loaded = _load_with_document_end(tokenizer, eos_policy, parse_special=parse_special)
    return run_job(
        settings,
        given,
        listed,
        identity=loaded.identity,
        open_pool=lambda: EncodingPool(
            loaded, workers=workers or usable_cores(), normalization=normalization
        ),
        describe=lambda run, _: _describe(run, settings, loaded, given, listed),
        progress=progress,
    )


def _load_with_document_end(folder: Path, policy: EosPolicy, *, parse_special: bool) -> LoadedTokenizer:
    loaded = load_tokenizer(folder, parse_special=parse_special)
    if policy is not EosPolicy.NONE and loaded.identity.eos_id is None:
        raise TokenizerError(
            "it has no token that ends a document",
            where=folder,
            expected=f"one for --eos-policy {policy.value}",
            remedy="pass --eos-policy none, or import the tokenizer with its tokenizer_config.json beside it",
        )
    return loaded


def _describe(
    run: EncodingRun, settings: EncodeSettings, loaded: LoadedTokenizer, given: Given, listed: Sources
) -> None:
    """Write every split's source list and manifest beside its shards, still in the work folder."""
    listing, source = describe_sources(run, settings, given, listed)
    identity = loaded.identity
    for name, writer in run.writers.items():
        if not writer.documents:
            continue
        check_ids(writer.shards, identity.id_bound)
        write_atomically(writer.folder / SOURCES_NAME, listing)
        Manifest(
            folder=writer.folder,
            shards=tuple(writer.shards),
            vocab_size=identity.id_bound,
            tokenizer=identity,
            split=None if name == "all" else name,
            total_documents=writer.documents,
            eos_policy=settings.eos_policy.value,
            eos_token_id=None if settings.eos_policy is EosPolicy.NONE else identity.eos_id,
            has_index=True,
            tokenizer_dir=printable(loaded.folder),
            source=source,
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            tool_version=__version__,
        ).write()


def check_ids(shards: Sequence[Shard], id_bound: int) -> None:
    """No shard holds an id that the tokenizer does not have.

    Raises:
        ShardError: one does.
    """
    largest = max(shard.max_id or 0 for shard in shards)
    if largest >= id_bound:
        raise ShardError(f"the tokenizer produced the id {largest}", expected=f"ids below {id_bound}")
