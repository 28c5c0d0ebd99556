"""`tinsmith config`: the commands about recipes."""

from typing import Annotated

import typer

from tinsmith.cli.options import Imports, More, Overrides, Recipe

config_app = typer.Typer(
    no_args_is_help=True, help="Show, check and compare recipes.", rich_markup_mode=None
)


@config_app.command()
def show(
    recipe: Recipe,
    overrides: Overrides = None,
    more: More = None,
    resolved: Annotated[
        bool,
        typer.Option(
            "--resolved", help="Print the plan of the run as a recipe: model, tokenizer, device."
        ),
    ] = False,
    imports: Imports = None,
) -> None:
    """Print every key of a recipe, with the origin of values that are not defaults.

    \b
    tinsmith config show recipes/tiny/pretrain.yaml train.steps=10
    tinsmith config show recipes/tiny/lora.yaml --resolved > full.yaml
    """
    from tinsmith.verbs.config import show as run

    run(recipe, overrides or [], more or [], resolved)


@config_app.command()
def check(
    recipe: Recipe, overrides: Overrides = None, more: More = None, imports: Imports = None
) -> None:
    """Validate a recipe and print `ok`.

    \b
    tinsmith config check my.yaml
    tinsmith config check my.yaml optim.max_grad_norm=0.5
    """
    from tinsmith.verbs.config import check as run

    run(recipe, overrides or [], more or [])


@config_app.command()
def schema() -> None:
    """Print the JSON schema of a recipe with all keys.

    \b
    tinsmith config schema > recipe.schema.json
    tinsmith config schema | less
    """
    from tinsmith.verbs.config import schema as run

    run()


@config_app.command()
def diff(left: Recipe, right: Recipe) -> None:
    """Print the keys in which two recipes differ, defaults included.

    \b
    tinsmith config diff a.yaml b.yaml
    tinsmith config diff runs/a/config.yaml runs/b/config.yaml
    """
    from tinsmith.verbs.config import diff as run

    run(left, right)
