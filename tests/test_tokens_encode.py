"""Encoding a corpus: the same bytes however it is done, nothing lost in silence, killed runs go on."""

from __future__ import annotations

import json
import os
import unicodedata
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders.tokens import DOCUMENT_END, build_tiny_tokenizer, contents, ids_of, small_sources, write_jsonl
from tokenizers import Tokenizer

from apr_dist.corpus import encoding_pool
from apr_dist.corpus.decode import decode_documents
from apr_dist.corpus.encode import EncodeProgress, EosPolicy, Normalization, encode_corpus
from apr_dist.corpus.encoding_pool import EncodingPool, cut
from apr_dist.corpus.sources import Problem
from apr_dist.corpus.tokenizer import LoadedTokenizer, load_tokenizer
from apr_dist.data import Manifest
from apr_dist.errors import CorpusError, OutputError, TokenizerError, UsageError
from apr_dist.interop.pretokenizers import PRE_TOKENIZERS


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_tokenizer(tmp_path_factory.mktemp("encode") / "tok")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """JSONL of 300 documents of every size, some empty of words, some of several scripts."""
    pieces = ["def f(x):\n", "    return x + 1\n", "é世界🎉", "\n\n", f" {DOCUMENT_END} ", "0123456789 "]
    texts = [f"{one}" + pieces[one % 6] * (one * 7 % 50) for one in range(300)]
    return write_jsonl(tmp_path / "corpus.jsonl", texts)


def texts_of(corpus: Path) -> list[str]:
    return [json.loads(line)["content"] for line in corpus.read_text("utf-8").splitlines()]


@pytest.mark.parametrize("policy", EosPolicy)
def test_shards_hold_the_documents_with_end_ids_where_the_policy_puts_them(
    tokenizer: Path, corpus: Path, tmp_path: Path, policy: EosPolicy
) -> None:
    encode_corpus(
        sources=[corpus], tokenizer=tokenizer, output=tmp_path / "out", shard_tokens=700, eos_policy=policy
    )
    loaded = load_tokenizer(tokenizer)
    end = loaded.identity.eos_id
    expected: list[int] = []
    for number, text in enumerate(texts_of(corpus)):
        if policy is EosPolicy.BETWEEN and number:
            expected.append(int(end or 0))
        expected += loaded.encode(text).tolist()
        if policy is EosPolicy.AFTER:
            expected.append(int(end or 0))
    assert ids_of(tmp_path / "out") == expected
    count = {EosPolicy.NONE: 0, EosPolicy.BETWEEN: 299, EosPolicy.AFTER: 300}[policy]
    assert expected.count(int(end or 0)) == count
    manifest = Manifest.load(tmp_path / "out")
    assert manifest.total_documents == 300
    assert manifest.eos_token_id == (None if policy is EosPolicy.NONE else end)


def test_documents_come_back_as_text(tokenizer: Path, corpus: Path, tmp_path: Path) -> None:
    encode_corpus(sources=[corpus], tokenizer=tokenizer, output=tmp_path / "out", shard_tokens=500)
    found = list(decode_documents(tmp_path / "out"))
    assert [one.text for one in found] == texts_of(corpus)
    assert [one.number for one in found] == list(range(300))


def test_a_shard_closes_after_the_document_that_reaches_its_limit(
    tokenizer: Path, corpus: Path, tmp_path: Path
) -> None:
    encode_corpus(sources=[corpus], tokenizer=tokenizer, output=tmp_path / "out", shard_tokens=700)
    manifest = Manifest.load(tmp_path / "out")
    assert [shard.file for shard in manifest.shards] == [
        f"shard-{one:05}.bin" for one in range(len(manifest.shards))
    ]
    for shard in manifest.shards[:-1]:
        assert shard.tokens >= 700
        assert manifest.document_starts(shard)[-1] < 700
    assert manifest.shards[-1].tokens > 0


@pytest.mark.parametrize("workers", [2, 5])
def test_the_result_does_not_depend_on_the_number_of_workers(
    tokenizer: Path, corpus: Path, tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, count in (("one", 1), ("many", workers)):
        encode_corpus(
            sources=[corpus, *small_sources(10)],
            tokenizer=tokenizer,
            output=tmp_path / name,
            shard_tokens=900,
            val_fraction=0.3,
            workers=count,
        )
        monkeypatch.setattr(encoding_pool, "CALL_CHARACTERS", 500)  # other batches, other cuts
        monkeypatch.setattr("apr_dist.corpus.encoding_run.CALL_CHARACTERS", 500)
    assert contents(tmp_path / "one") == contents(tmp_path / "many")


def test_no_document_is_on_both_sides_of_the_split(tokenizer: Path, tmp_path: Path) -> None:
    texts = [f"document {one % 100}" for one in range(400)]  # each one four times
    corpus = write_jsonl(tmp_path / "a.jsonl", texts)
    encode_corpus(sources=[corpus], tokenizer=tokenizer, output=tmp_path / "out", val_fraction=0.25)
    sides = {
        part: Counter(one.text for one in decode_documents(tmp_path / "out" / part))
        for part in ("train", "validation")
    }
    assert not sides["train"].keys() & sides["validation"].keys()
    assert sides["train"] + sides["validation"] == Counter(texts)
    assert 10 <= len(sides["validation"]) <= 45
    assert not (tmp_path / "out/manifest.json").exists()


def test_what_is_no_document_is_counted_and_shown(tokenizer: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["one", "two", ""])
    path.write_text(path.read_text() + '{bad\n{"body": "x"}\n{"body": "y"}\n')
    summary = encode_corpus(sources=[path], tokenizer=tokenizer, output=tmp_path / "out")
    assert summary.problems == {Problem.BAD_LINE: 1, Problem.MISSING_KEY: 2, Problem.EMPTY: 1}
    assert summary.documents == 2
    assert any("a.jsonl:5: missing key" in example for example in summary.examples)
    counts = Manifest.load(tmp_path / "out").source["counts"]
    assert counts == {"bad line": 1, "missing key": 2, "empty": 1}


def test_strict_stops_at_the_first_bad_line_with_file_and_line(tokenizer: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["one"])
    path.write_text(path.read_text() + "{bad\n")
    with pytest.raises(CorpusError, match=r"a\.jsonl:2: bad line"):
        encode_corpus(sources=[path], tokenizer=tokenizer, output=tmp_path / "out", strict=True)
    assert not list((tmp_path / "out").glob("*.json"))


def test_bytes_the_vocabulary_lacks_are_counted_not_dropped_in_silence(
    tokenizer: Path, tmp_path: Path
) -> None:
    recorded = json.loads((tokenizer / "tokenizer.json").read_text("utf-8"))
    model = recorded["model"]
    del model["vocab"]["č"]  # the spelling of the carriage return
    model["merges"] = [merge for merge in model["merges"] if "č" not in "".join(merge)]
    model["vocab"] = {token: one for token, one in model["vocab"].items() if "č" not in token}
    (tmp_path / "tok").mkdir()
    (tmp_path / "tok/tokenizer.json").write_text(json.dumps(recorded), "utf-8")
    path = write_jsonl(tmp_path / "a.jsonl", ["fine", "not\r\nfine\r"])
    summary = encode_corpus(sources=[path], tokenizer=tmp_path / "tok", output=tmp_path / "out")
    assert (summary.lossy_documents, summary.lost_bytes) == (1, 2)
    assert "a.jsonl:2: 2 bytes" in summary.examples[0]
    with pytest.raises(CorpusError, match=r"a\.jsonl:2"):
        encode_corpus(sources=[path], tokenizer=tmp_path / "tok", output=tmp_path / "strict", strict=True)


def test_text_is_rewritten_only_when_asked(tokenizer: Path, tmp_path: Path) -> None:
    text = "cafe\u0301 \u2126"
    path = write_jsonl(tmp_path / "a.jsonl", [text])
    for normalization, expected in (
        (Normalization.NONE, text),
        (Normalization.NFC, unicodedata.normalize("NFC", text)),
    ):
        output = tmp_path / normalization.value
        encode_corpus(sources=[path], tokenizer=tokenizer, output=output, normalization=normalization)
        assert next(decode_documents(output)).text == expected


def test_long_texts_are_cut_where_it_changes_nothing(
    tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "\n".join(path.read_text("utf-8") for path in small_sources(6))
    loaded = load_tokenizer(tokenizer)
    whole = loaded.encode(text)
    monkeypatch.setattr(encoding_pool, "CALL_CHARACTERS", 1000)
    pieces = list(cut(text))
    assert len(pieces) > 10
    assert "".join(pieces) == text
    pool = EncodingPool(loaded, workers=1, normalization=Normalization.NONE)
    assert pool.encode([text, "short"])[0].ids.tolist() == whole.tolist()


def edit_tokenizer(folder: Path, target: Path, change: Callable[[dict[str, Any]], None]) -> LoadedTokenizer:
    """The tokenizer of ``folder`` with its JSON changed, opened."""
    recorded = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    change(recorded)
    target.mkdir()
    (target / "tokenizer.json").write_text(json.dumps(recorded), "utf-8")
    return load_tokenizer(target)


def _merge_over_newlines(recorded: dict[str, Any]) -> None:
    recorded["model"]["vocab"]["t\u010a"] = 9001
    recorded["model"]["merges"].insert(0, ["t", "\u010a"])


def _without_a_pattern(recorded: dict[str, Any]) -> None:
    _merge_over_newlines(recorded)
    recorded["pre_tokenizer"] = {**BYTES, "use_regex": False}


def _space_in_front(recorded: dict[str, Any]) -> None:
    recorded["pre_tokenizer"] = {**BYTES, "add_prefix_space": True}


def _joined_lines(recorded: dict[str, Any]) -> None:
    _merge_over_newlines(recorded)
    split = {"type": "Split", "pattern": {"Regex": r"\w+\n?|\W"}, "behavior": "Isolated", "invert": False}
    recorded["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [split, {**BYTES, "use_regex": False}],
    }


def _token_with_a_newline(recorded: dict[str, Any]) -> None:
    recorded["added_tokens"].append(ADDED | {"content": "import\n", "id": 9000})


def _token_that_takes_what_follows(recorded: dict[str, Any]) -> None:
    recorded["added_tokens"].append(ADDED | {"content": "import", "id": 9000, "rstrip": True})


def _stripped(recorded: dict[str, Any]) -> None:
    recorded["normalizer"] = {"type": "Strip", "strip_left": True, "strip_right": True}


@pytest.mark.parametrize("family", sorted(PRE_TOKENIZERS))
def test_long_texts_of_every_known_family_are_cut(family: str, tokenizer: Path, tmp_path: Path) -> None:
    def as_family(recorded: dict[str, Any]) -> None:
        steps = [dict(step) for step in PRE_TOKENIZERS[family].steps]
        recorded["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
        recorded["normalizer"] = {"type": "NFC"} if PRE_TOKENIZERS[family].nfc else None

    assert edit_tokenizer(tokenizer, tmp_path / "changed", as_family).cuttable


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
ADDED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}


@pytest.mark.parametrize(
    "change",
    [
        _without_a_pattern,
        _space_in_front,
        _joined_lines,
        _token_with_a_newline,
        _token_that_takes_what_follows,
        _stripped,
    ],
)
def test_long_texts_are_not_cut_where_it_would_change_something(
    change: Callable[[dict[str, Any]], None],
    tokenizer: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded = edit_tokenizer(tokenizer, tmp_path / "changed", change)
    text = "from a import\n\n  b\nimport\nword\n" * 200
    monkeypatch.setattr(encoding_pool, "CALL_CHARACTERS", 100)
    apart = np.concatenate([loaded.encode(piece) for piece in cut(text)])
    assert apart.tolist() != loaded.encode(text).tolist(), "or it might have been cut"
    pool = EncodingPool(loaded, workers=1, normalization=Normalization.NONE)
    assert pool.encode([text])[0].ids.tolist() == loaded.encode(text).tolist()


def test_a_limit_stops_after_the_document_that_reaches_it(
    tokenizer: Path, corpus: Path, tmp_path: Path
) -> None:
    summary = encode_corpus(sources=[corpus], tokenizer=tokenizer, output=tmp_path / "out", limit_tokens=1000)
    encode_corpus(sources=[corpus], tokenizer=tokenizer, output=tmp_path / "all")
    limited, whole = ids_of(tmp_path / "out"), ids_of(tmp_path / "all")
    assert limited == whole[: len(limited)]
    manifest = Manifest.load(tmp_path / "out")
    assert manifest.document_starts(manifest.shards[0])[-1] < 1000 <= summary.tokens < len(whole)


def test_progress_ends_at_everything(tokenizer: Path, corpus: Path, tmp_path: Path) -> None:
    seen: list[EncodeProgress] = []
    summary = encode_corpus(
        sources=[corpus], tokenizer=tokenizer, output=tmp_path / "out", progress=seen.append
    )
    last = seen[-1]
    assert (last.documents, last.tokens) == (summary.documents, summary.tokens)
    assert last.bytes_done == last.bytes_total == corpus.stat().st_size
    assert last.eta_s == 0
    assert last.tokens_per_s > 0


def test_the_source_list_stands_beside_the_shards(tokenizer: Path, tmp_path: Path) -> None:
    paths = [write_jsonl(tmp_path / f"{name}.jsonl", [name]) for name in "ab"]
    encode_corpus(sources=paths, tokenizer=tokenizer, output=tmp_path / "out")
    listed = [json.loads(line) for line in (tmp_path / "out/sources.jsonl").read_text().splitlines()]
    assert listed == [{"path": str(path), "bytes": path.stat().st_size} for path in paths]
    assert Manifest.load(tmp_path / "out").source["files"] == 2


def test_a_corpus_without_a_document_leaves_no_data_set(tokenizer: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["x"], key="body")
    with pytest.raises(CorpusError, match=r"no document.*1 x missing key.*--text-key"):
        encode_corpus(sources=[path], tokenizer=tokenizer, output=tmp_path / "out")
    assert not list((tmp_path / "out").glob("*"))


def test_a_split_that_gets_no_document_is_refused(tokenizer: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["x"])
    with pytest.raises(CorpusError, match="no document fell to the validation part"):
        encode_corpus(sources=[path], tokenizer=tokenizer, output=tmp_path / "out", val_fraction=0.001)


def test_an_existing_data_set_is_replaced_only_when_asked(tokenizer: Path, tmp_path: Path) -> None:
    first = write_jsonl(tmp_path / "a.jsonl", ["first"] * 50)
    second = write_jsonl(tmp_path / "b.jsonl", ["second"])
    output = tmp_path / "out"
    encode_corpus(sources=[first], tokenizer=tokenizer, output=output, shard_tokens=10)
    before = contents(output)
    with pytest.raises(OutputError, match="--force"):
        encode_corpus(sources=[second], tokenizer=tokenizer, output=output)
    assert contents(output) == before
    (output / "notes.txt").write_text("mine")
    encode_corpus(sources=[second], tokenizer=tokenizer, output=output, overwrite=True)
    assert [one.text for one in decode_documents(output)] == ["second"]
    names = {path.name for path in output.iterdir()}
    assert names == {"manifest.json", "sources.jsonl", "notes.txt"} | {
        f"shard-00000.{suffix}" for suffix in ("bin", "idx", "docs")
    }


def test_another_layout_does_not_leave_the_old_one_readable(tokenizer: Path, tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "a.jsonl", [f"text {one}" for one in range(50)])
    output = tmp_path / "out"
    encode_corpus(sources=[corpus], tokenizer=tokenizer, output=output, val_fraction=0.3)
    encode_corpus(sources=[corpus], tokenizer=tokenizer, output=output, overwrite=True)
    assert not list(output.glob("*/manifest.json"))
    encode_corpus(sources=[corpus], tokenizer=tokenizer, output=output, overwrite=True, val_fraction=0.3)
    assert not (output / "manifest.json").exists()
    assert not list(output.glob("shard-*"))


@pytest.mark.parametrize(
    "change",
    [{"shard_tokens": 0}, {"val_fraction": 1.0}, {"val_fraction": -0.1}, {"workers": 0}, {"limit_tokens": 0}],
)
def test_numbers_out_of_range_are_refused(
    tokenizer: Path, corpus: Path, tmp_path: Path, change: dict[str, int]
) -> None:
    with pytest.raises(UsageError, match="--"):
        encode_corpus(sources=[corpus], tokenizer=tokenizer, output=tmp_path / "out", **change)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_a_folder_is_refused(tokenizer: Path, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="a file stands there"):
        encode_corpus(sources=[corpus], tokenizer=tokenizer, output=tmp_path / "file")
    with pytest.raises(OutputError, match="cannot be written"):
        encode_corpus(sources=[corpus], tokenizer=tokenizer, output=tmp_path / "file" / "below")


def test_a_tokenizer_without_document_end_needs_the_policy_none(corpus: Path, tmp_path: Path) -> None:
    recorded = json.loads((build_tiny_tokenizer(tmp_path / "a") / "tokenizer.json").read_text("utf-8"))
    recorded["added_tokens"] = []
    recorded["model"]["vocab"]["<|other|>"] = recorded["model"]["vocab"].pop(DOCUMENT_END)
    (tmp_path / "tok").mkdir()
    (tmp_path / "tok/tokenizer.json").write_text(json.dumps(recorded), "utf-8")
    with pytest.raises(TokenizerError, match="--eos-policy none"):
        encode_corpus(sources=[corpus], tokenizer=tmp_path / "tok", output=tmp_path / "out")
    encode_corpus(
        sources=[corpus], tokenizer=tmp_path / "tok", output=tmp_path / "out", eos_policy=EosPolicy.NONE
    )


def test_the_parallelism_setting_of_the_caller_is_given_back(
    tokenizer: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, setting in enumerate(("true", None)):
        if setting is None:
            monkeypatch.delenv("TOKENIZERS_PARALLELISM")
        else:
            monkeypatch.setenv("TOKENIZERS_PARALLELISM", setting)
        encode_corpus(sources=[corpus], tokenizer=tokenizer, output=tmp_path / str(number))
        assert os.environ.get("TOKENIZERS_PARALLELISM") == setting


def test_a_tokenizer_that_is_not_byte_level_is_encoded_whole(tmp_path: Path) -> None:
    recorded = json.loads((build_tiny_tokenizer(tmp_path / "a") / "tokenizer.json").read_text("utf-8"))
    recorded["pre_tokenizer"] = {"type": "WhitespaceSplit"}
    (tmp_path / "tok").mkdir()
    (tmp_path / "tok/tokenizer.json").write_text(json.dumps(recorded), "utf-8")
    loaded = load_tokenizer(tmp_path / "tok")
    assert not loaded.cuttable
    assert loaded.unencodable == b""
    assert isinstance(loaded.tokenizer, Tokenizer)
