"""The groups of keys of a configuration, and what each mode defaults to; the whole run is in ``schema``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from apr_dist.choices import (
    ActivationCheckpointing,
    AdapterInit,
    AdapterKind,
    Compile,
    Documents,
    FinalCheckpoint,
    GradientStorage,
    KernelChoice,
    Mode,
    Offload,
    OnNonFinite,
    OnSpike,
    Precision,
    ScheduleKind,
    ShardAccess,
    ShuffleOrder,
    SpikeOf,
    StrategyChoice,
    VerifyShards,
    WeightStorage,
)


@dataclass(frozen=True)
class ModeDefaults:
    """What GATE-TRAIN-009 calls atomic: the three values a mode sets together."""

    lr: float
    warmup_steps: int
    target_val_loss: float


MODE_DEFAULTS: Mapping[Mode, ModeDefaults] = {
    Mode.FINETUNE: ModeDefaults(lr=5e-5, warmup_steps=100, target_val_loss=2.2),
    Mode.FROM_SCRATCH: ModeDefaults(lr=3e-4, warmup_steps=1000, target_val_loss=3.0),
}


class Section(BaseModel):
    """A group of keys; unknown keys are errors, numbers are finite, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_enum_values=False, allow_inf_nan=False)


def _number_from_text(value: object) -> object:
    """``8``, as a flag gives it, as the number a file gives."""
    return int(value) if isinstance(value, str) and value.isdecimal() else value


class OptimizerSection(Section):
    """AdamW and the learning-rate schedule."""

    weight_decay: float = Field(0.01, ge=0, description="decoupled weight decay, on matrices only")
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of the first moment")
    beta2: float = Field(0.999, ge=0, lt=1, description="decay of the second moment")
    eps: float = Field(1e-8, gt=0, description="added to the root of the second moment")
    state_bits: Annotated[Literal[8, 32], BeforeValidator(_number_from_text)] = Field(
        32, description="bits of both moments; 8: of large matrices, by bitsandbytes (extra bitsandbytes)"
    )
    grad_clip: float = Field(1.0, gt=0, description="largest global gradient norm that is applied")
    schedule: ScheduleKind = Field(
        ScheduleKind.COSINE,
        description="rate after warm-up: cosine, wsd (stable, then decay), linear, constant",
    )
    decay_steps: int | None = Field(
        None, gt=0, description="with wsd: last steps, in which the rate falls; none: a fifth of all"
    )
    lr_min_ratio: float = Field(0.01, ge=0, le=1, description="end of the schedule, as a share of lr")


def _weights_from_text(value: object) -> object:
    """``path=weight,path=weight``, as a flag gives a mixture, as the mapping a file gives."""
    if value is None:
        return {}
    if not isinstance(value, str):
        return value
    pairs = [part.strip().rpartition("=") for part in value.split(",")]
    found = {path: weight for path, _, weight in pairs}
    if "" in found or len(found) < len(pairs):
        raise ValueError("path=weight, separated by commas, each path once")
    return found


def _paths_from_text(value: object) -> object:
    """``name=path,name=path``, as a flag gives named folders, as the mapping a file gives."""
    if value is None:
        return {}
    if not isinstance(value, str):
        return value
    pairs = [part.strip().partition("=") for part in value.split(",")]
    found = {name: path for name, _, path in pairs}
    if len(found) < len(pairs) or not all(found.values()):
        raise ValueError("name=path, separated by commas, each name once")
    return found


def _ids_from_text(value: object) -> object:
    """``0,2``, as a flag gives ids, as the list a file gives."""
    if value is None:
        return ()
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


def _words_from_text(value: object) -> object:
    """``q_proj,v_proj``, as a flag gives names, as the list a file gives."""
    if value is None:
        return ()
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


class AdapterBaseSection(Section):
    """How the frozen weights are kept while an adapter is trained."""

    bits: Annotated[Literal[4, 8, 16, 32] | None, BeforeValidator(_number_from_text)] = Field(
        None,
        description="bits of the frozen matrices: 32, 16 (bf16); of those of the blocks 8 (int8) or 4 (nf4),"
        " by bitsandbytes; none: 16 where every matrix of the file is bf16, else 32",
    )


class AdapterSection(Section):
    """What is trained beside frozen weights, in place of them (extra adapters)."""

    kind: AdapterKind = Field(
        AdapterKind.OFF, description="off: every weight is trained; or lora, rslora, dora"
    )
    rank: int = Field(16, gt=0, description="rows of the first factor, columns of the second")
    alpha: float = Field(32.0, gt=0, description="scale: alpha / rank, for rslora alpha / sqrt(rank)")
    dropout: float = Field(0.0, ge=0, lt=1, description="share of the inputs that are zero in training")
    targets: Annotated[tuple[str, ...], BeforeValidator(_words_from_text)] = Field(
        ("all-linear",),
        description="linear maps that get one: all-linear (those of the blocks), names, or patterns with *",
    )
    layers: Annotated[tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(_ids_from_text)] = Field(
        (), description="numbers of the blocks that get one, from 0; none: all"
    )
    bias: bool = Field(False, description="also train a bias beside the second factor, where the map has one")
    init: AdapterInit = Field(
        AdapterInit.KAIMING, description="first factor: kaiming (uniform, as peft) or gaussian (1 / rank)"
    )
    train_embeddings: Annotated[tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(_ids_from_text)] = (
        Field((), description="ids of tokens whose rows of embedding and head are trained too")
    )
    base: AdapterBaseSection = AdapterBaseSection()

    @property
    def is_on(self) -> bool:
        """Whether an adapter is trained."""
        return self.kind is not AdapterKind.OFF


class LoaderSection(Section):
    """How training sequences are drawn from the shards."""

    mixture: Annotated[Mapping[str, Annotated[float, Field(gt=0)]], BeforeValidator(_weights_from_text)] = (
        Field(
            {}, description="in place of dataset: folders of training shards and their weights in the stream"
        )
    )

    shuffle: ShuffleOrder = Field(
        ShuffleOrder.SEQUENCE,
        description="sequence: any row after any other, one copy a batch; block: rows in blocks, no copy",
    )
    block_sequences: int = Field(8, gt=0, description="rows of a block; part of the order, like the seed")
    verify: VerifyShards = Field(
        VerifyShards.FIRST_TOUCH, description="when shard hashes are checked: first-touch, open or off"
    )
    max_open_shards: int | None = Field(
        None, gt=0, description="shards kept open at once; none: as many as the limit on open files allows"
    )
    max_unread: float = Field(
        0.25, ge=0, le=1, description="largest share of the tokens that no sequence may reach, at shard ends"
    )
    any_split: bool = Field(
        False, description="train on a part recorded as validation, or measure on one recorded as train"
    )
    max_epochs: int | None = Field(
        None, gt=0, description="passes over the data before StreamExhausted; none: cycle, and say so"
    )
    documents: Documents = Field(
        Documents.CONTINUE,
        description="attention in training: continue over document ends, or isolate each document",
    )
    access: ShardAccess = Field(
        ShardAccess.MMAP,
        description="mmap, or pread: for network storage, where a map turns errors to signals",
    )
    prefetch_batches: int | None = Field(
        None, ge=0, description="global batches made ahead by a thread; 0: none; none: by their size"
    )
    pin_memory: bool | None = Field(
        None, description="gather into page-locked memory; none: where a CUDA device is"
    )
    ignored_ids: Annotated[
        tuple[Annotated[int, Field(ge=0, lt=2**32)], ...], BeforeValidator(_ids_from_text)
    ] = Field((), description="targets that do not count in the loss, in training and evaluation (padding)")


class EvaluationSection(Section):
    """The held-out measurement."""

    sets: Annotated[
        Mapping[Annotated[str, Field(pattern=r"^[\w.-]+$")], Path], BeforeValidator(_paths_from_text)
    ] = Field(
        {}, description="in place of val_dataset: held-out folders by name, all measured at every evaluation"
    )
    counts: str | None = Field(
        None,
        description="with sets: the name of the one that targets and best checkpoints go by; none: first",
    )
    prompts: Path | None = Field(
        None, description="file of prompts that the model answers at every evaluation: lines, or JSON lines"
    )
    answer_tokens: int = Field(64, gt=0, description="longest answer to a prompt, in tokens")
    max_sequences: int | None = Field(
        None, gt=0, description="size of the fixed sample of the held-out part; none: all of it"
    )
    micro_batch_size: int | None = Field(
        None, gt=0, description="sequences per forward while evaluating; none: as in training"
    )
    max_shared: float = Field(
        0, ge=0, le=1, description="largest share of the held-out documents that may be trained on as well"
    )
    random_sequences: int = Field(
        4, ge=0, description="sequences an init is compared on with random weights first; 0: not compared"
    )


class EarlyStopSection(Section):
    """When a run ends before its steps do (GATE-TRAIN-004)."""

    patience: int = Field(2, gt=0, description="evaluations without improvement that are allowed")
    min_evaluations: int = Field(3, gt=0, description="never stop before this many evaluations")


class CheckpointSection(Section):
    """Which step folders a run keeps."""

    keep_last: int = Field(1, gt=0, description="newest step folders to keep")
    keep_best: int = Field(1, ge=0, description="also keep the steps with the lowest validation losses")
    final: FinalCheckpoint = Field(
        FinalCheckpoint.LAST,
        description="what checkpoint.apr is when the run has ended: the last step, or the best one kept",
    )
    keep_every: int | None = Field(None, gt=0, description="also keep every step divisible by this")
    background: bool = Field(
        True, description="write while training goes on, from copies in host memory, where they fit"
    )


class GuardsSection(Section):
    """What happens to a step whose figures are wrong, before its update (GATE-TRAIN-007)."""

    on_nonfinite: OnNonFinite = Field(
        OnNonFinite.STOP, description="a loss or gradient norm that is not finite: stop, or skip the step"
    )
    on_spike: OnSpike = Field(OnSpike.OFF, description="a step far above the median: off, skip or stop")
    spike_of: SpikeOf = Field(SpikeOf.GRAD_NORM, description="the figure compared: grad-norm or loss")
    spike_factor: float = Field(10.0, gt=1, description="how many times the median is far above it")
    spike_window: int = Field(64, gt=1, description="updates the median is of; none is judged before")
    max_skipped: int = Field(10, gt=0, description="skipped steps after which the run stops")


class ParallelSection(Section):
    """Processes and arithmetic."""

    strategy: StrategyChoice = Field(
        StrategyChoice.AUTO, description="how the model is spread; asserted against what really runs"
    )
    shard_size: int | None = Field(
        None, gt=0, description="with hsdp: processes that share one copy; none: those of one machine"
    )
    offload: Offload = Field(
        Offload.NONE,
        description="what lies in host memory: none, optimizer (single, ddp, ZeRO), optimizer+parameters"
        " (zero3, FSDP2)",
    )
    precision: Precision = Field(Precision.F32, description="compute type: f32 or bf16 autocast")
    cpu_threads: int | None = Field(
        None, gt=0, description="threads per process on CPU; none: cores divided by local processes"
    )
    timeout_s: float = Field(1800.0, gt=0, description="longest a collective may wait, in seconds")
    hang_s: float = Field(
        600.0, gt=0, description="a run in which no process has moved for this many seconds is ended"
    )


class MemorySection(Section):
    """How many bits a trained matrix and its gradient take; what each costs is in docs/memory.md."""

    weights: WeightStorage = Field(
        WeightStorage.F32,
        description="f32; split (bf16 and the low 16 bits: exact f32); bf16 (rounded stochastically);"
        " bf16-nearest",
    )
    gradients: GradientStorage = Field(
        GradientStorage.F32, description="f32, or bf16 with sums over micro-batches rounded stochastically"
    )


class TrackingSection(Section):
    """Where trackers file the run; each key is for the trackers that have such a thing."""

    project: str = Field("apr-dist", min_length=1, description="project of the run, for every tracker")
    entity: str | None = Field(
        None, min_length=1, description="team or user that owns the project: wandb, swanlab"
    )
    group: str | None = Field(
        None, min_length=1, description="group of runs within the project: wandb, swanlab, trackio"
    )
    tags: str = Field("", description="words to find the run by, by commas: wandb, swanlab")


class RouterSection(Section):
    """What the routers of a mixture of experts add to what is minimised; not in any reported loss."""

    aux_loss: float | None = Field(
        None,
        ge=0,
        description="weight of the load-balancing loss; none: the model's own (router_aux_loss_coef)",
    )
    z_loss: float = Field(
        0.0, ge=0, description="weight of the mean squared log-partition of the routers' logits"
    )


class ComputeSection(Section):
    """How the network is computed; none of it changes what is trained but z_loss."""

    kernels: KernelChoice = Field(
        KernelChoice.AUTO,
        description="implementation of the network: auto (by device), plain (PyTorch's own), cpu, cuda",
    )
    compile: Compile = Field(
        Compile.OFF, description="block: every block by PyTorch's compiler; off: as it is"
    )
    activation_checkpointing: ActivationCheckpointing = Field(
        ActivationCheckpointing.OFF,
        description="what a block computes twice to keep less: off, selective (all but attention and every"
        " second product), full, full-offload (its input waits in host memory)",
    )
    z_loss: float = Field(
        0.0,
        ge=0,
        description="weight of the squared log-partition added to the loss; not in any reported loss",
    )
