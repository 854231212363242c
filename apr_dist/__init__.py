"""A distributed trainer for language models that starts from a pretrained APR file and never lies about it.

``import apr_dist`` loads nothing heavy; PyTorch is imported when `open_session` is first used.
"""

from importlib import import_module

from apr_dist.version import __version__

_HOMES = {
    "AprDistError": "apr_dist.errors",
    "Session": "apr_dist.training.session",
    "TrainConfig": "apr_dist.config",
    "fit": "apr_dist.training.library",
    "open_session": "apr_dist.training.library",
}

__all__ = ["__version__", *sorted(_HOMES)]  # noqa: PLE0604  (their types are in __init__.pyi)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
