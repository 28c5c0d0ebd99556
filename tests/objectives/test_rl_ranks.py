"""Two gloo ranks, each with its part of the prompts, have the gradients of a single process."""

from pathlib import Path

import pytest
import torch

from tests.ranks import run

WORKER = Path(__file__).with_name("rl_worker.py")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    return run(WORKER, 1, folder), run(WORKER, 2, folder)


@pytest.mark.parametrize("name", ["grpo", "dapo", "dr_grpo", "ppo", "critic", "spo"])
def test_T3_two_ranks_have_the_gradients_of_one_process(name, found):
    """Two rollouts, the second by another policy, two parts each."""
    alone, both = found
    named = [key for key in alone if key.startswith(f"{name}.")]
    assert len({tuple(key.split(".")[1:3]) for key in named}) == 4
    assert {key for key in both if key.startswith(f"{name}.")} == set(named)
    for key in named:
        assert torch.allclose(both[key], alone[key], atol=1e-9), key
    assert sum(bool(alone[key].any()) for key in named) > len(named) / 2


def test_T3_the_spo_tracker_is_equal_on_two_ranks(found):
    alone, both = found
    assert torch.allclose(both["tracker"], alone["tracker"], atol=1e-9)
    assert torch.equal(both["kept"], alone["kept"])
    assert len(alone["tracker"].unique()) > 10
