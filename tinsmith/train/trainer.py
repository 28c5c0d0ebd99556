"""The training loop, for all objectives.

    loss of a step = sum of the losses of all micro-batches of all ranks / their units

so the result does not depend on how the batch is split. `objectives/` compute losses, `hooks.py`
logs, evaluates, samples and saves between steps, `setup.py` builds a run and `export.py` writes the
files of a finished one.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinsmith.config import RunConfig
from tinsmith.core import rng
from tinsmith.core.errors import Stopped
from tinsmith.core.kill_points import kill_point
from tinsmith.core.signals import StopFlag
from tinsmith.distributed.dtensor import full_tensor
from tinsmith.objectives.base import Loss, Metric
from tinsmith.optim.schedule import lr_multiplier
from tinsmith.train import checkpoint
from tinsmith.train.export import export_run
from tinsmith.train.guard import TooManyNonfiniteSteps
from tinsmith.train.hooks import HOOKS, log_nonfinite_step, run_hooks
from tinsmith.train.meters import MetricAccumulator
from tinsmith.train.parallel import average_gradients
from tinsmith.train.precision import autocast
from tinsmith.train.run import Interrupted, Run
from tinsmith.train.run_dir import default_run_name, run_folder
from tinsmith.train.setup import setup_run


def train(
    config: RunConfig,
    name: str | None = None,
    *,
    resume: bool = False,
    resume_from: Path | None = None,
    accept_changes: bool = False,
    recipe: str = "run",
) -> Path:
    """Train a recipe from the start or from a checkpoint to its last step. Return the run's folder.

    `name`: the folder's name under `$TINSMITH_RUNS` or `runs` (default: `recipe` and the date).
    `resume`: continue from the newest valid checkpoint, or start if there is none; `resume_from`
    names one. `accept_changes`: continue even if data or reference models have changed.

    Raise UserError for wrong input, Stopped after a requested stop and its checkpoint,
    TooManyNonfiniteSteps after too many steps in a row that were not finite, and DiskFull if two
    checkpoints in a row could not be saved.
    """
    name = name or default_run_name(recipe)
    with StopFlag() as flag:
        run = setup_run(
            config,
            name,
            flag,
            resume=resume,
            resume_from=resume_from,
            accept_changes=accept_changes,
        )
        if run is None:
            return run_folder(name)
        try:
            train_loop(run)
            export_run(run)
        except Interrupted:
            raise save_and_stop(run) from None
        finally:
            run.log.close()
            run.ranks.destroy()
    return run.folder


def train_loop(run: Run) -> None:
    """Train to the last step and run the hooks after each one. If interrupted, raise Interrupted
    with the run at the last complete step.
    """
    run_hooks(run, list(run.state.pending))
    while run.state.step < run.config.train.steps:
        tensors, values = rng.capture()
        cursor, snapshot = run.loader.cursor, run.objective.snapshot()
        try:
            train_step(run)
        except Interrupted:
            run.optimizers.zero_grad()
            rng.restore(tensors, values)
            run.loader.cursor = cursor
            run.objective.restore_snapshot(snapshot)
            raise
        kill_point("step")
        run_hooks(run, list(HOOKS))
        if run.failed_saves > 1:
            raise checkpoint.DiskFull(
                "two checkpoints in a row could not be saved; free some space, then --resume"
            )


def train_step(run: Run) -> None:
    """Run one optimizer step over `grad_accum_steps` micro-batches."""
    begin = run.loader.cursor
    micro = []
    for _ in range(run.config.train.grad_accum_steps):
        run.poll()
        with autocast(run.config.train.precision, run.ranks.device):
            micro.append(next(run.batches).to(run.ranks.device))
    units = (
        torch.stack([run.objective.units(batch) for batch in micro])
        .sum()
        .double()
        .to(run.metrics_device)
    )
    units = run.ranks.all_reduce_sum(units).clamp(min=1)
    gathered = MetricAccumulator()
    stats: dict[str, Tensor] = {}
    for batch in micro:
        run.poll()
        loss = backward(run, batch, units)
        gathered.add(loss.metrics)
        for key, value in loss.stats.items():
            stats[key] = stats[key] + value if key in stats else value
        kill_point("micro-step")
    healthy = optimizer_step(run, gathered.all_reduce(run.ranks), stats)
    run.optimizers.zero_grad()
    run.state.step += 1
    run.state.tokens += run.config.train.tokens_per_step
    if not healthy:
        log_nonfinite_step(run, begin)
        if run.guard.exceeded:
            good = checkpoint.latest_until(
                run.checkpoint_dir, run.state.step - run.guard.consecutive
            )
            where = (
                f"go on from the last good checkpoint with --resume-from {good}"
                if good
                else "no checkpoint was saved before them"
            )
            raise TooManyNonfiniteSteps(
                f"{run.guard.consecutive} steps in a row were not finite; {where}"
            )


def backward(run: Run, batch: Any, units: Tensor) -> Loss:
    """Run forward and backward of one micro-batch. Gradients are those of the mean over the global
    batch.
    """
    with autocast(run.config.train.precision, run.ranks.device):
        loss = run.objective.loss(run.policy, batch)
    share = (run.ranks.world_size / units).to(loss.total) * run.loss_scaler.scale
    (loss.total * share).backward()
    return loss._replace(stats=loss.stats | run.policy.after_backward(loss.grad_probes))


def optimizer_step(run: Run, metrics: MetricAccumulator, stats: dict[str, Tensor]) -> bool:
    """Clip gradients and step the optimizers. Return False if loss or gradient norm is not finite;
    then only the loss scale has changed.
    """
    parameters = [p for p in run.trainable_parameters() if p.grad is not None]
    average_gradients(parameters, run.ranks)
    run.loss_scaler.unscale(parameters)
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    norm = full_tensor(norm)
    finite = metrics.all_finite()
    overflow = (
        run.loss_scaler.enabled
        and finite
        and not math.isfinite(float(norm))
        and not run.loss_scaler.exhausted
    )
    run.loss_scaler.update(overflow)
    healthy = finite and math.isfinite(float(norm))
    run.guard.update(healthy or overflow)
    if not healthy:
        return overflow
    if not run.objective.accept_step(metrics.means()):
        return True
    if run.config.optim.max_grad_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, run.config.optim.max_grad_norm, norm)
    run.optimizers.set_lr_multiplier(
        lr_multiplier(run.config.optim.schedule, run.state.step, run.config.train.steps)
    )
    run.optimizers.step()
    summed = {key: run.ranks.all_reduce_sum(value) for key, value in stats.items()}
    run.expert_stats.add(summed)
    run.optimizers.reset_state(run.policy.post_step(summed))
    one = torch.ones((), dtype=torch.float64, device=run.metrics_device)
    metrics.add({"grad_norm": Metric(norm.to(one), one)})
    run.metrics.merge(metrics)
    return True


def save_and_stop(run: Run) -> Stopped:
    """Save a checkpoint and return the exception that ends the process with code 75."""
    if not run.save_checkpoint():
        raise checkpoint.DiskFull(
            "the stop was asked for, but its checkpoint could not be saved; free some space"
        )
    run.log.line(
        f" stopped at step {run.state.step}; resume with --name {run.folder.name} --resume"
    )
    return Stopped(f"stopped at step {run.state.step}")
