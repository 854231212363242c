"""From conversations to packed rows: the public call, and what it writes about the result.

Conversations are encoded once into the work folder, where a run that was killed resumes; then rows are made
of them (``row_writer``). What texts and conversations have in common is in ``encode_job``.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from apr_dist.atomic_files import write_atomically
from apr_dist.cores import usable_cores
from apr_dist.corpus.chat_pool import ChatPool, ChatRules, RewrittenTurns, chat_reader
from apr_dist.corpus.conversations import Shape
from apr_dist.corpus.encode import check_ids
from apr_dist.corpus.encode_facts import (
    EncodeProgress,
    EncodeSettings,
    EncodeSummary,
    EosPolicy,
    Normalization,
)
from apr_dist.corpus.encode_job import Given, describe_sources, run_job
from apr_dist.corpus.encoding_run import EncodingRun
from apr_dist.corpus.formats import Problem, Record
from apr_dist.corpus.publish import SOURCES_NAME
from apr_dist.corpus.row_writer import RowSettings, TooLong, write_rows
from apr_dist.corpus.sources import Sources
from apr_dist.data.flags import VOCABULARY_LIMIT
from apr_dist.data.manifest import Manifest, TokenizerIdentity
from apr_dist.data.manifest_file import Conversations
from apr_dist.errors import CorpusError, TokenizerError, UsageError
from apr_dist.parsing import printable
from apr_dist.version import __version__

PACKED, UNPACKED = "best-fit", "none"


@dataclass(frozen=True, kw_only=True)
class ChatModel:
    """The model that conversations are for.

    Attributes:
        path: its file.
        identity: of its tokenizer.
        tokenizer_dir: a folder of that tokenizer; None if it is only inside the file.
    """

    path: Path
    identity: TokenizerIdentity
    tokenizer_dir: Path | None


def encode_chat(
    *,
    sources: Sequence[Path],
    model: ChatModel,
    rules: ChatRules,
    output: Path,
    seq_length: int,
    too_long: TooLong = TooLong.TRUNCATE,
    packed: bool = True,
    val_fraction: float = 0.0,
    shape: Shape | None = None,
    shard_tokens: int = 1_000_000,
    skip_bad_records: bool = False,
    skip_unreadable: bool = False,
    globs: Sequence[str] | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    limit_tokens: int | None = None,
    progress: Callable[[EncodeProgress], None] | None = None,
    commit_every_s: float = 1.0,
) -> EncodeSummary:
    """Encode conversations into rows of flagged words; the same bytes for any number of workers.

    A run that was killed goes on where it was when the same call is made again.

    Args:
        sources: files, folders, or ``-`` for JSONL on standard input (which cannot be resumed).
        model: what they are for.
        rules: template, tokenizer, and which tokens are targets.
        output: the shard folder; with ``val_fraction`` it gets ``train/`` and ``validation/``.
        seq_length: tokens of a row, which is the sequence length to train with.
        too_long: what is done with conversations longer than a row.
        packed: several conversations share a row; else each has its own.
        val_fraction: share of conversations, by hash, that go to ``validation``.
        shape: of the records; None recognises each.
        shard_tokens: a shard closes after the row that reaches this many tokens.
        skip_bad_records: leave out and count what is no conversation, or one the template refuses.
        skip_unreadable: leave out files that cannot be read.
        globs: which files of a folder are taken; None for the corpus formats.
        workers: threads; None for one a CPU this process may use.
        overwrite: replace a finished data set, or drop an interrupted one of another configuration.
        limit_tokens: stop after the conversation that reaches this many tokens in all.
        progress: called about twice a second, and once at the end.
        commit_every_s: about how much work a kill may cost, in seconds.

    Raises:
        CorpusError: a source cannot be read, a record is bad, or a split has nothing to train on.
        TokenizerError: the vocabulary leaves no bits for flags.
        OutputError: the output exists, belongs to another process or configuration, or cannot be written.
        UsageError: a number is out of its range.
    """
    if seq_length < 2:
        raise UsageError(f"--seq-length is {seq_length}", expected="at least 2: a token, and one to predict")
    if model.identity.id_bound > VOCABULARY_LIMIT:
        raise TokenizerError(
            f"it has {model.identity.id_bound:,} ids, and two bits of a word are flags",
            where=model.path,
            expected=f"at most {VOCABULARY_LIMIT:,}",
        )
    rows = RowSettings(
        seq_length=seq_length,
        too_long=too_long,
        packed=packed,
        pad_id=_padding_of(model.identity),
        shard_tokens=shard_tokens,
        turn_end=rules.template.turn_end(rules.tokenizer),
    )
    settings = EncodeSettings(
        output=output,
        shard_tokens=shard_tokens,
        eos_policy=EosPolicy.NONE,
        normalization=Normalization.NONE,
        val_fraction=val_fraction,
        text_key=None,
        parse_special=rules.parse_special,
        limit_tokens=limit_tokens,
        strict=not skip_bad_records,
        commit_every_s=commit_every_s,
        chat=_configuration(rules, rows, shape),
    )
    given = Given(
        sources=sources,
        globs=globs,
        skip_unreadable=skip_unreadable,
        overwrite=overwrite,
        workers=workers,
    )
    listed = given.listed(output)

    def read(value: object, path: Path, line: int) -> Record:
        return chat_reader(shape, value=value, path=path, line=line)

    return run_job(
        settings,
        given,
        listed,
        identity=model.identity,
        open_pool=lambda: ChatPool(rules, workers=workers or usable_cores()),
        describe=_Describing(settings, rows, model, rules, given, listed),
        read=read,
        progress=progress,
    )


def _padding_of(identity: TokenizerIdentity) -> int:
    known = (identity.pad_id, identity.eos_id, identity.bos_id)
    return next((one for one in known if one is not None), 0)


def _configuration(rules: ChatRules, rows: RowSettings, shape: Shape | None) -> dict[str, object]:
    """What the result depends on, for the journal: a run goes on only with the same."""
    reads_time = "strftime_now" in rules.template.text
    return {
        **asdict(rows),
        "train_on": rules.train_on.value,
        "template": rules.template.digest,
        "date": rules.template.now.date().isoformat() if reads_time else None,
        "rewritten_turns": RewrittenTurns(rules.rewritten).value,
        "shape": None if shape is None else shape.value,
    }


@dataclass(frozen=True)
class _Describing:
    """Makes the rows of every split in the work folder, with source list and manifest beside them."""

    settings: EncodeSettings
    rows: RowSettings
    model: ChatModel
    rules: ChatRules
    given: Given
    listed: Sources

    def __call__(self, run: EncodingRun, work: Path) -> None:
        listing, source = describe_sources(run, self.settings, self.given, self.listed)
        bad = {one.value: run.counts[one.value] for one in Problem if run.counts[one.value]}
        for name, writer in run.writers.items():
            if not writer.documents:
                continue
            check_ids(writer.shards, self.model.identity.id_bound)
            folder = work / self.settings.made_in(name)
            shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed here
            folder.mkdir()
            shards, made = write_rows(writer.folder, writer.shards, folder, self.rows)
            if not made.rows:
                raise self._nothing_left(made.counts)
            write_atomically(folder / SOURCES_NAME, listing)
            facts = asdict(made) | {"counts": {**made.counts, **bad}}
            Manifest(
                folder=folder,
                shards=tuple(shards),
                vocab_size=self.model.identity.id_bound,
                tokenizer=self.model.identity,
                split=None if name == "all" else name,
                total_documents=sum(shard.documents or 0 for shard in shards),
                eos_policy=EosPolicy.NONE.value,
                has_index=True,
                tokenizer_dir=self._tokenizer_dir(),
                source=source | {"model": printable(self.model.path)},
                created_at=datetime.now(UTC).isoformat(timespec="seconds"),
                tool_version=__version__,
                conversations=Conversations(
                    seq_length=self.rows.seq_length,
                    train_on=self.rules.train_on.value,
                    template=self.rules.template.digest,
                    packing=PACKED if self.rows.packed else UNPACKED,
                    too_long=self.rows.too_long.value,
                    pad_id=self.rows.pad_id,
                    turn_end=self.rows.turn_end,
                    **facts,
                ),
            ).write()

    def _tokenizer_dir(self) -> str | None:
        return None if self.model.tokenizer_dir is None else printable(self.model.tokenizer_dir)

    def _nothing_left(self, counts: dict[str, int]) -> CorpusError:
        met = ", ".join(f"{count:,} {name}" for name, count in counts.items())
        return CorpusError(
            f"no conversation is left to train on ({met})",
            where=self.given.sources[0],
            expected="conversations that fit a row and have something to train on",
            remedy="raise --seq-length, choose another --too-long, or another --train-on",
        )
