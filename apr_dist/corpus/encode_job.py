"""One encoding from its sources to published shards: what is the same for texts and for conversations.

Its parts: sources in ``sources``, threads in ``encoding_pool``, the loop in ``encoding_run``, shard files in
``split_writer``, resuming in ``journal``, moving into place in ``publish``.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import tokenizers

from apr_dist.atomic_files import writing_to
from apr_dist.corpus.encode_facts import EncodeProgress, EncodeSettings, EncodeSummary
from apr_dist.corpus.encoding_pool import EncodingThreads
from apr_dist.corpus.encoding_run import (
    LOSSY_DOCUMENTS,
    LOST_BYTES,
    SPECIAL_TEXTS,
    UNDER_KEY,
    EncodingRun,
)
from apr_dist.corpus.formats import ReadRecord
from apr_dist.corpus.journal import Journal, is_publishing
from apr_dist.corpus.publish import SOURCES_NAME, WORK_FOLDER, publish, refuse_existing
from apr_dist.corpus.sources import STDIN, Problem, Source, Sources, list_sources, refuse_all
from apr_dist.data.manifest import Manifest, TokenizerIdentity
from apr_dist.errors import CorpusError, UsageError
from apr_dist.parsing import printable
from apr_dist.version import __version__

_PATHS_SHOWN = 16  # of what was given on the command line; the list of files is complete


@dataclass(frozen=True, kw_only=True)
class Given:
    """What a user names.

    Attributes:
        sources: files, folders, or ``-`` for JSONL on standard input.
        globs: which files of a folder are taken; None for the corpus formats.
        skip_unreadable: leave out files that cannot be read.
        overwrite: replace a finished data set, or drop an interrupted one of another configuration.
        workers: threads; None for one a CPU this process may use.
    """

    sources: Sequence[Path]
    globs: Sequence[str] | None
    skip_unreadable: bool
    overwrite: bool
    workers: int | None

    def listed(self, output: Path) -> Sources:
        """The files of the corpus.

        Raises:
            UsageError: a number is out of its range.
            CorpusError: a source cannot be read.
        """
        if self.workers is not None and self.workers < 1:
            raise UsageError(f"--workers is {self.workers}", expected="at least 1")
        return list_sources(
            self.sources, globs=self.globs, output=output, skip_unreadable=self.skip_unreadable
        )


def run_job(
    settings: EncodeSettings,
    given: Given,
    listed: Sources,
    *,
    identity: TokenizerIdentity,
    open_pool: Callable[[], EncodingThreads],
    describe: Callable[[EncodingRun, Path], None],
    read: ReadRecord | None = None,
    progress: Callable[[EncodeProgress], None] | None = None,
) -> EncodeSummary:
    """Encode what is not encoded yet, describe and publish it.

    Args:
        settings: what the result depends on.
        given: what the user named.
        listed: the files of the corpus.
        identity: of the tokenizer.
        open_pool: makes the threads.
        describe: writes each split's manifest beside its shards in the work folder, which it gets.
        read: makes records of whole JSON values and rows; None: texts.
        progress: called about twice a second, and once at the end.

    Raises:
        CorpusError, OutputError: as `encode.encode_corpus`.
    """
    output = settings.output
    new_output = not output.exists()
    refuse_existing(output, overwrite=given.overwrite or is_publishing(output / WORK_FOLDER))
    with closing(_open_journal(settings, listed.files, identity, overwrite=given.overwrite)) as journal:
        run = EncodingRun(settings, listed.files, journal, eos_id=identity.eos_id, read=read)
        if not journal.publishing:
            with (
                _naming_all_that_is_unreadable(run, listed.files),
                _dropping_empty_work(journal, new_output=new_output),
                open_pool() as pool,
            ):
                run.encode(pool, progress)
                if not run.documents:
                    raise run.without_documents()
                describe(run, journal.folder)
            journal.mark_publishing()
        made = [name for name, writer in run.writers.items() if writer.documents]
        work = {settings.made_in(name): settings.splits[name] for name in made}
        manifests = publish(output, journal.folder, work)
        manifests = {name: manifests[settings.made_in(name)] for name in made}
    _refuse_empty_split(run, settings)
    counts = run.counts
    return EncodeSummary(
        manifests=manifests,
        documents=run.documents,
        tokens=run.tokens,
        problems={problem: counts[problem.value] for problem in Problem if counts[problem.value]},
        examples=tuple(run.examples),
        lossy_documents=counts[LOSSY_DOCUMENTS],
        lost_bytes=counts[LOST_BYTES],
        special_texts=counts[SPECIAL_TEXTS],
        text_keys={
            key.removeprefix(UNDER_KEY): count for key, count in counts.items() if key.startswith(UNDER_KEY)
        },
        left_out=listed.left_out,
        notes=_notes(journal, manifests),
        resumed_tokens=run.resumed_tokens,
        elapsed_s=run.elapsed_s,
    )


def describe_sources(
    run: EncodingRun, settings: EncodeSettings, given: Given, listed: Sources
) -> tuple[bytes, dict[str, object]]:
    """The list of source files, for beside the shards, and what a manifest says of its source."""
    listing = "".join(_facts(one) + "\n" for one in listed.files).encode()
    return listing, {
        "paths": [printable(path) for path in given.sources[:_PATHS_SHOWN]],
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
        if manifest.flagged:  # whole rows, none of which is lost
            continue
        mean = manifest.total_tokens // manifest.shard_count
        notes.append(
            f"{name}: shards of {mean:,} tokens lose at most 1 % at their ends to sequences of up to"
            f" {max(1, mean // 100):,} tokens; longer ones want a larger --shard-tokens"
        )
    return tuple(notes)
