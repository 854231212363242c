"""What the tests of plans and reports share: training steps, and what they hold."""

from __future__ import annotations

import subprocess
import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from apr_dist.model.config import TransformerConfig
from apr_dist.model.families import Family
from apr_dist.model.transformer import Decoder
from apr_dist.planning.activations import Load
from apr_dist.training.optimizer import build_optimizer


def decoder_config(**sizes: int) -> TransformerConfig:
    """A small model to measure."""
    return TransformerConfig(
        family=Family.QWEN2,
        rope_theta=1e4,
        rms_norm_eps=1e-6,
        head_dim=64,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        **sizes,
    )


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of CPU tensors that are alive while it is entered; ``peak`` is the most at once."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                if storage._cdata not in self._sizes:
                    self._sizes[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self._sizes.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self._sizes.values()))
        return made


def two_steps(config: TransformerConfig, load: Load) -> None:
    """Train a decoder for two optimizer steps, as the trainer does on one process."""
    with torch.device("meta"):
        model = Decoder(config)
    model.to_empty(device="cpu")
    model.reset_buffers()
    model.set_checkpointing(load.checkpointing)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0.0, 0.02)
    optimizer = build_optimizer(model, lr=1e-4, weight_decay=0.01, betas=(0.9, 0.999), eps=1e-8)
    shape = (load.micro_batch, load.seq_length + 1)
    for _ in range(2):
        for _ in range(2 if load.accumulates else 1):
            tokens = torch.randint(0, config.vocab_size, shape, dtype=torch.int32)
            model(tokens[:, :-1], tokens[:, 1:].long())[0].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


_RUN_AND_MEASURE = """
import re, sys
from pathlib import Path
from apr_dist.train import main
code = main(sys.argv[1:])
print("PEAK", int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024)
sys.exit(code)
"""


def peak_bytes(*runs: list[str]) -> list[int]:
    """Train as each list of flags says, side by side, each in a process of its own.

    Returns:
        The most resident memory each process ever had.
    """
    started = [
        subprocess.Popen(
            [sys.executable, "-c", _RUN_AND_MEASURE, *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for flags in runs
    ]
    peaks = []
    for process in started:
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 0, said
        peaks.append(int(said.rpartition("PEAK ")[2]))
    return peaks
