"""How many processors a process may use: what a container's quota leaves of them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from apr_dist.cores import quotas, usable_cores


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("mine", "files", "expected"),
    [
        ("0::/\n", {"cpu.max": "200000 100000\n"}, [2.0]),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "150000 100000\n"}, [1.5]),
        ("0::/gone\n", {"cpu.max": "50000 100000\n"}, [0.5]),
        ("3:memory:/x\n1:cpu,cpuacct:/x\n", {"cpu/x/cpu.cfs_quota_us": "300000\n"}, []),
        (
            "1:cpuacct,cpu:/x\n",
            {"cpu/x/cpu.cfs_quota_us": "300000\n", "cpu/x/cpu.cfs_period_us": "100000\n"},
            [3.0],
        ),
        ("1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, []),
        ("0::/\n", {"cpu.max": "nonsense\n"}, []),
        ("0::/\n", {"cpu.max": "100 0\n"}, []),
        ("nonsense\n", {}, []),
    ],
)
def test_a_quota_is_read_in_processors(
    mine: str, files: dict[str, str], expected: list[float], tmp_path: Path
) -> None:
    (tmp_path / "mine").write_text(mine)
    assert list(quotas(tree(tmp_path / "groups", files), tmp_path / "mine")) == expected


def test_without_control_groups_there_is_no_quota(tmp_path: Path) -> None:
    assert list(quotas(tmp_path / "none", tmp_path / "none")) == []


def test_this_process_may_use_no_more_than_its_affinity() -> None:
    assert 1 <= usable_cores() <= len(os.sched_getaffinity(0))
