"""What happens between steps: log, evaluate, sample, save, in this order, each at its own
interval.
"""

import math
import time
from pathlib import Path

import torch

from tinsmith.core.log import Metrics
from tinsmith.core.units import count, duration
from tinsmith.data.sources import Source
from tinsmith.evals.bpb import evaluate_bpb
from tinsmith.evals.choice import evaluate_choice
from tinsmith.evals.routing import Specialisation, evaluate_routing, token_classes
from tinsmith.optim.schedule import multiplier
from tinsmith.train.precision import autocast
from tinsmith.train.routing import sentence
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
    _experts(run)
    _spike(run, means.get("loss", math.nan))


def _experts(run: Run) -> None:
    """What the experts did since the last line, where there are any."""
    found = run.routing.take(run.policy)
    if found:
        run.log.metrics({"step": run.state.step, "kind": "routing"} | found)
        run.log.line(f" experts {sentence(found)}")


def _spike(run: Run, loss: float) -> None:
    """Say where the loss leapt."""
    usual = run.spikes.saw(loss) if math.isfinite(loss) else None
    if usual is not None:
        values: Metrics = {"step": run.state.step, "kind": "spike", "loss": loss, "usual": usual}
        run.log.metrics(values)
        said = f"loss {loss:.3f} is far above the {usual:.3f} before it"
        run.log.line(f" warning step {run.state.step}: {said}; a lower lr may help")


def evaluate(run: Run) -> None:
    """Bits per byte on validation data."""
    if run.validation is None or not _due(run, run.config.train.eval_every):
        return
    began = time.monotonic()
    lengths = torch.from_numpy(run.tokenizer.byte_lengths()).to(run.ranks.device)
    with autocast(run.config.train.precision, run.ranks.device):
        found = evaluate_bpb(
            run.policy,
            run.validation,
            lengths,
            rows=run.config.eval.rows,
            batch_rows=max(1, run.config.train.rows // run.ranks.world),
            device=run.ranks.device,
            poll=run.poll,
        )
    whole = found["all"]
    values: Metrics = {"step": run.state.step, "kind": "eval", "loss": whole.loss, "bpb": whole.bpb}
    if len(found) > 2:
        values |= {f"bpb.{name}": each.bpb for name, each in found.items() if name != "all"}
    values |= _choices(run)
    special = _specialisation(run, run.validation)
    run.log.metrics(values)
    run.state.evaluation = {"step": run.state.step, "loss": whole.loss, "bpb": whole.bpb}
    better = run.state.best is None or whole.loss < run.state.best["loss"]
    if better and math.isfinite(whole.loss):
        run.state.best = dict(run.state.evaluation)
        run.save_now = run.config.train.keep.best
    mark = " (best)" if better else ""
    run.log.line(f" eval   step {run.state.step}  loss {whole.loss:.3f}  bpb {whole.bpb:.3f}{mark}")
    _tell_specialisation(run, special)
    run.clock.pause(time.monotonic() - began)


def _specialisation(run: Run, source: Source) -> dict[str, Specialisation]:
    """How much the experts of a run that ends have come to differ; empty where there are none."""
    if run.state.step < run.config.train.steps:
        return {}
    with autocast(run.config.train.precision, run.ranks.device):
        return evaluate_routing(
            run.policy,
            source,
            token_classes(run.tokenizer),
            rows=run.config.eval.rows,
            batch_rows=max(1, run.config.train.rows // run.ranks.world),
            device=run.ranks.device,
            poll=run.poll,
        )


def _tell_specialisation(run: Run, found: dict[str, Specialisation]) -> None:
    if found:
        layers = {name: one.to_dict() for name, one in found.items()}
        run.log.metrics({"step": run.state.step, "kind": "specialisation", "layers": layers})
        run.log.line(f" experts {found['all']}")


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
