"""`tinsmith eval`: measure a model on evaluation tasks."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tinsmith.config import RunConfig, from_dict
from tinsmith.core.errors import UserError
from tinsmith.core.log import nonfinite_to_none, print_line
from tinsmith.core.parse import read_yaml
from tinsmith.data.formats import FORMATS
from tinsmith.data.loader.loader import TokenizedDataset, open_dataset
from tinsmith.data.prepare.prepare import prepare
from tinsmith.evals.arc import evaluate_arc
from tinsmith.evals.bpb import evaluate_bpb, evaluate_text
from tinsmith.evals.choice import evaluate_choice
from tinsmith.evals.format import evaluate_format
from tinsmith.evals.routing import evaluate_routing, token_classes
from tinsmith.hub.load import load
from tinsmith.nn.model import LM
from tinsmith.text.tokenizer import Tokenizer
from tinsmith.train.parallel import pick_device
from tinsmith.train.run_dir import runs_root
from tinsmith.verbs.export_import import parse_rope_scaling
from tinsmith.verbs.puzzles import open_puzzles, picture_folder, run_folder_of, save_puzzles

BATCH_SIZE = 16


class EvalOptions(NamedTuple):
    """Options of the evaluation tasks."""

    data: Path | None
    """Text for `bpb`, or ARC tasks. None: the validation split of the run."""
    seq_len: int | None
    """Window length in tokens on `data`. None: `train.seq_len` of the run, else `max_seq_len`."""
    limit: int | None
    """Largest number of rows, questions or puzzles per task (generated puzzles: 100 by default)."""
    solutions: Path | None = None
    """File with the test outputs of the ARC tasks in `data`, if they are separate."""


def evaluate(
    model: str,
    tasks: str,
    text: EvalOptions,
    device: str,
    rope_scaling: str | None,
    as_json: bool,
) -> None:
    """Run every task and print its results."""
    lm, tokenizer = load(
        model, device=pick_device(device), rope_scaling=parse_rope_scaling(rope_scaling)
    )
    if tokenizer is None:
        raise UserError(f"{model}: has no tokenizer, so it cannot be evaluated on text")
    for name in ("seq_len", "limit"):
        value = getattr(text, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least 1")
    results: dict[str, Any] = {}
    names = [name.strip() for name in tasks.split(",")]
    if text.seq_len is not None and "bpb" not in names:
        raise UserError(
            f"--seq-len {text.seq_len}: applies to --tasks bpb only; add bpb or leave it out"
        )
    for task in names:
        if not task:
            raise UserError(f"--tasks '{tasks}': a name is missing; try bpb")
        if task == "bpb":
            results |= _bits_per_byte(model, lm, tokenizer, text)
        elif task == "routing":
            results |= _routing(model, lm, tokenizer, text)
        elif task == "format":
            results["format"] = _format(model, lm, tokenizer, text)
        elif task == "arc_agi":
            results |= _arc(model, lm, tokenizer, text)
        elif Path(task).exists():
            found = evaluate_choice(
                lm, tokenizer, task, limit=text.limit, batch_size=BATCH_SIZE, say=_aside
            )
            results[task] = found.to_dict()
        else:
            known = "arc_agi, bpb, format, routing"
            raise UserError(f"--tasks {task}: neither of {known} nor a file of questions")
    if as_json:
        print_line(json.dumps(nonfinite_to_none(results), indent=1))
    else:
        for name, found in results.items():
            print_line(f" {name:<32} " + _numbers(found))
            for task, score in found.get("by_task", {}).items():
                print_line(f"   {task:<30} score {score:.4g}")


def _bits_per_byte(model: str, lm: LM, tokenizer: Tokenizer, text: EvalOptions) -> dict[str, Any]:
    config = _recipe(model)
    if text.data is not None:
        trained_on = config and min(config.train.seq_len, lm.config.max_seq_len)
        found = evaluate_text(
            lm,
            tokenizer,
            text.data,
            seq_len=text.seq_len or trained_on,
            limit=text.limit,
            batch_size=BATCH_SIZE,
            say=_aside,
        )
        return {f"bpb {name}": each.to_dict() for name, each in found.parts.items()}
    if config is None:
        raise UserError(f"{model}: is not part of a run; name a text with --data")
    validation = _validation(model, config, tokenizer)
    parts = evaluate_bpb(
        lm,
        validation,
        torch.from_numpy(tokenizer.byte_lengths()),
        max_samples=text.limit or validation.size,
        batch_size=BATCH_SIZE,
        device=lm.embed.weight.device,
        poll=lambda: None,
    )
    return {f"bpb {name}": each.to_dict() for name, each in parts.items()}


def _routing(model: str, lm: LM, tokenizer: Tokenizer, text: EvalOptions) -> dict[str, Any]:
    """Measure expert specialisation on the validation split of the run."""
    config = _recipe(model)
    if config is None or text.data is not None:
        raise UserError("--tasks routing: measures the validation split of a run; name its folder")
    if not lm.routed_modules():
        raise UserError(f"{model}: has no experts, so --tasks routing has nothing to measure")
    validation = _validation(model, config, tokenizer)
    found = evaluate_routing(
        lm,
        validation,
        token_classes(tokenizer),
        max_samples=text.limit or validation.size,
        batch_size=BATCH_SIZE,
        device=lm.embed.weight.device,
        poll=lambda: None,
    )
    return {f"routing {name}": each.to_dict() for name, each in found.items()}


def _validation(model: str, config: RunConfig, tokenizer: Tokenizer) -> TokenizedDataset:
    data_format, train = config.objective.data_format, config.train
    if FORMATS[data_format].evaluation != "text":
        raise UserError(f"{model}: was trained on {data_format}; name a text with --data")
    prepared = prepare(config.data, tokenizer, data_format, runs_root() / ".data", _aside)
    return open_dataset(prepared.folder, data_format, "validation", train.seq_len, train.seed)


def _format(model: str, lm: LM, tokenizer: Tokenizer, text: EvalOptions) -> dict[str, Any]:
    """Measure the format of greedy completions of the validation prompts of the run."""
    config = _recipe(model)
    if config is None:
        raise UserError(f"{model}: is not part of a run: no prompts for --tasks format")
    context, seed = config.train.seq_len, config.train.seed
    place = runs_root() / ".data"
    prepared = prepare(config.data, tokenizer, "prompts", place, _aside, seq_len=context)
    source = open_dataset(prepared.folder, "prompts", "validation", context, seed)
    prompts = [
        source.get_prompts(int(i), 1)[0] for i in source.evenly_spaced(text.limit or source.size)
    ]
    return evaluate_format(lm, tokenizer, prompts, batch_size=BATCH_SIZE).to_dict()


def _arc(model: str, lm: LM, tokenizer: Tokenizer, text: EvalOptions) -> dict[str, Any]:
    """Solve ARC puzzles and draw some of them into the run's folder, or beside the model."""
    groups = open_puzzles(model, _recipe(model), text.data, text.solutions, text.limit, _aside)
    found = {name: evaluate_arc(lm, tokenizer, each) for name, each in groups.items()}
    outcomes = [outcome for result in found.values() for outcome in result.outcomes]
    _aside(f" picture {save_puzzles(picture_folder(model), outcomes)}")
    return {f"arc_agi {name}": result.to_dict() for name, result in found.items()}


def _recipe(model: str) -> RunConfig | None:
    """Return the recipe of the run that `model` belongs to, or None."""
    run = run_folder_of(Path(model))
    recipe = run / "config.yaml"
    whole = recipe.exists() and (run / "checkpoints").is_dir()
    return from_dict(read_yaml(recipe), str(recipe)) if whole else None


def _numbers(found: dict[str, Any]) -> str:
    numbers = [(key, value) for key, value in found.items() if isinstance(value, int | float)]
    return "  ".join(f"{key} {value:.4g}" for key, value in numbers)


def _aside(line: str) -> None:
    print_line(line, err=True)
