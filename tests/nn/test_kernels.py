"""Triton kernels, run by Triton's interpreter on a CPU, against their torch implementations."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is for Linux")

SIZES = [(2, 37, 2, 8, 3, 4), (1, 50, 4, 12, 4, 8), (3, 20, 1, 16, 2, 5), (1, 3, 3, 8, 5, 16)]
SIZES += [(1, 150, 4, 64, 2, 64)]  # as in the benchmark
"""(rows, queries, heads, width, chosen blocks, size of a block)."""


def drawn(rows, queries, heads, width, count, size):
    """Two documents a row, and some queries that choose nothing."""
    source = torch.Generator().manual_seed(0)

    def noise(*shape):
        return torch.randn(shape, generator=source)

    start = torch.arange(queries).where(torch.arange(queries) >= queries // 3, 0)
    start[queries // 3 :] = queries // 3
    place = torch.arange(queries)
    begins = torch.full((rows, queries, count), -1)
    for n in range(rows):
        for t in range(queries):
            number = (t - int(start[t])) // size + 1
            some = torch.randperm(number, generator=source)[:count]
            if t % 7 != 3:
                begins[n, t, : len(some)] = some * size + start[t]
    tensors = noise(rows, queries, heads, width), noise(rows, queries, width)
    place_NT = place.expand(rows, -1).contiguous()
    return *tensors, noise(rows, queries, width), begins, place_NT, size


def compare(device: str) -> None:
    """Forward and backward of every size, by both."""
    from tinsmith.nn.attention import block_sparse as parts
    from tinsmith.nn.kernels import block_sparse as kernels

    for sizes in SIZES:
        *given, size = drawn(*sizes)
        given = [x.to(device) for x in given]
        wanted = parts.torch_forward(*given, size)
        found = kernels.forward(*given, size)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        dy = torch.randn(wanted[0].shape, generator=torch.Generator().manual_seed(1)).to(device)
        wanted = parts.torch_backward(dy, *wanted, *given, size)
        found = kernels.backward(dy, *found, *given, size)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_block_sparse_attention_in_the_interpreter_equals_torch():
    """In a process of its own: Triton asks once, when it is imported, whether to interpret."""
    code = f"import sys; sys.path.insert(0, {os.getcwd()!r})\n"
    code += "from tests.nn.test_kernels import compare\ncompare('cpu')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_block_sparse_attention_on_a_gpu_equals_torch():
    compare("cuda")
