"""A model file opened for text: its decoder with every weight proven, its tokenizer, its chat template.

Which token comes next is decided in ``model.generation``; here text becomes ids and ids become text, as
they are chosen. Front doors parse flags and print.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from apr_dist.apr.reader import AprReader
from apr_dist.corpus.chat_encoding import encode_prompt
from apr_dist.errors import TokenizerError, UsageError
from apr_dist.gates.model_file import prove_model
from apr_dist.interop.adapter_files import open_adapter
from apr_dist.interop.chat import ModelChat, chat_of
from apr_dist.model.adapters import canonical, is_adapter
from apr_dist.model.config import TransformerConfig
from apr_dist.model.generation import Sampling, stream
from apr_dist.model.quantized import kept_values
from apr_dist.model.transformer import Decoder

DEFAULT_NEW_TOKENS = 128
"""What is generated when nobody says how much, as far as the model has positions."""


class Finish(StrEnum):
    """Why a text ended."""

    END_TOKEN = "end-token"  # noqa: S105  (a token of text, no secret)
    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What one more token added; ``text`` may be empty while a character or a stop text is incomplete."""

    text: str
    token: int | None = None
    finish: Finish | None = None


@dataclass(frozen=True, kw_only=True)
class TextModel:
    """A decoder that speaks.

    Attributes:
        path: the model file.
        digest: ``sha256:...`` of its bytes.
        decoder: in f32 on its device, in evaluation mode.
        tokenizer: with special tokens read as such.
        tokenizer_from: where it came from.
        end_ids: tokens that end a text, as far as the file says.
        chat: what makes tokens of conversations.
        adapter: where the adapter that is computed beside the weights came from; None without one.
    """

    path: Path
    digest: str
    decoder: Decoder
    tokenizer: Tokenizer
    tokenizer_from: Path
    end_ids: frozenset[int]
    chat: ModelChat
    adapter: Path | None = None

    def encode(self, prompt: str) -> list[int]:
        """Ids of a prompt, with the tokens that its tokenizer puts around a text.

        Raises:
            UsageError: the prompt is empty.
        """
        if not prompt:
            raise UsageError("the prompt is empty", where="--prompt", expected="some text to go on from")
        return list(self.tokenizer.encode(prompt).ids)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Ids of a chat that the assistant answers next.

        Raises:
            TokenizerError: the model has no chat template.
            CorpusError: the template refuses the chat.
        """
        template = self.chat.needed(self.path)
        return [int(one) for one in encode_prompt(messages, template, self.chat.tokenizer)]

    def room(self, prompt_ids: Sequence[int], wanted: int | None) -> int:
        """How many tokens to generate: those wanted, or up to the default as far as there are positions.

        Raises:
            UsageError: the prompt leaves no position free.
        """
        positions = self.decoder.config.max_position_embeddings
        free = positions - len(prompt_ids)
        if free < 1 or (wanted is not None and wanted > free):
            asked = "no new one fits" if wanted is None else f"{wanted:,} new ones were asked for"
            raise UsageError(
                f"the prompt has {len(prompt_ids):,} tokens and {asked}",
                where=self.path,
                expected=f"at most {positions:,} together (max_position_embeddings)",
                remedy="shorten the prompt or lower --max-tokens",
            )
        return min(DEFAULT_NEW_TOKENS, free) if wanted is None else wanted

    def speak(
        self, prompt_ids: Sequence[int], sampling: Sampling, *, stop: Sequence[str] = (), chat: bool = False
    ) -> Iterator[Piece]:
        """Generate after a prompt, piece by piece; a piece with ``finish`` is the last.

        With ``chat``, what ends a turn under the chat template ends it as well.

        Neither the token that ends a text nor a stop text is part of what is said.

        Raises:
            UsageError: see `model.generation.stream`.
        """
        ends = self.end_ids
        if chat:
            ends |= self.chat.needed(self.path).stop_ids(self.chat.tokenizer)
        said = Utterance(self.tokenizer, stop)
        for token in stream(self.decoder, prompt_ids, replace(sampling, stop_ids=ends)):
            if token in ends:
                yield Piece(text=said.rest(), token=token, finish=Finish.END_TOKEN)
                return
            text, stopped = said.add(token)
            yield Piece(text=text, token=token, finish=Finish.STOP if stopped else None)
            if stopped:
                return
        yield Piece(text=said.rest(), finish=Finish.LENGTH)


class Utterance:
    """Text as far as it is certain: whole characters, and nothing that may become a stop text."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self._tokenizer, self._stop = tokenizer, [text for text in stop if text]
        self._stream = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._decoded = self._told = ""

    def add(self, token: int) -> tuple[str, bool]:
        """What may be said after one more token, and whether a stop text ended it."""
        self._ids.append(token)
        self._decoded += self._stream.step(self._tokenizer, token) or ""
        ends = [at for text in self._stop if (at := self._decoded.find(text)) >= 0]
        if ends:
            return self._tell(min(ends)), True
        return self._tell(len(self._decoded) - self._held()), False

    def rest(self) -> str:
        """What was held back, an incomplete character included."""
        whole = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        if whole.startswith(self._decoded):
            self._decoded = whole
        return self._tell(len(self._decoded))

    def _tell(self, end: int) -> str:
        text = self._decoded[len(self._told) : end]
        self._told += text
        return text

    def _held(self) -> int:
        """Length of the longest end of the text that a stop text begins with."""
        longest = 0
        for text in self._stop:
            for size in range(min(len(text) - 1, len(self._decoded)), longest, -1):
                if self._decoded.endswith(text[:size]):
                    longest = size
                    break
        return longest


def open_text_model(
    path: Path, *, tokenizer: Path | None = None, device: str = "cpu", adapter: Path | None = None
) -> TextModel:
    """Open a model file for generating, through the gates a run opens it with.

    Args:
        path: an APR v2 file.
        tokenizer: tokenizer folder; None takes the one inside the file, else ``model.tokenizer`` beside it.
        device: a torch device.
        adapter: ``peft`` folder, or the checkpoint of a run's adapter, to compute beside the weights.

    Raises:
        ModelFileError, GateRefused: the file is missing, damaged, or not a whole decoder; or the adapter is
            none of this file.
        TokenizerError: there is no tokenizer, or it cannot be used.
        UsageError: the device is not there.
    """
    with AprReader(path) as reader:
        proven = prove_model(reader, with_digest=True)
        metadata, digest = reader.metadata, reader.digest()
        chat = chat_of(metadata, path, tokenizer)
        decoder = load_decoder(reader, proven.config, device=device, adapter=adapter)
    return TextModel(
        path=path,
        digest=digest,
        decoder=decoder,
        tokenizer=_speaking(chat.tokenizer_json, chat.tokenizer_from),
        tokenizer_from=chat.tokenizer_from,
        end_ids=chat.end_ids,
        chat=chat,
        adapter=adapter,
    )


def load_decoder(
    reader: AprReader, config: TransformerConfig, *, device: str = "cpu", adapter: Path | None = None
) -> Decoder:
    """The network of a proven file on one device, one tensor at a time.

    Beside an adapter the weights have the values that they had when it was trained.

    Args:
        reader: the file.
        config: its architecture.
        device: a torch device.
        adapter: where an adapter is that is computed beside the weights; None: the weights alone.

    Raises:
        ModelFileError, WeightsRefused: the adapter cannot be read, or belongs to other weights.
        UsageError: CUDA was asked for and there is none.
    """
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(
            "device is cuda and PyTorch finds no CUDA device",
            where="--device",
            expected="a visible CUDA device",
            remedy="use --device cpu",
        )
    with contextlib.ExitStack() as stack:
        beside = stack.enter_context(open_adapter(adapter, config)) if adapter is not None else None
        with torch.device("meta"):
            decoder = Decoder(config)
            if beside is not None:
                beside.refuse_other_base(reader)
                decoder.attach(beside.adapter.beside_floats)
        decoder.to_empty(device=device)
        decoder.reset_buffers()
        with torch.no_grad():
            for within, parameter in decoder.named_parameters():
                name = canonical(within)
                if beside is not None and is_adapter(name):
                    parameter.copy_(torch.from_numpy(beside.read(name)))
                    continue
                values = torch.utils.dlpack.from_dlpack(reader.float32(name))
                parameter.copy_(values if beside is None else kept_values(name, values, beside.adapter))
                reader.forget(name)
    return decoder.eval()


def _speaking(content: bytes, where: Path) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_str(content.decode())
    except Exception as error:  # the library raises bare Exception for a malformed file
        raise TokenizerError(f"the tokenizers library refuses it ({error})", where=where) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
