"""A circle between files is found wherever the import stands, and none is where none is."""

from __future__ import annotations

from pathlib import Path

import pytest
from circles import circles, main, python_arrows, rust_arrows

REPOSITORY = Path(__file__).resolve().parents[1]


def written(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    "second",
    [
        "from apr_dist.one import a\n",
        "import apr_dist.one\n",
        "from apr_dist import one\n",
        "from . import one\n",
        "from .one import a\n",
        "def late():\n    from apr_dist.one import a\n",
        "if TYPE_CHECKING:\n    from apr_dist.one import a\n",
    ],
)
def test_two_files_that_import_each_other_are_a_circle(second: str, tmp_path: Path) -> None:
    files = {"__init__.py": "", "one.py": "from apr_dist.two import b\n", "two.py": second}
    package = written(tmp_path / "apr_dist", files)
    assert circles(python_arrows(package)) == [["one.py", "two.py", "one.py"]]


def test_a_circle_through_a_package_s_own_file_is_found(tmp_path: Path) -> None:
    files = {
        "__init__.py": "",
        "room/__init__.py": "from apr_dist.room.inner import a\n",
        "room/inner.py": "from apr_dist.other import b\n",
        "other.py": "from apr_dist.room import a\n",
    }
    package = written(tmp_path / "apr_dist", files)
    assert circles(python_arrows(package)) == [["other.py", "room/__init__.py", "room/inner.py", "other.py"]]


def test_files_that_only_look_down_are_no_circle(tmp_path: Path) -> None:
    files = {
        "__init__.py": "from apr_dist.low import c\n",
        "high.py": "from apr_dist.middle import b\nfrom apr_dist.low import c\n",
        "middle.py": "import os\nfrom apr_dist.low import c\n",
        "low.py": "",
    }
    assert circles(python_arrows(written(tmp_path / "apr_dist", files))) == []


@pytest.mark.parametrize(
    "use",
    [
        "use crate::one::A;",
        "use crate::{error::E, one::A};",
        "fn f() -> u8 { crate::one::a() }",
        "use crate::one;",
    ],
)
def test_two_files_of_the_crate_that_name_each_other_are_a_circle(use: str, tmp_path: Path) -> None:
    files = {
        "lib.rs": "mod error;\nmod one;\nmod two;\n",
        "error.rs": "//! See crate::one.\n",
        "one.rs": "use crate::two::{B, C};\n",
        "two.rs": use,
    }
    assert circles(rust_arrows(written(tmp_path / "src", files))) == [["one.rs", "two.rs", "one.rs"]]


def test_a_comment_and_a_file_s_own_tests_are_no_circle(tmp_path: Path) -> None:
    files = {
        "lib.rs": "mod one;\nmod two;\n",
        "one.rs": "//! Read by crate::two.\nmod tests { use super::*; use crate::one::A; }\n",
        "two.rs": "use crate::one::A; // and not crate::two\n",
    }
    assert circles(rust_arrows(written(tmp_path / "src", files))) == []


def test_the_command_names_each_circle_and_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(
        tmp_path / "apr_dist",
        {"__init__.py": "", "a.py": "import apr_dist.b\n", "b.py": "import apr_dist.a\n"},
    )
    written(tmp_path / "rust_loader" / "src", {"lib.rs": ""})
    assert main(["--root", str(tmp_path)]) == 1
    assert capsys.readouterr().out == "circle: a.py -> b.py -> a.py\n"


def test_the_package_has_none() -> None:
    assert circles(python_arrows(REPOSITORY / "apr_dist")) == []
