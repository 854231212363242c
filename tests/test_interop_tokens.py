"""What a model's files say of its tokens reaches its tokenizer, its generation and its exports."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from builders.files import TINY_METADATA, VOCABULARY, tiny_tensors, write_apr, write_tokenizer
from builders.hf_models import SIZES, claims, hf_folder
from tokenizers import Tokenizer

from apr_dist.apr.reader import AprReader
from apr_dist.corpus.tokenizer_json import byte_alphabet
from apr_dist.errors import TokenizerError, UnsupportedModelFile
from apr_dist.interop.gguf_export import GgufType, export_gguf
from apr_dist.interop.hf_export import export_huggingface
from apr_dist.interop.importing import import_model
from apr_dist.interop.stamp import stamp_file
from apr_dist.interop.text_model import open_text_model
from apr_dist.interop.tokenizers import tokenizer_json_from_apr, tokenizer_json_from_gguf
from apr_dist.model.families import Family

BYTES = sorted(byte_alphabet().values())
TOKENS = [*BYTES, "<b>", "<e>", "he"]


def vocabulary_gguf(path: Path, **fields: Any) -> Path:
    """A GGUF of nothing but a byte-level vocabulary: beginning 256, end 257."""
    chosen: dict[str, Any] = {"pre": "gpt-2", "bos_token_id": 256, "eos_token_id": 257} | fields
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(chosen.pop("pre"))
    writer.add_token_list(TOKENS)
    writer.add_token_types([1] * 256 + [3, 3, 1])
    writer.add_token_merges(["h e"])
    for key, value in chosen.items():
        add = writer.add_bool if isinstance(value, bool) else writer.add_uint32
        if value is not None:
            add(f"tokenizer.ggml.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def ids(content: bytes, text: str) -> list[int]:
    return list(Tokenizer.from_str(content.decode()).encode(text).ids)


@pytest.mark.parametrize(
    ("fields", "begins", "ends"),
    [
        ({"add_bos_token": True}, True, False),
        ({"add_bos_token": False, "pre": "llama-bpe"}, False, False),
        ({"pre": "llama-bpe"}, True, False),  # llama.cpp's own default for these cuts
        ({"pre": "llama3"}, True, False),
        ({"pre": "tekken"}, True, False),
        ({"pre": "qwen2"}, False, False),
        ({"add_eos_token": True}, False, True),
        ({"add_bos_token": True, "add_eos_token": True}, True, True),
        ({"pre": "llama-bpe", "bos_token_id": None}, False, False),
    ],
)
def test_tokens_are_put_around_a_text_as_llama_cpp_puts_them(
    fields: dict[str, Any], begins: bool, ends: bool, tmp_path: Path
) -> None:
    content, _ = tokenizer_json_from_gguf(vocabulary_gguf(tmp_path / "x.gguf", **fields))
    assert ids(content, "he") == [256] * begins + [258] + [257] * ends


def test_a_beginning_without_its_token_is_refused(tmp_path: Path) -> None:
    path = vocabulary_gguf(tmp_path / "x.gguf", add_bos_token=True, bos_token_id=None)
    with pytest.raises(TokenizerError, match="bos_token_id"):
        tokenizer_json_from_gguf(path)


def model_with(folder: Path, content: bytes, tmp_path: Path, **metadata: Any) -> Path:
    """An APR file with room for that tokenizer."""
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes(content)
    rows = len(Tokenizer.from_str(content.decode()).get_vocab())
    tensors = tiny_tensors()
    tensors["model.embed_tokens.weight"] = np.ones((rows, 64), np.float32) / 8
    write_apr(tmp_path / "bare.apr", tensors, TINY_METADATA | {"vocab_size": rows} | metadata)
    stamp_file(tmp_path / "bare.apr", tmp_path / "model.apr", changes={}, tokenizer=folder)
    return tmp_path / "model.apr"


@pytest.mark.parametrize("fields", [{"add_bos_token": True}, {"add_eos_token": True}, {}])
def test_what_is_put_around_a_text_travels_to_every_export(fields: dict[str, Any], tmp_path: Path) -> None:
    content, _ = tokenizer_json_from_gguf(vocabulary_gguf(tmp_path / "x.gguf", **fields))
    model = model_with(tmp_path / "t", content, tmp_path)
    export_gguf(model, tmp_path / "out.gguf", kind=GgufType.F32)
    stated = gguf.GGUFReader(tmp_path / "out.gguf").fields
    for key in ("add_bos_token", "add_eos_token"):
        assert stated[f"tokenizer.ggml.{key}"].contents() is fields.get(key, False)
    again, _ = tokenizer_json_from_gguf(tmp_path / "out.gguf")
    export_huggingface(model, tmp_path / "out")
    for one in (again, (tmp_path / "out" / "tokenizer.json").read_bytes()):
        assert ids(one, "he he") == ids(content, "he he")


@pytest.mark.parametrize(
    "normalizer",
    [
        {"type": "Lowercase"},
        {"type": "NFKC"},
        {"type": "NFC"},
        {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]},
        {"type": "Prepend", "prepend": "x"},
    ],
)
def test_a_normaliser_that_gguf_cannot_say_is_refused(normalizer: dict[str, Any], tmp_path: Path) -> None:
    content, _ = tokenizer_json_from_gguf(vocabulary_gguf(tmp_path / "x.gguf"))
    changed = json.loads(content) | {"normalizer": normalizer}
    model = model_with(tmp_path / "t", json.dumps(changed).encode(), tmp_path)
    with pytest.raises(UnsupportedModelFile, match="GGUF has no name"):
        export_gguf(model, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
WORDS = ["\u2581t", "he", "\u2581the", "in", "er", "\u2581a", "re", "on", "at", "th", "\u2581th", "en", "hen"]
LETTERS = ["\u2581", *"abcdefghijklmnopqrstuvwxyz"]
ALL = [*PIECES, *WORDS, *LETTERS]
SCORES = [0.0] * len(PIECES) + [-float(one) for one in range(len(WORDS) + len(LETTERS))]


def sentencepiece_gguf(path: Path, **flags: bool) -> Path:
    """The vocabulary of a SentencePiece BPE, as llama.cpp's converter writes it."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(ALL)
    writer.add_token_scores(SCORES)
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * (len(WORDS) + len(LETTERS)))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    for key, value in flags.items():
        writer.add_bool(f"tokenizer.ggml.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def sentencepiece_ids(text: str, *, prefixed: bool = True) -> list[int]:
    """SentencePiece's own rule: join the neighbours with the best score, the leftmost first."""
    known = {token: one for one, token in enumerate(ALL)}
    parts = list((" " + text if prefixed else text).replace(" ", "\u2581"))
    while True:
        pairs = [
            (-SCORES[known[left + right]], place)
            for place, (left, right) in enumerate(itertools.pairwise(parts))
            if left + right in known and known[left + right] >= len(PIECES)
        ]
        if not pairs:
            break
        place = min(pairs)[1]
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    found = []
    for part in parts:
        found += [known[part]] if part in known else [known[f"<0x{byte:02X}>"] for byte in part.encode()]
    return found


@pytest.mark.parametrize("flags", [{}, {"add_bos_token": False}, {"add_space_prefix": False}])
def test_a_sentencepiece_vocabulary_gives_its_own_ids_there_and_back(
    flags: dict[str, bool], tmp_path: Path
) -> None:
    content, declared = tokenizer_json_from_gguf(sentencepiece_gguf(tmp_path / "x.gguf", **flags))
    assert declared == {"bos_token": "<s>", "eos_token": "</s>"}
    model = model_with(tmp_path / "t", content, tmp_path, special_tokens=declared | {"unk_token": "<unk>"})
    export_gguf(model, tmp_path / "out.gguf", kind=GgufType.F32)
    again, _ = tokenizer_json_from_gguf(tmp_path / "out.gguf")
    choose = random.Random(3)
    begin = [1] if flags.get("add_bos_token", True) else []
    for _ in range(200):
        text = "".join(choose.choices("theinraon  é!", k=choose.randint(1, 30)))
        expected = begin + sentencepiece_ids(text, prefixed=flags.get("add_space_prefix", True))
        assert ids(content, text) == expected, text
        assert ids(again, text) == expected, text
    tokenizer = Tokenizer.from_str(content.decode())
    assert tokenizer.decode(tokenizer.encode("the then é").ids) == "the then é"
    stated = gguf.GGUFReader(tmp_path / "out.gguf").fields
    assert stated["tokenizer.ggml.model"].contents() == "llama"
    assert stated["tokenizer.ggml.token_type"].contents()[:4] == [2, 3, 3, 6]


def folder_with_tokenizer(folder: Path, **config: Any) -> Path:
    """A Llama folder whose tokenizer has 34 tokens; 32 begins and 33 ends a text."""
    write_tokenizer(folder.parent / "t")
    hf_folder(folder, claims(Family.LLAMA) | SIZES | {"eos_token_id": None, "bos_token_id": None} | config)
    (folder / "tokenizer.json").write_bytes((folder.parent / "t" / "tokenizer.json").read_bytes())
    return folder


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({}, {"eos_token_id": [5, 6, 7]}, {5, 6, 7}),
        ({"eos_token_id": [3, 4]}, None, {3, 4}),
        ({"eos_token_id": 3}, {"eos_token_id": 5}, {5}),
        ({"eos_token_id": 3}, {"temperature": 0.7}, {3}),
        ({"eos_token_id": 9}, None, {9}),
    ],
)
def test_generation_stops_at_every_end_that_a_folder_states(
    config: dict[str, Any], generation: dict[str, Any] | None, expected: set[int], tmp_path: Path
) -> None:
    folder = folder_with_tokenizer(tmp_path / "in", **config)
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    import_model(folder, tmp_path / "x.apr")
    assert open_text_model(tmp_path / "x.apr").end_ids >= expected
    export_gguf(tmp_path / "x.apr", tmp_path / "x.gguf", kind=GgufType.F32)
    import_model(tmp_path / "x.gguf", tmp_path / "y.apr")
    assert open_text_model(tmp_path / "y.apr").end_ids >= expected
    export_huggingface(tmp_path / "y.apr", tmp_path / "out")
    stated = json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"]
    assert set(stated if isinstance(stated, list) else [stated]) >= expected


@pytest.mark.parametrize("where", ["special_tokens_map.json", "config.json"])
def test_special_tokens_are_found_in_older_files(where: str, tmp_path: Path) -> None:
    named = {"bos_token": {"content": "<s>"}, "eos_token": "<e>", "pad_token": "<e>"}
    config = {"bos_token_id": 32, "eos_token_id": 33, "pad_token_id": 33} if where == "config.json" else {}
    folder = folder_with_tokenizer(tmp_path / "in", **config)
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ bos_token }}!"}))
    if not config:
        (folder / where).write_text(json.dumps(named))
    import_model(folder, tmp_path / "x.apr")
    metadata = AprReader(tmp_path / "x.apr").metadata
    assert metadata.special_tokens == {"bos_token": "<s>", "eos_token": "<e>", "pad_token": "<e>"}
    assert tokenizer_json_from_apr(tmp_path / "x.apr")[1]["eos_token"] == "<e>"
    model = open_text_model(tmp_path / "x.apr")
    assert 33 in model.end_ids
    assert VOCABULARY > 33
    assert model.encode_chat([{"role": "user", "content": "x"}])[0] == 32
