"""Rules of the code base that a machine can check: imports, names, docstrings, sizes, pages."""

import ast
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "tinsmith"

MAY_IMPORT = {
    "core": set(),
    "distributed": {"core"},
    "text": {"core"},
    "data": {"core", "text"},
    "nn": {"core", "distributed"},
    "losses": {"core", "nn"},
    "optim": {"core", "distributed"},
    "infer": {"core", "nn", "text"},
    "rewards": {"core", "text", "data", "nn"},
    "objectives": {
        *("core", "distributed", "text", "data", "nn", "infer", "losses", "rewards"),
    },
    "hub": {"core", "text", "nn", "infer"},
    "evals": {"core", "text", "data", "nn", "infer", "losses", "objectives"},
    "train": {
        *("core", "distributed", "text", "data", "nn", "optim", "infer", "losses", "rewards"),
        *("objectives", "evals", "hub", "config"),
    },
}
"""Packages that a package may import beside itself. verbs, cli and config may import all of them.
docs/architecture.md draws this table.
"""

THIRD_PARTY = {
    "core": {"numpy", "torch", "pydantic", "pydantic_core", "yaml", "rich"},
    "distributed": {"torch"},
    "text": {"numpy", "tokenizers", "jinja2", "huggingface_hub"},
    "nn": {"torch"},
    "losses": {"torch"},
    "optim": {"torch"},
    "infer": {"torch"},
}
"""Libraries beyond the standard one that a package may import, where that is limited."""

MAX_LINES = 400
MIN_LINES = 60
SLOTS = {
    *("nn/mixers", "nn/feedforwards", "nn/residuals", "objectives", "data/sources"),
    *("data/formats", "verbs", "hub/families"),
}
"""Folders in which every file is one variant, so that a short file is right."""

BANNED = set(
    [
        "judge",
        "judges",
        "judged",
        "judging",
        "dues",
        "told",
        "asked",
        "said",
        "heard",
        "listen",
        "listens",
        "lesson",
        "lessons",
        "survey",
        "surveyed",
        "reborn",
        "rebirth",
        "births",
        "born",
        "spoken",
        "spots",
        "somebody",
        "nobody",
        "everybody",
    ]
)
"""Words that name nothing a practitioner would search for; see docs/style.md."""


def files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def library(package: str = "") -> list[Path]:
    return files(f"tinsmith/{package}")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path) -> set[str]:
    """Absolute names imported anywhere in a file."""
    names = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_follow_the_table(package):
    assert library(package)
    for path in library(package):
        for name in imports(path):
            parts = name.split(".")
            if parts[0] == "tinsmith" and len(parts) > 1:
                allowed = MAY_IMPORT[package] | {package, "__version__"}
                assert parts[1] in allowed, f"{name_of(path)} imports {name}"


def test_every_package_is_in_the_table():
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders == {*MAY_IMPORT, "cli", "verbs"}


@pytest.mark.parametrize("package", THIRD_PARTY)
def test_third_party_imports_are_the_listed_ones(package):
    for path in library(package):
        for name in imports(path):
            top = name.split(".")[0]
            known = {"tinsmith", *sys.stdlib_module_names, *THIRD_PARTY[package]}
            known |= {"triton"} if path.parent.name == "kernels" else set()
            known |= {"bitsandbytes"} if path.name in ("quant.py", "state_io.py") else set()
            assert top in known, f"{name_of(path)} imports {name}"


def test_only_rng_imports_torch_in_core():
    for path in library("core"):
        if path.name != "rng.py":
            assert not any(name.startswith("torch") for name in imports(path)), path.name


def test_kernels_are_imported_only_where_they_are_used():
    code = "import tinsmith.nn.model, tinsmith.infer.engine, tinsmith.train.trainer"
    assert not any(name.startswith("tinsmith.nn.kernels") for name in modules_after(code))


def test_T10_no_pickle_and_nothing_that_runs_text():
    """No pickle, torch.load, eval, exec, yaml.load, jinja2.Template or trust_remote_code=True."""
    banned = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
    for path in library():
        for name in imports(path):
            assert name.split(".")[0] not in banned, f"{path.name} imports {name}"
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("eval", "exec", "compile"), f"{path.name}:{node.lineno}"
                for forbidden in ("torch.load", "yaml.load", "yaml.unsafe_load", "jinja2.Template"):
                    assert not called.endswith(forbidden), f"{path.name}:{node.lineno} {called}"
                for keyword in node.keywords:
                    if keyword.arg == "trust_remote_code":
                        assert ast.unparse(keyword.value) == "False", f"{path.name}:{node.lineno}"
            if isinstance(node, ast.ImportFrom) and node.module == "jinja2":
                assert all(alias.name != "Template" for alias in node.names), path.name


def modules_after(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.split("\n")[-2].split())


def test_help_imports_nothing_heavy():
    code = "import sys\nsys.argv = ['tinsmith', '--help']\nfrom tinsmith.cli import main\n"
    loaded = modules_after(code + "try:\n    main()\nexcept SystemExit:\n    pass")
    assert "typer" in loaded
    for heavy in ("torch", "pydantic", "yaml", "numpy", "transformers", "tokenizers"):
        assert heavy not in loaded, heavy


def test_import_tinsmith_loads_no_heavy_library():
    assert not {"torch", "numpy", "yaml", "typer"} & modules_after("import tinsmith")


def test_nn_loads_torch_and_core_only():
    loaded = modules_after("import tinsmith.nn.model")
    for other in ("tokenizers", "pydantic", "yaml", "transformers", "matplotlib"):
        assert other not in loaded, other
    own = {name.split(".")[1] for name in loaded if name.startswith("tinsmith.")}
    assert own == {"core", "distributed", "nn"}


def test_no_public_class_name_is_defined_twice():
    homes = defaultdict(set)
    for path in library():
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes[node.name].add(name_of(path))
    assert not {name: paths for name, paths in homes.items() if len(paths) > 1}


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of every docstring of a module, class, function or constant."""
    for node in ast.walk(tree_of(path)):
        value = node.value if isinstance(node, ast.Expr) else None
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            yield value.lineno, value.value


def test_no_docstring_of_one_or_two_words():
    short = [
        f"{name_of(path)}:{line}: {text}"
        for path in library()
        for line, text in docstrings(path)
        if len(text.split()) < 3
    ]
    assert not short, "\n".join(short)


def test_no_module_above_400_lines():
    long = {name_of(path): len(path.read_text(encoding="utf-8").split("\n")) for path in library()}
    assert not {name: lines for name, lines in long.items() if lines > MAX_LINES + 1}


def test_no_short_file_with_a_single_reader():
    """Such a file belongs to its reader, unless it is one variant of a slot."""
    readers = defaultdict(set)
    for path in library():
        for name in imports(path):
            for module in (name, name.rpartition(".")[0]):
                readers[module].add(path)
    lonely = []
    for path in library():
        module = name_of(path).removesuffix(".py").replace("/", ".")
        folder = path.parent.relative_to(PACKAGE).as_posix()
        lines = len(path.read_text(encoding="utf-8").split("\n")) - 1
        if path.name.startswith("__") or folder in SLOTS or lines >= MIN_LINES:
            continue
        if len(readers[module] - {path}) == 1:
            (reader,) = readers[module] - {path}
            lonely.append(f"{name_of(path)} ({lines} lines) belongs to {name_of(reader)}")
    assert not lonely, "\n".join(lonely)


def identifiers(path: Path) -> Iterator[tuple[int, str]]:
    """(line, name) of everything that a file names."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Attribute):
            yield node.lineno, node.attr
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id


@pytest.mark.parametrize("folder", ["tinsmith", "tests", "benchmarks", "experiments"])
def test_no_identifier_with_a_banned_word(folder):
    bad = []
    for path in files(folder):
        for line, name in identifiers(path):
            words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)
            if BANNED & {word.lower() for word in words}:
                bad.append(f"{name_of(path)}:{line}: {name}")
    assert not bad, "\n".join(sorted(set(bad)))


def reachable(package: str) -> set[str]:
    """Packages that `package` may import, directly or through others."""
    direct = MAY_IMPORT.get(package, set())
    return direct.union(*(reachable(other) for other in direct))


def test_the_picture_of_the_packages_is_the_table():
    """docs/architecture.md draws the table without the arrows that follow from others."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    arrows = set(re.findall(r"^ +(\w+) --> (\w+)$", page, re.M))
    expected = {
        (package, other)
        for package, row in MAY_IMPORT.items()
        for other in row
        if not any(other in reachable(between) for between in row - {other})
    }
    assert arrows == expected


def test_the_files_of_the_architecture_page_exist():
    """`folder/file.py` and `folder/` in backquotes, relative to the package or the checkout."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    names = set(re.findall(r"`([a-z_]+/[a-z0-9_/]*(?:\.py)?)`", page))
    assert len(names) > 30
    folders = (ROOT, PACKAGE, *(path.parent for path in PACKAGE.glob("*/__init__.py")))
    missing = {name for name in names if not any((folder / name).exists() for folder in folders)}
    assert not missing


def test_modules_and_attributes_that_texts_name_exist():
    """`folder.module.name` and `Class.name` in backquotes of the library's docstrings, comments and
    messages. A key of a recipe, such as `train.seq_len`, is a field in that package's config.
    """
    texts = {path: path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}
    folders = {path.parent.name for path in PACKAGE.rglob("__init__.py")} | {"parts", "routing"}
    classes = defaultdict(list)
    for text in texts.values():
        for name in re.findall(r"^class (\w+)", text, re.M):
            classes[name].append(text)
    stale = [
        f"{name_of(path)}: `{name}`"
        for path, text in texts.items()
        for name in re.findall(r"`(\w+(?:\.\w+)+)[`(]", text)
        if (name.split(".")[0] in folders and not _names_code(name, texts))
        or (name.split(".")[0] in classes and not _has(classes[name.split(".")[0]], name))
    ]
    assert not stale, "\n".join(stale)


def _names_code(name: str, texts: dict[Path, str]) -> bool:
    """True if some module's path, with or without names in it, ends the way `name` says."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        ending = "/" + "/".join(parts[:end])
        for path, text in texts.items():
            module = str(path.with_suffix("")).removesuffix("/__init__")
            if module.endswith(ending) and all(
                re.search(rf"\b{part}\b", text) for part in parts[end:]
            ):
                return True
    config = texts.get(PACKAGE / parts[0] / "config.py", "")
    return parts[-1] in ("yaml", "json", "txt", "py") or bool(
        re.search(rf"^    {parts[1]}:", config, re.M)
    )


def _has(definitions: list[str], name: str) -> bool:
    return any(re.search(rf"\b{name.split('.')[1]}\b", text) for text in definitions)
