"""One file a family: what identifies it, its keys and names in other formats, and what its block does.

A file of this package without an underscore defines a family; nothing else in the project names one.
``_definition`` has the form that such a file fills in, ``_huggingface`` and ``_gguf`` the keys that all
families share, ``_others`` the families that are refused by name.
"""

from apr_dist.model.families._definition import (
    FULL_ATTENTION,
    SLIDING_ATTENTION,
    Activation,
    Effect,
    FamilyDefinition,
    GgufForm,
    Key,
    Norms,
    layer_kinds,
    rope_layers,
)
from apr_dist.model.families._gguf import KEYS as GGUF_KEYS
from apr_dist.model.families._gguf import TOKENIZER_KEYS
from apr_dist.model.families._huggingface import HF_KEYS
from apr_dist.model.families._registry import (
    UNKNOWN,
    Family,
    decoder_family,
    family_from_tensor_names,
    family_named,
    family_of_gguf,
    family_of_model_type,
    is_encoder,
    normalize_metadata_family,
    only_shares_names,
)

__all__ = [
    "FULL_ATTENTION",
    "GGUF_KEYS",
    "HF_KEYS",
    "SLIDING_ATTENTION",
    "TOKENIZER_KEYS",
    "UNKNOWN",
    "Activation",
    "Effect",
    "Family",
    "FamilyDefinition",
    "GgufForm",
    "Key",
    "Norms",
    "decoder_family",
    "family_from_tensor_names",
    "family_named",
    "family_of_gguf",
    "family_of_model_type",
    "is_encoder",
    "layer_kinds",
    "normalize_metadata_family",
    "only_shares_names",
    "rope_layers",
]
