"""The tokens that a tokenizer puts before and after a text, as its post-processor states them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class TextEnds(NamedTuple):
    """What is put around a text: tokens, None for nothing."""

    begin: str | None
    end: str | None


def post_processor(begin: tuple[str, int] | None, end: tuple[str, int] | None) -> dict[str, Any] | None:
    """A post-processor that puts these tokens (with their ids) around each text; None puts nothing."""
    if begin is None and end is None:
        return None
    before, after = [_special(begin[0])] if begin else [], [_special(end[0])] if end else []
    single, second = ([*before, {"Sequence": {"id": one, "type_id": 0}}, *after] for one in "AB")
    named = dict(one for one in (begin, end) if one is not None)
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, *second],
        "special_tokens": {
            token: {"id": token, "ids": [index], "tokens": [token]} for token, index in named.items()
        },
    }


def text_ends(recorded: Mapping[str, Any]) -> TextEnds | None:
    """What a tokenizer.json puts around a text; None when that is more than one token on a side."""
    stated = recorded.get("post_processor")
    steps = stated.get("processors", [stated]) if isinstance(stated, Mapping) else []
    found = TextEnds(None, None)
    for step in steps:
        if step.get("type") == "ByteLevel":
            continue
        ends = _template_ends(step) if step.get("type") == "TemplateProcessing" else None
        if ends is None or found != TextEnds(None, None):
            return None
        found = ends
    return found


def _template_ends(step: Mapping[str, Any]) -> TextEnds | None:
    single = step.get("single") or []
    places = [place for place, piece in enumerate(single) if "Sequence" in piece]
    if len(places) != 1:
        return None
    before, after = single[: places[0]], single[places[0] + 1 :]
    if len(before) > 1 or len(after) > 1:
        return None
    tokens = step.get("special_tokens") or {}
    names = [piece["SpecialToken"]["id"] for piece in (*before, *after)]
    if any(len(tokens.get(name, {}).get("tokens", [name])) != 1 for name in names):
        return None
    texts = {name: tokens.get(name, {}).get("tokens", [name])[0] for name in names}
    return TextEnds(
        texts[before[0]["SpecialToken"]["id"]] if before else None,
        texts[after[0]["SpecialToken"]["id"]] if after else None,
    )


def _special(token: str) -> dict[str, Any]:
    return {"SpecialToken": {"id": token, "type_id": 0}}
