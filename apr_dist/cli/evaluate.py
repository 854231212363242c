"""The verb that measures a model file on shards."""

from __future__ import annotations

import json as json_text
from pathlib import Path
from typing import Annotated

import tyro

from apr_dist.choices import Device, Precision


def evaluate(
    model: Annotated[Path, tyro.conf.Positional],
    /,
    *,
    dataset: Path,
    adapter: Path | None = None,
    seq_length: int | None = None,
    max_sequences: int | None = None,
    micro_batch_size: int = 4,
    device: Device = Device.AUTO,
    precision: Precision = Precision.F32,
    json: bool = False,
) -> None:
    """Measure the loss and the perplexity of a model file on any shards, as a run's evaluation does.

    Example: apr-dist eval model.apr --dataset data/validation --adapter runs/lora/adapter

    Args:
        model: an APR file.
        dataset: folder of shards with manifest.json.
        adapter: folder of an adapter to compute beside the model's weights, or checkpoint.apr of its run.
        seq_length: tokens per sequence; by default 1,024, or as many as the model has positions.
        max_sequences: size of the fixed sample; by default all sequences.
        micro_batch_size: sequences per forward.
        device: auto, cpu or cuda.
        precision: f32, or bf16 autocast.
        json: print JSON.
    """
    from apr_dist.runs.checkpoint import perplexity  # noqa: PLC0415
    from apr_dist.training.measuring import Measurement, measure  # noqa: PLC0415  (imports PyTorch)

    found = measure(
        Measurement(
            model=model,
            dataset=dataset,
            adapter=adapter,
            seq_length=seq_length,
            max_sequences=max_sequences,
            micro_batch=micro_batch_size,
            device=device,
            precision=precision,
        )
    )
    if json:
        facts = {
            "model": str(model),
            "adapter": None if adapter is None else str(adapter),
            "dataset": str(dataset),
            "loss": found.loss,
            "perplexity": perplexity(found.loss),
            "tokens": found.tokens,
        }
        print(json_text.dumps(facts))
        return
    print(f"loss {found.loss:.6f} nats a token, perplexity {perplexity(found.loss)}, {found.tokens:,} tokens")
