"""APR beside safetensors: load, verify and write a model of about 500 MB; import; what reading back costs.

Everything in one run on one machine, the two sides of a row alternating; the figure is the ratio of
the medians. Run it as ``python benchmarks/bench_files.py [--megabytes 500] [--rounds 5] [--json PATH]``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from apr_dist.apr.layout import DType
from apr_dist.apr.metadata import AprMetadata
from apr_dist.apr.reader import AprReader
from apr_dist.apr.writer import AprWriter, TensorSpec
from apr_dist.atomic_files import AtomicFile
from apr_dist.interop.gguf_export import export_gguf
from apr_dist.interop.hf_export import export_huggingface
from apr_dist.interop.importing import import_model
from apr_dist.interop.inspection import validate_file
from apr_dist.model.config import TransformerConfig
from apr_dist.model.families import Family

ROWS, COLUMNS = 4096, 1024
METADATA = {
    "architecture": "llama",
    "hf_architecture": "LlamaForCausalLM",
    "hf_model_type": "llama",
    "hidden_size": COLUMNS,
    "num_heads": 8,
    "num_kv_heads": 8,
    "head_dim": 128,
    "vocab_size": ROWS,
    "intermediate_size": ROWS,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "rope_type": 2,
    "tie_word_embeddings": True,
}


def make_model(megabytes: int) -> tuple[AprMetadata, dict[str, torch.Tensor]]:
    """A Llama of about that size in F16, with random weights."""
    generator = torch.Generator().manual_seed(0)
    layer_bytes = 2 * (4 * COLUMNS * COLUMNS + 3 * ROWS * COLUMNS)
    layers = max(1, (megabytes * 1_000_000 - 2 * ROWS * COLUMNS) // layer_bytes)
    metadata = AprMetadata.from_mapping(METADATA | {"num_layers": layers})
    shapes = TransformerConfig.from_metadata(
        metadata.to_mapping(), family=Family.LLAMA, where="benchmark", tie_word_embeddings=True
    ).parameter_shapes()
    return metadata, {
        name: torch.randn(shape, generator=generator).to(torch.float16) for name, shape in shapes.items()
    }


def write_apr(path: Path, metadata: AprMetadata, tensors: dict[str, torch.Tensor]) -> None:
    specs = [TensorSpec(name, DType.F16, tuple(tensor.shape)) for name, tensor in tensors.items()]
    with AprWriter(path, metadata=metadata, tensors=specs, overwrite=True) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor.numpy())


def export_unproven(source: Path, target: Path) -> None:
    """The same GGUF file, which takes its name without having been read back."""
    with mock.patch("apr_dist.interop.gguf_export.check_read_back"):
        export_gguf(source, target, overwrite=True)


def write_bare(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """The same bytes into the same kind of file, but no checksum: no reader would take it."""
    offset = 0
    with AtomicFile(path, overwrite=True) as file:
        for tensor in tensors.values():
            view = memoryview(tensor.numpy()).cast("B")
            file.write_at(offset, view)
            offset += len(view)


def write_safetensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, path)
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def load_apr(path: Path) -> int:
    """Every tensor as its own copy in memory, without the checksum."""
    with AprReader(path, verify="structure") as reader:
        return sum(torch.from_numpy(np.array(reader.array(name))).numel() for name in reader.tensors)


def load_safetensors(path: Path) -> int:
    return sum(tensor.clone().numel() for tensor in load_file(path).values())


def open_apr(path: Path) -> int:
    """Every tensor as a view, nothing touched."""
    with AprReader(path, verify="structure") as reader:
        return sum(reader.array(name).size for name in reader.tensors)


def open_safetensors(path: Path) -> int:
    return sum(tensor.numel() for tensor in load_file(path).values())


def verify_apr(path: Path) -> None:
    AprReader(path).close()


def bare_crc(path: Path) -> None:
    """Zlib's CRC32 of the same bytes in equal parts on as many cores, not combined."""
    data = np.memmap(path, np.uint8, mode="r")
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(zlib.crc32, [data[i : i + (16 << 20)] for i in range(0, data.size, 16 << 20)]))


def copy_file(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
    with target.open("rb+") as file:
        os.fsync(file.fileno())


def timed(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def compare(ours: Callable[[], object], theirs: Callable[[], object], rounds: int) -> dict[str, list[float]]:
    """Seconds of both sides, alternating, after one round that is not counted."""
    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    for counted in (False, *[True] * rounds):
        for side, action in (("ours", ours), ("theirs", theirs)):
            seconds = timed(action)
            if counted:
                times[side].append(seconds)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    metadata, tensors = make_model(arguments.megabytes)
    results: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        apr, other = folder / "x.apr", folder / "hf" / "model.safetensors"
        write_apr(apr, metadata, tensors)
        export_huggingface(apr, folder / "hf")
        pairs: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
            "write, checksummed and fsynced / save_file, fsynced": (
                lambda: write_apr(apr, metadata, tensors),
                lambda: write_safetensors(other, tensors),
            ),
            "write, no checksum, fsynced / save_file, fsynced": (
                lambda: write_bare(folder / "bare", tensors),
                lambda: write_safetensors(other, tensors),
            ),
            "load into memory / load_file and clone": (
                lambda: load_apr(apr),
                lambda: load_safetensors(other),
            ),
            "open as views / load_file": (lambda: open_apr(apr), lambda: open_safetensors(other)),
            "verify / bare zlib.crc32 on as many cores": (lambda: verify_apr(apr), lambda: bare_crc(apr)),
            "validate (checksums and finite scan) / bare zlib.crc32": (
                lambda: validate_file(apr),
                lambda: bare_crc(apr),
            ),
            "import from Hugging Face / copy of the bytes, fsynced": (
                lambda: import_model(other, folder / "y.apr", overwrite=True),
                lambda: copy_file(other, folder / "copy"),
            ),
            "export to GGUF, read back / the same, not read back": (
                lambda: export_gguf(apr, folder / "proven.gguf", overwrite=True),
                lambda: export_unproven(apr, folder / "unproven.gguf"),
            ),
        }
        for label, (ours, theirs) in pairs.items():
            results[label] = compare(ours, theirs, arguments.rounds)
        size = apr.stat().st_size
    cores = len(os.sched_getaffinity(0))
    print(f"{size / 1e6:.0f} MB, {arguments.rounds} rounds, {cores} cores; seconds: median (min-max)")
    for label, times in results.items():
        columns = [f"{statistics.median(t):7.3f} ({min(t):.3f}-{max(t):.3f})" for t in times.values()]
        ratio = statistics.median(times["ours"]) / statistics.median(times["theirs"])
        speed = size / statistics.median(times["ours"]) / 1e9
        print(f"{label:54} {columns[0]:24} {columns[1]:24} ratio {ratio:5.2f}  {speed:6.2f} GB/s")
    if arguments.json:
        arguments.json.write_text(json.dumps({"bytes": size, "seconds": results}, indent=2))


if __name__ == "__main__":
    main()
