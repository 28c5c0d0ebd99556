"""The built wheel and source distribution work without a checkout."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import tinsmith

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def run(*words: object, cwd: Path, **environment: str) -> str:
    """Run a command that must succeed and return its output."""
    done = subprocess.run(
        list(map(str, words)),
        cwd=cwd,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(root, tmp_path_factory) -> Path:
    """A folder with the wheel and the source distribution."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "hatchling", "build", "-d", folder, cwd=root)
    return folder


@pytest.fixture(scope="module")
def python(built, tmp_path_factory) -> Path:
    """Python of a new environment with the wheel and the libraries of the present one."""
    folder = tmp_path_factory.mktemp("clean") / "env"
    run(sys.executable, "-m", "venv", folder, cwd=built)
    python = folder / "bin" / "python"
    paths = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=built)
    site_packages = Path(paths.strip())
    # a line of a .pth file adds a folder, but not the .pth files in it: no editable install
    (site_packages / "libraries.pth").write_text(
        sysconfig.get_path("purelib") + "\n", encoding="utf-8"
    )
    (wheel,) = built.glob("*.whl")
    words = ("-m", "pip", "install", "--no-deps", "--no-index", "--quiet", wheel)
    run(python, *words, cwd=built)
    return python


def test_wheel_and_sdist_contain_all_data_files(built):
    (wheel,) = built.glob("*.whl")
    (sdist,) = built.glob("*.tar.gz")
    assert wheel.name == f"tinsmith-{tinsmith.__version__}-py3-none-any.whl"
    names = set(zipfile.ZipFile(wheel).namelist())
    package = Path(tinsmith.__file__).parent
    data = {
        path.relative_to(package.parent).as_posix()
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert data <= names
    assert not {name.split("/")[0] for name in names} - {
        "tinsmith",
        f"tinsmith-{tinsmith.__version__}.dist-info",
    }
    with tarfile.open(sdist) as archive:
        files = {name.partition("/")[2] for name in archive.getnames()}
    assert {"README.md", "CHANGELOG.md", "LICENSE", "pyproject.toml", "Makefile"} <= files


def test_the_tiny_quickstart_runs_from_an_empty_folder(python, tmp_path):
    where = run(python, "-c", "import tinsmith; print(tinsmith.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(python.parents[1])
    command = python.parent / "tinsmith"
    output = run(command, "quickstart", "--tiny", cwd=tmp_path, OMP_NUM_THREADS="1")
    assert output.count("% right") == 3
    assert (tmp_path / "runs" / "quickstart" / "final" / "model.safetensors").is_file()


def test_versions_agree(root):
    citation = (root / "CITATION.cff").read_text(encoding="utf-8")
    assert f"version: {tinsmith.__version__}" in citation.replace('"', "")
    changes = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{tinsmith.__version__}]" in changes
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["tool"]["hatch"]["version"]["path"] == "tinsmith/__init__.py"
