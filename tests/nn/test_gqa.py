"""Grouped-query attention and each of its options."""

import pytest
import torch

from tests.oracles.close import close_to
from tinsmith.nn.mixers.gqa import GQA
from tinsmith.nn.model import LM, ModelConfig

close = close_to(1e-10)


def test_A4_no_biases_unless_requested_and_an_output_projection(small):
    mixer = small().blocks[0].mixer
    assert {name for name, _ in mixer.named_parameters()} == {
        "q_proj.weight",
        "k_proj.weight",
        "v_proj.weight",
        "o_proj.weight",
    }
    assert mixer.k_proj.weight.shape == mixer.v_proj.weight.shape == (16, 32)
    assert mixer.q_proj.weight.shape == mixer.o_proj.weight.shape == (32, 32)


@pytest.mark.parametrize(
    ("bias", "expected"), [("none", set()), ("qkv", {"q", "k", "v"}), ("all", {"q", "k", "v", "o"})]
)
def test_biases_exist_if_requested(small, bias, expected):
    named = dict(small({"bias": bias}).blocks[0].mixer.named_parameters())
    assert {name[0] for name in named if name.endswith("bias")} == expected


def test_A4_heads_are_repeated_after_the_cache(small):
    """The cache holds kv_heads, not heads."""
    (cache, *_) = small().new_caches(batch_size=3, capacity=10)
    assert cache.nbytes() == 3 * 10 * 2 * 2 * 8 * 8
    wide = small({"head_dim": 20, "kv_heads": 1}).new_caches(3, 10)[0]
    assert wide.nbytes() == 3 * 10 * 2 * 1 * 20 * 8


def test_a_window_cache_holds_only_the_window(small):
    sizes = [small({"window": 4}).new_caches(2, capacity)[0].nbytes() for capacity in (2, 4, 99)]
    assert sizes == [2 * size * 2 * 2 * 8 * 8 for size in (2, 4, 4)]


def test_more_heads_than_groups_equal_repeated_groups(small, ids):
    """kv_heads 2 of 4 is plain attention whose key and value heads come in equal pairs."""
    grouped, full = small({"kv_heads": 2}), small({"kv_heads": 4})
    state = grouped.state_dict()
    for name in [name for name in state if "k_proj" in name or "v_proj" in name]:
        state[name] = state[name].unflatten(0, (2, 8)).repeat_interleave(2, 0).flatten(0, 1)
    full.load_state_dict(state)
    close(full(ids).logits, grouped(ids).logits)


def test_head_norms_make_scores_independent_of_the_size_of_q(small, ids):
    plain, normed = small(), small({"qk_norm": True})
    expected = [model(ids).logits for model in (plain, normed)]
    with torch.no_grad():
        for model in (plain, normed):
            for block in model.blocks:
                block.mixer.q_proj.weight *= 10
                block.mixer.k_proj.weight *= 10
    close(normed(ids).logits, expected[1], 1e-3)
    assert (plain(ids).logits - expected[0]).abs().max() > 0.1


def test_without_rope_the_order_of_tokens_has_no_effect(small, ids):
    """The last token sees a bag of words; with RoPE it does not."""
    order = torch.tensor([3, 0, 2, 1, 4, 5, 6, 8, 7, 9, 10, 11])
    for rope, same in ((False, True), (True, False)):
        lm = small({"rope": rope}, depth=1)
        found, mixed = lm(ids).logits[:, -1], lm(ids[:, order]).logits[:, -1]
        assert torch.allclose(found, mixed) == same


def test_sinks_take_weight_from_the_tokens(small, ids):
    lm = small({"sinks": True})
    before = lm(ids).logits
    with torch.no_grad():
        for block in lm.blocks:
            block.mixer.sinks.fill_(60.0)
        drowned = lm(ids).hidden
        for block in lm.blocks:
            block.mixer.o_proj.weight.zero_()
    close(drowned, lm(ids).hidden)
    assert not torch.isclose(before, lm(ids).logits).all()


def test_sinks_start_at_zero_as_one_more_key(section):
    lm = LM(ModelConfig.from_dict(section({"sinks": True})))
    assert all((block.mixer.sinks == 0).all() for block in lm.blocks)


class TestValueResidual:
    """v = l1 v_first + l2 v_here (2410.17897)."""

    MIXER = {"value_residual": True}

    def test_the_first_layer_provides_values_and_later_layers_mix_them(self, small):
        mixes = [block.mixer.value_mix for block in small(self.MIXER).blocks]
        assert mixes[0] is None
        assert [tuple(mix.shape) for mix in mixes[1:]] == [(2,), (2,)]

    def test_mixing_starts_at_one_half(self, section):
        lm = LM(ModelConfig.from_dict(section(self.MIXER)))
        assert [block.mixer.value_mix.tolist() for block in lm.blocks[1:]] == [[0.5, 0.5]] * 2

    def test_weights_zero_and_one_equal_the_baseline(self, small, ids):
        plain, mixed = small(), small(self.MIXER)
        missing = mixed.load_state_dict(plain.state_dict(), strict=False)
        assert not missing.unexpected_keys
        with torch.no_grad():
            for block in mixed.blocks[1:]:
                block.mixer.value_mix.copy_(torch.tensor([0.0, 1.0]))
        assert torch.equal(mixed(ids).logits, plain(ids).logits)

    def test_weights_one_and_zero_use_the_first_layers_values(self, small, ids):
        lm = small(self.MIXER)
        with torch.no_grad():
            for block in lm.blocks[1:]:
                block.mixer.value_mix.copy_(torch.tensor([1.0, 0.0]))
        before = lm(ids).logits
        with torch.no_grad():
            for block in lm.blocks[1:]:
                block.mixer.v_proj.weight.add_(1.0)
        assert torch.equal(lm(ids).logits, before)

    def test_the_first_value_projection_has_gradients_from_every_layer(self, small, ids):
        """With the first layer's own output cut off, its values still reach the loss."""
        for listening in (1, 2):
            lm = small(self.MIXER)
            with torch.no_grad():
                for layer, block in enumerate(lm.blocks):
                    if layer != listening:
                        block.mixer.o_proj.weight.zero_()
            lm(ids).logits.square().sum().backward()
            assert lm.blocks[0].mixer.v_proj.weight.grad.abs().max() > 1e-6
            assert lm.blocks[listening].mixer.value_mix.grad.abs().min() > 0

    def test_decoding_stores_mixed_values(self, small, ids):
        lm = small(self.MIXER)
        caches = lm.new_caches(2, 12)
        found = [lm(ids[:, t : t + 1], caches=caches).logits for t in range(12)]
        close(torch.cat(found, 1), lm(ids).logits)

    def test_layers_without_value_residual_are_skipped(self, section, ids):
        """The first layer with the option provides the values, at any depth; others are skipped."""
        feed = {"kind": "relu2", "hidden_dim": 8}
        silent = {"mixer": {"kind": "gqa", "heads": 2}, "feed_forward": feed}
        taking = {
            "mixer": {"kind": "gqa", "heads": 4, "kv_heads": 2, "value_residual": True},
            "feed_forward": feed,
        }
        config = section(depth=5, first=[silent], pattern=[taking, silent])
        lm = LM(ModelConfig.from_dict(config)).double()
        mixing = [block.mixer.value_mix is not None for block in lm.blocks]
        assert mixing == [False, False, False, True, False]
        caches = lm.new_caches(2, 12)
        found = [lm(ids[:, t : t + 1], caches=caches).logits for t in range(12)]
        close(torch.cat(found, 1), lm(ids).logits)


def test_flops_are_counted(small):
    """Projections exactly; scores and sums over the keys seen on average, by counting them."""
    projections = 2 * 32 * (32 + 16 + 16 + 32)
    for window in (None, 5):
        mixer = small({"window": window}).blocks[0].mixer
        for context in (1, 5, 12):
            seen = sum(min(t + 1, window or context) for t in range(context)) / context
            assert mixer.flops(context) == int(projections + 2 * 2 * 32 * seen)


def test_projection_widths():
    assert GQA(heads=8).resolve_head_dim(64) == 8
    assert GQA(heads=8, head_dim=12).resolve_head_dim(64) == 12
    assert (GQA(heads=8).num_kv_heads, GQA(heads=8, kv_heads=2).num_kv_heads) == (8, 2)
