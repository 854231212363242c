"""Fine-tuning on conversations next to ``trl.SFTTrainer``: one loss on the same rows, and what packing saves.

    python benchmarks/bench_chat.py --model MODEL.apr --corpus chats.jsonl

Both start from the same weights in f32 and take the same conversations in the same order without packing, one
micro-batch a step, with the loss of assistant turns alone; the loss of each step is compared. TRL gets the
model's template with ``{% generation %}`` around what the assistant says, by which it knows the targets; that
template is compared with the model's own, text by text. Encoding is timed on both sides in processor seconds,
and the rows that packing needs are counted next to those without. Needs the package ``trl``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from apr_dist.apr.reader import AprReader
from apr_dist.cli import main as apr_dist
from apr_dist.data.loader import TokenLoader
from apr_dist.data.manifest import Manifest
from apr_dist.gates.model_file import prove_model
from apr_dist.interop.chat import read_chat
from apr_dist.interop.hf_export import export_huggingface
from apr_dist.training.library import without_gates
from apr_dist.training.run_data import RunData
from apr_dist.training.session import Session

ALLOWED = 1e-4
LR = 1e-4


def main() -> None:
    """Print three tables; exit non-zero where a loss differs by more than allowed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="APR file of an instruct model")
    parser.add_argument("--corpus", type=Path, required=True, help="JSON lines with messages")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--conversations", type=int, default=1000, help="how many are encoded and packed")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(given, Path(folder))
        bench.compare_losses()
        bench.compare_encoding()
        bench.count_rows()
    raise SystemExit(bench.failed)


class Bench:
    """The model, the conversations and the folder that both sides work in."""

    def __init__(self, given: argparse.Namespace, folder: Path) -> None:
        self.given, self.folder, self.failed = given, folder, 0
        chat = read_chat(given.model)
        self.template = chat.needed(given.model)
        self.needed = given.steps * given.batch_size
        records = [json.loads(line) for line in islice(_lines(given.corpus), given.conversations)]
        self.records = [{"messages": one["messages"]} for one in records if _has_answer(one)]
        export_huggingface(given.model, folder / "hf")

    # --- losses -------------------------------------------------------------------------------------

    def compare_losses(self) -> None:
        """Step by step."""
        ours, theirs = self._our_losses(), self._their_losses()
        rows = [
            [str(step), f"{one:.6f}", f"{other:.6f}", f"{abs(one - other):.1e}"]
            for step, (one, other) in enumerate(zip(ours, theirs, strict=True), start=1)
        ]
        print_table(["step", "apr-dist", "trl.SFTTrainer", "difference"], rows)
        worst = max(abs(one - other) for one, other in zip(ours, theirs, strict=True))
        self.failed = int(worst > ALLOWED)
        print(f"largest difference {worst:.1e}, allowed {ALLOWED:.0e}\n")

    def _our_losses(self) -> list[float]:
        given = self.given
        rows = self._encode(self.needed, "--no-pack")
        with AprReader(given.model) as reader:
            config = prove_model(reader, read_values=False, with_digest=False).config
            opened = without_gates(
                config,
                reader=reader,
                init=str(given.model),
                device="cpu",
                seq_length=given.seq_length,
                batch_size=given.batch_size,
                num_steps=given.steps,
                lr=LR,
                warmup_steps=0,
                optimizer={"schedule": "constant", "weight_decay": 0.0},
                parallel={"precision": "f32", "strategy": "single"},
            )
            with Session(*opened) as session:
                train = TokenLoader(
                    rows,
                    seq_length=given.seq_length,
                    global_batch=given.batch_size,
                    micro_batch=given.batch_size,
                    seed=0,
                    shuffle="none",
                )
                session.data = RunData(train=train, held_out=None)
                session.stepper = session.make_stepper(session.engine, session.make_feed())
                for step in range(given.steps):
                    session.stepper.take(step, compare=False, more=False)
                return [taken.train_loss for taken in session.stepper.read()]

    def _their_losses(self) -> list[float]:
        from torch.utils.data import SequentialSampler  # noqa: PLC0415
        from transformers import AutoModelForCausalLM  # noqa: PLC0415
        from trl import SFTConfig, SFTTrainer  # noqa: PLC0415

        losses: list[float] = []

        class Recorded(SFTTrainer):
            def _get_train_sampler(self, *_: Any) -> Any:
                return SequentialSampler(self.train_dataset)

            def compute_loss(self, *positional: Any, **named: Any) -> Any:
                found = super().compute_loss(*positional, **named)
                losses.append(float((found[0] if isinstance(found, tuple) else found).detach()))
                return found

        given = self.given
        settings = SFTConfig(
            output_dir=str(self.folder / "trl"),
            per_device_train_batch_size=given.batch_size,
            gradient_accumulation_steps=1,
            max_steps=given.steps,
            learning_rate=LR,
            lr_scheduler_type="constant",
            optim="adamw_torch",
            weight_decay=0.0,
            max_grad_norm=1.0,
            max_length=given.seq_length,
            assistant_only_loss=True,
            packing=False,
            gradient_checkpointing=False,
            use_cpu=True,
            bf16=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_strategy="no",
        )
        model = AutoModelForCausalLM.from_pretrained(self.folder / "hf", dtype=torch.float32)
        Recorded(
            model=model,
            args=settings,
            train_dataset=self._their_rows(),
            processing_class=self._their_tokenizer(),
        ).train()
        return losses

    def _their_rows(self) -> Any:
        from datasets import Dataset  # noqa: PLC0415

        return Dataset.from_list(self._fitting()[: self.needed])

    def _their_tokenizer(self) -> Any:
        from transformers import AutoTokenizer  # noqa: PLC0415

        tokenizer = AutoTokenizer.from_pretrained(self.folder / "hf")
        marked = _marked(self.template.text)
        for record in self.records[:50]:
            texts = [
                tokenizer.apply_chat_template(record["messages"], chat_template=one, tokenize=False)
                for one in (self.template.text, marked)
            ]
            if texts[0] != texts[1]:
                raise SystemExit("the marked template renders another text than the model's own")
        tokenizer.chat_template = marked
        return tokenizer

    # --- encoding and packing -----------------------------------------------------------------------

    def compare_encoding(self) -> None:
        """Tokens a second of both, rendering included."""
        began = time.process_time()
        rows = self._encode(len(self.records))
        ours = time.process_time() - began
        tokenizer = self._their_tokenizer()
        began = time.process_time()
        tokens = 0
        for record in self.records:
            made = tokenizer.apply_chat_template(
                record["messages"], return_dict=True, return_assistant_tokens_mask=True
            )
            tokens += len(made["input_ids"])
        theirs = time.process_time() - began
        assert rows.conversations is not None
        table = [
            ["apr-dist tokenize encode-chat, rows written", f"{tokens / ours:,.0f}", f"{ours:.1f}"],
            ["apply_chat_template with masks, nothing written", f"{tokens / theirs:,.0f}", f"{theirs:.1f}"],
        ]
        print_table([f"encoding {len(self.records):,} conversations", "tokens/s", "seconds"], table)
        print()

    def count_rows(self) -> None:
        """Rows, and so steps, of one pass with packing and without."""
        table = []
        for name, more in (("packed", ()), ("one conversation a row", ("--no-pack",))):
            rows = self._encode(len(self.records), *more).conversations
            assert rows is not None
            steps = -(-rows.rows // self.given.batch_size)
            table.append([name, f"{rows.rows:,}", f"{rows.fill:.1%}", f"{steps:,}"])
        print_table([f"rows of {self.given.seq_length}", "rows", "full", "steps a pass"], table)

    def _encode(self, count: int, *more: str) -> Manifest:
        records = self.records if count >= len(self.records) else self._fitting()[:count]
        corpus, output = self.folder / "chats.jsonl", self.folder / "rows"
        corpus.write_text("".join(json.dumps(one) + "\n" for one in records))
        given = ["tokenize", "encode-chat", "--corpus", str(corpus), "--model", str(self.given.model)]
        given += ["--output", str(output), "--seq-length", str(self.given.seq_length), "--force", *more]
        if apr_dist(given) != 0:
            raise SystemExit("encode-chat failed")
        return Manifest.load(output)

    def _fitting(self) -> list[dict[str, Any]]:
        """Conversations of which an answer begins well within a row, so that both sides keep each."""
        limit = 2 * self.given.seq_length  # characters: at most half of a row, at four a token
        return [one for one in self.records if len(one["messages"][0]["content"]) < limit]


def print_table(head: list[str], rows: list[list[str]]) -> None:
    """Columns as wide as their longest entry, numbers to the right."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    for row in (head, *rows):
        first, *rest = zip(row, widths, strict=True)
        print("  ".join([first[0].ljust(first[1]), *(text.rjust(width) for text, width in rest)]))


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        yield from file


def _has_answer(record: dict[str, Any]) -> bool:
    return any(message["role"] == "assistant" for message in record["messages"])


def _marked(template: str) -> str:
    """SmolLM2's template with marks around what the assistant says; of ChatML's kind any will do."""
    written = "'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'"
    if written not in template:
        raise SystemExit("this benchmark knows how to mark templates like SmolLM2's")
    before = "{{'<|im_start|>' + message['role'] + '\n'}}"
    said = "{{message['content'] + '<|im_end|>'}}"
    marked = (
        f"{before}{{% if message['role'] == 'assistant' %}}{{% generation %}}{said}{{% endgeneration %}}"
        f"{{% else %}}{said}{{% endif %}}{{{{'\n'}}}}"
    )
    start = template.index(written)
    opened, closed = template.rindex("{{", 0, start), template.index("}}", start) + 2
    return template[:opened] + marked + template[closed:]


if __name__ == "__main__":
    main()
