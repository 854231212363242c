"""DeepSpeed's ZeRO: its configuration and its partitioning at construction.

Every number in the configuration is written out, none is "auto". Precision is torch autocast over f32
weights, as under every other strategy, so ZeRO trains the same numbers. Nothing here is imported by a
run of another strategy's.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn

from apr_dist.choices import Offload
from apr_dist.model.config import TransformerConfig
from apr_dist.model.transformer import Decoder
from apr_dist.parallel.runtime import Runtime

BUCKET_ELEMENTS = 100_000_000
"""Elements reduced or gathered together: 400 MB in f32."""


def zero_config(
    stage: int, runtime: Runtime, *, micro_batch: int, grad_clip: float, kept_whole: int
) -> dict[str, Any]:
    """The configuration of one engine.

    Args:
        stage: of ZeRO, 1 to 3.
        runtime: this rank's view of the run.
        micro_batch: sequences per forward; DeepSpeed only reports with it.
        grad_clip: largest global gradient norm that is applied.
        kept_whole: ZeRO-3 keeps parameters of fewer elements than this on every rank (norms, biases).
    """
    bf16 = runtime.accelerator.mixed_precision == "bf16"
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": 1,  # our loop marks the last micro-batch itself
        "gradient_clipping": grad_clip,
        "steps_per_print": 2**62,
        "zero_allow_untested_optimizer": False,
        "torch_autocast": {"enabled": bf16, "dtype": "bfloat16", "lower_precision_safe_modules": []},
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": runtime.device.type == "cuda",
            "contiguous_gradients": True,
            "reduce_bucket_size": BUCKET_ELEMENTS,
            "allgather_bucket_size": BUCKET_ELEMENTS,
            "sub_group_size": 10 * BUCKET_ELEMENTS,
            "stage3_prefetch_bucket_size": BUCKET_ELEMENTS,
            "stage3_max_live_parameters": 10 * BUCKET_ELEMENTS,
            "stage3_max_reuse_distance": 10 * BUCKET_ELEMENTS,
            "stage3_param_persistence_threshold": kept_whole,
            **_offloaded(runtime),
        },
    }


def _offloaded(runtime: Runtime) -> dict[str, Any]:
    """Page-locked host memory only where a GPU reads it."""
    place = {"device": "cpu", "pin_memory": runtime.device.type == "cuda"}
    if runtime.offload is Offload.NONE:
        return {}
    both = runtime.offload is Offload.OPTIMIZER_AND_PARAMETERS
    return {"offload_optimizer": place, **({"offload_param": place} if both else {})}


def zero_init(config: TransformerConfig, runtime: Runtime) -> contextlib.AbstractContextManager[Any]:
    """While it is active, every parameter that is made is cut over the ranks at once (ZeRO-3)."""
    import deepspeed  # noqa: PLC0415  (takes seconds, and only ZeRO needs it)

    deepspeed.init_distributed(dist_backend="gloo" if runtime.device.type == "cpu" else "nccl")
    settings = zero_config(3, runtime, micro_batch=1, grad_clip=1.0, kept_whole=vector_elements(config))
    # The type comes from the configuration: an explicit dtype is overruled on devices without f16.
    context: contextlib.AbstractContextManager[Any] = deepspeed.zero.Init(config_dict_or_path=settings)
    return context


def ask_for_input_gradients(decoder: Decoder) -> None:
    """Let the gradient of each trained block's input be computed, even where nothing before it is trained.

    DeepSpeed reduces a block's gradients together when that of its input is there; where none would be, it
    takes them before they are computed.
    """

    def require(block: nn.Module, inputs: tuple[Any, ...]) -> None:
        trained = any(weight.requires_grad for weight in block.parameters())
        if trained and torch.is_grad_enabled() and not inputs[0].requires_grad:
            inputs[0].requires_grad_()

    for block in decoder.model.layers:
        block.register_forward_pre_hook(require, prepend=True)


def vector_elements(config: TransformerConfig) -> int:
    """One more than the longest norm or bias has: what is too small to be worth gathering."""
    return 1 + max(config.hidden_size, config.query_size)
