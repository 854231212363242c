"""inspect, validate, stamp and diff as functions: what they find, change and refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders.files import (
    TINY_METADATA,
    RawEntry,
    assemble,
    flipped,
    tiny_tensors,
    write_apr,
    write_tokenizer,
)

from apr_dist.apr.layout import DType, Flag, align
from apr_dist.apr.metadata import AprMetadata
from apr_dist.apr.quality import QualityFacts, score_quality
from apr_dist.apr.reader import AprReader
from apr_dist.errors import (
    ArchitectureRefused,
    DamagedModelFile,
    OutputError,
    TokenizerError,
    UsageError,
    WeightsRefused,
)
from apr_dist.interop.diff import diff_files
from apr_dist.interop.inspection import inspect_file, validate_file
from apr_dist.interop.stamp import spdx, stamp_file

EMBEDDING = "model.embed_tokens.weight"


def tiny_file(path: Path, metadata: dict[str, Any] | None = None, **options: bool) -> Path:
    return write_apr(path, tiny_tensors(**options), TINY_METADATA | (metadata or {}))


def test_inspect_tells_what_a_file_is(tmp_path: Path) -> None:
    report = inspect_file(tiny_file(tmp_path / "x.apr"))
    assert (report.family_claimed, report.family_shown, report.tied) == ("llama", "llama", True)
    assert (report.checksum, report.version, report.flags) == ("valid", "2.0", ("ROW_MAJOR",))
    assert report.tensor_count == len(tiny_tensors())
    assert report.param_count == sum(array.size for array in tiny_tensors().values())
    assert report.dtypes == {"F32": (report.tensor_count, report.param_count * 4)}
    assert report.tokenizer is None
    assert json.loads(json.dumps(report.to_json()))["metadata"]["hidden_size"] == 64


def test_inspect_reports_a_wrong_checksum_without_failing(tmp_path: Path) -> None:
    path = tiny_file(tmp_path / "x.apr")
    content = path.read_bytes()
    path.write_bytes(flipped(content, len(content) - 200))
    assert inspect_file(path).checksum == "wrong"
    path.write_bytes(content[:-4])
    assert inspect_file(path).checksum == "absent"


def test_inspect_shortens_what_nobody_reads(tmp_path: Path) -> None:
    report = inspect_file(tiny_file(tmp_path / "x.apr", {"tokenizer.vocabulary": ["tok"] * 5000}))
    assert report.to_json()["metadata"]["tokenizer.vocabulary"] == "<5,000 values>"
    assert report.tokenizer is not None
    assert report.tokenizer.tokens == 5000


def test_a_tokenizer_beside_the_file_is_found(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "x.tokenizer")
    report = inspect_file(tiny_file(tmp_path / "x.apr"))
    assert report.tokenizer is not None
    assert (report.tokenizer.where, report.tokenizer.tokens) == (str(tmp_path / "x.tokenizer"), 34)


def test_a_complete_file_is_ship_ready_and_an_unstamped_one_says_what_to_run(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "tokenizer")
    provenance = {"license": "MIT", "data_source": "stdlib", "data_license": "PSF-2.0"}
    plain = tiny_file(tmp_path / "plain.apr")
    stamp_file(plain, tmp_path / "full.apr", changes=provenance, tokenizer=folder)
    full = inspect_file(tmp_path / "full.apr", quality=True).quality
    assert full is not None
    assert (full.score, full.ship_ready) == (100, True)
    assert not any(part.remedies for part in full.parts)
    bare = write_apr(tmp_path / "bare.apr", tiny_tensors(), {"architecture": "llama", "hidden_size": 64})
    quality = inspect_file(bare, quality=True).quality
    assert quality is not None
    points = {part.name: part.points for part in quality.parts}
    assert points == {"physics": 20, "structural": 10, "provenance": 0, "hf_identity": 0, "tokenizer": 0}
    assert not quality.ship_ready
    hf = next(part for part in quality.parts if part.name == "hf_identity")
    assert hf.remedies == ("apr-dist stamp --hf-architecture", "apr-dist stamp --hf-model-type")


@pytest.mark.parametrize(
    ("change", "part", "lost"),
    [
        ({"checksums_valid": False}, "physics", 10),
        ({"non_finite": "w"}, "physics", 10),
        ({"contradictions": frozenset({"num_layers", "num_heads"})}, "structural", 10),
        ({"family_shown": "qwen2"}, "hf_identity", 20),
        ({"tokenizer_tokens": 41}, "tokenizer", 15),
        ({"tokenizer_tokens": None}, "tokenizer", 15),
    ],
)
def test_each_fault_costs_its_points(change: dict[str, Any], part: str, lost: int) -> None:
    good: dict[str, Any] = {
        "metadata": AprMetadata.from_mapping(
            TINY_METADATA | {"license": "MIT", "data_source": "d", "data_license": "MIT"}
        ),
        "checksums_valid": True,
        "non_finite": None,
        "contradictions": frozenset(),
        "family_shown": "llama",
        "family_claimed": "llama",
        "tokenizer_tokens": 40,
    }
    assert score_quality(QualityFacts(**good)).score == 100
    quality = score_quality(QualityFacts(**(good | change)))
    assert quality.score == 100 - lost
    assert [found.name for found in quality.parts if found.remedies] == [part]


def test_dimensions_that_the_shapes_contradict_cost_points(tmp_path: Path) -> None:
    path = tiny_file(tmp_path / "x.apr", {"hidden_size": 63, "num_layers": 3, "num_heads": 5})
    quality = inspect_file(path, quality=True).quality
    assert quality is not None
    assert next(part.points for part in quality.parts if part.name == "structural") == 5


def test_a_sound_file_is_valid_and_says_what_was_checked(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = validate_file(tiny_file(tmp_path / "x.apr"), progress=lambda a, b: seen.append((a, b)))
    count, values = len(tiny_tensors()), sum(array.size for array in tiny_tensors().values())
    assert {check.gate: check.measured for check in report.checks} == {
        "model file is intact": f"0.3 MB, {count} tensors, checksums match",
        "family agrees with tensor names": "llama (LlamaForCausalLM)",
        "every weight is there": f"{count} of {count} tensors, {values:,} finite values",
    }
    assert seen[-1][0] == seen[-1][1]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.uint16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_no_number_is_found_and_its_tensor_named(
    tmp_path: Path, dtype: type[Any], value: float
) -> None:
    array = np.full((2000, 64), 1.5, np.float32)
    array[1200, 33] = value
    stored = (array.view(np.uint32) >> 16).astype(np.uint16) if dtype is np.uint16 else array.astype(dtype)
    tensors, metadata = tiny_tensors() | {EMBEDDING: stored}, TINY_METADATA | {"vocab_size": 2000}
    with pytest.raises(WeightsRefused, match=f"{EMBEDDING} holds 1 values"):
        validate_file(write_apr(tmp_path / "x.apr", tensors, metadata))


def quantised_file(path: Path, scale: float) -> Path:
    """The tiny model with its final norm as APR_Q8: one scale and 64 small integers."""
    entries: list[RawEntry] = []
    data = b""
    for name, array in sorted(tiny_tensors().items()):
        payload, code = array.tobytes(), 0
        if name == "model.norm.weight":
            payload, code = np.array([scale], "<f4").tobytes() + bytes(range(64)), 129
        entries.append((name.encode(), code, array.shape, len(data), len(payload)))
        data += payload.ljust(align(len(payload)), b"\0")
    path.write_bytes(assemble(entries, data, metadata=json.dumps(dict(TINY_METADATA)).encode()))
    return path


def test_a_quantised_scale_that_is_no_number_is_found(tmp_path: Path) -> None:
    assert validate_file(quantised_file(tmp_path / "x.apr", 0.5)).tensor_count == len(tiny_tensors())
    with pytest.raises(WeightsRefused, match=r"model\.norm\.weight holds 64 values"):
        validate_file(quantised_file(tmp_path / "y.apr", np.nan))


@pytest.mark.falsifies("FALSIFY-INIT-ARCH-MATCH-001")
@pytest.mark.parametrize(
    "claims", [{"hf_architecture": "Qwen2ForCausalLM"}, {"architecture": "qwen3", "hf_model_type": "qwen3"}]
)
def test_a_family_that_the_names_contradict_is_refused_with_the_command_that_mends_it(
    tmp_path: Path, claims: dict[str, str]
) -> None:
    with pytest.raises(ArchitectureRefused, match=r"apr-dist stamp .* --architecture llama"):
        validate_file(tiny_file(tmp_path / "x.apr", claims))


def test_a_tie_that_the_tensors_contradict_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArchitectureRefused, match="differs from the embedding"):
        validate_file(tiny_file(tmp_path / "x.apr", head=True))
    with pytest.raises(ArchitectureRefused, match=r"no lm_head\.weight"):
        validate_file(tiny_file(tmp_path / "y.apr", {"tie_word_embeddings": False}))
    assert inspect_file(tmp_path / "x.apr").tied is None


def test_a_damaged_file_is_not_valid(tmp_path: Path) -> None:
    path = tiny_file(tmp_path / "x.apr")
    path.write_bytes(flipped(path.read_bytes(), 5000))
    with pytest.raises(DamagedModelFile):
        validate_file(path)


def test_stamping_changes_metadata_and_no_tensor_byte(tmp_path: Path) -> None:
    source = tiny_file(tmp_path / "x.apr", {"zz.unknown": {"kept": [1, None]}})
    summary = stamp_file(source, tmp_path / "y.apr", changes={"license": "apache-2.0", "name": None})
    assert summary.changes == (("license", None, "Apache-2.0"),)
    before, after = AprReader(source), AprReader(tmp_path / "y.apr")
    assert all(before.raw(name) == after.raw(name) for name in before.tensors)
    assert after.metadata == before.metadata.replace(license="Apache-2.0")


def test_quantised_tensors_are_stamped_without_being_decoded(tmp_path: Path) -> None:
    source = quantised_file(tmp_path / "x.apr", 0.5)
    stamp_file(source, tmp_path / "y.apr", changes={"license": "MIT"})
    before, after = AprReader(source), AprReader(tmp_path / "y.apr")
    assert after.tensors["model.norm.weight"].dtype is DType.APR_Q8
    assert all(before.raw(name) == after.raw(name) for name in before.tensors)


def test_an_embedded_tokenizer_sets_the_vocabulary_flag(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "tokenizer")
    stamp_file(tiny_file(tmp_path / "x.apr"), tmp_path / "y.apr", changes={}, tokenizer=folder)
    reader = AprReader(tmp_path / "y.apr")
    assert Flag.HAS_VOCAB in reader.header.flags
    assert reader.metadata.custom["tokenizer.json"].encode() == (folder / "tokenizer.json").read_bytes()
    assert len(reader.metadata.custom["tokenizer.vocabulary"]) == 34
    assert reader.metadata.custom["tokenizer.merges"] == ["a b"]


def test_stamping_nothing_is_an_error(tmp_path: Path) -> None:
    source = tiny_file(tmp_path / "x.apr")
    for changes in ({}, {"license": None}, {"hidden_size": 64}):
        with pytest.raises(UsageError, match=r"nothing to change|already"):
            stamp_file(source, tmp_path / "y.apr", changes=changes)
    assert not (tmp_path / "y.apr").exists()


@pytest.mark.parametrize("text", ["apache", "MIT AND", "my own", "", "GPL"])
def test_what_is_no_spdx_expression_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError, match="SPDX"):
        stamp_file(tiny_file(tmp_path / "x.apr"), tmp_path / "y.apr", changes={"license": text})


def test_spdx_expressions_are_spelled_canonically() -> None:
    assert spdx("mit OR apache-2.0", key="license") == "MIT OR Apache-2.0"


def test_stamping_refuses_unknown_keys_missing_tokenizers_and_existing_outputs(tmp_path: Path) -> None:
    source = tiny_file(tmp_path / "x.apr")
    with pytest.raises(UsageError, match="'colour'"):
        stamp_file(source, tmp_path / "y.apr", changes={"colour": "red"})
    (tmp_path / "wordpiece").mkdir()
    (tmp_path / "wordpiece" / "tokenizer.json").write_text('{"model":{"type":"WordPiece","vocab":{}}}')
    with pytest.raises(TokenizerError, match="WordPiece"):
        stamp_file(source, tmp_path / "y.apr", changes={}, tokenizer=tmp_path / "wordpiece")
    with pytest.raises(OutputError, match="exists"):
        stamp_file(source, source, changes={"license": "MIT"})


def test_a_file_equals_itself(tmp_path: Path) -> None:
    path = tiny_file(tmp_path / "x.apr")
    found = diff_files(path, path)
    assert found.equal
    assert found.identical == len(tiny_tensors())


def test_differences_are_found_and_measured(tmp_path: Path) -> None:
    tensors = tiny_tensors()
    first = write_apr(tmp_path / "1.apr", tensors, TINY_METADATA | {"name": "one"})
    changed = {name: array.copy() for name, array in tensors.items()}
    changed["model.norm.weight"][0] += 3
    changed["model.embed_tokens.weight"] = changed["model.embed_tokens.weight"][:30]
    changed["lm_head.weight"] = changed["model.embed_tokens.weight"] + 1
    other = {"name": "two", "vocab_size": 30, "tie_word_embeddings": False}
    second = write_apr(tmp_path / "2.apr", changed, TINY_METADATA | other)
    found = diff_files(first, second)
    assert not found.equal
    assert ("name", "one", "two") in found.metadata
    assert (found.only_first, found.only_second) == ((), ("lm_head.weight",))
    reshaped, norm = found.tensors
    assert (reshaped.shapes, reshaped.max_abs) == (((40, 64), (30, 64)), None)
    assert (norm.name, norm.max_abs) == ("model.norm.weight", 3.0)
    scale = float(np.abs(tensors["model.norm.weight"]).max())
    assert norm.relative == pytest.approx(3 / scale)
    a, b = (values["model.norm.weight"].astype(float) for values in (tensors, changed))
    assert norm.cosine == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize("dtype", [np.float16, np.uint16])
def test_the_same_values_in_another_type_differ_in_type_alone(tmp_path: Path, dtype: type[Any]) -> None:
    tensors, metadata = tiny_tensors(), TINY_METADATA | {"vocab_size": 5000, "total_size": 1}
    values = np.random.default_rng(1).integers(-100, 100, (5000, 64)).astype(np.float32)
    narrow = (values.view(np.uint32) >> 16).astype(np.uint16) if dtype is np.uint16 else values.astype(dtype)
    first = write_apr(tmp_path / "1.apr", tensors | {EMBEDDING: values}, metadata)
    second = write_apr(tmp_path / "2.apr", tensors | {EMBEDDING: narrow}, metadata)
    (found,) = diff_files(first, second).tensors
    name = "BF16" if dtype is np.uint16 else "F16"
    assert (found.dtypes, found.max_abs, found.relative) == (("F32", name), 0.0, 0.0)
    assert found.cosine == pytest.approx(1.0)
