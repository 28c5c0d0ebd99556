"""`tinsmith` with one rank of two whose sixth micro-batch is spoilt: `python poisoned.py loss
train ...`; started by test_ranks.py.
"""

import math
import os
import sys

from tinsmith.cli import main
from tinsmith.objectives.pretrain import CrossEntropy

where = sys.argv.pop(1)
real = CrossEntropy.loss
calls = {"number": 0}


def spoilt(self, policy, batch):
    """An infinite loss, or a finite one whose gradient is not."""
    calls["number"] += 1
    loss = real(self, policy, batch)
    if calls["number"] != 6 or os.environ["RANK"] != "1":
        return loss
    if where == "loss":
        bad = {"loss": loss.metrics["loss"]._replace(total=loss.total.detach() * math.inf)}
        return loss._replace(total=loss.total * math.inf, metrics=bad)
    return loss._replace(total=loss.total * math.nan)


CrossEntropy.loss = spoilt
main()
