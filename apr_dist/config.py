"""The run's configuration: one validated, frozen tree of values, from YAML and the command line.

Every key exists once. Its dotted path is the key in the YAML file and the flag on the command line
(``optimizer.weight_decay`` is ``--optimizer.weight-decay``); a flag wins over the file. What a mode
defaults to (learning rate, warm-up, target) is resolved here and nowhere else, so what a run stores
is what it used. Parsing the text is here; deciding whether files are good is for the gates.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, NoReturn, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from apr_dist.errors import UsageError


class Mode(StrEnum):
    """Which set of defaults a run starts from."""

    FINETUNE = "finetune"
    FROM_SCRATCH = "from-scratch"


class Device(StrEnum):
    """Where tensors live; ``auto`` is CUDA where there is one."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class StrategyChoice(StrEnum):
    """How the model is spread over processes.

    ``auto`` is single for one process, else what the launcher's configuration names, else DDP.
    """

    AUTO = "auto"
    SINGLE = "single"
    DDP = "ddp"
    FSDP2 = "fsdp2"
    SHARD_GRAD_OP = "shard-grad-op"
    HSDP = "hsdp"
    ZERO1 = "zero1"
    ZERO2 = "zero2"
    ZERO3 = "zero3"


class Precision(StrEnum):
    """Compute type of forward and backward; weights and optimizer state stay f32."""

    F32 = "f32"
    BF16 = "bf16"


class ShuffleOrder(StrEnum):
    """Unit of the keyed permutation: single sequences, or blocks of neighbouring ones (views)."""

    SEQUENCE = "sequence"
    BLOCK = "block"


class VerifyShards(StrEnum):
    """When a shard's recorded hash is compared with its bytes."""

    FIRST_TOUCH = "first-touch"
    OPEN = "open"
    OFF = "off"


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
    """A group of keys; unknown keys are errors, values never change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_enum_values=False)


class OptimizerSection(Section):
    """AdamW and the learning-rate schedule's tail."""

    weight_decay: float = Field(0.01, ge=0, description="decoupled weight decay, on matrices only")
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of the first moment")
    beta2: float = Field(0.999, ge=0, lt=1, description="decay of the second moment")
    eps: float = Field(1e-8, gt=0, description="added to the root of the second moment")
    grad_clip: float = Field(1.0, gt=0, description="largest global gradient norm that is applied")
    lr_min_ratio: float = Field(0.01, ge=0, le=1, description="end of the cosine, as a share of lr")


class LoaderSection(Section):
    """How training sequences are drawn from the shards."""

    shuffle: ShuffleOrder = Field(
        ShuffleOrder.SEQUENCE,
        description="sequence: any row after any other, one copy a batch; block: rows in blocks, no copy",
    )
    block_sequences: int = Field(8, gt=0, description="rows of a block; part of the order, like the seed")
    verify: VerifyShards = Field(
        VerifyShards.FIRST_TOUCH, description="when shard hashes are checked: first-touch, open or off"
    )
    max_epochs: int | None = Field(
        None, gt=0, description="passes over the data before StreamExhausted; none: cycle, and say so"
    )


class EvaluationSection(Section):
    """The held-out measurement."""

    max_sequences: int | None = Field(
        None, gt=0, description="size of the fixed sample of the held-out part; none: all of it"
    )
    micro_batch_size: int | None = Field(
        None, gt=0, description="sequences per forward while evaluating; none: as in training"
    )


class EarlyStopSection(Section):
    """When a run ends before its steps do (GATE-TRAIN-004)."""

    patience: int = Field(2, gt=0, description="evaluations without improvement that are allowed")
    min_epochs: int = Field(3, gt=0, description="never stop before this many evaluations")


class CheckpointSection(Section):
    """Which step folders a run keeps."""

    keep_last: int = Field(1, gt=0, description="newest step folders to keep")
    keep_every: int | None = Field(None, gt=0, description="also keep every step divisible by this")


class ParallelSection(Section):
    """Processes and arithmetic."""

    strategy: StrategyChoice = Field(
        StrategyChoice.AUTO, description="how the model is spread; asserted against what really runs"
    )
    shard_size: int | None = Field(
        None, gt=0, description="with hsdp: processes that share one copy; none: those of one machine"
    )
    precision: Precision = Field(Precision.F32, description="compute type: f32 or bf16 autocast")
    cpu_threads: int | None = Field(
        None, gt=0, description="threads per process on CPU; none: cores divided by local processes"
    )
    timeout_s: float = Field(1800.0, gt=0, description="longest a collective may wait, in seconds")


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
    steps_per_epoch: int = Field(100, gt=0, description="steps between evaluations and checkpoints")
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
    optimizer: OptimizerSection = OptimizerSection()
    loader: LoaderSection = LoaderSection()
    evaluation: EvaluationSection = EvaluationSection()
    early_stop: EarlyStopSection = EarlyStopSection()
    checkpoint: CheckpointSection = CheckpointSection()
    parallel: ParallelSection = ParallelSection()

    def resolved(self) -> TrainConfig:
        """The same run with every mode default filled in; an explicit value wins alone."""
        return self.model_copy(
            update={"lr": self.peak_lr, "warmup_steps": self.warmup, "target_val_loss": self.target}
        )

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

    def to_yaml(self) -> str:
        """The configuration as YAML text that ``--config`` reads back to an equal one."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def digest(self) -> str:
        """``sha256:...`` over every key that changes what is trained (not where it is written)."""
        facts = self.resolved().model_dump(mode="json")
        for name in _NOT_THE_MATHEMATICS:
            facts.pop(name)
        return "sha256:" + hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


_NOT_THE_MATHEMATICS = (
    *("run_dir", "overwrite", "resume", "resume_allow", "checkpoint"),
    *("init", "dataset", "val_dataset", "tokenizer"),
)
"""Where things are and how long they are kept; files are identified by their own digests."""


@dataclass(frozen=True)
class Invocation:
    """What one command line asked for."""

    config: TrainConfig
    debug: bool


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


def parse_command_line(arguments: Sequence[str]) -> Invocation:
    """Read flags (and the file ``--config`` names) into one validated configuration.

    Raises:
        UsageError: unknown flag or key (with the nearest match), bad value, unreadable file.
    """
    parser = _parser()
    given, unknown = parser.parse_known_args(list(arguments))
    if unknown:
        _refuse_unknown(
            unknown[0], [flag_of(key) for key, _ in leaves(TrainConfig)] + ["--config", "--debug"]
        )
    values = vars(given)
    debug, path = bool(values.pop("debug", False)), values.pop("config", None)
    tree = read_yaml(Path(path)) if path else {}
    for key, value in values.items():
        _put(tree, key, value)
    return Invocation(config=validate(tree, where="command line"), debug=debug)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a configuration file into a tree, refusing unknown keys by their path.

    Raises:
        UsageError: missing, not YAML, not a mapping, or with a key that does not exist.
    """
    tree = read_tree(path)
    _check_keys(tree, TrainConfig, path, "")
    return tree


def read_tree(path: Path) -> dict[str, Any]:
    """Read a configuration file into a tree of plain values, whatever its keys are.

    Raises:
        UsageError: missing, not YAML, or not a mapping.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(
            f"the configuration file cannot be read ({error.strerror})",
            where=path,
            expected="a YAML file",
            remedy="give the path of one of configs/*.yaml",
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(
            f"the configuration is not YAML ({' '.join(str(error).split())})",
            where=path,
            expected="YAML text",
        ) from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UsageError(
            f"the configuration is a {type(tree).__name__}",
            where=path,
            expected="a mapping of keys to values",
        )
    return tree


def validate(tree: Mapping[str, Any], *, where: str | Path) -> TrainConfig:
    """Turn a tree of plain values into a configuration.

    Raises:
        UsageError: naming the first key whose value is wrong, the value, and what it may be.
    """
    try:
        return TrainConfig.model_validate(tree)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UsageError(
            f"{key} is {first.get('input')!r}",
            where=where,
            expected=plain_message(first["msg"]),
            remedy=f"correct the key {key} (flag {flag_of(key)})",
        ) from error


def plain_message(message: str) -> str:
    """What a validation message asks for, to follow the word "expected"."""
    text = message.removeprefix("Input should be ").removeprefix("Value error, ")
    return text[:1].lower() + text[1:]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message, where="command line", remedy="see --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="train.py",
        description="Train a language model, from a pretrained APR file or from scratch.",
        epilog="Example: accelerate launch apr_dist/train.py --init model.apr --dataset data/train "
        "--val-dataset data/validation --run-dir runs/first --num-steps 500",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", metavar="PATH", help="YAML file of the keys below; a flag wins over it")
    parser.add_argument("--debug", action="store_true", help="show a traceback with an error")
    for key, field in leaves(TrainConfig):
        text = f"{field.description} (default: {_shown(field.get_default(call_default_factory=True))})"
        flag, help_text = flag_of(key), text.replace("%", "%%")
        if field.annotation is bool:
            parser.add_argument(flag, dest=key, action=argparse.BooleanOptionalAction, help=help_text)
        else:
            parser.add_argument(flag, dest=key, metavar=_metavar(field), help=help_text)
    return parser


def _shown(value: object) -> str:
    return "none" if value is None else str(value)


def _metavar(field: FieldInfo) -> str:
    kinds = [kind for kind in (get_args(field.annotation) or (field.annotation,)) if kind is not type(None)]
    kind = kinds[0]
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        return "{" + ",".join(kind) + "}"
    return getattr(kind, "__name__", "VALUE").upper()


def _put(tree: dict[str, Any], key: str, value: object) -> None:
    *groups, last = key.split(".")
    for group in groups:
        tree = tree.setdefault(group, {})
    tree[last] = None if value == "none" else value


def _check_keys(tree: Mapping[str, Any], section: type[BaseModel], path: Path, prefix: str) -> None:
    for key, value in tree.items():
        field = section.model_fields.get(str(key))
        if field is None:
            close = nearest(str(key), list(section.model_fields))
            raise UsageError(
                f"unknown key {prefix}{key}",
                where=path,
                expected=f"one of {', '.join(section.model_fields)}",
                remedy=f"did you mean {prefix}{close}?".rstrip("?") if close else "remove the key",
            )
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel) and isinstance(value, dict):
            _check_keys(value, inner, path, f"{prefix}{key}.")


def _refuse_unknown(argument: str, known: Sequence[str]) -> NoReturn:
    word = argument.split("=", 1)[0]
    close = nearest(word, known) if word.startswith("-") else None
    raise UsageError(
        f"unknown {'flag' if word.startswith('-') else 'argument'} {word}",
        where="command line",
        expected="one of the flags that --help lists",
        remedy=f"use {close}" if close else "see --help",
    )
