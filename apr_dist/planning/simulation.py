"""What each strategy takes on 8 to 4,096 GPUs: memory by part, bytes sent a step, and what no longer fits.

Arithmetic from dimensions; nothing is built. Memory is ``memory.estimate``, which the suite holds to what
runs really keep. Volumes are those of ring collectives (Patarasuk and Yuan, 2009: an all-reduce of n bytes
over k ranks sends 2 n (k - 1) / k from each, a gather or a reduce-scatter half of it) for what each engine
here does: FSDP2 gathers in the compute type, ZeRO in f32, and gradients are always reduced in f32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from apr_dist.choices import Precision, Strategy
from apr_dist.config import TrainConfig
from apr_dist.gates.adapters import adapter_of
from apr_dist.model.config import TransformerConfig
from apr_dist.parallel.storage import Storage
from apr_dist.parallel.stored_bytes import F32, trained_count
from apr_dist.parallel.strategy import GPUS_PER_MACHINE
from apr_dist.planning.activations import Load
from apr_dist.planning.memory import Memory, estimate

WORLDS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
MOST_LAYERS = 1 << 14
_GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """One strategy on one number of GPUs.

    Attributes:
        strategy: how the model is spread.
        gpus: processes, one per GPU.
        memory: of one GPU at its fullest moment.
        sent_bytes: what one GPU sends in one optimizer step.
        fits: whether the memory is there.
        largest_layers: layers of the largest model of the same width that would fit; 0 for none.
        largest_parameters: its parameters.
    """

    strategy: Strategy
    gpus: int
    memory: Memory
    sent_bytes: int
    fits: bool
    largest_layers: int
    largest_parameters: int


def simulate(
    model: TransformerConfig,
    config: TrainConfig,
    *,
    gpu_bytes: int,
    strategies: tuple[Strategy, ...] = (),
) -> list[Simulated]:
    """Every strategy on every number of GPUs.

    Args:
        model: the decoder.
        config: batch sizes, sequence length, precision; each GPU takes ``micro_batch_size`` sequences a
            forward (1 where it is not given), and the batch grows where it is smaller than that.
        gpu_bytes: memory of one GPU that the run may use.
        strategies: those to look at; none: all that use several processes.
    """
    wanted = strategies or tuple(one for one in Strategy if one is not Strategy.SINGLE)
    return [_simulated(model, config, one, gpus, gpu_bytes) for one in wanted for gpus in WORLDS]


def _simulated(
    model: TransformerConfig, config: TrainConfig, strategy: Strategy, gpus: int, gpu_bytes: int
) -> Simulated:
    micro = config.micro_batch_size or 1
    micro_batches = max(1, config.batch_size // (micro * gpus))
    load = Load(
        micro_batch=micro,
        seq_length=config.seq_length,
        accumulates=micro_batches > 1,
        precision=config.parallel.precision,
        cuda=True,
        copies=config.checkpoint.background,
    )
    shard_size = config.parallel.shard_size or GPUS_PER_MACHINE

    asked = config.adapter
    everywhere = asked.model_copy(update={"layers": ()})

    def memory(layers: int) -> Memory:
        scaled = replace(model, num_layers=layers)
        return estimate(
            scaled,
            load,
            strategy=strategy,
            world_size=gpus,
            shard_size=shard_size,
            offload=config.parallel.offload,
            state_bits=config.optimizer.state_bits,
            storage=Storage(weights=config.memory.weights, gradients=config.memory.gradients),
            adapter=adapter_of(asked if layers == model.num_layers else everywhere, scaled),
        )

    held = memory(model.num_layers)
    layers = _most(lambda count: memory(count).total <= gpu_bytes)
    return Simulated(
        strategy=strategy,
        gpus=gpus,
        memory=held,
        sent_bytes=sent_bytes(
            model.parameter_count(),
            strategy,
            trained=trained_count(model, adapter_of(asked, model)),
            gpus=gpus,
            shard_size=shard_size,
            micro_batches=micro_batches,
            precision=config.parallel.precision,
        ),
        fits=held.total <= gpu_bytes,
        largest_layers=layers,
        largest_parameters=replace(model, num_layers=layers).parameter_count() if layers else 0,
    )


def sent_bytes(
    parameters: int,
    strategy: Strategy,
    *,
    trained: int | None = None,
    gpus: int,
    shard_size: int,
    micro_batches: int,
    precision: Precision,
) -> int:
    """Bytes one GPU sends in one optimizer step.

    Args:
        parameters: of the model.
        strategy: how it is spread.
        trained: those of them, or beside them, that are trained; None: all.
        gpus: processes.
        shard_size: processes that share one copy under ``hsdp``.
        micro_batches: forwards and backwards a step.
        precision: compute type, in which FSDP2 gathers.
    """
    whole = F32 * (parameters if trained is None else trained)
    gathered = F32 * parameters if precision is Precision.F32 else F32 * parameters // 2

    def ring(volume: int, ranks: int) -> int:
        return volume * (ranks - 1) // ranks

    if strategy is Strategy.DDP:
        return 2 * ring(whole, gpus)
    if strategy is Strategy.ZERO1:  # gradients at the last micro-batch, then the new weights
        return 2 * ring(whole, gpus)
    if strategy is Strategy.ZERO2:
        return micro_batches * ring(whole, gpus) + ring(whole, gpus)
    if strategy is Strategy.ZERO3:
        return micro_batches * (2 * ring(F32 * parameters, gpus) + ring(whole, gpus))
    size = shard_size if strategy is Strategy.HSDP else gpus
    gathers = 1 if strategy is Strategy.SHARD_GRAD_OP else 2
    between_copies = 2 * ring(whole // size, gpus // size)
    return micro_batches * (gathers * ring(gathered, size) + ring(whole, size) + between_copies)


def _most(fits: Callable[[int], bool]) -> int:
    """Largest number of layers that fits, by halving; 0 where one does not."""
    if not fits(1):
        return 0
    low, high = 1, MOST_LAYERS
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


STATE = ("weights", "gradients", "optimizer", "masters", "buckets")
WORK = ("activations", "loss", "working")


def simulation_lines(points: list[Simulated], *, gpu_bytes: int) -> Iterator[str]:
    """A table in 80 columns, what its columns are, and which strategy fits where."""
    widths = (14, 6, 9, 9, 9, 9, 9, 5, 10)
    headings = ("strategy", "GPUs", "state", "work", "GiB", "host", "sent", "fits", "largest")
    for cells in (headings, *map(_cells, points)):
        first, *rest = cells
        yield f"{first:<{widths[0]}}" + "".join(f"{c:>{w}}" for c, w in zip(rest, widths[1:], strict=True))
    yield ""
    yield "state: GiB of weights, gradients, optimizer, f32 masters and buckets on one GPU"
    yield "work: GiB of activations, logits and what backward computes on the way"
    yield "GiB: both; host: GiB in host memory for one GPU; sent: GiB it sends in a step"
    yield "largest: parameters of the largest model of this width that would fit"
    yield ""
    for strategy in dict.fromkeys(point.strategy for point in points):
        worlds = [point.gpus for point in points if point.strategy is strategy and point.fits]
        size = f"of {gpu_bytes / _GIB:g} GiB"
        where = f"fits on {min(worlds):,} GPUs {size} or more" if worlds else f"does not fit on GPUs {size}"
        yield f"{strategy.value}: {where}"


def _cells(point: Simulated) -> tuple[str, ...]:
    state, work = (sum(getattr(point.memory, part) for part in parts) for parts in (STATE, WORK))
    sizes = (state, work, point.memory.total, point.memory.host, point.sent_bytes)
    return (
        point.strategy.value,
        f"{point.gpus:,}",
        *(f"{size / _GIB:,.1f}" for size in sizes),
        "yes" if point.fits else "NO",
        f"{point.largest_parameters / 1e9:,.1f} B" if point.largest_layers else "none",
    )
