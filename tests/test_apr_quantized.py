"""Quantised tensors come out as their formulas say, and as the gguf package reads the shared ones."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from builders.files import assemble

from apr_dist.apr.layout import DType, payload_bytes
from apr_dist.apr.reader import AprReader
from apr_dist.errors import UnsupportedModelFile


def read_one(folder: Path, code: int, shape: tuple[int, ...], payload: bytes) -> AprReader:
    path = folder / "x.apr"
    padded = payload.ljust(-(-len(payload) // 64) * 64, b"\0")
    path.write_bytes(assemble([(b"w", code, shape, 0, len(payload))], padded))
    return AprReader(path)


@pytest.mark.parametrize(("dtype", "kind"), [(DType.Q4_K, "Q4_K"), (DType.Q6_K, "Q6_K")])
def test_super_blocks_equal_the_gguf_packages_values(tmp_path: Path, dtype: DType, kind: str) -> None:
    shape = (5, 512)
    random = np.random.default_rng(0)
    blocks = random.integers(0, 256, (10, payload_bytes(dtype, (256,))), np.uint8)
    scales = (slice(0, 2), slice(2, 4)) if dtype is DType.Q4_K else (slice(208, 210),)
    for part in scales:
        blocks[:, part] = random.standard_normal((10, 1)).astype(np.float16).view(np.uint8)
    expected = gguf.dequantize(blocks, gguf.GGMLQuantizationType[kind]).reshape(shape)
    reader = read_one(tmp_path, dtype, shape, blocks.tobytes())
    np.testing.assert_array_equal(reader.float32("w"), expected)
    with pytest.raises(UnsupportedModelFile, match="quantised"):
        reader.array("w")


def test_rows_that_start_at_a_new_block_are_told_apart_by_their_size(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    blocks = random.integers(0, 256, (6, 210), np.uint8)
    blocks[:, 208:] = np.full((6, 1), 0.5, np.float16).view(np.uint8)
    values = gguf.dequantize(blocks, gguf.GGMLQuantizationType.Q6_K).reshape(3, 512)
    padded = read_one(tmp_path, DType.Q6_K, (3, 300), blocks.tobytes())
    np.testing.assert_array_equal(padded.float32("w"), values[:, :300])
    packed = read_one(tmp_path, DType.Q6_K, (3, 300), blocks[:4].tobytes())
    np.testing.assert_array_equal(packed.float32("w").ravel(), values.ravel()[:900])
    with pytest.raises(UnsupportedModelFile, match="padded and unpadded"):
        read_one(tmp_path, DType.Q6_K, (2, 250), blocks[:2].tobytes())


@pytest.mark.parametrize("code", [128, 8])
def test_apr_q4_values_follow_their_formula(tmp_path: Path, code: int) -> None:
    scales = np.array([0.5, np.inf, np.nan, 1e-7, -2.0], np.float16)
    nibbles = np.random.default_rng(2).integers(0, 256, (5, 16), np.uint8)
    payload = np.concatenate((scales.view(np.uint8).reshape(5, 2), nibbles), axis=1).tobytes()
    values = read_one(tmp_path, code, (150,), payload).float32("w")
    assert values.shape == (150,)
    for block, scale in enumerate([0.5, 0, 0, 0, -2.0]):
        for i in range(32 if block < 4 else 22):
            byte = int(nibbles[block, i // 2])
            assert values[32 * block + i] == ((byte >> 4 if i % 2 else byte & 15) - 8) * scale


@pytest.mark.parametrize("code", [129, 9])
def test_apr_q8_values_follow_their_formula(tmp_path: Path, code: int) -> None:
    payload = np.array([0.25], "<f4").tobytes() + np.array([-127, 0, 5, 127], np.int8).tobytes()
    np.testing.assert_array_equal(
        read_one(tmp_path, code, (2, 2), payload).float32("w"), [[-31.75, 0], [1.25, 31.75]]
    )
    assert read_one(tmp_path, code, (0,), b"").float32("w").shape == (0,)


@pytest.mark.parametrize(
    ("dtype", "values"),
    [
        (DType.F64, np.array([1e300, -2.5])),
        (DType.I32, np.array([-5, 7], "<i4")),
        (DType.I64, np.array([-5, 1 << 40], "<i8")),
        (DType.I8, np.array([-5, 7], "i1")),
        (DType.U8, np.array([5, 250], "u1")),
        (DType.F16, np.array([0.1, -3], "<f2")),
    ],
)
def test_plain_types_become_float32(tmp_path: Path, dtype: DType, values: np.ndarray) -> None:  # type: ignore[type-arg]
    reader = read_one(tmp_path, dtype, values.shape, values.tobytes())
    np.testing.assert_array_equal(reader.array("w"), values)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(reader.float32("w"), values.astype(np.float32))


def test_bfloat16_widens_exactly(tmp_path: Path) -> None:
    bits = np.arange(0, 1 << 16, 7, dtype="<u2")
    wide = read_one(tmp_path, DType.BF16, bits.shape, bits.tobytes()).float32("w")
    np.testing.assert_array_equal(wide.view(np.uint32) >> 16, bits)
    assert not (wide.view(np.uint32) & 0xFFFF).any()
