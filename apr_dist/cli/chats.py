"""Verbs over conversations."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from datetime import date, datetime
from pathlib import Path

from apr_dist.cli.progress import encode_progress
from apr_dist.cli.tokens import Output, Source, print_met
from apr_dist.corpus.chat_encoding import TrainOn
from apr_dist.corpus.chat_pool import ChatRules, RewrittenTurns
from apr_dist.corpus.conversations import Shape
from apr_dist.corpus.encode_chat import encode_chat as encode_conversations
from apr_dist.corpus.encode_facts import EncodeSummary
from apr_dist.corpus.preview import ShownConversation, preview_conversations
from apr_dist.corpus.row_writer import TooLong
from apr_dist.data.manifest import Manifest
from apr_dist.errors import UsageError
from apr_dist.interop.chat import read_chat
from apr_dist.interop.chat_shards import chat_model, decoder_of
from apr_dist.parsing import printable

_COLOUR, _PLAIN = "\033[32m", "\033[0m"


def encode_chat(
    *,
    model: Path,
    output: Output,
    seq_length: int,
    corpus: tuple[Path, ...] = (),
    train_on: TrainOn = TrainOn.ASSISTANT,
    shape: Shape | None = None,
    glob: tuple[str, ...] = (),
    val_fraction: float = 0.0,
    too_long: TooLong = TooLong.TRUNCATE,
    no_pack: bool = False,
    rewritten_turns: RewrittenTurns = RewrittenTurns.REFUSE,
    parse_special: bool = False,
    tokenizer: Path | None = None,
    skip_bad_records: bool = False,
    skip_unreadable: bool = False,
    shard_tokens: int = 1_000_000,
    workers: int | None = None,
    limit_tokens: int | None = None,
    today: str | None = None,
    force: bool = False,
) -> None:
    """Encode conversations into packed rows for one model, and mark what is trained on.

    A run that was killed goes on where it was when the same command is given again.

    Example: apr-dist tokenize encode-chat --corpus chats.jsonl --model MODEL.apr -o chats --seq-length 1024

    Args:
        model: APR file of the model to train; its chat template and tokenizer are used.
        output: shard folder to write; with --val-fraction it gets train/ and validation/.
        seq_length: tokens of a row; train with the same --seq-length.
        corpus: files or folders of JSON lines, JSON arrays, Parquet or Arrow (also .gz, .zst, .xz, .bz2), or
            - for JSON lines on stdin.
        train_on: assistant: each of its turns with the token that ends it; last: its last turn; completion:
            what follows the last question, or the record's completion; all: every token.
        shape: how records are laid out; by default each is recognised by its keys.
        glob: which files of a folder are taken; by default the corpus formats.
        val_fraction: share of conversations, by hash, that is held out.
        too_long: what is done with a conversation longer than a row.
        no_pack: give each conversation a row of its own.
        rewritten_turns: refuse a conversation of which the template rewrites earlier turns, or split it into
            one for each turn.
        parse_special: special tokens that a message spells are read as such, not as text.
        tokenizer: tokenizer folder, in place of the one inside the model file or next to it.
        skip_bad_records: leave out and count bad records; without it the first one stops the run.
        skip_unreadable: leave out files that cannot be read, counted; each file is read once more to know.
        shard_tokens: a shard closes after the row that reaches this many tokens.
        workers: threads; by default one a CPU.
        limit_tokens: stop after the conversation that reaches this many tokens.
        today: the date, as 2026-01-31, for templates that write it; by default today.
        force: replace a finished data set.
    """
    if not corpus:
        raise UsageError("no source was named", where="command line", expected="--corpus PATH")
    now = _date(today)
    chat = read_chat(model, tokenizer=tokenizer)
    rules = ChatRules(
        template=replace(chat.needed(model), now=now),
        tokenizer=chat.tokenizer,
        train_on=train_on,
        rewritten=rewritten_turns,
        parse_special=parse_special,
    )
    with encode_progress() as progress:
        summary = encode_conversations(
            sources=corpus,
            model=chat_model(model, chat),
            rules=rules,
            output=output,
            seq_length=seq_length,
            too_long=too_long,
            packed=not no_pack,
            val_fraction=val_fraction,
            shape=shape,
            shard_tokens=shard_tokens,
            skip_bad_records=skip_bad_records,
            skip_unreadable=skip_unreadable,
            globs=glob or None,
            workers=workers,
            overwrite=force,
            limit_tokens=limit_tokens,
            progress=progress,
        )
    _print_summary(summary)


def preview(folder: Source, /, *, count: int = 3, tokenizer: Path | None = None, color: bool = False) -> None:
    """Show conversations of a shard folder, with what is trained on in colour, or between [[ and ]].

    Example: apr-dist tokenize preview chats/train --count 3

    Args:
        folder: shard folder that encode-chat wrote.
        count: how many conversations, spread evenly over the folder.
        tokenizer: tokenizer folder; by default the one the manifest names, or that of its model file.
        color: colour what is trained on also where output is no terminal, or NO_COLOR is set.
    """
    coloured = color or (sys.stdout.isatty() and not os.environ.get("NO_COLOR"))
    for shown in preview_conversations(folder, decoder_of(Manifest.load(folder), tokenizer), count=count):
        print(
            f"--- conversation {shown.number}, {shown.shard} at {shown.first_token:,}:"
            f" {shown.tokens:,} tokens, {shown.targets:,} trained on"
        )
        print(_coloured(shown) if coloured else shown.marked())


def _coloured(shown: ShownConversation) -> str:
    return "".join(f"{_COLOUR}{one.text}{_PLAIN}" if one.trained else one.text for one in shown.stretches)


def _date(text: str | None) -> datetime:
    try:
        day = date.today() if text is None else date.fromisoformat(text)
    except ValueError as error:
        raise UsageError(f"--today is {text!r}", expected="a date such as 2026-01-31") from error
    return datetime(day.year, day.month, day.day)


def _print_summary(summary: EncodeSummary) -> None:
    for split, manifest in summary.manifests.items():
        rows = manifest.conversations
        assert rows is not None
        lengths = ", ".join(f"{name} {size:,}" for name, size in rows.lengths.items())
        print(
            f"{printable(manifest.folder)}: {split}, {rows.rows:,} rows of {rows.seq_length:,} tokens,"
            f" {rows.fill:.1%} full, fingerprint {manifest.fingerprint[:16]}"
        )
        print(
            f"  {rows.targets:,} of {rows.tokens:,} tokens are trained on ({rows.targets / rows.tokens:.1%})"
        )
        print(f"  tokens of a conversation: {lengths}")
        for name, number in rows.counts.items():
            print(f"  {number:,} {name}")
    print_met(summary, found="conversations of the shape")
