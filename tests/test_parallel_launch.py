"""The recipes in launch/: each parses, and says nothing the trainer does not understand."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import _filter_args, prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from builders.faults import free_port
from builders.runs import TRAIN, run_here
from torch.distributed.run import config_from_args, get_args_parser

from apr_dist.choices import Offload, Strategy, StrategyChoice
from apr_dist.config import TrainConfig
from apr_dist.config.reading import parse_command_line
from apr_dist.errors import DistributedError, ExitCode, UsageError
from apr_dist.parallel.strategy import choose, group_size, refuse_offload

if TYPE_CHECKING:
    from builders.runs import Inputs

LAUNCH = Path(__file__).resolve().parents[1] / "launch"
RECIPES = sorted(path for path in LAUNCH.iterdir() if path.is_file())
SCRIPTS = [path for path in RECIPES if path.suffix in {".sh", ".sbatch"}]
KUBERNETES = [LAUNCH / "kubernetes.yaml", LAUNCH / "jobset.yaml"]
ACCELERATE = [path for path in RECIPES if path.suffix == ".yaml" and path not in KUBERNETES]


DEFAULT_STRATEGY = {"zero3-offload-8gpu.sh": "zero3"}
"""Of the scripts that do not start with hsdp."""


def trainer_flags(text: str) -> list[str]:
    """The words after ``apr_dist/train.py`` of the first command line that has it."""
    joined = re.sub(r"\\\n#?", " ", text)
    (line,) = [line for line in joined.splitlines() if "apr_dist/train.py" in line]
    words = shlex.split(line.split("apr_dist/train.py", 1)[1])
    return [word for word in words if word not in {"$@", "", "&"}]


def flags_of(recipe: Path) -> list[str]:
    if recipe not in KUBERNETES:
        return trainer_flags(recipe.read_text())
    command = container(recipe)["command"]
    return [str(word) for word in command[command.index("apr_dist/train.py") + 1 :]]


def job_of(recipe: Path) -> dict[str, Any]:
    """The specification of the Job in a recipe for Kubernetes, which a JobSet has inside."""
    *_, found = yaml.safe_load_all(recipe.read_text())
    if found["kind"] == "JobSet":
        (found,) = [replicated["template"] for replicated in found["spec"]["replicatedJobs"]]
    return found["spec"]  # type: ignore[no-any-return]


def container(recipe: Path) -> dict[str, Any]:
    (found,) = job_of(recipe)["template"]["spec"]["containers"]
    return found  # type: ignore[no-any-return]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_the_trainer_takes_every_flag_of_a_recipe(recipe: Path) -> None:
    default = DEFAULT_STRATEGY.get(recipe.name, "hsdp")
    flags = [word.replace("$STRATEGY", default) for word in flags_of(recipe)]
    config = parse_command_line(flags).config
    assert isinstance(config, TrainConfig)
    assert config.init is not None
    assert config.dataset is not None


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_valid_bash_and_its_default_strategy_exists(script: Path) -> None:
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (default,) = re.findall(r'^STRATEGY="\$\{STRATEGY:-([\w-]+)\}"$', script.read_text(), re.MULTILINE)
    assert StrategyChoice(default).value == DEFAULT_STRATEGY.get(script.name, "hsdp")


def after(recipe: Path, flag: str) -> str:
    command = container(recipe)["command"]
    return str(command[command.index(flag) + 1])


@pytest.mark.parametrize("recipe", KUBERNETES, ids=lambda path: path.name)
def test_a_kubernetes_job_starts_one_process_per_gpu_on_every_machine(recipe: Path) -> None:
    job, found = job_of(recipe), container(recipe)
    pod = job["template"]["spec"]
    assert job["completionMode"] == "Indexed"
    assert int(after(recipe, "--nnodes")) == job["completions"] == job["parallelism"]
    assert int(after(recipe, "--nproc_per_node")) == found["resources"]["limits"]["nvidia.com/gpu"]
    assert {mount["name"] for mount in found["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    run_dir = after(recipe, "--run-dir")
    (mounted,) = [one for one in found["volumeMounts"] if run_dir.startswith(one["mountPath"] + "/")]
    assert not mounted.get("readOnly"), "every pod writes its part of a save there"
    assert after(recipe, "--resume") == "auto"


def test_the_pods_of_the_indexed_job_meet_at_the_first_of_them() -> None:
    recipe = LAUNCH / "kubernetes.yaml"
    service, job = yaml.safe_load_all(recipe.read_text())
    name, subdomain = job["metadata"]["name"], service["metadata"]["name"]
    assert job["spec"]["template"]["spec"]["subdomain"] == subdomain
    assert service["spec"]["selector"] == {"job-name": name}
    assert after(recipe, "--rdzv_endpoint").split(":")[0] == f"{name}-0.{subdomain}"


def test_the_pods_of_the_jobset_meet_at_the_first_of_them_and_restart_together() -> None:
    """Names of pods are NAME-JOB-0-POD.SUBDOMAIN; a Job that may not retry hands its failure to the set."""
    recipe = LAUNCH / "jobset.yaml"
    (found,) = yaml.safe_load_all(recipe.read_text())
    assert (found["apiVersion"], found["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert set(found["spec"]) == {"network", "failurePolicy", "replicatedJobs"}
    network = found["spec"]["network"]
    assert network["enableDNSHostnames"] is network["publishNotReadyAddresses"] is True
    (replicated,) = found["spec"]["replicatedJobs"]
    assert set(replicated) == {"name", "replicas", "template"}
    assert replicated["replicas"] == 1
    first = f"{found['metadata']['name']}-{replicated['name']}-0-0.{network['subdomain']}"
    assert after(recipe, "--rdzv_endpoint").split(":")[0] == first
    job = job_of(recipe)
    assert job["backoffLimit"] == 0
    assert job["template"]["spec"]["restartPolicy"] == "Never"
    assert found["spec"]["failurePolicy"]["maxRestarts"] > 0


def test_both_kubernetes_recipes_start_the_same_container() -> None:
    first, second = (container(recipe) for recipe in KUBERNETES)
    own = {"--rdzv_endpoint", "--run-dir"}

    def words(found: dict[str, Any]) -> list[str]:
        command = found.pop("command")
        return [word for before, word in zip(["", *command], command, strict=False) if before not in own]

    assert words(first) == words(second)
    assert first == second


@pytest.mark.parametrize(
    ("name", "processes", "strategy"),
    [
        ("single-rtx4090", 1, Strategy.SINGLE),
        ("fsdp2-8gpu", 8, Strategy.FSDP2),
        ("zero3-8gpu", 8, Strategy.ZERO3),
        ("ddp-multinode", 16, Strategy.DDP),
        ("fsdp2-multinode", 16, Strategy.FSDP2),
        ("zero3-multinode", 16, Strategy.ZERO3),
    ],
)
def test_accelerate_hands_the_strategy_of_a_recipe_to_the_trainer(
    name: str, processes: int, strategy: Strategy, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--config_file", str(LAUNCH / f"{name}.yaml"), "apr_dist/train.py"]
    options, _, _ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    assert options.num_processes == processes
    options.deepspeed_fields_from_accelerate_config = ""  # which the launcher itself sets a step later
    before = dict(os.environ)
    if processes == 1:
        environment: dict[str, str] = {}
    elif options.use_deepspeed:
        _, environment = prepare_deepspeed_cmd_env(options)
    else:
        environment = prepare_multi_gpu_env(options)
    for key, said in environment.items():
        if before.get(key) != said:
            monkeypatch.setenv(key, said)
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    assert choose("auto", processes) is strategy


def torchrun_options(recipe: Path) -> Namespace:
    """What torchrun's own parser takes from a recipe."""
    if recipe in KUBERNETES:
        words = [str(word) for word in container(recipe)["command"]]
    else:
        joined = re.sub(r"\\\n", " ", recipe.read_text())
        (line,) = [line for line in joined.splitlines() if "apr_dist/train.py" in line]
        own = line[line.index("torchrun") :].split("--rdzv")[0].split("${LOCAL")[0]
        words = [*shlex.split(re.sub(r'"\$\w+"', "1", own)), "apr_dist/train.py"]
    return get_args_parser().parse_args(words[1:])


TORCHRUN = [*[script for script in SCRIPTS if "torchrun" in script.read_text()], *KUBERNETES]


@pytest.mark.parametrize("recipe", TORCHRUN, ids=lambda path: path.name)
def test_torchrun_waits_for_a_step_as_long_as_whoever_stops_it(recipe: Path) -> None:
    """Its default of 30 s would kill a step that the scheduler still allows."""
    limit = torchrun_options(recipe).shutdown_timeout
    allowed = 600
    if recipe in KUBERNETES:
        allowed = job_of(recipe)["template"]["spec"]["terminationGracePeriodSeconds"]
    elif recipe.suffix == ".sbatch":
        (seconds,) = re.findall(r"^#SBATCH --signal=B:TERM@(\d+)$", recipe.read_text(), re.MULTILINE)
        allowed = int(seconds)
    assert allowed - 60 <= limit <= allowed - 30


def test_accelerate_hands_the_limit_of_the_environment_to_torchs_launcher(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (name, seconds) = ("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "570")
    for recipe in ACCELERATE:
        several = "num_processes: 1\n" not in recipe.read_text()
        assert (f"export {name}={seconds}" in recipe.read_text()) is several, recipe
    monkeypatch.setenv(name, seconds)
    launched = launch_command_parser().parse_args(["--multi_gpu", "apr_dist/train.py"])
    options = _filter_args(launched, get_args_parser(), ["--module", "x"])
    config, _, _ = config_from_args(options)
    assert config.shutdown_timeout == int(seconds)


def test_an_offload_the_strategy_cannot_do_is_refused_with_what_it_can() -> None:
    for strategy, offload in (
        (Strategy.SINGLE, Offload.OPTIMIZER_AND_PARAMETERS),
        (Strategy.DDP, Offload.OPTIMIZER_AND_PARAMETERS),
        (Strategy.ZERO2, Offload.OPTIMIZER_AND_PARAMETERS),
        (Strategy.FSDP2, Offload.OPTIMIZER),
    ):
        with pytest.raises(UsageError, match=rf"offload is {re.escape(offload)} under strategy {strategy}"):
            refuse_offload(strategy, offload)
    for strategy in Strategy:
        refuse_offload(strategy, Offload.NONE)
    for strategy in (Strategy.SINGLE, Strategy.DDP, Strategy.ZERO1):
        refuse_offload(strategy, Offload.OPTIMIZER)
    refuse_offload(Strategy.HSDP, Offload.OPTIMIZER_AND_PARAMETERS)


def test_a_run_whose_offload_cannot_be_done_ends_with_the_usage_code(
    inputs: Inputs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = [*inputs.data_flags(), "--init", str(inputs.pretrained), "--run-dir", str(tmp_path / "run")]
    assert run_here(*flags, "--parallel.offload", "optimizer+parameters") == ExitCode.USAGE
    assert "parallel.offload is optimizer+parameters under strategy single" in capfd.readouterr().err


def test_a_launcher_and_a_configuration_that_disagree_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(DistributedError, match=r"DISTRIBUTED-001.*says zero2.*says fsdp2"):
        choose("fsdp2", 8)


@pytest.mark.parametrize(
    ("asked", "launched", "world", "expected"),
    [
        ("auto", {}, 1, Strategy.SINGLE),
        ("auto", {}, 4, Strategy.DDP),
        ("auto", {"ACCELERATE_USE_FSDP": "true"}, 4, Strategy.FSDP2),
        (
            "auto",
            {"ACCELERATE_USE_FSDP": "true", "FSDP_RESHARD_AFTER_FORWARD": "false"},
            4,
            Strategy.SHARD_GRAD_OP,
        ),
        ("auto", {"ACCELERATE_USE_FSDP": "true"}, 1, Strategy.SINGLE),
        ("auto", {"ACCELERATE_USE_DEEPSPEED": "true"}, 1, Strategy.SINGLE),
        ("hsdp", {"ACCELERATE_USE_FSDP": "true"}, 4, Strategy.HSDP),
        ("zero1", {}, 4, Strategy.ZERO1),
    ],
)
def test_the_configuration_decides_and_auto_asks_the_launcher(
    asked: str, launched: dict[str, str], world: int, expected: Strategy, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "FSDP_RESHARD_AFTER_FORWARD"):
        monkeypatch.delenv(key, raising=False)
    for key, said in launched.items():
        monkeypatch.setenv(key, said)
    assert choose(asked, world) is expected


def test_every_strategy_that_can_be_configured_exists() -> None:
    assert {choice.value for choice in StrategyChoice} == {"auto", *(strategy.value for strategy in Strategy)}


def test_a_shard_size_must_divide_the_processes_and_belongs_to_hsdp() -> None:
    assert group_size(Strategy.HSDP, 16, None, 4) == 4
    assert group_size(Strategy.HSDP, 16, None) == 8
    assert group_size(Strategy.HSDP, 16, 8) == 8
    assert group_size(Strategy.FSDP2, 16, None) == 16
    assert group_size(Strategy.ZERO2, 16, None) == 1
    with pytest.raises(UsageError, match="16 processes do not divide into groups of 3"):
        group_size(Strategy.HSDP, 16, 3)
    with pytest.raises(UsageError, match="only hsdp"):
        group_size(Strategy.ZERO3, 16, 4)


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE is 'abc'. Expected an integer of at least 1"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        ({"RANK": "-1"}, "RANK is '-1'"),
        ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE is '999"),
        ({"RANK": "1"}, "RANK is 1 and WORLD_SIZE is 1"),
        ({"LOCAL_WORLD_SIZE": "4"}, "LOCAL_WORLD_SIZE is 4 and WORLD_SIZE is 1"),
        ({"WORLD_SIZE": "2", "RANK": "5"}, "RANK is 5 and WORLD_SIZE is 2"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR and MASTER_PORT not set"),
        ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "localhost"}, "and MASTER_PORT not set"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_launch_that_makes_no_sense_is_refused_at_once(
    variables: dict[str, str],
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert run_here("--run-dir", str(tmp_path / "run")) == ExitCode.USAGE
    said = capsys.readouterr().err
    assert said.startswith("error: the launcher's environment: ")
    assert words in said
    assert not (tmp_path / "run").exists()


def _alone(inputs: Inputs, run: Path, port: int, **environment: str) -> subprocess.CompletedProcess[str]:
    """One process of two, whose partner never starts."""
    launched = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    given = [*inputs.data_flags(), "--init", str(inputs.pretrained), "--run-dir", str(run)]
    return subprocess.run(
        [sys.executable, str(TRAIN), *given, "--num-steps", "1", "--parallel.timeout-s", "3"],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", **launched, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"RANK": "0"}, "1 of 2 processes came to localhost:"),
        ({"RANK": "0", "TORCHELASTIC_RESTART_COUNT": "1"}, "1 of 2 processes came to localhost:"),
        ({"RANK": "1"}, "rank 1 of 2 did not reach the others at localhost:"),
    ],
    ids=["rank 0", "rank 0 after a restart", "rank 1"],
)
def test_a_process_whose_partner_does_not_come_says_how_many_came_and_what_to_check(
    environment: dict[str, str], words: str, inputs: Inputs, tmp_path: Path
) -> None:
    done = _alone(inputs, tmp_path / "run", free_port(), **environment)
    assert done.returncode == ExitCode.DISTRIBUTED, done.stderr
    assert words in done.stderr
    assert "the same MASTER_ADDR, MASTER_PORT and WORLD_SIZE" in done.stderr
    assert "internal error" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_port_that_is_in_use_is_named(inputs: Inputs, tmp_path: Path) -> None:
    with socket.create_server(("localhost", 0)) as taken:
        port = taken.getsockname()[1]
        done = _alone(inputs, tmp_path / "run", port, RANK="0")
    assert done.returncode == ExitCode.DISTRIBUTED, done.stderr
    assert f"the port of localhost:{port} is in use" in done.stderr
