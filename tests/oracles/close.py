"""Equality of numbers up to rounding."""

from collections.abc import Callable
from typing import Any

import torch


def close_to(usual: float) -> Callable[..., None]:
    """(found, expected, tolerance=usual) -> asserts that tensors, or trees of them, differ by no
    more than that, relative and absolute, and have one dtype.
    """

    def close(found: Any, expected: Any, tolerance: float = usual) -> None:
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)

    return close
