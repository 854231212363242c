"""Activation checkpointing: which results of a block are kept and which computed again in its backward."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import apr_dist.model.kernels.cpu_attention  # noqa: F401  (defines its operator)
from apr_dist.choices import ActivationCheckpointing
from apr_dist.model.host_copies import HostInputs


def run_checkpointed(
    mode: ActivationCheckpointing,
    compute: Callable[..., Any],
    *args: Any,
    inputs: HostInputs | None = None,
    draws: bool = False,
) -> Any:
    """``compute(*args)``, keeping for the backward pass only what the mode keeps.

    With ``inputs`` what is kept is in host memory. Where it ``draws`` random numbers, they are the same the
    second time.
    """
    if mode is ActivationCheckpointing.OFF or not torch.is_grad_enabled():
        return compute(*args)
    options: dict[str, Any] = {}
    if mode is ActivationCheckpointing.SELECTIVE:
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _every_second())
    if inputs is not None:
        with torch.autograd.graph.saved_tensors_hooks(_packing(inputs), _unpacking(inputs)):
            return run_checkpointed(ActivationCheckpointing.FULL, compute, *args, draws=draws)
    return checkpoint(compute, *args, use_reentrant=False, preserve_rng_state=draws, **options)


def _packing(inputs: HostInputs) -> Callable[[Tensor], Any]:
    return lambda saved: inputs.pack(saved) if saved.numel() else saved


def _unpacking(inputs: HostInputs) -> Callable[[Any], Tensor]:
    return lambda kept: kept if isinstance(kept, Tensor) else inputs.unpack(kept)


def _operators(namespace: Any, *names: str) -> set[Any]:
    return {getattr(namespace, name).default for name in names if hasattr(namespace, name)}


_PRODUCTS = _operators(torch.ops.aten, "mm", "addmm") | _operators(torch.ops.mkldnn, "_linear_pointwise")
_ATTENTION = _operators(
    torch.ops.aten,
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
) | _operators(torch.ops.apr_dist, "causal_attention")
_ATTENTION_NAMES = {"torch_attn::_varlen_attn", "flex_attention"}
"""Attention that is known only once it was used, because its module loads the compiler. Flex attention is
seen where blocks are compiled; by itself it is compiled code, which is computed again."""


def _every_second() -> Callable[..., CheckpointPolicy]:
    """Keep attention, and of the matrix products the first, third, fifth of the forward and of its repeat."""
    seen = {"forward": 0, "recompute": 0}

    def policy(context: Any, operator: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
        keep = operator in _ATTENTION or operator.name() in _ATTENTION_NAMES
        if operator in _PRODUCTS:
            phase = "recompute" if context.is_recompute else "forward"
            seen[phase] += 1
            keep = seen[phase] % 2 == 1
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return policy
