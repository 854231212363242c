"""Completion for a shell: one script with every verb, its flags and their choices; files complete as ever."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from apr_dist.config import TrainConfig, flag_of, leaves
from apr_dist.config.reading import words_of


@dataclass(frozen=True)
class Flag:
    """One flag of a verb.

    Attributes:
        names: every spelling, dashes included.
        takes: whether a value follows.
        choices: the words that value may be; none if it is free, such as a path.
    """

    names: tuple[str, ...]
    takes: bool
    choices: tuple[str, ...] = ()


Verbs = Mapping[str, Sequence[Flag]]


def flags_of(verb: str, function: Callable[..., Any]) -> list[Flag]:
    """The flags of a verb: those of its function, or its own parser's and the trainer's.

    Args:
        verb: its words.
        function: what it calls; one that takes the command line itself has a ``parser`` beside it.
    """
    if verb == "train":
        return [*_of_parser(argparse.ArgumentParser()), *_of_trainer()]
    parser = getattr(importlib.import_module(function.__module__), "parser", None)
    if parser is not None:
        return [*_of_parser(parser()), *_of_trainer()]
    return [Flag(("-h", "--help"), takes=False), *_of_signature(function)]


def _of_signature(function: Callable[..., Any]) -> Iterable[Flag]:
    """What the parser of verbs makes of keyword-only parameters; a dataclass stands for its fields."""
    for name, one in inspect.signature(function, eval_str=True).parameters.items():
        if one.kind is inspect.Parameter.KEYWORD_ONLY:
            yield from _of_parameter(name, one.annotation, one.default)


def _of_parameter(name: str, annotation: Any, default: object) -> Iterable[Flag]:
    kind, *notes = get_args(annotation) if get_origin(annotation) is Annotated else [annotation]
    if dataclasses.is_dataclass(kind):
        hints = get_type_hints(kind, include_extras=True)
        for field in dataclasses.fields(kind):
            yield from _of_parameter(field.name, hints[field.name], field.default)
        return
    aliases = [alias for note in notes for alias in getattr(note, "aliases", None) or ()]
    named = next((note.name for note in notes if getattr(note, "name", None)), name)
    no = "no-" if default is True else ""
    names = (*aliases, f"--{no}{named.replace('_', '-')}")
    yield Flag(names, takes=kind is not bool, choices=_choices(kind))


def _choices(kind: object) -> tuple[str, ...]:
    """The words that a value of this type may be; none if it is free."""
    if isinstance(kind, type) and issubclass(kind, Enum):
        return tuple(str(one.value) for one in kind)
    if get_origin(kind) is Literal:
        return tuple(map(str, get_args(kind)))
    return tuple(word for one in get_args(kind) for word in _choices(one))


def _of_parser(parser: argparse.ArgumentParser) -> Iterable[Flag]:
    for action in parser._actions:  # argparse has no public list of its flags
        if action.option_strings:
            takes = action.nargs != 0 and not isinstance(action, argparse.BooleanOptionalAction)
            yield Flag(tuple(action.option_strings), takes, tuple(map(str, action.choices or ())))


def _of_trainer() -> Iterable[Flag]:
    yield Flag(("--config",), takes=True)
    yield Flag(("--debug",), takes=False)
    for key, field in leaves(TrainConfig):
        flag = flag_of(key)
        if field.annotation is bool:
            yield Flag((flag, f"--no-{flag[2:]}"), takes=False)
        else:
            yield Flag((flag,), takes=True, choices=tuple(words_of(field)))


def _groups(verbs: Verbs) -> dict[str, list[str]]:
    """First word to the second words that may follow it."""
    found: dict[str, list[str]] = {}
    for verb in verbs:
        first, _, second = verb.partition(" ")
        found.setdefault(first, []).extend([second] if second else [])
    return found


_GLOBAL = "help --help --version --print-completion"


def _cases(verbs: Verbs) -> Iterable[str]:
    """Arms of a shell's ``case "$verb"``: flags, flags with free values, and the words of the rest."""
    for verb, flags in verbs.items():
        names = " ".join(name for flag in flags for name in flag.names)
        free = "|".join(name for flag in flags if flag.takes and not flag.choices for name in flag.names)
        yield f"    '{verb}')"
        yield f"      flags='{names}'"
        yield '      case "$previous" in'
        for flag in flags:
            if flag.choices:
                yield f"        {'|'.join(flag.names)}) choices='{' '.join(flag.choices)}' ;;"
        if free:
            yield f"        {free}) files=1 ;;"
        yield "      esac ;;"
    yield "    '--print-completion') choices='bash zsh fish' ;;"
    yield f"    help) choices='{' '.join(_groups(verbs))}' ;;"


def _first_words(verbs: Verbs, second: str) -> Iterable[str]:
    """Lines that complete the words of a verb; ``second`` is how a shell calls its second word."""
    groups = _groups(verbs)
    for first, seconds in groups.items():
        if seconds:
            yield f"    {first}) choices='{' '.join(seconds)}'; verb=\"{first} {second}\" ;;"


def bash(verbs: Verbs) -> str:
    """A script for bash; where it knows nothing to offer, readline completes files as ever."""
    return "\n".join(
        [
            "# Completion of apr-dist for bash: source <(apr-dist --print-completion bash)",
            "_apr_dist() {",
            '  local current="${COMP_WORDS[COMP_CWORD]}" previous="${COMP_WORDS[COMP_CWORD-1]}"',
            '  local verb="${COMP_WORDS[1]}" flags= choices= files=',
            "  COMPREPLY=()",
            "  [[ $current == = ]] && current=  # bash splits --flag=value at the sign",
            '  [[ $previous == = ]] && previous="${COMP_WORDS[COMP_CWORD-2]}"',
            "  if ((COMP_CWORD == 1)); then",
            f"    COMPREPLY=($(compgen -W '{' '.join(_groups(verbs))} {_GLOBAL}' -- \"$current\"))",
            "    return",
            "  fi",
            '  case "$verb" in',
            *_first_words(verbs, "${COMP_WORDS[2]}"),
            "  esac",
            "  if [[ -n $choices && $COMP_CWORD -gt 2 ]]; then choices=; fi",
            '  case "$verb" in',
            *_cases(verbs),
            "  esac",
            "  if [[ -n $choices ]]; then",
            '    COMPREPLY=($(compgen -W "$choices" -- "$current"))',
            "  elif [[ -z $files && $current == -* ]]; then",
            '    COMPREPLY=($(compgen -W "$flags" -- "$current"))',
            "  fi",
            "}",
            "complete -o bashdefault -o default -F _apr_dist apr-dist",
            "",
        ]
    )


def zsh(verbs: Verbs) -> str:
    """A script for zsh, to lie in its ``fpath``."""
    return "\n".join(
        [
            "#compdef apr-dist",
            "# Completion of apr-dist for zsh, as _apr-dist in a folder of $fpath",
            "_apr_dist() {",
            '  local previous="${words[CURRENT-1]}" verb="${words[2]}" flags= choices= files=',
            "  if ((CURRENT == 2)); then",
            f"    compadd -- {' '.join(_groups(verbs))} {_GLOBAL}",
            "    return",
            "  fi",
            '  case "$verb" in',
            *_first_words(verbs, "${words[3]}"),
            "  esac",
            "  if [[ -n $choices ]] && ((CURRENT > 3)); then choices=; fi",
            '  case "$verb" in',
            *_cases(verbs),
            "  esac",
            "  if [[ -n $choices ]]; then",
            "    compadd -- ${=choices}",
            "  elif [[ -z $files && $PREFIX == -* ]]; then",
            "    compadd -- ${=flags}",
            "  else",
            "    _files",
            "  fi",
            "}",
            '_apr_dist "$@"',
            "",
        ]
    )


def fish(verbs: Verbs) -> str:
    """A script for fish; an argument that is no flag completes as a file."""
    groups = _groups(verbs)
    lines = [
        "# Completion of apr-dist for fish, as completions/apr-dist.fish",
        "function __apr_dist_is  # whether the words before the cursor are these, and no more",
        "  set -l given (commandline -opc)",
        '  test "$given[2..-1]" = "$argv"',
        "end",
        "function __apr_dist_in  # whether the command line begins with this verb",
        "  set -l given (commandline -opc)",
        "  set -l last (math (count $argv) + 1)",
        '  test (count $given) -ge $last; and test "$given[2..$last]" = "$argv"',
        "end",
        f"complete -c apr-dist -n __apr_dist_is -f -a '{' '.join(groups)} {_GLOBAL}'",
        "complete -c apr-dist -n '__apr_dist_is --print-completion' -f -a 'bash zsh fish'",
        f"complete -c apr-dist -n '__apr_dist_is help' -f -a '{' '.join(groups)}'",
    ]
    for first, seconds in groups.items():
        if seconds:
            lines.append(f"complete -c apr-dist -n '__apr_dist_is {first}' -f -a '{' '.join(seconds)}'")
    for verb, flags in verbs.items():
        for flag in flags:
            names = " ".join(
                f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}" for name in flag.names
            )
            value = f" -x -a '{' '.join(flag.choices)}'" if flag.choices else " -r -F" if flag.takes else ""
            lines.append(f"complete -c apr-dist -n '__apr_dist_in {verb}' {names}{value}")
    return "\n".join([*lines, ""])


SCRIPTS: Mapping[str, Callable[[Verbs], str]] = {"bash": bash, "zsh": zsh, "fish": fish}
"""Shell to what writes its script."""
