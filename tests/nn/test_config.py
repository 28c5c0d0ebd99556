"""`model:` sections: what is parsed, what is refused, and the messages."""

import json
import re
import subprocess
import sys
from dataclasses import fields

import pytest

from tinsmith.core.errors import UserError
from tinsmith.nn.config import presets
from tinsmith.nn.mixers import DSA, GQA, MLA, NSA, Hybrid
from tinsmith.nn.model import ModelConfig


def test_a_section_round_trips(section):
    config = ModelConfig.from_dict(
        section(
            {"window": 5, "sinks": True, "bias": "qkv"},
            rope={
                "theta": 1e6,
                "scaling": {"kind": "yarn", "factor": 4, "original_max_seq_len": 64},
            },
            dropout={"attention": 0.1},
            last=[{"mixer": {"kind": "gqa"}, "feed_forward": {"kind": "relu2", "hidden_dim": 8}}],
        )
    )
    assert ModelConfig.from_dict(config.to_dict()) == config
    assert hash(config) == hash(ModelConfig.from_dict(config.to_dict()))


def test_presets_exist_and_can_be_overridden():
    minimind = ["104m", "145m-moe", "26m"], ["198m-moe", "64m"]
    assert presets() == [
        *(f"minimind2-{size}" for size in minimind[0]),
        *(f"minimind3-{size}" for size in minimind[1]),
        *("tiny-onn-0.6b", "tiny-r2", "tiny-r2-dense"),
    ]
    config = ModelConfig.from_dict({"preset": "minimind3-64m", "depth": 2, "max_seq_len": 64})
    base = ModelConfig.preset("minimind3-64m")
    assert (config.depth, config.max_seq_len, config.dim) == (2, 64, 768)
    assert config.pattern == base.pattern
    assert base.pattern[0].mixer.qk_norm


def test_the_defaults_are_the_documented_ones(section):
    config = ModelConfig.from_dict(
        {
            "vocab_size": 48,
            "dim": 64,
            "depth": 1,
            "pattern": [
                {"mixer": {"kind": "gqa"}, "feed_forward": {"kind": "swiglu", "hidden_dim": 8}}
            ],
        }
    )
    plain = config.to_dict()
    assert plain["pattern"][0]["mixer"] == {
        "kind": "gqa",
        "heads": 8,
        "kv_heads": None,
        "head_dim": None,
        "qk_norm": False,
        "window": None,
        "sinks": False,
        "value_residual": False,
        "bias": "none",
        "rope": True,
    }
    assert plain["pattern"][0]["feed_forward"]["bias"] is False
    assert (plain["positions"], plain["norm"], plain["attention"]) == ("rope", "rms", "sdpa")
    assert plain["dropout"] == {"embedding": 0, "attention": 0, "residual": 0}
    assert (plain["first"], plain["last"], plain["residual"]) == ([], [], {"kind": "plain"})


LAYER = {"mixer": {"kind": "gqa"}, "feed_forward": {"kind": "relu2", "hidden_dim": 8}}
SPARSE = [
    ({"kind": "nsa", "compress_stride": 12}, "compress_block=32 must be a multiple of .*stride=12"),
    ({"kind": "nsa", "select_block": 40}, "select_block=40 must be a multiple of .*stride=16"),
    ({"kind": "nsa", "compress_block": 128}, "compress_block=128 must be at most select_block=64"),
    ({"kind": "nsa", "compress_stride": 0}, "compress_stride=0 must be at least 1"),
    ({"kind": "nsa", "window": 0}, "window=0 must be at least 1"),
    ({"kind": "nsa", "select_count": 0}, "select_count=0 must be at least 1"),
    ({"kind": "nsa", "heads": 6}, "dim=32 must be a multiple of heads=6"),
    ({"kind": "mla", "kv_rank": 0}, "kv_rank=0 must be at least 1"),
    ({"kind": "mla", "rope_dim": 7}, "rope_dim=7 must be even"),
    ({"kind": "mla", "window": 8}, "window: unknown key"),
    ({"kind": "dsa", "index_topk": 0}, "index_topk=0 must be at least 1"),
    ({"kind": "dsa", "index_dim": 24}, "index_dim=24 must be even and divide rope_dim=64"),
    ({"kind": "hybrid", "index_topk": 0}, "index_topk=0 must be at least 1"),
    ({"kind": "hybrid", "window": 0}, "window=0 must be at least 1"),
    ({"kind": "hybrid", "compress_block": 0}, "compress_block=0 must be at least 1"),
    ({"kind": "hybrid", "v_dim": 0}, "v_dim=0 must be at least 1"),
    ({"kind": "hybrid", "mode": "csa"}, "mode: .*'nsa', 'swa' or 'dsa'"),
    ({"kind": "hybrid", "mode": "nsa", "branches": ["window"]}, "mode=nsa or branches, not both"),
]
"""Mixers with invalid sizes, and the messages."""
HYBRID, WINDOWED = {"kind": "hybrid", "branches": "compress"}, {"kind": "dsa", "window": 4}
WRONG = [
    ({"mixer": {"heads": 5, "kv_heads": None}}, r"dim=32 must be a multiple of heads=5"),
    ({"mixer": {"kv_heads": 3}}, r"pattern\.0\.mixer: heads=4 must be a multiple of kv_heads=3"),
    ({"mixer": {"head_dim": 7}}, r"head_dim=7 must be even"),
    ({"mixer": {"window": 0}}, r"pattern\.0\.mixer: window=0 must be at least 1"),
    ({"mixer": {"heads": -4}}, r"pattern\.0\.mixer: heads=-4 must be at least 1"),
    ({"mixer": {"heads": "many"}}, r"pattern\.0\.mixer\.heads: .*integer.* \(got 'many'\)"),
    ({"mixer": {"bias": "most"}}, r"pattern\.0\.mixer\.bias: .*'none', 'qkv' or 'all'"),
    ({"mixer": {"headz": 4}}, r"pattern\.0\.mixer\.headz: unknown key\. Did you mean 'heads'\?"),
    ({"mixer": {"kind": "gqaa"}}, r"pattern\.0\.mixer\.kind: .*'gqa'"),
    ({"dim": 0}, r"dim=0 must be at least 1"),
    ({"dim": "wide"}, r"model: dim: "),
    ({"depth": 0}, r"depth=0 must be at least 1"),
    ({"vocab_size": None}, r"model: vocab_size: "),
    ({"pattern": []}, r"pattern must hold at least one layer"),
    ({"first": [LAYER], "last": [LAYER] * 3}, r"depth=3 is less than the 4 layers"),
    ({"last": [LAYER | {"mixer": {"kind": "gqa", "heads": 3}}]}, r"multiple of heads=3"),
    (
        {"last": [LAYER | {"feed_forward": {"hidden_dim": 8}}]},
        r"last\.0\.feed_forward: needs a `kind`",
    ),
    (
        {"last": [LAYER | {"feed_forward": {"kind": "moe"}}]},
        r"feed_forward\.kind: 'moe' is not one of swiglu, relu2",
    ),
    (
        {"last": [LAYER | {"feed_forward": {"kind": "relu2"}}]},
        r"feed_forward\.hidden_dim: required",
    ),
    (
        {"last": [LAYER | {"feed_forward": {"kind": "relu2", "hidden_dim": 0}}]},
        r"feed_forward: hidden_dim=0 must be at least 1",
    ),
    ({"dropout": {"attention": 1.0}}, r"dropout: attention=1\.0 must be .* below 1"),
    ({"dropout": {"residual": -0.1}}, r"dropout: residual=-0\.1 must be at least 0"),
    ({"positions": "rotary"}, r"positions: .*'rope', 'learned', 'sinusoidal' or 'none'"),
    ({"positions": "sinusoidal", "dim": 36, "vocab_size": 0}, r"vocab_size=0 must be"),
    ({"norm": "batch"}, r"norm: .*'rms' or 'layer'"),
    ({"norm_eps": 0}, r"norm_eps=0\.0 must be above 0"),
    ({"attention": "flash"}, r"attention: .*'sdpa' or 'naive'"),
    ({"rope": {"theta": 0}}, r"rope: theta=0\.0 must be above 1"),
    ({"rope": {"scaling": {"kind": "yarn", "factor": 2}}}, r"original_max_seq_len: required"),
    (
        {"rope": {"scaling": {"kind": "yarn", "factor": 0.5, "original_max_seq_len": 9}}},
        r"rope\.scaling: factor=0\.5 must be at least 1",
    ),
    (
        {"rope": {"scaling": {"kind": "llama3", "factor": 2, "original_max_seq_len": 0}}},
        r"rope\.scaling: original_max_seq_len=0 must be at least 1",
    ),
    ({"rope": {"scaling": {"kind": "linear", "factor": 0}}}, r"factor=0\.0 must be at least 1"),
    (
        {
            "mixer": {"value_residual": True},
            "last": [LAYER | {"mixer": {"kind": "gqa", "heads": 8, "value_residual": True}}],
        },
        r"value_residual needs one \(kv_heads, head_dim\)",
    ),
    *(({"last": [LAYER | {"mixer": mixer}]}, rf"^model: .*{output}") for mixer, output in SPARSE),
    ({"residual": {"kind": "hyper", "streams": 1}}, r"residual: streams=1 must be at least 2"),
    ({"residual": {"kind": "mhyper", "streams": 0}}, r"residual: streams=0 must be at least 2"),
    ({"residual": {"kind": "hyper", "fracs": 5}}, r"dim=32 must be a multiple of fracs=5"),
    ({"tie_embeddings": "perhaps"}, r"tie_embeddings: "),
    ({"residual": "hyper"}, r"residual: write \{kind: hyper\}"),
    ({"pattern": "gqa"}, r"pattern: must be a list, \[\.\.\.\] \(got 'gqa'\)"),
    ({"pattern": [LAYER | {"mixer": HYBRID}]}, r"mixer\.branches: must be a list"),
    (
        {"pattern": [LAYER | {"mixer": WINDOWED}]},
        r"mixer\.window: unknown key \(known: kind, heads",
    ),
    ({"max_seq_ln": 9}, r"max_seq_ln: unknown key\. Did you mean 'max_seq_len'\?"),
]


@pytest.mark.parametrize(
    ("change", "expected"), WRONG, ids=lambda x: str(x) if type(x) is str else ""
)
def test_an_invalid_section_is_refused_in_one_line(section, change, expected):
    change = dict(change)
    data = section(change.pop("mixer", None), **change)
    with pytest.raises(UserError) as error:
        ModelConfig.from_dict(data)
    line = str(error.value)
    assert line.startswith("model: ")
    assert re.search(expected, line), line
    assert "\n" not in line


def test_the_kind_of_a_part_is_printed_first_then_what_kinds_share():
    names = {kind.kind: [f.name for f in fields(kind)] for kind in (GQA, NSA, MLA, DSA, Hybrid)}
    assert {keys[0] for keys in names.values()} == {"kind"}
    sizes = ["heads", "kv_rank", "q_rank", "nope_dim", "rope_dim", "v_dim"]
    assert all(names[kind][1:7] == sizes for kind in ("mla", "dsa", "hybrid"))
    index = ["index_topk", "index_heads", "index_dim", "index_weight", "index_target"]
    assert all(names[kind][7:12] == index for kind in ("dsa", "hybrid"))


def test_sections_of_the_wrong_type_are_refused():
    for data in (None, [], "minimind2-26m", 7):
        with pytest.raises(UserError, match="model: "):
            ModelConfig.from_dict(data)
    with pytest.raises(
        UserError, match=r"'minimind2-25m' is not one of .* Did you mean 'minimind2-26m'"
    ):
        ModelConfig.preset("minimind2-25m")


def test_importing_the_model_loads_torch_and_core_only():
    code = (
        "import json, sys, tinsmith.nn.model\n"
        "heavy = {'pydantic', 'yaml', 'transformers', 'tokenizers', 'datasets', 'matplotlib'}\n"
        "print(json.dumps(sorted(heavy & set(sys.modules))))\n"
        "print(json.dumps([m for m in sys.modules if m.startswith('tinsmith.')]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy, own = map(json.loads, done.stdout.splitlines())
    assert heavy == []
    assert {name.split(".")[1] for name in own} == {"core", "distributed", "nn"}


def test_a_model_can_be_built_without_the_border():
    code = (
        "import sys\n"
        "from tinsmith.nn.config import Layer, ModelConfig\n"
        "from tinsmith.nn.feedforwards import ReLU2\n"
        "from tinsmith.nn.mixers.gqa import GQA\n"
        "from tinsmith.nn.model import LM\n"
        "layer = Layer(mixer=GQA(heads=2), feed_forward=ReLU2(hidden_dim=8))\n"
        "LM(ModelConfig(vocab_size=9, dim=8, depth=1, pattern=(layer,)))\n"
        "print('pydantic' in sys.modules, 'yaml' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
