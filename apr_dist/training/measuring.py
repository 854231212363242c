"""The loss of a model file on shards, as a run's evaluation measures it, in one process."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from apr_dist.apr.reader import AprReader
from apr_dist.choices import Device, Precision, Strategy
from apr_dist.data.evaluation_loader import EvaluationLoader
from apr_dist.data.manifest import Manifest
from apr_dist.errors import UsageError
from apr_dist.gates import vocabulary
from apr_dist.gates.model_file import prove_model
from apr_dist.interop.text_model import load_decoder
from apr_dist.parallel import runtime as processes
from apr_dist.runs.progress import Evaluation
from apr_dist.training.evaluation import evaluate


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What is measured, and how.

    Attributes:
        model: an APR file.
        dataset: folder of shards.
        adapter: where an adapter is that is computed beside the weights.
        seq_length: tokens per sequence; None: 1,024, or as many as the model has positions.
        max_sequences: size of the fixed sample; None: all.
        micro_batch: sequences per forward.
        device: where it is computed.
        precision: compute type.
    """

    model: Path
    dataset: Path
    adapter: Path | None = None
    seq_length: int | None = None
    max_sequences: int | None = None
    micro_batch: int = 4
    device: Device = Device.AUTO
    precision: Precision = Precision.F32


def measure(asked: Measurement) -> Evaluation:
    """Mean loss of a model, with its adapter if there is one, over the sequences of a folder of shards.

    Raises:
        ModelFileError, GateRefused: the model or the adapter is missing, damaged, or not one of the other.
        DataError: the shards are missing, damaged, or hold no whole sequence.
        UsageError: the sequences are longer than the model's positions, or the device is not there.
    """
    manifest = Manifest.load(asked.dataset)
    with AprReader(asked.model) as reader, contextlib.ExitStack() as stack:
        model = prove_model(reader).config
        vocabulary.check_shards(
            max_id=manifest.max_token_id, model_vocab=model.vocab_size, where=manifest.folder
        )
        limit = model.longest_sequence
        length = asked.seq_length or min(1024, limit)
        if length > limit:
            raise UsageError(
                f"seq_length {length:,} is more than the model's {limit:,} positions",
                where="--seq-length",
                expected=f"at most {limit:,}",
                remedy="lower --seq-length",
            )
        stack.callback(processes.reset_state)
        runtime = processes.start(
            device=asked.device.value,
            strategy=Strategy.SINGLE.value,
            precision=asked.precision.value,
            cpu_threads=None,
            timeout_s=600,
        )
        decoder = load_decoder(reader, model, device=str(runtime.device), adapter=asked.adapter)
        loader = stack.enter_context(
            contextlib.closing(
                EvaluationLoader(
                    manifest,
                    seq_length=length,
                    micro_batch=asked.micro_batch,
                    rank=0,
                    world_size=1,
                    max_sequences=asked.max_sequences,
                )
            )
        )
        return evaluate(decoder, loader, runtime)
