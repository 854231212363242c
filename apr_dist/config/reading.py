"""From text to a configuration: the command line and YAML files, refused with the nearest match.

Both become one tree of plain values under the keys of ``config``, validated in one place; a flag wins over
the file. What the keys are and mean is in ``config``.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from apr_dist.config.advice import advice, renamed
from apr_dist.config.schema import TrainConfig, flag_of, leaves
from apr_dist.errors import UsageError
from apr_dist.parsing import parse_yaml


@dataclass(frozen=True)
class Invocation:
    """What one command line asked for."""

    config: TrainConfig
    debug: bool


def parse_command_line(arguments: Sequence[str], *, prog: str = "train.py") -> Invocation:
    """Read flags (and the file ``--config`` names) into one validated configuration.

    Args:
        arguments: the command line without the program's name.
        prog: the program's name, for ``--help``.

    Raises:
        UsageError: unknown flag or key (with the nearest match), bad value, unreadable file.
    """
    parser = _parser(prog)
    given, unknown = parser.parse_known_args(list(arguments))
    if unknown:
        _refuse_unknown(unknown[0])
    values = vars(given)
    debug, path = bool(values.pop("debug", False)), values.pop("config", None)
    tree = read_yaml(Path(path)) if path else {}
    fields = dict(leaves(TrainConfig))
    for key, value in values.items():
        is_null = value == "none" and type(None) in get_args(fields[key].annotation)
        _put(tree, key, None if is_null else value)
    return Invocation(config=validate(tree, where="command line"), debug=debug)


def read_yaml(path: Path, *, saved: bool = False) -> dict[str, Any]:
    """Read a configuration file into a tree, refusing unknown keys by their path.

    Args:
        path: the file.
        saved: whether a run wrote it, whose keys may have had other names then.

    Raises:
        UsageError: missing, not YAML, not a mapping, or with a key that does not exist.
    """
    tree = renamed(read_tree(path)) if saved else read_tree(path)
    _check_keys(tree, TrainConfig, path, "")
    return tree


def read_tree(path: Path) -> dict[str, Any]:
    """Read a configuration file into a tree of plain values, whatever its keys are.

    Raises:
        UsageError: missing, not YAML, or not a mapping.
    """
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(
            f"the configuration file cannot be read ({error.strerror})",
            where=path,
            expected="a YAML file",
            remedy="give the path of one of configs/*.yaml",
        ) from error
    except ValueError as error:
        raise UsageError(
            f"the configuration is not YAML ({error})",
            where=path,
            expected="YAML text",
        ) from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UsageError(
            f"the configuration is a {type(tree).__name__}",
            where=path,
            expected="a mapping of keys to values",
        )
    return tree


def validate(tree: Mapping[str, Any], *, where: str | Path) -> TrainConfig:
    """Turn a tree of plain values into a configuration.

    Raises:
        UsageError: naming the first key whose value is wrong, the value, and what it may be.
    """
    try:
        return TrainConfig.model_validate(tree)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = _leaf_of(".".join(str(part) for part in first["loc"]))
        raise UsageError(
            f"{key} is {first.get('input')!r}",
            where=where,
            expected=plain_message(first["msg"]),
            remedy=f"correct the key {key} (flag {flag_of(key)})",
        ) from error


def _leaf_of(place: str) -> str:
    """The settable key that a place inside its value belongs to; ``place`` itself where it is none."""
    return next((key for key, _ in leaves(TrainConfig) if place.startswith(f"{key}.")), place)


def plain_message(message: str) -> str:
    """What a validation message asks for, to follow the word "expected"."""
    text = message.removeprefix("Input should be ").removeprefix("Value error, ")
    return text[:1].lower() + text[1:]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message, where="command line", remedy="see --help")


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=prog,
        usage=f"{prog} [--config PATH] [--KEY VALUE ...]",
        description="Train a language model, from a pretrained APR file or from scratch.",
        epilog="Example: apr-dist train --init model.apr --dataset data/train --val-dataset data/validation"
        " --run-dir runs/first --num-steps 500; several processes: accelerate launch apr_dist/train.py with"
        " the same flags",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", metavar="PATH", help="YAML file of the keys below; a flag wins over it")
    parser.add_argument("--debug", action="store_true", help="show a traceback with an error")
    groups: dict[str, argparse._ArgumentGroup] = {}
    for key, field in leaves(TrainConfig):
        room = key.rpartition(".")[0]
        group = groups[room] = groups.get(room) or parser.add_argument_group(room or "the run")
        words = words_of(field)
        default = f"default: {_shown(field.get_default(call_default_factory=True))}"
        unsaid = ", ".join(words) + "; " if any(word not in str(field.description) for word in words) else ""
        text = f"{field.description} ({unsaid}{default})"
        flag, help_text = flag_of(key), text.replace("%", "%%")
        if field.annotation is bool:
            group.add_argument(flag, dest=key, action=argparse.BooleanOptionalAction, help=help_text)
        else:
            group.add_argument(flag, dest=key, metavar="WORD" if words else _metavar(field), help=help_text)
    return parser


def _shown(value: object) -> str:
    return "none" if value is None else str(value)


def _metavar(field: FieldInfo) -> str:
    if get_origin(field.annotation) is Mapping:
        return "PATH=WEIGHT,..."
    if get_origin(field.annotation) is tuple:
        return "INT,..."
    kinds = [kind for kind in (get_args(field.annotation) or (field.annotation,)) if kind is not type(None)]
    return getattr(kinds[0], "__name__", "VALUE").upper()


def words_of(field: FieldInfo) -> list[str]:
    """The words that a key may hold; none where it is not a choice."""
    kind = field.annotation
    return list(kind) if isinstance(kind, type) and issubclass(kind, StrEnum) else []


def _put(tree: dict[str, Any], key: str, value: object) -> None:
    *groups, last = key.split(".")
    for group in groups:
        tree = tree.setdefault(group, {})
    tree[last] = value


def _check_keys(tree: Mapping[str, Any], section: type[BaseModel], path: Path, prefix: str) -> None:
    for key, value in tree.items():
        field = section.model_fields.get(str(key))
        if field is None:
            raise UsageError(
                f"unknown key {prefix}{key}",
                where=path,
                expected=f"one of {', '.join(section.model_fields)}",
                remedy=advice(f"{prefix}{key}", is_flag=False) or "remove the key",
            )
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel) and isinstance(value, dict):
            _check_keys(value, inner, path, f"{prefix}{key}.")


def _refuse_unknown(argument: str) -> NoReturn:
    word = argument.split("=", 1)[0]
    is_flag = word.startswith("-")
    raise UsageError(
        f"unknown {'flag' if is_flag else 'argument'} {word}",
        where="command line",
        expected="one of the flags that --help lists",
        remedy=(advice(word.lstrip("-"), is_flag=True) if is_flag else None) or "see --help",
    )
