"""`tinsmith prepare`: raw files to shards."""

from pathlib import Path

from tinsmith.config import load
from tinsmith.core.log import say
from tinsmith.core.signals import StopFlag
from tinsmith.data.prepare import prepare as make
from tinsmith.hub.load import load as load_model
from tinsmith.train.folder import runs_root
from tinsmith.train.start import tokenizer_for


def prepare(recipe: Path, overrides: list[str], more: list[Path]) -> None:
    """Make, or find, the shards that `tinsmith train` with the same arguments will read."""
    config = load(recipe, overrides, more)
    with StopFlag() as flag:
        root = runs_root() / ".data"
        given = load_model(config.init_from)[1] if config.init_from else None
        made = make(
            config.data,
            tokenizer_for(config, given),
            config.objective.shape,
            root,
            say,
            lambda: flag.stop,
            context=config.train.context,
        )
    say(f" prepared  {made.folder}")
