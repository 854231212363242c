"""What a file is (``inspect``) and whether training accepts it (``validate``), as facts to print."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apr_dist.apr.finite import count_non_finite
from apr_dist.apr.layout import TOKENIZER_TEXT, VOCABULARY, Flag, TensorEntry
from apr_dist.apr.metadata import AprMetadata
from apr_dist.apr.quality import Quality, QualityFacts, score_quality
from apr_dist.apr.reader import AprReader
from apr_dist.corpus.tokenizer_json import parse_tokenizer_json
from apr_dist.errors import TokenizerError
from apr_dist.gates.architecture import CLAIM_KEYS, EMBEDDING, HEAD
from apr_dist.gates.model_file import prove_model, same_payload
from apr_dist.gates.result import GateResult
from apr_dist.interop.convert import Progress, one_by_one
from apr_dist.model.families import UNKNOWN, family_from_tensor_names, normalize_metadata_family

_HF_CLAIMS = ("hf_architecture", "hf_model_type")


@dataclass(frozen=True, kw_only=True)
class TokenizerFacts:
    """The tokenizer of a file: where it is (``"embedded"`` or a path) and how many tokens it has."""

    where: str
    tokens: int


@dataclass(frozen=True, kw_only=True)
class FileReport:
    """What a file is.

    Attributes:
        path: the file.
        size_bytes: its length.
        version: of the format, such as ``"2.0"``.
        flags: names of the header flags that are set.
        checksum: ``"valid"``, ``"wrong"`` or ``"absent"`` (no footer).
        metadata: everything the file says.
        family_claimed: family of the metadata's claim; None without a claim that is known.
        family_shown: family that the tensor names show; ``"unknown"`` when they cannot tell.
        tensor_count: number of tensors.
        param_count: elements of all tensors, counted.
        dtypes: (tensors, bytes) by dtype name, largest first.
        tied: whether the head is the embedding; None when metadata and tensors contradict each other.
        tokenizer: inside the file or beside it; None without one.
        tensors: the index, sorted by name.
        quality: the score, where it was asked for.
    """

    path: Path
    size_bytes: int
    version: str
    flags: tuple[str, ...]
    checksum: str
    metadata: AprMetadata
    family_claimed: str | None
    family_shown: str
    tensor_count: int
    param_count: int
    dtypes: dict[str, tuple[int, int]]
    tied: bool | None
    tokenizer: TokenizerFacts | None
    tensors: tuple[TensorEntry, ...]
    quality: Quality | None

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values; large metadata values are replaced by their size."""
        held = self.tokenizer
        kept = (
            "size_bytes",
            "version",
            "checksum",
            "family_claimed",
            "family_shown",
            "tensor_count",
            "param_count",
        )
        return {
            "path": str(self.path),
            **{key: getattr(self, key) for key in (*kept, "tied")},
            "flags": list(self.flags),
            "dtypes": {name: {"tensors": n, "bytes": size} for name, (n, size) in self.dtypes.items()},
            "tokenizer": held and {"where": held.where, "tokens": held.tokens},
            "metadata": shortened(self.metadata),
            "quality": self.quality and self.quality.to_json(),
        }


@dataclass(frozen=True, kw_only=True)
class ValidationReport:
    """A file that passed the gates of a training run, with what each of them measured."""

    path: Path
    size_bytes: int
    tensor_count: int
    checks: tuple[GateResult, ...]


def inspect_file(path: Path, *, quality: bool = False, progress: Progress | None = None) -> FileReport:
    """Facts about an APR file; a wrong checksum is reported, not raised.

    Args:
        path: the file.
        quality: also scan every tensor and score the file.
        progress: called with (bytes scanned, bytes in all) during that scan.

    Raises:
        ModelFileError: no APR v2 file whose structure can be read.
    """
    with AprReader(path, verify="structure", footer_required=False) as reader:
        checksum = "absent" if not reader.has_footer else "valid" if reader.footer_matches() else "wrong"
        tokenizer = _tokenizer(reader)
        return FileReport(
            path=reader.path,
            size_bytes=reader.size_bytes,
            version=".".join(map(str, reader.header.version)),
            flags=tuple(str(flag.name) for flag in Flag if flag in reader.header.flags),
            checksum=checksum,
            metadata=reader.metadata,
            family_claimed=_claim(reader.metadata, CLAIM_KEYS),
            family_shown=family_from_tensor_names(reader.tensors),
            tensor_count=len(reader.tensors),
            param_count=sum(entry.num_elements for entry in reader.tensors.values()),
            dtypes=_histogram(reader),
            tied=_tied(reader),
            tokenizer=tokenizer,
            tensors=tuple(reader.tensors.values()),
            quality=_quality(reader, checksum == "valid", tokenizer, progress) if quality else None,
        )


def validate_file(path: Path, *, progress: Progress | None = None) -> ValidationReport:
    """Prove that a training run would accept the file: the run's own gates, `gates.model_file`.

    Args:
        path: the file.
        progress: called with (bytes looked at, bytes in all).

    Raises:
        ModelFileError: missing, another format, damaged, or one shard of a model.
        ArchitectureRefused: no decoder, two families, a dimension missing or impossible, a disputed tie.
        WeightsRefused: a tensor missing, left over, of another shape, all zero, or not finite.
    """
    with AprReader(path) as reader:
        return ValidationReport(
            path=reader.path,
            size_bytes=reader.size_bytes,
            tensor_count=len(reader.tensors),
            checks=prove_model(reader, progress=progress and (lambda _, *counts: progress(*counts))).results,
        )


def _tied(reader: AprReader) -> bool | None:
    """Whether the head is the embedding; None where metadata and tensors contradict each other."""
    claimed, both = (
        reader.metadata.custom.get("tie_word_embeddings"),
        {HEAD, EMBEDDING} <= reader.tensors.keys(),
    )
    shown = HEAD not in reader.tensors or (both and same_payload(reader, HEAD, EMBEDDING))
    if (claimed is True and not shown) or (claimed is False and HEAD not in reader.tensors):
        return None
    return shown and claimed is not False


def _claim(metadata: AprMetadata, keys: tuple[str, ...]) -> str | None:
    claims = (normalize_metadata_family(getattr(metadata, key) or "") for key in keys)
    return next((claim for claim in claims if claim is not None), None)


def _histogram(reader: AprReader) -> dict[str, tuple[int, int]]:
    found: dict[str, tuple[int, int]] = {}
    for entry in reader.tensors.values():
        count, size = found.get(entry.dtype.name, (0, 0))
        found[entry.dtype.name] = (count + 1, size + entry.size_bytes)
    return dict(sorted(found.items(), key=lambda item: -item[1][1]))


def _tokenizer(reader: AprReader) -> TokenizerFacts | None:
    tokens = reader.metadata.custom.get(VOCABULARY)
    if isinstance(tokens, list):
        return TokenizerFacts(where="embedded", tokens=len(tokens))
    beside = reader.path.with_suffix(".tokenizer") / TOKENIZER_TEXT
    if not beside.is_file():
        return None
    try:
        facts = parse_tokenizer_json(beside.read_bytes(), where=beside)
    except (OSError, TokenizerError):
        return None
    return TokenizerFacts(where=str(beside.parent), tokens=len(facts.effective_vocabulary))


def _quality(
    reader: AprReader, checksums_valid: bool, tokenizer: TokenizerFacts | None, progress: Progress | None
) -> Quality:
    shown = family_from_tensor_names(reader.tensors)
    bad = next(
        (name for name in one_by_one(reader.tensors, progress) if count_non_finite(reader, name)), None
    )
    return score_quality(
        QualityFacts(
            metadata=reader.metadata,
            checksums_valid=checksums_valid,
            non_finite=bad,
            contradictions=_contradictions(reader),
            family_shown=None if shown == UNKNOWN else shown,
            family_claimed=_claim(reader.metadata, _HF_CLAIMS),
            tokenizer_tokens=None if tokenizer is None else tokenizer.tokens,
        )
    )


def _contradictions(reader: AprReader) -> frozenset[str]:
    """Stated dimensions that the shapes contradict, where the names say which tensor to look at."""
    metadata, tensors, wrong = reader.metadata, reader.tensors, set[str]()
    embedding, query = tensors.get(EMBEDDING), tensors.get("model.layers.0.self_attn.q_proj.weight")
    if embedding is not None and embedding.shape[1:] != (metadata.hidden_size,):
        wrong.add("hidden_size")
    layers = {name.split(".")[2] for name in tensors if name.startswith("model.layers.")}
    if layers and len(layers) != metadata.num_layers:
        wrong.add("num_layers")
    if query is not None and query.shape and metadata.num_heads:
        width = metadata.head_dim or (metadata.hidden_size or 0) // metadata.num_heads
        if metadata.num_heads * width != query.shape[0]:
            wrong.add("num_heads")
    return frozenset(wrong)


_LONG = 2000


def shortened(metadata: AprMetadata) -> dict[str, Any]:
    """Metadata for showing: texts, lists and tables beyond 2,000 characters become a note of their size."""
    return {key: _brief(value) for key, value in metadata.to_mapping().items()}


def _brief(value: Any) -> Any:
    if isinstance(value, str | list | dict) and len(repr(value)) > _LONG:
        unit = {str: "characters", list: "values", dict: "keys"}[type(value)]
        return f"<{len(value):,} {unit}>"
    return value
