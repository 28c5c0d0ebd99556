"""Evaluate a run on validation data: one function per data format.

Documents and chats are measured in bits per byte, other formats by the metrics of the objective.
"""

from collections.abc import Callable
from pathlib import Path

import torch

from tinsmith.core.log import Metrics
from tinsmith.data.formats import FORMATS
from tinsmith.data.loader.loader import TokenizedDataset
from tinsmith.evals.bpb import evaluate_bpb
from tinsmith.evals.choice import evaluate_choice
from tinsmith.evals.routing import Specialisation, evaluate_routing, token_classes
from tinsmith.infer.generate import eval_mode
from tinsmith.nn.model import LM
from tinsmith.objectives.base import Objective
from tinsmith.train.precision import autocast
from tinsmith.train.run import Run


def evaluate_validation(run: Run, validation: TokenizedDataset) -> dict[str, float]:
    """Return validation metrics by name. The best checkpoint has the lowest `loss`."""
    with autocast(run.config.train.precision, run.ranks.device):
        return EVALUATORS[_kind(run)](run, validation)


def _text(run: Run, validation: TokenizedDataset) -> dict[str, float]:
    """Return loss (nats per token) and bits per byte, with several sources also of each."""
    found = evaluate_bpb(
        run.policy,
        validation,
        torch.from_numpy(run.tokenizer.byte_lengths()).to(run.ranks.device),
        max_samples=run.config.eval.max_samples,
        batch_size=_batch_rows(run),
        device=run.ranks.device,
        poll=run.poll,
    )
    values = {"loss": found["all"].loss, "bpb": found["all"].bpb}
    if len(found) > 2:
        values |= {f"bpb.{name}": each.bpb for name, each in found.items() if name != "all"}
    return values


def _objective(run: Run, validation: TokenizedDataset) -> dict[str, float]:
    """Return the metrics of the objective's loss; for pairs: loss, margin, accuracy."""
    return evaluate_objective(
        run.objective,
        run.policy,
        validation,
        max_samples=run.config.eval.max_samples,
        batch_size=_batch_rows(run),
        device=run.ranks.device,
        poll=run.poll,
    )


def _completions(run: Run, validation: TokenizedDataset) -> dict[str, float]:
    """Return the metrics of completions of validation prompts."""
    return run.objective.evaluate(run.policy, validation, run.config.eval.max_samples)


EVALUATORS: dict[str, Callable[[Run, TokenizedDataset], dict[str, float]]] = {
    "text": _text,
    "objective": _objective,
    "generation": _completions,
}
"""Functions by `DataFormat.evaluation`."""


def _kind(run: Run) -> str:
    return FORMATS[run.config.objective.data_format].evaluation


def evaluate_choice_tasks(run: Run) -> Metrics:
    """Return the accuracy on every multiple-choice file of `eval.tasks`."""
    found: Metrics = {}
    for path in run.config.eval.tasks:
        if path != "bpb":
            with autocast(run.config.train.precision, run.ranks.device):
                result = evaluate_choice(
                    run.policy,
                    run.tokenizer,
                    path,
                    limit=run.config.eval.max_samples,
                    poll=run.poll,
                )
            found[f"accuracy.{Path(path).name.split('.')[0]}"] = result.to_dict()["acc"]
    return found


def evaluate_specialisation(run: Run, validation: TokenizedDataset) -> dict[str, Specialisation]:
    """Measure the specialisation of experts at the last step. Return an empty dict at other steps,
    without experts, and for data other than text.
    """
    if run.state.step < run.config.train.steps or _kind(run) != "text":
        return {}
    with autocast(run.config.train.precision, run.ranks.device):
        return evaluate_routing(
            run.policy,
            validation,
            token_classes(run.tokenizer),
            max_samples=run.config.eval.max_samples,
            batch_size=_batch_rows(run),
            device=run.ranks.device,
            poll=run.poll,
        )


def _batch_rows(run: Run) -> int:
    return max(1, run.config.train.batch_size // run.ranks.world_size)


def evaluate_objective(
    objective: Objective,
    lm: LM,
    source: TokenizedDataset,
    *,
    max_samples: int,
    batch_size: int,
    device: torch.device | str,
    poll: Callable[[], object],
) -> dict[str, float]:
    """Return every metric of `objective.loss` as a mean over at most `max_samples` samples, spread
    evenly over `source`, in batches of `batch_size`.

    `poll` is called before every batch and may raise to end the evaluation. Global random state,
    training mode and gradients are unchanged. Gradients stay enabled although there is no backward,
    so that policy and reference are computed as in training.
    """
    sums: dict[str, tuple[float, float]] = {}
    with eval_mode(lm):
        for batch in source.iter_batches(batch_size, max_samples=max_samples):
            poll()
            for name, metric in objective.loss(lm, batch.to(device)).metrics.items():
                total, count = sums.get(name, (0.0, 0.0))
                sums[name] = total + float(metric.total), count + float(metric.count)
    return {name: total / count for name, (total, count) in sums.items() if count}
