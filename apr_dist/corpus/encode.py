"""From a corpus to shard folders: the one public call, and what it writes about the result.

Its parts: sources in ``corpus``, threads in ``encoding_pool``, the loop in ``encoding_run``, shard files in
``split_writer``, resuming in ``journal``, moving into place in ``publish``.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

import tokenizers

from apr_dist import __version__
from apr_dist.atomic_files import write_atomically, writing_to
from apr_dist.cores import usable_cores
from apr_dist.corpus.encode_facts import (
    EncodeProgress,
    EncodeSettings,
    EncodeSummary,
    EosPolicy,
    Normalization,
)
from apr_dist.corpus.encoding_pool import EncodingPool
from apr_dist.corpus.encoding_run import LOSSY_DOCUMENTS, LOST_BYTES, EncodingRun
from apr_dist.corpus.journal import Journal, is_publishing
from apr_dist.corpus.publish import SOURCES_NAME, WORK_FOLDER, publish, refuse_existing
from apr_dist.corpus.sources import STDIN, Problem, Source, list_sources
from apr_dist.corpus.split_writer import SplitWriter
from apr_dist.corpus.tokenizer import LoadedTokenizer, load_tokenizer
from apr_dist.data.manifest import Manifest, TokenizerIdentity
from apr_dist.errors import CorpusError, ShardError, TokenizerError, UsageError

__all__ = ["EncodeProgress", "EncodeSummary", "EosPolicy", "Normalization", "encode_corpus"]


_PATHS_SHOWN = 16  # of what was given on the command line; the list of files is complete


def encode_corpus(
    *,
    sources: Sequence[Path],
    tokenizer: Path,
    output: Path,
    shard_tokens: int = 1_000_000,
    eos_policy: EosPolicy = EosPolicy.BETWEEN,
    normalization: Normalization = Normalization.NONE,
    val_fraction: float = 0.0,
    text_key: str = "content",
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
        text_key: JSON key or Parquet column of the text.
        globs: which files of a folder are taken; None for the corpus formats.
        workers: tokenizing threads; None for one a CPU this process may use.
        overwrite: replace a finished data set, or drop an interrupted one of another configuration.
        strict: the first bad record stops it.
        limit_tokens: stop after the document that reaches this many tokens in all.
        progress: called about twice a second, and once at the end.
        commit_every_s: about how much work a kill may cost, in seconds.

    Raises:
        CorpusError: a source cannot be read, a split got no document, or (strict) a record is bad.
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
        limit_tokens=limit_tokens,
        strict=strict,
        commit_every_s=commit_every_s,
    )
    if workers is not None and workers < 1:
        raise UsageError(f"--workers is {workers}", expected="at least 1")
    listed = list_sources(sources, globs=globs)
    loaded = _load_with_document_end(tokenizer, eos_policy)
    new_output = not output.exists()
    refuse_existing(output, overwrite=overwrite or is_publishing(output / WORK_FOLDER))
    with closing(_open_journal(settings, listed, loaded.identity, overwrite=overwrite)) as journal:
        run = EncodingRun(settings, listed, journal, eos_id=loaded.identity.eos_id)
        if not journal.publishing:
            with (
                _dropping_what_cannot_go_on(journal.folder, new_output=new_output),
                EncodingPool(loaded, workers=workers or usable_cores(), normalization=normalization) as pool,
            ):
                run.encode(pool, progress)
                _describe(run, settings, loaded, listed, sources)
            journal.mark_publishing()
        manifests = publish(output, journal.folder, settings.splits)
    return EncodeSummary(
        manifests=manifests,
        documents=run.documents,
        tokens=run.tokens,
        problems={problem: run.counts[problem.value] for problem in Problem if run.counts[problem.value]},
        examples=tuple(run.examples),
        lossy_documents=run.counts[LOSSY_DOCUMENTS],
        lost_bytes=run.counts[LOST_BYTES],
        resumed_tokens=run.resumed_tokens,
        elapsed_s=run.elapsed_s,
    )


@contextmanager
def _dropping_what_cannot_go_on(work: Path, *, new_output: bool) -> Iterator[None]:
    """Remove the work folder when the corpus itself is at fault: mended, it is another corpus."""
    try:
        yield
    except CorpusError as error:
        cause = error.__cause__
        # A reading error may pass, and the run then goes on; bytes that are not gzip do not become it.
        if not isinstance(cause, OSError) or isinstance(cause, gzip.BadGzipFile):
            shutil.rmtree(work)
            if new_output:
                with suppress(OSError):  # not empty: someone put something there meanwhile
                    work.parent.rmdir()
        raise


def _load_with_document_end(folder: Path, policy: EosPolicy) -> LoadedTokenizer:
    loaded = load_tokenizer(folder)
    if policy is not EosPolicy.NONE and loaded.identity.eos_id is None:
        raise TokenizerError(
            "it has no token that ends a document",
            where=folder,
            expected=f"one for --eos-policy {policy.value}",
            remedy="pass --eos-policy none, or import the tokenizer with its tokenizer_config.json beside it",
        )
    return loaded


def _open_journal(
    settings: EncodeSettings, sources: Sequence[Source], identity: TokenizerIdentity, *, overwrite: bool
) -> Journal:
    work = settings.output / WORK_FOLDER
    with writing_to(settings.output):
        work.mkdir(parents=True, exist_ok=True)
    configuration = settings.to_json() | {
        "tool_version": __version__,
        "tokenizers_version": tokenizers.__version__,
        "tokenizer_sha256": identity.sha256,
        "eos_id": identity.eos_id,
        "corpus_sha256": hashlib.sha256(_listing(sources, with_times=True)).hexdigest(),
    }
    resumable = all(source.path != STDIN for source in sources)
    return Journal(work, configuration, discard=overwrite, resumable=resumable)


def _listing(sources: Sequence[Source], *, with_times: bool = False) -> bytes:
    """One JSON line a source file."""
    lines = []
    for source in sources:
        fields: dict[str, object] = {"path": str(source.path), "bytes": source.bytes}
        lines.append(json.dumps(fields | ({"modified_ns": source.modified_ns} if with_times else {})))
    return ("\n".join(lines) + "\n").encode()


def _describe(
    run: EncodingRun,
    settings: EncodeSettings,
    loaded: LoadedTokenizer,
    listed: Sequence[Source],
    given: Sequence[Path],
) -> None:
    """Write every split's source list and manifest beside its shards, still in the work folder."""
    listing = _listing(listed)
    source = {
        "paths": [str(path) for path in given[:_PATHS_SHOWN]],
        "files": len(listed),
        "bytes": sum(one.bytes for one in listed),
        "list": SOURCES_NAME,
        "list_sha256": hashlib.sha256(listing).hexdigest(),
        "text_key": settings.text_key,
        "normalization": settings.normalization.value,
        "val_fraction": settings.val_fraction,
        "limit_tokens": settings.limit_tokens,
        "counts": dict(run.counts),
        "tokenizers_version": tokenizers.__version__,
    }
    identity = loaded.identity
    for name, writer in run.writers.items():
        _check_split(name, writer, identity.id_bound, run)
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
            tokenizer_dir=str(loaded.folder),
            source=source,
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            tool_version=__version__,
        ).write()


def _check_split(name: str, writer: SplitWriter, id_bound: int, run: EncodingRun) -> None:
    if not writer.documents:
        met = ", ".join(f"{count} x {problem}" for problem, count in run.counts.items()) or "nothing else"
        what = "the corpus holds no document" if name == "all" else f"no document fell to the {name} part"
        raise CorpusError(
            f"{what} ({run.documents} documents in all; met {met})",
            expected="at least one document a part",
            remedy="check --text-key, or change --val-fraction",
        )
    largest = max(shard.max_id or 0 for shard in writer.shards)
    if largest >= id_bound:
        raise ShardError(f"the tokenizer produced the id {largest}", expected=f"ids below {id_bound}")
