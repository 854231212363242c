"""Which model an APR file states, for writing it in another format."""

from __future__ import annotations

from apr_dist.apr.reader import AprReader
from apr_dist.gates.architecture import check_family
from apr_dist.interop.tie import tied_head
from apr_dist.model.config import TransformerConfig


def stated_model(reader: AprReader) -> TransformerConfig:
    """The configuration of a file's model, its family agreed by metadata and tensor names.

    Raises:
        ArchitectureRefused: the family is contradicted or not one of ours, or a dimension is missing.
    """
    values = reader.metadata.to_mapping()
    family = check_family(values, reader.tensors, where=reader.path)
    return TransformerConfig.from_metadata(
        values, family=family, where=reader.path, tie_word_embeddings=tied_head(reader)
    )
