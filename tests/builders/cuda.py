"""CUDA tensors without CUDA, which have a shape and a type and no value, and what is asked of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True)
class Call:
    """An operator that ran: its arguments, the types of the tensors among them, the shapes that it made."""

    name: str
    args: Sequence[Any] = ()
    types: list[torch.dtype] = field(default_factory=list)
    made: list[torch.Size] = field(default_factory=list)


class Operators(TorchDispatchMode):
    """Lists what runs while entered."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Note it and run it."""
        result = function(*args, **(kwargs or {}))
        made = result if isinstance(result, tuple | list) else [result]
        self.calls.append(
            Call(
                name=function.name(),
                args=args,
                types=[one.dtype for one in args if isinstance(one, torch.Tensor)],
                made=[one.shape for one in made if isinstance(one, torch.Tensor)],
            )
        )
        return result

    def named(self, name: str) -> list[Call]:
        """Those of that name, in order."""
        return [call for call in self.calls if call.name == name]


@contextlib.contextmanager
def imagined_cuda(*, autocast: bool = True) -> Iterator[None]:
    """Tensors made inside are on a CUDA device that need not exist, under autocast to bf16."""
    was = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        torch.set_autocast_enabled("cuda", autocast)
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        try:
            yield
        finally:
            torch.set_autocast_enabled("cuda", was[0])
            torch.set_autocast_dtype("cuda", was[1])
            torch.clear_autocast_cache()
