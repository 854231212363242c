"""Kernels that only CUDA has: attention of packed documents without a mask, and Liger's loss.

All else is the plain set's, which is made of PyTorch's own kernels. Packed documents go to the
variable-length kernel where it runs (16-bit types, compute capability 8.0 and later), else to flex attention;
no mask of ``[seq, seq]`` is ever held for them. Sliding windows go to the variable-length kernel too, else
they are one mask for all blocks. Nothing here waits for the device.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor

from apr_dist.choices import KernelChoice
from apr_dist.model.kernels.loss import IGNORE_INDEX, LossTerms
from apr_dist.model.kernels.plain import Attend, Kernels
from apr_dist.model.packing import Boundaries

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128
"""Side of the blocks that flex attention takes or leaves."""


class CudaKernels(Kernels):
    """See the module."""

    name: ClassVar = KernelChoice.CUDA

    def attention(
        self,
        shape: tuple[int, int],
        device: torch.device,
        *,
        dtype: torch.dtype,
        window: int | None = None,
        softcap: float | None = None,
        documents: Boundaries | None = None,
        whole: bool = True,
    ) -> Attend:
        """See `Kernels.attention`; capped scores are the plain set's, with all scores held."""
        if softcap is not None:
            return super().attention(
                shape, device, dtype=dtype, window=window, softcap=softcap, documents=documents, whole=whole
            )
        hidden = whole and window is not None and window < shape[1]
        if has_varlen(device, dtype) and (documents is not None or hidden):
            return Varlen.of(documents or Boundaries.of_rows(*shape, device), window)
        if documents is not None:
            return Flex(block_mask(documents, window))
        return super().attention(shape, device, dtype=dtype, window=window, whole=whole)

    def isolation(self, device: torch.device, dtype: torch.dtype) -> str:
        """See `Kernels.isolation`."""
        return "varlen" if has_varlen(device, dtype) else "flex"

    def has_own_loss(self, *, z_loss: float, softcap: float | None = None) -> bool:
        """See `Kernels.has_own_loss`; Liger's loss does not report what z-loss adds, nor does it cap here."""
        return bool(z_loss) or softcap is not None or find_spec("liger_kernel") is None

    def _summed_loss(
        self, rows: Tensor, weight: Tensor, targets: Tensor, terms: LossTerms, chunk_tokens: int | None
    ) -> tuple[Tensor, Tensor]:
        if self.has_own_loss(z_loss=terms.z_loss, softcap=terms.softcap):
            return super()._summed_loss(rows, weight, targets, terms, chunk_tokens)
        return liger_cross_entropy(rows, weight, targets), torch.zeros((), device=rows.device)


def has_varlen(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the variable-length kernel computes with this type on this device."""
    return dtype in (torch.bfloat16, torch.float16) and torch.cuda.get_device_capability(device) >= (8, 0)


def liger_cross_entropy(rows: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Summed loss of rows ``[tokens, hidden]`` and head ``[vocab, hidden]`` by the extra ``liger``, f32."""
    liger = importlib.import_module("liger_kernel.transformers")
    compute = liger.LigerFusedLinearCrossEntropyLoss(
        ignore_index=IGNORE_INDEX, reduction="sum", accum_dtype=torch.float32
    )
    return cast(Tensor, compute(weight.to(rows.dtype), rows, targets)).float()


@dataclass(frozen=True)
class Varlen:
    """Packed documents, or whole rows through a window, by PyTorch's variable-length kernel.

    Attributes:
        edges: int32 ``[documents + 1]``, first token of each in the flattened batch.
        longest: tokens of a row, as the bound of a document's.
        shares_heads: whether the kernel takes fewer KV heads than query heads (not in PyTorch 2.11).
        window: positions that one sees; None: all before it.
    """

    edges: Tensor
    longest: int
    shares_heads: bool
    window: int | None

    @staticmethod
    def of(documents: Boundaries, window: int | None) -> Varlen:
        """For one batch."""
        from torch.nn.attention import varlen  # noqa: PLC0415  (loads the compiler, for seconds)

        # Every batch has another number of documents: one compiled block for all of them.
        torch._dynamo.mark_dynamic(documents.edges, 0)
        shares_heads = "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters
        return Varlen(documents.edges, documents.shape[1], shares_heads, window)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See `Attend`."""
        from torch.nn.attention import varlen  # noqa: PLC0415  (loads the compiler, for seconds)

        groups = query.shape[2] // key.shape[2]
        options: dict[str, Any] = {}
        if groups > 1 and self.shares_heads:
            options["enable_gqa"] = True
        elif groups > 1:
            key, value = key.repeat_interleave(groups, dim=2), value.repeat_interleave(groups, dim=2)
        mixed = varlen.varlen_attn(
            query.flatten(0, 1),
            key.flatten(0, 1),
            value.flatten(0, 1),
            self.edges,
            self.edges,
            self.longest,
            self.longest,
            window_size=(-1 if self.window is None else self.window - 1, 0),
            **options,
        )
        return mixed.view(query.shape)  # type: ignore[union-attr]


@dataclass(frozen=True)
class Flex:
    """Packed documents by flex attention, of whose score matrix only the blocks are listed."""

    block_mask: BlockMask

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See `Attend`."""
        mixed: Any = compiled_flex()(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            block_mask=self.block_mask,
            enable_gqa=key.shape[2] != query.shape[2],
        )
        return mixed.transpose(1, 2)  # type: ignore[no-any-return]


def block_mask(boundaries: Boundaries, window: int | None) -> BlockMask:
    """Which blocks of the score matrix are seen in part and which whole; nothing of ``[seq, seq]`` is made.

    A query sees the keys from ``first[query]`` to itself. As ``first`` never falls, a block of queries sees
    every block of keys from its first query's first to its own; whole are those behind its last query's
    first, and before its own.
    """
    from torch.nn.attention.flex_attention import BlockMask  # noqa: PLC0415  (loads the compiler)

    (batch, length), device = boundaries.shape, boundaries.edges.device
    places = torch.arange(batch * length, dtype=torch.int32, device=device)
    document = torch.searchsorted(boundaries.edges, places, right=True) - 1
    first = (boundaries.edges[document] % length).view(batch, length)
    if window is not None:
        first = first.maximum(places[:length] - (window - 1))
    own = torch.arange(-(-length // BLOCK), dtype=torch.int32, device=device)
    some_from = first[:, ::BLOCK] // BLOCK
    all_from = own.expand(batch, -1).clone()  # a block that the row's end cuts off counts none as whole
    all_from[:, : length // BLOCK] = (first[:, BLOCK - 1 :: BLOCK] + (BLOCK - 1)) // BLOCK
    before = own < own[:, None]
    whole = before & (own >= all_from[..., None])
    part = (before | (own == own[:, None])) & (own >= some_from[..., None]) & ~whole

    def visible(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (key >= first[row, query])

    return BlockMask.from_kv_blocks(
        *_listed(part), *_listed(whole), BLOCK_SIZE=BLOCK, mask_mod=visible, seq_lengths=(length, length)
    )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Bool ``[batch, rows, columns]`` to how many each row has, and which, these first; one for all heads."""
    which = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[:, None], which.int()[:, None]


@functools.cache
def compiled_flex() -> Callable[..., Any]:
    """Flex attention, which is fast only where it is compiled."""
    from torch.nn.attention.flex_attention import flex_attention  # noqa: PLC0415  (loads the compiler)

    return torch.compile(flex_attention, dynamic=False)
