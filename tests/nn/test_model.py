"""The model around its parts: positions, heads, caches, patterns, first losses."""

import math

import pytest
import torch
import torch.nn.functional as F

from tests.oracles.close import close_to
from tinsmith.core.errors import UserError
from tinsmith.nn.config import presets
from tinsmith.nn.contract import FeedForward, OptimizerReset, Out, Routed
from tinsmith.nn.model import LM, ModelConfig, ModelOut

close = close_to(1e-10)

COUNTS = {
    "minimind2-26m": (25_829_888, 25_829_888),
    "minimind2-104m": (104_030_976, 104_030_976),
    "minimind2-145m-moe": (145_029_760, 91_945_600),
    "minimind3-64m": (63_912_192, 63_912_192),
    "minimind3-198m-moe": (198_416_640, 63_936_768),
    "tiny-onn-0.6b": (596_968_320, 464_847_744),
    "tiny-r2-dense": (30_325_012, 30_325_012),
    "tiny-r2": (47_130_900, 21_965_076),
}
"""All parameters, and those that one token meets."""
LARGE = ("tiny-onn-0.6b",)


@pytest.mark.parametrize("name", presets())
def test_presets_have_exactly_the_published_number_of_parameters(name):
    with torch.device("meta"):
        lm = LM(ModelConfig.preset(name))
    assert (lm.parameter_count(), lm.active_parameter_count()) == COUNTS[name]


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if name in LARGE else []) for name in presets()],
)
def test_the_first_loss_of_presets_is_ln_v(name):
    torch.manual_seed(1)
    lm = LM(ModelConfig.preset(name)).eval()
    vocabulary = lm.config.vocab_size
    ids = torch.randint(0, vocabulary, (2, 65))
    with torch.no_grad():
        logits = lm(ids[:, :-1]).logits
    loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(vocabulary), rel=0.05)


@pytest.mark.parametrize("positions", ["rope", "learned", "sinusoidal", "none"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("depth", [1, 16])
def test_the_first_loss_is_ln_v(section, positions, tied, norm, depth):
    """Also for text that repeats, where a tied head could favour the input."""
    config = section(
        vocab_size=500,
        dim=64,
        depth=depth,
        positions=positions,
        tie_embeddings=tied,
        norm=norm,
    )
    lm = LM(ModelConfig.from_dict(config))
    random = torch.randint(0, 500, (8, 33))
    for ids in (random, random[:, :1].expand(-1, 33)):
        logits = lm(ids[:, :-1], logits=True).logits
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        assert loss.item() == pytest.approx(math.log(500), rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_what_the_model_returns(small, ids, dtype):
    lm = small().to(dtype)
    out = lm(ids)
    assert ModelOut._fields == ("logits", "losses", "stats", "grad_probes", "hidden")
    assert out.logits.shape == (2, 12, 48)
    assert out.logits.dtype == torch.promote_types(dtype, torch.float32)
    assert out.hidden.shape == (2, 12, 32)
    assert out.hidden.dtype == dtype
    assert (out.losses, out.stats, out.grad_probes) == ({}, {}, {})
    assert torch.equal(lm.head(out.hidden), out.logits)


def test_hidden_is_after_the_final_norm(small, ids):
    lm = small()
    before = lm(ids).hidden
    with torch.no_grad():
        lm.norm.weight *= 2
    close(lm(ids).hidden, 2 * before)


def test_a_tied_head_is_the_embedding(small):
    tied, untied = small(), small(tie_embeddings=False)
    assert tied.head.weight is tied.embed.weight
    assert untied.head.weight is not untied.embed.weight
    assert untied.parameter_count() - tied.parameter_count() == 48 * 32
    tied.load_state_dict({name: x + 1 for name, x in tied.state_dict().items()})
    assert tied.head.weight is tied.embed.weight


@pytest.mark.parametrize("positions", ["rope", "learned", "sinusoidal", "none"])
def test_positions_restart_in_packed_rows_and_skip_padding(small, ids, positions):
    lm = small(positions=positions)
    segments = torch.tensor([[-1, -1, 5, 5, 5, 5, 0, 0, 0, 0, 0, -1]])
    found = lm(ids[:1], segments=segments).logits
    for begin, end in ((2, 6), (6, 11)):
        close(found[:, begin:end], lm(ids[:1, begin:end]).logits)


@pytest.mark.parametrize("positions", ["rope", "learned", "sinusoidal", "none"])
def test_A22_positions_continue_from_the_cache(small, ids, positions):
    """Rotations that restart at 0 in every call make chunks differ from the whole."""
    lm = small(positions=positions)
    expected = lm(ids).logits
    caches = lm.new_caches(2, 12)
    found = [
        lm(ids[:, begin:end], caches=caches).logits for begin, end in ((0, 5), (5, 6), (6, 12))
    ]
    close(torch.cat(found, 1), expected)
    caches = lm.new_caches(2, 12)
    segments = torch.tensor([[-1] * 3 + [0] * 4, [0] * 7])
    start = torch.stack((ids[0].roll(3)[:7], ids[1, :7]))
    lm(start, segments=segments, caches=caches)
    found = lm(torch.stack((ids[0, 4:6], ids[1, 7:9])), caches=caches).logits
    close(found, torch.stack((expected[0, 4:6], expected[1, 7:9])))


def test_A23_decoding_feeds_the_last_token_only(small, ids):
    """The cache grows by one a step; feeding the whole sequence again would double it."""
    lm = small()
    caches = lm.new_caches(2, 12)
    lm(ids[:, :9], caches=caches)
    for t in range(9, 12):
        found = lm(ids[:, t : t + 1], caches=caches)
        assert [cache.lengths.tolist() for cache in caches] == [[t + 1] * 2] * 3
        assert found.logits.shape == (2, 1, 48)
        close(found.logits[:, 0], lm(ids[:, : t + 1]).logits[:, -1])


def test_explicit_positions_are_used(small, ids):
    rope, learned = small(), small(positions="learned")
    given = torch.arange(30, 42).expand(2, 12)
    close(rope(ids, positions=given).logits, rope(ids).logits)
    assert not torch.isclose(learned(ids, positions=given).logits, learned(ids).logits).all()
    stretched = torch.arange(0, 24, 2).expand(2, 12)
    assert not torch.isclose(rope(ids, positions=stretched).logits, rope(ids).logits).all()


def test_learned_positions_are_added_to_the_embedding(small, ids):
    lm = small(positions="learned", max_seq_len=16)
    assert lm.places.weight.shape == (16, 32)
    assert small().places is None
    with torch.no_grad():
        expected = lm(ids).logits
        lm.embed.weight += 1.0
        lm.places.weight -= 1.0
        lm.head.weight = torch.nn.Parameter(lm.embed.weight - 1.0)
    close(lm(ids).logits, expected)
    with pytest.raises(UserError, match="17 tokens in a row are beyond max_seq_len=16"):
        lm(torch.zeros(1, 17, dtype=torch.long))
    with pytest.raises(UserError, match="17 tokens in a row are beyond max_seq_len=16"):
        lm(torch.zeros(1, 17, dtype=torch.long), segments=torch.zeros(1, 17, dtype=torch.long))


@pytest.mark.parametrize("positions", ["rope", "learned", "none"])
@pytest.mark.parametrize("capacity", [17, 0, -1])
def test_decoding_past_the_maximum_context_is_refused_in_one_line(small, positions, capacity):
    lm = small(positions=positions, max_seq_len=16)
    lm.new_caches(1, 16)
    expected = f"capacity={capacity} tokens of a cache must be from 1 to max_seq_len=16"
    with pytest.raises(UserError) as refused:
        lm.new_caches(1, capacity)
    assert str(refused.value) == expected


def test_sinusoidal_positions_equal_the_paper(small, ids):
    """Sines and cosines of 10000^(-2i/d) t, in halves rather than alternating."""
    lm, silent = small(positions="sinusoidal"), small(positions="none")
    t, i = torch.arange(12)[:, None], torch.arange(16)
    angles = t / 10000.0 ** (2 * i.double() / 32)
    table = torch.cat((angles.sin(), angles.cos()), -1)
    with torch.no_grad():
        for model in (lm, silent):
            for block in model.blocks:
                block.mixer.o_proj.weight.zero_()
                block.feed.down_proj.weight.zero_()
        expected = F.rms_norm(lm.embed(ids) + table, (32,), lm.norm.weight, 1e-5)
    close(lm(ids).hidden, expected, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_caches_follow_the_parameters_at_the_time_of_the_call(small, dtype):
    lm = small()
    held = lm.new_caches(1, 8)[0].nbytes() // 8
    lm.to(dtype)
    assert lm.new_caches(1, 8)[0].nbytes() == held * dtype.itemsize
    assert lm.new_caches(1, 8, dtype=torch.float32)[0].nbytes() == held * 4
    lm.to("meta")
    assert lm.new_caches(1, 8)[0].lengths.is_meta


def test_windows_and_whole_contexts_mix(section, ids):
    """first, pattern and last: a window, then whole and window in turns, then no rotation."""
    feed = {"kind": "relu2", "hidden_dim": 8}

    def layer(**mixer):
        return {"mixer": {"kind": "gqa", "heads": 4, **mixer}, "feed_forward": feed}

    config = ModelConfig.from_dict(
        section(
            depth=6,
            first=[layer(window=3)],
            pattern=[layer(), layer(window=5, sinks=True)],
            last=[layer(rope=False)],
        )
    )
    assert [x.mixer.window for x in config.layers] == [3, None, 5, None, 5, None]
    lm = LM(config).double()
    expected = lm(ids).logits
    for splits in ([1] * 12, [7, 1, 1, 3]):
        caches = lm.new_caches(2, 12)
        begin, found = 0, []
        for length in splits:
            found.append(lm(ids[:, begin : begin + length], caches=caches).logits)
            begin += length
        close(torch.cat(found, 1), expected)


def test_a_change_of_the_first_token_reaches_as_far_as_the_windows(small):
    lm = small({"window": 3}, depth=2)
    ids = torch.arange(12)[None]
    changed = ids.clone()
    changed[0, 0] = 40
    moved = (lm(changed).logits - lm(ids).logits).abs().amax((0, 2)) > 0
    assert moved.tolist() == [True] * 5 + [False] * 7


def test_checkpointing_recomputes_in_training_and_nowhere_else(small, ids):
    lm = small()
    lm.activation_checkpointing = True
    calls = []
    lm.blocks[1].register_forward_pre_hook(lambda *_: calls.append(1))
    lm.train()(ids).logits.sum().backward()
    assert len(calls) == 2
    lm.eval()(ids).logits.sum().backward()
    assert len(calls) == 3
    with torch.no_grad():
        lm.train()(ids)
    assert len(calls) == 4


def test_activation_checkpointing_saves_less_memory(small):
    """Bytes saved for the backward pass, with and without."""
    kept = []
    for checkpointing in (False, True):
        lm = small(depth=6).train()
        lm.activation_checkpointing = checkpointing
        total = 0

        def pack(x):
            nonlocal total
            total += x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            lm(torch.zeros(4, 64, dtype=torch.long), logits=False)
        kept.append(total)
    assert kept[1] < 0.3 * kept[0]


class ProbeFeedForward(FeedForward, Routed):
    """Returns every kind of output."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.received = layer, []
        self.weight = torch.nn.Parameter(torch.ones(3))

    def forward(self, x, ctx):
        layer = torch.tensor(float(self.layer))
        return Out(x, {"balance": layer}, {"load": layer + 10}, {"norms": layer + 20})

    def after_backward(self, grad_probes):
        self.received.append(grad_probes)
        return {"heard": grad_probes["norms"]}

    def post_step(self, stats):
        self.received.append(stats)
        return [OptimizerReset(self.weight, torch.tensor([self.layer]))]


def test_layer_outputs_are_named_by_layer_and_returned_to_it(small, ids):
    lm = small()
    for layer in (0, 2):
        lm.blocks[layer].feed = ProbeFeedForward(layer)
    out = lm(ids)
    assert {name: x.item() for name, x in out.losses.items()} == {
        "0.feed.balance": 0,
        "2.feed.balance": 2,
    }
    assert set(out.stats) == {"0.feed.load", "2.feed.load"}
    output = lm.after_backward(out.grad_probes)
    assert output == {"0.feed.heard": 20, "2.feed.heard": 22}
    resets = lm.post_step(out.stats)
    assert [reset.rows.item() for reset in resets] == [0, 2]
    for layer in (0, 2):
        feed = lm.blocks[layer].feed
        assert feed.received == [{"norms": layer + 20}, {"load": layer + 10}]


def test_flops_are_those_of_blocks_and_head(small):
    lm = small()
    block = lm.blocks[0]
    expected = 3 * (block.mixer.flops(64) + block.feed.flops()) + 2 * 32 * 48
    assert lm.flops(64) == expected
