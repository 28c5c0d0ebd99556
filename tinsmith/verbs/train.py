"""`tinsmith train`: run a recipe."""

from pathlib import Path

from tinsmith.config import load
from tinsmith.core.errors import UserError
from tinsmith.train.dryrun import dry_run
from tinsmith.train.trainer import train as run_recipe


def train(
    recipe: Path,
    overrides: list[str],
    more: list[Path],
    name: str | None,
    resume: bool,
    resume_from: Path | None,
    accept_changes: bool,
    dry: bool,
) -> None:
    """Validate the recipe and train. With `dry`, only do a dry run."""
    config = load(recipe, overrides, more)
    if dry:
        dry_run(config, name or recipe.stem)
        return
    if (resume or resume_from) and name is None:
        raise UserError("--resume: name the run to resume with --name")
    if resume_from is not None and not (resume_from / "manifest.json").exists():
        raise UserError(
            f"--resume-from {resume_from}: no checkpoint there (a folder step-... with a "
            "manifest.json)"
        )
    run_recipe(
        config,
        name,
        resume=resume,
        resume_from=resume_from,
        accept_changes=accept_changes,
        recipe=recipe.stem,
    )
