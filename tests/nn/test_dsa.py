"""DeepSeek sparse attention: against DeepSeek-V3.2's in transformers, its dense limit, and what its
indexer learns.
"""

import pytest
import torch
import torch.nn.functional as F

from tests.oracles.close import close_to
from tinsmith.nn.attention import indexer, token_sparse
from tinsmith.nn.attention.rope import Rope, rotary_tables
from tinsmith.nn.contract import BuildContext, Ctx
from tinsmith.nn.mixers.dsa import DSA
from tinsmith.nn.mixers.mla import MLA
from tinsmith.nn.model import LM, ModelConfig

close = close_to(1e-10)

DIM, TOKENS = 40, 23
LATENT = {"heads": 4, "kv_rank": 8, "q_rank": 12, "nope_dim": 6, "rope_dim": 4, "v_dim": 10}
SMALL = LATENT | {"index_heads": 3, "index_dim": 8, "index_topk": 5}


def noise(*shape, seed=1, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def stirred(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return module


def mixer_of(config, dtype=torch.float64, **build_ctx):
    torch.manual_seed(0)
    return stirred(config.build(BuildContext(DIM, 0, 1, **build_ctx)).to(dtype)).eval()


def context(width, rows=2, dtype=torch.float64, segments=None, tokens=TOKENS):
    positions = torch.arange(tokens).expand(rows, -1)
    return Ctx(positions, segments, None, {width: rotary_tables(Rope(), width, positions, dtype)})


def model_of(**changes):
    layer = {"mixer": {"kind": "dsa"} | SMALL | changes, "feed_forward": FEED}
    sizes = {"vocab_size": 48, "dim": 32, "depth": 2, "max_seq_len": 128, "pattern": [layer]}
    torch.manual_seed(0)
    return LM(ModelConfig.from_dict(sizes)).double()


FEED = {"kind": "relu2", "hidden_dim": 48}
NAMES = {
    "queries.down": "q_a_proj",
    "queries.norm": "q_a_layernorm",
    "queries.up": "q_b_proj",
    "keys.down": "kv_a_proj_with_mqa",
    "keys.norm": "kv_a_layernorm",
    "keys.up": "kv_b_proj",
    "o_proj": "o_proj",
    "indexer.q_up": "indexer.wq_b",
    "indexer.k_down": "indexer.wk",
    "indexer.k_norm": "indexer.k_norm",
    "indexer.weigh": "indexer.weights_proj",
}


def in_pairs(rows, width):
    """Rows whose last `width` are turned half-split, in the order of DeepSeek's pairs."""
    kept, turned = rows.split((len(rows) - width, width))
    return torch.cat((kept, turned.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1)))


@pytest.mark.parametrize("keep", [1, 5, 22])
def test_outputs_equal_deepseek_v32(keep):
    """With 3 index heads of random weights no two scores are equal; where they are, transformers
    chooses by chance.
    """
    from transformers.models.deepseek_v32.modeling_deepseek_v32 import (
        DeepseekV32Attention,
        DeepseekV32Config,
        DeepseekV32RotaryEmbedding,
    )

    config = DSA(**SMALL | {"index_topk": keep, "index_heads": 8})
    ours = mixer_of(config, torch.float32)
    settings = DeepseekV32Config(
        hidden_size=DIM,
        num_attention_heads=4,
        num_key_value_heads=4,
        kv_lora_rank=8,
        q_lora_rank=12,
        qk_nope_head_dim=6,
        qk_rope_head_dim=4,
        v_head_dim=10,
        index_topk=keep,
        index_head_dim=8,
        index_n_heads=8,
        max_position_embeddings=64,
        rope_parameters={"rope_theta": 10000.0, "rope_type": "default"},
        attn_implementation="eager",
    )
    theirs = DeepseekV32Attention(settings, 0).eval()
    state = {}
    for name, tensor in ours.state_dict().items():
        module, _, leaf = name.rpartition(".")
        if module == "queries.up":
            heads = [in_pairs(head, 4) for head in tensor.unflatten(0, (4, 10))]
            tensor = torch.cat(heads)
        elif module == "keys.down":
            tensor = in_pairs(tensor, 4)
        state[f"{NAMES[module]}.{leaf}"] = tensor
    theirs.load_state_dict(state)
    x = noise(2, TOKENS, DIM, dtype=torch.float32)
    ctx = context(4, dtype=torch.float32)
    mask = torch.full((TOKENS, TOKENS), -torch.inf).triu(1)[None, None].expand(2, -1, -1, -1)
    rotary = DeepseekV32RotaryEmbedding(settings)(x, ctx.positions)
    with torch.no_grad():
        wanted = theirs(x, rotary, mask, position_ids=ctx.positions)[0]
        # transformers masks an invisible selected token with finfo.min; -inf is smaller still
        close(ours(x, ctx).y[:, keep:], wanted[:, keep:], 2e-5)


@pytest.mark.parametrize("keep", [TOKENS, TOKENS + 9])
def test_selecting_every_token_equals_mla(keep):
    sparse, dense = mixer_of(DSA(**SMALL | {"index_topk": keep})), mixer_of(MLA(**LATENT))
    dense.load_state_dict({k: v for k, v in sparse.state_dict().items() if "indexer" not in k})
    x = noise(2, TOKENS, DIM)
    for segments in (None, torch.tensor([[0] * 9 + [1] * 14, [-1] * 4 + [2] * 19])):
        ctx = context(4, segments=segments)
        real = torch.ones(2, TOKENS, dtype=torch.bool) if segments is None else segments >= 0
        close(sparse(x, ctx).y[real], dense(x, ctx).y[real])


PACKED = torch.tensor([[0] * 9 + [1] * 14, [-1] * 4 + [2] * 12 + [3] * 7])


@pytest.mark.parametrize("segments", [None, PACKED], ids=["plain", "packed"])
def test_chunks_of_queries_change_nothing(monkeypatch, segments):
    mixer = mixer_of(DSA(**SMALL)).train()
    weight = noise(2, TOKENS, DIM, seed=2)
    if segments is not None:
        weight *= (segments >= 0)[..., None]

    def run():
        x = noise(2, TOKENS, DIM).requires_grad_()
        out = mixer(x, context(4, segments=segments))
        loss = (out.y * weight).sum() + out.losses["indexer"]
        return out.y * (weight != 0), loss, *torch.autograd.grad(loss, [x, *mixer.parameters()])

    whole = run()
    for step in (1, 7, 16):
        monkeypatch.setattr(token_sparse, "_chunk_size", lambda keys, step=step: step)
        for found, expected in zip(run(), whole, strict=True):
            close(found, expected)


@torch.no_grad()
def test_chunks_of_queries_change_nothing_in_a_cache(monkeypatch):
    """Whole rows, and rows of different length with padding between, in several chunks each."""
    lm = stirred(model_of()).eval()
    ids = torch.randint(0, 48, (2, 24), generator=torch.Generator().manual_seed(1))
    expected = lm(ids).logits
    monkeypatch.setattr(token_sparse, "_chunk_size", lambda keys: 3)
    close(lm(ids).logits, expected)
    caches = lm.new_caches(2, 24)
    found = [lm(ids[:, begin:end], caches=caches).logits for begin, end in ((0, 8), (8, 24))]
    close(torch.cat(found, 1), expected)
    caches = lm.new_caches(2, 24)
    segments = torch.tensor([[0] * 8 + [-1] * 4, [-1] * 9 + [0] * 3])
    for begin in ((0, 0), (8, 3)):
        part = torch.full((2, 12), 3)
        part[segments >= 0] = torch.cat((ids[0, begin[0] :][:8], ids[1, begin[1] :][:3]))
        found = lm(part, segments=segments, caches=caches).logits
        wanted = torch.cat((expected[0, begin[0] :][:8], expected[1, begin[1] :][:3]))
        close(found[segments >= 0], wanted)


@pytest.mark.parametrize("segments", [None, PACKED], ids=["plain", "packed"])
def test_a_chunk_computes_no_products_with_keys_after_its_end(monkeypatch, segments):
    """So half of the products are never made."""
    mixer, met = mixer_of(DSA(**SMALL)).train(), []
    monkeypatch.setattr(token_sparse, "_chunk_size", lambda keys: 4)
    for name in ("index_scores", "target_attention"):
        make = getattr(token_sparse, name)

        def counted(*given, make=make):
            met.append(tuple(make(*given).shape[1:]))
            return make(*given)

        monkeypatch.setattr(token_sparse, name, counted)
    mixer(noise(2, TOKENS, DIM), context(4, segments=segments)).losses["indexer"].backward()
    ends = [(4, end) for end in range(4, TOKENS, 4)] + [(3, TOKENS)]
    assert met == [shape for shape in ends for _ in range(2)]


def test_memory_saved_for_backward_grows_linearly_with_the_length(monkeypatch):
    """Bytes of all tensors that the backward pass waits for, in chunks of 4 queries."""
    mixer = mixer_of(DSA(**SMALL)).train()
    monkeypatch.setattr(token_sparse, "_chunk_size", lambda keys: 4)

    def kept(tokens):
        storages = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        x = noise(1, tokens, DIM).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = mixer(x, context(4, rows=1, tokens=tokens))
        del out
        return sum(storages.values())

    short, longer, longest = (kept(tokens) for tokens in (64, 128, 192))
    assert longest - longer == pytest.approx(longer - short, rel=0.02)


def test_equal_scores_select_the_earliest_tokens():
    """With an indexer that scores all tokens 0, tokens attend to the first `index_topk` and no
    other.
    """
    mixer = mixer_of(DSA(**SMALL))
    torch.nn.init.zeros_(mixer.indexer.weigh.weight)
    x = noise(1, TOKENS, DIM).requires_grad_()
    y = mixer(x, context(4, rows=1)).y
    for t in range(TOKENS):
        (slope,) = torch.autograd.grad(y[0, t].square().sum(), x, retain_graph=True)
        received = slope[0].abs().amax(-1).nonzero()[:, 0].tolist()
        assert received == sorted({*range(min(5, t + 1)), t})


def test_equal_scores_select_the_same_tokens_in_all_decoding_paths():
    lm = stirred(model_of(index_topk=3)).eval()
    for block in lm.blocks:
        torch.nn.init.zeros_(block.mixer.indexer.weigh.weight)
    ids = torch.randint(0, 48, (2, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = lm(ids).logits
        for splits in ([17], [1] * 17, [5, 1, 7, 4]):
            caches, found, begin = lm.new_caches(2, 17), [], 0
            for length in splits:
                found.append(lm(ids[:, begin : begin + length], caches=caches).logits)
                begin += length
            close(torch.cat(found, 1), expected)


@pytest.mark.parametrize("kind", ["dense", "selected"])
def test_the_indexer_loss_equals_the_divergence_formula(kind):
    mixer = mixer_of(DSA(**SMALL | {"index_target": kind, "index_weight": 0.5})).train()
    x, ctx = noise(1, TOKENS, DIM), context(4, rows=1)
    rotary = ctx.rotary[4]
    nope, turned, latent = mixer.queries(x, rotary)
    k, _ = mixer.keys.expand(*mixer.keys(x, rotary))
    logits = torch.einsum("bthd,bshd->bhts", torch.cat((nope, turned), -1), k) / 10**0.5
    output = indexer.index_scores(mixer.indexer(x, latent, rotary))[0]
    total = 0.0
    for t in range(TOKENS):
        seen = range(t + 1)
        if kind == "selected":
            seen = sorted(seen, key=lambda s: -output[t, s])[:5]
        seen = list(seen)
        wanted = logits[0, :, t, seen].softmax(-1).mean(0)
        total += F.kl_div(output[t, seen].log_softmax(-1), wanted, reduction="sum")
    close(mixer(x, ctx).losses["indexer"], 0.5 * total / TOKENS)


def test_only_the_indexer_has_gradients_from_its_loss():
    lm = model_of().train()
    ids = torch.randint(0, 48, (2, 20), generator=torch.Generator().manual_seed(1))
    out = lm(ids)
    names, parameters = zip(*lm.named_parameters(), strict=True)
    language = torch.autograd.grad(
        F.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()),
        parameters,
        retain_graph=True,
        allow_unused=True,
    )
    own = torch.autograd.grad(sum(out.losses.values()), parameters, allow_unused=True)
    for name, from_language, from_own in zip(names, language, own, strict=True):
        assert (from_language is None) == ("indexer" in name), name
        assert (from_own is None) == ("indexer" not in name), name


def test_the_attention_mass_of_selected_tokens_increases_in_training():
    """The share of one head's attention that the chosen tokens hold: from chance to nearly all that
    5 tokens can hold, while only the indexer is trained.
    """
    sizes = SMALL | {"heads": 1, "index_heads": 8, "index_dim": 16}
    mixer = mixer_of(DSA(**sizes)).train()
    ctx = context(4, rows=8)
    optimizer = torch.optim.Adam(mixer.indexer.parameters(), 1e-2)
    held_out = noise(8, TOKENS, DIM, seed=99)

    @torch.no_grad()
    def recall():
        rotary = ctx.rotary[4]
        nope, turned, latent = mixer.queries(held_out, rotary)
        k, _ = mixer.keys.expand(*mixer.keys(held_out, rotary))
        visible = torch.ones(8, TOKENS, TOKENS, dtype=torch.bool).tril()
        truth = indexer.target_attention(torch.cat((nope, turned), -1), k, visible)
        output = indexer.index_scores(mixer.indexer(held_out, latent, rotary))
        best = output.masked_fill(~visible, -torch.inf).topk(5, -1).indices
        found, most = truth.gather(-1, best), truth.topk(5, -1).values
        return found[:, 8:].sum() / most[:, 8:].sum()

    assert recall() < 0.5
    for step in range(300):
        mixer(noise(8, TOKENS, DIM, seed=step), ctx).losses["indexer"].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert recall() > 0.9


def test_evaluation_computes_no_loss():
    assert not model_of().eval()(torch.zeros(1, 9, dtype=torch.long)).losses


def test_padding_and_other_documents_are_never_selected():
    """With `index_topk` above the number of visible tokens, no invisible token is selected."""
    mixer = mixer_of(DSA(**SMALL | {"index_topk": 9}))
    x = noise(1, TOKENS, DIM)
    segments = torch.tensor([[0] * 10 + [1] * 13])
    positions = torch.tensor([[*range(10), *range(13)]])
    ctx = Ctx(positions, segments, None, {4: rotary_tables(Rope(), 4, positions, torch.float64)})
    alone = Ctx(positions[:, 10:], None, None, {4: tuple(t[:, 10:] for t in ctx.rotary[4])})
    close(mixer(x, ctx).y[:, 10:], mixer(x[:, 10:], alone).y)


def test_a_narrow_index_head_is_rotated_by_the_angles_of_its_own_width():
    x, positions = noise(1, TOKENS, 2, 4), torch.arange(TOKENS)[None]
    narrow, wide = (rotary_tables(Rope(), width, positions, torch.float64) for width in (4, 16))
    close(indexer._rotate_index_heads(x, wide), indexer._rotate_index_heads(x, narrow))


@pytest.mark.parametrize(
    ("sizes", "output"),
    [
        ({"index_topk": 0}, "index_topk=0 must be at least 1"),
        ({"index_heads": 0}, "index_heads=0 must be at least 1"),
        ({"index_dim": 3, "rope_dim": 64}, "index_dim=3 must be even and divide rope_dim=64"),
        ({"index_dim": 24, "rope_dim": 64}, "index_dim=24 must be even and divide rope_dim=64"),
        ({"index_weight": -1.0}, "index_weight=-1.0 must be at least 0"),
        ({"rope_dim": 5}, "rope_dim=5 must be even"),
    ],
)
def test_invalid_sizes_give_one_line(sizes, output):
    with pytest.raises(ValueError, match=output):
        DSA(**sizes)


@pytest.mark.slow
def test_it_compiles_as_a_whole():
    lm = model_of().float().eval()
    ids = torch.randint(0, 48, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        close(torch.compile(lm, fullgraph=True)(ids).logits, lm(ids).logits, 1e-5)
