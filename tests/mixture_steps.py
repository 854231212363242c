"""A random mixture of OLMoE's shape with few layers, 20 steps beside ``transformers``: ``make mixtures``.

64 experts, 8 of them a token, q/k norms over all heads; narrower than the published model, so that two
processes fit a small machine. Losses, gradient norms and load-balancing losses must be within 1e-5 of those
of ``transformers`` and PyTorch's AdamW on the same batches: on one process, on two under DDP, FSDP2, ZeRO-3.

Usage: python tests/mixture_steps.py FOLDER
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import apr_dist
from apr_dist.interop.importing import import_model

CONFIG = {
    "architectures": ["OlmoeForCausalLM"],
    "model_type": "olmoe",
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "router_aux_loss_coef": 0.01,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "eos_token_id": None,
}
STEPS, BATCH, LENGTH, LR, BOUND = 20, 8, 64, 1e-4, 1e-5
WAYS = {
    "one process": (1, {"strategy": "single"}),
    "ddp": (2, {"strategy": "ddp"}),
    "fsdp2": (2, {"strategy": "fsdp2"}),
    "zero3": (2, {"strategy": "zero3"}),
}


def batches() -> list[torch.Tensor]:
    """The global batches, int32 [BATCH, LENGTH + 1]."""
    generator = torch.Generator().manual_seed(7)
    size = (STEPS, BATCH, LENGTH + 1)
    return list(torch.randint(CONFIG["vocab_size"], size, generator=generator, dtype=torch.int32))


def reference(folder: Path) -> list[dict[str, float]]:
    """What ``transformers`` and PyTorch measure at each step."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    weights = list(model.parameters())
    groups = [
        {"params": [one for one in weights if one.ndim >= 2], "weight_decay": 0.01},
        {"params": [one for one in weights if one.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.999), eps=1e-8)
    found = []
    for batch in batches():
        tokens = batch.long()
        out = model(tokens[:, :-1], output_router_logits=True)
        loss = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        (loss + CONFIG["router_aux_loss_coef"] * out.aux_loss).backward()
        # In f64: PyTorch's own norm of so large a tensor is off by 1e-4 on a CPU.
        norm = torch.stack([one.grad.double().square().sum() for one in weights]).sum().sqrt()
        for one in weights:
            one.grad.mul_(min(1.0, 1.0 / (norm.item() + 1e-6)))
        optimizer.step()
        found.append({"loss": loss.item(), "norm": norm.item(), "balance": out.aux_loss.item()})
    return found


def ours(model: Path, run_dir: Path, parallel: dict[str, Any]) -> None:
    """The same steps by a session, on every rank; rank 0 prints what they measured."""
    settings: dict[str, Any] = {
        "init": str(model),
        "run_dir": str(run_dir),
        "overwrite": True,
        "num_steps": STEPS,
        "eval_every": STEPS,
        "batch_size": BATCH,
        "seq_length": LENGTH,
        "lr": LR,
        "warmup_steps": 0,
        "device": "cpu",
        "optimizer": {"schedule": "constant"},
        "parallel": {**parallel, "cpu_threads": 1},
    }
    with apr_dist.open_session(batches=batches(), val_batches=batches()[:1], **settings) as session:
        lines = [
            {"loss": line.train_loss, "norm": line.grad_norm, "balance": (line.router or {})["balance_loss"]}
            for line in session.steps()
        ]
        facts = {"strategy": session.runtime.strategy.value, "world": session.runtime.world_size}
        is_main = session.runtime.is_main
    if is_main:
        print("FOUND " + json.dumps({"lines": lines, **facts}))


def run(way: str, model: Path, folder: Path) -> dict[str, Any]:
    """What the session of one way measured, in processes of its own."""
    world, parallel = WAYS[way]
    command = [sys.executable]
    if world > 1:
        command += ["-m", "torch.distributed.run", "--nproc_per_node", str(world)]
        command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    run_dir = folder / way.replace(" ", "-")
    command += [__file__, str(model), str(run_dir), json.dumps(parallel)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    if not lines:
        raise SystemExit(f"{way}: exit code {done.returncode}\n{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(lines[0].removeprefix("FOUND "))
    assert (found["strategy"], found["world"]) == (parallel["strategy"], world), found
    return found


def main() -> int:
    """Compare every way with the reference; 0 if all are within the bound."""
    if len(sys.argv) > 2:
        ours(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
        return 0
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    source, model = folder / "olmoe", folder / "olmoe.apr"
    if not source.exists():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(AutoConfig.for_model(**CONFIG)).save_pretrained(source)
        import_model(source, model, overwrite=True)
    expected, worst = reference(source), 0.0
    for way in WAYS:
        lines = run(way, model, folder)["lines"]
        assert len(lines) == len(expected) == STEPS
        apart = {
            key: max(abs(one[key] / other[key] - 1) for one, other in zip(lines, expected, strict=True))
            for key in expected[0]
        }
        worst = max(worst, *apart.values())
        print(f"{way}: largest relative difference over {STEPS} steps {apart}")
    print(f"at most {worst:.1e} from transformers; required {BOUND:.0e}")
    return 0 if worst <= BOUND else 1


if __name__ == "__main__":
    raise SystemExit(main())
