"""Records of conversations: recognising their shape, and reading them into messages.

Lives here: what a record may look like and which of its fields become which message. A chat template turns
messages into text in ``chat_template``; files and lines are read in ``formats``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice
from typing import Any

from apr_dist.errors import CorpusError
from apr_dist.parsing import parse_json

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
"""Roles that a message may have; what a template does with each is the template's own affair."""

_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
_CALLS = "function_call"
_REMEDY = "correct the record, or leave such records out with --skip-bad-records"


class Shape(StrEnum):
    """How the records of a corpus of conversations are laid out."""

    MESSAGES = "messages"
    SHAREGPT = "sharegpt"
    ALPACA = "alpaca"
    PROMPT_COMPLETION = "prompt-completion"
    TEXT = "text"


_KEYS: dict[Shape, tuple[str, ...]] = {
    Shape.MESSAGES: ("messages",),
    Shape.SHAREGPT: ("conversations",),
    Shape.ALPACA: ("instruction", "output"),
    Shape.PROMPT_COMPLETION: ("prompt", "completion"),
    Shape.TEXT: ("text",),
}
"""Keys that a record of each shape has, in the order in which shapes are tried."""


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """One conversation.

    Attributes:
        messages: each with ``role`` and, as far as it has them, ``content``, ``tool_calls`` and further keys
            that templates read; plain JSON values, none of them None. Empty for plain text.
        tools: descriptions of the tools that the assistant may call; None without any.
        where: file and line, for errors.
        completion_from: number of the first message of the completion, where the record states it.
        text: plain text, which no template renders; None for a conversation.
    """

    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] | None = None
    where: str = ""
    completion_from: int | None = None
    text: str | None = None


def recognise_shape(record: Mapping[str, Any], *, where: str = "") -> Shape:
    """The shape of a record, by the keys that it has.

    Raises:
        CorpusError: it has the keys of none.
    """
    if not isinstance(record, Mapping):
        raise _bad(where, f"the record is a JSON {type(record).__name__}", "an object")
    for shape, keys in _KEYS.items():
        if all(record.get(key) is not None for key in keys):
            return shape
    shown = ", ".join(str(key) for key in islice(record, 8)) or "none"
    expected = "; ".join(f"{' and '.join(keys)} ({shape})" for shape, keys in _KEYS.items())
    raise CorpusError(
        f"the record has none of the keys of a conversation (its keys: {shown})",
        where=where,
        expected=expected,
        remedy="rename its keys, or encode plain text with apr-dist tokenize encode-corpus --text-key KEY",
    )


def read_conversation(record: Mapping[str, Any], shape: Shape, where: str) -> Conversation:
    """The conversation in a record.

    Raises:
        CorpusError: a field is missing or of another kind than its shape asks for; with file, line and field.
    """
    if not isinstance(record, Mapping):
        raise _bad(where, f"the record is a JSON {type(record).__name__}", "an object")
    missing = [key for key in _KEYS[shape] if record.get(key) is None]
    if missing:
        raise _bad(where, f"{missing[0]} is missing", f"a record of the shape {shape}, as the first one is")
    return _READERS[shape](record, where)


def turns_of(conversation: Conversation) -> list[Conversation]:
    """One conversation for each turn of the assistant, which ends with that turn.

    For templates that render a turn otherwise once others follow: each of these is to be encoded with the
    last turn as the target.
    """
    return [
        Conversation(
            messages=conversation.messages[: number + 1], tools=conversation.tools, where=conversation.where
        )
        for number, message in enumerate(conversation.messages)
        if message["role"] == "assistant"
    ]


def _messages(record: Mapping[str, Any], where: str) -> Conversation:
    return Conversation(
        messages=_read_messages(record["messages"], where, "messages"),
        tools=_tools(record, where),
        where=where,
    )


def _sharegpt(record: Mapping[str, Any], where: str) -> Conversation:
    turns = _list(record["conversations"], where, "conversations")
    messages: list[dict[str, Any]] = []
    if record.get("system"):
        messages.append({"role": "system", "content": _text(record["system"], where, "system")})
    for number, turn in enumerate(turns):
        field = f"conversations[{number}]"
        if not isinstance(turn, Mapping):
            raise _bad(where, f"{field} is a JSON {type(turn).__name__}", "an object with from and value")
        if "from" not in turn and "role" in turn:  # the name of the one shape, the fields of the other
            messages.append(_read_message(turn, where, field))
            continue
        speaker = turn.get("from")
        role = _SHAREGPT_ROLES.get(speaker) if isinstance(speaker, str) else None
        if role is None:
            raise _bad(where, f"{field}.from is {speaker!r}", f"one of {', '.join(_SHAREGPT_ROLES)}")
        value = _text(turn.get("value"), where, f"{field}.value")
        if speaker == _CALLS:
            messages.append({"role": role, "tool_calls": _calls_in(value, where, f"{field}.value")})
        else:
            messages.append({"role": role, "content": value})
    return Conversation(messages=tuple(messages), tools=_tools(record, where), where=where)


def _alpaca(record: Mapping[str, Any], where: str) -> Conversation:
    messages = []
    if record.get("system"):
        messages.append({"role": "system", "content": _text(record["system"], where, "system")})
    for number, pair in enumerate(_list(record.get("history") or [], where, "history", empty=True)):
        field = f"history[{number}]"
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise _bad(where, f"{field} is no pair", "a question and its answer")
        messages.append({"role": "user", "content": _text(pair[0], where, f"{field}[0]")})
        messages.append({"role": "assistant", "content": _text(pair[1], where, f"{field}[1]")})
    asked = _text(record["instruction"], where, "instruction")
    if record.get("input"):
        asked += "\n\n" + _text(record["input"], where, "input")
    answer = {"role": "assistant", "content": _text(record["output"], where, "output")}
    return Conversation(messages=(*messages, {"role": "user", "content": asked}, answer), where=where)


def _prompt_completion(record: Mapping[str, Any], where: str) -> Conversation:
    def part(key: str, role: str) -> tuple[dict[str, Any], ...]:
        if isinstance(record[key], str):
            return ({"role": role, "content": _text(record[key], where, key)},)
        return _read_messages(record[key], where, key)

    prompt, completion = part("prompt", "user"), part("completion", "assistant")
    return Conversation(
        messages=prompt + completion,
        tools=_tools(record, where),
        where=where,
        completion_from=len(prompt),
    )


def _plain(record: Mapping[str, Any], where: str) -> Conversation:
    text = _text(record["text"], where, "text")
    if not text:
        raise _bad(where, "text is empty", "some text")
    return Conversation(messages=(), where=where, text=text)


_READERS = {
    Shape.MESSAGES: _messages,
    Shape.SHAREGPT: _sharegpt,
    Shape.ALPACA: _alpaca,
    Shape.PROMPT_COMPLETION: _prompt_completion,
    Shape.TEXT: _plain,
}


def _read_messages(value: Any, where: str, field: str) -> tuple[dict[str, Any], ...]:
    entries = enumerate(_list(value, where, field))
    return tuple(_read_message(message, where, f"{field}[{number}]") for number, message in entries)


def _read_message(message: Any, where: str, field: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise _bad(where, f"{field} is a JSON {type(message).__name__}", "an object with role and content")
    found = {str(key): _json(value, where, f"{field}.{key}") for key, value in message.items()}
    found = {key: value for key, value in found.items() if value is not None}
    role = found.get("role")
    if role not in ROLES:
        raise _bad(where, f"{field}.role is {role!r}", f"one of {', '.join(ROLES)}")
    if "tool_calls" in found:
        found["tool_calls"] = _calls(found["tool_calls"], where, f"{field}.tool_calls")
        if not found["tool_calls"]:
            del found["tool_calls"]
    if "content" in found:
        _check_content(found["content"], where, f"{field}.content")
    elif not (role == "assistant" and ("tool_calls" in found or "function_call" in found)):
        raise _bad(where, f"{field}.content is missing", "text, or a list of parts of text")
    if found.get("weight", 1) not in (0, 1):
        raise _bad(where, f"{field}.weight is {found['weight']!r}", "0 (not trained on) or 1")
    return found


def _check_content(content: Any, where: str, field: str) -> None:
    if isinstance(content, str):
        return
    if not isinstance(content, list):
        raise _bad(where, f"{field} is a JSON {type(content).__name__}", "text, or a list of parts of text")
    for number, part in enumerate(content):
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise _bad(
                where, f"{field}[{number}] is a part of type {kind!r}", 'parts {"type": "text", "text": ...}'
            )


def _calls(value: Any, where: str, field: str) -> list[dict[str, Any]]:
    """Tool calls, with arguments given as JSON text parsed, as templates expect them."""
    calls = _list(value, where, field, empty=True)
    for number, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise _bad(where, f"{field}[{number}] names no function", "an object with name and arguments")
        if isinstance(function.get("arguments"), str):
            try:
                arguments = parse_json(function["arguments"])
            except ValueError:
                continue  # some models are given their arguments as text
            if isinstance(arguments, dict):
                function["arguments"] = arguments
    return calls


def _calls_in(text: str, where: str, field: str) -> list[dict[str, Any]]:
    try:
        value = parse_json(text)
    except ValueError as error:
        raise _bad(where, f"{field} is not JSON ({error})", "a call with name and arguments") from error
    calls = _calls(value if isinstance(value, list) else [value], where, field)
    return [call if "function" in call else {"type": "function", "function": call} for call in calls]


def _tools(record: Mapping[str, Any], where: str) -> tuple[dict[str, Any], ...] | None:
    value = record.get("tools")
    if isinstance(value, str) and value:
        try:
            value = parse_json(value)
        except ValueError as error:
            raise _bad(where, f"tools is not JSON ({error})", "a list of descriptions of tools") from error
    if not value:
        return None
    tools = _list(_json(value, where, "tools"), where, "tools")
    for number, tool in enumerate(tools):
        if not isinstance(tool, dict):
            raise _bad(where, f"tools[{number}] is a JSON {type(tool).__name__}", "an object")
    return tuple(tools)


def _list(value: Any, where: str, field: str, *, empty: bool = False) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise _bad(where, f"{field} is a JSON {type(value).__name__}", "a list")
    if not value and not empty:
        raise _bad(where, f"{field} is empty", "at least one")
    return list(value)


def _text(value: Any, where: str, field: str) -> str:
    if not isinstance(value, str):
        raise _bad(where, f"{field} is {'missing' if value is None else type(value).__name__}", "text")
    text: str = _json(value, where, field)
    return text


def _json(value: Any, where: str, field: str) -> Any:
    """``value`` as plain JSON values of its own, so that a template meets no other object."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise _bad(where, f"{field} holds half a surrogate pair", "valid Unicode") from error
        return str(value)
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(key): _json(item, where, f"{field}.{key}") for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [_json(item, where, f"{field}[{number}]") for number, item in enumerate(value)]
    raise _bad(where, f"{field} is of the type {type(value).__name__}", "text, numbers, lists and objects")


def _bad(where: str, what: str, expected: str) -> CorpusError:
    return CorpusError(what, where=where, expected=expected, remedy=_REMEDY)
