"""Gate: validation sets of different names hold different data."""

from __future__ import annotations

from collections.abc import Mapping

from apr_dist.data.manifest import Manifest
from apr_dist.errors import DataError


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
