"""Every gate that can be asked before a process group or a large allocation exists, in order.

Rank 0 runs this alone, on headers, manifests and mapped bytes. The order is fixed: the file, its
family, its dimensions, every shape, every value, the vocabulary, the data. Settings that contradict each
other come before all of them; whether the run folder is free is asked after them, by ``runs.opening``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from apr_dist.apr.layout import TOKENIZER_TEXT
from apr_dist.apr.reader import AprReader
from apr_dist.choices import ShuffleOrder
from apr_dist.config import TrainConfig
from apr_dist.corpus.prompts import read_prompts
from apr_dist.corpus.tokenizer import identify, load_tokenizer
from apr_dist.corpus.tokenizer_json import parse_tokenizer_json
from apr_dist.data.manifest import Manifest, TokenizerIdentity
from apr_dist.data.mixture import Mixture
from apr_dist.data.training_set import check_shares, open_training_set, parts_of
from apr_dist.errors import UsageError, VocabularyRefused
from apr_dist.gates import architecture, vocabulary
from apr_dist.gates.adapters import adapter_of, keeps_values, prove_adapter_file
from apr_dist.gates.conversations import check_conversations, template_digest
from apr_dist.gates.data import (
    check_disjoint,
    check_sequences,
    check_shared_documents,
    check_splits,
    check_unread,
)
from apr_dist.gates.documents import check_documents
from apr_dist.gates.host_memory import check_host_memory
from apr_dist.gates.mixtures import check_mixture
from apr_dist.gates.model_file import Progress, named, prove_model
from apr_dist.gates.named_sets import check_own_counts, check_sets_differ
from apr_dist.gates.result import GateResult
from apr_dist.gates.settings import check_settings
from apr_dist.gates.warnings import DataFacts, left_out_of, warnings_of
from apr_dist.model.adapters import Adapter
from apr_dist.model.config import PRESETS, TransformerConfig, preset
from apr_dist.parallel.launch import read_launch
from apr_dist.parsing import parse_json


@dataclass
class Preflight:
    """What rank 0 proved, and the open file it proved it on.

    Attributes:
        model_config: architecture of the decoder to build.
        reader: the open init file; None from scratch. Closed by ``close``.
        results: the gates that passed, in order.
        provenance: digests for the checkpoint and the verdict.
        warnings: what could not be checked and what will hurt, one sentence each.
        data: what the shards hold; None for made-up tokens.
        recorded_val_loss: what the init file says this same evaluation gave when it was saved.
        given_init_digest: digest of ``--init`` when weights come from a checkpoint to resume instead.
        adapter: what is trained in place of the weights; None: the weights.
        adapter_reader: the open checkpoint of an adapter to resume. Closed by ``close``.
    """

    model_config: TransformerConfig
    reader: AprReader | None
    results: list[GateResult] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    data: DataFacts | None = None
    recorded_val_loss: float | None = None
    given_init_digest: str | None = None
    adapter: Adapter | None = None
    adapter_reader: AprReader | None = None

    @property
    def trained_parameters(self) -> int:
        """Elements that are trained: of the adapter, or of the model."""
        if self.adapter is None:
            return self.model_config.parameter_count()
        return sum(math.prod(shape) for shape in self.adapter.shapes(self.model_config).values())

    def close(self) -> None:
        """Unmap the files."""
        for reader in (self.reader, self.adapter_reader):
            if reader is not None:
                reader.close()


def run_preflight(
    config: TrainConfig,
    *,
    world_size: int,
    say: Callable[[str], None],
    resume_from: Path | None = None,
    read_weights: bool = True,
    own_data: bool = False,
    own_held_out: bool = False,
    progress: Progress | None = None,
) -> Preflight:
    """Run every gate in order and stop at the first that says no.

    Args:
        config: the resolved configuration.
        world_size: processes that will share the global batch.
        say: told each gate's line as it passes.
        resume_from: checkpoint of this run to go on from; its weights are loaded instead of the init's.
        read_weights: off, only header, metadata and index of the file are read: its checksum, its digest
            and its values are not asked about, which takes no longer for a large file than for a small one.
        own_data: the program hands in batches of its own; training shards are not asked about.
        own_held_out: it hands in held-out batches too, in place of ``val_dataset`` and as what counts.
        progress: called while a model file is read.

    Raises:
        AprDistError: the first gate's refusal; the file is closed again.
    """
    check_settings(config, world_size=world_size)
    if config.evaluation.prompts is not None:
        read_prompts(config.evaluation.prompts)  # its checks
    with ExitStack() as stack:
        path = config.init if config.adapter.is_on else resume_from or config.init
        if path:
            found = prove_model_file(path, stack, say, read_weights, progress)
        else:
            found = _from_scratch(config.model)
        found.adapter = adapter_of(config.adapter, found.model_config, found.reader)
        if resume_from is not None and found.adapter is not None:
            found.given_init_digest = found.provenance.get("init_digest")
            found.adapter_reader = stack.enter_context(AprReader(resume_from))
            _note(found, say, prove_adapter_file(found.adapter_reader, found.adapter, found.model_config))
        elif resume_from is not None:
            _identify_init(found, config.init, progress)
        check_mixture(found.model_config, config.compute, config.router)
        _note(found, say, _positions(found.model_config, config.seq_length))
        if config.synthetic:
            check_documents(config.loader.documents, config.compute, (), synthetic=True)
        else:
            _check_data(found, config, say, own_data=own_data, own_held_out=own_held_out)
        if read_weights:  # a plan may be made on another machine than the run
            check_host_memory(
                found.model_config,
                config,
                world_size=world_size,
                processes=min(read_launch().local_world_size or 1, world_size),
            )
        found.warnings += warnings_of(config, found.model_config, found.data)
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
    head = architecture.HeadFacts(present=True, equals_embedding=None)  # either is made as stated
    keys = {"tie_word_embeddings": True} | keys
    return architecture.check_dimensions(keys, head, family=family, where=path)


def prove_model_file(
    path: Path,
    stack: ExitStack,
    say: Callable[[str], None],
    read_weights: bool,
    progress: Progress | None = None,
) -> Preflight:
    """Ask the gates of a model file (`gates.model_file`); it stays open in ``stack``.

    Raises:
        ModelFileError, GateRefused: the first gate that refuses.
    """
    summing = named("checking the file", progress)
    reader = stack.enter_context(
        AprReader(path, verify="full" if read_weights else "structure", progress=summing)
    )
    proven = prove_model(
        reader,
        read_values=read_weights,
        with_digest=read_weights,
        passed=lambda one: say(_line(one)),
        progress=progress,
    )
    found = Preflight(model_config=proven.config, reader=reader, results=list(proven.results))
    found.warnings += left_out_of(reader.metadata.custom, proven.config.family)
    if proven.digest:
        found.provenance["init_digest"] = proven.digest
    return found


def _identify_init(found: Preflight, init: Path | None, progress: Progress | None) -> None:
    """A resumed run's init is the file it began with; the checkpoint it goes on from remembers which."""
    assert found.reader is not None
    found.provenance["init_digest"] = found.reader.metadata.custom.get("apr_dist.init_digest")
    if init is not None and init.exists():
        with AprReader(init, progress=named("checking the init file", progress)) as given:
            found.given_init_digest = given.digest(named("hashing the init file", progress))


def _from_scratch(name: str) -> Preflight:
    return Preflight(model_config=model_from_name(name), reader=None)


def _positions(model: TransformerConfig, seq_length: int) -> GateResult:
    limit = model.longest_sequence
    if seq_length > limit:
        raise UsageError(
            f"seq_length {seq_length:,} is more than the model's {limit:,} positions",
            where="--seq-length",
            expected=f"at most {limit:,}",
            remedy="lower --seq-length",
        )
    measured = f"{model.parameter_count():,} parameters, {limit:,} positions"
    required = f"at least {seq_length:,} positions"
    return GateResult("FALSIFY-APR-PRETRAIN-ARCH-003", "dimensions come from the model", measured, required)


def _check_data(
    found: Preflight, config: TrainConfig, say: Callable[[str], None], *, own_data: bool, own_held_out: bool
) -> None:
    if own_data:
        found.warnings.append("the batches are the program's own: no gate compares them with the tokenizer")
        named = config.evaluation.sets if own_held_out else config.held_out
        sets = {name: Manifest.load(path) for name, path in named.items()}
        check_documents(config.loader.documents, config.compute, (), synthetic=False)
        if own_held_out:
            check_own_counts(config.evaluation.counts)
        if sets:
            _check_shards(found, config, say, (), sets, counted=not own_held_out)
        return
    missing = "--dataset" if config.dataset is None and not config.loader.mixture else "--val-dataset"
    if missing == "--dataset" or not config.held_out:
        raise UsageError(
            f"{missing} is not given",
            where="command line",
            expected="training shards and held-out shards",
            remedy="apr-dist tokenize encode-corpus --val-fraction 0.05 makes both",
            falsifier="INV-TRAIN-010",
        )
    training = open_training_set(config.dataset, config.loader.mixture)
    sets = {name: Manifest.load(path) for name, path in config.held_out.items()}
    check_shares(training, global_batch=config.batch_size, block=_block(config))
    found.provenance["data_fingerprint"] = training.fingerprint
    if isinstance(training, Mixture):
        found.provenance["data_sources"] = training.describe()
    _check_shards(found, config, say, parts_of(training), sets, counted=True)


def _block(config: TrainConfig) -> int:
    """Sequences that are read together."""
    return config.loader.block_sequences if config.loader.shuffle is ShuffleOrder.BLOCK else 1


def _check_shards(
    found: Preflight,
    config: TrainConfig,
    say: Callable[[str], None],
    parts: Sequence[Manifest],
    sets: Mapping[str, Manifest],
    *,
    counted: bool,
) -> None:
    """Ask the gates of training sets and of held-out ones by name, the first of which counts if any does."""
    check_sets_differ(sets)
    held_out, order, everything = next(iter(sets.values())), config.loader, (*parts, *sets.values())
    found.warnings += [f"{part.folder}: {text}" for part in everything for text in part.warnings]
    chats = tuple(part for part in everything if part.flagged)
    check_documents(order.documents, config.compute, (*parts, *chats), synthetic=False)
    if parts:
        found.data = DataFacts.of(parts, held_out, seq_length=config.seq_length)
    for number, part in enumerate(everything):
        length, limit = config.seq_length, order.max_unread
        part_block = _block(config) if number < len(parts) else 1
        if text := check_unread(part, seq_length=length, block=part_block, limit=limit):
            found.warnings.append(text)
    shared = _check_apart(found, config, parts, sets)
    rows = found.model_config.vocab_size
    _note(found, say, _check_tokenizer(found, config, everything, rows))
    conversations, unknown = check_conversations(
        everything,
        seq_length=config.seq_length,
        model_vocab=rows,
        template=template_digest(found.reader.metadata if found.reader else None),
        tokenizer_sha256=found.provenance["tokenizer_sha256"],
    )
    found.warnings += unknown
    if conversations is not None:
        _note(found, say, conversations)
    for manifest in everything:
        vocabulary.check_shards(max_id=manifest.max_token_id, model_vocab=rows, where=manifest.folder)
    vocabulary.check_ignored(order.ignored_ids, model_vocab=rows)
    held = check_sequences(held_out, seq_length=config.seq_length)
    sequences = f"{held:,}" if found.data is None else f"{found.data.sequences:,} + {held:,}"
    measured = f"largest id {max(part.max_token_id or 0 for part in everything):,}, "
    measured += f"{sequences} sequences, {shared}"
    required = f"ids below {rows:,}; nothing held out is trained on"
    _note(found, say, GateResult(vocabulary.SHARD_ID, "shards fit the model", measured, required))
    if config.evaluation.sets:
        found.provenance["validation_sets"] = {name: one.fingerprint for name, one in sets.items()}
    if counted:
        found.provenance["val_data_fingerprint"] = held_out.fingerprint
        found.provenance["evaluation"] = _evaluation_identity(held_out, config)
        found.recorded_val_loss = _recorded_loss(found)


def _check_apart(
    found: Preflight, config: TrainConfig, parts: Sequence[Manifest], sets: Mapping[str, Manifest]
) -> str:
    """Nothing of any validation set is trained on; returns what was found, the one that counts first."""
    said: list[str] = []
    for name, one in sets.items():
        check_sequences(one, seq_length=config.seq_length)
        for part in parts:
            check_disjoint(part, one)
        check_splits(parts, one, allowed=config.loader.any_split)
        if parts:
            shared, warning = check_shared_documents(parts, one, limit=config.evaluation.max_shared)
            said.append(f"{name}: {shared}" if said else shared)
            found.warnings += [warning] if warning else []
    return "; ".join(said) or "compared with no batch of the program"


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
    if said.get("apr_dist.evaluation") != found.provenance["evaluation"] or not isinstance(loss, float):
        return None
    if found.adapter is None or found.reader is None or keeps_values(found.adapter, found.reader):
        return float(loss)
    bits = found.adapter.base_bits
    found.warnings.append(f"the loss in the file is not compared with: {bits} bits change its matrices")
    return None


def _check_tokenizer(
    found: Preflight, config: TrainConfig, parts: Sequence[Manifest], rows: int
) -> GateResult:
    recorded = next((part.tokenizer for part in parts if part.tokenizer), None)
    own, where = _own_tokenizer(config.tokenizer, config.init, found.reader)
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
    falsifier = vocabulary.ABOVE_MODEL if from_init else vocabulary.NOT_EQUAL
    required = f"{'at most' if from_init else 'exactly'} {rows:,} tokens"
    return GateResult(falsifier, "tokenizer fits the model", f"{tokens:,} tokens, {rows:,} rows", required)


def _own_tokenizer(
    named: Path | None, init: Path | None, reader: AprReader | None
) -> tuple[TokenizerIdentity | None, Path | None]:
    """The tokenizer that was named, else the one inside the model file, else the one beside it."""
    embedded = reader.metadata.custom.get(TOKENIZER_TEXT) if reader else None
    if named is None and reader is not None and isinstance(embedded, str):
        content = embedded.encode()
        return identify(parse_tokenizer_json(content, where=reader.path), content, {}), reader.path
    folder = tokenizer_folder(named, init)
    return (load_tokenizer(folder).identity, folder) if folder else (None, None)


def tokenizer_folder(named: Path | None, init: Path | None) -> Path | None:
    """The tokenizer folder that was named, else the one an import writes next to ``model.apr``."""
    beside = init.with_suffix(".tokenizer") if init else None
    return named or (beside if beside and beside.is_dir() else None)


def _note(found: Preflight, say: Callable[[str], None], result: GateResult) -> None:
    found.results.append(result)
    say(_line(result))


def _line(result: GateResult) -> str:
    return f"gate passed: {result.gate}: {result.measured}  [{result.id}]"
