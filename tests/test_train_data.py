"""What a run trains on, through the entry point: mixtures, ways to read, and targets that do not count."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import xxhash
import yaml
from builders.runs import metrics, run_here, verdict, whole_folders
from builders.tokens import build_tiny_tokenizer, small_sources

from apr_dist.corpus.encode import encode_corpus
from apr_dist.data.manifest import Manifest, Shard
from apr_dist.data.training_set import tail_names
from apr_dist.errors import ExitCode

if TYPE_CHECKING:
    from builders.runs import Inputs


def encoded(folder: Path, tokenizer: Path, *, files: int) -> Path:
    """A shard folder of a few source files that are in neither part of the shared data set."""
    encode_corpus(sources=small_sources(150 + files)[150:], tokenizer=tokenizer, output=folder)
    return folder


@pytest.fixture(scope="module")
def second(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A much smaller data set of the same tokenizer."""
    return encoded(tmp_path_factory.mktemp("second") / "other", inputs.tokenizer, files=3)


def flags(inputs: Inputs, run_dir: Path, *more: str) -> list[str]:
    given = inputs.data_flags()
    at = given.index("--dataset")
    del given[at : at + 2]
    given += ["--init", str(inputs.pretrained), "--run-dir", str(run_dir), "--num-steps", "4"]
    given += ["--eval-every", "2", "--lr", "1e-3", "--warmup-steps", "1", "--checkpoint.keep-last", "9"]
    return [*given, *more]


def mixture_flag(*weights: tuple[Path, float]) -> list[str]:
    return ["--loader.mixture", ",".join(f"{path}={weight}" for path, weight in weights)]


def test_a_mixture_trains_and_reports_every_source_and_its_passes(
    inputs: Inputs, second: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    few = encoded(tmp_path / "few", inputs.tokenizer, files=1)
    code = run_here(
        *flags(inputs, tmp_path / "run", "--batch-size", "64", "--seq-length", "16"),
        *mixture_flag((inputs.train, 1.0), (few, 3.0)),
    )
    assert code == ExitCode.OK
    facts = verdict(tmp_path / "run")["facts"]
    assert {source["name"]: source["weight"] for source in facts["data_sources"]} == {
        "train": 1.0,
        "few": 3.0,
    }
    held = sum((shard.tokens - 1) // 16 for shard in Manifest.load(few).shards)
    done = facts["data"]
    assert (done["train"]["sequences"], done["few"]["sequences"]) == (64, 192)
    assert done["few"]["epoch"] == 192 // held
    last = metrics(tmp_path / "run")[-1]
    assert last["data_epochs"] == {"train": 0, "few": 191 // held}
    assert last["data_epoch"] == max(last["data_epochs"].values())
    if 191 // held:
        assert "training data few: pass 2 begins" in capfd.readouterr().out


def test_a_mixture_in_a_file_is_the_same_as_on_the_command_line_and_goes_on_exactly(
    inputs: Inputs, second: Path, tmp_path: Path
) -> None:
    mixture = {str(inputs.train): 0.75, str(second): 0.25}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"loader": {"mixture": mixture}}))
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert run_here("--config", str(file), *flags(inputs, straight)) == ExitCode.OK
    shutil.copytree(straight, stopped)
    shutil.rmtree(whole_folders(stopped)[-1])
    moved = shutil.copytree(second.parent, tmp_path / "elsewhere") / second.name
    resumed = flags(inputs, stopped, *mixture_flag((moved, 0.25), (inputs.train, 0.75)), "--resume", "auto")
    assert run_here(*resumed) == ExitCode.OK
    ours, theirs = (
        [(line["step"], line["train_loss"], line["data_epochs"]) for line in metrics(run)]
        for run in (stopped, straight)
    )
    assert ours == theirs
    before, after = verdict(straight)["facts"], verdict(stopped)["facts"]
    assert before["weights_digest"] == after["weights_digest"]
    assert before["data_fingerprint"] == after["data_fingerprint"]


def test_other_weights_are_another_run(
    inputs: Inputs, second: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    assert run_here(*flags(inputs, run_dir), *mixture_flag((inputs.train, 3), (second, 1))) == ExitCode.OK
    capfd.readouterr()
    resumed = [*flags(inputs, run_dir, "--resume", "auto"), *mixture_flag((inputs.train, 1), (second, 1))]
    assert run_here(*resumed) == ExitCode.USAGE
    assert "training shards were" in capfd.readouterr().err


def refused(capfd: pytest.CaptureFixture[str], run_dir: Path, code: ExitCode, *given: str) -> str:
    capfd.readouterr()
    assert run_here(*given) == code
    error = capfd.readouterr().err
    assert error.startswith("error: ")
    assert "Traceback" not in error
    assert not run_dir.exists()
    return error


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{train}=0", "loader.mixture is"),
        ("{train}=-1", "loader.mixture is"),
        ("{train}=nan", "loader.mixture is"),
        ("{train}", "path=weight"),
        ("{train}=1,{train}=2", "each path once"),
        ("{train}=1,{train}/../train=2", "twice"),
        ("{train}=1,{validation}=0.000000001", "would get no sequence"),
    ],
)
def test_a_mixture_that_means_nothing_is_refused(
    text: str, said: str, inputs: Inputs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    mixture = text.format(train=inputs.train, validation=inputs.validation)
    given = flags(inputs, tmp_path / "run", "--loader.mixture", mixture)
    assert said in refused(capfd, tmp_path / "run", ExitCode.USAGE, *given)


def test_every_source_of_a_mixture_passes_the_gates(
    inputs: Inputs, second: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"

    def said(code: ExitCode, other: Path, *more: str) -> str:
        mixture = mixture_flag((inputs.train, 1), (other, 1))
        return refused(capfd, run_dir, code, *flags(inputs, run_dir), *mixture, *more)

    assert "there is no such folder" in said(ExitCode.DATA, tmp_path / "none")
    assert "is also training shard" in said(ExitCode.DATA, inputs.validation)
    foreign = encoded(tmp_path / "foreign", build_tiny_tokenizer(tmp_path / "tok", vocab_size=300), files=2)
    assert str(foreign) in said(ExitCode.GATE, foreign)
    assert "both name training data" in said(ExitCode.USAGE, second, "--dataset", str(inputs.train))
    beyond = np.full(1000, 10**6, dtype="<u4")
    wild = tmp_path / "wild"
    wild.mkdir()
    beyond.tofile(wild / "shard-00000.bin")
    shard = Shard(
        file="shard-00000.bin",
        tokens=1000,
        bytes=4000,
        xxh3_64=xxhash.xxh3_64_hexdigest(beyond.tobytes()),
        min_id=10**6,
        max_id=10**6,
    )
    Manifest(folder=wild, shards=(shard,), vocab_size=None, tokenizer=None).write()
    assert "1,000,000" in said(ExitCode.GATE, wild)


def test_sources_are_named_by_the_shortest_ends_that_differ() -> None:
    assert tail_names([Path("/d/code/train"), Path("/d/prose/train")]) == ["code/train", "prose/train"]
    assert tail_names([Path("/d/code"), Path("/e/prose")]) == ["code", "prose"]
    assert tail_names([Path("/a/x/train"), Path("/b/x/train"), Path("/c")]) == ["a/x/train", "b/x/train", "c"]


def losses(run_dir: Path) -> list[float]:
    return [line["train_loss"] for line in metrics(run_dir)]


def test_the_way_shards_are_read_changes_no_loss(inputs: Inputs, tmp_path: Path) -> None:
    data = ["--dataset", str(inputs.train)]
    for name, more in {
        "plain": [],
        "pread": ["--loader.access", "pread", "--loader.prefetch-batches", "0"],
        "ahead": ["--loader.prefetch-batches", "3", "--loader.pin-memory", "none"],
    }.items():
        assert run_here(*flags(inputs, tmp_path / name, *data, *more)) == ExitCode.OK
    assert losses(tmp_path / "plain") == losses(tmp_path / "pread") == losses(tmp_path / "ahead")
    assert "access: pread" in (tmp_path / "pread" / "config.yaml").read_text()


def test_pinning_without_a_cuda_device_is_refused(
    inputs: Inputs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = flags(inputs, tmp_path / "run", "--dataset", str(inputs.train), "--loader.pin-memory", "true")
    assert run_here(*given) == ExitCode.USAGE
    assert "there is no CUDA device" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_ignored_targets_count_in_no_loss_and_no_total(inputs: Inputs, tmp_path: Path) -> None:
    """One step over everything, and over everything but the most frequent id: the sums must add up."""
    ids = np.concatenate([np.fromfile(path, "<u4") for path in sorted(inputs.train.glob("*.bin"))])
    common = str(np.bincount(ids).argmax())
    runs = {"all": [], "some": ["--loader.ignored-ids", common]}
    for name, more in runs.items():
        given = flags(inputs, tmp_path / name, "--dataset", str(inputs.train), "--num-steps", "1")
        assert run_here(*given, *more) == ExitCode.OK
    whole, some = (metrics(tmp_path / name)[0] for name in runs)
    assert 0 < some["tokens_seen"] < whole["tokens_seen"] == 4 * 32
    first, left = (metrics(tmp_path / name, "evaluation")[0] for name in runs)
    assert left["tokens"] < first["tokens"]
    assert left["val_loss"] != first["val_loss"]
    facts = verdict(tmp_path / "some")["facts"]
    assert facts["evaluation"].endswith(f"without the targets {common}")
    # The gate that compares training with evaluation on the same sequences covers the masked loss too.
    agrees = [gate for gate in verdict(tmp_path / "some")["gates"] if "agrees with training" in gate["gate"]]
    assert agrees[0]["passed"]


def test_ids_that_cannot_be_ignored_are_refused(
    inputs: Inputs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    given = flags(inputs, run_dir, "--dataset", str(inputs.train))
    assert "10,000,000" in refused(capfd, run_dir, ExitCode.GATE, *given, "--loader.ignored-ids", "10000000")
    assert "ignored_ids" in refused(capfd, run_dir, ExitCode.USAGE, *given, "--loader.ignored-ids", "1,x")
    everything = ",".join(map(str, range(Manifest.load(inputs.train).vocab_size or 0)))
    code = run_here(*given, "--loader.ignored-ids", everything)
    assert code == ExitCode.DATA
