"""The parts of the documentation that are generated: each a function without arguments, giving Markdown."""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from apr_dist import cli
from apr_dist.cli import VERBS
from apr_dist.contracts.entries import entries
from apr_dist.contracts.overview import contract_rows
from apr_dist.contracts.repository import read_repository
from apr_dist.model.config import PRESETS
from apr_dist.model.families import GGUF_KEYS, HF_KEYS, TOKENIZER_KEYS, Effect, Family, Key

REPOSITORY = Path(__file__).resolve().parents[2]


def gates() -> str:
    """An entry for every falsifier, contract by contract: cause, and what to do."""
    lines: list[str] = []
    contract = ""
    for entry in entries():
        if entry.contract != contract:
            contract = entry.contract
            lines += [f"## {contract}", "", entry.description, ""]
        lines += [f"### {entry.id}", "", f"**{entry.rule}**", "", f"Without it: {entry.without}", ""]
        lines += _term("Cause", [_escaped(cause) for cause in entry.causes])
        lines += _term("Fix", [_escaped(fix) for fix in entry.fixes])
        if entry.exit_codes:
            codes = ", ".join(f"{int(code)} ({code.name})" for code in entry.exit_codes)
            lines += ["Exit code", f": {codes}", ""]
    return "\n".join(lines)


def _term(term: str, texts: list[str]) -> Iterator[str]:
    """A term with its one description, or with a list of several."""
    yield term
    if len(texts) == 1:
        yield f": {texts[0]}"
    else:
        yield from (f"{': ' if text is texts[0] else '  '}- {text}" for text in texts)
    yield ""


def _escaped(text: str) -> str:
    """Text of a message as Markdown: its pointed brackets are no HTML."""
    return text.replace("<", "\\<").replace("*", "\\*").replace("_", "\\_")


def command_line() -> str:
    """Every verb with what its ``--help`` prints, and the trainer's."""
    lines = ["| verb | what it does |", "|---|---|"]
    for verb in VERBS:
        summary = (cli._load(verb).__doc__ or "").split("\n", 1)[0]
        anchor = f"apr-dist-{verb.replace(' ', '-')}"
        lines.append(f"| [`apr-dist {verb}`](#{anchor}) | {summary} |")
    for verb in VERBS:
        lines += ["", f"## apr-dist {verb}", "", "```text", _help(verb.split()).rstrip(), "```"]
    return "\n".join(lines)


def _help(verb: list[str]) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        cli.main([*verb, "--help"])
    plain = re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue())
    return "\n".join(line.rstrip() for line in plain.splitlines())


def contracts() -> str:
    """A row for each contract."""
    lines = [
        "| contract | version | status | tested falsifiers | what it promises |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| `{row.id}` | {row.version} | {row.status} | {row.bound} of {row.falsifiers} | {row.description} |"
        for row in contract_rows(read_repository(REPOSITORY))
    ]
    return "\n".join(lines)


def presets() -> str:
    """A row for each architecture that ``--model`` knows by name."""
    lines = [
        "| `--model` | family | parameters | layers | hidden | vocabulary |",
        "|---|---|---|---|---|---|",
    ]
    for name, model in PRESETS.items():
        lines.append(
            f"| `{name}` | {model.family} | {model.parameter_count():,} | {model.num_layers} |"
            f" {model.hidden_size:,} | {model.vocab_size:,} |"
        )
    return "\n".join(lines)


def families() -> str:
    """A row for each family: what names it, and what its block does differently."""
    lines = [
        "| family | `model_type` | class | GGUF | biases | norms | q and k normalised | MLP | window"
        " | options |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for family in Family:
        facts = family.definition
        biases = "q, k, v" if facts.qkv_bias else "none"
        if facts.optional_attention_bias:
            biases = "none, or q, k, v and o (`attention_bias`)"
        imported = "" if facts.gguf.imported else " (written only)"
        architecture = f"`{facts.gguf.architecture}`{imported}" if facts.gguf.exported else "refused"
        window = "as the file states" if facts.sliding_window else "no"
        if facts.full_every:
            window = f"all layers but one of {facts.full_every}, or as listed"
        normed = "all heads together" if facts.qk_norm_whole else "each head"
        norms = f"{facts.norms}{', times one plus weight' if facts.one_plus_norms else ''}"
        options = ", ".join(f"`{name}`" for name in facts.options) or "none"
        lines.append(
            f"| {family} | `{facts.hf_model_type}` | `{facts.hf_architecture}` |"
            f" {architecture} | {biases} | {norms} | {normed if facts.qk_norm else 'no'} |"
            f" {facts.activation}{', experts' if facts.experts else ''} | {window} | {options} |"
        )
    return "\n".join(lines)


def family_defaults() -> str:
    """A row for each key that a config.json may leave out, with each family's value."""
    keys = dict.fromkeys(key for family in Family for key in family.definition.hf_defaults)
    lines = [f"| key | {' | '.join(Family)} |", "|---" * (len(Family) + 1) + "|"]
    for key in keys:
        values = (family.definition.hf_defaults.get(key, "-") for family in Family)
        lines.append(f"| `{key}` | {' | '.join('derived' if one is None else str(one) for one in values)} |")
    return "\n".join(lines)


def config_keys() -> str:
    """What becomes of each key of a config.json."""
    lines = ["| key | family | what becomes of it | why |", "|---|---|---|---|"]
    lines += _key_rows("all", HF_KEYS)
    for family in Family:
        lines += _key_rows(family, family.definition.hf_keys)
    return "\n".join(lines)


def gguf_keys() -> str:
    """What becomes of each key of a GGUF file."""
    lines = ["| key | family | what becomes of it | why |", "|---|---|---|---|"]
    lines += _key_rows("all", {f"ARCHITECTURE.{key}": rule for key, rule in GGUF_KEYS.items()})
    lines += _key_rows("all", {f"tokenizer.{key}": rule for key, rule in TOKENIZER_KEYS.items()})
    for family in Family:
        lines += _key_rows(family, family.definition.gguf.keys)
    return "\n".join(lines)


def _key_rows(family: str, keys: Mapping[str, Key]) -> Iterator[str]:
    for key, rule in keys.items():
        effect = rule.effect.value
        if rule.effect is Effect.CHECKED:
            effect = f"must be {' or '.join(f'`{json.dumps(one)}`' for one in rule.accepted) or 'absent'}"
        yield f"| `{key}` | {family} | {effect} | {rule.why} |"


def configs() -> str:
    """A row for each shipped configuration: its first sentence."""
    lines = ["| file | what it is for |", "|---|---|"]
    for path in sorted((REPOSITORY / "configs").glob("*.yaml")):
        comment = " ".join(line[1:].strip() for line in path.read_text().splitlines() if line.startswith("#"))
        lines.append(f"| `configs/{path.name}` | {comment.split('. ')[0].removesuffix('.')}. |")
    return "\n".join(lines)


PARTS: Mapping[str, Callable[[], str]] = {
    "gates": gates,
    "command-line": command_line,
    "contracts": contracts,
    "presets": presets,
    "families": families,
    "family-defaults": family_defaults,
    "config-keys": config_keys,
    "gguf-keys": gguf_keys,
    "configs": configs,
}
"""Name in a page to what generates it."""
