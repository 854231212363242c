"""``tokenize encode-chat`` from files to rows, against conversations that are rendered by hand."""

from __future__ import annotations

import gzip
import io
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders.chat_rows import rendered, smollm2_words, tiny_chat_model
from builders.runs import once
from builders.tokens import build_tiny_tokenizer, contents

from apr_dist.cli import main
from apr_dist.corpus import encode_chat as encoder
from apr_dist.data.manifest import Manifest

Messages = list[dict[str, Any]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return once(tmp_path_factory.mktemp("model") / "made", lambda one: str(tiny_chat_model(one))) / "chat.apr"  # type: ignore[arg-type,return-value]


def ask(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def say(content: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def small_talk(count: int, *, seed: int = 0, longest: int = 40) -> list[Messages]:
    """Conversations of one to four questions and answers of made-up words."""
    draw = random.Random(seed)
    words = ["the", " cat", " sat", "\n", " on", "a", " mat?", " 12", " yes", ".", "Hello", " ünï", " 你好"]

    def text() -> str:
        return "".join(draw.choice(words) for _ in range(draw.randint(1, longest)))

    return [
        [one for _ in range(draw.randint(1, 4)) for one in (ask(text()), say(text()))] for _ in range(count)
    ]


def write_chats(path: Path, chats: Sequence[Messages]) -> Path:
    path.write_text("".join(json.dumps({"messages": one}) + "\n" for one in chats), "utf-8")
    return path


def encode(model: Path, output: Path, *more: str, corpus: Path | str | None = None) -> int:
    given = ["tokenize", "encode-chat", "--model", str(model), "--output", str(output)]
    given += ["--corpus", str(corpus)] if corpus else []
    return main([*given, *([] if "--seq-length" in more else ["--seq-length", "512"]), *more])


def spans_of(folder: Path) -> list[list[int]]:
    """The words of every conversation in a folder; padding has no target and is left out."""
    found: list[list[int]] = []
    for shard in Manifest.load(folder).shards:
        for word in np.fromfile(folder / shard.file, dtype="<u4").tolist():
            if word // 2**30 % 2:
                found.append([])
            found[-1].append(word)
    return [span for span in found if any(word < 2**31 for word in span)]


@pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-040")
@pytest.mark.parametrize("train_on", ["assistant", "last"])
def test_words_are_those_of_conversations_rendered_by_hand(
    model: Path, tmp_path: Path, train_on: str, capsys: pytest.CaptureFixture[str]
) -> None:
    chats = small_talk(60, longest=25)
    corpus = write_chats(tmp_path / "chats.jsonl", chats)
    assert encode(model, tmp_path / "out", "--train-on", train_on, corpus=corpus) == 0
    assert sorted(spans_of(tmp_path / "out")) == sorted(rendered(one, train_on=train_on) for one in chats)
    assert main(["tokenize", "verify", str(tmp_path / "out")]) == 0
    facts = Manifest.load(tmp_path / "out").conversations
    assert facts is not None
    end = smollm2_words().token_to_id("<|im_end|>")
    answers = sum(len(one) // 2 if train_on == "assistant" else 1 for one in chats)
    assert (facts.turn_end, facts.turn_end_targets) == (end, answers)
    assert f"{facts.targets:,} of {facts.tokens:,} tokens are trained on" in capsys.readouterr().out


def test_the_shapes_of_records_give_the_same_conversation(model: Path, tmp_path: Path) -> None:
    shapes: dict[str, dict[str, Any]] = {
        "messages": {"messages": [ask("Hi there"), say("Hello.")]},
        "parts": {"messages": [ask([{"type": "text", "text": "Hi there"}]), say("Hello.")]},  # type: ignore[arg-type]
        "sharegpt": {
            "conversations": [{"from": "human", "value": "Hi there"}, {"from": "gpt", "value": "Hello."}]
        },
        "alpaca": {"instruction": "Hi there", "input": "", "output": "Hello."},
        "prompt": {"prompt": "Hi there", "completion": "Hello."},
    }
    expected = rendered([ask("Hi there"), say("Hello.")])
    for name, record in shapes.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(record))
        assert encode(model, tmp_path / name, corpus=tmp_path / f"{name}.jsonl") == 0
        assert spans_of(tmp_path / name) == [expected], name


@pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-040")
def test_every_way_to_give_a_corpus_gives_the_same_rows(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow as pa  # noqa: PLC0415
    from backports import zstd  # noqa: PLC0415
    from pyarrow import parquet  # noqa: PLC0415

    chats = small_talk(20)
    lines = write_chats(tmp_path / "chats.jsonl", chats).read_bytes()
    folder = tmp_path / "folder"
    folder.mkdir()
    records = [{"messages": one} for one in chats]
    (tmp_path / "a.json").write_text(json.dumps(records))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "c.jsonl.zst").write_bytes(zstd.compress(lines))
    parquet.write_table(pa.Table.from_pylist(records), tmp_path / "d.parquet")
    (folder / "e.jsonl").write_bytes(lines)
    (folder / "readme.md").write_text("none of it")
    assert encode(model, tmp_path / "out", corpus=tmp_path / "chats.jsonl") == 0
    known = Manifest.load(tmp_path / "out").fingerprint
    for name in ("a.json", "b.jsonl.gz", "c.jsonl.zst", "d.parquet", "folder", "-"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
        corpus = name if name == "-" else tmp_path / name
        assert encode(model, tmp_path / "again", "--force", corpus=corpus) == 0
        assert Manifest.load(tmp_path / "again").fingerprint == known, name


def test_threads_do_not_change_a_byte_and_a_killed_run_goes_on(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = write_chats(tmp_path / "chats.jsonl", small_talk(80))
    split = ("--val-fraction", "0.2", "--shard-tokens", "2000")
    assert encode(model, tmp_path / "one", *split, "--workers", "1", corpus=corpus) == 0
    with monkeypatch.context() as patch:
        patch.setattr(encoder, "write_rows", _killed)
        assert encode(model, tmp_path / "many", *split, "--workers", "3", corpus=corpus) != 0
    assert not (tmp_path / "many" / "train").exists()
    seen: list[int] = []
    rules = encoder.ChatPool.encode_documents
    monkeypatch.setattr(
        encoder.ChatPool, "encode_documents", lambda pool, some: seen.append(len(some)) or rules(pool, some)
    )
    assert encode(model, tmp_path / "many", *split, "--workers", "3", corpus=corpus) == 0
    assert sum(seen) == 0, "what was encoded before the kill was encoded again"
    assert contents(tmp_path / "one") == contents(tmp_path / "many")
    train, held = (spans_of(tmp_path / "one" / name) for name in ("train", "validation"))
    assert len(train) + len(held) == 80
    assert 4 <= len(held) <= 32


def _killed(*_: object) -> None:
    raise MemoryError


def test_the_same_conversation_never_lies_on_both_sides(model: Path, tmp_path: Path) -> None:
    chats = small_talk(30)
    corpus = write_chats(tmp_path / "chats.jsonl", [*chats, *chats])
    assert encode(model, tmp_path / "out", "--val-fraction", "0.3", corpus=corpus) == 0
    train, held = (map(tuple, spans_of(tmp_path / "out" / name)) for name in ("train", "validation"))
    assert not set(train) & set(held)


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        ({"messages": [{"role": "user"}, say("x")]}, "messages[0].content is missing"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role is 'robot'"),
        ({"messages": "Hello"}, "messages is a JSON str"),
        ({"dialogue": []}, "none of the keys of a conversation"),
        ([1], "the record is a JSON list"),
    ],
)
def test_a_bad_record_stops_with_its_place_or_is_counted(
    model: Path, tmp_path: Path, record: object, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = tmp_path / "chats.jsonl"
    good = json.dumps({"messages": [ask("Hi"), say("Hello")]})
    corpus.write_text(f"{good}\n{json.dumps(record)}\n{good}\nnot json\n")
    assert encode(model, tmp_path / "out", corpus=corpus) != 0
    error = capsys.readouterr().err
    assert complaint in error
    assert "chats.jsonl:2" in error
    assert "--skip-bad-records" in error or "encode-corpus" in error
    assert encode(model, tmp_path / "out", "--skip-bad-records", corpus=corpus) == 0
    said = capsys.readouterr().out
    assert "1 record(s) left out: bad conversation" in said
    assert "1 record(s) left out: bad line" in said
    assert len(spans_of(tmp_path / "out")) == 2
    counts = Manifest.load(tmp_path / "out").conversations.counts  # type: ignore[union-attr]
    assert (counts["bad conversation"], counts["bad line"]) == (1, 1)


def test_conversations_without_an_answer_are_counted_and_a_set_of_them_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    silent = [ask("Anybody?")]
    corpus = write_chats(tmp_path / "chats.jsonl", [silent, [ask("Hi"), say("Hello")], silent])
    assert encode(model, tmp_path / "out", corpus=corpus) == 0
    assert Manifest.load(tmp_path / "out").conversations.counts["without targets"] == 2  # type: ignore[union-attr]
    corpus = write_chats(tmp_path / "silent.jsonl", [silent, silent])
    assert encode(model, tmp_path / "none", corpus=corpus) != 0
    assert "without targets" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("too_long", "name"), [("truncate", "truncated"), ("drop", "dropped"), ("split", "split")]
)
def test_what_does_not_fit_is_counted(
    model: Path, tmp_path: Path, too_long: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    chats = [*small_talk(9, longest=2), [ask("Tell me"), say("word " * 300), ask("more"), say("yes")]]
    corpus = write_chats(tmp_path / "chats.jsonl", chats)
    out = tmp_path / "out"
    assert encode(model, out, "--seq-length", "128", "--too-long", too_long, corpus=corpus) == 0
    assert f"  1 {name}\n" in capsys.readouterr().out
    whole = rendered(chats[-1])
    targets = sum(word < 2**31 for one in chats for word in rendered(one))
    if too_long == "drop":
        targets -= sum(word < 2**31 for word in whole)
    elif too_long == "truncate":
        targets -= sum(word < 2**31 for word in whole[128:])
    assert Manifest.load(out).conversations.targets == targets  # type: ignore[union-attr]


def test_a_preview_marks_what_is_trained_on(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = write_chats(tmp_path / "chats.jsonl", [[ask("Hi [x]"), say("Hello"), ask("And?"), say("Bye ü")]])
    assert encode(model, tmp_path / "out", corpus=corpus) == 0
    capsys.readouterr()
    assert main(["tokenize", "preview", str(tmp_path / "out"), "--count", "5"]) == 0
    said = capsys.readouterr().out
    assert "<|im_start|>assistant\n[[Hello<|im_end|>]]\n<|im_start|>user\nAnd?<|im_end|>\n" in said
    assert "[[Bye ü<|im_end|>]]\n" in said
    assert said.count("[[") == 2
    assert main(["tokenize", "preview", str(tmp_path / "out"), "--color"]) == 0
    assert "\033[32mHello<|im_end|>\033[0m" in capsys.readouterr().out
    tokenizer = str(tmp_path / "tokenizer")
    assert main(["tokenize", "import-hf", str(model), "-o", tokenizer]) == 0
    assert main(["tokenize", "decode", str(tmp_path / "out"), "--tokenizer", tokenizer]) == 0
    assert "<|im_start|>user\nHi [x]<|im_end|>\n" in capsys.readouterr().out
    assert main(["tokenize", "preview", str(tmp_path / "out"), "--count", "0"]) == 2


def test_the_report_shows_three_conversations_of_a_run(model: Path, tmp_path: Path) -> None:
    corpus, run = write_chats(tmp_path / "chats.jsonl", small_talk(12, longest=5)), tmp_path / "run"
    assert encode(model, tmp_path / "out", corpus=corpus) == 0
    run.mkdir()
    (run / "config.yaml").write_text(f"dataset: {tmp_path / 'out'}\nnum_steps: 1\n")
    (run / "metrics.jsonl").write_text("")
    assert main(["report", str(run), "--output", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert page.count("tokens trained on</h3>") == 3
    assert page.count("&lt;|im_end|&gt;</mark>") >= 3
    assert "<mark>&lt;|im_start|&gt;" not in page


def test_plain_encoding_points_to_the_verb_for_conversations(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import pyarrow as pa  # noqa: PLC0415
    from pyarrow import parquet  # noqa: PLC0415

    chats, tokenizer = small_talk(5), build_tiny_tokenizer(tmp_path / "tokenizer")
    write_chats(tmp_path / "a.jsonl", chats)
    parquet.write_table(pa.Table.from_pylist([{"messages": one} for one in chats]), tmp_path / "b.parquet")
    for name in ("a.jsonl", "b.parquet"):
        given = ["--corpus", str(tmp_path / name), "--tokenizer", str(tokenizer)]
        assert main(["tokenize", "encode-corpus", *given, "--output", str(tmp_path / "out")]) != 0
        assert "apr-dist tokenize encode-chat" in capsys.readouterr().err


def test_a_model_without_a_template_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = write_chats(tmp_path / "chats.jsonl", small_talk(2))
    assert encode(tmp_path / "none.apr", tmp_path / "out", corpus=corpus) != 0
    assert "none.apr" in capsys.readouterr().err
    assert encode(tmp_path / "none.apr", tmp_path / "out", "--today", "soon", corpus=corpus) == 2
    assert "--today" in capsys.readouterr().err
