"""Imports stream: their memory is bounded by the largest tensor, not by the model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from builders.files import write_gguf

from apr_dist.apr.layout import DType
from apr_dist.apr.writer import TensorSpec
from apr_dist.interop.gguf_names import to_gguf
from apr_dist.interop.safetensors_file import SafetensorsWriter
from apr_dist.model.families import Family

LAYERS, HIDDEN, MIDDLE, ROWS = 15, 1024, 4096, 4096
LARGEST_F32_BYTES = MIDDLE * HIDDEN * 4
LIMIT_BYTES = 2 * LARGEST_F32_BYTES + 300_000_000

MEASURE = """
import sys
from pathlib import Path
from apr_dist.apr.layout import DType
from apr_dist.interop.importing import import_model
dtype = DType[sys.argv[3]] if sys.argv[3] else None
import_model(Path(sys.argv[1]), Path(sys.argv[2]), dtype=dtype)
print(next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def shapes() -> dict[str, tuple[int, ...]]:
    """A model of more than 500 MB in F16."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (ROWS, HIDDEN)}
    found["model.norm.weight"] = (HIDDEN,)
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        found |= {f"{prefix}self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qkvo"}
        found |= {f"{prefix}mlp.{name}_proj.weight": (MIDDLE, HIDDEN) for name in ("gate", "up")}
        found[f"{prefix}mlp.down_proj.weight"] = (HIDDEN, MIDDLE)
        found |= {f"{prefix}{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
    return found


def peak_of_import(source: Path, target: Path, dtype: str) -> int:
    """Peak resident bytes of a process of its own (getrusage would count the parent's at the fork)."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(source), str(target), dtype],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    return int(done.stdout)


@pytest.mark.parametrize("dtype", ["", "BF16"])
def test_a_folder_of_500_mb_is_imported_in_bounded_memory(tmp_path: Path, dtype: str) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 16,
        "vocab_size": ROWS,
        "intermediate_size": MIDDLE,
        "max_position_embeddings": 128,
        "rope_theta": 1e4,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    specs = [TensorSpec(name, DType.F16, shape) for name, shape in shapes().items()]
    block = np.ones(MIDDLE * HIDDEN, np.float16)
    with SafetensorsWriter(folder / "model.safetensors", specs) as writer:
        for spec in specs:
            writer.append(block[: int(np.prod(spec.shape))])
    assert (folder / "model.safetensors").stat().st_size > 500_000_000
    assert peak_of_import(folder, tmp_path / "x.apr", dtype) < LIMIT_BYTES


def test_a_gguf_of_500_mb_is_imported_in_bounded_memory(tmp_path: Path) -> None:
    block = np.ones(MIDDLE * HIDDEN, np.float16)
    tensors = {
        str(to_gguf(name, Family.LLAMA.definition.gguf)): block[: int(np.prod(shape))].reshape(shape)
        for name, shape in shapes().items()
    }
    fields = {
        "llama.embedding_length": HIDDEN,
        "llama.block_count": LAYERS,
        "llama.attention.head_count": 16,
        "llama.feed_forward_length": MIDDLE,
        "llama.context_length": 128,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
    }
    source = write_gguf(tmp_path / "x.gguf", tensors, fields=fields)
    assert source.stat().st_size > 500_000_000
    assert peak_of_import(source, tmp_path / "x.apr", "") < LIMIT_BYTES
