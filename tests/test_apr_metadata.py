"""Metadata JSON: order, aliases, kinds, and what is kept."""

from __future__ import annotations

import json

import pytest

from apr_dist.apr.metadata import ALIASES, KEYS, AprMetadata
from apr_dist.errors import DamagedModelFile


def test_typed_keys_come_in_table_order_and_custom_keys_after() -> None:
    metadata = AprMetadata.from_mapping(
        {"zeta": 1, "hidden_size": 4, "architecture": "llama", "alpha": 2, "name": "n", "license": "MIT"}
    )
    assert metadata.dump() == (
        b'{"model_type":"","name":"n","license":"MIT","data_source":null,"data_license":null,'
        b'"total_size":0,"param_count":0,"architecture":"llama","hidden_size":4,"alpha":2,"zeta":1}'
    )


def test_custom_keys_of_a_file_keep_their_order_and_values() -> None:
    raw = b'{"zeta":{"b":1,"a":[null,true]},"hidden_size":4,"tokenizer.vocabulary":["a"],"alpha":"\xc3\xa9"}'
    metadata = AprMetadata.parse(raw)
    assert list(metadata.custom) == ["zeta", "tokenizer.vocabulary", "alpha"]
    assert AprMetadata.parse(metadata.dump()) == metadata.replace(model_type="", total_size=0, param_count=0)
    assert (
        b'"zeta":{"b":1,"a":[null,true]},"tokenizer.vocabulary":["a"],"alpha":"\xc3\xa9"}' in metadata.dump()
    )


@pytest.mark.parametrize(
    ("key", "alias"), [(key, alias) for key, group in ALIASES.items() for alias in group]
)
def test_an_alias_is_promoted_and_never_written_beside_its_key(key: str, alias: str) -> None:
    promoted = AprMetadata.parse(json.dumps({alias: 3}).encode())
    assert getattr(promoted, key) == 3
    both = AprMetadata.parse(json.dumps({key: 5, alias: 3}).encode())
    assert getattr(both, key) == 5
    for metadata in (promoted, both):
        assert alias not in json.loads(metadata.dump())


def test_the_first_alias_in_the_table_wins() -> None:
    assert AprMetadata.parse(b'{"n_embd":1,"hidden_dim":2}').hidden_size == 2


@pytest.mark.falsifies("FALSIFY-APR-PRETRAIN-INIT-005")
@pytest.mark.parametrize("key", list(KEYS)[list(KEYS).index("architecture") :])
def test_an_architecture_key_of_the_wrong_kind_is_refused_and_named(key: str) -> None:
    with pytest.raises(DamagedModelFile, match=key) as caught:
        AprMetadata.parse(json.dumps({key: ["no"]}).encode())
    assert caught.value.falsifier == "FALSIFY-APR-PRETRAIN-INIT-005"


def test_whole_numbers_serve_as_floats_but_not_the_other_way() -> None:
    assert AprMetadata.parse(b'{"rope_theta":10000}').rope_theta == 10000.0
    with pytest.raises(DamagedModelFile, match="num_layers"):
        AprMetadata.parse(b'{"num_layers":12.0}')


def test_custom_keys_can_be_set_and_removed() -> None:
    metadata = AprMetadata.parse(b'{"z":1,"y":2}').with_custom({"c": 3, "b": 4, "y": None})
    assert dict(metadata.custom) == {"z": 1, "b": 4, "c": 3}
    assert list(metadata.custom) == ["z", "b", "c"]


def test_a_long_string_full_of_brackets_is_no_nesting() -> None:
    raw = json.dumps({"template": "[{" * 200_000 + '\\"' * 10}).encode()
    assert AprMetadata.parse(raw).custom["template"].startswith("[{")
