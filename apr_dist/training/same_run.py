"""What a rank compares with rank 0 before the first step: settings, init file, code and library versions."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from platform import python_version_tuple

from apr_dist.apr.reader import AprReader
from apr_dist.config import TrainConfig
from apr_dist.contracts.evidence import package_digest
from apr_dist.errors import AprDistError
from apr_dist.runs.resume import flat
from apr_dist.version import __version__

_LIBRARIES = ("torch", "accelerate", "deepspeed", "numpy", "safetensors", "tokenizers", "bitsandbytes")

_OF_ONE_HOST = {
    *("run_dir", "init", "dataset", "val_dataset", "tokenizer", "resume", "progress", "track"),
    *(
        "evaluation.prompts",
        "parallel.cpu_threads",
        "loader.access",
        "loader.prefetch_batches",
        "loader.pin_memory",
    ),
}
"""Paths and choices that may differ between hosts. Files are compared by content, the run folder by a proof
of its own; rank 0 alone reads ``resume`` and shows progress."""


def facts_of(config: TrainConfig, *, init: str | None, init_digest: str | None) -> dict[str, str]:
    """This rank's settings, init file, code and versions.

    Args:
        config: the resolved configuration of this rank.
        init: the init file as rank 0's configuration names it.
        init_digest: its digest.
    """
    settings = {
        key: str(value)
        for key, value in flat(config.model_dump(mode="json")).items()
        if key not in _OF_ONE_HOST and not key.startswith(("loader.mixture.", "evaluation.sets."))
    }
    versions = {name: _version(name) for name in _LIBRARIES}
    return {
        **settings,
        **{f"version of {name}": found for name, found in versions.items()},
        "version of Python": ".".join(python_version_tuple()[:2]),
        "version of apr-dist": f"{__version__}, code {package_digest()[7:19]}",
        "init file": _init(config, init, init_digest),
    }


def _init(config: TrainConfig, init: str | None, digest: str | None) -> str:
    """Digest of this rank's init file, which is read only if it has another name than rank 0's."""
    if config.init is None or str(config.init) == init:
        return "none" if config.init is None else str(digest)
    try:
        with AprReader(config.init) as reader:
            return reader.digest()
    except AprDistError as error:
        return f"{config.init} ({error.what})"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
