"""From a corpus to shard folders: the one public call, and what it writes about the result.

Its parts: sources in ``corpus``, threads in ``encoding_pool``, the loop in ``encoding_run``, shard files in
``split_writer``, resuming in ``journal``, moving into place in ``publish``.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

import tokenizers

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
from apr_dist.corpus.encoding_run import (
    LOSSY_DOCUMENTS,
    LOST_BYTES,
    SPECIAL_TEXTS,
    UNDER_KEY,
    EncodingRun,
)
from apr_dist.corpus.journal import Journal, is_publishing
from apr_dist.corpus.publish import SOURCES_NAME, WORK_FOLDER, publish, refuse_existing
from apr_dist.corpus.sources import STDIN, Problem, Source, Sources, list_sources, refuse_all
from apr_dist.corpus.split_writer import SplitWriter
from apr_dist.corpus.tokenizer import LoadedTokenizer, load_tokenizer
from apr_dist.data.manifest import Manifest, TokenizerIdentity
from apr_dist.errors import CorpusError, ShardError, TokenizerError, UsageError
from apr_dist.parsing import printable
from apr_dist.version import __version__

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
    if workers is not None and workers < 1:
        raise UsageError(f"--workers is {workers}", expected="at least 1")
    listed = list_sources(sources, globs=globs, output=output, skip_unreadable=skip_unreadable)
    loaded = _load_with_document_end(tokenizer, eos_policy, parse_special=parse_special)
    new_output = not output.exists()
    refuse_existing(output, overwrite=overwrite or is_publishing(output / WORK_FOLDER))
    with closing(_open_journal(settings, listed.files, loaded.identity, overwrite=overwrite)) as journal:
        run = EncodingRun(settings, listed.files, journal, eos_id=loaded.identity.eos_id)
        if not journal.publishing:
            with (
                _naming_all_that_is_unreadable(run, listed.files),
                _dropping_empty_work(journal, new_output=new_output),
                EncodingPool(loaded, workers=workers or usable_cores(), normalization=normalization) as pool,
            ):
                run.encode(pool, progress)
                _describe(run, settings, loaded, listed, sources)
            journal.mark_publishing()
        made = {name: settings.splits[name] for name, writer in run.writers.items() if writer.documents}
        manifests = publish(output, journal.folder, made)
    _refuse_empty_split(run, settings)
    return EncodeSummary(
        manifests=manifests,
        documents=run.documents,
        tokens=run.tokens,
        problems={problem: run.counts[problem.value] for problem in Problem if run.counts[problem.value]},
        examples=tuple(run.examples),
        lossy_documents=run.counts[LOSSY_DOCUMENTS],
        lost_bytes=run.counts[LOST_BYTES],
        special_texts=run.counts[SPECIAL_TEXTS],
        text_keys={
            key.removeprefix(UNDER_KEY): count
            for key, count in run.counts.items()
            if key.startswith(UNDER_KEY)
        },
        left_out=listed.left_out,
        notes=_notes(journal, manifests),
        resumed_tokens=run.resumed_tokens,
        elapsed_s=run.elapsed_s,
    )


@contextmanager
def _dropping_empty_work(journal: Journal, *, new_output: bool) -> Iterator[None]:
    """Leave nothing behind where nothing was encoded; what was encoded is kept."""
    try:
        yield
    except CorpusError:
        if journal.progress.is_empty:
            shutil.rmtree(journal.folder)
            if new_output:
                with suppress(OSError):  # not empty: someone put something there meanwhile
                    journal.folder.parent.rmdir()
        raise


@contextmanager
def _naming_all_that_is_unreadable(run: EncodingRun, sources: Sequence[Source]) -> Iterator[None]:
    """Where one source cannot be read, find out which others cannot, so that all can be repaired at once."""
    try:
        yield
    except CorpusError as error:
        if error.where != str(sources[run.source].path):
            raise
        broken = [error]
        for source in sources[run.source + 1 :]:
            try:
                source.read()
            except CorpusError as another:
                broken.append(another)
        refuse_all(broken)


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
    }
    resumable = all(source.path != STDIN for source in sources)
    lines = [_facts(source, with_times=True) for source in sources]
    return Journal(work, configuration, lines, discard=overwrite, resumable=resumable)


def _facts(source: Source, *, with_times: bool = False) -> str:
    """One JSON text a source file."""
    fields: dict[str, object] = {"path": printable(source.path), "bytes": source.bytes}
    return json.dumps(fields | ({"modified_ns": source.modified_ns} if with_times else {}))


def _describe(
    run: EncodingRun,
    settings: EncodeSettings,
    loaded: LoadedTokenizer,
    listed: Sources,
    given: Sequence[Path],
) -> None:
    """Write every split's source list and manifest beside its shards, still in the work folder."""
    listing = "".join(_facts(one) + "\n" for one in listed.files).encode()
    source = {
        "paths": [printable(path) for path in given[:_PATHS_SHOWN]],
        "files": len(listed.files),
        "files_left_out": len(listed.left_out),
        "bytes": sum(one.bytes for one in listed.files),
        "list": SOURCES_NAME,
        "list_sha256": hashlib.sha256(listing).hexdigest(),
        "text_key": settings.text_key,
        "parse_special": settings.parse_special,
        "normalization": settings.normalization.value,
        "val_fraction": settings.val_fraction,
        "limit_tokens": settings.limit_tokens,
        "counts": dict(run.counts),
        "tokenizers_version": tokenizers.__version__,
    }
    identity = loaded.identity
    if not run.documents:
        raise run.without_documents()
    for name, writer in run.writers.items():
        if not writer.documents:
            continue
        _check_ids(writer, identity.id_bound)
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


def _check_ids(writer: SplitWriter, id_bound: int) -> None:
    largest = max(shard.max_id or 0 for shard in writer.shards)
    if largest >= id_bound:
        raise ShardError(f"the tokenizer produced the id {largest}", expected=f"ids below {id_bound}")


def _refuse_empty_split(run: EncodingRun, settings: EncodeSettings) -> None:
    """Say that a part of the data set is missing; the other part is in place by now.

    Raises:
        CorpusError: no document fell to one of the parts.
    """
    for name, writer in run.writers.items():
        if not writer.documents:
            other = next(settings.splits[one] for one in run.writers if one != name)
            raise CorpusError(
                f"no document fell to the {name} part ({run.documents:,} documents in all, --val-fraction"
                f" {settings.val_fraction})",
                where=settings.output,
                expected="at least one document a part",
                remedy=f"{other} is complete and can be used. For both parts encode again with --force and "
                + ("a larger" if name == "validation" else "a smaller")
                + " --val-fraction"
                + (f", from {run.least_position * 1.05:.2g} on" if name == "validation" else ""),
            )


def _notes(journal: Journal, manifests: Mapping[str, Manifest]) -> tuple[str, ...]:
    """What was found damaged, and how long sequences may be before shards are too short for them."""
    notes = [f"of the interrupted run, {journal.lost}"] if journal.lost else []
    for name, manifest in manifests.items():
        mean = manifest.total_tokens // manifest.shard_count
        notes.append(
            f"{name}: shards of {mean:,} tokens lose at most 1 % at their ends to sequences of up to"
            f" {max(1, mean // 100):,} tokens; longer ones want a larger --shard-tokens"
        )
    return tuple(notes)
