"""Reading a corpus: order, formats, compression, and a record for everything that is no document."""

from __future__ import annotations

import gzip
import importlib.util
import io
import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from builders.tokens import build_tiny_tokenizer, write_jsonl

from apr_dist.corpus import formats, recognition
from apr_dist.corpus.encode import encode_corpus
from apr_dist.corpus.sources import (
    STDIN,
    BadRecord,
    CorpusReader,
    Problem,
    documents,
    list_sources,
    standard_library_sources,
)
from apr_dist.errors import CorpusError

needs_pyarrow = pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="needs pyarrow")


def read_all(*paths: Path, text_key: str | None = None) -> list[str | tuple[Problem, int]]:
    """Texts of documents, and problem with line of everything else."""
    reader = CorpusReader(list_sources(paths).files, text_key=text_key)
    return [(one.problem, one.line) if isinstance(one, BadRecord) else one.text for _, one in reader]


def zstd_compress(content: bytes) -> bytes:
    return recognition._zstd().compress(content)  # type: ignore[no-any-return]


def test_a_folder_is_read_in_path_order_at_any_depth(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.txt", "a/b/c.txt", "a.txt", "c.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"content": name}) if name.endswith("jsonl") else name)
    (tmp_path / "ignored.bin").write_text("no corpus")
    assert read_all(tmp_path) == ["a/b/c.txt", "a/z.txt", "a.txt", "b.txt", "c.jsonl"]


def test_globs_choose_the_files_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/code.py").write_text("x = 1\n")
    (tmp_path / "notes.txt").write_text("no")
    found = [document.text for document in documents([tmp_path], globs=["*.py"])]
    assert found == ["x = 1\n"]


def test_a_folder_without_a_match_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "code.rs").touch()
    with pytest.raises(CorpusError, match=r"holds \.rs.*--glob"):
        list_sources([tmp_path])


def test_a_missing_path_and_a_file_named_twice_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="cannot be read"):
        list_sources([tmp_path / "absent.jsonl"])
    path = write_jsonl(tmp_path / "a.jsonl", ["x"])
    with pytest.raises(CorpusError, match="twice"):
        list_sources([path, tmp_path])
    with pytest.raises(CorpusError, match="no file"):
        list_sources([])


def test_plain_files_keep_every_character(tmp_path: Path) -> None:
    text = "\ufeffline\r\nnext\rlast\x0c\u2028é\n\n"
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert read_all(tmp_path / "a.txt") == [text]


def test_what_is_no_document_is_reported_with_its_line(tmp_path: Path) -> None:
    lines = [
        b"\xef\xbb\xbf" + json.dumps({"content": "first"}).encode(),
        b'{"body": "other key"}',
        b"",
        b"   ",
        b"{broken",
        b"[1, 2]",
        b'{"content": 7}',
        b'{"content": null}',
        b'{"content": ""}',
        b'{"content": "\\ud800"}',
        b'{"content": "\xff"}',
        b"[" * 100_000,
        b'{"content": "last"}',
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    assert read_all(tmp_path / "a.jsonl") == [
        "first",
        (Problem.MISSING_KEY, 2),
        (Problem.BAD_LINE, 5),
        (Problem.BAD_LINE, 6),
        (Problem.BAD_LINE, 7),
        (Problem.MISSING_KEY, 8),
        (Problem.EMPTY, 9),
        (Problem.BAD_LINE, 10),
        (Problem.BAD_LINE, 11),
        (Problem.BAD_LINE, 12),
        "last",
    ]


def test_documents_stops_at_the_first_bad_record_with_file_and_line(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["good"])
    path.write_text(path.read_text() + "{bad\n")
    found = documents([path])
    assert next(found).text == "good"
    with pytest.raises(CorpusError, match=r"a\.jsonl:2: bad line: not JSON"):
        next(found)


def test_another_text_key_is_honoured(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["x", "y"], key="body")
    assert read_all(path, text_key="body") == ["x", "y"]
    assert read_all(path) == [(Problem.MISSING_KEY, 1), (Problem.MISSING_KEY, 2)]


def test_a_document_beyond_the_limit_is_reported_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "MAX_DOCUMENT_BYTES", 64)
    path = write_jsonl(tmp_path / "a.jsonl", ["x", "y" * 1000, "z"])
    assert read_all(path) == ["x", (Problem.TOO_LARGE, 2), "z"]
    (tmp_path / "a.txt").write_text("x" * 65)
    assert read_all(tmp_path / "a.txt") == [(Problem.TOO_LARGE, 1)]


def test_reading_from_any_position_gives_the_rest(tmp_path: Path) -> None:
    paths = [write_jsonl(tmp_path / f"{name}.jsonl", [f"{name}{one}" for one in range(4)]) for name in "ab"]
    paths[0].write_text("\n\n{bad\n" + paths[0].read_text())
    sources = list_sources(paths).files
    whole = list(CorpusReader(sources, text_key="content"))
    position = {0: 0, 1: 0}
    for done, (number, _) in enumerate(whole):
        rest = CorpusReader(sources, text_key="content", start_source=number, start_record=position[number])
        assert list(rest) == whole[done:]
        position[number] += 1


def test_the_reader_knows_how_far_it_is(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["x" * 50_000 for _ in range(20)])
    reader = CorpusReader(list_sources([path]).files, text_key="content")
    seen = [reader.bytes_done for _ in reader]
    assert seen == sorted(seen)
    assert 0 < seen[5] < seen[15] <= reader.bytes_done == reader.bytes_total == path.stat().st_size


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_files_read_like_plain_ones(tmp_path: Path, suffix: str) -> None:
    compress = gzip.compress if suffix == ".gz" else zstd_compress
    lines = "".join(json.dumps({"content": f"document {one}"}) + "\n" for one in range(500)).encode()
    (tmp_path / f"a.jsonl{suffix}").write_bytes(compress(lines[:999]) + compress(lines[999:]))
    (tmp_path / f"b.txt{suffix}").write_bytes(compress("é\n".encode()))
    assert read_all(tmp_path) == [*(f"document {one}" for one in range(500)), "é\n"]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "not compressed"])
def test_a_damaged_compressed_file_stops_the_run(tmp_path: Path, suffix: str, damage: str) -> None:
    compress = gzip.compress if suffix == ".gz" else zstd_compress
    texts = "".join(json.dumps({"content": str(one**7)}) + "\n" for one in range(3000)).encode()
    packed = bytearray(compress(texts))
    if damage == "cut":
        packed = packed[: len(packed) - 20]
    elif damage == "flipped":
        packed[len(packed) // 2 : len(packed) // 2 + 40] = b"\xff" * 40
    else:
        packed = bytearray(texts)
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(packed)
    with pytest.raises(CorpusError, match=r"damaged|cannot be read"):
        list(CorpusReader(list_sources([path]).files, text_key="content"))


@needs_pyarrow
def test_parquet_columns_are_documents(tmp_path: Path) -> None:
    import pyarrow  # noqa: PLC0415  (an optional extra)
    from pyarrow import parquet  # noqa: PLC0415

    texts = [f"row {one}" for one in range(200)] + [None, ""]
    table = pyarrow.table({"content": texts, "stars": list(range(202))})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=50)
    assert read_all(tmp_path) == [*texts[:200], (Problem.MISSING_KEY, 201), (Problem.EMPTY, 202)]
    with pytest.raises(CorpusError, match=r"no column 'body'.*content, stars"):
        read_all(tmp_path, text_key="body")
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    with pytest.raises(CorpusError, match="no readable Parquet"):
        read_all(tmp_path)


@pytest.mark.parametrize("package", ["pyarrow", "compression.zstd"])
def test_a_missing_optional_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    for name in ("pyarrow", "compression.zstd", "backports.zstd"):
        monkeypatch.setitem(sys.modules, name, None)
    path = tmp_path / ("a.parquet" if package == "pyarrow" else "a.jsonl.zst")
    path.write_bytes(b"PAR1" if package == "pyarrow" else b"\x28\xb5\x2f\xfd")
    with pytest.raises(CorpusError, match="pip install"):
        read_all(path)


def test_standard_input_is_jsonl(monkeypatch: pytest.MonkeyPatch) -> None:
    class Input:
        buffer = io.BytesIO(b'{"content": "a"}\n{"content": "b"}')

    monkeypatch.setattr(sys, "stdin", Input)
    assert read_all(STDIN) == ["a", "b"]


def test_the_standard_library_is_real_code_without_its_tests() -> None:
    sources = standard_library_sources()
    assert len(sources) > 300
    assert sources == standard_library_sources()
    assert all(path.suffix == ".py" for path in sources)
    assert not {"test", "tests", "site-packages"} & {part for path in sources for part in path.parts[-3:]}
    names = {path.name for path in sources}
    assert {"argparse.py", "dataclasses.py"} <= names
    for path in sources[::25]:
        path.read_bytes().decode()


def test_a_file_of_the_standard_library_that_another_links_to_is_taken_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library, outside = tmp_path / "lib", tmp_path / "settings.py"
    library.mkdir()
    outside.write_text("site = 1\n")
    (library / "b_data.py").write_text("data = 1\n")
    (library / "a_data.py").symlink_to("b_data.py")
    (library / "site.py").symlink_to(outside)
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(library))
    assert standard_library_sources() == [library / "b_data.py", library / "site.py"]


@pytest.mark.parametrize(
    "content",
    [b"", b"not gzip at all", gzip.compress(b'{"content": "a"}' * 99, mtime=0)[:-9]],
    ids=["no documents", "no gzip", "cut short"],
)
def test_a_corpus_that_cannot_be_encoded_leaves_nothing(tmp_path: Path, content: bytes) -> None:
    corpus, output = tmp_path / "a.jsonl.gz", tmp_path / "out"
    corpus.write_bytes(content)
    tokenizer = build_tiny_tokenizer(tmp_path / "tokenizer")
    for existed in (False, True):
        if existed:
            output.mkdir()
        with pytest.raises(CorpusError):
            encode_corpus(sources=[corpus], tokenizer=tokenizer, output=output)
        assert output.exists() is existed
        assert not existed or not list(output.iterdir())


# A child's resource usage would count its parent's memory before exec; VmHWM does not.
PEAK_AT_EXIT = """
import atexit, pathlib, sys
status = pathlib.Path("/proc/self/status")
atexit.register(lambda: print(status.read_text().split("VmHWM:")[1].split()[0]))
from apr_dist.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_the_memory_of_encoding_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    """2 MB and 10 MB of JSONL on standard input, each in a process of its own."""
    tokenizer = build_tiny_tokenizer(tmp_path / "tokenizer")
    line = json.dumps({"content": "abcdefgh " * 11_000}).encode() + b"\n"
    peaks = []
    for megabytes in (2, 10):
        command = [sys.executable, "-c", PEAK_AT_EXIT, "tokenize", "encode-corpus", "--corpus", "-"]
        command += ["--tokenizer", str(tokenizer), "--output", str(tmp_path / str(megabytes))]
        command += ["--shard-tokens", "200000", "--workers", "1"]
        done = subprocess.run(
            command, input=line * (megabytes * 10), stdout=subprocess.PIPE, timeout=300, check=True
        )
        peaks.append(int(done.stdout.split()[-1]) / 1024)
    assert peaks[1] - peaks[0] < 8, peaks  # the ids alone would be 30 MB
    assert peaks[1] < 500
