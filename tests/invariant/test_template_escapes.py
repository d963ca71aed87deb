"""No template reaches outside its values or fills the memory, and no data value is read as a template."""

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
    "{{ ''.__class__ }}",
    "{{ item.__class__ }}",
    "{{ item._source }}",
    "{{ item.title.upper() }}",
    "{{ item.title.x }}",
    "{{ item['title'] }}",
    "{{ history[0] }}",
    "{{ history[0:2] }}",
    "{{ range(10) }}",
    "{{ lipsum() }}",
    "{{ cycler('a') }}",
    "{{ noun|upper }}",
    "{{ noun|attr('x') }}",
    "{{ noun is defined }}",
    "{{ noun ~ noun }}",
    "{{ noun * 1000000000 }}",
    "{{ 10 ** 10 ** 10 }}",
    "{{ 1 + 1 }}",
    "{{ -1 }}",
    "{{ 'a' if noun else 'b' }}",
    "{{ [1, 2] }}",
    "{{ (1, 2) }}",
    "{{ {'a': 1} }}",
    "{% set x = 1 %}",
    "{% set x %}y{% endset %}",
    "{% macro m() %}x{% endmacro %}",
    "{% call m() %}x{% endcall %}",
    "{% filter upper %}x{% endfilter %}",
    "{% with a = 1 %}x{% endwith %}",
    "{% block b %}x{% endblock %}",
    "{% extends 'x' %}",
    "{% include 'x' %}",
    "{% import 'x' as y %}",
    "{% from 'x' import y %}",
    "{% do 1 %}",
    "{% autoescape true %}x{% endautoescape %}",
    "{% for a in history %}{% for b in history %}x{% endfor %}{% endfor %}",
    "{% for a in history %}{% if a %}{% for b in history %}x{% endfor %}{% endif %}{% endfor %}",
    "{% for a in range(9) %}x{% endfor %}",
    "{% for a in [1, 2] %}x{% endfor %}",
    "{% for a in item.genres %}x{% endfor %}",
    "{% for a, b in history %}x{% endfor %}",
    "{% for a in history if a.x %}x{% endfor %}",
    "{% for a in history recursive %}{{ loop(a) }}{% endfor %}",
    "{% for a in history %}{{ loop.cycle('a') }}{% endfor %}",
    "{% for a in history %}{{ loop.previtem }}{% endfor %}",
    "{% for a in history %}{{ loop }}{% endfor %}",
    "{{ loop.index }}",
    "{% for a in history %}x{% else %}{{ loop.index }}{% endfor %}",
    "{{ '\\ue0000\\ue001' }}",
    "\ue0000\ue001",
    "bell \x07",
    "{{ noun",
    "{% if noun %}",
    "{% for loop in history %}{% endfor %}",
    "{{ " + "(" * 3000 + "noun" + ")" * 3000 + " }}",
    "{{ " + "not " * 3000 + "noun }}",
    "{{ " + " and ".join(["noun"] * 1500) + " }}",
    "{% if noun %}" * 600 + "x" + "{% endif %}" * 600,
    "{{ " + "9" * 9000 + " }}",
    "x" * 20_000,
    "   ",
    # Published ways out of a sandbox, and the constructs that they are made of.
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ config.__class__.__init__.__globals__['os'].popen('id').read() }}",
    "{{ self.__init__.__globals__.__builtins__ }}",
    "{{ cycler.__init__.__globals__.os.popen('id') }}",
    "{{ joiner.__init__.__globals__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ lipsum.__globals__['os'].system('id') }}",
    "{{ get_flashed_messages.__globals__ }}",
    "{{ url_for.__globals__ }}",
    "{{ request.application.__globals__ }}",
    "{{ request['application'] }}",
    "{{ ''['__class__'] }}",
    "{{ ''|attr('__class__') }}",
    "{{ '%s'|format(noun) }}",
    "{{ '{0.__class__}'.format(noun) }}",
    "{{ ('{0.__cl' ~ 'ass__}').format }}",
    "{{ (noun|attr)('format') }}",
    "{{ noun.format.__self__ }}",
    "{% set f = ''.format %}{{ f(noun) }}",
    "{{ [''.format]|map('call') }}",
    "{{ history|map(attribute='__class__')|list }}",
    "{{ history|groupby('__class__') }}",
    "{{ history|sort(attribute='__init__.__globals__') }}",
    "{{ history|selectattr('x') }}",
    "{{ dict(a=1) }}",
    "{{ noun.__init__ }}",
    "{{ loop.__class__ }}",
    "{% for a in history %}{{ loop.__class__ }}{% endfor %}",
    "{% for a in history %}{{ loop._iterator }}{% endfor %}",
    "{% for a in history %}{{ loop.depth0 }}{% endfor %}",
    "{% for a in history %}{{ loop.changed(a) }}{% endfor %}",
    "{% for a in history %}{{ a.__dict__ }}{% endfor %}",
    "{% for a in history %}{{ a._ledger }}{% endfor %}",
    "{% for a in history %}{{ a.title.x }}{% endfor %}",
    "{% for _x in a.b.c %}x{% endfor %}",
    "{% for a in 'abc' %}x{% endfor %}",
    "{% for a in history + history %}x{% endfor %}",
    "{% for a in history.x %}x{% endfor %}",
    "{% if noun is callable %}x{% endif %}",
    "{% if noun() %}x{% endif %}",
    "{% if noun|length %}x{% endif %}",
    "{% raw %}{{ noun }}{% endraw %}{{ noun|e }}",
    "{% trans %}x{% endtrans %}",
    "{% break %}",
    "{% debug %}",
    "{% import '/etc/passwd' as y %}",
    "{% include ['a', 'b'] ignore missing %}",
    "{% include noun %}",
    "{% extends noun %}",
    "{% call(x) noun() %}{% endcall %}",
    "{% macro m(x=noun.__class__) %}{% endmacro %}",
    "{{ caller() }}",
    "{{ super() }}",
    "{{ varargs[0] }}",
    "{{ noun[::-1] }}",
    "{{ noun % noun }}",
    "{{ noun // 1 }}",
    "{{ not noun() }}",
    "{{ await noun }}",
    "{{ lambda: 1 }}",
]


@pytest.mark.parametrize("source", ESCAPES, ids=lambda source: source[:40].encode("unicode_escape").decode())
def test_grammar_refuses(source: str) -> None:
    with pytest.raises(RecipeError) as refused:
        chat(source)
    assert "user" in str(refused.value)


def test_there_are_100_ways_out_and_all_are_shut() -> None:
    assert len(ESCAPES) == len(set(ESCAPES)) >= 100


_EVENTS = [{"title": "x" * 1000, "text": "y" * 1000, "long": "z" * 50_000, "rating": "5"}] * 4000
_ALL = "{{ e.title }}{{ e.text }}{{ e.rating }}"
BOMBS = {
    # Refused when it is read: too deep, too long, or more than one loop.
    "two loops": "{% for a in history %}{% for b in history %}x{% endfor %}{% endfor %}",
    "three loops": "{% for a in h %}" * 3 + "x" + "{% endfor %}" * 3,
    "a range": "{% for a in range(10000000000) %}x{% endfor %}",
    "a product": "{{ 'x' * 10000000000 }}",
    "a power": "{{ 9 ** 9 ** 9 }}",
    "a shifted product": "{{ noun * noun * noun }}",
    "joined": "{{ " + " ~ ".join(["noun"] * 2000) + " }}",
    "deep brackets": "{{ " + "(" * 5000 + ")" * 5000 + " }}",
    "deep lists": "{{ " + "[" * 5000 + "]" * 5000 + " }}",
    "deep not": "{{ " + "not " * 3900 + "noun }}",
    "deep or": "{{ " + " or ".join(["noun"] * 1800) + " }}",
    "deep if": "{% if noun %}" * 700 + "{% endif %}" * 700,
    "a long number": "{{ " + "9" * 16000 + " }}",
    "a long source": "x" * 2_000_000,
    "an open comment": "{#" * 8000,
    "open braces": "{{" * 8000,
    "padded": "{{ '%1000000000d' % 1 }}",
    "filled": "{{ noun.ljust(1000000000) }}",
    "centred": "{{ noun|center(1000000000) }}",
    "made words": "{{ lipsum(n=100000) }}",
    "a macro that calls itself": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "recursive": "{% for a in history recursive %}{{ loop(history) }}{% endfor %}",
    # Refused when it is filled in: it would be larger than any prompt.
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


def test_templates_that_would_fill_the_memory_are_stopped() -> None:
    assert len(BOMBS) >= 20
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, source in BOMBS.items():
        started = time.process_time()
        with pytest.raises(RecipeError):
            chat(source).turns({"history": _EVENTS, "noun": "n" * 100_000})
        # Less than a second each; without the limits they would take hours or all of the memory.
        assert time.process_time() - started < 10, name
    # In KiB; each bomb alone would need more than this.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - highest < 256 * 1024


def test_a_thousand_titles_of_template_code_stay_as_they_are() -> None:
    template = chat("{% for e in history %}{{ e.title }}\n{% endfor %}{{ noun }}", "{{ item.title }}")
    sources = [
        *(s for s in ESCAPES if s.strip() and len(s) <= 250),
        "{{ 7*7 }}",
        "{# x #}",
        "{%- x -%}",
        "}}{{",
        "%}{%",
    ]
    titles = [f"{source} {number}" for number in range(1000) for source in [sources[number % len(sources)]]]
    for title in titles:
        (message,) = template.turns({"history": [{"title": title}], "noun": title})
        assert message.text == f"{clean(title)}\n{clean(title)}"
        assert template.answer({"item": {"title": title}}) == clean(title)
    assert len({clean(title) for title in titles}) == 1000
