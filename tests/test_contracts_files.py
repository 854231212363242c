"""The contracts of this project, held against its own suite and sources."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from apr_dist.contracts.lint import LintReport, lint
from apr_dist.contracts.repository import Repository, read_repository

ROOT = Path(__file__).resolve().parent.parent

IDS = {
    "apr-pretrain-from-init-v1": [f"FALSIFY-APR-PRETRAIN-INIT-{n:03}" for n in range(1, 11)]
    + ["FALSIFY-INIT-ARCH-MATCH-001"],
    "apr-pretrain-arch-polymorphic-v1": [f"FALSIFY-APR-PRETRAIN-ARCH-{n:03}" for n in range(1, 11)]
    + [f"FALSIFY-APR-PRETRAIN-ARCH-CUDA-{n:03}" for n in range(1, 4)],
    "apr-pretrain-init-finetune-v1": [f"FALSIFY-APR-PRETRAIN-INIT-FINETUNE-{n:03}" for n in range(1, 8)],
    "training-loop-pretrain-v1": [f"INV-TRAIN-{n:03}" for n in range(1, 12)],
    "apr-dist-token-loader-v1": [f"FALSIFY-TOK-IMPORT-HF-{n:03}" for n in range(1, 6)]
    + [f"FALSIFY-REPAIR-MANIFEST-{n:03}" for n in range(1, 7)],
    "apr-dist-trainer-v1": [f"FALSIFY-APR-DIST-TRAINER-{n:03}" for n in range(20, 36)],
    "apr-dist-distributed-v1": [],
    "apr-dist-checkpoint-v1": [],
    "apr-dist-adapter-v1": [],
}
"""Ids whose meaning is fixed: those of the published contracts, and one for each defect known."""


@pytest.fixture(scope="module")
def repository() -> Repository:
    """Contracts and tests alone: what an earlier run recorded must not decide this one."""
    return replace(read_repository(ROOT), results={})


@pytest.fixture(scope="module")
def report(repository: Repository) -> LintReport:
    return lint(repository)


def findings_in(report: LintReport, contract: str) -> list[str]:
    return [str(finding) for finding in report.findings if finding.file.stem == contract]


@pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-INIT-008")
def test_the_contract_of_the_init_passes_every_gate(report: LintReport) -> None:
    assert not findings_in(report, "apr-pretrain-from-init-v1")


@pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-ARCH-008")
def test_the_contract_of_the_architecture_passes_every_gate(report: LintReport) -> None:
    assert not findings_in(report, "apr-pretrain-arch-polymorphic-v1")


def test_every_contract_test_and_cited_id_passes_every_gate(report: LintReport) -> None:
    assert not [str(finding) for finding in report.findings]


@pytest.mark.parametrize("contract", IDS)
def test_the_published_ids_are_all_there(repository: Repository, contract: str) -> None:
    own = next(found for found in repository.contracts if found.id == contract)
    assert set(IDS[contract]) <= {falsifier.id for falsifier in own.falsifiers}


def test_there_is_no_other_contract(repository: Repository) -> None:
    assert {contract.id for contract in repository.contracts} == set(IDS)
