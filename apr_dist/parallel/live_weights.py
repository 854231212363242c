"""Reading and replacing single parameters of a model in training, wherever the strategy keeps them."""

from __future__ import annotations

import torch
from torch import nn

from apr_dist.errors import UsageError
from apr_dist.parallel.runtime import Runtime
from apr_dist.parallel.shard_layout import fill, whole_in_runs, whole_shape
from apr_dist.parallel.weights import coded_weights, fill_codes, named_weights


def read_weight(model: nn.Module, name: str, runtime: Runtime) -> torch.Tensor:
    """A copy of one whole parameter, f32, in host memory of every rank; a collective.

    Raises:
        UsageError: there is no such parameter.
    """
    weight = _named(model, name)
    if (layer := coded_weights(model).get(name)) is not None:
        return layer.dequantize().cpu()
    runs = [run.detach().float().cpu().flatten().clone() for run in whole_in_runs(weight, runtime)]
    return torch.cat(runs).view(whole_shape(weight))


def write_weight(model: nn.Module, name: str, values: torch.Tensor, runtime: Runtime) -> None:
    """Replace one whole parameter by rank 0's values, and the optimizer's master of it; a collective.

    Args:
        model: the decoder that is trained.
        name: of the parameter, as in its file.
        values: of the parameter's shape.
        runtime: this rank's view of the run.

    Raises:
        UsageError: there is no such parameter, or the shape differs.
    """
    weight, layer = _named(model, name), coded_weights(model).get(name)
    shape = whole_shape(weight) if layer is None else layer.shape
    if tuple(values.shape) != shape:
        raise UsageError(f"the values for {name} have shape {tuple(values.shape)}", expected=f"{shape}")
    whole = values.detach().to(torch.float32).cpu().contiguous()
    with torch.no_grad():
        if layer is not None:
            fill_codes(layer, whole if runtime.is_main else None, runtime)
            return
        fill(weight, whole if runtime.is_main else None, runtime)
        if runtime.strategy.zero_stage:
            from deepspeed.utils import safe_set_full_fp32_param  # noqa: PLC0415  (slow, rarely needed)

            runtime.broadcast(whole := whole.to(runtime.device))
            safe_set_full_fp32_param(weight, whole)


def _named(model: nn.Module, name: str) -> nn.Parameter:
    found = dict(named_weights(model))
    if name not in found:
        raise UsageError(
            f"there is no parameter {name}",
            expected="a name of model.named_parameters()",
            remedy=f"the first are {', '.join(list(found)[:3])}",
        )
    return found[name]
