"""What the machine's examination says, and what it tells people to fix."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from apr_dist.cli.doctor import (
    collective,
    compiler,
    disk,
    doctor,
    file_size,
    open_files,
    packages,
    strategies,
)


def test_it_lists_what_is_there_and_ends_with_what_to_fix(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor(tmp_path, skip_collective=True) == 0
    out = capsys.readouterr().out
    assert "ok  torch" in out
    assert "ok  Rust loader" in out
    assert "\nto fix:" in out
    assert list(tmp_path.iterdir()) == []


def test_two_processes_meet() -> None:
    assert collective().fix is None


def test_few_open_files_are_a_thing_to_fix_and_no_limit_is_not() -> None:
    assert open_files(1024).fix == "ulimit -n 65536"
    assert open_files(1 << 20).fix is None
    assert open_files(-1).fix is None


def test_a_folder_that_is_not_there_is_fatal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert disk(tmp_path / "none").fatal
    assert doctor(tmp_path / "none", skip_collective=True) == 2
    assert "BAD disk" in capsys.readouterr().out


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apr_dist.cli.doctor.REQUIRED", ("a-package-nobody-has",))
    first = next(packages())
    assert first.fatal
    assert first.fix == "pip install a-package-nobody-has"


def test_it_says_what_every_way_of_starting_would_run(capsys: pytest.CaptureFixture[str]) -> None:
    found = {finding.what: finding.found for finding in strategies()}
    assert found["run: python"].startswith("single on ")
    assert "ddp over " in found["run: torchrun"]
    assert "fsdp2" in found["run: torchrun"]
    assert "run: accelerate" in found


def test_an_accelerate_configuration_is_read_and_a_broken_one_is_a_thing_to_fix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "default_config.yaml"
    monkeypatch.setattr("accelerate.commands.config.config_args.default_config_file", str(path))
    monkeypatch.setattr("accelerate.commands.config.config_args.default_yaml_config_file", str(path))
    path.write_text("compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nnum_processes: 4\n")
    *_, found = strategies()
    assert "MULTI_GPU over 4 process(es)" in found.found
    path.write_text("distributed_type: [")
    *_, broken = strategies()
    assert broken.fix is not None
    assert "accelerate config" in broken.fix


def test_a_small_limit_of_file_size_and_a_missing_compiler_are_named() -> None:
    assert file_size(2_000_000_000).fix == "ulimit -f unlimited"
    assert file_size(-1).fix is None
    assert "ZeRO on CPU ranks cannot be built" in compiler("a-compiler-nobody-has").found


def test_a_folder_that_cannot_be_written_is_a_clear_thing_to_fix(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/proc/self")  # a folder nobody can write to, whoever runs the test
    assert doctor(skip_collective=True) == 2
    out = capsys.readouterr().out
    assert "cannot be written" in out
    assert "disk: name a folder that can be written: apr-dist doctor FOLDER" in out


def test_the_disk_is_written_and_read(tmp_path: Path) -> None:
    found = disk(tmp_path).found
    assert str(tmp_path) in found
    assert re.search(r"writes [\d,]+ MB/s, reads [\d,]+ MB/s", found)
    assert list(tmp_path.iterdir()) == []
