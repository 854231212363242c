"""How a decoder is spread over the ranks, and the proof that it is.

FSDP2 shards are made here by ``fully_shard``: Accelerate's own FSDP2 path is DDP in silence on CPU, so
it is not used on any device. ZeRO-3 shards are made by ``deepspeed.zero.Init``. What fills the shards
and proves their values is in ``weights``; how a step runs is in ``engine``.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from apr_dist.choices import Offload, Strategy, WeightStorage
from apr_dist.errors import DistributedError
from apr_dist.model.adapters import Adapter
from apr_dist.model.config import TransformerConfig
from apr_dist.model.host_copies import host_empty
from apr_dist.model.quantized import quantized_layers
from apr_dist.model.transformer import Decoder
from apr_dist.parallel.runtime import Runtime
from apr_dist.parallel.shard_layout import whole_shape
from apr_dist.parallel.sharded import as_dtensor, as_fsdp, held_here
from apr_dist.parallel.split_weights import SplitWeight, attach
from apr_dist.parallel.storage import is_narrow
from apr_dist.parallel.strategy import NOT_AS_ASKED
from apr_dist.parallel.zero import zero_init

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def build_decoder(config: TransformerConfig, runtime: Runtime, adapter: Adapter | None = None) -> Decoder:
    """A decoder spread as the strategy says; its parameters hold arbitrary values, its buffers are right.

    No rank ever holds more than its share: the network is made on the meta device (under ZeRO-3 each
    parameter is cut as soon as it is made).
    """
    if runtime.strategy is Strategy.ZERO3:
        with zero_init(config, runtime):
            decoder = Decoder(config)
            if adapter is not None:
                decoder.attach(adapter)
    else:
        with torch.device("meta"):
            decoder = Decoder(config)
            if adapter is not None:
                decoder.attach(adapter)
        narrow = _narrow(decoder, runtime)
        if runtime.strategy.is_fsdp:
            _shard(decoder, runtime)
        _materialise(decoder, runtime)
        if runtime.storage.weights is WeightStorage.SPLIT:
            _split(decoder, narrow, runtime)
    decoder.reset_buffers()
    return decoder


def _narrow(decoder: Decoder, runtime: Runtime) -> set[str]:
    """Let the parameters that are stored in 16 bits be bf16; their names."""
    names = set()
    for name, weight in decoder.named_parameters():
        if is_narrow(name, weight.shape, runtime.strategy, runtime.storage.weights):
            weight.data = weight.data.to(torch.bfloat16)
            names.add(name)
    return names


def _split(decoder: Decoder, names: set[str], runtime: Runtime) -> None:
    """Give each of these parameters the bits that its rounding lost, where they are kept."""
    on_host = runtime.storage.streams(runtime.strategy)
    for name, weight in decoder.named_parameters():
        if name in names:
            high = _local(weight).detach().view(-1)
            if on_host:
                low = host_empty(high.numel(), torch.int16, device=runtime.device)
            else:
                low = torch.empty_like(high, dtype=torch.int16)
            attach(weight, SplitWeight.around(weight, low))


def _materialise(decoder: Decoder, runtime: Runtime) -> None:
    if runtime.offload is Offload.NONE or runtime.storage.streams(runtime.strategy):
        if runtime.strategy.is_fsdp:
            decoder.to_empty(device=runtime.device)
        else:
            _allocate(decoder, runtime.device)
        return
    decoder.to_empty(device="cpu")  # FSDP2 fetches offloaded parameters, but not the rotations
    for module in decoder.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty_like(buffer, device=runtime.device))


def _allocate(decoder: Decoder, device: torch.device) -> None:
    """As ``to_empty``, which asks the meta device and so loads a computer algebra (most of a second)."""

    def empty(like: Tensor) -> Tensor:
        return torch.empty(like.shape, dtype=like.dtype, device=device)

    for module in decoder.modules():
        for name, weight in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(empty(weight), requires_grad=weight.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, empty(buffer))


def _shard(decoder: Decoder, runtime: Runtime) -> None:
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard  # noqa: PLC0415

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
    if runtime.offload is not Offload.NONE:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=runtime.device.type == "cuda")
    for block in decoder.model.layers:
        fully_shard(block, **options)
    fully_shard(decoder, **options)


def keep_f32_gradients(decoder: nn.Module) -> None:
    """Let FSDP2 give bf16 shards the f32 that their reduced gradients are; after the first forward.

    It would round them to the type of the shard. Which type they get is settled there, for each group.

    Raises:
        DistributedError: the installed PyTorch settles it elsewhere.
    """
    for module in decoder.modules():
        managed = as_fsdp(module)
        group = None if managed is None else managed._get_fsdp_state()._fsdp_param_group
        if group is None:
            continue
        if not hasattr(group, "_orig_dtype"):
            raise DistributedError(
                "the installed PyTorch does not let FSDP2 keep f32 gradients of bf16 weights",
                expected="the attribute _orig_dtype of FSDPParamGroup",
                remedy="use --memory.weights f32, or PyTorch 2.13",
            )
        group._orig_dtype = torch.float32
        for weight in module.parameters(recurse=True):
            if weight.dtype is torch.bfloat16 and as_dtensor(weight) is not None:
                weight.grad_dtype = torch.float32


def _mesh(runtime: Runtime) -> DeviceMesh:
    from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415  (see ``sharded``)

    kind, world = runtime.device.type, runtime.world_size
    if runtime.strategy is not Strategy.HSDP:
        return init_device_mesh(kind, (world,), mesh_dim_names=("shard",))
    shape = (world // runtime.shard_size, runtime.shard_size)
    return init_device_mesh(kind, shape, mesh_dim_names=("replicate", "shard"))


def reshard(model: nn.Module) -> None:
    """Give back what an FSDP2 forward without a backward left gathered; nothing elsewhere."""
    for module in model.modules():
        if (managed := as_fsdp(module)) is not None:
            managed.reshard()


def assert_spread(model: nn.Module, runtime: Runtime) -> dict[str, Any]:
    """Prove by what lies in memory that the parameters are spread as the strategy says; a collective.

    Returns:
        ``parameter_elements`` of the model and ``shard_elements`` held by each rank.

    Raises:
        DistributedError: on every rank, when a rank holds anything but its share.
    """
    weights = list(model.parameters())
    elements = {layer.weight: math.prod(layer.shape) for layer in quantized_layers(model).values()}
    held = torch.zeros(2, runtime.world_size, dtype=torch.int64, device=runtime.device)
    held[0, runtime.rank] = sum(elements.get(weight, _local(weight).numel()) for weight in weights)
    held[1, runtime.rank] = sum(not _is_share(weight, runtime) for weight in weights)
    shards, odd = runtime.sum(held).tolist()
    total = sum(elements.get(weight, math.prod(whole_shape(weight))) for weight in weights)
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
    part: Tensor = getattr(parameter, "ds_tensor", parameter)
    return held_here(part)


def _is_share(parameter: Tensor, runtime: Runtime) -> bool:
    """Whether this rank's part is of the kind and size that the strategy gives it."""
    shape, size = whole_shape(parameter), runtime.shard_size
    if runtime.strategy.is_fsdp:
        rows = -(-shape[0] // size)
        mine = min(max(shape[0] - (runtime.rank % size) * rows, 0), rows)
        return as_dtensor(parameter) is not None and _local(parameter).shape == (mine, *shape[1:])
    if runtime.strategy is Strategy.ZERO3:  # flat, the last part padded
        return hasattr(parameter, "ds_id") and _local(parameter).numel() == -(-math.prod(shape) // size)
    return type(parameter) is nn.Parameter and _local(parameter) is parameter
