"""Sharded models: joined whole, and refused where manifest and shards disagree."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from builders.files import TINY_METADATA, tiny_tensors, write_apr

from apr_dist.apr.layout import Flag
from apr_dist.apr.reader import AprReader
from apr_dist.cli import main
from apr_dist.errors import AprDistError, DamagedModelFile, ExitCode, ModelFileMissing
from apr_dist.interop.importing import import_model

COUNT = 3


def write_shards(folder: Path) -> Path:
    """The tiny model in three shards, and the manifest the format describes; returns the manifest."""
    folder.mkdir()
    tensors = tiny_tensors()
    names = sorted(tensors)
    shards = []
    for index in range(COUNT):
        held = names[index::COUNT]
        file = f"model-{index + 1:05d}-of-{COUNT:05d}.apr"
        sharding = {"shard_count": COUNT, "shard_index": index, "total_size": 0, "pattern": None}
        facts = {**TINY_METADATA, "sharding": sharding, "apr_dist.shard": index}
        path = write_apr(
            folder / file, {name: tensors[name] for name in held}, facts, flags=Flag.ROW_MAJOR | Flag.SHARDED
        )
        shards.append({"filename": file, "index": index, "size": path.stat().st_size, "tensors": held})
    manifest = {
        "version": "2.0",
        "shard_count": COUNT,
        "total_size": 0,
        "tensor_count": len(names),
        "shards": shards,
        "weight_map": {name: shard["index"] for shard in shards for name in shard["tensors"]},
    }
    path = folder / "model.apr.json"
    path.write_text(json.dumps(manifest, indent=2))
    return path


@pytest.mark.parametrize("named", ["manifest", "folder"])
def test_shards_become_the_file_they_were_cut_from(tmp_path: Path, named: str) -> None:
    manifest = write_shards(tmp_path / "in")
    source = manifest if named == "manifest" else manifest.parent
    assert main(["import", str(source), "-o", str(tmp_path / "x.apr")]) == 0
    assert main(["validate", str(tmp_path / "x.apr")]) == 0
    whole = write_apr(tmp_path / "whole.apr", tiny_tensors(), TINY_METADATA)
    with AprReader(tmp_path / "x.apr") as joined, AprReader(whole) as expected:
        assert joined.tensors == expected.tensors
        assert all(joined.raw(name) == expected.raw(name) for name in joined.tensors)
        assert Flag.SHARDED not in joined.header.flags
        assert joined.metadata.custom.pop("apr_dist.shard") == 0
        assert joined.metadata == expected.metadata


@pytest.mark.parametrize("to", ["huggingface", "safetensors", "gguf"])
def test_one_shard_can_be_looked_at_and_is_never_exported_as_a_model(
    tmp_path: Path, to: str, capfd: pytest.CaptureFixture[str]
) -> None:
    shard = write_shards(tmp_path / "in").with_name("model-00001-of-00003.apr")
    assert main(["inspect", str(shard)]) == 0
    assert "SHARDED" in capfd.readouterr().out
    assert main(["export", str(shard), "--to", to, "-o", str(tmp_path / "out")]) == ExitCode.MODEL_FILE
    assert "one shard of a model" in capfd.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


Change = Callable[[dict[str, Any]], object]
DISAGREEMENTS: dict[str, Change] = {
    "a file elsewhere": lambda m: m["shards"][0].update(filename="../x.apr"),
    "an absolute file": lambda m: m["shards"][0].update(filename="/etc/passwd"),
    "another kind of file": lambda m: m["shards"][0].update(filename="model.bin"),
    "no file name": lambda m: m["shards"][0].update(filename=7),
    "one file twice": lambda m: m["shards"][1].update(filename=m["shards"][0]["filename"]),
    "one index twice": lambda m: m["shards"][1].update(index=0),
    "an index that is no number": lambda m: m["shards"][1].update(index=True),
    "a tensor in two shards": lambda m: m["shards"][1]["tensors"].append(m["shards"][0]["tensors"][0]),
    "a tensor that is not there": lambda m: (
        m["shards"][0]["tensors"].append("ghost"),
        m["weight_map"].update(ghost=0),
        m.update(tensor_count=m["tensor_count"] + 1),
    ),
    "a map to another shard": lambda m: m["weight_map"].update({m["shards"][0]["tensors"][0]: 2}),
    "another number of shards": lambda m: m.update(shard_count=2),
    "another number of tensors": lambda m: m.update(tensor_count=2**64),
    "no shards": lambda m: m.update(shards=[], weight_map={}, shard_count=0, tensor_count=0),
    "shards that are no list": lambda m: m.update(shards=5),
    "no map": lambda m: m.pop("weight_map"),
}


@pytest.mark.parametrize("kind", DISAGREEMENTS)
def test_a_manifest_that_lies_is_refused(tmp_path: Path, kind: str) -> None:
    manifest = write_shards(tmp_path / "in")
    facts = json.loads(manifest.read_text())
    DISAGREEMENTS[kind](facts)
    manifest.write_text(json.dumps(facts))
    with pytest.raises(DamagedModelFile):
        import_model(manifest, tmp_path / "x.apr")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("content", ["{", "{}", "{" * 100_000, '{"shards": 1e999, "weight_map": {}}'])
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "model.json"
    path.write_text(content)
    assert main(["import", str(path), "-o", str(tmp_path / "x.apr")]) == ExitCode.MODEL_FILE
    assert [one.name for one in tmp_path.iterdir()] == ["model.json"]


def test_shards_that_are_missing_damaged_or_of_another_model_are_named(tmp_path: Path) -> None:
    manifest = write_shards(tmp_path / "in")
    second = manifest.parent / "model-00002-of-00003.apr"
    content = second.read_bytes()
    cases: dict[bytes | None, type[AprDistError]] = {
        None: ModelFileMissing,
        content[:-70]: DamagedModelFile,
        content[:200] + bytes([content[200] ^ 1]) + content[201:]: DamagedModelFile,
    }
    for replaced, expected in cases.items():
        second.unlink(missing_ok=True)
        if replaced is not None:
            second.write_bytes(replaced)
        with pytest.raises(expected, match="model-00002-of-00003"):
            import_model(manifest, tmp_path / "x.apr")
    with AprReader(next(manifest.parent.glob("*00001-of*.apr"))) as first:
        assert first.metadata.num_layers == 2
    held = json.loads(manifest.read_text())["shards"][1]["tensors"]
    other = {name: tensor for name, tensor in tiny_tensors().items() if name in held}
    write_apr(second, other, {**TINY_METADATA, "num_layers": 3}, overwrite=True)
    with pytest.raises(DamagedModelFile, match="num_layers is 3 here and 2"):
        import_model(manifest, tmp_path / "x.apr")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
