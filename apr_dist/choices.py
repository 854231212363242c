"""The words a user may choose from, each choice once. No logic: what a word means is where it is used."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum


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


class Strategy(StrEnum):
    """How parameters, gradients and optimizer state lie over the ranks."""

    SINGLE = "single"
    DDP = "ddp"
    FSDP2 = "fsdp2"
    SHARD_GRAD_OP = "shard-grad-op"
    HSDP = "hsdp"
    ZERO1 = "zero1"
    ZERO2 = "zero2"
    ZERO3 = "zero3"

    @property
    def is_fsdp(self) -> bool:
        """Whether PyTorch's FSDP2 shards parameters, gradients and optimizer state."""
        return self in {Strategy.FSDP2, Strategy.SHARD_GRAD_OP, Strategy.HSDP}

    @property
    def zero_stage(self) -> int:
        """DeepSpeed's ZeRO stage, 0 where DeepSpeed is not used."""
        return int(self.value.removeprefix("zero")) if self.value.startswith("zero") else 0

    @property
    def shards_parameters(self) -> bool:
        """Whether a rank holds a part of the parameters only, so that reading one is a collective."""
        return self.is_fsdp or self is Strategy.ZERO3

    @property
    def shards_optimizer(self) -> bool:
        """Whether a rank holds a part of the optimizer state only."""
        return self.is_fsdp or self.zero_stage > 0


class Offload(StrEnum):
    """What lies in host memory between its uses, where the strategy can."""

    NONE = "none"
    OPTIMIZER = "optimizer"
    OPTIMIZER_AND_PARAMETERS = "optimizer+parameters"


class WeightStorage(StrEnum):
    """How a trained matrix is stored.

    ``split`` is its bf16 rounding and the 16 bits that rounding lost, together the exact f32; ``bf16`` is
    rounded stochastically after each update, ``bf16-nearest`` to the nearest.
    """

    F32 = "f32"
    SPLIT = "split"
    BF16 = "bf16"
    BF16_NEAREST = "bf16-nearest"


class GradientStorage(StrEnum):
    """How the gradient of a trained matrix is stored between its backward and the update."""

    F32 = "f32"
    BF16 = "bf16"


class Precision(StrEnum):
    """Compute type of forward and backward; how weights are stored is ``memory.weights``."""

    F32 = "f32"
    BF16 = "bf16"


class ShuffleOrder(StrEnum):
    """Unit of the keyed permutation: single sequences, or blocks of neighbouring ones (views)."""

    SEQUENCE = "sequence"
    BLOCK = "block"


class VerifyShards(StrEnum):
    """When a shard's recorded hash is compared with its bytes."""

    FIRST_TOUCH = "first-touch"
    """Before its first sequence is handed out; once a host, which remembers it until it is started again."""
    OPEN = "open"
    """All of them before the loader is ready, in every process, whatever was verified before."""
    OFF = "off"


class ShardAccess(StrEnum):
    """How rows are read: out of a map of the shard, or with a system call each (network storage)."""

    MMAP = "mmap"
    """One that is truncated meanwhile is an error."""
    PREAD = "pread"


class Documents(StrEnum):
    """What attention does at a document's end inside a sequence."""

    CONTINUE = "continue"
    ISOLATE = "isolate"


class ScheduleKind(StrEnum):
    """Shape of the learning rate after warm-up; wsd is warm-up, stable, decay."""

    COSINE = "cosine"
    WSD = "wsd"
    LINEAR = "linear"
    CONSTANT = "constant"


class Compile(StrEnum):
    """What is handed to PyTorch's compiler."""

    OFF = "off"
    BLOCK = "block"


class KernelChoice(StrEnum):
    """Which set of kernels computes the decoder; ``auto`` is the one made for the device."""

    AUTO = "auto"
    PLAIN = "plain"
    CPU = "cpu"
    CUDA = "cuda"


class ActivationCheckpointing(StrEnum):
    """What a block computes again in its backward pass instead of keeping it.

    ``selective`` keeps attention and every second matrix product, ``full`` the block's input alone.
    """

    OFF = "off"
    SELECTIVE = "selective"
    FULL = "full"
    FULL_OFFLOAD = "full-offload"


class ProgressStyle(StrEnum):
    """What is shown during a run; ``auto`` is a live picture on a terminal and plain lines elsewhere."""

    AUTO = "auto"
    RICH = "rich"
    PLAIN = "plain"
    QUIET = "quiet"


class FinalCheckpoint(StrEnum):
    """Which saved step a finished run hands over as checkpoint.apr."""

    LAST = "last"
    BEST = "best"


class AdapterKind(StrEnum):
    """What is trained beside frozen weights; ``off``: the weights themselves.

    ``lora``: a low-rank map scaled by alpha / rank (arXiv:2106.09685); ``rslora``: by alpha / sqrt(rank)
    (arXiv:2312.03732); ``dora``: as lora, with a trained length for every row (arXiv:2402.09353).
    """

    OFF = "off"
    LORA = "lora"
    RSLORA = "rslora"
    DORA = "dora"


class AdapterInit(StrEnum):
    """How the first factor of an adapter begins; the second is zero, so that training begins at the base."""

    KAIMING = "kaiming"
    GAUSSIAN = "gaussian"


class MergeInto(StrEnum):
    """Which values of its base an adapter is merged into: as they were kept in training, or the file's own.

    They differ where the base was trained beside in fewer bits than its file has.
    """

    TRAINED = "trained"
    ORIGINAL = "original"


class OnNonFinite(StrEnum):
    """What a loss or gradient norm that is not finite does."""

    STOP = "stop"
    SKIP = "skip"


class OnSpike(StrEnum):
    """What a step far above the ones before it does."""

    OFF = "off"
    SKIP = "skip"
    STOP = "stop"


class SpikeOf(StrEnum):
    """By what a spike is recognised."""

    GRAD_NORM = "grad-norm"
    LOSS = "loss"


TRACKERS = ("aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb")
"""What ``track`` may name: the trackers that Accelerate knows, by its own names."""

TRACKER_OPTIONS: Mapping[str, Mapping[str, str]] = {
    "wandb": {"name": "name", "entity": "entity", "group": "group", "tags": "tags", "id": "id"},
    "swanlab": {
        "name": "experiment_name",
        "entity": "workspace",
        "group": "group",
        "tags": "tags",
        "id": "id",
    },
    "trackio": {"name": "name", "group": "group"},
}
"""Arguments of a tracker's own ``init`` by what they mean; other trackers take a project alone. All of these
resume: wandb and swanlab the run of an ``id``, trackio the run of a ``name``."""
