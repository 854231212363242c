"""The decoder network: embedding, blocks, final norm, head, and how its weights begin.

Names in its ``state_dict`` are the Hugging Face names, so a file's tensors are a set comparison away.
A tied head is the embedding parameter itself. Building on the meta device costs nothing; after
``to_empty`` call ``reset_buffers``.
"""

from __future__ import annotations

import hashlib
import math

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from apr_dist.model.attention import Attention
from apr_dist.model.config import TransformerConfig
from apr_dist.model.layers import Embedding, GatedMLP, Linear, RMSNorm
from apr_dist.model.loss import cross_entropy_sum
from apr_dist.model.rotary import RotaryEmbedding, Rotation

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

    def forward(self, x: Tensor, rotation: Rotation) -> Tensor:
        """``[batch, seq, hidden]`` to the same shape."""
        x = x + self.self_attn(self.input_layernorm(x), rotation)
        return x + self.mlp(self.post_attention_layernorm(x))  # type: ignore[no-any-return]


class Backbone(nn.Module):
    """Everything before the head; ``model.`` in the parameter names."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderBlock(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary = RotaryEmbedding(config)

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Token ids ``[batch, seq]`` to hidden states ``[batch, seq, hidden]`` after the final norm."""
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).unsqueeze(0)
        rotation = self.rotary(position_ids)
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x, rotation)
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
        z_loss: float = 0.0,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits, or with targets the summed loss; the head is only ever used inside this call.

        Args:
            input_ids: int32 or int64 ``[batch, seq]``.
            targets: next tokens ``[batch, seq]``, -100 where there is none.
            position_ids: ``[1 or batch, seq]``; counted from 0 when absent.
            z_loss: see `cross_entropy_sum`; only with targets.

        Returns:
            without targets logits ``[batch, seq, vocab]``; with targets ``(loss sum in nats, f32;
            number of targets, int64)``.
        """
        hidden = self.model(input_ids, position_ids)
        if targets is None:
            return self.logits(hidden)
        return cross_entropy_sum(hidden, self.head_weight, targets, z_loss=z_loss)

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states ``[..., hidden]`` to logits ``[..., vocab]``."""
        return F.linear(hidden, self.head_weight)

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
