"""What CUDA is asked to compute, seen without a GPU: the operators, their types and their shapes."""

from __future__ import annotations

import pytest
import torch
from builders.cuda import Operators, imagined_cuda
from builders.models import tiny_config
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import DynamicOutputShapeException

from apr_dist.choices import ActivationCheckpointing, KernelChoice
from apr_dist.model.families import Family
from apr_dist.model.kernels import cuda
from apr_dist.model.kernels.choice import SETS
from apr_dist.model.packing import Boundaries
from apr_dist.model.transformer import Decoder
from apr_dist.parallel import norm
from apr_dist.parallel.runtime import start

VARLEN = "torch_attn::_varlen_attn"


@pytest.fixture(autouse=True)
def _new_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "has_varlen", lambda *_: True)


CONFIGS = {one: tiny_config(one) for one in Family}
UNCAPPED = [
    name
    for name, one in CONFIGS.items()
    if one.attn_logit_softcapping is None  # others have one plain way
    and one.num_experts is None  # their attention is the others', and imagined tokens choose no expert
]


@pytest.mark.parametrize("family", UNCAPPED)
def test_under_autocast_the_attention_of_packed_documents_gets_one_16_bit_type(family: Family) -> None:
    with imagined_cuda():
        model = Decoder(CONFIGS[family])
        tokens = torch.zeros(2, 19, dtype=torch.int32)
        documents = Boundaries(torch.zeros(4, dtype=torch.int32), (2, 19))
        with Operators() as operators:
            model.model(tokens, document_ids=documents)
    calls = operators.named(VARLEN)
    assert [call.types[:3] for call in calls] == [[torch.bfloat16] * 3] * 2


def test_a_sliding_window_is_the_kernels_and_no_mask() -> None:
    with imagined_cuda():
        model = Decoder(tiny_config(Family.MISTRAL, sliding_window=4))
        tokens = torch.zeros(2, 50, dtype=torch.int32)
        with Operators() as operators:
            model.model(tokens)
    assert [call.args[9] for call in operators.named(VARLEN)] == [[3, 0]] * 2
    assert all(made[-2:] != (50, 50) for call in operators.calls for made in call.made)


@pytest.mark.parametrize("varlen", [True, False], ids=["varlen", "flex"])
def test_documents_known_beforehand_are_prepared_without_a_wait(
    varlen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "has_varlen", lambda *_: varlen)
    # A tensor that is only imagined has no value to wait for: asking for one is an error.
    with imagined_cuda():
        documents = Boundaries(torch.zeros(9, dtype=torch.int32), (2, 300))
        SETS[KernelChoice.CUDA].attention(
            (2, 300), documents.edges.device, dtype=torch.bfloat16, documents=documents
        )
        with pytest.raises(DynamicOutputShapeException):
            Boundaries.from_ids(torch.zeros(2, 300, dtype=torch.int32))


def test_a_compiled_block_takes_any_number_of_documents() -> None:
    torch.compiler.reset()
    with torch.device("meta"):
        model = Decoder(tiny_config())
        model.use_kernels(SETS[KernelChoice.CUDA])
        model.compile_blocks(backend="aot_eager")
        tokens = torch.zeros(2, 19, dtype=torch.int32)
        graphs = []
        for count in range(2, 14):
            documents = Boundaries(torch.zeros(count + 1, dtype=torch.int32), (2, 19))
            model.model(tokens, document_ids=documents).sum().backward()
            graphs.append(counters["stats"]["unique_graphs"])
    torch.compiler.reset()
    assert len(set(graphs)) == 1


def test_selective_checkpointing_keeps_the_attention_of_packed_documents() -> None:
    tokens = torch.zeros(2, 19, dtype=torch.int32, device="meta")
    documents = Boundaries(torch.zeros(4, dtype=torch.int32, device="meta"), (2, 19))
    with torch.device("meta"):
        model = Decoder(tiny_config())
    model.use_kernels(SETS[KernelChoice.CUDA])
    found = {}
    for mode in (ActivationCheckpointing.FULL, ActivationCheckpointing.SELECTIVE):
        model.set_checkpointing(mode)
        with Operators() as operators:
            model.model(tokens, document_ids=documents).sum().backward()
        found[mode] = len(operators.named(VARLEN))
    assert found == {ActivationCheckpointing.FULL: 4, ActivationCheckpointing.SELECTIVE: 2}


def test_the_norm_of_all_gradients_is_a_handful_of_operators() -> None:
    shapes = [(64, 32), (32,), (0,), (97, 32), (5000,)] * 60
    here = [torch.randn(shape, generator=torch.Generator().manual_seed(k)) for k, shape in enumerate(shapes)]
    runtime = start(device="cpu", strategy="auto", precision="f32", cpu_threads=1, timeout_s=60)
    exact = float(norm.global_norm(here, runtime))
    assert float(norm._squares_at_once(here).sum().sqrt()) == pytest.approx(exact, rel=1e-6)
    with imagined_cuda(autocast=False):
        gradients = [torch.zeros(shape) for shape in shapes]
        with Operators() as operators:
            found = norm.global_norm(gradients, runtime)
    assert found.device.type == "cuda"
    assert found.dtype is torch.float64
    assert len([call for call in operators.calls if call.name != "aten::detach"]) < 10


def test_under_autocast_a_norm_is_cast_once_for_all_maps_that_read_it() -> None:
    with imagined_cuda():
        block = Decoder(tiny_config()).model.layers[0]
        x = torch.zeros(2, 19, 32)
        with Operators() as operators:
            block.mlp(block.post_attention_layernorm(x))
    # The norm's output, and the three weights, which autocast keeps for the next use.
    casts = [call for call in operators.named("aten::_to_copy") if call.made != [torch.Size([32])]]
    assert [tuple(call.made[0]) for call in casts].count((2, 19, 32)) == 1
