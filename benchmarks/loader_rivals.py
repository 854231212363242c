"""Other ways to get the same batches, for ``bench_loader``: each opens a data set and gives batches for ever.

A batch is an int64 tensor [8, 2049] of shuffled rows unless a name says otherwise; the shift to targets is
left to the consumer. Ways whose package is not installed are left out.
"""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

BATCH, WIDTH = 8, 2049
RING = 9  # batches: the eight that ours keeps ready and the one in use

Batches = Iterator[object]

GATHER_C = r"""
#include <stdint.h>
#include <string.h>
void gather(const uint32_t **rows, long batches, long batch, long width, char *ring, long slots, int wide) {
    long bytes = batch * width * (wide ? 8 : 4);
    for (long k = 0; k < batches; k++) {
        char *out = ring + k % slots * bytes;
        for (long j = 0; j < batch; j++) {
            const uint32_t *row = rows[k * batch + j];
            if (!wide) memcpy(out + j * width * 4, row, width * 4);
            else for (long n = 0; n < width; n++) ((int64_t *)out)[j * width + n] = row[n];
        }
    }
}
"""


def maps_of(folder: Path) -> list[NDArray[np.uint32]]:
    return [np.memmap(path, dtype="<u4", mode="r") for path in sorted(folder.glob("shard-*.bin"))]


def nano_gpt(folder: Path, *, reopen: bool) -> Batches:
    """Random crops of one shard, each copied to int64 and stacked, as nanoGPT reads its data."""
    generator = np.random.default_rng(0)
    paths = sorted(folder.glob("shard-*.bin"))
    kept = maps_of(folder)
    while True:
        shard = int(generator.integers(len(paths)))
        data = np.memmap(paths[shard], dtype="<u4", mode="r") if reopen else kept[shard]
        starts = generator.integers(len(data) - WIDTH, size=BATCH)
        yield torch.stack([torch.from_numpy(data[at : at + WIDTH].astype(np.int64)) for at in starts])


def numpy_gather(folder: Path, dtype: type[np.signedinteger]) -> Batches:
    """The shortest loop over maps in plain numpy: one new array a batch, rows copied into it."""
    maps = maps_of(folder)
    per_shard = (len(maps[0]) - 1) // (WIDTH - 1)
    order = np.random.default_rng(0).permutation(len(maps) * per_shard).tolist()
    while True:
        for first in range(0, len(order) - BATCH, BATCH):
            out = np.empty((BATCH, WIDTH), dtype)
            for row, index in enumerate(order[first : first + BATCH]):
                at = index % per_shard * (WIDTH - 1)
                out[row] = maps[index // per_shard][at : at + WIDTH]
            yield torch.from_numpy(out)


class Rows(Dataset[torch.Tensor]):
    """A map-style data set over memmaps, a row at a time or whole batches."""

    def __init__(self, folder: Path, *, whole: bool) -> None:
        self.maps = maps_of(folder)
        self.per_shard = (len(self.maps[0]) - 1) // (WIDTH - 1)
        self.whole = whole
        if whole:
            self.order = np.random.default_rng(0).permutation(len(self.maps) * self.per_shard)

    def __len__(self) -> int:
        rows = len(self.maps) * self.per_shard
        return rows // BATCH if self.whole else rows

    def row(self, index: int) -> NDArray[np.uint32]:
        """Row ``index`` where it lies in its map."""
        at = index % self.per_shard * (WIDTH - 1)
        return self.maps[index // self.per_shard][at : at + WIDTH]

    def __getitem__(self, index: int) -> torch.Tensor:
        if not self.whole:
            return torch.from_numpy(self.row(index).astype(np.int64))
        out = np.empty((BATCH, WIDTH), np.int64)
        for place, row in enumerate(self.order[index * BATCH : (index + 1) * BATCH]):
            out[place] = self.row(int(row))
        return torch.from_numpy(out)


def data_loader(folder: Path, *, workers: int, whole: bool) -> Batches:
    size = None if whole else BATCH
    loader = DataLoader(
        Rows(folder, whole=whole),
        batch_size=size,
        shuffle=not whole,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    while True:
        yield from loader


def litdata_loader(folder: Path, *, workers: int) -> Batches:
    import litdata  # noqa: PLC0415
    from litdata.streaming.item_loader import TokensLoader  # noqa: PLC0415

    chunks = folder / "litdata"
    if not (chunks / "index.json").is_file():
        from litdata.streaming.writer import BinaryWriter  # noqa: PLC0415

        writer = BinaryWriter(str(chunks), chunk_size=2048 * WIDTH, item_loader=TokensLoader(WIDTH))
        for index, tokens in enumerate(maps_of(folder)):
            writer.add_item(index, torch.from_numpy(tokens.astype(np.int32)))
        writer.done()
        writer.merge()
    dataset = litdata.StreamingDataset(str(chunks), item_loader=TokensLoader(WIDTH), shuffle=True)
    loader = litdata.StreamingDataLoader(dataset, batch_size=BATCH, num_workers=workers)
    while True:
        for batch in loader:
            yield batch.long()


def mosaic_loader(folder: Path, *, workers: int) -> Batches:
    import streaming  # noqa: PLC0415

    chunks = folder / "mds"
    if not (chunks / "index.json").is_file():
        columns = {"tokens": f"ndarray:uint32:{WIDTH}"}
        with streaming.MDSWriter(out=str(chunks), columns=columns) as writer:
            rows = Rows(folder, whole=False)
            for index in range(len(rows)):
                writer.write({"tokens": np.ascontiguousarray(rows.row(index))})
    dataset = streaming.StreamingDataset(local=str(chunks), shuffle=True, batch_size=BATCH)
    loader = DataLoader(dataset, batch_size=BATCH, num_workers=workers, persistent_workers=workers > 0)
    while True:
        for batch in loader:
            yield batch["tokens"].to(torch.int64)


def rivals(folder: Path) -> dict[str, Callable[[], Batches]]:
    """Every way that can run here, by name."""
    ways: dict[str, Callable[[], Batches]] = {
        "numpy memmap, opened per batch (nanoGPT)": lambda: nano_gpt(folder, reopen=True),
        "numpy memmap, kept open": lambda: nano_gpt(folder, reopen=False),
        "numpy gather, int64": lambda: numpy_gather(folder, np.int64),
        "numpy gather, int32": lambda: numpy_gather(folder, np.int32),
    }
    for workers in (0, 2):
        ways |= {
            f"DataLoader over a memmap, {workers} workers": lambda n=workers: data_loader(
                folder, workers=n, whole=False
            ),
            f"DataLoader, whole batches, {workers} workers": lambda n=workers: data_loader(
                folder, workers=n, whole=True
            ),
        }
        if importlib.util.find_spec("litdata"):
            ways[f"litdata, {workers} workers"] = lambda n=workers: litdata_loader(folder, workers=n)
        if importlib.util.find_spec("streaming"):
            ways[f"mosaicml-streaming, {workers} workers"] = lambda n=workers: mosaic_loader(
                folder, workers=n
            )
    return ways


class BareGather:
    """The limit of a plain copy: a C loop of ``memcpy`` (or of widening) over known rows; as many buffers."""

    def __init__(self, folder: Path, rows: list[tuple[int, int]]) -> None:
        self.maps = maps_of(folder)
        addresses = [self.maps[shard].ctypes.data + start * 4 for shard, start in rows]
        self.rows = (ctypes.c_void_p * len(addresses))(*addresses)
        self.batches = len(addresses) // BATCH
        self.ring = np.zeros(RING * BATCH * WIDTH, np.int64)
        source = folder / "gather.c"
        source.write_text(GATHER_C)
        compiler = shutil.which("cc") or "gcc"
        library = folder / "gather.so"
        subprocess.run(
            [compiler, "-O3", "-march=native", "-shared", "-fPIC", "-o", library, source], check=True
        )
        self.function = ctypes.CDLL(str(library)).gather

    def run(self, *, wide: bool) -> int:
        """Copy every row once; returns how many batches that were."""
        ring = ctypes.c_void_p(self.ring.ctypes.data)
        size = (ctypes.c_long(self.batches), ctypes.c_long(BATCH), ctypes.c_long(WIDTH))
        self.function(self.rows, *size, ring, ctypes.c_long(RING), ctypes.c_int(wide))
        return self.batches
