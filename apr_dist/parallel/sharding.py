"""How a decoder is spread over the ranks, and one parameter made whole or filled at a time.

FSDP2 shards are made here by ``fully_shard``: Accelerate's own FSDP2 path is DDP in silence on CPU, so
it is not used on any device. ZeRO-3 shards are made by ``deepspeed.zero.Init``. What fills the shards
and proves them is in ``weights``; how a step runs is in ``engine``.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from apr_dist.errors import DistributedError
from apr_dist.model.config import TransformerConfig
from apr_dist.model.transformer import Decoder
from apr_dist.parallel.runtime import Runtime
from apr_dist.parallel.strategy import NOT_AS_ASKED, Strategy
from apr_dist.parallel.zero import zero_init


def build_decoder(config: TransformerConfig, runtime: Runtime) -> Decoder:
    """A decoder spread as the strategy says; its parameters hold arbitrary values, its buffers are right.

    No rank ever holds more than its share: the network is made on the meta device (under ZeRO-3 each
    parameter is cut as soon as it is made).
    """
    if runtime.strategy is Strategy.ZERO3:
        with zero_init(config, runtime):
            decoder = Decoder(config)
    else:
        with torch.device("meta"):
            decoder = Decoder(config)
        if runtime.strategy.is_fsdp:
            _shard(decoder, runtime)
        decoder.to_empty(device=runtime.device)
    decoder.reset_buffers()
    return decoder


def _shard(decoder: Decoder, runtime: Runtime) -> None:
    # Embedding, final norm and head stay in the root's group: a tied pair is one parameter of one group.
    # Autocast governs the arithmetic, so a block's inputs (the f32 rotations) are left as they are.
    options: dict[str, Any] = {
        "mesh": _mesh(runtime),
        "reshard_after_forward": runtime.strategy is not Strategy.SHARD_GRAD_OP,
    }
    if runtime.accelerator.mixed_precision == "bf16":
        options["mp_policy"] = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    for block in decoder.model.layers:
        fully_shard(block, **options)
    fully_shard(decoder, **options)


def _mesh(runtime: Runtime) -> DeviceMesh:
    kind, world = runtime.device.type, runtime.world_size
    if runtime.strategy is not Strategy.HSDP:
        return init_device_mesh(kind, (world,), mesh_dim_names=("shard",))
    shape = (world // runtime.shard_size, runtime.shard_size)
    return init_device_mesh(kind, shape, mesh_dim_names=("replicate", "shard"))


def whole_shape(parameter: Tensor) -> tuple[int, ...]:
    """Shape of the whole parameter, of which this rank may hold a part."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def reshard(model: nn.Module) -> None:
    """Give back what an FSDP2 forward without a backward left gathered; nothing elsewhere."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _whole(parameter: DTensor) -> Tensor:
    """All rows of a sharded parameter in one new tensor; ``full_tensor`` would hold two for a moment."""
    mesh, cut = parameter.device_mesh, _cut(parameter)
    local, size = parameter.to_local().detach(), mesh.size(cut)
    rows = -(-parameter.shape[0] // size)
    if local.shape[0] < rows:
        local = torch.nn.functional.pad(local, (0, 0) * (local.ndim - 1) + (0, rows - local.shape[0]))
    whole = local.new_empty((size * rows, *local.shape[1:]))
    _all_gather(whole, local.contiguous(), group=mesh.get_group(cut))
    return whole[: parameter.shape[0]]


def _cut(parameter: DTensor) -> int:
    """The mesh dimension over which the parameter's rows are cut."""
    (cut,) = (index for index, placement in enumerate(parameter.placements) if placement == Shard(0))
    return cut


_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
"""PyTorch 2.13 renamed it."""


@contextlib.contextmanager
def gathered(parameter: Tensor) -> Iterator[Tensor]:
    """The whole values of one parameter, on every rank, while the block runs; read only.

    A collective: every rank enters for the same parameters in the same order.
    """
    if isinstance(parameter, DTensor):
        yield _whole(parameter)
    elif hasattr(parameter, "ds_id"):
        from deepspeed.runtime.zero import GatheredParameters  # noqa: PLC0415  (slow to import, rarely needed)

        with GatheredParameters([parameter]):
            yield parameter.detach()
    else:
        yield parameter.detach()


def fill(parameter: Tensor, values: Tensor | None, runtime: Runtime) -> None:
    """Give one parameter, wherever its parts lie, the values rank 0 holds; a collective.

    Args:
        parameter: replicated, an FSDP2 shard, or a ZeRO-3 partition; or a moment lying like one.
        values: the whole f32 values on rank 0, in host memory; None elsewhere.
        runtime: this rank's view of the run.
    """
    if hasattr(parameter, "ds_id"):
        from deepspeed.runtime.zero import GatheredParameters  # noqa: PLC0415  (slow to import, rarely needed)

        with GatheredParameters([parameter], modifier_rank=0):
            if values is not None:
                parameter.data.copy_(values)
    elif isinstance(parameter, DTensor):
        whole = received(whole_shape(parameter), values, runtime)
        parameter.to_local().copy_(_part(whole, parameter))
    else:
        if values is not None:
            parameter.data.copy_(values)
        runtime.broadcast(parameter.data)


def received(shape: tuple[int, ...], values: Tensor | None, runtime: Runtime) -> Tensor:
    """Rank 0's f32 values of this shape, on every rank's device; a collective."""
    if values is None:
        whole = torch.empty(shape, dtype=torch.float32, device=runtime.device)
    else:
        whole = values.to(runtime.device)  # on CPU the mapped file itself
    runtime.broadcast(whole)
    return whole


def _part(whole: Tensor, parameter: DTensor) -> Tensor:
    """The rows of the whole tensor that are this rank's: as `torch.chunk` cuts dimension 0."""
    mesh, cut = parameter.device_mesh, _cut(parameter)
    size, rank = mesh.size(cut), mesh.get_local_rank(cut)
    rows = -(-whole.shape[0] // size)
    return whole[min(rank * rows, whole.shape[0]) : min((rank + 1) * rows, whole.shape[0])]


def zero3_part(whole: Tensor, parameter: Tensor, runtime: Runtime) -> Tensor:
    """The elements of the whole tensor that are this rank's under ZeRO-3; the last part is padded."""
    size = parameter.ds_tensor.ds_numel  # type: ignore[attr-defined]
    flat = whole.flatten()[runtime.rank * size : (runtime.rank + 1) * size]
    return torch.nn.functional.pad(flat, (0, size - flat.numel()))


def assert_spread(model: nn.Module, runtime: Runtime) -> dict[str, Any]:
    """Prove by what lies in memory that the parameters are spread as the strategy says; a collective.

    Returns:
        ``parameter_elements`` of the model and ``shard_elements`` held by each rank.

    Raises:
        DistributedError: on every rank, when a rank holds anything but its share.
    """
    weights = list(model.parameters())
    held = torch.zeros(2, runtime.world_size, dtype=torch.int64, device=runtime.device)
    held[0, runtime.rank] = sum(_local(weight).numel() for weight in weights)
    held[1, runtime.rank] = sum(not _is_share(weight, runtime) for weight in weights)
    shards, odd = runtime.sum(held).tolist()
    total = sum(math.prod(whole_shape(weight)) for weight in weights)
    if any(odd):
        raise DistributedError(
            f"under strategy {runtime.strategy} {max(odd)} parameters lie otherwise; the ranks hold {shards}"
            f" of {total} elements",
            expected=f"{total} elements spread over every {runtime.shard_size} rank(s)",
            remedy="check that the installed PyTorch and DeepSpeed are supported versions",
            falsifier=NOT_AS_ASKED,
        )
    return {"parameter_elements": total, "shard_elements": shards}


def _local(parameter: Tensor) -> Tensor:
    if isinstance(parameter, DTensor):
        return parameter.to_local()
    part: Tensor = getattr(parameter, "ds_tensor", parameter)
    return part


def _is_share(parameter: Tensor, runtime: Runtime) -> bool:
    """Whether this rank's part is of the kind and size that the strategy gives it."""
    shape, size = whole_shape(parameter), runtime.shard_size
    if runtime.strategy.is_fsdp:
        rows = -(-shape[0] // size)
        mine = min(max(shape[0] - (runtime.rank % size) * rows, 0), rows)
        return isinstance(parameter, DTensor) and _local(parameter).shape == (mine, *shape[1:])
    if runtime.strategy is Strategy.ZERO3:  # flat, the last part padded
        return hasattr(parameter, "ds_id") and _local(parameter).numel() == -(-math.prod(shape) // size)
    return type(parameter) is nn.Parameter and _local(parameter) is parameter
