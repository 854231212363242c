"""The file verbs against bad paths and sources, a full disk and interruption: error, code, nothing left."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from builders.files import (
    TINY_METADATA,
    open_folder,
    small_disk,
    tiny_tensors,
    unprivileged,
    write_apr,
    write_tokenizer,
)
from builders.runs import Inputs

from apr_dist.apr.reader import AprReader
from apr_dist.cli import main
from apr_dist.errors import ExitCode
from apr_dist.interop.gguf_export import GgufType, export_gguf
from apr_dist.interop.hf_export import export_huggingface
from apr_dist.interop.stamp import stamp_file

OUT = "OUT"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model in every format, things that are no model, and nothing else."""
    monkeypatch.chdir(tmp_path)
    folder = write_tokenizer(tmp_path / "tokenizer")
    bare = write_apr(tmp_path / "bare.apr", tiny_tensors(), TINY_METADATA)
    stamp_file(bare, tmp_path / "x.apr", changes={}, tokenizer=folder)
    export_gguf(tmp_path / "x.apr", tmp_path / "x.gguf", kind=GgufType.F32)
    for name in ("hf", "lacking", "cut"):
        export_huggingface(tmp_path / "x.apr", tmp_path / name, max_shard_bytes=60_000)
    _, second, *_ = sorted((tmp_path / "lacking").glob("*.safetensors"))
    second.unlink()
    _, second, *_ = sorted((tmp_path / "cut").glob("*.safetensors"))
    second.write_bytes(second.read_bytes()[:-100])
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "words.txt").write_text("some words")
    return tmp_path


def listing(folder: Path) -> list[tuple[str, int, int]]:
    """Every path below ``folder`` with its kind and size."""
    paths = sorted(folder.rglob("*"))
    return [(str(path), path.lstat().st_mode, path.lstat().st_size) for path in paths if not path.is_dir()]


REFUSED = {
    "export x.apr --to gguf -o nowhere/x.gguf": (ExitCode.OUTPUT, "create the folder nowhere"),
    "export x.apr --to huggingface -o nowhere/x": (ExitCode.OUTPUT, "create the folder nowhere"),
    "export x.apr --to safetensors -o nowhere/x": (ExitCode.OUTPUT, "create the folder nowhere"),
    "export x.apr --to huggingface -o tokenizer --force": (ExitCode.OUTPUT, "is no model folder"),
    "export x.apr --to huggingface -o hf": (ExitCode.OUTPUT, "exists already"),
    "export x.apr --to gguf -o hf --force": (ExitCode.OUTPUT, "is a folder"),
    "export x.apr --to gguf -o pipe --force": (ExitCode.OUTPUT, "pipe, socket or device"),
    "export x.apr --to gguf -o .": (ExitCode.OUTPUT, "is a folder"),
    "import hf -o .": (ExitCode.OUTPUT, "is a folder"),
    "import hf -o x.apr": (ExitCode.OUTPUT, "exists already"),
    "import tokenizer -o y.apr": (ExitCode.MODEL_FILE, "there is no model here"),
    "import lacking -o y.apr": (ExitCode.MODEL_FILE, "model-00002-of-0000"),
    "import cut -o y.apr": (ExitCode.MODEL_FILE, "truncated"),
    "import pipe -o y.apr": (ExitCode.MODEL_FILE, "not a regular file"),
    "import nothing -o y.apr": (ExitCode.MODEL_FILE, "no such file"),
    "import tokenizer/tokenizer.model -o y.apr": (ExitCode.MODEL_FILE, "Expected a GGUF"),
    "inspect pipe": (ExitCode.MODEL_FILE, "not a regular file"),
    "validate hf": (ExitCode.MODEL_FILE, "is a directory"),
    "diff x.apr hf": (ExitCode.MODEL_FILE, "is a directory"),
    "stamp x.apr --tokenizer hf/nothing -o y.apr": (ExitCode.DATA, "no tokenizer.json"),
    "stamp x.apr --license nonsense! -o y.apr": (ExitCode.USAGE, "SPDX"),
    "export x.apr --to gguf --dtype bf16 -o y.gguf": (ExitCode.USAGE, "f32, f16 or q8_0"),
}


@pytest.mark.parametrize("command", REFUSED)
def test_a_bad_path_is_refused_by_name_and_nothing_changes(
    here: Path, command: str, capfd: pytest.CaptureFixture[str]
) -> None:
    code, words = REFUSED[command]
    before = listing(here)
    assert main(command.split()) == code
    assert words in capfd.readouterr().err
    assert listing(here) == before


DEEP = {
    "tokenize import-hf deep/tokenizer.json -o y": ExitCode.DATA,
    "tokenize encode-corpus --corpus text.txt --tokenizer deep --output y": ExitCode.DATA,
    "tokenize verify deep": ExitCode.DATA,
    "stamp x.apr --tokenizer deep -o y.apr": ExitCode.DATA,
    "report deep": ExitCode.USAGE,
    "verdict deep": ExitCode.USAGE,
    "config check deep/config.yaml": ExitCode.USAGE,
    "plan --config deep/config.yaml": ExitCode.USAGE,
    "plan --mode from-scratch --model deep/config.json": ExitCode.USAGE,
    "import deep -o y.apr": ExitCode.MODEL_FILE,
}
"""Each reads a text nested beyond what its parser can follow."""


@pytest.mark.parametrize("command", DEEP)
def test_a_text_nested_without_end_is_one_more_malformed_text(
    here: Path, command: str, capfd: pytest.CaptureFixture[str]
) -> None:
    (here / "deep").mkdir()
    for name in ("tokenizer.json", "manifest.json", "config.yaml", "config.json", "verdict.json"):
        (here / "deep" / name).write_text('{"a":' * 100_000 + "1" + "}" * 100_000)
    (here / "deep" / "model.safetensors").touch()
    (here / "text.txt").write_text("some text")
    before = listing(here)
    assert main(command.split()) == DEEP[command]
    said = capfd.readouterr().err
    assert "Traceback" not in said
    assert "internal error" not in said
    assert listing(here) == before


LONG = "n" * 300


@pytest.mark.parametrize(
    "command",
    [
        f"export x.apr --to gguf -o {LONG}.gguf",
        f"stamp x.apr --license MIT -o {LONG}.apr",
        f"tokenize verify {LONG}",
        f"tokenize encode-corpus --corpus words.txt --tokenizer tokenizer --output {LONG}",
        f"import {LONG} -o y.apr",
        f"report hf --output {LONG}.html",
        f"plan --init x.apr --synthetic --run-dir {LONG}",
    ],
)
def test_a_name_that_no_file_system_takes_is_no_defect_of_the_program(
    here: Path, command: str, capfd: pytest.CaptureFixture[str]
) -> None:
    before = listing(here)
    assert main(command.split()) == ExitCode.USAGE
    assert "internal error" not in capfd.readouterr().err
    assert listing(here) == before


def test_a_shard_that_is_a_link_to_itself_is_named(
    inputs: Inputs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "looped"
    shutil.copytree(inputs.train, folder)
    shard = min(folder.glob("*.bin"))
    shard.unlink()
    shard.symlink_to(shard.name)
    assert main(["tokenize", "verify", str(folder)]) == ExitCode.DATA
    assert shard.name in capfd.readouterr().err


def test_an_error_nobody_foresaw_is_one_paragraph_and_the_code_of_a_defect(
    here: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_down(*_: object, **__: object) -> None:
        raise ZeroDivisionError("division by nothing")

    monkeypatch.setattr(AprReader, "__init__", break_down)
    for flags, shown in (((), False), (("--debug",), True)):
        assert main(["inspect", str(here / "x.apr"), *flags]) == ExitCode.INTERNAL
        said = capfd.readouterr().err
        assert "error: internal error: ZeroDivisionError: division by nothing. Fix: run again" in said
        assert ("Traceback" in said) is shown


def test_without_permission_nothing_is_read_or_written(capfd: pytest.CaptureFixture[str]) -> None:
    with open_folder() as folder, unprivileged():
        source = write_apr(folder / "x.apr", tiny_tensors(), TINY_METADATA)
        folder.chmod(0o555)
        for command in ("export SRC --to gguf -o y", "export SRC --to huggingface -o y", "stamp SRC -o y"):
            parts = command.replace("SRC", str(source)).split()
            parts[-1] = str(folder / parts[-1])
            assert main([*parts, *(["--license", "MIT"] if "stamp" in parts else [])]) == ExitCode.OUTPUT
            assert "Permission denied" in capfd.readouterr().err
        source.chmod(0)
        for verb in ("inspect", "validate"):
            assert main([verb, str(source)]) == ExitCode.MODEL_FILE
            assert "Permission denied" in capfd.readouterr().err
        assert [path.name for path in folder.iterdir()] == ["x.apr"]


WRITING = [
    "import x.gguf -o OUT/y.apr",
    "import hf -o OUT/y.apr",
    "stamp x.apr --license MIT -o OUT/y.apr",
    "export x.apr --to huggingface -o OUT/y",
    "export x.apr --to safetensors -o OUT/y.safetensors",
    "export x.apr --to gguf --dtype f32 -o OUT/y.gguf",
]


@pytest.mark.parametrize("command", WRITING)
def test_a_full_disk_is_named_and_nothing_is_left_on_it(
    here: Path, command: str, capfd: pytest.CaptureFixture[str]
) -> None:
    disk = here / OUT
    disk.mkdir()
    with small_disk(disk, 150_000):
        assert main(command.split()) == ExitCode.OUTPUT
        assert "cannot be written" in capfd.readouterr().err
        assert list(disk.iterdir()) == []


INTERRUPTED_AT_THE_FIRST_BYTES = """
import contextlib, os, signal, sys
from pathlib import Path
from apr_dist.cli import files, main

@contextlib.contextmanager
def interrupting(title):
    yield lambda done, total: signal.raise_signal(int(sys.argv[1]))

files.bytes_bar = interrupting
before = sorted(Path().rglob("*"))
for command in sys.argv[2:]:
    print(main(command.split()), sorted(Path().rglob("*")) == before)
"""


@pytest.mark.parametrize(("signal", "code"), [("2", ExitCode.INTERRUPTED), ("15", ExitCode.TERMINATED)])
def test_an_interrupted_verb_leaves_nothing(here: Path, signal: str, code: ExitCode) -> None:
    commands = [command.replace("OUT/", "") for command in WRITING]
    script = [sys.executable, "-c", INTERRUPTED_AT_THE_FIRST_BYTES, signal, *commands]
    done = subprocess.run(script, cwd=here, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == [f"{code.value} True"] * len(commands)
    assert "nothing half-written was left behind" in done.stderr
    assert "Traceback" not in done.stderr
