"""Model files and shards of conversations: what they are encoded for, and what makes text of them again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from apr_dist.corpus.encode_chat import ChatModel
from apr_dist.corpus.preview import Decode
from apr_dist.corpus.tokenizer import identify, load_tokenizer
from apr_dist.corpus.tokenizer_json import parse_tokenizer_json
from apr_dist.data.manifest import Manifest
from apr_dist.errors import TokenizerError
from apr_dist.interop.chat import ModelChat, read_chat


def decoder_of(manifest: Manifest, named: Path | None = None) -> Decode:
    """What makes text of the ids of a shard folder.

    Args:
        manifest: of the folder.
        named: a tokenizer folder; None takes the one that the manifest names, or that of its model file.

    Raises:
        TokenizerError: there is none, or it is another than the ids came from.
    """
    path = named or (Path(manifest.tokenizer_dir) if manifest.tokenizer_dir else None)
    model = manifest.source.get("model")
    if path is not None and (named is not None or path.is_dir()):
        loaded = load_tokenizer(path)
        found, sha256 = loaded.tokenizer, loaded.identity.sha256
    elif isinstance(model, str) and Path(model).is_file():
        path, chat = Path(model), read_chat(Path(model))
        found, sha256 = chat.tokenizer.tokenizer, chat_model(path, chat).identity.sha256
    else:
        raise TokenizerError(
            f"neither its tokenizer ({path}) nor its model ({model}) is there",
            where=manifest.folder,
            remedy="name a tokenizer folder with --tokenizer",
        )
    if manifest.tokenizer is not None and manifest.tokenizer.sha256 != sha256:
        raise TokenizerError(
            f"it is not the tokenizer the shards were made with (sha256 {sha256[:16]}...)",
            where=path,
            expected=f"sha256 {manifest.tokenizer.sha256[:16]}..., as {manifest.folder} records",
        )
    return lambda ids: _decode(found, ids)


def _decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False))


def chat_model(path: Path, chat: ModelChat) -> ChatModel:
    """The model that conversations are encoded for."""
    beside = path.with_suffix(".tokenizer")
    if chat.tokenizer_from.is_dir():
        identity, folder = load_tokenizer(chat.tokenizer_from).identity, chat.tokenizer_from
        return ChatModel(path=path, identity=identity, tokenizer_dir=folder)
    content = chat.tokenizer_json
    roles = dict(chat.template.special_tokens) if chat.template else {}
    identity = identify(parse_tokenizer_json(content, where=path), content, roles)
    return ChatModel(path=path, identity=identity, tokenizer_dir=beside if beside.is_dir() else None)
