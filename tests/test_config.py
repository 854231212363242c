"""The configuration: one tree, from YAML and flags, refused with the nearest match when wrong."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser

from apr_dist.choices import Mode, Offload
from apr_dist.config import TrainConfig, flag_of, leaves
from apr_dist.config.advice import _ABSENT, _MEANT
from apr_dist.config.reading import parse_command_line, read_yaml, validate
from apr_dist.config.sections import MODE_DEFAULTS
from apr_dist.config.text import load_config, problems
from apr_dist.errors import ExitCode, UsageError
from apr_dist.parsing import parse_yaml


def parse(*arguments: str) -> TrainConfig:
    return parse_command_line(arguments).config


@pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-INIT-001")
def test_init_parses_to_the_path_and_absent_means_none() -> None:
    assert parse("--init", "model.apr").init == Path("model.apr")
    assert parse().init is None


def test_none_is_null_only_for_a_key_that_may_be_null() -> None:
    assert parse("--parallel.offload", "none").parallel.offload is Offload.NONE
    assert parse("--init", "none").init is None
    with pytest.raises(UsageError, match=r"adapter\.kind is 'none'"):
        parse("--adapter.kind", "none")


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
    assert "use optimizer.weight_decay." in str(refused.value)


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


@pytest.mark.parametrize(
    ("flag", "remedy"),
    [
        ("--learning-rate", "use --lr."),
        ("--learning_rate=1e-4", "use --lr."),
        ("--save-steps", "use --save-every."),
        ("--bf16", "use --parallel.precision bf16."),
        ("--lora", "use --adapter.kind lora"),
        ("--lora_alpha", "use --adapter.alpha"),
        ("--report-to", "use --track."),
        ("--gpus", "accelerate launch --num_processes N"),
        ("--num-train-epochs", "counted in steps, num_steps"),
        ("--weight-decay", "use --optimizer.weight-decay."),
        ("--per-device-train-batch-size", "use --micro-batch-size."),
        ("--confg", "use --config."),
        ("--lerning-rate", "use --lr."),
        ("--qqq", "see --help"),
    ],
)
def test_a_flag_of_another_trainer_is_answered_with_ours_or_with_what_there_is(
    flag: str, remedy: str
) -> None:
    with pytest.raises(UsageError) as refused:
        parse(flag, "1")
    assert remedy in str(refused.value)


@pytest.mark.parametrize("word", ["overwrit", "over-write", "overwrite_output_dir", "overwrite-run", "force"])
def test_a_flag_that_destroys_a_run_is_never_proposed(word: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse(f"--{word}")
    assert "use --overwrite" not in str(refused.value)


def test_every_answer_names_a_key_that_there_is_and_no_flag_of_ours_is_taken_for_another_s() -> None:
    keys = {key for key, _ in leaves(TrainConfig)}
    assert {target.split()[0] for target in _MEANT} <= keys
    for target in _MEANT:
        key, _, value = target.partition(" ")
        if value:
            assert parse(flag_of(key), value)
    ours = {key.rpartition(".")[2] for key in keys} - {"max_epochs"}
    assert not ours & {name for names in (*_MEANT.values(), *_ABSENT.values()) for name in names.split()}


@pytest.mark.parametrize(
    ("old", "new"),
    [("steps_per_epoch", "eval_every"), ("early_stop.min_epochs", "early_stop.min_evaluations")],
)
def test_an_old_key_is_refused_with_its_new_name_in_a_file_and_as_a_flag(
    old: str, new: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=f"it is now called {flag_of(new)}"):
        parse(flag_of(old), "3")
    with pytest.raises(UsageError, match=f"nearest is {new}"):
        parse("--resume-allow", old)
    path = tmp_path / "run.yaml"
    group, _, last = old.rpartition(".")
    path.write_text(f"{group}:\n  {last}: 3\n" if group else f"{last}: 3\n")
    with pytest.raises(UsageError, match=f"it is now called {new}"):
        read_yaml(path)
    assert [one.text for one in problems(path)] == [f"unknown key; it is now called {new}"]


def test_what_an_earlier_version_saved_is_read_under_the_new_names(tmp_path: Path) -> None:
    saved = "steps_per_epoch: 7\nearly_stop:\n  min_epochs: 2\nresume_allow: num_steps,steps_per_epoch\n"
    (tmp_path / "config.yaml").write_text(saved)
    config = load_config(tmp_path)
    assert (config.eval_every, config.early_stop.min_evaluations) == (7, 2)
    assert config.resume_allow == "num_steps,eval_every"


@pytest.mark.parametrize("value", ["inf", "-inf", "nan", "1e400"])
def test_every_number_of_a_configuration_is_finite(value: str, tmp_path: Path) -> None:
    def refuses(key: str, given: str) -> None:
        with pytest.raises(UsageError, match="Expected a finite number"):
            parse(f"{flag_of(key)}={given}")

    numbers = [key for key, field in leaves(TrainConfig) if "float" in str(field.annotation)]
    assert {"lr", "optimizer.eps", "parallel.timeout_s", "guards.spike_factor"} <= set(numbers)
    for key in numbers:
        refuses(key, f"a={value}" if key == "loader.mixture" else value)
    for text in (f"lr: .{value}\n", f"optimizer:\n  eps: .{value}\n") if "e" not in value else ():
        path = tmp_path / "run.yaml"
        path.write_text(text.replace(".-", "-."))
        with pytest.raises(UsageError, match="Expected a finite number"):
            parse("--config", str(path))


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("lr: 1.0e-4\nseed: 1\nlr: 2.0e-4\n", "lr"),
        ("optimizer:\n  eps: 1.0e-8\noptimizer:\n  beta1: 0.8\n", "optimizer"),
        ("optimizer: {eps: 1.0e-8, eps: 1.0e-6}\n", "eps"),
        ("seed: 1\n'seed': 2\n", "seed"),
    ],
)
def test_a_key_that_a_file_gives_twice_is_refused(text: str, key: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=f"the key {key} is given twice"):
        parse("--config", str(path))


def test_a_value_that_is_merged_in_may_be_overridden(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("optimizer: &usual {beta1: 0.8}\nguards: {}\n")
    assert parse("--config", str(path)).optimizer.beta1 == 0.8
    assert parse_yaml("a: &a {x: 1, y: 2}\nb:\n  <<: *a\n  x: 3\n")["b"] == {"x": 3, "y": 2}
