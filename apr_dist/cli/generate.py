"""The verb that lets a model speak."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from apr_dist.choices import Device
from apr_dist.errors import UsageError

if TYPE_CHECKING:
    from apr_dist.interop.text_model import Piece, TextModel
    from apr_dist.model.generation import Sampling


def generate(
    model: Annotated[Path, tyro.conf.Positional],
    /,
    *,
    prompt: str | None = None,
    max_tokens: int | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    chat: bool = False,
    system: str | None = None,
    tokenizer: Path | None = None,
    adapter: Path | None = None,
    device: Device = Device.AUTO,
    json_output: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Let a model continue a text or answer in a chat; by default each next token is the most likely one.

    Example: apr-dist generate model.apr --prompt "def fibonacci(n):" --max-tokens 64

    Args:
        model: an APR file.
        prompt: the text to continue, or with --chat the user's message; only what follows it is printed.
            Without it, all of standard input; with --chat on a terminal, a conversation.
        max_tokens: tokens after which it ends; by default 128, or as many as the model has positions for.
        temperature: 0 takes the most likely token; above it tokens are drawn, more freely the higher it is.
        top_k: draw among the k most likely tokens only.
        top_p: draw among the most likely tokens whose probabilities first add up to p.
        seed: of the draw.
        stop: end before this text; may be given several times.
        chat: render messages with the model's chat template, and stop where a turn ends.
        system: with --chat, the system message that the conversation begins with.
        tokenizer: tokenizer folder; by default the one inside the file, else the one beside it.
        adapter: folder of an adapter to compute beside the model's weights, or checkpoint.apr of its run.
        device: auto, cpu or cuda.
        json_output: print one JSON object at the end instead of the text as it comes.
    """
    _check_flags(chat=chat, system=system, temperature=temperature, top_k=top_k, top_p=top_p)
    from apr_dist.model.generation import Sampling  # noqa: PLC0415  (imports PyTorch)

    # Checked before a model is loaded, which may take long.
    wanted = Sampling(
        max_new_tokens=1 if max_tokens is None else max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    )
    talk = chat and prompt is None and sys.stdin.isatty()
    if talk and json_output:
        raise UsageError("--json takes one message", where="--chat", remedy="give the message with --prompt")
    if not talk:
        prompt = _prompt(prompt)
    speaker = _opened(model, tokenizer, adapter, device)
    if chat:
        speaker.chat.needed(model)

    def pieces(ids: list[int]) -> Iterator[Piece]:
        sampling = replace(wanted, max_new_tokens=speaker.room(ids, max_tokens))
        return speaker.speak(ids, sampling, stop=stop, chat=chat)

    if talk:
        from apr_dist.cli.chat import converse  # noqa: PLC0415

        converse(
            lambda messages: (piece.text for piece in pieces(speaker.encode_chat(messages))), system=system
        )
        return
    ids = speaker.encode_chat(_messages(system, prompt)) if chat else speaker.encode(prompt or "")
    if not json_output:
        for piece in pieces(ids):
            print(piece.text, end="", flush=True)
        print(flush=True)
        return
    found = _facts(speaker, prompt or "", ids, list(pieces(ids)), wanted)
    json.dump(found, sys.stdout, ensure_ascii=False)
    print()


def _check_flags(
    *, chat: bool, system: str | None, temperature: float, top_k: int | None, top_p: float | None
) -> None:
    if temperature == 0.0 and (top_k is not None or top_p is not None):
        raise UsageError(
            f"{'--top-k' if top_k is not None else '--top-p'} is given and temperature is 0",
            where="command line",
            expected="a temperature above 0 to draw tokens with",
            remedy="add --temperature 1, or leave it out",
        )
    if system is not None and not chat:
        raise UsageError(
            "--system is given without --chat",
            where="command line",
            expected="a chat, which begins with it",
            remedy="add --chat",
        )


def _prompt(given: str | None) -> str:
    if given is None and sys.stdin.isatty():
        raise UsageError(
            "there is no prompt",
            where="--prompt",
            expected="some text to continue",
            remedy='add --prompt "TEXT", or --chat for a conversation',
        )
    prompt = sys.stdin.read().removesuffix("\n") if given is None else given
    if not prompt:
        raise UsageError("the prompt is empty", where="--prompt", expected="some text to continue")
    return prompt


def _messages(system: str | None, prompt: str | None) -> Sequence[dict[str, Any]]:
    opening = [] if system is None else [{"role": "system", "content": system}]
    return [*opening, {"role": "user", "content": prompt}]


def _opened(path: Path, tokenizer: Path | None, adapter: Path | None, device: Device) -> TextModel:
    import torch  # noqa: PLC0415

    from apr_dist.interop.text_model import open_text_model  # noqa: PLC0415

    there = "cuda" if torch.cuda.is_available() else "cpu"
    return open_text_model(
        path,
        tokenizer=tokenizer,
        adapter=adapter,
        device=there if device is Device.AUTO else device.value,
    )


def _facts(
    speaker: TextModel, prompt: str, ids: list[int], pieces: list[Piece], sampling: Sampling
) -> dict[str, Any]:
    return {
        "model": str(speaker.path),
        "digest": speaker.digest,
        "adapter": None if speaker.adapter is None else str(speaker.adapter),
        "tokenizer": str(speaker.tokenizer_from),
        "prompt": prompt,
        "prompt_tokens": ids,
        "text": "".join(piece.text for piece in pieces),
        "tokens": [piece.token for piece in pieces if piece.token is not None],
        "finish": pieces[-1].finish,
        "temperature": sampling.temperature,
        "seed": sampling.seed if sampling.temperature else None,
    }
