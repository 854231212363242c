"""The verbs of ``apr-dist`` through their entry point."""

from __future__ import annotations

import importlib
import json
import os
import pty
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from apr_dist.apr.layout import Flag
from apr_dist.apr.reader import AprReader
from apr_dist.cli import VERBS, main
from apr_dist.cli.completion import flags_of
from apr_dist.errors import ExitCode
from apr_dist.version import __version__

if TYPE_CHECKING:
    from builders.runs import Inputs


@pytest.fixture
def stamped(inputs: Inputs, tmp_path: Path) -> Path:
    """The shared pretrained model with its tokenizer inside."""
    target = tmp_path / "stamped.apr"
    flags = ["--license", "MIT", "--tokenizer", str(inputs.tokenizer), "-o", str(target)]
    assert main(["stamp", str(inputs.pretrained), *flags]) == 0
    return target


@pytest.mark.falsifies("FALSIFY-TOK-IMPORT-HF-001")
@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(verb: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*verb.split(), "--help"])
    assert stopped.value.code == 0
    assert f"apr-dist {verb}" in " ".join(capfd.readouterr().out.split())


def test_the_list_of_verbs_is_printed_and_an_unknown_one_refused_with_the_nearest(
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert main(["--help"]) == 0
    listed = capfd.readouterr().out
    assert all(verb in listed for verb in VERBS)
    assert main(["inspcet", "x.apr"]) == ExitCode.USAGE
    assert "did you mean 'apr-dist inspect'" in capfd.readouterr().err
    assert main(["tokenize"]) == ExitCode.USAGE


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        ("trian --init x", "train"),
        ("Train", "train"),
        ("finetune", "train"),
        ("--init x.apr", "train"),
        ("inspcet x.apr", "inspect"),
        ("quantize x.apr", "export"),
        ("tokenise encode-corpus", "tokenize encode-corpus"),
        ("encode-corpus", "tokenize encode-corpus"),
        ("tokenize encode", "tokenize encode-corpus"),
        ("config chek", "config check"),
        ("contract lint", "contracts lint"),
        ("explian X", "explain"),
        ("--versoin", "--version"),
        ("xyzzy", None),
    ],
)
def test_a_verb_that_does_not_exist_gets_the_right_word(
    words: str, meant: str | None, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(words.split()) == ExitCode.USAGE
    error = capfd.readouterr().err.splitlines()[0]
    assert error.startswith("error: there is no verb")
    assert error.endswith(f"did you mean 'apr-dist {meant}'?") if meant else "did you mean" not in error
    if meant in VERBS:
        with pytest.raises(SystemExit) as stopped:  # the word that is proposed works
            main([*meant.split(), "--help"])
        assert stopped.value.code == 0


def test_help_and_version_go_by_their_usual_names(capfd: pytest.CaptureFixture[str]) -> None:
    for asked in ("help", "-h", "--help"):
        assert main([asked]) == 0
        assert "usage: apr-dist VERB" in capfd.readouterr().out
    for asked in ("-v", "-V", "--version", "version"):
        assert main([asked]) == 0
        assert capfd.readouterr().out == f"apr-dist {__version__}\n"
    for verb in ("plan", "train", "export", "tokenize encode-corpus"):
        with pytest.raises(SystemExit) as stopped:
            main(["help", *verb.split()])
        assert stopped.value.code == 0
        assert f"usage: apr-dist {verb}" in capfd.readouterr().out
    assert main(["help", "tokenize"]) == 0
    assert "tokenize decode" in capfd.readouterr().out
    assert main(["help", "trian"]) == ExitCode.USAGE
    assert "did you mean 'apr-dist train'?" in capfd.readouterr().err


def train_here(*flags: str) -> subprocess.CompletedProcess[str]:
    """``apr-dist train`` in a process of its own."""
    command = [sys.executable, "-m", "apr_dist", "train", *flags]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)


def test_train_is_a_verb_with_the_trainers_flags_and_exit_codes(inputs: Inputs, tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = [*inputs.data_flags(), "--init", str(inputs.pretrained), "--num-steps", "2", "--device", "cpu"]
    done = train_here(*flags, "--run-dir", str(run))
    assert done.returncode == 0, done.stderr
    assert json.loads((run / "verdict.json").read_text())["status"] == "COMPLETED"
    assert (run / "checkpoint.apr").is_file()
    refused = train_here("--init", str(tmp_path / "none.apr"), "--run-dir", str(tmp_path / "other"))
    assert refused.returncode == ExitCode.MODEL_FILE
    assert refused.stderr.startswith("error: [FALSIFY-APR-PRETRAIN-INIT-003]")
    wrong = train_here("--learning-rate", "1e-4", "--debug")
    assert wrong.returncode == ExitCode.USAGE
    assert "use --lr" in wrong.stderr
    assert "Traceback" in wrong.stderr


def completion_script(shell: str, capfd: pytest.CaptureFixture[str]) -> str:
    assert main(["--print-completion", shell]) == 0
    return capfd.readouterr().out


@pytest.mark.parametrize("verb", VERBS)
def test_completion_knows_exactly_the_flags_that_help_lists(
    verb: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    helps = [verb] if verb not in ("plan", "profile") else [verb, "train"]
    listed: set[str] = set()
    for one in helps:
        with pytest.raises(SystemExit):
            main([*one.split(), "--help"])
        for line in re.sub(r"\x1b\[[0-9;]*m", "", capfd.readouterr().out).splitlines():
            spelled = re.match(r"[ │]*(-[^ ,]+(?: [^ ,]+)?(?:, -[^ ,]+(?: [^ ,]+)?)*)(?:  | *$|[ │])", line)
            listed |= set(re.findall(r"(?<![\w-])--?[a-z][\w.-]*", spelled.group(1))) if spelled else set()
    module = importlib.import_module(f"apr_dist.cli.{VERBS[verb].split(':')[0]}")
    known = flags_of(verb, getattr(module, VERBS[verb].split(":")[1]))
    assert {name for flag in known for name in flag.names} == listed


def completed_by_bash(script: Path, words: Sequence[str]) -> set[str]:
    """What bash's own completion function offers for the last of ``words``."""
    line = " ".join(f"'{word}'" for word in words)
    program = (
        f"source {script}; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1};"
        " $(complete -p apr-dist | sed 's/.*-F \\([^ ]*\\).*/\\1/'); printf '%s\\n' \"${COMPREPLY[@]}\""
    )
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_bash_completes_verbs_and_their_flags(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "apr-dist.bash"
    script.write_text(completion_script("bash", capfd))
    asked = {
        ("apr-dist", "va"): {"validate"},
        ("apr-dist", "trai"): {"train"},
        ("apr-dist", "tokenize", "enc"): {"encode-corpus", "encode-chat"},
        ("apr-dist", "tokenize", "encode-corpus", "--par"): {"--parse-special"},
        ("apr-dist", "export", "--to", "hugg"): {"huggingface"},
        ("apr-dist", "export", "--to", "=", "hugg"): {"huggingface"},
        ("apr-dist", "stamp", "--data-l"): {"--data-license"},
        ("apr-dist", "plan", "--simu"): {"--simulate"},
        ("apr-dist", "profile", "--steps"): {"--steps"},
        ("apr-dist", "help", "doc"): {"doctor"},
        ("apr-dist", "--print-completion", "z"): {"zsh"},
        ("apr-dist", "import", "model"): set(),  # files: readline completes them
        ("apr-dist", "stamp", "-o", "mod"): set(),
    }
    for verb in ("train", "plan", "profile"):
        asked |= {
            ("apr-dist", verb, "--optimizer.weig"): {"--optimizer.weight-decay"},
            ("apr-dist", verb, "--init", "x.apr", "--parallel.prec"): {"--parallel.precision"},
            ("apr-dist", verb, "--parallel.precision", "b"): {"bf16"},
            ("apr-dist", verb, "--overw"): {"--overwrite"},
            ("apr-dist", verb, "--no-overw"): {"--no-overwrite"},
            ("apr-dist", verb, "--init", ""): set(),
        }
    for words, expected in asked.items():
        assert completed_by_bash(script, words) == expected, words


def typed_into(shell: Sequence[str], lines: Sequence[str], folder: Path) -> str:
    """What an interactive shell prints for ``lines``, typed key by key; a tab completes."""
    process, terminal = pty.fork()
    if process == 0:  # pragma: no cover - replaced by the shell
        os.chdir(folder)
        os.execve(shell[0], list(shell), {**os.environ, "TERM": "dumb", "PS1": "$ ", "HOME": str(folder)})
    shown = b""
    try:
        for line in [*lines, "exit"]:
            os.write(terminal, line.encode() + b"\n")
        while piece := os.read(terminal, 4096):
            shown += piece
    except OSError:  # the shell has ended and with it the terminal
        pass
    finally:
        os.close(terminal)
        os.waitpid(process, 0)
    return shown.decode(errors="replace")


def test_an_interactive_bash_completes_files_too(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "apr-dist.bash").write_text(completion_script("bash", capfd))
    (tmp_path / "a-very-long-model.apr").touch()
    (tmp_path / "shards-of-mine").mkdir()
    lines = [
        "source apr-dist.bash",
        "apr-dist() { printf '<%s>' \"$@\"; }",
        "apr-dist import a-ve\t",
        "apr-dist stamp -o a-ve\t",
        "apr-dist train --dataset shar\t",
        "apr-dist train --init a-ve\t --parallel.prec\t b\t",
    ]
    shown = typed_into(["/bin/bash", "--norc", "--noprofile", "-i"], lines, tmp_path)
    assert "<import><a-very-long-model.apr>" in shown
    assert "<stamp><-o><a-very-long-model.apr>" in shown
    assert "<train><--dataset><shards-of-mine/>" in shown
    assert "<train><--init><a-very-long-model.apr><--parallel.precision><bf16>" in shown


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_take_their_script(
    shell: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    script = completion_script(shell, capfd)
    assert all(word in script for verb in VERBS for word in verb.split())
    assert "optimizer.weight-decay" in script
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed to try it")
    (tmp_path / "script").write_text(script)
    subprocess.run([shell, "-n", str(tmp_path / "script")], check=True)
    if shell == "fish":
        (tmp_path / "a-model.apr").touch()
        asked = {
            "apr-dist tokenize enc": "encode-corpus",
            "apr-dist plan --optimizer.weig": "--optimizer.weight-decay",
            "apr-dist train --parallel.precision b": "bf16",
            "apr-dist export --to hugg": "huggingface",
            "apr-dist import a-m": "a-model.apr",
            "apr-dist train --init a-m": "a-model.apr",
        }
        for line, expected in asked.items():
            command = [shell, "--no-config", "-c", f"source script; complete -C '{line}'"]
            done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
            assert done.stdout.split() == [expected], line


def test_a_shell_nobody_knows_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    for asked in (["tcl"], []):
        assert main(["--print-completion", *asked]) == ExitCode.USAGE
        assert "bash, zsh, fish" in capfd.readouterr().err


def test_inspect_shows_a_person_and_a_program_the_same_facts(
    stamped: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    capfd.readouterr()
    assert main(["inspect", str(stamped), "--quality"]) == 0
    shown = capfd.readouterr().out
    assert main(["inspect", str(stamped), "--quality", "--json", "--tensors"]) == 0
    facts = json.loads(capfd.readouterr().out)
    assert facts["family_shown"] == "qwen2"
    assert facts["quality"]["breakdown"]["hf_identity"] == 20
    assert len(facts["tensors"]) == facts["tensor_count"] == 26
    assert f"{facts['param_count']:,}" in shown
    assert f"quality {facts['quality']['score']}/100" in shown


def test_validate_passes_a_whole_file_and_names_what_is_wrong_with_a_broken_one(
    stamped: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["validate", str(stamped)]) == 0
    broken = tmp_path / "broken.apr"
    broken.write_bytes(stamped.read_bytes()[:-10])
    assert main(["validate", str(broken)]) == ExitCode.MODEL_FILE
    error = capfd.readouterr().err
    assert str(broken) in error
    assert "Traceback" not in error


def test_stamp_changes_metadata_only_and_diff_shows_exactly_that(
    stamped: Path, inputs: Inputs, capfd: pytest.CaptureFixture[str]
) -> None:
    capfd.readouterr()
    assert main(["diff", str(inputs.pretrained), str(stamped)]) == 1
    out = capfd.readouterr().out
    assert "metadata license: None -> 'MIT'" in out
    assert "26 tensor(s) identical, 0 differ" in out
    assert main(["diff", str(stamped), str(stamped)]) == 0
    assert main(["stamp", str(stamped), "--license", "MIT", "-o", str(stamped) + "2"]) == ExitCode.USAGE


def test_export_and_import_bring_every_tensor_back(stamped: Path, tmp_path: Path) -> None:
    folder, again = tmp_path / "hf", tmp_path / "again.apr"
    assert main(["export", str(stamped), "--to", "huggingface", "-o", str(folder)]) == 0
    assert main(["import", str(folder), "-o", str(again)]) == 0
    with AprReader(stamped) as first, AprReader(again) as second:
        assert {n: bytes(first.raw(n)) for n in first.tensors} == {
            n: bytes(second.raw(n)) for n in second.tensors
        }
    assert (tmp_path / "again.tokenizer" / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("command", "title"),
    [
        ("inspect SRC --quality", "inspecting"),
        ("validate SRC", "validating"),
        ("diff SRC SRC", "comparing"),
        ("stamp SRC --license Apache-2.0 -o OUT", "stamping"),
        ("export SRC --to huggingface -o OUT", "exporting"),
        ("export SRC --to gguf -o OUT", "exporting"),
    ],
)
@pytest.mark.parametrize("terminal", [True, False])
def test_a_verb_that_may_take_long_shows_a_bar_to_a_person_only(
    stamped: Path,
    command: str,
    title: str,
    terminal: bool,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1" if terminal else "0")
    capfd.readouterr()
    words = [str(stamped) if word == "SRC" else word for word in command.split()]
    assert main([str(stamped.with_name("out")) if word == "OUT" else word for word in words]) == 0
    shown = capfd.readouterr()
    assert (title in shown.err) is terminal
    assert title not in shown.out


def test_nothing_is_overwritten_without_force(
    stamped: Path, inputs: Inputs, capfd: pytest.CaptureFixture[str]
) -> None:
    before = stamped.read_bytes()
    command = ["stamp", str(inputs.pretrained), "--license", "Apache-2.0", "-o", str(stamped)]
    assert main(command) == ExitCode.OUTPUT
    assert "--force" in capfd.readouterr().err
    assert stamped.read_bytes() == before
    assert main([*command, "--force"]) == 0
    assert stamped.read_bytes() != before


def test_shards_are_verified_decoded_and_their_manifest_repaired(
    inputs: Inputs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "text.txt"
    source.write_text("import os\nprint(os.name)\n")
    out, tokenizer = tmp_path / "shards", ["--tokenizer", str(inputs.tokenizer)]
    encode = ["tokenize", "encode-corpus", "--corpus", str(source), *tokenizer, "-o", str(out)]
    assert main(encode) == 0
    assert main(encode) == ExitCode.OUTPUT
    assert main(["tokenize", "verify", str(out)]) == 0
    capfd.readouterr()
    assert main(["tokenize", "decode", str(out), *tokenizer]) == 0
    assert "print(os.name)" in capfd.readouterr().out
    (out / "manifest.json").unlink()
    assert main(["tokenize", "verify", str(out)]) == ExitCode.DATA
    assert main(["tokenize", "repair-manifest", str(out), *tokenizer]) == 0
    assert main(["tokenize", "verify", str(out)]) == 0


def test_a_checkpoint_keeps_the_tokenizer_of_its_init_and_needs_no_other_file(
    stamped: Path, inputs: Inputs, tmp_path: Path
) -> None:
    from builders.runs import run_here  # noqa: PLC0415  (imports PyTorch)

    data = inputs.data_flags()
    at = data.index("--tokenizer")
    data = data[:at] + data[at + 2 :]
    checkpoint = tmp_path / "run" / "checkpoint.apr"
    flags = ["--init", str(stamped), "--num-steps", "1", "--run-dir", str(checkpoint.parent)]
    assert run_here(*data, *flags) == 0
    with AprReader(stamped) as init, AprReader(checkpoint) as saved:
        assert saved.metadata.custom["tokenizer.json"] == init.metadata.custom["tokenizer.json"]
        assert Flag.HAS_VOCAB in saved.header.flags
    again = ["--init", str(checkpoint), "--num-steps", "0", "--run-dir", str(tmp_path / "again")]
    assert run_here(*data, *again) == 0
