"""A training step beside what a user would pick instead: same shape, data, type and optimizer, one run.

Ours is the trainer's own step: its engine, optimizer, feed and guards, read after every step. The contenders,
each in a process of its own as its user would run it, alternate step by step; the figure is the median of
paired ratios to the plain loop over ``transformers``, with its range. ``memory kept`` is that loop with our
allocator's settings. Activation memory is the largest sum of live tensors during forward and backward beyond
weights, gradients and optimizer state. On a GPU: MFU. With ``--compile`` all are compiled, from an empty
cache, and the first step, which waits for the compiler, is told too.

    python benchmarks/bench_train.py --shape smollm2-135m --batch 2 --seq 256
    python benchmarks/bench_train.py --shape qwen2.5-0.5b --layers 8 --batch 1 --seq 1024 --skip trainer
    python benchmarks/bench_train.py --shape qwen2.5-0.5b --batch 8 --seq 2048 --dtype bf16 --compile
    python benchmarks/bench_train.py --plot docs/images/step.svg one.json other.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from train_ours import OurStep, our_weights
from train_rivals import Setting, TrainerLoop, litgpt_loop, plain_loop
from train_turns import Absent, Channel, Seat, Step

from apr_dist.model.config import preset
from apr_dist.model.flops import FORMULA, flops_per_token, peak_flops
from apr_dist.model.host_memory import keep_freed_memory
from apr_dist.model.kernels.products import cpu_matmul_backend

OURS, PLAIN, KEPT, TRAINER, LITGPT = "apr-dist", "transformers", "memory kept", "Trainer", "litgpt"
CONTENDERS = (OURS, PLAIN, KEPT, TRAINER, LITGPT)
"""In the order in which they take turns; ``memory kept`` is the plain loop with our allocator's settings."""

COUNTED = (OURS, PLAIN, LITGPT)
"""Those whose activations are measured."""

SKIPPED_AS = {KEPT: "kept", TRAINER: "trainer", LITGPT: "litgpt"}

WARM_UP = 2
SAME_LOSS = 0.01
"""Losses further apart than this are not of the same model, in bf16 either."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="smollm2-135m", help="name of a model preset")
    parser.add_argument("--layers", type=int, help="fewer layers than the preset has")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--dtype", choices=("f32", "bf16"), default="f32", help="bf16: autocast, f32 weights")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, help="torch threads; by default all cores")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="ours by blocks, the others as a whole")
    parser.add_argument("--skip", nargs="*", default=[], choices=(*SKIPPED_AS.values(), "memory"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="draw the JSON files that follow, and measure nothing")
    parser.add_argument("--serve", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--channel", type=int, nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("files", nargs="*", type=Path)
    return parser.parse_args()


def setting_of(options: argparse.Namespace) -> Setting:
    """What all contenders share."""
    config = preset(options.shape)
    return Setting(
        config=replace(config, num_layers=options.layers or config.num_layers),
        batch=options.batch,
        seq=options.seq,
        dtype=torch.bfloat16 if options.dtype == "bf16" else torch.float32,
        device=torch.device(options.device),
        compiled=options.compile,
    )


def serve(name: str, setting: Setting, channel: Channel) -> None:
    """Be one contender, in this process, with the settings a user of it has."""
    if name == OURS:
        keep_freed_memory()  # as the trainer does
        channel.serve(OurStep(setting))
        return
    state = our_weights(setting)
    if name == TRAINER:
        TrainerLoop(setting, state).serve(channel)
    elif name == LITGPT:
        try:
            loop = litgpt_loop(setting, state)
        except ImportError as error:
            channel.reply(absent=str(error))
            return
        channel.serve(loop)
    else:
        if name == KEPT:
            keep_freed_memory()
        channel.serve(plain_loop(setting, state))


@dataclass(frozen=True)
class Times:
    """By contender: seconds of its first step, and the steps that count; how far losses were ever apart."""

    first: dict[str, float]
    steps: dict[str, list[Step]]
    apart: float

    def seconds(self) -> dict[str, list[float]]:
        """Of the steps that count."""
        return {name: [one.seconds for one in steps] for name, steps in self.steps.items()}


def take_seats(options: argparse.Namespace, stack: contextlib.ExitStack) -> list[Seat]:
    """Start every contender that is wanted and can be there, one after another."""
    scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="compiled-")))
    seats = []
    for name in CONTENDERS:
        if SKIPPED_AS.get(name) in options.skip:
            continue
        try:
            seat = Seat(name, Path(__file__), sys.argv[1:], scratch)
        except Absent as absent:
            print(f"{name} left out: {absent}")
            continue
        stack.callback(seat.leave)
        seats.append(seat)
    return seats


def measure(seats: list[Seat], repeats: int) -> Times:
    """Let all take turns.

    Raises:
        RuntimeError: one has another loss, and so is not the same model.
    """
    first: dict[str, float] = {}
    steps: dict[str, list[Step]] = {seat.name: [] for seat in seats}
    apart = 0.0
    for repeat in range(repeats + WARM_UP):
        losses = {}
        for seat in seats:
            step = seat.step()
            first.setdefault(seat.name, step.seconds)
            if step.loss is not None:
                losses[seat.name] = step.loss
            if repeat >= WARM_UP:
                steps[seat.name].append(step)
        apart = max(apart, max(losses.values()) - min(losses.values()))
        if apart > SAME_LOSS:
            raise RuntimeError(f"step {repeat}: these are not losses of one model: {losses}")
    return Times(first, steps, apart)


def spread(values: list[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure one setting."""
    setting, memory = setting_of(options), {}
    with contextlib.ExitStack() as stack:
        seats = take_seats(options, stack)
        times = measure(seats, options.repeats)
        if "memory" not in options.skip:
            memory = {seat.name: seat.activation_bytes() for seat in seats if seat.name in COUNTED}
        rates = {seat.name: seat.product_rate() for seat in seats if seat.name in (OURS, PLAIN)}
    seconds = times.seconds()
    waited = sum(step.data_wait_s or 0.0 for step in times.steps[OURS]) / sum(seconds[OURS])
    ratios = {
        name: spread([a / b for a, b in zip(took, seconds[PLAIN], strict=True)])
        for name, took in seconds.items()
    }
    config, tokens = setting.config, setting.batch * setting.seq
    cuda = setting.device.type == "cuda"
    peak = peak_flops(torch.cuda.get_device_name(), setting.dtype) if cuda else None
    work = flops_per_token(config, setting.seq) * tokens
    return {
        "setting": f"{options.shape}, {config.num_layers} layers, {setting.batch} x {setting.seq}, "
        f"{options.dtype}{', compiled' if options.compile else ''}",
        "machine": f"{torch.cuda.get_device_name() if cuda else f'{torch.get_num_threads()} CPU threads'}, "
        f"torch {torch.__version__}, our f32 products by {cpu_matmul_backend()}",
        "first_step_seconds": times.first,
        "seconds": {name: spread(took) for name, took in seconds.items()},
        "ratios": ratios,
        "memory_bytes": memory,
        "tokens": tokens,
        "mfu": {
            name: None if peak is None else work / statistics.median(took) / peak
            for name, took in seconds.items()
        },
        "product_rates": rates,
        "floor_seconds": work / rates[OURS],
        "data_wait_share": waited,
        "loss_apart": times.apart,
    }


def table(facts: dict[str, Any]) -> str:
    """What was measured, as a Markdown table."""
    memory = facts["memory_bytes"]
    base, ours, rates = memory.get(PLAIN), facts["seconds"][OURS]["median"], facts["product_rates"]
    lines = [
        f"{facts['setting']}; {facts['machine']}",
        "",
        "| | step, s (range) | of the plain loop (range) | tokens/s | MFU | activations, MB (of plain) "
        "| first step, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, took in facts["seconds"].items():
        ratio, mfu = facts["ratios"][name], facts["mfu"][name]
        kept = f"{memory[name] / 1e6:,.0f} ({memory[name] / base:.2f})" if name in memory else "-"
        lines.append(
            f"| {name} | {took['median']:.3f} ({took['min']:.3f}-{took['max']:.3f}) | "
            f"{ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f}) | "
            f"{facts['tokens'] / took['median']:,.0f} | {'n/a' if mfu is None else f'{100 * mfu:.1f} %'} | "
            f"{kept} | {facts['first_step_seconds'][name]:.1f} |"
        )
    lines += [
        "",
        f"losses of all that tell theirs at most {facts['loss_apart']:.1e} apart; MFU by {FORMULA}",
        f"a step's arithmetic at the rate of our large products ({rates[OURS] / 1e9:,.0f} GFLOP/s, "
        f"PyTorch's own {rates[PLAIN] / 1e9:,.0f}) takes {facts['floor_seconds']:.3f} s; "
        f"our step {ours / facts['floor_seconds']:.2f} times that",
        f"of our steps the host waited {100 * facts['data_wait_share']:.3f} % for their batches",
    ]
    return "\n".join(lines)


def plot(path: Path, files: list[Path]) -> None:
    """Step time and activation memory of every setting, as shares of the plain loop."""
    import matplotlib as mpl  # noqa: PLC0415  (only a plot needs it)

    mpl.use("svg")
    mpl.rcParams["svg.fonttype"] = "none"
    from matplotlib import pyplot as plt  # noqa: PLC0415

    runs = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    figure, axes = plt.subplots(1, len(runs), figsize=(3.6 * len(runs), 3.4), sharey=True, squeeze=False)
    for axis, facts in zip(axes[0], runs, strict=True):
        names = list(facts["ratios"])
        medians = [facts["ratios"][name]["median"] for name in names]
        low = [facts["ratios"][name]["median"] - facts["ratios"][name]["min"] for name in names]
        high = [facts["ratios"][name]["max"] - facts["ratios"][name]["median"] for name in names]
        places = range(len(names))
        colours = ["#1f6f8b" if name == OURS else "#b0b7bd" for name in names]
        axis.bar(places, medians, 0.62, yerr=[low, high], color=colours, ecolor="#444444", capsize=3)
        for place, median in zip(places, medians, strict=True):
            axis.text(place, 0.03, f"{median:.2f}", ha="center", color="white", fontweight="bold")
        axis.axhline(1.0, color="#444444", linewidth=0.8, linestyle=":")
        axis.set_xticks(list(places), [name.replace(" ", "\n") for name in names], fontsize=8)
        axis.set_title(facts["setting"].replace(", ", "\n", 1), fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("step time, share of the plain loop")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    print(f"{path}: {path.stat().st_size / 1e3:.0f} KB")


def main() -> None:
    options = arguments()
    if options.plot:
        plot(options.plot, options.files)
        return
    torch.set_num_threads(options.threads or torch.get_num_threads())
    if options.serve:
        serve(options.serve, setting_of(options), Channel(*options.channel))
        return
    facts = run(options)
    print(table(facts))
    if options.json:
        options.json.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
