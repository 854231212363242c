"""What the tests of plans and reports share: a process that trains and tells how much memory it took."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from apr_dist.model.config import Family, TransformerConfig
from apr_dist.training.memory import Load

_TRAIN_AND_MEASURE = """
import resource, sys
import torch
from apr_dist.model.config import TransformerConfig, Family
from apr_dist.model.transformer import Decoder, init_weights
from apr_dist.training.optimizer import build_optimizer

def train(sizes, micro_batch, seq, micro_batches):
    config = TransformerConfig(family=Family.QWEN2, rope_theta=1e4, rms_norm_eps=1e-6, head_dim=64,
        max_position_embeddings=4096, tie_word_embeddings=True, **sizes)
    with torch.device("meta"):
        model = Decoder(config)
    model.to_empty(device="cpu")
    model.reset_buffers()
    init_weights(model, seed=1)
    optimizer = build_optimizer(model, lr=1e-4, weight_decay=0.01, betas=(0.9, 0.999), eps=1e-8)
    for _ in range(2):
        for _ in range(micro_batches):
            tokens = torch.randint(0, config.vocab_size, (micro_batch, seq + 1), dtype=torch.int32)
            model(tokens[:, :-1], tokens[:, 1:].long())[0].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

torch.set_num_threads(1)
tiny = dict(vocab_size=64, hidden_size=64, num_layers=1, num_heads=1, num_kv_heads=1, intermediate_size=64)
train(tiny, 1, 16, 1)
bare = peak()
train(eval(sys.argv[1]), *map(int, sys.argv[2:5]))
print(peak() - bare)
"""
"""Peak memory over the bare process: one that imported PyTorch and took the same steps on a tiny model."""


def decoder_config(**sizes: int) -> TransformerConfig:
    """The model that the measuring process trains."""
    return TransformerConfig(
        family=Family.QWEN2,
        rope_theta=1e4,
        rms_norm_eps=1e-6,
        head_dim=64,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        **sizes,
    )


def measured_peak(sizes: dict[str, int], load: Load) -> int:
    """Bytes that two optimizer steps took at most, in a process of their own, on one thread."""
    result = subprocess.run(
        [sys.executable, "-c", _TRAIN_AND_MEASURE, repr(sizes)]
        + [str(load.micro_batch), str(load.seq_length), "2" if load.accumulates else "1"],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    return int(result.stdout)
