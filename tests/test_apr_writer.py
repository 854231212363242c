"""What the writer promises: any order, exact bytes, all or nothing."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from builders.files import open_folder, small_disk, unprivileged, write_apr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from apr_dist.apr.checksum import RESIDUE
from apr_dist.apr.layout import DType, Flag
from apr_dist.apr.metadata import AprMetadata
from apr_dist.apr.reader import AprReader
from apr_dist.apr.writer import AprWriter, TensorSpec
from apr_dist.errors import OutputError

LETTERS = st.characters(min_codepoint=33, max_codepoint=0x2FFF, exclude_categories=("C", "Z"))
NAMES = st.text(LETTERS, min_size=1, max_size=20)
SHAPES = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=9)
ARRAYS = hnp.arrays(st.sampled_from(["<f4", "<f2", "<u2"]), SHAPES)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | FLOATS | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def specs_of(tensors: Mapping[str, npt.NDArray[np.float32]]) -> list[TensorSpec]:
    return [TensorSpec(name, DType.F32, array.shape) for name, array in tensors.items()]


def some_tensors() -> dict[str, npt.NDArray[np.float32]]:
    random = np.random.default_rng(1)
    return {f"t{i}": random.standard_normal((i, 7)).astype(np.float32) for i in (3, 1, 40, 16)}


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(NAMES, ARRAYS, max_size=6),
    st.dictionaries(st.text(min_size=1), JSON, max_size=5),
    st.data(),
)
def test_what_is_written_is_read_back(
    tmp_path_factory: pytest.TempPathFactory,
    tensors: dict[str, npt.NDArray[Any]],
    custom: dict[str, Any],
    data: st.DataObject,
) -> None:
    path = tmp_path_factory.mktemp("round") / "x.apr"
    facts = {f"x.{key}": value for key, value in custom.items()} | {"hidden_size": 3, "rope_theta": 1e6}
    write_apr(path, tensors, facts)
    with AprReader(path) as reader:
        assert set(reader.tensors) == set(tensors)
        assert list(reader.tensors) == sorted(tensors, key=str.encode)
        for name, array in tensors.items():
            assert reader.raw(name) == array.tobytes()
            assert reader.array(name).shape == array.shape
        assert {key: reader.metadata.to_mapping()[key] for key in facts} == facts
        assert reader.metadata.param_count == sum(array.size for array in tensors.values())
        copy = path.with_name("copy.apr")
        specs = [TensorSpec(entry.name, entry.dtype, entry.shape) for entry in reader.tensors.values()]
        order = data.draw(st.permutations(specs))
        with AprWriter(copy, metadata=reader.metadata, tensors=order) as writer:
            for spec in order:
                writer.write(spec.name, reader.raw(spec.name))
    assert copy.read_bytes() == path.read_bytes()
    assert zlib.crc32(path.read_bytes()) == RESIDUE


def test_pieces_of_several_tensors_may_alternate(tmp_path: Path) -> None:
    tensors = some_tensors()
    whole = write_apr(tmp_path / "whole.apr", tensors).read_bytes()
    pieces = tmp_path / "pieces.apr"
    with AprWriter(pieces, metadata=AprMetadata(), tensors=specs_of(tensors)) as writer:
        for row in range(40):
            for name, array in tensors.items():
                writer.append(name, array[row : row + 1])
    assert pieces.read_bytes() == whole


@pytest.mark.parametrize("fault", ["missing", "short", "long", "twice", "unknown", "strided", "exception"])
def test_nothing_is_left_behind_when_writing_fails(tmp_path: Path, fault: str) -> None:
    target = write_apr(tmp_path / "x.apr", {"old": np.ones(3, np.float32)})
    before = target.read_bytes()
    tensors = some_tensors()
    expected = RuntimeError if fault == "exception" else OutputError

    def write_with_fault() -> None:
        with AprWriter(target, metadata=AprMetadata(), tensors=specs_of(tensors), overwrite=True) as writer:
            for name in list(tensors)[1:] if fault in ("missing", "short", "long", "strided") else tensors:
                writer.write(name, tensors[name])
            first = tensors["t3"]
            if fault == "short":
                writer.append("t3", first[:-1])
            elif fault == "long":
                writer.write("t3", np.ones(100, np.float32))
            elif fault == "twice":
                writer.write("t3", first)
            elif fault == "unknown":
                writer.write("other", first)
            elif fault == "strided":
                writer.write("t3", np.ones((7, 3), np.float32).T)
            elif fault == "exception":
                raise RuntimeError

    with pytest.raises(expected):
        write_with_fault()
    assert target.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["x.apr"]


def test_an_existing_file_stays_unless_replacing_it_was_asked_for(tmp_path: Path) -> None:
    target = tmp_path / "x.apr"
    target.write_text("precious")
    with pytest.raises(OutputError, match="exists already"):
        write_apr(target, {})
    assert target.read_text() == "precious"
    write_apr(target, {}, overwrite=True)
    assert AprReader(target).tensors == {}
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError):
        write_apr(tmp_path / "folder", {}, overwrite=True)


def test_a_file_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    target = tmp_path / "x.apr"
    writer = AprWriter(target, metadata=AprMetadata(), tensors=[])
    with pytest.raises(OutputError, match="exists already"), writer:
        target.write_text("someone else's")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("x.apr", "someone else's")]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"create the folder .*nowhere"):
        write_apr(tmp_path / "nowhere" / "x.apr", {})


def test_a_read_only_folder_is_refused() -> None:
    with open_folder() as folder, unprivileged():
        write_apr(folder / "x.apr", {})
        folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
        with pytest.raises(OutputError, match="Permission denied"):
            write_apr(folder / "y.apr", {})


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    with small_disk(tmp_path, 100_000):
        target = write_apr(tmp_path / "x.apr", {"old": np.ones(3, np.float32)})
        before = target.read_bytes()
        with pytest.raises(OutputError, match=r"cannot be written \((No space left|File too large)"):
            write_apr(target, {"w": np.ones(100_000, np.float32)}, overwrite=True)
        assert target.read_bytes() == before
        assert [path.name for path in tmp_path.iterdir()] == ["x.apr"]


@pytest.mark.parametrize("kind", ["pipe", "link to a device"])
def test_what_is_no_file_is_never_replaced(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "x.apr"
    os.mkfifo(target) if kind == "pipe" else target.symlink_to("/dev/null")
    before = target.lstat()
    with pytest.raises(OutputError, match="pipe, socket or device"):
        write_apr(target, {}, overwrite=True)
    assert target.lstat() == before
    assert [path.name for path in tmp_path.iterdir()] == ["x.apr"]


def test_an_interrupt_leaves_nothing_behind(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from apr_dist.apr.metadata import AprMetadata\n"
        "from apr_dist.apr.writer import AprWriter\n"
        "with AprWriter(Path(sys.argv[1]), metadata=AprMetadata(), tensors=[]):\n"
        "    print(len(os.listdir(os.path.dirname(sys.argv[1]))))\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    signal.pause()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "x.apr")], capture_output=True, text=True, check=False
    )
    assert done.stdout == "1\n"
    assert "KeyboardInterrupt" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [DType.F64, DType.I32, DType.U8, DType.Q4_K, DType.APR_Q4, DType.APR_Q8])
def test_a_new_file_holds_only_types_that_every_reader_understands(tmp_path: Path, dtype: DType) -> None:
    with pytest.raises(OutputError, match=dtype.name):
        AprWriter(tmp_path / "x.apr", metadata=AprMetadata(), tensors=[TensorSpec("w", dtype, (256,))])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["", "a\0b", "a\nb", "n" * 257, "\ud800"])
def test_a_name_that_no_reader_should_meet_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(OutputError, match="tensor name"):
        AprWriter(tmp_path / "x.apr", metadata=AprMetadata(), tensors=[TensorSpec(name, DType.F32, (1,))])


def test_tensors_announced_twice_or_too_deep_are_refused(tmp_path: Path) -> None:
    for specs in ([TensorSpec("w", DType.F32, (1,))] * 2, [TensorSpec("w", DType.F32, (1,) * 9)]):
        with pytest.raises(OutputError, match="'w'"):
            AprWriter(tmp_path / "x.apr", metadata=AprMetadata(), tensors=specs)


def test_metadata_beyond_the_limit_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="metadata is"):
        write_apr(tmp_path / "x.apr", {}, {"x": "y" * (16 << 20)})
    assert list(tmp_path.iterdir()) == []


def test_flags_are_written_as_given(tmp_path: Path) -> None:
    path = write_apr(tmp_path / "x.apr", {}, flags=Flag.ROW_MAJOR | Flag.HAS_VOCAB)
    assert AprReader(path).header.flags == Flag.ROW_MAJOR | Flag.HAS_VOCAB
