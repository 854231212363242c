"""The verb that lets a model speak."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import tyro

from apr_dist.choices import Device
from apr_dist.errors import UsageError


def generate(
    model: Annotated[Path, tyro.conf.Positional],
    /,
    *,
    prompt: str,
    max_tokens: int | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    chat: bool = False,
    tokenizer: Path | None = None,
    device: Device = Device.AUTO,
    json_output: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Let a model go on from a prompt; by default each next token is the most likely one.

    Example: apr-dist generate model.apr --prompt "def fibonacci(n):" --max-tokens 64

    Args:
        model: an APR file.
        prompt: the text to go on from; only what follows it is printed.
        max_tokens: tokens after which it ends; by default 128, or as many as the model has positions for.
        temperature: 0 takes the most likely token; above it tokens are drawn, more freely the higher it is.
        top_k: draw among the k most likely tokens only.
        top_p: draw among the most likely tokens whose probabilities first add up to p.
        seed: of the draw.
        stop: end before this text; may be given several times.
        chat: put the prompt into the model's chat template, as a user's message.
        tokenizer: tokenizer folder; by default the one inside the file, else the one beside it.
        device: auto, cpu or cuda.
        json_output: print one JSON object at the end instead of the text as it comes.
    """
    if temperature == 0.0 and (top_k is not None or top_p is not None):
        raise UsageError(
            f"{'--top-k' if top_k is not None else '--top-p'} is given and temperature is 0",
            where="command line",
            expected="a temperature above 0 to draw tokens with",
            remedy="add --temperature 1, or leave it out",
        )
    from apr_dist.model.generation import Sampling  # noqa: PLC0415  (imports PyTorch)

    # Checked before a model is loaded, which may take long.
    wanted = Sampling(
        max_new_tokens=1 if max_tokens is None else max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    )
    if not prompt:
        raise UsageError("the prompt is empty", where="--prompt", expected="some text to go on from")
    _speak(
        model,
        prompt,
        wanted,
        max_tokens=max_tokens,
        stop=stop,
        chat=chat,
        tokenizer=tokenizer,
        device=device,
        as_json=json_output,
    )


def _speak(
    path: Path,
    prompt: str,
    sampling: Any,
    *,
    max_tokens: int | None,
    stop: tuple[str, ...],
    chat: bool,
    tokenizer: Path | None,
    device: Device,
    as_json: bool,
) -> None:
    from dataclasses import replace  # noqa: PLC0415

    import torch  # noqa: PLC0415

    from apr_dist.interop.text_model import open_text_model  # noqa: PLC0415

    there = "cuda" if torch.cuda.is_available() else "cpu"
    speaker = open_text_model(
        path, tokenizer=tokenizer, device=there if device is Device.AUTO else device.value
    )
    ids = speaker.encode_chat([{"role": "user", "content": prompt}]) if chat else speaker.encode(prompt)
    sampling = replace(sampling, max_new_tokens=speaker.room(ids, max_tokens))
    pieces = []
    for piece in speaker.speak(ids, sampling, stop=stop):
        pieces.append(piece)
        if not as_json:
            print(piece.text, end="", flush=True)
    if not as_json:
        print(flush=True)
        return
    found = {
        "model": str(path),
        "digest": speaker.digest,
        "tokenizer": str(speaker.tokenizer_from),
        "prompt": prompt,
        "prompt_tokens": ids,
        "text": "".join(piece.text for piece in pieces),
        "tokens": [piece.token for piece in pieces if piece.token is not None],
        "finish": pieces[-1].finish,
        "temperature": sampling.temperature,
        "seed": sampling.seed if sampling.temperature else None,
    }
    json.dump(found, sys.stdout, ensure_ascii=False)
    print()
