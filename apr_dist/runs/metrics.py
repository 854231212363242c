"""metrics.jsonl: one JSON line a step and one an evaluation, complete or refused (INV-TRAIN-001)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Self

from apr_dist.atomic_files import write_atomically
from apr_dist.errors import NumericalInstability, OutputError
from apr_dist.parsing import parse_json

MAY_BE_UNKNOWN = ("mfu", "memory_bytes", "host_memory_bytes")
"""Figures that are null where the machine does not tell."""


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """What one optimizer step really did.

    Attributes:
        step: 1-based number of the step.
        train_loss: mean loss over the targets of the global batch, before the update, in nats.
        grad_norm: global norm of the gradient before clipping.
        lr: the rate the optimizer used.
        tokens_per_sec: tokens of the global batch, targets or not, over the step's wall time.
        gpu_util_pct: utilisation of this rank's GPU in percent; 0 on CPU.
        wall_ms: wall time of the step in milliseconds.
        data_wait_ms: time the host waited for the batch.
        forward_ms: part of it that this rank spent in forward and loss, over all its micro-batches.
        backward_ms: part of it in their backward, with what ranks exchange meanwhile.
        update_ms: part of it in gradient norm, clipping and optimizer.
        targets: tokens of the global batch that the loss counts.
        tokens_seen: target tokens trained on so far, this step included.
        data_epoch: passes over the training data begun so far, less one; of a mixture, over the source
            with most.
        data_epochs: the same for each source, by name.
        mfu: share of the devices' peak that the model's own arithmetic reached; None where the peak is
            not known.
        memory_bytes: most memory held so far: on a GPU by tensors, on a CPU by the process.
        host_memory_bytes: most memory the process has held so far.
        router: what the routers of a mixture did with the batch, as `RoutingFigures.to_json`; not in the file
            for a dense model.
    """

    step: int
    train_loss: float
    grad_norm: float
    lr: float
    tokens_per_sec: float
    gpu_util_pct: float
    wall_ms: float
    data_wait_ms: float
    forward_ms: float
    backward_ms: float
    update_ms: float
    targets: int
    tokens_seen: int
    data_epoch: int
    data_epochs: Mapping[str, int]
    mfu: float | None = None
    memory_bytes: int | None = None
    host_memory_bytes: int | None = None
    router: Mapping[str, float] | None = None


class MetricsFile:
    """Appends lines to metrics.jsonl on rank 0; elsewhere it does nothing.

    Args:
        path: the file; None writes nothing.
        common: keys put on every line (``synthetic`` marks a run on made-up data).
        told: called with every line once it is written, as a display is.
        after_step: a resumed run keeps the lines up to this step; None replaces the file.
    """

    def __init__(
        self,
        path: Path | None,
        *,
        common: Mapping[str, Any],
        told: Sequence[Callable[[Mapping[str, Any]], None]] = (),
        after_step: int | None = None,
    ) -> None:
        self._common, self._told = dict(common), tuple(told)
        self._path = path
        self._file: IO[bytes] | None = None
        if path is not None:
            kept = b"" if after_step is None else _lines_up_to(path, after_step)
            if kept:
                write_atomically(path, kept)
            try:  # unbuffered: a line is on its way or an error
                self._file = path.open("ab" if kept else "wb", buffering=0)
            except OSError as error:
                raise OutputError(f"cannot be written ({error.strerror})", where=path) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def step(self, metrics: StepMetrics) -> None:
        """Append one step.

        Raises:
            NumericalInstability: a value is not a finite number (INV-TRAIN-008).
            OutputError: the line cannot be written.
        """
        values = asdict(metrics)
        router = values.pop("router")
        for key, value in (values | {f"router.{key}": one for key, one in (router or {}).items()}).items():
            if key == "data_epochs" or (value is None and key in MAY_BE_UNKNOWN):
                continue
            if not math.isfinite(value) or (key == "tokens_per_sec" and value <= 0):
                raise NumericalInstability(
                    f"{key} is {value}",
                    where=f"step {metrics.step}",
                    expected="a finite figure, and a positive throughput",
                    falsifier="INV-TRAIN-008",
                )
        if router is not None:
            values["router"] = router
        self._line({"kind": "step", **values})

    def event(self, kind: str, values: Mapping[str, Any]) -> None:
        """Append a line of another kind, such as ``evaluation``."""
        self._line({"kind": kind, **values})

    def _line(self, values: Mapping[str, Any]) -> None:
        if self._file is None:
            return
        line = {**values, **self._common}
        try:
            self._file.write((json.dumps(line, allow_nan=False) + "\n").encode())
        except OSError as error:
            raise OutputError(
                f"a line cannot be written ({error.strerror})",
                where=self._path,
                remedy="free space on that disk, then start again from the last checkpoint",
            ) from error
        for tell in self._told:
            tell(line)


def _lines_up_to(path: Path, step: int) -> bytes:
    """What an earlier part of this run wrote, without steps that are about to be done again."""
    if not path.exists():
        return b""
    lines = path.read_bytes().splitlines(keepends=True)
    return b"".join(line for line in lines if line.endswith(b"\n") and parse_json(line)["step"] <= step)
