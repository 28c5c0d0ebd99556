"""E1: old log-probabilities are those of training, whatever the engine that samples rounds to."""

import pytest
import torch

from tests.contracts.samples import SAMPLES
from tests.objectives.conftest import Prompts
from tinsmith.losses.policy import GRPOLoss
from tinsmith.nn.feedforwards import FeedForwardConfig
from tinsmith.nn.mixers import MixerConfig
from tinsmith.objectives.frozen import deterministic_config
from tinsmith.objectives.grpo import GRPO
from tinsmith.objectives.ppo import PPO
from tinsmith.objectives.spo import SPO

SWIGLU = {"kind": "swiglu", "hidden_dim": 48}
GQA = {"kind": "gqa", "heads": 4, "kv_heads": 2}
SMALL = {"max_new_tokens": 12, "generation_batch_size": 8, "num_minibatches": 2}


def kinds(union):
    """Return the kinds of a union of configs."""
    return {member.kind for member in union.__origin__.__args__}


def layers():
    """Yield (name, layer) with the first sample of every mixer and of every feed-forward."""
    for kind in sorted(kinds(MixerConfig)):
        yield kind, {"mixer": {"kind": kind} | SAMPLES[kind][0], "feed_forward": SWIGLU}
    for kind in sorted(kinds(FeedForwardConfig)):
        sample = {"hidden_dim": 48} | SAMPLES[kind][0]
        yield kind, {"mixer": GQA, "feed_forward": {"kind": kind} | sample}


LAYERS = dict(layers())


def first_minibatches(objective, lm):
    """Yield the loss of each minibatch of a first rollout in bf16, before any step."""
    with torch.autocast("cpu", torch.bfloat16):
        batches = objective.batches(Prompts(8), lm)
        for _ in range(objective.config.num_minibatches):
            batch = next(batches)
            yield batch, objective.loss(lm, batch)


@pytest.mark.parametrize("name", LAYERS)
def test_E1_no_ratio_is_outside_the_clip_range_before_the_first_step_in_bf16(name, small, ready):
    lm = small(dtype=torch.float32, pattern=[LAYERS[name]])
    lm.config = deterministic_config(lm.config)
    before = {key: value.clone() for key, value in lm.state_dict().items()}
    loss = GRPOLoss(clip_low=1e-7, clip_high=1e-7)
    objective = ready(GRPO(num_generations=3, loss=loss, **SMALL), lm)
    for batch, output in first_minibatches(objective, lm):
        assert batch.mask.any()
        assert output.metrics["clip_fraction"].total == 0
        assert output.metrics["approx_kl"].total == 0
        assert output.metrics["sampling_logprob_difference"].total > 0
    assert all(torch.equal(value, before[key]) for key, value in lm.state_dict().items())


@pytest.mark.parametrize("config", [PPO(kl_coef=0.1, **SMALL), SPO(**SMALL)], ids=["ppo", "spo"])
def test_E1_holds_for_every_rl_objective(config, small, ready):
    lm = small(dtype=torch.float32, pattern=[LAYERS["topk_moe"]])
    for _, output in first_minibatches(ready(config, lm), lm):
        assert output.metrics["approx_kl"].total == 0


def test_E1_the_mismatch_between_engine_and_training_is_reported(small, ready):
    lm = small(dtype=torch.float32)
    objective = ready(GRPO(num_generations=3, **SMALL), lm)
    batch, output = next(first_minibatches(objective, lm))
    difference = ((batch.old_logprobs - batch.sampling_logprobs).abs() * batch.mask).sum()
    assert output.metrics["sampling_logprob_difference"].total == pytest.approx(float(difference))
    moved = batch._replace(sampling_logprobs=batch.old_logprobs + 0.3 * batch.mask)
    outside = objective.loss(lm, moved).metrics["sampling_clip_fraction"]
    assert outside.total == outside.count == batch.mask.sum()
