"""What every config of an objective refuses alike."""

import math
from dataclasses import fields
from typing import Annotated, Any, get_args, get_type_hints

import pytest

from tinsmith.core.errors import UserError
from tinsmith.core.parse import parse
from tinsmith.nn.lora import LoRA
from tinsmith.objectives import ObjectiveConfig
from tinsmith.objectives.on_policy_kd import Ramp
from tinsmith.objectives.rules import RewardConfig
from tinsmith.objectives.tags import TagWeights

REQUIRED: dict[str, dict[str, Any]] = {
    "KD": {"teacher": "x", "loss": "jsd"},
    "OnPolicyKD": {"teacher": "x"},
    "Classified": {"path": "x"},
    "Learned": {"path": "x"},
}
UNIONS = (ObjectiveConfig, RewardConfig)
MEMBERS = [member for union in UNIONS for member in get_args(get_args(union)[0])]
FLOATS = [
    pytest.param(kind, field.name, id=f"{kind.__name__}.{field.name}")
    for kind in (*MEMBERS, LoRA, Ramp, TagWeights)
    for field in fields(kind)
    if float in (hint := get_type_hints(kind)[field.name], *get_args(hint))
]


def test_floats_of_all_configs_were_found():
    said = {param.id for param in FLOATS}
    assert {"DPO.beta", "DPO.gamma", "GRPO.penalty", "PPO.max_moved", "LoRA.alpha"} <= said
    assert get_args(ObjectiveConfig)[0] is not Annotated


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize(("kind", "name"), FLOATS)
def test_what_is_no_finite_number_is_refused_in_one_line(kind, name, value):
    given = REQUIRED.get(kind.__name__, {}) | {name: value}
    given |= {"loss": "simpo"} if (kind.__name__, name) == ("DPO", "gamma") else {}
    with pytest.raises(UserError, match=name) as refused:
        parse(kind, given)
    assert "\n" not in str(refused.value)
    with pytest.raises(ValueError, match=name):
        kind(**given)
