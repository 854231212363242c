"""Training runs of adapters under every strategy, and the same steps by ``transformers`` and ``peft``."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from apr_dist import open_session
from apr_dist.apr.reader import AprReader
from apr_dist.gates.model_file import prove_model
from apr_dist.interop.adapter_files import WEIGHTS
from apr_dist.interop.text_model import load_decoder
from apr_dist.model.quantized import bitsandbytes
from builders.reference import reference_model
from builders.runs import once, run_here
from builders.several import HAS_COMPILER, LIMIT_S

if TYPE_CHECKING:
    from builders.runs import Inputs
    from builders.warm_ranks import WarmRanks

STEPS, HALF, RATE = 20, 10, 3e-3

KINDS: Mapping[str, tuple[str, ...]] = {
    "lora": ("lora", "--adapter.rank", "4", "--adapter.alpha", "16"),
    "rslora": (
        "rslora",
        "--adapter.rank",
        "8",
        "--adapter.targets",
        "q_proj,*.mlp.*",
        "--adapter.layers",
        "1",
    ),
    "dora": ("dora", "--adapter.rank", "4", "--adapter.init", "gaussian"),
    "bias": ("lora", "--adapter.rank", "3", "--adapter.targets", "q_proj,v_proj", "--adapter.bias"),
    "tokens": ("lora", "--adapter.rank", "3", "--adapter.train-embeddings", "40,7,101"),
}
"""Name to what follows ``--adapter.kind``."""

RUNS: Mapping[str, tuple[int, str, tuple[str, ...]]] = {
    "lora": (1, "lora", ("single",)),
    "rslora": (1, "rslora", ("single",)),
    "dora": (1, "dora", ("single", "--compute.activation-checkpointing", "full")),
    "bias": (1, "bias", ("single", "--compute.kernels", "plain")),
    "tokens": (1, "tokens", ("single",)),
    "tokens-fsdp2": (2, "tokens", ("fsdp2",)),
    "lora-half": (1, "lora", ("single", "--adapter.base.bits", "16")),
    "dora-half-fsdp2": (2, "dora", ("fsdp2", "--adapter.base.bits", "16")),
    "lora-half-ddp-plain": (2, "lora", ("ddp", "--adapter.base.bits", "16", "--compute.kernels", "plain")),
    "lora-int8": (1, "lora", ("single", "--adapter.base.bits", "8", "--compute.kernels", "plain")),
    "lora-nf4": (
        1,
        "lora",
        ("single", "--adapter.base.bits", "4", "--compute.activation-checkpointing", "full-offload"),
    ),
    "dora-nf4-ddp": (
        2,
        "dora",
        ("ddp", "--adapter.base.bits", "4", "--compute.activation-checkpointing", "full"),
    ),
    "lora-selective": (1, "lora", ("single", "--compute.activation-checkpointing", "selective")),
    "lora-ddp": (2, "lora", ("ddp",)),
    "dora-ddp": (2, "dora", ("ddp",)),
    "lora-fsdp2": (2, "lora", ("fsdp2",)),
    "rslora-fsdp2": (2, "rslora", ("fsdp2", "--compute.activation-checkpointing", "full")),
    "dora-fsdp2": (2, "dora", ("fsdp2",)),
    "lora-shard-grad-op": (2, "lora", ("shard-grad-op",)),
    "lora-zero1": (2, "lora", ("zero1",)),
    "lora-zero2": (2, "lora", ("zero2",)),
    "lora-zero3": (2, "lora", ("zero3",)),
    "bias-zero3": (2, "bias", ("zero3", "--compute.activation-checkpointing", "full")),
}
"""Name to world size, kind, and what follows ``--parallel.strategy``."""

RESUMED = ("lora", "lora-nf4", "dora", "lora-ddp", "tokens-fsdp2", "lora-zero2", "lora-zero3", "dropout")
"""Runs that are also resumed from the middle."""

ROWS = ("--seq-length", "256", "--loader.documents")
PACKED: Mapping[str, tuple[str, ...]] = {
    "packed-cpu": (*ROWS, "isolate", "--compute.kernels", "cpu"),
    "packed-plain": (*ROWS, "isolate", "--compute.kernels", "plain"),
    "packed-joined": (*ROWS, "continue"),
}
"""Runs on rows long enough to hold several documents, which see each other in the last alone."""

DROPPED: Mapping[str, tuple[str, ...]] = {
    "dropout": (),
    "dropout-full": ("--compute.activation-checkpointing", "full"),
    "dropout-selective": ("--compute.activation-checkpointing", "selective"),
}
"""Runs with dropout, which no other program draws alike: they are compared with each other."""


@dataclass(frozen=True)
class Reference:
    """What ``transformers`` and ``peft`` measured and left, from the same begin on the same batches."""

    losses: list[float]
    weights: dict[str, torch.Tensor]


def make_runs(inputs: Inputs, ranks: WarmRanks, root: Path) -> Path:
    """Every run of `RUNS`, ``-resumed`` too, ``KIND-initial`` without a step, and the batches."""

    def make(folder: Path) -> None:
        for world in (1, 2):
            runs = [
                flags(inputs, folder / name, kind, strategy)
                for name, (size, kind, strategy) in RUNS.items()
                if size == world and (HAS_COMPILER or "zero" not in name)
            ]
            if world == 1:
                runs += [
                    [*flags(inputs, folder / f"{kind}-initial", kind, ("single",)), "--num-steps", "0"]
                    for kind in KINDS
                ]
                few = {bits: ("single", "--adapter.base.bits", str(bits)) for bits in (16, 4)}
                runs += [
                    [*flags(inputs, folder / begin("dora", bits), "dora", given), "--num-steps", "0"]
                    for bits, given in few.items()
                ]
                runs += [
                    [*flags(inputs, folder / name, "lora", ("single",)), *more]
                    for name, more in PACKED.items()
                ]
                drops = ("single", "--adapter.dropout", "0.2")
                runs += [
                    flags(inputs, folder / name, "lora", (*drops, *more)) for name, more in DROPPED.items()
                ]
            ended = ranks.launch_all(runs, world_size=world, limit_s=LIMIT_S)
            assert ended.codes == (0,) * world, [text[-6000:] for text in ended.errors]
        for world in (1, 2):
            again = [
                [*flags(inputs, folder / f"{name}-resumed", *_of(name)), "--resume", str(half(folder / name))]
                for name in RESUMED
                if _world(name) == world and (HAS_COMPILER or "zero" not in name)
            ]
            if world == 1:  # fewer processes, another strategy
                again += [
                    [
                        *flags(inputs, folder / "moved", "lora", ("single",)),
                        "--resume",
                        str(half(folder / "lora-fsdp2")),
                    ]
                ]
            ended = ranks.launch_all(again, world_size=world, limit_s=LIMIT_S)
            assert ended.codes == (0,) * world, [text[-6000:] for text in ended.errors]
        torch.save(_batches(inputs, folder / "unused"), folder / "batches.pt")

    return once(root, make)


def begin(kind: str, bits: int) -> str:
    """The run that saved the adapter a kind begins with: the lengths of dora are those of its own base."""
    return f"dora-{bits}-initial" if kind == "dora" and bits < 32 else f"{kind}-initial"


def half(run: Path) -> Path:
    """The step folder in the middle of a run."""
    return run / "steps" / f"{HALF:06d}"


def last(run: Path) -> Path:
    """The step folder at the end of a run."""
    return run / "steps" / f"{STEPS:06d}"


def _of(name: str) -> tuple[str, tuple[str, ...]]:
    if name in DROPPED:
        return "lora", ("single", "--adapter.dropout", "0.2", *DROPPED[name])
    return RUNS[name][1:]


def _world(name: str) -> int:
    return RUNS[name][0] if name in RUNS else 1


def flags(inputs: Inputs, run_dir: Path, kind: str, strategy: tuple[str, ...]) -> list[str]:
    """The flags of one run."""
    given = [*inputs.data_flags(), "--init", str(inputs.pretrained), "--run-dir", str(run_dir)]
    given += ["--num-steps", str(STEPS), "--eval-every", str(HALF), "--batch-size", "4"]
    given += ["--lr", str(RATE), "--warmup-steps", "0", "--optimizer.schedule", "constant"]
    given += ["--checkpoint.keep-last", "9", "--micro-batch-size", "2", "--target-val-loss", "0.1"]
    return [*given, "--adapter.kind", *KINDS[kind], "--parallel.strategy", *strategy]


def _batches(inputs: Inputs, run_dir: Path) -> list[torch.Tensor]:
    settings = {"dataset": inputs.train, "val_dataset": inputs.validation, "tokenizer": inputs.tokenizer}
    settings |= {"init": inputs.pretrained, "run_dir": run_dir, "device": "cpu"}
    sizes: dict[str, Any] = {"batch_size": 4, "seq_length": 32, "micro_batch_size": 2, "num_steps": STEPS}
    with open_session(**settings, **sizes, parallel={"cpu_threads": 1}) as session:
        return [torch.cat(session.data.train.batch(step)) for step in range(STEPS)]


def peft_model(inputs: Inputs, folder: Path, *, trainable: bool = False, bits: int = 32) -> Any:
    """The pretrained model in ``transformers`` with an adapter folder opened by ``peft``.

    Matrices are rounded to bf16 where ``bits`` are fewer than 32, and computed with in f32. In 4 bits
    ``transformers`` quantises those of the blocks itself, by bitsandbytes; in 8 bits they have the values
    that bitsandbytes makes of its codes, because its own product quantises activations too.
    """
    with AprReader(inputs.pretrained) as reader:
        base = reference_model(load_decoder(reader, prove_model(reader).config))
    if bits == 4:
        base = quantized_by_transformers(base)
    with torch.no_grad():
        for name, weight in base.named_parameters():
            if bits == 8 and ".layers." in name and weight.ndim == 2:
                codes, scales, _ = bitsandbytes().functional.int8_vectorwise_quant(weight.half())
                weight.copy_(codes * (scales[:, None] / 127))
            elif bits < 32 and weight.ndim == 2 and weight.is_floating_point():
                weight.copy_(weight.bfloat16())
    return PeftModel.from_pretrained(base, folder, is_trainable=trainable)


def quantized_by_transformers(model: Any) -> Any:
    """The same model with its blocks' matrices in nf4 with double quantisation, computed with in f32."""
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(
            folder,
            quantization_config=settings,
            dtype=torch.float32,
            device_map="cpu",
            attn_implementation="eager",
        )


def adapter_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of an adapter folder."""
    return load_file(folder / WEIGHTS)


def reference(inputs: Inputs, root: Path, name: str) -> Reference:
    """A run's twenty steps by the textbook, from the adapter that ``KIND-initial`` saved; made once."""
    _, kind, options = RUNS[name]
    bits = int(options[options.index("--adapter.base.bits") + 1]) if "--adapter.base.bits" in options else 32
    made = once(
        root / f"reference-{kind}-{bits}",
        lambda folder: _train_reference(inputs, root, kind, folder, bits=bits),
    )
    losses = json.loads((made / "losses.json").read_text())
    return Reference(losses, adapter_tensors(made / "adapter"))


def _train_reference(inputs: Inputs, root: Path, kind: str, folder: Path, *, bits: int) -> None:
    model = peft_model(inputs, root / begin(kind, bits) / "adapter", trainable=True, bits=bits).train()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    groups = [
        {"params": [weight for weight in trained if weight.ndim >= 2], "weight_decay": 0.01},
        {"params": [weight for weight in trained if weight.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.999), eps=1e-8)
    losses = []
    for rows in torch.load(root / "batches.pt", weights_only=True):
        tokens = rows.long()
        logits = model(input_ids=tokens[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.save_pretrained(folder / "adapter")
    (folder / "losses.json").write_text(json.dumps(losses))


def reopened(run_dir: Path, inputs: Inputs, *more: str) -> int:
    """Train in this process with one more flag or two; returns the exit code."""
    return run_here(*flags(inputs, run_dir, "lora", ("single",)), *more)
