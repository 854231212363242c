"""The parts of the documentation that are generated: each a function without arguments, giving Markdown."""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from cures import CURES
from refusals import Refusal, judged, refusals

from apr_dist import cli
from apr_dist.cli import VERBS
from apr_dist.contracts.overview import contract_rows
from apr_dist.contracts.repository import Repository, read_repository
from apr_dist.contracts.schema import Contract, Falsifier
from apr_dist.errors import ExitCode
from apr_dist.model.config import PRESETS
from apr_dist.model.families import GGUF_KEYS, HF_KEYS, TOKENIZER_KEYS, Effect, Family, Key

REPOSITORY = Path(__file__).resolve().parents[2]


def gates() -> str:
    """An entry for every falsifier, contract by contract: cause, and what to do."""
    found = read_repository(REPOSITORY)
    raised, verdicts = refusals(REPOSITORY), judged(REPOSITORY)
    lines: list[str] = []
    for contract in found.contracts:
        described = " ".join(contract.body.metadata.description.split())
        lines += [f"## {contract.id}", "", described, ""]
        for falsifier in contract.falsifiers:
            lines += [f"### {falsifier.id}", "", f"**{_text(falsifier.rule)}**", ""]
            lines += [f"Without it: {_lowered(_text(falsifier.if_fails))}", ""]
            if falsifier.id in raised:
                lines += _refused(raised[falsifier.id])
            elif falsifier.id in verdicts:
                lines += _judged(verdicts[falsifier.id], CURES[falsifier.id])
            else:
                lines += _property(found, contract, falsifier)
            lines.append("")
    return "\n".join(lines)


def _refused(raised: list[Refusal]) -> Iterator[str]:
    """What refusals say: each with what it found, then what they advise."""
    told = [one for one in raised if not re.fullmatch("<[^<>]*>", one.what)] or raised
    causes = dict.fromkeys(one.what + (f"; expected {one.expected}" if one.expected else "") for one in told)
    yield from _term("Cause", [_escaped(cause) for cause in causes])
    cures = list(dict.fromkeys(one.remedy for one in raised if one.remedy))
    named = "mend what the message names: what was found, where, and what was expected"
    yield from _term("Cure", [_escaped(cure) for cure in cures or [named]])
    codes = sorted({ExitCode[one.exit_code] for one in raised})
    yield from ("Exit code", f": {', '.join(f'{int(code)} ({code.name})' for code in codes)}")


def _term(term: str, texts: list[str]) -> Iterator[str]:
    """A term with its one description, or with a list of several."""
    yield term
    if len(texts) == 1:
        yield f": {texts[0]}"
    else:
        yield from (f"{': ' if text is texts[0] else '  '}- {text}" for text in texts)
    yield ""


def _judged(gates_of_it: list[tuple[str, str]], cure: str) -> Iterator[str]:
    """What the verdict of a run requires, and what to do when it was not measured."""
    causes = [
        f"{_escaped(gate)}: required {_escaped(required)}, and something else was measured"
        for gate, required in gates_of_it
    ]
    yield from _term("Cause", causes)
    yield from _term("Cure", [cure])


def _property(found: Repository, contract: Contract, falsifier: Falsifier) -> Iterator[str]:
    """A promise about the program itself, which no setting breaks."""
    owed = [one.property for one in contract.body.proof_obligations if one.id in falsifier.obligations]
    files = sorted({cited.file.as_posix() for cited in found.citations() if cited.id == falsifier.id})
    yield "Cause"
    yield (
        f": no file or setting: this is a property of the program ({_lowered(_text(owed[0]).rstrip('.'))})."
        f" What its tests try: {'; '.join(_text(one) for one in falsifier.counter_example_classes)}."
        + (f" It is decided in {', '.join(f'`{file}`' for file in files)}." if files else "")
    )
    yield from ("", "Cure")
    yield (
        f": a run that contradicts it has met a defect. In a checkout, `apr-dist contracts explain"
        f" {falsifier.id}` names the tests to run; report what they say."
    )


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
            window = f"all layers but every {facts.full_every}th, or as listed"
        normed = "all heads together" if facts.qk_norm_whole else "each head"
        norms = f"{facts.norms}{', times one plus weight' if facts.one_plus_norms else ''}"
        options = ", ".join(f"`{name}`" for name in facts.options) or "none"
        lines.append(
            f"| {family} | `{facts.hf_model_type}` | `{facts.hf_architecture}` |"
            f" {architecture} | {biases} | {norms} | {normed if facts.qk_norm else 'no'} |"
            f" {facts.activation} | {window} | {options} |"
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


def _text(text: str) -> str:
    return " ".join(text.split())


def _lowered(text: str) -> str:
    first = text.split(" ", 1)[0]
    return text if first.isupper() and len(first) > 1 else text[0].lower() + text[1:]


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
