"""Weights on their way into the network: built empty, measured with random weights, loaded, proven."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from apr_dist.apr.digests import weights_digest
from apr_dist.apr.reader import AprReader
from apr_dist.config import TrainConfig
from apr_dist.gates.adapters import adapter_of
from apr_dist.gates.result import GateResult
from apr_dist.model.adapters import is_adapter
from apr_dist.model.config import TransformerConfig
from apr_dist.model.transformer import Decoder
from apr_dist.parallel.runtime import Runtime
from apr_dist.parallel.sharding import build_decoder, reshard
from apr_dist.parallel.weights import draw_weights, load_weights
from apr_dist.runs.display import Display
from apr_dist.runs.progress import RandomStart
from apr_dist.training.random_start import can_measure, compare_with_random
from apr_dist.training.run_data import held_out


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Where the weights come from.

    Attributes:
        reader: the open file, on rank 0 only.
        named: its path, on every rank; None draws random weights.
        compared: whether random weights are measured first.
        adapter: the open checkpoint of an adapter to resume, on rank 0 only.
        base_bits: of the frozen matrices beside an adapter, on every rank.
    """

    reader: AprReader | None
    named: str | None
    compared: bool
    adapter: AprReader | None = None
    base_bits: int | None = None


@dataclass(frozen=True, kw_only=True)
class Arrived:
    """The network with its weights in place.

    Attributes:
        model: the decoder.
        gate: says that every weight is its source's.
        random_start: what random weights measured before.
        digests: of the values of every tensor's source.
    """

    model: Decoder
    gate: GateResult
    random_start: RandomStart | None
    digests: Mapping[str, str]

    @property
    def base_digest(self) -> str:
        """Identity of the weights without an adapter."""
        return weights_digest({name: one for name, one in self.digests.items() if not is_adapter(name)})


def build_model(
    config: TrainConfig, model_config: TransformerConfig, weights: Weights, runtime: Runtime, say: Display
) -> Arrived:
    """The network with its weights in place, and what is known of them.

    Raises:
        WeightsRefused: on every rank: a tensor is not its source's.
    """
    began, random_start = time.perf_counter(), None
    adapter = adapter_of(config.adapter, model_config, bits=weights.base_bits)
    model = build_decoder(model_config, runtime, adapter)
    digests: dict[str, str] = {}

    def load() -> None:
        given = load_weights(
            model, weights.reader, runtime, say.working, adapter=weights.adapter, seed=config.seed
        )
        digests.update(given)

    if weights.named is None:
        digests.update(draw_weights(model, model_config, runtime, seed=config.seed, progress=say.working))
    elif weights.compared and config.evaluation.random_sequences and not config.synthetic:
        random_start = _compare_with_random(config, model, model_config, runtime, load, say)
    else:
        load()
    arrived = GateResult(
        id="FALSIFY-APR-DIST-TRAINER-001",
        gate="weights arrived in the network",
        measured=f"{len(digests)} tensors from {weights.named or f'seed {config.seed}'}, digests equal on"
        f" {runtime.world_size} rank(s)",
        required="every digest equal to its source's, on every rank",
    )
    took = time.perf_counter() - began
    say(f"gate passed: {arrived.gate}: {arrived.measured} ({took:.1f} s)  [{arrived.id}]")
    return Arrived(model=model, gate=arrived, random_start=random_start, digests=digests)


def _compare_with_random(
    config: TrainConfig,
    model: Decoder,
    model_config: TransformerConfig,
    runtime: Runtime,
    load: Callable[[], None],
    say: Display,
) -> RandomStart | None:
    if not can_measure(runtime):
        say(f"random weights are not compared under {runtime.strategy}")
        load()
        return None
    asked = config.evaluation
    sample = held_out(config, runtime, min(asked.random_sequences, asked.max_sequences or 2**31))
    with contextlib.closing(sample):
        found = compare_with_random(model, model_config, runtime, sample, seed=config.seed, load=load)
    reshard(model)  # FSDP2 may keep parameters gathered after a forward that no backward follows
    say(
        f"random weights: loss {found.random_loss:.4f}; the init: {found.init_loss:.4f} on the same"
        f" {found.tokens:,} held-out tokens"
    )
    return found
