"""The ways of breaking the code that ``mutate.py`` tries, each with the falsifier that must notice."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Change:
    """One change of one place.

    Attributes:
        falsifier: the id whose bound tests must turn red.
        what: the change in words.
        file: the file, relative to the repository.
        old: the text there now; it occurs once.
        new: the text put in its place.
        also: other falsifiers that rest on the same line, whose tests may turn red as well.
    """

    falsifier: str
    what: str
    file: str
    old: str
    new: str
    also: tuple[str, ...] = ()

    def count(self, root: Path) -> int:
        """How often the text to change is there."""
        path = root / self.file
        return path.read_text(encoding="utf-8").count(self.old) if path.exists() else 0


INIT, ARCH, FINETUNE = (
    "FALSIFY-APR-PRETRAIN-INIT-",
    "FALSIFY-APR-PRETRAIN-ARCH-",
    "FALSIFY-APR-PRETRAIN-INIT-FINETUNE-",
)
TRAINER, LOADER, CHECKPOINT, DISTRIBUTED = (
    "FALSIFY-APR-DIST-TRAINER-",
    "FALSIFY-APR-DIST-LOADER-",
    "FALSIFY-APR-DIST-CHECKPOINT-",
    "FALSIFY-APR-DIST-DISTRIBUTED-",
)
MATCH, IMPORT, REPAIR, LOOP = (
    "FALSIFY-INIT-ARCH-MATCH-001",
    "FALSIFY-TOK-IMPORT-HF-",
    "FALSIFY-REPAIR-MANIFEST-",
    "INV-TRAIN-",
)

CONFIG = "apr_dist/config.py"
FILES = "apr_dist/apr/files.py"
STRUCTURE = "apr_dist/apr/structure.py"
READER = "apr_dist/apr/reader.py"
MODEL_CONFIG = "apr_dist/model/config.py"
ATTENTION = "apr_dist/model/attention.py"
FAMILY_GATE = "apr_dist/gates/architecture.py"
VOCABULARY_GATE = "apr_dist/gates/vocabulary.py"
WEIGHTS_GATE = "apr_dist/gates/weights.py"
DATA_GATE = "apr_dist/gates/data.py"
OUTPUT_GATE = "apr_dist/gates/output.py"
PREFLIGHT = "apr_dist/gates/preflight.py"
VERDICT = "apr_dist/training/verdict.py"
GUARDS = "apr_dist/training/guards.py"
OPTIMIZER = "apr_dist/training/optimizer.py"
SCHEDULE = "apr_dist/training/schedule.py"
METRICS = "apr_dist/training/metrics.py"
TRAINER_FILE = "apr_dist/training/trainer.py"
SAVED = "apr_dist/training/checkpoint.py"
RUN = "apr_dist/training/run.py"
RUNTIME = "apr_dist/parallel/runtime.py"
TOKENIZER_JSON = "apr_dist/data/tokenizer_json.py"
TOKENIZER = "apr_dist/data/tokenizer.py"
LOADER_FILE = "apr_dist/data/loader.py"
VERIFICATION = "apr_dist/data/verification.py"

MUTANTS: tuple[Change, ...] = (
    Change(
        INIT + "001",
        "an init file by default",
        CONFIG,
        "init: Path | None = Field(None, description",
        'init: Path | None = Field(Path("model.apr"), description',
        also=(INIT + "007",),
    ),
    Change(
        INIT + "002",
        "a from-scratch checkpoint names an init",
        RUN,
        '"tool_version": __version__,',
        '"tool_version": __version__, "init_digest": facts["provenance"].get("init_digest", "none"),',
    ),
    Change(INIT + "003", "the refusal loses its id", FILES, "falsifier=MISSING,", "falsifier=None,"),
    Change(
        INIT + "003",
        "a folder or pipe passes for a file",
        FILES,
        "    if stat.S_ISREG(mode):",
        "    if not stat.S_ISLNK(mode):",
    ),
    Change(
        INIT + "004",
        "every magic is right",
        STRUCTURE,
        "    if magic == MAGIC:\n        return",
        "    if magic != b'':\n        return",
        also=(CHECKPOINT + "001",),
    ),
    Change(
        INIT + "005",
        "a missing theta is not noticed",
        MODEL_CONFIG,
        "    missing = [key for key in needed if values.get(key) is None]",
        '    missing = [key for key in needed if values.get(key) is None and key != "rope_theta"]',
    ),
    Change(
        INIT + "005",
        "a file without any witness is Llama",
        FAMILY_GATE,
        "    if not witnesses:\n        raise",
        '    if not witnesses:\n        return Family("llama")\n        raise',
    ),
    Change(
        INIT + "006",
        "the step-0 cap is flipped",
        VERDICT,
        "passed=math.isfinite(val_loss) and val_loss <= INIT_LOSS_CAP,",
        "passed=math.isfinite(val_loss) and val_loss >= INIT_LOSS_CAP,",
        also=(FINETUNE + "003",),
    ),
    Change(
        INIT + "006",
        "random weights need not look random",
        VERDICT,
        "passed=math.isfinite(val_loss) and val_loss >= low,",
        "passed=math.isfinite(val_loss),",
    ),
    Change(
        INIT + "007",
        "the flag has another name",
        CONFIG,
        '    return "--" + key.replace("_", "-")',
        '    return "--" + key.replace("_", "-").replace("init", "start")',
        also=(INIT + "001",),
    ),
    Change(
        INIT + "008",
        "the contract counts an obligation too many",
        "contracts/apr-pretrain-from-init-v1.yaml",
        "  total_obligations: 6",
        "  total_obligations: 7",
    ),
    Change(
        INIT + "009",
        "the schedule starts past its warm-up",
        SCHEDULE,
        "        if step < self.warmup_steps:",
        "        if 0 < step < self.warmup_steps:",
    ),
    Change(
        INIT + "010",
        "a checkpoint depends on the clock",
        SAVED,
        '    ours = {f"apr_dist.{key}": value for key, value in provenance.items() if value is not None}',
        '    import time\n    ours = {"apr_dist.at": time.time_ns()}',
    ),
    Change(
        MATCH,
        "a contradiction is not compared",
        FAMILY_GATE,
        "    if len(set(witnesses)) > 1:",
        "    if len(set(witnesses)) > 9:",
    ),
    Change(
        MATCH,
        "a silent witness is a contradiction",
        FAMILY_GATE,
        "    witnesses = list(claims.values()) + ([shown] if shown != UNKNOWN else [])",
        "    witnesses = [*claims.values(), shown]",
    ),
    Change(
        ARCH + "001",
        "the 1.5B preset loses its tie",
        MODEL_CONFIG,
        'tie_word_embeddings=size != "7b",',
        'tie_word_embeddings=size == "0.5b",',
    ),
    Change(
        ARCH + "003",
        "theta is a constant",
        MODEL_CONFIG,
        'rope_theta=values["rope_theta"],',
        "rope_theta=1e6,",
        also=(INIT + "005",),
    ),
    Change(
        ARCH + "004",
        "grouped queries read the wrong KV head",
        ATTENTION,
        "        key.transpose(1, 2),",
        "        key.flip(2).transpose(1, 2),",
    ),
    Change(
        ARCH + "004",
        "the bias of the keys is not built",
        ATTENTION,
        "self.k_proj = Linear(hidden, config.kv_size, bias=config.qkv_bias)",
        "self.k_proj = Linear(hidden, config.kv_size, bias=False)",
    ),
    Change(
        ARCH + "005",
        "equality is demanded with an init",
        VOCABULARY_GATE,
        "    if not from_init and effective != model_vocab:",
        "    if effective != model_vocab:",
        also=(ARCH + "009", ARCH + "006", ARCH + "010"),
    ),
    Change(
        ARCH + "006",
        "inequality passes from scratch",
        VOCABULARY_GATE,
        "    if not from_init and effective != model_vocab:",
        "    if not from_init and effective > model_vocab:",
        also=(ARCH + "010",),
    ),
    Change(
        ARCH + "007",
        "an encoder is not recognised",
        FAMILY_GATE,
        "    if any(is_encoder(text) for text in (*texts, shown)):",
        "    if any(is_encoder(text) for text in ()):",
    ),
    Change(
        ARCH + "007",
        "an encoder is recognised by its metadata only",
        FAMILY_GATE,
        "    if any(is_encoder(text) for text in (*texts, shown)):",
        "    if any(is_encoder(text) for text in texts):",
    ),
    Change(
        ARCH + "008",
        "the contract counts an obligation too many",
        "contracts/apr-pretrain-arch-polymorphic-v1.yaml",
        "  total_obligations: 7",
        "  total_obligations: 8",
    ),
    Change(
        ARCH + "009",
        "reserved rows are refused",
        VOCABULARY_GATE,
        "    if effective > model_vocab:",
        "    if effective != model_vocab:",
        also=(ARCH + "005", ARCH + "006", ARCH + "010"),
    ),
    Change(
        ARCH + "010",
        "one token too many passes",
        VOCABULARY_GATE,
        "    if effective > model_vocab:",
        "    if effective > model_vocab + 1:",
        also=(ARCH + "006",),
    ),
    Change(
        FINETUNE + "001",
        "the verdict is not written",
        RUN,
        "    runtime.on_main(lambda: write_atomically(config.run_dir / VERDICT_NAME",
        "    runtime.on_main(lambda: write_atomically(config.run_dir / METRICS_NAME",
    ),
    Change(
        FINETUNE + "003",
        "the share of chance is not looked at",
        VERDICT,
        "passed=math.isfinite(val_loss) and val_loss <= INIT_LOSS_SHARE * log_v,",
        "passed=math.isfinite(val_loss),",
    ),
    Change(
        FINETUNE + "004",
        "a checkpoint loses who it is",
        SAVED,
        "    values = {**kept, **stamped, **ours,",
        "    values = {**stamped, **ours,",
    ),
    Change(
        FINETUNE + "005",
        "the last loss may be anything",
        VERDICT,
        "passed=math.isfinite(val_loss) and val_loss < FINAL_LOSS_CAP,",
        "passed=val_loss < 2 * FINAL_LOSS_CAP,",
    ),
    Change(
        FINETUNE + "007",
        "only the first comparison counts",
        VERDICT,
        "        worst = max(agreements, key=lambda pair: pair.difference)",
        "        worst = agreements[0]",
    ),
    Change(
        FINETUNE + "007",
        "an impossible loss is plausible",
        VERDICT,
        "passed=val_loss >= PLAUSIBLE_SHARE * train_loss,",
        "passed=val_loss <= train_loss,",
    ),
    Change(
        LOOP + "001",
        "a step line has no rate",
        METRICS,
        '        self._line({"kind": "step", **values})',
        '        self._line({"kind": "step", **values, "lr": None})',
    ),
    Change(
        LOOP + "002",
        "the facts lose a figure",
        "apr_dist/training/saving.py",
        "            train_ppl=perplexity(progress.train_loss),",
        "            train_ppl=None,",
    ),
    Change(
        LOOP + "004",
        "patience is one short",
        GUARDS,
        "        return self.without_improvement > self.patience and",
        "        return self.without_improvement >= self.patience and",
    ),
    Change(
        LOOP + "004",
        "a run may stop before its third evaluation",
        GUARDS,
        "self.without_improvement > self.patience and epochs_done >= self.min_epochs",
        "self.without_improvement > self.patience",
    ),
    Change(
        LOOP + "005",
        "NaN is no divergence",
        GUARDS,
        "    if math.isfinite(val_loss) and val_loss <= bound:",
        "    if not val_loss > bound:",
    ),
    Change(
        LOOP + "005",
        "the band is three times as wide",
        GUARDS,
        "MAX_GROWTH = 2.0",
        "MAX_GROWTH = 3.0",
    ),
    Change(
        LOOP + "006",
        "the seed of the order is ignored",
        RUN,
        "        seed=config.seed,\n        shuffle",
        "        seed=1,\n        shuffle",
    ),
    Change(
        LOOP + "007",
        "the gradient norm is not looked at",
        GUARDS,
        "    if math.isfinite(train_loss) and math.isfinite(grad_norm):",
        "    if math.isfinite(train_loss):",
    ),
    Change(
        LOOP + "008",
        "no throughput is impossible",
        METRICS,
        '            if not math.isfinite(value) or (key == "tokens_per_sec" and value <= 0):',
        "            if math.isnan(value):",
    ),
    Change(
        LOOP + "009",
        "a mode's warm-up is the other's",
        CONFIG,
        "Mode.FROM_SCRATCH: ModeDefaults(lr=3e-4, warmup_steps=1000,",
        "Mode.FROM_SCRATCH: ModeDefaults(lr=3e-4, warmup_steps=100,",
    ),
    Change(
        LOOP + "010",
        "a synthetic line is not marked",
        "apr_dist/train.py",
        '        self._prefix = "[SYNTHETIC] " if synthetic else ""',
        '        self._prefix = ""',
    ),
    Change(
        LOOP + "011",
        "cycling is not said",
        TRAINER_FILE,
        "        if data_epoch > state.data_epoch:",
        "        if data_epoch > state.data_epoch + 1:",
    ),
    Change(
        TRAINER + "002",
        "a doubled parameter passes",
        OPTIMIZER,
        "    if len(held) != len(set(held)) or set(held) != wanted:",
        "    if set(held) != wanted:",
    ),
    Change(
        TRAINER + "003",
        "a claimed tie is believed",
        FAMILY_GATE,
        "    if claim is True and not head.equals_embedding:",
        "    if False:",
    ),
    Change(
        TRAINER + "004",
        "a missing tensor is not looked for",
        WEIGHTS_GATE,
        "    if missing:\n",
        "    if missing and not found:\n",
    ),
    Change(
        TRAINER + "005",
        "only the number of elements is compared",
        WEIGHTS_GATE,
        "        if found[name] != shape",
        "        if np.prod(found[name]) != np.prod(shape)",
    ),
    Change(
        TRAINER + "006",
        "a left-over tensor is dropped in silence",
        WEIGHTS_GATE,
        "    if extra:\n",
        "    if extra and not expected:\n",
    ),
    Change(
        TRAINER + "008",
        "an id equal to the rows passes",
        VOCABULARY_GATE,
        "    if max_id >= model_vocab:",
        "    if max_id > model_vocab:",
    ),
    Change(
        TRAINER + "009",
        "tokenizers are not compared",
        VOCABULARY_GATE,
        "and shards_sha256 != tokenizer_sha256:",
        "and shards_sha256 == tokenizer_sha256 + ' ':",
    ),
    Change(
        TRAINER + "011",
        "a copied shard is not recognised",
        DATA_GATE,
        "        copied = shard.sha256 is not None and shard.sha256 in trained",
        "        copied = shard.file is None and shard.sha256 in trained",
    ),
    Change(
        TRAINER + "012",
        "values are not looked at before training",
        PREFLIGHT,
        "    count = weights.check_values(reader, list(expected))",
        "    count = len(expected)",
    ),
    Change(
        TRAINER + "020",
        "the rate reaches one group only",
        OPTIMIZER,
        '    for group in optimizer.param_groups:\n        group["lr"] = lr',
        '    for group in optimizer.param_groups[:1]:\n        group["lr"] = lr',
    ),
    Change(
        TRAINER + "021",
        "the logged norm is a constant",
        TRAINER_FILE,
        "        self._record(train_loss, grad_norm, lr, wall_s, data_wait_s)",
        "        self._record(train_loss, 1.0, lr, wall_s, data_wait_s)",
    ),
    Change(
        TRAINER + "023",
        "biases are not saved",
        "apr_dist/parallel/weights.py",
        "    yield from model.named_parameters(remove_duplicate=True)",
        '    yield from ((n, p) for n, p in model.named_parameters() if "bias" not in n)',
    ),
    Change(
        CHECKPOINT + "001",
        "the footer is not compared",
        READER,
        "        if stored != computed:",
        "        if stored == 0:",
    ),
    Change(
        CHECKPOINT + "003",
        "an occupied folder is free",
        OUTPUT_GATE,
        "    if folder.is_dir() and any(folder.iterdir()) and not overwrite:",
        "    if folder.is_dir() and not folder.exists() and not overwrite:",
    ),
    Change(
        CHECKPOINT + "004",
        "any disk is large enough",
        OUTPUT_GATE,
        "    if free < needed_bytes:",
        "    if free < 0:",
    ),
    Change(
        CHECKPOINT + "005",
        "a reopened checkpoint is not compared",
        VERDICT,
        "    if recorded is None:\n        return []",
        "    if recorded is not None:\n        return []",
    ),
    Change(
        LOADER + "002",
        "ranks share their first rows",
        LOADER_FILE,
        "        return k * self._batch_size + self._rank * self._share",
        "        return k * self._batch_size + self._rank * self._micro",
    ),
    Change(
        LOADER + "003",
        "a state is one batch behind",
        LOADER_FILE,
        "        self._global_batch = found",
        "        self._global_batch = max(0, found - 1)",
    ),
    Change(
        LOADER + "004",
        "another fingerprint is accepted",
        LOADER_FILE,
        "            if state.get(key) != value:",
        '            if state.get(key) != value and key != "fingerprint":',
    ),
    Change(
        LOADER + "007",
        "a block is copied",
        LOADER_FILE,
        "            return [from_dlpack(view) for view in stream.views(first, self._share, self._micro)]",
        "            return [from_dlpack(v).clone() for v in stream.views(first, self._share, self._micro)]",
    ),
    Change(
        LOADER + "008",
        "the seed is not part of the order",
        LOADER_FILE,
        '            "seed": seed,\n            "block"',
        '            "seed": 0,\n            "block"',
    ),
    Change(
        LOADER + "009",
        "epochs are not counted",
        LOADER_FILE,
        "        if self._batches is not None and k >= self._batches:",
        "        if self._batches is not None and k >= self._batches + 10**9:",
    ),
    Change(
        IMPORT + "002",
        "merges.txt has no first line",
        TOKENIZER,
        '    return "#version: 0.2\\n" + "".join(',
        '    return "" + "".join(',
        also=(IMPORT + "003", IMPORT + "004"),
    ),
    Change(
        IMPORT + "003",
        "added tokens count twice",
        TOKENIZER,
        "        added_tokens_count=len(effective) - len(facts.vocabulary),",
        "        added_tokens_count=len(facts.added) + 1,",
    ),
    Change(
        IMPORT + "004",
        "merges are sorted",
        TOKENIZER,
        'f"{left} {right}\\n" for left, right in facts.merges)',
        'f"{left} {right}\\n" for left, right in sorted(facts.merges))',
    ),
    Change(
        IMPORT + "005",
        "another kind is read as BPE",
        TOKENIZER_JSON,
        '    if kind != "BPE":',
        '    if kind == "":',
    ),
    Change(
        LOADER + "001",
        "every other sequence comes twice",
        LOADER_FILE,
        "        return k * self._batch_size + self._rank * self._share",
        "        return k // 2 * 2 * self._batch_size + self._rank * self._share",
        also=(LOADER + "003", LOADER + "008"),
    ),
    Change(
        LOADER + "005",
        "the size of a shard is not compared",
        "rust_loader/src/shard.rs",
        "        if metadata.len() != bytes {",
        "        if metadata.len() == u64::MAX {",
    ),
    Change(
        LOADER + "006",
        "the hash of a shard is not compared",
        "rust_loader/src/shard.rs",
        "            if found != expected {",
        "            if found == 0 && found != expected {",
    ),
    Change(
        LOADER + "012",
        "positions have 32 bits",
        "rust_loader/src/shard.rs",
        "    value as usize\n",
        "    value as u32 as usize\n",
    ),
    Change(
        REPAIR + "001",
        "one shard is not counted",
        "apr_dist/data/manifest.py",
        '            "shard_count": len(self.shards),',
        '            "shard_count": len(self.shards) - 1,',
        also=(REPAIR + "005",),
    ),
    Change(
        REPAIR + "002",
        "bytes are counted as tokens",
        "apr_dist/data/manifest.py",
        '            "total_tokens": self.total_tokens,',
        '            "total_tokens": 4 * self.total_tokens,',
        also=(REPAIR + "005",),
    ),
    Change(
        REPAIR + "003",
        "the schema has another name",
        "apr_dist/data/manifest_file.py",
        'SCHEMA = "apr-dist-shards-v1"',
        'SCHEMA = "apr-dist-shards-v0"',
    ),
    Change(
        REPAIR + "004",
        "the time has no zone",
        VERIFICATION,
        '    now = datetime.now(UTC).isoformat(timespec="seconds")',
        '    now = datetime.now().isoformat(timespec="seconds")',
    ),
    Change(
        REPAIR + "005",
        "a repaired manifest forgets its tokenizer",
        VERIFICATION,
        "        identity = load_tokenizer(tokenizer).identity\n        vocab_size = identity.id_bound",
        "        vocab_size = None",
    ),
    Change(
        REPAIR + "006",
        "the note changes from repair to repair",
        VERIFICATION,
        "    manifest = replace(manifest, repaired_at=now, note=note)",
        "    manifest = replace(manifest, repaired_at=now, note=f'{note} {id(manifest)} {changed}')",
    ),
    Change(
        DISTRIBUTED + "001",
        "the active strategy is not compared",
        RUNTIME,
        "    fits = (wanted is not Strategy.SINGLE) == several",
        "    fits = wanted is not None or several",
    ),
    Change(
        DISTRIBUTED + "002",
        "gradients are not scaled by the world size",
        TRAINER_FILE,
        "        scale = self.runtime.world_size / global_tokens",
        "        scale = 1 / global_tokens",
    ),
    Change(
        DISTRIBUTED + "003",
        "only rank 0 hears of its refusal",
        RUNTIME,
        "        if fields is not None:\n            raise",
        "        if fields is not None and self.is_main:\n            raise",
    ),
    Change(
        TRAINER + "001",
        "the digests are not compared",
        "apr_dist/parallel/weights.py",
        "    wrong = [name for name in found if expected.get(name) != found[name]]",
        "    wrong = [name for name in found if name not in expected]",
    ),
    Change(
        TRAINER + "007",
        "infinity is a weight",
        WEIGHTS_GATE,
        "        if not np.isfinite(total):",
        "        if np.isnan(total):",
    ),
    Change(
        TRAINER + "007",
        "a matrix of zeros is a weight",
        WEIGHTS_GATE,
        '        if total == 0.0 and not name.endswith(".bias") and not values.any():',
        "        if total == 0.0 and not name and not values.any():",
    ),
    Change(
        TRAINER + "010",
        "an equal loss has fallen",
        VERDICT,
        "                passed=val_loss < first_val_loss,",
        "                passed=val_loss <= first_val_loss,",
    ),
    Change(
        TRAINER + "022",
        "layers share their random stream",
        "apr_dist/model/transformer.py",
        '    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()',
        '    digest = hashlib.blake2b(f"{seed}:{name[15:]}".encode(), digest_size=8).digest()',
    ),
    Change(
        TRAINER + "024",
        "a checkpoint has no dimensions",
        SAVED,
        "    values = {**kept, **stamped, **ours,",
        "    values = {**kept, **ours,",
    ),
    Change(
        TRAINER + "025",
        "a full disk is an internal error",
        FILES,
        "                rest, offset = rest[written:], offset + written\n        except OSError as error:",
        "                rest, offset = rest[written:], offset + written\n        except KeyError as error:",
    ),
    Change(
        TRAINER + "026",
        "the end of the steps is OK",
        VERDICT,
        '    COMPLETED = "COMPLETED"',
        '    COMPLETED = "OK "',
    ),
    Change(
        TRAINER + "027",
        "the sample is one of the training stream",
        "apr_dist/data/evaluation_loader.py",
        "            yield from_dlpack(stream.gather(begin, end - begin))",
        "            yield from_dlpack(stream.gather(begin, end - begin)).flip(0) + int(id(stream) % 3)",
    ),
    Change(
        TRAINER + "029",
        "the order is that of the shards",
        "rust_loader/src/stream.rs",
        "        let (epoch, place) = (unit / source.units(), unit % source.units());",
        "        if source.units() > 0 { return unit % source.units(); }\n"
        "        let (epoch, place) = (unit / source.units(), unit % source.units());",
    ),
    Change(
        TRAINER + "030",
        "the footer is not compared",
        READER,
        "        if stored != computed:",
        "        if stored == 0:",
    ),
    Change(
        TRAINER + "032",
        "shards depend on the number of workers",
        "apr_dist/data/encode.py",
        "        shard_tokens=shard_tokens,\n        eos_policy",
        "        shard_tokens=shard_tokens // (workers or 1),\n        eos_policy",
    ),
    Change(
        TRAINER + "033",
        "a bias is cut off from the loss",
        "apr_dist/model/layers.py",
        "            return _Linear.apply(x.to(compute_dtype(x)), self.weight, self.bias)",
        "            bias = None if self.bias is None else self.bias.detach()\n"
        "            return _Linear.apply(x.to(compute_dtype(x)), self.weight, bias)",
    ),
    Change(
        TRAINER + "034",
        "vectors are in no group",
        OPTIMIZER,
        '{"params": vectors, "weight_decay": 0.0}],',
        '{"params": vectors, "weight_decay": 0.0, "lr": 0.0}],',
    ),
    Change(
        CHECKPOINT + "002",
        "what was written is not read back",
        "apr_dist/parallel/weights.py",
        "            if name not in reader.tensors or _digest_array(reader.float32(name)) != value:",
        "            if name not in reader.tensors:",
    ),
    Change(
        CHECKPOINT + "010",
        "a file that failed takes the name all the same",
        FILES,
        "        if kind is None:\n            self.commit()",
        "        if kind is not KeyError:\n            self.commit()",
    ),
    Change(
        ARCH + "002",
        "another default model",
        CONFIG,
        '        "llama-370m", description',
        '        "smollm2-135m", description',
    ),
    Change(
        ARCH + "CUDA-001",
        "a device changes the rotation",
        "apr_dist/model/transformer.py",
        "        self.model.rotary.reset()",
        "        pass",
    ),
    Change(
        ARCH + "CUDA-002",
        "the command line gives the shape, the file the weights",
        PREFLIGHT,
        "    found = Preflight(model_config=model_config, reader=reader,",
        "    found = Preflight(model_config=model_from_name(config.model), reader=reader,",
    ),
    Change(
        ARCH + "CUDA-003",
        "the encoder is asked for on the CPU only",
        PREFLIGHT,
        "    family = architecture.check_family(metadata, shapes, where=path)",
        '    cpu = config.device != "cuda"\n'
        '    claims = metadata if cpu else {"architecture": "qwen2"}\n'
        "    family = architecture.check_family(claims, shapes if cpu else {}, where=path)",
    ),
    Change(
        TRAINER + "031",
        "a data folder that is missing is a synthetic run",
        PREFLIGHT,
        "        if not config.synthetic:",
        "        if not config.synthetic and config.dataset.exists() and config.val_dataset.exists():",
    ),
    Change(
        CHECKPOINT + "006",
        "digests of a step folder are not compared",
        "apr_dist/training/step_folders.py",
        "        if not file.is_file() or file_digest(file) != digest:",
        "        if not file.is_file():",
    ),
    Change(
        CHECKPOINT + "007",
        "another setting is no other run",
        "apr_dist/training/resume.py",
        "    if changed:\n",
        "    if changed and not before:\n",
    ),
    Change(
        CHECKPOINT + "008",
        "a resume forgets the moments",
        TRAINER_FILE,
        "        load_optimizer(self.model, self.engine.optimizer, path, self.runtime)",
        "        del path",
    ),
    Change(
        CHECKPOINT + "009",
        "the last good folder goes before the new one is whole",
        "apr_dist/training/saving.py",
        "        folder = step_folder(self._run_dir, progress.step)\n",
        "        folder = step_folder(self._run_dir, progress.step)\n"
        "        for old in (self._run_dir / 'steps').glob('*/state.json'):\n            old.unlink()\n"
        "        time.sleep(1.0)\n",
    ),
    Change(
        DISTRIBUTED + "004",
        "a signal ends the run without a save",
        TRAINER_FILE,
        "            if signal_number:\n                self._save()\n",
        "            if signal_number:\n",
    ),
    Change(
        LOOP + "003",
        "the facts carry the digest of the model",
        "apr_dist/training/saving.py",
        "        facts = self._facts(progress, optimizer_digest)",
        "        facts = self._facts(progress, file_digest(target))",
    ),
    Change(
        TRAINER + "028",
        "a resumed run begins with the first batch",
        TRAINER_FILE,
        "        micro_batches = self.train_data.batch(step)",
        "        micro_batches = self.train_data.batch(step % 2)",
    ),
    Change(
        LOADER + "010",
        "the size of a mapped shard is not looked at again",
        "rust_loader/src/shard.rs",
        "        if found == self.bytes {",
        "        if found > 0 {",
    ),
    Change(
        LOADER + "011",
        "one source of a mixture takes the places of the next",
        "rust_loader/src/stream.rs",
        "            if source.dealt(place + 1) > before {",
        "            if source.dealt(place + 2) > before {",
    ),
)
