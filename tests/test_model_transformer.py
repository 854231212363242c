"""The decoder as a whole: its names, its start, what each position sees, and where gradients go."""

from __future__ import annotations

import pytest
import torch
from builders.models import random_tokens, tiny_config, tiny_decoder

from apr_dist.model.families import Family
from apr_dist.model.transformer import Decoder, init_weights

TIES = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


@TIES
@pytest.mark.parametrize("family", Family)
def test_the_state_dict_holds_exactly_the_hugging_face_names(family: Family, tied: bool) -> None:
    config = tiny_config(family, tie_word_embeddings=tied)
    state = tiny_decoder(config).state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == config.parameter_shapes()
    assert list(state) == list(config.parameter_shapes())


def test_a_tied_head_is_the_embedding_parameter_itself() -> None:
    model = tiny_decoder()
    assert model.head_weight is model.model.embed_tokens.weight
    assert sum(parameter.numel() for parameter in model.parameters()) == model.config.parameter_count()


@TIES
def test_building_on_meta_and_resetting_equals_building_directly(tied: bool) -> None:
    config = tiny_config(Family.QWEN3, tie_word_embeddings=tied)
    with torch.device("meta"):
        late = Decoder(config)
    assert all(parameter.is_meta for parameter in late.parameters())
    late.to_empty(device="cpu")
    late.model.rotary.frequencies.fill_(torch.nan)
    late.reset_buffers()
    direct = Decoder(config)
    init_weights(late, seed=3)
    init_weights(direct, seed=3)
    tokens = random_tokens(config, (2, 9))
    assert torch.equal(late(tokens), direct(tokens))


def test_no_buffer_is_saved_and_every_buffer_is_reset() -> None:
    model = tiny_decoder()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert before
    assert not before.keys() & model.state_dict().keys()
    for buffer in model.buffers():
        buffer.fill_(torch.nan)
    model.reset_buffers()
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())


def test_no_two_matrices_start_alike_and_the_seed_decides() -> None:
    config = tiny_config(Family.LLAMA, num_layers=3, tie_word_embeddings=False)
    first, again, other = (Decoder(config) for _ in range(3))
    for model, seed in ((first, 1), (again, 1), (other, 2)):
        init_weights(model, seed=seed)
    matrices = {name: value for name, value in first.state_dict().items() if value.dim() == 2}
    starts = {tuple(value.flatten()[:4].tolist()) for value in matrices.values()}
    assert len(starts) == len(matrices) == 7 * 3 + 2
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in first.state_dict().items())
    assert all(not torch.equal(value, other.state_dict()[name]) for name, value in matrices.items())


def test_weights_start_with_the_published_spread() -> None:
    config = tiny_config(Family.QWEN2, hidden_size=256, num_layers=8, vocab_size=500)
    model = Decoder(config)
    init_weights(model, seed=0)
    for name, value in model.state_dict().items():
        if name.endswith("norm.weight"):
            assert torch.equal(value, torch.ones_like(value))
        elif name.endswith(".bias"):
            assert torch.equal(value, torch.zeros_like(value))
        else:
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            assert value.std().item() == pytest.approx(0.02 / 4 if residual else 0.02, rel=0.03)


def test_a_fresh_model_knows_nothing() -> None:
    config = tiny_config(vocab_size=512)
    model = Decoder(config)
    init_weights(model, seed=0)
    tokens = random_tokens(config, (2, 33))
    total, count = model(tokens[:, :-1], tokens[:, 1:])
    assert (total / count).item() == pytest.approx(torch.tensor(512.0).log().item(), abs=0.02)


@pytest.mark.parametrize("family", Family)
def test_no_position_sees_the_future(family: Family) -> None:
    config = tiny_config(family)
    model, tokens = tiny_decoder(config), random_tokens(config, (1, 12))
    changed = tokens.clone()
    changed[0, 7:] = (changed[0, 7:] + 1) % config.vocab_size
    before, after = model(tokens), model(changed)
    assert torch.allclose(before[:, :7], after[:, :7], atol=1e-6)
    assert (before[:, 7:] - after[:, 7:]).abs().amax(-1).min() > 1e-3


def test_one_sequence_of_a_batch_does_not_see_another() -> None:
    model = tiny_decoder()
    tokens = random_tokens(model.config, (3, 10))
    assert torch.allclose(model(tokens)[1], model(tokens[1:2])[0], atol=1e-5)


@pytest.mark.parametrize("family", Family)
def test_every_parameter_receives_a_gradient(family: Family) -> None:
    config = tiny_config(family, tie_word_embeddings=False)
    model = tiny_decoder(config)
    tokens = random_tokens(config, (2, 9))
    total, _ = model(tokens[:, :-1], tokens[:, 1:])
    total.backward()
    norms = {name: parameter.grad.norm() for name, parameter in model.named_parameters()}
    # A key's bias shifts all scores of a row alike but for RoPE, so its gradient is small, not zero.
    assert all(norm > 1e-6 for norm in norms.values()), norms


def test_the_loss_of_forward_is_the_cross_entropy_of_its_logits() -> None:
    model = tiny_decoder()
    tokens = random_tokens(model.config, (2, 9))
    total, count = model(tokens[:, :-1], tokens[:, 1:])
    logits = model(tokens[:, :-1])
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum"
    )
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    assert count == 16


def test_int32_tokens_give_the_same_logits() -> None:
    model = tiny_decoder()
    tokens = random_tokens(model.config, (2, 9))
    assert torch.equal(model(tokens), model(tokens.int()))


def test_positions_may_be_given_and_only_their_differences_matter() -> None:
    model = tiny_decoder()
    tokens = random_tokens(model.config, (2, 9))
    positions = torch.arange(9).expand(2, 9)
    assert torch.equal(model(tokens), model(tokens, position_ids=positions))
    assert torch.allclose(model(tokens), model(tokens, position_ids=positions + 5), atol=1e-4)
    assert not torch.allclose(model(tokens), model(tokens, position_ids=positions * 2), atol=1e-2)


def test_bf16_stays_near_f32() -> None:
    model = tiny_decoder()
    tokens = random_tokens(model.config, (2, 9))
    exact = model(tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model(tokens)
    assert (mixed.float() - exact).abs().max() < 0.03 * exact.abs().max()
