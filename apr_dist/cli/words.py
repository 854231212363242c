"""What a verb that does not exist was meant to be: another tool's word for one of ours, or mistyped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches

from apr_dist.config import nearest

_MEANT: Mapping[str, str] = {
    "train": "run fit finetune fine-tune pretrain launch resume sft",
    "import": "load pull from-hf",
    "export": "save quantize to-gguf to-hf convert",
    "inspect": "info ls list cat",
    "validate": "test",
    "generate": "chat infer inference complete sample",
    "plan": "estimate dry-run memory",
    "profile": "bench benchmark trace",
    "report": "plot plots curves",
    "verdict": "result gates eval evaluate",
    "doctor": "env info-env environment",
    "tokenize encode-corpus": "encode prepare preprocess shard",
    "tokenize import-hf": "import-tokenizer tokenizer",
}
_WORDS = {word: verb for verb, words in _MEANT.items() for word in words.split()}


def meant_by(words: Sequence[str], verbs: Sequence[str]) -> str | None:
    """The verb that the first words of a command line were meant to be; None if nothing is like them.

    Args:
        words: the words of the command line, flags among them.
        verbs: the verbs there are, of one word or two.
    """
    first, second = (*words[:2], "", "")[:2]
    if first.startswith("-"):
        return next(iter(get_close_matches(first, ("--help", "--version"), cutoff=0.7)), "train")
    seconds = [verb.partition(" ")[2] for verb in verbs if verb.startswith(f"{first} ")]
    if seconds:
        close = _nearest(second, seconds)
        return f"{first} {close}" if close else None
    word = first.lower()
    if word in _WORDS:
        return _WORDS[word]
    groups = dict.fromkeys(verb.partition(" ")[0] for verb in verbs)
    known = [*groups, *(verb.partition(" ")[2] for verb in verbs if " " in verb)]
    close = _nearest(word, known)
    if close is None or close in verbs:
        return close
    if close in groups:
        return meant_by([close, second], verbs) or close
    return next(verb for verb in verbs if verb.endswith(f" {close}"))


def _nearest(word: str, known: Sequence[str]) -> str | None:
    """The first word that ``word`` begins, else the one it most resembles; None if there is none."""
    begun = [one for one in known if len(word) > 2 and one.startswith(word)]
    return begun[0] if begun else nearest(word, known)
