"""Adapters in files: the folder of ``peft``, and the APR file of a run's checkpoint.

``adapter_config.json`` says what the adapter is, ``adapter_model.safetensors`` holds its tensors under
``base_model.model.`` and the names of the base. The digest of the base, and the bits it was kept in, are in
the header of the second, where ``peft`` overlooks them; ``README.md`` tells a reader.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from apr_dist.apr.bounded_json import parse_object
from apr_dist.apr.digests import file_weights_digest
from apr_dist.apr.layout import DType
from apr_dist.apr.reader import AprReader, widen_bfloat16
from apr_dist.apr.writer import TensorSpec
from apr_dist.atomic_files import write_atomically, writing_to
from apr_dist.choices import AdapterInit, AdapterKind
from apr_dist.errors import DamagedModelFile, ModelFileMissing, UnsupportedModelFile, WeightsRefused
from apr_dist.gates.adapters import BASE, BASE_BITS, OTHER_BASE, STATED, refuse_other_base
from apr_dist.gates.weights import check_names_and_shapes
from apr_dist.interop.safetensors_file import SafetensorsFile, SafetensorsWriter
from apr_dist.model.adapters import (
    BIAS,
    FIRST,
    LENGTHS,
    ROW_OWNERS,
    ROWS,
    SECOND,
    Adapter,
    short_names,
)
from apr_dist.model.config import TransformerConfig

CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = "adapter_model.safetensors"
README: Final = "README.md"
_PREFIX: Final = "base_model.model."
_INSIDE: Final = ".base_layer."
_KEY: Final = "apr_dist.base_digest"

_DEFAULTS: Final[Mapping[str, tuple[Any, ...]]] = {
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "fan_in_fan_out": (None, False),
    "bias": (None, "none"),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "megatron_config": (None,),
    "alora_invocation_tokens": (None,),
    "use_qalora": (None, False),
    "use_bdlora": (None, False),
    "arrow_config": (None,),
    "corda_config": (None,),
    "eva_config": (None,),
    "velora_config": (None,),
    "monteclora_config": (None,),
    "kasa_config": (None,),
}
"""Keys of an adapter that say something else than a low-rank product, and the values by which they do not."""

_CHANGES_BASE: Final = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")
"""Initialisations that subtract something from the base's own weights, which a folder does not hold."""


@dataclass(frozen=True, kw_only=True)
class AdapterFile:
    """An open adapter.

    Attributes:
        path: folder or file.
        adapter: what it is.
        base_digest: identity of the weights it belongs to; None: its maker did not say.
        shapes: of its tensors, by canonical name.
        read: gives a tensor's f32 values by that name.
        stated: its configuration, as ``peft`` writes it.
        copies: weights of the base that ``peft`` put beside it, by the base's names.
    """

    path: Path
    adapter: Adapter
    base_digest: str | None
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]
    stated: Mapping[str, Any]
    copies: Mapping[str, np.ndarray]

    def refuse_other_base(self, base: AprReader) -> None:
        """Hold a file against the base that the adapter names, and what of it lies beside the adapter.

        A folder that names no base is taken at its word; ``base_digest`` says so.

        Raises:
            WeightsRefused: the file holds other weights.
        """
        if self.base_digest is not None:
            refuse_other_base(self.base_digest, file_weights_digest(base), where=self.path, base=base.path)
        for name, values in self.copies.items():
            if name not in base.tensors or not np.array_equal(base.float32(name), values):
                raise WeightsRefused(
                    f"the folder holds a {name} that is not the base's",
                    where=self.path,
                    expected="the base that the adapter was trained on, its own weights as they were",
                    remedy="merge it with peft's merge_and_unload, and import the merged folder",
                    falsifier=OTHER_BASE,
                )


def peft_config(adapter: Adapter, model: TransformerConfig, *, base: str | None = None) -> dict[str, Any]:
    """The content of ``adapter_config.json``.

    Args:
        adapter: what is described.
        model: the base's architecture.
        base: where the base was, for a reader.
    """
    alpha = int(adapter.alpha) if float(adapter.alpha).is_integer() else adapter.alpha
    return {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True if adapter.init is AdapterInit.KAIMING else adapter.init.value,
        "lora_alpha": alpha,
        "lora_bias": adapter.bias,
        "lora_dropout": adapter.dropout,
        "peft_type": "LORA",
        "r": adapter.rank,
        "target_modules": short_names(model, adapter.modules),
        "task_type": "CAUSAL_LM",
        "trainable_token_indices": _token_indices(adapter, model),
        "use_dora": adapter.kind is AdapterKind.DORA,
        "use_rslora": adapter.kind is AdapterKind.RSLORA,
    }


def _token_indices(adapter: Adapter, model: TransformerConfig) -> dict[str, list[int]] | None:
    """Which rows of what are trained, as ``peft`` says it; a tied head follows the embedding."""
    owners = [name for name in adapter.row_owners if f"{name}.weight" in model.parameter_shapes()]
    return {name.rpartition(".")[2]: list(adapter.tokens) for name in owners} if adapter.tokens else None


def write_peft_folder(checkpoint: Path, folder: Path) -> None:
    """Write a run's saved adapter as a ``peft`` folder, and read it back.

    Args:
        checkpoint: the APR file of the adapter.
        folder: to make, or whose two files are replaced.

    Raises:
        OutputError: it cannot be written.
        WeightsRefused: what is on disk is not what was read.
    """
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with AprReader(checkpoint) as reader:
        stated = reader.metadata.custom
        specs = [TensorSpec(_PREFIX + name, DType.F32, entry.shape) for name, entry in reader.tensors.items()]
        said = {_KEY: str(stated[BASE]), BASE_BITS: str(stated.get(BASE_BITS, 32))}
        with SafetensorsWriter(folder / WEIGHTS, specs, overwrite=True, said=said) as writer:
            for name in reader.tensors:
                writer.append(np.ascontiguousarray(reader.float32(name)))
        text = json.dumps(stated[STATED], indent=2, sort_keys=True) + "\n"
        write_atomically(folder / CONFIG, text.encode())
        write_atomically(folder / README, _readme(stated[STATED], said[_KEY], int(said[BASE_BITS])).encode())
        with SafetensorsFile(folder / WEIGHTS) as written:
            for name in reader.tensors:
                if not np.array_equal(_values(written, _PREFIX + name), reader.float32(name)):
                    raise WeightsRefused(
                        f"{name} on disk is not the tensor that was saved",
                        where=folder / WEIGHTS,
                        expected="every tensor back bit for bit",
                        remedy="check the disk; do not use this folder",
                        falsifier="FALSIFY-APR-DIST-CHECKPOINT-002",
                    )


_KEPT: Final[Mapping[int, str]] = {
    32: "in f32",
    16: "in bf16",
    8: "matrices of the blocks in 8 bits (int8 by rows, bitsandbytes), embedding and head in bf16",
    4: "matrices of the blocks in 4 bits (nf4 twice quantised, bitsandbytes), embedding and head in bf16",
}


def _readme(stated: Mapping[str, Any], base: str, bits: int) -> str:
    """A model card: what the adapter is, beside which weights it was trained, and how these were kept."""
    kind = "dora" if stated["use_dora"] else "rslora" if stated["use_rslora"] else "lora"
    lines = [
        *("---", "library_name: peft", "---", ""),
        f"An adapter ({kind} of rank {stated['r']}, alpha {stated['lora_alpha']}) trained by apr-dist.",
        "",
        f"- base: the weights with the digest `{base}`",
        f"- base in training: {_KEPT[bits]}",
    ]
    return "\n".join(lines) + "\n"


@contextmanager
def open_adapter(path: Path, model: TransformerConfig) -> Iterator[AdapterFile]:
    """An adapter for a model, every tensor proven to be there and finite.

    Args:
        path: a ``peft`` folder, whoever wrote it, or the checkpoint of a run's adapter.
        model: architecture of the base.

    Raises:
        ModelFileError: a file is missing, damaged, or uses what is not computed here.
        WeightsRefused: a tensor is missing, left over, misshapen, or not finite.
    """
    if path.is_dir():
        stated = _config(path / CONFIG)
        with SafetensorsFile(path / WEIGHTS) as file:
            odd = [name for name in file.tensors if not name.startswith(_PREFIX)]
            if odd:
                raise UnsupportedModelFile(
                    f"{odd[0]} is no tensor of a low-rank adapter of a whole model",
                    where=file.path,
                    expected=f"names that begin with {_PREFIX}",
                    remedy="save the adapter with peft's save_pretrained",
                )
            shapes = {name.removeprefix(_PREFIX): one.shape for name, one in file.tensors.items()}
            inside = [name for name in shapes if _INSIDE in name]
            copies = {name.replace(_INSIDE, "."): _values(file, _PREFIX + name) for name in inside}
            shapes = {name: shape for name, shape in shapes.items() if name not in inside}
            yield _proven(
                AdapterFile(
                    path=path,
                    adapter=_adapter(stated, shapes, path / CONFIG, file.said.get(BASE_BITS)),
                    base_digest=file.said.get(_KEY),
                    shapes=shapes,
                    read=lambda name: _values(file, _PREFIX + name),
                    stated=stated,
                    copies=copies,
                ),
                model,
            )
        return
    with AprReader(path) as reader:
        content = reader.metadata.custom.get(STATED)
        if not isinstance(content, dict):
            raise UnsupportedModelFile(
                "the file holds a model, not an adapter",
                where=path,
                expected=f"a folder with {CONFIG} and {WEIGHTS}, or the checkpoint of a run's adapter",
                remedy="give the folder adapter/ of the run",
            )
        shapes = {name: entry.shape for name, entry in reader.tensors.items()}
        base = reader.metadata.custom.get(BASE)
        yield _proven(
            AdapterFile(
                path=path,
                adapter=_adapter(content, shapes, path, reader.metadata.custom.get(BASE_BITS)),
                base_digest=base if isinstance(base, str) else None,
                shapes=shapes,
                read=reader.float32,
                stated=content,
                copies={},
            ),
            model,
        )


def _config(path: Path) -> dict[str, Any]:
    try:
        return parse_object(path.read_bytes())
    except FileNotFoundError as error:
        raise ModelFileMissing(
            "there is no adapter",
            where=path.parent,
            expected=f"a folder with {CONFIG} and {WEIGHTS}",
            remedy="check the path; a run writes one to RUN_DIR/adapter",
        ) from error
    except (OSError, ValueError) as error:
        raise DamagedModelFile(
            f"{CONFIG} cannot be read ({error})",
            where=path,
            expected="a JSON object, as peft writes it",
            remedy="copy the folder again",
        ) from error


def _adapter(
    stated: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: Path, bits: Any
) -> Adapter:
    """What a configuration says, for the modules that have tensors; ``bits`` of the base, where known.

    Raises:
        UnsupportedModelFile: it says something that is not computed here, named.
        DamagedModelFile: rank or alpha is no number.
    """
    if stated.get("peft_type") != "LORA":
        raise _unsupported("peft_type", stated.get("peft_type"), "LORA", where)
    for key, usual in _DEFAULTS.items():
        if stated.get(key) not in usual:
            raise _unsupported(key, stated[key], "the default", where)
    init = stated.get("init_lora_weights")
    if isinstance(init, str) and init.startswith(_CHANGES_BASE):
        raise _unsupported("init_lora_weights", init, "one that leaves the base as it is", where)
    rank, alpha = stated.get("r"), stated.get("lora_alpha")
    if not (isinstance(rank, int) and rank > 0) or not (
        isinstance(alpha, int | float) and 0 < alpha < math.inf
    ):
        raise DamagedModelFile(
            f"r is {rank!r} and lora_alpha is {alpha!r}",
            where=where,
            expected="a positive whole number and a number",
            remedy="copy the folder again",
        )
    kind = AdapterKind.DORA if stated.get("use_dora") else AdapterKind.LORA
    if stated.get("use_rslora"):
        if kind is AdapterKind.DORA:
            raise _unsupported("use_rslora", True, "false with use_dora", where)
        kind = AdapterKind.RSLORA
    if str(bits or 32) not in {str(known) for known in _KEPT}:
        raise _unsupported(BASE_BITS, bits, f"one of {', '.join(map(str, _KEPT))}", where)
    ends = (FIRST, SECOND, BIAS, LENGTHS)
    owners = (name.removesuffix(f".{end}") for name in shapes for end in ends if name.endswith(f".{end}"))
    return Adapter(
        kind=kind,
        rank=rank,
        alpha=alpha,
        dropout=0.0,
        modules=tuple(dict.fromkeys(owners)),
        bias=bool(stated.get("lora_bias")),
        tokens=_tokens(stated.get("trainable_token_indices"), shapes, where),
        row_owners=tuple(name for name in ROW_OWNERS if f"{name}.{ROWS}" in shapes),
        base_bits=int(bits or 32),
    )


def _tokens(said: Any, shapes: Mapping[str, tuple[int, ...]], where: Path) -> tuple[int, ...]:
    """The ids whose rows are trained, in the order of the rows.

    Raises:
        UnsupportedModelFile: other rows of the head than of the embedding, or of something else.
    """
    if not said:
        return ()
    owners = [name for name in ROW_OWNERS if f"{name}.{ROWS}" in shapes]
    by_owner = said if isinstance(said, dict) else {"embed_tokens": said}
    lists = [ids for ids in by_owner.values() if isinstance(ids, list)]
    known = {name.rpartition(".")[2] for name in ROW_OWNERS}
    same = len(lists) == len(by_owner) and all(ids == lists[0] for ids in lists)
    if not owners or not same or not {name.rpartition(".")[2] for name in by_owner} <= known:
        raise _unsupported(
            "trainable_token_indices", said, "the same rows of embed_tokens and lm_head", where
        )
    if not all(type(one) is int and one >= 0 for one in lists[0]):
        raise _unsupported("trainable_token_indices", said, "ids", where)
    return tuple(lists[0])


def _unsupported(key: str, value: Any, expected: str, where: Path) -> UnsupportedModelFile:
    return UnsupportedModelFile(
        f"{key} is {value!r}"[:200],
        where=where,
        expected=expected,
        remedy="merge it with peft's merge_and_unload, and import the merged folder",
    )


def _proven(file: AdapterFile, model: TransformerConfig) -> AdapterFile:
    known = model.parameter_shapes()
    strange = [name for name in file.adapter.modules if len(known.get(f"{name}.weight", ())) != 2]
    joined = [
        name for name in strange if name.endswith(tuple(f".{one}" for one in model.family.definition.joined))
    ]
    if joined:
        raise UnsupportedModelFile(
            f"the adapter is for {joined[0]}, which is several maps in an APR file",
            where=file.path,
            expected=f"an adapter of maps that the files of {model.family} models hold apart",
            remedy="merge it with peft's merge_and_unload, and import the merged folder",
        )
    if strange or not file.adapter.modules:
        raise WeightsRefused(
            f"the adapter is for {strange[0] if strange else 'nothing'}, which the base does not have",
            where=file.path,
            expected="linear maps of the base",
            remedy="give the base that the adapter was trained on",
        )
    beyond = [one for one in file.adapter.tokens if one >= model.vocab_size]
    if beyond:
        raise WeightsRefused(
            f"the adapter has a row for token {beyond[0]:,}, and the base has {model.vocab_size:,} rows",
            where=file.path,
            expected="rows of the base",
            remedy="give the base that the adapter was trained on, its new tokens added",
        )
    check_names_and_shapes(file.adapter.shapes(model), file.shapes, where=file.path)
    for name in file.shapes:
        if not np.isfinite(file.read(name)).all():
            raise WeightsRefused(
                f"{name} holds a value that is not finite",
                where=file.path,
                expected="finite values",
                remedy="use an earlier checkpoint of the adapter",
            )
    return file


def _values(file: SafetensorsFile, name: str) -> np.ndarray:
    entry = file.tensors[name]
    content = b"".join(bytes(piece) for piece in file.pieces(entry, 1 << 24))
    if entry.dtype is DType.BF16:
        return widen_bfloat16(np.frombuffer(content, np.uint16)).reshape(entry.shape)
    kind = {DType.F16: np.float16, DType.F64: np.float64}.get(entry.dtype, np.float32)
    return np.frombuffer(content, kind).astype(np.float32).reshape(entry.shape)
