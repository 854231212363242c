"""The layers of adapters: peft's, around the linear maps of a decoder, and their formula for merging.

What is trained and how it is called is in ``adapters``.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from apr_dist.choices import AdapterInit, AdapterKind
from apr_dist.errors import UsageError
from apr_dist.model.adapters import (
    BIAS,
    FIRST,
    LENGTHS,
    PEFT_NAME,
    ROWS,
    SECOND,
    Adapter,
    is_adapter,
    is_halved,
)
from apr_dist.model.layers import Embedding, Head, TrainedRows
from apr_dist.model.quantized import bitsandbytes, quantize_blocks


def attach(root: nn.Module, adapter: Adapter, modules: Iterable[str] | None = None) -> None:
    """Put peft's layers around the linear maps of a network, and freeze everything but what they add.

    Their values are arbitrary afterwards; `initial_value` says how they begin.

    Args:
        root: a decoder, or a part of one.
        adapter: which maps, and how.
        modules: names of the maps within ``root``; None: those of a whole decoder.

    Raises:
        UsageError: peft is not installed, or a map has no bias where one is asked for.
    """
    layer, settings = _peft(adapter)
    root.requires_grad_(False)
    if adapter.base_bits < 16:
        quantize_blocks(root, adapter.base_bits)
    if adapter.base_bits < 32:
        _halve(root)
    for within in adapter.modules if modules is None else modules:
        parent, _, last = within.rpartition(".")
        base = root.get_submodule(within)
        if adapter.bias and base.bias is None:
            raise UsageError(
                f"{within} has no bias for adapter.bias to be added to",
                where="--adapter.bias",
                expected="targets that have one",
                remedy="leave --adapter.bias out, or name targets with a bias in --adapter.targets",
            )
        wrapped = layer(base, PEFT_NAME, config=settings, r=adapter.rank, lora_alpha=adapter.alpha)
        setattr(root.get_submodule(parent), last, wrapped)
    for name, module in root.named_modules():
        if adapter.tokens and name in adapter.row_owners and isinstance(module, Embedding | Head):
            rows = TrainedRows(adapter.tokens, module.weight.shape[1], module.weight.device)
            module.add_module("token_adapter", rows)
    for name, parameter in root.named_parameters():
        parameter.requires_grad_(is_adapter(name))


def _halve(root: nn.Module) -> None:
    """Keep every matrix in bf16; norms and biases, which are small, and routers stay as they are."""
    for prefix, module in root.named_modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if is_halved(f".{prefix}.{name}", weight.ndim) and weight.is_floating_point():
                setattr(module, name, nn.Parameter(weight.to(torch.bfloat16), requires_grad=False))


def _peft(adapter: Adapter) -> tuple[Any, Any]:
    if find_spec("bitsandbytes") is not None:
        bitsandbytes()  # which peft imports, in its own way
    from peft import LoraConfig  # noqa: PLC0415  (loads transformers, and only adapters need it)
    from peft.tuners.lora.layer import Linear  # noqa: PLC0415

    alpha: Any = adapter.alpha  # peft says int and computes with any number
    return Linear, LoraConfig(
        r=adapter.rank,
        lora_alpha=alpha,
        lora_dropout=adapter.dropout,
        use_rslora=adapter.kind is AdapterKind.RSLORA,
        use_dora=adapter.kind is AdapterKind.DORA,
        lora_bias=adapter.bias,
        init_lora_weights=False,
    )


def initial_value(
    name: str, shape: tuple[int, ...], adapter: Adapter, *, seed: int, base: Callable[[str], Tensor]
) -> Tensor:
    """The f32 value a trained tensor begins with, a pure function of seed, name and base.

    The first factor is drawn, from a stream of its own: uniform within ``1 / sqrt(in)`` (what peft draws) or
    normal with standard deviation ``1 / rank``. The second and the bias are zero. DoRA's lengths are those of
    the base's rows, trained rows of tokens are the base's. So the network begins as the base.

    Args:
        name: canonical.
        shape: of the tensor.
        adapter: what it belongs to.
        seed: of the run.
        base: gives a base weight's values.
    """
    if name.endswith(LENGTHS):
        return _row_lengths(base(name.removesuffix(LENGTHS) + "weight").float())
    if name.endswith(ROWS):
        return base(name.removesuffix(ROWS) + "weight")[list(adapter.tokens)].float()
    if not name.endswith(FIRST):
        return torch.zeros(shape)
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    if adapter.init is AdapterInit.GAUSSIAN:
        return torch.empty(shape).normal_(0.0, 1 / adapter.rank, generator=generator)
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def merged_weight(weight: Tensor, module: str, adapter: Adapter, tensor: Callable[[str], Tensor]) -> Tensor:
    """``W + scale B A`` of one linear map, with DoRA each row at its trained length; f32 ``[out, in]``.

    Args:
        weight: the base's, f32.
        module: full name of the map.
        adapter: what is merged.
        tensor: gives a trained tensor's f32 values by its canonical name.
    """
    summed = weight + adapter.scale * (tensor(f"{module}.{SECOND}") @ tensor(f"{module}.{FIRST}"))
    if adapter.kind is not AdapterKind.DORA:
        return summed
    return summed * (tensor(f"{module}.{LENGTHS}") / _row_lengths(summed))[:, None]


def _row_lengths(matrix: Tensor) -> Tensor:
    lengths: Tensor = torch.linalg.norm(matrix, dim=1)
    return lengths


def merged_rows(matrix: Tensor, module: str, adapter: Adapter, tensor: Callable[[str], Tensor]) -> Tensor:
    """The rows of an embedding or a head with the trained ones in place; f32 ``[vocab, hidden]``."""
    merged = matrix.clone()
    merged[list(adapter.tokens)] = tensor(f"{module}.{ROWS}")
    return merged


def merged_bias(bias: Tensor, module: str, adapter: Adapter, tensor: Callable[[str], Tensor]) -> Tensor:
    """The bias of one linear map with the adapter's, f32 ``[out]``."""
    return bias + adapter.scale * tensor(f"{module}.{BIAS}")
