"""Gates of named validation sets: each is other data, and one thing alone counts."""

from __future__ import annotations

from collections.abc import Mapping

from apr_dist.data.manifest import Manifest
from apr_dist.errors import DataError, UsageError


def check_sets_differ(sets: Mapping[str, Manifest]) -> None:
    """No two sets are the same data.

    Raises:
        DataError: naming both.
    """
    seen: dict[str, str] = {}
    for name, one in sets.items():
        if (other := seen.setdefault(one.fingerprint, name)) != name:
            raise DataError(
                f"the validation sets {other} and {name} hold the same data",
                where=one.folder,
                expected="other data for each name (evaluation.sets)",
                remedy=f"leave {name} out of --evaluation.sets",
            )


def check_own_counts(counts: str | None) -> None:
    """Held-out batches that a program hands in are what counts.

    Raises:
        UsageError: a named set is to count as well.
    """
    if counts is not None:
        raise UsageError(
            f"evaluation.counts is {counts}, and the program's own held-out batches count",
            where="val_batches",
            expected="one of them; named sets are measured as well",
            remedy="leave evaluation.counts out, or hand in no val_batches",
        )
