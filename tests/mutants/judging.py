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
        'passed=code == 0 and run.logged_exit_code == 0 and run.verdict.get("status") != Status.ABORTED,',
        "passed=code is not None,",
    ),
    Change(
        FINETUNE + "002",
        "a smaller run is as good",
        JUDGE,
        "passed=wall <= MAX_WALL_S and done >= CONTRACT_STEPS and tokens >= WALL_TOKENS,",
        "passed=wall <= MAX_WALL_S,",
    ),
    Change(
        FINETUNE + "002",
        "any time is short enough",
        JUDGE,
        "passed=wall <= MAX_WALL_S and done >= CONTRACT_STEPS and tokens >= WALL_TOKENS,",
        "passed=done >= CONTRACT_STEPS and tokens >= WALL_TOKENS,",
    ),
    Change(
        FINETUNE + "003",
        "an init may be as bad as random weights",
        VERDICT,
        "            passed=finite and init_loss < random_loss,",
        "            passed=finite,",
    ),
    Change(
        FINETUNE + "003",
        "a comparison that was not made is passed",
        JUDGE,
        "    if len(measured) != 1:\n        return [_missing(",
        "    if len(measured) != 1:\n        return []\n        return [_missing(",
    ),
    Change(
        FINETUNE + "004",
        "a damaged checkpoint is one",
        JUDGE,
        "            passed=found is not None,",
        "            passed=run.refusal is not None or found is not None,",
    ),
    Change(
        FINETUNE + "005",
        "any number of steps is enough",
        JUDGE,
        "            passed=done >= steps,",
        "            passed=done >= 0,",
    ),
    Change(
        FINETUNE + "006",
        "only running out of memory is looked for",
        JUDGE,
        '    r"out of memory|memoryerror|cannot allocate memory|can\'t allocate memory|too many open files"',
        '    r"out of memory|memoryerror|cannot allocate memory|can\'t allocate memory"',
    ),
    Change(
        FINETUNE + "006",
        "a log that is gone is a good one",
        JUDGE,
        "        passed=bool(run.log) and not errors,",
        "        passed=not errors,",
    ),
    Change(
        FINETUNE + "007",
        "only the last evaluation is looked at",
        JUDGE,
        "        passed=bool(shares) and all(share >= PLAUSIBLE_SHARE for share in shares),",
        "        passed=bool(shares) and shares[-1] >= PLAUSIBLE_SHARE,",
    ),
    Change(
        TRAINER + "036",
        "gates are believed as they stand",
        FINISHED,
        "        if json.dumps(gate.to_json(), sort_keys=True) not in told:",
        "        if not told:",
    ),
    Change(
        TRAINER + "036",
        "the weights of a checkpoint are not compared",
        FINISHED,
        '    if found.weights_digest != run.facts.get("weights_digest"):',
        "    if not found.weights_digest:",
    ),
    Change(
        TRAINER + "036",
        "the configuration is not compared",
        FINISHED,
        '    if run.facts.get("config_digest") not in run.config_digests:',
        '    if not run.facts.get("config_digest"):',
    ),
    Change(
        TRAINER + "036",
        "the log may end otherwise",
        FINISHED,
        '    if not aborted and run.logged_exit_code != run.verdict.get("exit_code"):',
        "    if not aborted and not run.log:",
        also=(FINETUNE + "001", FINETUNE + "006"),
    ),
)
