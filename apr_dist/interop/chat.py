"""Chat templates: finding the one a model carries, and turning what a user says into its prompt.

A template is Jinja source that came with a model file, so it runs in Jinja's sandbox; the names and tags it
may use are those that ``transformers`` gives it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from apr_dist.errors import TokenizerError, UsageError
from apr_dist.parsing import parse_json


def chat_template(stated: str | None, files: Mapping[str, bytes], *, where: Path) -> str | None:
    """The template that the metadata state, else one of the files beside the tokenizer.

    Raises:
        TokenizerError: the file that should hold it is malformed.
    """
    if stated:
        return stated
    if "chat_template.jinja" in files:
        return files["chat_template.jinja"].decode(errors="replace")
    try:
        found = parse_json(files.get("tokenizer_config.json", b"{}")).get("chat_template")
    except (ValueError, AttributeError) as error:
        raise TokenizerError(f"tokenizer_config.json is not a JSON object ({error})", where=where) from error
    if isinstance(found, list):  # several by name; the one called default speaks
        found = next((one.get("template") for one in found if one.get("name") == "default"), None)
    return found if isinstance(found, str) else None


def render_chat(template: str, prompt: str, *, special_tokens: Mapping[str, str], where: Path) -> str:
    """The prompt of a chat of one user message, ready for the assistant to answer.

    Raises:
        UsageError: Jinja is not installed.
        TokenizerError: the template is malformed, or refuses such a chat.
    """
    try:
        from jinja2 import TemplateError  # noqa: PLC0415  (an extra)
        from jinja2.sandbox import ImmutableSandboxedEnvironment  # noqa: PLC0415

        from apr_dist.interop.chat_tags import GenerationTag  # noqa: PLC0415
    except ImportError as error:
        raise UsageError(
            "jinja2 is not installed",
            where="--chat",
            expected="the extra that reads chat templates",
            remedy="pip install 'apr-dist[report]'",
        ) from error

    def refuse(message: str) -> NoReturn:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": refuse,
        "strftime_now": lambda form: datetime.now().astimezone().strftime(form),
    }
    try:
        return environment.from_string(template).render(
            messages=[{"role": "user", "content": prompt}],
            tools=None,
            documents=None,
            add_generation_prompt=True,
            **special_tokens,
        )
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise TokenizerError(
            f"the chat template cannot be used ({type(error).__name__}: {error})",
            where=where,
            expected="a Jinja template of a chat",
            remedy="leave --chat out",
        ) from error


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
