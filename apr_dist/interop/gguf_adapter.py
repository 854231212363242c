"""An adapter alone to GGUF, as llama.cpp loads one beside a model of its base.

``general.type`` is ``adapter``, ``adapter.type`` is ``lora``, ``adapter.lora.alpha`` what llama.cpp divides
by the rank; a map's factors are ``NAME.lora_a`` and ``NAME.lora_b`` behind its own name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from apr_dist.apr.reader import AprReader
from apr_dist.atomic_files import atomic_path
from apr_dist.choices import AdapterKind
from apr_dist.errors import DamagedModelFile, UnsupportedModelFile
from apr_dist.gates.model_file import prove_model
from apr_dist.interop.adapter_files import AdapterFile, open_adapter
from apr_dist.interop.gguf_file import load_gguf_package
from apr_dist.interop.gguf_names import adjacent_pairs, rotary_projection, to_gguf
from apr_dist.interop.hf_export import ExportSummary
from apr_dist.model.adapters import FIRST, SECOND
from apr_dist.model.config import TransformerConfig


def export_adapter_gguf(adapter: Path, base: Path, target: Path, *, overwrite: bool = False) -> ExportSummary:
    """Write an adapter as GGUF, its factors in F32.

    Args:
        adapter: ``peft`` folder, or the checkpoint of a run's adapter.
        base: APR file of the model that it belongs to.
        target: GGUF file to make.
        overwrite: whether ``target`` may exist.

    Raises:
        ModelFileError: a file cannot be read, or the adapter is one that llama.cpp does not compute.
        WeightsRefused: the adapter belongs to another base.
        OutputError: the target cannot be written.
        UsageError: the ``gguf`` package is not installed.
    """
    gguf = load_gguf_package()
    with AprReader(base) as reader:
        model = prove_model(reader).config
        with open_adapter(adapter, model) as opened:
            _refuse_unsayable(opened)
            opened.refuse_other_base(reader)
            tensors = _tensors(opened, model)
            alpha = opened.adapter.scale * opened.adapter.rank
            with atomic_path(target, overwrite=overwrite) as path:
                writer = gguf.GGUFWriter(path, model.family.definition.gguf.architecture)
                try:
                    writer.add_type(gguf.GGUFType.ADAPTER)
                    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
                    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
                    for name, values in tensors.items():
                        writer.add_tensor(name, values)
                    writer.write_header_to_file()
                    writer.write_kv_data_to_file()
                    writer.write_tensors_to_file()
                finally:
                    writer.close()
                _prove(gguf, path, tensors)
    return ExportSummary(
        source=adapter,
        target=target,
        format="gguf",
        tensor_count=len(tensors),
        size_bytes=target.stat().st_size,
        dtypes={"F32": len(tensors)},
        files=(target.name,),
    )


def _refuse_unsayable(opened: AdapterFile) -> None:
    what = "the row lengths of dora" if opened.adapter.kind is AdapterKind.DORA else None
    if opened.adapter.bias:
        what = "a trained bias"
    if opened.adapter.tokens:
        what = "trained rows of tokens"
    if what is not None:
        raise UnsupportedModelFile(
            f"a GGUF adapter cannot state {what}",
            where=opened.path,
            expected="lora or rslora without a bias",
            remedy="merge it (apr-dist merge), and export the merged model",
        )


def _tensors(opened: AdapterFile, model: TransformerConfig) -> dict[str, np.ndarray]:
    """Factors by their GGUF names; rows of q and k in the order in which llama.cpp rotates them."""
    form, found = model.family.definition.gguf, dict[str, np.ndarray]()
    for module in opened.adapter.modules:
        name = f"{module}.weight"
        first, second = opened.read(f"{module}.{FIRST}"), opened.read(f"{module}.{SECOND}")
        if form.permuted and rotary_projection(name) is not None:
            second = np.ascontiguousarray(adjacent_pairs(second, model.head_dim))
        found[f"{to_gguf(name, form)}.lora_a"] = np.ascontiguousarray(first)
        found[f"{to_gguf(name, form)}.lora_b"] = np.ascontiguousarray(second)
    return found


def _prove(gguf: Any, path: Path, tensors: dict[str, np.ndarray]) -> None:
    written = {one.name: one for one in gguf.GGUFReader(path).tensors}
    for name, values in tensors.items():
        held = written.get(name)
        if held is None or not np.array_equal(np.asarray(held.data).reshape(values.shape), values):
            raise DamagedModelFile(
                f"{name} on disk is not the tensor that was written",
                where=path,
                expected="every tensor back bit for bit",
                remedy="check the disk",
            )
