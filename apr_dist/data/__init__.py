"""Shards to batches: manifest, verification, mixtures and the loader."""

from importlib.util import find_spec
from pathlib import Path

from apr_dist.errors import UsageError

if find_spec("apr_dist._rust_loader") is None:  # before any module here imports it
    raise UsageError(
        "the compiled loader _rust_loader is missing from this package",
        where=Path(__file__).parents[1],
        expected="an installed package; a checkout that is the current folder, or whose apr_dist/train.py is"
        " started, hides the installed one",
        remedy="build it into the checkout with `pip install -e .`, or start `python -m apr_dist.train`"
        " from another folder",
    )

from apr_dist.data.manifest import Manifest, Shard, TokenizerIdentity

__all__ = ["Manifest", "Shard", "TokenizerIdentity"]
