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
from torch import Tensor, nn

from apr_dist.choices import ActivationCheckpointing
from apr_dist.model.adapter_layers import attach
from apr_dist.model.adapters import Adapter
from apr_dist.model.attention import Attention, LayerCache
from apr_dist.model.checkpointing import run_checkpointed
from apr_dist.model.config import TransformerConfig
from apr_dist.model.experts import MixtureMLP
from apr_dist.model.families import FULL_ATTENTION
from apr_dist.model.host_copies import HostInputs
from apr_dist.model.kernels.loss import IGNORE_INDEX, Loss, cross_entropy_of, soft_capped
from apr_dist.model.kernels.plain import Attend, Kernels, compute_dtype
from apr_dist.model.kernels.tied_gradient import TiedGradient
from apr_dist.model.layers import Computed, Embedding, GatedMLP, Head, RMSNorm, TrainedRows
from apr_dist.model.packing import Boundaries
from apr_dist.model.rotary import RotaryEmbedding, Rotation
from apr_dist.model.routing import Routing

INITIAL_STD = 0.02
"""Standard deviation of embeddings and projections at the start (``initializer_range`` of all families)."""


class DecoderBlock(nn.Module):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``: the unit of sharding and compiling.

    A family may have norms after attention and MLP instead, or both before and after (`Norms`), and multiply
    what is added. With a mixture of experts in place of the MLP a call also returns the sums of its router.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self._attention_norms, self._mlp_norms = config.norms.names
        self.residual_multiplier = config.residual_multiplier
        self._add_norm(self._attention_norms[0], config)
        self.self_attn = Attention(config)
        self._add_norm(self._attention_norms[1], config)
        self._add_norm(self._mlp_norms[0], config)
        self.mlp = (
            GatedMLP(config.hidden_size, config.intermediate_size, config.activation)
            if config.num_experts is None
            else MixtureMLP(config)
        )
        self._add_norm(self._mlp_norms[1], config)
        self.checkpointing = ActivationCheckpointing.OFF
        self.draws = False
        self.inputs_on_host: HostInputs | None = None

    def _add_norm(self, name: str | None, config: TransformerConfig) -> None:
        if name is not None:
            self.add_module(name, _norm(config))

    def forward(
        self,
        x: Tensor,
        rotation: Rotation | None,
        attend: Attend,
        cache: LayerCache | None = None,
        counted: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """``[batch, seq, hidden]`` to the same shape, with a mixture also `routing.routed_sums`.

        Arguments as `Attention.forward`; ``counted`` as `MixtureMLP.forward`.
        """
        result: Tensor | tuple[Tensor, Tensor] = self._run(x, rotation, attend, cache, counted)
        return result

    def compile_compute(self, **options: Any) -> None:
        """Compile what this block computes, checkpointing included; hooks on the module stay outside.

        So a strategy may gather and free the block's weights around its call, and the graph does not break.
        """
        self._run = torch.compile(self._run, **options)  # type: ignore[method-assign]

    def _run(self, *given: Any) -> Any:
        return run_checkpointed(
            self.checkpointing, self._compute, *given, inputs=self.inputs_on_host, draws=self.draws
        )

    def _compute(
        self,
        x: Tensor,
        rotation: Rotation | None,
        attend: Attend,
        cache: LayerCache | None,
        counted: Tensor | None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        before, after = self._attention_norms
        mixed = self.self_attn(self._normed(x, before), rotation, attend, cache)
        x = self._added(x, self._normed(mixed, after))
        before, after = self._mlp_norms
        if not isinstance(self.mlp, MixtureMLP):
            return self._added(x, self._normed(self.mlp(self._normed(x, before)), after))
        made, sums = self.mlp(self._normed(x, before), counted)
        return self._added(x, self._normed(made, after)), sums

    def _normed(self, x: Tensor, name: str | None) -> Tensor:
        return x if name is None else getattr(self, name)(x)

    def _added(self, x: Tensor, change: Tensor) -> Tensor:
        return x + (change if self.residual_multiplier == 1.0 else change * self.residual_multiplier)


def _norm(config: TransformerConfig) -> RMSNorm:
    """A norm of the residual stream."""
    return RMSNorm(config.hidden_size, eps=config.rms_norm_eps, one_plus=config.one_plus_norms)


class Backbone(Computed):
    """Everything before the head; ``model.`` in the parameter names."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.compiled = False
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderBlock(config) for _ in range(config.num_layers))
        self.norm = _norm(config)
        self.rotary = RotaryEmbedding(config)
        self.local_rotary = RotaryEmbedding(config, local=True) if config.rope_local_theta else None

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        document_ids: Tensor | Boundaries | None = None,
        caches: list[LayerCache] | None = None,
        *,
        tied: TiedGradient | None = None,
        counted: Tensor | None = None,
        routed: list[Tensor] | None = None,
    ) -> Tensor:
        """Token ids ``[batch, seq]`` to hidden states ``[batch, seq, hidden]``, after the final norm.

        They are divided by ``logits_scaling``, so that the head's products are the logits.

        Args:
            input_ids: the tokens.
            position_ids: ``[1 or batch, seq]``; by default counted from where each document begins, or on
                from what the caches hold.
            document_ids: ``[batch, seq]``, runs of equal ids are documents that see only themselves; or
                where documents begin, which on CUDA saves a wait.
            caches: one per block, for generating.
            tied: where the embedding's gradient meets the head's.
            counted: as `MixtureMLP.forward`.
            routed: where the sums of each block's router are appended; None: nowhere.
        """
        if isinstance(document_ids, Tensor):
            document_ids = Boundaries.from_ids(document_ids)
        if position_ids is None and document_ids is not None and not caches:
            position_ids = document_ids.positions()
        if position_ids is None:
            first = caches[0].length if caches else 0
            position_ids = torch.arange(first, first + input_ids.shape[1], device=input_ids.device)[None]
        x = self.embed_tokens(input_ids, tied=tied) if tied else self.embed_tokens(input_ids)
        if self.config.embedding_scale != 1.0:
            x = x * _rounded(self.config.embedding_scale, x.dtype)
        attend = self.attention(x, document_ids, whole=caches is None)
        rotations = self.rotations(position_ids, document_ids)
        for index, layer in enumerate(self.layers):
            window = self.config.windows[index]
            x = layer(x, rotations[index], attend[window], caches[index] if caches else None, counted)
            if isinstance(x, tuple):
                x, sums = x
                if routed is not None:
                    routed.append(sums)
        scaling = self.config.logits_scaling
        x = self.norm(x)
        return x if scaling == 1.0 else x / scaling  # type: ignore[no-any-return]

    def attention(
        self, x: Tensor, documents: Boundaries | None = None, *, whole: bool = True
    ) -> dict[int | None, Attend]:
        """How each window attends."""
        kernels = self.kernels_for(x, compiled=self.compiled)
        return {
            window: kernels.attention(
                (x.shape[0], x.shape[1]),
                x.device,
                dtype=compute_dtype(x),
                window=window,
                softcap=self.config.attn_logit_softcapping,
                documents=documents,
                whole=whole,
            )
            for window in dict.fromkeys(self.config.windows)
        }

    def rotations(self, position_ids: Tensor, documents: Boundaries | None = None) -> list[Rotation | None]:
        """The rotation of each layer; where lengths decide it, each document has its own."""
        scaling = self.config.rope_scaling
        by_length = scaling is not None and scaling.by_length and documents is not None
        far = self.rotary(position_ids, documents.lengths() if documents and by_length else None)
        near = far if self.local_rotary is None else self.local_rotary(position_ids)
        turns = self.config.no_rope_layers or (1,) * self.config.num_layers
        kinds = self.config.layer_types or (FULL_ATTENTION,) * self.config.num_layers
        return [
            (far if kind == FULL_ATTENTION else near) if turn else None
            for kind, turn in zip(kinds, turns, strict=True)
        ]


def _rounded(scale: float, dtype: torch.dtype) -> float:
    """The scale in the type of the embedding's weight, in which ``transformers`` multiplies."""
    return torch.tensor(scale, dtype=dtype, device="cpu").item()


class Decoder(Computed):
    """A causal language model of any family, as its configuration says."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        self.lm_head = (
            None if config.tie_word_embeddings else Head(config.hidden_size, config.vocab_size, bias=False)
        )
        self.z_loss = 0.0
        self.routing: Routing | None = None
        if config.num_experts is not None:
            self.routing = Routing(config.num_layers, config.num_experts, config.active_experts)
        self.adapter: Adapter | None = None

    def attach(self, adapter: Adapter) -> None:
        """Train an adapter in place of the weights; see `adapter_layers.attach`."""
        attach(self, adapter)
        self.adapter = adapter
        for layer in self.model.layers:
            layer.draws = adapter.dropout > 0  # type: ignore[assignment]

    @property
    def head_weight(self) -> Tensor:
        """``[vocab, hidden]``: the head's own matrix, or a tied embedding's, with trained rows in it."""
        owner = self.model.embed_tokens if self.lm_head is None else self.lm_head
        return owner.rows if isinstance(owner, Embedding | Head) else owner.weight

    def forward(
        self,
        input_ids: Tensor,
        targets: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        document_ids: Tensor | Boundaries | None = None,
        caches: list[LayerCache] | None = None,
        last: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits, or with targets the summed loss; the head is only ever used inside this call.

        Args:
            input_ids: int32 or int64 ``[batch, seq]``.
            targets: next tokens ``[batch, seq]``, -100 where there is none.
            position_ids: ``[1 or batch, seq]``; counted from 0 (or the caches' length) when absent.
            document_ids: as `Backbone.forward`.
            caches: see `empty_caches`; the tokens are appended to what they hold.
            last: logits of the last position alone, ``[batch, 1, vocab]``.

        Returns:
            without targets logits ``[batch, seq, vocab]``; with targets ``(loss sum in nats, f32;
            number of targets, int64)``. With ``z_loss`` set the sum is still the cross-entropy alone, and
            its gradient that of cross-entropy and z-loss together; so it is with the router's losses of
            ``routing``. Documents without a target (padding) count in none of these.
        """
        tied = TiedGradient() if targets is not None and self._gives_one_gradient(input_ids) else None
        if isinstance(document_ids, Tensor):
            document_ids = Boundaries.from_ids(document_ids)
        routed: list[Tensor] = []
        counted = None
        if self.routing is not None and targets is not None:
            counted = _counted(targets, document_ids)
        hidden = self.model(
            input_ids, position_ids, document_ids, caches, tied=tied, counted=counted, routed=routed
        )
        if targets is None:
            return self.logits(hidden[:, -1:] if last else hidden)
        loss = self._loss(hidden, targets, tied)
        total = loss.total - loss.penalty
        if self.routing is not None:
            total = self.routing.joined(total, torch.stack(routed), loss.targets)
        return total, loss.targets

    def _loss(self, hidden: Tensor, targets: Tensor, tied: TiedGradient | None) -> Loss:
        """The loss of hidden states by whichever head there is."""
        terms = self._loss_terms
        if isinstance(self.lm_head, Head):
            return self.lm_head(hidden, targets, **terms)  # type: ignore[no-any-return]
        if self.lm_head is not None:  # what wraps the head knows no targets
            return cross_entropy_of(self.lm_head(hidden), targets, **terms)
        weight = self.head_weight
        if tied is not None:
            hidden, weight = tied.catch(hidden, weight)
        return self.kernels_for(hidden).cross_entropy(hidden, weight, targets, **terms)

    @property
    def _loss_terms(self) -> dict[str, Any]:
        return {"z_loss": self.z_loss, "softcap": self.config.final_logit_softcapping}

    def _gives_one_gradient(self, x: Tensor) -> bool:
        """Whether head and embedding share a gradient, which only our own loss lets go of."""
        embedding = self.model.embed_tokens
        return (
            self.lm_head is None
            and isinstance(embedding, Embedding)
            and embedding.weight.requires_grad
            and torch.is_grad_enabled()
            and self.kernels_for(x).has_own_loss(**self._loss_terms)
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states ``[..., hidden]`` to logits ``[..., vocab]``."""
        if self.lm_head is not None:
            logits = self.lm_head(hidden)
        else:
            logits = self.kernels_for(hidden).linear(hidden, self.head_weight, None)
        return soft_capped(logits, self.config.final_logit_softcapping)

    def empty_caches(self, capacity: int) -> list[LayerCache]:
        """One empty cache per block, for up to ``capacity`` positions."""
        return [LayerCache(capacity) for _ in self.model.layers]

    def use_kernels(self, kernels: Kernels | None) -> None:
        """Compute with one set on every device; None: with that of the device."""
        for module in self.modules():
            if isinstance(module, Computed):
                module.kernels = kernels

    def set_checkpointing(self, mode: ActivationCheckpointing) -> None:
        """Choose what every block keeps for its backward pass."""
        inputs = HostInputs() if mode is ActivationCheckpointing.FULL_OFFLOAD else None
        for layer in self.model.layers:
            layer.checkpointing = mode  # type: ignore[assignment]
            layer.inputs_on_host = inputs  # type: ignore[assignment]

    def compile_blocks(self, **options: Any) -> None:
        """Compile each block as one graph (``torch.compile``'s options); a graph break is an error.

        All blocks share their code, so it is compiled once per shape, in training and in evaluation.
        """
        self.model.compiled = True
        for layer in self.model.layers:
            layer.compile_compute(fullgraph=True, dynamic=False, **options)  # type: ignore[operator]

    def reset_buffers(self) -> None:
        """Recompute every buffer that is not in the state dict; needed after ``to_empty``."""
        for module in self.modules():
            if isinstance(module, RotaryEmbedding | TrainedRows):
                module.reset()


def _counted(targets: Tensor, documents: Boundaries | None) -> Tensor:
    """Bool ``[batch, seq]``: tokens of documents, or of rows, that have a target: all but padding."""
    marks = targets != IGNORE_INDEX
    if documents is not None:
        return documents.with_any(marks)
    return marks.any(dim=1, keepdim=True).expand(marks.shape)


def init_weights(model: Decoder, *, seed: int) -> None:
    """Give every parameter its value from scratch, in place; see `initial_weight`."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_weight(name, tuple(parameter.shape), config=model.config, seed=seed))


def initial_weight(name: str, shape: tuple[int, ...], *, config: TransformerConfig, seed: int) -> Tensor:
    """The f32 value one parameter starts from, a pure function of seed and name.

    Norms multiply by one, biases are zero. Matrices are normal with standard deviation 0.02; those that write
    into the residual stream (``o_proj``, ``down_proj``) are smaller by ``sqrt(2 * layers)``, the number
    of such writes, so that the stream does not grow with depth (GPT-2, Radford et al. 2019, section
    2.3). Each draws from its own stream, so neither order nor world size matters and no two are alike.
    """
    if name.endswith("norm.weight"):
        return torch.zeros(shape) if config.one_plus_norms else torch.ones(shape)
    if name.endswith(".bias"):
        return torch.zeros(shape)
    std = INITIAL_STD
    if name.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj")):
        std /= math.sqrt(2 * config.num_layers)
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.empty(shape).normal_(0.0, std, generator=generator)
