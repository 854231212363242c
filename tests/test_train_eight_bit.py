"""Optimizer state in 8 bits: as small as promised, near 32 bits in what it trains, exact when it is saved."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from builders.models import tiny_decoder
from builders.runs import REPOSITORY, metrics, run_here, verdict
from builders.several import EIGHT_BIT, EIGHT_BIT_MOVED, HALF, STATE_BITS, STEPS
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from apr_dist.apr.reader import AprReader
from apr_dist.atomic_files import file_digest
from apr_dist.errors import ExitCode, UsageError
from apr_dist.parallel import state_bits
from apr_dist.parallel.eight_bit import AdamW8bit, Quantized, code_values
from apr_dist.parallel.state_bits import BLOCK, is_eligible
from apr_dist.training.optimizer import build_optimizer

if TYPE_CHECKING:
    from builders.runs import Inputs

RUNS = [(world, name) for world, names in EIGHT_BIT.items() for name in names]
MOVED = [(world, name) for world, named in EIGHT_BIT_MOVED.items() for name in named]
SCALE = ".scales"


def last_step(run: Path) -> Path:
    return run / "steps" / f"{STEPS:06d}"


def saved(folder: Path) -> dict[str, bytes]:
    """Every byte of a step folder that says what was trained."""
    with AprReader(folder / "checkpoint.apr") as reader:
        found = {name: bytes(reader.raw(name)) for name in reader.tensors}
    return found | {path.name: path.read_bytes() for path in folder.glob("optimizer*")}


def moments(folder: Path) -> dict[str, Tensor]:
    """Every moment in a step folder as a whole, by name, in f32."""
    parts: dict[str, dict[int, Tensor]] = {}
    for path in sorted(folder.glob("optimizer-*.safetensors")):
        with safe_open(path, framework="pt") as file:
            places = json.loads(file.metadata()["places"])
            for name in file.keys():  # noqa: SIM118  (no mapping)
                if name.startswith("random.") or name.endswith(SCALE):
                    continue
                values = file.get_tensor(name)
                if values.dtype == torch.uint8:
                    scales = file.get_tensor(name + SCALE).repeat_interleave(BLOCK)[: len(values)]
                    values = code_values(signed=name.endswith("exp_avg"))[values.long()] * scales
                if len(values):
                    parts.setdefault(name, {})[places[name][0]] = values
    return {name: torch.cat([runs[start] for start in sorted(runs)]) for name, runs in parts.items()}


@pytest.mark.parametrize(("world", "name"), RUNS)
def test_large_matrices_keep_a_byte_for_each_moment_and_the_rest_keeps_four(
    strategies: Path, world: int, name: str
) -> None:
    run = strategies / str(world) / f"{name}-8bit"
    facts = verdict(run)["facts"]
    assert (facts["strategy"], facts["world_size"]) == (name, world)
    assert facts["optimizer"] == "AdamW8bit"
    with AprReader(last_step(run) / "checkpoint.apr") as reader:
        shapes = {tensor: entry.shape for tensor, entry in reader.tensors.items()}
    found: dict[str, int] = {}
    for path in last_step(run).glob("optimizer-*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                found[key] = found.get(key, 0) + file.get_tensor(key).nbytes
    eligible = {tensor for tensor, shape in shapes.items() if is_eligible(tensor, shape)}
    assert "model.embed_tokens.weight" not in eligible
    assert any(tensor.endswith("mlp.down_proj.weight") for tensor in eligible)
    for tensor, shape in shapes.items():
        for moment in ("exp_avg", "exp_avg_sq"):
            held, scales = found[f"{tensor}.{moment}"], found.get(f"{tensor}.{moment}{SCALE}", 0)
            count = math.prod(shape)
            assert (held, scales) == ((count, 4 * count // BLOCK) if tensor in eligible else (4 * count, 0))


@pytest.mark.parametrize(("world", "name"), RUNS)
def test_losses_are_near_those_of_32_bits(strategies: Path, world: int, name: str) -> None:
    whole = {line["step"]: line["train_loss"] for line in metrics(strategies / "1" / "single")}
    eight = {line["step"]: line["train_loss"] for line in metrics(strategies / str(world) / f"{name}-8bit")}
    assert sorted(eight) == sorted(whole)
    assert eight[1] == pytest.approx(whole[1], rel=1e-6)
    assert eight != whole, "or nothing was quantised"
    for step, loss in whole.items():
        assert eight[step] == pytest.approx(loss, rel=1e-3), step


@pytest.mark.falsifies("FALSIFY-APR-DIST-CHECKPOINT-008")
@pytest.mark.parametrize(("world", "name"), RUNS)
def test_a_resumed_run_is_the_straight_one_bit_for_bit(strategies: Path, world: int, name: str) -> None:
    run = strategies / str(world) / f"{name}-8bit"
    resumed = run.with_name(f"{name}-8bit-resumed")
    assert saved(last_step(resumed)) == saved(last_step(run))
    straight = {line["step"]: line["train_loss"] for line in metrics(run)}
    for line in metrics(resumed):
        assert line["train_loss"] == straight[line["step"]]


@pytest.mark.falsifies("FALSIFY-APR-DIST-CHECKPOINT-008")
@pytest.mark.parametrize(("world", "name"), MOVED)
def test_a_run_goes_on_under_another_world_size_and_strategy(strategies: Path, world: int, name: str) -> None:
    from_world, other = EIGHT_BIT_MOVED[world][name]
    straight = {
        line["step"]: line["train_loss"] for line in metrics(strategies / str(from_world) / f"{other}-8bit")
    }
    everything = metrics(strategies / str(world) / f"{name}-8bit-moved")
    assert [line["step"] for line in everything] == list(range(1, STEPS + 1))
    moved = everything[HALF:]  # the lines before came along from the run it continues
    for line in moved:
        assert line["train_loss"] == pytest.approx(straight[line["step"]], rel=1e-5)


def flags(inputs: Inputs, run_dir: Path, *more: str) -> list[str]:
    given = [
        *inputs.data_flags(),
        "--init",
        str(inputs.pretrained),
        "--run-dir",
        str(run_dir),
        "--lr",
        "1e-3",
    ]
    given += ["--num-steps", "4", "--eval-every", "2", "--warmup-steps", "2", "--target-val-loss", "0.1"]
    return [*given, "--checkpoint.keep-last", "9", *more]


@pytest.mark.parametrize(("before", "after"), [("8", "32"), ("32", "8")])
def test_the_bits_of_a_run_change_only_when_that_is_allowed(
    before: str, after: str, inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert run_here(*flags(inputs, run, "--optimizer.state-bits", before)) == 0
    halfway = str(run / "steps" / "000002")
    go_on = ["--optimizer.state-bits", after, "--resume", halfway]
    assert run_here(*flags(inputs, tmp_path / "other", *go_on)) == ExitCode.USAGE
    assert f"optimizer.state_bits was {before} and is {after}" in capsys.readouterr().err
    allowed = [*go_on, "--resume-allow", "optimizer.state_bits"]
    assert run_here(*flags(inputs, tmp_path / "other", *allowed)) == 0
    straight = {line["step"]: line["train_loss"] for line in metrics(run)}
    assert [line["step"] for line in metrics(tmp_path / "other")] == [1, 2, 3, 4]
    for line in metrics(tmp_path / "other"):
        assert line["train_loss"] == pytest.approx(straight[line["step"]], rel=1e-3)
    here, there = moments(run / "steps" / "000004"), moments(tmp_path / "other" / "steps" / "000004")
    assert here.keys() == there.keys()
    for name, values in here.items():
        assert (there[name] - values).abs().max() <= 0.1 * values.abs().max(), name


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--optimizer.state-bits", "16"), "Expected 8 or 32"),
        (("--optimizer.state-bits", "eight"), "Expected 8 or 32"),
        ((*STATE_BITS, "--parallel.strategy", "zero1"), "state_bits is 8 under strategy zero1"),
        (
            (*STATE_BITS, "--parallel.strategy", "fsdp2", "--parallel.offload", "optimizer+parameters"),
            "state_bits is 8 under strategy fsdp2 with optimizer+parameters offloaded",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(
    more: tuple[str, ...], words: str, inputs: Inputs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_here(*flags(inputs, tmp_path / "run", *more)) == ExitCode.USAGE
    assert words in capfd.readouterr().err
    assert not (tmp_path / "run" / "steps").exists()


def test_a_missing_library_is_named_with_the_command_before_anything_is_loaded(
    inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state_bits, "find_spec", lambda _: None)
    assert run_here(*flags(inputs, tmp_path / "run", *STATE_BITS)) == ExitCode.USAGE
    assert "pip install 'apr-dist[bitsandbytes]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def without_scales(folder: Path, moment: str) -> None:
    """Take one moment's scales out of a saved state, and let every digest say it was so written."""
    (path,) = folder.glob("optimizer-*.safetensors")
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    places = json.loads(metadata["places"])
    del places[moment + SCALE], tensors[moment + SCALE]
    save_file(tensors, path, metadata={**metadata, "places": json.dumps(places)})
    index = json.loads((folder / "optimizer.json").read_text())
    index["files"] = {path.name: file_digest(path)}
    (folder / "optimizer.json").write_text(json.dumps(index))
    state = json.loads((folder / "state.json").read_text())
    state["optimizer_digest"] = file_digest(folder / "optimizer.json")
    (folder / "state.json").write_text(json.dumps(state))


def test_codes_without_their_scales_are_a_damaged_state(
    inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert run_here(*flags(inputs, run, *STATE_BITS)) == 0
    halfway = run / "steps" / "000002"
    without_scales(halfway, "model.layers.0.mlp.up_proj.weight.exp_avg")
    again = ("--resume", str(halfway))
    assert run_here(*flags(inputs, tmp_path / "other", *STATE_BITS, *again)) == ExitCode.MODEL_FILE
    said = capsys.readouterr().err
    assert "up_proj.weight.exp_avg is in 8 bits without a scale for each of its 32 blocks" in said
    assert "FALSIFY-APR-DIST-CHECKPOINT-006" in said


def test_a_library_that_cannot_be_imported_is_named_with_the_cause(inputs: Inputs, tmp_path: Path) -> None:
    broken = tmp_path / "packages" / "bitsandbytes"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text('raise OSError("libcudart.so.12: cannot open shared object file")\n')
    command = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); from apr_dist.train import main; sys.exit(main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", command, str(broken.parent), *flags(inputs, tmp_path / "run", *STATE_BITS)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == ExitCode.DISTRIBUTED, done.stderr
    assert "bitsandbytes cannot be imported (OSError: libcudart.so.12: cannot open" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "run").glob("steps/*"))


def test_a_model_without_a_large_matrix_is_refused() -> None:
    with pytest.raises(UsageError, match="no matrix of this model would have 8-bit state"):
        build_optimizer(tiny_decoder(), lr=1e-3, weight_decay=0.1, betas=(0.9, 0.999), eps=1e-8, state_bits=8)


def one_matrix(bits: int) -> tuple[torch.nn.Parameter, AdamW8bit]:
    weight = torch.nn.Parameter(torch.randn(80, 128, generator=torch.Generator().manual_seed(1)))
    groups = [{"params": [weight], "weight_decay": 0.1, "state_bits": bits}]
    return weight, AdamW8bit(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)


@pytest.mark.parametrize(("bits", "apart"), [(32, 1e-6), (8, 4e-3)])
def test_an_update_is_adamws(bits: int, apart: float) -> None:
    weight, optimizer = one_matrix(bits)
    other = torch.nn.Parameter(weight.detach().clone())
    plain = torch.optim.AdamW([other], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    random = torch.Generator().manual_seed(2)
    for _ in range(10):
        weight.grad = torch.randn(weight.shape, generator=random) * 0.1
        other.grad = weight.grad.clone()
        optimizer.step()
        plain.step()
    # Ten updates of about 1e-2 each: the two are within a few percent of the way.
    difference = (weight - other).abs()
    assert difference.mean() < apart
    assert difference.max() < 10 * apart
    state = optimizer.state[weight]
    assert state["step"] == 10
    assert isinstance(state["exp_avg"], Quantized) == (bits == 8)


def test_a_step_that_is_held_changes_nothing() -> None:
    weight, optimizer = one_matrix(8)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    state = optimizer.state[weight]
    before = [weight.detach().clone(), state["exp_avg"].codes.clone(), state["exp_avg_sq"].scales.clone()]
    weight.grad = torch.full_like(weight, math.nan)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert state["step"] == 1
    after = [weight, state["exp_avg"].codes, state["exp_avg_sq"].scales]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))


@pytest.mark.parametrize("signed", [True, False])
def test_codes_go_from_blocks_to_blocks_unchanged_and_to_others_as_the_nearest(signed: bool) -> None:
    held = Quantized.zeros(1000, torch.device("cpu"), signed=signed)
    random = torch.Generator().manual_seed(3)
    codes = torch.randint(256, (1000,), generator=random, dtype=torch.uint8)
    scales = torch.rand(4, generator=random).repeat_interleave(BLOCK)[:1000]
    floats = held.values[codes.long()] * scales
    held.take(codes, scales, floats)
    assert torch.equal(held.codes, codes)
    assert torch.equal(held.scales, scales[::BLOCK])
    # The same values, in blocks that begin 100 elements earlier: every block but the last has two scales.
    shifted = torch.cat((scales[100:], scales.new_full((100,), 2.0)))
    values = held.values[codes.long()] * shifted
    held.take(codes, shifted, values)
    largest = torch.nn.functional.pad(values.abs(), (0, 24)).view(4, BLOCK).amax(1)
    torch.testing.assert_close(held.scales[:3], largest[:3])
    again = held.values[held.codes.long()] * held.scales.repeat_interleave(BLOCK)[:1000]
    assert (again - values).abs().max() <= 0.01 * largest.max()
