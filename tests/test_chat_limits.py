"""No expression of a chat template builds more than the limit, and ordinary ones give what Jinja gives."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import pytest
from builders.chats import user
from jinja2.sandbox import ImmutableSandboxedEnvironment

from apr_dist.corpus import chat_limits
from apr_dist.corpus.chat_limits import measured_filters
from apr_dist.corpus.chat_template import ChatTemplate
from apr_dist.errors import CorpusError

DOUBLED = "{% set a = 'x' * 2**24 %}" + "{% set a = a ~ a %}" * 12
MANY = "{% set a = 'x' * 10**6 %}{% for i in range(9999) %}{{ a }}{% endfor %}"
NESTED = "{% set a = ['x', 'x'] %}" + "{% set a = [a, a] %}" * 40
HUGE = {
    "center": "{{ 'x'.center(10**9) }}",
    "ljust": "{{ 'x'.ljust(10**9) }}",
    "rjust of a text that is escaped": "{{ ('x' | e).rjust(10**9) }}",
    "zfill": "{{ '1'.zfill(10**9) }}",
    "a width by name": "{{ '\t'.expandtabs(tabsize=10**9) }}",
    "tabs": "{{ ('\t' * 10**6).expandtabs(10**4) }}",
    "bytes": "{{ 'x'.encode().center(10**9) }}",
    "bytes of a number": "{{ (1).to_bytes(10**9, 'big') }}",
    "a method through attr": "{{ ('x' | attr('center'))(10**9) }}",
    "a product": "{{ 'x' * 10**9 }}",
    "a product of a list": "{{ [1] * 10**9 }}",
    "a product of a tuple": "{{ (10**9 * (1, 2)) | length }}",
    "a product in steps": "{% set a = 'x' * 10**4 %}{{ a * 10**4 }}",
    "a sum in steps": "{% set a = 'x' * 2**25 %}{% set a = a + a %}{{ a + a }}",
    "a sum of tuples": "{% set a = (1, 2) * 2**21 %}{% set a = a + a %}{{ (a + a) | length }}",
    "~ in steps": DOUBLED,
    "~ of many": "{% set a = 'x' * 2**22 %}{{ " + " ~ ".join(["a"] * 20) + " }}",
    "a power": "{{ 2 ** (10**9) }}",
    "a power of powers": "{{ 10 ** 60 ** 9 }}",
    "a product of numbers": "{% set a = 10 ** 60 %}" + "{% set a = a * a %}" * 40 + "{{ a }}",
    "%": "{{ '%1000000000d' % 1 }}",
    "% with a precision": "{{ '%.1000000000f' % 1 }}",
    "% with a width of its arguments": "{{ '%*d' % (10**9, 1) }}",
    "% by name": "{{ '%(a)1000000000s' % {'a': 1} }}",
    "% with brackets in a name": "{{ '%((a))1000000000d' % {'(a)': 1} }}",
    "% many times": "{{ ('%(a)s' * 10**4) % {'a': 'x' * 10**6} }}",
    "the filter format": "{{ '%1000000000d' | format(1) }}",
    "format": "{{ '{:1000000000}'.format(1) }}",
    "format with a width of its arguments": "{{ '{:{}}'.format(1, 10**9) }}",
    "format many times": "{{ ('{0}' * 10**4).format('x' * 10**6) }}",
    "format_map": "{{ '{a:1000000000}'.format_map({'a': 1}) }}",
    "replace": "{{ ('x' * 10**5).replace('x', 'y' * 10**5) }}",
    "replace of nothing": "{{ ('x' * 10**5).replace('', 'y' * 10**5) }}",
    "the filter replace, by name": "{{ ('x' * 10**5) | replace(new='y' * 10**5, old='x') }}",
    "join": "{{ ('x' * 10**5).join(range(10**5)) }}",
    "the filter join": "{{ range(10**5) | join('x' * 10**5) }}",
    "join of what is gone through once": "{{ ('x' * 10**5).join(range(10**4) | map('string')) }}",
    "the filter center": "{{ 'x' | center(10**9) }}",
    "center for each": "{{ ['x'] | map('center', 10**9) | join }}",
    "indent": "{{ 'x\ny' | indent(10**9) }}",
    "indent of many lines": "{{ ('\n' * 10**5) | indent('x' * 10**5) }}",
    "tojson": "{{ [[1]] | tojson(indent=10**9) }}",
    "tojson with a separator": "{{ ([1] * 10**5) | tojson(separators=('x' * 10**5, ':')) }}",
    "batch": "{{ [1] | batch(10**9, 'x') | list | length }}",
    "slice": "{{ [1] | slice(10**9) | list | length }}",
    "round": "{{ 1.5 | round(10**9, 'ceil') }}",
    "sum": "{{ ([[1] * 10**4] * 10**4) | sum(start=[]) | length }}",
    "wordwrap": "{{ ('x ' * 10**6) | wordwrap(2, wrapstring='y' * 10**6) }}",
    "a list of letters": "{{ ('x' * 10**7) | list | length }}",
    "a text taken apart": "{{ ('x ' * 10**7).split() | length }}",
    "a value in values": NESTED + "{{ a }}",
    "a value in values as text": NESTED + "{{ a | string }}",
    "a value in values as upper case": NESTED + "{{ a | upper }}",
    "a value in values as JSON": NESTED + "{{ a | tojson }}",
    "a value in values with ~": NESTED + "{{ a ~ '' }}",
    "a value in values with %": NESTED + "{{ '%s' % a }}",
    "a block that is kept": MANY.replace("{% for", "{% set b %}{% for") + "{% endset %}{{ b | length }}",
    "a macro": "{% macro m() %}" + MANY + "{% endmacro %}{{ m() | length }}",
    "a method without a rule": "{{ ('x' * 10**5).translate({120: 'y' * 10**5}) }}",
}


@pytest.mark.parametrize("about", HUGE)
def test_an_expression_that_would_build_too_much_is_refused_before_it_does(about: str) -> None:
    template = ChatTemplate(text=HUGE[about], where="model.apr")
    tracemalloc.start()
    try:
        with pytest.raises(CorpusError, match=r"SecurityError: (it (builds|computes|formats)|the method)"):
            template.render([user("x")])
        assert tracemalloc.get_traced_memory()[1] < 300 * 2**20
    finally:
        tracemalloc.stop()


def test_values_that_are_all_kept_are_counted_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_limits, "LARGEST", 1000)
    template = ChatTemplate(
        text="{% set ns = namespace(l=[]) %}{% for i in range(n) %}"
        "{% set ns.l = ns.l + ['x'.center(900)] %}{% endfor %}",
        variables={"n": 999},
    )
    with pytest.raises(CorpusError, match="it builds values of more than 64,000 characters in all"):
        template.render([user("x")])
    replace(template, variables={"n": 40}).render([user("x")])


ORDINARY = [
    "{{ 'x'.center(9) ~ 'y'.rjust(4, '.') ~ '7'.zfill(3) ~ 'a\tb'.expandtabs(4) }}",
    "{{ '%5.2f|%-6s|%s%% * %d' % (1.5, 'x', [1], 12345678901) }}{{ '%(a)s%%' % {'a': 1} }}",
    "{{ '{:>6}|{x!r:8}|{{}}: {}'.format(1, 2, x='y') }}",
    "{{ 'a: {}, b: {}'.format(12345678901, 'x' | e) }}",
    "{{ ', '.join(['a', 'b'] | map('upper')) }}{{ [1, [2]] | join('-') }}{{ range(5) | join }}",
    "{{ 'a\nb\n\nc' | indent }}|{{ 'a\nb' | indent('> ', first=true) }}|{{ 'a b c' | wordwrap(3) }}",
    "{{ 'abcabc'.replace('b', 'xx', 1) }}{{ 'aaa' | replace('a', 'bc', 2) }}{{ 5 | replace(5, 'x') }}",
    "{{ [1, 2, 3, 4, 5] | batch(2, 0) | list }}{{ [1, 2, 3, 4] | slice(3) | map('list') | list }}",
    "{{ 'x' * 3 + 'y' }}{{ [1] * 3 + [2] }}{{ (1,) + (2,) }}{{ 3 * 4 ** 2 % 7 - 1 }}{{ 2.5 * 2 }}",
    "{{ [1.25, 2.5] | map('round', 1) | join(' ') }}{{ [[1], [2]] | sum(start=[]) }}{{ [1, 2] | sum }}",
    "{{ 'a,b'.split(',') }}{{ 'a\nb'.splitlines() }}{{ 'abc' | list }}{{ 'A b' | title | lower | trim }}",
    "{{ {'a': [1, {'b': none}]} }}{{ [1, 'x'] | string }}{{ {'a': 1} | items | list }}{{ 'x' | length }}",
    "{% set b %}a{{ 1 }}{% endset %}{{ b ~ b }}{% macro m(x) %}<{{ x }}>{% endmacro %}{{ m('<') }}",
    "{{ 'x'.upper().startswith('X') }}{{ (10).bit_length() }}{{ '<b>' | e ~ none }}",
    "{{ ('<b>x</b>' | e).striptags() }}{{ '<b>x</b>' | striptags }}{{ 'x' * true }}",
]


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_expressions_give_what_jinja_s_own_sandbox_gives(text: str) -> None:
    reference = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    assert ChatTemplate(text=text).render([]) == reference.from_string(text).render()


def test_every_filter_has_a_rule_or_is_left_out() -> None:
    known = ImmutableSandboxedEnvironment().filters
    assert set(known) - set(measured_filters(known)) == {"random", "urlize"}
    assert not measured_filters({"of another version": known["center"]})
