"""Gate: conversations were encoded for this model, and teach it something, the end of a turn included."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from apr_dist.apr.metadata import AprMetadata
from apr_dist.corpus.chat_template import ChatTemplate
from apr_dist.data.manifest import Manifest
from apr_dist.data.manifest_file import Conversations
from apr_dist.errors import DataError
from apr_dist.gates.result import GateResult
from apr_dist.gates.vocabulary import check_same_tokenizer

CONVERSATIONS = "FALSIFY-APR-DIST-TRAINER-039"
_AGAIN = "encode the conversations again with `apr-dist tokenize encode-chat --model` and this model's file"


def template_digest(metadata: AprMetadata | None) -> str | None:
    """Digest of the chat template that a model file states; None if it states none."""
    if metadata is None or not metadata.chat_template:
        return None
    roles = {role: token for role, token in (metadata.special_tokens or {}).items() if isinstance(token, str)}
    return ChatTemplate(text=metadata.chat_template, special_tokens=roles).digest


def check_conversations(
    sets: Sequence[Manifest],
    *,
    seq_length: int,
    model_vocab: int,
    template: str | None,
    tokenizer_sha256: str | None,
) -> tuple[GateResult | None, list[str]]:
    """Every set of conversations can be trained on, or measured, with this model.

    Args:
        sets: training sets and held-out ones; those of plain text are not asked about.
        seq_length: of the run.
        model_vocab: rows of the embedding.
        template: digest of the model's chat template; None: not known.
        tokenizer_sha256: of the model's tokenizer; None: not known.

    Returns:
        What was found, None without conversations; and warnings.

    Raises:
        DataError, VocabularyRefused: naming the folder and what does not fit.
    """
    chats = [(one, one.conversations) for one in sets if one.conversations is not None]
    warnings = []
    for manifest, rows in chats:
        manifest.check_rows(seq_length)
        check_same_tokenizer(
            shards_sha256=manifest.tokenizer.sha256 if manifest.tokenizer else None,
            tokenizer_sha256=tokenizer_sha256,
            where=manifest.folder,
        )
        for what, expected, remedy in _faults(rows, model_vocab, template):
            raise DataError(
                what, where=manifest.folder, expected=expected, remedy=remedy, falsifier=CONVERSATIONS
            )
        if template is None:
            warnings.append(
                f"{manifest.folder}: the model file states no chat template: whether its conversations were"
                " rendered with the model's own cannot be checked"
            )
    return (_result([rows for _, rows in chats]) if chats else None), warnings


def _faults(rows: Conversations, model_vocab: int, template: str | None) -> Iterator[tuple[str, str, str]]:
    """What is wrong, what was expected, and what to do; the first is reported."""
    if not rows.targets:
        yield "nothing in it is trained on", "at least one target", "encode again with another --train-on"
    if template is not None and template != rows.template:
        yield (
            f"its conversations were rendered with the chat template {rows.template[:19]} and the model's is"
            f" {template[:19]}",
            "conversations as the model will see them in use",
            _AGAIN,
        )
    if rows.turn_end is None:
        yield (
            "the chat template ends no turn with a token, so the model never learns to stop",
            "a template that writes an end token after what the assistant says",
            "give the model such a template (apr-dist stamp --chat-template FILE) and encode again",
        )
    elif rows.turn_end >= model_vocab:
        yield (
            f"a turn ends with the token {rows.turn_end:,}, which the model cannot emit: it has"
            f" {model_vocab:,} rows",
            f"an end token below {model_vocab:,}",
            _AGAIN,
        )
    elif not rows.turn_end_targets:
        yield (
            f"the token {rows.turn_end}, which ends a turn, is never trained on, so the model never learns"
            " to stop",
            "turns that fit their rows with their end, and are trained on with it",
            "encode again with a larger --seq-length or --too-long split, and --train-on assistant",
        )


def _result(sets: Sequence[Conversations]) -> GateResult:
    tokens, targets = sum(rows.tokens for rows in sets), sum(rows.targets for rows in sets)
    counts: dict[str, int] = {}
    for rows in sets:
        for name, count in rows.counts.items():
            counts[name] = counts.get(name, 0) + count
    longest = max(rows.lengths.get("most", 0) for rows in sets)
    fill = tokens / max(sum(rows.rows * rows.seq_length for rows in sets), 1)
    met = ", ".join(f"{count:,} {name}" for name, count in counts.items())
    return GateResult(
        id=CONVERSATIONS,
        gate="conversations fit the model",
        measured=f"{targets:,} of {tokens:,} tokens trained on ({targets / max(tokens, 1):.1%}), rows"
        f" {fill:.1%} full, the longest conversation {longest:,} tokens; {met}",
        required="targets, turn ends among them, rendered with the model's template and tokenizer",
    )
