"""What a change touches: each is made in a copy of the package, in the files its row of the table names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from builders.changed_package import apr_dist, copy_package, put, train
from builders.runs import Inputs


@pytest.fixture
def package(tmp_path: Path) -> Path:
    return copy_package(tmp_path / "changed")


VERB = {
    "cli/footer.py": '''
"""``apr-dist footer``: the stored checksum of a model file."""

from pathlib import Path
from typing import Annotated

import tyro

from apr_dist.apr.reader import AprReader


def footer(file: Annotated[Path, tyro.conf.Positional]) -> None:
    """Print how many tensors a model file holds.

    Example: apr-dist footer model.apr
    """
    with AprReader(file) as reader:
        print(f"{len(reader.tensors)} tensors")
''',
    "cli/__init__.py": {
        '    "diff": "files:diff",\n': '    "diff": "files:diff",\n    "footer": "footer:footer",\n'
    },
}


def test_a_verb_is_two_files(package: Path, inputs: Inputs, tmp_path: Path) -> None:
    assert put(package, VERB) <= 2
    assert "26 tensors" in apr_dist(package, "footer", str(inputs.pretrained))
    assert "apr-dist footer model.apr" in apr_dist(package, "footer", "--help")
    assert "footer" in apr_dist(package, "--help")
    assert "footer" in apr_dist(package, "--print-completion", "bash")


METRIC = {
    "training/stepping.py": {
        "    update_s: float\n": "    update_s: float\n    micro_batches: int\n",
        "    sums: Tensor\n": "    sums: Tensor\n    micro_batches: int\n",
        "sums=sums,\n": "sums=sums,\n                micro_batches=len(batches),\n",
        "                data_wait_s=one.data_wait_s,\n": (
            "                data_wait_s=one.data_wait_s,\n                micro_batches=one.micro_batches,\n"
        ),
    },
    "training/step_record.py": {
        "            update_ms=taken.update_s * 1e3,\n": (
            "            update_ms=taken.update_s * 1e3,\n            micro_batches=taken.micro_batches,\n"
        )
    },
    "runs/metrics.py": {"    update_ms: float\n": "    update_ms: float\n    micro_batches: int\n"},
}


def test_a_metric_is_three_files(package: Path, inputs: Inputs, tmp_path: Path) -> None:
    assert put(package, METRIC) <= 3
    flags = ["--init", str(inputs.pretrained), *inputs.data_flags(), "--num-steps", "2"]
    done = train(package, *flags, "--micro-batch-size", "2", "--run-dir", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["micro_batches"] for line in lines if line["kind"] == "step"] == [2, 2]


OPTIMIZER = {
    "config/sections.py": {
        '    weight_decay: float = Field(0.01, ge=0, description="decoupled': (
            '    rule: Literal["adamw", "radam"] = Field("adamw", description="how a weight moves")\n'
            '    weight_decay: float = Field(0.01, ge=0, description="decoupled'
        )
    },
    "training/opening.py": {
        "            state_bits=options.state_bits,\n            runtime=runtime,\n": (
            "            state_bits=options.state_bits,\n            rule=options.rule,\n"
            "            runtime=runtime,\n"
        )
    },
    "training/optimizer.py": {
        "    seed: int = 0,\n) -> torch.optim.Optimizer:\n": (
            '    seed: int = 0,\n    rule: str = "adamw",\n) -> torch.optim.Optimizer:\n'
        ),
        "    elif state_bits == 8:\n": (
            '    elif rule == "radam":\n'
            "        optimizer = RAdam(groups, lr=lr, betas=betas, eps=eps, decoupled_weight_decay=True)\n"
            "    elif state_bits == 8:\n"
        ),
        "def _is_stored(": (
            "class RAdam(torch.optim.RAdam):\n"
            "    found_inf = None\n\n"
            "    def step(self):\n"
            "        if self.found_inf is None or not bool(self.found_inf):\n"
            "            super().step()\n\n\n"
            "def _is_stored("
        ),
    },
}


def test_an_optimizer_with_two_moments_is_three_files(package: Path, inputs: Inputs, tmp_path: Path) -> None:
    assert put(package, OPTIMIZER) <= 3
    flags = ["--init", str(inputs.pretrained), *inputs.data_flags(), "--num-steps", "4", "--save-every", "2"]
    flags += ["--checkpoint.keep-last", "2", "--warmup-steps", "1"]
    losses = {}
    for name, more in {
        "adamw": (),
        "radam": ("--optimizer.rule", "radam"),
        "resumed": ("--optimizer.rule", "radam", "--resume", str(tmp_path / "radam" / "steps" / "000002")),
    }.items():
        done = train(package, *flags, *more, "--run-dir", str(tmp_path / name))
        assert done.returncode == 0, done.stderr
        lines = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        losses[name] = {line["step"]: line["train_loss"] for line in lines if line["kind"] == "step"}
    assert losses["radam"][1] == losses["adamw"][1]  # before any update
    assert losses["radam"][4] != losses["adamw"][4]
    assert [losses["resumed"][step] for step in (3, 4)] == [losses["radam"][step] for step in (3, 4)]
