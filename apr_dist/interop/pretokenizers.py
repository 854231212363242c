"""How each known family cuts text before BPE: what a GGUF's ``tokenizer.ggml.pre`` stands for.

Lives here: the patterns, as ``tokenizers`` pre-tokenizer descriptions. Reading the files that name them
lives in ``tokenizers`` beside this room.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

Step: TypeAlias = dict[str, object]


@dataclass(frozen=True)
class PreTokenizer:
    """A family's way of cutting text.

    Attributes:
        steps: pre-tokenizers applied one after the other, the last one mapping bytes to the alphabet.
        nfc: text is NFC-normalised first, as the family's own tokenizer does.
        ignore_merges: a piece that is a token as a whole is taken without merging.
    """

    steps: tuple[Step, ...]
    nfc: bool = False
    ignore_merges: bool = False


_CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"
# GPT-2's own pattern, for families that cut with others before it.
_GPT2 = rf"{_CONTRACTIONS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)|\s+"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = rf"(?i:{_CONTRACTIONS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_TAIL}"
_LLAMA3 = rf"(?i:{_CONTRACTIONS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_TAIL}"


def _isolate(pattern: str) -> Step:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _byte_level(*, gpt2_pattern: bool) -> Step:
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": gpt2_pattern,
    }


_DIGITS: Step = {"type": "Digits", "individual_digits": True}
_BYTES = _byte_level(gpt2_pattern=False)
_GPT2_BYTES = _byte_level(gpt2_pattern=True)

PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "gpt-2": PreTokenizer((_GPT2_BYTES,)),
    "smollm": PreTokenizer((_DIGITS, _GPT2_BYTES)),
    "qwen2": PreTokenizer((_isolate(_QWEN2), _BYTES), nfc=True),
    "llama-bpe": PreTokenizer((_isolate(_LLAMA3), _BYTES), ignore_merges=True),
    # What a converter writes when it does not know: punctuation apart, GPT-2's cuts, digits by three.
    "default": PreTokenizer(
        (
            _isolate(r"[\p{P}\$\+<=>\^~\|]+"),
            _isolate(_GPT2),
            _isolate(r"\p{N}+"),
            _isolate(r"[0-9][0-9][0-9]"),
            _BYTES,
        )
    ),
}
