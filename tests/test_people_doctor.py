"""What the machine's examination says, and what it tells people to mend."""

from __future__ import annotations

from pathlib import Path

import pytest

from apr_dist.cli.doctor import collective, disk, doctor, open_files, packages


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
