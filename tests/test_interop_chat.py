"""A chat template gives the text that ``transformers`` gives it."""

from __future__ import annotations

from pathlib import Path

import pytest
from builders.files import write_tokenizer
from transformers import PreTrainedTokenizerFast

from apr_dist.errors import TokenizerError
from apr_dist.interop.chat import render_chat

TEMPLATES = {
    "plain": "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
    "{% endfor %}",
    "generation scope": "{% set x = 'out' %}{% generation %}{% set x = 'in' %}{{ x }}"
    "{% endgeneration %}{{ x }}",
    "break": "{% for m in messages * 3 %}{% if loop.index > 2 %}{% break %}{% endif %}"
    "{{ m.content }}{% endfor %}",
    "continue": "{% for m in messages * 3 %}{% if loop.first %}{% continue %}{% endif %}"
    "{{ m.role }}{% endfor %}",
    "no tools": "{% if tools is not none %}TOOLS{% endif %}{{ tools }}|{% if tools %}x{% else %}y{% endif %}",
    "no documents": "{% if documents is none %}none{% endif %}",
    "undefined": "{% if date is defined %}a{% else %}b{% endif %}",
    "json": "{{ messages | tojson }}{{ messages | tojson(indent=2) }}"
    "{{ {'b': 1, 'a': 'é'} | tojson(sort_keys=true) }}",
    "prompt": "{{ bos_token }}{% if add_generation_prompt %}<go>{% endif %}",
    "white space": "  {% if true %}\n  x\n  {% endif %}\n y",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_is_rendered_as_the_library_renders_it(name: str, tmp_path: Path) -> None:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(write_tokenizer(tmp_path / "t") / "tokenizer.json"),
        bos_token="<s>",
        eos_token="<e>",
    )
    expected = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hé <x>"}],
        chat_template=TEMPLATES[name],
        tokenize=False,
        add_generation_prompt=True,
    )
    special = {"bos_token": "<s>", "eos_token": "<e>"}
    assert render_chat(TEMPLATES[name], "hé <x>", special_tokens=special, where=tmp_path) == expected


@pytest.mark.parametrize("template", ["{% generation %}x", "{% for %}", "{{ ''.__class__.__mro__ }}"])
def test_a_template_that_is_malformed_or_reaches_out_is_refused(template: str, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="chat template cannot be used"):
        render_chat(template, "x", special_tokens={}, where=tmp_path)
