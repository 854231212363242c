"""Mixtures of experts: products, routing, losses, layouts and figures, each beside a reference."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from builders.families import odd_config
from builders.files import write_apr
from builders.hf_models import TOKENS, hf_folder, logits_of, reference_logits
from builders.models import random_tokens, tiny_config, tiny_decoder
from builders.runs import metrics
from builders.several import MIXTURE_KEYS
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.models.switch_transformers.modeling_switch_transformers import router_z_loss_func

from apr_dist import open_session
from apr_dist.apr.reader import AprReader
from apr_dist.choices import AdapterKind, KernelChoice
from apr_dist.cli import main as apr_dist_main
from apr_dist.config import TrainConfig
from apr_dist.config.reading import parse_command_line
from apr_dist.config.sections import ComputeSection, RouterSection
from apr_dist.errors import ArchitectureRefused, UsageError, WeightsRefused
from apr_dist.gates.mixtures import check_mixture
from apr_dist.gates.model_file import prove_model
from apr_dist.interop.hf_export import export_huggingface
from apr_dist.interop.importing import import_model
from apr_dist.model.adapters import Adapter, chosen_modules
from apr_dist.model.config import preset
from apr_dist.model.experts import Router
from apr_dist.model.families import Family
from apr_dist.model.flops import flops_per_token
from apr_dist.model.kernels.choice import SETS
from apr_dist.model.kernels.grouped import grouped_mm, looped, runs_grouped_mm
from apr_dist.model.packing import Boundaries
from apr_dist.report.page import write_report
from apr_dist.training.compute import set_up_routers

if TYPE_CHECKING:
    from builders.runs import Inputs

MIXTURES = [Family.MIXTRAL, Family.OLMOE, Family.QWEN3_MOE]


def backward(product: torch.Tensor, *leaves: torch.Tensor) -> list[torch.Tensor]:
    ahead = torch.randn(product.shape, generator=torch.Generator().manual_seed(3))
    return list(torch.autograd.grad(product, leaves, ahead, retain_graph=True))


# --- products -------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [[5, 0, 3, 4], [0, 0, 0, 12], [12, 0, 0, 0]])
def test_the_loop_the_kernel_and_single_products_are_equal_with_groups_that_are_empty(
    counts: list[int],
) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(12, 8, generator=generator, requires_grad=True)
    weight = torch.randn(4, 16, 8, generator=generator, requires_grad=True)
    parts = zip(rows.split(counts), weight.unbind(), strict=True)
    expected = torch.cat([part @ one.t() for part, one in parts])
    assert runs_grouped_mm(rows, weight)
    for multiply in (looped, grouped_mm):
        found = multiply(rows, weight, torch.tensor(counts))
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
        gradients = zip(backward(found, rows, weight), backward(expected, rows, weight), strict=True)
        for one, other in gradients:
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)


def test_rows_that_the_kernel_does_not_take_are_computed_by_the_loop() -> None:
    rows, weight = torch.randn(6, 7), torch.randn(2, 5, 7)
    assert not runs_grouped_mm(rows, weight)
    found = SETS[KernelChoice.PLAIN].grouped(rows, weight, torch.tensor([2, 4]))
    torch.testing.assert_close(found, torch.cat((rows[:2] @ weight[0].t(), rows[2:] @ weight[1].t())))


@pytest.mark.parametrize("family", MIXTURES)
def test_every_set_of_kernels_gives_the_same_loss_and_gradients(family: Family) -> None:
    model, tokens = tiny_decoder(tiny_config(family)), random_tokens(tiny_config(family), (2, 13))
    results = []
    for kernels in (SETS[KernelChoice.PLAIN], SETS[KernelChoice.CPU]):
        model.use_kernels(kernels)
        model.zero_grad()
        loss = model(tokens[:, :-1], tokens[:, 1:])[0]
        loss.backward()
        results.append((loss.detach(), {name: one.grad for name, one in model.named_parameters()}))
    torch.testing.assert_close(results[0], results[1], atol=1e-4, rtol=1e-5)


# --- routing --------------------------------------------------------------------------------------


@pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-051")
def test_router_logits_are_f32_under_autocast() -> None:
    router, x = Router(5, 32), torch.randn(9, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = router(x.bfloat16())
    assert found.dtype is torch.float32
    assert torch.equal(found, torch.nn.functional.linear(x.bfloat16().float(), router.weight))


@pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-051")
@pytest.mark.parametrize("family", ["mixtral", "olmoe", "qwen3_moe"])
def test_experts_whose_logits_tie_are_chosen_as_by_the_reference(family: str, tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "in", odd_config(family, 0))
    tensors = load_file(folder / "model.safetensors")
    for name, value in tensors.items():
        if name.endswith("mlp.gate.weight"):
            value[1:] = value[:1]
    save_file(tensors, folder / "model.safetensors")
    import_model(folder, tmp_path / "x.apr")
    torch.testing.assert_close(logits_of(tmp_path / "x.apr"), reference_logits(folder), atol=1e-5, rtol=1e-5)


@pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-051")
@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe"])
def test_weights_of_experts_are_normalised_as_the_configuration_says(family: str, tmp_path: Path) -> None:
    logits = []
    for normed in (True, False):
        folder = hf_folder(tmp_path / f"in{normed}", odd_config(family, 0) | {"norm_topk_prob": normed})
        import_model(folder, tmp_path / "x.apr", overwrite=True)
        logits.append(logits_of(tmp_path / "x.apr"))
        torch.testing.assert_close(logits[-1], reference_logits(folder), atol=1e-5, rtol=1e-5)
    assert (logits[0] - logits[1]).abs().max() > 1e-3


# --- losses ---------------------------------------------------------------------------------------


@pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-052")
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", MIXTURES)
def test_the_router_s_losses_are_those_of_transformers_and_train_beside_the_loss(
    family: Family, padded: bool
) -> None:
    """Load-balancing loss and z-loss, their gradients, and the loss itself, with rows that end in padding."""
    model = tiny_decoder(tiny_config(family))
    tokens = random_tokens(model.config, (3, 12))
    targets, mask, documents = tokens.roll(-1, 1).clone(), torch.ones(3, 12), None
    if padded:
        for row, length in enumerate((12, 7, 4)):
            mask[row, length:] = 0
            targets[row, length - 1 :] = -100
        documents = Boundaries(torch.tensor([0, 12, 19, 24, 28, 36], dtype=torch.int32), (3, 12))
    assert model.routing is not None
    alone = model(tokens, targets, document_ids=documents)
    plain = torch.autograd.grad(alone[0] / alone[1], list(model.parameters()))
    model.routing.balance, model.routing.z_loss = 0.7, 0.3
    model.routing.take_trained(tokens.device)
    loss, count = model(tokens, targets, document_ids=documents)
    assert loss == alone[0], "the loss that is reported is the language model's alone"
    found = torch.autograd.grad(loss / count, list(model.parameters()))
    seen: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda *call: seen.append(call[-1]))
    model(tokens, targets, document_ids=documents)
    number, each = model.config.num_experts, model.config.active_experts
    balance = load_balancing_loss_func(tuple(seen), number, each, mask if padded else None)
    kept = torch.cat([one[mask.flatten() > 0] for one in seen])
    z_loss = router_z_loss_func(kept[None])
    more = torch.autograd.grad(0.7 * balance + 0.3 * z_loss, list(model.parameters()), allow_unused=True)
    for one, before, after in zip(found, plain, more, strict=True):
        expected = before if after is None else before + after
        torch.testing.assert_close(one, expected, atol=2e-6, rtol=1e-4)
    figures = model.routing.figures(model.routing.take_trained(tokens.device) / 2)
    assert figures is not None
    assert figures.balance_loss == pytest.approx(balance.item(), rel=1e-5)
    assert figures.z_loss == pytest.approx(z_loss.item(), rel=1e-5)
    shares = kept.softmax(dim=-1)
    assert figures.entropy == pytest.approx(-(shares * shares.log()).sum(-1).mean().item(), rel=1e-5)
    assert figures.dropped == 0.0


def test_losses_of_routers_are_refused_for_a_dense_model() -> None:
    for section in (RouterSection(aux_loss=0.1), RouterSection(z_loss=0.1)):
        with pytest.raises(UsageError, match="this model is dense"):
            check_mixture(tiny_config(), ComputeSection(), section)
    check_mixture(tiny_config(), ComputeSection(compile="block"), RouterSection())
    assert set_up_routers(tiny_decoder(tiny_config()), RouterSection(), None) is None  # type: ignore[arg-type]


def test_compiled_blocks_of_a_mixture_are_refused_by_name() -> None:
    with pytest.raises(UsageError, match="mixture of experts are not compiled"):
        check_mixture(tiny_config(Family.OLMOE), ComputeSection(compile="block"), RouterSection())


# --- sizes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("mixtral-8x7b", 46_702_792_704, 12_879_925_248),
        ("olmoe-1b-7b", 6_919_161_856, 1_282_017_280),
        ("qwen3-30b-a3b", 30_532_122_624, 3_353_032_704),
    ],
)
def test_parameters_are_as_published_and_only_active_experts_are_arithmetic(
    name: str, total: int, active: int
) -> None:
    """46.7 and 12.9, 6.9 and 1.3, 30.5 and 3.3 billion in the models' own papers."""
    model = preset(name)
    assert (model.parameter_count(), model.active_parameter_count()) == (total, active)
    embedding = model.vocab_size * model.hidden_size
    assert 0.99 < flops_per_token(model, 1) / (6 * (active - embedding)) < 1.01


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_experts": None}, "num_experts"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok"),
        ({"router_aux_loss_coef": -0.1}, "router_aux_loss_coef"),
        ({"moe_intermediate_size": 20}, "moe_intermediate_size"),
    ],
)
def test_an_impossible_mixture_is_refused_by_its_key(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ArchitectureRefused, match=named):
        tiny_config(Family.OLMOE, **changes)


# --- layouts --------------------------------------------------------------------------------------


@pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-053")
@pytest.mark.parametrize("family", ["mixtral", "olmoe", "qwen3_moe"])
def test_both_layouts_and_older_keys_are_read_and_written_as_transformers_reads_them(
    family: str, tmp_path: Path
) -> None:
    folder = hf_folder(tmp_path / "fused", odd_config(family, 0))
    import_model(folder, tmp_path / "x.apr")
    export_huggingface(tmp_path / "x.apr", tmp_path / "apart", max_shard_bytes=20_000)
    export_huggingface(tmp_path / "x.apr", tmp_path / "fused2", fused_experts=True)
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "theirs")
    names = json.loads((tmp_path / "apart" / "model.safetensors.index.json").read_text())["weight_map"]
    experts = {"mixtral": "block_sparse_moe.experts.2.w3.weight"}.get(family, "mlp.experts.2.up_proj.weight")
    assert f"model.layers.1.{experts}" in names
    expected = logits_of(tmp_path / "x.apr")
    for other in ("apart", "fused2"):
        assert torch.equal(reference_logits(tmp_path / other), reference_logits(folder))
    for number, other in enumerate(("apart", "fused2", "theirs")):
        config = json.loads((tmp_path / other / "config.json").read_text())
        count = config.pop("num_experts", None) or config.pop("num_local_experts")
        config[("num_experts", "num_local_experts")[number % 2]] = count
        (tmp_path / other / "config.json").write_text(json.dumps(config))
        import_model(tmp_path / other, tmp_path / "y.apr", overwrite=True)
        assert torch.equal(logits_of(tmp_path / "y.apr"), expected)


@pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-053")
def test_an_expert_that_lacks_a_matrix_is_named(tmp_path: Path) -> None:
    import_model(hf_folder(tmp_path / "in", odd_config("mixtral", 0)), tmp_path / "x.apr")
    export_huggingface(tmp_path / "x.apr", tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    del tensors["model.layers.1.block_sparse_moe.experts.3.w3.weight"]
    save_file(tensors, tmp_path / "out" / "model.safetensors")
    with pytest.raises(WeightsRefused, match=r"layers\.1\.block_sparse_moe\.experts\.3\.w3"):
        import_model(tmp_path / "out", tmp_path / "y.apr")


def test_two_numbers_of_experts_in_one_configuration_are_refused(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "in", odd_config("qwen3_moe", 0))
    config = json.loads((folder / "config.json").read_text()) | {"num_local_experts": 9}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArchitectureRefused, match="num_local_experts is 9"):
        import_model(folder, tmp_path / "x.apr")


# --- adapters -------------------------------------------------------------------------------------


def test_adapters_are_of_attention_alone_and_experts_are_refused_by_name() -> None:
    config = tiny_config(Family.QWEN3_MOE)
    everything = chosen_modules(config, ["all-linear"])
    assert {name.rpartition(".")[2] for name in everything} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    for target in ("experts", "gate_up_proj", "mlp.gate", "down_proj", "*.mlp.experts*"):
        with pytest.raises(UsageError, match="mixture of experts, whose experts and routers get no adapter"):
            chosen_modules(config, [target])


def test_frozen_experts_may_be_bf16_and_routers_stay_f32() -> None:
    config = tiny_config(Family.MIXTRAL)
    adapter = Adapter(
        kind=AdapterKind.LORA,
        rank=2,
        alpha=4.0,
        dropout=0.0,
        modules=chosen_modules(config, ["q_proj"]),
        base_bits=16,
    )
    model = tiny_decoder(config)
    model.attach(adapter)
    held = {name: one.dtype for name, one in model.named_parameters() if "mlp" in name}
    for name, dtype in held.items():
        assert dtype is (torch.float32 if name.endswith("mlp.gate.weight") else torch.bfloat16), name
    stored = sum(
        one.numel() * one.element_size() for name, one in model.named_parameters() if "lora" not in name
    )
    assert stored == sum(adapter.base_bytes(name, shape) for name, shape in config.parameter_shapes().items())
    assert model(TOKENS % 97).isfinite().all()


def test_router_keys_are_part_of_a_run_s_identity() -> None:
    assert TrainConfig().digest() != TrainConfig(router=RouterSection(z_loss=0.1)).digest()


# --- a run ----------------------------------------------------------------------------------------


def test_a_run_measures_every_expert_and_names_one_that_nobody_uses(
    inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trained, given an expert that is never the best, evaluated, reported, exported and spoken with."""
    (tmp_path / "mixture.json").write_text(json.dumps(MIXTURE_KEYS | {"num_experts_per_tok": 1}))
    run_dir, name = tmp_path / "run", "model.layers.1.mlp.gate.weight"
    flags = [*inputs.data_flags(), "--warmup-steps", "0", "--num-steps", "2", "--progress", "plain"]
    flags += ["--model", str(tmp_path / "mixture.json"), "--mode", "from-scratch", "--run-dir", str(run_dir)]
    with open_session(parse_command_line(flags).config) as session:
        router = session.weight(name)
        router[0] = (router[1] + router[2]) / 2  # never larger than both
        session.set_weight(name, router)
        session.evaluate()
        list(session.steps(until=1))
        session.evaluate()
        list(session.steps())
        session.save()
    said = "".join(capsys.readouterr())
    assert "load-balancing loss x 0.1 (the model's)" in said
    assert "experts got no held-out token: model.layers.1.mlp.experts 0" in said
    assert "experts got no training token since the last evaluation, so nothing trained them" in said
    first, second = metrics(run_dir, "evaluation")
    assert first["router"]["idle_held_out"] == ["model.layers.1.mlp.experts 0"]
    assert [len(row) for row in first["router"]["load"]] == [7, 7]
    assert sum(first["router"]["load"][0]) == pytest.approx(7, abs=1e-3)
    assert "model.layers.1.mlp.experts 0" in second["router"]["idle_trained"]
    figures = metrics(run_dir)[0]["router"]
    assert figures["load_min"] == 0.0 < 1 < figures["load_max"]
    assert (figures["dropped"], figures["idle"] > 0) == (0.0, True)
    assert 0 < figures["entropy"] <= math.log(7) + 1e-6
    write_report([run_dir], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "0% dropped" in page
    model = str(run_dir / "steps" / "000002" / "checkpoint.apr")
    assert apr_dist_main(["export", model, "--to", "huggingface", "-o", str(tmp_path / "out")]) == 0
    fused = ["export", model, "--to", "huggingface", "--fused-experts", "-o", str(tmp_path / "fused")]
    assert apr_dist_main(fused) == 0
    assert "model.layers.0.mlp.experts.gate_up_proj" in load_file(tmp_path / "fused" / "model.safetensors")
    apart, together = (reference_logits(tmp_path / one) for one in ("out", "fused"))
    assert torch.equal(apart, together)
    torch.testing.assert_close(logits_of(Path(model)), apart, atol=1e-5, rtol=1e-5)
    capsys.readouterr()
    assert apr_dist_main(["generate", model, "--prompt", "the", "--max-tokens", "3"]) == 0
    assert apr_dist_main(["plan", "--init", model, "--synthetic", "--seq-length", "32", "--json"]) == 0


@pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-053")
def test_an_expert_that_is_all_zero_is_refused_by_its_number(tmp_path: Path) -> None:
    import_model(hf_folder(tmp_path / "in", odd_config("olmoe", 0)), tmp_path / "x.apr")
    with AprReader(tmp_path / "x.apr") as reader:
        tensors = {name: np.array(reader.float32(name)) for name in reader.tensors}
        tensors["model.layers.0.mlp.experts.down_proj"][5] = 0
        write_apr(tmp_path / "y.apr", tensors, reader.metadata.to_mapping())
    with (
        AprReader(tmp_path / "y.apr") as reader,
        pytest.raises(WeightsRefused, match=r"down_proj\[5\] is zero"),
    ):
        prove_model(reader)
