"""Whether documents can be kept apart as asked: the data must say where they begin."""

from __future__ import annotations

from collections.abc import Sequence

from apr_dist.choices import Compile, Documents
from apr_dist.config.sections import ComputeSection
from apr_dist.data.manifest import Manifest
from apr_dist.errors import DataError, UsageError


def check_documents(
    documents: Documents, compute: ComputeSection, parts: Sequence[Manifest], *, synthetic: bool
) -> None:
    """Where documents are kept apart: boundaries are known, and blocks are not compiled.

    Conversations always are; documents of plain text are with ``loader.documents`` isolate.

    Args:
        documents: what attention does at a document's end.
        compute: how the network is computed.
        parts: the training sets; none for made-up tokens.
        synthetic: whether tokens are made up.

    Raises:
        UsageError: made-up tokens, or compiled blocks, whose shapes would change with the documents.
        DataError: a data set does not record where documents begin.
    """
    isolate = documents is Documents.ISOLATE
    chats = any(part.flagged for part in parts)
    if not (isolate or chats):
        return
    clash = "--synthetic" if synthetic else "--compute.compile block"
    if synthetic or compute.compile is Compile.BLOCK:
        raise UsageError(
            f"{'--loader.documents isolate' if isolate else 'conversations'} and {clash} do not go together",
            where="command line",
            expected="real documents, and blocks that are not compiled",
            remedy="leave one of them out",
        )
    for part in parts if isolate else ():
        if not part.flagged and not part.has_index and part.eos_token_id is None:
            raise DataError(
                "this data set records neither document starts nor an end-of-document id",
                where=part.folder,
                expected="boundaries to tell documents apart by, for --loader.documents isolate",
                remedy="encode the corpus again with `apr-dist tokenize encode-corpus`",
            )
