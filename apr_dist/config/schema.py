"""The run's configuration: one validated, frozen tree of values, from YAML and the command line.

Every key exists once. Its dotted path is the key in the YAML file and the flag on the command line
(``optimizer.weight_decay`` is ``--optimizer.weight-decay``); a flag wins over the file. What a mode
defaults to (learning rate, warm-up, target) is resolved here and nowhere else, so what a run stores
is what it used. How text becomes values is in ``reading``; whether files are good is for the gates.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, Field, field_validator
from pydantic.fields import FieldInfo

from apr_dist.choices import TRACKERS, Device, Mode, ProgressStyle
from apr_dist.config.sections import (
    MODE_DEFAULTS,
    AdapterSection,
    CheckpointSection,
    ComputeSection,
    EarlyStopSection,
    EvaluationSection,
    GuardsSection,
    LoaderSection,
    MemorySection,
    OptimizerSection,
    ParallelSection,
    RouterSection,
    Section,
    TrackingSection,
)


class TrainConfig(Section):
    """One training run, as a YAML file or as flags of ``apr_dist/train.py``."""

    init: Path | None = Field(None, description="pretrained APR v2 file to start from; none: from scratch")
    mode: Mode = Field(Mode.FINETUNE, description="set of defaults: finetune or from-scratch")
    model: str = Field(
        "llama-370m", description="without init: a preset's name, or a JSON file of architecture keys"
    )
    dataset: Path | None = Field(None, description="folder of training shards with manifest.json")
    val_dataset: Path | None = Field(None, description="folder of held-out shards with manifest.json")
    tokenizer: Path | None = Field(None, description="tokenizer folder; none: beside or inside the init file")
    run_dir: Path = Field(
        Path("runs/latest"), description="folder this run writes into; must be new or empty"
    )
    overwrite: bool = Field(False, description="replace the files of a finished run in run_dir")
    resume: str = Field("never", description="never, auto (newest whole step folder of run_dir), or its path")
    resume_allow: str = Field("", description="keys, by commas, that a resumed run may change")
    num_steps: int = Field(1000, ge=0, description="optimizer steps; 0 loads, evaluates and saves")
    eval_every: int = Field(
        100, gt=0, description="steps between evaluations; the last step is evaluated too"
    )
    save_every: int | None = Field(
        None, gt=0, description="steps between saves; also after the last step; none: as eval_every"
    )
    batch_size: int = Field(16, gt=0, description="sequences per optimizer step, over all processes")
    micro_batch_size: int | None = Field(
        None, gt=0, description="sequences per process and forward; none: batch_size over processes"
    )
    seq_length: int = Field(1024, gt=0, description="tokens per sequence")
    lr: float | None = Field(None, gt=0, description="peak learning rate; none: the mode's")
    warmup_steps: int | None = Field(None, ge=0, description="steps of linear warm-up; none: the mode's")
    target_val_loss: float | None = Field(
        None, gt=0, description="validation loss in nats per token to reach; none: the mode's"
    )
    seed: int = Field(42, ge=0, lt=2**63, description="of the data order and of weights from scratch")
    device: Device = Field(Device.AUTO, description="auto, cpu or cuda")
    synthetic: bool = Field(False, description="train on made-up tokens; every line and the verdict say so")
    progress: ProgressStyle = Field(
        ProgressStyle.AUTO,
        description="what is shown: auto, rich (live picture), plain (a line a step) or quiet (the verdict)",
    )
    track: str = Field(
        "", description="trackers to tell, by commas: tensorboard, wandb, trackio or another of Accelerate's"
    )
    tracking: TrackingSection = TrackingSection()
    optimizer: OptimizerSection = OptimizerSection()
    adapter: AdapterSection = AdapterSection()
    loader: LoaderSection = LoaderSection()
    log_every: int | None = Field(
        None, gt=0, description="steps between readings of loss and norm; none: 1 on CPU, 10 on CUDA"
    )
    evaluation: EvaluationSection = EvaluationSection()
    early_stop: EarlyStopSection = EarlyStopSection()
    checkpoint: CheckpointSection = CheckpointSection()
    guards: GuardsSection = GuardsSection()
    parallel: ParallelSection = ParallelSection()
    memory: MemorySection = MemorySection()
    compute: ComputeSection = ComputeSection()
    router: RouterSection = RouterSection()

    @field_validator("resume_allow")
    @classmethod
    def _known_keys(cls, named: str) -> str:
        known = [key for key, _ in leaves(cls)]
        for key in filter(None, (key.strip() for key in named.split(","))):
            if key not in known:
                close = RENAMED.get(key) or nearest(key, known)
                raise ValueError(f"keys of the configuration; there is no {key}, nearest is {close}")
        return named

    @field_validator("track")
    @classmethod
    def _known_trackers(cls, value: str) -> str:
        for name in _by_commas(value):
            if name not in TRACKERS:
                close = nearest(name, TRACKERS)
                hint = f"; the nearest to {name} is {close}" if close else ""
                raise ValueError(f"names among {', '.join(TRACKERS)}{hint}")
        return value

    @property
    def trackers(self) -> tuple[str, ...]:
        """The names in ``track``, each once."""
        return tuple(dict.fromkeys(_by_commas(self.track)))

    def resolved(self) -> TrainConfig:
        """The same run with every mode default filled in; an explicit value wins alone."""
        return self.model_copy(
            update={"lr": self.peak_lr, "warmup_steps": self.warmup, "target_val_loss": self.target}
        )

    @property
    def held_out(self) -> dict[str, Path]:
        """Folders of held-out shards by name, the one that counts first; empty without any."""
        sets = dict(self.evaluation.sets)
        if not sets:
            return {} if self.val_dataset is None else {"validation": self.val_dataset}
        first = self.evaluation.counts if self.evaluation.counts in sets else next(iter(sets))
        return {first: sets[first], **sets}

    @property
    def save_period(self) -> int:
        """Steps between saves: those given, else as many as between evaluations."""
        return self.save_every or self.eval_every

    @property
    def peak_lr(self) -> float:
        """Peak learning rate: the one given, else the mode's."""
        return MODE_DEFAULTS[self.mode].lr if self.lr is None else self.lr

    @property
    def warmup(self) -> int:
        """Warm-up length in steps: the one given, else the mode's."""
        return MODE_DEFAULTS[self.mode].warmup_steps if self.warmup_steps is None else self.warmup_steps

    @property
    def target(self) -> float:
        """Target validation loss in nats per token: the one given, else the mode's."""
        defaults = MODE_DEFAULTS[self.mode]
        return defaults.target_val_loss if self.target_val_loss is None else self.target_val_loss

    def micro_batch(self, world_size: int) -> int:
        """Sequences per process and forward: those given, else a batch divided over the processes."""
        return self.micro_batch_size or max(1, self.batch_size // world_size)

    def to_yaml(self) -> str:
        """The configuration as YAML text that ``--config`` reads back to an equal one."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def digest(self) -> str:
        """``sha256:...`` over every key that changes what is trained (not where it is written)."""
        return _digest(self.resolved().model_dump(mode="json"), NOT_THE_MATHEMATICS)


RENAMED: Mapping[str, str] = {
    "steps_per_epoch": "eval_every",
    "early_stop.min_epochs": "early_stop.min_evaluations",
}
"""Keys of earlier versions: read in what a run has saved, refused in what a user writes."""

NOT_THE_MATHEMATICS = (
    *("run_dir", "overwrite", "resume", "resume_allow", "checkpoint", "save_every", "log_every"),
    *("init", "dataset", "val_dataset", "tokenizer", "progress", "track", "tracking"),
)
"""Where things are, what is shown and how long they are kept; files are identified by their own digests."""


def digests_of_saved(tree: Mapping[str, Any]) -> set[str]:
    """What ``digest`` gave, in this version or an earlier one, for a configuration that a run saved.

    A digest covers the names of keys, so it is computed from the keys that are there, under the names they
    had when they were written, and not from those of today.
    """
    return {_digest(tree, [key for key in NOT_THE_MATHEMATICS if key not in counted]) for counted in _COUNTED}


def _digest(tree: Mapping[str, Any], left_out: Sequence[str]) -> str:
    facts = {key: value for key, value in tree.items() if key not in left_out}
    for section, places in _PLACES.items():
        facts[section] = {key: value for key, value in facts.get(section, {}).items() if key not in places}
    return "sha256:" + hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


_PLACES = {"loader": ("mixture",), "evaluation": ("sets", "counts", "prompts", "answer_tokens")}
"""Keys of sections that are left out as well: where data lie, and what is shown of a run."""

_COUNTED: tuple[tuple[str, ...], ...] = ((), ("save_every",), ("save_every", "log_every"))
"""Keys that are left out of a digest and that this version, then earlier ones, counted all the same."""


def _by_commas(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def leaves(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every settable key as (dotted path, field), in the order they are written."""
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from leaves(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def flag_of(key: str) -> str:
    """The command-line flag of a dotted key."""
    return "--" + key.replace("_", "-")


def nearest(word: str, known: Sequence[str]) -> str | None:
    """The known word a mistyped one most resembles, or None."""
    found = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return found[0] if found else None
