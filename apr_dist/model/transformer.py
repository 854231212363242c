"""The decoder network: embedding, blocks, final norm, head, and how its weights begin.

Names in its ``state_dict`` are the Hugging Face names, so a file's tensors are a set comparison away.
A tied head is the embedding parameter itself. Building on the meta device costs nothing; after
``to_empty`` call ``reset_buffers``.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from apr_dist.model.attention import Attention, LayerCache
from apr_dist.model.checkpointing import Checkpointing, run_checkpointed
from apr_dist.model.config import TransformerConfig
from apr_dist.model.layers import Embedding, GatedMLP, Linear, RMSNorm, compute_dtype
from apr_dist.model.loss import LossBackend, choose_loss_backend, cross_entropy_parts
from apr_dist.model.packing import Boundaries, Documents, find_documents, find_windows
from apr_dist.model.rotary import RotaryEmbedding, Rotation
from apr_dist.model.tied_gradient import TiedGradient

INITIAL_STD = 0.02
"""Standard deviation of embeddings and projections at the start (``initializer_range`` of all families)."""


class DecoderBlock(nn.Module):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``: the unit of sharding and compiling."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size)
        self.checkpointing = Checkpointing.OFF

    def forward(
        self,
        x: Tensor,
        rotation: Rotation,
        documents: Documents | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """``[batch, seq, hidden]`` to the same shape; arguments as `Attention.forward`."""
        return self._run(x, rotation, documents, cache)

    def compile_compute(self, **options: Any) -> None:
        """Compile what this block computes, checkpointing included; hooks on the module stay outside.

        So a strategy may gather and free the block's weights around its call, and the graph does not break.
        """
        self._run = torch.compile(self._run, **options)  # type: ignore[method-assign]

    def _run(
        self, x: Tensor, rotation: Rotation, documents: Documents | None, cache: LayerCache | None
    ) -> Tensor:
        return run_checkpointed(self.checkpointing, self._compute, x, rotation, documents, cache)

    def _compute(
        self, x: Tensor, rotation: Rotation, documents: Documents | None, cache: LayerCache | None
    ) -> Tensor:
        x = x + self.self_attn(x, rotation, documents, cache, norm=self.input_layernorm)
        return x + self.mlp(x, self.post_attention_layernorm)  # type: ignore[no-any-return]


class Backbone(nn.Module):
    """Everything before the head; ``model.`` in the parameter names."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.sliding_window = config.sliding_window
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderBlock(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary = RotaryEmbedding(config)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        document_ids: Tensor | Boundaries | None = None,
        caches: list[LayerCache] | None = None,
        *,
        tied: TiedGradient | None = None,
    ) -> Tensor:
        """Token ids ``[batch, seq]`` to hidden states ``[batch, seq, hidden]`` after the final norm.

        Args:
            input_ids: the tokens.
            position_ids: ``[1 or batch, seq]``; by default counted on from what the caches hold.
            document_ids: ``[batch, seq]``, runs of equal ids are documents that see only themselves; or
                where documents begin, which on CUDA saves a wait.
            caches: one per block, for generating.
            tied: where the embedding's gradient meets the head's.
        """
        if position_ids is None:
            first = caches[0].length if caches else 0
            position_ids = torch.arange(first, first + input_ids.shape[1], device=input_ids.device)[None]
        rotation = self.rotary(position_ids)
        x = self.embed_tokens(input_ids, tied=tied)
        documents, window, dtype = None, self.sliding_window, compute_dtype(x)
        if document_ids is not None:
            documents = find_documents(document_ids, dtype=dtype, window=window)
        elif window is not None and caches is None:
            documents = find_windows(input_ids, window, dtype=dtype)
        for index, layer in enumerate(self.layers):
            x = layer(x, rotation, documents, caches[index] if caches else None)
        return self.norm(x)  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """A causal language model: Llama, Qwen2, Qwen3 or Mistral as its configuration says."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        self.lm_head = (
            None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size, bias=False)
        )
        self.loss_backend: LossBackend | None = None
        self.z_loss = 0.0

    @property
    def head_weight(self) -> Tensor:
        """``[vocab, hidden]``: the head's own parameter, or the embedding's when tied."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def forward(
        self,
        input_ids: Tensor,
        targets: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        document_ids: Tensor | Boundaries | None = None,
        caches: list[LayerCache] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits, or with targets the summed loss; the head is only ever used inside this call.

        Args:
            input_ids: int32 or int64 ``[batch, seq]``.
            targets: next tokens ``[batch, seq]``, -100 where there is none.
            position_ids: ``[1 or batch, seq]``; counted from 0 (or the caches' length) when absent.
            document_ids: as `Backbone.forward`.
            caches: see `empty_caches`; the tokens are appended to what they hold.

        Returns:
            without targets logits ``[batch, seq, vocab]``; with targets ``(loss sum in nats, f32;
            number of targets, int64)``. With ``z_loss`` set the sum is still the cross-entropy alone, and
            its gradient that of cross-entropy and z-loss together.
        """
        backend = self.loss_backend or choose_loss_backend(input_ids.device, z_loss=self.z_loss)
        tied = TiedGradient() if targets is not None and self._gives_one_gradient(backend) else None
        hidden = self.model(input_ids, position_ids, document_ids, caches, tied=tied)
        if targets is None:
            return self.logits(hidden)
        weight = self.head_weight
        if tied is not None:
            hidden, weight = tied.catch(hidden, weight)
        total, penalty, count = cross_entropy_parts(
            hidden, weight, targets, z_loss=self.z_loss, backend=backend
        )
        return total - penalty, count

    def _gives_one_gradient(self, backend: LossBackend) -> bool:
        """Whether head and embedding share a gradient, which only our own loss lets go of."""
        return (
            self.lm_head is None
            and backend is LossBackend.CHUNKED
            and torch.is_grad_enabled()
            and self.model.embed_tokens.weight.requires_grad
            and not torch.compiler.is_compiling()
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states ``[..., hidden]`` to logits ``[..., vocab]``."""
        return F.linear(hidden, self.head_weight)

    def empty_caches(self, capacity: int) -> list[LayerCache]:
        """One empty cache per block, for up to ``capacity`` positions."""
        return [LayerCache(capacity) for _ in self.model.layers]

    def set_checkpointing(self, mode: Checkpointing) -> None:
        """Choose what every block keeps for its backward pass."""
        for layer in self.model.layers:
            layer.checkpointing = Checkpointing(mode)  # type: ignore[assignment]

    def compile_blocks(self, **options: Any) -> None:
        """Compile each block as one graph (``torch.compile``'s options); a graph break is an error.

        All blocks share their code, so it is compiled once per shape, in training and in evaluation.
        """
        for layer in self.model.layers:
            layer.compile_compute(fullgraph=True, dynamic=False, **options)  # type: ignore[operator]

    def reset_buffers(self) -> None:
        """Recompute every buffer that is not in the state dict (RoPE); needed after ``to_empty``."""
        self.model.rotary.reset()


def init_weights(model: Decoder, *, seed: int) -> None:
    """Give every parameter its value from scratch, in place; see `initial_weight`."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_weight(name, tuple(parameter.shape), config=model.config, seed=seed))


def initial_weight(name: str, shape: tuple[int, ...], *, config: TransformerConfig, seed: int) -> Tensor:
    """The f32 value one parameter starts from, a pure function of seed and name.

    Norms are one and biases zero. Matrices are normal with standard deviation 0.02; those that write
    into the residual stream (``o_proj``, ``down_proj``) are smaller by ``sqrt(2 * layers)``, the number
    of such writes, so that the stream does not grow with depth (GPT-2, Radford et al. 2019, section
    2.3). Each draws from its own stream, so neither order nor world size matters and no two are alike.
    """
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    if name.endswith(".bias"):
        return torch.zeros(shape)
    std = INITIAL_STD
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        std /= math.sqrt(2 * config.num_layers)
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.empty(shape).normal_(0.0, std, generator=generator)
