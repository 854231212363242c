"""Verbs over configurations: show, check, compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from apr_dist.config import TrainConfig
from apr_dist.config.text import (
    commented_yaml,
    differences,
    json_schema,
    load_config,
    markdown_reference,
    problems,
)
from apr_dist.errors import ExitCode, UsageError

Source = Annotated[Path, tyro.conf.Positional]


def show(
    source: Annotated[Path | None, tyro.conf.Positional] = None,
    /,
    *,
    resolved: bool = False,
    given: bool = False,
    schema: bool = False,
    markdown: bool = False,
) -> None:
    """Print every key with its type, default and meaning, as YAML that a run reads.

    Example: apr-dist config show configs/demo.yaml > mine.yaml

    Args:
        source: YAML file or run folder whose values to show; by default the defaults.
        resolved: fill in what the mode sets (learning rate, warm-up, target).
        given: only the keys that the file gives.
        schema: print the JSON Schema for editors instead.
        markdown: print the reference page instead.
    """
    if schema and markdown:
        raise UsageError("--schema and --markdown were both given", expected="one of them")
    if schema or markdown:
        print(json_schema() if schema else markdown_reference(), end="")
        return
    config = load_config(source) if source else TrainConfig()
    print(commented_yaml(config.resolved() if resolved else config, given_only=given), end="")


def check(sources: Annotated[tuple[Path, ...], tyro.conf.Positional], /) -> int:
    """List every problem of configuration files; exit code 2 when there is one.

    Example: apr-dist config check configs/*.yaml

    Args:
        sources: YAML files.
    """
    code = ExitCode.OK
    for path in sources:
        found = problems(path)
        print(f"{path}: {'valid' if not found else f'{len(found)} problem(s)'}")
        for problem in found:
            print(f"  {problem.key}: {problem.text}")
            code = ExitCode.USAGE
    return int(code)


def diff(left: Source, right: Source, /) -> None:
    """List the keys that two configurations disagree on, mode defaults filled in.

    Example: apr-dist config diff runs/first runs/second

    Args:
        left: YAML file or run folder.
        right: YAML file or run folder.
    """
    found = differences(load_config(left), load_config(right))
    width = max((len(one.key) for one in found), default=0)
    for one in found:
        print(f"{one.key:<{width}}  {one.left} -> {one.right}")
    if not found:
        print("no difference")
