"""`tinsmith export` and `tinsmith import`."""

from pathlib import Path

import yaml

from tinsmith.core.errors import UserError
from tinsmith.core.log import say
from tinsmith.core.units import count
from tinsmith.hub.hf import export_folder
from tinsmith.hub.load import load


def export(model: str, out: Path, to: str) -> None:
    """Any model as a Hugging Face folder."""
    if to != "hf":
        raise UserError(f"--to {to}: only hf is known")
    _write(model, out, None)


def import_(source: str, out: Path, rope_scaling: str | None) -> None:
    """A Hugging Face folder, read strictly and written anew."""
    _write(source, out, scaling(rope_scaling))


def _write(model: str, out: Path, rope_scaling: dict[str, object] | None) -> None:
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} exists and is not empty; choose another folder")
    lm, tokenizer = load(model, rope_scaling=rope_scaling)
    export_folder(lm, tokenizer, out)
    said = "" if tokenizer else ", without a tokenizer"
    say(f" written  {out} ({count(lm.parameter_count())} parameters{said})")


def scaling(text: str | None) -> dict[str, object] | None:
    """The value of --rope-scaling, YAML."""
    if text is None:
        return None
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = None
    if not isinstance(value, dict):
        raise UserError(
            f"--rope-scaling '{text}': write it like '{{kind: yarn, factor: 4, original_context: "
            f"2048}}'"
        )
    return value
