"""Prompts of a file, answered by the weights being trained.

Every rank takes part in every token, as in a forward of training: no rank ever needs more of the weights
than a forward gathers, whatever the strategy. Rank 0's choice of a token is everybody's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn

from apr_dist.apr.layout import TOKENIZER_TEXT
from apr_dist.apr.metadata import AprMetadata
from apr_dist.corpus.chat_encoding import encode_prompt
from apr_dist.corpus.prompts import Prompt, read_prompts
from apr_dist.errors import TokenizerError, UsageError
from apr_dist.interop.chat import ModelChat, chat_of
from apr_dist.model.generation import Sampling, stream
from apr_dist.model.transformer import Decoder
from apr_dist.parallel.heartbeat import HERE
from apr_dist.parallel.runtime import Runtime
from apr_dist.parallel.sharding import reshard


@dataclass(frozen=True)
class Questions:
    """Prompts as every rank needs them.

    Attributes:
        texts: what is shown of each.
        ids: tokens of each.
        stop_ids: tokens that end an answer.
        answer_tokens: longest answer.
        tokenizer: makes text of answers; on rank 0 alone.
    """

    texts: list[str]
    ids: list[list[int]]
    stop_ids: frozenset[int]
    answer_tokens: int
    tokenizer: Tokenizer | None


def open_questions(
    path: Path, metadata: AprMetadata | None, *, answer_tokens: int, positions: int, runtime: Runtime
) -> Questions:
    """Read a file of prompts, with the chat template where the model has one; a collective.

    Args:
        path: the file; rank 0 reads it.
        metadata: of the model with its tokenizer inside; on rank 0.
        answer_tokens: longest answer.
        positions: of the model.
        runtime: this rank's view of the processes.

    Raises:
        CorpusError, TokenizerError: on every rank: the file, the tokenizer or the template cannot be used.
        UsageError: a prompt leaves no room for an answer.
    """
    opened: list[Tokenizer] = []

    def read() -> dict[str, Any]:
        chat = _chat(metadata, path)
        opened.append(Tokenizer.from_str(chat.tokenizer_json.decode()))
        prompts = read_prompts(path)
        ids = [_ids(one, chat, opened[0], path) for one in prompts]
        longest = max(map(len, ids))
        if longest + answer_tokens > positions:
            raise UsageError(
                f"a prompt has {longest:,} tokens and its answer may have {answer_tokens:,}",
                where=path,
                expected=f"at most {positions:,} together, the model's positions",
                remedy="shorten the prompt or lower --evaluation.answer-tokens",
            )
        stops = (
            chat.end_ids if chat.template is None else chat.template.stop_ids(chat.tokenizer) | chat.end_ids
        )
        return {"texts": [one.text for one in prompts], "ids": ids, "stops": sorted(stops)}

    facts = runtime.on_main(read)
    return Questions(
        texts=facts["texts"],
        ids=facts["ids"],
        stop_ids=frozenset(facts["stops"]),
        answer_tokens=answer_tokens,
        tokenizer=opened[0] if opened else None,
    )


def answer_all(
    questions: Questions,
    decoder: Decoder,
    network: nn.Module,
    runtime: Runtime,
    *,
    stop: Callable[[], bool],
) -> dict[str, Any]:
    """Answer every prompt with the likeliest tokens; a collective that changes no weight.

    Args:
        questions: the prompts.
        decoder: the decoder that is trained.
        network: what a forward goes through on this strategy.
        runtime: this rank's view of the processes.
        stop: asked by all ranks together before each prompt whether to leave the rest unanswered.

    Returns:
        a line of metrics: prompts with their answers (the answers on rank 0), and the time they took.
    """
    began, found = time.perf_counter(), []
    sampling = Sampling(max_new_tokens=questions.answer_tokens, stop_ids=questions.stop_ids)

    def agree(token: int) -> int:
        HERE.moved()
        chosen = torch.tensor([token], device=runtime.device)
        runtime.broadcast(chosen)
        return int(chosen)

    was_training = decoder.training
    network.eval()
    try:
        with runtime.accelerator.autocast():
            for text, ids in zip(questions.texts, questions.ids, strict=True):
                if stop():
                    break
                made = list(stream(decoder, ids, sampling, network=network, agree=agree))
                found.append({"prompt": text, **_answer(made, questions)})
    finally:
        network.train(was_training)
        reshard(decoder)  # FSDP2 may keep parameters gathered after a forward that no backward follows
    return {"answers": found, "wall_ms": (time.perf_counter() - began) * 1e3}


def _answer(made: list[int], questions: Questions) -> dict[str, Any]:
    ended = bool(made) and made[-1] in questions.stop_ids
    said = made[:-1] if ended else made
    text = "" if questions.tokenizer is None else questions.tokenizer.decode(said, skip_special_tokens=True)
    return {"answer": text, "tokens": len(made), "ended": ended}


def _chat(metadata: AprMetadata | None, path: Path) -> ModelChat:
    if metadata is None or not isinstance(metadata.custom.get(TOKENIZER_TEXT), str):
        raise TokenizerError(
            "prompts are to be answered and the model has no tokenizer inside",
            where=path,
            expected="the tokenizer that the shards were encoded with",
            remedy="pass --tokenizer FOLDER, or leave --evaluation.prompts out",
        )
    return chat_of(metadata, path, None)


def _ids(prompt: Prompt, chat: ModelChat, tokenizer: Tokenizer, path: Path) -> list[int]:
    if chat.template is None and prompt.messages is None:
        return list(tokenizer.encode(prompt.text).ids)
    messages = prompt.messages or ({"role": "user", "content": prompt.text},)
    return [int(one) for one in encode_prompt(messages, chat.needed(path), chat.tokenizer)]
