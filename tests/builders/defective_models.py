"""Model files that training refuses, by name: what is changed of a whole one, and words of the refusal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from apr_dist.apr.layout import Flag
from builders.files import TINY_METADATA, Arrays, tiny_tensors, write_apr

UP1 = "model.layers.1.mlp.up_proj.weight"
GATE0 = "model.layers.0.mlp.gate_proj.weight"
EMBEDDING = "model.embed_tokens.weight"
Change = Callable[[Arrays, dict[str, Any]], Any]


@dataclass(frozen=True, kw_only=True)
class Defect:
    """One way to spoil a model file.

    Attributes:
        change: made to tensors and metadata of a whole Llama.
        words: a part of the refusal.
        values: whether only reading the values shows it.
        unstated: whether a dimension is left unstated, which an import accepts for ``stamp`` to state.
        imports: whether ``apr-dist import`` brings such a file into the form that is trained.
        flags: header flags of the file.
    """

    change: Change
    words: str
    values: bool = False
    unstated: bool = False
    imports: bool = False
    flags: Flag = Flag.ROW_MAJOR

    def write(self, path: Path) -> Path:
        """The spoiled file."""
        tensors, metadata = tiny_tensors(), dict(TINY_METADATA)
        self.change(tensors, metadata)
        return write_apr(path, tensors, metadata, flags=self.flags)


def stated(**keys: Any) -> Change:
    """Metadata that state something else; None leaves a key out."""

    def change(_: Arrays, metadata: dict[str, Any]) -> None:
        metadata.update(keys)
        for key in [key for key, value in keys.items() if value is None]:
            del metadata[key]

    return change


def added(shape: tuple[int, ...], *names: str) -> Change:
    """Tensors that no decoder of the family has."""
    return lambda tensors, _: tensors.update({name: np.ones(shape, np.float32) for name in names})


def renamed(change: Callable[[str], str]) -> Change:
    """Every tensor under another name."""
    return lambda tensors, _: [tensors.update({change(name): tensors.pop(name)}) for name in list(tensors)]


def attention_biases(tensors: Arrays, _: dict[str, Any]) -> None:
    for name in [name for name in tensors if "self_attn" in name]:
        tensors[name.replace(".weight", ".bias")] = np.ones(tensors[name].shape[0], np.float32)


def frequencies(tensors: Arrays, metadata: dict[str, Any]) -> None:
    values = metadata["rope_theta"] ** -(np.arange(8) / 8)
    for layer in range(2):
        name = f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"
        tensors[name] = values.astype(np.float32)


def spoil(name: str, value: float) -> Change:
    return lambda tensors, _: tensors[name].__setitem__((0, 0), value)


GEMMA = {"architecture": "gemma", "hf_architecture": "GemmaForCausalLM", "hf_model_type": "gemma"}
BERT = {"architecture": "bert", "hf_architecture": "BertModel", "hf_model_type": "bert"}
LONG: dict[str, Any] = {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 32} | {
    "short_factor": [1.0] * 3,
    "long_factor": [2.0] * 8,
}

DEFECTS: Mapping[str, Defect] = {
    "a claim to be Gemma": Defect(change=stated(**GEMMA), words="'GemmaForCausalLM' is not one"),
    "a claim to be BertModel": Defect(change=stated(**BERT), words="this is an encoder (BertModel)"),
    "a tensor missing": Defect(
        change=lambda t, _: t.pop(UP1), words=f"1 of 20 parameters are missing: {UP1}"
    ),
    "the embedding missing": Defect(change=lambda t, _: t.pop(EMBEDDING), words=f"missing: {EMBEDDING}"),
    "only lm_head.weight of two": Defect(
        change=lambda t, _: t.update({"lm_head.weight": t.pop(EMBEDDING)}),
        words=f"missing: {EMBEDDING}",
        imports=True,
    ),
    "no tensor at all": Defect(change=lambda t, _: t.clear(), words="20 of 20 parameters are missing"),
    "a tensor left over": Defect(
        change=added((2, 2), "model.layers.0.adapter.weight"), words="1 tensors belong to no parameter"
    ),
    "biases in the MLP": Defect(
        change=added((96,), "model.layers.0.mlp.up_proj.bias"),
        words="start from a model without these biases",
    ),
    "attention biases that nothing states": Defect(change=attention_biases, words="--attention-bias True"),
    "a bias on o alone": Defect(
        change=added((64,), "model.layers.0.self_attn.o_proj.bias"), words="start from a model without"
    ),
    "a matrix transposed": Defect(
        change=lambda t, _: t.update({GATE0: np.ascontiguousarray(t[GATE0].T)}),
        words=f"{GATE0} is [64, 96], not [96, 64]",
    ),
    "a matrix all zero": Defect(
        change=lambda t, _: t[GATE0].fill(0), words=f"every value of {GATE0} is zero", values=True
    ),
    "a NaN": Defect(change=spoil(UP1, np.nan), words=f"{UP1} holds 1 values", values=True),
    "an infinity": Defect(change=spoil(EMBEDDING, -np.inf), words=f"{EMBEDDING} holds 1 values", values=True),
    "no num_heads": Defect(change=stated(num_heads=None), words="does not state num_heads", unstated=True),
    "what the reference leaves unstated": Defect(
        change=stated(max_position_embeddings=None, rope_theta=None, rms_norm_eps=None),
        words="does not state max_position_embeddings, rope_theta, rms_norm_eps",
        unstated=True,
    ),
    "seven layers claimed, two held": Defect(change=stated(num_layers=7), words="45 of 65 parameters are"),
    "one layer too many claimed": Defect(change=stated(num_layers=3), words="9 of 29 parameters are missing"),
    "one layer too few claimed": Defect(
        change=stated(num_layers=1), words="9 tensors belong to no parameter"
    ),
    "three heads": Defect(change=stated(num_heads=3), words="num_heads is 3"),
    "another number of KV heads": Defect(change=stated(num_kv_heads=4), words="have another shape"),
    "an epsilon below zero": Defect(change=stated(rms_norm_eps=-1.0), words="rms_norm_eps is -1.0"),
    "tie as text": Defect(change=stated(tie_word_embeddings="true"), words="tie_word_embeddings is 'true'"),
    "a head said to be its own": Defect(
        change=stated(tie_word_embeddings=False), words="there is no lm_head.weight"
    ),
    "a rotary scaling that nobody has": Defect(
        change=stated(rope_scaling={"rope_type": "ntk", "factor": 2.0}), words="'ntk'"
    ),
    "a rotary factor too few": Defect(change=stated(rope_scaling=LONG), words="short_factor is '3 numbers'"),
    "a window that Llama does not have": Defect(
        change=stated(sliding_window=32, use_sliding_window=True), words="use_sliding_window is True"
    ),
    "rows in adjacent pairs": Defect(change=stated(rope_type=0), words="rope_type is 0", imports=True),
    "names with module.": Defect(
        change=renamed(lambda name: f"module.{name}"), words="20 tensor names carry a prefix", imports=True
    ),
    "names with base_model.model.": Defect(
        change=renamed(lambda name: f"base_model.model.{name}"), words="base_model.model.model", imports=True
    ),
    "names with _orig_mod. inside": Defect(
        change=renamed(lambda name: name.replace("mlp.", "mlp._orig_mod.")),
        words="carry a",
        imports=True,
    ),
    "rotary buffers": Defect(change=frequencies, words="leaves these buffers out", imports=True),
    "one shard of a model": Defect(
        change=stated(), words="one shard of a model", flags=Flag.ROW_MAJOR | Flag.SHARDED
    ),
}
