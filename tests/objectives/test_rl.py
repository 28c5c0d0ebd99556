"""RL objectives (GRPO, PPO, SPO): rollouts, micro-batches, advantages, interruption."""

import math
from dataclasses import replace
from itertools import islice
from types import SimpleNamespace

import pytest
import torch

from tests.objectives.conftest import END, TOKENIZER, Prompts, liked
from tinsmith.core.errors import UserError
from tinsmith.core.parse import parse
from tinsmith.data.formats.prompts import Prompt
from tinsmith.distributed.group import SingleProcess
from tinsmith.losses.policy import DrGRPOLoss
from tinsmith.objectives.grpo import GRPO
from tinsmith.objectives.ppo import PPO, rewards_at_last_token
from tinsmith.objectives.rl.advantages import gae, group_advantages, whiten
from tinsmith.objectives.rl.rollout import Rollout
from tinsmith.objectives.spo import SPO
from tinsmith.rewards.functions import WeightedReward, as_batch_reward

SMALL = {"max_new_tokens": 6, "generation_batch_size": 8, "temperature": 0.9}
CONFIGS = {
    "grpo": GRPO(num_generations=3, kl_coef=0.1, num_minibatches=2, num_epochs=2, **SMALL),
    "dr_grpo": GRPO(num_generations=3, loss=DrGRPOLoss(), num_minibatches=2, num_epochs=2, **SMALL),
    "ppo": PPO(kl_coef=0.1, num_minibatches=2, num_epochs=2, **SMALL),
    "critic": PPO(critic="model", num_minibatches=2, num_epochs=2, **SMALL),
    "spo": SPO(num_minibatches=2, num_epochs=2, **SMALL),
}


def gradients(objective, lm, batch):
    lm.zero_grad()
    objective.zero_grad()
    loss = objective.loss(lm, batch)
    (loss.total / objective.units(batch)).backward()
    named = [*lm.named_parameters(), *objective.named_parameters()]
    return {name: p.grad.clone() for name, p in named if p.grad is not None}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_trainable_parameter_gets_a_finite_gradient(name, small, ready):
    lm = small()
    objective = ready(CONFIGS[name], lm)
    batches = objective.batches(Prompts(), lm)
    found = gradients(objective, lm, next(batches))
    assert found.keys() >= dict(lm.named_parameters()).keys()
    assert all(bool(torch.isfinite(grad).all()) for grad in found.values())
    assert any(bool((grad != 0).any()) for grad in found.values())
    trained = {n for n, p in objective.named_parameters() if p.requires_grad}
    assert trained <= found.keys()


@pytest.mark.parametrize("name", CONFIGS)
def test_stages_run_in_order_once_per_rollout_and_the_loss_once_per_minibatch(name, small, ready):
    lm = small()
    objective = ready(CONFIGS[name], lm)
    calls = []

    def record(stage):
        method = getattr(objective, stage)

        def recorded(*args, **kwargs):
            calls.append(stage)
            return method(*args, **kwargs)

        setattr(objective, stage, recorded)

    stages = ["generate", "score", "reference_logprobs", "compute_advantages"]
    for stage in [*stages, "loss"]:
        record(stage)
    batches = objective.batches(Prompts(), lm)
    for _ in range(8):
        objective.loss(lm, next(batches))
    minibatches = objective.config.num_minibatches * objective.config.num_epochs
    assert calls == [*stages, *["loss"] * minibatches] * (8 // minibatches)


@pytest.mark.parametrize("name", CONFIGS)
def test_micro_batches_of_a_rollout_are_complete_groups_and_cover_it(name, small, ready):
    lm = small()
    config = CONFIGS[name]
    objective = ready(config, lm)
    parts = list(islice(objective.batches(Prompts(), lm), 4))
    for a, b in zip(parts[:2], parts[2:], strict=True):
        assert all(torch.equal(one, two) for one, two in zip(a, b, strict=True))
    assert sum(len(part.ids) for part in parts[:2]) == 4 * config.num_generations
    firsts = [part.ids[:: config.num_generations, 0].tolist() for part in parts[:2]]
    assert firsts == [[5, 7], [6, 8]]
    for part in parts:
        groups = part.ids[:, 0].view(-1, config.num_generations)
        assert bool((groups == groups[:, :1]).all())


@pytest.mark.parametrize("name", CONFIGS)
def test_micro_batches_sum_to_the_gradient_of_the_rollout(name, small, ready):
    """T4: how a rollout was split into micro-batches changes nothing."""
    lm = small()
    objective = ready(CONFIGS[name], lm)
    batches = objective.batches(Prompts(), lm)
    one, two = next(batches), next(batches)
    whole = objective.rollout
    expected = gradients(objective, lm, whole)
    units = objective.units(one) + objective.units(two)
    found = {
        key: (a * objective.units(one) + b * objective.units(two)) / units
        for (key, a), b in zip(
            gradients(objective, lm, one).items(),
            gradients(objective, lm, two).values(),
            strict=True,
        )
    }
    for key, value in expected.items():
        assert torch.allclose(found[key], value, atol=1e-6), key


@pytest.mark.parametrize("name", CONFIGS)
def test_the_first_step_is_reinforce_for_any_rollout_precision(name, small, ready):
    """The ratio to the policy that answered is 1."""
    lm = small()
    objective = ready(CONFIGS[name], lm)
    batch = next(objective.batches(Prompts(), lm))
    metrics = objective.loss(lm, batch).metrics
    assert metrics["clip_fraction"].total == 0
    assert metrics["approx_kl"].total < 1e-10
    assert math.isfinite(metrics["loss"].total)
    if "kl" in metrics:
        assert abs(metrics["kl"].total) < 1e-6


def test_E4_dr_grpo_divides_by_no_deviation_unless_it_is_set(small, ready):
    """The paper's advantages (2503.20783): 0.875 for one right completion of eight."""
    lm = small()
    rewards = torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 0])
    expected = {None: 0.875, False: 0.875, True: 0.875 / (rewards.std(correction=0) + 1e-4)}
    for scale_rewards, value in expected.items():
        config = GRPO(num_generations=8, loss=DrGRPOLoss(), scale_rewards=scale_rewards, **SMALL)
        objective = ready(config, lm)
        objective.raw_rewards = lambda prompts, rollouts: rewards.tolist()
        batch = next(objective.batches(Prompts(1), lm))
        assert batch.advantages[0].max() == pytest.approx(float(value))
    assert GRPO().loss.SCALES_REWARDS
    scaled = ready(GRPO(num_generations=8, **SMALL), lm)
    scaled.raw_rewards = lambda prompts, rollouts: rewards.tolist()
    assert next(scaled.batches(Prompts(1), lm)).advantages[0].max() > 2.6


@pytest.mark.parametrize("name", CONFIGS)
def test_T2_an_unfinished_rollout_is_saved(name, small, ready):
    lm = small()
    whole = ready(CONFIGS[name], lm)
    expected = list(islice(whole.batches(Prompts(), lm), 12))
    for stop in (1, 3, 4, 5, 8):
        feed, before = Prompts(), ready(CONFIGS[name], lm)
        given = list(islice(before.batches(feed, lm), stop))
        after = ready(CONFIGS[name], lm)
        after.load_state(before.state())
        after.load_rank_state({key: value.clone() for key, value in before.rank_state().items()})
        given += list(islice(after.batches(feed, lm), 12 - stop))
        for one, two in zip(given, expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
        assert after.rank_state().keys() == whole.rank_state().keys()


@pytest.mark.parametrize("name", CONFIGS)
def test_T7_a_stop_during_a_rollout_rewinds_to_the_start_of_the_step(name, small, ready):
    """The step had begun with the last part of one rollout, and had finished another."""
    lm = small()
    expected = list(islice(ready(CONFIGS[name], lm).batches(Prompts(), lm), 12))
    feed, objective = Prompts(), ready(CONFIGS[name], lm)
    batches = objective.batches(feed, lm)
    given = list(islice(batches, 3))
    mark, cursor = objective.snapshot(), feed.cursor
    list(islice(batches, 5))

    class Stopping(SingleProcess):
        def poll(self, busy: bool = False) -> bool:
            raise KeyboardInterrupt

    objective.peers = Stopping()
    with pytest.raises(KeyboardInterrupt):
        next(batches)
    assert lm.training
    objective.peers = SingleProcess()
    objective.restore_snapshot(mark)
    feed.cursor = cursor
    given += list(islice(objective.batches(feed, lm), 9))
    for one, two in zip(given, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_grpo_compares_completions_with_their_group(small, ready):
    lm = small()
    objective = ready(CONFIGS["grpo"], lm)
    next(objective.batches(Prompts(), lm))
    rows = objective.rollout
    expected = group_advantages(rows.rewards.view(4, 3)).flatten()
    assert torch.equal(rows.advantages, expected[:, None] * rows.mask)
    assert expected.abs().sum() > 0


def test_groups_with_equal_rewards_are_counted(small, ready):
    lm = small()
    objective = ready(CONFIGS["grpo"], lm)
    objective.raw_rewards = lambda prompts, episodes: [
        1.0 if prompt.prompt_id % 2 else score
        for prompt, score in zip(prompts, liked(prompts, episodes), strict=True)
    ]
    even, odd = islice(objective.batches(Prompts(), lm), 2)
    reported = [objective.loss(lm, part).metrics["zero_variance_groups"] for part in (even, odd)]
    assert [float(metric.total / metric.count) for metric in reported] == [0.0, 1.0]
    assert bool((odd.advantages == 0).all())


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_completion_without_a_reward_is_excluded_and_counted(name, bad, small, ready):
    lm = small()
    objective = ready(CONFIGS[name], lm)
    objective.raw_rewards = lambda prompts, episodes: [bad, *liked(prompts, episodes)[1:]]
    batches = objective.batches(Prompts(), lm)
    part = next(batches)
    assert part.mask[0].sum() == 0
    assert part.mask[1].sum() > 0
    metrics = objective.loss(lm, part).metrics
    assert metrics["reward_failed_fraction"].total == 1
    assert all(math.isfinite(m.total) for m in metrics.values())
    assert all(bool(torch.isfinite(g).all()) for g in gradients(objective, lm, part).values())


@pytest.mark.parametrize("name", CONFIGS)
def test_a_rollout_without_any_reward_changes_no_parameter(name, small, ready):
    lm = small()
    objective = ready(CONFIGS[name], lm)
    objective.raw_rewards = lambda prompts, episodes: [math.nan] * len(prompts)
    part = next(objective.batches(Prompts(), lm))
    loss = objective.loss(lm, part)
    loss.total.backward()
    assert loss.total.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in lm.parameters())


@pytest.mark.parametrize("room", [4, 3, 2])
@pytest.mark.parametrize("name", CONFIGS)
def test_prompts_without_room_for_a_completion_cause_no_error(name, room, small, ready):
    """Prompts are of 2 to 4 tokens: of 4 the longest gets no answer, and of 2 none does."""
    lm = small()
    objective = ready(CONFIGS[name], lm)
    objective.limits = replace(objective.limits, max_seq_len=room)
    objective.raw_rewards = lambda prompts, episodes: [
        float(len(each.completion_ids)) for each in episodes
    ]
    for batch in islice(objective.batches(Prompts(), lm), 4):
        assert bool(torch.isfinite(batch.advantages).all())
        total = objective.loss(lm, batch).total
        assert bool(torch.isfinite(total))
        found = gradients(objective, lm, batch) if objective.units(batch) else {}
        assert all(bool(torch.isfinite(gradient).all()) for gradient in found.values())
        assert room > 2 or not batch.mask.any()


def test_truncated_completions_may_be_masked_or_penalised(small, ready):
    lm = small()
    keep = ready(GRPO(num_generations=3, **SMALL), lm)
    drop = ready(GRPO(num_generations=3, mask_truncated=True, truncation_penalty=0.25, **SMALL), lm)
    kept, dropped = (next(each.batches(Prompts(), lm)) for each in (keep, drop))
    cut = kept.truncated
    assert 0 < cut.sum() < len(cut)
    assert torch.equal(dropped.mask, kept.mask & ~cut[:, None])
    assert torch.allclose(dropped.rewards, kept.rewards - 0.25 * cut)


def test_prompt_counts_that_do_not_divide_evenly_are_refused(small, ready):
    lm = small()
    objective = ready(GRPO(num_generations=2, num_minibatches=3, **SMALL), lm)
    with pytest.raises(UserError, match=r"objective.num_minibatches: 3 must divide the 4 prompts"):
        next(objective.batches(Prompts(), lm))


@pytest.mark.parametrize(
    ("config", "key", "value"),
    [
        (GRPO, "num_generations", 1),
        (GRPO, "temperature", 0.0),
        (GRPO, "kl_coef", -0.1),
        (PPO, "clip_low", 1.5),
        (GRPO, "num_epochs", 0),
        (PPO, "lam", 1.1),
        (PPO, "target_kl", 0.0),
        (SPO, "num_generations", 2),
        (SPO, "rho_min", 0.99),
        (SPO, "reward_max", 0.0),
    ],
)
def test_values_out_of_range_are_refused_by_name(config, key, value):
    with pytest.raises(ValueError, match=key):
        config(**{key: value})


# PPO


def test_ppo_has_the_reward_at_the_last_token_and_the_kl_at_every_token(small, ready):
    lm = small()
    objective = ready(PPO(kl_coef=0.3, gamma=0.9, lam=0.8, whiten=False, **SMALL), lm)
    with torch.no_grad():
        objective.value.weight.normal_()
        objective.frozen_models["reference"].head.weight.normal_()
    rows = next(objective.batches(Prompts(), lm))
    away = (rows.old_logprobs - rows.ref_logprobs) * rows.mask
    assert away.abs().sum() > 0.1
    rewards = -0.3 * away
    for row in range(4):
        rewards[row, rows.mask[row].nonzero().max()] += rows.rewards[row]
    advantages, returns = gae(rewards, rows.values, rows.mask, 0.9, 0.8)
    assert torch.allclose(rows.advantages, advantages, atol=1e-6)
    assert torch.allclose(rows.returns, returns, atol=1e-6)


def test_the_value_baseline_does_not_see_the_action_that_it_evaluates(small, ready):
    for config in (PPO(**SMALL), PPO(critic="model", **SMALL)):
        lm = small()
        objective = ready(config, lm)
        with torch.no_grad():
            objective.value.weight.normal_()
        rows = next(objective.batches(Prompts(), lm))
        row, place = rows.mask.nonzero()[2].tolist()
        changed = rows.ids.clone()
        changed[row, place + 1 :] = (changed[row, place + 1 :] + 3) % 20
        before, after = (
            objective.values(lm(ids, segments=rows.segments), rows._replace(ids=ids))
            for ids in (rows.ids, changed)
        )
        assert torch.equal(before[row, : place + 1], after[row, : place + 1])
        assert not torch.equal(before[row], after[row])


def test_ppo_stops_early_without_a_step_and_continues_with_a_new_rollout(small, ready):
    lm = small()
    objective = ready(PPO(num_minibatches=2, num_epochs=3, target_kl=0.01, **SMALL), lm)
    feed = Prompts()
    batches = objective.batches(feed, lm)
    next(batches)
    assert objective.accept_step({"approx_kl": 0.009})
    next(batches)
    assert feed.cursor == 4
    assert not objective.accept_step({"approx_kl": 0.011})
    next(batches)
    assert feed.cursor == 8
    assert objective.minibatch_index == 1


def test_rewards_are_at_the_last_sampled_token():
    mask = torch.tensor([[0, 1, 0, 1, 0], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0]], dtype=torch.bool)
    found = rewards_at_last_token(torch.tensor([2.0, math.nan, 3.0]), mask)
    assert found.tolist() == [[0, 0, 0, 2, 0], [0] * 5, [3, 0, 0, 0, 0]]


def test_whitened_values_have_mean_0_and_deviation_1():
    values = torch.randn(5, 7) * 3 + 2
    mask = torch.rand(5, 7) > 0.4
    found = whiten(values, mask, SingleProcess())
    assert found[mask].mean().item() == pytest.approx(0, abs=1e-6)
    assert found[mask].std(correction=0).item() == pytest.approx(1, abs=1e-5)
    assert bool((found[~mask] == 0).all())
    assert bool((whiten(values, mask & False, SingleProcess()) == 0).all())


# SPO


def test_spo_compares_a_completion_with_the_previous_estimate_of_its_prompt(small, ready):
    lm = small()
    objective = ready(SPO(whiten=False, **SMALL), lm)
    feed, expected = Prompts(batch_size=10), objective.config.new_tracker()
    batches = objective.batches(feed, lm)
    first, second = next(batches), next(batches)
    for rows in (first, second):
        advantages = [float(r) - expected.value(n) for n, r in enumerate(rows.rewards)]
        found = rows.advantages.sum(1) / rows.mask.sum(1)
        assert found.tolist() == pytest.approx(advantages, abs=1e-6)
        for number, reward in enumerate(rows.rewards.tolist()):
            expected.update(number, reward, 0.0)
    assert objective.tracker.state.keys() == expected.state.keys()
    for number, pair in expected.state.items():
        assert objective.tracker.state[number] == pytest.approx(pair, abs=1e-6)


def test_spo_measures_the_kl_on_the_previous_completion_of_the_same_prompt(small, ready):
    lm = small()
    objective = ready(SPO(**SMALL), lm)
    rows = next(objective.batches(Prompts(batch_size=10), lm))
    assert objective.distances(lm, list(range(10))).abs().max() < 1e-5
    with torch.no_grad():
        lm.head.weight += 0.2 * torch.randn_like(lm.head.weight)
        now = objective.logprobs(lm, rows)[0]
    expected = ((now - rows.old_logprobs).abs() * rows.mask).sum(1) / rows.mask.sum(1)
    found = objective.distances(lm, [3, 99, 7])
    assert found.tolist() == pytest.approx([float(expected[3]), 0.0, float(expected[7])], abs=1e-6)


def test_spo_initialises_a_prompt_with_completions_without_gradient(small, ready):
    lm = small()
    objective = ready(SPO(warmup_samples=8, **SMALL), lm)
    batches = objective.batches(Prompts(batch_size=10), lm)
    requested = []
    answers = objective.generate
    objective.generate = lambda policy, prompts, seeds: (
        requested.append(len(prompts)) or answers(policy, prompts, seeds)
    )
    next(batches)
    next(batches)
    assert requested == [10, 80, 10, 0]
    assert all(6 < sum(pair) < 11 for pair in objective.tracker.state.values())


def test_spo_clips_rewards_to_their_bounds(small, ready):
    lm = small()
    objective = ready(SPO(reward_min=-3, reward_max=3, **SMALL), lm)
    rewards = torch.tensor([-5.0, -3.0, 0.0, 4.5, math.nan])
    found = objective.normalize_rewards(rewards)
    assert found[:4].tolist() == [0.0, 0.0, 0.5, 1.0]
    assert math.isnan(found[4])


# rewards


def test_a_failed_reward_is_reported_with_its_prompt_and_its_completion_excluded(
    small, ready, capsys
):
    lm = small()
    objective = ready(GRPO(num_generations=3, **SMALL), lm)
    del objective.raw_rewards
    objective.tokenizer = SimpleNamespace(decode=lambda ids: " ".join(map(str, ids)))

    def broken(prompt, text):
        if prompt.prompt_id == 1:
            raise KeyError("gone")
        return math.nan if prompt.prompt_id == 2 else len(text) / 20

    objective.weighted_rewards = [WeightedReward("broken", as_batch_reward(broken))]
    rows = next(objective.batches(Prompts(), lm))
    assert rows.rewards.view(4, 3).isnan().all(1).tolist() == [False, True, True, False]
    assert not rows.mask.view(4, -1)[1:3].any()
    output = capsys.readouterr().err
    assert output.count("no reward: broken of prompt 1: KeyError") == 3
    assert output.count("no reward: broken of prompt 2: returned nan") == 3


def test_rewards_of_a_recipe_are_a_weighted_sum(small, ready):
    rewards = [{"kind": "exact_match"}, {"kind": "length", "low": 3, "high": 9, "weight": 0.5}]
    config = parse(GRPO, {"kind": "grpo", "rewards": rewards})
    objective = config.build()
    objective.prepare(small(), TOKENIZER)
    objective.tokenizer = SimpleNamespace(decode=lambda ids: f"It is {ids[0]}.")
    prompts = [Prompt([5], 0, "7", {}), Prompt([5], 1, "8", {})]
    episodes = [Rollout([5], seed=0), Rollout([5], seed=0)]
    for episode in episodes:
        episode.append_token(7, 0.0)
        episode.append_token(END, 0.0)
    assert objective.raw_rewards(prompts, episodes) == [1.5, 0.5]
    with pytest.raises(UserError, match="low=9 and high=3"):
        parse(GRPO, {"kind": "grpo", "rewards": [{"kind": "length", "low": 9, "high": 3}]})


# other numbers of processes


@pytest.mark.parametrize("name", CONFIGS)
def test_T3_a_rollout_of_two_processes_continues_in_one_and_back(name, small, ready):
    lm = small()
    whole = ready(CONFIGS[name], lm)
    next(whole.batches(Prompts(), lm))
    parts = []
    for rank in range(2):
        half = ready(CONFIGS[name], lm)
        half.rollout = whole.rollout.select_rows(
            torch.arange(2 * whole.config.num_generations) + rank * 2 * whole.config.num_generations
        )
        half.place = 1
        parts.append(half.rank_state() | {k: v for k, v in whole.rank_state().items() if "." in k})
    found = whole.reshard_rank_state(parts, 0, 1)
    assert found.keys() == whole.rank_state().keys()
    for key, value in whole.rank_state().items():
        assert torch.equal(found[key], value), key
    for rank in range(2):
        again = whole.reshard_rank_state([whole.rank_state()], rank, 2)
        for key, value in parts[rank].items():
            assert torch.equal(again[key], value), key
    assert not {k for k in whole.reshard_rank_state([{}, {}], 0, 1) if "." not in k}
