"""A few of the conversations that a run trained on, with what it learned to say told apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from apr_dist.corpus.preview import ShownConversation, preview_conversations
from apr_dist.data.manifest import Manifest
from apr_dist.errors import AprDistError
from apr_dist.interop.chat_shards import decoder_of
from apr_dist.report.run_folder import Run

SHOWN = 3


@dataclass(frozen=True)
class TrainedOn:
    """Conversations of a run's shards, and why there are none where they cannot be shown."""

    rows: Sequence[ShownConversation]
    notes: Sequence[str]


def trained_on(run: Run) -> TrainedOn:
    """Three conversations of the first set of conversations among a run's training data."""
    for folder in _folders(run):
        try:
            manifest = Manifest.load(folder)
            if manifest.flagged:
                shown = preview_conversations(folder, decoder_of(manifest), count=SHOWN)
                return TrainedOn(list(shown), ())
        except AprDistError as error:
            return TrainedOn((), (f"No conversations: {error}",))
    return TrainedOn((), ())


def _folders(run: Run) -> Iterator[Path]:
    """The run's training data that are still there."""
    named = [run.values.get("dataset", "None")]
    named += [key.removeprefix("loader.mixture.") for key in run.values if key.startswith("loader.mixture.")]
    yield from (Path(one) for one in named if one != "None" and Path(one).is_dir())
