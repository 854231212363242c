"""Folders of flagged rows with known conversations: made-up ids, or a whole corpus of made-up text."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray
from tokenizers import Tokenizer

from apr_dist.corpus.row_writer import RowSettings, TooLong, write_rows
from apr_dist.corpus.split_writer import SplitWriter
from apr_dist.data.flags import flag
from apr_dist.data.manifest import Manifest
from apr_dist.data.manifest_file import Conversations, TokenizerIdentity

PAD, END = 0, 5
"""Ids of padding, and of what ends a turn."""


@dataclass(frozen=True)
class Turns:
    """One conversation: its ids, and which of them are targets."""

    ids: NDArray[np.uint32]
    is_target: NDArray[np.bool_]


def made_up(count: int, *, vocab_size: int, longest: int, seed: int = 0, shortest: int = 2) -> list[Turns]:
    """Conversations of random ids; about half of the tokens of each are targets, at least one is."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        size = draw.randint(shortest, longest)
        ids = np.array([draw.randrange(1, vocab_size) for _ in range(size)], dtype=np.uint32)
        is_target = np.array([False] + [draw.random() < 0.5 for _ in range(size - 1)])
        is_target[draw.randrange(1, size)] = True
        found.append(Turns(ids, is_target))
    return found


def build_rows(
    folder: Path,
    turns: Sequence[Turns],
    seq_length: int,
    *,
    vocab_size: int,
    packed: bool = True,
    too_long: TooLong = TooLong.TRUNCATE,
    shard_tokens: int = 1_000_000,
    **facts: Any,
) -> Manifest:
    """A folder of the rows that the encoder makes of these conversations, with its manifest.

    Args:
        folder: made here.
        turns: the conversations.
        seq_length: tokens of a row.
        vocab_size: ids are below it.
        packed: several share a row.
        too_long: what becomes of longer ones.
        shard_tokens: a shard closes after the row that reaches as many.
        facts: other fields of the manifest, or of its description of conversations.
    """
    staged = folder.with_name(folder.name + ".staged")
    for one in (staged, folder):
        one.mkdir(parents=True, exist_ok=True)
    writer = SplitWriter(staged, shard_tokens=shard_tokens, flagged=True)
    for one in turns:
        writer.append(flag(one.ids, one.is_target), xxhash.xxh3_64_intdigest(one.ids.tobytes()))
    writer.close_shard()
    settings = RowSettings(
        seq_length=seq_length,
        too_long=too_long,
        packed=packed,
        pad_id=PAD,
        shard_tokens=shard_tokens,
        turn_end=facts.get("turn_end", END),
    )
    shards, made = write_rows(staged, writer.shards, folder, settings)
    described = {
        "seq_length": seq_length,
        "train_on": "assistant",
        "template": "sha256:" + "0" * 64,
        "turn_end": settings.turn_end,
        "packing": "best-fit" if packed else "none",
        "too_long": too_long.value,
        "pad_id": PAD,
        **asdict(made),
    }
    described |= {key: facts.pop(key) for key in set(described) & set(facts)}
    Manifest(
        folder=folder,
        shards=tuple(shards),
        vocab_size=vocab_size,
        tokenizer=facts.pop("tokenizer", None) or TokenizerIdentity("a" * 64, vocab_size, 0, vocab_size, 0),
        total_documents=sum(shard.documents or 0 for shard in shards),
        eos_policy="none",
        has_index=True,
        conversations=Conversations(**described),
        **facts,
    ).write()
    return Manifest.load(folder)


@cache
def smollm2_words() -> Tokenizer:
    """SmolLM2's tokenizer, that reads special tokens of a text as text."""
    tokenizer = Tokenizer.from_str(smollm2_json().decode())
    tokenizer.encode_special_tokens = True
    return tokenizer


SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
"""What SmolLM2's template says where the conversation has no message of the system."""


def rendered(messages: Sequence[dict[str, Any]], *, train_on: str = "assistant") -> list[int]:
    """The words of a conversation under SmolLM2's template, by hand: nothing of the package renders here.

    Each message is ``<|im_start|>ROLE``, a line end, its content, ``<|im_end|>``, a line end.
    """
    tokenizer = smollm2_words()
    begin, end = tokenizer.token_to_id("<|im_start|>"), tokenizer.token_to_id("<|im_end|>")
    if messages[0]["role"] != "system":
        messages = [{"role": "system", "content": SYSTEM}, *messages]
    answers = [place for place, one in enumerate(messages) if one["role"] == "assistant"]
    chosen = answers if train_on == "assistant" else answers[-1:]
    found: list[tuple[int, bool]] = []
    for place, message in enumerate(messages):
        head, body = message["role"] + "\n", message["content"]
        both = tokenizer.encode(head + body, add_special_tokens=False)
        trained = place in chosen
        found.append((begin, False))
        found += [
            (one, trained and start >= len(head))
            for one, (start, _) in zip(both.ids, both.offsets, strict=True)
        ]
        found.append((end, trained))
        found += [(one, False) for one in tokenizer.encode("\n", add_special_tokens=False).ids]
    words = [one if is_target else one + 2**31 for one, is_target in found]
    return [words[0] + 2**30, *words[1:]]


@cache
def smollm2_json() -> bytes:
    """SmolLM2's tokenizer.json."""
    from builders.chats import model_chat  # noqa: PLC0415  (reads a model file)

    return model_chat("smollm2").tokenizer._content  # type: ignore[return-value]


def tiny_chat_model(folder: Path) -> Path:
    """An APR file of a network of two heads that carries SmolLM2's tokenizer, template and turn end."""
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415  (takes seconds)

    from apr_dist.interop.importing import import_model  # noqa: PLC0415
    from builders.chats import model_chat  # noqa: PLC0415

    chat, source = model_chat("smollm2"), folder / "hf"
    config = LlamaConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=49_152,
        intermediate_size=16,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        eos_token_id=chat.tokenizer.id_of("<|im_end|>"),
    )
    LlamaForCausalLM(config).save_pretrained(source)
    (source / "tokenizer.json").write_bytes(smollm2_json())
    stated = {**chat.special, "chat_template": chat.template.text, "tokenizer_class": "GPT2Tokenizer"}
    (source / "tokenizer_config.json").write_text(json.dumps(stated))
    import_model(source, folder / "chat.apr")
    return folder / "chat.apr"
