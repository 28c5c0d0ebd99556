"""`tinsmith prepare`: convert raw files to token shards."""

from pathlib import Path

from tinsmith.config import load
from tinsmith.core.log import print_line
from tinsmith.core.signals import StopFlag
from tinsmith.data.prepare.prepare import prepare as make
from tinsmith.hub.load import load as load_model
from tinsmith.train.run_dir import runs_root
from tinsmith.train.setup import resolve_tokenizer


def prepare(recipe: Path, overrides: list[str], more: list[Path]) -> None:
    """Make, or find, the token shards that `tinsmith train` with the same arguments reads."""
    config = load(recipe, overrides, more)
    with StopFlag() as flag:
        root = runs_root() / ".data"
        given = load_model(config.init_from)[1] if config.init_from else None
        made = make(
            config.data,
            resolve_tokenizer(config, given),
            config.objective.data_format,
            root,
            print_line,
            lambda: flag.stop,
            seq_len=config.train.seq_len,
        )
    print_line(f" prepared  {made.folder}")
