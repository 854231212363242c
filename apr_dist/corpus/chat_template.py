"""A model's chat template: from messages to text, in a sandbox, as ``transformers`` renders them.

Tokens, and which of them are trained on, are the work of ``chat_encoding``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError

from apr_dist.corpus.chat_sandbox import MARK_BEGIN, compiled, marks_generation, render, trace_turns
from apr_dist.corpus.chat_tokenizer import ChatTokenizer
from apr_dist.corpus.chat_turns import Turns
from apr_dist.errors import CorpusError, TokenizerError

_FAILURES = (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError)
_REASONING = ("reasoning_content", "thinking", "reasoning")
_LEAVE_OUT = "correct the record, or leave such records out with --skip-bad-records"


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """A model's chat template with what it reads.

    Attributes:
        text: Jinja source.
        special_tokens: special tokens by role (``bos_token``, ``eos_token``, ...).
        end_ids: tokens at which the model stops, as far as its file states them.
        variables: further values for the template, such as ``enable_thinking``.
        now: the time for templates that write the date; one for a whole data set.
        where: the file it came from.

    Raises:
        TokenizerError: the template is malformed.
    """

    text: str
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    end_ids: frozenset[int] = frozenset()
    variables: Mapping[str, Any] = field(default_factory=dict)
    now: datetime = field(default_factory=datetime.now)
    where: Path | str = ""

    def __post_init__(self) -> None:
        try:
            compiled(self.text)
        except _FAILURES as error:
            raise TokenizerError(
                f"the chat template cannot be used ({type(error).__name__}: {error})",
                where=self.where,
                expected="a Jinja template of a chat",
                remedy="give the model another template: apr-dist stamp --chat-template FILE",
            ) from error

    @cached_property
    def digest(self) -> str:
        """``sha256:...`` of everything that decides what it renders."""
        said = [self.text, dict(self.special_tokens), dict(self.variables)]
        return "sha256:" + hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        where: str = "",
        marks: bool = False,
    ) -> str:
        """The text of a chat, as ``transformers`` renders it.

        Args:
            messages: as `Conversation.messages`.
            tools: descriptions of tools.
            add_generation_prompt: end with what comes before an answer of the assistant.
            where: what errors call the chat.
            marks: with the marks of ``{% generation %}``.

        Raises:
            CorpusError: the template refuses the chat, or exceeds its limits.
        """
        variables = self._variables(messages, tools) | {"add_generation_prompt": add_generation_prompt}
        try:
            return render(self.text, variables, now=self.now, marks=marks)
        except _FAILURES as error:
            raise CorpusError(
                f"the chat template cannot render this conversation ({type(error).__name__}: {error})",
                where=where or self.where,
                expected=f"a conversation that the template of {self.where or 'the model'} accepts",
                remedy=_LEAVE_OUT,
            ) from error

    def turns(
        self, messages: Sequence[Mapping[str, Any]], *, tools: Sequence[Mapping[str, Any]] | None = None
    ) -> Turns | None:
        """Where each turn of a chat begins, as far as one rendering shows it; None where it shows nothing."""
        variables = self._variables(messages, tools) | {"add_generation_prompt": False}
        try:
            return trace_turns(self.text, variables, now=self.now)
        except _FAILURES:
            return None

    def _variables(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None
    ) -> dict[str, Any]:
        return {
            **self.special_tokens,
            **self.variables,
            "messages": [_with_reasoning(message) for message in messages],
            "tools": None if tools is None else list(tools),
            "documents": None,
        }

    def prompt_of_a_turn(self, where: str) -> tuple[str, str]:
        """A question as text, and what follows it as the prompt for an answer.

        Raises:
            CorpusError: the template cannot render them.
        """
        messages = [{"role": "user", "content": "a"}]
        asked = self.render(messages, where=where)
        prompted = self.render(messages, add_generation_prompt=True, where=where)
        return asked, prompted[len(asked) :] if prompted.startswith(asked) else ""

    @cached_property
    def takes_parts(self) -> bool:
        """Whether it renders content that is given in parts; the texts of others' parts are joined."""
        parts = [{"type": "text", "text": text} for text in ("first", "second")]
        try:
            text = self.render([{"role": "user", "content": parts}])
        except CorpusError:
            return False
        return "first" in text and "second" in text and "'text'" not in text and '"text"' not in text

    @cached_property
    def marks_turns(self) -> bool:
        """Whether it marks what the assistant says, with ``{% generation %}``."""
        return marks_generation(self.text)

    def turn_end(self, tokenizer: ChatTokenizer) -> int | None:
        """The id of the special token that ends a turn of the assistant; None if the template writes none."""
        known = tokenizer.turn_ends
        if self.digest not in known:
            known[self.digest] = self._find_turn_end(tokenizer)
        return known[self.digest]

    def _find_turn_end(self, tokenizer: ChatTokenizer) -> int | None:
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": MARK_BEGIN + "b"}]
        try:
            before, mark, after = self.render(messages).partition(MARK_BEGIN)
        except CorpusError:
            return None
        found = tokenizer.encode(before + after)
        behind = found.is_special & (found.starts > len(before))
        return int(found.ids[behind][0]) if mark and behind.any() else None

    def stop_ids(self, tokenizer: ChatTokenizer) -> frozenset[int]:
        """Tokens at which an answer is over: the end of a turn, and those at which the model stops."""
        end = self.turn_end(tokenizer)
        return self.end_ids | (frozenset() if end is None else frozenset({end}))


def _with_reasoning(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message whose reasoning stands under the names that templates read, as ``transformers`` does it."""
    found = {key: value for key, value in message.items() if value is not None}
    reasoning = next((found[key] for key in _REASONING if key in found), None)
    return found if reasoning is None else {"thinking": reasoning, **found, "reasoning_content": reasoning}
