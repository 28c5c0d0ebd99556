"""`tinsmith export` and `tinsmith import`: write and read Hugging Face folders."""

from pathlib import Path

from tinsmith.core.errors import UserError
from tinsmith.core.log import print_line
from tinsmith.core.units import format_count
from tinsmith.core.yamlfile import parse_yaml
from tinsmith.hub.hf import export_folder, open_tokenizer
from tinsmith.hub.load import load, load_adapters, load_tokenizer
from tinsmith.hub.peft.adapters import merge_adapters, read_adapters, write_adapters
from tinsmith.hub.vocabulary import save_tokenizer


def export(model: str, out: Path, to: str, adapter: Path | None) -> None:
    """Write a model as a Hugging Face folder with adapters merged, or write a run's adapters."""
    if to not in ("hf", "peft"):
        raise UserError(f"--to {to}: only hf and peft are known")
    if to == "hf":
        _write(model, out, None, adapter)
    elif adapter is not None:
        raise UserError("--adapter: merges adapters into a model; use it with --to hf")
    else:
        _write_adapters(model, out)


def import_(source: str, out: Path, rope_scaling: str | None) -> None:
    """Load a Hugging Face folder, checking every tensor, and write it as a new folder."""
    _write(source, out, parse_rope_scaling(rope_scaling), None)


def _write(
    model: str, out: Path, rope_scaling: dict[str, object] | None, adapter: Path | None
) -> None:
    check_output_free(out)
    lm, tokenizer = load(model, rope_scaling=rope_scaling)
    if adapter is not None:
        lm = merge_adapters(lm, read_adapters(adapter, lm.config))
        tokenizer = open_tokenizer(adapter) or tokenizer
    export_folder(lm, tokenizer, out)
    note = "" if tokenizer else ", without a tokenizer"
    print_line(f" written  {out} ({format_count(lm.parameter_count())} parameters{note})")


def _write_adapters(model: str, out: Path) -> None:
    check_output_free(out)
    config, adapter_weights, base = load_adapters(model)
    write_adapters(out, config, adapter_weights, base)
    if tokenizer := load_tokenizer(model):
        save_tokenizer(tokenizer, out, config)
    num_parameters = sum(t.numel() for pair in adapter_weights.pairs.values() for t in pair)
    num_parameters += sum(part.rows.numel() for part in adapter_weights.rows.values())
    print_line(
        f" written  {out} ({format_count(num_parameters)} parameters of adapters, "
        f"for {base or 'its base'})"
    )


def check_output_free(out: Path) -> None:
    """Raise UserError if the output folder is not empty."""
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} exists and is not empty; choose another folder")


def parse_rope_scaling(text: str | None) -> dict[str, object] | None:
    """Parse the YAML value of --rope-scaling."""
    if text is None:
        return None
    value = parse_yaml(text, "--rope-scaling")
    if not isinstance(value, dict):
        raise UserError(
            f"--rope-scaling '{text}': write it like "
            "'{kind: yarn, factor: 4, original_max_seq_len: 2048}'"
        )
    return value
