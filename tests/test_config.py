"""The configuration: one tree, from YAML and flags, refused with the nearest match when wrong."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser

from apr_dist.choices import Mode
from apr_dist.config import TrainConfig, flag_of, leaves
from apr_dist.config.reading import parse_command_line, read_yaml, validate
from apr_dist.config.sections import MODE_DEFAULTS
from apr_dist.errors import ExitCode, UsageError


def parse(*arguments: str) -> TrainConfig:
    return parse_command_line(arguments).config


@pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-INIT-001")
def test_init_parses_to_the_path_and_absent_means_none() -> None:
    assert parse("--init", "model.apr").init == Path("model.apr")
    assert parse().init is None


@pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-INIT-007")
def test_init_is_a_flag_of_the_parser_with_a_help_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse_command_line(["--help"])
    assert stopped.value.code == 0
    assert "--init PATH" in capsys.readouterr().out


@pytest.mark.falsifies("INV-TRAIN-009")
@pytest.mark.parametrize(
    ("mode", "lr", "warmup", "target"),
    [("finetune", 5e-5, 100, 2.2), ("from-scratch", 3e-4, 1000, 3.0)],
)
def test_a_mode_sets_its_three_defaults_together(mode: str, lr: float, warmup: int, target: float) -> None:
    config = parse("--mode", mode).resolved()
    assert (config.lr, config.warmup_steps, config.target_val_loss) == (lr, warmup, target)


@pytest.mark.falsifies("INV-TRAIN-009")
def test_an_explicit_flag_wins_alone() -> None:
    config = parse("--mode", "from-scratch", "--lr", "1e-4").resolved()
    rest = MODE_DEFAULTS[Mode.FROM_SCRATCH]
    assert config.lr == 1e-4
    assert (config.warmup_steps, config.target_val_loss) == (rest.warmup_steps, rest.target_val_loss)


@pytest.mark.parametrize(
    ("arguments", "found", "near"),
    [
        (["--num-stepz", "3"], "--num-stepz", "--num-steps"),
        (["--optimizer.weight_decoy", "1"], "--optimizer.weight_decoy", "--optimizer.weight-decay"),
        (["--lr=1", "--inot", "x"], "--inot", "--init"),
    ],
)
def test_an_unknown_flag_is_refused_with_the_nearest_one(arguments: list[str], found: str, near: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse_command_line(arguments)
    assert f"unknown flag {found}" in str(refused.value)
    assert f"use {near}." in str(refused.value)
    assert refused.value.exit_code is ExitCode.USAGE


def test_an_unknown_key_is_refused_with_its_file_and_the_nearest_one(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("optimizer:\n  weight_decya: 0.1\n")
    with pytest.raises(UsageError) as refused:
        read_yaml(path)
    assert str(path) in str(refused.value)
    assert "optimizer.weight_decya" in str(refused.value)
    assert "did you mean optimizer.weight_decay" in str(refused.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_steps", "-1"),
        ("mode", "tune"),
        ("lr", "0"),
        ("device", "tpu"),
        ("seed", "x"),
        ("batch_size", "0"),
    ],
)
def test_a_bad_value_names_the_key_the_value_and_what_it_may_be(key: str, value: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse(flag_of(key), value)
    text = str(refused.value)
    assert f"{key} is {value!r}" in text
    assert "Expected" in text


@pytest.mark.parametrize("content", ["- a\n- b\n", "a: [", "\x00\x01"])
def test_a_file_that_is_not_a_mapping_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(content)
    with pytest.raises(UsageError, match=r"is not YAML|is a list"):
        read_yaml(path)


def test_a_missing_configuration_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        parse("--config", str(tmp_path / "none.yaml"))


def test_a_flag_wins_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("num_steps: 7\nseed: 3\noptimizer: {beta2: 0.95}\n")
    config = parse("--config", str(path), "--num-steps", "9")
    assert (config.num_steps, config.seed, config.optimizer.beta2) == (9, 3, 0.95)


def test_the_resolved_configuration_reads_back_equal(tmp_path: Path) -> None:
    config = parse("--init", "m.apr", "--lr", "1e-5", "--loader.shuffle", "block").resolved()
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    assert validate(read_yaml(path), where=path) == config


def test_every_key_has_a_description_and_a_flag_that_sets_it() -> None:
    for key, field in leaves(TrainConfig):
        assert field.description, key
        assert flag_of(key).startswith("--")


def test_where_a_run_is_written_does_not_change_its_digest_and_what_is_trained_does() -> None:
    base = parse("--seed", "1")
    assert base.digest() == parse("--seed", "1", "--run-dir", "elsewhere").digest()
    assert base.digest() != parse("--seed", "2").digest()
    assert base.digest() == base.resolved().digest()


def test_every_flag_reaches_the_script_through_either_launcher() -> None:
    """Launchers accept any unambiguous prefix of their own options and refuse ambiguous ones."""
    for launcher in (launch_command_parser(), get_args_parser()):
        assert isinstance(launcher, argparse.ArgumentParser)
        for key, _ in [*leaves(TrainConfig), ("config", None), ("debug", None)]:
            given = launcher.parse_args(["train.py", flag_of(key), "value"])
            assert given.training_script_args == [flag_of(key), "value"]
