"""Judge the wheel and the source distribution in a folder, then use the wheel in an environment of its own.

``make wheel`` runs this after the build. The new environment holds the wheel alone; its dependencies are
those of the interpreter that runs this script, so nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

from builders.pages import huggingface_model
from builders.runs import TINY

IN_WHEEL = (
    "apr_dist/py.typed",
    "apr_dist/_rust_loader.abi3.so",
    "apr_dist/_rust_loader.pyi",
    "apr_dist/contracts/carried/apr-dist-trainer-v1.yaml",
    "licenses/LICENSE",
)
IN_SDIST = (
    "Makefile",
    "LICENSE",
    "CHANGELOG.md",
    "rust_loader/Cargo.lock",
    "tests/conftest.py",
    "docs/conf.py",
    "configs/demo.yaml",
    "contracts/apr-dist-trainer-v1.yaml",
    "launch/slurm.sbatch",
)


def main() -> None:
    """Check what is inside, the platform tag, the metadata, and that the installed wheel works."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dist", type=Path, help="folder with one wheel and one source distribution")
    dist = parser.parse_args().dist
    (wheel,) = dist.glob("*.whl")
    (sdist,) = dist.glob("*.tar.gz")
    tools = Path(sys.executable).parent
    _contents(wheel, sdist)
    _run([str(tools / "twine"), "check", "--strict", str(wheel), str(sdist)])
    if sys.platform == "linux":
        said = _run([str(tools / "auditwheel"), "show", str(wheel)])
        assert "manylinux" in said.split("platform tag:")[1].split("\n")[0], said
    with tempfile.TemporaryDirectory() as folder:
        _use(wheel, Path(folder))
    print(f"{wheel.name} and {sdist.name} are sound")


def _contents(wheel: Path, sdist: Path) -> None:
    assert "-abi3-" in wheel.name, wheel.name
    inside = zipfile.ZipFile(wheel).namelist()
    missing = [name for name in IN_WHEEL if not any(one.endswith(name) for one in inside)]
    strays = [name for name in inside if not name.startswith("apr_dist")]
    with tarfile.open(sdist) as archive:
        source = {name.partition("/")[2] for name in archive.getnames()}
    missing += [name for name in IN_SDIST if name not in source]
    assert not missing, f"missing: {missing}"
    assert not strays, f"beside the package: {strays}"


def _use(wheel: Path, folder: Path) -> None:
    """Install the wheel alone, and call every kind of entry point it brings."""
    venv.create(folder / "venv", with_pip=True)
    bin_folder = folder / "venv" / "bin"
    python = str(bin_folder / "python")
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel.resolve())]
    _run(install, cwd=folder)
    site = Path(_run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip())
    # A path in a .pth is only searched; the .pth files in it, such as an editable install's, are not read.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    origin = _run([python, "-c", "import apr_dist._rust_loader as r; print(r.__file__)"], cwd=folder)
    assert origin.startswith(str(site)), origin
    verb = str(bin_folder / "apr-dist")
    version = _run([verb, "--version"], cwd=folder)
    assert version == _run([python, "-m", "apr_dist", "--version"], cwd=folder)
    assert version.split()[1] in wheel.name, version
    huggingface_model(folder / "model")
    _run([verb, "import", "model", "--output", "model.apr"], cwd=folder)
    _run([verb, "validate", "model.apr"], cwd=folder)
    (folder / "tiny.json").write_text(json.dumps(TINY))
    flags = [
        "--synthetic",
        "--mode",
        "from-scratch",
        "--model",
        "tiny.json",
        "--run-dir",
        "run",
        "--device",
        "cpu",
    ]
    flags += [
        "--num-steps",
        "2",
        "--seq-length",
        "16",
        "--batch-size",
        "2",
        "--evaluation.max-sequences",
        "4",
    ]
    _run([verb, "plan", *flags], cwd=folder)
    _run([python, "-m", "apr_dist.train", *flags], cwd=folder)
    _run([verb, "validate", "run/checkpoint.apr"], cwd=folder)
    explained = _run([verb, "explain", "FALSIFY-APR-DIST-TRAINER-004"], cwd=folder)
    assert "parameters are missing" in explained, explained
    absent = _run([verb, "contracts", "validate"], cwd=folder, wanted=(2,))
    assert "expected a checkout" in absent.lower(), absent


def _run(command: list[str], *, cwd: Path | None = None, wanted: tuple[int, ...] = (0,)) -> str:
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        command, cwd=cwd, env=clean, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode in wanted, f"{command} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


if __name__ == "__main__":
    main()
