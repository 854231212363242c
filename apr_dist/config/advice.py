"""What a key or flag that does not exist was meant to be: renamed, known to other trainers, or mistyped.

The YAML file and the command line ask the same tables. A flag that destroys something is never proposed.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import SequenceMatcher
from typing import Any

from apr_dist.config.schema import RENAMED, TrainConfig, flag_of, leaves

_MEANT: Mapping[str, str] = {
    "lr": "learning_rate",
    "init": "model_name_or_path model_path pretrained base_model init_from",
    "dataset": "data train_data train_dataset train_file dataset_path data_dir data_path",
    "val_dataset": "eval_dataset eval_data validation_file val_data",
    "tokenizer": "tokenizer_name tokenizer_path tokenizer_name_or_path",
    "run_dir": "output_dir out_dir save_dir output checkpoint_dir logging_dir",
    "resume": "resume_from_checkpoint resume_from load_checkpoint continue",
    "num_steps": "max_steps steps train_steps max_train_steps num_train_steps total_steps",
    "eval_every": "eval_steps eval_interval evaluation_steps val_check_interval",
    "save_every": "save_steps save_interval checkpoint_every checkpoint_interval",
    "log_every": "logging_steps log_interval log_steps",
    "batch_size": "global_batch_size train_batch_size total_batch_size",
    "micro_batch_size": "per_device_train_batch_size per_device_batch_size device_batch_size micro_batch",
    "seq_length": "max_seq_length max_seq_len seq_len sequence_length max_length context_length block_size",
    "warmup_steps": "warmup num_warmup_steps lr_warmup_steps",
    "adapter.kind lora": "lora qlora peft use_lora use_peft",
    "adapter.kind dora": "use_dora",
    "adapter.kind rslora": "use_rslora",
    "adapter.rank": "lora_r lora_rank",
    "adapter.alpha": "lora_alpha",
    "adapter.dropout": "lora_dropout",
    "adapter.targets": "target_modules lora_target_modules lora_target",
    "adapter.base.bits 4": "load_in_4bit",
    "adapter.base.bits 8": "load_in_8bit",
    "track": "report_to log_with logger tracker",
    "optimizer.beta1": "adam_beta1",
    "optimizer.beta2": "adam_beta2",
    "optimizer.eps": "adam_epsilon adam_eps epsilon",
    "optimizer.grad_clip": "max_grad_norm gradient_clipping clip_grad_norm gradient_clip_val",
    "optimizer.schedule": "lr_scheduler_type lr_scheduler scheduler",
    "optimizer.lr_min_ratio": "min_lr_ratio min_lr lr_min",
    "early_stop.patience": "early_stopping_patience",
    "evaluation.micro_batch_size": "per_device_eval_batch_size eval_batch_size",
    "evaluation.max_sequences": "max_eval_samples eval_iters",
    "checkpoint.keep_last": "save_total_limit keep_checkpoints",
    "parallel.precision": "mixed_precision dtype torch_dtype",
    "parallel.strategy": "sharding_strategy distributed_type",
    "parallel.timeout_s": "ddp_timeout",
    "parallel.precision bf16": "bf16 bfloat16",
    "parallel.precision f32": "fp32 float32",
    "parallel.strategy ddp": "ddp data_parallel",
    "parallel.strategy fsdp2": "fsdp use_fsdp",
    "parallel.strategy zero2": "deepspeed use_deepspeed",
    "parallel.offload optimizer": "cpu_offload offload_optimizer",
    "device cpu": "cpu use_cpu no_cuda",
    "device cuda": "cuda gpu use_cuda",
    "compute.activation_checkpointing full": "gradient_checkpointing recompute",
    "compute.compile block": "torch_compile use_compile",
    "track wandb": "wandb use_wandb",
    "track tensorboard": "tensorboard",
    "progress quiet": "quiet silent disable_tqdm",
}
"""Our key, with its value where that is meant too, to what other trainers call it."""

_ABSENT: Mapping[str, str] = {
    "f16 is not supported; for less memory use parallel.precision bf16": "fp16 float16 half",
    "the launcher starts the processes, accelerate launch --num_processes N apr_dist/train.py": (
        "gpus num_gpus n_gpus devices num_processes nproc_per_node world_size nodes num_nodes nnodes gpu_ids"
    ),
    "a run is counted in steps, num_steps; apr-dist plan shows how many passes over the data that is": (
        "epochs num_epochs num_train_epochs max_epochs"
    ),
    "accumulation follows from batch_size, micro_batch_size and the number of processes": (
        "gradient_accumulation_steps grad_accum accumulation_steps accumulate_grad_batches"
    ),
    "warm-up is counted in steps: warmup_steps": "warmup_ratio",
    "AdamW is the only optimizer; apr-dist config show lists its keys": "optim optimizer optimizer_type",
    "beside an adapter the frozen weights may have few bits: adapter.base.bits 8 or 4": "quantization",
    "nothing is uploaded; apr-dist export writes a folder that can be": "push_to_hub hub_model_id hub_token",
    "sequences are always packed; loader.documents isolate keeps attention inside a document": (
        "packing pack sample_packing"
    ),
    "a run writes into a new or empty folder: choose another run_dir": "overwrite_output_dir force",
    "a run trains, evaluates and saves by itself; eval_every and save_every say how often": (
        "do_train do_eval eval_strategy evaluation_strategy save_strategy logging_strategy"
    ),
    "no code of a model is ever run": "trust_remote_code",
}
"""What there is instead, to what other trainers have and this one has not."""

_FAMILIES = frozenset({"lora", "qlora", "peft", "wandb", "fsdp", "deepspeed"})
"""First words that alone say what is meant."""

_DESTRUCTIVE = frozenset({"overwrite"})
_LEAST_RATIO = 0.75


def advice(word: str, *, is_flag: bool) -> str | None:
    """What to do about a key or flag that does not exist, to follow "remedy"; None where nothing is like it.

    Args:
        word: a dotted key, or a flag without its dashes.
        is_flag: whether to name flags instead of keys.
    """
    key = word.replace("-", "_").lower()
    last = key.rpartition(".")[2]
    if key in RENAMED:
        return f"it is now called {_named(RENAMED[key], is_flag=is_flag)}"
    family = last.partition("_")[0]
    for asked in (key, last, *({family} & _FAMILIES)):
        if asked in _OTHERS:
            return _answer(asked, is_flag=is_flag)
    known = [name for name, _ in leaves(TrainConfig) if name not in _DESTRUCTIVE]
    known += ["config", "debug"] if is_flag else []
    # A key in the wrong group is as common as a mistyped one: its last part then matches exactly.
    likeness = {name: max(_ratio(key, name), _ratio(last, name.rpartition(".")[2])) for name in known}
    likeness |= {name: _ratio(last, name) for name in _OTHERS}
    best = max(likeness, key=lambda name: likeness[name])
    if likeness[best] < _LEAST_RATIO:
        return None
    return _answer(best, is_flag=is_flag)


def renamed(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A saved configuration as this version calls its keys."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        last = RENAMED.get(key, key).rpartition(".")[2]
        found[last] = renamed(value, f"{key}.") if isinstance(value, dict) else value
        if key == "resume_allow":
            found[last] = ",".join(RENAMED.get(one.strip(), one) for one in str(value).split(","))
    return found


def _answer(other: str, *, is_flag: bool) -> str:
    instead = _OTHERS.get(other, other)
    return instead if instead in _ABSENT else f"use {_named(instead, is_flag=is_flag)}"


def _named(target: str, *, is_flag: bool) -> str:
    """A key, or a key and its value after a space, as a flag or as a line of a file."""
    key, _, value = target.partition(" ")
    return f"{flag_of(key)} {value}".strip() if is_flag else f"{key}: {value}" if value else key


def _ratio(left: str, right: str) -> float:
    return SequenceMatcher(None, left, right).ratio()


_OTHERS = {
    name: ours for table in (_MEANT, _ABSENT) for ours, names in table.items() for name in names.split()
}
