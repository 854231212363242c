"""The keys that say how a step is computed, through the entry point: they change what they promise only."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from builders.models import tiny_decoder
from builders.reference import reference_model
from builders.runs import metrics, run_here
from torch._dynamo.utils import counters

from apr_dist.apr.reader import AprReader
from apr_dist.config import TrainConfig
from apr_dist.data.loader import TokenLoader
from apr_dist.data.manifest import Manifest
from apr_dist.errors import ExitCode
from apr_dist.model.config import TransformerConfig
from apr_dist.model.families import Family
from apr_dist.model.transformer import Decoder
from apr_dist.parallel.engine import ReplicaEngine
from apr_dist.runs.metrics import MetricsFile, StepMetrics
from apr_dist.training import efficiency, opening
from apr_dist.training.efficiency import process_age_s
from apr_dist.training.session import Session
from apr_dist.training.stepping import BatchFeed, Stepper

if TYPE_CHECKING:
    from builders.runs import Inputs


def train(inputs: Inputs, run_dir: Path, *flags: str) -> int:
    return run_here(
        *inputs.data_flags(),
        *("--init", str(inputs.pretrained), "--run-dir", str(run_dir), "--num-steps", "4"),
        *("--eval-every", "4", "--lr", "1e-3", "--warmup-steps", "1", *flags),
    )


def losses(run_dir: Path) -> list[float]:
    lines = metrics(run_dir)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    return [line["train_loss"] for line in lines] + [line["grad_norm"] for line in lines]


@pytest.fixture(scope="module")
def plain(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses and norms of four steps with every key of ``compute`` as it is by default."""
    run_dir = tmp_path_factory.mktemp("plain") / "run"
    assert train(inputs, run_dir) == 0
    return losses(run_dir)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Compiled graphs there were after each step; code generation in C++ is left out, it takes a minute."""
    found: list[int] = []
    write, compile_blocks = MetricsFile.step, Decoder.compile_blocks

    def counting(self: MetricsFile, line: StepMetrics) -> None:
        found.append(counters["stats"]["unique_graphs"])
        write(self, line)

    monkeypatch.setattr(MetricsFile, "step", counting)
    monkeypatch.setattr(Decoder, "compile_blocks", lambda self: compile_blocks(self, backend="aot_eager"))
    torch.compiler.reset()
    counters.clear()
    yield found
    torch.compiler.reset()


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_checkpointing_changes_no_loss(mode: str, plain: list[float], inputs: Inputs, tmp_path: Path) -> None:
    assert train(inputs, tmp_path / "run", "--compute.activation-checkpointing", mode) == 0
    assert losses(tmp_path / "run") == plain


def test_compiled_blocks_give_the_same_losses_without_a_break_or_a_late_compilation(
    graphs: list[int],
    plain: list[float],
    inputs: Inputs,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    flags = ("--compute.compile", "block", "--compute.activation-checkpointing", "full")
    assert train(inputs, tmp_path / "run", *flags, "--eval-every", "3") == 0
    assert "blocks compiled, checkpointing full" in capfd.readouterr().out
    assert losses(tmp_path / "run") == pytest.approx(plain, rel=1e-5)
    assert graphs[1] > 0
    assert graphs[1:] == [graphs[1]] * 3
    assert not counters["graph_break"]


@pytest.mark.parametrize("name", ["plain", "cpu"])
def test_a_set_of_kernels_may_be_forced_and_is_named(
    name: str, plain: list[float], inputs: Inputs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert train(inputs, tmp_path / "run", "--compute.kernels", name) == 0
    assert f"; {name} kernels, loss chunked" in capfd.readouterr().out
    assert losses(tmp_path / "run") == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("cuda",), "compute.kernels is cuda, which does not run on cpu. Expected auto or plain or cpu"),
        (
            ("cpu", "--compute.compile", "block"),
            "compute.kernels is cpu, which does not run on cpu in compiled blocks. Expected auto or plain.",
        ),
    ],
)
def test_kernels_that_cannot_run_here_are_refused(
    flags: tuple[str, ...], said: str, inputs: Inputs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert train(inputs, tmp_path / "run", "--compute.kernels", *flags) == ExitCode.USAGE
    found = capfd.readouterr().err
    assert said in found
    assert "use --compute.kernels auto, which takes the fastest set that runs here" in found


def test_a_run_resumes_on_another_set_of_kernels(inputs: Inputs, tmp_path: Path) -> None:
    assert train(inputs, tmp_path / "run", "--eval-every", "2", "--checkpoint.keep-last", "9") == 0
    whole = losses(tmp_path / "run")
    resume = ("--resume", str(tmp_path / "run" / "steps" / "000002"), "--eval-every", "2")
    assert train(inputs, tmp_path / "again", *resume, "--compute.kernels", "plain") == 0
    found = [line["train_loss"] for line in metrics(tmp_path / "again")]
    assert found == pytest.approx(whole[:4], rel=1e-5)


def test_z_loss_moves_the_weights_and_no_reported_loss(
    plain: list[float], inputs: Inputs, tmp_path: Path
) -> None:
    assert train(inputs, tmp_path / "run", "--compute.z-loss", "0.1") == 0
    found = losses(tmp_path / "run")
    assert found[0] == pytest.approx(plain[0], rel=1e-6)
    assert found[2] != pytest.approx(plain[2], rel=1e-4)
    assert found[4] != pytest.approx(plain[4], rel=1e-3)


def test_figures_that_are_read_seldom_are_those_of_every_step(
    plain: list[float], inputs: Inputs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert train(inputs, tmp_path / "run", "--log-every", "3") == 0
    assert losses(tmp_path / "run") == plain
    said = capfd.readouterr().out
    assert "MFU n/a: the peak of this processor is not known" in said
    assert re.search(r"first step done [\d.]+ s after the process began: .*asking the gates .*loading", said)
    for line in metrics(tmp_path / "run"):
        assert line["mfu"] is None
        assert line["memory_bytes"] == line["host_memory_bytes"] > 1e8
        assert 0 <= line["data_wait_ms"] < line["wall_ms"]


@pytest.mark.parametrize("flags", [(), ("--log-every", "3"), ("--micro-batch-size", "2")], ids=" ".join)
def test_the_parts_of_a_step_fit_into_its_time(
    inputs: Inputs, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    assert train(inputs, tmp_path / "run", *flags) == 0
    for line in metrics(tmp_path / "run"):
        parts = [line[key] for key in ("forward_ms", "backward_ms", "update_ms")]
        assert min(parts) > 0
        assert sum(parts) <= line["wall_ms"]
        if not torch.cuda.is_available():  # there the host waits while the device computes
            assert sum(parts) + line["data_wait_ms"] <= line["wall_ms"]


@pytest.mark.falsifies("INV-TRAIN-007")
def test_after_a_loss_that_is_no_number_nothing_moves_until_the_run_stops(
    inputs: Inputs, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    heads: list[torch.Tensor] = []
    take, forward = Stepper.take, Decoder.forward

    def watching(self: Stepper, step: int, *, compare: bool, more: bool) -> None:
        take(self, step, compare=compare, more=more)
        heads.append(self._engine.evaluated.head_weight.detach().clone())

    def broken(
        self: Decoder, *args: torch.Tensor, **options: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        total, count = forward(self, *args, **options)
        return total * (math.nan if self.training and len(heads) == 2 else 1.0), count

    monkeypatch.setattr(Stepper, "take", watching)
    monkeypatch.setattr(Decoder, "forward", broken)
    flags = ("--log-every", "8", "--num-steps", "6", "--eval-every", "6")
    assert train(inputs, tmp_path / "run", *flags) == ExitCode.NUMERICAL_INSTABILITY
    assert "step 3" in capfd.readouterr().err
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2]
    assert not torch.equal(heads[0], heads[1])
    assert len(heads) == 6
    assert all(torch.equal(head, heads[1]) for head in heads[2:])


def test_the_next_batch_is_sent_while_the_step_before_it_computes(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def noted(owner: type, name: str, what: str) -> None:
        call = getattr(owner, name)

        def noting(self: Any, *args: Any, **options: Any) -> Any:
            asked.append(what)
            return call(self, *args, **options)

        monkeypatch.setattr(owner, name, noting)

    noted(BatchFeed, "take", "take")
    noted(ReplicaEngine, "accumulate", "compute")
    noted(Session, "_notes", "tell")
    noted(BatchFeed, "send_ahead", "send the next")
    noted(ReplicaEngine, "step", "update")
    noted(Stepper, "read", "wait")
    flags = ("--log-every", "2", "--num-steps", "6", "--eval-every", "6")
    assert train(inputs, tmp_path / "run", *flags) == 0
    step = ["take", "compute", "tell", "send the next", "update"]
    last = [what for what in step if what != "send the next"]
    assert asked == [*step, "wait", *step, *step, "wait", *step, *step, "wait", *last, "wait"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("flags", [(), ("--loader.documents", "isolate")])
def test_no_step_waits_for_the_gpu(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...]
) -> None:
    take, strict = Stepper.take, []

    def taking(self: Stepper, step: int, *, compare: bool, more: bool) -> None:
        if step > 1 and not compare:  # the first steps make what is kept: kernels, the optimizer's state
            torch.cuda.set_sync_debug_mode("error")
            strict.append(step)
        try:
            take(self, step, compare=compare, more=more)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Stepper, "take", taking)
    options = ("--device", "cuda", "--parallel.precision", "bf16", "--log-every", "8", *flags)
    assert train(inputs, tmp_path / "run", "--num-steps", "6", "--eval-every", "6", *options) == 0
    assert strict == [2, 3, 4]


def test_isolated_documents_attend_to_themselves_alone(
    inputs: Inputs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = ("--seq-length", "256", "--batch-size", "64", "--micro-batch-size", "8", "--num-steps", "1")
    isolate = ("--loader.documents", "isolate", "--compute.activation-checkpointing", "full")
    assert train(inputs, tmp_path / "run", *flags, *isolate) == 0
    assert "documents isolated by spans" in capfd.readouterr().out
    (found,) = metrics(tmp_path / "run")
    masked, plain = _reference_losses(inputs)
    assert found["train_loss"] == pytest.approx(masked, rel=1e-6)
    assert found["train_loss"] != pytest.approx(plain, rel=1e-5)


def _reference_losses(inputs: Inputs) -> tuple[float, float]:
    """Of the first global batch, by `transformers` with a dense mask of its documents, and without."""
    with AprReader(inputs.pretrained) as reader:
        config = TransformerConfig.from_metadata(
            reader.metadata.to_mapping(), family=Family.QWEN2, where="test", tie_word_embeddings=True
        )
        model = tiny_decoder(config)
        model.load_state_dict(
            {name: torch.from_numpy(reader.float32(name).copy()) for name in reader.tensors}
        )
    loader = TokenLoader(
        Manifest.load(inputs.train), seq_length=256, global_batch=64, micro_batch=64, seed=TrainConfig().seed
    )
    (rows,), (documents,) = loader.batch(0), loader.documents(0)
    loader.close()
    assert len(documents.cu_seqlens) > 65, "no document ends inside a sequence"
    reference, found = reference_model(model), []
    for mask in (torch.where(documents.attention_mask(), 0.0, -torch.inf), None):
        with torch.no_grad():
            logits = reference(input_ids=rows[:, :-1].long(), attention_mask=mask).logits
        targets = rows[:, 1:].long().flatten()
        found.append(float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets)))
    return found[0], found[1]


@pytest.mark.parametrize("other", [("--synthetic",), ("--compute.compile", "block")])
def test_isolation_is_refused_where_it_cannot_be(
    other: tuple[str, ...], inputs: Inputs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert train(inputs, tmp_path / "run", "--loader.documents", "isolate", *other) == ExitCode.USAGE
    assert "do not go together" in capfd.readouterr().err


def test_isolation_needs_data_that_tells_documents_apart(
    inputs: Inputs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    silent = tmp_path / "silent"
    shutil.copytree(inputs.train, silent)
    facts = json.loads((silent / "manifest.json").read_text())
    facts["eos_token_id"] = facts["documents_index"] = None
    (silent / "manifest.json").write_text(json.dumps(facts))
    flags = ("--loader.documents", "isolate", "--dataset", str(silent))
    assert train(inputs, tmp_path / "run", *flags) == ExitCode.DATA
    assert "neither document starts" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("linear", [1.0, 1.0, 0.67, 0.34]),
        ("constant", [1.0, 1.0, 1.0, 1.0]),
        ("wsd", [1.0, 1.0, 1.0, 0.01 + 0.99 * (1 - math.sqrt(0.5))]),
    ],
)
def test_the_rate_follows_the_schedule_that_is_named(
    schedule: str, rates: list[float], inputs: Inputs, tmp_path: Path
) -> None:
    decay = ("--optimizer.decay-steps", "2") if schedule == "wsd" else ()
    assert train(inputs, tmp_path / "run", "--optimizer.schedule", schedule, *decay) == 0
    assert [line["lr"] for line in metrics(tmp_path / "run")] == pytest.approx(
        [1e-3 * rate for rate in rates]
    )


@pytest.mark.parametrize("flags", [("3",), ("4", "--optimizer.schedule", "wsd")])
def test_a_decay_that_does_not_fit_is_refused_before_anything_starts(
    flags: tuple[str, ...], inputs: Inputs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert train(inputs, tmp_path / "run", "--optimizer.decay-steps", *flags) == ExitCode.USAGE
    assert "optimizer.decay_steps is" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_machine_without_a_compiler_is_told_so(
    inputs: Inputs, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert train(inputs, tmp_path / "run", "--compute.compile", "block") == ExitCode.USAGE
    assert "C++ compiler" in capfd.readouterr().err


@pytest.mark.parametrize("has", [True, False])
def test_bf16_without_bf16_arithmetic_is_warned_of(
    has: bool,
    inputs: Inputs,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(opening, "has_bf16_arithmetic", lambda: has)
    given = [*inputs.data_flags(), "--init", str(inputs.pretrained), "--run-dir", str(tmp_path / "run")]
    assert run_here(*given, "--num-steps", "1", "--target-val-loss", "9", "--parallel.precision", "bf16") == 0
    said = capsys.readouterr()
    assert ("no bf16 arithmetic" in said.out + said.err) is not has
    assert re.search(
        r"running on cpu as single over 1 process\(es\), bf16; cpu kernels, loss chunked, .*1 thread\(s\)",
        said.out,
    )


def test_the_age_of_a_process_is_the_time_since_it_was_started(monkeypatch: pytest.MonkeyPatch) -> None:
    began = time.monotonic()
    code = "from apr_dist.training.efficiency import process_age_s; print(process_age_s())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    elapsed = time.monotonic() - began
    assert 0.0 < float(done.stdout) < elapsed + 0.02  # a process's start is told in ticks of a hundredth
    here = process_age_s()
    monkeypatch.setattr(efficiency, "STATUS", Path("/proc/no-such-process"))
    assert abs(process_age_s() - here) < 2  # what psutil knows, which counts from a boot told in seconds
