"""Completion for a shell: one script that knows every verb and every flag of the verbs that own theirs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Annotated, Any, Union

import tyro


class Shell(StrEnum):
    """Shells a completion script can be written for."""

    BASH = "bash"
    ZSH = "zsh"
    FISH = "fish"


def print_completion(shell: Shell, verbs: Mapping[str, Callable[..., Any]]) -> None:
    """Print a script for ``shell`` that completes ``apr-dist``.

    Args:
        shell: which.
        verbs: the function behind each verb; groups are the first words of verbs of two.
    """
    groups: dict[str, dict[str, Callable[..., Any]]] = {}
    for verb, function in verbs.items():
        first, _, second = verb.partition(" ")
        groups.setdefault(first, {})[second] = function
    choices = {name: found[""] if "" in found else _group(found) for name, found in groups.items()}
    tyro.cli(
        _one_of(choices),
        prog="apr-dist",
        args=["--tyro-print-completion", shell.value],
        config=(tyro.conf.FlagCreatePairsOff, tyro.conf.EnumChoicesFromValues),
    )


def _group(found: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    def group(verb: Any) -> None: ...

    group.__annotations__["verb"] = tyro.conf.OmitSubcommandPrefixes[_one_of(found)]  # type: ignore[misc]
    return group


def _one_of(choices: Mapping[str, Callable[..., Any]]) -> Any:
    options = [Annotated[Any, tyro.conf.subcommand(name, constructor=one)] for name, one in choices.items()]
    return Union[tuple(options)]  # noqa: UP007 - the members are known at run time only
