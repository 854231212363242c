"""Logits of a model that is never held: one block at a time, its weights read, used and forgotten.

With it a merge is proven on a machine that could not hold either model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from apr_dist.choices import KernelChoice
from apr_dist.gates.architecture import EMBEDDING
from apr_dist.interop.adapter_files import AdapterFile
from apr_dist.model.adapter_layers import attach
from apr_dist.model.adapters import ROW_OWNERS, ROWS, canonical, is_adapter
from apr_dist.model.config import TransformerConfig
from apr_dist.model.kernels.choice import SETS
from apr_dist.model.kernels.loss import soft_capped
from apr_dist.model.layers import Head, RMSNorm
from apr_dist.model.rotary import RotaryEmbedding
from apr_dist.model.transformer import Backbone, DecoderBlock

Read = Callable[[str], Tensor]
"""Gives a weight's f32 values by its name."""

NORM = "model.norm.weight"


def layerwise_logits(
    model: TransformerConfig, read: Read, ids: Tensor, adapter: AdapterFile | None = None
) -> Tensor:
    """Logits ``[batch, seq, vocab]`` of token ids, in f32 on the CPU.

    Args:
        model: the architecture.
        read: gives each weight once.
        ids: int64 ``[batch, seq]``.
        adapter: computed beside the weights by peft's layers; None: the weights alone.
    """
    with torch.no_grad():
        shell = _shell(model)
        hidden = _looked_up(ids, read, adapter) * model.embedding_scale
        rotations = shell.rotations(torch.arange(ids.shape[1])[None])
        attend = shell.attention(hidden)
        for layer, window in enumerate(model.windows):
            block = _filled(DecoderBlock(model), f"model.layers.{layer}.", read, adapter)
            hidden = block(hidden, rotations[layer], attend[window])
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        norm = RMSNorm(model.hidden_size, eps=model.rms_norm_eps, one_plus=model.one_plus_norms)
        hidden = _filled(norm, "model.norm.", read, None)(hidden) / model.logits_scaling
        if model.tie_word_embeddings:
            logits = _with_rows(nn.functional.linear(hidden, read(EMBEDDING)), hidden, adapter, ROW_OWNERS[0])
        else:
            tail = nn.Sequential()
            tail.add_module("lm_head", Head(model.hidden_size, model.vocab_size, bias=False))
            logits = _with_rows(_filled(tail, "", read, adapter)(hidden), hidden, adapter, ROW_OWNERS[1])
        return soft_capped(logits, model.final_logit_softcapping)


def _shell(model: TransformerConfig) -> Backbone:
    """The network without its weights: how its layers rotate and attend."""
    with torch.device("meta"):
        shell = Backbone(model)
    shell.rotary = RotaryEmbedding(model)
    shell.local_rotary = RotaryEmbedding(model, local=True) if model.rope_local_theta else None
    shell.kernels = SETS[KernelChoice.PLAIN]
    return shell


def _looked_up(ids: Tensor, read: Read, adapter: AdapterFile | None) -> Tensor:
    """Rows of the embedding ``[batch, seq, hidden]``, those of trained tokens in place."""
    hidden = nn.functional.embedding(ids, read(EMBEDDING))
    for number, token in enumerate(adapter.adapter.tokens if adapter is not None else ()):
        assert adapter is not None
        hidden[ids == token] = torch.from_numpy(adapter.read(f"{ROW_OWNERS[0]}.{ROWS}"))[number]
    return hidden


def _with_rows(logits: Tensor, hidden: Tensor, adapter: AdapterFile | None, owner: str) -> Tensor:
    """Logits with those of trained tokens computed from their rows."""
    name = f"{owner}.{ROWS}"
    if adapter is not None and name in adapter.shapes:
        rows = torch.from_numpy(adapter.read(name))
        logits[..., list(adapter.adapter.tokens)] = nn.functional.linear(hidden, rows)
    return logits


def _filled(part: nn.Module, prefix: str, read: Read, adapter: AdapterFile | None) -> nn.Module:
    """A part of the network with the weights, and the adapter, of its place in it."""
    if adapter is not None:
        linear = [name for name, module in part.named_modules() if isinstance(module, nn.Linear)]
        here = [name for name in linear if prefix + name in adapter.adapter.modules]
        if here:
            attach(part, replace(adapter.adapter.beside_floats, tokens=()), here)
    for name, parameter in part.named_parameters():
        full = prefix + canonical(name)
        if is_adapter(full) and adapter is not None:
            parameter.copy_(torch.from_numpy(adapter.read(full)))
        else:
            parameter.copy_(read(full))
    return part.eval()
