"""Gate: what an adapter is to be trained on, and that a saved one is of this run. Needs no PyTorch."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from apr_dist.apr.layout import DType
from apr_dist.apr.reader import AprReader
from apr_dist.choices import AdapterKind, GradientStorage, Offload, Strategy, WeightStorage
from apr_dist.config import TrainConfig
from apr_dist.config.sections import AdapterSection
from apr_dist.errors import DistributedError, UnsupportedModelFile, UsageError, WeightsRefused
from apr_dist.gates.result import GateResult
from apr_dist.gates.weights import check_names_and_shapes
from apr_dist.model.adapters import Adapter, chosen_modules
from apr_dist.model.config import TransformerConfig

STATED = "apr_dist.adapter"
"""Metadata key of an APR file that holds an adapter: what it is."""

BASE = "apr_dist.base_digest"
"""Metadata key of such a file: identity of the weights that it belongs to (`apr.digests.weights_digest`)."""

BASE_BITS = "apr_dist.base_bits"
"""Metadata key of such a file, and of a peft folder: bits that the base's matrices had in training."""

OTHER_BASE = "FALSIFY-APR-DIST-ADAPTER-002"
"""Falsifier of every refusal of an adapter beside weights that are not those it was trained on."""


def check_adapter_settings(config: TrainConfig, strategy: Strategy) -> None:
    """Every rule on ``adapter`` that needs no file.

    Raises:
        UsageError: keys without a kind, no init, peft is not installed, or keys that exclude each other.
        DistributedError: the strategy cannot train one.
    """
    asked = config.adapter
    if not asked.is_on:
        _refuse_keys_alone(asked)
        return
    if config.init is None:
        raise UsageError(
            f"adapter.kind is {asked.kind} and there are no weights for it to be beside",
            where="--adapter.kind",
            expected="--init with a pretrained APR file",
            remedy="give --init, or leave --adapter.kind out to train every weight",
        )
    if asked.bias and asked.kind is AdapterKind.DORA:
        raise UsageError(
            "a bias of its own does not go with dora",
            where="--adapter.bias",
            expected="lora or rslora",
            remedy="leave --adapter.bias out",
        )
    if strategy is Strategy.ZERO3 and asked.kind is AdapterKind.DORA:
        raise DistributedError(
            f"dora is not trained under strategy {strategy}, which cuts a row's length from its row",
            where="--parallel.strategy",
            expected="fsdp2, which shards base and adapter alike, or any other strategy",
            remedy="use --parallel.strategy fsdp2",
        )
    if strategy is Strategy.ZERO3 and asked.train_embeddings:
        raise DistributedError(
            f"rows of tokens are not trained under strategy {strategy}, which gathers a matrix without them",
            where="--adapter.train-embeddings",
            expected="fsdp2, or any strategy but zero3",
            remedy="use --parallel.strategy fsdp2",
        )
    _refuse_storage(config, strategy)
    if asked.base.bits is not None and asked.base.bits < 16:
        _check_quantized(asked.base.bits, strategy)
    if find_spec("peft") is None:
        raise UsageError(
            "adapters are peft's layers, and peft is not installed",
            where="--adapter.kind",
            expected="its package in this environment",
            remedy="pip install 'apr-dist[adapters]'",
        )


def _check_quantized(bits: int, strategy: Strategy) -> None:
    """A base in 4 or 8 bits is whole in every process, and bitsandbytes quantises it.

    Raises:
        DistributedError: the strategy would cut codes from their scales.
        UsageError: bitsandbytes is not installed.
    """
    if strategy not in {Strategy.SINGLE, Strategy.DDP}:
        raise DistributedError(
            f"a base in {bits} bits is not trained under strategy {strategy}",
            where="--parallel.strategy",
            expected="one process or ddp, where every process has the whole base; it is small in few bits",
            remedy=f"use --parallel.strategy ddp, or --adapter.base.bits 16 with {strategy}",
        )
    if find_spec("bitsandbytes") is None:
        raise UsageError(
            f"adapter.base.bits is {bits} and bitsandbytes is not installed",
            where="--adapter.base.bits",
            expected="the library that quantises the base",
            remedy="pip install 'apr-dist[bitsandbytes]'",
        )


def _refuse_storage(config: TrainConfig, strategy: Strategy) -> None:
    """An adapter is small and kept in f32; what it is beside is stored as ``adapter.base`` says."""
    stored, streams = config.memory, config.parallel.offload is Offload.OPTIMIZER and not strategy.zero_stage
    if streams or (stored.weights, stored.gradients) != (WeightStorage.F32, GradientStorage.F32):
        raise UsageError(
            "memory.weights, memory.gradients and an offload without ZeRO are for weights that are trained",
            where="--parallel.offload" if streams else "--memory.weights",
            expected="an adapter in f32, on the device",
            remedy="leave it out, and use --adapter.base.bits 16 for the frozen weights",
        )


def _refuse_keys_alone(asked: AdapterSection) -> None:
    default = AdapterSection()
    changed = [key for key in AdapterSection.model_fields if getattr(asked, key) != getattr(default, key)]
    if changed:
        raise UsageError(
            f"adapter.{changed[0]} is set and adapter.kind is off",
            where=f"--adapter.{changed[0]}",
            expected="a kind of adapter",
            remedy="add --adapter.kind lora, or leave it out",
        )


def adapter_of(
    asked: AdapterSection,
    model: TransformerConfig,
    reader: AprReader | None = None,
    *,
    bits: int | None = None,
) -> Adapter | None:
    """The adapter that a configuration means for a model; None: every weight is trained.

    Args:
        asked: the section of the configuration.
        model: the base's architecture.
        reader: the base's file, which says how many bits lose nothing where none are asked for.
        bits: these, where the file was read elsewhere.

    Raises:
        UsageError: a target that is nothing in this model, or a map without the bias that is asked for.
    """
    if not asked.is_on:
        return None
    modules = chosen_modules(model, asked.targets, asked.layers)
    shapes = model.parameter_shapes()
    without = [name for name in modules if asked.bias and f"{name}.bias" not in shapes]
    if without:
        raise UsageError(
            f"{without[0]} has no bias for adapter.bias to be added to",
            where="--adapter.bias",
            expected="targets that have one",
            remedy="leave --adapter.bias out, or name targets with a bias in --adapter.targets",
        )
    return Adapter(
        kind=asked.kind,
        rank=asked.rank,
        alpha=asked.alpha,
        dropout=asked.dropout,
        modules=modules,
        bias=asked.bias,
        init=asked.init,
        base_bits=asked.base.bits or bits or (16 if reader is not None and _is_bf16(reader) else 32),
        tokens=_tokens_of(asked, model, modules),
    )


def _tokens_of(asked: AdapterSection, model: TransformerConfig, modules: tuple[str, ...]) -> tuple[int, ...]:
    """The ids whose rows are trained, in order.

    Raises:
        UsageError: the model has no such row, an id is given twice, or the head has factors too.
    """
    ids, wrong = asked.train_embeddings, None
    beyond = [one for one in ids if one >= model.vocab_size]
    if beyond:
        wrong = f"there is no row {beyond[0]:,} in a model of {model.vocab_size:,}"
    elif len(set(ids)) < len(ids):
        wrong = "an id is given twice"
    elif ids and "lm_head" in modules:
        wrong = "rows of the head are trained, and lm_head is a target too"
    if wrong is not None:
        raise UsageError(
            wrong,
            where="--adapter.train-embeddings",
            expected="ids of the model's tokens, each once, and a head without factors",
            remedy="name ids that apr-dist import --add-tokens printed, or leave it out",
        )
    return tuple(sorted(ids))


def keeps_values(adapter: Adapter, reader: AprReader) -> bool:
    """Whether the bits of a base leave every value of its file as it is."""
    return adapter.base_bits == 32 or (adapter.base_bits == 16 and _is_bf16(reader))


def _is_bf16(reader: AprReader) -> bool:
    """Whether every matrix of a file is stored in bf16."""
    return all(one.dtype is DType.BF16 for one in reader.tensors.values() if len(one.shape) == 2)


def with_base_bits(config: TrainConfig, bits: int) -> TrainConfig:
    """The configuration with the bits of the base stated."""
    base = config.adapter.base.model_copy(update={"bits": bits})
    return config.model_copy(update={"adapter": config.adapter.model_copy(update={"base": base})})


def prove_adapter_file(reader: AprReader, adapter: Adapter, model: TransformerConfig) -> GateResult:
    """A saved adapter holds every tensor of this one, all finite.

    Raises:
        UnsupportedModelFile: the file holds a model.
        WeightsRefused: a tensor is missing, left over, misshapen or not finite.
    """
    if STATED not in reader.metadata.custom:
        raise UnsupportedModelFile(
            "the file holds a model, not an adapter",
            where=reader.path,
            expected="a checkpoint of a run with adapter.kind",
            remedy="give it as --init, or leave --adapter.kind out",
        )
    expected = adapter.shapes(model)
    found = {name: entry.shape for name, entry in reader.tensors.items()}
    check_names_and_shapes(expected, found, where=reader.path)
    values = sum(_finite(reader, name) for name in expected)
    return GateResult(
        id="FALSIFY-APR-DIST-ADAPTER-001",
        gate="every tensor of the adapter is there",
        measured=f"{len(expected)} tensors, {values:,} finite values",
        required="none missing, left over or misshapen, all finite",
    )


def _finite(reader: AprReader, name: str) -> int:
    import numpy as np  # noqa: PLC0415  (beside what reads it)

    values = reader.float32(name)
    if not np.isfinite(values).all():
        raise WeightsRefused(
            f"{name} holds a value that is not finite",
            where=reader.path,
            expected="finite values",
            remedy="go on from an earlier step folder",
        )
    return int(values.size)


def refuse_other_base(stated: str | None, found: str, *, where: Path, base: Path) -> None:
    """An adapter belongs to the weights that it was trained beside, by content.

    Raises:
        WeightsRefused: it names other weights, or none.
    """
    if stated != found:
        raise WeightsRefused(
            f"the adapter belongs to weights {stated or 'that it does not name'}, and {base} holds {found}",
            where=where,
            expected="the base that the adapter was trained on",
            remedy="give the file that was --init of its run",
            falsifier=OTHER_BASE,
        )
