"""Every kind of broken input, on one rank and on two, with an init file and without.

Each ends with the id of its falsifier and its documented exit code on every rank, told once, and leaves no
run folder that could be taken for a run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from builders.broken_inputs import EMBEDDING, FROM_SCRATCH, WITH_INIT, Arrays, Case
from builders.warm_ranks import Ended, WarmRanks

from apr_dist.apr.reader import AprReader
from apr_dist.errors import ExitCode

if TYPE_CHECKING:
    from builders.runs import Inputs


@pytest.fixture
def case(inputs: Inputs, tmp_path: Path) -> Iterator[Case]:
    with ExitStack() as stack:
        yield Case(inputs, tmp_path, stack, {"--run-dir": str(tmp_path / "run"), "--num-steps": "0"})


def launched(case: Case, ranks: WarmRanks, world_size: int) -> Ended:
    usual = case.inputs.data_flags()
    given = dict(zip(usual[::2], usual[1::2], strict=True)) | case.flags
    flags = [part for flag, value in given.items() if value for part in (flag, value)]
    return ranks.launch(flags, world_size=world_size, unprivileged=case.unprivileged)


def check_refused(case: Case, ended: Ended, code: ExitCode, falsifier: str | None) -> None:
    """What every refusal has in common."""
    assert ended.codes == (code,) * len(ended.codes), ended.errors
    said = [line for text in ended.errors for line in text.splitlines() if line.startswith("error")]
    assert len(said) == 1, "told once, by rank 0"
    assert falsifier is None or f"[{falsifier}]" in said[0], said[0]
    assert "Traceback" not in "".join(ended.errors)
    run = Path(case.flags["--run-dir"])
    assert not run.exists() or [path.name for path in run.iterdir()] == ["notes.txt"]


@pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-012", "FALSIFY-APR-DIST-DISTRIBUTED-003")
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(
    ("fault", "code", "falsifier"),
    [
        pytest.param(
            "missing",
            ExitCode.GATE,
            "FALSIFY-APR-DIST-TRAINER-004",
            marks=pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-004"),
        ),
        pytest.param(
            "extra",
            ExitCode.GATE,
            "FALSIFY-APR-DIST-TRAINER-006",
            marks=pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-006"),
        ),
        pytest.param(
            "renamed",
            ExitCode.GATE,
            "FALSIFY-APR-DIST-TRAINER-004",
            marks=pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-004"),
        ),
        pytest.param(
            "wrong shape",
            ExitCode.GATE,
            "FALSIFY-APR-DIST-TRAINER-005",
            marks=pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-005"),
        ),
        pytest.param(
            "transposed",
            ExitCode.GATE,
            "FALSIFY-APR-DIST-TRAINER-005",
            marks=pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-005"),
        ),
        pytest.param(
            "NaN",
            ExitCode.GATE,
            "FALSIFY-APR-DIST-TRAINER-007",
            marks=pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-007"),
        ),
        pytest.param(
            "zero",
            ExitCode.GATE,
            "FALSIFY-APR-DIST-TRAINER-007",
            marks=pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-007"),
        ),
        pytest.param(
            "wrong dtype",
            ExitCode.GATE,
            "FALSIFY-APR-DIST-TRAINER-013",
            marks=pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-013"),
        ),
        pytest.param(
            "untied without a head",
            ExitCode.GATE,
            "FALSIFY-APR-DIST-TRAINER-003",
            marks=pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-003"),
        ),
        pytest.param(
            "doubly tied",
            ExitCode.GATE,
            "FALSIFY-APR-DIST-TRAINER-003",
            marks=pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-003"),
        ),
        pytest.param(
            "encoder",
            ExitCode.GATE,
            "FALSIFY-APR-PRETRAIN-ARCH-007",
            marks=pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-ARCH-007"),
        ),
        pytest.param(
            "unknown family",
            ExitCode.GATE,
            "FALSIFY-APR-PRETRAIN-INIT-005",
            marks=pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-INIT-005"),
        ),
        pytest.param(
            "metadata absent",
            ExitCode.GATE,
            "FALSIFY-APR-PRETRAIN-INIT-005",
            marks=pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-INIT-005"),
        ),
        pytest.param(
            "metadata contradicting the names",
            ExitCode.GATE,
            "FALSIFY-INIT-ARCH-MATCH-001",
            marks=pytest.mark.falsifies("FALSIFY-INIT-ARCH-MATCH-001"),
        ),
        pytest.param(
            "metadata contradicting the shapes",
            ExitCode.GATE,
            "FALSIFY-APR-DIST-TRAINER-006",
            marks=pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-006"),
        ),
        pytest.param(
            "names of GGUF",
            ExitCode.GATE,
            "FALSIFY-APR-DIST-TRAINER-004",
            marks=pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-004"),
        ),
        pytest.param(
            "truncated",
            ExitCode.MODEL_FILE,
            "FALSIFY-APR-DIST-CHECKPOINT-001",
            marks=pytest.mark.falsifies("FALSIFY-APR-DIST-CHECKPOINT-001"),
        ),
        pytest.param(
            "bit-flipped",
            ExitCode.MODEL_FILE,
            "FALSIFY-APR-DIST-CHECKPOINT-001",
            marks=pytest.mark.falsifies("FALSIFY-APR-DIST-CHECKPOINT-001"),
        ),
        pytest.param(
            "empty",
            ExitCode.MODEL_FILE,
            "FALSIFY-APR-PRETRAIN-INIT-004",
            marks=pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-INIT-004"),
        ),
        pytest.param(
            "wrong magic",
            ExitCode.MODEL_FILE,
            "FALSIFY-APR-PRETRAIN-INIT-004",
            marks=pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-INIT-004"),
        ),
        pytest.param(
            "v1 magic",
            ExitCode.MODEL_FILE,
            "FALSIFY-APR-PRETRAIN-INIT-004",
            marks=pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-INIT-004"),
        ),
        pytest.param(
            "directory",
            ExitCode.MODEL_FILE,
            "FALSIFY-APR-PRETRAIN-INIT-003",
            marks=pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-INIT-003"),
        ),
        pytest.param(
            "FIFO",
            ExitCode.MODEL_FILE,
            "FALSIFY-APR-PRETRAIN-INIT-003",
            marks=pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-INIT-003"),
        ),
        pytest.param(
            "permission denied",
            ExitCode.MODEL_FILE,
            "FALSIFY-APR-PRETRAIN-INIT-003",
            marks=pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-INIT-003"),
        ),
        pytest.param(
            "missing file",
            ExitCode.MODEL_FILE,
            "FALSIFY-APR-PRETRAIN-INIT-003",
            marks=pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-INIT-003"),
        ),
        pytest.param(
            "oversize tokenizer",
            ExitCode.GATE,
            "FALSIFY-APR-PRETRAIN-ARCH-010",
            marks=pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-ARCH-010"),
        ),
        pytest.param(
            "wrong tokenizer",
            ExitCode.GATE,
            "FALSIFY-APR-DIST-TRAINER-009",
            marks=pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-009"),
        ),
        pytest.param(
            "held-out shards trained on",
            ExitCode.DATA,
            "FALSIFY-APR-DIST-TRAINER-011",
            marks=pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-011"),
        ),
        pytest.param(
            "a token without a row",
            ExitCode.GATE,
            "FALSIFY-APR-DIST-TRAINER-008",
            marks=pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-008"),
        ),
        pytest.param("manifest a FIFO", ExitCode.DATA, None),
        pytest.param("tokenizer a FIFO", ExitCode.DATA, None),
        pytest.param(
            "occupied run folder",
            ExitCode.OUTPUT,
            "FALSIFY-APR-DIST-CHECKPOINT-003",
            marks=pytest.mark.falsifies("FALSIFY-APR-DIST-CHECKPOINT-003"),
        ),
    ],
)
def test_with_an_init_every_rank_refuses(
    fault: str,
    code: ExitCode,
    falsifier: str | None,
    world_size: int,
    case: Case,
    ranks: WarmRanks,
    record_property: Callable[[str, object], None],
) -> None:
    case.flags["--init"] = str(case.inputs.pretrained)
    WITH_INIT[fault](case)
    ended = launched(case, ranks, world_size)
    record_property("seconds", ended.seconds)
    check_refused(case, ended, code, falsifier)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(
    ("fault", "code", "falsifier"),
    [
        pytest.param(
            "encoder",
            ExitCode.GATE,
            "FALSIFY-APR-PRETRAIN-ARCH-007",
            marks=pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-ARCH-007"),
        ),
        pytest.param(
            "unknown family",
            ExitCode.GATE,
            "FALSIFY-APR-PRETRAIN-INIT-005",
            marks=pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-INIT-005"),
        ),
        pytest.param(
            "metadata absent",
            ExitCode.GATE,
            "FALSIFY-APR-PRETRAIN-INIT-005",
            marks=pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-INIT-005"),
        ),
        pytest.param(
            "a dimension absent",
            ExitCode.GATE,
            "FALSIFY-APR-PRETRAIN-INIT-005",
            marks=pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-INIT-005"),
        ),
        pytest.param(
            "metadata contradicting itself",
            ExitCode.GATE,
            "FALSIFY-INIT-ARCH-MATCH-001",
            marks=pytest.mark.falsifies("FALSIFY-INIT-ARCH-MATCH-001"),
        ),
        pytest.param(
            "impossible dimension",
            ExitCode.GATE,
            "FALSIFY-APR-PRETRAIN-INIT-005",
            marks=pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-INIT-005"),
        ),
        pytest.param(
            "reserved rows",
            ExitCode.GATE,
            "FALSIFY-APR-PRETRAIN-ARCH-006",
            marks=pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-ARCH-006"),
        ),
        pytest.param(
            "oversize tokenizer",
            ExitCode.GATE,
            "FALSIFY-APR-PRETRAIN-ARCH-006",
            marks=pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-ARCH-006"),
        ),
        pytest.param(
            "wrong tokenizer",
            ExitCode.GATE,
            "FALSIFY-APR-PRETRAIN-ARCH-006",
            marks=pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-ARCH-006"),
        ),
        pytest.param("empty", ExitCode.USAGE, None),
        pytest.param("directory", ExitCode.USAGE, None),
        pytest.param("FIFO", ExitCode.USAGE, None),
        pytest.param("permission denied", ExitCode.USAGE, None),
        pytest.param(
            "held-out shards trained on",
            ExitCode.DATA,
            "FALSIFY-APR-DIST-TRAINER-011",
            marks=pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-011"),
        ),
        pytest.param(
            "a token without a row",
            ExitCode.GATE,
            "FALSIFY-APR-DIST-TRAINER-008",
            marks=pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-008"),
        ),
        pytest.param(
            "no data", ExitCode.USAGE, "INV-TRAIN-010", marks=pytest.mark.falsifies("INV-TRAIN-010")
        ),
        pytest.param(
            "occupied run folder",
            ExitCode.OUTPUT,
            "FALSIFY-APR-DIST-CHECKPOINT-003",
            marks=pytest.mark.falsifies("FALSIFY-APR-DIST-CHECKPOINT-003"),
        ),
    ],
)
def test_from_scratch_every_rank_refuses(
    fault: str,
    code: ExitCode,
    falsifier: str | None,
    world_size: int,
    case: Case,
    ranks: WarmRanks,
    record_property: Callable[[str, object], None],
) -> None:
    case.flags |= {"--mode": "from-scratch", "--model": str(case.inputs.model)}
    FROM_SCRATCH[fault](case)
    ended = launched(case, ranks, world_size)
    record_property("seconds", ended.seconds)
    check_refused(case, ended, code, falsifier)


@pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-ARCH-009")
@pytest.mark.parametrize("world_size", [1, 2])
def test_reserved_rows_and_a_copied_head_are_trained(world_size: int, case: Case, ranks: WarmRanks) -> None:
    """The two kinds of file that look broken and are not."""

    def grow(arrays: Arrays, metadata: dict[str, Any]) -> None:
        arrays[EMBEDDING] = np.concatenate([arrays[EMBEDDING], arrays[EMBEDDING][:8]])
        arrays["lm_head.weight"] = arrays[EMBEDDING]
        metadata["vocab_size"] = 520

    case.model(grow)
    ended = launched(case, ranks, world_size)
    assert ended.codes == (0,) * world_size, ended.errors
    with AprReader(Path(case.flags["--run-dir"]) / "checkpoint.apr") as saved:
        assert saved.tensors[EMBEDDING].shape[0] == 520
        assert "lm_head.weight" not in saved.tensors
