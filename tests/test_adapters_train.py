"""Adapters through the trainer's entry point: as ``peft`` trains them, on every strategy, resumed exactly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from builders.adapter_ranks import (
    DROPPED,
    HALF,
    KINDS,
    PACKED,
    RESUMED,
    RUNS,
    STEPS,
    adapter_tensors,
    half,
    last,
    make_runs,
    peft_model,
    reference,
    reopened,
)
from builders.runs import metrics, verdict
from builders.several import HAS_COMPILER
from conftest import shared_folder
from safetensors import safe_open

from apr_dist.apr.digests import file_weights_digest
from apr_dist.apr.reader import AprReader
from apr_dist.errors import ExitCode
from apr_dist.gates.model_file import prove_model
from apr_dist.interop.adapter_files import open_adapter

if TYPE_CHECKING:
    from builders.runs import Inputs
    from builders.warm_ranks import WarmRanks


def _case(name: str) -> object:
    skip = pytest.mark.skipif("zero" in name and not HAS_COMPILER, reason="there is no C++ compiler")
    return pytest.param(name, marks=skip)


ALL, AGAIN = [_case(name) for name in RUNS], [_case(name) for name in RESUMED]


@pytest.fixture(scope="module")
def runs(inputs: Inputs, ranks: WarmRanks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_runs(inputs, ranks, shared_folder(tmp_path_factory) / "adapters")


@pytest.mark.falsifies("FALSIFY-APR-DIST-ADAPTER-001")
@pytest.mark.parametrize("name", ALL)
def test_twenty_steps_are_those_of_transformers_and_peft(name: str, runs: Path, inputs: Inputs) -> None:
    expected = reference(inputs, runs, name)
    steps = metrics(runs / name)
    assert len(steps) == STEPS
    for line, loss in zip(steps, expected.losses, strict=True):
        assert line["train_loss"] == pytest.approx(loss, abs=1e-5)
    found = adapter_tensors(runs / name / "adapter")
    assert found.keys() == expected.weights.keys()
    begun = adapter_tensors(runs / f"{RUNS[name][1]}-initial" / "adapter")
    for tensor, values in expected.weights.items():
        assert torch.allclose(found[tensor], values, atol=1e-5, rtol=0), tensor
        assert not torch.allclose(found[tensor], begun[tensor], atol=1e-4), tensor


@pytest.mark.parametrize("name", ALL)
def test_the_adapter_alone_is_saved_and_has_moments(name: str, runs: Path, inputs: Inputs) -> None:
    folder = last(runs / name)
    with AprReader(inputs.pretrained) as reader:
        model, base = prove_model(reader).config, file_weights_digest(reader)
    with (
        open_adapter(folder / "checkpoint.apr", model) as found,
        open_adapter(folder / "adapter", model) as same,
    ):
        assert found.base_digest == same.base_digest == base
        assert found.adapter == same.adapter
        shapes = dict(found.shapes)
    assert shapes
    held = set()
    for path in folder.glob("optimizer-*.safetensors"):
        with safe_open(path, framework="np") as file:
            held |= {key for key in file.keys() if not key.startswith("random.")}  # noqa: SIM118
    assert held == {f"{tensor}.{key}" for tensor in shapes for key in ("exp_avg", "exp_avg_sq")}
    world, _, strategy = RUNS[name]
    facts = verdict(runs / name)["facts"]
    assert (facts["strategy"], facts["world_size"]) == (strategy[0], world)
    arrived = next(gate for gate in verdict(runs / name)["gates"] if gate["id"].endswith("TRAINER-001"))
    assert arrived["measured"].startswith(f"{len(model.parameter_shapes()) + len(shapes)} tensors")


@pytest.mark.parametrize("name", AGAIN)
def test_a_resumed_adapter_ends_with_the_very_bits(name: str, runs: Path) -> None:
    whole, resumed = runs / name, runs / f"{name}-resumed"
    for one, other in zip(metrics(whole), metrics(resumed), strict=True):
        assert (one["train_loss"], one["grad_norm"]) == (other["train_loss"], other["grad_norm"])
    names = sorted(path.name for path in last(whole).glob("optimizer*"))
    assert names
    for file in [*names, "adapter/adapter_model.safetensors", "adapter/adapter_config.json"]:
        assert (last(resumed) / file).read_bytes() == (last(whole) / file).read_bytes()


def test_an_adapter_goes_on_in_fewer_processes_and_without_shards(runs: Path) -> None:
    for one, other in zip(metrics(runs / "lora"), metrics(runs / "moved"), strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], abs=1e-5)


@pytest.mark.parametrize("name", [name for name in DROPPED if name != "dropout"])
def test_dropout_draws_the_same_when_a_block_is_computed_again(name: str, runs: Path) -> None:
    plain, again = metrics(runs / "dropout"), metrics(runs / name)
    assert [line["train_loss"] for line in plain] == pytest.approx(
        [line["train_loss"] for line in again], abs=2e-6
    )
    assert plain[3]["train_loss"] != pytest.approx(metrics(runs / "lora")[3]["train_loss"], abs=1e-5)


def test_packed_documents_are_kept_apart_beside_an_adapter(runs: Path) -> None:
    cpu, plain, joined = ([line["train_loss"] for line in metrics(runs / name)] for name in PACKED)
    assert cpu == pytest.approx(plain, abs=1e-5)
    assert cpu != pytest.approx(joined, abs=1e-3)


@pytest.mark.skipif(not HAS_COMPILER, reason="there is no C++ compiler")
def test_compiled_blocks_train_the_same_adapter(runs: Path, inputs: Inputs, tmp_path: Path) -> None:
    compiled = ("--compute.compile", "block", "--compute.activation-checkpointing", "full")
    assert reopened(tmp_path / "run", inputs, *compiled) == ExitCode.OK
    for line, plain in zip(metrics(tmp_path / "run"), metrics(runs / "lora"), strict=True):
        assert line["train_loss"] == pytest.approx(plain["train_loss"], abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_peft_opens_the_folder_with_the_logits_of_the_run(kind: str, runs: Path, inputs: Inputs) -> None:
    model = peft_model(inputs, runs / kind / "adapter").eval()
    rows = torch.load(runs / "batches.pt", weights_only=True)[0].long()
    with torch.no_grad():
        logits = model(input_ids=rows[:, :-1]).logits
        base = model.unload()(input_ids=rows[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
    assert loss < torch.nn.functional.cross_entropy(base.flatten(0, 1), rows[:, 1:].flatten())


def test_the_best_step_can_be_handed_over(runs: Path, inputs: Inputs, tmp_path: Path) -> None:
    assert reopened(tmp_path / "run", inputs, "--checkpoint.final", "best") == ExitCode.OK
    facts = verdict(tmp_path / "run")["facts"]
    folder = tmp_path / "run" / "steps" / f"{facts['checkpoint_step']:06d}"
    for name in ("checkpoint.apr", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (folder / name).read_bytes()
    assert facts["base_digest"].startswith("sha256:")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--adapter.targets", "c_attn"), "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"),
        (("--adapter.targets", "lm_head"), "the target 'lm_head' is no linear map of this model"),
        (("--adapter.layers", "0,2"), "there is no block 2 in a model of 2 blocks"),
        (("--adapter.targets", "lora,*.self_attn.*,nothing*"), "the target 'lora' is no linear map"),
        (("--adapter.bias",), "model.layers.0.self_attn.o_proj has no bias"),
        (("--adapter.kind", "dora", "--adapter.bias"), "a bias of its own does not go with dora"),
        (("--adapter.train-embeddings", "5,100000"), "there is no row 100,000"),
        (("--adapter.train-embeddings", "5,5"), "an id is given twice"),
        (("--adapter.kind", "off"), "adapter.rank is set and adapter.kind is off"),
    ],
)
def test_what_an_adapter_cannot_be_is_refused(
    given: tuple[str, ...], said: str, inputs: Inputs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert reopened(tmp_path / "run", inputs, *given) == ExitCode.USAGE
    assert said in " ".join(capfd.readouterr().err.split())
    assert not (tmp_path / "run").exists()


def test_an_adapter_needs_a_base_and_no_model_is_taken_for_one(
    runs: Path, inputs: Inputs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code = reopened(tmp_path / "run", inputs, "--init", str(runs / "lora" / "checkpoint.apr"))
    assert code == ExitCode.MODEL_FILE
    assert "the file holds an adapter" in capfd.readouterr().err
    run = runs / "lora"
    text = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert text["target_modules"] == [
        "down_proj",
        "gate_proj",
        "k_proj",
        "o_proj",
        "q_proj",
        "up_proj",
        "v_proj",
    ]


def test_a_run_is_resumed_with_its_own_base_alone(
    runs: Path, inputs: Inputs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = inputs.pretrained_run / "steps" / "000250" / "checkpoint.apr"
    assert other.read_bytes() == inputs.pretrained.read_bytes()  # the same by another name goes
    again = ("--resume", str(half(runs / "lora")), "--num-steps", str(HALF))
    assert (
        reopened(tmp_path / "a", inputs, *again, "--resume-allow", "num_steps", "--init", str(other))
        == ExitCode.OK
    )
