"""APR files for tests: good ones through the writer, hostile ones byte by byte with valid checksums."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import struct
import subprocess
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from apr_dist.apr.layout import DType, Flag, Header, align
from apr_dist.apr.metadata import AprMetadata
from apr_dist.apr.reader import AprReader
from apr_dist.apr.writer import AprWriter, TensorSpec

_DTYPES = {"<f4": DType.F32, "<f2": DType.F16, "<u2": DType.BF16}

GOLDEN_METADATA: Mapping[str, Any] = {
    "model_type": "linear_regression",
    "name": "golden-v2",
    "version": "0.0.0-golden",
    "created_at": "1700000000",
    "total_size": 0,
    "param_count": 8,
}
GOLDEN_TENSORS: Mapping[str, npt.NDArray[np.float32]] = {
    "weights": np.array([1, 2, 0.5, -0.5, 4, -2, 0.25, 8], np.float32),
    "bias": np.array([0.125], np.float32),
}

RawEntry = tuple[bytes, int, Sequence[int], int, int]
"""Name, dtype code, dims, offset and size of an index entry, none of them checked."""


def write_apr(
    path: Path,
    tensors: Mapping[str, npt.NDArray[Any]],
    metadata: Mapping[str, Any] | None = None,
    *,
    flags: Flag = Flag.ROW_MAJOR,
    overwrite: bool = False,
) -> Path:
    """Write arrays (float32, float16, or uint16 for BF16) and flat metadata as an APR file."""
    specs = [TensorSpec(name, _DTYPES[array.dtype.str], array.shape) for name, array in tensors.items()]
    facts = AprMetadata.from_mapping(metadata or {})
    with AprWriter(path, metadata=facts, tensors=specs, flags=flags, overwrite=overwrite) as writer:
        for name, array in tensors.items():
            writer.write(name, np.ascontiguousarray(array))
    return path


def write_golden(path: Path) -> Path:
    """The published 516-byte file, made by our writer."""
    return write_apr(path, GOLDEN_TENSORS, GOLDEN_METADATA)


def assemble(
    entries: Sequence[RawEntry],
    data: bytes,
    *,
    metadata: bytes = b"{}",
    count: int | None = None,
    flags: int = Flag.ROW_MAJOR,
    **overrides: int,
) -> bytes:
    """A file with valid checksums whose index, metadata and header fields (``overrides``) may all lie."""
    index = b"".join(
        struct.pack("<H", len(name))
        + name
        + bytes((code, len(dims)))
        + struct.pack(f"<{len(dims)}QQQ", *dims, offset, size)
        for name, code, dims, offset, size in entries
    )
    index_offset = 64 + align(len(metadata))
    data_offset = index_offset + align(len(index))
    fields = {
        "metadata_size": len(metadata),
        "index_offset": index_offset,
        "data_offset": data_offset,
    } | overrides
    header = Header(Flag(flags), len(entries) if count is None else count, **fields).pack()
    body = (header + metadata).ljust(index_offset, b"\0") + index
    return seal(body.ljust(data_offset, b"\0") + data)


def seal(body: bytes) -> bytes:
    """``body`` followed by the footer that makes it whole."""
    return body + zlib.crc32(body).to_bytes(4, "little")


def flipped(content: bytes, position: int, mask: int = 0xFF) -> bytes:
    """``content`` with some bits of one byte turned over."""
    return content[:position] + bytes([content[position] ^ mask]) + content[position + 1 :]


_NOBODY = 65534


@contextlib.contextmanager
def open_folder() -> Iterator[Path]:
    """A temporary folder that belongs to ``unprivileged`` code and is reachable by it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "work"
        Path(name).chmod(0o755)
        folder.mkdir(mode=0o755)
        if os.geteuid() == 0:
            os.chown(folder, _NOBODY, _NOBODY)
        yield folder
        folder.chmod(0o755)


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """Code that file permissions apply to, even when the tests run as root."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(_NOBODY)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[None]:
    """Let ``folder`` be a file system with room for ``size`` bytes.

    A tmpfs where we may mount one; elsewhere a limit on the size of every file stands in for it.
    """
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() == 0 and subprocess.run(command, capture_output=True, check=False).returncode == 0:
        try:
            yield
        finally:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def write_gguf(
    path: Path,
    tensors: Mapping[str, npt.NDArray[Any]],
    *,
    architecture: str = "llama",
    fields: Mapping[str, Any] | None = None,
    quantization: Mapping[str, str] | None = None,
) -> Path:
    """A GGUF file by the ``gguf`` package: float tensors, some quantised to the GGML type named for them.

    ``fields`` are written with the type their Python value suggests; int becomes u32, float f32.
    """
    import gguf  # noqa: PLC0415 - a test of another format needs it, the others do not

    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (fields or {}).items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_string(key, value)
    for name, array in tensors.items():
        kind = (quantization or {}).get(name)
        if kind is None:
            writer.add_tensor(name, array)
        else:
            quantised = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(name, gguf.quantize(array, quantised), raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


HIDDEN, HEADS, KV_HEADS, HEAD_DIM, MIDDLE, LAYERS, VOCABULARY = 64, 4, 2, 16, 96, 2, 40
Arrays = dict[str, npt.NDArray[Any]]


def tiny_tensors(*, bias: bool = False, norms: bool = False, head: bool = False) -> Arrays:
    """Hugging Face tensors of a tiny decoder, values exact in F16."""
    random = np.random.default_rng(5)

    def values(*shape: int) -> npt.NDArray[np.float32]:
        return random.integers(-512, 512, shape).astype(np.float32) / 64

    tensors: Arrays = {
        "model.embed_tokens.weight": values(VOCABULARY, HIDDEN),
        "model.norm.weight": values(HIDDEN),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        shapes = {
            "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
            "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
            "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
            "mlp.gate_proj": (MIDDLE, HIDDEN),
            "mlp.up_proj": (MIDDLE, HIDDEN),
            "mlp.down_proj": (HIDDEN, MIDDLE),
        }
        tensors |= {f"{prefix}{name}.weight": values(*shape) for name, shape in shapes.items()}
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{name}.weight"] = values(HIDDEN)
        for name in ("q", "k", "v") if bias else ():
            tensors[f"{prefix}self_attn.{name}_proj.bias"] = values(shapes[f"self_attn.{name}_proj"][0])
        for name in ("q", "k") if norms else ():
            tensors[f"{prefix}self_attn.{name}_norm.weight"] = values(HEAD_DIM)
    if head:
        tensors["lm_head.weight"] = values(VOCABULARY, HIDDEN)
    return tensors


TINY_METADATA: Mapping[str, Any] = {
    "model_type": "llama",
    "name": "tiny",
    "architecture": "llama",
    "hf_architecture": "LlamaForCausalLM",
    "hf_model_type": "llama",
    "hidden_size": HIDDEN,
    "num_layers": LAYERS,
    "num_heads": HEADS,
    "num_kv_heads": KV_HEADS,
    "vocab_size": VOCABULARY,
    "intermediate_size": MIDDLE,
    "max_position_embeddings": 128,
    "rope_theta": 50000.0,
    "rope_type": 2,
    "rms_norm_eps": 1e-06,
    "head_dim": HEAD_DIM,
    "tie_word_embeddings": True,
    "special_tokens": {"bos_token": "<s>", "eos_token": "<e>"},
}
"""Metadata that fit ``tiny_tensors``."""


def write_tokenizer(folder: Path) -> Path:
    """A model folder's tokenizer files: a byte-level BPE of 34 tokens with its companions."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = [chr(ord("a") + i) for i in range(26)] + list("01234")
    vocabulary = {token: i for i, token in enumerate(["ab", *letters])}
    added = [
        {"id": 32 + i, "content": token, "special": True, "single_word": False, "lstrip": False}
        | {"rstrip": False, "normalized": False}
        for i, token in enumerate(("<s>", "<e>"))
    ]
    description = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": True,
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": ["a b"], "unk_token": None},
    }
    (folder / "tokenizer.json").write_text(json.dumps(description, indent=2))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "<e>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=4))
    (folder / "special_tokens_map.json").write_text('{"bos_token": "<s>",\n "eos_token": "<e>"}')
    (folder / "generation_config.json").write_text('{"eos_token_id": 33}')
    (folder / "tokenizer.model").write_bytes(bytes(range(256)))
    return folder


def write_without_tokenizer(source: Path, target: Path) -> None:
    """The same model as earlier versions saved it: no tokenizer inside."""
    with AprReader(source) as reader:
        kept = reader.metadata.to_mapping().items()
        plain = {key: value for key, value in kept if not key.startswith(("tokenizer.", "apr_dist.files"))}
        tensors = [TensorSpec(one.name, one.dtype, one.shape) for one in reader.tensors.values()]
        metadata = AprMetadata.from_mapping(plain)
        with AprWriter(
            target, metadata=metadata, tensors=tensors, flags=reader.header.flags, verbatim=True
        ) as out:
            for name in reader.tensors:
                out.write(name, reader.raw(name))
