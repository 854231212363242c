"""APR v1 to APR v2: tensor bytes copied, metadata carried over."""

from __future__ import annotations

from apr_dist.apr.legacy import Apr1File
from apr_dist.apr.writer import TensorSpec
from apr_dist.interop.request import ImportRequest, ImportSummary


def import_apr1(request: ImportRequest) -> ImportSummary:
    """Write the tensors and metadata of an "APR1" file as APR v2.

    Raises:
        ModelFileError: the source is missing, damaged, or cannot be read without guessing.
        GateRefused: training would refuse the model.
        OutputError: the target cannot be written.
    """
    with Apr1File(request.source) as file:
        return request.write(
            ((name, file.raw(name)) for name in file.tensors),
            metadata=file.metadata.replace(total_size=None, param_count=None),
            specs=[TensorSpec(entry.name, entry.dtype, entry.shape) for entry in file.tensors.values()],
            original_format="apr-v1",
            notes=("converted from APR v1",),
            may_leave_unstated=True,
        )
