"""Multi-head latent attention: against DeepSeek-V3's in transformers, and its two ways of
attending against each other.
"""

import pytest
import torch

from tests.oracles.close import close_to
from tinsmith.nn.attention.rope import Rope, YarnScaling, rotary_tables
from tinsmith.nn.attention.span import Span
from tinsmith.nn.contract import BuildContext, Ctx
from tinsmith.nn.mixers.mla import MLA
from tinsmith.nn.model import LM, ModelConfig

close = close_to(1e-10)

DIM, TOKENS = 40, 13
SIZES = [
    {"heads": 4, "kv_rank": 8, "q_rank": 12, "nope_dim": 6, "rope_dim": 4, "v_dim": 10},
    {"heads": 3, "kv_rank": 24, "q_rank": None, "nope_dim": 4, "rope_dim": 8, "v_dim": 5},
]


@pytest.fixture(params=SIZES, ids=["q_rank", "straight"])
def config(request):
    return MLA(**request.param)


def mixer_of(config, dtype=torch.float64, rope=None):
    torch.manual_seed(0)
    factor = 1.0 if rope is None else rope.attention_scaling
    mixer = config.build(BuildContext(DIM, 0, 1, attention_scaling=factor)).to(dtype).eval()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return mixer


def context(config, rope=None, rows=2, dtype=torch.float64):
    positions = torch.arange(TOKENS).expand(rows, -1)
    rotary = rotary_tables(rope or Rope(), config.rope_dim, positions, dtype)
    return Ctx(positions, None, None, {config.rope_dim: rotary})


def noise(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(1))


def theirs_of(mixer, config, scaling=None):
    """transformers' module with the same weights; its turned parts come in pairs."""
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
        DeepseekV3Attention,
        DeepseekV3Config,
        DeepseekV3RotaryEmbedding,
    )

    settings = DeepseekV3Config(
        hidden_size=DIM,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        kv_lora_rank=config.kv_rank,
        q_lora_rank=config.q_rank,
        qk_nope_head_dim=config.nope_dim,
        qk_rope_head_dim=config.rope_dim,
        v_head_dim=config.v_dim,
        max_position_embeddings=64,
        rope_parameters={"rope_theta": 10000.0, "rope_type": "default"} | (scaling or {}),
        rope_interleave=False,
        attn_implementation="eager",
    )
    theirs = DeepseekV3Attention(settings, 0).eval()
    names = {
        "queries.down": "q_a_proj",
        "queries.norm": "q_a_layernorm",
        "queries.up": "q_b_proj",
        "queries.straight": "q_proj",
        "keys.down": "kv_a_proj_with_mqa",
        "keys.norm": "kv_a_layernorm",
        "keys.up": "kv_b_proj",
        "o_proj": "o_proj",
    }
    state = {}
    for name, tensor in mixer.state_dict().items():
        module, _, leaf = name.rpartition(".")
        state[f"{names[module]}.{leaf}"] = tensor
    theirs.load_state_dict(state)
    return theirs, DeepseekV3RotaryEmbedding(settings)


STRETCHED = YarnScaling(factor=4.0, original_max_seq_len=16)
IN_THEIR_WORDS = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}


@pytest.mark.parametrize(("scaling", "words"), [(None, None), (STRETCHED, IN_THEIR_WORDS)])
def test_outputs_and_gradients_equal_deepseek_v3(config, scaling, words):
    rope = Rope(scaling=scaling)
    mixer = mixer_of(config, torch.float32, rope)
    theirs, embedding = theirs_of(mixer, config, words)
    x = noise(2, TOKENS, DIM, dtype=torch.float32).requires_grad_()
    positions = torch.arange(TOKENS).expand(2, -1)
    mask = torch.full((TOKENS, TOKENS), -torch.inf).triu(1)[None, None]
    expected = theirs(x, embedding(x, positions), mask)[0]
    found = mixer(x, context(config, rope, dtype=torch.float32)).y
    close(found, expected, 1e-5)
    weight = noise(2, TOKENS, DIM, dtype=torch.float32)
    grads = [torch.autograd.grad((y * weight).sum(), x)[0] for y in (found, expected)]
    close(grads[0], grads[1], 1e-4)


def test_absorbed_equals_expanded(config):
    mixer = mixer_of(config)
    nope, turned, _ = mixer.queries(noise(2, 3, DIM), None)
    latent, key = mixer.keys(noise(2, TOKENS, DIM), None)
    seen = Span(torch.zeros(2, 3, dtype=torch.long), torch.tensor([[4, 9, 12], [0, 1, 2]]))
    ways = (mixer._absorbed, mixer._expanded)
    close(*(way(nope, turned, latent, key, seen) for way in ways), 1e-12)


def test_the_cheaper_of_absorbed_and_expanded_is_used(config):
    """Few queries are absorbed, many expanded, unless a latent is no wider than half of that."""
    narrow = 2 * config.kv_rank <= config.nope_dim + config.v_dim
    assert config.prefer_absorbed(1)
    assert config.prefer_absorbed(10**6) == narrow
    large = MLA(heads=128, kv_rank=512, q_rank=1536, nope_dim=128, rope_dim=64, v_dim=128)
    assert large.prefer_absorbed(170)
    assert not large.prefer_absorbed(171)


def test_a_cache_holds_one_latent_and_one_rotated_key_per_token(config):
    held = mixer_of(config).new_cache(3, 10, torch.float64, torch.device("cpu"))
    assert held.nbytes() == 3 * 10 * (config.kv_rank + config.rope_dim) * 8
    assert [tensor.shape[2:] for tensor in held.tensors] == [
        (config.kv_rank,),
        (config.rope_dim,),
    ]


def test_the_default_sizes_cache_96_numbers_per_token():
    mixer = MLA().build(BuildContext(512, 0, 1))
    assert mixer.new_cache(1, 1, torch.float32, torch.device("cpu")).nbytes() == 96 * 4


def test_A9_the_shared_key_is_not_divided_by_the_number_of_heads():
    """Only the rotated parts of q and k contribute to the logits; the other parts are 0."""
    config = MLA(**SIZES[0])
    mixer = mixer_of(config)
    with torch.no_grad():
        mixer.keys.up.weight.unflatten(0, (4, 16))[:, :6] = 0.0
    x, ctx = noise(1, TOKENS, DIM), context(config, rows=1)
    rotary = ctx.rotary[4]
    _, turned, _ = mixer.queries(x, rotary)
    latent, key = mixer.keys(x, rotary)
    scores = torch.einsum("bthr,bsr->bhts", turned, key) / (6 + 4) ** 0.5
    hidden = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    _, values = mixer.keys.expand(latent, key)
    expected = mixer.o_proj(torch.einsum("bhts,bshv->bthv", weights, values).flatten(2))
    close(mixer(x, ctx).y, expected)


def test_without_rope_nothing_is_rotated():
    layer = {
        "mixer": {"kind": "mla", **SIZES[0]},
        "feed_forward": {"kind": "relu2", "hidden_dim": 8},
    }
    sizes = {"vocab_size": 11, "dim": DIM, "depth": 2, "pattern": [layer]}
    torch.manual_seed(0)
    lm = LM(ModelConfig.from_dict(sizes | {"positions": "none"})).double().eval()
    assert all(block.mixer.rotary_dim is None for block in lm.blocks)
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    close(lm(ids, positions=torch.tensor([[9, 9, 9, 9, 9]])).logits, lm(ids).logits)


@pytest.mark.parametrize(
    ("sizes", "output"),
    [
        ({"rope_dim": 5}, "rope_dim=5 must be even"),
        ({"kv_rank": 0}, "kv_rank=0 must be at least 1"),
        ({"q_rank": 0}, "q_rank=0 must be at least 1"),
        ({"heads": 0}, "heads=0 must be at least 1"),
    ],
)
def test_invalid_sizes_give_one_line(sizes, output):
    with pytest.raises(ValueError, match=output):
        MLA(**sizes)


def test_flops_count_projections_and_pairs():
    config = MLA()
    mixer = config.build(BuildContext(512, 0, 1))
    weights = 512 * 96 + 96 * 8 * 96 + 512 * 96 + 32 * 8 * 64 + 8 * 32 * 512
    pairs = 8 * (32 + 64 + 32) * (100 + 1)
    assert mixer.flops(100) == 2 * weights + pairs
