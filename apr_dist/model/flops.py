"""Arithmetic of a training step: operations per token, and what devices can do at most. No PyTorch here.

Model FLOPs utilisation (MFU) is ``flops_per_token * tokens_per_second / (devices * peak_flops)``.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final, NamedTuple

from apr_dist.model.adapters import BLOCKS, ROWS, Adapter, block_of
from apr_dist.model.config import TransformerConfig

if TYPE_CHECKING:
    import torch

HEAD_GRADIENT_ROWS: Final = 8192
"""Rows of the head's gradient that are computed at once."""

LOGITS_CHUNK_BYTES: Final = 128 << 20
"""Largest chunk of logits the loss holds at once."""

LOGITS_CHUNK_MULTIPLE: Final = 16
"""Tokens of such a chunk are a multiple of this, as vector units and matrix units like them."""

FORMULA: Final = "6 * active matrix parameters + 12 * layers * heads * head_dim * sequence length"
"""`flops_per_token` in words, to print beside an MFU."""

ADAPTED: Final = (
    "4 * frozen + 6 * adapter matrix parameters + 12 * layers * heads * head_dim * sequence length,"
    " backward as far down as adapters are"
)
"""The same where an adapter is trained."""


def logits_chunk(tokens: int, vocab_size: int, element_bytes: int) -> int:
    """Tokens whose logits the loss holds at once: chunks of one size, as few as the limit allows.

    A last chunk much smaller than the others would be multiplied at a lower rate.
    """
    most = max(1, LOGITS_CHUNK_BYTES // (element_bytes * vocab_size))
    multiple = min(LOGITS_CHUNK_MULTIPLE, most)
    most -= most % multiple
    share = math.ceil(tokens / max(1, math.ceil(tokens / most)))
    return max(1, math.ceil(share / multiple) * multiple)


def flops_per_token(
    config: TransformerConfig, seq_length: int, *, backward: bool = True, adapter: Adapter | None = None
) -> int:
    """Floating-point operations the model needs per token (PaLM, arXiv:2204.02311, appendix B).

    Each weight of a matrix is one multiplication and one addition forward and twice that backward: 6
    per weight, the head included, the embedding lookup not, and of a mixture's experts those that compute the
    token. Scores and mixing add
    ``12 * layers * heads * head_dim * seq_length``, or in layers with a window its length; as in that
    convention, the causal half that is not computed counts. Recomputation is not counted.

    A frozen weight has no gradient of its own, so beside an adapter it is 4 operations, and 2 in blocks below
    the first that has one, through which no gradient passes.

    Args:
        config: the model.
        seq_length: tokens per sequence.
        backward: whether the backward pass counts too.
        adapter: what is trained in place of the weights.
    """
    shapes = config.parameter_shapes()
    experts = config.num_experts or 1
    matrices = sum(
        math.prod(shape) * (config.active_experts if len(shape) == 3 else experts)
        for shape in shapes.values()
        if len(shape) > 1
    )
    matrices //= experts
    if not config.tie_word_embeddings:
        matrices -= config.vocab_size * config.hidden_size
    seen = sum(min(seq_length, window or seq_length) for window in config.windows)
    forward = 2 * matrices + 4 * config.query_size * seen
    if adapter is None:
        return 3 * forward if backward else forward
    factors = (shape for name, shape in adapter.shapes(config).items() if not name.endswith(ROWS))
    own = sum(math.prod(shape) for shape in factors if len(shape) == 2)
    if not backward:
        return forward + 2 * own
    below = _without_gradient(config, seq_length, adapter)
    given = 2 * (matrices - below.matrices) + 8 * config.query_size * (seen - below.seen)
    head = 2 * config.vocab_size * config.hidden_size if adapter.tokens else 0
    return forward + 6 * own + given + head


class _Below(NamedTuple):
    """Of the blocks below the first with an adapter: weights of matrices, and positions that are seen."""

    matrices: int
    seen: int


def _without_gradient(config: TransformerConfig, seq_length: int, adapter: Adapter) -> _Below:
    lowest = (block_of(name, config.num_layers) for name in adapter.modules)
    first = 0 if adapter.tokens else min(lowest, default=config.num_layers)
    matrices = sum(
        math.prod(shape)
        for name, shape in config.parameter_shapes().items()
        if len(shape) == 2 and name.startswith(BLOCKS) and block_of(name, config.num_layers) < first
    )
    return _Below(matrices, sum(min(seq_length, window or seq_length) for window in config.windows[:first]))


_16BIT: Final[tuple[tuple[str, float], ...]] = (
    ("B200", 2250e12),
    ("H200 NVL", 835.5e12),
    ("H200", 989.4e12),
    ("GH200", 989.4e12),
    ("H100 NVL", 835.5e12),
    ("H100 PCIe", 756e12),
    ("H100", 989.4e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("L4", 121e12),
    ("RTX 5090", 209.5e12),
    ("RTX 4090", 165.2e12),
    ("RTX 3090", 71e12),
    ("MI300X", 1307.4e12),
)
_F32: Final[tuple[tuple[str, float], ...]] = (
    ("H200 NVL", 60e12),
    ("H200", 67e12),
    ("GH200", 67e12),
    ("H100 NVL", 60e12),
    ("H100 PCIe", 51e12),
    ("H100", 67e12),
    ("A100", 19.5e12),
    ("L40S", 91.6e12),
    ("L4", 30.3e12),
    ("RTX 5090", 104.8e12),
    ("RTX 4090", 82.6e12),
    ("RTX 3090", 35.6e12),
    ("MI300X", 163.4e12),
)
_NOT_THESE: Final = ("L40", "H800", "A800", "H20", "Laptop", "MIG", "RTX 4090 D", "RTX 5090 D")


def peak_flops(device_name: str, dtype: torch.dtype) -> float | None:
    """Dense peak of one device in FLOP/s as its maker states it; None for a device or type not listed.

    16-bit figures are without sparsity and, on consumer cards, with f32 accumulation; f32 figures are
    of the ordinary units, not TF32.

    Args:
        device_name: as ``torch.cuda.get_device_name`` gives it.
        dtype: type of the products.
    """
    words = device_name.replace("-", " ").split()
    if _is_excluded(words):
        return None
    table = {"torch.bfloat16": _16BIT, "torch.float16": _16BIT, "torch.float32": _F32}.get(str(dtype), ())
    return next((peak for name, peak in table if _names(name, words)), None)


def _names(name: str, words: list[str]) -> bool:
    return all(any(word == part for word in words) for part in name.split())


def _is_excluded(words: list[str]) -> bool:
    return any(_names(name, words) for name in _NOT_THESE)
