"""APR v1 to APR v2: tensor bytes copied, metadata carried over."""

from __future__ import annotations

from pathlib import Path

from apr_dist.apr.legacy import Apr1File
from apr_dist.apr.writer import TensorSpec
from apr_dist.gates.architecture import HEAD
from apr_dist.interop.convert import ImportSummary, Progress, summarize, total_bytes
from apr_dist.interop.proven import proven_writer


def import_apr1(
    source: Path, target: Path, *, overwrite: bool = False, progress: Progress | None = None
) -> ImportSummary:
    """Write the tensors and metadata of an "APR1" file as APR v2.

    Raises:
        ModelFileError: the source is missing, damaged, or cannot be read without guessing.
        GateRefused: training would refuse the model.
        OutputError: the target cannot be written.
    """
    unstated: list[str] = []
    with Apr1File(source) as file:
        specs = [TensorSpec(entry.name, entry.dtype, entry.shape) for entry in file.tensors.values()]
        metadata = file.metadata.replace(total_size=None, param_count=None)
        done, total = 0, total_bytes(specs)
        with proven_writer(
            target,
            metadata=metadata,
            tensors=specs,
            source=file.path,
            overwrite=overwrite,
            unstated=unstated,
        ) as writer:
            for spec in specs:
                writer.write(spec.name, file.raw(spec.name))
                done += file.tensors[spec.name].size_bytes
                if progress:
                    progress(done, total)
    return summarize(
        source,
        target,
        "apr-v1",
        specs,
        tied=HEAD not in file.tensors,
        notes=("converted from APR v1", *unstated),
    )
