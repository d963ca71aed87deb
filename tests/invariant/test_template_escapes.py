"""Templates cannot escape the sandbox or exhaust memory, and data values are never evaluated as templates."""

from __future__ import annotations

import resource
import time

import pytest

from llmrec.errors import RecipeError
from llmrec.guard import clean
from llmrec.prompts.template import Template


def chat(user: str, target: str = "{{ label }}") -> Template:
    return Template(family="direct", name="t", version=1, use="seen", shape="chat", user=user, target=target)


ESCAPES = [
    # Attributes, items, calls, filters, tests and operators in expressions.
    "{{ ''.__class__ }}", "{{ item._source }}", "{{ item.title.upper() }}", "{{ item.title.x }}", "{{ item['title'] }}",
    "{{ history[0] }}", "{{ history[0:2] }}", "{{ range(10) }}", "{{ lipsum() }}", "{{ noun|upper }}",
    "{{ noun|attr('x') }}", "{{ noun is defined }}", "{{ noun ~ noun }}", "{{ noun * 1000000000 }}",
    "{{ 10 ** 10 ** 10 }}", "{{ 1 + 1 }}", "{{ noun % noun }}", "{{ -1 }}", "{{ 'a' if noun else 'b' }}",
    "{{ [1, 2] }}", "{{ (1, 2) }}", "{{ {'a': 1} }}", "{{ not noun() }}", "{{ await noun }}", "{{ lambda: 1 }}",
    # Statements.
    "{% set x = 1 %}", "{% set x %}y{% endset %}", "{% macro m() %}x{% endmacro %}", "{% call m() %}x{% endcall %}",
    "{% filter upper %}x{% endfilter %}", "{% with a = 1 %}x{% endwith %}", "{% block b %}x{% endblock %}",
    "{% extends 'x' %}", "{% include 'x' %}", "{% import '/etc/passwd' as y %}", "{% from 'x' import y %}",
    "{% do 1 %}", "{% autoescape true %}x{% endautoescape %}", "{% trans %}x{% endtrans %}", "{% debug %}",
    # Loops and conditions.
    "{% for a in history %}{% for b in history %}x{% endfor %}{% endfor %}",
    "{% for a in history %}{% if a %}{% for b in history %}x{% endfor %}{% endif %}{% endfor %}",
    "{% for a in range(9) %}x{% endfor %}", "{% for a in [1, 2] %}x{% endfor %}", "{% for a in 'abc' %}x{% endfor %}",
    "{% for a in item.genres %}x{% endfor %}", "{% for a in history + history %}x{% endfor %}",
    "{% for a, b in history %}x{% endfor %}", "{% for loop in history %}{% endfor %}",
    "{% for a in history if a.x %}x{% endfor %}", "{% for a in history recursive %}{{ loop(a) }}{% endfor %}",
    "{% for a in history %}{{ loop.cycle('a') }}{% endfor %}", "{% for a in history %}{{ loop.previtem }}{% endfor %}",
    "{% for a in history %}{{ loop }}{% endfor %}", "{% for a in history %}{{ loop._iterator }}{% endfor %}",
    "{% for a in history %}{{ a.__dict__ }}{% endfor %}", "{% for a in history %}{{ a.title.x }}{% endfor %}",
    "{{ loop.index }}", "{% for a in history %}x{% else %}{{ loop.index }}{% endfor %}",
    "{% if noun is callable %}x{% endif %}", "{% if noun() %}x{% endif %}", "{% if noun|length %}x{% endif %}",
    # Forbidden characters, unclosed code, and sources that are too deep or too long.
    "{{ '\\ue0000\\ue001' }}", "\ue0000\ue001", "bell \x07", "{{ noun", "{% if noun %}", "   ", "x" * 20_000,
    "{{ " + "(" * 3000 + "noun" + ")" * 3000 + " }}", "{{ " + "not " * 3000 + "noun }}", "{{ " + "9" * 9000 + " }}",
    "{{ " + " and ".join(["noun"] * 1500) + " }}", "{% if noun %}" * 600 + "x" + "{% endif %}" * 600,
    # Published ways out of a sandbox.
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ cycler.__init__.__globals__.os.popen('id') }}",
    "{{ config.__class__.__init__.__globals__['os'].popen('id').read() }}", "{{ ''|attr('__class__') }}",
    "{{ '{0.__class__}'.format(noun) }}", "{{ ('{0.__cl' ~ 'ass__}').format }}", "{{ (noun|attr)('format') }}",
    "{% set f = ''.format %}{{ f(noun) }}", "{{ history|map(attribute='__class__')|list }}",
    "{{ history|groupby('__class__') }}", "{% macro m(x=noun.__class__) %}{% endmacro %}",
    "{% raw %}{{ noun }}{% endraw %}{{ noun|e }}", "{% include ['a', 'b'] ignore missing %}",
]  # fmt: skip


@pytest.mark.parametrize("source", ESCAPES, ids=lambda source: source[:40].encode("unicode_escape").decode())
def test_grammar_rejects(source: str) -> None:
    with pytest.raises(RecipeError) as caught:
        chat(source)
    assert "user" in str(caught.value)


_EVENTS = [{"title": "x" * 1000, "text": "y" * 1000, "long": "z" * 50_000, "rating": "5"}] * 4000
_ALL = "{{ e.title }}{{ e.text }}{{ e.rating }}"
BOMBS = {
    # Rejected when parsed: too deep, too long, or more than one loop.
    "two loops": "{% for a in history %}{% for b in history %}x{% endfor %}{% endfor %}",
    "a power": "{{ 9 ** 9 ** 9 }}",
    "joined": "{{ " + " ~ ".join(["noun"] * 2000) + " }}",
    "deep brackets": "{{ " + "(" * 5000 + ")" * 5000 + " }}",
    "deep not": "{{ " + "not " * 3900 + "noun }}",
    "deep or": "{{ " + " or ".join(["noun"] * 1800) + " }}",
    "deep if": "{% if noun %}" * 700 + "{% endif %}" * 700,
    "a long number": "{{ " + "9" * 16000 + " }}",
    "a long source": "x" * 2_000_000,
    "an open comment": "{#" * 8000,
    "open braces": "{{" * 8000,
    "recursive": "{% for a in history recursive %}{{ loop(history) }}{% endfor %}",
    # Rejected when rendered: larger than any prompt.
    "long values": "{% for e in history %}" + _ALL + "{% endfor %}",
    "wide steps": "{% for e in history %}" + "y" * 15_000 + "{% endfor %}",
    "one value often": "{% for e in history %}" + "{{ noun }}" * 1500 + "{% endfor %}",
    "loop after loop": ("{% for e in history %}" + _ALL + "{% endfor %}") * 100,
    "in an else": "{% for e in history %}{% if not e.title %}{% else %}" + _ALL * 100 + "{% endif %}{% endfor %}",
    "compared often": "{% for e in history %}" + "{% if e.title == e.text %}{% endif %}" * 250 + _ALL + "{% endfor %}",
    "nothing written": "{% for e in history %}" + "{% if e.title == e.text %}{% endif %}" * 250 + "{% endfor %}",
    "nothing shown": "{% for e in history %}" + "{% if e.long %}{% endif %}" * 500 + "{% endfor %}",
    "no fields": "{% for e in history %}" + "{% if noun == noun %}{% endif %}" * 300 + "{% endfor %}",
    "small steps": "{% for e in history %}" + "{{ loop.index }}" * 800 + "{% endfor %}",
}


def test_templates_cannot_fill_the_memory() -> None:
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, source in BOMBS.items():
        started = time.process_time()
        with pytest.raises(RecipeError):
            chat(source).turns({"history": _EVENTS, "noun": "n" * 100_000})
        assert time.process_time() - started < 10, name
    # In KiB; each bomb alone would need more than this.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - highest < 256 * 1024


def test_titles_with_template_code_are_not_executed() -> None:
    template = chat("{% for e in history %}{{ e.title }}\n{% endfor %}{{ noun }}", "{{ item.title }}")
    sources = [
        *(s for s in ESCAPES if s.strip() and len(s) <= 250),
        "{{ 7*7 }}",
        "{# x #}",
        "{%- x -%}",
        "}}{{",
        "%}{%",
    ]
    for number, source in enumerate(sources * 3):
        title = f"{source} {number}"
        (message,) = template.turns({"history": [{"title": title}], "noun": title})
        assert message.text == f"{clean(title)}\n{clean(title)}"
        assert template.answer({"item": {"title": title}}) == clean(title)
