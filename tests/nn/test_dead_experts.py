"""Re-initialisation of dead experts (promises R), on a router with weights."""

import copy
import math

import pytest
import torch
from torch import nn

from tinsmith.nn.contract import OptimizerReset
from tinsmith.nn.moe.cosine_router import CosineRouter, CosineRouterConfig

E, D, H = 6, 16, 4
INTERVAL = 3


class Part(nn.Module):
    """A router and the weights of its experts."""

    def __init__(self, dead: tuple[int, ...] = (), layer: int = 0, **keys):
        super().__init__()
        torch.manual_seed(0)
        keys = {"experts": E, "reset_interval": INTERVAL} | keys
        self.gate = CosineRouter(CosineRouterConfig(**keys), D, layer)
        self.up = nn.Parameter(torch.randn(E, H, D))
        self.down = nn.Parameter(torch.randn(E, D, H))
        with torch.no_grad():
            self.gate.thresholds[list(dead)] = 2.0

    def step(self, x: torch.Tensor, valid: torch.Tensor | None = None) -> list[OptimizerReset]:
        return self.gate.post_step(self.gate(x, valid).stats, {self.up: 0.5, self.down: 0.0})


def draw(seed: int, count: int = 64) -> torch.Tensor:
    return torch.randn(count, D, generator=torch.Generator().manual_seed(seed))


def window(part: Part, seed: int = 0) -> list[list[OptimizerReset]]:
    return [part.step(draw(seed + index)) for index in range(INTERVAL)]


def weights(part: Part) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in part.named_parameters()}


def test_R1_exactly_the_dead_rows_change():
    part = Part(dead=(1, 4))
    before = weights(part)
    *quiet, resets = window(part)
    assert quiet == [[], []]
    live = [0, 2, 3, 5]
    for name, value in part.named_parameters():
        assert torch.equal(value[live], before[name][live]), name
        assert all((value[row] != before[name][row]).any() for row in (1, 4)), name
    expected = [part.gate.prototypes, part.gate.thresholds, part.up, part.down]
    assert [id(reset.parameter) for reset in resets] == [id(parameter) for parameter in expected]
    assert all(reset.rows.tolist() == [1, 4] for reset in resets)
    assert (part.gate.thresholds[[1, 4]] == 0).all()
    assert (part.down[[1, 4]] == 0).all()
    lengths = part.gate.prototypes[[1, 4]].norm(dim=-1)
    torch.testing.assert_close(lengths, torch.full((2,), math.sqrt(D)))
    assert part.gate.window.newborn.tolist() == [e in (1, 4) for e in range(E)]


def test_reset_weights_have_the_initial_distribution():
    part = Part(dead=tuple(range(E)))
    window(part)
    assert part.up.std().item() == pytest.approx(0.5, rel=0.1)


def test_R2_without_dead_experts_only_counters_change():
    part = Part()
    before = weights(part)
    assert window(part) == [[], [], []]
    assert all(torch.equal(value, before[name]) for name, value in part.named_parameters())
    counters = part.gate.window
    assert (int(counters.looks), int(counters.steps), int(counters.tokens)) == (1, 0, 0)
    assert not counters.load.any()
    assert not counters.unrouted.any()
    assert not counters.newborn.any()


def test_R3_a_planted_dead_expert_is_found_and_selected_for_unrouted_tokens():
    part = Part(dead=(2,))
    direction = draw(9, 1)[0]
    with torch.no_grad():
        alive = [0, 1, 3, 4, 5]
        others = part.gate.prototypes[alive]
        direction = direction - others.T @ (others @ direction) / D
        part.gate.thresholds[alive] = 0.3
    for index in range(INTERVAL):
        assert not part.gate.window.newborn.any()
        tokens = torch.cat((draw(index), direction + 0.01 * draw(20 + index)))
        part.step(tokens)
    assert part.gate.window.newborn.tolist() == [False, False, True, False, False, False]
    assert part.gate(direction[None]).mask_NE[0, 2]
    cosine = part.gate.margins(direction[None])[0, 2]
    assert cosine > 0.9


def test_prototypes_are_orthogonal_to_live_ones_without_unrouted_tokens():
    part = Part(dead=(1, 4), fallback="none")
    for index in range(INTERVAL):
        x = draw(index, 200)
        part.step(x[part.gate(x).mask_NE.any(-1)])
    unit = part.gate.prototypes.detach() / math.sqrt(D)
    similar = unit @ unit.T
    torch.testing.assert_close(similar, torch.eye(E), rtol=0, atol=1e-6)


def test_without_an_orthogonal_direction_a_random_one_is_used():
    part = Part(dead=(3,), experts=D + 2)
    part.up, part.down = (
        nn.Parameter(torch.randn(D + 2, *p.shape[1:])) for p in (part.up, part.down)
    )
    window(part)
    assert part.gate.prototypes[3].norm().item() == pytest.approx(math.sqrt(D))


def test_R4_equal_histories_give_equal_resets_and_global_random_state_is_unchanged():
    state = torch.get_rng_state()
    found = []
    for _ in range(2):
        part = Part(dead=(1, 4))
        torch.manual_seed(7)
        before = torch.get_rng_state()
        window(part)
        assert torch.equal(torch.get_rng_state(), before)
        found.append(weights(part))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    other = Part(dead=(1, 4), layer=1)
    window(other)
    assert not torch.equal(other.up, found[0]["up"])
    torch.set_rng_state(state)


def test_resets_of_the_next_window_differ():
    part = Part(dead=(1,))
    window(part)
    first = part.up[1].detach().clone()
    with torch.no_grad():
        part.gate.thresholds[1] = 2.0
    window(part)
    assert not torch.equal(part.up[1], first)


def test_R6_neither_padding_nor_the_fallback_keeps_an_expert_alive():
    part = Part(dead=(0, 1, 2, 3, 4, 5))
    x, valid = draw(0), torch.arange(64) < 32
    choice = part.gate(x, valid)
    assert choice.mask_NE.any()
    assert not choice.stats["load"].any()
    part.step(x, valid)
    assert int(part.gate.window.tokens) == 32
    for _ in range(2):
        resets = part.step(x, valid)
    assert resets[0].rows.tolist() == list(range(E))


def test_a_window_without_tokens_resets_no_expert():
    part = Part()
    before = weights(part)
    for _ in range(INTERVAL):
        assert part.step(draw(0), torch.zeros(64, dtype=torch.bool)) == []
    assert all(torch.equal(value, before[name]) for name, value in part.named_parameters())


def test_R7_a_copy_in_the_middle_of_a_window_gives_the_same_reset():
    part = Part(dead=(1, 4))
    part.step(draw(0))
    twin = Part()
    with torch.no_grad():
        part.gate.thresholds[0] = 2.0  # fired before, so it is not dead: the copy must know
    twin.load_state_dict(copy.deepcopy(part.state_dict()))
    for name, counter in part.named_buffers():
        twin.get_buffer(name).copy_(counter)
    for index in (1, 2):
        part.step(draw(index))
        twin.step(draw(index))
    assert part.gate.window.newborn.tolist() == [e in (1, 4) for e in range(E)]
    others = {**dict(twin.named_parameters()), **dict(twin.named_buffers())}
    for name, value in (*part.named_parameters(), *part.named_buffers()):
        assert torch.equal(value, others[name]), name


def test_reset_interval_null_never_resets():
    part = Part(dead=(1,), reset_interval=None)
    before = weights(part)
    assert window(part) + window(part) == [[]] * (2 * INTERVAL)
    assert all(torch.equal(value, before[name]) for name, value in part.named_parameters())
