"""Defects that a real trainer had, each shown to be absent here."""

from __future__ import annotations

import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from builders.files import write_golden
from builders.models import random_tokens, tiny_config, tiny_decoder
from builders.runs import metrics, run_here, verdict
from builders.shards import SHARD_STRIDE, build_shards
from builders.tokens import build_tiny_tokenizer, small_sources

from apr_dist.apr.metadata import AprMetadata
from apr_dist.apr.reader import AprReader
from apr_dist.corpus.encode import encode_corpus
from apr_dist.data.loader import EvaluationLoader, TokenLoader
from apr_dist.data.manifest import Manifest
from apr_dist.errors import ExitCode, ModelFileError
from apr_dist.gates.architecture import HeadFacts, check_dimensions, check_family
from apr_dist.model.families import Family
from apr_dist.model.transformer import init_weights
from apr_dist.runs.checkpoint import checkpoint_metadata
from apr_dist.training.optimizer import apply_lr, build_optimizer

if TYPE_CHECKING:
    from builders.runs import Inputs


@pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-022")
def test_every_layer_begins_with_weights_of_its_own() -> None:
    model = tiny_decoder(tiny_config(num_layers=3))
    init_weights(model, seed=1)
    first = {name: weight.clone() for name, weight in model.named_parameters() if weight.ndim == 2}
    values = [tuple(weight.flatten()[:8].tolist()) for weight in first.values()]
    assert len(set(values)) == len(values)
    init_weights(model, seed=1)
    assert all(torch.equal(weight, first[name]) for name, weight in model.named_parameters() if name in first)
    init_weights(model, seed=2)
    assert not any(torch.equal(w, first[name]) for name, w in model.named_parameters() if name in first)


@pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-024")
@pytest.mark.parametrize("family", Family)
def test_the_metadata_of_a_checkpoint_alone_build_its_model_again(family: Family) -> None:
    config = tiny_config(family)
    metadata = checkpoint_metadata(config, None, {"step": 3}).to_mapping()
    names = list(config.parameter_shapes())
    where = Path("checkpoint.apr")
    found = check_family(metadata, names, where=where)
    head = HeadFacts(present="lm_head.weight" in names, equals_embedding=False)
    assert found is family
    assert check_dimensions(metadata, head, family=found, where=where) == config


@pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-024")
def test_a_checkpoint_keeps_the_identity_its_init_came_with() -> None:
    config = tiny_config(Family.QWEN2)
    source = AprMetadata.from_mapping({**config.to_metadata(), "name": "a model", "license": "MIT"})
    kept = checkpoint_metadata(config, source, {}).to_mapping()
    assert (kept["name"], kept["license"], kept["hf_architecture"]) == ("a model", "MIT", "Qwen2ForCausalLM")


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may grow beyond 64 KiB: room for a log, none for weights."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-025")
@pytest.mark.usefixtures("small_files")
def test_a_checkpoint_that_cannot_be_written_ends_the_run_with_its_exit_code(
    inputs: Inputs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = [*inputs.data_flags(), "--init", str(inputs.pretrained), "--run-dir", str(tmp_path / "run")]
    assert run_here(*flags, "--num-steps", "1") == ExitCode.OUTPUT
    error = capfd.readouterr().err
    assert error.startswith("error: ")
    assert "Traceback" not in error
    assert not list((tmp_path / "run").rglob("*.apr"))


@pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-026")
def test_steps_that_end_without_reaching_the_target_are_completed_and_not_ok(
    inputs: Inputs, tmp_path: Path
) -> None:
    flags = ("--init", str(inputs.pretrained), "--num-steps", "1", "--target-val-loss", "0.01")
    assert run_here(*inputs.data_flags(), "--run-dir", str(tmp_path / "run"), *flags) == 0
    said = verdict(tmp_path / "run")
    assert said["status"] == "COMPLETED"
    target = next(gate for gate in said["gates"] if gate["gate"] == "target validation loss")
    assert (target["passed"], target["ship_blocking"]) == (False, False)


def rows(batches: list[torch.Tensor]) -> set[tuple[int, ...]]:
    """The sequences of some batches, as they are."""
    return {tuple(row.tolist()) for batch in batches for row in batch}


@pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-027")
def test_the_held_out_sample_never_moves_and_is_never_trained_on(inputs: Inputs) -> None:
    held_out = EvaluationLoader(
        Manifest.load(inputs.validation), seq_length=64, micro_batch=4, max_sequences=16
    )
    first, second = list(held_out), list(held_out)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert len(rows(first)) == 16
    training = TokenLoader(
        Manifest.load(inputs.train), seq_length=64, global_batch=64, micro_batch=4, seed=1, max_epochs=2
    )
    seen = [micro for batch in training for micro in batch]
    assert sum(len(micro) for micro in seen) > training.sequences_per_epoch
    # Two files may hold the same lines, so it is not their contents that must differ but their folders.
    assert rows(first) <= rows(
        EvaluationLoader(Manifest.load(inputs.validation), seq_length=64, micro_batch=4)
    )
    assert rows(seen) == rows(EvaluationLoader(Manifest.load(inputs.train), seq_length=64, micro_batch=4))


@pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-028")
def test_a_resumed_run_trains_on_the_batches_that_were_next(inputs: Inputs, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    flags = [*inputs.data_flags(), "--init", str(inputs.pretrained), "--run-dir", str(run_dir)]
    flags += ["--num-steps", "4", "--eval-every", "2", "--lr", "1e-3", "--checkpoint.keep-last", "9"]
    assert run_here(*flags) == 0
    losses = [line["train_loss"] for line in metrics(run_dir)]
    shutil.rmtree(run_dir / "steps" / "000004")
    assert run_here(*flags, "--resume", "auto") == 0
    assert [line["train_loss"] for line in metrics(run_dir)] == losses
    assert len(set(losses)) == 4


@pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-029")
def test_the_first_batches_hold_sequences_of_every_shard(tmp_path: Path) -> None:
    manifest = build_shards(tmp_path, [1001] * 8)
    loader = TokenLoader(manifest, seq_length=10, global_batch=64, micro_batch=64, seed=3)
    shards = [int(row[0]) // SHARD_STRIDE for row in loader.batch(0)[0]]
    assert set(shards) == set(range(8))
    assert max(shards.count(shard) for shard in range(8)) < 32


@pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-030")
def test_half_a_file_and_an_altered_one_are_not_opened(tmp_path: Path) -> None:
    whole = write_golden(tmp_path / "whole.apr").read_bytes()
    AprReader(tmp_path / "whole.apr").close()
    altered = bytearray(whole)
    altered[-70] ^= 1
    for name, content in {
        "half": whole[: len(whole) // 2],
        "short": whole[:-1],
        "altered": bytes(altered),
    }.items():
        (tmp_path / f"{name}.apr").write_bytes(content)
        with pytest.raises(ModelFileError):
            AprReader(tmp_path / f"{name}.apr")


@pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-031")
@pytest.mark.parametrize("flag", ["--dataset", "--val-dataset", "--init", "--tokenizer"])
def test_a_wrong_path_trains_nothing(
    inputs: Inputs, tmp_path: Path, capfd: pytest.CaptureFixture[str], flag: str
) -> None:
    flags = [*inputs.data_flags(), "--init", str(inputs.pretrained), "--num-steps", "1"]
    code = run_here(*flags, "--run-dir", str(tmp_path / "run"), flag, str(tmp_path / "nowhere"))
    assert code in (ExitCode.MODEL_FILE, ExitCode.DATA)
    assert str(tmp_path / "nowhere") in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-032")
def test_encoding_gives_the_same_bytes_for_any_number_of_workers(tmp_path: Path) -> None:
    tokenizer = build_tiny_tokenizer(tmp_path / "tokenizer")
    contents = []
    for workers in (1, 2):
        folder = tmp_path / f"with-{workers}"
        encode_corpus(
            sources=small_sources(12), tokenizer=tokenizer, output=folder, shard_tokens=4000, workers=workers
        )
        contents.append({path.name: path.read_bytes() for path in sorted(folder.glob("shard-*"))})
        shutil.rmtree(folder)
    assert contents[0] == contents[1]
    assert len(contents[0]) > 2


@pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-033")
@pytest.mark.parametrize("family", Family)
def test_every_parameter_and_every_bias_receives_a_gradient(family: Family) -> None:
    config = tiny_config(family)
    model, tokens = tiny_decoder(config), random_tokens(config, (2, 9))
    loss, _ = model(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not silent
    biases = sum(name.endswith(".bias") for name, _ in model.named_parameters())
    assert biases == (3 * config.num_layers if family is Family.QWEN2 else 0)


@pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-034")
@pytest.mark.parametrize("family", Family)
def test_every_trainable_tensor_moves_in_a_step(family: Family) -> None:
    config = tiny_config(family)
    model, tokens = tiny_decoder(config), random_tokens(config, (2, 9))
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    optimizer = build_optimizer(model, lr=1e-9, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8)
    apply_lr(optimizer, 1e-2)
    loss, _ = model(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    optimizer.step()
    still = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert len(before) == len(config.parameter_shapes())
    assert not still


@pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-020")
def test_the_rate_that_is_logged_is_the_one_the_optimizer_held(inputs: Inputs, tmp_path: Path) -> None:
    flags = ["--init", str(inputs.pretrained), "--num-steps", "3", "--lr", "4e-3", "--warmup-steps", "2"]
    flags += ["--optimizer.lr-min-ratio", "0.5", "--optimizer.weight-decay", "0"]
    assert run_here(*inputs.data_flags(), "--run-dir", str(tmp_path / "run"), *flags) == 0
    assert [line["lr"] for line in metrics(tmp_path / "run")] == pytest.approx([2e-3, 4e-3, 4e-3])
    assert run_here(*inputs.data_flags(), "--run-dir", str(tmp_path / "slow"), *flags, "--lr", "1e-7") == 0
    moved, still = (
        distance(tmp_path / name / "checkpoint.apr", inputs.pretrained) for name in ("run", "slow")
    )
    assert moved > 100 * still > 0


def distance(path: Path, other: Path) -> float:
    """Largest change of a value between two model files."""
    with AprReader(path) as one, AprReader(other) as two:
        return max(float(abs(one.float32(name) - two.float32(name)).max()) for name in one.tensors)
