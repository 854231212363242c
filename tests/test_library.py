"""The library: what a program can do with a session, and that it is the command line's own training."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from builders.runs import REPOSITORY, metrics, run_here, verdict
from builders.several import HAS_COMPILER

import apr_dist
from apr_dist.apr.digests import file_weights_digest
from apr_dist.apr.reader import AprReader
from apr_dist.config import TrainConfig
from apr_dist.data.loader import TokenLoader
from apr_dist.data.manifest import Manifest
from apr_dist.errors import AprDistError, DataError, OutputError, StreamExhausted, UsageError

if TYPE_CHECKING:
    from builders.runs import Inputs

EXAMPLES = REPOSITORY / "docs" / "examples"


def settings(inputs: Inputs, run_dir: Path, **more: Any) -> dict[str, Any]:
    return {
        "init": str(inputs.pretrained),
        "dataset": str(inputs.train),
        "val_dataset": str(inputs.validation),
        "tokenizer": str(inputs.tokenizer),
        "run_dir": str(run_dir),
        "num_steps": 4,
        "eval_every": 2,
        "batch_size": 4,
        "seq_length": 32,
        "lr": 1e-3,
        "warmup_steps": 2,
        "device": "cpu",
        "target_val_loss": 0.1,
        "evaluation": {"max_sequences": 16, "random_sequences": 0},
        "parallel": {"cpu_threads": 1},
        **more,
    }


def flags(inputs: Inputs, run_dir: Path) -> list[str]:
    given = [*inputs.data_flags(), "--init", str(inputs.pretrained), "--run-dir", str(run_dir)]
    given += ["--num-steps", "4", "--eval-every", "2", "--lr", "1e-3", "--warmup-steps", "2"]
    return [*given, "--evaluation.random-sequences", "0", "--target-val-loss", "0.1"]


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = (
        "import sys, apr_dist; print(sorted({'torch', 'numpy', 'accelerate', 'pydantic'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
    assert set(apr_dist.__all__) >= {"Session", "TrainConfig", "fit", "open_session"}
    with pytest.raises(AttributeError, match="no attribute 'sesion'"):
        _ = apr_dist.sesion


def test_a_session_trains_as_the_command_line_does(inputs: Inputs, tmp_path: Path) -> None:
    assert run_here(*flags(inputs, tmp_path / "run")) == 0
    expected = metrics(tmp_path / "run")
    with apr_dist.open_session(**settings(inputs, tmp_path / "library")) as session:
        first = session.evaluate()
        steps = list(session.steps())
        last = session.evaluate()
        assert last.perplexity == pytest.approx(math.exp(last.loss))
        session.save()
    assert [step.train_loss for step in steps] == [line["train_loss"] for line in expected]
    assert [step.grad_norm for step in steps] == [line["grad_norm"] for line in expected]
    losses = [line["val_loss"] for line in metrics(tmp_path / "run", "evaluation")]
    assert [first.loss, last.loss] == [losses[0], losses[-1]]
    checkpoints = [tmp_path / name / "checkpoint.apr" for name in ("run", "library")]
    digests = []
    for path in checkpoints:
        with AprReader(path) as reader:
            digests.append(file_weights_digest(reader))
    assert digests[0] == digests[1] == verdict(tmp_path / "run")["facts"]["weights_digest"]
    said = verdict(tmp_path / "library")
    assert (said["status"], said["exit_code"], said["facts"]["steps"]) == ("COMPLETED", 0, 4)


def test_fit_is_the_whole_run_and_a_session_resumes_it(inputs: Inputs, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with apr_dist.open_session(**settings(inputs, run_dir)) as session:
        assert apr_dist.fit(session).exit_code == 0
    more = settings(inputs, run_dir, num_steps=6, resume="auto", resume_allow="num_steps")
    with apr_dist.open_session(**more) as session:
        assert session.progress.step == 4
        assert [step.step for step in session.steps()] == [5, 6]


def test_a_configuration_comes_from_yaml_or_an_object_and_keywords_win(
    inputs: Inputs, tmp_path: Path
) -> None:
    given = settings(inputs, tmp_path / "one")
    config = TrainConfig(**given)
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    for number, source in enumerate((config, tmp_path / "run.yaml", str(tmp_path / "run.yaml"))):
        over = {"run_dir": str(tmp_path / f"run-{number}"), "optimizer": {"weight_decay": 0.5}}
        with apr_dist.open_session(source, num_steps=0, **over) as session:
            assert session.config.optimizer.weight_decay == 0.5
            assert session.config.optimizer.beta2 == 0.999
            assert session.config.seq_length == 32
    with pytest.raises(UsageError, match="num_stepps"):
        apr_dist.open_session(config, num_stepps=3)


def test_rate_and_weights_change_between_steps(inputs: Inputs, tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.o_proj.weight"
    with apr_dist.open_session(**settings(inputs, tmp_path / "run")) as session:
        assert session.lr == session.schedule.lr_at(0)
        steps = session.steps()
        next(steps)
        session.lr = 1e-5
        assert next(steps).lr == session.lr == 1e-5
        session.follow_schedule()
        session.set_weight(name, torch.zeros_like(session.weight(name)))
        assert not session.weight(name).any()
        assert next(steps).lr == session.schedule.lr_at(2)
        assert session.weight(name).any()
        with pytest.raises(UsageError, match="there is no parameter lm_head"):
            session.weight("lm_head.weight")
        with pytest.raises(UsageError, match="have shape"):
            session.set_weight(name, torch.zeros(2, 2))


def batches_of(inputs: Inputs, count: int) -> list[torch.Tensor]:
    loader = TokenLoader(Manifest.load(inputs.train), seq_length=32, global_batch=4, micro_batch=4, seed=42)
    found = [loader.batch(k)[0].clone() for k in range(count)]
    loader.close()
    return found


def test_own_batches_train_as_the_same_rows_of_shards(inputs: Inputs, tmp_path: Path) -> None:
    rows = batches_of(inputs, 4)
    with apr_dist.open_session(**settings(inputs, tmp_path / "shards", micro_batch_size=2)) as session:
        expected = [step.train_loss for step in session.steps()]
    given = settings(inputs, tmp_path / "own", dataset=None, val_dataset=None, micro_batch_size=2)
    own = (row.numpy().astype(np.int64) for row in rows)
    with apr_dist.open_session(**given, batches=own, val_batches=rows[:2]) as session:
        assert [step.train_loss for step in session.steps()] == expected
        assert session.evaluate().tokens == 2 * 4 * 32
        session.save()
    more = {**given, "num_steps": 5, "resume": "auto", "resume_allow": "num_steps"}
    with apr_dist.open_session(**more, batches=batches_of(inputs, 5)) as session:
        assert [step.step for step in session.steps()] == [5]
        with pytest.raises(DataError, match="no held-out data"):
            session.evaluate()
        with pytest.raises(StreamExhausted, match="ended after 5"):
            list(session.steps(until=6))


@pytest.mark.parametrize(
    ("batch", "text"),
    [
        (np.zeros((4, 32), np.int32), r"int32 \(4, 32\)"),
        (np.zeros((3, 33), np.int32), r"int32 \(3, 33\)"),
        (np.zeros((4, 33), np.float32), "float32"),
        (np.full((4, 33), 512, np.int32), "token id 512"),
        (np.full((4, 33), -1, np.int64), "token id -1"),
    ],
)
def test_a_batch_that_does_not_fit_the_model_is_refused(
    batch: np.ndarray, text: str, inputs: Inputs, tmp_path: Path
) -> None:
    given = settings(inputs, tmp_path / "run", dataset=None, val_dataset=None)
    with (
        pytest.raises(DataError, match=text),
        apr_dist.open_session(**given, batches=[batch]) as session,
    ):
        list(session.steps())
    said = verdict(tmp_path / "run")
    assert (said["status"], said["exit_code"]) == ("ABORTED", DataError("").exit_code)


def test_held_out_batches_must_begin_again(inputs: Inputs, tmp_path: Path) -> None:
    rows = batches_of(inputs, 2)
    given = settings(inputs, tmp_path / "run", dataset=None, val_dataset=None)
    with pytest.raises(UsageError, match="iterated once only"):
        apr_dist.open_session(**given, batches=rows, val_batches=iter(rows))


def of_another_tokenizer(source: Path, folder: Path) -> Path:
    """The same shards, said to be encoded by another tokenizer."""
    shutil.copytree(source, folder)
    known = Manifest.load(folder)
    assert known.tokenizer is not None
    replace(known, tokenizer=replace(known.tokenizer, sha256="b" * 64)).write()
    return folder


def test_held_out_shards_are_asked_their_gates_next_to_own_batches(inputs: Inputs, tmp_path: Path) -> None:
    rows, shards = batches_of(inputs, 2), str(inputs.validation)
    given = settings(inputs, tmp_path / "run", dataset=None, val_dataset=None)
    strange = of_another_tokenizer(inputs.validation, tmp_path / "strange")
    same = str(shutil.copytree(inputs.validation, tmp_path / "same"))
    for named, refusal in (
        ({"val_dataset": str(strange)}, "encoded by tokenizer bbbbbbbbbbbb"),
        ({"evaluation": {"sets": {"one": shards, "two": same}}}, "one and two hold the same data"),
        ({"evaluation": {"sets": {"two": str(strange)}}}, "encoded by tokenizer bbbbbbbbbbbb"),
        ({"evaluation": {"sets": {"one": shards}}, "seq_length": 4096}, "positions|a sequence needs"),
        ({"evaluation": {"sets": {"one": str(inputs.train)}}}, "the train part"),
    ):
        for own in ({}, {"val_batches": rows}):
            if own and "val_dataset" in named:
                continue  # the program's own are in its place
            with pytest.raises(AprDistError, match=refusal):
                apr_dist.open_session(**{**given, **named}, batches=rows, **own)
    counting = {"sets": {"one": shards}, "counts": "one"}
    with pytest.raises(UsageError, match="the program's own held-out batches count"):
        apr_dist.open_session(**{**given, "evaluation": counting}, batches=rows, val_batches=rows)


def test_named_sets_are_measured_next_to_own_batches(inputs: Inputs, tmp_path: Path) -> None:
    rows = batches_of(inputs, 2)
    given = settings(inputs, tmp_path / "run", dataset=None, val_dataset=None)
    given["evaluation"] |= {"sets": {"one": str(inputs.validation)}}
    with apr_dist.open_session(**given, batches=rows) as session:
        shards = session.evaluate()
    given["run_dir"] = str(tmp_path / "both")
    with apr_dist.open_session(**given, batches=rows, val_batches=rows) as session:
        assert session.evaluate().tokens == 2 * 4 * 32
    (line,) = metrics(tmp_path / "both", "evaluation")
    assert line["val_losses"] == {"one": shards.loss}
    assert list(verdict(tmp_path / "both")["facts"]["validation_sets"]) == ["one"]


def test_leaving_a_session_closes_everything_and_an_error_leaves_a_verdict(
    inputs: Inputs, tmp_path: Path
) -> None:
    given = settings(inputs, tmp_path / "run")

    def program() -> None:
        with apr_dist.open_session(**given):
            with pytest.raises(OutputError, match="another run is training"):
                apr_dist.open_session(**given)
            raise ValueError("of the program")

    with pytest.raises(ValueError, match="of the program"):
        program()
    assert verdict(tmp_path / "run")["detail"] == "of the program"
    assert not (tmp_path / "run" / "run.lock").exists()
    with pytest.raises(AprDistError, match="already holds files"):
        apr_dist.open_session(**given)
    with apr_dist.open_session(**given, overwrite=True) as session:
        assert len(list(session.steps(until=1))) == 1


@pytest.mark.parametrize(
    "strategy",
    [
        "ddp",
        "fsdp2",
        *(
            pytest.param(name, marks=pytest.mark.skipif(not HAS_COMPILER, reason="DeepSpeed needs one"))
            for name in ("zero1", "zero3")
        ),
    ],
)
def test_a_session_works_on_every_rank_of_a_launcher(strategy: str, inputs: Inputs, tmp_path: Path) -> None:
    given = settings(inputs, tmp_path / "run", parallel={"strategy": strategy, "cpu_threads": 1})
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    environment["TORCH_EXTENSIONS_DIR"] = str(REPOSITORY / ".build" / "torch_extensions")
    environment["PYTHONPATH"] = str(REPOSITORY)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    command += [str(REPOSITORY / "tests" / "builders" / "library_ranks.py"), json.dumps(given)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)
    line = next((line for line in done.stdout.splitlines() if line.startswith("FOUND ")), None)
    assert line is not None, done.stdout + done.stderr
    found = json.loads(line.removeprefix("FOUND "))
    assert (found["strategy"], found["world_size"]) == (strategy, 2)
    assert found["replaced"]
    assert found["other"]
    assert found["moved"], "the optimizer went on from the weight that was replaced"
    name = "model.layers.0.mlp.up_proj.weight"
    with apr_dist.open_session(**settings(inputs, tmp_path / "alone")) as session:
        old = session.weight(name)
        session.set_weight(name, torch.arange(old.numel()).float().view(old.shape) / old.numel() / 10)
        assert session.evaluate().loss == pytest.approx(found["first"], abs=1e-6)
        losses = [step.train_loss for step in session.steps()]
    assert found["losses"] == pytest.approx(losses, rel=1e-5)


def test_the_script_of_the_docs_runs(inputs: Inputs, tmp_path: Path) -> None:
    script = EXAMPLES / "fine_tune.py"
    code = [line for line in script.read_text().splitlines() if line and not line.startswith('"""')]
    assert len(code) <= 25
    done = subprocess.run(
        [sys.executable, str(script), *map(str, (inputs.pretrained, inputs.train, inputs.validation)), "run"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "step 20: loss " in done.stdout
    assert verdict(tmp_path / "run")["facts"]["steps"] == 20
    assert metrics(tmp_path / "run")[-1]["lr"] <= 1e-3


def test_the_notebook_of_the_docs_runs_and_plots_the_loss(inputs: Inputs, tmp_path: Path) -> None:
    nbformat, client = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(EXAMPLES / "fine_tune.ipynb", as_version=4)
    paths = {"MODEL": inputs.pretrained, "SHARDS": inputs.train, "HELD_OUT": inputs.validation}
    environment = {f"APR_DIST_{name}": str(path) for name, path in paths.items()}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**environment, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}.items():
            patch.setenv(name, value)
        client.NotebookClient(
            notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
        ).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 1
    printed = "".join(output.get("text", "") for output in outputs)
    losses = [line["train_loss"] for line in metrics(tmp_path / "runs" / "notebook")]
    assert len(losses) == 30
    assert f"last training loss {losses[-1]:.3f}" in printed
