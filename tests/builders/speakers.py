"""A tiny model that says one thing and ends its turn, in a Hugging Face folder with a chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from builders.files import write_tokenizer

TURN_END = 34
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}a{% endif %}{{ m.content }}<t>"
    "{% endfor %}"
    "{% if add_generation_prompt %}a{% endif %}"
)
SETTINGS = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9, "eos_token_id": [33, TURN_END]}


def chat_folder(folder: Path, *, settings: dict[str, Any] | None = None, template: str = TEMPLATE) -> Path:
    """A Hugging Face folder of a model that says ``ab`` and then ends its turn with ``<t>``, for ever."""
    config = LlamaConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=40,
        intermediate_size=96,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    state = model.state_dict()
    for name, tensor in state.items():
        if "proj" in name:
            tensor.mul_(1e-3)
    embedding, head = state["model.embed_tokens.weight"], state["lm_head.weight"]
    embedding.zero_()
    head.zero_()
    for token in range(40):
        embedding[token, token] = 1.0
        head[TURN_END if token == 0 else 0, token] = 1.0  # after "ab" the end, after anything else "ab"
    model.save_pretrained(folder)
    write_tokenizer(folder)
    description = json.loads((folder / "tokenizer.json").read_text())
    description["added_tokens"].append(description["added_tokens"][1] | {"id": TURN_END, "content": "<t>"})
    (folder / "tokenizer.json").write_text(json.dumps(description))
    stated = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(stated | {"chat_template": template}))
    (folder / "generation_config.json").write_text(json.dumps(settings or {"eos_token_id": 33}))
    return folder
