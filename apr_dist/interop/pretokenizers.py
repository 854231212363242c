"""How text is cut before BPE: what each name in a GGUF's ``tokenizer.ggml.pre`` stands for.

Lives here: the patterns, as ``tokenizers`` pre-tokenizer descriptions, and llama.cpp's names for them.
Reading the files that name them lives in ``tokenizers``.
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
        add_bos: a text begins with the beginning token where the file does not say.
    """

    steps: tuple[Step, ...]
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False


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

_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORD = r"[^\r\n\p{L}\p{N}]?"
_SLASHES = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = rf"{_WORD}{_UPPER}*{_LOWER}+|{_WORD}{_UPPER}+{_LOWER}*|\p{{N}}|{_SLASHES}"
_ENDING = rf"(?i:{_CONTRACTIONS})?"
_GPT4O = rf"{_WORD}{_UPPER}*{_LOWER}+{_ENDING}|{_WORD}{_UPPER}+{_LOWER}*{_ENDING}|\p{{N}}{{1,3}}|{_SLASHES}"
_DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_LLAMA3_CUTS = (_isolate(_LLAMA3), _BYTES)
_LLAMA_BPE = PreTokenizer(_LLAMA3_CUTS, ignore_merges=True, add_bos=True)
_GPT_2 = PreTokenizer((_GPT2_BYTES,))
_DIGITS_APART = PreTokenizer((_DIGITS, _GPT2_BYTES))
_DEEPSEEK_V3 = PreTokenizer(
    (_isolate(r"\p{N}{1,3}"), _isolate("[一-龥\u3040-\u30ff]+"), _isolate(_DEEPSEEK3), _BYTES)
)
_QWEN_CUTS = PreTokenizer((_isolate(_QWEN2), _BYTES))

PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "gpt-2": _GPT_2,
    "smollm": _DIGITS_APART,
    "qwen2": PreTokenizer(_QWEN_CUTS.steps, nfc=True),
    "llama-bpe": _LLAMA_BPE,
    "dbrx": PreTokenizer(_LLAMA3_CUTS),
    "deepseek-r1-qwen": _QWEN_CUTS,
    "tekken": PreTokenizer((_isolate(_TEKKEN), _BYTES), ignore_merges=True, add_bos=True),
    "gpt-4o": PreTokenizer((_isolate(_GPT4O), _BYTES)),
    "deepseek-coder": PreTokenizer(
        (
            _isolate(r"[\r\n]"),
            _isolate(r"\s?\p{L}+"),
            _isolate(r"\s?\p{P}+"),
            _isolate(r"[一-龥ࠀ-一가-퟿]+"),
            _DIGITS,
            _BYTES,
        )
    ),
    "deepseek-v3": _DEEPSEEK_V3,
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
    **dict.fromkeys(
        ("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"), _LLAMA_BPE
    ),
    **dict.fromkeys(("phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "exaone4"), _GPT_2),
    **dict.fromkeys(
        ("jina-es", "jina-de", "jina-v2-es", "jina-v2-de", "gigachat", "a.x-4.0", "mellum"), _GPT_2
    ),
    **dict.fromkeys(("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), _DIGITS_APART),
    **dict.fromkeys(("stablelm2", "hunyuan", "megrez", "kormo", "grok-2"), _QWEN_CUTS),
    "smaug-bpe": PreTokenizer(_LLAMA3_CUTS),
    "llama4": PreTokenizer((_isolate(_GPT4O), _BYTES)),
    "hunyuan-dense": _DEEPSEEK_V3,
}
"""By llama.cpp's name; of several names for the same cuts an export writes the first."""
