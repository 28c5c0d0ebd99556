"""Rollouts: completions do not depend on batching, and have the log-probabilities of sampling."""

from dataclasses import replace

import pytest
import torch

from tests.objectives.conftest import END, MIXERS
from tinsmith.core.errors import Failure
from tinsmith.objectives.rl.rollout import (
    GenerationLimits,
    collate,
    concat_rollouts,
    generate_rollouts,
)

PROMPTS = [[5, 6, 7], [9], [5, 6, 7, 8, 9, 10, 11], [20, 3], [4, 4, 4, 4]]
SEEDS = [11, 12, 13, 14, 15]
LIMITS = GenerationLimits(
    max_new_tokens=12, max_seq_len=64, batch_size=3, temperature=0.8, eos_ids=(END,)
)


def texts(episodes):
    return [each.ids for each in episodes]


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_completions_do_not_depend_on_batching(mixer, temperature, small):
    lm = small(mixer)
    wanted = replace(LIMITS, temperature=temperature)
    together = texts(generate_rollouts(lm, PROMPTS, SEEDS, replace(wanted, batch_size=5)))
    assert texts(generate_rollouts(lm, PROMPTS, SEEDS, replace(wanted, batch_size=1))) == together
    backwards = generate_rollouts(lm, PROMPTS[::-1], SEEDS[::-1], replace(wanted, batch_size=2))
    assert texts(backwards)[::-1] == together
    alone = [
        generate_rollouts(lm, [p], [s], wanted)[0].ids for p, s in zip(PROMPTS, SEEDS, strict=True)
    ]
    assert alone == together


@pytest.mark.parametrize("mixer", MIXERS)
def test_logprobs_are_of_the_sampled_tokens_at_the_sampling_temperature(mixer, small):
    lm = small(mixer)
    rows = collate(generate_rollouts(lm, PROMPTS, SEEDS, LIMITS), torch.device("cpu"))
    lm.eval()
    logits = lm(rows.ids, segments=rows.segments).logits / LIMITS.temperature
    expected = logits.log_softmax(-1).gather(2, rows.targets[..., None])[..., 0]
    assert rows.mask.sum() > 20
    assert torch.allclose(rows.old_logprobs[rows.mask].double(), expected[rows.mask], atol=1e-6)
    assert bool((rows.old_logprobs[~rows.mask] == 0).all())


def test_logprobs_under_autocast_are_those_of_its_precision(small):
    """Token by token and all at once round differently in bf16, by about as much as bf16 does."""
    lm = small(dtype=torch.float32)
    cpu = torch.device("cpu")
    exact = collate(generate_rollouts(lm, PROMPTS, SEEDS, LIMITS), cpu)
    with torch.autocast("cpu", torch.bfloat16):
        rows = collate(generate_rollouts(lm, PROMPTS, SEEDS, LIMITS), cpu)
        low = lm(rows.ids, segments=rows.segments).logits / LIMITS.temperature
    reported = low.log_softmax(-1).gather(2, rows.targets[..., None])[..., 0]
    assert 0 < (reported - rows.old_logprobs)[rows.mask].abs().mean() < 0.03
    assert not torch.equal(rows.old_logprobs[:, 2], exact.old_logprobs[:, 2])


def test_completions_include_the_end_of_turn_and_not_the_prompt(small):
    episodes = generate_rollouts(small(), PROMPTS * 4, list(range(20)), LIMITS)
    finishes = {each.finish_reason for each in episodes}
    assert finishes == {"stop", "length"}
    for episode, prompt in zip(episodes, PROMPTS * 4, strict=True):
        answer = episode.completion_ids
        assert episode.ids[: len(prompt)] == prompt
        assert episode.response_mask == [False] * len(prompt) + [True] * len(answer)
        assert (answer[-1] == END) == (episode.finish_reason == "stop")
        assert END not in answer[:-1]
        assert episode.finish_reason == "stop" or len(answer) == LIMITS.max_new_tokens
    rows = collate(episodes, torch.device("cpu"))
    assert rows.truncated.tolist() == [each.finish_reason == "length" for each in episodes]
    for row, episode in enumerate(episodes):
        assert rows.targets[row][rows.mask[row]].tolist() == episode.completion_ids
        assert (rows.segments[row] == 0).sum() == len(episode.ids) - 1


class Counted:
    """How many forward passes, and over how many positions."""

    def __init__(self, lm):
        self.passes, self.positions = 0, 0
        lm.register_forward_pre_hook(self.saw)

    def saw(self, lm, given):
        self.passes += 1
        self.positions += given[0].numel()


def test_a_shared_prompt_is_prefilled_once(small):
    lm = small()
    counted = Counted(lm)
    prompt = list(range(2, 22))
    limits = replace(LIMITS, batch_size=4, eos_ids=())
    episodes = generate_rollouts(lm, [prompt] * 8, list(range(8)), limits)
    assert len({tuple(each.completion_ids) for each in episodes}) == 8
    assert counted.positions == 20 + 8 * (12 - 1)


def test_a_finished_row_is_replaced_by_the_next_prompt(small):
    """Lengths differ by seed; in fixed batches every row would wait for its batch's longest."""
    lm = small()
    counted = Counted(lm)
    episodes = generate_rollouts(
        lm, [[5, 6]] * 24, list(range(24)), replace(LIMITS, batch_size=4, max_new_tokens=30)
    )
    lengths = [len(each.completion_ids) for each in episodes]
    fixed = sum(max(lengths[start : start + 4]) for start in range(0, 24, 4))
    assert counted.passes < 0.8 * fixed
    assert counted.passes <= sum(lengths) / 4 + max(lengths)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_restored_and_nothing_has_a_gradient(training, small):
    lm = small(dropout={"residual": 0.5}).train(training)
    first = generate_rollouts(lm, PROMPTS, SEEDS, LIMITS)
    assert lm.training is training
    assert texts(generate_rollouts(lm, PROMPTS, SEEDS, LIMITS)) == texts(first)
    assert all(parameter.grad is None for parameter in lm.parameters())


def test_T7_a_stop_is_checked_between_tokens(small):
    lm, requested = small(), []

    def poll(busy: bool) -> bool:
        requested.append(busy)
        if len(requested) == 5:
            raise KeyboardInterrupt
        return busy

    with pytest.raises(KeyboardInterrupt):
        generate_rollouts(lm, PROMPTS, SEEDS, LIMITS, poll=poll)
    assert lm.training
    assert requested == [True] * 5


def test_ranks_that_are_done_poll_until_all_are_done(small):
    """With several ranks all poll equally often, until no rank is busy."""
    requested = []

    def poll(busy: bool) -> bool:
        requested.append(busy)
        return len(requested) < 40

    generate_rollouts(small(), PROMPTS[:1], SEEDS[:1], LIMITS, poll=poll)
    assert len(requested) == 40
    assert requested[:2] == [True, True]
    assert requested[-20:] == [False] * 20


def test_a_prompt_without_room_gets_no_completion(small):
    episodes = generate_rollouts(small(), [[3] * 64, [3] * 60, [4]], [1, 2, 3], LIMITS)
    assert [each.finish_reason is None for each in episodes] == [True, False, False]
    assert episodes[0].completion_ids == []
    assert len(episodes[1].completion_ids) <= 4
    rows = collate(episodes, torch.device("cpu"))
    assert rows.mask[0].sum() == 0
    assert bool(rows.truncated[0])


def test_tool_results_are_masked_and_do_not_change_sampled_tokens(small):
    lm = small()
    before = generate_rollouts(lm, PROMPTS, SEEDS, LIMITS)
    received = [8, 8, 2]
    episodes = generate_rollouts(
        lm, PROMPTS, SEEDS, LIMITS, reply=lambda each: received if each.turns == 1 else []
    )
    longer = 0
    for first, episode in zip(before, episodes, strict=True):
        count = len(first.ids)
        assert episode.ids[:count] == first.ids
        assert episode.logprobs[:count] == pytest.approx(first.logprobs, abs=1e-12)
        if first.finish_reason == "stop":
            longer += 1
            assert episode.ids[count : count + 3] == received
            assert episode.response_mask[count : count + 3] == [False] * 3
            assert all(episode.response_mask[count + 3 :])
            assert len(episode.ids) > count + 3
    assert longer > 0


def test_rows_of_several_rollouts_are_joined_and_split_again(small):
    lm, cpu = small(), torch.device("cpu")
    one = collate(generate_rollouts(lm, PROMPTS[:2], SEEDS[:2], LIMITS), cpu)
    two = collate(generate_rollouts(lm, PROMPTS[2:], SEEDS[2:], LIMITS), cpu)
    both = concat_rollouts([one, two])
    whole = collate(generate_rollouts(lm, PROMPTS, SEEDS, LIMITS), cpu)
    for name, a, b in zip(both._fields, both, whole, strict=True):
        assert torch.equal(a, b), name
    for name, a, b in zip(one._fields, both.select_rows(torch.tensor([0, 1])), one, strict=True):
        assert torch.equal(a, b), name


def test_broken_weights_end_the_run_with_one_line(small):
    lm = small("gqa")
    with torch.no_grad():
        lm.embed.weight[9] = float("nan")
    with pytest.raises(Failure, match=r"logits are NaN or infinite.* \(rollout after 1 tokens\)"):
        generate_rollouts(lm, PROMPTS, SEEDS, LIMITS)
