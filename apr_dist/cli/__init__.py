"""The entry point of everything but training: ``apr-dist VERB ...``.

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
    "train": "train:train",
    "import": "files:import_file",
    "export": "files:export_file",
    "inspect": "files:inspect",
    "validate": "files:validate",
    "stamp": "files:stamp",
    "diff": "files:diff",
    "merge": "adapters:merge",
    "generate": "generate:generate",
    "eval": "evaluate:evaluate",
    "plan": "plan:plan",
    "profile": "profile:profile",
    "report": "report:report",
    "replay": "replay:replay",
    "verdict": "verdict:verdict",
    "doctor": "doctor:doctor",
    "explain": "explain:explain",
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

OWN_FLAGS = ("train", "plan", "profile")
"""Verbs that take the trainer's flags and parse them as the trainer does."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; its error is one paragraph on stderr and a documented exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    if given[:1] != ["train"]:  # the trainer reads this flag itself
        given = [argument for argument in given if argument != "--debug"]
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        return _dispatch(given)
    except BrokenPipeError:  # the reader of a pipe, such as head, had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return int(ExitCode.OK)
    except KeyboardInterrupt:
        return int(_conclude(Interrupted("interrupted; nothing half-written was left behind"), debug=debug))
    except Exception as error:  # the entry point: no bare traceback leaves it
        return int(_conclude(as_known(error), debug=debug))
    finally:
        signal.signal(signal.SIGTERM, before)


def _conclude(error: AprDistError, *, debug: bool) -> ExitCode:
    if not error.told_by_rank_0:
        print(f"error: {error}", file=sys.stderr)
        if error.page:
            print(f"see: {error.page}", file=sys.stderr)
    if debug:
        traceback.print_exc()
    return error.exit_code


def _terminate(*_: object) -> NoReturn:
    raise Terminated("terminated; nothing half-written was left behind")


def _dispatch(given: list[str]) -> int:
    if given in (["--version"], ["version"], ["-v"], ["-V"]):
        print(f"apr-dist {__version__}")
        return 0
    if given[:1] == ["--print-completion"]:
        return _print_completion(given[1:])
    if given[:1] == ["help"]:
        given = [*given[1:], "--help"]
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
    return _list_verbs(given)


def _print_completion(asked: list[str]) -> int:
    from apr_dist.cli.completion import SCRIPTS, flags_of  # noqa: PLC0415  (loads every verb)

    if len(asked) != 1 or asked[0] not in SCRIPTS:
        raise UsageError("--print-completion takes one shell", expected=", ".join(SCRIPTS))
    print(SCRIPTS[asked[0]]({verb: flags_of(verb, _load(verb)) for verb in VERBS}), end="")
    return 0


def _load(verb: str) -> Callable[..., Any]:
    module, function = VERBS[verb].split(":")
    found: Callable[..., Any] = getattr(importlib.import_module(f"apr_dist.cli.{module}"), function)
    return found


def _list_verbs(given: Sequence[str]) -> int:
    """Print the verbs, of one group if one was named; first what is wrong with what was asked."""
    asked = [word for word in given if word not in ("-h", "--help")]
    group = [verb for verb in VERBS if asked and verb.startswith(f"{asked[0]} ")]
    right = not asked or (bool(group) and len(asked) == 1 and len(given) > 1)
    unknown = not right and (not group or len(asked) > 1)
    stream = sys.stdout if right else sys.stderr
    if unknown:
        from apr_dist.cli.words import meant_by  # noqa: PLC0415  (only an error needs it)

        close = meant_by(asked, list(VERBS))
        shown = " ".join(asked[: 2 if group else 1])
        hint = f"; did you mean 'apr-dist {close}'?" if close else ""
        print(f"error: there is no verb {shown!r}{hint}", file=stream)
    print("usage: apr-dist VERB [--help] ...\n\nverbs:", file=stream)
    for verb in group or VERBS:
        summary = (_load(verb).__doc__ or "").split("\n", 1)[0]
        print(f"  {verb:<28}{summary}", file=stream)
    print("\nExample: apr-dist import model.gguf -o model.apr", file=stream)
    return 0 if right else int(ExitCode.USAGE)
