"""The ways of breaking the code that ``mutate.py`` tries, each with the falsifier that must notice."""

from mutants import adapters, data, gates, judging, mixtures, model_and_files, processes, training
from mutants.change import Change

__all__ = ["MUTANTS", "Change"]

MUTANTS: tuple[Change, ...] = (
    *gates.MUTANTS,
    *model_and_files.MUTANTS,
    *training.MUTANTS,
    *processes.MUTANTS,
    *data.MUTANTS,
    *judging.MUTANTS,
    *adapters.MUTANTS,
    *mixtures.MUTANTS,
)
