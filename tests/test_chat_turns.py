"""Turns are found in one rendering where it shows them, as a rendering for each turn would find them."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import pytest
from builders.chats import CHATML, CHATS, TOOLS, assistant, chat, model_chat, system, user
from builders.tokens import packaged
from hypothesis import given, settings
from hypothesis import strategies as st
from test_chat_hostile import hostile

from apr_dist.corpus import chat_template
from apr_dist.corpus.chat_encoding import TrainOn, encode_conversation
from apr_dist.corpus.chat_sandbox import trace_turns
from apr_dist.corpus.chat_template import ChatTemplate
from apr_dist.corpus.chat_turns import Turns
from apr_dist.errors import CorpusError


class EachTurnRendered(ChatTemplate):
    """A template of which one rendering shows nothing, so that every turn is rendered by itself."""

    def turns(self, *_: Any, **__: Any) -> Turns | None:
        return None


def found(
    kind: type[ChatTemplate],
    text: str,
    messages: Sequence[Mapping[str, Any]],
    on: TrainOn = TrainOn.ASSISTANT,
    **more: Any,
) -> tuple[list[int], list[bool]] | str:
    """Ids and targets, or the refusal."""
    known = model_chat("qwen2.5")
    template = kind(text=text, special_tokens=known.special, now=model_chat("qwen2.5").template.now)
    try:
        made = encode_conversation(
            chat([dict(one) for one in messages], **more), template, known.tokenizer, on
        )
    except CorpusError as refused:
        return str(refused)
    return made.ids.tolist(), made.is_target.tolist()


def assert_the_same(text: str, messages: Sequence[Mapping[str, Any]], **more: Any) -> None:
    at_once, one_by_one = (found(kind, text, messages, **more) for kind in (ChatTemplate, EachTurnRendered))
    assert at_once == one_by_one


def assert_right(template: ChatTemplate, messages: Sequence[Mapping[str, Any]], **more: Any) -> int:
    """What one rendering shows is what the first messages are rendered to; returns how much it shows."""
    seen = template.turns(messages, **more)
    starts = seen.starts if seen else {}
    for number, start in starts.items():
        assert template.render(messages[:number], **more) == seen.text[:start]
        asked = template.render(messages[:number], add_generation_prompt=True, **more)
        assert asked == seen.text[:start] + seen.prompt
    return len(starts)


def published() -> list[str]:
    if importlib.util.find_spec("trl") is None:
        return []
    return sorted(path.stem for path in packaged("trl", "chat_templates").glob("*.jinja"))


LONGER = {
    "many turns": [one for number in range(8) for one in (user(f"{number}?"), assistant(f" {number}.\n"))],
    "a mixture": [
        system("s"),
        assistant("first"),
        user("a"),
        assistant(""),
        assistant("b"),
        user(""),
        user("c"),
    ],
}


@pytest.mark.parametrize("stem", published())
def test_what_one_rendering_of_a_published_template_shows_is_right(stem: str) -> None:
    text = packaged("trl", f"chat_templates/{stem}.jinja").read_text()
    template = ChatTemplate(text=text, special_tokens=model_chat("qwen2.5").special)
    shown = [assert_right(template, messages) for messages in LONGER.values()]
    shown.append(assert_right(template, CHATS["tools"], tools=TOOLS))
    if stem in ("gemma3", "llama3_1", "qwen2_5", "qwen3_instruct_2507"):
        assert shown[0] == len(LONGER["many turns"]) - 1


@pytest.mark.parametrize("stem", ["qwen2_5", "qwen2_5_training", "qwen3", "llama3_1", "phi3"])
def test_a_published_template_gives_the_same_with_one_rendering_and_with_one_a_turn(stem: str) -> None:
    text = packaged("trl", f"chat_templates/{stem}.jinja").read_text()
    for about in ("line ends", "answer first", "tools", "reasoning", *LONGER):
        messages = CHATS.get(about) or LONGER[about]
        assert_the_same(text, messages, tools=TOOLS if about == "tools" else None)


def test_hostile_conversations_give_the_same() -> None:
    text = model_chat("smollm2").template.text
    for messages in islice(hostile(), 200):
        if sum(len(one["content"]) for one in messages) < 10_000:
            assert_the_same(text, messages)


TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
ASKED = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
LOOP = "{% for m in messages %}" + TURN + "{% endfor %}"
OTHERWISE = {
    "trims what was said before": "{% for m in messages %}{% if loop.last %}" + TURN + "{% else %}"
    "<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endif %}{% endfor %}" + ASKED,
    "drops what was said before": "{% for m in messages[-3:] %}" + TURN + "{% endfor %}" + ASKED,
    "drops answers but the last": "{% for m in messages if m.role == 'user' or m == messages[-1] %}"
    + TURN
    + "{% endfor %}"
    + ASKED,
    "rewrites by the last question": "{% set n = messages | length %}{% for m in messages %}"
    "{% if loop.index < n - 1 %}old {% endif %}" + TURN + "{% endfor %}" + ASKED,
    "looks at the next one": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% if not loop.last and messages[loop.index].role == 'user' %} {% endif %}<|im_end|>\n{% endfor %}"
    + ASKED,
    "looks at the next one by its loop": "{% for m in messages %}"
    + TURN
    + "{% if loop.nextitem %}{{ loop.nextitem.role }}{% endif %}{% endfor %}"
    + ASKED,
    "writes its loop": "{% for m in messages %}{{ loop }}" + TURN + "{% endfor %}" + ASKED,
    "looks at all in a macro": "{% macro all() %}{% for m in messages %}{{ m.content[:1] }}{% endfor %}"
    "{% endmacro %}{% for m in messages %}" + TURN + "{% if loop.index == 3 %}{{ all() }}{% endif %}"
    "{% endfor %}" + ASKED,
    "ends in what the last turn left": "{% set ns = namespace(n=0) %}{% for m in messages %}"
    + TURN
    + "{% set ns.n = ns.n + 1 %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{{ ns.n }}{% endif %}",
    "ends in what was said last": LOOP + "{% if add_generation_prompt and messages[-1].role == 'user' %}"
    "<|im_start|>assistant\n{% endif %}",
    "knows at the beginning that it is asked": "{% if add_generation_prompt %}!{% endif %}" + LOOP + ASKED,
    "knows in a macro that it is asked": "{% macro a() %}{% if add_generation_prompt %}!{% endif %}"
    "{% endmacro %}{% for m in messages %}{{ a() }}" + TURN + "{% endfor %}" + ASKED,
    "closes each text": LOOP + "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}"
    "{{ eos_token }}{% endif %}",
    "begins its turns otherwise than it asks": LOOP
    + "{% if add_generation_prompt %}<|im_start|>a{% endif %}",
    "goes on early": "{% for m in messages %}" + TURN + "{% if m.role == 'user' %}{% continue %}{% endif %}x"
    "{% endfor %}" + ASKED,
    "leaves early": "{% for m in messages %}" + TURN + "{% if loop.index == 4 %}{% break %}{% endif %}"
    "{% endfor %}" + ASKED,
    "is recursive": "{% for m in messages recursive %}" + TURN + "{% endfor %}" + ASKED,
    "has the system apart": "{% if messages[0].role == 'system' %}{{ messages[0].content }}"
    "{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}{% for m in rest %}"
    + TURN
    + "{% endfor %}"
    + ASKED,
    "takes away the last": "{% for m in messages[:-1] %}" + TURN + "{% endfor %}" + ASKED,
    "compares": "{% if messages == messages[:2] %}short{% endif %}" + LOOP + ASKED,
    "compares in its loop": "{% for m in messages %}" + TURN + "{% if messages[:loop.index] == messages %}"
    "the last{% endif %}{% endfor %}" + ASKED,
    "counts in its loop": "{% for m in messages %}{{ messages | length }}" + TURN + "{% endfor %}" + ASKED,
    "asks for a method": "{% if messages.count is defined %}a list{% endif %}" + LOOP + ASKED,
    "keeps its turns": "{% set text %}" + LOOP + "{% endset %}{{ text }}" + ASKED,
    "goes over them twice": LOOP + "{% for m in messages %}{{ m.role[0] }}{% endfor %}" + ASKED,
    "sets what is not asked": "{% if not add_generation_prompt is defined %}"
    "{% set add_generation_prompt = true %}{% endif %}" + LOOP + ASKED,
    "numbers its turns": "{% for m in messages %}{{ loop.index }}" + TURN + "{% endfor %}" + ASKED,
    "looks back": "{% for m in messages %}{% if loop.previtem %}{{ loop.previtem.role }}{% endif %}"
    "{{ messages[loop.index0 - 1].role if loop.index0 else '' }}" + TURN + "{% endfor %}" + ASKED,
}
SHOWN = {"has the system apart", "sets what is not asked", "numbers its turns", "looks back"}


@pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-040")
@pytest.mark.parametrize("about", OTHERWISE)
def test_templates_that_rewrite_drop_and_look_ahead_give_the_same(about: str) -> None:
    for messages in (*LONGER.values(), CHATS["two turns"], CHATS["two answers"], CHATS["system"]):
        assert_the_same(OTHERWISE[about], messages)


@pytest.mark.parametrize("about", OTHERWISE)
def test_what_one_rendering_shows_is_what_the_first_messages_are_rendered_to(about: str) -> None:
    template, messages = ChatTemplate(text=OTHERWISE[about]), LONGER["many turns"]
    shown = assert_right(template, messages)
    if about in SHOWN:
        assert shown == len(messages) - 1


PIECES = [
    "{{ loop.index }}", "{% if loop.first %}^{% endif %}", "{% if loop.last %}${% endif %}",
    "{{ messages|length }}", "{% if loop.nextitem is defined %}>{% endif %}",
    "{% if loop.length > 4 %}long{% endif %}",
    "{{ messages[loop.index].role }}", "{{ messages[loop.index0].role }}", "{{ messages[0].content }}",
    "{% for n in messages %}{{ n.role[0] }}{% if loop.index == 2 %}{% break %}{% endif %}{% endfor %}",
    "{% if loop.index == 3 %}{% continue %}{% endif %}", "{% set ns.n = ns.n + 1 %}{{ ns.n }}",
    "{{ loop.revindex }}",
    "{% if messages[2:] %}more{% endif %}", "{{ messages[loop.index:] | length }}", TURN, TURN, TURN,
]  # fmt: skip


@given(
    body=st.lists(st.sampled_from(PIECES), min_size=1, max_size=5).map("".join),
    head=st.sampled_from(
        ["", "{{ messages[0].role }}", "{{ messages[3].role }}", "{% if messages[5] %}!{% endif %}"]
    ),
    over=st.sampled_from(["messages", "messages[1:]", "messages if m.role != 'system'", "messages|list"]),
)
@settings(max_examples=60, deadline=None)
def test_no_template_is_seen_wrongly(body: str, head: str, over: str) -> None:
    text = (
        "{% set ns = namespace(n=0) %}" + head + "{% for m in " + over + " %}" + body + "{% endfor %}" + ASKED
    )
    assert_right(ChatTemplate(text=text), [system("s"), *LONGER["many turns"][:7]])


MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% generation %}{{ m.content }}<|im_end|>\n"
    "{% endgeneration %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("text", [CHATML, MARKED])
def test_a_long_chat_is_rendered_as_often_as_a_short_one(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rendered: list[str] = []

    def counted(*positional: Any, **named: Any) -> str:
        rendered.append("")
        return real(*positional, **named)

    def counted_trace(*positional: Any, **named: Any) -> Turns | None:
        rendered.append("")
        return trace_turns(*positional, **named)

    real = chat_template.render
    monkeypatch.setattr(chat_template, "render", counted)
    monkeypatch.setattr(chat_template, "trace_turns", counted_trace)
    template, tokenizer = ChatTemplate(text=text), model_chat("smollm2").tokenizer
    counts = []
    for turns in (2, 2, 100):
        rendered.clear()
        messages = [one for _ in range(turns) for one in (user("Hi"), assistant("Hello."))]
        made = encode_conversation(chat(messages), template, tokenizer, TrainOn.ASSISTANT)
        end = tokenizer.id_of("<|im_end|>")
        assert int((made.ids[made.is_target] == end).sum()) >= turns
        counts.append(len(rendered))
    assert counts[1] == counts[2] <= 4
