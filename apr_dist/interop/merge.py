"""An adapter merged into its base, tensor by tensor, and the proof that the result is what was trained.

The proof runs twice through the network, a block at a time (``layerwise``): the base with the adapter beside
it, by peft's layers; and the merged file, as it is on disk before it takes its name. A base that was kept in
fewer bits than its file has is merged as it was kept, because beside those values the adapter was trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor

from apr_dist.apr.digests import values_digest, weights_digest
from apr_dist.apr.layout import DType
from apr_dist.apr.metadata import AprMetadata
from apr_dist.apr.reader import AprReader
from apr_dist.apr.writer import AprWriter, TensorSpec
from apr_dist.choices import MergeInto
from apr_dist.errors import OutputError, WeightsRefused
from apr_dist.gates.adapters import keeps_values
from apr_dist.gates.architecture import HEAD
from apr_dist.gates.model_file import prove_model
from apr_dist.interop.adapter_files import AdapterFile, open_adapter
from apr_dist.interop.convert import Piece, Progress, converted_pieces, encode, kept_type, total_bytes
from apr_dist.interop.layerwise import layerwise_logits
from apr_dist.model.adapter_layers import merged_bias, merged_rows, merged_weight
from apr_dist.model.adapters import ROWS
from apr_dist.model.config import TransformerConfig
from apr_dist.model.quantized import kept_values

NOT_THE_SAME: Final = "FALSIFY-APR-DIST-ADAPTER-003"
"""Falsifier of every refusal of a merged model that is not its base with the adapter."""

BOUNDS: Final[Mapping[DType, float]] = {DType.F32: 1e-4, DType.F16: 5e-3, DType.BF16: 4e-2}
"""How far merged logits may be from those of base and adapter, as a share of the largest of these. In f32
only the order of sums differs; F16 and BF16 round every merged weight to 11 and 8 bits."""

PROBE: Final = (2, 24)
"""Sequences and tokens that the proof looks at."""


@dataclass(frozen=True, kw_only=True)
class MergeSummary:
    """What a merge made.

    Attributes:
        target: the APR file that was written.
        tensor_count: tensors in it.
        merged: linear maps that the adapter changed.
        size_bytes: length of the file.
        apart: largest difference of a logit, as a share of the largest, by stored type; f32 before rounding.
        effect: how far the adapter moves the base's logits, in the same measure.
        notes: what is worth telling, one sentence each.
    """

    target: Path
    tensor_count: int
    merged: int
    size_bytes: int
    apart: Mapping[DType, float]
    effect: float
    notes: tuple[str, ...] = ()


def merge_adapter(
    base: Path,
    adapter: Path,
    target: Path,
    *,
    dtype: DType | None = None,
    into: MergeInto = MergeInto.TRAINED,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> MergeSummary:
    """Write a base with an adapter merged into it, proven against base and adapter.

    Args:
        base: APR file of the model that the adapter was trained beside.
        adapter: ``peft`` folder, or the checkpoint of a run's adapter.
        target: APR file to make; it appears proven, or not at all.
        dtype: element type of every tensor; None keeps F32, F16 and BF16 and makes the rest F16.
        into: the base's values as they were kept in training, or the file's own.
        overwrite: whether ``target`` may exist.
        progress: told how far the writing is.

    Raises:
        ModelFileError: a file is missing, damaged, or uses what is not computed here.
        WeightsRefused: the adapter belongs to another base, or the merged logits are not the same.
        OutputError: the target cannot be written, or would take the place of the base.
    """
    if target.exists() and target.samefile(base):
        raise OutputError(
            "the merged model would replace its base, which the adapter belongs to",
            where=target,
            expected="another file",
            remedy="choose another path",
        )
    with AprReader(base) as reader:
        model = prove_model(reader).config
        with open_adapter(adapter, model) as opened:
            notes = _prove_base(reader, opened, base)
            specs, values = _specs(reader, model, dtype), _values(reader, opened, into)
            said: dict[DType, float] = {}
            effect: list[float] = []

            def prove(written: Path) -> None:
                with AprReader(written, verify="structure") as finished:
                    prove_model(finished, where=base)
                measured, moved = _prove_logits(values, opened, written, model, specs)
                said.update(measured)
                effect.append(moved)
                notes.extend(_notes(reader, opened, model, into))

            metadata, total, done = _metadata(reader.metadata, opened, reader, into), total_bytes(specs), 0
            with AprWriter(
                target, metadata=metadata, tensors=specs, overwrite=overwrite, prove=prove
            ) as writer:
                for spec in specs:
                    for piece in _pieces(reader, opened, spec, values):
                        writer.append(spec.name, piece)
                        done += piece.nbytes
                        if progress:
                            progress(done, total)
                    reader.forget(spec.name)
            modules = len(opened.adapter.modules)
    return MergeSummary(
        target=target,
        tensor_count=len(specs),
        merged=modules,
        size_bytes=target.stat().st_size,
        apart=said,
        effect=effect[0],
        notes=tuple(notes),
    )


def _prove_base(reader: AprReader, adapter: AdapterFile, base: Path) -> list[str]:
    adapter.refuse_other_base(reader)
    if adapter.base_digest is None:
        return [
            f"{adapter.path} does not say which weights it was trained beside: that {base} holds them is not"
            " proven"
        ]
    return []


def _notes(reader: AprReader, adapter: AdapterFile, model: TransformerConfig, into: MergeInto) -> list[str]:
    """What it means that the base was kept in fewer bits in training than its file has."""
    bits = adapter.adapter.base_bits
    if keeps_values(adapter.adapter, reader):
        return []
    if into is MergeInto.TRAINED:
        return [
            f"the base had {bits} bits in training and is merged as it was kept: the result computes what was"
            " trained; --into original merges into the file's own values"
        ]
    ids = _probe(model)
    trained, own = (
        layerwise_logits(model, _values(reader, adapter, one), ids, adapter)
        for one in (MergeInto.TRAINED, MergeInto.ORIGINAL)
    )
    apart = float((own - trained).abs().max() / trained.abs().max())
    return [
        f"the base had {bits} bits in training and the file's own values are merged: the adapter never saw"
        f" these, and the result's logits are {apart:.1e} of the largest apart from what was trained"
    ]


def _specs(reader: AprReader, model: TransformerConfig, dtype: DType | None) -> list[TensorSpec]:
    """What to write, in index order; a tied head is left out."""
    return [
        TensorSpec(entry.name, kept_type(entry, dtype), entry.shape)
        for entry in reader.tensors.values()
        if not (model.tie_word_embeddings and entry.name == HEAD)
    ]


def _metadata(metadata: AprMetadata, adapter: AdapterFile, reader: AprReader, into: MergeInto) -> AprMetadata:
    """The base's own, without what a run said of its weights, and what was merged."""
    kept = {key: value for key, value in metadata.custom.items() if not key.startswith("apr_dist.")}
    tensors = weights_digest({name: values_digest(adapter.read(name)) for name in adapter.shapes})
    plain = metadata.replace(created_at=None, quantization=None, total_size=None, param_count=None)
    return plain.replace(custom=kept).with_custom(
        {
            "apr_dist.merged_base": adapter.base_digest or reader.digest(),
            "apr_dist.merged_adapter": tensors,
            "apr_dist.merged_base_bits": adapter.adapter.base_bits if into is MergeInto.TRAINED else 32,
        }
    )


def _pieces(
    reader: AprReader, adapter: AdapterFile, spec: TensorSpec, values: Callable[[str], Tensor]
) -> Iterable[Piece]:
    """A tensor's bytes as they are to be stored."""
    merged = _merged(spec.name, values, adapter)
    if not _is_changed(spec.name, adapter) and np.array_equal(merged, reader.float32(spec.name)):
        return converted_pieces(reader, spec.name, spec.dtype)
    return [encode(merged.numpy(), spec.dtype, name=spec.name, where=reader.path)]


def _is_changed(name: str, adapter: AdapterFile) -> bool:
    module, _, kind = name.rpartition(".")
    if _has_rows(module, adapter):
        return True
    return module in adapter.adapter.modules and (kind == "weight" or adapter.adapter.bias)


def _has_rows(module: str, adapter: AdapterFile) -> bool:
    return f"{module}.{ROWS}" in adapter.shapes


def _merged(name: str, base: Callable[[str], Tensor], adapter: AdapterFile) -> Tensor:
    """The f32 values of a tensor of the base with the adapter in them."""
    values, (module, _, kind) = base(name), name.rpartition(".")
    if not _is_changed(name, adapter):
        return values
    given = (values, module, adapter.adapter, lambda tensor: torch.from_numpy(adapter.read(tensor)))
    if _has_rows(module, adapter):
        return merged_rows(*given)
    return merged_weight(*given) if kind == "weight" else merged_bias(*given)


def _file(reader: AprReader) -> Callable[[str], Tensor]:
    return lambda name: torch.utils.dlpack.from_dlpack(reader.float32(name))


def _values(reader: AprReader, adapter: AdapterFile, into: MergeInto) -> Callable[[str], Tensor]:
    """Gives the base's values that are merged into."""
    own = _file(reader)
    if into is MergeInto.ORIGINAL:
        return own
    return lambda name: kept_values(name, own(name), adapter.adapter)


def _probe(model: TransformerConfig) -> Tensor:
    """The token ids that the proof looks at."""
    draw = torch.Generator().manual_seed(0)
    length = min(PROBE[1], model.max_position_embeddings)
    return torch.randint(model.vocab_size, (PROBE[0], length), generator=draw)


def _prove_logits(
    base: Callable[[str], Tensor],
    adapter: AdapterFile,
    written: Path,
    model: TransformerConfig,
    specs: list[TensorSpec],
) -> tuple[dict[DType, float], float]:
    """Compare the merged logits with those of base and adapter: in f32, and as they are stored.

    Returns:
        the differences by type, and how far the adapter moves the base's logits.

    Raises:
        WeightsRefused: one of them is beyond its bound.
    """
    ids = _probe(model)
    expected = layerwise_logits(model, base, ids, adapter)
    largest = expected.abs().max()

    def apart(logits: Tensor) -> float:
        return float((logits - expected).abs().max() / largest)

    found = {DType.F32: apart(layerwise_logits(model, lambda name: _merged(name, base, adapter), ids))}
    coarsest = max((spec.dtype for spec in specs), key=lambda kind: BOUNDS[kind])
    with AprReader(written, verify="structure") as stored:
        found[coarsest] = apart(layerwise_logits(model, _file(stored), ids))
    for kind, distance in found.items():
        if not distance <= BOUNDS[kind]:
            raise WeightsRefused(
                f"logits of the merged model are {distance:.2e} of the largest apart from those of base and"
                f" adapter ({kind.name})",
                where=written,
                expected=f"at most {BOUNDS[kind]:.0e}",
                remedy="report this: the merged model is not the one that was trained"
                if kind is DType.F32
                else "merge with --dtype f32",
                falsifier=NOT_THE_SAME,
            )
    return found, apart(layerwise_logits(model, base, ids))
