"""What random weights score on the held-out data, measured in the run that starts from a file.

A step-0 loss says little alone: it is compared with that of freshly drawn weights of the same model, on
the same sequences, before the file's weights take their place. Here is the measuring; what the two
losses must be is in ``verdict``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from apr_dist.choices import Strategy
from apr_dist.model.config import TransformerConfig
from apr_dist.model.transformer import Decoder
from apr_dist.parallel.runtime import Runtime
from apr_dist.parallel.weights import draw_weights
from apr_dist.runs.progress import RandomStart
from apr_dist.training.evaluation import evaluate


def can_measure(runtime: Runtime) -> bool:
    """Whether a decoder can be evaluated before its engine exists: not where ZeRO-3 cut it in pieces."""
    return runtime.strategy is not Strategy.ZERO3


def compare_with_random(
    model: Decoder,
    config: TransformerConfig,
    runtime: Runtime,
    batches: Iterable[torch.Tensor],
    *,
    seed: int,
    load: Callable[[], None],
) -> RandomStart:
    """Evaluate drawn weights, then those that ``load`` puts in their place; a collective.

    No second model is held: the drawn weights lie where the loaded ones will.

    Args:
        model: the decoder, spread as the strategy says; its values are arbitrary.
        config: its architecture.
        runtime: this rank's view of the processes.
        batches: this rank's share of the held-out sequences, iterated twice.
        seed: of the drawn weights.
        load: gives the model the file's weights, and proves that they arrived.
    """
    draw_weights(model, config, runtime, seed=seed)
    drawn = evaluate(model, batches, runtime)
    load()
    loaded = evaluate(model, batches, runtime)
    return RandomStart(random_loss=drawn.loss, init_loss=loaded.loss, tokens=loaded.tokens)
