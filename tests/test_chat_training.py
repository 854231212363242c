"""Training on conversations: each alone, targets alone, and one mean whatever the split of a global batch."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from builders.chat_rows import END, Turns, build_rows, made_up
from builders.kernels import KernelCase
from builders.models import tiny_config, tiny_decoder
from builders.runs import metrics, run_here
from builders.several import HAS_COMPILER
from builders.warm_ranks import WarmRanks
from torch.nn.functional import cross_entropy

from apr_dist.data.loader import TokenLoader
from apr_dist.data.manifest import Manifest
from apr_dist.gates.preflight import model_from_name
from apr_dist.model.families import Family
from apr_dist.model.transformer import Decoder, init_weights
from apr_dist.training.evaluation import split_sequences

if TYPE_CHECKING:
    from builders.runs import Inputs

T, V = 48, 96
needs_compiler = pytest.mark.skipif(
    not HAS_COMPILER, reason="DeepSpeed builds its CPU modules with a C++ compiler, and there is none"
)


def alone(model: Decoder, turns: Turns) -> torch.Tensor:
    """Summed loss of one conversation by itself, from the logits, with what is not a target left out."""
    ids = torch.from_numpy(turns.ids.astype(np.int64))[None].to(model.model.embed_tokens.weight.device)
    logits = model(ids)
    assert isinstance(logits, torch.Tensor)
    losses = cross_entropy(logits[0, :-1].double(), ids[0, 1:], reduction="none")
    return losses[torch.from_numpy(turns.is_target[1:])].sum()


def gradients(model: Decoder, loss: torch.Tensor) -> list[torch.Tensor]:
    return [one.double().cpu() for one in torch.autograd.grad(loss, list(model.parameters()))]


@pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-037")
@pytest.mark.parametrize("window", [None, 5])
def test_a_packed_row_costs_what_its_conversations_cost_alone(
    kernels: KernelCase, tmp_path: Path, window: int | None
) -> None:
    turns = made_up(60, vocab_size=V, longest=T, seed=4)
    manifest = build_rows(tmp_path / "rows", turns, T, vocab_size=V)
    config = tiny_config(Family.MISTRAL if window else Family.QWEN2)
    config = replace(config, vocab_size=V, sliding_window=window)
    model = kernels.put(tiny_decoder(config, seed=1))
    raw = torch.cat(TokenLoader(manifest, seq_length=T, global_batch=manifest.sequences(T), micro_batch=1,
                                seed=0, shuffle="none").batch(0))  # fmt: skip
    for row in raw:
        batch = split_sequences(row[None], kernels.device, flagged=True)
        loss, targets = model(batch.inputs, batch.targets, document_ids=batch.document_ids)
        words = [int(word) % 2**32 for word in row[:-1].tolist()]
        members = [one for one in turns if _is_in(one, words)]
        expected = torch.stack([alone(model, one) for one in members]).sum()
        assert int(targets) == sum(int(one.is_target.sum()) for one in members)
        assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
        for found, known in zip(gradients(model, loss), gradients(model, expected), strict=True):
            assert torch.allclose(found, known, rtol=1e-4, atol=1e-5)


def _is_in(turns: Turns, words: list[int]) -> bool:
    first = int(turns.ids[0]) + 2**30 + 2**31
    rest = [int(one) + (0 if yes else 2**31) for one, yes in zip(turns.ids, turns.is_target, strict=True)][1:]
    return any(
        words[place : place + len(rest) + 1] == [first, *rest] for place in range(len(words) - len(rest))
    )


@pytest.fixture(scope="module")
def chats(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> tuple[Manifest, Manifest]:
    """Rows of real text, with as few as one target and as many as all."""
    folder, draw = tmp_path_factory.mktemp("chats"), random.Random(0)
    known, place, made = Manifest.load(inputs.train), 0, []
    ids = np.fromfile(known.path_of(known.shards[0]), dtype="<u4")
    for name, count in (("train", 260), ("validation", 90)):
        turns = []
        for _ in range(count):
            size, share = draw.randint(12, 32), draw.choice([0.1, 0.5, 1.0])
            is_target = [False] * 8 + [draw.random() < share for _ in range(size - 9)] + [True]
            piece = ids[place : place + size].copy()
            piece[-1] = END
            turns.append(Turns(piece, np.array(is_target)))
            place += size
        facts = {"split": name, "tokenizer": known.tokenizer}
        made.append(build_rows(folder / name, turns, 32, vocab_size=512, **facts))
    return made[0], made[1]


def flags(inputs: Inputs, chats: tuple[Manifest, Manifest], run_dir: Path, *more: str) -> list[str]:
    given = ["--mode", "from-scratch", "--model", str(inputs.model), "--tokenizer", str(inputs.tokenizer)]
    given += ["--run-dir", str(run_dir)]
    given += ["--dataset", str(chats[0].folder), "--val-dataset", str(chats[1].folder)]
    given += [
        "--seq-length",
        "32",
        "--batch-size",
        "8",
        "--num-steps",
        "4",
        "--eval-every",
        "4",
        "--seed",
        "5",
    ]
    given += ["--device", "cpu", "--parallel.cpu-threads", "1", "--lr", "1e-3", "--warmup-steps", "0"]
    return [*given, *more]


@pytest.fixture(scope="module")
def single(
    inputs: Inputs, chats: tuple[Manifest, Manifest], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run of one process whose global batch is one micro-batch."""
    run = tmp_path_factory.mktemp("single") / "run"
    assert run_here(*flags(inputs, chats, run, "--micro-batch-size", "8")) == 0, "it was refused"
    return run


@pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-038")
def test_the_first_loss_is_the_plain_mean_over_targets(
    inputs: Inputs, chats: tuple[Manifest, Manifest], single: Path
) -> None:
    model = tiny_decoder(model_from_name(str(inputs.model)))
    init_weights(model, seed=5)
    loader = TokenLoader(chats[0], seq_length=32, global_batch=8, micro_batch=8, seed=5)
    total, count = 0.0, 0
    with torch.no_grad():
        for words in ([word % 2**32 for word in row] for row in loader.batch(0)[0][:, :-1].tolist()):
            starts = [place for place, word in enumerate(words) if word // 2**30 % 2]
            for start, stop in zip(starts, [*starts[1:], len(words)], strict=True):
                span = np.array(words[start:stop])
                one = Turns((span % 2**30).astype(np.uint32), span // 2**31 == 0)
                if one.is_target.any():
                    total += float(alone(model, one))
                    count += int(one.is_target.sum())
    line = metrics(single)[0]
    assert line["targets"] == count
    assert line["train_loss"] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-038")
@pytest.mark.parametrize(
    ("world", "more"),
    [
        (1, ("--micro-batch-size", "1")),
        (2, ("--parallel.strategy", "ddp", "--micro-batch-size", "2")),
        (2, ("--parallel.strategy", "fsdp2", "--micro-batch-size", "1")),
        pytest.param(2, ("--parallel.strategy", "zero1", "--micro-batch-size", "4"), marks=needs_compiler),
        pytest.param(2, ("--parallel.strategy", "zero3", "--micro-batch-size", "2"), marks=needs_compiler),
    ],
)
def test_the_mean_is_over_the_targets_of_the_global_batch(
    inputs: Inputs,
    chats: tuple[Manifest, Manifest],
    single: Path,
    ranks: WarmRanks,
    tmp_path: Path,
    world: int,
    more: tuple[str, ...],
) -> None:
    ended = ranks.launch(flags(inputs, chats, tmp_path / "run", *more), world_size=world)
    assert ended.codes == (0,) * world, ended.errors
    for found, known in zip(metrics(tmp_path / "run"), metrics(single), strict=True):
        assert found["targets"] == known["targets"]
        assert found["tokens_seen"] == known["tokens_seen"]
        assert found["train_loss"] == pytest.approx(known["train_loss"], rel=1e-5)
        assert found["grad_norm"] == pytest.approx(known["grad_norm"], rel=1e-5)
    for found, known in zip(
        metrics(tmp_path / "run", "evaluation"), metrics(single, "evaluation"), strict=True
    ):
        assert found["tokens"] == known["tokens"]
        assert found["val_loss"] == pytest.approx(known["val_loss"], rel=1e-5)
    assert known["tokens"] == chats[1].conversations.targets, "evaluation counts targets alone"  # type: ignore[union-attr]


def test_seen_targets_and_speed_are_told_apart(single: Path) -> None:
    lines = metrics(single)
    assert all(0 < line["targets"] < 8 * 32 for line in lines)
    assert lines[-1]["tokens_seen"] == sum(line["targets"] for line in lines)
    for line in lines:
        assert line["tokens_per_sec"] == pytest.approx(8 * 32 / line["wall_ms"] * 1e3)
