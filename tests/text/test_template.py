"""S10: a template from a download can neither reach out nor run away."""

import sys
import threading
import time

import pytest

from tinsmith.core.errors import UserError
from tinsmith.text.specials import our_template
from tinsmith.text.template import MAX_TEMPLATE_CHARS, ChatTemplate, TemplateRefused

MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo <b>"}]


def run(source, room=100_000, **variables):
    return ChatTemplate(source).render({"messages": MESSAGES} | variables, room)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (
            "{% for m in messages %}{{ m.role ~ ':' ~ m['content'] }};{% endfor %}",
            "user:hi;assistant:yo <b>;",
        ),
        (
            "{{ messages | tojson }}",
            '[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo <b>"}]',
        ),
        (
            "{% for m in messages %}{{ loop.index0 }}{{ loop.last }}{{ loop.length }} {% endfor %}",
            "0False2 1True2 ",
        ),
        (
            "{% for m in messages %}{{ loop.previtem.role if loop.last }}{% endfor %}",
            "user",
        ),
        (
            "{% set ns = namespace(n=0) %}{% for i in range(5) %}{% set ns.n = ns.n + i %}"
            "{% endfor %}{{ ns.n }}",
            "10",
        ),
        ("{{ messages[1:][0].content.split('<')[0].strip().upper() }}", "YO"),
        ("{{ messages[::-1] | map(attribute='role') | join(', ') }}", "assistant, user"),
        (
            "{% for m in messages if m.role == 'user' %}{{ m.content | trim }}{% else %}none"
            "{% endfor %}",
            "hi",
        ),
        ("{% for m in messages %}{{ m.role }}{% break %}{% endfor %}", "user"),
        (
            "{% for m in messages %}{% generation %}{{ m.role }}{% endgeneration %} {% endfor %}",
            "user assistant ",
        ),
        ("{% macro f(x) %}[{{ x }}]{% endmacro %}{{ f(1) + f('a') }}", "[1][a]"),
        ("{% for k, v in {'a': 1}.items() %}{{ k }}={{ v }}{% endfor %}", "a=1"),
        (
            "{% if tools is defined %}x{% endif %}{{ missing }}{{ none }}{{ 'ab' * 2 }}{{ 7 % 4 }}",
            "Noneabab3",
        ),
        ("{{ 'a-b'.replace('-', '+') }}{{ 'a-b' | replace('-', '/') }}", "a+ba/b"),
        ("    {% if true %}\nx\n    {% endif %}\ny", "x\ny"),
        ("{{ [1, (2, 'x')] }}{{ {'a': [none]} }}", "[1, (2, 'x')]{'a': [None]}"),
        ("{{ {'a': 1} | tojson(indent=2) }}", '{\n  "a": 1\n}'),
    ],
)
def test_what_chat_templates_use_works(source, expected):
    assert run(source) == expected


DOUBLED = "{% set x = 'ab' %}" + "{% set x = x STEP x %}" * 60 + "{{ x }}"
BOMBS = {
    "nested loops": "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}",
    "loops over text": "{% set s = 'a' * 9000 %}" + "{% for i in s %}" * 5 + "{% endfor %}" * 5,
    "a huge range": "{% for i in range(10 ** 12) %}x{% endfor %}",
    "a long range": "{% for i in range(1000000000000) %}x{% endfor %}",
    "macros": "{% macro a() %}{{ a() }}{{ a() }}{% endmacro %}{{ a() }}",
    "shallow macros": "{% macro a(n) %}{% if n %}{{ a(n-1) }}{{ a(n-1) }}{% endif %}{% endmacro %}"
    "{{ a(60) }}",
    "times": "{{ 'a' * 1000000000000 }}",
    "times, turned": "{{ 1000000000000 * 'a' }}",
    "times, quietly": "{{ ('a' * 50000000) | length }}",
    "a list of a range": "{{ range(100000000) | list | length }}",
    "comparing": "{% set x = [1] %}{% set y = [1] %}"
    + "{% set x = [x, x] %}{% set y = [y, y] %}" * 60
    + "{{ x == y }}",
    "times a list": "{{ ([1] * 1000000000000) | length }}",
    "power": "{{ 2 ** 1000000000 }}",
    "numbers": "{% set x = 9 %}" + "{% set x = x * x %}" * 60 + "{{ x }}",
    "doubling by ~": DOUBLED.replace("STEP", "~"),
    "doubling by +": DOUBLED.replace("STEP", "+"),
    "doubling a list": "{% set x = [1] %}" + "{% set x = x + x %}" * 60 + "{{ x | length }}",
    "doubling by blocks": "{% set x %}ab{% endset %}"
    + "{% set x %}{{ x }}{{ x }}{% endset %}" * 60,
    "doubling by macros": "{% macro t(x) %}{{ x }}{{ x }}{% endmacro %}{% set x = 'ab' %}"
    + "{% set x = t(x) %}" * 60,
    "doubling by replace": "{% set x = 'a' * 99 %}" + "{% set x = x.replace('a', x) %}" * 9,
    "doubling by a filter": "{% set x = 'a' * 99 %}" + "{% set x = x | replace('a', x) %}" * 9,
    "doubling by join": "{% set x = 'a' * 99 %}" + "{% set x = [x, x, x] | join(x) %}" * 30,
    "a list of itself": "{% set x = [1] %}" + "{% set x = [x, x] %}" * 60 + "{{ x }}",
    "a dict of itself": "{% set x = {} %}"
    + "{% set x = {'a': x, 'b': x} %}" * 60
    + "{{ x | tojson }}",
    "formatting": "{{ '%1000000000d' % 1 }}",
    "format": "{{ '{:>1000000000}'.format(1) }}",
    "a wide indent": "{{ messages | tojson(indent=1000000000) }}",
    "center": "{{ 'a' | center(1000000000) }}",
    "ljust": "{{ 'a'.ljust(1000000000000) }}",
    "to_bytes": "{{ (1).to_bytes(100000000000, 'big') }}",
    "much output": "{% for i in range(99999) %}{{ messages[1].content }}{% endfor %}",
    "lorem ipsum": "{{ lipsum(n=100000) }}",
    "recursive loops": "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "harmless recursive loops": "{% for m in messages recursive %}x{% endfor %}",
    "harmless blocks": "{% block a %}x{% endblock %}",
    "blocks": "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
    "deep brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "deep ifs": "{% if true %}" * 300 + "{% endif %}" * 300,
}


BOMBS |= {
    "batches": "{{ [1] | batch(1000000000, 'x') | list }}",
    "a sum of lists": "{{ [[1] * 9999] * 9999 | sum(start=[]) }}",
    "a wide percent": "{{ '%*d' % (1000000000, 1) }}",
    "a computed width": "{{ '{:{}}'.format(1, 1000000000) }}",
    "doubling by safe": "{% set x = ('a' * 99) | safe %}" + "{% set x = x.replace('a', x) %}" * 9,
    "doubling by str.join": "{% set x = 'a' * 99 %}" + "{% set x = x.join([x, x, x]) %}" * 30,
    "a wide indent of text": "{{ 'a' | indent(1000000000) }}",
    "sorting itself": "{% set x = [1] %}" + "{% set x = x + x %}" * 40 + "{{ x | sort | first }}",
}


@pytest.mark.parametrize("name", BOMBS)
def test_S10_a_bomb_goes_off_early_and_small(name):
    start = time.monotonic()
    with pytest.raises(UserError, match="the chat template") as caught:
        run(BOMBS[name])
    assert time.monotonic() - start < 5
    assert "MemoryError" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ ''['__class__']['__mro__'] }}",
        "{{ (''|attr('__class__')).__mro__ }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ raise_exception.__globals__['os'] }}",
        "{{ range.__self__._room }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ self._TemplateReference__context.environment }}",
        "{{ messages.append(1) }}",
        "{{ '{0.__class__}'.format(messages) }}",
        "{{ '{0[0]}'.format(messages) }}",
        "{{ '%(a)s' % {'a': messages} | attr('__class__') }}",
        "{{ messages[0].update({'a': 1}) }}",
        "{% include 'secret' %}",
        "{% import 'os' as os %}{{ os }}",
        "{% from 'os' import path %}",
        "{% extends 'x' %}",
    ],
)
def test_S10_a_template_cannot_reach_python(source):
    with pytest.raises(UserError, match="the chat template"):
        run(source)


@pytest.mark.parametrize(
    "source",
    [
        "{% for",
        "{{ f() }}",
        "{{ missing.x.y }}",
        "{{ 1 / 0 }}",
        "{{ 'a' + 1 }}",
        "{% x %}",
        "{{ raise_exception }}",
    ],
)
def test_a_template_that_fails_is_one_line(source):
    with pytest.raises(UserError, match="the chat template") as caught:
        run(source)
    assert "\n" not in str(caught.value)


def test_a_template_that_is_too_long_is_refused():
    with pytest.raises(UserError, match="longer than"):
        ChatTemplate("x" * (MAX_TEMPLATE_CHARS + 1))


def test_the_room_is_a_bound_on_all_that_is_emitted():
    assert run("{{ 'a' * 10 }}", room=10) == "a" * 10
    with pytest.raises(UserError, match="longer than 9 characters"):
        run("{{ 'a' * 5 }}{{ 'a' * 5 }}", room=9)


def test_a_template_may_refuse_messages_in_its_own_words():
    with pytest.raises(TemplateRefused, match="no system please"):
        run("{{ raise_exception('no system please') }}")


def test_a_bomb_leaves_the_next_rendering_its_full_account():
    template = ChatTemplate("{% for i in range(n) %}{{ 'ab' }}{% endfor %}")
    with pytest.raises(UserError):
        template.render({"n": 10**9}, 100)
    assert template.render({"n": 2}, 100) == "abab"


def test_threads_share_a_template_without_sharing_its_account():
    template = ChatTemplate(our_template())
    variables = {"messages": MESSAGES, "tools": None, "add_generation_prompt": True}
    expected = template.render(variables, 1000)
    wrong = []

    def work(room):
        try:
            for _ in range(300):
                assert template.render(variables, room) == expected
        except (AssertionError, UserError) as error:
            wrong.append(error)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    emitted = len(expected) + sum(len(message["content"]) for message in MESSAGES)
    threads = [threading.Thread(target=work, args=(emitted,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(before)
    assert not wrong


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}{{ m.content.replace('a', 'b', 1) }}{% endfor %}",
        "{{ messages | tojson(ensure_ascii=False, separators=(',', ':'), sort_keys=True) }}",
        "{{ messages | tojson(ensure_ascii=True) }}{{ messages | tojson(indent=2) }}",
        "{{ strftime_now('%Y-%m-%d') }}",
        "{{ 'x<' | safe }}{{ 'a<b' | e }}{{ \"'\" | escape }}",
        "{{ [2, 1] | sort | first }}{{ (messages | sort(attribute='role') | first).role }}",
        "{{ [1, 2] | sum }}{{ [{'n': 1}, {'n': 2.5}] | sum(attribute='n') }}",
        "{{ [3, 1] | min }}{{ 'ab' | max }}",
        "{{ ['a', 'A', 'b'] | unique | list }}{{ [1, 2, 3] | batch(2, 0) | list }}",
        "{% for g in messages | groupby('role') %}{{ g.grouper }}{{ g.list | length }}{% endfor %}",
        "{{ 3.7 | round }}{{ 3.14159 | round(2) }}{{ '3' | float }}{{ -2 | abs }}",
        "{{ 'a\nb' | indent(2) }}{{ 'a\nb' | indent(1, true) }}",
        "{{ ','.join(['x', 'y']) }}{{ 'abc'.index('c') }}{{ 'a-b'.partition('-') }}",
        "{{ '{} {x:>3} {y!r}'.format(1, x=2, y='z') }}",
        "{{ '%s-%03d' % ('x', 7) }}{{ '%.2f' % 3.14159 }}",
        "{{ '%(a)s' % {'a': 1} }}{{ 'a'.isalpha() }}{{ 'a b' | wordcount }}",
        "{% macro f(x) %}{% for c in x %}{{ c.replace(' ', '_') }}{% endfor %}{% endmacro %}"
        "{{ f(['a b ', 'c']) }}",
    ],
)
def test_D22_templates_see_the_jinja_that_transformers_gives_them(source):
    from transformers.utils.chat_template_utils import _compile_jinja_template

    expected = _compile_jinja_template(source).render(messages=MESSAGES)
    assert run(source) == expected
