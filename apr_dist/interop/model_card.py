"""The model card (README.md) of an exported folder, from what the file's metadata say."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import yaml

from apr_dist.apr.metadata import AprMetadata

_OURS: Final = "apr_dist."
_CARRIED = frozenset({"files", "hf_config"})  # other files of the folder, not facts of a training
_FACTS = (
    ("architecture", "Architecture"),
    ("param_count", "Parameters"),
    ("num_layers", "Layers"),
    ("hidden_size", "Hidden size"),
    ("num_heads", "Heads"),
    ("num_kv_heads", "KV heads"),
    ("vocab_size", "Vocabulary"),
    ("max_position_embeddings", "Positions"),
    ("source", "Source"),
    ("data_source", "Data"),
    ("data_license", "Data license"),
)
_LONGEST = 200


def model_card(metadata: AprMetadata) -> str:
    """Markdown with front matter: who the model is, what it was trained on, and its verdict.

    Every value of an ``apr_dist.*`` key that is a number, a short text or a flat table is listed
    under "Training"; a key whose name ends in ``verdict`` has a section of its own.
    """
    values = metadata.to_mapping()
    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if metadata.license:
        front["license"] = metadata.license
    parts = [f"---\n{yaml.safe_dump(front, sort_keys=True)}---\n\n# {metadata.name or 'Model'}\n"]
    if metadata.description:
        parts.append(f"\n{metadata.description}\n")
    parts.append(_table("Model", [(label, values[key]) for key, label in _FACTS if values.get(key)]))
    ours = {key.removeprefix(_OURS): value for key, value in values.items() if key.startswith(_OURS)}
    ours = {key: value for key, value in ours.items() if key not in _CARRIED}
    verdicts = {key: value for key, value in ours.items() if key.endswith("verdict")}
    parts.append(
        _table("Training", [row for key in ours if key not in verdicts for row in _rows(key, ours[key])])
    )
    parts.append(_table("Verdict", [row for key, value in verdicts.items() for row in _rows(key, value)]))
    return "".join(parts)


def _rows(key: str, value: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(value, dict):
        for inner, item in value.items():
            yield from ((f"{key}.{inner}", item),) if _short(item) else ()
    elif _short(value):
        yield key, value


def _short(value: Any) -> bool:
    return isinstance(value, bool | int | float) or (
        isinstance(value, str) and len(value) <= _LONGEST and "\n" not in value
    )


def _table(title: str, rows: list[tuple[str, Any]]) -> str:
    if not rows:
        return ""
    lines = [f"| {_cell(label)} | {_cell(value)} |\n" for label, value in rows]
    return f"\n## {title}\n\n| | |\n|---|---|\n" + "".join(lines)


def _cell(value: Any) -> str:
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return text.replace("|", "\\|")
