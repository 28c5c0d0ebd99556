"""Hooks between steps: log, evaluate, sample and save, in this order, each at its own interval."""

import math
import time

from tinsmith.core.log import Metrics
from tinsmith.core.units import format_count, format_duration
from tinsmith.optim.schedule import lr_multiplier
from tinsmith.train.evaluate import (
    evaluate_choice_tasks,
    evaluate_specialisation,
    evaluate_validation,
)
from tinsmith.train.expert_stats import format_line
from tinsmith.train.run import Interrupted, Run
from tinsmith.train.samples import generate_samples


def run_hooks(run: Run, names: list[str]) -> None:
    """Run the hooks due at this step. If interrupted, the remaining ones are stored in
    `state.pending` and run after resume.
    """
    for index, name in enumerate(names):
        run.state.pending = names[index + 1 :] if name == "save" else names[index:]
        HOOKS[name](run)
    run.state.pending = []
    if names and run.ranks.any(run.stop_flag.stop):
        raise Interrupted


def _due(run: Run, every: int) -> bool:
    return run.state.step % every == 0 or run.state.step == run.config.train.steps


def log(run: Run) -> None:
    """Log the means of all metrics since the last line, to the terminal and `metrics.jsonl`."""
    if not _due(run, run.config.log.every) or not run.metrics.sums:
        return
    means = run.metrics.means()
    run.metrics.sums = {}
    steps, now = run.config.train.steps, time.monotonic()
    speed = run.throughput.tokens_per_second(now, run.state.tokens)
    left = (steps - run.state.step) * run.config.train.tokens_per_step / speed
    rate = lr_multiplier(run.config.optim.schedule, run.state.step - 1, steps)
    values: Metrics = {"step": run.state.step, "kind": "train", **means}
    values |= {
        "lr_multiplier": rate,
        "tokens": run.state.tokens,
        "epoch": round(run.source.epoch_of(run.loader.cursor), 6),
        "nonfinite_steps": run.guard.total,
        "tokens_per_second": speed,
        "eta_seconds": left,
    }
    if run.loss_scaler.enabled:
        values["loss_scale"] = run.loss_scaler.scale
    run.log.metrics(values)
    extra = "".join(f"  {k} {v:.3g}" for k, v in means.items() if k not in ("loss", "grad_norm"))
    percent = 100 * run.state.step // steps
    progress = f"{run.state.step:>6}/{steps} {percent:>3}%  loss {means.get('loss', math.nan):.3f}"
    norm = f"norm {means.get('grad_norm', math.nan):.2f}  lr {rate:.2f}{extra}"
    run.log.line(
        f" step {progress}  {norm}  {format_count(speed)} tok/s  eta {format_duration(left)}"
    )
    _experts(run)
    _spike(run, means.get("loss", math.nan))


def _experts(run: Run) -> None:
    """Log the statistics of experts since the last line, if there are any."""
    found = run.expert_stats.pop_metrics(run.policy)
    if found:
        run.log.metrics({"step": run.state.step, "kind": "routing"} | found)
        run.log.line(f" experts {format_line(found)}")


def _spike(run: Run, loss: float) -> None:
    """Warn of a loss spike."""
    median = run.spike_detector.update(loss) if math.isfinite(loss) else None
    if median is not None:
        values: Metrics = {"step": run.state.step, "kind": "spike", "loss": loss, "median": median}
        run.log.metrics(values)
        output = f"loss {loss:.3f} is far above the {median:.3f} before it"
        run.log.line(f" warning step {run.state.step}: {output}; a lower lr may help")


def evaluate(run: Run) -> None:
    """Evaluate on validation data and note the best evaluation."""
    if run.validation is None or not _due(run, run.config.train.eval_every):
        return
    began = time.monotonic()
    values = evaluate_validation(run, run.validation)
    found = evaluate_specialisation(run, run.validation)
    run.log.metrics({"step": run.state.step, "kind": "eval"} | values | evaluate_choice_tasks(run))
    whole = {name: value for name, value in values.items() if "." not in name}
    run.state.evaluation, loss = {"step": run.state.step, **whole}, whole["loss"]
    better = math.isfinite(loss) and (run.state.best is None or loss < run.state.best["loss"])
    if better:
        run.state.best = dict(run.state.evaluation)
        run.save_now = run.config.train.keep.best
    mark = " (best)" if better else ""
    output = "".join(f"  {name} {value:.3f}" for name, value in list(whole.items())[:3])
    run.log.line(f" eval   step {run.state.step}{output}{mark}")
    if found:
        layers = {name: one.to_dict() for name, one in found.items()}
        run.log.metrics({"step": run.state.step, "kind": "specialisation", "layers": layers})
        run.log.line(f" experts {found['all']}")
    run.throughput.exclude(time.monotonic() - began)


def sample(run: Run) -> None:
    """Generate text samples for fixed prompts and log them."""
    if not _due(run, run.config.train.sample_every):
        return
    began = time.monotonic()
    drawn = generate_samples(run)
    run.log.metrics({"step": run.state.step, "kind": "samples", "samples": drawn})
    for each in drawn[: run.config.log.samples]:
        requested, output = (" ".join(each[part].split()) for part in ("prompt", "text"))
        run.log.line(f" sample {requested[-44:]} >> {output[:80]}")
    run.throughput.exclude(time.monotonic() - began)


def save(run: Run) -> None:
    """Save a checkpoint: at its interval, at a new best, at the end, or after SIGUSR1.

    While steps are not finite only SIGUSR1 saves, because the weights may be broken already.
    """
    requested = run.ranks.any(run.stop_flag.save)
    run.stop_flag.save = False
    due = _due(run, run.config.train.save_every) or run.save_now
    if not requested and (not due or run.guard.consecutive):
        return
    began = time.monotonic()
    run.save_now = False
    run.save_checkpoint()
    run.throughput.exclude(time.monotonic() - began)


def log_nonfinite_step(run: Run, first_sample: int) -> None:
    """Log a skipped step and its samples, whose loss or gradient was not finite."""
    stop = run.loader.cursor
    run.log.metrics(
        {
            "step": run.state.step,
            "kind": "nonfinite_step",
            "first_sample": first_sample,
            "end_sample": stop,
        }
    )
    skipped = f"skipped (samples {first_sample} to {stop - 1}; {run.guard.total} so far)"
    run.log.line(f" warning step {run.state.step}: loss or gradient is not finite, {skipped}")


HOOKS = {"log": log, "evaluate": evaluate, "sample": sample, "save": save}
"""All hooks in the order in which they run."""
