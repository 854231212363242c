"""The same model trained by others: what ``bench_train`` and ``bench_quick`` measure, one step at a time.

Every contender has the same weights, tokens, AdamW and clipping; ours is in ``train_ours``. ``transformers``
is a plain PyTorch loop over the same model of that library, without the cache for generation; ``Trainer`` is
that library's own loop, which waits between its steps; litgpt is a plain loop over litgpt's model and its
chunked loss. litgpt 0.5.13 pins other versions than ``constraints.txt`` has; it runs with those beside it in
an environment of its own, as ``pip install --no-deps litgpt; pip install lightning`` make it.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.profiler import ProfilerActivity, profile
from train_turns import Channel, Step

from apr_dist.apr.layout import DType
from apr_dist.apr.metadata import AprMetadata
from apr_dist.interop.hf_config import config_from_metadata
from apr_dist.model.config import TransformerConfig

LR, WEIGHT_DECAY, BETAS, EPS, GRAD_CLIP = 1e-4, 0.01, (0.9, 0.999), 1e-8, 1.0

Batches = Callable[[], torch.Tensor]
"""Gives the next tokens ``[batch, seq + 1]``, on the device; every contender has its own, of one seed."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all contenders share."""

    config: TransformerConfig
    batch: int
    seq: int
    dtype: torch.dtype
    device: torch.device
    compiled: bool = False

    def batches(self) -> Batches:
        """Random tokens, the same for each caller."""
        generator = torch.Generator().manual_seed(0)

        def draw() -> torch.Tensor:
            shape = (self.batch, self.seq + 1)
            return torch.randint(self.config.vocab_size, shape, generator=generator).to(self.device)

        return draw

    def autocast(self) -> torch.autocast:
        """bf16 products over f32 weights, where that is the type."""
        narrow = self.dtype is torch.bfloat16
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=narrow)

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class Loop:
    """A plain training loop over a model and its mean loss."""

    def __init__(
        self,
        setting: Setting,
        model: torch.nn.Module,
        loss: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        self.model, self._setting, self._loss, self._tokens = model, setting, loss, setting.batches()
        weights = list(model.parameters())
        groups = [  # Trainer decays no vector either
            {"params": [weight for weight in weights if weight.dim() >= 2], "weight_decay": WEIGHT_DECAY},
            {"params": [weight for weight in weights if weight.dim() < 2], "weight_decay": 0.0},
        ]
        self._optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS, fused=True)

    def step(self) -> Step:
        """One optimizer step."""
        tokens = self._tokens()
        self._setting.synchronize()
        began = time.perf_counter()
        loss = self._forward_backward(tokens)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), GRAD_CLIP)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._setting.synchronize()
        return Step(time.perf_counter() - began, float(loss))

    def activation_bytes(self) -> int:
        """Peak of live bytes in one forward and backward, beyond weights, gradients and optimizer state."""
        tokens = self._tokens()
        peak = activation_peak(lambda: self._forward_backward(tokens), self._setting.device)
        self._optimizer.zero_grad(set_to_none=True)
        return peak

    def product_rate(self) -> float:
        """Operations a second of one large product by PyTorch, in the type of the setting."""
        return product_rate(torch.mm, self._setting)

    def _forward_backward(self, tokens: torch.Tensor) -> torch.Tensor:
        with self._setting.autocast():
            loss = self._loss(tokens)
        loss.backward()
        return loss.detach()


def plain_loop(setting: Setting, state: dict[str, torch.Tensor]) -> Loop:
    """A plain PyTorch loop over the model of ``transformers``."""
    model = hugging_face_model(setting.config, state).to(setting.device)
    called = torch.compile(model) if setting.compiled else model
    return Loop(setting, model, lambda tokens: called(**_inputs(tokens)).loss)


def litgpt_loop(setting: Setting, state: dict[str, torch.Tensor]) -> Loop:
    """A plain PyTorch loop over litgpt's model with these weights, and its chunked loss.

    Raises:
        ImportError: litgpt is not installed.
    """
    from litgpt.config import Config  # noqa: PLC0415  (an optional contender)
    from litgpt.model import GPT  # noqa: PLC0415
    from litgpt.utils import chunked_cross_entropy  # noqa: PLC0415

    config = setting.config
    model = GPT(
        Config(
            block_size=setting.seq,
            padded_vocab_size=config.vocab_size,
            vocab_size=config.vocab_size,
            n_layer=config.num_layers,
            n_head=config.num_heads,
            n_query_groups=config.num_kv_heads,
            n_embd=config.hidden_size,
            head_size=config.head_dim,
            intermediate_size=config.intermediate_size,
            rotary_percentage=1.0,
            rope_base=config.rope_theta,
            norm_eps=config.rms_norm_eps,
            parallel_residual=False,
            bias=False,
            attn_bias=config.qkv_bias,
            norm_class_name="RMSNorm",
            mlp_class_name="LLaMAMLP",
        )
    )
    if config.tie_word_embeddings:
        model.lm_head.weight = model.transformer.wte.weight
    model.load_state_dict(_litgpt_state(config, state))
    model.to(setting.device)
    called = torch.compile(model) if setting.compiled else model

    def loss(tokens: torch.Tensor) -> torch.Tensor:
        logits = called(tokens[:, :-1]).float()  # as Lightning's mixed precision hands them on
        return chunked_cross_entropy(logits, tokens[:, 1:].contiguous())  # type: ignore[no-any-return]

    return Loop(setting, model, loss)


def _litgpt_state(config: TransformerConfig, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors under litgpt's names; q, k and v are one matrix there."""
    embedding = state["model.embed_tokens.weight"]
    renamed = {
        "transformer.wte.weight": embedding,
        "transformer.ln_f.weight": state["model.norm.weight"],
        "lm_head.weight": embedding if config.tie_word_embeddings else state["lm_head.weight"],
    }
    names = {
        "norm_1": "input_layernorm",
        "norm_2": "post_attention_layernorm",
        "attn.proj": "self_attn.o_proj",
        "mlp.fc_1": "mlp.gate_proj",
        "mlp.fc_2": "mlp.up_proj",
        "mlp.proj": "mlp.down_proj",
    }
    for layer in range(config.num_layers):
        there, here = f"transformer.h.{layer}.", f"model.layers.{layer}."
        renamed |= {f"{there}{one}.weight": state[f"{here}{other}.weight"] for one, other in names.items()}
        for kind in ("weight", "bias") if config.qkv_bias else ("weight",):
            parts = [state[f"{here}self_attn.{name}_proj.{kind}"] for name in ("q", "k", "v")]
            renamed[f"{there}attn.qkv.{kind}"] = torch.cat(parts)
    return renamed


class TrainerLoop:
    """``transformers.Trainer``, which waits before every step until it is told to go on."""

    def __init__(self, setting: Setting, state: dict[str, torch.Tensor]) -> None:
        arguments = transformers.TrainingArguments(
            output_dir=tempfile.mkdtemp(prefix="trainer-"),
            per_device_train_batch_size=setting.batch,
            max_steps=1_000_000,
            learning_rate=LR,
            weight_decay=WEIGHT_DECAY,
            max_grad_norm=GRAD_CLIP,
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            bf16=setting.dtype is torch.bfloat16,
            use_cpu=setting.device.type == "cpu",
            torch_compile=setting.compiled,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            remove_unused_columns=False,
            disable_tqdm=True,
        )
        if arguments.n_gpu > 1:
            print(
                f"{arguments.n_gpu} GPUs are visible: Trainer is held to one, else it would be DataParallel"
            )
            arguments._n_gpu = 1
        self._setting, self._rows = setting, _Rows(setting)
        self._model, self._arguments = hugging_face_model(setting.config, state), arguments

    def serve(self, channel: Channel) -> None:
        """Train as long as steps are asked for; the batch is collated within a step, and no loss is told."""
        turns = _Turns(self._setting, self._rows, channel)
        trainer = transformers.Trainer(
            model=self._model, args=self._arguments, train_dataset=self._rows, callbacks=[turns]
        )
        trainer.train()


class _Turns(transformers.TrainerCallback):  # type: ignore[misc]
    def __init__(self, setting: Setting, rows: _Rows, channel: Channel) -> None:
        self._setting, self._rows, self._channel = setting, rows, channel
        self._began = 0.0

    def on_train_begin(self, _args: Any, _state: Any, control: Any, **_: Any) -> None:
        self._channel.reply()
        self._wait(control)

    def on_step_end(self, _args: Any, _state: Any, control: Any, **_: Any) -> None:
        self._setting.synchronize()
        self._channel.reply(seconds=time.perf_counter() - self._began)
        self._wait(control)

    def _wait(self, control: Any) -> None:
        if not self._channel.command():
            control.should_training_stop = True
        self._rows.draw_ahead()
        self._setting.synchronize()
        self._began = time.perf_counter()


class _Rows(torch.utils.data.IterableDataset[dict[str, torch.Tensor]]):
    """Sequence after sequence, drawn between the steps."""

    def __init__(self, setting: Setting) -> None:
        self._draw, self._batch = setting.batches(), setting.batch
        self._drawn: deque[torch.Tensor] = deque()

    def draw_ahead(self) -> None:
        """Have at hand what a step may take: its batch, and the next one, which Accelerate fetches early."""
        while len(self._drawn) < 2 * self._batch:
            self._drawn.extend(self._draw().cpu())

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        while True:
            self.draw_ahead()
            for _ in range(2 * self._batch):
                yield _inputs(self._drawn.popleft())


def hugging_face_model(config: TransformerConfig, state: dict[str, torch.Tensor]) -> Any:
    """The model of the same family in ``transformers``, with these weights and no others.

    Its configuration is the one an export of ours would have.
    """
    tied = config.tie_word_embeddings
    metadata = AprMetadata.from_mapping(config.to_metadata())
    values = config_from_metadata(metadata, config, dtype=DType.F32, token_ids={}, where=Path("memory"))
    settings = transformers.AutoConfig.for_model(**values)
    settings.use_cache = False  # or every layer would copy its keys and values, for nothing
    model = transformers.AutoModelForCausalLM.from_config(settings)
    found = model.load_state_dict({name: value.cpu() for name, value in state.items()}, strict=False)
    if found.unexpected_keys or found.missing_keys != (["lm_head.weight"] if tied else []):
        raise RuntimeError(f"{type(model).__name__} has other weights: {found}")
    model.tie_weights()
    return model


def _inputs(tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    targets = tokens[..., 1:].contiguous()
    return {"input_ids": tokens[..., :-1].contiguous(), "labels": targets, "shift_labels": targets}


def product_rate(multiply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], setting: Setting) -> float:
    """Operations a second of ``multiply`` with square matrices; the median of nine."""
    size = 8192 if setting.device.type == "cuda" else 2048
    left, right = (torch.randn(size, size, dtype=setting.dtype, device=setting.device) for _ in range(2))
    seconds = []
    for _ in range(11):
        setting.synchronize()
        began = time.perf_counter()
        multiply(left, right)
        setting.synchronize()
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / statistics.median(seconds[2:])


def activation_peak(compute: Callable[[], Any], device: torch.device) -> int:
    """Peak of live bytes in a forward and backward, beyond what is live when its gradients exist."""
    compute()
    if device.type != "cuda":
        return _peak_on_cpu(compute)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    compute()
    return torch.cuda.max_memory_allocated() - before


def _peak_on_cpu(compute: Callable[[], Any]) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        compute()
    live = peak = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak
