"""Where a model's answers end and how they are drawn: in an APR file, and in the files of other formats.

The template is one of the metadata; generation settings travel as the ``generation_config.json`` that lay
next to the weights. What ends a turn under the template is an end of the text in every format, so that other
programs stop there as well.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from apr_dist.apr.layout import TOKENIZER_TEXT
from apr_dist.apr.metadata import AprMetadata
from apr_dist.errors import AprDistError, TokenizerError
from apr_dist.interop.chat import chat_of, chat_template
from apr_dist.interop.embedding import FILES_KEY, embedded_files, end_token_ids, token_ids
from apr_dist.interop.hf_config import config_text
from apr_dist.parsing import parse_json

_GENERATION: Final = "generation_config.json"
_TEMPLATE: Final = "chat_template.jinja"
_TOKENIZER: Final = "tokenizer_config.json"
_SAMPLING: Final = {
    "temperature": "temp",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "penalty_repeat",
}
"""Keys of a ``generation_config.json`` and what GGUF calls them, after ``general.sampling.``."""


def stated_template(metadata: AprMetadata, where: Path) -> str | None:
    """The chat template of a file, from its metadata or the files inside.

    Raises:
        TokenizerError: a file inside is malformed.
    """
    return chat_template(metadata.chat_template, embedded_files(metadata, where=where), where=where)


def stop_ids(metadata: AprMetadata, where: Path) -> tuple[int, ...]:
    """Tokens at which generation stops: those stated, and what ends a turn under the chat template."""
    stated = end_token_ids(metadata)
    if not isinstance(metadata.custom.get(TOKENIZER_TEXT), str):
        return stated
    try:
        chat = chat_of(metadata, where, None)
    except AprDistError:
        return stated  # a template or a tokenizer that cannot be used is refused by those who use it
    end = chat.template.turn_end(chat.tokenizer) if chat.template else None
    return stated if end is None else tuple(dict.fromkeys((*stated, end)))


def huggingface_files(metadata: AprMetadata, files: Mapping[str, bytes], *, where: Path) -> dict[str, bytes]:
    """The small files of a model folder, which say of its chats what the metadata say.

    Args:
        metadata: of the model.
        files: the files that go into the folder otherwise; returned as they are where they agree.
        where: what errors call the model.

    Raises:
        TokenizerError: a file to be changed is malformed.
    """
    found = dict(files)
    stated = metadata.chat_template
    if stated and chat_template(None, files, where=where) != stated:
        if _TEMPLATE in found or _TOKENIZER not in found:
            found[_TEMPLATE] = stated.encode()
        else:
            settings = _read(files, _TOKENIZER, where)
            settings["chat_template"] = _with_default(settings.get("chat_template"), stated)
            found[_TOKENIZER] = config_text(settings)
    settings = _read(files, _GENERATION, where)
    kept = settings.get("eos_token_id")
    ends = [*(kept if isinstance(kept, list) else [] if kept is None else [kept])]
    missing = [one for one in stop_ids(metadata, where) if one not in ends]
    if missing:
        ends += missing
        ids = token_ids(metadata) | {"eos_token_id": ends[0] if len(ends) == 1 else ends}
        found[_GENERATION] = config_text(ids | settings | {"eos_token_id": ids["eos_token_id"]})
    return found


def with_template(metadata: AprMetadata, template: str) -> AprMetadata:
    """Metadata with another chat template."""
    chatml = "chatml" if "<|im_start|>" in template else None
    return metadata.replace(chat_template=template, chat_format=chatml)


def gguf_sampling(metadata: AprMetadata, where: Path) -> dict[str, int | float]:
    """The fields of a GGUF file that say how answers are drawn; empty if the model does not draw.

    Raises:
        TokenizerError: the generation settings are malformed.
    """
    settings = _read(embedded_files(metadata, where=where), _GENERATION, where)
    if not settings.get("do_sample"):
        return {}
    return {
        f"general.sampling.{gguf}": value
        for ours, gguf in _SAMPLING.items()
        if isinstance(value := settings.get(ours), int | float) and not isinstance(value, bool)
    }


def with_gguf_sampling(metadata: AprMetadata, fields: Mapping[str, Any]) -> AprMetadata:
    """Metadata with the generation settings that a GGUF file states, if it states any."""
    values = {ours: fields.get(f"general.sampling.{gguf}") for ours, gguf in _SAMPLING.items()}
    settings = {key: _shortest(value) for key, value in values.items() if type(value) in (int, float)}
    if not settings:
        return metadata
    text = config_text({"do_sample": True} | settings).decode()
    inside = metadata.custom.get(FILES_KEY)
    files = dict(inside) if isinstance(inside, Mapping) else {}
    return metadata.with_custom({FILES_KEY: files | {_GENERATION: text}})


def _shortest(value: Any) -> Any:
    """A 32-bit float as the number that was meant."""
    return float(f"{value:.7g}") if isinstance(value, float) else value


def _with_default(named: Any, template: str) -> Any:
    """What ``chat_template`` of a tokenizer's settings becomes: the text, or a list with it as default."""
    if not isinstance(named, list):
        return template
    others = [one for one in named if isinstance(one, dict) and one.get("name") != "default"]
    return [{"name": "default", "template": template}, *others]


def _read(files: Mapping[str, bytes], name: str, where: Path) -> dict[str, Any]:
    try:
        found = parse_json(files.get(name, b"{}"))
    except ValueError as error:
        raise TokenizerError(f"{name} is not JSON ({error})", where=where) from error
    if not isinstance(found, dict):
        raise TokenizerError(f"{name} is a JSON {json.dumps(found)[:20]}", where=where, expected="an object")
    return found
