"""Every residual, beyond the tests that test_mixers runs over mixers and residuals."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tinsmith.core.parse import to_plain
from tinsmith.nn.config import ModelConfig
from tinsmith.nn.contract import Ctx


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def lm(make, residual):
    return make(residual=residual)


def noise(*shape, seed=1):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_expanding_and_collapsing_is_the_identity(lm):
    config, x = lm.config.residual, noise(2, 5, 32)
    torch.testing.assert_close(config.collapse(config.expand(x)), x)


def test_reading_gives_one_stream_and_writing_keeps_the_state(lm):
    h = lm.config.residual.expand(noise(2, 5, 32))
    for block in lm.blocks:
        for part in (block.mix_residual, block.feed_residual):
            x, kept = part.read(h)
            assert x.shape == (2, 5, 32)
            written = part.write(h, noise(2, 5, 32, seed=2), kept)
            assert written.shape == h.shape
            assert written.dtype == h.dtype


def test_tokens_and_rows_do_not_mix_in_the_streams(lm):
    """Changing one token changes the streams at that token only, bit for bit."""
    part, expand = lm.blocks[1].mix_residual, lm.config.residual.expand
    x, y = noise(2, 5, 32), noise(2, 5, 32, seed=2)

    def through(x, y):
        h = expand(x) * (1 + noise(*expand(x).shape, seed=3))
        read, kept = part.read(h)
        return read, part.write(h, y, kept)

    other_x, other_y = x.clone(), y.clone()
    other_x[1, 3], other_y[1, 3] = 2.0, -1.0
    elsewhere = torch.ones(2, 5, dtype=torch.bool)
    elsewhere[1, 3] = False
    for before, after in zip(through(x, y), through(other_x, other_y), strict=True):
        assert torch.equal(before[elsewhere], after[elsewhere])
        assert not torch.isclose(before[~elsewhere], after[~elsewhere]).all()


def test_the_stream_is_not_normalised(make, residual):
    """B-06: a state that is 100 times larger stays 100 times larger after a block."""
    lm = make(residual=residual, positions="none")
    h = lm.config.residual.expand(noise(2, 5, 32))
    h, ctx = h * (1 + 0.1 * noise(*h.shape, seed=3)), Ctx(torch.arange(5).expand(2, 5))
    for block in lm.blocks:
        small, large = (block(factor * h, ctx).y.square().mean().sqrt() for factor in (1e3, 1e5))
        assert 90 < large / small < 110


def test_the_output_of_a_sub_layer_reaches_the_stream(lm):
    part = lm.blocks[1].mix_residual
    h = lm.config.residual.expand(noise(2, 5, 32))
    _, kept = part.read(h)
    without = part.write(h, torch.zeros(2, 5, 32, dtype=torch.float64), kept)
    with_output = part.write(h, noise(2, 5, 32, seed=2), kept)
    collapse = lm.config.residual.collapse
    assert ((collapse(with_output) - collapse(without)).abs().amax(-1) > 1e-3).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_stream_keeps_its_dtype(make, residual, dtype):
    lm = make(residual=residual, dtype=dtype)
    h = lm.config.residual.expand(noise(2, 5, 32).to(dtype))
    x, kept = lm.blocks[0].mix_residual.read(h)
    assert x.dtype == dtype
    assert lm.blocks[0].mix_residual.write(h, x, kept).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_streams_are_computed_in_float32(make, residual, dtype):
    """Inputs and outputs are rounded, nothing in between, under autocast too."""
    lm = make(residual=residual, dtype=torch.float32)
    h = lm.config.residual.expand(noise(2, 5, 32).to(dtype))
    h, y = h * (1 + noise(*h.shape, seed=3)).to(dtype), noise(2, 5, 32, seed=2).to(dtype)
    for block in lm.blocks:
        with torch.autocast("cpu", dtype):
            x, kept = block.mix_residual.read(h)
            after = block.mix_residual.write(h, y, kept)
        exact, kept = block.mix_residual.read(h.float())
        assert torch.equal(x, exact.to(dtype))
        exact = block.mix_residual.write(h.float(), y.float(), kept)
        assert torch.equal(after, exact.to(dtype))


def test_the_stream_does_not_grow_with_depth(make, residual):
    """The input of the final norm after 64 blocks is less than three times that after two."""
    ids, sizes = torch.arange(32)[None], []
    for depth in (2, 64):
        lm = make(residual=residual, depth=depth, perturbed=False)
        seen = []
        lm.norm.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        lm(ids)
        sizes.append(seen[0].square().mean().sqrt())
    assert sizes[1] < 3 * sizes[0]


def test_kind_is_the_first_key(lm):
    assert next(iter(to_plain(lm.config.residual))) == "kind"


@pytest.mark.costly
def test_it_compiles_without_a_graph_break(make, residual, assert_compiles):
    assert_compiles(make(residual=residual, depth=2))


def test_flops_equal_those_of_torchs_flop_counter(lm):
    h = lm.config.residual.expand(noise(2, 5, 32))
    for part in (lm.blocks[1].mix_residual, lm.blocks[1].feed_residual):
        with FlopCounterMode(display=False) as counter:
            x, kept = part.read(h)
            part.write(h, x, kept)
        assert counter.get_total_flops() == 10 * part.flops()
    block = lm.blocks[0]
    parts = block.mixer.flops(9) + block.feed.flops()
    streams = block.mix_residual.flops() + block.feed_residual.flops()
    assert lm.flops(9) == 3 * (parts + streams) + 2 * 32 * 48


def test_activation_bytes_match_the_saved_tensors(make, residual):
    lm = make(residual=residual, dim=256, dtype=torch.float32)
    part, held = lm.blocks[1].mix_residual, {}
    own = {parameter.untyped_storage().data_ptr() for parameter in part.parameters()}

    def pack(x):
        memory = x.untyped_storage()
        if memory.data_ptr() not in own:
            held[memory.data_ptr()] = (memory.nbytes(), x)
        return x

    h = lm.config.residual.expand(torch.randn(1, 64, 256))
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        x, kept = part.read(h.requires_grad_())
        part.write(h, x + 1, kept)
    total = sum(size for size, _ in held.values()) / 64
    assert part.activation_bytes() <= total <= 1.4 * part.activation_bytes()


def test_the_config_survives_to_dict_and_from_dict(lm):
    assert ModelConfig.from_dict(lm.config.to_dict()) == lm.config
