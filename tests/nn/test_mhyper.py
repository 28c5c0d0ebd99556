"""Manifold-constrained Hyper-Connections: equal to transformers, to the paper written out, and what
a doubly stochastic mix promises.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HyperConnection

from tests.oracles import streams as oracle
from tests.oracles.close import close_to
from tinsmith.nn.contract import BuildContext, Ctx
from tinsmith.nn.model import LM, ModelConfig
from tinsmith.nn.residuals import mhyper
from tinsmith.nn.residuals.mhyper import MHyper, sinkhorn
from tinsmith.optim.groups import partition

close = close_to(1e-12)

DIM = 12


def noise(*shape, seed=1):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def fresh(sub_layer=1, norm_eps=0.0, **options):
    """A float64 module as it is built."""
    build_ctx = BuildContext(
        dim=DIM, layer_idx=0, depth=1, norm_eps=norm_eps, sublayer_idx=sub_layer
    )
    return MHyper(**options).build(build_ctx).double()


def built(**options):
    """The same with every parameter random: dynamic terms as large as static ones."""
    part = fresh(**options)
    with torch.no_grad():
        for seed, parameter in enumerate(part.parameters()):
            parameter += 0.7 * noise(*parameter.shape, seed=seed)
    return part


def lm_of(section, **model):
    torch.manual_seed(0)
    return LM(ModelConfig.from_dict(section(residual={"kind": "mhyper"}, **model))).double()


def sub_layers(lm):
    return [part for block in lm.blocks for part in (block.mix_residual, block.feed_residual)]


def reported(part, n):
    """Columns of the projection, and parts of the bias, that make H_pre, H_post and H_res."""
    sizes = [n, n, n * n]
    return part.projection.split(sizes, -1), part.bias.split(sizes)


def logits_of(kind, count=512, n=4):
    """Logits of order 1, as they are at first, and as training leaves them (measured: standard
    deviations of 0.7 about the start after a small model has learned a batch by heart).
    """
    stay, spread = {"order one": (0.0, 0.5), "start": (3.0, 0.02), "trained": (3.0, 0.7)}[kind]
    return stay * torch.eye(n, dtype=torch.float64) + spread * noise(count, n, n)


class TestSinkhorn:
    @pytest.mark.parametrize("kind", ["order one", "start"])
    def test_rows_and_columns_sum_to_one_and_nothing_is_negative(self, kind):
        mix = sinkhorn(logits_of(kind), 20)
        assert (mix >= 0).all()
        close(mix.sum(-1), torch.ones(512, 4).double())
        assert (mix.sum(-2) - 1).abs().max() < 1e-3
        assert torch.linalg.matrix_norm(mix, 2).max() <= 1 + 1e-3

    def test_after_training_rows_are_exact_and_columns_as_good_as_the_rounds(self):
        """The closer to a permutation, the slower: 20 rounds, the paper's number, leave some
        columns more than 1e-3 off, and the size of what is mixed less than 1 %.
        """
        for rounds, share, off, size in ((20, 0.9, 3e-2, 5e-3), (400, 1.0, 1e-3, 1e-3)):
            mix = sinkhorn(logits_of("trained"), rounds)
            assert (mix >= 0).all()
            close(mix.sum(-1), torch.ones(512, 4).double())
            columns = (mix.sum(-2) - 1).abs()
            assert (columns < 1e-3).double().mean() >= share
            assert columns.max() < off
            assert torch.linalg.matrix_norm(mix, 2).max() <= 1 + size

    @pytest.mark.parametrize("kind", ["order one", "start", "trained"])
    def test_64_consecutive_mixes_do_not_increase_the_norm(self, kind):
        mix = sinkhorn(logits_of(kind), 20)
        for begin in range(0, 512, 64):
            deep = torch.linalg.multi_dot(list(mix[begin : begin + 64]))
            assert torch.linalg.matrix_norm(deep, 2) < 1.07
            close(deep.sum(-1), torch.ones(4).double())

    @pytest.mark.parametrize("kind", ["order one", "start"])
    def test_the_mean_over_the_streams_is_preserved(self, kind):
        mix, h = sinkhorn(logits_of(kind), 20), noise(512, 4, DIM, seed=2)
        assert ((mix @ h).mean(1) - h.mean(1)).abs().max() < 1e-3

    def test_more_iterations_are_more_accurate(self):
        errors = [
            (sinkhorn(logits_of("order one"), rounds).sum(-2) - 1).abs().max()
            for rounds in (1, 3, 10)
        ]
        assert errors[0] > 10 * errors[1] > 100 * errors[2]

    @pytest.mark.parametrize("rounds", [1, 2, 20])
    def test_it_equals_the_loop_of_the_definition(self, rounds):
        logits = noise(3, 4, 4)
        for found, one in zip(sinkhorn(logits, rounds), logits, strict=True):
            expected = oracle.doubly_stochastic([list(row) for row in one], rounds)
            close(found, torch.stack([torch.stack(row) for row in expected]))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_it_is_finite_for_any_logits(self, dtype):
        """A row or column whose every exponential is 0 in float32, forward and backward."""
        logits = (400 * noise(200, 4, 4)).to(dtype)
        logits[0], logits[1] = 0.0, -1e4
        logits[2, :, 1], logits[3, 2] = -1e4, -1e4
        mix = sinkhorn(logits.requires_grad_(), 20)
        (mix * noise(200, 4, 4, seed=2)).sum().backward()
        assert mix.isfinite().all()
        assert logits.grad.isfinite().all()
        torch.testing.assert_close(mix.sum(-1), torch.ones(200, 4, dtype=dtype))

    def test_nan_in_one_matrix_does_not_affect_others(self):
        logits = noise(5, 4, 4)
        expected = sinkhorn(logits, 20)
        logits[2] = torch.nan
        others = [0, 1, 3, 4]
        assert torch.equal(sinkhorn(logits, 20)[others], expected[others])


class TestTransformers:
    """Its `comb` is used transposed and is H_res^T: it starts with rows and ends on columns, which,
    transposed, is the paper's order. It adds `hc_eps` to H_pre, to the matrix before the first
    column sums, and to all sums; without it, and in float64, both are the same function.
    """

    def theirs(self, part, n, eps, rounds=20):
        config = DeepseekV4Config(
            hidden_size=DIM, hc_mult=n, hc_eps=eps, hc_sinkhorn_iters=rounds, rms_norm_eps=1e-3
        )
        other = DeepseekV4HyperConnection(config).double()

        def turned(rows):
            pairs = rows[2 * n :].unflatten(0, (n, n)).transpose(0, 1).flatten(0, 1)
            return torch.cat((rows[: 2 * n], pairs))

        with torch.no_grad():
            other.fn.copy_(turned(part.projection.T))
            other.base.copy_(turned(part.bias))
            other.scale.copy_(part.scale)
        return other, turned

    def both(self, part, n, eps, rounds=20):
        other, turned = self.theirs(part, n, eps, rounds)
        h, output, upstream = noise(2, 3, n, DIM), noise(2, 3, DIM, seed=2), noise(2, 3, n, DIM)
        mine, theirs = h.clone().requires_grad_(), h.clone().requires_grad_()
        x, kept = part.read(mine)
        found = part.write(mine, torch.sin(3 * x) * output, kept)
        post, comb, collapsed = other(theirs)
        y = torch.sin(3 * collapsed) * output
        expected = post.unsqueeze(-1) * y.unsqueeze(-2) + comb.transpose(-1, -2) @ theirs
        for state in (found, expected):
            (state * upstream).sum().backward()
        gradients = [
            (mine.grad, theirs.grad),
            (turned(part.projection.grad.T), other.fn.grad),
            (turned(part.bias.grad), other.base.grad),
            (part.scale.grad, other.scale.grad),
        ]
        return [(x, collapsed), (found, expected), *gradients]

    @pytest.mark.parametrize("rounds", [1, 20])
    @pytest.mark.parametrize("n", [2, 4])
    def test_without_its_epsilon_it_is_equal_forward_and_backward(self, monkeypatch, n, rounds):
        monkeypatch.setattr(torch.Tensor, "float", lambda tensor: tensor)
        part = built(streams=n, norm_eps=1e-3, sinkhorn_iterations=rounds)
        for found, expected in self.both(part, n, 0.0, rounds):
            close(found, expected, 1e-11)

    def test_with_its_epsilon_it_is_as_close_as_that(self, monkeypatch):
        monkeypatch.setattr(torch.Tensor, "float", lambda tensor: tensor)
        for found, expected in self.both(fresh(norm_eps=1e-3), 4, 1e-6):
            close(found, expected, 1e-4)
            assert not torch.equal(found, expected)


@pytest.mark.parametrize(("n", "temperature"), [(2, 1.0), (4, 1.0), (3, 0.7)])
def test_it_equals_the_paper_forward_and_backward(n, temperature):
    part = built(streams=n, norm_eps=1e-3, sinkhorn_iterations=4, sinkhorn_temperature=temperature)
    h = noise(1, 2, n, DIM).requires_grad_()
    x, kept = part.read(h)
    found = part.write(h, torch.sin(3 * x), kept)
    inputs = [h, *part.parameters()]
    gradients = torch.autograd.grad((found * noise(*found.shape, seed=2)).sum(), inputs)

    weights, (pre, post, res) = reported(part, n)
    expected = [
        oracle.mhyper(
            [list(stream) for stream in token],
            lambda x: [torch.sin(3 * number) for number in x],
            [[list(row) for row in weight] for weight in weights],
            tuple(part.scale),
            (list(pre), list(post), [list(row) for row in res.unflatten(0, (n, n))]),
            4,
            temperature,
            1e-3,
        )
        for token in h[0]
    ]
    expected = torch.stack([torch.stack([torch.stack(x) for x in token]) for token in expected])
    close(found, expected[None])
    loss = (expected * noise(*found.shape, seed=2)[0]).sum()
    close(gradients, torch.autograd.grad(loss, inputs))


class TestAtFirst:
    @pytest.mark.parametrize("temperature", [1.0, 0.05])
    @pytest.mark.parametrize("n", [2, 4])
    def test_a_sub_layer_reads_about_one_stream_and_is_written_to_all(self, n, temperature):
        for sub_layer in range(n + 1):
            part = fresh(sub_layer=sub_layer, streams=n, sinkhorn_temperature=temperature)
            _, (pre, post, res) = reported(part, n)
            taken = pre.sigmoid()
            assert taken.argmax() == sub_layer % n
            assert taken.max() > 0.8
            assert taken.sum().item() == pytest.approx(1.0, abs=1e-6)
            assert (2 * post.sigmoid() == 1).all()
            mix = sinkhorn(res.unflatten(0, (n, n)) / temperature, 20)
            assert 0.8 < mix.diagonal().min() <= mix.diagonal().max() < 0.98
            assert part.scale.tolist() == pytest.approx([0.01] * 3)

    def test_the_dynamic_terms_are_small_and_not_zero(self, section):
        lm = lm_of(section, dim=64)
        for part in sub_layers(lm):
            assert part.projection.std().item() == pytest.approx(0.5 / 16, rel=0.05)

    def test_B08_the_first_loss_is_ln_V(self, section):
        ids = torch.randint(0, 999, (2, 64))
        for tied in (True, False):
            lm = lm_of(section, vocab_size=999, dim=64, tie_embeddings=tied)
            logits = lm(ids).logits[:, :-1]
            loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            assert loss.item() == pytest.approx(math.log(999), rel=0.05)

    @pytest.mark.parametrize("temperature", [1.0, 0.05])
    def test_B07_the_mix_has_gradients(self, section, ids, temperature):
        """In float32, off its diagonal too (where a logit of -160 had a gradient of 0), unless in
        the first and last sub-layer, where it has no effect.
        """
        residual = {"kind": "mhyper", "sinkhorn_temperature": temperature}
        lm = LM(ModelConfig.from_dict(section(residual=residual)))
        F.cross_entropy(lm(ids).logits.flatten(0, 1), ids.flatten()).backward()
        for part in sub_layers(lm)[1:-1]:
            gradient = part.bias.grad[8:].view(4, 4)
            assert gradient[~torch.eye(4, dtype=torch.bool)].abs().min() > 1e-10


def mixing_gradients(part):
    """(parameter, its columns) -> the norm of the gradient."""
    pieces = {
        "projection": part.projection.grad.split([4, 4, 16], -1),
        "scale": part.scale.grad.split(1),
        "bias": part.bias.grad.split([4, 4, 16]),
    }
    return {
        (name, made): gradient.abs().max().item()
        for name, split in pieces.items()
        for made, gradient in zip(("pre", "post", "res"), split, strict=True)
    }


def test_streams_diverge_and_all_mixing_parameters_but_two_have_gradients(section, ids):
    """H_res does not in the first sub-layer, where all streams are equal, so that rows that sum to
    1 change nothing; nor in the last, after which only the mean of the streams is read, so that
    columns that sum to 1 (as nearly as 20 rounds make them) change nothing.
    """
    lm = lm_of(section)
    optimizer = torch.optim.AdamW(lm.parameters(), 1e-2)
    for _ in range(10):
        optimizer.zero_grad()
        logits = lm(ids).logits[:, :-1]
        F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
    first, *middle, last = [mixing_gradients(part) for part in sub_layers(lm)]
    for key in first:
        if key[1] == "res":
            least = min(gradients[key] for gradients in middle)
            assert least > 1e-9, key
            assert first[key] < 1e-9 * least, key
            assert last[key] < 0.1 * least, key
        else:
            assert min(gradients[key] for gradients in (first, *middle, last)) > 1e-9, key
    states = []
    lm.blocks[-1].register_forward_hook(lambda _, args, out: states.append(out.y))
    lm(ids)
    for one in range(4):
        for other in range(one):
            assert (states[0][:, :, one] - states[0][:, :, other]).abs().max() > 1e-3


def test_after_ten_steps_mixes_are_doubly_stochastic_and_64_of_them_do_not_increase_the_norm(
    section, ids, monkeypatch
):
    """Those of a model in float32, at every token of every sub-layer."""
    found = []

    def received(logits, iterations):
        found.append(sinkhorn(logits, iterations))
        return found[-1]

    monkeypatch.setattr(mhyper, "sinkhorn", received)
    lm = lm_of(section, depth=3).float()
    optimizer = torch.optim.AdamW(lm.parameters(), 1e-2)
    for _ in range(11):
        found.clear()
        F.cross_entropy(lm(ids).logits.flatten(0, 1), ids.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(found) == 6
    mixes = torch.stack([mix.detach().flatten(0, -3) for mix in found], 1)
    assert not torch.allclose(mixes[0, 0], mixes[-1, -1], atol=1e-4)
    for axis in (-1, -2):
        assert (mixes.sum(axis) - 1).abs().max() < 1e-3
    assert torch.linalg.matrix_norm(mixes, 2).max() <= 1 + 1e-3
    deep = torch.linalg.multi_dot([mixes[:, n % 6][0] for n in range(64)])
    assert torch.linalg.matrix_norm(deep, 2) < 1.07


def test_B06_nothing_in_a_block_normalises_the_streams(section):
    """The output of a block is bounded, the state is not: 100 times the state stays 100 times."""
    lm = lm_of(section, positions="none")
    h, ctx = noise(2, 5, 4, 32), Ctx(torch.arange(5).expand(2, 5))
    for block in lm.blocks:
        small, large = (block(factor * h, ctx).y.square().mean().sqrt() for factor in (1, 100))
        assert 80 < large / small < 120
    part = fresh()
    h, silent = noise(2, 5, 4, DIM), torch.zeros(2, 5, DIM).double()
    (x, kept), (larger, kept_larger) = part.read(h), part.read(100 * h)
    close(larger, 100 * x)
    close(part.write(100 * h, silent, kept_larger), 100 * part.write(h, silent, kept))


def test_mixing_preserves_the_mean_over_the_streams():
    part = fresh()
    h = noise(2, 5, 4, DIM)
    _, kept = part.read(h)
    after = part.write(h, torch.zeros(2, 5, DIM).double(), kept)
    assert (after.mean(2) - h.mean(2)).abs().max() < 1e-4
    assert (after - h).abs().max() > 0.05


def test_all_its_parameters_are_vectors_for_the_optimizer(section):
    """So none is orthogonalised and none decays, whatever its shape."""
    lm = lm_of(section)
    mixing = {name for name, _ in lm.named_parameters() if "_residual." in name}
    assert len(mixing) == 3 * 2 * 3
    assert mixing <= {name for name, _ in partition(lm)["vector"]}
