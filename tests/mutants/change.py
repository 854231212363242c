"""One way of breaking the code, and the names that the tables of them share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mutants.editing import Edit, edits, has_scope


@dataclass(frozen=True)
class Change:
    """One operation of one function, made another.

    Attributes:
        falsifier: the id whose bound tests must turn red.
        what: the change in words.
        file: the file, relative to the repository. A function that moved is found where it is now.
        scope: the function, class or value it is in, by its qualified name; empty for a whole file.
        old: the operation there now (``editing.edits`` says in which forms); it occurs once.
        new: what takes its place.
        also: other falsifiers that rest on the same operation, whose tests may turn red as well.
    """

    falsifier: str
    what: str
    file: str
    scope: str
    old: str
    new: str
    also: tuple[str, ...] = ()

    def path(self, root: Path) -> Path:
        """The file under ``root`` that the function is in: the one named, or the only other one."""
        named = root / self.file
        if (
            named.suffix != ".py"
            or not self.scope
            or (named.exists() and has_scope(_text(named), self.scope))
        ):
            return named
        others = [path for path in (root / "apr_dist").rglob("*.py") if has_scope(_text(path), self.scope)]
        return others[0] if len(others) == 1 else named

    def edits(self, root: Path) -> list[Edit]:
        """Every place the operation has there."""
        path = self.path(root)
        return edits(_text(path), path.suffix, self.scope, self.old, self.new) if path.exists() else []


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


INIT, ARCH, FINETUNE = (
    "FALSIFY-APR-PRETRAIN-INIT-",
    "FALSIFY-APR-PRETRAIN-ARCH-",
    "FALSIFY-APR-PRETRAIN-INIT-FINETUNE-",
)
ADAPTER = "FALSIFY-APR-DIST-ADAPTER-"
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

CONFIG = "apr_dist/config/schema.py"
CONFIG_SECTIONS = "apr_dist/config/sections.py"
FILES = "apr_dist/apr/files.py"
ATOMIC = "apr_dist/atomic_files.py"
STRUCTURE = "apr_dist/apr/structure.py"
READER = "apr_dist/apr/reader.py"
MODEL_CONFIG = "apr_dist/model/config.py"
ATTENTION = "apr_dist/model/attention.py"
PLAIN_KERNELS = "apr_dist/model/kernels/plain.py"
FAMILY_GATE = "apr_dist/gates/architecture.py"
VOCABULARY_GATE = "apr_dist/gates/vocabulary.py"
WEIGHTS_GATE = "apr_dist/gates/weights.py"
DATA_GATE = "apr_dist/gates/data.py"
OUTPUT_GATE = "apr_dist/gates/output.py"
PREFLIGHT = "apr_dist/gates/preflight.py"
MODEL_FILE_GATE = "apr_dist/gates/model_file.py"
VERDICT = "apr_dist/gates/losses.py"
GUARDS = "apr_dist/training/guards.py"
OPTIMIZER = "apr_dist/training/optimizer.py"
SCHEDULE = "apr_dist/training/schedule.py"
METRICS = "apr_dist/runs/metrics.py"
TRAINER_FILE = "apr_dist/training/trainer.py"
STEPPING = "apr_dist/training/stepping.py"
SAVED = "apr_dist/runs/checkpoint.py"
SESSION = "apr_dist/training/opening.py"
RUN_DATA = "apr_dist/training/run_data.py"
RECORDING = "apr_dist/training/step_record.py"
STRATEGY = "apr_dist/parallel/strategy.py"
STEP_GUARD = "apr_dist/training/step_guard.py"
WATCH = "apr_dist/parallel/watchdog.py"
RUN_FOLDER = "apr_dist/parallel/run_folder.py"
TOKENIZER_JSON = "apr_dist/corpus/tokenizer_json.py"
TOKENIZER = "apr_dist/corpus/tokenizer.py"
LOADER_FILE = "apr_dist/data/loader.py"
REPAIR_FILE = "apr_dist/corpus/repair.py"
