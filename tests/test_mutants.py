"""A mutant is bound to an operation of a function: neither spelling nor place in the file matters."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from mutants.change import Change
from mutants.editing import edits

SOURCE = '''
LIMIT = 2.0

class Rule:
    """Ünïcode before the place, because columns of a syntax tree count bytes."""

    bound: float | None = None

    def check(self, loss, *, steps):
        text = f"{loss}"  # a formatted string is one value
        if not loss:
            self.note("ä"); return None
        while steps:
            steps -= 1
        return self.note(loss <= self.bound and text, seed=steps, facts={"loss": loss, **self.facts})
'''
SPELLED_OTHERWISE = SOURCE.replace(
    "loss <= self.bound and text", "(loss\n            <= self.bound)  # moved\n            and text"
)
RUST = (
    "fn other() { if found == 0 { return; } }\nfn open() {\n    if found\n        != expected {\n    }\n}\n"
)


@pytest.mark.parametrize(
    ("scope", "old", "new", "expected"),
    [
        ("LIMIT", "2.0", "3.0", "LIMIT = 3.0"),
        ("Rule.bound", "None", "1.0", "bound: float | None = 1.0"),
        ("Rule.check", "loss <= self.bound", "True", "self.note(True and text"),
        ("Rule.check", "seed=steps", "seed=0", "seed=0, facts"),
        ("Rule.check", '"loss": loss', '"loss": 0', '{"loss": 0, **self.facts}'),
        ("Rule.check", "**self.facts", "**{}", '{"loss": loss, **{}}'),
        (
            "Rule.check",
            "if not loss: ...",
            "if loss is None: ...",
            'if loss is None:\n            self.note("ä")',
        ),
        ("Rule.check", "if not loss: ...", "pass", "        pass\n        while steps"),
        (
            "Rule.check",
            "while steps: ...",
            "while steps > 1: ...",
            "while steps > 1:\n            steps -= 1",
        ),
        ("Rule.check", 'self.note("ä")', "pass", "            pass; return None"),
        ("Rule.check", 'text = f"{loss}"', 'text = ""', 'text = ""  # a formatted'),
    ],
)
def test_an_operation_is_found_in_its_function_and_made_another(
    scope: str, old: str, new: str, expected: str
) -> None:
    (edit,) = edits(SOURCE, ".py", scope, old, new)
    changed = edit.apply(SOURCE)
    assert expected in changed
    ast.parse(changed)


def test_line_breaks_comments_and_brackets_do_not_matter() -> None:
    (edit,) = edits(SPELLED_OTHERWISE, ".py", "Rule.check", "loss <= self.bound and text", "text")
    assert "self.note(text, seed=steps" in edit.apply(SPELLED_OTHERWISE)


def test_what_stands_elsewhere_is_not_it() -> None:
    assert not edits(SOURCE, ".py", "Rule.check", "2.0", "3.0")
    assert not edits(SOURCE, ".py", "Rule.forgotten", "2.0", "3.0")
    assert len(edits(SOURCE, ".py", "Rule.check", "loss", "0")) > 1  # it must be one place: this is refused


def test_rust_is_compared_word_by_word_in_its_function() -> None:
    (edit,) = edits(RUST, ".rs", "open", "found != expected", "false")
    assert "if false {" in edit.apply(RUST)
    assert not edits(RUST, ".rs", "open", "found == 0", "false")


def test_a_function_that_moved_to_another_file_is_found(tmp_path: Path) -> None:
    moved = tmp_path / "apr_dist" / "rules" / "rule.py"
    moved.parent.mkdir(parents=True)
    moved.write_text(SOURCE, encoding="utf-8")
    change = Change("ID", "no bound", "apr_dist/old_place.py", "Rule.check", "loss <= self.bound", "True")
    assert change.path(tmp_path) == moved
    assert len(change.edits(tmp_path)) == 1
