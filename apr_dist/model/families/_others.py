"""Families that are known in order to be refused by name: other networks, and encoders."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

CLAIMS: Final[Mapping[str, tuple[str, ...]]] = {
    "llama": ("PhiForCausalLM", "phi", "phi4"),
    "qwen3": ("Qwen3MoeForCausalLM", "qwen3_5", "qwen3.5"),
    "gpt2": ("GPT2LMHeadModel", "gpt2", "GPT2"),
    "gpt-neox": ("GPTNeoXForCausalLM", "gpt-neox", "gpt_neox", "gptneox", "pythia"),
    "mamba": ("mamba",),
    "rwkv": ("rwkv",),
    "bert": ("BertModel", "BertForMaskedLM", "bert"),
    "opt": ("OPTForCausalLM", "opt"),
}
"""Texts by the family whose tensor names they have; none of them is trained here."""

CLASS_PREFIXES: Final[Mapping[str, str]] = {"Mamba": "mamba", "Rwkv": "rwkv"}

ENCODERS: Final = ("bert", "electra", "mpnet", "minilm", "sentence-transformer", "sentence_transformer")

TENSOR_MARKS: Final = tuple(
    (family, re.compile(pattern))
    for family, pattern in (
        ("mamba", r"mixer\.(in|out)_proj"),
        ("rwkv", r"\nrwkv\.blocks\.|blocks\.0\.att\."),
        ("gpt-neox", r"\ngpt_neox\."),
        ("opt", r"\nmodel\.decoder\.layers\."),
        ("bert", r"\n(bert|roberta|distilbert|electra|deberta|albert|mpnet)\."),
        ("bert", r"\n(encoder\.layer\.|embeddings\.word_embeddings\.|transformer\.layer\.)"),
        ("gpt2", r"\ntransformer\.h\.|\nh\.\d+\.attn\."),
    )
)
"""Tried in this order, before those of our families, on the names, each preceded by a newline."""

NAMED_LIKE_OURS: Final = re.compile(
    r"^(phi|gemma|granite|smollm3|cohere|olmo|stablelm|starcoder2|minicpm|internlm|exaone|helium|glm|nemotron"
    r"|mixtral|mistral3|ministral|qwen[23]_?moe|qwen3_5|qwen3\.5|qwen3_?next|qwen2_?5?_?vl|qwen3_?vl|deepseek"
    r"|ernie|seed_?oss|arcee|apertus|diffllama|hunyuan|bitnet|mellum|cwm|doge)",
    re.IGNORECASE,
)
"""Texts of models whose tensors are named like one of ours and whose arithmetic differs."""
