"""What mixtures of experts have in common in other formats: their keys, GGUF tensors and stored layouts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from apr_dist.model.families._definition import ExpertNames, Key, irrelevant, left_out, only, read
from apr_dist.model.families._gguf import BLOCK

NAMES: Final = ExpertNames(gate="gate_proj.weight", up="up_proj.weight", down="down_proj.weight")
"""One tensor for each matrix of an expert, as Qwen and OLMoE are published."""

OPTIONS: Final = ("num_experts", "num_experts_per_tok", "router_aux_loss_coef")
"""Options of every mixture."""

HF_KEYS: Final[Mapping[str, Key]] = {
    "num_experts_per_tok": read("num_experts_per_tok"),
    "router_aux_loss_coef": read("router_aux_loss_coef"),
    "output_router_logits": irrelevant("what a call returns; the loss that is trained is in the run's keys"),
}
ROUTER_JITTER: Final = left_out("the router's input is not disturbed in training", unless=(0.0,))

_DENSE_MLP: Final = ("ffn_gate.weight", "ffn_up.weight", "ffn_down.weight")
EXPERTS_BLOCK: Final[Mapping[str, str]] = {
    **{gguf: name for gguf, name in BLOCK.items() if gguf not in _DENSE_MLP},
    "ffn_gate_inp.weight": "mlp.gate.weight",
    "ffn_gate_exps.weight": "mlp.experts.gate_up_proj",
    "ffn_up_exps.weight": "mlp.experts.gate_up_proj",
    "ffn_down_exps.weight": "mlp.experts.down_proj",
}
"""A block of experts in GGUF; gate and up lie in two tensors there and in one here."""

GGUF_KEYS: Final[Mapping[str, Key]] = {
    "expert_count": read("num_experts"),
    "expert_used_count": read("num_experts_per_tok"),
    "expert_shared_count": only(0, why="no expert computes every token"),
    "expert_group_count": only(0, why="experts are chosen among all"),
    "expert_group_used_count": only(0, why="experts are chosen among all"),
    "expert_weights_scale": only(0.0, 1.0, why="the weights of experts are not scaled"),
    "expert_gating_func": only(0, 1, why="the weights of experts are a softmax"),
}
