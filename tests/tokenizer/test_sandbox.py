"""A chat template that would eat memory or time is refused in a sentence; what it may do, it does as in Jinja."""

import jinja2
import pytest

from pairtune.errors import UserError
from pairtune.tokenizer.sandbox import Sandbox
from pairtune.tokenizer.template import ChatTemplate

MESSAGES = [{"role": "user", "content": "Why?\nAnd how?"}, {"role": "assistant", "content": "So."}]
DOUBLED = "{% set ns = namespace(x='ab', l=[1]) %}{% for i in range(60) %}BODY{% endfor %}"
TOO_MUCH = {
    "a product": "{{ 'x' * 3000000000 }}",
    "a product, the other way": "{{ 3000000000 * 'x' }}",
    "a product of lists": "{{ ([0] * 3000000000) | length }}",
    "a product of products": "{{ ('x' * 10000) * 10000 * 1000 }}",
    "a sum that doubles": DOUBLED.replace("BODY", "{% set ns.x = ns.x + ns.x %}"),
    "a list that doubles": DOUBLED.replace("BODY", "{% set ns.l = ns.l + ns.l %}"),
    "a list in a list, written": DOUBLED.replace("BODY", "{% set ns.l = [ns.l, ns.l] %}") + "{{ ns.l }}",
    "a list in a list, as JSON": DOUBLED.replace("BODY", "{% set ns.l = [ns.l, ns.l] %}") + "{{ ns.l | tojson }}",
    "a list in a list, as text": DOUBLED.replace("BODY", "{% set ns.l = [ns.l, ns.l] %}") + "{{ (ns.l | string)[:1] }}",
    "a tilde that doubles": DOUBLED.replace("BODY", "{% set ns.x = ns.x ~ ns.x %}"),
    "a block that doubles": DOUBLED.replace("BODY", "{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}"),
    "a join that doubles": DOUBLED.replace("BODY", "{% set ns.x = [ns.x, ns.x] | join %}"),
    "a join's method": DOUBLED.replace("BODY", "{% set ns.x = ''.join([ns.x, ns.x]) %}"),
    "a replacement that doubles": DOUBLED.replace("BODY", "{% set ns.x = ns.x | replace('a', 'aa') %}"),
    "a replacement's method": DOUBLED.replace("BODY", "{% set ns.x = ns.x.replace('', ns.x) %}"),
    "a translation": DOUBLED.replace("BODY", "{% set ns.x = ns.x.translate({97: ns.x}) %}"),
    "a format that doubles": DOUBLED.replace("BODY", "{% set ns.x = '%s%s' % (ns.x, ns.x) %}"),
    "a format's method that doubles": DOUBLED.replace("BODY", "{% set ns.x = '{0}{0}'.format(ns.x) %}"),
    "a format's width": "{{ '%3000000000d' % 1 }}",
    "a format's width among its values": "{{ '%*d' % (3000000000, 1) }}",
    "a filter's width": "{{ '%3000000000d' | format(1) }}",
    "a width in braces": "{{ '{:>3000000000}'.format('x') }}",
    "a width in braces, among the values": "{{ '{:>{}}'.format('x', 3000000000) }}",
    "a width in braces, as text": "{{ '{:{}}'.format('x', '>3000000000') }}",
    "center": "{{ 'x' | center(3000000000) }}",
    "center, mapped": "{{ ['x'] | map('center', 3000000000) | list }}",
    "center's method": "{{ 'x'.center(3000000000) }}",
    "ljust": "{{ 'x'.ljust(3000000000) }}",
    "zfill": "{{ '1'.zfill(3000000000) }}",
    "tabs": "{{ ('\\t' * 1000).expandtabs(10000000) }}",
    "indent": "{{ 'x\\ny' | indent(3000000000) }}",
    "indent, of many lines": "{{ ('x\\n' * 10000) | indent(10000000) }}",
    "indent by a text": "{{ ('x\\n' * 10000) | indent('y' * 10000) }}",
    "JSON's indent": "{{ [1, 2] | tojson(indent=3000000000) }}",
    "a batch that is filled": "{{ [1] | batch(3000000000, 0) | list | length }}",
    "slices": "{{ [1] | slice(3000000000) | list | length }}",
    "a number": "{{ 10 ** (10 ** 10) }}",
    "a number that is squared": DOUBLED.replace("x='ab'", "x=10").replace("BODY", "{% set ns.x = ns.x * ns.x %}"),
    "digits to round to": "{{ 1.5 | round(3000000000, 'ceil') }}",
    "much text, bit by bit": "{% for i in range(90000) %}{{ 'x' * 1000 }}{% endfor %}",
    "much text on the way": "{% for i in range(90000) %}{% if 'x' * 1000000 == '' %}{% endif %}{% endfor %}",
    "parts of a text": "{% set x = 'x' * 9000000 %}{% for i in range(90000) %}{% set y = x[1:] %}{% endfor %}",
    "loops in loops": "{% for a in X %}{% for b in X %}{% for c in X %}{% endfor %}{% endfor %}{% endfor %}".replace(
        "X", "(messages * 1000)"
    ),
    "loops over text": "{% for a in 'x' * 5000 %}{% for b in 'x' * 5000 %}{% endfor %}{% endfor %}",
    "ranges": "{% for i in range(90000) %}{% set x = range(90000) | sum %}{% endfor %}",
    "a macro": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
}  # fmt: skip


@pytest.mark.parametrize("source", TOO_MUCH.values(), ids=TOO_MUCH.keys())
def test_a_template_that_eats_memory_or_time_is_refused(source):
    with pytest.raises(UserError, match=r"The chat template (writes more than|counts more than|computes a number)"):
        ChatTemplate(source, {}).render(MESSAGES)


ALLOWED = [
    "{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ loop.last }}{{ m.content | trim }}{% endfor %}",
    "{% for m in messages if m.role == 'user' %}{{ m['content'] }}{% else %}none{% endfor %}",
    "{% for k, v in {'a': 1, 'b': [2, none]}.items() %}{{ k }}={{ v }} {% endfor %}{% for x in missing %}{% endfor %}",
    "{% for a in [1, [2, [3]]] recursive %}{{ loop(a) if a is iterable else a }}{% endfor %}",
    "{% for c in 'abc' %}{{ loop.revindex }}{{ c ~ 1 ~ none ~ missing ~ [1, 'x'] }}{% endfor %}",
    "{{ 3 * 4 }} {{ 2 ** 10 }} {{ 7 % 3 }} {{ 'ab' * 3 }} {{ [1] * 2 }} {{ [1] + [2] }} {{ '%s-%03d' % ('x', 7) }}",
    "{{ 'x' | center(9) }}|{{ 'a\nb' | indent(2, true) }}|{{ 'aXb' | replace('X', 'YY') }}|{{ [1, 2] | join(', ') }}",
    "{{ [3, 1, 2] | sort | map('string') | join }} {{ {'a': [1]} | tojson(indent=2) }} {{ 'a b c' | wordwrap(3) }}",
    "{{ '{:>5}|{}'.format('x', 12345678901) }} {{ 'a,b'.split(',') }} {{ ' '.join(['a', 'b']) }}",
    "{{ 'a'.replace('a', 'b') }} {{ 1.5 * 2 }} {{ ['x'] | map('upper') | join('-') }} {{ [1, 2] | join }}",
    "{{ 12345678901 | default(99999999999) }} {{ missing | default(9) }} {{ [1, 2, 3] | batch(2, 0) | list }}",
    "{% macro m(x,y=2)%}{{ x ~ y }}{{ caller and caller() }}{% endmacro %}{{ m(1) }} {% call m(3) %}in{% endcall %}",
    "{% set x %}a{{ 1 }}b{% endset %}{{ x | upper }}{% filter upper %}low{% endfilter %}{{ 'a' if x else 'b' }}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}",
    "{{ messages[::-1] | map(attribute='role') | first }}",
    "{{ 'abcde'[1:] }} {{ 'abcde'[:-1] }} {{ 'abcde'[::2] }} {{ [1, 2, 3][:2] }} {{ messages[1:][0]['role'] }}",
    "{{ range(5) | list }}{{ range(3) | length }}{% for i in range(2, 5) %}{{ i }}{{ loop.length }}{% endfor %}",
    "{{ 1.256 | round(2) }} {{ 'x' | e }} {{ '<b>' | escape }} {{ [[1, 2], [3]] | sum(start=[]) }}",
]


@pytest.mark.parametrize("source", ALLOWED)
def test_what_a_template_may_do_it_does_as_in_jinja(source):
    plain = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    bounded = Sandbox(trim_blocks=True, lstrip_blocks=True)
    plain.filters["tojson"] = bounded.filters["tojson"]
    expected = plain.from_string(source).render(messages=MESSAGES)
    assert bounded.from_string(source).render(messages=MESSAGES) == expected


def test_a_long_conversation_is_no_bomb():
    messages = [{"role": "user", "content": "long " * 400_000}] * 20  # 40 million characters
    text = ChatTemplate("{% for m in messages %}{{ '<' ~ m['content'] | trim + '>' }}{% endfor %}", {}).render(messages)
    assert len(text) == 20 * (2_000_000 - 1 + 2)
