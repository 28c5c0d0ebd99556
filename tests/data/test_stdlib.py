import ast
import sys

import pytest

from tinsmith.data.sources import stdlib


@pytest.fixture(scope="module")
def modules():
    return list(stdlib.read_modules(stdlib.find_modules()))


def test_the_corpus_is_megabytes_of_modules_in_a_fixed_order(modules):
    names = [module.name for module in modules]
    assert {"os.py", "json/decoder.py", "asyncio/base_events.py", "argparse.py"} <= set(names)
    assert names == sorted(names)
    assert 4e6 < sum(len(module.text) for module in modules) < 40e6


@pytest.mark.parametrize(
    "part", ["test", "tests", "site-packages", "dist-packages", "idle_test", "__pycache__"]
)
def test_tests_and_installed_packages_are_left_out(modules, part):
    assert not [module.name for module in modules if part in module.name.split("/")]


@pytest.mark.parametrize(
    "name",
    [
        "pydoc_data/topics.py",
        "encodings/cp1252.py",
        "keyword.py",
        "token.py",
        "stringprep.py",
        "html/entities.py",
    ],
)
def test_generated_files_are_left_out(modules, name):
    assert name not in {module.name for module in modules}


@pytest.mark.parametrize("name", ["ast.py", "dataclasses.py", "bdb.py", "pickletools.py"])
def test_files_that_only_mention_generation_are_kept(modules, name):
    assert name in {module.name for module in modules}


def test_modules_are_read_and_never_imported(modules):
    assert "antigravity.py" in {module.name for module in modules}
    assert "antigravity" not in sys.modules


def test_chats_are_thousands_of_functions_that_parse(modules):
    records = [record for module in modules for record in stdlib.function_chats(module)]
    assert len(records) > 2000
    for record in records[::20]:
        user, assistant = record["messages"]
        code = assistant["content"].removeprefix("```python\n").removesuffix("\n```")
        (function,) = ast.parse(code).body
        assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        assert function.name in user["content"]
        assert code.count("\n") < stdlib.MAX_ANSWER_LINES


def test_functions_that_cannot_be_dedented_are_left_out():
    source = """class Page:
    def head(self):
        \"\"\"Return the head of the page.\"\"\"
        return f'''
<head>
'''

    def tail(self):
        \"\"\"Return the tail of the page.\"\"\"
        return 1
"""
    records = stdlib.function_chats(stdlib.StdlibModule("page.py", source))
    assert ["tail" in record["messages"][0]["content"] for record in records] == [True]


SOURCE = (
    '''
import os

def add(a, b=1, *rest, key: int = 2):
    """Return the sum of a and b.

    More words.
    """
    # why
    return a + b

class Box:
    @property
    def size(self):
        """Size of the box, in bytes"""
        return 1

    def only_words(self):
        """Do nothing at all."""

    def silent(self):
        return 2

def long(x):
    """Do it again and again."""
'''
    + "    x += 1\n" * 61
    + """
def one_line(): "Say nothing much."; return 3
"""
)


def test_instruction_and_completion_come_from_name_signature_and_docstring():
    records = list(stdlib.function_chats(stdlib.StdlibModule("m.py", SOURCE)))
    requested = [record["messages"][0]["content"] for record in records]
    answers = [record["messages"][1]["content"] for record in records]
    assert len(records) == 2
    assert "Return the sum of a and b." in requested[0]
    assert "add" in requested[0]
    assert (
        answers[0]
        == "```python\ndef add(a, b=1, *rest, key: int = 2):\n    # why\n    return a + b\n```"
    )
    assert "Size of the box, in bytes." in requested[1]
    assert "Box.size" in requested[1]
    assert answers[1] == "```python\n@property\ndef size(self):\n    return 1\n```"


def test_phrases_vary_and_are_deterministic():
    source = "".join(
        f'def f{n}(x):\n    """Return the number {n}."""\n    return {n}\n' for n in range(40)
    )
    module = stdlib.StdlibModule("m.py", source)
    openings = {
        record["messages"][0]["content"].split()[0] for record in stdlib.function_chats(module)
    }
    assert len(openings) >= 5
    assert list(stdlib.function_chats(module)) == list(stdlib.function_chats(module))


@pytest.mark.parametrize("text", ["def broken(:", "print 'old'", "(" * 500 + ")" * 500])
def test_a_module_that_does_not_parse_has_no_chats(text):
    assert list(stdlib.function_chats(stdlib.StdlibModule("m.py", text))) == []
