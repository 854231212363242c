"""200 steps at every rung of the memory ladder: validation loss next to that of f32, and updates lost.

The model is small (1.1 million parameters, 4 layers of width 128), so that all rungs end in minutes on a
core. It is trained from scratch for 300 steps in f32; from there each rung goes on with the same batches
and a learning rate for fine-tuning. The text is the standard library, in tokens of a byte-level BPE of 2,048
ids that is trained on it.

    python benchmarks/bench_rungs.py
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from apr_dist.corpus.encode import encode_corpus
from apr_dist.corpus.sources import standard_library_sources
from apr_dist.corpus.tokenizer import import_tokenizer
from apr_dist.parallel.runtime import reset_state
from apr_dist.train import main as train

VOCABULARY = 2048

MODEL = {
    "architecture": "qwen2",
    "hf_architecture": "Qwen2ForCausalLM",
    "hf_model_type": "qwen2",
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "num_layers": 4,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 32,
    "intermediate_size": 384,
    "max_position_embeddings": 1024,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}

SPLIT, BF16 = ("--memory.weights", "split"), ("--memory.weights", "bf16")
GRADIENTS, BITS = ("--memory.gradients", "bf16"), ("--optimizer.state-bits", "8")
OFFLOAD = ("--parallel.offload", "optimizer")
LEAVING = ("--compute.activation-checkpointing", "full-offload")
RUNGS: dict[str, tuple[str, ...]] = {
    "f32": (),
    "split": SPLIT,
    "split, offloaded, block inputs too": (*SPLIT, *OFFLOAD, *LEAVING),
    "bf16 gradients": GRADIENTS,
    "8-bit moments": BITS,
    "split, bf16 gradients, 8-bit moments": (*SPLIT, *GRADIENTS, *BITS),
    "bf16": BF16,
    "bf16, bf16 gradients, 8-bit moments": (*BF16, *GRADIENTS, *BITS),
    "bf16-nearest": ("--memory.weights", "bf16-nearest"),
}


def make_data(folder: Path) -> list[str]:
    """A tokenizer and shards under ``folder``; the flags that name them."""
    sources, tokenizer = standard_library_sources(), folder / "tokenizer"
    tokenizer.mkdir()
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    learner = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator((path.read_text("utf-8", "replace") for path in sources[::32]), learner)
    bpe.save(str(tokenizer / "tokenizer.json"))
    import_tokenizer(tokenizer / "tokenizer.json", tokenizer)
    encode_corpus(
        sources=sources, tokenizer=tokenizer, output=folder / "shards", val_fraction=0.1, limit_tokens=400_000
    )
    shards = folder / "shards"
    flags = ["--dataset", str(shards / "train"), "--val-dataset", str(shards / "validation")]
    return [*flags, "--tokenizer", str(tokenizer)]


def trained(flags: Sequence[str], run: Path) -> tuple[int, dict[str, object]]:
    """Exit code of a run, and the line of its last evaluation."""
    reset_state()
    code = train([*flags, "--run-dir", str(run), "--progress", "quiet"])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return code, [line for line in lines if line["kind"] == "evaluation"][-1]


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--lr", type=float, default=1e-4)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "model.json").write_text(json.dumps(MODEL))
        flags = [*make_data(folder), "--batch-size", "4", "--micro-batch-size", "2", "--seq-length", "128"]
        flags += [
            "--warmup-steps",
            "20",
            "--evaluation.max-sequences",
            "128",
            "--device",
            "cpu",
            "--parallel.cpu-threads",
            "1",
            "--parallel.precision",
            "bf16",
        ]
        begun = ["--mode", "from-scratch", "--model", str(folder / "model.json"), "--num-steps", "300"]
        _, first = trained([*flags, *begun, "--eval-every", "300", "--lr", "1e-3"], folder / "begun")
        init = ["--init", str(folder / "begun" / "checkpoint.apr"), "--num-steps", str(options.steps)]
        init += ["--eval-every", str(options.steps), "--lr", str(options.lr), "--target-val-loss", "0.1"]
        print(f"from a validation loss of {first['val_loss']:.4f}, {options.steps} steps at {options.lr:g}\n")
        print(
            "| rung | validation loss | minus f32's | below half an ulp | changed nothing | exit | seconds |"
        )
        print("|---|---|---|---|---|---|---|", flush=True)
        base = math.nan
        for number, (rung, more) in enumerate(RUNGS.items()):
            began = time.perf_counter()
            code, last = trained([*flags, *init, *more], folder / str(number))
            took, loss, lost = time.perf_counter() - began, last["val_loss"], last["updates_lost"]
            base = loss if rung == "f32" else base
            row = f"{loss:.5f} | {loss - base:+.5f} | {lost['below_half_ulp']:.3%} | {lost['unchanged']:.3%}"
            print(f"| {rung} | {row} | {code} | {took:.0f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
