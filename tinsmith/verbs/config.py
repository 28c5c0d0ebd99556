"""`tinsmith config`: show, check and compare recipes."""

import json
from pathlib import Path
from typing import Any

from tinsmith.config import load
from tinsmith.config import schema as make_schema
from tinsmith.core.log import print_line
from tinsmith.core.parse import read_yaml, to_plain, write_yaml
from tinsmith.core.plugins import imported_files
from tinsmith.nn.config import with_preset
from tinsmith.text.tokenizer import Tokenizer
from tinsmith.train.dryrun import parameter_lines
from tinsmith.train.plan import RunPlan, resolve


def show(recipe: Path, overrides: list[str], more: list[Path], resolved: bool = False) -> None:
    """Print every key of the recipe with the origin of values that are not defaults, or the plan of
    its run if `resolved`.
    """
    config = load(recipe, overrides, more)
    if resolved:
        print_line(_plan(resolve(config)))
        return
    origins = _origins(recipe, overrides, more)
    for key, value in flat(to_plain(config)).items():
        origin = origins.get(key)
        line = f"{key}: {value!r}"
        print_line(f"{line:<60} # {origin}" if origin else line)


def _plan(plan: RunPlan) -> str:
    """Format a plan as a YAML recipe, with the facts that are no keys as comments above it."""
    train, mesh = plan.config.train, plan.mesh
    trained = "" if isinstance(plan.tokenizer, Tokenizer) else ", to be trained on the data"
    shape = plan.meta_policy()
    facts = [
        "The resolved recipe of a run: `tinsmith train` with this file gives the same run.",
        f"processes {mesh.world_size}, parallel: {mesh.kind}",
        f"batch     {train.batch_size // mesh.world_size} sequences per process and micro-batch, "
        f"{train.tokens_per_step:,} tokens per step",
        f"tokenizer {plan.tokenizer.vocab_size} ids{trained}",
        *parameter_lines(plan, shape),
    ]
    recipe = to_plain(plan.recipe())
    if files := imported_files():
        recipe = {"import": [str(path) for path in files]} | recipe
    return "\n".join(f"# {fact}" for fact in facts) + "\n" + write_yaml(recipe)


def check(recipe: Path, overrides: list[str], more: list[Path]) -> None:
    """Print `ok`, or raise UserError."""
    load(recipe, overrides, more)
    print_line("ok")


def schema() -> None:
    """Print the JSON schema of a recipe."""
    print_line(json.dumps(make_schema(), indent=1))


def diff(left: Path, right: Path) -> None:
    """Print the keys in which two recipes differ, as `key: left -> right`."""
    one, two = flat(to_plain(load(left))), flat(to_plain(load(right)))
    for key in sorted(one.keys() | two.keys()):
        if one.get(key) != two.get(key):
            print_line(f"{key}: {one.get(key)!r} -> {two.get(key)!r}")


def flat(data: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten a tree to `a.b.0.c` -> leaf."""
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
    found: dict[str, str] = {}
    for path in [recipe, *more]:
        data = read_yaml(path)
        model = data.get("model")
        if isinstance(model, dict) and "preset" in model:
            found |= {
                f"model.{key}": f"preset {model['preset']}"
                for key in flat(with_preset({"preset": model["preset"]}))
            }
        if isinstance(data.get("data"), dict):
            data = data | {"data": [data["data"]]}
        found |= {key: str(path) for key in flat(data)}
    single = isinstance(read_yaml(recipe).get("data"), dict)
    for override in overrides:
        key = override.partition("=")[0]
        found[key.replace("data.", "data.0.", 1) if single else key] = "command line"
    return found
