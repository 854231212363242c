"""Training runs of a decoder some of whose parameters are frozen, through the trainer's entry point.

As a script this is the server of ``warm_ranks``, in which every decoder that is built has them frozen.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from builders.runs import once
from builders.several import HAS_COMPILER, LIMIT_S
from builders.warm_ranks import WarmRanks, serve

if TYPE_CHECKING:
    from builders.runs import Inputs

FROZEN = ("model.embed_tokens.weight", "model.layers.0.", "k_proj.bias", "model.norm.weight")
"""Parts of the names: the tied embedding, a whole block, single vectors."""

STRATEGIES = {
    "single": (1, "single"),
    "ddp": (2, "ddp"),
    "fsdp2": (2, "fsdp2"),
    "zero1": (2, "zero1"),
    "zero2": (2, "zero2"),
    "zero3": (2, "zero3"),
}
"""Name to world size and strategy."""

STEPS, HALF = 6, 3


def is_frozen(name: str) -> bool:
    """Whether the parameter of that name is not trained."""
    return any(part in name for part in FROZEN)


def make_runs(inputs: Inputs, root: Path) -> Path:
    """Each strategy's run ``NAME``, and ``NAME-resumed`` from the middle of it."""

    def make(folder: Path) -> None:
        ranks = WarmRanks(folder / "ranks", script=Path(__file__), deepspeed=HAS_COMPILER)
        for world in (1, 2):
            runs = [
                _flags(inputs, folder, name, strategy, resumed=resumed)
                for name, (size, strategy) in STRATEGIES.items()
                if size == world and (HAS_COMPILER or not strategy.startswith("zero"))
                for resumed in (False, True)
            ]
            ended = ranks.launch_all(runs, world_size=world, limit_s=LIMIT_S)
            assert ended.codes == (0,) * world, [text[-6000:] for text in ended.errors]
        ranks.close()

    return once(root, make)


def _flags(inputs: Inputs, folder: Path, name: str, strategy: str, *, resumed: bool) -> list[str]:
    run_dir = folder / (f"{name}-resumed" if resumed else name)
    given = [*inputs.data_flags(), "--init", str(inputs.pretrained), "--run-dir", str(run_dir)]
    given += ["--batch-size", "4", "--num-steps", str(STEPS), "--eval-every", str(HALF)]
    given += ["--lr", "1e-3", "--warmup-steps", "1", "--checkpoint.keep-last", "9"]
    given += ["--parallel.strategy", strategy, "--micro-batch-size", "2"]
    return [*given, "--resume", str(folder / name / "steps" / f"{HALF:06d}")] if resumed else given


def _freeze_every_decoder() -> None:
    from apr_dist.model.transformer import Decoder  # noqa: PLC0415  (imported by the server alone)

    build = Decoder.__init__

    def build_and_freeze(self: Decoder, *args: Any, **options: Any) -> None:
        build(self, *args, **options)
        for name, weight in self.named_parameters():
            weight.requires_grad_(not is_frozen(name))

    Decoder.__init__ = build_and_freeze  # type: ignore[method-assign]


if __name__ == "__main__":
    _freeze_every_decoder()
    serve()
