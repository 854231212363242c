"""What a plan says of an adapter is what a run holds, and it refuses what the run refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from builders.adapter_ranks import reopened
from builders.models import tiny_config
from builders.sessions import open_alone

from apr_dist.choices import ActivationCheckpointing, Offload, Precision, Strategy
from apr_dist.cli import main
from apr_dist.config.sections import AdapterSection
from apr_dist.gates.adapters import adapter_of
from apr_dist.model.config import TransformerConfig
from apr_dist.model.families import Family
from apr_dist.model.quantized import quantized_layers
from apr_dist.planning.activations import Load
from apr_dist.planning.memory import estimate
from apr_dist.planning.state import State, shards

if TYPE_CHECKING:
    from builders.runs import Inputs

LLAMA_3_8B = TransformerConfig(
    family=Family.LLAMA,
    vocab_size=128256,
    hidden_size=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    intermediate_size=14336,
    max_position_embeddings=8192,
    rope_theta=5e5,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
)
GIB = 1 << 30
ONE_GPU = Load(
    micro_batch=1,
    seq_length=2048,
    accumulates=True,
    precision=Precision.BF16,
    cuda=True,
    checkpointing=ActivationCheckpointing.FULL,
)


def bytes_of(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize(
    "asked",
    [
        {"kind": "lora", "rank": 3},
        {"kind": "dora", "rank": 5, "base": {"bits": 16}},
        {"kind": "rslora", "targets": "q_proj", "layers": "1"},
        {"kind": "lora", "bias": True, "targets": "k_proj"},
        {"kind": "lora", "rank": 3, "base": {"bits": 4}},
        {"kind": "dora", "rank": 3, "base": {"bits": 8}},
        {"kind": "lora", "rank": 3, "train_embeddings": "1,9"},
    ],
)
def test_weights_gradients_and_moments_are_counted_to_the_byte(asked: dict[str, Any]) -> None:
    model = tiny_config(Family.QWEN2)
    section = AdapterSection(**asked)
    adapter, alone = adapter_of(section, model), Strategy.SINGLE
    said = State.of(model, shards(alone, 1, 1), alone, Offload.NONE, adapter=adapter)
    rows = torch.randint(model.vocab_size, (2, 17))
    settings = {"batches": [rows], "batch_size": 2, "seq_length": 16, "lr": 1e-3}
    with open_alone(model, Strategy.SINGLE, adapter=section.model_dump(mode="json"), **settings) as session:
        scales = (one for layer in quantized_layers(session.model).values() for one in layer.stored()[1:])
        assert bytes_of([*session.model.parameters(), *scales]) == said.weights
        inputs, targets = rows[:, :-1], rows[:, 1:]
        session.engine.accumulate(inputs, targets, scale=1.0, last=True)
        given = [weight.grad for weight in session.model.parameters() if weight.grad is not None]
        assert bytes_of(given) == said.gradients
        session.engine.step(torch.tensor(False))
        state = session.engine.optimizer.state.values()
        held = [one[key] for one in state for key in ("exp_avg", "exp_avg_sq")]
        assert bytes_of(held) == said.optimizer


OFFLOADED = replace(ONE_GPU, checkpointing=ActivationCheckpointing.FULL_OFFLOAD)


@pytest.mark.parametrize(
    ("bits", "targets", "load", "most"),
    [
        (16, "q_proj,v_proj", ONE_GPU, 17.0),
        (16, "all-linear", ONE_GPU, 17.5),
        (16, "all-linear", OFFLOADED, 16.5),
        (8, "all-linear", ONE_GPU, 11.5),
        (4, "q_proj,v_proj", ONE_GPU, 7.5),
        (4, "all-linear", ONE_GPU, 8.0),
        (4, "all-linear", OFFLOADED, 7.0),
    ],
)
def test_eight_billion_parameters_fit_one_gpu(bits: int, targets: str, load: Load, most: float) -> None:
    section = AdapterSection.model_validate({"kind": "lora", "targets": targets, "base": {"bits": bits}})
    adapter, one = adapter_of(section, LLAMA_3_8B), Strategy.SINGLE
    found = estimate(LLAMA_3_8B, load, strategy=one, world_size=1, shard_size=1, adapter=adapter)
    assert (most - 0.5) * GIB < found.total < most * GIB


def test_a_base_in_bf16_is_kept_in_16_bits_unless_others_are_asked_for(
    inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    narrow = tmp_path / "narrow.apr"
    assert main(["import", str(inputs.pretrained), "-o", str(narrow), "--dtype", "bf16"]) == 0
    held = {}
    for name, init, more in (
        ("wide", inputs.pretrained, ()),
        ("narrow", narrow, ()),
        ("asked", narrow, ("--adapter.base.bits", "32")),
    ):
        flags = [
            "plan",
            *inputs.data_flags(),
            "--init",
            str(init),
            "--run-dir",
            str(tmp_path / "r"),
            "--json",
        ]
        capsys.readouterr()
        assert main([*flags, "--num-steps", "10", "--adapter.kind", "lora", *more]) == 0
        held[name] = json.loads(capsys.readouterr().out)["memory_bytes"]["single"]["weights"]
    assert held["narrow"] < 0.65 * held["wide"]
    assert held["asked"] == held["wide"]
    run = tmp_path / "run"
    assert reopened(run, inputs, "--init", str(narrow), "--num-steps", "0") == 0
    assert "base in training: in bf16" in (run / "adapter" / "README.md").read_text()


def test_a_plan_says_what_is_trained_and_refuses_what_the_run_refuses(
    inputs: Inputs, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    flags = ["plan", *inputs.data_flags(), "--init", str(inputs.pretrained), "--run-dir", str(tmp_path / "r")]
    flags += ["--num-steps", "10", "--adapter.kind", "lora", "--adapter.rank", "2"]
    assert main(flags) == 0
    said = capsys.readouterr().out
    assert "lora of rank 2: 4,096 parameters are trained" in " ".join(said.split())
    assert main([*flags, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["trained_parameters"] == 4096
    assert facts["memory_bytes"]["single"]["optimizer"] == 2 * 4 * 4096
    assert main([*flags, "--adapter.targets", "c_attn"]) != 0
    assert "the target 'c_attn' is no linear map" in capsys.readouterr().out
    assert main([*flags, "--processes", "2", "--parallel.strategy", "zero3", "--adapter.kind", "dora"]) != 0
    assert "dora is not trained under strategy zero3" in " ".join(capsys.readouterr().out.split())
