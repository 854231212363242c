"""The chat of a model file: finding the template it carries, with its special tokens and its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from apr_dist.apr.layout import TOKENIZER_TEXT
from apr_dist.apr.metadata import AprMetadata
from apr_dist.apr.reader import AprReader
from apr_dist.corpus.chat_template import ChatTemplate
from apr_dist.corpus.chat_tokenizer import ChatTokenizer
from apr_dist.corpus.tokenizer import load_tokenizer
from apr_dist.errors import TokenizerError
from apr_dist.interop.embedding import embedded_files, end_token_ids
from apr_dist.parsing import parse_json


@dataclass(frozen=True, kw_only=True)
class ModelChat:
    """What turns a model's conversations into tokens.

    Attributes:
        template: its chat template; None if it carries none.
        tokenizer: its tokenizer.
        tokenizer_json: the text of that.
        tokenizer_from: where that came from: the model file or a folder.
        end_ids: tokens at which the model stops, as far as its file states them.
    """

    template: ChatTemplate | None
    tokenizer: ChatTokenizer
    tokenizer_json: bytes
    tokenizer_from: Path
    end_ids: frozenset[int]

    def needed(self, path: Path) -> ChatTemplate:
        """The template.

        Raises:
            TokenizerError: there is none.
        """
        if self.template is None:
            raise TokenizerError(
                "the model carries no chat template",
                where=path,
                expected="a chat template in its metadata or next to its tokenizer",
                remedy=f"give it one: apr-dist stamp {path} -o OUTPUT.apr --chat-template FILE.jinja",
            )
        return self.template


def read_chat(path: Path, *, tokenizer: Path | None = None) -> ModelChat:
    """The chat of a model file, without its weights.

    Args:
        path: an APR v2 file.
        tokenizer: tokenizer folder; None takes the one inside the file, else ``model.tokenizer`` next to it.

    Raises:
        ModelFileError: the file is missing or damaged.
        TokenizerError: there is no tokenizer, or it or the template cannot be used.
    """
    with AprReader(path, verify="structure") as reader:
        return chat_of(reader.metadata, path, tokenizer)


def chat_of(metadata: AprMetadata, path: Path, tokenizer: Path | None) -> ModelChat:
    """As `read_chat`, for a file whose metadata are read.

    Raises:
        TokenizerError: there is no tokenizer, or it or the template cannot be used.
    """
    source, files = _tokenizer_files(metadata, path, tokenizer)
    roles = {role: token for role, token in (metadata.special_tokens or {}).items() if isinstance(token, str)}
    content = files[TOKENIZER_TEXT]
    reading = ChatTokenizer(content, special_tokens=roles, where=source)
    named = reading.id_of(roles["eos_token"]) if "eos_token" in roles else None
    ends = frozenset({*end_token_ids(metadata), *(() if named is None else (named,))})
    text = chat_template(metadata.chat_template, files, where=source)
    template = (
        None if text is None else ChatTemplate(text=text, special_tokens=roles, end_ids=ends, where=path)
    )
    return ModelChat(
        template=template,
        tokenizer=reading,
        tokenizer_json=content,
        tokenizer_from=source,
        end_ids=ends,
    )


def chat_template(stated: str | None, files: Mapping[str, bytes], *, where: Path) -> str | None:
    """The template that the metadata state, else one of the files beside the tokenizer.

    Raises:
        TokenizerError: the file that should hold it is malformed.
    """
    if stated:
        return stated
    if "chat_template.jinja" in files:
        return files["chat_template.jinja"].decode(errors="replace")
    try:
        found = parse_json(files.get("tokenizer_config.json", b"{}")).get("chat_template")
    except (ValueError, AttributeError) as error:
        raise TokenizerError(f"tokenizer_config.json is not a JSON object ({error})", where=where) from error
    if isinstance(found, list):  # several by name; the one called default speaks
        found = next((one.get("template") for one in found if one.get("name") == "default"), None)
    return found if isinstance(found, str) else None


def _tokenizer_files(metadata: AprMetadata, path: Path, folder: Path | None) -> tuple[Path, dict[str, bytes]]:
    """The tokenizer that was named, else the one inside, else the one beside; and the files around it."""
    if folder is None and isinstance(metadata.custom.get(TOKENIZER_TEXT), str):
        return path, embedded_files(metadata, where=path)
    source = folder or path.with_suffix(".tokenizer")
    if folder is None and not source.is_dir():
        raise TokenizerError(
            "there is no tokenizer inside the file or beside it",
            where=path,
            expected=f"an embedded one, or the folder {source.name}",
            remedy=f"apr-dist tokenize import-hf FOLDER -o {source}, with the folder the tokenizer is in",
        )
    load_tokenizer(source)  # its checks: whole, of a known kind, unchanged since its import
    return source, {
        file.name: file.read_bytes() for file in source.iterdir() if file.suffix in (".json", ".jinja")
    }
