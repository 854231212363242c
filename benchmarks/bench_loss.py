"""The linear cross-entropy's implementations beside the plain one: time and peak memory, in one run.

Forward and backward of the loss alone, on the CPU, alternating; medians with their spread, and the
largest sum of live tensors beyond the inputs, as the allocator saw it.

    python benchmarks/bench_loss.py --tokens 4096 --vocab 151936 --hidden 896
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from torch.profiler import ProfilerActivity, profile

from apr_dist.choices import KernelChoice
from apr_dist.model.host_memory import keep_freed_memory
from apr_dist.model.kernels.choice import SETS
from apr_dist.model.kernels.loss import cross_entropy_of

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def chunked(inputs: Inputs) -> torch.Tensor:
    return SETS[KernelChoice.CPU].cross_entropy(*inputs).total


def pytorch(inputs: Inputs) -> torch.Tensor:
    hidden, head, targets = inputs
    return F.linear_cross_entropy(hidden, head, targets, reduction="sum")


def plain(inputs: Inputs) -> torch.Tensor:
    hidden, head, targets = inputs
    return cross_entropy_of(F.linear(hidden, head), targets).total


def run(compute: Callable[[Inputs], torch.Tensor], inputs: Inputs) -> tuple[float, float]:
    """Loss, and seconds of forward and backward."""
    began = time.perf_counter()
    loss = compute(inputs)
    loss.backward()
    took = time.perf_counter() - began
    inputs[0].grad = inputs[1].grad = None
    return loss.item(), took


def peak_bytes(compute: Callable[[Inputs], torch.Tensor], inputs: Inputs) -> int:
    """Largest sum of live tensors beyond the inputs, the gradients of the inputs included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        compute(inputs).backward()
    inputs[0].grad = inputs[1].grad = None
    live = peak = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=49_152)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--skip-torch", action="store_true", help="leave PyTorch's own out: it is slow on CPU"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    keep_freed_memory()
    generator = torch.Generator().manual_seed(0)
    inputs = (
        torch.randn(options.tokens, options.hidden, generator=generator).requires_grad_(),
        torch.randn(options.vocab, options.hidden, generator=generator).mul_(0.02).requires_grad_(),
        torch.randint(options.vocab, (options.tokens,), generator=generator),
    )
    contenders = {"chunked": chunked, "plain": plain}
    if not options.skip_torch:
        contenders["torch"] = pytorch
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    losses = {}
    for repeat in range(options.repeats + 1):
        for name, compute in contenders.items():
            losses[name], took = run(compute, inputs)
            if repeat:
                seconds[name].append(took)
    gradients = 4 * (options.tokens + options.vocab) * options.hidden
    memory = {name: peak_bytes(compute, inputs) - gradients for name, compute in contenders.items()}
    print(f"{options.tokens} tokens, vocabulary {options.vocab}, hidden {options.hidden}, f32")
    print(f"{'':10}{'s, median (min-max)':>28}{'of plain':>10}{'peak MB':>10}{'of plain':>10}{'loss':>14}")
    base = statistics.median(seconds["plain"])
    for name, times in seconds.items():
        spread = f"{statistics.median(times):.3f} ({min(times):.3f}-{max(times):.3f})"
        print(
            f"{name:10}{spread:>28}{statistics.median(times) / base:10.3f}{memory[name] / 1e6:10.0f}"
            f"{memory[name] / memory['plain']:10.3f}{losses[name]:14.4f}"
        )
    print("peak: beyond the inputs and their gradients")
    if options.json:
        facts = {"seconds": seconds, "memory_bytes": memory, "losses": losses}
        options.json.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
