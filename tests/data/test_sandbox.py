"""Chat templates are code from strangers: whatever one tries, it is refused soon, and takes and learns nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tunesmith.data.template import ChatTemplate
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.errors import TemplateError

REPOSITORY = Path(__file__).resolve().parents[2]
STARTER = REPOSITORY / "recipes" / "starter" / "tokenizer"


def template(source: str) -> ChatTemplate:
    return ChatTemplate(Tokenizer.from_folder(STARTER), source=source)


@pytest.mark.parametrize(
    "source",
    [
        "{% for %}",
        "{{ 1 | nofilter }}",
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{% if a %}" * 1500 + "{% endif %}" * 1500,
    ],
    ids=["syntax", "unknown filter", "deep brackets", "deep blocks"],
)
def test_what_does_not_compile_is_refused(source: str) -> None:
    with pytest.raises(TemplateError):
        template(source).render([{"role": "user", "content": "a"}], generation_prompt=True)


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'x' | dictsort }}",
        "{{ 1 // 0 }}",
        "{{ messages['a'] + 1 }}",
        "{{ strftime_now(5) }}",
        "{% for a, b in [1] %}{% endfor %}",
        "{% include 'x' %}",
        "{{ self.nothing() }}",
        "{{ 'a'.encode('rot13') }}",
        "{{ messages | map('nofilter') | list }}",
        "{{ (messages | map('upper')).throw(1) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_whatever_goes_wrong_inside_is_a_template_error(source: str) -> None:
    with pytest.raises(TemplateError):
        template(source).render([{"role": "user", "content": "a"}], generation_prompt=True)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ '' | attr('__class__') }}",
        "{{ ''['__class__'] }}",
        "{{ messages | map(attribute='__class__') | first }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__globals__.datetime }}",
        "{{ range.__self__ }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ dict.__base__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ lipsum.__globals__['os'] }}",
        "{{ self._TemplateReference__context }}",
        "{{ loop.__class__ }}{% for m in messages %}{{ loop.__init__.__globals__ }}{% endfor %}",
        "{% macro f() %}{% endmacro %}{{ f._environment }}{{ f._func }}",
        "{{ (messages | map('upper')).gi_frame.f_globals }}",
        "{{ environment }}{{ context }}{{ resolve }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{{ messages[0].clear() }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{{ '{0.__class__}'.format_map({'0': 1}) }}",
        "{{ '%s' % 1 }}",
    ],
)
def test_nothing_of_python_is_within_reach(source: str) -> None:
    messages = [{"role": "user", "content": "a"}]
    try:
        text = template(source).render(messages, generation_prompt=True)
    except TemplateError:
        text = ""
    assert text == ""
    assert messages == [{"role": "user", "content": "a"}]


DOUBLING = "{{% set n = namespace(x={start}) %}}{{% for i in range(60) %}}{{% set n.x = {step} %}}{{% endfor %}}"
# 65,536 characters, and 16 million
LARGE = "{% set n = namespace(x='a') %}{% for i in range(16) %}{% set n.x = n.x ~ n.x %}{% endfor %}"
HUGE = LARGE.replace("16", "24")
HOSTILE = {
    "endless loop": "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
    "huge range": "{% for a in range(10 ** 10) %}{% endfor %}",
    "huge range without power": "{% for a in range(10000000000) %}{% endfor %}",
    "twice calling macros": "{% macro f(n) %}{% if n > 0 %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}"
    "{{ f(60) }}",
    "recursive loop": "{% for a in [1] recursive %}{{ loop([1, 1]) }}{% endfor %}",
    "text doubled by ~": DOUBLING.format(start="'a'", step="n.x ~ n.x"),
    "text doubled by +": DOUBLING.format(start="'a'", step="n.x + n.x"),
    "lists doubled": DOUBLING.format(start="[1]", step="n.x + n.x"),
    "text doubled by a filter": DOUBLING.format(start="'aa'", step="n.x | replace('a', 'aa')"),
    "text doubled by a method": DOUBLING.format(start="'aa'", step="n.x.replace('a', 'aa')"),
    "numbers squared": DOUBLING.format(start="99", step="n.x * n.x"),
    "lists in lists, written": DOUBLING.format(start="[]", step="[n.x, n.x]") + "{{ n.x }}",
    "lists in lists, as JSON": DOUBLING.format(start="[]", step="[n.x, n.x]") + "{{ n.x | tojson }}",
    "lists in lists, compared": DOUBLING.format(start="[]", step="[n.x, n.x]")
    + "{% set o = n %}"
    + DOUBLING.format(start="[]", step="[n.x, n.x]")
    + "{{ n.x == o.x }}",
    "each letter replaced": LARGE + "{{ n.x.replace('a', n.x) | length }}",
    "each letter replaced by a filter": LARGE + "{{ n.x | replace('a', n.x) | length }}",
    "joined by itself": LARGE + "{{ n.x.join(n.x | list) | length }}",
    "joined by a filter": LARGE + "{{ n.x | list | join(n.x) | length }}",
    "translated": LARGE + "{{ n.x.translate({97: n.x}) | length }}",
    "a wide field": "{{ '{:2500000000}'.format(1) | length }}",
    "a padded text": "{{ 'a'.ljust(2500000000) | length }}",
    "a centred text": "{{ 'a' | center(2500000000) | length }}",
    "a multiplied text": "{{ ('a' * 2500000000) | length }}",
    "a wide number": "{{ ('%2500000000d' % 1) | length }}",
    "placeholder text": "{{ lipsum(n=100000000) }}",
    "filled batches": "{{ [1] | batch(1000000000, 'x') | list | length }}",
    "filled slices": "{{ [1] | slice(1000000000, 'x') | list | length }}",
    "indented": LARGE + "{{ n.x.replace('a', 'a\n') | indent(40000) | length }}",
    "indented JSON": DOUBLING.format(start="[]", step="[n.x]").replace("60", "900")
    + "{{ n.x | tojson(indent=100000000) }}",
    "tabs expanded": "{{ '\t'.expandtabs(2500000000) | length }}",
    "captured": "{% set x %}{% for a in range(40) %}{% for b in range(25000) %}"
    + "A" * 3000
    + "{% endfor %}{% endfor %}{% endset %}",
    "captured by a macro": "{% macro f() %}{% for a in range(40) %}{% for b in range(25000) %}"
    + "A" * 3000
    + "{% endfor %}{% endfor %}{% endmacro %}{% if f() %}{% endif %}",
    "captured by a filter": "{% filter upper %}{% for a in range(40) %}{% for b in range(25000) %}"
    + "A" * 3000
    + "{% endfor %}{% endfor %}{% endfilter %}",
    "written": "{% for a in range(100000) %}" + "A" * 3000 + "{% endfor %}",
    "sums": "{% for i in range(100000) %}{{ range(100000) | sum }}{% endfor %}",
    "sorts": "{% for i in range(100000) %}{% set x = range(100000) | sort %}{% endfor %}",
    "searches": HUGE + "{% set l = n.x | list %}{% for i in range(400000) %}{% if 'x' in l %}{% endif %}{% endfor %}",
    "searches in text": HUGE + "{% for i in range(400000) %}{% if 'ax' in n.x %}{% endif %}{% endfor %}",
    "comparisons": HUGE + "{% set m = n.x ~ 'b' %}{% set k = n.x ~ 'c' %}"
    "{% for i in range(400000) %}{% if m == k %}{% endif %}{% endfor %}",
    "slices": HUGE
    + "{% set o = namespace(l=[]) %}{% for i in range(1000) %}{% set o.l = o.l + [n.x[i:]] %}{% endfor %}",
    "kept values": HUGE
    + "{% set o = namespace(l=[]) %}{% for i in range(1000) %}{% set o.l = o.l + [n.x | upper] %}{% endfor %}",
    "joined values": HUGE
    + "{% set o = namespace(l=[]) %}{% for i in range(1000) %}{% set o.l = o.l + [n.x] %}{% endfor %}"
    "{{ o.l | join | length }}",
}

# Runs in a process of its own, a child for each template, so that whatever gets through hurts nobody.
RUN_HOSTILE = """
import json, os, resource, sys
from pathlib import Path
from tunesmith.data import sandbox
from tunesmith.data.template import ChatTemplate
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.errors import TemplateError

sandbox.MAX_SECONDS = 0.3  # the tests need not wait for it
tokenizer = Tokenizer.from_folder(Path(sys.argv[1]))
found = {}
for name, source in json.load(sys.stdin).items():
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
        resource.setrlimit(resource.RLIMIT_CPU, (3, 3))
        try:
            template = ChatTemplate(tokenizer, source=source)
            text = template.render([{"role": "user", "content": "hi"}], generation_prompt=True)
            said = f"rendered {len(text)} characters"
        except TemplateError as error:
            said = "refused"
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"[:200]
        os.write(writer, said.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        said = file.read()
    _, status, usage = os.wait4(child, 0)
    found[name] = [said or f"killed, status {status}", usage.ru_maxrss // 1024]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def outcomes() -> dict[str, tuple[str, int]]:
    """What became of each hostile template, and how many MiB it took at most."""
    done = subprocess.run(
        [sys.executable, "-c", RUN_HOSTILE, str(STARTER)],
        input=json.dumps(HOSTILE), capture_output=True, text=True, cwd=REPOSITORY, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return {name: (said, mebibytes) for name, (said, mebibytes) in json.loads(done.stdout).items()}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_end_soon_and_take_little_memory(outcomes: dict[str, tuple[str, int]], name: str) -> None:
    said, mebibytes = outcomes[name]
    assert said == "refused" or said.startswith("rendered"), said
    assert mebibytes < 600


def test_one_rendering_leaves_no_budget_spent_for_the_next() -> None:
    counting = template("{% for i in range(90000) %}{% endfor %}{{ messages[0].content }}")
    for _ in range(12):
        assert counting.render([{"role": "user", "content": "a"}], generation_prompt=True) == "a"
