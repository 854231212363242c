"""What the reader accepts, what it refuses, and with which error."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
from builders.files import (
    GOLDEN_METADATA,
    GOLDEN_TENSORS,
    assemble,
    flipped,
    open_folder,
    seal,
    unprivileged,
    write_apr,
    write_golden,
)
from hypothesis import given
from hypothesis import strategies as st

from apr_dist.apr.checksum import RESIDUE, combine, crc32
from apr_dist.apr.layout import DType, Flag
from apr_dist.apr.reader import AprReader
from apr_dist.errors import (
    DamagedModelFile,
    ModelFileError,
    ModelFileMissing,
    NotAModelFile,
    UnsupportedModelFile,
)

HUGE = (1 << 64) - 1
GOLDEN_HEX = """
4150520002000004020000004000000000000000bd0000000001000000000000
8001000000000000028cc03b0000000000000000000000000000000000000000
7b226d6f64656c5f74797065223a226c696e6561725f72656772657373696f6e
222c226e616d65223a22676f6c64656e2d7632222c226c6963656e7365223a6e
756c6c2c22646174615f736f75726365223a6e756c6c2c22646174615f6c6963
656e7365223a6e756c6c2c2276657273696f6e223a22302e302e302d676f6c64
656e222c22637265617465645f6174223a2231373030303030303030222c2274
6f74616c5f73697a65223a302c22706172616d5f636f756e74223a387d000000
0400626961730001010000000000000000000000000000000400000000000000
0700776569676874730001080000000000000040000000000000002000000000
0000000000000000000000000000000000000000000000000000000000000000
0000000000000000000000000000000000000000000000000000000000000000
0000003e00000000000000000000000000000000000000000000000000000000
0000000000000000000000000000000000000000000000000000000000000000
0000803f000000400000003f000000bf00008040000000c00000803e00000041
0000000000000000000000000000000000000000000000000000000000000000
353f0f55
"""
GOLDEN = bytes.fromhex(GOLDEN_HEX)
OLD_KEYS = [
    "model_type",
    "name",
    "description",
    "author",
    "license",
    "data_source",
    "data_license",
    "version",
    "source",
    "original_format",
    "created_at",
    "total_size",
    "param_count",
    "quantization",
    "sharding",
    "chat_template",
    "chat_format",
    "special_tokens",
    "architecture",
    "hf_architecture",
    "hf_model_type",
    "hidden_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "vocab_size",
    "intermediate_size",
    "max_position_embeddings",
    "rope_theta",
    "rope_type",
    "rms_norm_eps",
    "head_dim",
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
]


def put(folder: Path, content: bytes) -> Path:
    path = folder / "model.apr"
    path.write_bytes(content)
    return path


def one_tensor(**entry: object) -> bytes:
    """A file with one F32 tensor of four elements, some of whose index fields lie."""
    facts = {"name": b"w", "code": 0, "dims": (4,), "offset": 0, "size": 16} | entry
    return assemble([tuple(facts.values())], bytes(64))  # type: ignore[list-item]


def test_the_published_file_is_read_value_by_value(tmp_path: Path) -> None:
    with AprReader(put(tmp_path, GOLDEN)) as reader:
        assert list(reader.tensors) == ["bias", "weights"]
        for name, values in GOLDEN_TENSORS.items():
            np.testing.assert_array_equal(reader.float32(name), values)
        assert reader.metadata.to_mapping() == GOLDEN_METADATA
        assert reader.header.flags == Flag.ROW_MAJOR
    assert zlib.crc32(GOLDEN) == RESIDUE


def test_the_published_file_is_written_byte_for_byte(tmp_path: Path) -> None:
    assert write_golden(tmp_path / "golden.apr").read_bytes() == GOLDEN


def test_the_older_spelling_with_every_absent_key_null_is_read(tmp_path: Path) -> None:
    metadata = json.dumps({key: GOLDEN_METADATA.get(key) for key in OLD_KEYS}, separators=(",", ":")).encode()
    weights, bias = (GOLDEN_TENSORS[name].tobytes() for name in ("weights", "bias"))
    content = assemble(
        [(b"bias", 0, (1,), 0, 4), (b"weights", 0, (8,), 64, 32)],
        bias.ljust(64, b"\0") + weights.ljust(64, b"\0"),
        metadata=metadata,
    )
    assert (len(metadata), len(content)) == (715, 1092)
    assert content[40:44] == (0x97402698).to_bytes(4, "little")
    assert content[-4:] == (0x3166AC78).to_bytes(4, "little")
    with AprReader(put(tmp_path, content)) as reader:
        assert reader.metadata.to_mapping() == GOLDEN_METADATA


@pytest.mark.falsifies("FALSIFY-APR-DIST-CHECKPOINT-001")
def test_every_single_flipped_byte_is_found(tmp_path: Path) -> None:
    for position in range(len(GOLDEN)):
        for mask in (0x01, 0x80, 0xFF):
            with pytest.raises(ModelFileError):
                AprReader(put(tmp_path, flipped(GOLDEN, position, mask)))


@pytest.mark.falsifies("FALSIFY-APR-DIST-CHECKPOINT-001")
def test_a_file_cut_at_any_length_is_refused(tmp_path: Path) -> None:
    for length in range(len(GOLDEN)):
        expected = NotAModelFile if length < 4 else DamagedModelFile
        with pytest.raises(expected):
            AprReader(put(tmp_path, GOLDEN[:length]))


def test_a_flipped_byte_in_the_index_is_called_damage_not_an_unknown_type(tmp_path: Path) -> None:
    dtype_of_bias = GOLDEN.index(b"bias\0") + 4
    with pytest.raises(DamagedModelFile, match="checksum"):
        AprReader(put(tmp_path, flipped(GOLDEN, dtype_of_bias)))


def test_structure_alone_does_not_read_tensor_bytes(tmp_path: Path) -> None:
    path = put(tmp_path, flipped(GOLDEN, GOLDEN.index(b"\x80\x3f")))
    assert AprReader(path, verify="structure").tensors
    with pytest.raises(DamagedModelFile, match="footer"):
        AprReader(path)


def test_a_file_without_a_footer_is_damaged_unless_asked_for(tmp_path: Path) -> None:
    path = put(tmp_path, GOLDEN[:-4])
    with pytest.raises(DamagedModelFile, match="truncated: it has 512 bytes"):
        AprReader(path)
    with AprReader(path, footer_required=False) as reader:
        assert not reader.has_footer
        np.testing.assert_array_equal(reader.float32("bias"), [0.125])


@pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-INIT-003")
@pytest.mark.parametrize("kind", ["missing", "folder", "pipe", "below a file", "dangling link", "NUL"])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.apr"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "below a file":
        path.touch()
        path = path / "y.apr"
    elif kind == "dangling link":
        path.symlink_to(tmp_path / "nowhere")
    elif kind == "NUL":
        path = tmp_path / "a\0b"
    with pytest.raises(ModelFileMissing) as caught:
        AprReader(path)
    assert caught.value.falsifier == "FALSIFY-APR-PRETRAIN-INIT-003"
    assert str(path) in str(caught.value)


def test_a_file_without_read_permission_is_refused() -> None:
    with open_folder() as folder, unprivileged():
        path = put(folder, GOLDEN)
        assert AprReader(path).tensors
        path.chmod(0)
        with pytest.raises(ModelFileMissing, match="Permission denied"):
            AprReader(path)


@pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-INIT-004")
@pytest.mark.parametrize("content", [b"", b"A", b"GGUF" + bytes(100), b"\x80\x02" + bytes(64)])
def test_an_empty_file_or_another_format_is_no_model_file(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(NotAModelFile) as caught:
        AprReader(put(tmp_path, content))
    assert caught.value.falsifier == "FALSIFY-APR-PRETRAIN-INIT-004"


@pytest.mark.parametrize("magic", [b"APRN", b"APRN" + bytes(200), b"APR1" + bytes(200), b"APR2" + bytes(200)])
def test_an_older_version_is_named(tmp_path: Path, magic: bytes) -> None:
    with pytest.raises(UnsupportedModelFile, match=magic[:4].decode()):
        AprReader(put(tmp_path, magic))


@pytest.mark.parametrize("flag", [Flag.LZ4, Flag.ZSTD, Flag.ENCRYPTED, Flag.SIGNED, Flag.COLUMN_MAJOR])
def test_what_cannot_be_read_right_is_refused_by_flag_name(tmp_path: Path, flag: Flag) -> None:
    with pytest.raises(UnsupportedModelFile, match=str(flag.name)):
        AprReader(put(tmp_path, assemble([], b"", flags=Flag.ROW_MAJOR | flag)))


def test_unknown_flags_and_versions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelFile, match="0x8000"):
        AprReader(put(tmp_path, assemble([], b"", flags=0x8400)))
    with pytest.raises(UnsupportedModelFile, match=r"version 2\.1"):
        AprReader(put(tmp_path, assemble([], b"", version=(2, 1))))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (one_tensor(offset=1), "offset 1"),
        (one_tensor(offset=HUGE - 63), "truncated"),
        (one_tensor(offset=64), "truncated"),
        (one_tensor(size=HUGE), "bytes"),
        (one_tensor(size=12), "12 bytes"),
        (one_tensor(dims=(HUGE, HUGE)), "shape"),
        (one_tensor(dims=(1 << 32, 1 << 32)), "shape"),
        (one_tensor(dims=(1 << 63, 2, 2)), "shape"),
        (one_tensor(dims=(0, HUGE), size=0), "shape"),
        (one_tensor(dims=(1,) * 9), "9 dimensions"),
        (one_tensor(name=b""), "empty"),
        (one_tensor(name=b"a\0b"), "unprintable"),
        (one_tensor(name=b"\x1b[2J"), "unprintable"),
        (one_tensor(name=b"\xff\xfe"), "UTF-8"),
        (one_tensor(name=b"n" * 257), "257 bytes"),
        (assemble([(b"w", 0, (4,), 0, 16)] * 2, bytes(128)), "twice"),
        (assemble([(b"b", 0, (4,), 0, 16), (b"a", 0, (4,), 64, 16)], bytes(128)), "out of order"),
        (assemble([(b"a", 0, (32,), 0, 128), (b"b", 0, (4,), 64, 16)], bytes(128)), "overlap"),
        (assemble([(b"w", 0, (4,), 0, 16)], bytes(64), count=0xFFFFFFFF), "4294967295 tensors"),
        (assemble([(b"w", 0, (4,), 0, 16)], bytes(64), count=2), "inside entry|tensor name"),
        (assemble([], b"", metadata_size=1 << 30), "header places"),
        (assemble([], b"", metadata_offset=HUGE), "header places"),
        (assemble([], b"", index_offset=HUGE, data_offset=HUGE - 63), "header places"),
        (assemble([], b"", data_offset=1 << 62), "truncated"),
        (assemble([], b"", metadata=b""), "metadata cannot be read"),
        (assemble([], b"", metadata=b"[1]"), "list"),
        (assemble([], b"", metadata=b"{\xff}"), "metadata cannot be read"),
        (assemble([], b"", metadata=b'{"x":' + b"[" * 5000 + b"]" * 5000 + b"}"), "5001 deep"),
        (assemble([], b"", metadata=b'{"x":' + b"[" * 90000), "90001 deep"),
        (assemble([], b"", metadata=b'{"x":[' + b"[]," * 100_001 + b"1]}"), "containers"),
        (assemble([], b"", metadata=b'{"x":[' + b"1," * 1_000_001 + b"1]}"), "values"),
        (assemble([], b"", metadata=b'{"x":NaN}'), "NaN"),
        (assemble([], b"", metadata=b'{"x":1e999}'), "range"),
        (assemble([], b"", metadata=b'{"x":"\\ud800"}'), "surrogates"),
        (assemble([], b"", metadata=b'{"x":' + b"9" * 5000 + b"}"), "metadata cannot be read"),
        (assemble([], b"", metadata=b'{"hidden_size":"576"}'), "hidden_size"),
        (assemble([], b"", metadata=b'{"hidden_size":-1}'), "hidden_size"),
        (assemble([], b"", metadata=b'{"hidden_size":true}'), "hidden_size"),
        (assemble([], b"", metadata=b'{"rope_theta":' + b"9" * 400 + b"}"), "rope_theta"),
    ],
)
def test_a_lying_field_is_damage_and_is_named(tmp_path: Path, content: bytes, match: str) -> None:
    with pytest.raises(DamagedModelFile, match=match):
        AprReader(put(tmp_path, content))


@pytest.mark.parametrize("code", [2, 10, 13, 31, 127, 130, 255])
def test_an_undefined_type_code_is_named(tmp_path: Path, code: int) -> None:
    with pytest.raises(UnsupportedModelFile, match=f"dtype code {code}"):
        AprReader(put(tmp_path, one_tensor(code=code)))


def test_metadata_beyond_the_limit_is_refused(tmp_path: Path) -> None:
    content = assemble([], b"", metadata=b'{"x":"' + b"y" * (16 << 20) + b'"}')
    with pytest.raises(UnsupportedModelFile, match="16777224 bytes"):
        AprReader(put(tmp_path, content))


def test_data_need_not_lie_in_index_order(tmp_path: Path) -> None:
    data = np.array([2.0], "<f4").tobytes().ljust(64, b"\0") + np.array([1.0], "<f4").tobytes().ljust(
        64, b"\0"
    )
    content = assemble([(b"a", 0, (1,), 64, 4), (b"b", 0, (), 0, 4)], data)
    with AprReader(put(tmp_path, content)) as reader:
        assert (reader.float32("a")[0], reader.float32("b")[()]) == (1.0, 2.0)


def test_empty_tensors_may_share_an_offset(tmp_path: Path) -> None:
    content = assemble([(b"a", 0, (0, 3), 0, 0), (b"b", 0, (1,), 0, 4), (b"c", 1, (0,), 0, 0)], bytes(64))
    with AprReader(put(tmp_path, content)) as reader:
        assert reader.float32("a").shape == (0, 3)


def test_the_last_of_repeated_keys_wins(tmp_path: Path) -> None:
    metadata = b'{"hidden_size":null,"n_embd":7,"hidden_size":8,"custom":1,"custom":2}'
    with AprReader(put(tmp_path, assemble([], b"", metadata=metadata))) as reader:
        assert reader.metadata.to_mapping() == {"hidden_size": 8, "custom": 2}


def test_views_are_read_only_and_outlive_the_reader(tmp_path: Path) -> None:
    values = np.arange(1000, dtype=np.float32)
    with AprReader(write_apr(tmp_path / "x.apr", {"w": values})) as reader:
        view, raw = reader.float32("w"), reader.raw("w")
    assert not view.flags.writeable
    assert raw.readonly
    np.testing.assert_array_equal(view, values)


def test_digests_tell_files_and_tensors_apart(tmp_path: Path) -> None:
    one, two = np.ones(5, np.float32), np.full(5, 2, np.float32)
    first = AprReader(write_apr(tmp_path / "1.apr", {"a": one, "b": two}))
    second = AprReader(write_apr(tmp_path / "2.apr", {"a": one, "b": one}))
    assert first.digest().startswith("sha256:")
    assert first.digest() != second.digest()
    assert first.tensor_digest("a") == second.tensor_digest("a") == second.tensor_digest("b")
    assert first.tensor_digest("b") != second.tensor_digest("b")


@given(st.binary(max_size=200), st.binary(max_size=200))
def test_checksums_of_pieces_combine_to_the_whole(left: bytes, right: bytes) -> None:
    assert combine(zlib.crc32(left), zlib.crc32(right), len(right)) == zlib.crc32(left + right)


def test_the_parallel_checksum_equals_the_serial_one() -> None:
    data = np.random.default_rng(0).bytes((50 << 20) + 12345)
    assert crc32(memoryview(data), threads=3) == zlib.crc32(data)


def test_a_file_followed_by_more_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DamagedModelFile, match="footer"):
        AprReader(put(tmp_path, GOLDEN + b"more"))
    with AprReader(put(tmp_path, seal(GOLDEN))) as reader:  # covered by a checksum of its own
        assert reader.tensors["bias"].dtype is DType.F32
