"""What a dry run estimates."""

import pytest
import torch

from tinsmith.config import from_dict
from tinsmith.nn.model import LM
from tinsmith.train.dryrun import memory

MODEL = {
    **{"vocab_size": 320, "dim": 64, "depth": 4},
    "pattern": [{"mixer": {"kind": "gqa"}, "feed_forward": {"kind": "relu2", "hidden": 256}}],
}


def estimated(residual, **train):
    sizes = {"context": 128, "rows": 8, "steps": 10} | train
    config = from_dict(
        {
            "model": MODEL | {"residual": residual},
            "data": {"kind": "stdlib"},
            "objective": {"kind": "pretrain"},
            "train": sizes,
        }
    )
    with torch.device("meta"):
        lm = LM(config.model)
    return memory(lm, config.model, config) - 16 * lm.parameter_count(), config


@pytest.mark.parametrize("kind", ["hyper", "mhyper"])
def test_several_streams_are_counted_in_memory(kind):
    """Each of 8 sub-layers keeps four streams and what was said, in float32."""
    plain, _ = estimated({"kind": "plain"})
    several, _ = estimated({"kind": kind, "streams": 4})
    assert several - plain == 8 * 128 * 8 * 4 * (4 * 64 + 64)


def test_what_optimizers_remember_is_that_of_trained_weights_alone():
    """Muon: 4 bytes a weight of a matrix, AdamW: 8, in 8 bits: 2; every weight and gradient: 4."""
    found = {}
    for trained in ("*", "blocks.*.feed"):
        for kind in ("muon", "adamw", "adamw8bit", "adafactor"):
            config = from_dict(
                {
                    "model": MODEL | {"trained": [trained]},
                    "data": {"kind": "stdlib"},
                    "objective": {"kind": "pretrain"},
                    "optim": {"matrices": {"kind": kind}},
                }
            )
            with torch.device("meta"):
                lm = LM(config.model)
            found[trained, kind] = memory(lm, config.model, config)
    feeds = 4 * 2 * 64 * 256
    attention, rest = 4 * 4 * 64 * 64, 320 * 64 + 9 * 64
    for (trained, kind), remembered in zip(found, [4, 8, 2, 0] * 2, strict=True):
        matrices = feeds + attention if trained == "*" else feeds
        others = rest if trained == "*" else 0
        expected = (4 + remembered) * matrices + 12 * others
        least = found["blocks.*.feed", "adafactor"] - 4 * feeds
        assert found[trained, kind] - least == expected


def test_checkpointed_blocks_keep_all_streams_at_their_border():
    plain, config = estimated({"kind": "plain"}, checkpointing=True)
    several, _ = estimated({"kind": "mhyper", "streams": 4}, checkpointing=True)
    wide = 4 if config.train.precision == "fp32" else 2
    tokens = 8 * 128
    borders = tokens * 2 * 4 * (4 - 1) * 64 * wide
    assert several - plain == pytest.approx(borders + tokens * 2 * 4 * (4 * 64 + 64))
