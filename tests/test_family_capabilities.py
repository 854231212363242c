"""What every family can do besides what the reference does: recomputation, memory rungs, and a plan."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from builders.models import random_tokens, tiny_config, tiny_decoder
from builders.sessions import open_alone

from apr_dist.choices import ActivationCheckpointing, Strategy
from apr_dist.config.reading import parse_command_line
from apr_dist.model.config import PRESETS, TransformerConfig
from apr_dist.model.families import Family, layer_kinds, rope_layers
from apr_dist.planning import plan
from apr_dist.planning.tracing import trace

CARD = ["--synthetic", "--parallel.precision", "bf16", "--device", "cuda", "--no-checkpoint.background"]
CARD += ["--micro-batch-size", "1", "--batch-size", "1", "--memory.weights", "split"]
CARD += ["--compute.activation-checkpointing", "full"]


@pytest.mark.shows("recomputation")
@pytest.mark.parametrize("family", Family)
def test_recomputed_gradients_are_those_of_kept_activations(family: Family) -> None:
    config = tiny_config(family)
    tokens, found = random_tokens(config, (2, 20)), []
    for mode in (
        ActivationCheckpointing.OFF,
        ActivationCheckpointing.FULL,
        ActivationCheckpointing.SELECTIVE,
    ):
        model = tiny_decoder(config)
        model.set_checkpointing(mode)
        model(tokens[:, :-1], tokens[:, 1:])[0].backward()
        found.append({name: one.grad for name, one in model.named_parameters()})
    for other in found[1:]:
        assert all(torch.equal(other[name], gradient) for name, gradient in found[0].items())


def trained(model: TransformerConfig, **settings: object) -> dict[str, torch.Tensor]:
    """Every weight after two steps of a session of one process."""
    batches = [random_tokens(model, (4, 17), seed=seed) for seed in (1, 2)]
    sizes = {"batch_size": 4, "seq_length": 16, "num_steps": 2, "lr": 1e-3}
    with open_alone(model, Strategy.SINGLE, batches=batches, **sizes, **settings) as session:
        for step in range(2):
            session.stepper.take(step, compare=False, more=step == 0)
        return {name: session.weight(name).clone() for name, _ in session.model.named_parameters()}


@pytest.mark.shows("memory rungs")
@pytest.mark.parametrize("family", Family)
def test_split_weights_train_to_the_bits_of_whole_ones(family: Family) -> None:
    model, half = tiny_config(family, intermediate_size=128), {"precision": "bf16"}
    whole, split = (
        trained(model, parallel=half, memory={"weights": weights}) for weights in ("f32", "split")
    )
    assert whole.keys() == split.keys()
    assert all(torch.equal(split[name], values) for name, values in whole.items())
    bytewise = trained(model, parallel=half, optimizer={"state_bits": 8})
    assert all((bytewise[name] - values).abs().max() < 2e-3 for name, values in whole.items())


PUBLISHED = {one.family: name for name, one in PRESETS.items()}
"""A published size of each family."""


def cut(name: str, layers: int) -> TransformerConfig:
    """A published configuration with fewer layers."""
    model = PRESETS[name]
    facts, changes = model.family.definition, {}
    if facts.full_every is not None:
        changes["layer_types"] = layer_kinds(layers, facts.full_every)
    if facts.no_rope_every is not None:
        changes["no_rope_layers"] = rope_layers(layers, facts.no_rope_every)
    return replace(model, num_layers=layers, **changes)


@pytest.mark.shows("plan")
@pytest.mark.parametrize("family", Family)
def test_a_plan_is_what_a_traced_step_of_published_sizes_holds(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    if family is not Family.GEMMA3 and "APR_DIST_CONFIGURATIONS" not in os.environ:
        pytest.skip("make families traces every family")
    monkeypatch.setattr(plan, "_has_liger", lambda: False)
    model = cut(PUBLISHED[family], 2)
    config = parse_command_line([*CARD, "--seq-length", "1024"]).config
    said, found = next(iter(plan._memory(model, config, 1).values())), trace(model, config)
    assert said.weights == pytest.approx(found.weights, rel=0.01)
    assert said.low == pytest.approx(found.low, rel=0.01)
    assert said.optimizer == pytest.approx(found.optimizer, rel=0.01)
    assert said.total == pytest.approx(found.peak, rel=0.05)
