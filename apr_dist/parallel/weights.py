"""Weights from one file to all ranks, one tensor at a time, proven on arrival.

Rank 0 reads a tensor, every rank receives its part of it, nobody ever holds a second copy of the model.
What arrived is proven by digest against what the file holds. Which tensors a file must hold is the
business of ``gates.weights``; the way back into a file is in ``gather``.
"""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
import xxhash
from torch import nn

from apr_dist.apr.digests import values_digest, weights_digest
from apr_dist.apr.reader import AprReader
from apr_dist.errors import WeightsRefused
from apr_dist.model.adapter_layers import initial_value
from apr_dist.model.adapters import canonical, is_adapter
from apr_dist.model.config import TransformerConfig
from apr_dist.model.quantized import QuantizedLinear, kept_values, quantize, quantized_layers
from apr_dist.model.transformer import Decoder, initial_weight
from apr_dist.parallel.runtime import Runtime
from apr_dist.parallel.shard_layout import fill, whole_in_runs, whole_shape
from apr_dist.parallel.sharding import reshard
from apr_dist.parallel.split_weights import split_of

ARRIVAL = "FALSIFY-APR-DIST-TRAINER-001"
"""Falsifier of every refusal that a weight in the network is not the weight in the file."""

DRAWING_THREADS = 8
"""Most threads that draw weights; storing and proving them is then what takes the time."""

Progress = Callable[[str, int, int], None]
"""Called with (what is done, tensors of it that are done, tensors in all)."""


Source = Callable[[str, tuple[int, ...]], torch.Tensor]
"""Gives the f32 values of a tensor, in host memory, by its name and shape."""


def named_weights(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Every distinct parameter once, by its canonical (Hugging Face and APR) name."""
    reshard(model)
    for name, parameter in model.named_parameters(remove_duplicate=True):
        yield canonical(name), parameter


def saved_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a checkpoint holds, by name: those of an adapter where there is one, else all."""
    weights = dict(named_weights(model))
    return {name: weight for name, weight in weights.items() if is_adapter(name)} or weights


def load_weights(
    model: Decoder,
    reader: AprReader | None,
    runtime: Runtime,
    progress: Progress | None = None,
    *,
    adapter: AprReader | None = None,
    seed: int = 0,
) -> dict[str, str]:
    """Stream every tensor from rank 0's file into the parts of the model on every rank, and prove it.

    Args:
        model: a materialised decoder whose values are still arbitrary.
        reader: the open file on rank 0, None elsewhere.
        runtime: this rank's view of the run.
        progress: called on rank 0 after each tensor, while loading and while proving.
        adapter: the open file of the model's adapter on rank 0; None: a new adapter is drawn.
        seed: of a new adapter.

    Returns:
        tensor name to digest of the f32 values that the file holds. The model now has them, matrices kept
        in fewer bits the nearest to them.

    Raises:
        WeightsRefused: on all ranks, when any rank's tensor is not the file's.
    """
    if reader is None:
        return _stream(model, None, runtime, progress)
    base = _from_file(reader)
    beside = _from_file(adapter) if adapter is not None else _new_adapter(model, base, seed)
    return _stream(
        model, lambda name, shape: (beside if is_adapter(name) else base)(name, shape), runtime, progress
    )


def _new_adapter(model: Decoder, base: Source, seed: int) -> Source:
    """Draws an adapter's values; those that depend on the base come from ``base``, as it is kept."""
    shapes = model.config.parameter_shapes()

    def read(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        adapter = model.adapter
        assert adapter is not None

        def kept(weight: str) -> torch.Tensor:
            return kept_values(weight, base(weight, shapes[weight]), adapter)

        return initial_value(name, shape, adapter, seed=seed, base=kept)

    return read


def draw_weights(
    model: Decoder,
    config: TransformerConfig,
    runtime: Runtime,
    *,
    seed: int,
    progress: Progress | None = None,
) -> dict[str, str]:
    """Give every tensor its value from scratch (``model.transformer.initial_weight``), by the same way.

    An adapter begins as it does beside a file's weights, so that it changes nothing.

    Returns:
        tensor name to digest, as `load_weights`.
    """
    if not runtime.is_main:
        return _stream(model, None, runtime, None)
    sizes = config.parameter_shapes()
    shapes = {name: sizes[name] for name, _ in named_weights(model) if not is_adapter(name)}
    beside = _new_adapter(
        model, lambda name, shape: initial_weight(name, shape, config=config, seed=seed), seed
    )
    with contextlib.closing(_drawn_ahead(shapes, config, seed)) as drawn:
        return _stream(
            model, lambda *asked: beside(*asked) if is_adapter(asked[0]) else next(drawn), runtime, progress
        )


def _drawn_ahead(
    shapes: Mapping[str, tuple[int, ...]], config: TransformerConfig, seed: int
) -> Generator[torch.Tensor, None, None]:
    """Every weight from scratch in turn, drawn on threads while those before are on their way.

    A generator is a sequence, so one weight takes one core; together those ahead are no larger than the
    largest weight.
    """
    room = max(map(math.prod, shapes.values()))
    with ThreadPoolExecutor(min(DRAWING_THREADS, torch.get_num_threads()), "drawing") as pool:
        ahead: deque[tuple[int, Future[torch.Tensor]]] = deque()
        for name, shape in shapes.items():
            size = math.prod(shape)
            while ahead and sum(one for one, _ in ahead) + size > room:
                yield ahead.popleft()[1].result()
            ahead.append((size, pool.submit(initial_weight, name, shape, config=config, seed=seed)))
        while ahead:
            yield ahead.popleft()[1].result()


def _stream(
    model: nn.Module, source: Source | None, runtime: Runtime, progress: Progress | None
) -> dict[str, str]:
    count, coded = len(list(named_weights(model))), coded_weights(model)
    told = progress if runtime.is_main else None
    given: dict[str, str] = {}
    expected: dict[str, str] = {}
    with torch.no_grad():
        for done, (name, parameter) in enumerate(named_weights(model), start=1):
            layer = coded.get(name)
            shape = whole_shape(parameter) if layer is None else layer.shape
            values = source(name, shape) if source is not None else None
            if values is not None:
                given[name] = _digest(values)
            if layer is None:
                held = _fill_values(parameter, values, runtime)
            else:
                held = fill_codes(layer, values, runtime)
            if held is not None:
                expected[name] = held
            del values
            if told is not None:
                told("loading weights", done, count)
    prove_weights(model, runtime.broadcast_json(expected), runtime, told)
    digests: dict[str, str] = runtime.broadcast_json(given)
    return digests


def coded_weights(model: nn.Module) -> dict[str, QuantizedLinear]:
    """The maps that are kept in 4 or 8 bits, by the names of their weights in files."""
    return {canonical(f"{name}.weight"): layer for name, layer in quantized_layers(model).items()}


def _fill_values(parameter: torch.Tensor, values: torch.Tensor | None, runtime: Runtime) -> str | None:
    """Give every rank its part of rank 0's values, rounded where they are kept so; a collective.

    Returns:
        on rank 0 the digest of what is kept.
    """
    if values is not None and is_rounded(parameter):
        values = values.bfloat16().float()
    fill(parameter, values, runtime)
    return None if values is None else _digest(values)


def fill_codes(layer: QuantizedLinear, values: torch.Tensor | None, runtime: Runtime) -> str | None:
    """Quantise rank 0's matrix where it computes, and give every rank the codes; a collective.

    Returns:
        on rank 0 the digest of what the matrix was quantised to.
    """
    digest = None
    if values is not None:
        made = quantize(values.to(runtime.device), layer.bits)
        digest = _digest_of_bytes(made)
        for held, given in zip(layer.stored(), made, strict=True):
            held.copy_(given)
    for held in layer.stored():
        runtime.broadcast(held)
    return digest


def _digest_of_bytes(tensors: Iterable[torch.Tensor]) -> str:
    hashed = xxhash.xxh3_128()
    for tensor in tensors:
        hashed.update(tensor.detach().cpu().contiguous().numpy().data)
    return hashed.hexdigest()


def is_rounded(parameter: torch.Tensor) -> bool:
    """Whether the parameter's bf16 values are all there is of it."""
    return parameter.dtype is torch.bfloat16 and split_of(parameter) is None


def _from_file(reader: AprReader) -> Source:
    """Reads a file's tensors as f32, letting go of each one's pages before the next."""
    held: list[str] = []

    def read(name: str, _: tuple[int, ...]) -> torch.Tensor:
        while held:
            reader.forget(held.pop())
        held.append(name)
        return torch.utils.dlpack.from_dlpack(reader.float32(name))

    return read


def prove_weights(
    model: nn.Module, expected: Mapping[str, str], runtime: Runtime, progress: Progress | None = None
) -> None:
    """Compare every tensor, as every rank sees it whole, with the digest it must have; a collective.

    Raises:
        WeightsRefused: on all ranks, naming the first tensor that differs on the lowest such rank.
    """
    found = weight_digests(model, runtime, progress)
    wrong = [name for name in found if expected.get(name) != found[name]]
    wrong += [name for name in expected if name not in found]
    counts = torch.zeros(runtime.world_size, dtype=torch.int64, device=runtime.device)
    counts[runtime.rank] = len(wrong)
    bad_ranks = [rank for rank, count in enumerate(runtime.sum(counts).tolist()) if count]
    if bad_ranks:
        named = f", first {wrong[0]}" if wrong else ""
        raise WeightsRefused(
            f"weights on rank(s) {bad_ranks} differ from what they were loaded from{named}",
            expected=f"{len(expected)} tensors with the digests of their source",
            remedy="check the memory and links of that machine, then start again",
            falsifier=ARRIVAL,
        )


def weight_digests(model: nn.Module, runtime: Runtime, progress: Progress | None = None) -> dict[str, str]:
    """Digest of each parameter's whole f32 values, by name; a collective where parameters are sharded.

    Of a matrix in 4 or 8 bits it is that of codes and scales.
    """
    return _digests(list(named_weights(model)), runtime, progress, coded_weights(model))


def _digests(
    weights: Sequence[tuple[str, nn.Parameter]],
    runtime: Runtime,
    progress: Progress | None = None,
    coded: Mapping[str, QuantizedLinear] | None = None,
) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, parameter in weights:
        if coded and name in coded:
            found[name] = _digest_of_bytes(coded[name].stored())
            continue
        hashed = xxhash.xxh3_128()
        for run in whole_in_runs(parameter, runtime):
            hashed.update(host_array(run).data)
        found[name] = hashed.hexdigest()
        if progress is not None:
            progress("proving weights", len(found), len(weights))
    return found


def model_digest(model: nn.Module, runtime: Runtime) -> str:
    """``sha256:...`` over the names and digests of what a checkpoint holds: the identity of the weights."""
    return weights_digest(_digests(list(saved_weights(model).items()), runtime))


def host_array(values: torch.Tensor) -> np.ndarray:
    """Values as a contiguous f32 array in host memory."""
    array: np.ndarray = values.detach().to(device="cpu", dtype=torch.float32).contiguous().numpy()
    return array


def _digest(values: torch.Tensor) -> str:
    return values_digest(host_array(values))
