"""Arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer


def _import_variants(paths: list[Path] | None) -> list[Path] | None:
    from tinsmith.core.plugins import import_variants

    for path in paths or []:
        import_variants(path)
    return paths


ModelPath = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A run, a checkpoint, a Hugging Face folder or Hub id."),
]
Recipe = Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML recipe.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Override keys: train.steps=100."),
]
More = Annotated[
    list[Path] | None,
    typer.Option("-c", "--config", help="Another YAML file, merged over the recipe."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, mps.")]
Scaling = Annotated[
    str | None, typer.Option("--rope-scaling", help="YAML, e.g. '{kind: yarn, factor: 4, ...}'.")
]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
TopK = Annotated[int | None, typer.Option(help="Sample from the k most likely tokens only.")]
TopP = Annotated[
    float | None,
    typer.Option(
        help="Sample from the most likely tokens with this total probability (nucleus sampling)."
    ),
]
MinP = Annotated[
    float | None, typer.Option(help="Drop tokens below this fraction of the largest probability.")
]
RepetitionPenalty = Annotated[
    float, typer.Option(help="Above 1, tokens that occurred already become less likely.")
]
Seed = Annotated[int | None, typer.Option(help="Random seed. The same seed gives the same text.")]
MaxNew = Annotated[
    int, typer.Option("--max-new-tokens", help="Largest number of tokens to generate.")
]
Imports = Annotated[
    list[Path] | None,
    typer.Option(
        "--import",
        callback=_import_variants,
        help="A Python file with a mixer, feed-forward, residual, objective or reward of your own.",
    ),
]
Thinking = Annotated[bool, typer.Option("--thinking", help="Start every reply with <think>.")]
Tools = Annotated[
    list[str] | None,
    typer.Option("--tool", help="Tool that the model may call: calculator. Repeatable."),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Resume from the newest valid checkpoint of --name.")
]
ResumeFrom = Annotated[Path | None, typer.Option(help="Resume from this checkpoint.")]
AcceptChanges = Annotated[
    bool,
    typer.Option("--accept-changes", help="Resume although data or reference models have changed."),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Check the recipe, take one tiny step and write nothing.")
]
WindowLength = Annotated[
    int | None,
    typer.Option(help="Window length in tokens on --data (default: train.seq_len of the run)."),
]
Limit = Annotated[
    int | None, typer.Option(help="Largest number of rows, questions or puzzles per task.")
]
