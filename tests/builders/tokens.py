"""Small tokenizers and data sets, made from the standard library's own sources; the same bytes every time."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from apr_dist.corpus.encode import encode_corpus
from apr_dist.corpus.sources import standard_library_sources
from apr_dist.corpus.tokenizer import import_tokenizer
from apr_dist.data import Manifest

DOCUMENT_END = "<|endoftext|>"


def small_sources(count: int = 40, *, largest_bytes: int = 20_000) -> list[Path]:
    """The first ``count`` standard-library files of a moderate size, in their fixed order."""
    fitting = (path for path in standard_library_sources() if 500 < path.stat().st_size < largest_bytes)
    return [path for path, _ in zip(fitting, range(count), strict=False)]


def tiny_tokenizer_json(vocab_size: int = 512) -> str:
    """A byte-level BPE trained on a few standard-library files, with one special token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[DOCUMENT_END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = [path.read_text("utf-8") for path in small_sources(12)]
    tokenizer.train_from_iterator(texts, trainer)
    return str(tokenizer.to_str())


def build_tiny_tokenizer(folder: Path, vocab_size: int = 512) -> Path:
    """A tokenizer folder with a byte-level BPE of ``vocab_size`` ids; returns ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "tokenizer.json"
    source.write_text(tiny_tokenizer_json(vocab_size), "utf-8")
    import_tokenizer(source, folder)
    return folder


def build_tiny_dataset(folder: Path, tokenizer: Path, *, files: int = 40, shard_tokens: int = 20_000) -> Path:
    """``folder`` with ``train/`` and ``validation/``, encoded from standard-library files."""
    encode_corpus(
        sources=small_sources(files),
        tokenizer=tokenizer,
        output=folder,
        shard_tokens=shard_tokens,
        val_fraction=0.2,
        workers=1,
    )
    return folder


def write_jsonl(path: Path, texts: list[str], *, key: str = "content") -> Path:
    """A JSONL file with one document a line."""
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts), "utf-8")
    return path


def packaged(package: str, name: str) -> Path:
    """A file of an installed package, found without importing it."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / name


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder`` by name; manifests without the time they record."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        if path.name == "manifest.json":
            recorded = json.loads(content)
            recorded.pop("created_at")
            content = json.dumps(recorded).encode()
        found[str(path.relative_to(folder))] = content
    return found


def ids_of(folder: Path) -> list[int]:
    """All ids of a shard folder, in order."""
    manifest = Manifest.load(folder)
    return np.concatenate(
        [np.fromfile(manifest.path_of(one), dtype="<u4") for one in manifest.shards]
    ).tolist()
