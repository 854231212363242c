"""Every gate that can be asked before a process group or a large allocation exists, in order.

Rank 0 runs this alone, on headers, manifests and mapped bytes. The order is fixed: the file, its
family, its dimensions, every shape, every value, the vocabulary, the data, the output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from apr_dist.apr.layout import TOKENIZER_TEXT
from apr_dist.apr.reader import AprReader
from apr_dist.config import TrainConfig
from apr_dist.config_sections import ShuffleOrder
from apr_dist.corpus.tokenizer import identify, load_tokenizer
from apr_dist.corpus.tokenizer_json import parse_tokenizer_json
from apr_dist.data.manifest import Manifest, TokenizerIdentity
from apr_dist.data.mixture import Mixture
from apr_dist.data.training_set import check_shares, open_training_set, parts_of
from apr_dist.errors import UsageError, VocabularyRefused
from apr_dist.gates import architecture, vocabulary, weights
from apr_dist.gates.data import (
    check_batch,
    check_disjoint,
    check_sequences,
    check_shared_documents,
    check_splits,
    check_unread,
)
from apr_dist.gates.documents import check_documents
from apr_dist.gates.output import check_run_dir
from apr_dist.gates.result import GateResult
from apr_dist.model.config import PRESETS, TransformerConfig, parameter_shapes, preset
from apr_dist.parsing import parse_json

BYTES_PER_WEIGHT = 12
"""A step folder holds a weight and its two AdamW moments, each in f32."""

_PIECE = 1 << 20


@dataclass
class Preflight:
    """What rank 0 proved, and the open file it proved it on.

    Attributes:
        model_config: architecture of the decoder to build.
        reader: the open init file; None from scratch. Closed by ``close``.
        results: the gates that passed, in order.
        provenance: digests for the checkpoint and the verdict.
        warnings: what could not be checked, one sentence each.
        recorded_val_loss: what the init file says this same evaluation gave when it was saved.
        given_init_digest: digest of ``--init`` when weights come from a checkpoint to resume instead.
    """

    model_config: TransformerConfig
    reader: AprReader | None
    results: list[GateResult] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    recorded_val_loss: float | None = None
    given_init_digest: str | None = None

    def close(self) -> None:
        """Unmap the init file."""
        if self.reader is not None:
            self.reader.close()


def run_preflight(
    config: TrainConfig,
    *,
    world_size: int,
    say: Callable[[str], None],
    resume_from: Path | None = None,
    read_weights: bool = True,
) -> Preflight:
    """Run every gate in order and stop at the first that says no.

    Args:
        config: the resolved configuration.
        world_size: processes that will share the global batch.
        say: told each gate's line as it passes.
        resume_from: checkpoint of this run to go on from; its weights are loaded instead of the init's.
        read_weights: off, only header, metadata and index of the file are read: its checksum, its digest
            and its values are not asked about, which takes no longer for a large file than for a small one.

    Raises:
        AprDistError: the first gate's refusal; the file is closed again.
    """
    micro_batch = config.micro_batch(world_size)
    check_batch(batch_size=config.batch_size, micro_batch=micro_batch, world_size=world_size)
    if config.init is not None and config.model != TrainConfig.model_fields["model"].default:
        raise UsageError(
            f"--model {config.model} and --init {config.init} both name an architecture",
            where="command line",
            expected="the file's own architecture with --init, or --model without it",
            remedy="leave one of them out",
        )
    with ExitStack() as stack:
        path = resume_from or config.init
        found = prove_model_file(path, stack, say, read_weights) if path else _from_scratch(config)
        if resume_from is not None:
            _identify_init(found, config)
        _note(found, say, _positions(found, config))
        if config.synthetic:
            check_documents(config, ())
        else:
            _check_data(found, config, say)
        size = found.model_config.parameter_count() * BYTES_PER_WEIGHT
        # Begun and stopped before its first checkpoint, a run that resumes by itself begins again.
        begun = config.resume == "auto" and not (config.run_dir / "checkpoint.apr").exists()
        check_run_dir(
            config.run_dir,
            overwrite=config.overwrite or resume_from is not None or begun,
            needed_bytes=size * (config.checkpoint.keep_last + 1),
        )
        stack.pop_all()
    return found


def model_from_name(name: str) -> TransformerConfig:
    """The architecture ``--model`` names: a preset, or a JSON file of APR architecture keys.

    Raises:
        UsageError: neither, or a file that is not a JSON object.
        ArchitectureRefused: a file whose dimensions are missing or impossible.
    """
    path = Path(name)
    if path.suffix != ".json":
        return preset(name)
    try:
        if not path.is_file():  # reading a FIFO would wait for ever
            raise FileNotFoundError("no regular file")
        keys = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"the architecture file cannot be read ({error})",
            where=path,
            expected=f"a JSON object of architecture keys, or one of {', '.join(PRESETS)}",
        ) from error
    if not isinstance(keys, dict):
        raise UsageError(
            f"the architecture file holds a {type(keys).__name__}", where=path, expected="a JSON object"
        )
    family = architecture.check_family(keys, (), where=path)
    tied = bool(keys.get("tie_word_embeddings", True))
    return TransformerConfig.from_metadata(keys, family=family, where=name, tie_word_embeddings=tied)


def prove_model_file(
    path: Path, stack: ExitStack, say: Callable[[str], None], read_weights: bool = True
) -> Preflight:
    """The gates of a model file: intact, a decoder, of one family, every weight there; open in ``stack``.

    Raises:
        ModelFileError, GateRefused: the first gate that says no.
    """
    reader = stack.enter_context(AprReader(path, verify="full" if read_weights else "structure"))
    metadata, shapes = reader.metadata.to_mapping(), {n: t.shape for n, t in reader.tensors.items()}
    intact = GateResult(
        id="FALSIFY-APR-DIST-CHECKPOINT-001",
        gate="init file is intact",
        measured=f"{reader.size_bytes / 1e6:,.1f} MB, {len(shapes)} tensors, "
        + ("checksums match" if read_weights else "header, metadata and index agree"),
        required="APR v2" + (", every checksum right" if read_weights else ", consistent with itself"),
    )
    say(_line(intact))
    family = architecture.check_family(metadata, shapes, where=path)
    head = architecture.HeadFacts(
        present=architecture.HEAD in shapes, equals_embedding=_same_head(reader, shapes)
    )
    model_config = architecture.check_dimensions(metadata, head, family=family, where=path)
    found = Preflight(model_config=model_config, reader=reader, results=[intact])
    _note(found, say, _family_result(metadata, model_config))
    expected = parameter_shapes(model_config)
    present = {name: shape for name, shape in shapes.items() if name != architecture.HEAD or name in expected}
    weights.check_names_and_shapes(expected, present, where=path)
    count = None
    if read_weights:
        with ThreadPoolExecutor(1, "digest") as pool:  # one core hashes while the others look at values
            digest = pool.submit(reader.digest)
            count = weights.check_values(reader, list(expected))
            found.provenance["init_digest"] = digest.result()
    _note(found, say, _weights_result(expected, count))
    return found


def _identify_init(found: Preflight, config: TrainConfig) -> None:
    """A resumed run's init is the file it began with; the checkpoint it goes on from remembers which."""
    assert found.reader is not None
    found.provenance["init_digest"] = found.reader.metadata.custom.get("apr_dist.init_digest")
    if config.init is not None and config.init.exists():
        with AprReader(config.init) as given:
            found.given_init_digest = given.digest()


def _same_head(reader: AprReader, shapes: dict[str, tuple[int, ...]]) -> bool | None:
    if architecture.HEAD not in shapes or architecture.EMBEDDING not in shapes:
        return None
    head, embedding = (
        np.frombuffer(reader.raw(name), np.uint8) for name in (architecture.HEAD, architecture.EMBEDDING)
    )
    # Piece by piece: two that differ do so in the first, and no more of them is read.
    pieces = range(0, max(head.size, embedding.size), _PIECE)
    return all(np.array_equal(head[at : at + _PIECE], embedding[at : at + _PIECE]) for at in pieces)


def _family_result(metadata: dict[str, Any], model_config: TransformerConfig) -> GateResult:
    claim = metadata.get("hf_architecture") or metadata.get("architecture") or "no claim"
    return GateResult(
        id=architecture.MATCH,
        gate="family agrees with tensor names",
        measured=f"{model_config.family} ({claim})",
        required="a decoder; metadata and names of one family",
    )


def _weights_result(expected: dict[str, tuple[int, ...]], values: int | None) -> GateResult:
    return GateResult(
        id=weights.MISSING,
        gate="every weight is there",
        measured=f"{len(expected)} of {len(expected)} tensors, "
        + ("shapes fit" if values is None else f"{values:,} finite values"),
        required="none missing, left over or misshapen" + ("" if values is None else ", all finite"),
    )


def _from_scratch(config: TrainConfig) -> Preflight:
    return Preflight(model_config=model_from_name(config.model), reader=None)


def _positions(found: Preflight, config: TrainConfig) -> GateResult:
    limit = found.model_config.max_position_embeddings
    if config.seq_length > limit:
        raise UsageError(
            f"seq_length {config.seq_length:,} is more than the model's {limit:,} positions",
            where="--seq-length",
            expected=f"at most {limit:,}",
            remedy="lower --seq-length",
        )
    return GateResult(
        id="FALSIFY-APR-PRETRAIN-ARCH-003",
        gate="dimensions come from the model",
        measured=f"{found.model_config.parameter_count():,} parameters, {limit:,} positions",
        required=f"at least {config.seq_length:,} positions",
    )


def _check_data(found: Preflight, config: TrainConfig, say: Callable[[str], None]) -> None:
    missing = "--dataset" if config.dataset is None and not config.loader.mixture else "--val-dataset"
    if missing == "--dataset" or config.val_dataset is None:
        raise UsageError(
            f"{missing} is not given",
            where="command line",
            expected="training shards and held-out shards",
            remedy="apr-dist tokenize encode-corpus --val-fraction 0.05 makes both",
            falsifier="INV-TRAIN-010",
        )
    training, held_out = (
        open_training_set(config.dataset, config.loader.mixture),
        Manifest.load(config.val_dataset),
    )
    order = config.loader
    block = order.block_sequences if order.shuffle is ShuffleOrder.BLOCK else 1
    check_shares(training, global_batch=config.batch_size, block=block)
    parts, everything = parts_of(training), (*parts_of(training), held_out)
    found.warnings += [f"{part.folder}: {text}" for part in everything for text in part.warnings]
    check_documents(config, parts)
    sequences = sum(check_sequences(part, seq_length=config.seq_length) for part in parts)
    held = check_sequences(held_out, seq_length=config.seq_length)
    for part in everything:
        length, limit = config.seq_length, order.max_unread
        part_block = 1 if part is held_out else block
        if text := check_unread(part, seq_length=length, block=part_block, limit=limit):
            found.warnings.append(text)
    for part in parts:
        check_disjoint(part, held_out)
    check_splits(parts, held_out, allowed=order.any_split)
    shared, warning = check_shared_documents(parts, held_out, limit=config.evaluation.max_shared)
    found.warnings += [warning] if warning else []
    rows = found.model_config.vocab_size
    _note(found, say, _check_tokenizer(found, config, parts, rows))
    for manifest in everything:
        vocabulary.check_shards(max_id=manifest.max_token_id, model_vocab=rows, where=manifest.folder)
    vocabulary.check_ignored(order.ignored_ids, model_vocab=rows)
    result = GateResult(
        id=vocabulary.SHARD_ID,
        gate="shards fit the model",
        measured=f"largest id {max(part.max_token_id or 0 for part in everything):,}, "
        f"{sequences:,} + {held:,} sequences, {shared}",
        required=f"ids below {rows:,}; nothing held out is trained on",
    )
    _note(found, say, result)
    found.provenance["data_fingerprint"] = training.fingerprint
    if isinstance(training, Mixture):
        found.provenance["data_sources"] = training.describe()
    found.provenance["val_data_fingerprint"] = held_out.fingerprint
    found.provenance["evaluation"] = _evaluation_identity(held_out, config)
    found.recorded_val_loss = _recorded_loss(found)


def _evaluation_identity(held_out: Manifest, config: TrainConfig) -> str:
    """What a validation loss was measured on; equal texts mean comparable losses."""
    sample = config.evaluation.max_sequences or "all"
    precision = config.parallel.precision.value
    ignored = ",".join(map(str, config.loader.ignored_ids))
    return f"{sample} sequences of {config.seq_length} from {held_out.fingerprint} in {precision}" + (
        f" without the targets {ignored}" if ignored else ""
    )


def _recorded_loss(found: Preflight) -> float | None:
    said = found.reader.metadata.custom if found.reader else {}
    loss = said.get("apr_dist.val_loss")
    same = said.get("apr_dist.evaluation") == found.provenance["evaluation"]
    return float(loss) if same and isinstance(loss, float) else None


def _check_tokenizer(
    found: Preflight, config: TrainConfig, parts: Sequence[Manifest], rows: int
) -> GateResult:
    recorded = next((part.tokenizer for part in parts if part.tokenizer), None)
    own, where = _own_tokenizer(config, found.reader)
    where = where or parts[0].folder
    identity = own or recorded
    # Ids may have gaps: what the model needs rows for is the bound of the ids, not their number.
    sizes = [part.vocab_size for part in parts if part.vocab_size is not None]
    tokens = max(identity.effective_vocab_count, identity.id_bound) if identity else max(sizes, default=None)
    if tokens is None:
        raise VocabularyRefused(
            "no tokenizer is known: none was given, and the manifest records none",
            where=where,
            expected="a tokenizer to compare with the model's vocabulary",
            remedy="pass --tokenizer FOLDER",
            falsifier=vocabulary.NOT_EQUAL,
        )
    from_init = config.init is not None
    vocabulary.check_tokenizer(effective=tokens, model_vocab=rows, from_init=from_init, where=where)
    for part in parts:
        vocabulary.check_same_tokenizer(
            shards_sha256=part.tokenizer.sha256 if part.tokenizer else None,
            tokenizer_sha256=identity.sha256 if identity else None,
            where=part.folder,
        )
    found.provenance["tokenizer_sha256"] = identity.sha256 if identity else None
    return GateResult(
        id=vocabulary.ABOVE_MODEL if from_init else vocabulary.NOT_EQUAL,
        gate="tokenizer fits the model",
        measured=f"{tokens:,} tokens, {rows:,} rows",
        required=f"{'at most' if from_init else 'exactly'} {rows:,} tokens",
    )


def _own_tokenizer(
    config: TrainConfig, reader: AprReader | None
) -> tuple[TokenizerIdentity | None, Path | None]:
    """The tokenizer that was named, else the one inside the model file, else the one beside it."""
    embedded = reader.metadata.custom.get(TOKENIZER_TEXT) if reader else None
    if config.tokenizer is None and reader is not None and isinstance(embedded, str):
        content = embedded.encode()
        return identify(parse_tokenizer_json(content, where=reader.path), content, {}), reader.path
    folder = config.tokenizer or _beside(config.init)
    return (load_tokenizer(folder).identity, folder) if folder else (None, None)


def _beside(init: Path | None) -> Path | None:
    """The tokenizer folder that an import writes beside ``model.apr``: ``model.tokenizer``."""
    folder = init.with_suffix(".tokenizer") if init else None
    return folder if folder and folder.is_dir() else None


def _note(found: Preflight, say: Callable[[str], None], result: GateResult) -> None:
    found.results.append(result)
    say(_line(result))


def _line(result: GateResult) -> str:
    return f"gate passed: {result.gate}: {result.measured}  [{result.id}]"
