"""APR v1: "APR1" is converted, everything ambiguous is refused by name."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders.files import TINY_METADATA, tiny_tensors

from apr_dist.apr.layout import DType
from apr_dist.apr.legacy import Apr1File
from apr_dist.apr.reader import AprReader
from apr_dist.cli import main
from apr_dist.errors import (
    ArchitectureRefused,
    DamagedModelFile,
    ExitCode,
    ModelFileError,
    NotAModelFile,
    UnsupportedModelFile,
    UsageError,
)
from apr_dist.interop.importing import import_model

VALUES = np.arange(6, dtype="<f4").reshape(2, 3)
INDEX: list[dict[str, Any]] = [
    {"name": "b", "dtype": "F32", "shape": [2, 3], "offset": 0, "size": 24},
    {"name": "a", "dtype": "F16", "shape": [3], "offset": 24, "size": 6},
]
DATA = VALUES.tobytes() + np.ones(3, "<f2").tobytes()


def apr1(
    index: Any = INDEX,
    *,
    count: int = 2,
    data: bytes = DATA,
    metadata: bytes = b'{"model_type":"m","d_model":3}',
) -> bytes:
    listed = json.dumps(index).encode()
    body = b"APR1" + struct.pack("<I", len(metadata)) + metadata + struct.pack("<II", count, len(listed))
    body += listed + data
    return body + zlib.crc32(body).to_bytes(4, "little")


def put(folder: Path, content: bytes) -> Path:
    path = folder / "old.apr"
    path.write_bytes(content)
    return path


def whole_apr1(**metadata: Any) -> bytes:
    """The tiny decoder as APR1, which states what is given."""
    index, data = [], b""
    for name, array in tiny_tensors().items():
        entry = {"name": name, "dtype": "F32", "shape": list(array.shape), "offset": len(data)}
        index.append(entry | {"size": array.nbytes})
        data += array.tobytes()
    return apr1(index, count=len(index), data=data, metadata=json.dumps(metadata).encode())


def test_an_apr1_file_becomes_apr2_value_for_value(tmp_path: Path) -> None:
    summary = import_model(put(tmp_path, whole_apr1(**TINY_METADATA)), tmp_path / "new.apr")
    with AprReader(summary.target) as reader:
        for name, array in tiny_tensors().items():
            np.testing.assert_array_equal(reader.float32(name), array)
        assert reader.metadata.hidden_size == 64
    assert (summary.tensor_count, summary.original_format) == (len(tiny_tensors()), "apr-v1")
    assert summary.notes == ("converted from APR v1",)


def test_dimensions_that_an_apr1_file_leaves_unstated_are_stamped_as_its_import_advises(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    unstated = {"max_position_embeddings": 128, "rope_theta": 50000.0, "rms_norm_eps": 1e-6}
    stated = {key: value for key, value in TINY_METADATA.items() if key not in unstated}
    old, new, stamped = put(tmp_path, whole_apr1(**stated)), tmp_path / "new.apr", tmp_path / "stamped.apr"
    assert main(["import", str(old), "-o", str(new)]) == 0
    advice = next(line for line in capfd.readouterr().out.splitlines() if "apr-dist stamp" in line)
    command = advice.split("apr-dist ")[1].rstrip(".").split()
    values = iter(map(str, unstated.values()))
    command = [next(values) if word == "VALUE" else word for word in command]
    assert main(["validate", str(new)]) == ExitCode.GATE
    assert main([*command[:-1], str(stamped)]) == 0
    assert main(["validate", str(stamped)]) == 0


def test_an_apr1_file_of_half_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArchitectureRefused, match="which architecture"):
        import_model(put(tmp_path, apr1()), tmp_path / "new.apr")
    assert not (tmp_path / "new.apr").exists()


def test_the_reader_points_to_the_conversion(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelFile, match="apr-dist import"):
        AprReader(put(tmp_path, apr1()))


def test_every_flipped_byte_and_every_cut_is_found(tmp_path: Path) -> None:
    content = apr1()
    for position in range(len(content)):
        altered = bytearray(content)
        altered[position] ^= 0xFF
        for damaged in (bytes(altered), content[:position]):
            with pytest.raises(ModelFileError):
                Apr1File(put(tmp_path, damaged))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"dtype": "Q4"}, UnsupportedModelFile),
        ({"shape": [2, -3]}, UnsupportedModelFile),
        ({"offset": "0"}, UnsupportedModelFile),
        ({"size": 20}, DamagedModelFile),
        ({"offset": 1 << 40}, DamagedModelFile),
        ({"name": "a"}, DamagedModelFile),
    ],
)
def test_an_index_that_lies_is_refused(
    tmp_path: Path, change: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        Apr1File(put(tmp_path, apr1([INDEX[0] | change, INDEX[1]])))


def test_another_kind_of_index_is_not_guessed(tmp_path: Path) -> None:
    for index in ({"tensors": []}, [1, 2], "x"):
        with pytest.raises(UnsupportedModelFile, match="without guessing"):
            Apr1File(put(tmp_path, apr1(index)))


def test_other_magics_and_options_are_refused(tmp_path: Path) -> None:
    with pytest.raises(NotAModelFile):
        Apr1File(put(tmp_path, b"APRN" + bytes(100)))
    with pytest.raises(NotAModelFile, match="GGUF, safetensors or APR file"):
        import_model(put(tmp_path, b"APRN" + bytes(100)), tmp_path / "x.apr")
    with pytest.raises(UsageError):
        import_model(put(tmp_path, apr1()), tmp_path / "x.apr", dtype=DType.F16)
