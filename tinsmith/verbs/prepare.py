"""`tinsmith prepare`: convert raw files to token shards."""

from pathlib import Path

from tinsmith.config import load
from tinsmith.core.log import print_line
from tinsmith.core.signals import StopFlag
from tinsmith.data.prepare.prepare import prepare as prepare_data
from tinsmith.train.plan import resolve_tokenizer
from tinsmith.train.run_dir import runs_root


def prepare(recipe: Path, overrides: list[str], more: list[Path]) -> None:
    """Prepare the token shards that `tinsmith train` with the same arguments reads."""
    config = load(recipe, overrides, more)
    with StopFlag() as flag:
        root = runs_root() / ".data"
        prepared = prepare_data(
            config.data,
            resolve_tokenizer(config),
            config.objective.data_format,
            root,
            print_line,
            lambda: flag.stop,
            seq_len=config.train.seq_len,
        )
    print_line(f" prepared  {prepared.folder}")
