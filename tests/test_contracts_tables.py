"""Every cell of the decision tables in ``contracts/``, tried on the code that decides it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from apr_dist.config import parse_command_line
from apr_dist.contracts.repository import read_contracts
from apr_dist.errors import AprDistError
from apr_dist.gates.architecture import HeadFacts, check_dimensions, check_family
from apr_dist.gates.vocabulary import check_tokenizer
from apr_dist.model.config import Family, parameter_shapes, preset

ROOT = Path(__file__).resolve().parent.parent
TABLES = {table.id: table for contract in read_contracts(ROOT)[0] for table in contract.body.decision_tables}
WHERE = Path("model.apr")


def cells(table: str) -> pytest.MarkDecorator:
    """One case for every cell of that table."""
    listed = TABLES[table].cells
    names = [" ".join(str(value) for key, value in cell.items() if key != "outcome") for cell in listed]
    return pytest.mark.parametrize("cell", listed, ids=names)


NAMES = {
    "llama": list(parameter_shapes(preset("smollm2-135m"))),
    "qwen2": list(parameter_shapes(preset("qwen2.5-0.5b"))),
    "unknown": ["blk.0.attn_q.weight", "token_embd.weight"],
}


@pytest.mark.falsifies("FALSIFY-INIT-ARCH-MATCH-001")
@cells("DT-INIT-ARCH-MATCH")
def test_metadata_against_tensor_names(cell: dict[str, Any]) -> None:
    metadata = {} if cell["metadata"] == "none" else {"hf_architecture": cell["metadata"]}
    # A claim that cannot be mapped is no witness against the names.
    try:
        family = check_family(metadata, NAMES[cell["names"]], where=WHERE)
    except AprDistError as refused:
        assert refused.falsifier == cell["outcome"]
    else:
        assert cell["outcome"] == "accepted"
        shown = (
            cell["names"]
            if cell["names"] != "unknown"
            else cell["metadata"].removesuffix("ForCausalLM").lower()
        )
        assert family is Family(shown)


@cells("DT-ARCH-VOCABULARY")
def test_tokenizer_against_rows(cell: dict[str, Any]) -> None:
    effective = {"smaller": 511, "equal": 512, "larger": 513}[cell["tokenizer"]]
    try:
        check_tokenizer(effective=effective, model_vocab=512, from_init=cell["init"], where=WHERE)
    except AprDistError as refused:
        assert refused.falsifier == cell["outcome"]
    else:
        assert cell["outcome"] == "accepted"


@cells("DT-TIED-HEAD")
def test_tie_claim_against_tensors(cell: dict[str, Any]) -> None:
    metadata = preset("qwen2.5-0.5b").to_metadata()
    metadata.pop("tie_word_embeddings", None)
    if cell["claim"] != "none":
        metadata["tie_word_embeddings"] = cell["claim"] == "true"
    equal = {"absent": None, "equal": True, "different": False}[cell["head"]]
    head = HeadFacts(present=cell["head"] != "absent", equals_embedding=equal)
    try:
        config = check_dimensions(metadata, head, family=Family.QWEN2, where=WHERE)
    except AprDistError as refused:
        assert refused.falsifier == cell["outcome"]
    else:
        assert ("tied" if config.tie_word_embeddings else "untied") == cell["outcome"]


EXPLICIT = {"lr": "1e-2", "warmup-steps": "7", "target-val-loss": "1.5"}


@pytest.mark.falsifies("INV-TRAIN-009")
@cells("DT-MODE-DEFAULTS")
def test_mode_defaults(cell: dict[str, Any]) -> None:
    flags = ["--mode", cell["mode"]]
    if cell["flag"] != "none":
        flags += [f"--{cell['flag']}", EXPLICIT[cell["flag"]]]
    config = parse_command_line(flags).config.resolved()
    assert f"{config.lr} {config.warmup_steps} {config.target_val_loss}" == cell["outcome"]
