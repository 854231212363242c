"""The configuration as text: what is printed reads back, every problem is named, nothing drifts."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from apr_dist.choices import Mode, StrategyChoice
from apr_dist.cli.config import check, diff, show
from apr_dist.config import TrainConfig, leaves
from apr_dist.config.reading import read_yaml, validate
from apr_dist.config.text import (
    commented_yaml,
    differences,
    json_schema,
    load_config,
    markdown_reference,
    problems,
    type_text,
)
from apr_dist.errors import UsageError
from apr_dist.model.config import PRESETS
from apr_dist.planning.plan import Rate, make_plan

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIGS = sorted((REPOSITORY / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_configuration_is_valid_and_can_be_given_with_its_model(path: Path) -> None:
    assert problems(path) == []
    config = load_config(path)
    assert config.num_steps > config.warmup
    # A model's name beside --init would be a second architecture, which a run refuses.
    assert (config.mode is Mode.FROM_SCRATCH) == ("model" in config.model_fields_set)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_comments_of_a_shipped_configuration_are_generated(path: Path) -> None:
    head, _, body = path.read_text().partition("\n\n")
    assert all(line.startswith("#") for line in head.splitlines())
    assert body == commented_yaml(load_config(path), given_only=True), (
        f"apr-dist config show {path} --given, below the file's own first lines"
    )


@pytest.mark.parametrize(
    "path", [one for one in CONFIGS if "GPU" in one.read_text()], ids=lambda path: path.stem
)
def test_a_shipped_configuration_fits_the_gpus_it_names(path: Path, tmp_path: Path) -> None:
    text = " ".join(line[1:].strip() for line in path.read_text().splitlines() if line.startswith("#"))
    gpus, size, unit = re.search(r"on (\d+) GPUs? of (\d+) (GB|GiB)", text).groups()  # type: ignore[union-attr]
    named = max((name for name in PRESETS if path.stem.startswith(name)), key=len)
    config = load_config(path).model_copy(
        update={"synthetic": True, "model": named, "run_dir": tmp_path / "run"}
    )
    plan = make_plan(config, world_size=int(gpus), rate=Rate())
    chosen = next(iter(plan.memory.values()))
    assert config.parallel.strategy in (StrategyChoice.AUTO, *plan.memory)
    # A tenth of the device is its context's, the collectives' and the allocator's.
    assert chosen.total < 0.9 * int(size) * (10**9 if unit == "GB" else 2**30)
    if int(gpus) > 1:
        assert f"--num_processes {gpus} " in text or "two-nodes" in text


def test_what_a_run_needs_is_shipped_for_every_model_that_is_promised() -> None:
    assert {path.stem for path in CONFIGS} >= {
        "demo",
        "llama-370m",
        "qwen2.5-coder-0.5b-rtx4090",
        "qwen2.5-1.5b-8gpu-fsdp2",
        "qwen2.5-1.5b-8gpu-zero3",
        "qwen2.5-7b-8gpu-fsdp2",
        "qwen2.5-7b-8gpu-zero3",
        "qwen2.5-7b-two-nodes-hsdp",
    }


def test_the_commented_yaml_reads_back_to_the_same_configuration(tmp_path: Path) -> None:
    config = validate(
        {"lr": 3e-6, "init": "a b.apr", "optimizer": {"beta2": 0.95}, "mode": "from-scratch"}, where="here"
    )
    path = tmp_path / "c.yaml"
    path.write_text(commented_yaml(config))
    assert validate(read_yaml(path), where=path) == config


def test_every_key_has_a_comment_with_its_type_and_its_default() -> None:
    lines = commented_yaml().splitlines()
    for key, field in leaves(TrainConfig):
        name = key.rpartition(".")[2]
        assert field.description, f"{key} does not say why it exists"
        assert any(line.strip().startswith(f"{name}:") for line in lines), key
    text = " ".join(line.strip().removeprefix("#").strip() for line in lines)
    assert "tokens per sequence (integer above 0; default 1024)" in text
    assert "(number at least 0 and below 1; default 0.9)" in text


def test_a_type_says_its_choices_and_whether_null_is_allowed() -> None:
    fields = dict(leaves(TrainConfig))
    assert type_text(fields["parallel.precision"]).startswith("one of f32, bf16")
    assert type_text(fields["lr"]) == "number above 0, or null"
    assert type_text(fields["synthetic"]) == "true or false"


def test_every_problem_of_a_file_is_listed_with_the_nearest_key(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("num_stepz: 3\nweight_decay: 0.1\nlr: -1\noptimizer:\n  beta1: 2\n")
    found = {one.key: one.text for one in problems(path)}
    assert set(found) == {"num_stepz", "weight_decay", "lr", "optimizer.beta1"}
    assert found["num_stepz"] == "unknown key; use num_steps"
    assert found["weight_decay"] == "unknown key; use optimizer.weight_decay"
    assert found["lr"] == "-1 is not greater than 0"


def test_check_prints_every_problem_and_exits_as_a_usage_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text("lr: 1.0e-4\n")
    bad.write_text("seed: yes please\nmode: finetuned\n")
    assert check((good,)) == 0
    assert check((good, bad)) == 2
    out = capsys.readouterr().out
    assert "good.yaml: valid" in out
    assert "bad.yaml: 2 problem(s)" in out
    assert "'finetune' or 'from-scratch'" in out


def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "list.yaml"
    path.write_text("- 1\n")
    with pytest.raises(UsageError, match="mapping of keys"):
        problems(path)


def test_differences_are_of_resolved_values_and_read_run_folders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    left, right = TrainConfig(mode=Mode.FINETUNE), TrainConfig(mode=Mode.FROM_SCRATCH, lr=5e-5)
    assert {one.key for one in differences(left, right)} == {"mode", "warmup_steps", "target_val_loss"}
    for name, config in (("a", left), ("b", right)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(config.to_yaml())
    diff(tmp_path / "a", tmp_path / "b")
    assert "warmup_steps     100 -> 1000" in capsys.readouterr().out
    diff(tmp_path / "a", tmp_path / "a")
    assert capsys.readouterr().out == "no difference\n"


def test_show_prints_a_files_values_and_fills_in_the_mode_when_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("mode: from-scratch\nseed: 7\n")
    show(path, resolved=True)
    values = yaml.safe_load(capsys.readouterr().out)
    assert (values["seed"], values["lr"]) == (7, 3e-4)
    show(path, given=True)
    assert yaml.safe_load(capsys.readouterr().out) == {"mode": "from-scratch", "seed": 7}
    with pytest.raises(UsageError, match="one of them"):
        show(schema=True, markdown=True)


def test_the_schema_forbids_unknown_keys_and_describes_the_known() -> None:
    schema = json.loads(json_schema())
    assert schema["additionalProperties"] is False
    assert set(schema["properties"]) == set(TrainConfig.model_fields)
    assert schema["properties"]["seq_length"]["description"] == "tokens per sequence"


@pytest.mark.parametrize(
    ("path", "generate", "flag"),
    [
        ("configs/schema.json", json_schema, "schema"),
        ("docs/configuration.md", markdown_reference, "markdown"),
    ],
)
def test_the_stored_reference_is_what_the_code_prints(path: str, generate: object, flag: str) -> None:
    assert callable(generate)
    stored = (REPOSITORY / path).read_text()
    assert stored == generate(), f"apr-dist config show --{flag} > {path}"
