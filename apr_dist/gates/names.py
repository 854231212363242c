"""Tensor names as training frameworks leave them, and the plain names they stand for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

ROTARY_BUFFER: Final = ".rotary_emb.inv_freq"
"""End of the name of a buffer that old Llama checkpoints hold and that is computed from ``rope_theta``."""

_WRAPPERS: Final = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""What ``torch.compile``, FSDP and activation checkpointing put into a name, at any depth."""

_ANCHORS: Final = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """The plain name of every stored one, in the same order.

    Wrappers are removed at any depth (``_orig_mod.``), and a prefix in front of a decoder's names where
    every name has it (``module.``, ``base_model.model.``). Names that would then collide stay as they are.
    """
    stored = list(names)
    plain = stored
    for wrapper in _WRAPPERS:
        plain = [name.replace(wrapper, "") for name in plain]
    prefix = _common_prefix(plain)
    plain = [name.removeprefix(prefix) for name in plain]
    return dict(zip(stored, plain if len(set(plain)) == len(stored) else stored, strict=True))


def _common_prefix(names: list[str]) -> str:
    for anchor in _ANCHORS:
        for name in names:
            prefix = name.removesuffix(anchor)
            if prefix.endswith(".") and prefix != name and all(one.startswith(prefix) for one in names):
                return prefix
    return ""
