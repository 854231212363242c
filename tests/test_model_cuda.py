"""What CUDA is asked to compute, seen without a GPU: the operators, their types and their shapes."""

from __future__ import annotations

import pytest
import torch
from builders.cuda import Operators, imagined_cuda
from builders.models import tiny_config

from apr_dist.model import packing
from apr_dist.model.config import Family
from apr_dist.model.packing import PackedKernel
from apr_dist.model.transformer import Decoder

VARLEN = "torch_attn::_varlen_attn"


@pytest.fixture(autouse=True)
def _new_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "packed_kernel", lambda *_: PackedKernel.VARLEN)


@pytest.mark.parametrize("family", list(Family))
def test_under_autocast_the_attention_of_packed_documents_gets_one_16_bit_type(family: Family) -> None:
    with imagined_cuda():
        model = Decoder(tiny_config(family))
        tokens = torch.zeros(2, 19, dtype=torch.int32)
        boundaries = torch.zeros(4, dtype=torch.int32)
        documents = packing.Documents(kernel=PackedKernel.VARLEN, boundaries=boundaries, longest=19)
        with pytest.MonkeyPatch.context() as patch, Operators() as operators:
            patch.setattr("apr_dist.model.transformer.find_documents", lambda *_, **__: documents)
            model.model(tokens, document_ids=tokens)
    calls = operators.named(VARLEN)
    assert [call.types[:3] for call in calls] == [[torch.bfloat16] * 3] * 2


def test_under_autocast_a_norm_is_cast_once_for_all_maps_that_read_it() -> None:
    with imagined_cuda():
        block = Decoder(tiny_config()).model.layers[0]
        x = torch.zeros(2, 19, 32)
        with Operators() as operators:
            block.mlp(x, block.post_attention_layernorm)
    # The norm's output, and the three weights, which autocast keeps for the next use.
    casts = [call for call in operators.named("aten::_to_copy") if call.made != [torch.Size([32])]]
    assert [tuple(call.made[0]) for call in casts].count((2, 19, 32)) == 1
