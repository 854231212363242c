"""The regression guard: paired ratios, compared with the last ones recorded. Under three minutes.

Each figure is a ratio of two things measured alternately in one run, so a slow or busy machine moves both.
A ratio whose median lies above the recorded range is a regression, and the exit code is 1; below it, the
table says that it improved. Bytes are counted, not timed, and may grow by one percent.

    python benchmarks/bench_quick.py                # compare
    python benchmarks/bench_quick.py --record       # measure longer, and write recorded.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from bench_loss import chunked, peak_bytes, plain
from train_ours import OurStep
from train_rivals import Setting, plain_loop

from apr_dist.model.config import preset
from apr_dist.model.host_memory import keep_freed_memory

RECORDED = Path(__file__).with_name("recorded.json")
"""Ratio by name: median, smallest, largest."""

Ratios = dict[str, list[float]]


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
        pairs = [(first.step()[1], second.step()[1]) for _ in range(rounds + 2)][2:]
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
    if not options.record and not RECORDED.exists():
        print(f"{RECORDED.name} is not there: run with --record on a quiet machine first", file=sys.stderr)
        return 1
    keep_freed_memory()
    rounds = 9 if options.record else 5
    found = step_ratios(rounds) | loss_ratios(rounds)
    if options.record:
        facts = {
            name: {"median": statistics.median(values), "min": min(values), "max": max(values)}
            for name, values in found.items()
        }
        RECORDED.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        print(f"recorded {len(facts)} ratios in {RECORDED.name}")
        return 0
    return compare(found, json.loads(RECORDED.read_text(encoding="utf-8")))


def compare(found: Ratios, recorded: dict[str, dict[str, float]]) -> int:
    """Say what moved; 1 when something is slower or larger than it ever was while recording, and a little."""
    worse = []
    print(f"{'ratio to the plain way':28}{'now':>8}{'recorded (range)':>26}  ")
    for name, values in found.items():
        before, now = recorded[name], statistics.median(values)
        slack = 1.01 if name.startswith("bytes") else 1.05  # a few pairs do not show the whole range
        verdict = "as before"
        if now > before["max"] * slack:
            verdict = "WORSE"
            worse.append(name)
        elif now < before["min"] / slack:
            verdict = "better: record it"
        known = f"{before['median']:.3f} ({before['min']:.3f}-{before['max']:.3f})"
        print(f"{name:28}{now:8.3f}{known:>26}  {verdict}")
    if worse:
        print(f"regression: {', '.join(worse)}", file=sys.stderr)
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
