"""Runs `tinsmith` with a loss or gradient that is not finite in the sixth micro-batch of rank 1:
`python nonfinite_worker.py loss train ...`. test_ranks.py starts it.
"""

import math
import os
import sys

from tinsmith.cli import main
from tinsmith.objectives.pretrain import CrossEntropy
from tinsmith.train import hooks

where = sys.argv.pop(1)
original = CrossEntropy.loss
calls = 0


def nonfinite_loss(self, policy, batch):
    """Return an infinite loss, or a loss whose gradient is NaN, in the sixth call on rank 1."""
    global calls
    calls += 1
    loss = original(self, policy, batch)
    if calls != 6 or os.environ["RANK"] != "1":
        return loss
    if where == "loss":
        bad = {"loss": loss.metrics["loss"]._replace(total=loss.total.detach() * math.inf)}
        return loss._replace(total=loss.total * math.inf, metrics=bad)
    return loss._replace(total=loss.total * math.nan)


def log_and_request_checkpoint(run):
    """Save after every step. At its interval no checkpoint is saved after a step that is not
    finite.
    """
    hooks.log(run)
    run.stop_flag.save = True


CrossEntropy.loss = nonfinite_loss
hooks.HOOKS["log"] = log_and_request_checkpoint
main()
