"""PyTorch's AdamW, called without loading PyTorch's compiler.

Around some of its methods PyTorch puts code that tells the compiler to leave them alone, and that imports
the compiler for it: most of a second of every run. Here nobody compiles an optimizer, so the same methods are
called as they were written.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

_STEP: Callable[..., Any] = inspect.unwrap(torch.optim.AdamW.step)


class AdamW(torch.optim.AdamW):
    """`torch.optim.AdamW`: the same state, the same updates."""

    add_param_group = inspect.unwrap(torch.optim.AdamW.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.AdamW.zero_grad)
    state_dict = inspect.unwrap(torch.optim.AdamW.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.AdamW.load_state_dict)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; see `torch.optim.AdamW.step`."""
        return _STEP(self, closure)
