"""One encoding under way: records read in order, ids written in order, work committed now and then.

Lives here: which split a document goes to, what stands between documents, counting what is met, and the
bounds on work in flight. The public call is ``encode.encode_corpus``.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from apr_dist.corpus.encode_facts import EncodeProgress, EncodeSettings, EosPolicy
from apr_dist.corpus.encoding_pool import CALL_CHARACTERS, EncodedText, EncodingThreads
from apr_dist.corpus.formats import TEXT_KEYS, ReadRecord
from apr_dist.corpus.journal import Journal, Progress, SplitProgress
from apr_dist.corpus.sources import BadRecord, CorpusReader, Document, Problem, Record, Source
from apr_dist.corpus.split_writer import SplitWriter
from apr_dist.errors import CorpusError
from apr_dist.parsing import printable

LOSSY_DOCUMENTS = "lossy documents"
LOST_BYTES = "lost bytes"
SPECIAL_TEXTS = "special tokens as plain text"
UNDER_KEY = "text under "
# Records without a single document among them: the key or the corpus is another than was meant.
_HOPELESS_RECORDS = 10_000
_BATCH_RECORDS = 512
_CHARACTERS_IN_FLIGHT = 16 * 2**20
_PROGRESS_EVERY_S = 0.5
_EXAMPLES = 5


_Encoding: TypeAlias = "Future[Sequence[EncodedText | BadRecord]]"


@dataclass(frozen=True)
class _Batch:
    """Consecutive records, and behind each the position: its source, and how many of that are done."""

    records: list[Record]
    places: list[tuple[int, int]]

    @property
    def documents(self) -> list[Document]:
        return [record for record in self.records if isinstance(record, Document)]

    @property
    def characters(self) -> int:
        return sum(len(document.text) for document in self.documents)


class EncodingRun:
    """Feeds a pool from the corpus and writers from the pool; takes up where ``journal`` says.

    With ``read`` records are made of whole JSON values and rows, and the pool's words carry flags.

    Attributes:
        writers: by split.
        counts: problems and losses so far, by name.
        examples: the first problems met, as text.
        least_position: the smallest place of a document in the split, as far as this process has seen.
        resumed_tokens: tokens that were there already.
    """

    def __init__(
        self,
        settings: EncodeSettings,
        sources: Sequence[Source],
        journal: Journal,
        *,
        eos_id: int | None = None,
        read: ReadRecord | None = None,
    ) -> None:
        self._settings = settings
        self._journal = journal
        self._started = self._committed = time.monotonic()
        state = journal.progress
        self._position = (state.source, state.record)
        self._flagged = read is not None
        self._reader = CorpusReader(
            sources,
            text_key=settings.text_key,
            read=read,
            start_source=state.source,
            start_record=state.record,
        )
        self._end = np.array([] if settings.eos_policy is EosPolicy.NONE else [eos_id], dtype=np.uint32)
        self.counts: Counter[str] = Counter(state.counts)
        self.examples: list[str] = []
        self.least_position = 1.0
        self._taking: int | None = None
        self.writers = {name: self._writer(name, state) for name in settings.splits}
        self.resumed_tokens = self.tokens

    @property
    def source(self) -> int:
        """Number of the source that is being read."""
        return self._reader.source

    @property
    def tokens(self) -> int:
        """Tokens in all splits so far."""
        return sum(writer.tokens for writer in self.writers.values())

    @property
    def documents(self) -> int:
        """Documents in all splits so far."""
        return sum(writer.documents for writer in self.writers.values())

    @property
    def elapsed_s(self) -> float:
        """Seconds since this process began."""
        return time.monotonic() - self._started

    def encode(self, pool: EncodingThreads, progress: Callable[[EncodeProgress], None] | None) -> None:
        """Encode everything from the position on; afterwards all shards are closed and committed.

        Raises:
            CorpusError: a source cannot be read, or (strict) a record is bad. What was done before that
                source stays done.
            OutputError: a shard cannot be written.
        """
        flying: deque[tuple[_Batch, _Encoding]] = deque()
        reported = 0.0
        try:
            for batch in self._batches():
                flying.append((batch, pool.submit(batch.documents)))
                while self._too_many(flying, pool.workers) and not self._is_full():
                    self._take(*flying.popleft())
                if self._is_full():
                    break
                if progress is not None and self.elapsed_s - reported >= _PROGRESS_EVERY_S:
                    reported = self.elapsed_s
                    progress(self._progress())
            while flying and not self._is_full():
                self._take(*flying.popleft())
            for writer in self.writers.values():
                writer.close_shard()
            self._commit()
        except CorpusError:
            self._keep_before(self._reader.source if self._taking is None else self._taking, flying)
            raise
        finally:
            for writer in self.writers.values():
                writer.abandon()
        if progress is not None:
            progress(self._progress())

    def _batches(self) -> Iterator[_Batch]:
        """Consecutive records in batches that one call of the tokenizer is worth."""
        found: list[Record] = []
        characters = 0
        places: list[tuple[int, int]] = []
        source, record = self._position
        for number, one in self._reader:
            record = record + 1 if number == source else 1
            source = number
            found.append(one)
            places.append((source, record))
            characters += len(one.text) if isinstance(one, Document) else 0
            if characters >= CALL_CHARACTERS or len(found) >= _BATCH_RECORDS:
                yield _Batch(found, places)
                found, places, characters = [], [], 0
        if found:
            yield _Batch(found, places)

    def _take(self, batch: _Batch, encoding: _Encoding, *, before: int | None = None) -> None:
        """Write one batch's documents, or those of the sources ``before`` one, and remember the position."""
        closed = self._closed_shards()
        encoded = iter(encoding.result())
        for record, place in zip(batch.records, batch.places, strict=True):
            if self._is_full() or (before is not None and place[0] >= before):
                return
            self._taking = place[0]
            found = record if isinstance(record, BadRecord) else next(encoded)
            if isinstance(found, BadRecord):
                self._count_problem(found)
            else:
                assert isinstance(record, Document)
                self._write(record, found)
            self._position, self._taking = place, None
        self._refuse_hopeless()
        if (
            self._closed_shards() > closed
            or time.monotonic() - self._committed >= self._settings.commit_every_s
        ):
            self._commit()

    def _keep_before(self, source: int, flying: deque[tuple[_Batch, _Encoding]]) -> None:
        """Commit what is done of the sources before one that cannot be read, and nothing of that one."""
        if self._position[0] < source:
            with suppress(CorpusError):  # a second bad record: the first is reported
                while flying:
                    self._take(*flying.popleft(), before=source)
                self._commit()
        self._journal.rewind_before(source)

    def _refuse_hopeless(self) -> None:
        """Stop early where no record of many is a document."""
        met = sum(self.counts[problem.value] for problem in Problem)
        if not self.documents and met >= _HOPELESS_RECORDS:
            raise self.without_documents()

    def without_documents(self) -> CorpusError:
        """The refusal of a corpus in which nothing is a document: what its records hold instead."""
        problems = [f"{self.counts[one.value]:,} x {one.value}" for one in Problem if self.counts[one.value]]
        met = f"; met {', '.join(problems)}" if problems else ""
        example = f"; such as {self.examples[0]}" if self.examples else ""
        return CorpusError(
            f"the corpus holds no document{met}{example}",
            expected="records with text",
            remedy=self._settings.find_text,
        )

    def _write(self, document: Document, encoded: EncodedText) -> None:
        if encoded.lost_bytes:
            self._count_loss(document, encoded.lost_bytes)
        if not encoded.ids.size:
            self._count_problem(BadRecord(Problem.EMPTY, "no tokens", document.source, document.line))
            return
        self.counts.update({SPECIAL_TEXTS: encoded.specials} if encoded.specials else {})
        if self._settings.text_key is None and document.key not in ("", TEXT_KEYS[0]):
            self.counts[UNDER_KEY + document.key] += 1
        self.least_position = min(self.least_position, encoded.position)
        if not self._settings.val_fraction:
            writer = self.writers["all"]
        else:
            is_validation = encoded.position < self._settings.val_fraction
            writer = self.writers["validation" if is_validation else "train"]
        if self._settings.eos_policy is EosPolicy.BETWEEN and writer.documents:
            writer.append_end(self._end)
        writer.append(encoded.ids, encoded.fingerprint)
        if self._settings.eos_policy is EosPolicy.AFTER:
            writer.append_end(self._end)

    def _count_loss(self, document: Document, lost_bytes: int) -> None:
        what = f"{lost_bytes} bytes that the vocabulary has no token for"
        where = f"{printable(document.source)}:{document.line}"
        if self._settings.strict:
            raise CorpusError(
                f"the document holds {what}", where=where, remedy="fix it, or leave out --strict"
            )
        self.counts[LOSSY_DOCUMENTS] += 1
        self.counts[LOST_BYTES] += lost_bytes
        if len(self.examples) < _EXAMPLES:
            self.examples.append(f"{where}: {what}")

    def _count_problem(self, problem: BadRecord) -> None:
        if self._settings.strict and problem.problem is not Problem.NO_TARGETS:
            raise problem.as_error(self._settings.skip_bad) if self._settings.skip_bad else problem.as_error()
        self.counts[problem.problem.value] += 1
        if len(self.examples) < _EXAMPLES:
            self.examples.append(str(problem))

    def _closed_shards(self) -> int:
        return sum(len(writer.shards) for writer in self.writers.values())

    def _commit(self) -> None:
        splits = {
            name: SplitProgress(open=writer.commit(), shards=tuple(writer.shards))
            for name, writer in self.writers.items()
        }
        source, record = self._position
        self._journal.commit(Progress(source=source, record=record, counts=self.counts, splits=splits))
        self._committed = time.monotonic()

    def _writer(self, name: str, state: Progress) -> SplitWriter:
        folder = self._journal.folder / name
        folder.mkdir(exist_ok=True)
        done = state.splits.get(name, SplitProgress())
        return SplitWriter(
            folder,
            shard_tokens=self._settings.shard_tokens,
            closed=done.shards,
            opened=done.open,
            flagged=self._flagged,
        )

    def _is_full(self) -> bool:
        limit = self._settings.limit_tokens
        return limit is not None and self.tokens >= limit

    @staticmethod
    def _too_many(flying: deque[tuple[_Batch, _Encoding]], workers: int) -> bool:
        """More work in flight than keeps the threads busy, or than memory is for."""
        if len(flying) <= 1:
            return False
        characters = sum(batch.characters for batch, _ in flying)
        return len(flying) > workers + 2 or characters > _CHARACTERS_IN_FLIGHT

    def _progress(self) -> EncodeProgress:
        done, total, elapsed = self._reader.bytes_done, self._reader.bytes_total, self.elapsed_s
        fresh = done - self._reader.bytes_at_start
        return EncodeProgress(
            documents=self.documents,
            tokens=self.tokens,
            bytes_done=done,
            bytes_total=total,
            elapsed_s=elapsed,
            tokens_per_s=(self.tokens - self.resumed_tokens) / max(elapsed, 1e-9),
            eta_s=(total - done) * elapsed / fresh if total and fresh > 0 else None,
        )
