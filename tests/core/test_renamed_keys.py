"""A renamed recipe key gives one line with its new name."""

import dataclasses
from typing import Any, get_args, get_origin, get_type_hints

import pytest

from tinsmith.config import RunConfig, from_dict
from tinsmith.core.errors import UserError
from tinsmith.core.renamed_keys import KEYS, VALUES

MOE = {"kind": "deepseek_moe", "hidden_dim": 8, "experts": 4, "top_k": 1}
TINY = {
    "model": {
        **{"vocab_size": 300, "dim": 16, "depth": 1, "max_seq_len": 16},
        "pattern": [
            {
                "mixer": {"kind": "gqa", "heads": 2},
                "feed_forward": {"kind": "swiglu", "hidden_dim": 8},
            }
        ],
    },
    "data": {"kind": "stdlib"},
    "objective": {"kind": "pretrain"},
}


def changed(path: str, value: Any) -> dict[str, Any]:
    """Return the tiny recipe with the key at a dotted path set."""

    def put(tree: Any, keys: list[str]) -> Any:
        key = keys[0]
        if isinstance(tree, list):
            return [put(tree[0], keys[1:])]
        inner = value if len(keys) == 1 else put(tree.get(key, {}), keys[1:])
        return tree | {key: inner}

    return put(TINY, path.split("."))


def recipe_of(objective: dict[str, Any]) -> dict[str, Any]:
    return TINY | {"objective": objective}


CASES = [
    ("train.rows", changed("train.rows", 4), "batch_size"),
    ("train.accumulate", changed("train.accumulate", 4), "grad_accum_steps"),
    ("train.context", changed("train.context", 4), "seq_len"),
    ("train.bad_steps", changed("train.bad_steps", 4), "max_nonfinite_steps"),
    ("train.checkpointing", changed("train.checkpointing", True), "activation_checkpointing"),
    ("train.keep.below", changed("train.keep.below", 1.0), "max_val_loss"),
    ("eval.rows", changed("eval.rows", 4), "max_samples"),
    ("eval.new_tokens", changed("eval.new_tokens", 4), "max_new_tokens"),
    ("parallel.kind", changed("parallel.kind", "replicate"), "ddp"),
    ("optim.clip", changed("optim.clip", 1.0), "max_grad_norm"),
    (
        "optim.schedule.final",
        changed("optim.schedule", {"kind": "wsd", "final": 0.1}),
        "min_lr_ratio",
    ),
    ("model.max_context", changed("model.max_context", 4), "max_seq_len"),
    ("model.trained", changed("model.trained", ["embed"]), "trainable"),
    *(
        (
            f"model.pattern.0.feed_forward.{old}",
            changed("model.pattern.0.feed_forward", MOE | {old: 1}),
            new,
        )
        for old, new in {
            "hidden": "hidden_dim",
            "renormalise": "norm_topk_prob",
            "bias_rate": "bias_update_speed",
            "shared": "n_shared_experts",
            "groups": "n_group",
            "kept_groups": "topk_group",
            "scale": "routed_scaling_factor",
        }.items()
    ),
    (
        "model.pattern.0.mixer.keep",
        changed("model.pattern.0.mixer", {"kind": "dsa", "keep": 4}),
        "index_topk",
    ),
    *(
        (f"objective.{old}", recipe_of({"kind": kind, old: 1}), new)
        for kind, old, new in [
            ("grpo", "answers", "num_generations"),
            ("grpo", "max_new", "max_new_tokens"),
            ("grpo", "decode_rows", "generation_batch_size"),
            ("ppo", "updates", "num_epochs"),
            ("ppo", "minibatches", "num_minibatches"),
            ("ppo", "beta", "kl_coef"),
            ("grpo", "truncated", "mask_truncated"),
            ("grpo", "penalty", "truncation_penalty"),
            ("grpo", "turns", "max_turns"),
            ("ppo", "max_moved", "target_kl"),
            ("spo", "first_answers", "warmup_samples"),
            ("spo", "lowest", "reward_min"),
            ("spo", "highest", "reward_max"),
            ("spo", "half", "kl_half_life"),
        ]
    ),
    *(
        (f"objective.{old}", recipe_of({"kind": "on_policy_kd", "teacher": "x", old: 1}), new)
        for old, new in {
            "sampling": "sampling_temperature",
            "temperature": "distill_temperature",
            "hint": "privileged_prompt",
            "share": "on_policy_fraction",
        }.items()
    ),
    ("objective.hard", recipe_of({"kind": "kd", "teacher": "x", "hard": 0.5}), "ce_weight"),
    ("data.mistakes", TINY | {"data": {"kind": "tasks", "mistakes": 0.5}}, "error_rate"),
    *(
        (
            "objective.rewards.0.kind",
            recipe_of({"kind": "grpo", "rewards": [{"kind": old}]}),
            new,
        )
        for old, new in VALUES.items()
        if old != "replicate"
    ),
]


def test_the_tiny_recipe_is_valid():
    assert from_dict(TINY).objective.kind == "pretrain"


@pytest.mark.parametrize(
    ("path", "recipe", "new"), CASES, ids=[f"{path}-{new}" for path, _, new in CASES]
)
def test_a_renamed_key_gives_an_error_with_its_new_name(path, recipe, new):
    with pytest.raises(UserError) as error:
        from_dict(recipe, "my.yaml")
    line = str(error.value)
    assert line.startswith(f"my.yaml: {path}: `"), line
    assert line.endswith(f"` is now `{new}`"), line
    assert "\n" not in line


def dataclasses_of(kind: Any, seen: set[Any]) -> set[Any]:
    """Return all config dataclasses inside a type, added to `seen`."""
    if dataclasses.is_dataclass(kind) and kind not in seen:
        seen.add(kind)
        for hint in get_type_hints(kind, include_extras=True).values():
            dataclasses_of(hint, seen)
    elif get_origin(kind) is not None:
        for argument in get_args(kind):
            dataclasses_of(argument, seen)
    return seen


def test_every_new_name_is_a_key_of_some_section():
    kinds = dataclasses_of(RunConfig, set())
    fields = [{field.name for field in dataclasses.fields(kind)} for kind in kinds]
    for old, news in KEYS.items():
        assert old not in news
        for new in news:
            assert any(new in names for names in fields), new
