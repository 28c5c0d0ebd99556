"""`tinsmith transplant`: replace the feed-forwards of a dense model by experts."""

from pathlib import Path

from tinsmith.config import set_key
from tinsmith.core.errors import UserError
from tinsmith.core.log import print_line
from tinsmith.core.rng import seed_all
from tinsmith.hub.card import CardFacts, model_card
from tinsmith.hub.hf import ExportResult, export_folder
from tinsmith.hub.load import load, load_config
from tinsmith.hub.transplant import (
    ExpertInit,
    TransplantPlan,
    build_transplant,
    parameter_table,
    transplant_config,
)
from tinsmith.nn.config import ModelConfig
from tinsmith.nn.parameters import count_parameters
from tinsmith.verbs.export_import import check_output_free


def transplant(
    source: str,
    out: Path,
    keys: list[str],
    init: ExpertInit,
    train_norms: bool,
    seed: int,
    dry: bool,
) -> None:
    """Write the sparse model to `out` atomically. With `dry`, only count parameters."""
    plan = TransplantPlan(_parse_keys(keys), init, train_norms)
    check_output_free(out)
    dense = load_config(source)
    sparse = transplant_config(dense, plan)
    _print_table(dense, sparse)
    if dry:
        print_line(" dry run   ok; nothing was written")
        return
    teacher, tokenizer = load(source)
    seed_all(seed)
    student = build_transplant(teacher, plan)
    kinds = ", ".join(dict.fromkeys(layer.feed_forward.kind for layer in sparse.layers))

    def card(result: ExportResult) -> str:
        facts = CardFacts(name=out.name, tokenizer=tokenizer is not None, **result._asdict())
        facts["base"] = source
        exception = ", except for its norms" if train_norms else ""
        facts["architecture"] = (
            f"{kinds} ({init}) in the frozen attention, embedding and head of its base{exception}"
        )
        return model_card(facts)

    export_folder(student, tokenizer, out, card=card)
    note = "" if tokenizer else ", without a tokenizer"
    print_line(f" written   {out} ({count_parameters(student)}{note})")


def _parse_keys(keys: list[str]) -> dict:
    """Parse KEY=VALUE arguments into a feed-forward section."""
    section: dict = {}
    for key in keys:
        set_key(section, key)
    return section


def _print_table(dense: ModelConfig, sparse: ModelConfig) -> None:
    """Print the number of frozen and trained parameters of the sparse model."""
    lines = parameter_table(sparse)
    for line in lines:
        state = "trained" if line.trainable else "frozen"
        print_line(f" model     {line.name:<12} {line.num_parameters:>14,}  {state}")
    trained = sum(line.num_parameters for line in lines if line.trainable)
    total = sum(line.num_parameters for line in lines)
    dense_total = sum(line.num_parameters for line in parameter_table(dense))
    print_line(f" model     {'frozen':<12} {total - trained:>14,}")
    print_line(f" model     {'trained':<12} {trained:>14,}")
    print_line(f" model     {'all':<12} {total:>14,}  (the dense model: {dense_total:,})")


def check_init(init: str) -> ExpertInit:
    """Validate the value of --init."""
    if init not in ("random", "slice"):
        raise UserError(f"--init {init}: only random and slice are known")
    return "slice" if init == "slice" else "random"
