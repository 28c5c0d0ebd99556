"""Tiny-R2's hybrid attention against its description, its dense limit, and its modes."""

import pytest
import torch
import torch.nn.functional as F

from tests.oracles.close import close_to
from tests.oracles.hybrid import hybrid as oracle
from tinsmith.nn.attention import indexer
from tinsmith.nn.attention.rope import Rope, YarnScaling, rotary_tables
from tinsmith.nn.contract import BuildContext, Ctx
from tinsmith.nn.layers.stable_topk import stable_topk
from tinsmith.nn.mixers.hybrid import MODES, Hybrid
from tinsmith.nn.mixers.mla import MLA
from tinsmith.nn.model import LM, ModelConfig

close = close_to(1e-10)

DIM, TOKENS = 24, 22
LATENT = {"heads": 2, "kv_rank": 8, "q_rank": 12, "nope_dim": 6, "rope_dim": 4, "v_dim": 5}
SMALL = LATENT | {
    "compress_block": 4,
    "window": 5,
    "index_topk": 3,
    "index_heads": 3,
    "index_dim": 6,
}
FEED = {"kind": "relu2", "hidden_dim": 48}


def noise(*shape, seed=1):
    source = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=source)


def mixer_of(config, **build_ctx):
    torch.manual_seed(0)
    mixer = config.build(BuildContext(DIM, 0, 1, **build_ctx)).double().eval()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return mixer


def context(rows=1, begin=0, rope=None, segments=None):
    positions = torch.arange(begin, begin + TOKENS).expand(rows, -1)
    rotary = rotary_tables(rope or Rope(), 4, positions, torch.float64)
    return Ctx(positions, segments, None, {4: rotary})


def chosen_by(mixer, x, ctx):
    """Positions to which the select branch attends."""
    branch, rotary = mixer.branches["select"], ctx.rotary[4]
    _, _, source = mixer.queries(x, rotary)
    scores = indexer.index_scores(branch.indexer(x, source, rotary))[0]
    hidden = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
    best = stable_topk(scores.masked_fill(hidden, -torch.inf), mixer.config.index_topk).tolist()
    return [[s for s in row if s <= t] for t, row in enumerate(best)]


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
@pytest.mark.parametrize("mode", list(MODES))
def test_every_mode_equals_its_description(mode, gate):
    mixer = mixer_of(Hybrid(**SMALL, mode=mode, gate=gate))
    x, ctx = noise(1, TOKENS, DIM), context()
    chosen = chosen_by(mixer, x, ctx) if "select" in mixer.config.branch_names else []
    with torch.no_grad():
        wanted = oracle(mixer.state_dict(), mixer.config, x[0], chosen)
        close(mixer(x, ctx).y[0], wanted)


def test_A16_modes_have_the_branches_of_the_documents_table():
    assert MODES == {
        "nsa": ("compress", "select", "window"),
        "swa": ("compress", "window"),
        "dsa": ("compress", "select"),
    }
    assert Hybrid().branch_names == MODES["nsa"]
    assert Hybrid(branches=("window",)).branch_names == ("window",)


def test_A18_only_the_branches_of_the_mode_have_parameters():
    for mode, names in MODES.items():
        found = {name.split(".")[1] for name, _ in _parameters(mode) if name.startswith("branches")}
        assert found == set(names)
    alone = mixer_of(Hybrid(**SMALL, branches=("window",)))
    assert alone.branch_gate is None
    assert not any("gate" in name for name, _ in alone.named_parameters())


def _parameters(mode):
    return mixer_of(Hybrid(**SMALL, mode=mode)).named_parameters()


@pytest.mark.parametrize("scaling", [None, YarnScaling(factor=4.0, original_max_seq_len=8)])
def test_blocks_of_one_token_equal_mla(scaling):
    rope = Rope(scaling=scaling)
    sizes = SMALL | {"compress_block": 1, "branches": ("compress",)}
    ours = mixer_of(Hybrid(**sizes), attention_scaling=rope.attention_scaling)
    mla = mixer_of(MLA(**LATENT), attention_scaling=rope.attention_scaling)
    state = ours.state_dict()
    mla.load_state_dict({k.replace("branches.compress.", ""): v for k, v in state.items()})
    x = noise(2, TOKENS, DIM)
    for segments in (None, torch.tensor([[0] * 9 + [1] * 13, [-1] * 4 + [2] * 18])):
        ctx = context(2, rope=rope, segments=segments)
        real = torch.ones(2, TOKENS, dtype=torch.bool) if segments is None else segments >= 0
        close(ours(x, ctx).y[real], mla(x, ctx).y[real])


def test_A6_a_branch_without_a_complete_block_contributes_zero():
    """Before the first block is whole, and then the same for any number of tokens to come."""
    mixer = mixer_of(Hybrid(**SMALL, branches=("compress",)))
    x = noise(1, TOKENS, DIM)
    y = mixer(x, context()).y
    assert torch.equal(y[:, :3], torch.zeros(1, 3, DIM, dtype=torch.float64))
    assert (y[:, 3:].abs().amax(-1) > 0).all()


def test_A4_the_window_branch_sees_exactly_its_window():
    mixer = mixer_of(Hybrid(**SMALL, branches=("window",)))
    x = noise(1, TOKENS, DIM)
    changed = x.clone()
    changed[:, 4] += 1.0
    moved = (mixer(changed, context()).y - mixer(x, context()).y).abs().amax(-1)[0] > 0
    assert moved.nonzero().flatten().tolist() == [4, 5, 6, 7, 8]


def test_A8_outputs_depend_on_relative_positions_only():
    """Keys of blocks and of selected tokens are rotated by the positions of their tokens."""
    mixer = mixer_of(Hybrid(**SMALL, mode="nsa"))
    x = noise(1, TOKENS, DIM)
    close(mixer(x, context(begin=1000)).y, mixer(x, context()).y, 1e-8)


def test_A3_gates_depend_on_their_own_token_only():
    mixer = mixer_of(Hybrid(**SMALL, mode="swa"))
    output = [noise(1, TOKENS, 2, 5, seed=s) for s in (5, 6)]
    x = noise(1, TOKENS, DIM)
    changed = x.clone()
    changed[:, 10] += 1.0
    moved = (mixer._mix(changed, output) - mixer._mix(x, output)).abs().amax((0, 2, 3)) > 0
    assert moved.nonzero().flatten().tolist() == [10]


def test_softmax_gates_sum_to_one_and_sigmoid_gates_need_not():
    ones = [torch.ones(1, TOKENS, 2, 5, dtype=torch.float64)] * 3
    x = noise(1, TOKENS, DIM)
    close(mixer_of(Hybrid(**SMALL))._mix(x, ones), ones[0])
    total = mixer_of(Hybrid(**SMALL, gate="sigmoid"))._mix(x, ones)
    assert (total - 1).abs().min() > 1e-6


def test_the_indexer_loss_exists_in_training_if_tokens_are_selected():
    for mode, names in MODES.items():
        mixer = mixer_of(Hybrid(**SMALL, mode=mode))
        assert not mixer(noise(1, TOKENS, DIM), context()).losses
        assert set(mixer.train()(noise(1, TOKENS, DIM), context()).losses) == (
            {"indexer"} if "select" in names else set()
        )


def requested_of(mixer, x, ctx):
    """Inputs of the select branch: queries, and the inputs of its keys and indexer."""
    received = []
    watch = mixer.branches["select"].register_forward_pre_hook(lambda _, a: received.append(a[0]))
    mixer(x, ctx)
    watch.remove()
    return received[0]


@pytest.mark.parametrize("kind", ["dense", "selected"])
def test_the_indexer_loss_equals_the_divergence_formula(kind):
    config = Hybrid(**SMALL, mode="nsa", index_target=kind, index_weight=0.5)
    mixer, x, ctx = mixer_of(config).train(), noise(1, TOKENS, DIM), context()
    branch, requested = mixer.branches["select"], requested_of(mixer, x, ctx)
    (k, _), q = branch.keys(requested), requested.q_BTHD
    logits = torch.einsum("bthd,bshd->bhts", q, k) / 10**0.5
    output = indexer.index_scores(
        branch.indexer(requested.x, requested.query_input, requested.rotary)
    )[0]
    total = 0.0
    for t, chosen in enumerate(chosen_by(mixer, x, ctx)):
        seen = chosen if kind == "selected" else list(range(t + 1))
        wanted = logits[0, :, t, seen].softmax(-1).mean(0)
        total += F.kl_div(output[t, seen].log_softmax(-1), wanted, reduction="sum")
    close(mixer(x, ctx).losses["indexer"], 0.5 * total / TOKENS)


def test_only_the_indexer_has_gradients_from_its_loss():
    lm = model_of(*MIXED[:2]).double().train()
    ids = torch.randint(0, 48, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    out = lm(ids)
    names, parameters = zip(*lm.named_parameters(), strict=True)
    language, own = (
        torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        for loss in (out.logits.square().sum(), sum(out.losses.values()))
    )
    assert any("indexer" in name for name in names)
    for name, from_language, from_own in zip(names, language, own, strict=True):
        assert (from_language is None) == ("indexer" in name), name
        assert (from_own is None) == ("indexer" not in name), name


def test_the_attention_mass_of_selected_tokens_increases_in_training():
    """Of one head's attention, while only the indexer is trained."""
    sizes = SMALL | {"heads": 1, "index_heads": 8, "index_dim": 16, "index_topk": 5}
    mixer, ctx, held_out = mixer_of(Hybrid(**sizes)).train(), context(8), noise(8, TOKENS, DIM)
    branch = mixer.branches["select"]
    optimizer = torch.optim.Adam(branch.indexer.parameters(), 1e-2)

    @torch.no_grad()
    def recall():
        requested = requested_of(mixer, held_out, ctx)
        visible = torch.ones(8, TOKENS, TOKENS, dtype=torch.bool).tril()
        truth = indexer.target_attention(requested.q_BTHD, branch.keys(requested)[0], visible)
        output = indexer.index_scores(
            branch.indexer(requested.x, requested.query_input, requested.rotary)
        )
        best = output.masked_fill(~visible, -torch.inf).topk(5, -1).indices
        found, most = truth.gather(-1, best), truth.topk(5, -1).values
        return found[:, 8:].sum() / most[:, 8:].sum()

    begun = recall()
    for step in range(300):
        mixer(noise(8, TOKENS, DIM, seed=100 + step), ctx).losses["indexer"].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert begun < 0.6
    assert recall() > 0.85


def model_of(*mixers, **more):
    layers = [{"mixer": mixer, "feed_forward": FEED} for mixer in mixers]
    sizes = {"vocab_size": 48, "dim": DIM, "depth": len(mixers), "max_seq_len": 64}
    torch.manual_seed(0)
    return LM(ModelConfig.from_dict(sizes | {"pattern": layers} | more))


MIXED = [
    {"kind": "hybrid", "mode": "swa"} | SMALL,
    {"kind": "hybrid", "mode": "nsa"} | SMALL,
    {"kind": "gqa", "heads": 2},
]


def test_layers_of_different_kinds_decode_as_they_train():
    lm = model_of(*MIXED).double().eval()
    ids = torch.randint(0, 48, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = lm(ids).logits
        caches, found, begin = lm.new_caches(2, TOKENS), [], 0
        for length in (5, 1, 1, 9, 1, 5):
            found.append(lm(ids[:, begin : begin + length], caches=caches).logits)
            begin += length
    close(torch.cat(found, 1), expected)


@pytest.mark.slow
def test_it_compiles_as_a_whole():
    lm = model_of(*MIXED).eval()
    ids = torch.randint(0, 48, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        close(torch.compile(lm, fullgraph=True)(ids).logits, lm(ids).logits, 1e-5)


@pytest.mark.parametrize(
    ("sizes", "output"),
    [
        ({"mode": "nsa", "branches": ("window",)}, "give mode=nsa or branches, not both"),
        ({"branches": ()}, "branches=\\[\\] must name at least one branch, each once"),
        ({"branches": ("window", "window")}, "must name at least one branch, each once"),
        ({"window": 0}, "window=0 must be at least 1"),
        ({"compress_block": 0}, "compress_block=0 must be at least 1"),
        ({"index_topk": 0}, "index_topk=0 must be at least 1"),
        ({"rope_dim": 3}, "rope_dim=3 must be even"),
    ],
)
def test_invalid_sizes_give_one_line(sizes, output):
    with pytest.raises(ValueError, match=output):
        Hybrid(**sizes)
