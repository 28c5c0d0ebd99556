"""RoPE and its scalings against transformers and against the definition of a rotation."""

import math

import pytest
import torch

from tests.oracles.close import close_to
from tinsmith.nn.attention.rope import (
    LinearScaling,
    Llama3Scaling,
    Rope,
    YarnScaling,
    apply_rotary_emb,
    frequencies,
    rotary_tables,
)
from tinsmith.nn.model import LM, ModelConfig

close = close_to(1e-12)


def drawn(*shape, seed=1, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("width", [2, 8, 64])
def test_A2_rotation_equals_that_of_transformers(width):
    """Half-split: dimension i turns with i + d/2."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    x = drawn(2, 9, 3, width)
    positions = torch.stack((torch.arange(9), torch.arange(100, 109)))
    rotary = rotary_tables(Rope(theta=1e4), width, positions, x.dtype)
    angles = positions[..., None] * 1e4 ** (-torch.arange(0, width, 2, dtype=x.dtype) / width)
    cos, sin = (torch.cat((part, part), -1) for part in (angles.cos(), angles.sin()))
    theirs, _ = apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=2)
    close(apply_rotary_emb(x, rotary), theirs)


def test_A2_interleaved_pairs_are_a_permutation_of_halves():
    """Complex products of pairs (2i, 2i + 1) are half-split rotation of [0, 2, ..., 1, 3, ...]."""
    x = drawn(2, 9, 3, 8)
    positions = torch.arange(9)[None]
    turn, _ = frequencies(Rope(theta=1e4), 8, torch.float64, None)
    spin = torch.polar(torch.ones(9, 4, dtype=torch.float64), positions[0][:, None] * turn)
    pairs = torch.view_as_complex(x.unflatten(-1, (4, 2)).contiguous())
    interleaved = torch.view_as_real(pairs * spin[:, None]).flatten(-2)
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    rotary = rotary_tables(Rope(theta=1e4), 8, positions, x.dtype)
    close(apply_rotary_emb(x[..., order], rotary), interleaved[..., order])
    assert not torch.isclose(apply_rotary_emb(x, rotary), interleaved).all()


def test_gradients_are_rotated_back():
    x, upstream = drawn(2, 4, 3, 8).requires_grad_(), drawn(2, 4, 3, 8, seed=2)
    rotary = rotary_tables(Rope(), 8, torch.arange(4)[None], x.dtype)
    assert torch.autograd.gradcheck(lambda x: apply_rotary_emb(x, rotary), (x,))
    apply_rotary_emb(x, rotary).backward(upstream)
    close(apply_rotary_emb(x.grad, rotary), upstream)


def test_rotation_preserves_norms_and_depends_on_distances_only():
    q, k = drawn(1, 1, 1, 16), drawn(1, 1, 1, 16, seed=2)

    def product(t, s):
        turned = [
            apply_rotary_emb(x, rotary_tables(Rope(), 16, torch.tensor([[place]]), x.dtype))
            for x, place in ((q, t), (k, s))
        ]
        close(turned[0].norm(), q.norm())
        return (turned[0] * turned[1]).sum()

    close(product(7, 3), product(1007, 1003), 1e-10)
    assert not torch.isclose(product(7, 3), product(3, 7))
    close(product(0, 0), (q * k).sum())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_tables_are_float32_and_vectors_keep_their_dtype(dtype):
    """Angles of far positions do not survive bf16: tables are at least float32."""
    positions = torch.tensor([[30_001]])
    cos, sin = rotary_tables(Rope(theta=1e6), 8, positions, dtype)
    assert cos.dtype == sin.dtype == torch.promote_types(dtype, torch.float32)
    exact, _ = rotary_tables(Rope(theta=1e6), 8, positions, torch.float64)
    close(cos.double(), exact, 5e-3)
    assert apply_rotary_emb(drawn(1, 1, 2, 8, dtype=dtype), (cos, sin)).dtype == dtype


def theirs(kind, head_dim, theta, context=4096, **scaling):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(
        hidden_size=head_dim * 2,
        num_attention_heads=2,
        head_dim=head_dim,
        max_position_embeddings=context,
        rope_parameters={"rope_type": kind, "rope_theta": theta} | scaling,
    )
    return ROPE_INIT_FUNCTIONS[kind](config, device=torch.device("cpu"))


def equal_to_theirs(rope, head_dim, expected):
    turn, factor = frequencies(rope, head_dim, torch.float32, None)
    torch.testing.assert_close(turn, expected[0], rtol=2e-6, atol=0.0)
    assert factor == pytest.approx(expected[1], rel=1e-12)


@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128])
@pytest.mark.parametrize("theta", [1e4, 5e5, 1e6])
@pytest.mark.parametrize(
    ("factor", "original", "fast", "slow", "attention"),
    [
        (16.0, 2048, 32.0, 1.0, None),
        (16.0, 2048, 32.0, 1.0, 1.0),
        (4.0, 32768, 32.0, 1.0, None),
        (2.5, 512, 4.0, 0.5, 1.3),
        (1.0, 2048, 32.0, 1.0, None),
        (8.0, 65536, 32.0, 1.0, None),
    ],
)
def test_A3_yarn_equals_that_of_transformers(
    head_dim, theta, factor, original, fast, slow, attention
):
    scaling = YarnScaling(
        factor=factor,
        original_max_seq_len=original,
        beta_fast=fast,
        beta_slow=slow,
        attention_factor=attention,
    )
    expected = theirs(
        "yarn",
        head_dim,
        theta,
        factor=factor,
        original_max_position_embeddings=original,
        beta_fast=fast,
        beta_slow=slow,
        **({} if attention is None else {"attention_factor": attention}),
    )
    equal_to_theirs(Rope(theta=theta, scaling=scaling), head_dim, expected)


def test_A3_yarn_scales_attention_logits():
    """cos and sin carry the factor, so that q.k grows by its square."""
    scaling = YarnScaling(factor=16.0, original_max_seq_len=64)
    cos, sin = rotary_tables(Rope(scaling=scaling), 16, torch.tensor([[0, 9]]), torch.float64)
    expected = torch.full((1, 2, 16), (0.1 * math.log(16) + 1) ** 2, dtype=torch.float64)
    close(cos.square() + sin.square(), expected)


@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_linear_scaling_equals_that_of_transformers(head_dim):
    rope = Rope(theta=1e4, scaling=LinearScaling(factor=2.5))
    equal_to_theirs(rope, head_dim, theirs("linear", head_dim, 1e4, factor=2.5))


@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize(("low", "high"), [(1.0, 4.0), (0.5, 8.0)])
def test_llama3_scaling_equals_that_of_transformers(head_dim, low, high):
    scaling = Llama3Scaling(
        factor=8.0, original_max_seq_len=8192, low_freq_factor=low, high_freq_factor=high
    )
    expected = theirs(
        "llama3",
        head_dim,
        5e5,
        context=131072,
        factor=8.0,
        original_max_position_embeddings=8192,
        low_freq_factor=low,
        high_freq_factor=high,
    )
    equal_to_theirs(Rope(theta=5e5, scaling=scaling), head_dim, expected)


def test_scaling_reaches_the_model():
    section = {
        "vocab_size": 48,
        "dim": 32,
        "depth": 1,
        "pattern": [
            {
                "mixer": {"kind": "gqa", "heads": 4},
                "feed_forward": {"kind": "relu2", "hidden_dim": 8},
            }
        ],
    }
    yarn = {"kind": "yarn", "factor": 4, "original_max_seq_len": 16}
    plain, stretched = (
        LM(ModelConfig.from_dict(section | {"rope": {"theta": 1e4, "scaling": scaling}}))
        for scaling in (None, yarn)
    )
    stretched.load_state_dict(plain.state_dict())
    ids = torch.arange(12)[None]
    assert not torch.isclose(plain(ids).logits, stretched(ids).logits).all()
    close(plain(ids[:, :1]).logits, stretched(ids[:, :1]).logits, 1e-6)


def test_A22_rotary_tables_are_not_stored_as_buffers():
    """Tables are computed where they are used, so no cast rounds them and no move leaves them
    behind.
    """
    lm = LM(ModelConfig.preset("minimind2-26m"))
    assert list(lm.buffers()) == []
    assert not any("rope" in name or "freq" in name for name in lm.state_dict())
