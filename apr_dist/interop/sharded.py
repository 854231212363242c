"""A model in several APR files, joined by their manifest into one file; tensor bytes copied.

A manifest is JSON beside the shards: ``shards`` (``filename``, ``index``, ``tensors``) and ``weight_map``
(tensor name to shard index). Nothing in it is believed that the shards do not show.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from apr_dist.apr.bounded_json import parse_object
from apr_dist.apr.files import map_readonly
from apr_dist.apr.layout import MAX_TENSORS, Flag
from apr_dist.apr.metadata import KEYS, AprMetadata
from apr_dist.apr.reader import AprReader
from apr_dist.apr.writer import TensorSpec
from apr_dist.errors import DamagedModelFile
from apr_dist.interop.convert import Piece
from apr_dist.interop.request import ImportRequest, ImportSummary

_MAX_SHARDS: Final = 10_000
_ARCHITECTURE_KEYS = list(KEYS)[list(KEYS).index("architecture") :]


@dataclass(frozen=True)
class _Shard:
    """One file of the model: its name beside the manifest, and the tensors it is said to hold."""

    filename: str
    tensors: frozenset[str]


def find_manifest(folder: Path) -> Path | None:
    """The manifest of APR shards in a folder; None when it holds none, or several."""
    if (folder / "config.json").exists() or not any(folder.glob("*.apr")):
        return None
    found = [path for path in sorted(folder.glob("*.json")) if path.is_file() and _is_manifest(path)]
    return found[0] if len(found) == 1 else None


def import_sharded(request: ImportRequest) -> ImportSummary:
    """Write the model that the shards of the manifest ``request.source`` hold as one APR file.

    Raises:
        DamagedModelFile: the manifest is malformed, or it and the shards, or two shards, disagree.
        ModelFileError: a shard is missing or cannot be read.
        GateRefused: training would refuse the model.
        OutputError: the target cannot be written.
    """
    manifest = request.source
    shards = _read_manifest(manifest)
    with ExitStack() as stack:
        readers = [stack.enter_context(AprReader(manifest.with_name(shard.filename))) for shard in shards]
        for reader, shard in zip(readers, shards, strict=True):
            if set(reader.tensors) != shard.tensors:
                odd = sorted(set(reader.tensors) ^ shard.tensors)[0]
                raise _disagree(f"shard and manifest differ about tensor {odd!r}", reader.path)
        metadata, flags = _metadata(readers), Flag.ROW_MAJOR
        for reader in readers:
            flags |= reader.header.flags & ~Flag.SHARDED
        entries = [entry for reader in readers for entry in reader.tensors.values()]

        def pieces() -> Iterator[tuple[str, Piece]]:
            for reader in readers:
                for name in reader.tensors:
                    yield name, reader.raw(name)
                    reader.forget(name)

        return request.write(
            pieces(),
            metadata=metadata,
            specs=[TensorSpec(entry.name, entry.dtype, entry.shape) for entry in entries],
            original_format="apr shards",
            notes=(f"joined from {len(shards)} shards",),
            flags=flags,
            verbatim=True,
            may_leave_unstated=True,
        )


def _is_manifest(path: Path) -> bool:
    try:
        return {"shards", "weight_map"} <= parse_object(bytes(map_readonly(path))).keys()
    except ValueError:
        return False


def _read_manifest(path: Path) -> list[_Shard]:
    """The shards in order of their index, after holding the manifest's own parts against each other."""
    try:
        facts = parse_object(bytes(map_readonly(path)))
        by_index = {_index(item["index"]): _shard(item) for item in facts["shards"]}
        weight_map = {str(name): _index(index) for name, index in facts["weight_map"].items()}
        counts = (facts.get("shard_count", len(by_index)), facts.get("tensor_count", len(weight_map)))
        listed = len(facts["shards"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _disagree(f"the manifest cannot be read ({error!r})"[:200], path) from error
    names = [name for shard in by_index.values() for name in shard.tensors]
    claimed = {name: index for index, shard in by_index.items() for name in shard.tensors}
    files = {shard.filename for shard in by_index.values()}
    if not 0 < listed <= _MAX_SHARDS or len(names) > MAX_TENSORS:
        raise _disagree(f"the manifest lists {listed} shards and {len(names)} tensors", path)
    if len(by_index) != listed or len(files) != listed or len(claimed) != len(names):
        raise _disagree("the manifest names a shard, a file or a tensor twice", path)
    if claimed != weight_map or counts != (listed, len(names)):
        raise _disagree("the manifest's weight map, lists and counts differ", path)
    return [by_index[index] for index in sorted(by_index)]


def _index(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"shard index {value!r}"[:80])
    return value


def _shard(item: Mapping[str, Any]) -> _Shard:
    filename = item["filename"]
    if not isinstance(filename, str) or Path(filename).name != filename or not filename.endswith(".apr"):
        raise ValueError(f"shard file {filename!r} (a name that ends in .apr, in the same folder)"[:200])
    return _Shard(filename, frozenset(map(str, item["tensors"])))


def _metadata(readers: Sequence[AprReader]) -> AprMetadata:
    """What the first shard says, completed by the others; a dimension said in two ways is refused."""
    merged: dict[str, Any] = {}
    for reader in readers:
        for key, value in reader.metadata.to_mapping().items():
            if key in _ARCHITECTURE_KEYS and merged.setdefault(key, value) != value:
                raise _disagree(f"{key} is {value!r} here and {merged[key]!r} in another shard", reader.path)
            merged.setdefault(key, value)
    for own in ("sharding", "total_size", "param_count"):
        merged.pop(own, None)
    return AprMetadata.from_mapping(merged)


def _disagree(what: str, where: Path) -> DamagedModelFile:
    return DamagedModelFile(
        what,
        where=where,
        expected="a manifest and shards that agree",
        remedy="copy or download the whole model again",
    )
