"""Conversations as records of a corpus, and the threads that make flagged words of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from apr_dist.corpus.chat_encoding import TrainOn, encode_conversation
from apr_dist.corpus.chat_template import ChatTemplate
from apr_dist.corpus.chat_tokenizer import ChatTokenizer
from apr_dist.corpus.conversations import (
    Conversation,
    Shape,
    read_conversation,
    recognise_shape,
    turns_of,
)
from apr_dist.corpus.encoding_pool import EncodedText, EncodingThreads
from apr_dist.corpus.formats import BadRecord, Document, Problem, Record
from apr_dist.data.flags import are_targets, flag
from apr_dist.errors import CorpusError
from apr_dist.parsing import printable


class RewrittenTurns(StrEnum):
    """What is done where a template renders a turn otherwise once others follow."""

    REFUSE = "refuse"
    """The conversation is a bad record."""
    SPLIT = "split"
    """Each turn of the assistant becomes a conversation of its own that ends with it."""


@dataclass(frozen=True)
class Chat(Document):
    """A conversation where it stands.

    Its ``text`` is its JSON in one fixed form, by which equal conversations are known; ``key`` is the name of
    its shape.
    """

    conversation: Conversation | None = None


def chat_reader(shape: Shape | None, *, value: object, path: Path, line: int) -> Record:
    """The conversation in a JSON value or row; its shape is recognised where none is named."""
    where = f"{printable(path)}:{line}"
    try:
        found = shape or recognise_shape(value, where=where)  # type: ignore[arg-type]
        conversation = read_conversation(value, found, where)  # type: ignore[arg-type]
    except CorpusError as error:
        return BadRecord(Problem.BAD_CONVERSATION, error.what, path, line, error)
    said = [conversation.messages, conversation.tools, conversation.text]
    text = json.dumps(said, ensure_ascii=False, sort_keys=True)
    return Chat(text, path, line, found.value, conversation)


@dataclass(frozen=True, kw_only=True)
class ChatRules:
    """How conversations become words.

    Attributes:
        template: the model's.
        tokenizer: the model's.
        train_on: which tokens are targets.
        rewritten: what is done with templates that rewrite turns.
        parse_special: special tokens that a message spells are read as such.
    """

    template: ChatTemplate
    tokenizer: ChatTokenizer
    train_on: TrainOn
    rewritten: RewrittenTurns = RewrittenTurns.REFUSE
    parse_special: bool = False

    def words(self, conversation: Conversation) -> NDArray[np.uint32]:
        """Flagged words, [tokens] u32; several conversations behind each other where turns were split.

        Raises:
            CorpusError: the template refuses the conversation, or does not show what the assistant says.
        """
        try:
            return self._encoded(conversation, self.train_on)
        except CorpusError:
            turns = turns_of(conversation)
            if self.rewritten is RewrittenTurns.REFUSE or len(turns) < 2:
                raise
        # Where a turn is rendered otherwise once others follow, it is learnt as it is when it comes last.
        return np.concatenate([self._encoded(turn, TrainOn.LAST) for turn in turns])

    def _encoded(self, conversation: Conversation, train_on: TrainOn) -> NDArray[np.uint32]:
        made = encode_conversation(
            conversation, self.template, self.tokenizer, train_on, parse_special=self.parse_special
        )
        return flag(made.ids, made.is_target)


class ChatPool(EncodingThreads):
    """Encodes conversations.

    Args:
        rules: shared by all threads.
        workers: number of threads.
    """

    def __init__(self, rules: ChatRules, *, workers: int) -> None:
        super().__init__(workers)
        self._rules = rules

    def encode_documents(self, documents: Sequence[Document]) -> Sequence[EncodedText | BadRecord]:
        """See `EncodingThreads.encode_documents`."""
        return [self._encode(document) for document in documents]

    def _encode(self, document: Document) -> EncodedText | BadRecord:
        assert isinstance(document, Chat)
        assert document.conversation is not None
        where = (document.source, document.line)
        try:
            words = self._rules.words(document.conversation)
        except CorpusError as error:
            return BadRecord(Problem.BAD_CONVERSATION, error.what, *where, error)
        if not are_targets(words).any():
            return BadRecord(
                Problem.NO_TARGETS, f"nothing in it is trained on ({self._rules.train_on})", *where
            )
        return EncodedText(words, xxhash.xxh3_64_intdigest(document.text.encode()), lost_bytes=0, specials=0)
