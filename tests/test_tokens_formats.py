"""A format is recognised by its content or refused; nothing of a corpus is left out without a word."""

from __future__ import annotations

import bz2
import gzip
import importlib.util
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from builders.tokens import build_tiny_tokenizer, ids_of, write_jsonl

from apr_dist.cli import main
from apr_dist.corpus.decode import decode_documents
from apr_dist.corpus.encode import encode_corpus
from apr_dist.corpus.sources import BadRecord, CorpusReader, Problem, list_sources
from apr_dist.corpus.tokenizer import load_tokenizer
from apr_dist.data import Manifest
from apr_dist.errors import CorpusError, OutputError

needs_pyarrow = pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="needs pyarrow")
TEXTS = ["one", "zwei \u00e9", "three\nlines\nlong"]
LINES = "".join(json.dumps({"id": 7, "text": text}) + "\n" for text in TEXTS).encode()


def read_all(*paths: Path, **options: Any) -> list[str | tuple[Problem, int]]:
    reader = CorpusReader(list_sources(paths).files, **options)
    return [(one.problem, one.line) if isinstance(one, BadRecord) else one.text for _, one in reader]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_tokenizer(tmp_path_factory.mktemp("formats") / "tok")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("docs.json.gz", gzip.compress(LINES, mtime=0)),
        ("c4-train.00000-of-01024.json", LINES),
        ("one.json", json.dumps({"text": "whole"}).encode()),
        ("array.json", json.dumps([{"text": text} for text in TEXTS]).encode()),
        ("pretty.json", json.dumps([{"text": text} for text in TEXTS], indent=2).encode()),
        ("docs.jsonl.xz", lzma.compress(LINES)),
        ("docs.ndjson.bz2", bz2.compress(LINES)),
        ("misnamed.jsonl", gzip.compress(LINES, mtime=0)),
        ("UPPER.JSONL", LINES),
        ("mark.json", b"\xef\xbb\xbf" + LINES),
    ],
)
def test_records_are_read_whatever_holds_them(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    expected = ["whole"] if name == "one.json" else TEXTS
    assert read_all(tmp_path / name) == expected
    assert read_all(tmp_path) == expected


@pytest.mark.falsifies("FALSIFY-APR-DIST-LOADER-015")
@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("table.csv", b"id,text\n1,hello\n", r"\.csv table"),
        ("table.tsv.gz", gzip.compress(b"id\ttext\n1\thello\n", mtime=0), r"\.tsv table"),
        ("lines.txt", LINES, "JSON lines"),
        ("lines", LINES, "JSON lines"),
        ("object.json", json.dumps({"text": "x"}, indent=1).encode(), "over several lines"),
        ("number.json", b"7", "a JSON int"),
        ("archive.zip", b"PK\x03\x04\x14\0\0\0\x08\0", "binary"),
        ("pages.pdf", b"%PDF-1.7\n\0\x01", "binary"),
        ("plain.gz", b"plain text", "does not begin as .gz"),
    ],
)
def test_what_is_no_corpus_is_refused(tmp_path: Path, name: str, content: bytes, why: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match=why):
        read_all(tmp_path / name)


def test_a_pipe_is_refused_before_its_beginning_is_lost(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(CorpusError, match=r"no regular file.*--corpus -"):
        list_sources([tmp_path / "pipe.jsonl"])


def test_a_path_that_is_missing_is_refused_also_where_files_may_be_left_out(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"absent\.jsonl: it cannot be read.*check the path"):
        list_sources([tmp_path / "absent.jsonl"], skip_unreadable=True)


@needs_pyarrow
def test_a_folder_is_read_as_far_as_it_can_be_and_the_rest_is_listed(tmp_path: Path) -> None:
    import pyarrow  # noqa: PLC0415  (an optional extra)

    folder, elsewhere = tmp_path / "corpus", tmp_path / "elsewhere"
    (folder / "inner").mkdir(parents=True)
    elsewhere.mkdir()
    write_jsonl(folder / "a.jsonl", ["a"])
    write_jsonl(folder / "b.ndjson", ["b"])
    (folder / "c.json.gz").write_bytes(gzip.compress(b'{"text": "c"}\n'))
    (folder / "d.jsonl.xz").write_bytes(lzma.compress(b'{"text": "d"}\n'))
    table = pyarrow.table({"text": ["e", "f"]})
    with pyarrow.ipc.new_stream(folder / "e.arrow", table.schema) as stream:
        stream.write_table(table)
    with pyarrow.ipc.new_file(folder / "inner/g.feather", table.schema) as blocks:
        blocks.write_table(table)
    write_jsonl(elsewhere / "h.jsonl", ["h"])
    (folder / "linked").symlink_to(elsewhere)
    (folder / "circle").symlink_to(folder)
    (folder / "infos.json").write_text(json.dumps({"a": 1}, indent=1))
    (folder / "README.md").write_text("about")
    (folder / "t.csv").write_text("a,b\n")
    found = list_sources([folder])
    assert [one.text for _, one in CorpusReader(found.files)] == ["a", "b", "c", "d", "e", "f", "e", "f", "h"]  # type: ignore[union-attr]
    assert sorted(path.name for path in found.left_out) == ["README.md", "infos.json", "t.csv"]


@pytest.mark.falsifies("FALSIFY-APR-DIST-LOADER-016")
def test_files_left_out_are_counted_on_the_screen(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["x"])
    for name in ("b.csv", "c.csv"):
        (tmp_path / name).write_text("a,b\n")
    arguments = ["--corpus", str(tmp_path), "--tokenizer", str(tokenizer), "-o", str(tmp_path / "out")]
    assert main(["tokenize", "encode-corpus", *arguments]) == 0
    assert "warning: 2 file(s) left out, such as" in capsys.readouterr().out
    assert Manifest.load(tmp_path / "out").source["files_left_out"] == 2


def test_the_key_of_the_text_is_found_and_said(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "web.jsonl").write_bytes(LINES)
    arguments = ["--corpus", str(tmp_path / "web.jsonl"), "--tokenizer", str(tokenizer)]
    assert main(["tokenize", "encode-corpus", *arguments, "-o", str(tmp_path / "out")]) == 0
    assert "text found under 'text' in 3 record(s)" in capsys.readouterr().out
    assert [one.text for one in decode_documents(tmp_path / "out")] == TEXTS


@pytest.mark.parametrize(
    ("record", "options", "expected"),
    [
        ({"content": "a", "text": "b"}, {}, ["a"]),
        ({"text": "b", "meta": {"text": "c"}}, {"text_key": "meta.text"}, ["c"]),
        ({"meta.text": "d", "meta": {"text": "c"}}, {"text_key": "meta.text"}, ["d"]),
        ({"content": None, "text": "b"}, {}, [(Problem.MISSING_KEY, 1)]),
        ({"text": ["a", "b"]}, {}, [(Problem.BAD_LINE, 1)]),
        ({"meta": "x"}, {"text_key": "meta.text"}, [(Problem.MISSING_KEY, 1)]),
    ],
)
def test_the_text_is_looked_up_by_key(
    tmp_path: Path, record: dict[str, object], options: dict[str, str], expected: list[object]
) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    assert read_all(tmp_path / "a.jsonl", **options) == expected


@pytest.mark.parametrize(
    ("record", "key", "said"),
    [
        (
            {"messages": [{"role": "user"}], "id": 3},
            "messages",
            r"'messages' is a list, not text.*id \(int\)",
        ),
        ({"messages": [], "id": 3}, None, r"no text under 'content or text' \(keys: id \(int\), messages"),
        ({"body": "x"}, "boddy", r"no text under 'boddy' \(keys: body \(str\)"),
        ({"text": {"en": "x"}}, None, r"'text' is a dict, not text"),
        ({}, None, r"keys: none"),
    ],
)
def test_a_corpus_under_another_key_says_which_keys_there_are(
    tmp_path: Path, tokenizer: Path, record: dict[str, object], key: str | None, said: str
) -> None:
    (tmp_path / "chat.jsonl").write_text((json.dumps(record) + "\n") * 400)
    with pytest.raises(CorpusError, match=rf"400 x .*chat\.jsonl:1: .*{said}.*--text-key"):
        encode_corpus(
            sources=[tmp_path / "chat.jsonl"], tokenizer=tokenizer, output=tmp_path / "out", text_key=key
        )


def test_a_hopeless_corpus_is_not_read_to_its_end(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "chat.jsonl").write_text('{"messages": []}\n' * 30_000 + "x" * 10)
    with pytest.raises(CorpusError, match=r"met 10,\d\d\d x missing key;"):
        encode_corpus(sources=[tmp_path / "chat.jsonl"], tokenizer=tokenizer, output=tmp_path / "out")


CHAT = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"


@pytest.fixture(scope="module")
def chat_tokenizer(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    recorded = json.loads((tokenizer / "tokenizer.json").read_text("utf-8"))
    for number, text in enumerate(("<|im_start|>", "<|im_end|>")):
        special = {"id": 512 + number, "content": text, "special": True, "normalized": False}
        recorded["added_tokens"].append({"single_word": False, "lstrip": False, "rstrip": False} | special)
    (folder / "tokenizer.json").write_text(json.dumps(recorded), "utf-8")
    return folder


def test_special_tokens_in_text_are_counted_and_parsed_when_asked(
    tmp_path: Path, chat_tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tokenizers import Tokenizer  # noqa: PLC0415  (the reference of this test)

    corpus = write_jsonl(tmp_path / "chat.jsonl", [CHAT] * 30)
    arguments = ["tokenize", "encode-corpus", "--corpus", str(corpus), "--tokenizer", str(chat_tokenizer)]
    assert main([*arguments, "-o", str(tmp_path / "plain")]) == 0
    assert "warning: 120 special token(s)" in capsys.readouterr().out
    assert not {512, 513} & set(ids_of(tmp_path / "plain"))
    assert main([*arguments, "-o", str(tmp_path / "parsed"), "--parse-special"]) == 0
    assert "special token" not in capsys.readouterr().out
    reference = Tokenizer.from_file(str(chat_tokenizer / "tokenizer.json"))
    expected = reference.encode(CHAT, add_special_tokens=False).ids
    assert expected.count(512) == 2
    assert ids_of(tmp_path / "parsed")[: len(expected)] == expected
    assert Manifest.load(tmp_path / "parsed").source["parse_special"] is True


@pytest.mark.parametrize(
    ("text", "count"),
    [(CHAT, 4), ("no markers", 0), ("<|im_start", 0), ("<|endoftext|>x", 1), ("<|im_end|>" * 5, 5)],
)
def test_special_tokens_are_counted_as_they_stand(chat_tokenizer: Path, text: str, count: int) -> None:
    assert load_tokenizer(chat_tokenizer).count_specials(text) == count


@needs_pyarrow
@pytest.mark.parametrize("wide", [False, True])
def test_a_row_that_is_not_utf8_is_named_and_the_others_are_read(tmp_path: Path, wide: bool) -> None:
    import pyarrow  # noqa: PLC0415  (an optional extra)
    from pyarrow import parquet  # noqa: PLC0415

    raw = pyarrow.array(
        [b"good", b"\xff\xfe", b"\xc3\xa9", None], pyarrow.large_binary() if wide else pyarrow.binary()
    )
    text = raw.view(pyarrow.large_string() if wide else pyarrow.string())
    expected = ["good", (Problem.BAD_LINE, 2), "\u00e9", (Problem.MISSING_KEY, 4)]
    for name, column in (("bytes", raw), ("text", text)):
        parquet.write_table(pyarrow.table({"content": column}), tmp_path / f"{name}.parquet")
        assert read_all(tmp_path / f"{name}.parquet") == expected
    nested = pyarrow.table({"content": pyarrow.array([{"text": "in"}, {"text": None}, None])})
    parquet.write_table(nested, tmp_path / "nested.parquet")
    found = read_all(tmp_path / "nested.parquet", text_key="content.text")
    assert found == ["in", (Problem.MISSING_KEY, 2), (Problem.MISSING_KEY, 3)]


@needs_pyarrow
def test_columns_of_other_types_are_text_or_said_by_their_type(tmp_path: Path) -> None:
    import pyarrow  # noqa: PLC0415  (an optional extra)
    from pyarrow import parquet  # noqa: PLC0415

    deep = pyarrow.array([{"b": {"text": "x"}}])
    columns = {
        "dictionary": (pyarrow.array(["a", "b", "a"]).dictionary_encode(), ["a", "b", "a"]),
        "view": (pyarrow.array(["a", "b"]).cast(pyarrow.string_view()), ["a", "b"]),
        "fixed": (pyarrow.array([b"ab", b"\xff\xfe"], pyarrow.binary(2)), ["ab", (Problem.BAD_LINE, 2)]),
        "lists": (pyarrow.array([["a"], ["b"]]), [(Problem.BAD_LINE, 1), (Problem.BAD_LINE, 2)]),
        "numbers": (pyarrow.array([1, 2]), [(Problem.BAD_LINE, 1), (Problem.BAD_LINE, 2)]),
        "none": (pyarrow.array([], pyarrow.string()), []),
    }
    for name, (column, expected) in columns.items():
        parquet.write_table(pyarrow.table({"text": column}), tmp_path / f"{name}.parquet")
        assert read_all(tmp_path / f"{name}.parquet") == expected, name
    parquet.write_table(pyarrow.table({"a": deep}), tmp_path / "deep.parquet")
    assert read_all(tmp_path / "deep.parquet", text_key="a.b.text") == ["x"]
    parquet.write_table(pyarrow.table({"a.b": ["dotted"]}), tmp_path / "dotted.parquet")
    assert read_all(tmp_path / "dotted.parquet", text_key="a.b") == ["dotted"]
    (bad, *_) = list(CorpusReader(list_sources([tmp_path / "numbers.parquet"]).files))
    assert "'text' is a int, not text (keys: text)" in str(bad[1])


def test_a_path_that_is_not_utf8_is_encoded_and_escaped(tmp_path: Path, tokenizer: Path) -> None:
    folder = tmp_path / "caf\udce9"
    folder.mkdir()
    (folder / "a\udcff.jsonl").write_bytes(LINES + b"{bad\n")
    output = folder / "out"
    summary = encode_corpus(sources=[folder], tokenizer=tokenizer, output=output)
    manifest = Manifest.load(output)
    assert manifest.source["paths"] == [f"{tmp_path}/caf\\xe9"]
    assert json.loads((output / "sources.jsonl").read_text())["path"].endswith("caf\\xe9/a\\xff.jsonl")
    assert "caf\\xe9/a\\xff.jsonl:4: bad line" in summary.examples[0]
    assert main(["tokenize", "verify", str(output)]) == 0


@pytest.mark.parametrize("output", ["shards", ".", "deep/er"])
def test_a_corpus_never_holds_its_own_output(tmp_path: Path, tokenizer: Path, output: str) -> None:
    corpus = tmp_path / "data"
    corpus.mkdir()
    write_jsonl(corpus / "a.jsonl", [f"text {one}" for one in range(30)])
    choices: dict[str, Any] = {"sources": [corpus], "tokenizer": tokenizer, "output": corpus / output}
    (corpus / output).mkdir(parents=True, exist_ok=True)

    def stop(_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode_corpus(**choices, progress=stop, val_fraction=0.3)
    first = encode_corpus(**choices, val_fraction=0.3)
    assert first.resumed_tokens == first.tokens
    with pytest.raises(OutputError, match="--force"):
        encode_corpus(**choices, val_fraction=0.3)
    again = encode_corpus(**choices, overwrite=True, val_fraction=0.3)
    assert again.documents == first.documents == 30
    other = encode_corpus(sources=[corpus], tokenizer=tokenizer, output=tmp_path / "other")
    assert other.documents == 30, "another data set inside the corpus is no corpus either"


def _with_quote(text: str) -> str:
    return text.replace("'", "\u2019", 1)


@pytest.mark.parametrize("change", [str, _with_quote, str.upper])
def test_half_a_surrogate_is_found_wherever_it_stands(tmp_path: Path, change: Callable[[str], str]) -> None:
    text = change("it's " * 1000)
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": text}) + "\n" + json.dumps({"text": text + "\udc80"}) + "\n")
    assert read_all(path) == [text, (Problem.BAD_LINE, 2)]
