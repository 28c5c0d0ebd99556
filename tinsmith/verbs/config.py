"""`tinsmith config`: show, check and compare recipes."""

import json
from pathlib import Path
from typing import Any

from tinsmith.config import load
from tinsmith.config import schema as recipe_schema
from tinsmith.core.log import print_line
from tinsmith.core.parse import to_plain
from tinsmith.core.plugins import imported_files
from tinsmith.core.yamlfile import read_yaml, write_yaml
from tinsmith.nn.config import with_preset
from tinsmith.text.tokenizer import Tokenizer
from tinsmith.train.dryrun import parameter_lines
from tinsmith.train.plan import RunPlan, resolve


def show(recipe: Path, overrides: list[str], more: list[Path], resolved: bool = False) -> None:
    """Print every key of the recipe with the origin of values that are not defaults. With
    `resolved`, print the plan of its run.
    """
    config = load(recipe, overrides, more)
    if resolved:
        print_line(_format_plan(resolve(config)))
        return
    origins = _origins(recipe, overrides, more)
    for key, value in flat(to_plain(config)).items():
        origin = origins.get(key)
        line = f"{key}: {value!r}"
        print_line(f"{line:<60} # {origin}" if origin else line)


def _format_plan(plan: RunPlan) -> str:
    """Format a plan as a YAML recipe, with comments on the processes, the batch, the tokenizer and
    the number of parameters.
    """
    train, mesh = plan.config.train, plan.mesh
    note = "" if isinstance(plan.tokenizer, Tokenizer) else ", to be trained on the data"
    comments = [
        "The resolved recipe of a run: `tinsmith train` with this file gives the same run.",
        f"processes {mesh.world_size}, parallel: {mesh.kind}",
        f"batch     {train.batch_size // mesh.world_size} sequences per process and micro-batch, "
        f"{train.tokens_per_step:,} tokens per step",
        f"tokenizer {plan.tokenizer.vocab_size} ids{note}",
        *parameter_lines(plan, plan.meta_policy()),
    ]
    recipe = to_plain(plan.recipe())
    if files := imported_files():
        recipe = {"import": [str(path) for path in files]} | recipe
    return "\n".join(f"# {comment}" for comment in comments) + "\n" + write_yaml(recipe)


def check(recipe: Path, overrides: list[str], more: list[Path]) -> None:
    """Print `ok` if a recipe is valid, or raise UserError."""
    load(recipe, overrides, more)
    print_line("ok")


def schema() -> None:
    """Print the JSON schema of a recipe."""
    print_line(json.dumps(recipe_schema(), indent=1))


def diff(left: Path, right: Path) -> None:
    """Print the keys in which two recipes differ, as `key: left -> right`."""
    left_values, right_values = flat(to_plain(load(left))), flat(to_plain(load(right)))
    for key in sorted(left_values.keys() | right_values.keys()):
        if left_values.get(key) != right_values.get(key):
            print_line(f"{key}: {left_values.get(key)!r} -> {right_values.get(key)!r}")


def flat(data: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten nested dictionaries and lists into one dictionary with keys such as `a.b.0.c`."""
    items = (
        data.items()
        if isinstance(data, dict)
        else enumerate(data)
        if isinstance(data, list)
        else None
    )
    if items is None or not data:
        return {prefix: data}
    leaves: dict[str, Any] = {}
    for key, value in items:
        leaves |= flat(value, f"{prefix}.{key}" if prefix else str(key))
    return leaves


def _origins(recipe: Path, overrides: list[str], more: list[Path]) -> dict[str, str]:
    """Return the origin of every key that is not a default: a file, a preset, or the command
    line.
    """
    origins: dict[str, str] = {}
    for path in [recipe, *more]:
        data = read_yaml(path)
        model = data.get("model")
        if isinstance(model, dict) and "preset" in model:
            origins |= {
                f"model.{key}": f"preset {model['preset']}"
                for key in flat(with_preset({"preset": model["preset"]}))
            }
        if isinstance(data.get("data"), dict):
            data = data | {"data": [data["data"]]}
        origins |= {key: str(path) for key in flat(data)}
    has_one_source = isinstance(read_yaml(recipe).get("data"), dict)
    for override in overrides:
        key = override.partition("=")[0]
        origins[key.replace("data.", "data.0.", 1) if has_one_source else key] = "command line"
    return origins
