"""One training step of this project's decoder beside the same model in ``transformers``, in one run.

A step is forward, backward, gradient clipping and AdamW, on the same weights and the same tokens, with
the same optimizer settings. The two alternate; the figure is the ratio of medians. Activation memory
is the largest sum of live tensors during forward and backward beyond weights, gradients and optimizer
state, as the allocator saw it.

    python benchmarks/bench_step.py --keep-memory
    python benchmarks/bench_step.py --shape qwen2.5-0.5b --batch 1 --seq 1024 --layers 6 --dtype bf16
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.profiler import ProfilerActivity, profile

from apr_dist.model.config import Family, TransformerConfig, preset
from apr_dist.model.host_memory import keep_freed_memory
from apr_dist.model.matmul import cpu_matmul_backend
from apr_dist.model.transformer import Decoder, init_weights

OPTIMIZERS = {"fused": {"fused": True}, "foreach": {"foreach": True}, "default": {}}


@dataclass
class Contender:
    """A model with its optimizer, and how its mean loss is computed from tokens."""

    name: str
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[[torch.Tensor], torch.Tensor]

    def forward_backward(self, tokens: torch.Tensor, dtype: torch.dtype) -> float:
        """Add the gradients of the mean loss, and return it."""
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
            loss = self.loss(tokens)
        loss.backward()
        return float(loss.detach())

    def step(self, tokens: torch.Tensor, dtype: torch.dtype) -> tuple[float, dict[str, float]]:
        """One step; the loss before it, and seconds by part."""
        marks = [time.perf_counter()]
        loss = self.forward_backward(tokens, dtype)
        marks.append(time.perf_counter())
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        marks.append(time.perf_counter())
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        marks.append(time.perf_counter())
        parts = dict(
            zip(
                ("model", "clip", "optimizer"),
                (b - a for a, b in itertools.pairwise(marks)),
                strict=True,
            )
        )
        return loss, {"step": marks[-1] - marks[0], **parts}

    def activation_bytes(self, tokens: torch.Tensor, dtype: torch.dtype) -> int:
        """Peak of live tensor bytes in one forward and backward, gradients already there."""
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            self.forward_backward(tokens, dtype)
        live = peak = 0
        events = profiler.profiler.kineto_results.events()
        for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
            live += event.nbytes()
            peak = max(peak, live)
        self.optimizer.zero_grad(set_to_none=False)
        return peak


def ours(config: TransformerConfig, optimizer: dict[str, Any]) -> Contender:
    with torch.device("meta"):
        model = Decoder(config)
    model.to_empty(device="cpu")
    model.reset_buffers()
    init_weights(model, seed=0)

    def loss(tokens: torch.Tensor) -> torch.Tensor:
        total, count = model(tokens[:, :-1], tokens[:, 1:])
        return total / count

    return Contender("apr-dist", model, adamw(model, optimizer), loss)


def theirs(config: TransformerConfig, state: dict[str, torch.Tensor], optimizer: dict[str, Any]) -> Contender:
    settings = getattr(transformers, f"{config.family.value.capitalize()}Config")(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        intermediate_size=config.intermediate_size,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=config.tie_word_embeddings,
        **({"sliding_window": config.sliding_window} if config.family is Family.MISTRAL else {}),
    )
    model = getattr(transformers, config.family.hf_architecture)(settings)
    model.load_state_dict(state, strict=False)
    model.tie_weights()

    def loss(tokens: torch.Tensor) -> torch.Tensor:
        inputs = tokens[:, :-1].contiguous()
        return model(
            input_ids=inputs, labels=tokens[:, 1:].contiguous(), shift_labels=tokens[:, 1:].contiguous()
        ).loss

    return Contender("transformers", model, adamw(model, optimizer), loss)


def adamw(model: torch.nn.Module, settings: dict[str, Any]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01, **settings)


def measure(
    contenders: tuple[Contender, Contender],
    batch: Callable[[], torch.Tensor],
    dtype: torch.dtype,
    repeats: int,
) -> tuple[dict[str, list[dict[str, float]]], list[float]]:
    """Seconds of each step by contender and part, and how far the losses were apart; the first is warm-up."""
    seconds: dict[str, list[dict[str, float]]] = {contender.name: [] for contender in contenders}
    differences = []
    for repeat in range(repeats + 1):
        tokens = batch()
        losses = []
        for contender in contenders:
            loss, parts = contender.step(tokens, dtype)
            losses.append(loss)
            if repeat:
                seconds[contender.name].append(parts)
        differences.append(abs(losses[0] - losses[1]))
    return seconds, differences


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="smollm2-135m", help="name of a model preset")
    parser.add_argument("--layers", type=int, help="fewer layers than the preset has")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--dtype", choices=("f32", "bf16"), default="f32", help="bf16: autocast, f32 weights")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="fused")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, help="torch threads; by default all cores")
    parser.add_argument("--keep-memory", action="store_true", help="both keep freed memory (host_memory)")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.keep_memory:
        keep_freed_memory()
    config = preset(options.shape)
    if options.layers:
        config = replace(config, num_layers=options.layers)
    dtype = torch.bfloat16 if options.dtype == "bf16" else torch.float32
    first = ours(config, OPTIMIZERS[options.optimizer])
    second = theirs(config, first.model.state_dict(), OPTIMIZERS[options.optimizer])
    generator = torch.Generator().manual_seed(0)

    def batch() -> torch.Tensor:
        return torch.randint(config.vocab_size, (options.batch, options.seq + 1), generator=generator)

    seconds, differences = measure((first, second), batch, dtype, options.repeats)
    memory = {}
    for contender in (first, second):
        contender.forward_backward(batch(), dtype)
        memory[contender.name] = contender.activation_bytes(batch(), dtype)
    report(options, config, seconds, memory, differences)


def report(
    options: argparse.Namespace,
    config: TransformerConfig,
    seconds: dict[str, list[dict[str, float]]],
    memory: dict[str, int],
    differences: list[float],
) -> None:
    print(
        f"{options.shape}, {config.num_layers} layers, batch {options.batch} x {options.seq}, {options.dtype}"
    )
    print(
        f"AdamW {options.optimizer}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"our f32 products by {cpu_matmul_backend()}, memory {'kept' if options.keep_memory else 'returned'}"
    )
    print(f"{'':14}{'step s, median (min-max)':>28}{'model':>9}{'clip':>9}{'AdamW':>9}{'activations MB':>16}")
    medians = {}
    for name, rows in seconds.items():
        parts = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        steps = [row["step"] for row in rows]
        medians[name] = parts
        spread = f"{parts['step']:.3f} ({min(steps):.3f}-{max(steps):.3f})"
        print(
            f"{name:14}{spread:>28}{parts['model']:9.3f}{parts['clip']:9.3f}{parts['optimizer']:9.3f}"
            f"{memory[name] / 1e6:16.0f}"
        )
    one, other = medians
    ratio = medians[one]["step"] / medians[other]["step"]
    print(f"step time ratio {ratio:.3f}, activation memory ratio {memory[one] / memory[other]:.3f}")
    print(f"largest difference of the losses over {len(differences)} steps {max(differences):.2e}")
    if options.json:
        facts = {"options": {key: str(value) for key, value in vars(options).items()}, "seconds": seconds}
        facts |= {"memory_bytes": memory, "loss_differences": differences, "step_ratio": ratio}
        options.json.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
