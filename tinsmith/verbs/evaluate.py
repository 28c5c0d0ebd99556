"""`tinsmith eval`: measure a model on evaluation tasks."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tinsmith.config import RunConfig, from_dict
from tinsmith.core.errors import UserError
from tinsmith.core.log import nonfinite_to_none, print_line
from tinsmith.core.yamlfile import read_yaml
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
    options: EvalOptions,
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
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least 1")
    results: dict[str, Any] = {}
    names = [name.strip() for name in tasks.split(",")]
    if options.seq_len is not None and "bpb" not in names:
        raise UserError(
            f"--seq-len {options.seq_len}: applies to --tasks bpb only; add bpb or leave it out"
        )
    for task in names:
        if not task:
            raise UserError(f"--tasks '{tasks}': a name is missing; try bpb")
        if task == "bpb":
            results |= _bits_per_byte(model, lm, tokenizer, options)
        elif task == "routing":
            results |= _routing(model, lm, tokenizer, options)
        elif task == "format":
            results["format"] = _format(model, lm, tokenizer, options)
        elif task == "arc_agi":
            results |= _arc(model, lm, tokenizer, options)
        elif Path(task).exists():
            choice = evaluate_choice(
                lm, tokenizer, task, limit=options.limit, batch_size=BATCH_SIZE, say=_print_progress
            )
            results[task] = choice.to_dict()
        else:
            known = "arc_agi, bpb, format, routing"
            raise UserError(f"--tasks {task}: neither of {known} nor a file of questions")
    if as_json:
        print_line(json.dumps(nonfinite_to_none(results), indent=1))
    else:
        for name, result in results.items():
            print_line(f" {name:<32} " + _format_numbers(result))
            for task, score in result.get("by_task", {}).items():
                print_line(f"   {task:<30} score {score:.4g}")


def _bits_per_byte(
    model: str, lm: LM, tokenizer: Tokenizer, options: EvalOptions
) -> dict[str, Any]:
    config = _recipe(model)
    if options.data is not None:
        train_seq_len = config and min(config.train.seq_len, lm.config.max_seq_len)
        result = evaluate_text(
            lm,
            tokenizer,
            options.data,
            seq_len=options.seq_len or train_seq_len,
            limit=options.limit,
            batch_size=BATCH_SIZE,
            say=_print_progress,
        )
        return {f"bpb {name}": bpb.to_dict() for name, bpb in result.parts.items()}
    if config is None:
        raise UserError(f"{model}: is not part of a run; name a text with --data")
    validation = _validation(model, config, tokenizer)
    parts = evaluate_bpb(
        lm,
        validation,
        torch.from_numpy(tokenizer.byte_lengths()),
        max_samples=options.limit or validation.size,
        batch_size=BATCH_SIZE,
        device=lm.embed.weight.device,
        poll=lambda: None,
    )
    return {f"bpb {name}": bpb.to_dict() for name, bpb in parts.items()}


def _routing(model: str, lm: LM, tokenizer: Tokenizer, options: EvalOptions) -> dict[str, Any]:
    """Measure expert specialisation on the validation split of the run."""
    config = _recipe(model)
    if config is None or options.data is not None:
        raise UserError("--tasks routing: measures the validation split of a run; name its folder")
    if not lm.routed_modules():
        raise UserError(f"{model}: has no experts, so --tasks routing has nothing to measure")
    validation = _validation(model, config, tokenizer)
    results = evaluate_routing(
        lm,
        validation,
        token_classes(tokenizer),
        max_samples=options.limit or validation.size,
        batch_size=BATCH_SIZE,
        device=lm.embed.weight.device,
        poll=lambda: None,
    )
    return {f"routing {name}": result.to_dict() for name, result in results.items()}


def _validation(model: str, config: RunConfig, tokenizer: Tokenizer) -> TokenizedDataset:
    """Open the validation split of the run. Raise UserError if its samples are not text."""
    data_format, train = config.objective.data_format, config.train
    if FORMATS[data_format].evaluation != "text":
        raise UserError(f"{model}: was trained on {data_format}; name a text with --data")
    prepared = prepare(config.data, tokenizer, data_format, runs_root() / ".data", _print_progress)
    return open_dataset(prepared.folder, data_format, "validation", train.seq_len, train.seed)


def _format(model: str, lm: LM, tokenizer: Tokenizer, options: EvalOptions) -> dict[str, Any]:
    """Evaluate the format of greedy completions of the run's validation prompts."""
    config = _recipe(model)
    if config is None:
        raise UserError(f"{model}: is not part of a run: no prompts for --tasks format")
    seq_len, seed = config.train.seq_len, config.train.seed
    data_root = runs_root() / ".data"
    prepared = prepare(
        config.data, tokenizer, "prompts", data_root, _print_progress, seq_len=seq_len
    )
    validation = open_dataset(prepared.folder, "prompts", "validation", seq_len, seed)
    indices = validation.evenly_spaced(options.limit or validation.size)
    prompts = [validation.get_prompts(int(i), 1)[0] for i in indices]
    return evaluate_format(lm, tokenizer, prompts, batch_size=BATCH_SIZE).to_dict()


def _arc(model: str, lm: LM, tokenizer: Tokenizer, options: EvalOptions) -> dict[str, Any]:
    """Evaluate ARC puzzles and draw some of them into the folder of the run or model."""
    groups = open_puzzles(
        model, _recipe(model), options.data, options.solutions, options.limit, _print_progress
    )
    results = {name: evaluate_arc(lm, tokenizer, puzzles) for name, puzzles in groups.items()}
    outcomes = [outcome for result in results.values() for outcome in result.outcomes]
    _print_progress(f" picture {save_puzzles(picture_folder(model), outcomes)}")
    return {f"arc_agi {name}": result.to_dict() for name, result in results.items()}


def _recipe(model: str) -> RunConfig | None:
    """Return the recipe of the run that `model` belongs to, or None."""
    run = run_folder_of(Path(model))
    recipe = run / "config.yaml"
    is_run = recipe.exists() and (run / "checkpoints").is_dir()
    return from_dict(read_yaml(recipe), str(recipe)) if is_run else None


def _format_numbers(result: dict[str, Any]) -> str:
    numbers = [(key, value) for key, value in result.items() if isinstance(value, int | float)]
    return "  ".join(f"{key} {value:.4g}" for key, value in numbers)


def _print_progress(line: str) -> None:
    print_line(line, err=True)
