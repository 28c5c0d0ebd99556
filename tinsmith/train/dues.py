"""What happens between steps: log, evaluate, sample, save, in this order, each at its own
interval.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch

from tinsmith.core.log import Metrics
from tinsmith.core.units import count, duration
from tinsmith.data.config import Shape
from tinsmith.data.sources import Source
from tinsmith.evals.bpb import evaluate_bpb
from tinsmith.evals.choice import evaluate_choice
from tinsmith.evals.heldback import evaluate_objective
from tinsmith.optim.schedule import multiplier
from tinsmith.train.precision import autocast
from tinsmith.train.run import Interrupted, Run
from tinsmith.train.samples import draw


def attend(run: Run, names: list[str]) -> None:
    """Do what is due after the present step. An interruption leaves word of what was not done."""
    for index, name in enumerate(names):
        run.state.pending = names[index + 1 :] if name == "save" else names[index:]
        DUES[name](run)
    run.state.pending = []
    if names and run.ranks.any(run.flag.stop):
        raise Interrupted


def _due(run: Run, every: int) -> bool:
    return run.state.step % every == 0 or run.state.step == run.config.train.steps


def log(run: Run) -> None:
    """One line, and the same numbers in metrics.jsonl; means since the last line."""
    if not _due(run, run.config.log.every) or not run.meters.sums:
        return
    means = run.meters.means()
    run.meters.sums = {}
    steps, now = run.config.train.steps, time.monotonic()
    speed = run.clock.speed(now, run.state.tokens)
    left = (steps - run.state.step) * run.config.train.positions / speed
    rate = multiplier(run.config.optim.schedule, run.state.step - 1, steps)
    values: Metrics = {"step": run.state.step, "kind": "train", **means}
    values |= {
        "lr_multiplier": rate,
        "tokens": run.state.tokens,
        "epoch": round(run.source.epoch_of(run.feed.cursor), 6),
        "bad_steps": run.guard.total,
        "tokens_per_second": speed,
        "eta_seconds": left,
    }
    if run.scale.active:
        values["loss_scale"] = run.scale.value
    run.log.metrics(values)
    extra = "".join(f"  {k} {v:.3g}" for k, v in means.items() if k not in ("loss", "grad_norm"))
    percent = 100 * run.state.step // steps
    place = f"{run.state.step:>6}/{steps} {percent:>3}%  loss {means.get('loss', math.nan):.3f}"
    norm = f"norm {means.get('grad_norm', math.nan):.2f}  lr {rate:.2f}{extra}"
    run.log.line(f" step {place}  {norm}  {count(speed)} tok/s  eta {duration(left)}")
    _spike(run, means.get("loss", math.nan))


def _spike(run: Run, loss: float) -> None:
    """Say where the loss leapt."""
    usual = run.spikes.saw(loss) if math.isfinite(loss) else None
    if usual is not None:
        values: Metrics = {"step": run.state.step, "kind": "spike", "loss": loss, "usual": usual}
        run.log.metrics(values)
        said = f"loss {loss:.3f} is far above the {usual:.3f} before it"
        run.log.line(f" warning step {run.state.step}: {said}; a lower lr may help")


def evaluate(run: Run) -> None:
    """What the shape of the data is measured by, on validation data."""
    measure = MEASURES.get(run.config.objective.shape)
    if run.validation is None or measure is None or not _due(run, run.config.train.eval_every):
        return
    began = time.monotonic()
    found = measure(run, run.validation)
    run.log.metrics({"step": run.state.step, "kind": "eval"} | found | _choices(run))
    whole = {name: value for name, value in found.items() if "." not in name}
    run.state.evaluation = {"step": run.state.step, **whole}
    loss = whole["loss"]
    better = run.state.best is None or loss < run.state.best["loss"]
    if better and math.isfinite(loss):
        run.state.best = dict(run.state.evaluation)
        run.save_now = run.config.train.keep.best
    mark = " (best)" if better else ""
    numbers = "".join(f"  {name} {value:.3f}" for name, value in list(whole.items())[:3])
    run.log.line(f" eval   step {run.state.step}{numbers}{mark}")
    run.clock.pause(time.monotonic() - began)


def _text(run: Run, validation: Source) -> dict[str, float]:
    """Nats per token and bits per byte; of several sources, bits per byte of each."""
    lengths = torch.from_numpy(run.tokenizer.byte_lengths()).to(run.ranks.device)
    with autocast(run.config.train.precision, run.ranks.device):
        found = evaluate_bpb(
            run.policy,
            validation,
            lengths,
            rows=run.config.eval.rows,
            batch_rows=max(1, run.config.train.rows // run.ranks.world),
            device=run.ranks.device,
            poll=run.poll,
        )
    values = {"loss": found["all"].loss, "bpb": found["all"].bpb}
    if len(found) > 2:
        values |= {f"bpb.{name}": each.bpb for name, each in found.items() if name != "all"}
    return values


def _pairs(run: Run, validation: Source) -> dict[str, float]:
    """The objective's own metrics: loss, margin, accuracy."""
    with autocast(run.config.train.precision, run.ranks.device):
        return evaluate_objective(
            run.objective,
            run.policy,
            validation,
            rows=run.config.eval.rows,
            batch_rows=max(1, run.config.train.rows // run.ranks.world),
            device=run.ranks.device,
            poll=run.poll,
        )


def _prompts(run: Run, validation: Source) -> dict[str, float]:
    """What greedy answers earn."""
    with autocast(run.config.train.precision, run.ranks.device):
        return run.objective.examine(run.policy, validation, run.config.eval.rows)


MEASURES: dict[Shape, Callable[[Run, Source], dict[str, float]]] = {
    "documents": _text,
    "chats": _text,
    "pairs": _pairs,
    "prompts": _prompts,
}
"""Numbers by name for a shape of data, `loss` among them, by which the best checkpoint is found."""


def _choices(run: Run) -> Metrics:
    """Accuracy on every multiple-choice file of `eval.tasks`."""
    found: Metrics = {}
    for path in run.config.eval.tasks:
        if path != "bpb":
            with autocast(run.config.train.precision, run.ranks.device):
                result = evaluate_choice(
                    run.policy, run.tokenizer, path, limit=run.config.eval.rows, poll=run.poll
                )
            found[f"accuracy.{Path(path).name.split('.')[0]}"] = result.to_dict()["acc"]
    return found


def sample(run: Run) -> None:
    """Continue fixed prompts; all go to samples.md, a few to the terminal."""
    if not _due(run, run.config.train.sample_every):
        return
    began = time.monotonic()
    drawn = draw(run)
    run.log.metrics({"step": run.state.step, "kind": "samples", "samples": drawn})
    for each in drawn[: run.config.log.samples]:
        asked, said = (" ".join(each[part].split()) for part in ("prompt", "text"))
        run.log.line(f" sample {asked[-44:]} >> {said[:80]}")
    run.clock.pause(time.monotonic() - began)


def save(run: Run) -> None:
    """A checkpoint, at its interval, at a new best, at the end, or because SIGUSR1 asked."""
    asked = run.ranks.any(run.flag.save)
    run.flag.save = False
    if not (_due(run, run.config.train.save_every) or run.save_now or asked):
        return
    began = time.monotonic()
    run.save_now = False
    run.save()
    run.clock.pause(time.monotonic() - began)


def bad_step(run: Run, begin: int) -> None:
    """Say which samples made a step that was skipped."""
    stop = run.feed.cursor
    run.log.metrics(
        {"step": run.state.step, "kind": "bad_step", "first_sample": begin, "end_sample": stop}
    )
    skipped = f"skipped (samples {begin} to {stop - 1}; {run.guard.total} so far)"
    run.log.line(f" warning step {run.state.step}: loss or gradient is not finite, {skipped}")


DUES = {"log": log, "evaluate": evaluate, "sample": sample, "save": save}
"""In the order in which they are done."""
