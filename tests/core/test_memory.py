"""Memory that was freed is used again."""

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource, torch
from tinsmith.train.setup import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

plain = faults()
keep_freed_memory()
kept = min(faults() for _ in range(10))  # the heap takes a while to settle
print(plain, kept)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone has mallopt")
def test_freed_memory_is_used_again():
    reported = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True
    )
    plain, kept = map(int, reported.stdout.split())
    assert kept < plain / 100
