"""Adapters: low-rank maps beside frozen linear ones, which maps get one, and the names of what is trained.

``X.lora_A.weight`` ``[rank, in]`` and ``X.lora_B.weight`` ``[out, rank]`` belong to the linear map ``X``;
DoRA adds ``X.lora_magnitude_vector`` ``[out]``, a trained bias ``X.lora_B.bias`` ``[out]``: peft's names.
What computes them is in ``adapter_layers``. Nothing here needs PyTorch.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Final

from apr_dist.choices import AdapterInit, AdapterKind
from apr_dist.errors import UsageError
from apr_dist.model.config import TransformerConfig
from apr_dist.model.expert_options import ROUTER

ALL_LINEAR: Final = "all-linear"
"""Every linear map of the blocks; not the output head, as in peft."""

PEFT_NAME: Final = "default"
"""What peft calls the only adapter of a network."""

ROWS: Final = "token_adapter.trainable_tokens_delta"
"""Name of the trained rows ``[tokens, hidden]`` of an embedding or a head, behind its own: peft's too."""

FIRST, SECOND, BIAS, LENGTHS = "lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_magnitude_vector"
"""Names of the trained tensors of one linear map, behind the map's own."""

ROW_OWNERS: Final = ("model.embed_tokens", "lm_head")
"""What has a row for each token; a tied head has those of the embedding."""

BLOCKS: Final = "model.layers."
"""What the names of everything in a block begin with."""
_EXPERT_WORDS: Final = ("experts", "gate_up_proj", "gate", "gate_proj", "up_proj", "down_proj", "mlp")
"""What targets are called by which an adapter of experts or routers is asked for."""


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """What is trained beside the frozen weights of a decoder.

    Attributes:
        kind: lora, rslora or dora.
        rank: rows of the first factor.
        alpha: what the scale is made of.
        dropout: share of the inputs that are zero in training.
        modules: full names of the linear maps that have one, in the order of the network.
        bias: whether each has a bias of its own.
        init: how the first factor begins.
        base_bits: bits of the frozen matrices: 32, 16 (bf16), and 8 or 4 for those of the blocks, where
            embedding and head have 16.
        tokens: ids whose rows are trained in place of the frozen ones.
        row_owners: whose rows; a tied head has those of the embedding.
    """

    kind: AdapterKind
    rank: int
    alpha: float
    dropout: float
    modules: tuple[str, ...]
    bias: bool = False
    init: AdapterInit = AdapterInit.KAIMING
    base_bits: int = 32
    tokens: tuple[int, ...] = ()
    row_owners: tuple[str, ...] = ROW_OWNERS

    @property
    def scale(self) -> float:
        """Factor of the low-rank product."""
        return self.alpha / (math.sqrt(self.rank) if self.kind is AdapterKind.RSLORA else self.rank)

    @property
    def beside_floats(self) -> Adapter:
        """The same beside weights that are held in f32, whatever their values were made of."""
        return replace(self, base_bits=32)

    def base_bytes(self, name: str, shape: tuple[int, ...]) -> int:
        """Bytes that a frozen weight of that shape is kept in, with its scales."""
        count = math.prod(shape)
        if not self.is_coded(name, shape):
            return count * (2 if self.base_bits < 32 and is_halved(name, len(shape)) else 4)
        if self.base_bits == 8:
            return count + 4 * shape[0]
        blocks = -(-count // 64)  # a byte each, whose 256 values are listed, and four bytes for 256 blocks
        return -(-count // 2) + blocks + 4 * (-(-blocks // 256) + 1 + 256)

    def is_coded(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether a frozen weight is kept as codes of 4 or 8 bits: a linear map's matrix in a block."""
        matrix = len(shape) == 2 and is_halved(name, 2)
        return self.base_bits < 16 and matrix and name.startswith(BLOCKS)

    def shapes(self, config: TransformerConfig) -> dict[str, tuple[int, ...]]:
        """Shape of every trained tensor by name."""
        base, found = config.parameter_shapes(), dict[str, tuple[int, ...]]()
        for module in self.modules:
            outputs, inputs = base[f"{module}.weight"]
            found[f"{module}.{FIRST}"], found[f"{module}.{SECOND}"] = (
                (self.rank, inputs),
                (outputs, self.rank),
            )
            if self.bias:
                found[f"{module}.{BIAS}"] = (outputs,)
            if self.kind is AdapterKind.DORA:
                found[f"{module}.{LENGTHS}"] = (outputs,)
        for module in self.row_owners if self.tokens else ():
            if f"{module}.weight" in base:
                found[f"{module}.{ROWS}"] = (len(self.tokens), base[f"{module}.weight"][1])
        return found


def is_halved(name: str, dimensions: int) -> bool:
    """Whether a frozen weight is a matrix, or one for each expert; a router's stays f32, as its logits."""
    return dimensions >= 2 and not name.endswith(ROUTER)


def linear_maps(config: TransformerConfig) -> list[str]:
    """Full names of the linear maps of a decoder, a head of its own among them, in the network's order.

    Neither experts nor routers are among them: no adapter is put around these.
    """
    shapes = config.parameter_shapes().items()
    names = (name for name, shape in shapes if len(shape) == 2 and not name.endswith(ROUTER))
    return [name.removesuffix(".weight") for name in names if name != "model.embed_tokens.weight"]


def chosen_modules(
    config: TransformerConfig, targets: Iterable[str], layers: Iterable[int] = ()
) -> tuple[str, ...]:
    """The linear maps that names and patterns mean.

    Args:
        config: of the decoder.
        targets: ``all-linear``, ends of names such as ``q_proj`` or ``mlp.up_proj``, or patterns of whole
            names such as ``*.mlp.*``.
        layers: numbers of the blocks; none: all.

    Raises:
        UsageError: a target or a number that is nothing in this model; the text lists what there is.
    """
    maps, wanted = linear_maps(config), set[str]()
    numbers = set(layers)
    if numbers and max(numbers) >= config.num_layers:
        raise UsageError(
            f"there is no block {max(numbers)} in a model of {config.num_layers} blocks",
            where="--adapter.layers",
            expected=f"numbers from 0 to {config.num_layers - 1}",
            remedy="leave out the numbers that are too large",
        )
    kept = [name for name in maps if not numbers or _block(name) in numbers]
    for target in targets:
        found = [name for name in kept if _is_meant(name, target)]
        if not found:
            of_experts = config.num_experts is not None and any(
                part in _EXPERT_WORDS for part in target.replace("*", ".").split(".")
            )
            raise UsageError(
                f"the target {target!r} is part of a mixture of experts, whose experts and routers get no"
                " adapter"
                if of_experts
                else f"the target {target!r} is no linear map"
                + (" of those blocks" if numbers else " of this model"),
                where="--adapter.targets",
                expected=f"{ALL_LINEAR}, or some of {', '.join(_kinds(kept))}",
                remedy="write one of them, or a pattern of whole names such as '*.mlp.*'",
            )
        wanted.update(found)
    _refuse_joined(config, [name for name in maps if name in wanted], maps)
    if not wanted:
        raise UsageError(
            "no target is named", where="--adapter.targets", expected=ALL_LINEAR, remedy="name at least one"
        )
    return tuple(name for name in maps if name in wanted)


def _refuse_joined(config: TransformerConfig, wanted: Iterable[str], maps: Iterable[str]) -> None:
    """Refuse maps that are rows of one matrix in peft's base, which no folder of peft could name."""
    joined = config.family.definition.joined
    parts = {f".{part}": whole for whole, several in joined.items() for part in several}
    for name in wanted:
        whole = next((whole for part, whole in parts.items() if name.endswith(part)), None)
        if whole is not None:
            apart = list(
                _kinds(one for one in maps if _block(one) is not None and not one.endswith(tuple(parts)))
            )
            raise UsageError(
                f"{name} is a part of {whole} in the files of {config.family} models, where peft has one map",
                where="--adapter.targets",
                expected=f"some of {', '.join(apart)}",
                remedy=f"write --adapter.targets {','.join(apart)}, or train the weights themselves",
            )


def short_names(config: TransformerConfig, modules: Iterable[str]) -> list[str]:
    """Names by which peft finds just these modules: their last parts, where no other ends so."""
    modules = list(modules)
    ends = sorted({name.rpartition(".")[2] for name in modules})
    same = [name for name in linear_maps(config) if name.rpartition(".")[2] in ends]
    return ends if same == modules else modules


def is_adapter(name: str) -> bool:
    """Whether a parameter of that name belongs to an adapter."""
    return ".lora_" in name or name.endswith(ROWS)


def canonical(name: str) -> str:
    """The name in files of a network's parameter: the base's own, and peft's without the adapter's name."""
    plain = name.replace(".base_layer.", ".").replace(f".{PEFT_NAME}.", ".")
    return plain.removesuffix(".weight") if plain.endswith(f"{LENGTHS}.weight") else plain


def block_of(name: str, head: int) -> int:
    """The number of the block that a map is in; ``head`` for one that is in none."""
    number = _block(name)
    return head if number is None else number


def _block(name: str) -> int | None:
    return int(name.removeprefix(BLOCKS).partition(".")[0]) if name.startswith(BLOCKS) else None


def _is_meant(name: str, target: str) -> bool:
    if target == ALL_LINEAR:
        return _block(name) is not None
    if any(sign in target for sign in "*?["):
        return fnmatch.fnmatchcase(name, target)
    return name == target or name.endswith(f".{target}")


def _kinds(names: Iterable[str]) -> Iterator[str]:
    """Last parts of the names, each once."""
    yield from dict.fromkeys(name.rpartition(".")[2] for name in names)
