"""The regression guard: paired ratios, compared with the last ones recorded. Under three minutes.

Each figure is a ratio of two things measured alternately in one run, so a slow or busy machine moves both.
A ratio whose median lies above the recorded range is a regression, and the exit code is 1, as when a
recorded ratio is no longer measured; below it, the table says that it improved. Bytes are counted, not
timed, and may grow by one percent. On another processor, with other threads or another PyTorch than were
recorded, the table is shown and nothing judged. Without a usable record the exit code is 2.

    python benchmarks/bench_quick.py                # compare
    python benchmarks/bench_quick.py --record       # measure longer, and write recorded.json
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from bench_loss import chunked, peak_bytes, plain
from recorded_ratios import Ratios, guard
from train_ours import OurStep
from train_rivals import Setting, plain_loop

from apr_dist.model.config import preset
from apr_dist.model.host_memory import keep_freed_memory


def step_ratios(rounds: int) -> Ratios:
    """A step and its activations beside the plain loop over ``transformers``: SmolLM2's shape, 4 layers."""
    found: Ratios = {}
    for name, dtype in (("f32", torch.float32), ("bf16", torch.bfloat16)):
        setting = Setting(
            config=replace(preset("smollm2-135m"), num_layers=4),
            batch=1,
            seq=256,
            dtype=dtype,
            device=torch.device("cpu"),
        )
        first = OurStep(setting)
        second = plain_loop(setting, first.model.state_dict())
        pairs = [(first.step().seconds, second.step().seconds) for _ in range(rounds + 2)][2:]
        found[f"step, {name}"] = [one / other for one, other in pairs]
        found[f"bytes: activations, {name}"] = [first.activation_bytes() / second.activation_bytes()]
    return found


def loss_ratios(rounds: int) -> Ratios:
    """The loss without the logits beside the plain one, forward and backward: 512 tokens, 49,152 rows."""
    generator = torch.Generator().manual_seed(0)
    inputs = (
        torch.randn(512, 576, generator=generator).requires_grad_(),
        torch.randn(49_152, 576, generator=generator).mul_(0.02).requires_grad_(),
        torch.randint(49_152, (512,), generator=generator),
    )

    def seconds(compute: Callable[..., torch.Tensor]) -> float:
        began = time.perf_counter()
        compute(inputs).backward()
        took = time.perf_counter() - began
        inputs[0].grad = inputs[1].grad = None
        return took

    pairs = [(seconds(chunked), seconds(plain)) for _ in range(rounds + 1)][1:]
    return {
        "loss": [one / other for one, other in pairs],
        "bytes: loss": [peak_bytes(chunked, inputs) / peak_bytes(plain, inputs)],
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    keep_freed_memory()
    rounds = 9 if options.record else 5
    return guard(
        lambda: step_ratios(rounds) | loss_ratios(rounds),
        Path(__file__).with_name("recorded.json"),
        record=options.record,
    )


if __name__ == "__main__":
    sys.exit(main())
