"""Training state in files: each rank writes what it holds, and any number of ranks reads it back.

``optimizer-00003-of-00008.safetensors`` holds flat runs of the moments by parameter name, with each one's
place in its whole tensor, and the rank's random state; ``optimizer.json`` names the files with their
digests. Of a moment in 8 bits it holds codes and, under ``NAME.scales``, the scale of each 256 of them. Names
and places, not positions in a group, tie a moment to its weight, so the files fit another world size or
strategy. ``torch.distributed.checkpoint`` does the same for its own layouts, but keeps its index as a pickle,
which nothing here loads.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from apr_dist.atomic_files import AtomicFile, file_digest
from apr_dist.errors import AprDistError, OutputError
from apr_dist.parallel.eight_bit import Quantized, code_values
from apr_dist.parallel.optimizer_index import FORMAT, STATE_DAMAGED, damaged_state, read_index
from apr_dist.parallel.optimizer_shards import MOMENTS, SCALES, fill_moments, moment_shapes
from apr_dist.parallel.runtime import Runtime
from apr_dist.parallel.save_group import Exchange
from apr_dist.parallel.shard_layout import Piece
from apr_dist.parallel.state_bits import BLOCK
from apr_dist.parsing import parse_json

RANDOM = "random."
"""Prefix of the tensors that hold a rank's random state, by device."""

_TYPES = {torch.float32: "F32", torch.uint8: "U8"}


def part_name(rank: int, world_size: int) -> str:
    """File of one rank's state."""
    return f"optimizer-{rank:05d}-of-{world_size:05d}.safetensors"


def random_pieces(device: torch.device) -> list[Piece]:
    """This rank's random state: of the CPU, and of the GPU it trains on."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return [Piece(RANDOM + kind, tuple(state.shape), 0, state) for kind, state in states.items()]


def write_part(pieces: Sequence[Piece], path: Path, moved: Callable[[], None]) -> str:
    """Write one rank's pieces as a safetensors file, a tensor at a time, and read it back.

    The library wants all tensors in host memory at once, so the header is written here; the format is
    documented with it (8 bytes of length, JSON, the values in order).

    Args:
        pieces: what the rank holds, in host memory or not.
        path: the file to make.
        moved: called after each tensor.

    Returns:
        ``sha256:...`` of the file's bytes.

    Raises:
        OutputError: it cannot be written, or does not read back; a file that stood there still stands.
    """
    hashed, at = hashlib.sha256(), 0
    with AtomicFile(path, overwrite=True) as file:
        for content in _contents(pieces):
            hashed.update(content)
            file.write_at(at, content)
            at += len(content)
            moved()
    digest = f"sha256:{hashed.hexdigest()}"
    if file_digest(path) != digest:
        raise OutputError(
            "what is on disk is not what was written",
            where=path,
            expected="every byte back",
            remedy="check the disk; do not use this folder",
            falsifier=STATE_DAMAGED,
        )
    return digest


def _contents(pieces: Sequence[Piece]) -> Iterable[bytes | memoryview]:
    places = {piece.name: [piece.start, *piece.shape] for piece in pieces}
    header: dict[str, Any] = {"__metadata__": {"format": FORMAT, "places": json.dumps(places)}}
    at = 0
    for piece in pieces:
        end = at + piece.values.numel() * piece.values.element_size()
        kind = _TYPES[piece.values.dtype]
        header[piece.name] = {"dtype": kind, "shape": [piece.values.numel()], "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for piece in pieces:
        if piece.values.numel():
            yield host_bytes(piece.values)


def host_bytes(values: Tensor) -> memoryview:
    """The bytes of a flat tensor's values, copied to host memory where they are not there."""
    array: Any = values.detach().cpu().contiguous().numpy()
    return memoryview(array).cast("B")


def restore(
    model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path, runtime: Runtime, exchange: Exchange
) -> None:
    """Give every rank's optimizer and random generators the state in a step folder.

    Args:
        model: the decoder whose parameters the optimizer holds.
        optimizer: AdamW without state, or DeepSpeed's wrapper of it.
        folder: the step folder, which every rank reads.
        runtime: this rank's view of the run.
        exchange: over which the ranks agree.

    Raises:
        DamagedModelFile: on every rank: not such a state, or not of this model.
    """
    error: AprDistError | None = None
    try:
        _load(model, optimizer, folder, runtime)
    except AprDistError as damaged:
        error = damaged
    exchange.agree(error)


def _load(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path, runtime: Runtime) -> None:
    index = read_index(folder)
    mine = part_name(runtime.rank, runtime.world_size)
    files = sorted(index["files"], key=lambda name: (name != mine, name))  # its own first, often enough
    parts = _Parts([folder / name for name in files])
    if index["updates"]:
        parts.refuse_others(moment_shapes(model))
        fill_moments(model, optimizer, updates=int(index["updates"]), stored=parts, runtime=runtime)
    if mine in files:
        _restore_random(folder / mine, runtime.device)


def _restore_random(path: Path, device: torch.device) -> None:
    with _opened(path) as file:
        names = set(file.keys())
        if RANDOM + "cpu" in names:
            torch.set_rng_state(file.get_tensor(RANDOM + "cpu"))
        if device.type == "cuda" and RANDOM + "cuda" in names:
            torch.cuda.set_rng_state(file.get_tensor(RANDOM + "cuda"), device)


class _Parts:
    """The files of one state, opened when something in them is needed."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self._opened: dict[Path, tuple[safe_open, dict[str, list[int]]]] = {}

    def refuse_others(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """The state must be of exactly these tensors."""
        path = self._paths[0]
        found = {
            name: tuple(place[1:])
            for name, place in self._open(path)[1].items()
            if not name.startswith(RANDOM)
        }
        odd = [name for name in found if shapes.get(name.removesuffix(SCALES)) != found[name]]
        if odd:
            raise damaged_state(path, f"{len(odd)} tensors are left over or misshapen, first {min(odd)}")

    def read(self, name: str, start: int, values: Tensor) -> None:
        """Fill ``values`` with the elements of ``name`` from ``start`` on.

        Raises:
            DamagedModelFile: some of them are in no file.
        """
        for run in self._runs(name, start, len(values)):
            here = slice(run.first - start, run.last - start)
            values[here] = run.floats(name) if run.codes else run.read(name)

    def read_quantized(self, name: str, start: int, held: Quantized) -> None:
        """Fill blocks of codes with the elements of ``name`` from ``start`` on.

        Raises:
            DamagedModelFile: some of them are in no file.
        """
        count = len(held.codes)
        floats, scales, codes = (
            torch.empty(count),
            torch.full((count,), math.nan),
            torch.empty_like(held.codes),
        )
        for run in self._runs(name, start, count):
            here = slice(run.first - start, run.last - start)
            if run.codes:
                codes[here], scales[here] = run.read(name), run.scales(name)
            floats[here] = run.floats(name) if run.codes else run.read(name)
        held.take(codes, scales, floats)

    def _runs(self, name: str, start: int, count: int) -> Iterator[_Run]:
        """Where the elements of ``name`` from ``start`` on are, until all were found."""
        missing = count
        for path in self._paths:
            if not missing:
                return
            file, places = self._open(path)
            if name not in places:
                continue
            begin, held = places[name][0], file.get_slice(name)  # type: ignore[no-untyped-call]
            first, codes = max(start, begin), held.get_dtype() == "U8"
            last = min(start + count, begin + held.get_shape()[0])
            if first < last:
                if codes:
                    _check_scales(file, path, name, blocks=-(-held.get_shape()[0] // BLOCK))
                yield _Run(file, begin, first, last, codes=codes)
                missing -= last - first
        if missing:
            raise damaged_state(self._paths[0].parent, f"{missing} elements of {name} are in no file")

    def _open(self, path: Path) -> tuple[safe_open, dict[str, list[int]]]:
        if path not in self._opened:
            file = _opened(path)
            try:
                places = parse_json(file.metadata()["places"])  # type: ignore[no-untyped-call]
            except (ValueError, KeyError, TypeError) as error:
                raise damaged_state(path, f"it does not say what it holds ({error})") from error
            self._opened[path] = (file, places)
        return self._opened[path]


@dataclass(frozen=True)
class _Run:
    """Elements from ``first`` to ``last`` of a whole tensor, in a file that holds it from ``begin`` on."""

    file: safe_open
    begin: int
    first: int
    last: int
    codes: bool

    def read(self, name: str) -> Tensor:
        """The elements as they are stored."""
        held: Tensor = self.file.get_slice(name)[self.first - self.begin : self.last - self.begin]  # type: ignore[no-untyped-call]
        return held

    def scales(self, name: str) -> Tensor:
        """The scale of each element's block, f32."""
        blocks: Tensor = self.file.get_tensor(name + SCALES)  # type: ignore[no-untyped-call]
        places = torch.arange(self.first - self.begin, self.last - self.begin)
        return blocks[places // BLOCK]

    def floats(self, name: str) -> Tensor:
        """What the codes stand for, f32."""
        values = code_values(signed=name.endswith(MOMENTS[0]))
        return values[self.read(name).long()] * self.scales(name)


def _check_scales(file: safe_open, path: Path, name: str, *, blocks: int) -> None:
    scales = name + SCALES
    held = file.get_slice(scales) if scales in file.keys() else None  # type: ignore[no-untyped-call]  # noqa: SIM118
    if held is None or (held.get_dtype(), held.get_shape()) != ("F32", [blocks]):
        raise damaged_state(path, f"{name} is in 8 bits without a scale for each of its {blocks} blocks")


def _opened(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise damaged_state(path, f"it cannot be opened ({error})") from error
