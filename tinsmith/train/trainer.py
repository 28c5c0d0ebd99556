"""The loop; the only one.

    loss of a step = sum of the losses of all micro-batches of all ranks / their units

so the result does not depend on how the batch was split. Objectives say what a batch means
(`objectives/`), dues what happens between steps (`dues.py`), `start.py` puts a run together and
`finish.py` leaves what a finished run leaves.
"""

import math
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from tinsmith.config import RunConfig
from tinsmith.core import rng
from tinsmith.core.errors import Stopped
from tinsmith.core.faults import event
from tinsmith.core.signals import StopFlag
from tinsmith.data.batch import Batch
from tinsmith.objectives.base import Loss, Metric
from tinsmith.optim.schedule import multiplier
from tinsmith.train import checkpoint
from tinsmith.train.dues import DUES, attend, bad_step
from tinsmith.train.finish import finish
from tinsmith.train.folder import default_name, run_folder
from tinsmith.train.guard import TooManyBadSteps
from tinsmith.train.meters import Meters
from tinsmith.train.parallel import average_gradients
from tinsmith.train.precision import autocast
from tinsmith.train.run import Interrupted, Run
from tinsmith.train.start import start


def train(
    config: RunConfig,
    name: str | None = None,
    *,
    resume: bool = False,
    resume_from: Path | None = None,
    recipe: str = "run",
) -> Path:
    """Run a recipe from start, or from where it stopped, to its end; returns the run's folder.

    `name`: the folder's name under `$TINSMITH_RUNS` or `runs` (default: `recipe` and the date).
    `resume`: go on from the newest valid checkpoint, or start if there is none; `resume_from` names
    one.

    Raises UserError for anything the caller can mend, Stopped after a requested stop and its
    checkpoint, TooManyBadSteps where the numbers are beyond repair, DiskFull where two saves in a
    row failed.
    """
    name = name or default_name(recipe)
    with StopFlag() as flag:
        run = start(config, name, flag, resume=resume, resume_from=resume_from)
        if run is None:
            return run_folder(name)
        try:
            loop(run)
            finish(run)
        except Interrupted:
            raise stopped(run) from None
        finally:
            run.log.close()
            run.ranks.leave()
    return run.folder


def loop(run: Run) -> None:
    """Steps, and what is due after each; raises Interrupted with the run at a whole step."""
    attend(run, list(run.state.pending))
    while run.state.step < run.config.train.steps:
        tensors, values = rng.capture()
        cursor, progress = run.feed.cursor, run.objective.progress()
        try:
            step(run)
        except Interrupted:
            run.optimizers.zero_grad()
            rng.restore(tensors, values)
            run.feed.cursor = cursor
            run.objective.restore_progress(progress)
            raise
        event("step")
        attend(run, list(DUES))
        if run.failed_saves > 1:
            raise checkpoint.DiskFull(
                "two checkpoints in a row could not be saved; free some space, then --resume"
            )


def step(run: Run) -> None:
    """One optimizer step over `accumulate` micro-batches."""
    begin = run.feed.cursor
    micro = []
    for _ in range(run.config.train.accumulate):
        run.poll()
        micro.append(next(run.batches).to(run.ranks.device))
    units = (
        torch.stack([run.objective.weight(batch) for batch in micro])
        .sum()
        .double()
        .to(run.meter_device)
    )
    units = run.ranks.all_sum(units).clamp(min=1)
    gathered = Meters()
    stats: dict[str, Tensor] = {}
    for batch in micro:
        run.poll()
        loss = backward(run, batch, units)
        gathered.add(loss.metrics)
        for key, value in loss.stats.items():
            stats[key] = stats[key] + value if key in stats else value
        event("micro-step")
    healthy = update(run, gathered.reduce(run.ranks), stats)
    run.optimizers.zero_grad()
    run.state.step += 1
    run.state.tokens += run.config.train.positions
    if not healthy:
        bad_step(run, begin)
        if run.guard.lost:
            good, _ = checkpoint.latest(run.checkpoints)
            where = f"the last good checkpoint is {good}" if good else "no checkpoint was saved yet"
            raise TooManyBadSteps(f"{run.guard.in_a_row} steps in a row were not finite; {where}")


def backward(run: Run, batch: Batch, units: Tensor) -> Loss:
    """Forward and backward of one micro-batch; gradients are those of the mean over the global
    batch.
    """
    with autocast(run.config.train.precision, run.ranks.device):
        loss = run.objective.loss(run.policy, batch)
    share = (run.ranks.world / units).to(loss.total) * run.scale.value
    (loss.total * share).backward()
    return loss._replace(stats=loss.stats | run.policy.after_backward(loss.probes))


def update(run: Run, gathered: Meters, stats: dict[str, Tensor]) -> bool:
    """Clip, check, step. False where a number was not a number: then nothing has changed but the
    loss scale.
    """
    parameters = [p for p in run.parameters() if p.grad is not None]
    average_gradients(parameters, run.ranks)
    run.scale.unscale(parameters)
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    finite = gathered.finite()
    overflow = (
        run.scale.active and finite and not math.isfinite(float(norm)) and not run.scale.exhausted
    )
    run.scale.update(overflow)
    healthy = finite and math.isfinite(float(norm))
    run.guard.saw(healthy or overflow)
    if not healthy:
        return overflow
    if not run.objective.accept(gathered.means()):
        return True
    if run.config.optim.clip is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, run.config.optim.clip, norm)
    run.optimizers.set_multiplier(
        multiplier(run.config.optim.schedule, run.state.step, run.config.train.steps)
    )
    run.optimizers.step()
    summed = {key: run.ranks.all_sum(value) for key, value in stats.items()}
    run.routing.add(summed)
    run.optimizers.forget(run.policy.post_step(summed))
    one = torch.ones((), dtype=torch.float64, device=run.meter_device)
    gathered.add({"grad_norm": Metric(norm.to(one), one)})
    run.meters.merge(gathered)
    return True


def stopped(run: Run) -> Stopped:
    """Save what there is and say how to go on."""
    if not run.save():
        raise checkpoint.DiskFull(
            "the stop was asked for, but its checkpoint could not be saved; free some space"
        )
    run.log.line(
        f" stopped at step {run.state.step}; resume with --name {run.folder.name} --resume"
    )
    return Stopped(f"stopped at step {run.state.step}")
