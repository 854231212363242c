"""AdamW over two groups: matrices decay, norms and biases do not; the scheduled rate is the rate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from apr_dist.choices import WeightStorage
from apr_dist.errors import DistributedError, UsageError, WeightsRefused
from apr_dist.parallel.eight_bit import AdamW8bit
from apr_dist.parallel.runtime import Runtime
from apr_dist.parallel.shard_layout import span, whole_shape
from apr_dist.parallel.state_bits import FLAG, LEAST_ELEMENTS, is_eligible
from apr_dist.parallel.stored_adamw import Place, StoredAdamW
from apr_dist.training.adamw import AdamW


def build_optimizer(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
    offloaded: bool = False,
    state_bits: int = 32,
    alone: bool = False,
    runtime: Runtime | None = None,
    seed: int = 0,
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019) with decay on tensors of two or more dimensions only.

    Uses torch's fused kernel, which exists for CPU and CUDA and updates each element in one pass; for
    an optimizer that ZeRO keeps in host memory, DeepSpeed's vectorised one, which it compiles at first use;
    with ``state_bits`` 8 the moments of large matrices in 8 bits, see ``parallel.eight_bit``; in a process
    that trains ``alone`` the same fused kernel without loading PyTorch's compiler, see ``adamw``. Where the
    runtime stores weights or gradients otherwise than as f32 on the device, see ``parallel.stored_adamw``;
    ``seed`` is that of its rounding.

    Raises:
        WeightsRefused: a trainable parameter is in no group or in two, or there is none.
        DistributedError: DeepSpeed's optimizer cannot be compiled.
        UsageError: 8 bits, and no matrix is large enough.
    """
    parameters = [weight for weight in model.parameters() if weight.requires_grad]
    if not parameters:
        raise WeightsRefused(
            "every parameter of the model is frozen",
            expected="at least one whose requires_grad is true",
            remedy="set requires_grad of what is to be trained before the optimizer is built",
        )
    matrices = [weight for weight in parameters if len(whole_shape(weight)) >= 2]
    vectors = [weight for weight in parameters if len(whole_shape(weight)) < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if runtime is not None and _is_stored(runtime):
        optimizer: torch.optim.Optimizer = StoredAdamW(
            _by_bits(model, groups) if state_bits == 8 else [{**group, "state_bits": 32} for group in groups],
            lr=lr,
            betas=betas,
            eps=eps,
            storage=runtime.storage.weights,
            seed=seed,
            places=_places(model, runtime),
            device=runtime.device,
            offloaded=runtime.storage.streams(runtime.strategy),
        )
    elif state_bits == 8:
        optimizer = AdamW8bit(_by_bits(model, groups), lr=lr, betas=betas, eps=eps)
    elif offloaded:
        optimizer = _on_host(groups, lr=lr, betas=betas, eps=eps)
    else:
        # DeepSpeed takes PyTorch's own class only, and DDP and FSDP2 load the compiler anyway.
        kind = AdamW if alone else torch.optim.AdamW
        optimizer = kind(groups, lr=lr, betas=betas, eps=eps, fused=True)
    assert_each_parameter_once(model, optimizer)
    return optimizer


def _is_stored(runtime: Runtime) -> bool:
    return runtime.storage.is_own(runtime.strategy) or runtime.storage.weights is not WeightStorage.F32


def _places(model: nn.Module, runtime: Runtime) -> dict[int, Place]:
    return {
        id(weight): Place(name, span(whole_shape(weight), runtime, runtime.rank)[0])
        for name, weight in model.named_parameters()
    }


def _by_bits(model: nn.Module, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The groups, each cut into parameters whose moments have 8 bits and those whose have 32."""
    names = {id(weight): name for name, weight in model.named_parameters()}
    found = []
    for group in groups:
        parts: dict[int, list[Tensor]] = {8: [], 32: []}
        for weight in group["params"]:
            eligible = is_eligible(names[id(weight)], whole_shape(weight))
            parts[8 if eligible else 32].append(weight)
        found += [{**group, "params": part, "state_bits": bits} for bits, part in parts.items() if part]
    if all(group["state_bits"] == 32 for group in found):
        raise UsageError(
            "optimizer.state_bits is 8 and no matrix of this model would have 8-bit state",
            where=FLAG,
            expected=f"a matrix of at least {LEAST_ELEMENTS:,} elements beside the embedding",
            remedy="use 32 bits",
        )
    return found


def _on_host(
    groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float
) -> torch.optim.Optimizer:
    from deepspeed.ops.adam import DeepSpeedCPUAdam  # noqa: PLC0415  (slow to import, rarely needed)

    try:
        optimizer: torch.optim.Optimizer = DeepSpeedCPUAdam(
            groups, lr=lr, betas=betas, eps=eps, adamw_mode=True
        )
    except RuntimeError as error:
        raise DistributedError(
            f"DeepSpeed's optimizer for host memory cannot be compiled ({error.__cause__ or error})",
            where="--parallel.offload",
            expected="a C++ compiler that builds deepspeed.ops.adam.DeepSpeedCPUAdam",
            remedy="run ds_report to see what is missing, or use --parallel.offload none",
        ) from error
    return optimizer


def assert_each_parameter_once(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Every trainable parameter object is in exactly one optimizer group (ties count once).

    Raises:
        WeightsRefused: naming how many are missing or doubled.
    """
    held = [id(weight) for group in optimizer.param_groups for weight in group["params"]]
    wanted = {id(weight) for weight in model.parameters() if weight.requires_grad}
    if len(held) != len(set(held)) or set(held) != wanted:
        raise WeightsRefused(
            f"the optimizer holds {len(held)} parameters ({len(set(held))} distinct)",
            expected=f"each of the model's {len(wanted)} trainable parameters exactly once",
            remedy="report this: a weight would be trained twice or never",
            falsifier="FALSIFY-APR-DIST-TRAINER-002",
        )


def apply_lr(optimizer: torch.optim.Optimizer, lr: float) -> float:
    """Set the rate of every group and return the one the optimizer will really use."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    return float(optimizer.param_groups[0]["lr"])
