"""From a conversation to token ids, with the tokens that are trained on.

What is trained on is found by construction. The text of an assistant's turn begins where the conversation
before it, rendered with the prompt for an answer, ends; and it ends where the conversation up to and with it
ends. Both must be beginnings of the whole text, or the template is refused with the reason. Where the
template marks turns itself, with ``{% generation %}``, its marks are taken.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from operator import itemgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from apr_dist.corpus.chat_sandbox import MARK_BEGIN, MARK_END
from apr_dist.corpus.chat_template import ChatTemplate
from apr_dist.corpus.chat_tokenizer import ChatTokenizer, EncodedText
from apr_dist.corpus.chat_turns import Turns
from apr_dist.corpus.conversations import Conversation
from apr_dist.errors import CorpusError

_MARKS = re.compile(f"[{MARK_BEGIN}{MARK_END}]")
_OTHER_PROMPT = "the prompt that a model answers is not how the turn begins"
_REWRITTEN = "the template renders that turn otherwise once others follow"
_MARK_TURNS = (
    "give the model a template that marks turns with {% generation %}: apr-dist stamp --chat-template FILE"
)


class TrainOn(StrEnum):
    """Which tokens of a conversation are trained on."""

    ASSISTANT = "assistant"
    LAST = "last"
    COMPLETION = "completion"
    ALL = "all"


@dataclass(frozen=True)
class EncodedConversation:
    """A conversation as tokens.

    Attributes:
        ids: [tokens] u32.
        is_target: [tokens] whether the model learns to produce the token; never the first one, which nothing
            comes before.
    """

    ids: NDArray[np.uint32]
    is_target: NDArray[np.bool_]


def encode_conversation(
    conversation: Conversation,
    template: ChatTemplate,
    tokenizer: ChatTokenizer,
    train_on: TrainOn,
    *,
    parse_special: bool = False,
) -> EncodedConversation:
    """Token ids of a conversation, and which of them are trained on.

    Ids are those that ``transformers`` gives where no message spells a special token. One that does is text,
    unless ``parse_special``.

    Raises:
        CorpusError: the template refuses the conversation, or does not show which text is whose.
    """
    if conversation.text is not None:
        return _encode_text(conversation, template, tokenizer, train_on, parse_special=parse_special)
    chat = _Chat(conversation, template, tokenizer, parse_special=parse_special)
    encoded = chat.encode()
    is_target = _inside(encoded, chat.spans(train_on, encoded))
    is_target[:1] = False
    return EncodedConversation(encoded.ids, is_target)


def encode_prompt(
    messages: Sequence[Mapping[str, Any]],
    template: ChatTemplate,
    tokenizer: ChatTokenizer,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> NDArray[np.uint32]:
    """Token ids of a chat that the assistant is to answer next.

    Raises:
        CorpusError: the template refuses the chat.
    """
    conversation = Conversation(
        messages=tuple(map(dict, messages)), tools=None if tools is None else tuple(map(dict, tools))
    )
    return _Chat(conversation, template, tokenizer, parse_special=False).encode(prompt=True).ids


def _inside(text: EncodedText, spans: Sequence[tuple[int, int]]) -> NDArray[np.bool_]:
    """Which tokens stand for characters of the spans alone."""
    found = np.zeros(len(text.ids), dtype=bool)
    in_order = bool(np.all(text.starts[1:] >= text.starts[:-1]))
    for begin, end in spans:
        near = slice(None)
        if in_order:  # a look at every token for every span would take the square of a long chat
            near = slice(*np.searchsorted(text.starts, (begin, end)).tolist())
        starts, ends = text.starts[near], text.ends[near]
        found[near] |= (starts >= begin) & (ends <= end) & (starts < end)
    return found


def _encode_text(
    conversation: Conversation,
    template: ChatTemplate,
    tokenizer: ChatTokenizer,
    train_on: TrainOn,
    *,
    parse_special: bool,
) -> EncodedConversation:
    if train_on is not TrainOn.ALL:
        raise CorpusError(
            f"the record is plain text, in which nothing shows what is trained on with {train_on}",
            where=conversation.where,
            expected="messages",
            remedy="train on all of it (--train-on all), or encode it with apr-dist tokenize encode-corpus",
        )
    text = conversation.text or ""
    ids = tokenizer.encode(text).ids if parse_special else tokenizer.encode_plain(text)
    end = tokenizer.id_of(template.special_tokens.get("eos_token", ""))
    ids = ids if end is None else np.append(ids, np.uint32(end))
    is_target = np.ones(len(ids), dtype=bool)
    is_target[:1] = False
    return EncodedConversation(ids, is_target)


class _Chat:
    """One conversation under one template: its texts, all with the same guards."""

    def __init__(
        self,
        conversation: Conversation,
        template: ChatTemplate,
        tokenizer: ChatTokenizer,
        *,
        parse_special: bool,
    ) -> None:
        self._template, self._tokenizer, self._where = template, tokenizer, conversation.where
        self._completion_from = conversation.completion_from
        self._plain = [_joined_parts(message, template) for message in conversation.messages]
        self._messages: list[Any] = self._plain
        self._plain_tools = self._tools = conversation.tools
        self._guard: str | None = None
        self._texts: dict[tuple[int, bool, bool], str] = {}
        self._prompts: dict[int, int] = {}
        if parse_special:
            return
        said = [self._plain, list(conversation.tools or ())]
        guard = tokenizer.guard_for([template.text, json.dumps(said, ensure_ascii=False)])
        guarded = tokenizer.guarded(said, guard, self._where)
        if guarded != said:
            self._guard = guard
            self._messages = guarded[0]
            self._tools = tuple(guarded[1]) if conversation.tools is not None else None

    def encode(self, *, prompt: bool = False) -> EncodedText:
        """The whole as tokens."""
        text = self._text(len(self._messages), prompt=prompt)
        if self._guard is None:
            return self._tokenizer.encode(text)
        plain = self._template.render(
            self._plain, tools=self._plain_tools, add_generation_prompt=prompt, where=self._where
        )
        if text.replace(self._guard, "") != plain:
            raise CorpusError(
                "a message spells a special token, and the chat template treats such a message otherwise",
                where=self._where,
                remedy="take the special token out of the message, or read it as such: --parse-special",
            )
        return self._tokenizer.encode_guarded(text, self._guard, self._where)

    def spans(self, train_on: TrainOn, encoded: EncodedText) -> list[tuple[int, int]]:
        """Characters of the whole text that are trained on: [begin, end) of each stretch."""
        if train_on is TrainOn.ALL:
            return [(0, len(self._whole))]
        turns = self._turns(train_on)
        ends = self._ends(encoded)
        if self._template.marks_turns:
            found = [self._after_prompt(*span) for span in self._marked(turns, train_on)]
        else:
            found = [self._bounds(turn, train_on, ends) for turn in turns]
        return [self._to_its_end(begin, end, ends, extend=self._template.marks_turns) for begin, end in found]

    @property
    def _whole(self) -> str:
        return self._text(len(self._messages))

    def _turns(self, train_on: TrainOn) -> list[int]:
        roles = [message["role"] for message in self._plain]
        turns = [number for number, role in enumerate(roles) if role == "assistant"]
        if train_on is TrainOn.LAST:
            turns = turns[-1:]
        if train_on is TrainOn.COMPLETION:
            asked = max((number for number, role in enumerate(roles) if role == "user"), default=-1)
            first = asked if self._completion_from is None else self._completion_from
            turns = [number for number in turns if number >= first]
        return [number for number in turns if self._plain[number].get("weight", 1) != 0]

    def _bounds(self, turn: int, train_on: TrainOn, ends: Sequence[tuple[int, int]]) -> tuple[int, int]:
        if all(message["role"] != "user" for message in self._plain[:turn]):
            before, after = self._opening(turn), self._text(turn + 1)
        elif (shown := self._shown(turn)) is not None:
            return shown
        else:
            before, after = self._text(turn, prompt=True), self._text(turn + 1)
        whole = self._whole
        if not (whole.startswith(before) and after.startswith(before)):
            raise self._unclear(turn, before, whole, _OTHER_PROMPT, _MARK_TURNS)
        if whole.startswith(after):
            return len(before), len(after)
        end = self._before_closing(before, after, ends)
        if end is None:
            remedy = "render each turn by itself: --rewritten-turns split"
            remedy += "" if train_on is TrainOn.LAST else "; or train on the last one alone: --train-on last"
            raise self._unclear(turn, after, whole, _REWRITTEN, remedy)
        return len(before), end

    @cached_property
    def _seen(self) -> Turns | None:
        """What one rendering of the whole shows of its turns; where there is one turn, nothing is saved."""
        if sum(message["role"] == "assistant" for message in self._plain) < 2:
            return None
        seen = self._template.turns(self._messages, tools=self._tools)
        return seen if seen is not None and seen.text == self._whole else None

    def _shown(self, turn: int) -> tuple[int, int] | None:
        """The bounds of a turn where one rendering of the whole shows them, as all other renderings would."""
        begin, seen = self._prompt_ends(turn), self._seen
        if begin is None or seen is None:
            return None
        end = len(self._whole) if turn + 1 == len(self._messages) else seen.starts.get(turn + 1)
        return None if end is None or end < begin else (begin, end)

    def _prompt_ends(self, turn: int) -> int | None:
        """Where the prompt for a turn ends in the whole, if one rendering of the whole shows it."""
        seen = self._seen
        if seen is None or turn not in seen.starts:
            return None
        start = seen.starts[turn]
        return start + len(seen.prompt) if self._whole.startswith(seen.prompt, start) else None

    def _opening(self, turn: int) -> str:
        """What stands before a turn that answers no user, which few templates render a prompt for.

        A mark in the turn's content shows where that is, and the prompt of any other turn what comes before.
        """
        message = self._messages[turn]
        content = message.get("content")
        content = content if isinstance(content, str) else ""
        said = content.lstrip()
        lead = content[: len(content) - len(said)]
        marked = [*self._messages[:turn], {**message, "content": lead + MARK_BEGIN + said}]
        text = self._template.render(marked, tools=self._tools, where=self._where)
        asked, prompt = self._template.prompt_of_a_turn(self._where)
        before = text.partition(MARK_BEGIN)[0]
        while lead and not (before.endswith(prompt + lead)):
            lead = lead[1:]
        before = before[: len(before) - len(lead)]
        if text.replace(MARK_BEGIN, "") == self._text(turn + 1) and before.endswith(prompt):
            return before
        raise self._unclear(turn, asked + prompt, text, _OTHER_PROMPT, _MARK_TURNS)

    def _before_closing(self, before: str, after: str, ends: Sequence[tuple[int, int]]) -> int | None:
        """Where a turn ends if what the template writes after it only closes the text; else None.

        Some templates end every text with a token: the text up to a turn is then no beginning of the whole,
        and the turn's own end is the last end token that both have.
        """
        whole = self._whole
        shared = [last for _, last in ends if len(before) < last and whole.startswith(after[:last])]
        if not shared:
            return None
        closed = self._tokenizer.encode(after)
        behind = closed.starts >= shared[-1]
        written = [after[first:last] for first, last in zip(closed.starts, closed.ends, strict=True)]
        closing = all(
            special or not text.strip()
            for text, special, late in zip(written, closed.is_special, behind, strict=True)
            if late
        )
        return shared[-1] if closing else None

    def _unclear(self, turn: int, part: str, whole: str, what: str, remedy: str) -> CorpusError:
        at = next(
            (at for at, (one, other) in enumerate(zip(part, whole, strict=False)) if one != other), None
        )
        at = min(len(part), len(whole)) if at is None else at
        return CorpusError(
            f"what the assistant says in messages[{turn}] cannot be told from the rest: {what}"
            f" ({part[at : at + 24]!r} against {whole[at : at + 24]!r})",
            where=self._where,
            expected="a chat template that only adds to what it rendered before",
            remedy=remedy,
        )

    def _after_prompt(self, begin: int, end: int) -> tuple[int, int]:
        """A marked stretch without what the prompt for it already holds."""
        for turn, message in enumerate(self._plain):
            if message["role"] == "assistant":
                if turn not in self._prompts:
                    self._prompts[turn] = self._prompt_ends(turn) or self._rendered_prompt(turn)
                if begin < self._prompts[turn] < end:
                    return self._prompts[turn], end
        return begin, end

    def _rendered_prompt(self, turn: int) -> int:
        """Where the prompt for a turn ends; 0 where it is not the beginning of the whole."""
        prompt = self._text(turn, prompt=True)
        return len(prompt) if self._whole.startswith(prompt) else 0

    def _marked(self, turns: Sequence[int], train_on: TrainOn) -> list[tuple[int, int]]:
        """What the template marks, where it marks each turn of the assistant once or all are trained on."""
        marked = self._text(len(self._messages), marks=True)
        if marked.replace(MARK_BEGIN, "").replace(MARK_END, "") != self._whole:
            raise CorpusError(
                "the chat template changes what it marks with {% generation %}",
                where=self._where,
                remedy="take the marks out of the template",
            )
        found: list[tuple[int, int]] = []
        begun: list[int] = []
        for before, letter in enumerate(_MARKS.finditer(marked)):
            at = letter.start() - before
            if letter[0] == MARK_BEGIN:
                begun.append(at)
            else:
                found.append((begun.pop(), at))
        said = [number for number, message in enumerate(self._plain) if message["role"] == "assistant"]
        if len(found) == len(said):
            return [found[said.index(turn)] for turn in turns]
        if turns == said:
            return found
        raise CorpusError(
            f"the chat template marks {len(found)} stretches with {{% generation %}} in a conversation of"
            f" {len(said)} turns of the assistant",
            where=self._where,
            expected=f"one for each turn, to train on {train_on}",
            remedy="train on all of them: --train-on assistant",
        )

    def _ends(self, encoded: EncodedText) -> list[tuple[int, int]]:
        """Characters of the tokens that end a turn, as the template wrote them."""
        stops = self._template.stop_ids(self._tokenizer)
        at = encoded.is_special & np.isin(encoded.ids, np.array(sorted(stops), dtype=np.int64))
        return list(zip(encoded.starts[at].tolist(), encoded.ends[at].tolist(), strict=True))

    @staticmethod
    def _to_its_end(
        begin: int, end: int, ends: Sequence[tuple[int, int]], *, extend: bool
    ) -> tuple[int, int]:
        """A turn up to and with the token that ends it; all of it where there is none."""
        at = bisect_right(ends, end, key=itemgetter(1))
        if at and ends[at - 1][0] >= begin:
            return begin, ends[at - 1][1]
        if extend and at < len(ends) and ends[at][0] == end:
            return begin, ends[at][1]
        return begin, end

    def _text(self, count: int, *, prompt: bool = False, marks: bool = False) -> str:
        """The first messages as text."""
        if (kept := self._texts.get((count, prompt, marks))) is not None:
            return kept
        text = self._template.render(
            self._messages[:count],
            tools=self._tools,
            add_generation_prompt=prompt,
            where=self._where,
            marks=marks,
        )
        if count == len(self._messages):  # the whole is asked for again and again, a part once
            self._texts[count, prompt, marks] = text
        return text


def _joined_parts(message: Mapping[str, Any], template: ChatTemplate) -> dict[str, Any]:
    """A message whose content is one text, where the template does not read parts."""
    content = message.get("content")
    if not isinstance(content, list) or template.takes_parts:
        return dict(message)
    return {**message, "content": "".join(part["text"] for part in content)}
