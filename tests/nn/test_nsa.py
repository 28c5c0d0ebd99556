"""Native sparse attention against the paper, its limits, and its options."""

import math

import pytest
import torch
from torch import nn

from tests.oracles.close import close_to
from tests.oracles.nsa import nsa
from tinsmith.core.errors import UserError
from tinsmith.nn.attention.core import attend
from tinsmith.nn.attention.rope import Rope, apply_rotary_emb, rotary_tables
from tinsmith.nn.attention.span import Span
from tinsmith.nn.config import ModelConfig
from tinsmith.nn.contract import BuildContext, CannotTruncate, Ctx
from tinsmith.nn.mixers import nsa as module
from tinsmith.nn.mixers.nsa import NSA
from tinsmith.nn.model import LM
from tinsmith.optim.groups import partition

close = close_to(1e-10)

SMALL = {
    **{"heads": 4, "kv_heads": 2, "compress_block": 4, "compress_stride": 2},
    **{"select_block": 8, "select_count": 4, "window": 5},
}
BRANCHES = ("compress", "select", "window")


@pytest.fixture
def make():
    """(keys of the mixer, keys of the model) -> a random float64 model in eval mode."""

    def made(mixer=(), **model):
        torch.manual_seed(0)
        layer = {
            "mixer": {"kind": "nsa"} | SMALL | dict(mixer),
            "feed_forward": {"kind": "swiglu", "hidden_dim": 48},
        }
        section = {"vocab_size": 48, "dim": 32, "depth": 3, "max_seq_len": 512, "pattern": [layer]}
        lm = LM(ModelConfig.from_dict(section | model)).double().eval()
        with torch.no_grad():
            for parameter in lm.parameters():
                parameter += 0.2 * torch.randn_like(parameter)
        return lm

    return made


def alone(first_value=True, **keys):
    """One mixer of width 16 with head width 8 and random float64 weights."""
    torch.manual_seed(0)
    config = NSA(**SMALL | {"heads": 4, "head_dim": 8} | keys)
    mixer = config.build(
        BuildContext(dim=16, layer_idx=0, depth=1, is_value_residual_source=first_value)
    ).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return mixer


def received(mixer, x, segments=None, value=None):
    """Out of a mixer for x (B, T, D) without a cache."""
    positions = torch.arange(x.shape[1]).expand(x.shape[:2])
    rotary = {8: rotary_tables(Rope(), 8, positions, x.dtype)}
    return mixer(x, Ctx(positions, segments, value, rotary))


def noise(*shape, seed=1):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def only(mixer, branch):
    """Set the gates to 1 for one branch and to 0 for the others."""
    with torch.no_grad():
        mixer.branch_gate.weight.zero_()
        wanted = torch.tensor([0.0 if name == branch else -math.inf for name in BRANCHES])
        mixer.branch_gate.bias.copy_(wanted.where(wanted != 0, math.inf).repeat(4))


class Whole(nn.Module):
    """Pools blocks of one token into that token."""

    def forward(self, tokens):
        return tokens.squeeze(-3)


class TestPaper:
    @pytest.mark.parametrize("keys", [{}, {"compress_stride": 4, "select_block": 4, "window": 1}])
    @pytest.mark.parametrize("length", [1, 3, 4, 30])
    def test_the_mixer_equals_the_paper(self, keys, length):
        mixer, x = alone(**keys), noise(1, length, 16)
        expected, _ = nsa(mixer, x[0])
        with torch.no_grad():
            close(received(mixer, x).y[0], expected)

    def test_values_of_the_first_layer_are_mixed_into_the_window(self):
        mixer = alone(first_value=False, value_residual=True)
        x, first = noise(1, 14, 16), noise(1, 14, 2, 8, seed=2)
        with torch.no_grad():
            out = received(mixer, x, value=first)
            close(out.y[0], nsa(mixer, x[0], first[0])[0])
        close(out.value_residual[0].flatten(1), x[0] @ mixer.window_v.weight.T)

    def test_the_same_blocks_are_selected(self, monkeypatch):
        mixer, x, found = alone(select_block=4, select_count=4), noise(1, 40, 16), []
        choose = module.select_blocks
        monkeypatch.setattr(
            module, "select_blocks", lambda *a, **k: found.append(choose(*a, **k)) or found[-1]
        )
        received(mixer, x)
        _, chosen = nsa(mixer, x[0])
        for g, t, blocks in chosen:
            line = found[0][0, g, t]
            assert sorted((line[line >= 0] // 4).tolist()) == blocks
        assert len({tuple(blocks) for _, t, blocks in chosen if t == 39}) == 2


class TestLimits:
    """With nothing left out, each branch is plain causal attention on its own keys and values."""

    def dense(self, mixer, x, k, v, turn=True):
        q = mixer.q_proj(x).unflatten(-1, (4, 8))
        k, v = (linear(x).unflatten(-1, (2, 8)) for linear in (k, v))
        if turn:
            rotary = rotary_tables(Rope(), 8, torch.arange(x.shape[1])[None], x.dtype)
            q, k = apply_rotary_emb(q, rotary), apply_rotary_emb(k, rotary)
        return mixer.o_proj(attend(q, k, v, Span(), kind="naive").flatten(2))

    @pytest.mark.parametrize("length", [1, 8, 9, 40])
    def test_every_block_selected(self, length):
        mixer, x = alone(select_count=5), noise(2, length, 16)
        only(mixer, "select")
        close(received(mixer, x).y, self.dense(mixer, x, mixer.select_k, mixer.select_v))

    def test_if_all_blocks_are_selected_no_scores_are_computed(self, monkeypatch):
        """And nothing is gathered: up to the last token of the last block, in documents too."""
        mixer, found = alone(select_count=5), []
        monkeypatch.setattr(module, "select_blocks", lambda *a, **k: found.append(k["keys"]))
        monkeypatch.setattr(module, "attend_topk_blocks", lambda q, *_, **__: q)
        segments = torch.tensor([[0] * 13 + [1] * 27])
        for length in (1, 39, 40, 41):
            received(mixer, noise(1, length, 16))
        assert found == [41]
        only(mixer, "select")
        ctx = Ctx(
            torch.arange(40)[None],
            segments,
            None,
            {8: rotary_tables(Rope(), 8, torch.arange(40)[None], torch.float64)},
        )
        x = noise(1, 40, 16)
        close(mixer(x, ctx).y[:, :13], received(mixer, x[:, :13]).y)
        monkeypatch.undo()
        chosen = alone(select_count=4)
        only(chosen, "select")
        close(mixer(x, ctx).y, chosen(x, ctx).y)

    @pytest.mark.parametrize("window", [40, 41])
    def test_a_window_of_all_tokens(self, window):
        mixer, x = alone(window=window), noise(2, 40, 16)
        only(mixer, "window")
        close(received(mixer, x).y, self.dense(mixer, x, mixer.window_k, mixer.window_v))

    def test_compress_with_blocks_of_one_token_and_identity_pooling(self):
        """Without rotation: blocks have no position."""
        mixer, x = alone(compress_block=1, compress_stride=1), noise(2, 40, 16)
        mixer.pool_k, mixer.pool_v = Whole(), Whole()
        only(mixer, "compress")
        close(
            received(mixer, x).y,
            self.dense(mixer, x, mixer.compress_k, mixer.compress_v, turn=False),
        )

    def test_the_output_is_the_gated_sum_of_branches(self):
        """Each head its own weight for each branch, from its own token."""
        mixer, x = alone(), noise(2, 30, 16)
        gate, bias = mixer.branch_gate.weight.clone(), mixer.branch_gate.bias.clone()
        gates = (x @ gate.T + bias).sigmoid().unflatten(-1, (4, 3))
        mixer.o_proj = nn.Identity()
        total = received(mixer, x).y.unflatten(-1, (4, 8))
        parts = []
        for branch in BRANCHES:
            only(mixer, branch)
            parts.append(received(mixer, x).y.unflatten(-1, (4, 8)))
        close(total, sum(gates[..., i, None] * part for i, part in enumerate(parts)))
        assert all((part.abs().amax((0, 2, 3))[4:] > 1e-3).all() for part in parts)

    def test_the_window_ends_after_its_length(self):
        mixer, x = alone(), noise(1, 20, 16)
        only(mixer, "window")
        other = x.clone()
        other[:, :10] += 1
        before, after = received(mixer, x).y, received(mixer, other).y
        assert torch.equal(before[:, 14:], after[:, 14:])
        assert (before[:, 13] != after[:, 13]).any()

    def test_no_visible_block_gives_zero_and_not_nan(self):
        mixer, x = alone(), noise(2, 7, 16).requires_grad_()
        only(mixer, "compress")
        for length in (1, 3, 7):
            y = received(mixer, x[:, :length]).y
            assert (y[:, :3] == 0).all()
            (gradient,) = torch.autograd.grad(y.sum(), x)
            assert gradient.isfinite().all()
            assert (length > 3) == bool((y != 0).any())

    def test_pooling_parameters_have_a_gradient_without_blocks(self):
        """None would be taken for a parameter that is not part of the model."""
        mixer = alone()
        received(mixer, noise(1, 3, 16)).y.sum().backward()
        assert all(parameter.grad is not None for parameter in mixer.parameters())
        assert (mixer.pool_k.inner.weight.grad == 0).all()


class TestDecoding:
    SIZES = [1, 3, 4, 5, 7, 8, 9, 97, 256]
    """One token, a compressed block and a selected one with their neighbours, long rows."""

    def agree(self, lm, ids):
        whole = lm(ids).logits
        length = ids.shape[1]
        for splits in ([1] * length, [length], [7] * (length // 7) + [length % 7], [20, length]):
            caches, begin, found = lm.new_caches(len(ids), length), 0, []
            for size in splits:
                found.append(lm(ids[:, begin : begin + size], caches=caches).logits)
                begin += size
            close(torch.cat(found, 1), whole)

    @pytest.mark.parametrize("size", SIZES)
    @torch.no_grad()
    def test_prefill_equals_chunks_equals_one_by_one(self, make, size):
        lm = make({"select_count": 4, "select_block": 4}, depth=2)
        source = torch.Generator().manual_seed(size)
        self.agree(lm, torch.randint(0, 48, (2, size), generator=source))

    @pytest.mark.parametrize("keys", [{}, {"rope": False}])
    @torch.no_grad()
    def test_ties_are_broken_equally(self, make, keys):
        """One token over and over: all blocks look the same."""
        lm = make({"select_count": 4, "select_block": 4} | keys, depth=2)
        self.agree(lm, torch.full((1, 97), 7))
        self.agree(lm, torch.tensor([[7, 7, 9, 9] * 24]))

    @torch.no_grad()
    def test_a_repeated_token_without_positions_selects_the_first_blocks(self, monkeypatch, make):
        lm, found = make({"select_block": 4, "rope": False}, depth=1), []
        choose = module.select_blocks
        monkeypatch.setattr(
            module, "select_blocks", lambda *a, **k: found.append(choose(*a, **k)) or found[-1]
        )
        lm(torch.full((1, 60), 7))
        assert sorted(found[0][0, 0, 59].tolist()) == [0, 4, 52, 56]

    @torch.no_grad()
    def test_cache_bytes_are_counted(self, make):
        (cache, *_) = make().new_caches(3, 30)
        tokens = 30 + 5 + 4 + (30 - 4) // 2 + 1
        assert cache.nbytes() == 3 * 2 * 2 * 8 * tokens * 8

    @torch.no_grad()
    def test_a_long_prompt_needs_no_dense_mask(self, make, monkeypatch):
        """Not through a cache either, whose window forgets on the way."""
        lm, sizes = make(depth=1), []
        visible = Span.mask
        monkeypatch.setattr(Span, "mask", lambda *a: sizes.append(a[1] * a[2]) or visible(*a))
        ids = torch.randint(0, 48, (1, 90), generator=torch.Generator().manual_seed(3))
        caches = lm.new_caches(1, 100)
        lm(ids[:, :50], caches=caches)
        lm(ids[:, 50:], caches=caches)
        lm(ids)
        assert not sizes

    @pytest.mark.parametrize(("window", "block", "kept"), [(8, 4, 1), (3, 6, 4)])
    @torch.no_grad()
    def test_an_impossible_truncation_changes_no_branch(self, make, window, block, kept):
        """Also where one branch could forget and another cannot."""
        keys = {"window": window, "compress_block": block, "compress_stride": block // 2}
        lm = make({"select_block": 2 * block} | keys)
        ids = torch.randint(0, 48, (1, 20), generator=torch.Generator().manual_seed(3))
        caches = lm.new_caches(1, 20)
        lm(ids[:, :5], caches=caches)
        for cache in caches:
            with pytest.raises(CannotTruncate):
                cache.truncate(torch.tensor([kept]))
        found = lm(ids[:, 5:], caches=caches).logits
        close(found, lm(ids).logits[:, 5:])


class TestValueResidual:
    @pytest.mark.parametrize("listening", [1, 2])
    def test_the_first_values_have_gradients_from_every_layer(self, make, listening):
        """With the first layer's own output cut off, its values still reach the loss."""
        lm = make({"value_residual": True})
        with torch.no_grad():
            for layer, block in enumerate(lm.blocks):
                if layer != listening:
                    block.mixer.o_proj.weight.zero_()
        lm(torch.arange(12)[None]).logits.square().sum().backward()
        assert lm.blocks[0].mixer.window_v.weight.grad.abs().max() > 1e-6
        assert lm.blocks[listening].mixer.value_mix.grad.abs().min() > 0

    @torch.no_grad()
    def test_weight_zero_of_the_first_values_equals_the_baseline(self, make):
        plain, mixed = make(), make({"value_residual": True})
        mixed.load_state_dict(plain.state_dict(), strict=False)
        for block in mixed.blocks[1:]:
            block.mixer.value_mix.copy_(torch.tensor([0.0, 1.0]))
        ids = torch.arange(30)[None]
        assert torch.equal(mixed(ids).logits, plain(ids).logits)

    def test_it_combines_with_gqa_of_the_same_shape(self, make):
        first = {
            "mixer": {"kind": "gqa", "heads": 4, "kv_heads": 2, "value_residual": True},
            "feed_forward": {"kind": "swiglu", "hidden_dim": 8},
        }
        lm = make({"value_residual": True}, first=[first])
        assert [block.mixer.value_mix is None for block in lm.blocks] == [True, False, False]
        with pytest.raises(UserError, match="value_residual"):
            make({"value_residual": True, "kv_heads": 4}, first=[first])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"compress_stride": 3}, "compress_block=4 must be a multiple of compress_stride=3"),
        ({"select_block": 7}, "select_block=7 must be a multiple of compress_stride=2"),
        ({"select_block": 2}, "compress_block=4 must be at most select_block=2"),
        ({"window": 0}, "window=0 must be at least 1"),
        ({"select_count": 0}, "select_count=0 must be at least 1"),
        ({"compress_block": 0}, "compress_block=0 must be at least 1"),
        ({"kv_heads": 3}, "heads=4 must be a multiple of kv_heads=3"),
        ({"head_dim": 7}, "head_dim=7 must be even"),
        ({"heads": 5, "kv_heads": 5}, "dim=32 must be a multiple of heads=5"),
        ({"compress_blok": 4}, "compress_block"),
    ],
)
def test_invalid_keys_are_refused_by_name(make, keys, message):
    with pytest.raises(UserError) as refused:
        make(keys)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_defaults_are_those_of_the_paper():
    config = NSA()
    assert (config.compress_block, config.compress_stride) == (32, 16)
    assert (config.select_block, config.select_count, config.window) == (64, 16, 512)
    assert (
        ModelConfig.from_dict(
            {
                **{"vocab_size": 8, "dim": 64, "depth": 1},
                "pattern": [
                    {"mixer": {"kind": "nsa"}, "feed_forward": {"kind": "swiglu", "hidden_dim": 8}}
                ],
            }
        )
        .layers[0]
        .mixer
        == config
    )


def test_gates_have_the_role_router_and_positions_are_no_matrices(make):
    lm = make()
    roles = {name: role for role, group in partition(lm).items() for name, _ in group}
    assert roles["blocks.0.mixer.branch_gate.weight"] == "router"
    assert roles["blocks.0.mixer.branch_gate.bias"] == "vector"
    assert roles["blocks.0.mixer.pool_k.positions"] == "embedding"
    assert roles["blocks.0.mixer.pool_v.inner.weight"] == "matrix"


def test_optimised_and_naive_attention_agree_on_long_rows_with_gradients(make):
    """Packed and padded, long enough for sorting by block and several chunks of queries."""
    ids = torch.randint(0, 48, (2, 200), generator=torch.Generator().manual_seed(3))
    segments = torch.tensor([[-1] * 3 + [4] * 60 + [1] * 137, [0] * 150 + [2] * 31 + [-1] * 19])
    output = []
    for kind in ("sdpa", "naive"):
        lm = make(attention=kind, depth=2)
        logits = lm(ids, segments=segments).logits[segments >= 0]
        logits.square().sum().backward()
        output.append([logits, *(parameter.grad for parameter in lm.parameters())])
    close(*output, 1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_precisions_are_close(make, dtype):
    """Forward and backward over a row that sorts by block; all blocks chosen, so that rounding
    does not choose others.
    """
    ids = torch.randint(0, 48, (2, 60), generator=torch.Generator().manual_seed(3))
    exact, rough = (make({"select_count": 9}, depth=2) for _ in range(2))
    expected, found = exact(ids), rough.to(dtype)(ids)
    error = (found.hidden.double() - expected.hidden).square().mean().sqrt()
    assert error < {torch.float32: 1e-5, torch.float16: 0.01, torch.bfloat16: 0.1}[dtype]
    found.logits.square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in rough.parameters())


@pytest.mark.parametrize(
    "segments", [None, torch.tensor([[-1] * 3 + [4] * 37, [0] * 18 + [1] * 22])]
)
def test_it_compiles_to_one_graph_with_many_tokens(make, segments):
    """One graph, eager's numbers and gradients, where the sorting operator is used."""
    ids = torch.randint(0, 48, (2, 40), generator=torch.Generator().manual_seed(3))
    lm = make(depth=1)
    torch.compiler.reset()
    compiled = torch.compile(lm, fullgraph=True, backend="aot_eager", dynamic=False)
    output = []
    for model in (compiled, lm):
        lm.zero_grad()
        logits = model(ids, segments=segments).logits
        logits.square().sum().backward()
        output.append([logits, *(parameter.grad for parameter in lm.parameters())])
    close(*output)


@pytest.mark.slow
def test_it_compiles_with_the_default_compiler(make):
    """With the default compiler."""
    ids = torch.randint(0, 48, (2, 40), generator=torch.Generator().manual_seed(3))
    lm = make(depth=1).float()
    torch.compiler.reset()
    close(torch.compile(lm, fullgraph=True)(ids).logits, lm(ids).logits, 1e-4)


@pytest.mark.parametrize("context", [1, 3, 4, 7, 31, 32, 33, 60, 257])
def test_flops_are_counted(context):
    """Projections exactly; keys seen by counting them, token by token."""
    mixer = alone(select_count=4)
    inner, outer, hidden = 32, 16, 16
    projections = 2 * 16 * (2 * inner + 6 * outer + 12)
    blocks = [i for i in range(context) if 2 * i + 3 < context]
    pooling = len(blocks) * 2 * 2 * 2 * (4 * 8 * hidden + hidden * 8)
    seen = 0
    for t in range(context):
        seen += min(t + 1, 5) + sum(2 * i + 3 <= t for i in blocks)
        seen += sum(s // 8 >= t // 8 - 3 for s in range(t + 1))  # any 4 blocks, the own among them
    assert mixer.flops(context) == int(projections + (pooling + 4 * inner * seen) / context)


def test_long_contexts_cost_less_than_dense_attention():
    mixer = NSA(head_dim=64).build(BuildContext(dim=512, layer_idx=0, depth=1))
    assert mixer.flops(65536) < 4 * 2 * 8 * 64 * 65536 / 8


class TestFla:
    """flash-linear-attention's plain functions; it pools by the mean over blocks of one size."""

    @pytest.fixture
    def fla(self):
        return pytest.importorskip("fla.ops.nsa.naive")

    def drawn(self):
        return noise(2, 40, 4, 8), noise(2, 40, 2, 8, seed=2), noise(2, 40, 2, 8, seed=3)

    def test_compressed_attention(self, fla):
        q, k, v = self.drawn()
        cut = module.BlockLayout(8, 8)
        seen = Span()
        at = module.block_positions(seen, 40, 40, q.device)
        pooled = [cut.gather_blocks(x, seen).mean(2) for x in (k, v)]
        theirs, _ = fla.naive_nsa_compression(q, *pooled, 8, 1 / math.sqrt(8))
        close(module.attend_compressed(q, *pooled, cut, at), theirs, 1e-5)

    def test_selected_attention(self, fla):
        q, k, v = self.drawn()
        cut = module.BlockLayout(8, 8)
        seen = Span()
        at = module.block_positions(seen, 40, 40, q.device)
        pooled = cut.gather_blocks(k, seen).mean(2)
        begins = module.select_blocks(q, pooled, cut, at, keys=40, size=8, count=4)
        chosen = (begins // 8).where(begins >= 0, -1).transpose(1, 2)
        theirs = fla.naive_nsa_selection(q, k, v, chosen, 8)
        close(module.attend_topk_blocks(q, k, v, begins, at.cache_position_BT, 8), theirs, 1e-5)
