"""Ways of breaking the judgement of finished runs."""

from __future__ import annotations

from mutants.change import FINETUNE, TRAINER, VERDICT, Change

JUDGE = "apr_dist/report/finetune_verdict.py"
FINISHED = "apr_dist/report/finished_run.py"

MUTANTS: tuple[Change, ...] = (
    Change(
        FINETUNE + "001",
        "a run that was stopped has ended well",
        JUDGE,
        "_end_gates",
        "code == 0 and run.logged_exit_code == 0 and (run.verdict.get('status') != Status.ABORTED)",
        "code is not None",
    ),
    Change(
        FINETUNE + "002",
        "a smaller run is as good",
        JUDGE,
        "_end_gates",
        "wall <= MAX_WALL_S and done >= CONTRACT_STEPS and (tokens >= WALL_TOKENS)",
        "wall <= MAX_WALL_S",
    ),
    Change(
        FINETUNE + "002",
        "any time is short enough",
        JUDGE,
        "_end_gates",
        "wall <= MAX_WALL_S and done >= CONTRACT_STEPS and (tokens >= WALL_TOKENS)",
        "done >= CONTRACT_STEPS and tokens >= WALL_TOKENS",
    ),
    Change(
        FINETUNE + "003",
        "an init may be as bad as random weights",
        VERDICT,
        "random_start_gates",
        "finite and init_loss < random_loss",
        "finite",
    ),
    Change(
        FINETUNE + "003",
        "a comparison that was not made is passed",
        JUDGE,
        "_random_gates",
        "if len(measured) != 1: ...",
        "if len(measured) != 1:\n    return []",
    ),
    Change(
        FINETUNE + "004",
        "a damaged checkpoint is one",
        JUDGE,
        "_checkpoint_gate",
        "GateResult(_FINETUNE + '004', 'checkpoint opens', measured, required, found is not None)",
        "GateResult(_FINETUNE + '004', 'checkpoint opens', measured, required, passed=True)",
    ),
    Change(
        FINETUNE + "005",
        "any number of steps is enough",
        JUDGE,
        "_end_gates",
        "done >= steps",
        "done >= 0",
    ),
    Change(
        FINETUNE + "006",
        "only running out of memory is looked for",
        JUDGE,
        "_RESOURCE_WORDS",
        '"too many open files"',
        '"no such words"',
    ),
    Change(
        FINETUNE + "006",
        "a log that is gone is a good one",
        JUDGE,
        "_log_gate",
        "bool(run.log) and (not errors)",
        "not errors",
    ),
    Change(
        FINETUNE + "007",
        "only the last evaluation is looked at",
        JUDGE,
        "_plausible_throughout",
        "all((share >= PLAUSIBLE_SHARE for share in shares))",
        "shares[-1] >= PLAUSIBLE_SHARE",
    ),
    Change(
        TRAINER + "036",
        "gates are believed as they stand",
        FINISHED,
        "_about_gates",
        "json.dumps(gate.to_json(), sort_keys=True) not in told",
        "not told",
    ),
    Change(
        TRAINER + "036",
        "the weights of a checkpoint are not compared",
        FINISHED,
        "_about_the_checkpoint",
        "found.weights_digest != run.facts.get('weights_digest')",
        "not found.weights_digest",
    ),
    Change(
        TRAINER + "036",
        "the configuration is not compared",
        FINISHED,
        "_about_the_end",
        "run.facts.get('config_digest') not in run.config_digests",
        "not run.facts.get('config_digest')",
    ),
    Change(
        TRAINER + "036",
        "the log may end otherwise",
        FINISHED,
        "_about_the_end",
        "run.logged_exit_code != run.verdict.get('exit_code')",
        "not run.log",
        also=(FINETUNE + "001", FINETUNE + "006"),
    ),
)
