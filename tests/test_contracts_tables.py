"""Every cell of the decision tables in ``contracts/``, tried on the code that decides it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from apr_dist.config.reading import parse_command_line
from apr_dist.contracts.repository import read_contracts
from apr_dist.errors import AprDistError
from apr_dist.gates.architecture import HeadFacts, check_dimensions, check_family
from apr_dist.gates.vocabulary import check_tokenizer
from apr_dist.model.config import preset
from apr_dist.model.families import Family

ROOT = Path(__file__).resolve().parent.parent
TABLES = {table.id: table for contract in read_contracts(ROOT)[0] for table in contract.body.decision_tables}
WHERE = Path("model.apr")


def cells(table: str) -> pytest.MarkDecorator:
    """One case for every cell of that table."""
    listed = TABLES[table].cells
    names = [" ".join(str(value) for key, value in cell.items() if key != "outcome") for cell in listed]
    return pytest.mark.parametrize("cell", listed, ids=names)


def outcome(decide: Callable[[], object]) -> str:
    """What a gate answers: the id it refuses with, or what it returns as text."""
    try:
        return str(decide())
    except AprDistError as refused:
        return str(refused.falsifier)


NAMES = {
    "llama": list(preset("smollm2-135m").parameter_shapes()),
    "qwen2": list(preset("qwen2.5-0.5b").parameter_shapes()),
    "unknown": ["blk.0.attn_q.weight", "token_embd.weight"],
}


@pytest.mark.falsifies("FALSIFY-INIT-ARCH-MATCH-001")
@cells("DT-INIT-ARCH-MATCH")
def test_metadata_against_tensor_names(cell: dict[str, Any]) -> None:
    metadata = {} if cell["metadata"] == "none" else {"hf_architecture": cell["metadata"]}
    names = NAMES[cell["names"]]
    known = cell["names"] if cell["names"] != "unknown" else cell["metadata"].removesuffix("ForCausalLM")
    expected = known.lower() if cell["outcome"] == "accepted" else cell["outcome"]
    assert outcome(lambda: check_family(metadata, names, where=WHERE).value) == expected


@pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-ARCH-010", "FALSIFY-APR-PRETRAIN-ARCH-006")
@cells("DT-ARCH-VOCABULARY")
def test_tokenizer_against_rows(cell: dict[str, Any]) -> None:
    tokens = {"smaller": 511, "equal": 512, "larger": 513}[cell["tokenizer"]]
    expected = "None" if cell["outcome"] == "accepted" else cell["outcome"]
    from_init = bool(cell["init"])
    found = outcome(
        lambda: check_tokenizer(effective=tokens, model_vocab=512, from_init=from_init, where=WHERE)
    )
    assert found == expected


@pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-003")
@cells("DT-TIED-HEAD")
def test_tie_claim_against_tensors(cell: dict[str, Any]) -> None:
    metadata = preset("qwen2.5-0.5b").to_metadata()
    metadata.pop("tie_word_embeddings", None)
    if cell["claim"] != "none":
        metadata["tie_word_embeddings"] = cell["claim"] == "true"
    equal = {"absent": None, "equal": True, "different": False}[cell["head"]]
    head = HeadFacts(present=cell["head"] != "absent", equals_embedding=equal)

    def decide() -> str:
        config = check_dimensions(metadata, head, family=Family.QWEN2, where=WHERE)
        return "tied" if config.tie_word_embeddings else "untied"

    assert outcome(decide) == cell["outcome"]


EXPLICIT = {"lr": "1e-2", "warmup-steps": "7", "target-val-loss": "1.5"}


@pytest.mark.falsifies("INV-TRAIN-009")
@cells("DT-MODE-DEFAULTS")
def test_mode_defaults(cell: dict[str, Any]) -> None:
    flags = ["--mode", cell["mode"]]
    if cell["flag"] != "none":
        flags += [f"--{cell['flag']}", EXPLICIT[cell["flag"]]]
    config = parse_command_line(flags).config.resolved()
    assert f"{config.lr} {config.warmup_steps} {config.target_val_loss}" == cell["outcome"]
