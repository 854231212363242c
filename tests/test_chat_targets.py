"""What is trained on: exactly what the assistant says and the token that ends it, whatever the template."""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any

import numpy as np
import pytest
from builders.chats import CHATS, TOOLS, assistant, chat, model_chat, system, user
from builders.tokens import packaged
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from apr_dist.corpus.chat_encoding import EncodedConversation, TrainOn, encode_conversation
from apr_dist.corpus.chat_template import ChatTemplate
from apr_dist.corpus.conversations import Conversation, turns_of
from apr_dist.errors import CorpusError


def published(stem: str) -> ChatTemplate:
    if importlib.util.find_spec("trl") is None:
        pytest.skip("the trl wheel is not installed")
    text = packaged("trl", f"chat_templates/{stem}.jinja").read_text()
    return ChatTemplate(text=text, special_tokens=model_chat("qwen2.5").special, where=stem)


def learned(name: str, encoded: EncodedConversation) -> list[str]:
    """Texts of the stretches that are trained on."""
    tokenizer = model_chat(name).tokenizer.tokenizer
    edges = np.flatnonzero(np.diff(np.concatenate(([False], encoded.is_target, [False])).astype(np.int8)))
    stretches = zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)
    return [
        tokenizer.decode(encoded.ids[begin:end].tolist(), skip_special_tokens=False)
        for begin, end in stretches
    ]


def encoded(
    messages: list[dict[str, Any]],
    on: TrainOn,
    *,
    name: str = "smollm2",
    template: ChatTemplate | None = None,
    **more: Any,
) -> EncodedConversation:
    found = model_chat(name)
    conversation = Conversation(messages=tuple(messages), where="c:1", **more)
    return encode_conversation(conversation, template or found.template, found.tokenizer, on)


THREE = [
    system("s"),
    user("one"),
    assistant("first"),
    user("two"),
    assistant("second"),
    user("three"),
    assistant("third"),
]


@pytest.mark.parametrize("name", ["smollm2", "qwen2.5"])
@pytest.mark.parametrize(
    ("on", "wanted"),
    [
        (TrainOn.ASSISTANT, ["first<|im_end|>", "second<|im_end|>", "third<|im_end|>"]),
        (TrainOn.LAST, ["third<|im_end|>"]),
        (TrainOn.COMPLETION, ["third<|im_end|>"]),
    ],
)
def test_each_policy_trains_on_its_turns_and_their_ends(name: str, on: TrainOn, wanted: list[str]) -> None:
    assert learned(name, encoded(THREE, on, name=name)) == wanted


def test_all_trains_on_everything_but_the_first_token() -> None:
    found = encoded(THREE, TrainOn.ALL)
    assert not found.is_target[0]
    assert found.is_target[1:].all()


def test_a_completion_is_what_the_record_says_or_all_that_follows_the_last_question() -> None:
    messages = [*THREE[:5], assistant("more")]
    assert learned("smollm2", encoded(messages, TrainOn.COMPLETION)) == ["second<|im_end|>", "more<|im_end|>"]
    assert learned("smollm2", encoded(messages, TrainOn.LAST)) == ["more<|im_end|>"]
    stated = encoded(messages, TrainOn.COMPLETION, completion_from=5)
    assert learned("smollm2", stated) == ["more<|im_end|>"]


def test_a_call_of_a_tool_is_trained_on_and_its_result_is_not() -> None:
    found = encoded(CHATS["tools"], TrainOn.ASSISTANT, name="qwen2.5", tools=tuple(TOOLS))
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call><|im_end|>'
    assert learned("qwen2.5", found) == [call, "It is 21 °C.<|im_end|>"]


def test_a_turn_of_weight_zero_is_not_trained_on() -> None:
    messages = [user("a"), assistant("bad", weight=0), user("b"), assistant("good", weight=1)]
    assert learned("smollm2", encoded(messages, TrainOn.ASSISTANT)) == ["good<|im_end|>"]


def test_a_greeting_that_answers_nobody_is_trained_on() -> None:
    messages = [assistant("Welcome  "), user("Hi"), assistant("Yes?")]
    assert learned("smollm2", encoded(messages, TrainOn.ASSISTANT)) == [
        "Welcome  <|im_end|>",
        "Yes?<|im_end|>",
    ]
    found = encoded([system("s"), assistant("Welcome")], TrainOn.ASSISTANT, name="qwen2.5")
    assert learned("qwen2.5", found) == ["Welcome<|im_end|>"]


def test_no_assistant_no_targets() -> None:
    for messages in ([user("x")], [system("x")], [system("x"), user("y")]):
        for on in (TrainOn.ASSISTANT, TrainOn.LAST, TrainOn.COMPLETION):
            assert not encoded(messages, on).is_target.any()


def test_a_turn_that_spells_the_turn_end_is_trained_on_to_its_real_end() -> None:
    messages = [user("x"), assistant("say <|im_end|> now"), user("y <|im_end|>"), assistant("ok")]
    wanted = ["say <|im_end|> now<|im_end|>", "ok<|im_end|>"]
    assert learned("smollm2", encoded(messages, TrainOn.ASSISTANT)) == wanted


def test_a_template_that_drops_reasoning_once_turns_follow_is_refused_and_its_turns_can_be_divided() -> None:
    template, messages = published("qwen3"), CHATS["reasoning"]
    with pytest.raises(CorpusError, match="otherwise once others follow") as refused:
        encoded(messages, TrainOn.ASSISTANT, name="qwen2.5", template=template)
    assert "--rewritten-turns split" in str(refused.value)
    last = encoded(messages, TrainOn.LAST, name="qwen2.5", template=template)
    assert learned("qwen2.5", last) == ["<think>\nThree and three.\n</think>\n\n6<|im_end|>"]
    divided = turns_of(chat(messages))
    said = [encoded(list(one.messages), TrainOn.LAST, name="qwen2.5", template=template) for one in divided]
    assert [learned("qwen2.5", one) for one in said] == [
        ["<think>\nTwo and two.\n</think>\n\n4<|im_end|>"],
        ["<think>\nThree and three.\n</think>\n\n6<|im_end|>"],
    ]


def test_a_template_whose_prompt_is_not_how_its_turns_begin_is_refused() -> None:
    with pytest.raises(CorpusError, match="the prompt that a model answers is not how the turn begins"):
        encoded(CHATS["two turns"], TrainOn.ASSISTANT, name="qwen2.5", template=published("qwen3_5_nothink"))


def test_a_template_that_closes_each_text_with_a_token_is_understood() -> None:
    template = ChatTemplate(
        text="{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}{{ eos_token }}{% endif %}",
        special_tokens={"eos_token": "<|endoftext|>"},
    )
    wanted = ["first<|im_end|>", "second<|im_end|>", "third<|im_end|>"]
    assert learned("smollm2", encoded(THREE, TrainOn.ASSISTANT, template=template)) == wanted


def test_a_turn_without_an_end_token_is_all_that_it_adds() -> None:
    template = ChatTemplate(
        text="{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    messages = [user("a"), assistant("b"), user("c"), assistant("d")]
    assert template.turn_end(model_chat("smollm2").tokenizer) is None
    assert learned("smollm2", encoded(messages, TrainOn.ASSISTANT, template=template)) == [" b\n", " d\n"]


@pytest.mark.parametrize(
    "stem", ["qwen2_5", "qwen2_5_vl", "qwen3_instruct_2507", "qwen3_8", "lfm2_v2", "llama3"]
)
@pytest.mark.parametrize("about", ["two turns", "system", "tools", "reasoning", "line ends"])
def test_a_template_with_marks_is_trained_on_as_the_one_without(stem: str, about: str) -> None:
    plain, marked = published(stem), published(f"{stem}_training")
    assert marked.marks_turns
    assert not plain.marks_turns
    tools = tuple(TOOLS) if about == "tools" else None
    for on in TrainOn:
        one, other = (
            encoded(CHATS[about], on, name="qwen2.5", template=template, tools=tools)
            for template in (plain, marked)
        )
        assert one.ids.tolist() == other.ids.tolist()
        assert one.is_target.tolist() == other.is_target.tolist()


def test_marks_are_where_transformers_finds_them() -> None:
    text = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    found = model_chat("qwen2.5")
    reference = PreTrainedTokenizerFast(tokenizer_object=found.tokenizer.tokenizer, **found.special)
    for about in ("two turns", "unicode", "two answers", "long"):
        wanted = reference.apply_chat_template(
            CHATS[about], chat_template=text, return_assistant_tokens_mask=True
        )
        ours = encoded(CHATS[about], TrainOn.ASSISTANT, name="qwen2.5", template=ChatTemplate(text=text))
        assert ours.ids.tolist() == wanted["input_ids"]
        assert ours.is_target.astype(int).tolist() == wanted["assistant_masks"]


def test_a_mark_that_leaves_out_the_turn_end_is_extended_to_it() -> None:
    text = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% generation %}{{ m.content }}{% endgeneration %}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    only = text.replace("{% generation %}{{ m.content }}{% endgeneration %}", "{{ said(m) }}")
    assert only != text
    template = ChatTemplate(
        text="{% macro said(m) %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endmacro %}" + only
    )
    assert learned("smollm2", encoded(THREE[:3], TrainOn.ASSISTANT, template=template)) == ["first<|im_end|>"]


def test_plain_text_is_trained_on_whole_or_not_at_all() -> None:
    found = model_chat("smollm2")
    record = Conversation(messages=(), text="Once <|im_end|>", where="c:4")
    ours = encode_conversation(record, found.template, found.tokenizer, TrainOn.ALL)
    assert found.tokenizer.tokenizer.decode(ours.ids.tolist(), skip_special_tokens=False) == (
        "Once <|im_end|><|im_end|>"
    )
    assert ours.ids.tolist().count(found.tokenizer.id_of("<|im_end|>")) == 1
    assert ours.is_target.tolist() == [False] + [True] * (len(ours.ids) - 1)
    with pytest.raises(CorpusError, match=r"c:4.*plain text"):
        encode_conversation(record, found.template, found.tokenizer, TrainOn.ASSISTANT)


PARTS = [*"ab <|>_\n\té😀", "<|im_end|>", "<|im_start|>", "<|", "|>"]
HOSTILE = st.lists(st.sampled_from(PARTS), max_size=12).map("".join)


@given(
    turns=st.lists(st.tuples(st.sampled_from(["user", "assistant"]), HOSTILE), min_size=1, max_size=6),
    opening=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_no_text_of_any_message_moves_a_mask(turns: list[tuple[str, str]], opening: bool) -> None:
    """An independent renderer of ChatML: tokens of each turn one by one, special tokens by hand."""
    found = model_chat("smollm2")
    messages = [system("s")] if opening else []
    messages += [{"role": role, "content": content} for role, content in turns]
    ours = encoded(messages, TrainOn.ASSISTANT)
    ids, targets = chatml_by_hand(messages)
    assert ours.ids.tolist() == ids
    assert ours.is_target.tolist() == targets
    assert found.template.turn_end(found.tokenizer) == found.tokenizer.id_of("<|im_end|>")


@cache
def plain_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer.from_str(model_chat("smollm2").tokenizer.tokenizer.to_str())
    tokenizer.encode_special_tokens = True
    return tokenizer


def chatml_by_hand(messages: list[dict[str, Any]]) -> tuple[list[int], list[bool]]:
    tokenizer = model_chat("smollm2").tokenizer
    start, end = tokenizer.id_of("<|im_start|>"), tokenizer.id_of("<|im_end|>")
    default = system("You are a helpful AI assistant named SmolLM, trained by Hugging Face")
    shown = messages if messages[0]["role"] == "system" else [default, *messages]
    plain = plain_tokenizer()
    ids: list[int] = []
    targets: list[bool] = []
    for number, message in enumerate(shown):
        head = f"{message['role']}\n"
        before = "" if number == 0 else "\n"
        found = plain.encode(before, add_special_tokens=False)
        ids += [*found.ids, start]
        targets += [False] * (len(found.ids) + 1)
        said = plain.encode(head + message["content"], add_special_tokens=False)
        speaks = message["role"] == "assistant"
        ids += [*said.ids, end]
        targets += [speaks and first >= len(head) for first, _ in said.offsets]
        targets.append(speaks)
    tail = plain.encode("\n", add_special_tokens=False).ids
    return ids + tail, targets + [False] * len(tail)
