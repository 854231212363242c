"""Who a model is: what its tensor names say, what its metadata claims, and which decoder that means.

Pure functions of names and texts. Comparing the two witnesses and refusing is a gate's business.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from apr_dist.model.config import Family

UNKNOWN: Final = "unknown"
"""The answer of tensor names that belong to no known family, or to GGUF, which cannot tell."""

_CLAIMS: Final[dict[str, tuple[str, ...]]] = {
    "qwen2": ("Qwen2ForCausalLM", "Qwen2.5ForCausalLM", "qwen2", "qwen2.5", "qwen"),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "qwen3", "qwen3_5", "qwen3.5"),
    "llama": (
        *("LlamaForCausalLM", "MistralForCausalLM", "Phi3ForCausalLM", "PhiForCausalLM"),
        *("llama", "mistral", "phi", "phi3", "phi4"),
    ),
    "gpt2": ("GPT2LMHeadModel", "gpt2", "GPT2"),
    "gpt-neox": ("GPTNeoXForCausalLM", "gpt-neox", "gpt_neox", "gptneox", "pythia"),
    "mamba": ("mamba",),
    "rwkv": ("rwkv",),
    "bert": ("BertModel", "BertForMaskedLM", "bert"),
    "opt": ("OPTForCausalLM", "opt"),
}
_FAMILY_OF_CLAIM: Final = {
    spelling: family
    for family, claims in _CLAIMS.items()
    for claim in claims
    for spelling in (claim, claim[:1].upper() + claim[1:])
}
_CLASS_PREFIXES: Final = {"Mamba": "mamba", "Rwkv": "rwkv"}

_ENCODERS: Final = ("bert", "electra", "mpnet", "minilm", "sentence-transformer", "sentence_transformer")

_NAME_RULES: Final = tuple(
    (family, re.compile(pattern))
    for family, pattern in (
        ("mamba", r"mixer\.(in|out)_proj"),
        ("rwkv", r"\nrwkv\.blocks\.|blocks\.0\.att\."),
        ("gpt-neox", r"\ngpt_neox\."),
        ("opt", r"\nmodel\.decoder\.layers\."),
        ("bert", r"\n(bert|roberta|distilbert|electra|deberta|albert|mpnet)\."),
        ("bert", r"\n(encoder\.layer\.|embeddings\.word_embeddings\.|transformer\.layer\.)"),
        ("qwen3", r"model\.layers\.[^\n]*self_attn\.q_norm\.weight"),
        ("qwen2", r"model\.layers\.[^\n]*(self_attn\.q_proj\.bias|qkv_proj\.weight)"),
        ("llama", r"model\.layers\.[^\n]*(self_attn\.q_proj|mlp\.gate_proj)\.weight"),
        ("gpt2", r"\ntransformer\.h\.|\nh\.\d+\.attn\."),
    )
)
"""Tried in this order on the names, each preceded by a newline."""

_LLAMA_NAMED_BUT_DIFFERENT: Final = re.compile(
    r"^(phi|gemma|granite|smollm3|cohere|olmo|stablelm|starcoder2|minicpm|internlm|exaone|helium|glm|nemotron"
    r"|mixtral|mistral3|ministral|qwen[23]_?moe|qwen3_5|qwen3\.5|qwen3_?next|qwen2_?5?_?vl|qwen3_?vl|deepseek)",
    re.IGNORECASE,
)
"""``hf_model_type`` of models whose tensors are named like Llama's and whose arithmetic differs."""


def only_shares_names(claim: str) -> bool:
    """Whether a class name or model type is of a model named like Llama whose arithmetic differs."""
    return _LLAMA_NAMED_BUT_DIFFERENT.match(claim) is not None


def family_from_tensor_names(names: Iterable[str]) -> str:
    """The family that a file's tensor names show, by the first rule that matches.

    Answers one of qwen3, qwen2, llama, mamba, rwkv, gpt-neox, opt, bert, gpt2, unknown. GGUF names
    (``blk.0...``) are the same for every family, so they answer unknown. Encoders that are exported
    without their ``bert.`` prefix are bert.
    """
    joined = "\n" + "\n".join(names)
    return next((family for family, pattern in _NAME_RULES if pattern.search(joined)), UNKNOWN)


def normalize_metadata_family(text: str) -> str | None:
    """The family a metadata text claims: a class name, a slug or a capitalised slug; else None.

    ``Qwen2ForCausalLM``, ``qwen2`` and ``Qwen2`` are all qwen2; Mistral and Phi are llama. A text
    that is not listed is no claim.
    """
    claim = text.strip()
    if claim in _FAMILY_OF_CLAIM:
        return _FAMILY_OF_CLAIM[claim]
    return next((family for prefix, family in _CLASS_PREFIXES.items() if claim.startswith(prefix)), None)


def is_encoder(text: str) -> bool:
    """Whether a slug or class name is that of an encoder (BERT and its relatives)."""
    lowered = text.lower()
    return any(encoder in lowered for encoder in _ENCODERS)


def hf_architecture(slug: str) -> str:
    """The Hugging Face class name to stamp on a model of that family slug (``qwen2``: Qwen2ForCausalLM)."""
    return _CLAIMS[slug][0]


def decoder_family(slug: str, hf_model_type: str | None = None) -> Family | None:
    """The decoder to build for a family (slug or class name) and the file's ``hf_model_type``.

    Mistral is Llama by its tensor names, so only ``hf_model_type`` (or an architecture text given in
    its place, ``mistral`` or ``MistralForCausalLM``) tells it apart. None: an encoder, a family this
    project does not train, or an ``hf_model_type`` whose tensors are named like Llama's while its
    arithmetic differs (Gemma, Granite, SmolLM3, Phi and others).
    """
    claim = (hf_model_type or "").strip()
    if is_encoder(slug) or is_encoder(claim) or _LLAMA_NAMED_BUT_DIFFERENT.match(claim):
        return None
    family = normalize_metadata_family(slug)
    if _LLAMA_NAMED_BUT_DIFFERENT.match(slug) or family not in ("llama", "qwen2", "qwen3"):
        return None
    says_mistral = {slug.lower(), claim.lower()} & {"mistral", "mistralforcausallm"}
    return Family.MISTRAL if family == "llama" and says_mistral else Family(family)
