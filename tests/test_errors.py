"""Errors say what, where, expected and remedy, and travel between ranks as plain fields."""

from __future__ import annotations

from apr_dist.errors import AprDistError, ExitCode, ShardError, UsageError


def test_an_error_is_one_paragraph_of_what_where_expected_and_remedy() -> None:
    error = UsageError("x is 3", where="--x", expected="2", remedy="pass --x 2", falsifier="F-1")
    assert str(error) == "[F-1] --x: x is 3. Expected 2. Fix: pass --x 2."


def test_an_error_survives_the_way_to_another_rank() -> None:
    error = ShardError("is short", where="s.bin", expected="8 bytes", remedy="mend", falsifier="F-2")
    told = AprDistError.from_fields(error.to_fields())
    assert type(told) is ShardError
    assert str(told) == str(error)
    assert told.exit_code is ExitCode.DATA
    assert told.told_by_rank_0
    assert not error.told_by_rank_0


def test_every_exit_code_but_success_is_some_error_s() -> None:
    kinds, used = [AprDistError], set()
    while kinds:
        kind = kinds.pop()
        used.add(kind.exit_code)
        kinds.extend(kind.__subclasses__())
    assert used == set(ExitCode) - {ExitCode.OK}
