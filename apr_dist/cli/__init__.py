"""The front door of everything but training: ``apr-dist VERB ...``.

Parses, calls one function, prints. Verbs are imported when they are called, so that ``--help`` and
a refusal take no longer than they must.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import tyro

from apr_dist.errors import AprDistError, ExitCode, Interrupted, Terminated, UsageError, as_known
from apr_dist.version import __version__

VERBS: Mapping[str, str] = {
    "import": "files:import_file",
    "export": "files:export_file",
    "inspect": "files:inspect",
    "validate": "files:validate",
    "stamp": "files:stamp",
    "diff": "files:diff",
    "generate": "generate:generate",
    "plan": "plan:plan",
    "profile": "profile:profile",
    "report": "report:report",
    "replay": "replay:replay",
    "verdict": "verdict:verdict",
    "doctor": "doctor:doctor",
    "config show": "config:show",
    "config check": "config:check",
    "config diff": "config:diff",
    "contracts validate": "contracts:validate",
    "contracts lint": "contracts:lint",
    "contracts status": "contracts:status",
    "contracts explain": "contracts:explain",
    "tokenize import-hf": "tokens:import_hf",
    "tokenize encode-corpus": "tokens:encode",
    "tokenize encode-chat": "chats:encode_chat",
    "tokenize preview": "chats:preview",
    "tokenize verify": "tokens:verify",
    "tokenize repair-manifest": "tokens:repair",
    "tokenize decode": "tokens:decode",
}
"""Verb to ``room:function`` under this package."""

OWN_FLAGS = ("plan", "profile")
"""Verbs that take the trainer's flags and parse them as the trainer does."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; its error is one paragraph on stderr and a documented exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [argument for argument in given if argument != "--debug"]
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        return _dispatch(given)
    except BrokenPipeError:  # the reader of a pipe, such as head, had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return int(ExitCode.OK)
    except KeyboardInterrupt:
        return int(_conclude(Interrupted("interrupted; nothing half-written was left behind"), debug=debug))
    except Exception as error:  # the front door: no bare traceback leaves it
        return int(_conclude(as_known(error), debug=debug))
    finally:
        signal.signal(signal.SIGTERM, before)


def _conclude(error: AprDistError, *, debug: bool) -> ExitCode:
    if not error.told_by_rank_0:
        print(f"error: {error}", file=sys.stderr)
        if error.page:
            print(f"cause and cure: {error.page}", file=sys.stderr)
    if debug:
        traceback.print_exc()
    return error.exit_code


def _terminate(*_: object) -> NoReturn:
    raise Terminated("terminated; nothing half-written was left behind")


def _dispatch(given: list[str]) -> int:
    if given in (["--version"], ["version"]):
        print(f"apr-dist {__version__}")
        return 0
    if given[:1] == ["--print-completion"]:
        return _print_completion(given[1:])
    words = 2 if given and any(verb.startswith(given[0] + " ") for verb in VERBS) else 1
    verb, rest = " ".join(given[:words]), given[words:]
    if verb in OWN_FLAGS:
        return int(_load(verb)(rest) or 0)
    if verb in VERBS:
        result = tyro.cli(
            _load(verb),
            prog=f"apr-dist {verb}",
            args=rest,
            config=(tyro.conf.FlagCreatePairsOff, tyro.conf.EnumChoicesFromValues),
        )
        return int(result or 0)
    _list_verbs(verb)
    return 0 if verb in ("", "-h", "--help") or "--help" in given else int(ExitCode.USAGE)


def _print_completion(asked: list[str]) -> int:
    from apr_dist.cli.completion import Shell, print_completion  # noqa: PLC0415  (loads every verb)

    if len(asked) != 1 or asked[0] not in list(Shell):
        raise UsageError("--print-completion takes one shell", expected=", ".join(Shell))
    print_completion(Shell(asked[0]), {verb: _plain if verb in OWN_FLAGS else _load(verb) for verb in VERBS})
    return 0


def _plain() -> None:
    """Stands for a verb whose flags are the trainer's and are parsed by it."""


def _load(verb: str) -> Callable[..., Any]:
    room, function = VERBS[verb].split(":")
    found: Callable[..., Any] = getattr(importlib.import_module(f"apr_dist.cli.{room}"), function)
    return found


def _list_verbs(asked: str) -> None:
    group = asked.split(" ", 1)[0]
    chosen = [verb for verb in VERBS if verb.startswith(group + " ")] or list(VERBS)
    unknown = asked not in ("", "-h", "--help") and not any(verb.startswith(group) for verb in VERBS)
    stream = sys.stderr if unknown else sys.stdout
    if unknown:
        print(f"error: there is no verb {asked!r}{_did_you_mean(group)}.", file=stream)
    print("usage: apr-dist VERB [--help] ...\n\nverbs:", file=stream)
    for verb in chosen:
        summary = (_load(verb).__doc__ or "").split("\n", 1)[0]
        print(f"  {verb:<28}{summary}", file=stream)
    print("\nExample: apr-dist import model.gguf -o model.apr", file=stream)


def _did_you_mean(word: str) -> str:
    from apr_dist.config import nearest  # noqa: PLC0415  (only an error needs it)

    close = nearest(word, list(VERBS))
    return f"; did you mean {close!r}?" if close else ""
