"""NaN and infinity are refused for every number of a recipe."""

from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, get_args, get_type_hints

import pytest

from tinsmith.config import RunConfig
from tinsmith.core.errors import UserError
from tinsmith.core.parse import parse
from tinsmith.nn.mixers.dynlora import DynLoRA

LAYER = {"mixer": {"kind": "gqa"}, "feed_forward": {"kind": "relu2", "hidden_dim": 8}}
REQUIRED = {
    **{"vocab_size": 48, "dim": 64, "depth": 1, "pattern": [LAYER], "base": {"kind": "gqa"}},
    **{"hidden_dim": 8, "experts": 4, "factor": 2.0, "original_max_seq_len": 64},
    **{"path": "x", "teacher": "x", "name": "x"},
}
"""Values of the keys that have no default."""


def configs(kind: Any) -> Iterator[type]:
    """Yield every config dataclass inside a type."""
    if is_dataclass(kind):
        yield kind  # type: ignore[misc]
        for hint in get_type_hints(kind).values():
            yield from configs(hint)
    for inner in get_args(kind):
        yield from configs(inner)


def numbers() -> list[Any]:
    """Return (class, key) of all numbers of a recipe."""
    kinds = dict.fromkeys(configs(RunConfig))
    cases = [
        (kind, key)
        for kind in kinds
        for key, hint in get_type_hints(kind).items()
        if float in (hint, *get_args(hint))
        and key in {field.name for field in fields(kind)}
        and str not in get_args(hint)  # a string may be a file name
    ]
    return [pytest.param(*each, id=f"{each[0].__name__}-{each[1]}") for each in cases]


def smallest(kind: Any) -> dict[str, Any]:
    """Return the smallest section from which `kind` can be parsed."""
    required = [field.name for field in fields(kind) if field.default is MISSING]
    return {name: REQUIRED[name] for name in required if name in REQUIRED}


def test_the_search_finds_numbers_in_all_sections():
    found = {case.id for case in numbers()}
    assert found >= {
        *("DynMoE-sdl_weight", "DynHeads-sdl_weight", "DynLoRA-alpha", "DynMoE-router_weight"),
        *("DeepSeekMoE-noise", "TopKMoE-z_weight", "MHyper-sinkhorn_temperature", "LoRA-alpha"),
        *(
            "Dropout-attention",
            "ModelConfig-norm_eps",
            "Rope-theta",
            "YarnScaling-attention_factor",
        ),
        *("DPO-beta", "DPO-gamma", "GRPO-truncation_penalty", "PPO-target_kl", "TagWeights-think"),
        *("MuonConfig-lr", "AdamWConfig-weight_decay", "OptimConfig-max_grad_norm"),
    }


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "-inf", "nan"])
@pytest.mark.parametrize(("kind", "key"), numbers())
def test_nan_and_infinity_are_refused_in_one_line(kind, key, value):
    parse(kind, smallest(kind), "here")
    with pytest.raises(UserError) as error:
        parse(kind, smallest(kind) | {key: value}, "here")
    line = str(error.value)
    assert line.startswith("here")
    assert key in line
    assert "\n" not in line


@pytest.mark.parametrize("alpha", [0, -1.0])
def test_a_lora_alpha_that_is_not_positive_is_refused(alpha):
    with pytest.raises(UserError, match=r"alpha=.* must be above 0"):
        parse(DynLoRA, smallest(DynLoRA) | {"alpha": alpha}, "mixer")
