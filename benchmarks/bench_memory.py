"""The memory ladder: what fits, what a traced step holds, how fast updates stream.

python benchmarks/bench_memory.py table                    # the table and picture of docs/memory.md
python benchmarks/bench_memory.py trace qwen3-8b           # plan beside a step on fake tensors; minutes
python benchmarks/bench_memory.py trace-adapters           # the same of an adapter beside 8 billion weights
python benchmarks/bench_memory.py update                   # a streamed update over the bytes it moves
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import torch

from apr_dist.choices import WeightStorage
from apr_dist.config.reading import parse_command_line
from apr_dist.config.schema import TrainConfig
from apr_dist.model.config import TransformerConfig, preset
from apr_dist.model.families import Family
from apr_dist.model.host_copies import host_empty
from apr_dist.model.host_memory import keep_freed_memory
from apr_dist.parallel.split_weights import SplitWeight, attach
from apr_dist.parallel.storage import Storage
from apr_dist.parallel.stored_adamw import Place, StoredAdamW
from apr_dist.parallel.strategy import named
from apr_dist.planning import plan as planning
from apr_dist.planning.memory import Memory
from apr_dist.planning.state import State, shards
from apr_dist.planning.tracing import trace

GIB = 1 << 30
MODELS = ("qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-3b", "qwen3-4b", "qwen3-8b")
CARDS = (12, 16, 24, 48, 80)
PICTURE = Path(__file__).parents[1] / "docs" / "_static" / "memory.svg"

CARD = ["--synthetic", "--parallel.precision", "bf16", "--device", "cuda", "--no-checkpoint.background"]
CARD += ["--micro-batch-size", "1", "--batch-size", "16", "--seq-length", "2048"]

LLAMA_3_8B = TransformerConfig(
    family=Family.LLAMA,
    vocab_size=128256,
    hidden_size=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    intermediate_size=14336,
    max_position_embeddings=8192,
    rope_theta=5e5,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
)

FULL = ("--compute.activation-checkpointing", "full")
SPLIT, BF16 = ("--memory.weights", "split"), ("--memory.weights", "bf16")
HALVED = ("--memory.gradients", "bf16", "--optimizer.state-bits", "8")
OFFLOAD = ("--parallel.offload", "optimizer")
RUNGS: dict[str, tuple[str, ...]] = {
    "f32": FULL,
    "split": (*FULL, *SPLIT),
    "split, bf16 gradients, 8-bit moments": (*FULL, *SPLIT, *HALVED),
    "bf16, bf16 gradients, 8-bit moments": (*FULL, *BF16, *HALVED),
    "the same as split, offloaded": (
        *("--compute.activation-checkpointing", "full-offload"),
        *(*SPLIT, *HALVED, *OFFLOAD),
    ),
}


FSDP: dict[str, tuple[str, ...]] = {
    "f32": FULL,
    "split, 8-bit moments": (*FULL, *SPLIT, "--optimizer.state-bits", "8"),
    "bf16, 8-bit moments": (*FULL, *BF16, "--optimizer.state-bits", "8"),
}
SHARDED = (("qwen2.5-0.5b", 8), ("qwen2.5-0.5b", 1024), ("qwen3-8b", 64), ("qwen3-8b", 1024))
"""Models and numbers of processes, each of which is one trace."""


def planned(model: TransformerConfig, config: TrainConfig, world_size: int = 1) -> Memory:
    """The plan of one process, with the loss that is traced."""
    with mock.patch.object(planning, "_has_liger", return_value=False):
        return next(iter(planning._memory(model, config, world_size).values()))


def table() -> None:
    """What each model takes at each rung, GiB on the card and on the host; and as a picture."""
    print("| model | " + " | ".join(RUNGS) + " |\n|---|" + "---|" * len(RUNGS))
    found: dict[str, list[Memory]] = {}
    for name in MODELS:
        config = [parse_command_line([*CARD, *flags]).config for flags in RUNGS.values()]
        found[name] = [planned(preset(name), one) for one in config]
        cells = [
            f"{one.total / GIB:.1f}" + (f" + {one.host / GIB:.1f} host" if one.host else "")
            for one in found[name]
        ]
        print(f"| {name} | " + " | ".join(cells) + " |")
    PICTURE.write_text(picture(found))


def picture(found: dict[str, list[Memory]]) -> str:
    """Bars of every rung of every model, against the sizes of cards, as SVG."""
    width, row, left, most = 760, 12, 110, 90.0
    scale = (width - left - 20) / most
    colours = ("#7f8c8d", "#2980b9", "#16a085", "#d35400", "#8e44ad")
    lines, y = [], 30
    for name, memories in found.items():
        lines.append(f'<text x="4" y="{y + 2.6 * row:.0f}" font-size="12">{name}</text>')
        for memory, colour in zip(memories, colours, strict=True):
            length = min(memory.total / GIB, most) * scale
            bar = f'x="{left}" y="{y}" width="{length:.1f}" height="{row - 2}"'
            lines.append(f'<rect {bar} fill="{colour}"/>')
            y += row
        y += row
    for card in CARDS:
        x = left + card * scale
        lines.append(
            f'<line x1="{x:.1f}" y1="20" x2="{x:.1f}" y2="{y}" stroke="#c0392b" stroke-dasharray="4"/>'
        )
        lines.append(f'<text x="{x - 14:.1f}" y="14" font-size="11">{card} GiB</text>')
    for number, (rung, colour) in enumerate(zip(RUNGS, colours, strict=True)):
        at = y + 16 + 16 * number
        lines.append(f'<rect x="{left}" y="{at - 9}" width="10" height="10" fill="{colour}"/>')
        lines.append(f'<text x="{left + 16}" y="{at}" font-size="12">{rung}</text>')
    height = y + 16 * len(RUNGS) + 20
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">'
    return (
        "\n".join([head, f'<rect width="{width}" height="{height}" fill="white"/>', *lines, "</svg>"]) + "\n"
    )


def traced(names: Sequence[str]) -> int:
    """Plan and trace of every rung, and of FSDP2 over many processes; 1 if one is too far off."""
    good = True
    print("| model | rung | planned GiB | traced GiB | ratio | on the host | ratio | worst part | s |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in names or MODELS:
        for rung, flags in RUNGS.items():
            good &= _compared(name, rung, [*CARD, *flags, "--batch-size", "2"], 1)
    for name, size in SHARDED:
        for rung, flags in FSDP.items():
            more = ["--parallel.strategy", "fsdp2", "--batch-size", str(2 * size)]
            good &= _compared(name, f"fsdp2 over {size:,}, {rung}", [*CARD, *flags, *more], size)
    return int(not good)


def _compared(name: str, rung: str, flags: Sequence[str], world_size: int) -> bool:
    """Print one row; whether weights, gradients and moments are within 1 %, the totals within 5 %."""
    model, config, began = preset(name), parse_command_line(flags).config, time.perf_counter()
    said, found = planned(model, config, world_size), trace(model, config, world_size=world_size)
    strategy = named(config.parallel.strategy, world_size)
    state = State.of(
        model,
        shards(strategy, world_size, world_size),
        strategy,
        config.parallel.offload,
        config.optimizer.state_bits,
        Storage(weights=config.memory.weights, gradients=config.memory.gradients),
    )
    beside = state.host_parts
    parts = {
        "weights": (state.weights + beside.get("weights", 0), found.weights),
        "low bits": (state.low + beside.get("low bits", 0), found.low),
        "gradients": (state.gradients + beside.get("gradients", 0), found.gradients),
        "moments": (state.optimizer + beside.get("moments", 0), found.optimizer),
    }
    off = {part: abs(one / other - 1) if other else float(one > 0) for part, (one, other) in parts.items()}
    worst = max(off, key=lambda part: off[part])
    ratio, host = said.total / found.peak, said.host / found.host_peak if found.host_peak else 1.0
    cells = [f"{said.total / GIB:.2f}", f"{found.peak / GIB:.2f}", f"{ratio:.3f}"]
    cells += [f"{said.host / GIB:.2f}", f"{host:.3f}", f"{worst} {off[worst]:.2%}"]
    print(f"| {name} | {rung} | {' | '.join(cells)} | {time.perf_counter() - began:.0f} |", flush=True)
    return off[worst] <= 0.01 and abs(ratio - 1) <= 0.05 and abs(host - 1) <= 0.05


def traced_adapters() -> int:
    """Plan beside trace for a LoRA of rank 16 beside Llama 3 8B; 1 if one is more than 5 % off."""
    worst = 0.0
    print("| bits | targets | checkpointing | planned GiB | traced GiB | ratio |\n|---|---|---|---|---|---|")
    for bits in (16, 8, 4):
        for targets, kept in (
            ("q_proj,v_proj", "full"),
            ("all-linear", "full"),
            ("all-linear", "full-offload"),
        ):
            flags = ["--adapter.kind", "lora", "--adapter.targets", targets, "--adapter.base.bits", str(bits)]
            flags += ["--compute.activation-checkpointing", kept, "--batch-size", "1"]
            config = parse_command_line([*CARD, *flags]).config
            said, found = planned(LLAMA_3_8B, config, 1).total, trace(LLAMA_3_8B, config).peak
            worst = max(worst, abs(said / found - 1))
            row = f"{said / GIB:.2f} | {found / GIB:.2f} | {said / found:.3f}"
            print(f"| {bits} | {targets} | {kept} | {row} |", flush=True)
    return int(worst > 0.05)


def update(elements: int = 1 << 26, rounds: int = 5) -> None:
    """A streamed update of split weights beside copying the same bytes to the device and back."""
    keep_freed_memory()  # as the trainer does
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    weight = torch.nn.Parameter(
        torch.empty(elements, dtype=torch.bfloat16, device=device), requires_grad=False
    )
    held = SplitWeight.around(weight, host_empty(elements, torch.int16, device=device))
    held.fill(torch.randn(elements, generator=torch.Generator().manual_seed(0)))
    attach(weight, held)
    gradient = host_empty(elements, torch.bfloat16, device=device).normal_()
    optimizer, on_device = (_optimizer(weight, device, offloaded=one) for one in (True, False))
    optimizer.gradient_of = lambda _: gradient
    here = gradient.to(device)
    on_device.gradient_of = lambda _: here
    there = [gradient, held.low, host_empty(elements, torch.float32, device=device)]
    there.append(host_empty(elements, torch.float32, device=device).zero_())
    # A CPU overlaps nothing, and others may use it: what counts there is this process's own time.
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    works = {"update": optimizer.step, "arithmetic": on_device.step}
    works["copies"] = lambda: _round_trip(there, device)
    found: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds + 1):
        for name, work in works.items():
            began = clock()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            found[name].append(clock() - began)
    nano = {name: statistics.median(times[1:]) / elements * 1e9 for name, times in found.items()}
    print(
        f"{elements:,} weights on {device}, ns a weight: "
        + ", ".join(f"{k} {v:.2f}" for k, v in nano.items())
    )
    print(f"update over copies {nano['update'] / nano['copies']:.2f}, arithmetic over copies", end=" ")
    print(f"{nano['arithmetic'] / nano['copies']:.2f}, update over both {_over_both(nano):.2f}")


def _over_both(nano: dict[str, float]) -> float:
    return nano["update"] / (nano["copies"] + nano["arithmetic"])


def _optimizer(weight: torch.nn.Parameter, device: torch.device, *, offloaded: bool) -> StoredAdamW:
    return StoredAdamW(
        [{"params": [weight], "weight_decay": 0.1, "state_bits": 32}],
        lr=1e-4,
        betas=(0.9, 0.999),
        eps=1e-8,
        storage=WeightStorage.SPLIT,
        seed=0,
        places={id(weight): Place("weight", 0)},
        device=device,
        offloaded=offloaded,
    )


def _round_trip(tensors: Sequence[torch.Tensor], device: torch.device) -> None:
    """What an update moves: gradients come, everything else comes and goes."""
    for number, tensor in enumerate(tensors):
        here = torch.empty_like(tensor, device=device).copy_(tensor, non_blocking=True)
        if number:
            tensor.copy_(here, non_blocking=True)


def main(arguments: Sequence[str]) -> int:
    """See the module."""
    verb, *rest = arguments or ["table"]
    if verb == "trace":
        return traced(rest)
    if verb == "trace-adapters":
        return traced_adapters()
    if verb == "update":
        update()
    else:
        table()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
