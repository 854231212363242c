"""Each gate, as the pure function it is: what passes, what is refused, and what the refusal says."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from apr_dist.atomic_files import temporary_beside
from apr_dist.data.manifest import Manifest, Shard
from apr_dist.errors import (
    ArchitectureRefused,
    DataError,
    OutputError,
    UsageError,
    VocabularyRefused,
    WeightsRefused,
)
from apr_dist.gates.architecture import HeadFacts, check_dimensions, check_family
from apr_dist.gates.data import check_batch, check_disjoint, check_sequences
from apr_dist.gates.output import check_run_dir
from apr_dist.gates.vocabulary import check_same_tokenizer, check_shards, check_tokenizer
from apr_dist.gates.weights import check_names_and_shapes
from apr_dist.model.config import preset
from apr_dist.model.families import Family

WHERE = Path("model.apr")
QWEN2 = [name for name in preset("qwen2.5-0.5b").parameter_shapes() if ".layers.0." in name]
LLAMA = [name for name in preset("smollm2-135m").parameter_shapes() if ".layers.0." in name]
BERT = ["embeddings.word_embeddings.weight", "encoder.layer.0.attention.self.query.weight"]
UNKNOWN = ["blk.0.attn_q.weight", "token_embd.weight"]


def family(names: list[str], **claims: str) -> Family:
    return check_family(claims, names, where=WHERE)


@pytest.mark.falsifies("FALSIFY-INIT-ARCH-MATCH-001")
@pytest.mark.parametrize(
    ("names", "stamp", "shown"), [(QWEN2, "LlamaForCausalLM", "qwen2"), (LLAMA, "Qwen2ForCausalLM", "llama")]
)
def test_a_stamp_that_contradicts_the_tensor_names_is_refused_with_the_command_that_mends_it(
    names: list[str], stamp: str, shown: str
) -> None:
    with pytest.raises(ArchitectureRefused) as refused:
        family(names, hf_architecture=stamp)
    text = str(refused.value)
    assert "[FALSIFY-INIT-ARCH-MATCH-001]" in text
    assert stamp in text
    assert f"apr-dist stamp model.apr --architecture {shown}" in text


@pytest.mark.falsifies("FALSIFY-INIT-ARCH-MATCH-001")
@pytest.mark.parametrize(
    ("names", "claims", "expected"),
    [
        (QWEN2, {"hf_architecture": "Qwen2ForCausalLM"}, Family.QWEN2),
        (LLAMA, {"architecture": "llama"}, Family.LLAMA),
        (QWEN2, {}, Family.QWEN2),
        (QWEN2, {"architecture": "SomethingElseForCausalLM"}, Family.QWEN2),
        (UNKNOWN, {"architecture": "qwen2"}, Family.QWEN2),
    ],
)
def test_witnesses_that_agree_or_of_which_one_is_silent_are_trusted(
    names: list[str], claims: dict[str, str], expected: Family
) -> None:
    assert family(names, **claims) is expected


@pytest.mark.falsifies("FALSIFY-INIT-ARCH-MATCH-001")
def test_metadata_that_contradict_themselves_are_refused() -> None:
    with pytest.raises(ArchitectureRefused, match="FALSIFY-INIT-ARCH-MATCH-001"):
        family(UNKNOWN, architecture="llama", hf_architecture="Qwen2ForCausalLM")


@pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-ARCH-007")
@pytest.mark.parametrize(
    ("names", "claims"),
    [(BERT, {}), (BERT, {"architecture": "bert"}), (UNKNOWN, {"hf_architecture": "RobertaForMaskedLM"})],
)
def test_an_encoder_is_refused_by_name(names: list[str], claims: dict[str, str]) -> None:
    with pytest.raises(ArchitectureRefused, match=r"\[FALSIFY-APR-PRETRAIN-ARCH-007\].*encoder"):
        family(names, **claims)


@pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-INIT-005")
def test_a_file_that_nobody_can_name_is_refused() -> None:
    with pytest.raises(ArchitectureRefused, match="FALSIFY-APR-PRETRAIN-INIT-005"):
        family(UNKNOWN)


DIMENSIONS = preset("qwen2.5-0.5b").to_metadata()


def dimensions(head: HeadFacts, **changes: Any) -> bool:
    values: Mapping[str, Any] = {k: v for k, v in (DIMENSIONS | changes).items() if v is not None}
    return check_dimensions(values, head, family=Family.QWEN2, where=WHERE).tie_word_embeddings


@pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-INIT-005")
@pytest.mark.parametrize(
    "key",
    [
        *("vocab_size", "hidden_size", "num_heads", "num_kv_heads", "intermediate_size", "num_layers"),
        *("max_position_embeddings", "rope_theta", "rms_norm_eps"),
    ],
)
def test_a_missing_dimension_is_refused_and_never_filled_in(key: str) -> None:
    with pytest.raises(ArchitectureRefused, match="FALSIFY-APR-PRETRAIN-INIT-005") as refused:
        dimensions(HeadFacts(present=False, equals_embedding=None), **{key: None})
    assert key in str(refused.value)


@pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-ARCH-003")
def test_every_dimension_of_the_file_reaches_the_model() -> None:
    changed: dict[str, Any] = {
        "vocab_size": 1000,
        "hidden_size": 64,
        "num_heads": 8,
        "num_kv_heads": 4,
        "head_dim": 8,
    }
    changed |= {"intermediate_size": 96, "num_layers": 3, "max_position_embeddings": 77}
    changed |= {"rope_theta": 5e4, "rms_norm_eps": 1e-3, "tie_word_embeddings": False}
    config = check_dimensions(DIMENSIONS | changed, HeadFacts(True, False), family=Family.QWEN2, where=WHERE)
    for key, value in changed.items():
        assert getattr(config, key) == value


@pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-003")
@pytest.mark.parametrize(
    ("claim", "head", "tied"),
    [
        (True, HeadFacts(False, None), True),
        (True, HeadFacts(True, True), True),
        (False, HeadFacts(True, False), False),
        (False, HeadFacts(True, True), False),
        (None, HeadFacts(False, None), True),
        (None, HeadFacts(True, True), True),
        (None, HeadFacts(True, False), False),
    ],
)
def test_the_head_is_tied_as_the_tensors_show(claim: bool | None, head: HeadFacts, tied: bool) -> None:
    assert dimensions(head, tie_word_embeddings=claim) is tied


@pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-003")
@pytest.mark.parametrize(
    ("claim", "head"),
    [(True, HeadFacts(True, False)), (False, HeadFacts(False, None)), ("yes", HeadFacts(True, True))],
)
def test_a_tie_that_contradicts_the_tensors_is_refused(claim: object, head: HeadFacts) -> None:
    with pytest.raises(ArchitectureRefused, match="FALSIFY-APR-DIST-TRAINER-003"):
        dimensions(head, tie_word_embeddings=claim)


SHAPES = {"a.weight": (4, 3), "b.bias": (4,)}


@pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-004")
def test_a_missing_tensor_is_refused_by_name() -> None:
    check_names_and_shapes(SHAPES, dict(SHAPES), where=WHERE)
    with pytest.raises(WeightsRefused, match=r"TRAINER-004.*1 of 2 parameters are missing: b.bias"):
        check_names_and_shapes(SHAPES, {"a.weight": (4, 3)}, where=WHERE)


@pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-005")
@pytest.mark.parametrize("shape", [(3, 4), (12,), (1, 4, 3), (4, 2)])
def test_another_shape_is_refused_and_never_reshaped(shape: tuple[int, ...]) -> None:
    with pytest.raises(WeightsRefused, match=r"TRAINER-005.*a.weight is"):
        check_names_and_shapes(SHAPES, SHAPES | {"a.weight": shape}, where=WHERE)


@pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-006")
def test_a_tensor_that_belongs_to_nothing_is_refused_by_name() -> None:
    with pytest.raises(WeightsRefused, match=r"TRAINER-006.*__training__.m"):
        check_names_and_shapes(SHAPES, SHAPES | {"__training__.m": (1,)}, where=WHERE)


@pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-ARCH-005", "FALSIFY-APR-PRETRAIN-ARCH-009")
def test_reserved_rows_beyond_the_tokenizer_are_accepted_with_an_init() -> None:
    check_tokenizer(effective=151_665, model_vocab=151_936, from_init=True, where=WHERE)
    check_tokenizer(effective=151_936, model_vocab=151_936, from_init=True, where=WHERE)


@pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-ARCH-010")
def test_one_token_too_many_is_refused_even_with_an_init() -> None:
    with pytest.raises(VocabularyRefused, match="FALSIFY-APR-PRETRAIN-ARCH-010"):
        check_tokenizer(effective=151_937, model_vocab=151_936, from_init=True, where=WHERE)


@pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-ARCH-006")
@pytest.mark.parametrize("effective", [151_665, 50_256, 50_258])
def test_from_scratch_any_other_vocabulary_is_refused(effective: int) -> None:
    check_tokenizer(effective=50_257, model_vocab=50_257, from_init=False, where=WHERE)
    with pytest.raises(VocabularyRefused, match="FALSIFY-APR-PRETRAIN-ARCH-006"):
        check_tokenizer(effective=effective, model_vocab=50_257, from_init=False, where=WHERE)


@pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-008")
def test_a_token_id_without_a_row_is_refused_and_an_unrecorded_one_too() -> None:
    check_shards(max_id=511, model_vocab=512, where=WHERE)
    for largest in (512, None):
        with pytest.raises(VocabularyRefused, match="FALSIFY-APR-DIST-TRAINER-008"):
            check_shards(max_id=largest, model_vocab=512, where=WHERE)


@pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-009")
def test_shards_of_another_tokenizer_are_refused() -> None:
    check_same_tokenizer(shards_sha256="a" * 64, tokenizer_sha256="a" * 64, where=WHERE)
    check_same_tokenizer(shards_sha256=None, tokenizer_sha256="a" * 64, where=WHERE)
    with pytest.raises(VocabularyRefused, match="FALSIFY-APR-DIST-TRAINER-009"):
        check_same_tokenizer(shards_sha256="a" * 64, tokenizer_sha256="b" * 64, where=WHERE)


def folder(path: Path, *, sha256: str | None, tokens: int = 100) -> Manifest:
    shard = Shard(file="shard-00000.bin", tokens=tokens, bytes=4 * tokens, sha256=sha256)
    return Manifest(folder=path, shards=(shard,), vocab_size=512, tokenizer=None)


@pytest.mark.falsifies("FALSIFY-APR-DIST-TRAINER-011")
def test_held_out_shards_that_are_trained_on_are_refused(tmp_path: Path) -> None:
    training = folder(tmp_path / "train", sha256="a" * 64)
    check_disjoint(training, folder(tmp_path / "validation", sha256="b" * 64))
    for held_out in (folder(tmp_path / "copy", sha256="a" * 64), replace(training)):
        with pytest.raises(DataError, match="FALSIFY-APR-DIST-TRAINER-011"):
            check_disjoint(training, held_out)
    older = folder(tmp_path / "train", sha256=None)
    with pytest.raises(DataError, match="FALSIFY-APR-DIST-TRAINER-011"):
        check_disjoint(older, older)


def test_a_sequence_longer_than_the_data_is_refused_with_both_numbers(tmp_path: Path) -> None:
    shards = folder(tmp_path, sha256=None, tokens=65)
    assert check_sequences(shards, seq_length=64) == 1
    with pytest.raises(DataError, match=r"65 tokens and a sequence needs 66"):
        check_sequences(shards, seq_length=65)


def test_a_batch_that_does_not_divide_is_refused_with_its_three_numbers() -> None:
    check_batch(batch_size=8, micro_batch=2, world_size=2)
    with pytest.raises(UsageError, match=r"batch_size 9 .* micro-batches of 2 on 2 rank"):
        check_batch(batch_size=9, micro_batch=2, world_size=2)
    with pytest.raises(UsageError, match="batch_size 1 "):
        check_batch(batch_size=1, micro_batch=1, world_size=2)


@pytest.mark.parametrize(
    ("batch", "micro", "world", "proposed"),
    [
        (7, None, 2, "use --batch-size 6 or 8."),
        (9, 2, 2, "use --batch-size 8 or 12, or change --micro-batch-size."),
        (1, None, 4, "use --batch-size 4."),
        (3, 4, 1, "use --batch-size 4, or change --micro-batch-size."),
        (1001, None, 8, "use --batch-size 1000 or 1008."),
    ],
)
def test_the_batch_sizes_next_to_the_refused_one_are_proposed_and_are_accepted(
    batch: int, micro: int | None, world: int, proposed: str
) -> None:
    with pytest.raises(UsageError) as refused:
        check_batch(batch_size=batch, micro_batch=micro, world_size=world)
    assert proposed in str(refused.value)
    for size in re.findall(r"\d+", proposed):
        check_batch(batch_size=int(size), micro_batch=micro, world_size=world)


@pytest.mark.falsifies("FALSIFY-APR-DIST-CHECKPOINT-003")
def test_an_occupied_run_folder_is_refused_unless_told_otherwise(tmp_path: Path) -> None:
    check_run_dir(tmp_path, overwrite=False, needed_bytes=0)
    check_run_dir(tmp_path / "deep" / "new", overwrite=False, needed_bytes=0)
    assert not (tmp_path / "deep").exists()
    (tmp_path / "checkpoint.apr").write_bytes(b"precious")
    with pytest.raises(OutputError, match="FALSIFY-APR-DIST-CHECKPOINT-003"):
        check_run_dir(tmp_path, overwrite=False, needed_bytes=0)
    check_run_dir(tmp_path, overwrite=True, needed_bytes=0)
    with pytest.raises(OutputError, match="is a file"):
        check_run_dir(tmp_path / "checkpoint.apr", overwrite=True, needed_bytes=0)


def test_what_a_killed_process_left_unfinished_does_not_occupy_a_run_folder(tmp_path: Path) -> None:
    temporary_beside(tmp_path / "config.yaml").write_text("mo")
    check_run_dir(tmp_path, overwrite=False, needed_bytes=0)
    (tmp_path / ".hidden").write_text("somebody's own")
    with pytest.raises(OutputError, match="already holds files"):
        check_run_dir(tmp_path, overwrite=False, needed_bytes=0)


@pytest.mark.falsifies("FALSIFY-APR-DIST-CHECKPOINT-004")
def test_a_disk_without_room_for_the_checkpoint_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="FALSIFY-APR-DIST-CHECKPOINT-004"):
        check_run_dir(tmp_path, overwrite=False, needed_bytes=2**60)


def test_a_folder_that_cannot_be_written_is_refused() -> None:
    with pytest.raises(OutputError):
        check_run_dir(Path("/proc/self/run"), overwrite=False, needed_bytes=0)
