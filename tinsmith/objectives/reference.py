"""The model that a policy is measured against."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tinsmith.nn.model import LM


@contextmanager
def reference(policy: LM, frozen: dict[str, LM]) -> Iterator[LM]:
    """The frozen reference of an objective, to be run inside.

    Gradients stay enabled, although no parameter of it wants one and so no graph is kept: norms and
    attention have ways of their own to compute where gradients are off, which round differently,
    and a policy that is its own reference is to get the same bits from both.
    """
    with torch.enable_grad():
        yield frozen["reference"]
