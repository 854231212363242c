"""What becomes of the keys of a ``config.json`` that every family has.

A key of a family's own, or a family's other rule for one of these, is in the family's file. A key in
neither table stops the import: nobody here knows what it changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from apr_dist.model.families._definition import Key, irrelevant, left_out, only, read

_LIBRARY = "of the library that loads the model"
_TASK = "of a classifier's head"
_GENERATION = "of a generator; the model is the same"
_SPLIT = "one product however it is cut"

_SAMPLING = (
    *("max_length", "min_length", "max_new_tokens", "min_new_tokens", "do_sample", "early_stopping"),
    *("num_beams", "num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p", "typical_p"),
    *("min_p", "top_h", "epsilon_cutoff", "eta_cutoff", "repetition_penalty", "length_penalty"),
    *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "encoder_repetition_penalty"),
    *("bad_words_ids", "num_return_sequences", "output_scores", "output_logits", "penalty_alpha"),
    *("return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values"),
    *("exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens", "use_cache"),
    *("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
    *("assistant_lookbehind", "target_lookbehind"),
)

HF_KEYS: Final[Mapping[str, Key]] = {
    "architectures": read(why="must be the family's class"),
    "model_type": read(why="must be the family's"),
    "hidden_size": read("hidden_size"),
    "num_hidden_layers": read("num_layers"),
    "num_attention_heads": read("num_heads"),
    "num_key_value_heads": read("num_kv_heads"),
    "head_dim": read("head_dim"),
    "intermediate_size": read("intermediate_size"),
    "vocab_size": read("vocab_size"),
    "max_position_embeddings": read("max_position_embeddings"),
    "rms_norm_eps": read("rms_norm_eps"),
    "rope_theta": read("rope_theta"),
    "rope_scaling": read("rope_scaling"),
    "rope_parameters": read(why="becomes rope_theta and rope_scaling"),
    "original_max_position_embeddings": read(why="part of rope_scaling"),
    "tie_word_embeddings": read("tie_word_embeddings"),
    "bos_token_id": read(why="the beginning token, where no file of the tokenizer names it"),
    "eos_token_id": read(why="where generation stops"),
    "pad_token_id": read(why="padding, where no file of the tokenizer names it"),
    "hidden_act": only("silu", "swish", why="the gate of the MLP is SiLU"),
    "attention_bias": only(False, why="this family's projections have none"),
    "mlp_bias": only(False, why="the MLP has none"),
    "layer_types": read(why="all layers must be of one kind"),
    "sliding_window": only(why="this family's attention has no window"),
    "use_sliding_window": only(False, why="this family's attention has no window"),
    "partial_rotary_factor": only(1.0, why="the whole head is rotated"),
    "rope_interleaved": only(False, why="dimension i is rotated with i + head_dim / 2"),
    "use_mrope": only(False, why="positions are one number"),
    "is_causal": only(True, why="attention is causal"),
    "is_encoder_decoder": only(False, why="a decoder alone"),
    "add_cross_attention": only(False, why="a decoder alone"),
    "cross_attention_hidden_size": only(why="a decoder alone"),
    "pruned_heads": only({}, [], why="every layer has all heads"),
    "attention_dropout": left_out("training applies no dropout", unless=(0.0,)),
    "auto_map": left_out("code of the model's repository is never run", dropped=True),
    "quantization_config": left_out("the weights are floating-point numbers", dropped=True),
    "compression_config": left_out("the weights are floating-point numbers", dropped=True),
    "initializer_range": irrelevant("of weights from scratch"),
    "pretraining_tp": irrelevant(_SPLIT),
    "chunk_size_feed_forward": irrelevant(_SPLIT),
    "is_decoder": irrelevant(_LIBRARY),
    "torch_dtype": irrelevant("each tensor states its own type"),
    "dtype": irrelevant("each tensor states its own type"),
    "transformers_version": irrelevant(_LIBRARY),
    "transformers.js_config": irrelevant(_LIBRARY),
    "unsloth_version": irrelevant("who wrote the file"),
    "unsloth_fixed": irrelevant("who wrote the file"),
    "is_llama_config": irrelevant("who wrote the file"),
    "name_or_path": irrelevant("where the file came from"),
    "max_sequence_length": irrelevant("max_position_embeddings is read"),
    "model_max_length": irrelevant("of the tokenizer; max_position_embeddings is read"),
    "tokenizer_class": irrelevant("the tokenizer's own files are read"),
    **dict.fromkeys(("return_dict", "output_hidden_states", "output_attentions"), irrelevant(_LIBRARY)),
    **dict.fromkeys(("torchscript", "use_return_dict", "use_bfloat16"), irrelevant(_LIBRARY)),
    **dict.fromkeys(
        ("tf_legacy_loss", "tie_encoder_decoder", "gradient_checkpointing"), irrelevant(_LIBRARY)
    ),
    **dict.fromkeys(("attn_implementation", "experts_implementation"), irrelevant(_LIBRARY)),
    **dict.fromkeys(("id2label", "label2id", "num_labels", "problem_type"), irrelevant(_TASK)),
    **dict.fromkeys(("finetuning_task", "task_specific_params", "prefix"), irrelevant(_TASK)),
    **dict.fromkeys(("sep_token_id", "decoder_start_token_id"), irrelevant("of encoder-decoders")),
    **dict.fromkeys(_SAMPLING, irrelevant(_GENERATION)),
}
"""Keys of every family; a key that begins with an underscore is the writing library's own."""

WINDOW_KEYS: Final[Mapping[str, Key]] = {
    "use_sliding_window": only(False, why="layers without a window are what is computed"),
    "sliding_window": irrelevant("not used without use_sliding_window"),
    "max_window_layers": irrelevant("not used without use_sliding_window"),
}
"""Qwen's keys of a window that is off."""

GEMMA_KEYS: Final[Mapping[str, Key]] = {
    "hidden_activation": only("gelu_pytorch_tanh", why="the gate of the MLP is GELU by its tanh formula"),
    "hidden_act": irrelevant("hidden_activation is read"),
    "query_pre_attn_scalar": read("query_pre_attn_scalar"),
    "sliding_window": read("sliding_window"),
    "layer_types": read("layer_types"),
    "final_logit_softcapping": read("final_logit_softcapping"),
    "use_bidirectional_attention": only(False, why="attention is causal"),
    "cache_implementation": irrelevant(_GENERATION),
}
"""Keys of Gemma 2 and 3."""
