"""Text from a decoder, one token at a time, with a KV cache. Ids in, ids out; tokenizers are elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from apr_dist.errors import UsageError
from apr_dist.model.transformer import Decoder


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen and when to stop.

    Attributes:
        max_new_tokens: tokens after which generation ends.
        temperature: logits are divided by it before the draw; 0 takes the most likely token.
        top_k: draw among the k most likely tokens only.
        top_p: draw among the most likely tokens whose probabilities first add up to p.
        seed: of the draw.
        stop_ids: end after any of these tokens, which is still handed out.

    Raises:
        UsageError: a value outside its range.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    stop_ids: frozenset[int] = field(default_factory=frozenset)

    def __post_init__(self) -> None:
        checks = (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature >= 0.0, "0 or more"),
            ("top_k", self.top_k is None or self.top_k >= 1, "at least 1"),
            ("top_p", self.top_p is None or 0.0 < self.top_p <= 1.0, "above 0 and at most 1"),
        )
        for name, holds, expected in checks:
            if not holds:
                raise UsageError(f"{name} is {getattr(self, name)!r}", expected=expected)


def generate(model: Decoder, prompt_ids: Sequence[int], sampling: Sampling | None = None) -> list[int]:
    """The new tokens after a prompt; see `stream`."""
    return list(stream(model, prompt_ids, sampling))


@torch.no_grad()
def stream(
    model: Decoder,
    prompt_ids: Sequence[int],
    sampling: Sampling | None = None,
    *,
    network: nn.Module | None = None,
    agree: Callable[[int], int] = lambda token: token,
) -> Iterator[int]:
    """Yield the new tokens after a prompt as they are chosen; by default the most likely ones.

    The prompt is read once; then each token costs one position of computation.

    Args:
        model: the decoder.
        prompt_ids: tokens of the prompt.
        sampling: how tokens are chosen.
        network: what a forward of the decoder goes through while it is trained; None: the decoder itself.
        agree: gives the token that is taken for the one chosen here, where several processes choose.

    Raises:
        UsageError: an empty prompt, an id outside the vocabulary, or more positions than the model has.
    """
    sampling = sampling or Sampling()
    _check(model, prompt_ids, sampling)
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(sampling.seed)
    whole, capacity = list(prompt_ids), len(prompt_ids) + sampling.max_new_tokens
    caches = model.empty_caches(capacity)
    tokens = torch.tensor([whole], device=device)
    for _ in range(sampling.max_new_tokens):
        logits = (network or model)(tokens, caches=caches, last=True)
        token = agree(choose(logits[0, -1], sampling, generator))
        yield token
        if token in sampling.stop_ids:
            return
        whole.append(token)
        if len(whole) - 1 == model.config.turning_length:  # from here on all positions rotate otherwise
            caches = model.empty_caches(capacity)
            tokens = torch.tensor([whole], device=device)
        else:
            tokens = torch.tensor([[token]], device=device)


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One token id from logits ``[vocab]``: temperature, then top-k, then top-p, then the draw."""
    if sampling.temperature == 0.0:
        return int(logits.argmax())
    scaled = logits.float().cpu() / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < scaled.numel():
        scaled[scaled < scaled.topk(sampling.top_k).values[-1]] = -torch.inf
    probabilities = scaled.softmax(dim=0)
    if sampling.top_p is not None:
        ordered, order = probabilities.sort(descending=True, stable=True)
        before = ordered.cumsum(0) - ordered
        probabilities[order[before >= sampling.top_p]] = 0.0
    return int(torch.multinomial(probabilities, 1, generator=generator))


def _check(model: Decoder, prompt_ids: Sequence[int], sampling: Sampling) -> None:
    vocabulary, positions = model.config.vocab_size, model.config.max_position_embeddings
    if not prompt_ids:
        raise UsageError("the prompt is empty", expected="at least one token")
    if not 0 <= min(prompt_ids) <= max(prompt_ids) < vocabulary:
        wrong = next(token for token in prompt_ids if not 0 <= token < vocabulary)
        raise UsageError(f"the prompt holds token {wrong}", expected=f"ids from 0 to {vocabulary - 1}")
    if len(prompt_ids) + sampling.max_new_tokens > positions:
        raise UsageError(
            f"{len(prompt_ids)} prompt tokens and {sampling.max_new_tokens} new ones",
            expected=f"at most {positions} together (max_position_embeddings)",
            remedy="shorten the prompt or ask for fewer new tokens",
        )
