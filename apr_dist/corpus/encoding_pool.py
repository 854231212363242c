"""Tokenizing threads: texts in, ids out, in bounded memory.

Lives here: one thread a worker, each calling the ``tokenizers`` library (which frees the interpreter
while it works), cutting long texts into pieces, and turning its answers into arrays. Order, shards and splits
are ``encoding_run``'s.
"""

from __future__ import annotations

import os
import re
import unicodedata
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np
import xxhash
from numpy.typing import NDArray

from apr_dist.corpus.encode_facts import Normalization
from apr_dist.corpus.formats import BadRecord, Document
from apr_dist.corpus.tokenizer import LoadedTokenizer

# One call's texts: enough to hide the cost of a call, little enough that the library's answer (about
# 100 bytes a token) stays small.
CALL_CHARACTERS = 1 << 18
# Where a tokenizer that is `cuttable` never joins what stands on both sides.
_CUT = re.compile(r"(?<=[A-Za-z0-9])\n")
_PARALLELISM = "TOKENIZERS_PARALLELISM"


@dataclass(frozen=True)
class EncodedText:
    """One text's ids and what was seen on the way.

    Attributes:
        ids: [tokens] u32.
        fingerprint: XXH3-64 of the text's UTF-8.
        lost_bytes: bytes that the vocabulary cannot express.
        specials: special tokens in the text that were encoded as plain text.
    """

    ids: NDArray[np.uint32]
    fingerprint: int
    lost_bytes: int
    specials: int

    @property
    def position(self) -> float:
        """The fingerprint as a number in [0, 1): which split the document falls to."""
        return self.fingerprint / 2**64


class EncodingThreads(ABC):
    """Threads that encode documents; use it as a context manager.

    Args:
        workers: number of threads.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="encode")

    def __enter__(self) -> Self:
        # Our threads are the parallelism; the library's own pool inside them would only get in their way.
        self._outer = os.environ.get(_PARALLELISM)
        os.environ[_PARALLELISM] = "false"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)
        if self._outer is None:
            del os.environ[_PARALLELISM]
        else:
            os.environ[_PARALLELISM] = self._outer

    def submit(self, documents: Sequence[Document]) -> Future[Sequence[EncodedText | BadRecord]]:
        """Start encoding documents; the result keeps their order."""
        return self._threads.submit(self.encode_documents, documents)

    @abstractmethod
    def encode_documents(self, documents: Sequence[Document]) -> Sequence[EncodedText | BadRecord]:
        """Encode documents in the calling thread; what turns out to be none comes back as a bad record."""


class EncodingPool(EncodingThreads):
    """Encodes texts.

    Args:
        tokenizer: shared by all threads.
        workers: number of threads.
        normalization: of every text before anything else.
    """

    def __init__(self, tokenizer: LoadedTokenizer, *, workers: int, normalization: Normalization) -> None:
        super().__init__(workers)
        self._tokenizer = tokenizer
        self._normalization = normalization

    def encode_documents(self, documents: Sequence[Document]) -> Sequence[EncodedText | BadRecord]:
        """See `EncodingThreads.encode_documents`."""
        return self.encode([document.text for document in documents])

    def encode(self, texts: Sequence[str]) -> list[EncodedText]:
        """Encode ``texts`` in the calling thread."""
        if self._normalization is Normalization.NFC:
            texts = [unicodedata.normalize("NFC", text) for text in texts]
        unencodable = self._tokenizer.unencodable
        encoded = []
        for text, ids in zip(texts, self._ids(texts), strict=True):
            raw = text.encode()
            lost = len(raw) - len(raw.translate(None, unencodable)) if unencodable else 0
            specials = self._tokenizer.count_specials(text)
            encoded.append(EncodedText(ids, xxhash.xxh3_64_intdigest(raw), lost, specials))
        return encoded

    def _ids(self, texts: Sequence[str]) -> Iterator[NDArray[np.uint32]]:
        """One array a text; neighbouring short texts share a call, a long one is cut into several."""
        together: list[str] = []
        characters = 0
        for text in texts:
            if together and characters + len(text) > CALL_CHARACTERS:
                yield from self._call(together)
                together, characters = [], 0
            if len(text) > CALL_CHARACTERS and self._tokenizer.cuttable:
                yield np.concatenate([ids for piece in cut(text) for ids in self._call([piece])])
            else:
                together.append(text)
                characters += len(text)
        if together:
            yield from self._call(together)

    def _call(self, texts: list[str]) -> list[NDArray[np.uint32]]:
        answers = self._tokenizer.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.frombuffer(array("I", answer.ids), dtype=np.uint32) for answer in answers]


def cut(text: str) -> Iterator[str]:
    """Pieces of ``text`` of about ``CALL_CHARACTERS``, cut where a cuttable tokenizer always cuts."""
    start = 0
    while len(text) - start > CALL_CHARACTERS:
        place = _CUT.search(text, start + CALL_CHARACTERS)
        if place is None:
            break
        yield text[start : place.start()]
        start = place.start()
    yield text[start:]
