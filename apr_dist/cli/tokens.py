"""Verbs over tokenizers, corpora and shards."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Annotated

import tyro

from apr_dist.cli.progress import bytes_bar, encode_progress
from apr_dist.corpus.decode import decode_documents
from apr_dist.corpus.encode import EncodeSummary, EosPolicy, Normalization, encode_corpus
from apr_dist.corpus.repair import repair_manifest
from apr_dist.corpus.sources import standard_library_sources
from apr_dist.data.verification import verify_dataset
from apr_dist.errors import ExitCode, UsageError
from apr_dist.interop.tokenizers import import_any_tokenizer
from apr_dist.parsing import printable

Source = Annotated[Path, tyro.conf.Positional]
Output = Annotated[Path, tyro.conf.arg(aliases=["-o"])]


def import_hf(
    source: Source, /, *, output: Output, include_added_tokens: bool = False, force: bool = False
) -> None:
    """Import a tokenizer into a tokenizer folder.

    Example: apr-dist tokenize import-hf tokenizer.json -o tokenizer/

    Args:
        source: a tokenizer.json, a folder with one, a GGUF, an APR that embeds one, or a Qwen .tiktoken.
        output: tokenizer folder to write.
        include_added_tokens: also list the added tokens in vocab.json.
        force: replace a tokenizer that lies there.
    """
    identity = import_any_tokenizer(
        source, output, include_added_tokens=include_added_tokens, overwrite=force
    )
    print(
        f"{printable(output)}: {identity.bpe_vocab_count:,} base + {identity.added_tokens_count:,} added ="
        f" {identity.effective_vocab_count:,} tokens, {identity.merges_count:,} merges"
    )


def encode(
    *,
    tokenizer: Path,
    output: Output,
    corpus: tuple[Path, ...] = (),
    standard_library: bool = False,
    glob: tuple[str, ...] = (),
    shard_tokens: int = 1_000_000,
    text_key: str | None = None,
    parse_special: bool = False,
    skip_unreadable: bool = False,
    eos_policy: EosPolicy = EosPolicy.BETWEEN,
    normalization: Normalization = Normalization.NONE,
    val_fraction: float = 0.0,
    workers: int | None = None,
    limit_tokens: int | None = None,
    strict: bool = False,
    force: bool = False,
) -> None:
    """Encode documents into u32 token shards with a manifest.

    A run that was killed goes on where it was when the same command is given again.

    Example: apr-dist tokenize encode-corpus --corpus docs.jsonl --tokenizer tok -o shards --val-fraction 0.05

    Args:
        tokenizer: tokenizer folder.
        output: shard folder to write; with --val-fraction it gets train/ and validation/.
        corpus: files or folders of JSON lines, JSON arrays, plain text, Parquet or Arrow (also .gz, .zst,
            .xz, .bz2), or - for JSON lines on stdin.
        standard_library: add the running Python's own standard-library sources.
        glob: which files of a folder are taken, such as '*.py'; by default the corpus formats.
        shard_tokens: a shard closes after the document that reaches this many tokens.
        text_key: JSON key or column of the text, a.b for b inside a; by default content, or else text.
        parse_special: special tokens written out in the text, as in rendered chats, become their ids.
        skip_unreadable: leave out files that cannot be read, counted; each file is read once more to know.
        eos_policy: where the tokenizer's document-end id is written.
        normalization: of the text before the tokenizer sees it.
        val_fraction: share of documents, by hash of their text, that is held out.
        workers: tokenizing threads; by default one a CPU.
        limit_tokens: stop after the document that reaches this many tokens.
        strict: stop at the first bad record, naming file and line.
        force: replace a finished data set.
    """
    sources = [*corpus, *(standard_library_sources() if standard_library else [])]
    if not sources:
        raise UsageError(
            "no source was named", where="command line", expected="--corpus PATH or --standard-library"
        )
    with encode_progress() as progress:
        summary = encode_corpus(
            sources=sources,
            tokenizer=tokenizer,
            output=output,
            shard_tokens=shard_tokens,
            eos_policy=eos_policy,
            normalization=normalization,
            val_fraction=val_fraction,
            text_key=text_key,
            parse_special=parse_special,
            skip_unreadable=skip_unreadable,
            globs=glob or None,
            workers=workers,
            overwrite=force,
            strict=strict,
            limit_tokens=limit_tokens,
            progress=progress,
        )
    _print_summary(summary)


def verify(folder: Source, /) -> int:
    """Check every hash, count and id of a shard folder against its manifest.

    Example: apr-dist tokenize verify shards

    Args:
        folder: a shard folder, or one with train/ and validation/.
    """
    with bytes_bar(f"verifying {folder.name}") as progress:
        report = verify_dataset(folder, progress=progress)
    for problem in report.problems:
        print(f"error: {problem}", file=sys.stderr)
    for text in report.unchecked:
        print(f"warning: {text}")
    if report.ok:
        print(f"{printable(folder)}: {report.shards} shard(s), {report.tokens:,} tokens, all as recorded")
    return int(ExitCode.OK if report.ok else ExitCode.DATA)


def repair(folder: Source, /, *, tokenizer: Path | None = None, accept_loss: bool = False) -> None:
    """Rebuild a lost or stale manifest from the shards, and say what it could not know.

    Example: apr-dist tokenize repair-manifest shards --tokenizer tok

    Args:
        folder: shard folder.
        tokenizer: tokenizer folder the shards were encoded with.
        accept_loss: write a manifest without shards that are missing.
    """
    report = repair_manifest(folder, tokenizer=tokenizer, accept_loss=accept_loss)
    found = report.manifest
    state = "written" if report.changed else "already right"
    print(
        f"{printable(folder)}: manifest {state}: {found.shard_count} shard(s), {found.total_tokens:,} tokens"
    )
    for text in report.changed:
        print(f"changed: {text}")
    for text in report.unknown:
        print(f"unknown: {text}")


def decode(
    folder: Source, /, *, tokenizer: Path | None = None, start: int = 0, count: int | None = None
) -> None:
    """Show documents of a shard folder as text again.

    Example: apr-dist tokenize decode shards/train --tokenizer tok --count 1

    Args:
        folder: shard folder.
        tokenizer: tokenizer folder; by default the one the manifest names.
        start: number of the first document, from 0.
        count: how many documents; by default all.
    """
    for document in decode_documents(folder, tokenizer=tokenizer, start=start, count=count):
        print(f"--- document {document.number}, {document.shard}, {document.tokens:,} tokens")
        print(document.text)


def _print_summary(summary: EncodeSummary) -> None:
    for split, manifest in summary.manifests.items():
        print(
            f"{printable(manifest.folder)}: {split}, {manifest.shard_count} shard(s),"
            f" {manifest.total_tokens:,} tokens of {manifest.total_documents:,} documents,"
            f" fingerprint {manifest.fingerprint[:16]}"
        )
    print_met(summary, found="text found under")


def print_met(summary: EncodeSummary, *, found: str) -> None:
    """Print what an encoding met on the way: what was left out, where records were found, and its speed."""
    for problem, count in summary.problems.items():
        print(f"warning: {count:,} record(s) left out: {problem.value}")
    for text, count in Counter(summary.left_out.values()).items():
        first = next(path for path, reason in summary.left_out.items() if reason == text)
        print(f"warning: {count:,} file(s) left out, such as {printable(first)}: {text}")
    for example in summary.examples:
        print(f"  {example}")
    if summary.lossy_documents:
        print(
            f"warning: {summary.lossy_documents:,} document(s) hold {summary.lost_bytes:,} byte(s)"
            " that the tokenizer has no token for"
        )
    if summary.special_texts:
        print(
            f"warning: {summary.special_texts:,} special token(s) in the texts, such as a chat's markers,"
            " were encoded as plain text; --parse-special turns them into their ids"
        )
    for key, count in summary.text_keys.items():
        print(f"{found} {key!r} in {count:,} record(s)")
    for text in summary.notes:
        print(f"note: {text}")
    print(f"{summary.tokens:,} tokens in {summary.elapsed_s:.1f} s ({summary.tokens_per_s:,.0f} tokens/s)")
