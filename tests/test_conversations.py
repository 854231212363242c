"""Records of conversations in the usual shapes, and what is wrong with one that cannot be read."""

from __future__ import annotations

from typing import Any

import pytest

from apr_dist.corpus.conversations import Shape, read_conversation, recognise_shape
from apr_dist.errors import CorpusError

USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


def messages_of(record: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    return read_conversation(record, recognise_shape(record), "c.jsonl:1").messages


@pytest.mark.parametrize(
    ("record", "shape"),
    [
        ({"messages": [USER, ANSWER]}, Shape.MESSAGES),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            Shape.SHAREGPT,
        ),
        ({"conversations": [USER, ANSWER]}, Shape.SHAREGPT),
        ({"instruction": "a", "input": "", "output": "b"}, Shape.ALPACA),
        ({"prompt": "a", "completion": "b"}, Shape.PROMPT_COMPLETION),
        ({"prompt": [USER], "completion": [ANSWER]}, Shape.PROMPT_COMPLETION),
    ],
)
def test_every_shape_is_recognised_and_says_the_same(record: dict[str, Any], shape: Shape) -> None:
    assert recognise_shape(record) is shape
    assert messages_of(record) == (USER, ANSWER)


def test_plain_text_stays_text() -> None:
    found = read_conversation({"text": "Once."}, recognise_shape({"text": "Once."}), "c:1")
    assert (found.messages, found.text) == ((), "Once.")


def test_alpaca_joins_its_input_and_keeps_its_system_and_history() -> None:
    record = {"instruction": "Add.", "input": "1 2", "output": "3", "system": "s", "history": [["q", "r"]]}
    assert [(one["role"], one["content"]) for one in messages_of(record)] == [
        ("system", "s"),
        ("user", "q"),
        ("assistant", "r"),
        ("user", "Add.\n\n1 2"),
        ("assistant", "3"),
    ]


def test_a_completion_of_messages_begins_where_the_prompt_ends() -> None:
    record = {"prompt": [USER, ANSWER, USER], "completion": [ANSWER]}
    assert read_conversation(record, Shape.PROMPT_COMPLETION, "c:1").completion_from == 3


def test_tools_and_calls_given_as_text_are_parsed() -> None:
    stated = {"role": "assistant", "content": None}
    stated["tool_calls"] = [{"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}]
    record = {"messages": [USER, stated], "tools": '[{"type": "function"}]'}
    found = read_conversation(record, Shape.MESSAGES, "c:1")
    assert found.messages[1] == {"role": "assistant", "tool_calls": [CALL]}
    assert found.tools == ({"type": "function"},)
    shared = [
        {"from": "human", "value": "a"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
    ]
    shared.append({"from": "observation", "value": "7"})
    assert messages_of({"conversations": shared})[1:] == (
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "tool", "content": "7"},
    )


def test_fields_that_are_null_are_absent() -> None:
    record = {
        "messages": [USER | {"name": None, "tool_calls": None}, ANSWER | {"tool_calls": []}],
        "tools": None,
    }
    assert messages_of(record) == (USER, ANSWER)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"messages": []}, "messages is empty"),
        ({"messages": "hi"}, "messages is a JSON str"),
        ({"messages": [1]}, r"messages\[0\] is a JSON int"),
        ({"messages": [{"role": "asistant", "content": "x"}]}, r"messages\[0\].role is 'asistant'"),
        ({"messages": [{"content": "x"}]}, r"messages\[0\].role is None"),
        ({"messages": [USER, {"role": "assistant"}]}, r"messages\[1\].content is missing"),
        ({"messages": [{"role": "user", "content": None}]}, r"messages\[0\].content is missing"),
        ({"messages": [{"role": "user", "content": 3}]}, r"messages\[0\].content is a JSON int"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "url": "u"}]}]},
            "part of type 'image'",
        ),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "half a surrogate pair"),
        ({"messages": [ANSWER | {"tool_calls": [{"type": "function"}]}]}, "names no function"),
        ({"messages": [ANSWER | {"weight": 0.5}]}, r"messages\[0\].weight is 0.5"),
        ({"messages": [USER], "tools": "{"}, "tools is not JSON"),
        ({"messages": [USER], "tools": ["f"]}, r"tools\[0\] is a JSON str"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, r"conversations\[0\].from is 'alien'"),
        ({"conversations": [{"from": "human"}]}, r"conversations\[0\].value is missing"),
        ({"conversations": [{"from": "function_call", "value": "f("}]}, "is not JSON"),
        ({"instruction": "a", "output": 3}, "output is int"),
        ({"instruction": "a", "output": "b", "history": [["q"]]}, r"history\[0\] is no pair"),
        ({"prompt": "a", "completion": [{"role": "x"}]}, r"completion\[0\].role is 'x'"),
        ({"text": ""}, "text is empty"),
        ({"text": 3}, "text is int"),
    ],
    ids=str,
)
def test_a_bad_record_is_refused_with_its_line_and_field(record: dict[str, Any], said: str) -> None:
    with pytest.raises(CorpusError, match=said) as refused:
        messages_of(record)
    assert refused.value.where == "c.jsonl:1"
    assert refused.value.expected
    assert refused.value.remedy


@pytest.mark.parametrize("record", [{}, {"content": "x"}, {"messages": None}, {"instruction": "x"}])
def test_a_record_of_no_shape_names_its_keys_and_those_that_would_do(record: dict[str, Any]) -> None:
    with pytest.raises(CorpusError, match="none of the keys of a conversation") as refused:
        recognise_shape(record, where="c.jsonl:7")
    assert "c.jsonl:7" in str(refused.value)
    assert "prompt and completion" in (refused.value.expected or "")


def test_a_record_of_another_shape_than_the_first_is_refused() -> None:
    with pytest.raises(CorpusError, match="messages is missing"):
        read_conversation({"text": "x"}, Shape.MESSAGES, "c.jsonl:2")
