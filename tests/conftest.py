"""What every test may count on: one thread, fixed seeds, no network, real data where present."""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


FIRST_CASE_ONLY = (
    "tests/faults/",
    "tests/train/",
    "tests/golden/test_losses",
    "tests/e2e/test_recipes",
)
"""Tests here take seconds a case. By default only the first case of each runs."""


CHECKED = ("tests/test_", "tests/core/", "tests/losses/", "tests/rewards/", "tests/objectives/")
"""Tests here take milliseconds a case and run in `make check`."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave all but the first case of expensive parametrised tests to `make test-all`, and mark
    the tests of `make check`.
    """
    seen = set()
    for item in items:
        name = item.nodeid.split("[")[0]
        if name in seen and name.startswith(FIRST_CASE_ONLY):
            item.add_marker(pytest.mark.slow)
        if item.nodeid.startswith(CHECKED):
            item.add_marker(pytest.mark.check)
        seen.add(name)


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def same_start():
    """Every test begins with the same random state and leaves the default dtype as it was."""
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets named by TINSMITH_DATA; skips where there is none."""
    folder = Path(os.environ.get("TINSMITH_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("no real data: set TINSMITH_DATA")
    return folder


@pytest.fixture(scope="session")
def root() -> Path:
    """The project's root."""
    return ROOT
