"""A killed encoding goes on to the same bytes, keeps what it had, and takes bounded memory."""

from __future__ import annotations

import io
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from builders.tokens import DOCUMENT_END, build_tiny_tokenizer, contents, ids_of, write_jsonl

from apr_dist.corpus.decode import decode_documents
from apr_dist.corpus.encode import EncodeProgress, encode_corpus
from apr_dist.data.verification import verify_dataset
from apr_dist.errors import OutputError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_tokenizer(tmp_path_factory.mktemp("resume") / "tok")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """JSONL of 300 documents of every size, some empty of words, some of several scripts."""
    pieces = ["def f(x):\n", "    return x + 1\n", "é世界🎉", "\n\n", f" {DOCUMENT_END} ", "0123456789 "]
    texts = [f"{one}" + pieces[one % 6] * (one * 7 % 50) for one in range(300)]
    return write_jsonl(tmp_path / "corpus.jsonl", texts)


KILLED_RUN = """
import os, signal, sys
from pathlib import Path
from apr_dist.corpus import encoding_run, journal
from apr_dist.corpus.encode import encode_corpus

corpus, tokenizer, output, when = sys.argv[1:]
left = [int(when)]

def after_each(cls, name):
    original = getattr(cls, name)
    def counted(*arguments, **named):
        result = original(*arguments, **named)
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(cls, name, counted)

encoding_run._BATCH_RECORDS = 16
after_each(encoding_run.EncodingRun, "_write")
after_each(journal.Journal, "commit")
after_each(Path, "replace")
encode_corpus(sources=[Path(corpus)], tokenizer=Path(tokenizer), output=Path(output), shard_tokens=600,
              val_fraction=0.2, workers=2, commit_every_s=0.0)
"""


@pytest.mark.parametrize("when", [1, 40, 150, 290, 331, 355])
def test_a_killed_run_goes_on_to_the_same_bytes(
    tokenizer: Path, corpus: Path, tmp_path: Path, when: int
) -> None:
    choices = {"tokenizer": tokenizer, "shard_tokens": 600, "val_fraction": 0.2}
    encode_corpus(sources=[corpus], output=tmp_path / "whole", **choices)  # type: ignore[arg-type]
    for moment in (when, 25):  # killed again while it goes on
        arguments = [str(corpus), str(tokenizer), str(tmp_path / "out"), str(moment)]
        run = subprocess.run([sys.executable, "-c", KILLED_RUN, *arguments], check=False, capture_output=True)
        if run.returncode == 0:
            break
        assert run.returncode == -signal.SIGKILL, run.stderr.decode()
        assert not (tmp_path / "out/train/manifest.json").exists() or when > 300
    else:
        encode_corpus(sources=[corpus], output=tmp_path / "out", **choices)  # type: ignore[arg-type]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


class BrokenOff(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize("replacing", [False, True])
def test_a_run_broken_off_at_any_move_into_place_goes_on(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replacing: bool
) -> None:
    corpus = write_jsonl(tmp_path / "a.jsonl", [f"text {one}" for one in range(40)])
    choices = {"tokenizer": tokenizer, "shard_tokens": 120, "val_fraction": 0.3}
    encode_corpus(sources=[corpus], output=tmp_path / "whole", **choices)  # type: ignore[arg-type]
    moves = 0
    replace = Path.replace

    def break_off(path: Path, target: Path) -> Path:
        nonlocal moves
        if path.parent.parent.name == ".encoding" and not path.name.endswith((".part", ".tmp")):
            moves += 1
            if moves == stop_at:
                raise BrokenOff
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", break_off)
    for stop_at in range(1, 100, 3 if replacing else 2):
        moves = -1000
        output = tmp_path / str(stop_at)
        if replacing:
            encode_corpus(sources=[corpus], tokenizer=tokenizer, output=output, shard_tokens=40)
        moves = 0
        try:
            encode_corpus(sources=[corpus], output=output, overwrite=replacing, **choices)  # type: ignore[arg-type]
        except BrokenOff:
            encode_corpus(sources=[corpus], output=output, **choices)  # type: ignore[arg-type]
            assert contents(output) == contents(tmp_path / "whole")
        else:
            break
    assert stop_at > 8


def interrupt(tokenizer: Path, corpus: Path, output: Path, **choices: object) -> None:
    """Encode until the first progress call breaks it off."""

    class Stop(Exception):
        pass

    def stop(_: EncodeProgress) -> None:
        raise Stop

    with pytest.raises(Stop):
        encode_corpus(sources=[corpus], tokenizer=tokenizer, output=output, progress=stop, **choices)  # type: ignore[arg-type]


def test_finished_work_is_kept_when_a_run_goes_on(tokenizer: Path, corpus: Path, tmp_path: Path) -> None:
    interrupt(tokenizer, corpus, tmp_path / "out", shard_tokens=600)
    summary = encode_corpus(sources=[corpus], tokenizer=tokenizer, output=tmp_path / "out", shard_tokens=600)
    assert summary.resumed_tokens == summary.tokens
    encode_corpus(sources=[corpus], tokenizer=tokenizer, output=tmp_path / "whole", shard_tokens=600)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_an_interrupted_run_is_not_mixed_with_another_configuration(
    tokenizer: Path, corpus: Path, tmp_path: Path
) -> None:
    interrupt(tokenizer, corpus, tmp_path / "out", shard_tokens=600)
    with pytest.raises(OutputError, match=r"another configuration lies there \(shard_tokens differ"):
        encode_corpus(sources=[corpus], tokenizer=tokenizer, output=tmp_path / "out", shard_tokens=601)
    write_jsonl(corpus, ["changed"])
    with pytest.raises(OutputError, match=r"corpus\.jsonl is another than it was"):
        encode_corpus(sources=[corpus], tokenizer=tokenizer, output=tmp_path / "out", shard_tokens=600)
    encode_corpus(
        sources=[corpus], tokenizer=tokenizer, output=tmp_path / "out", shard_tokens=600, overwrite=True
    )
    assert [one.text for one in decode_documents(tmp_path / "out")] == ["changed"]
    assert verify_dataset(tmp_path / "out").ok
    assert [path.name for path in (tmp_path / "out").glob("*.bin")] == ["shard-00000.bin"]


def test_two_processes_do_not_write_one_output(tokenizer: Path, corpus: Path, tmp_path: Path) -> None:
    refused: list[str] = []

    def second(_: EncodeProgress) -> None:
        with pytest.raises(OutputError, match="another process") as caught:
            encode_corpus(sources=[corpus], tokenizer=tokenizer, output=tmp_path / "out")
        refused.append(str(caught.value))

    encode_corpus(sources=[corpus], tokenizer=tokenizer, output=tmp_path / "out", progress=second)
    assert refused


def test_standard_input_is_encoded_and_never_resumed(
    tokenizer: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Input:
        """What ``sys.stdin`` is to a reader of bytes."""

        def __init__(self, path: Path) -> None:
            self.buffer = io.BytesIO(path.read_bytes())

    other = write_jsonl(tmp_path / "other.jsonl", ["another document"] * 20)
    monkeypatch.setattr(sys, "stdin", Input(other))
    interrupt(tokenizer, Path("-"), tmp_path / "out")
    monkeypatch.setattr(sys, "stdin", Input(corpus))
    summary = encode_corpus(sources=[Path("-")], tokenizer=tokenizer, output=tmp_path / "out")
    assert summary.resumed_tokens == 0
    encode_corpus(sources=[corpus], tokenizer=tokenizer, output=tmp_path / "file")
    assert ids_of(tmp_path / "out") == ids_of(tmp_path / "file")


MEASURED_RUN = """
import json, sys
from pathlib import Path
from apr_dist.corpus.encode import encode_corpus

folder, tokenizer, megabytes = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
line = json.dumps({"content": "some words of one document\\n" * 200}) + "\\n"
with (folder / "corpus.jsonl").open("w") as file:
    for _ in range(megabytes * 1_000_000 // len(line)):
        file.write(line)
encode_corpus(sources=[folder / "corpus.jsonl"], tokenizer=tokenizer, output=folder / "out", workers=2)
# Not ru_maxrss: that begins with what the process that started this one held.
peak = next(one for one in open("/proc/self/status") if one.startswith("VmHWM"))
print(int(peak.split()[1]) // 1024)
"""


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path, tokenizer: Path) -> None:
    peaks = []
    for megabytes in (4, 24):
        folder = tmp_path / str(megabytes)
        folder.mkdir()
        arguments = [str(folder), str(tokenizer), str(megabytes)]
        run = subprocess.run(
            [sys.executable, "-c", MEASURED_RUN, *arguments], check=True, capture_output=True
        )
        peaks.append(int(run.stdout))
    assert peaks[1] < 500
    assert peaks[1] - peaks[0] < 40
