"""Evidence: the kept outcome of a real run, how it is signed, and why one cannot be taken for good.

A folder under ``contracts/evidence/`` holds the ``verdict.json`` that a run was judged with, and beside it
the files that the verdict names with their digests. The signature is a digest over the verdict: it shows
that something was changed since, not who made it. Judging a run is in ``report``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from apr_dist.atomic_files import file_digest
from apr_dist.parsing import parse_json

SCHEMA = "apr-dist-evidence-v1"
RULES = 1
"""Version of the rules a run is judged by; evidence judged by others has to be made again."""

PACKAGE = Path(__file__).resolve().parent.parent
_SIGNATURE = "signature"


def package_digest(package: Path = PACKAGE) -> str:
    """``sha256:...`` over the Python sources of the package, by name and content: the code's version."""
    return sources_digest(package.rglob("*.py"), package)


def sources_digest(paths: Iterable[Path], root: Path) -> str:
    """``sha256:...`` over files, by their name below ``root`` and their content."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0")
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return "sha256:" + digest.hexdigest()


def signature(verdict: Mapping[str, Any]) -> str:
    """``sha256:...`` over everything a verdict says but its signature."""
    said = {key: value for key, value in verdict.items() if key != _SIGNATURE}
    text = json.dumps(said, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def sign(verdict: Mapping[str, Any]) -> dict[str, Any]:
    """The verdict with its schema, the version of the rules, and its signature."""
    whole = {"schema": SCHEMA, "rules": RULES, **verdict}
    return {**whole, _SIGNATURE: signature(whole)}


def read_verdict(path: Path) -> dict[str, Any] | str:
    """The signed verdict at ``path``, or why it is not one as it was signed."""
    try:
        verdict = parse_json(path.read_text(encoding="utf-8"))
    except OSError:
        return "does not exist"
    except ValueError:
        return "is not JSON"
    if not isinstance(verdict, dict) or not isinstance(verdict.get("gates"), list):
        return "has no list of gates"
    if verdict.get("schema") != SCHEMA or verdict.get(_SIGNATURE) != signature(verdict):
        return "is not as it was signed"
    if verdict.get("rules") != RULES:
        return f"was judged by rules {verdict.get('rules')}; these are {RULES}: make it again"
    return verdict


def evidence_problem(falsifier_id: str, path: Path) -> str | None:
    """Why the kept outcome of a run does not show this falsifier; None when it does.

    The file is the signed ``verdict.json`` of a run on real data with a passed gate of that id; the files
    it names lie beside it as they were, and nothing else does.
    """
    return folder_problem(path) or _gate_problem(falsifier_id, path)


def folder_problem(path: Path) -> str | None:
    """Why a kept outcome is none at all: missing, edited, stale, or of made-up data; None when it is one."""
    verdict = read_verdict(path)
    if isinstance(verdict, str):
        return verdict
    if verdict.get("synthetic"):
        return "is of a synthetic run"
    if verdict.get("rehearsal"):
        return "is of a rehearsal"
    named: Mapping[str, str] = verdict.get("files", {})
    for name, digest in named.items():
        file = path.parent / name
        if Path(name).name != name or not file.is_file():
            return f"names {name}, which is not beside it"
        if file_digest(file) != digest:
            return f"names {name}, which is not the file that was judged"
    strangers = {file.name for file in path.parent.iterdir()} - {path.name, *named}
    return f"does not name {min(strangers)}, which lies beside it" if strangers else None


def _gate_problem(falsifier_id: str, path: Path) -> str | None:
    verdict = read_verdict(path)
    gates = verdict["gates"] if isinstance(verdict, dict) else []
    own = [gate for gate in gates if isinstance(gate, dict) and gate.get("id") == falsifier_id]
    if not own:
        return f"has no gate {falsifier_id}"
    return None if all(gate.get("passed") is True for gate in own) else f"says {falsifier_id} failed"


def evidence_code(path: Path) -> str | None:
    """The package digest that a kept outcome was measured on; None where there is none."""
    verdict = read_verdict(path)
    code = verdict.get("signed", {}).get("code_digest") if isinstance(verdict, dict) else None
    return code if isinstance(code, str) else None
