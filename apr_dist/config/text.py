"""The configuration as people read it: commented YAML, a table, a JSON Schema, problems, differences.

Everything here is derived from the fields of ``TrainConfig``, so no text can say what the code does
not do. What the keys are and what their values may be is in ``apr_dist.config``.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from apr_dist.config.advice import advice
from apr_dist.config.reading import plain_message, read_tree, read_yaml, validate
from apr_dist.config.schema import TrainConfig, leaves

CONFIG_NAME = "config.yaml"
"""Name of the resolved configuration in a run folder."""

_KINDS: Mapping[Any, str] = {int: "integer", float: "number", str: "text", Path: "path"}
_BOUNDS = (("ge", "at least"), ("gt", "above"), ("le", "at most"), ("lt", "below"))
_LARGEST_SHOWN = 10**6


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a configuration: which key, what, and what to do."""

    key: str
    text: str


@dataclass(frozen=True)
class Difference:
    """A key that two configurations disagree on; values as YAML shows them."""

    key: str
    left: str
    right: str


def type_text(field: FieldInfo) -> str:
    """What a key's value may be, in words: ``integer above 0, or null``."""
    kinds = get_args(field.annotation) or (field.annotation,)
    if get_origin(field.annotation) is Mapping:
        return f"mapping of text to {'path' if kinds[1] is Path else 'number above 0'}"
    if get_origin(field.annotation) is tuple:
        return "list of text" if kinds[0] is str else "list of integers at least 0"
    words = ", or ".join(_kind_text(kind, field) for kind in kinds if kind is not type(None))
    return f"{words}, or null" if type(None) in kinds else words


def default_text(field: FieldInfo) -> str:
    """A key's default as YAML shows it."""
    return _value_text(_plain(field.get_default(call_default_factory=True)))


def commented_yaml(config: TrainConfig | None = None, *, given_only: bool = False) -> str:
    """A configuration as YAML that ``--config`` reads back, every key under a comment of what it is.

    Args:
        config: whose values to write; by default every key's own default.
        given_only: leave out the keys that the configuration was not given, and the line on top.
    """
    config = config or TrainConfig()
    values = config.model_dump(mode="json", exclude_unset=given_only)
    if given_only:
        return "\n".join(_commented(TrainConfig, values, ""))
    head = (
        "# Every key of a run. A flag on the command line wins over this file; null is written none there.\n"
    )
    return head + "\n" + "\n".join(_commented(TrainConfig, values, ""))


def markdown_reference() -> str:
    """Every key with its flag, type, default and meaning, as a Markdown page."""
    lines = [
        "# Configuration",
        "",
        "One YAML file, or the same keys as flags of `apr_dist/train.py`: `optimizer.weight_decay` is",
        "`--optimizer.weight-decay`. A flag wins over the file; an unknown key is refused with the nearest,",
        "and a run folder keeps the resolved configuration as `config.yaml`. This page is printed by",
        "`apr-dist config show --markdown`; `--schema` prints the JSON Schema of `configs/schema.json`",
        "for editors, `apr-dist config check FILE` lists every problem of a file, and",
        "`apr-dist config diff A B` compares two files or run folders.",
    ]
    section = None
    for key, field in leaves(TrainConfig):
        group = key.rpartition(".")[0]
        if group != section:
            section = group
            lines += ["", f"## {group or 'The run'}", ""]
            lines += [] if not group else [_first_line(_section_at(group)), ""]
            lines += ["| key | value | default | what it is |", "|---|---|---|---|"]
        cells = (f"`{key}`", type_text(field), f"`{default_text(field)}`", field.description or "")
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def json_schema() -> str:
    """JSON Schema (draft 2020-12) of the YAML file, for editors that complete and check keys."""
    schema = TrainConfig.model_json_schema()
    described = {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
    return json.dumps(described, indent=2) + "\n"


def problems(path: Path) -> list[Problem]:
    """Everything that is wrong with a configuration file; empty when a run would accept it.

    Raises:
        UsageError: the file is missing, not YAML, or not a mapping.
    """
    try:
        TrainConfig.model_validate(read_tree(path))
    except ValidationError as error:
        return [_problem(details) for details in error.errors(include_url=False)]
    return []


def load_config(path: Path) -> TrainConfig:
    """The configuration of a YAML file, or of a run folder.

    Raises:
        UsageError: no such file, or one that is not a valid configuration.
    """
    saved = path.is_dir()
    file = path / CONFIG_NAME if saved else path
    return validate(read_yaml(file, saved=saved), where=file)


def differences(left: TrainConfig, right: TrainConfig) -> list[Difference]:
    """The keys whose resolved values differ, in the order of the configuration."""
    ours, theirs = (dict(flat_values(config)) for config in (left, right))
    return [Difference(key, ours[key], theirs[key]) for key in ours if ours[key] != theirs[key]]


def flat_values(config: TrainConfig) -> Iterator[tuple[str, str]]:
    """Every (dotted key, resolved value as YAML shows it)."""
    tree = config.resolved().model_dump(mode="json")
    for key, _ in leaves(TrainConfig):
        value: Any = tree
        for part in key.split("."):
            value = value[part]
        yield key, _value_text(value)


def _problem(details: Mapping[str, Any]) -> Problem:
    key = ".".join(str(part) for part in details["loc"])
    if details["type"] != "extra_forbidden":
        return Problem(key, f"{details['input']!r} is not {plain_message(details['msg'])}")
    return Problem(key, "unknown key; " + (advice(key, is_flag=False) or "remove it"))


def _commented(section: type[BaseModel], values: Mapping[str, Any], indent: str) -> Iterator[str]:
    for name, field in section.model_fields.items():
        if name not in values:
            continue
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield f"\n{indent}# {_first_line(inner)}\n{indent}{name}:"
            yield from _commented(inner, values[name], indent + "  ")
            continue
        why = f"{field.description} ({type_text(field)}; default {default_text(field)})"
        yield textwrap.fill(
            why, 108, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}#   ", break_on_hyphens=False
        )
        yield f"{indent}{name}: {_value_text(values[name])}"
    if not indent:
        yield ""


def _section_at(group: str) -> type[BaseModel]:
    section: type[BaseModel] = TrainConfig
    for part in group.split("."):
        inner = section.model_fields[part].annotation
        assert isinstance(inner, type)
        section = inner
    return section


def _first_line(section: type[BaseModel]) -> str:
    return (section.__doc__ or "").partition("\n")[0]


def _kind_text(kind: Any, field: FieldInfo) -> str:
    if kind is bool:
        return "true or false"
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        return "one of " + ", ".join(kind)
    limits = []
    for bound, words in _BOUNDS:
        found = [getattr(item, bound) for item in field.metadata if getattr(item, bound, None) is not None]
        limits += [f"{words} {_bound_text(limit)}" for limit in found]
    return " ".join([_KINDS.get(kind, str(kind)), " and ".join(limits)]).strip()


def _bound_text(limit: float) -> str:
    # 2**63 is the only large bound there is; its decimal digits say nothing to a reader.
    power = int(limit).bit_length() - 1
    return f"2^{power}" if limit > _LARGEST_SHOWN and limit == 2**power else f"{limit:g}"


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, StrEnum) else str(value) if isinstance(value, Path) else value


def _value_text(value: Any) -> str:
    return str(yaml.safe_dump(value, default_flow_style=True, width=10**9)).removesuffix("...\n").strip()
