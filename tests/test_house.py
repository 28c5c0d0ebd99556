"""Rules of the house that a machine can check: who imports whom, and what must not occur."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "tinsmith"

MAY_IMPORT = {
    "core": set(),
    "text": {"core"},
    "data": {"core", "text"},
    "nn": {"core"},
    "optim": {"core"},
    "infer": {"core", "nn", "text"},
    "objectives": {"core", "text", "data", "nn", "infer"},
    "hub": {"core", "text", "nn", "infer"},
    "evals": {"core", "text", "data", "nn", "infer", "objectives"},
    "train": {
        *("core", "text", "data", "nn", "optim", "infer", "objectives", "evals", "hub"),
        *("config",),
    },
}
"""What a package may import beside itself; verbs, cli and config may import everything."""

THIRD_PARTY = {
    "core": {"numpy", "torch", "pydantic", "pydantic_core", "yaml", "rich"},
    "text": {"numpy", "tokenizers", "jinja2", "huggingface_hub"},
    "nn": {"torch"},
    "optim": {"torch"},
    "infer": {"torch"},
}
"""What a package may import from outside the standard library, where that is limited."""


def imports(path: Path) -> set[str]:
    """Absolute names imported anywhere in a file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def files(package: str) -> list[Path]:
    return sorted((PACKAGE / package).rglob("*.py"))


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_go_one_way(package):
    assert files(package)
    for path in files(package):
        for name in imports(path):
            parts = name.split(".")
            if parts[0] == "tinsmith" and len(parts) > 1:
                allowed = MAY_IMPORT[package] | {package, "__version__"}
                assert parts[1] in allowed, f"{path.relative_to(PACKAGE)} imports {name}"


@pytest.mark.parametrize("package", THIRD_PARTY)
def test_third_party_imports_are_the_listed_ones(package):
    for path in files(package):
        for name in imports(path):
            top = name.split(".")[0]
            known = {"tinsmith", *sys.stdlib_module_names, *THIRD_PARTY[package]}
            known |= {"triton"} if path.parent.name == "kernels" else set()
            known |= {"bitsandbytes"} if path.name in ("quant.py", "memory.py") else set()
            assert top in known, f"{path.relative_to(PACKAGE)} imports {name}"


def test_kernels_are_imported_where_they_are_used_only():
    code = "import tinsmith.nn.model, tinsmith.infer.engine, tinsmith.train.trainer"
    assert not any(name.startswith("tinsmith.nn.kernels") for name in modules_after(code))


def test_only_rng_imports_torch_in_core():
    for path in files("core"):
        if path.name != "rng.py":
            assert not any(name.startswith("torch") for name in imports(path)), path.name


def test_T10_no_pickle_and_nothing_that_runs_text():
    """No pickle, torch.load, eval, exec, yaml.load, jinja2.Template or trust_remote_code=True."""
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        banned = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
        for name in imports(path):
            assert name.split(".")[0] not in banned, f"{path.name} imports {name}"
        for node in ast.walk(tree):
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


def test_import_tinsmith_costs_nothing():
    assert not {"torch", "numpy", "yaml", "typer"} & modules_after("import tinsmith")


def test_nn_loads_torch_and_core_only():
    loaded = modules_after("import tinsmith.nn.model")
    for other in ("tokenizers", "pydantic", "yaml", "transformers", "matplotlib"):
        assert other not in loaded, other
    own = {name.split(".")[1] for name in loaded if name.startswith("tinsmith.")}
    assert own == {"core", "nn"}
