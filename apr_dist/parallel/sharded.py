"""FSDP2's kinds of tensor and module, told apart without loading what makes them.

``torch.distributed.tensor`` brings a computer algebra with it and takes most of a second to import. Only
FSDP2 makes a ``DTensor`` or an ``FSDPModule``; as long as nobody imported them there is none.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor


def as_dtensor(tensor: Tensor) -> DTensor | None:
    """The tensor, where it is one of FSDP2's; else None."""
    if "torch.distributed.tensor" not in sys.modules:
        return None
    from torch.distributed.tensor import DTensor  # noqa: PLC0415  (see above)

    return tensor if isinstance(tensor, DTensor) else None


def held_here(tensor: Tensor) -> Tensor:
    """This rank's part of one of FSDP2's tensors; any other as it is."""
    sharded = as_dtensor(tensor)
    return tensor if sharded is None else sharded.to_local()


def as_fsdp(module: nn.Module) -> FSDPModule | None:
    """The module, where ``fully_shard`` was applied to it; else None."""
    if "torch.distributed.fsdp" not in sys.modules:
        return None
    from torch.distributed.fsdp import FSDPModule  # noqa: PLC0415  (see above)

    return module if isinstance(module, FSDPModule) else None
