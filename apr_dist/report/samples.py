"""What a run's model says before and after training, to the same prompts; or why that cannot be shown.

The files are those the run names, and are used only while they are the ones it names: the init file by
its digest, the checkpoint by the digest of its weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from apr_dist.apr.digests import file_weights_digest
from apr_dist.apr.reader import AprReader
from apr_dist.data.flags import ids_of
from apr_dist.data.manifest import Manifest
from apr_dist.errors import AprDistError
from apr_dist.interop.text_model import TextModel, open_text_model
from apr_dist.model.generation import Sampling
from apr_dist.report.run_folder import Run
from apr_dist.runs.folder import RunFolder

BY_DEFAULT = 2
"""Samples of a run when nobody says how many, for models up to ``LARGEST_BY_DEFAULT``."""

LARGEST_BY_DEFAULT = 1_000_000_000
"""Parameters; beyond, generating without being asked would keep a reader waiting."""

_PROMPT_TOKENS = 24
_NEW_TOKENS = 48


@dataclass(frozen=True)
class Sample:
    """One prompt and what followed it; None where that model could not be asked.

    Attributes:
        prompt: what was asked.
        before: what followed it before training.
        after: what followed it after training.
        between: what followed it at evaluations between the two, by step.
    """

    prompt: str
    before: str | None
    after: str | None
    between: Sequence[tuple[int, str]] = ()


@dataclass(frozen=True)
class Samples:
    """What one run's models said, and a sentence for each that could not be asked."""

    rows: Sequence[Sample]
    notes: Sequence[str]


class _Skipped(Exception):
    """Why a model cannot be asked, in a sentence."""


def make_samples(run: Run, *, count: int | None, prompts: Sequence[str] = ()) -> Samples:
    """What the models before and after a run make of the same prompts, always by the likeliest token.

    A run that answered prompts of its own shows those answers, unless other prompts are asked for.

    Args:
        run: the run.
        count: how many prompts of the held-out shards; None for a few where the model is small.
        prompts: texts to use instead.
    """
    recorded = _recorded(run)
    if recorded and count in (None, 0) and not prompts:
        return Samples(recorded, ())
    if count == 0:
        return Samples((), ())
    notes: list[str] = []
    said: dict[str, list[str]] = {}
    asked = list(prompts)
    for when, find in (("after", _after), ("before", _before)):
        try:
            speaker = find(run, count is None and not prompts)
            asked = asked or _held_out(run, speaker, count or BY_DEFAULT)
            said[when] = [_goes_on(speaker, prompt) for prompt in asked]
        except _Skipped as reason:
            notes.append(f"No samples {when} training: {reason}.")
        except AprDistError as error:
            notes.append(f"No samples {when} training: {error}")
    if not said:
        return Samples((), notes)
    missing = [None] * len(asked)
    columns = zip(asked, said.get("before", missing), said.get("after", missing), strict=True)
    return Samples([Sample(*row) for row in columns], notes)


def _recorded(run: Run) -> list[Sample]:
    """The answers that the run itself wrote at its evaluations."""
    said: dict[str, list[tuple[int, str]]] = {}
    for line in run.others:
        for one in line["answers"] if line.get("kind") == "answers" else ():
            said.setdefault(one["prompt"], []).append((line["step"], one["answer"]))
    return [
        Sample(
            prompt=prompt,
            before=rows[0][1] if rows[0][0] == 0 else None,
            after=rows[-1][1] if rows[-1][0] else None,
            between=[(step, answer) for step, answer in rows[:-1] if step],
        )
        for prompt, rows in said.items()
    ]


def _after(run: Run, by_default: bool) -> TextModel:
    path = RunFolder(run.folder).checkpoint
    if not path.is_file():
        raise _Skipped(f"{path} is not there")
    recorded = run.verdict["facts"].get("weights_digest") if run.verdict else None
    if recorded is not None:
        with AprReader(path) as reader:
            if recorded != file_weights_digest(reader):
                raise _Skipped(f"the weights in {path} are not the ones the verdict names")
    if run.adapter is not None:
        return _open(run, _init(run), by_default, adapter=path)
    return _open(run, path, by_default)


def _before(run: Run, by_default: bool) -> TextModel:
    return _open(run, _init(run), by_default)


def _init(run: Run) -> Path:
    named = run.values.get("init", "None")
    if named == "None":
        raise _Skipped("the run began from random weights")
    path = Path(named)
    if not path.is_file():
        raise _Skipped(f"the init file {path} is not there")
    recorded = run.verdict["facts"].get("init_digest") if run.verdict else None
    with AprReader(path, verify="structure") as reader:
        if recorded is not None and recorded != reader.digest():
            raise _Skipped(f"{path} is not the file the run began with")
    return path


def _open(run: Run, path: Path, by_default: bool, adapter: Path | None = None) -> TextModel:
    with AprReader(path, verify="structure") as reader:
        parameters = sum(int(np.prod(tensor.shape)) for tensor in reader.tensors.values())
    if by_default and parameters > LARGEST_BY_DEFAULT:
        raise _Skipped(f"the model has {parameters / 1e9:.1f} B parameters; --samples N asks it all the same")
    free = psutil.virtual_memory().available
    if 4 * parameters > free:
        needed = f"{4 * parameters / 1e9:,.1f} GB"
        raise _Skipped(f"the model takes {needed} of memory and {free / 1e9:,.1f} GB are free")
    named = run.values.get("tokenizer", "None")
    return open_text_model(path, tokenizer=None if named == "None" else Path(named), adapter=adapter)


def _held_out(run: Run, speaker: TextModel, count: int) -> list[str]:
    named = [value for key, value in run.values.items() if key.startswith("evaluation.sets.")]
    folder = run.values.get("val_dataset", "None")
    folder = named[0] if named and folder == "None" else folder
    if folder == "None":
        raise _Skipped("the run names no held-out shards to take prompts from; give --prompt")
    found = []
    for ids in _beginnings(Manifest.load(Path(folder))):
        text = speaker.tokenizer.decode(ids.tolist(), skip_special_tokens=True)
        if text.strip():
            found.append(text)
        if len(found) == count:
            break
    return found


def _beginnings(manifest: Manifest) -> Iterator[np.ndarray]:
    """The first tokens of each document; of each shard where documents are not recorded."""
    for shard in manifest.shards:
        if not shard.tokens:
            continue
        ids = np.memmap(manifest.path_of(shard), dtype="<u4", mode="r", shape=(shard.tokens,))
        starts = manifest.document_starts(shard).astype(np.int64) if manifest.has_index else np.zeros(1, int)
        ends = np.append(starts, ids.size)[1:]
        for first, end in zip(starts.tolist(), ends.tolist(), strict=True):
            if end - first > _PROMPT_TOKENS:
                yield ids_of(ids[first : first + _PROMPT_TOKENS])


def _goes_on(speaker: TextModel, prompt: str) -> str:
    ids = speaker.encode(prompt)
    room = min(_NEW_TOKENS, speaker.room(ids, None))
    return "".join(piece.text for piece in speaker.speak(ids, Sampling(max_new_tokens=room)))
