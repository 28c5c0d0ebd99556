"""Hyper-Connections equal the plain residual at initialisation, the published package and the
paper.
"""

import pytest
import torch
from hyper_connections import HyperConnections

from tests.oracles import streams as oracle
from tests.oracles.close import close_to
from tinsmith.nn.contract import BuildContext
from tinsmith.nn.model import LM, ModelConfig
from tinsmith.nn.residuals.hyper import Hyper
from tinsmith.optim.groups import partition

close = close_to(1e-11)

DIM = 12
SHAPES = [(2, 1), (4, 1), (2, 2), (3, 4)]
"""(streams, fracs)"""


def noise(*shape, seed=1):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def built(sub_layer=1, norm_eps=0.0, **options):
    """A float64 module whose every parameter is random."""
    build_ctx = BuildContext(
        dim=DIM, layer_idx=0, depth=1, norm_eps=norm_eps, sublayer_idx=sub_layer
    )
    part = Hyper(**options).build(build_ctx).double()
    with torch.no_grad():
        for seed, parameter in enumerate(part.parameters()):
            parameter += 0.7 * noise(*parameter.shape, seed=seed)
    return part


def split(matrix, streams, fracs):
    """The columns of A_m, A_r and B."""
    return matrix.split([fracs, streams * fracs, fracs], -1)


@pytest.mark.parametrize("options", [{}, {"dynamic": False}, {"fracs": 2}, {"streams": 2}])
def test_at_initialisation_it_equals_plain_to_the_bit(section, ids, options):
    lms = []
    for residual in ({"kind": "plain"}, {"kind": "hyper"} | options):
        torch.manual_seed(0)
        lms.append(LM(ModelConfig.from_dict(section(residual=residual))).double())
    plain, hyper = lms
    assert not hyper.load_state_dict(plain.state_dict(), strict=False).unexpected_keys
    assert torch.equal(hyper(ids).logits, plain(ids).logits)


def test_with_streams_that_are_no_power_of_two_only_the_mean_rounds(section, ids):
    torch.manual_seed(0)
    plain = LM(ModelConfig.from_dict(section())).double()
    hyper = LM(ModelConfig.from_dict(section(residual={"kind": "hyper", "streams": 3}))).double()
    hyper.load_state_dict(plain.state_dict(), strict=False)
    close(hyper(ids).logits, plain(ids).logits, 1e-14)


def test_each_sub_layer_initially_reads_the_next_stream(section):
    lm = LM(ModelConfig.from_dict(section(residual={"kind": "hyper"})))
    parts = [part for block in lm.blocks for part in (block.mix_residual, block.feed_residual)]
    for index, part in enumerate(parts):
        assert part.static[:, 0].tolist() == [float(s == index % 4) for s in range(4)]
        assert torch.equal(part.static[:, 1:5], torch.eye(4))
        assert (part.static[:, 5] == 1).all()
        assert (part.projection == 0).all()
        assert part.scale.tolist() == pytest.approx([0.01, 0.01])


def packaged(part, streams, fracs, gain):
    """The package's module with the weights of `part`.

    Its order of pieces is (frac, stream), ours (stream, frac); its columns are, for every frac, the
    input and then the streams. Its norm has a gain, which ours has inside the projection. Its
    static beta does not know which piece of the output it weighs: `part` must not either.
    """
    other = HyperConnections(streams, dim=DIM, num_fracs=fracs, layer_index=1).double()

    def alpha(matrix):
        into, keep, _ = split(matrix, streams, fracs)
        into = into.unflatten(-1, (fracs, 1))
        keep = keep.unflatten(-1, (streams, fracs)).transpose(-1, -2)
        return torch.cat((into, keep), -1).flatten(-2)

    def rows(matrix):
        return matrix.unflatten(0, (streams, fracs)).transpose(0, 1).flatten(0, 1)

    with torch.no_grad():
        other.norm.gamma.copy_(gain - 1)
        other.static_alpha.copy_(alpha(rows(part.static)))
        beta = split(part.static, streams, fracs)[2].unflatten(0, (streams, fracs))
        assert torch.equal(beta, beta[:, :1].expand_as(beta))
        other.static_beta.copy_(beta[:, 0].flatten())
        if part.dynamic:
            folded = part.projection / gain[:, None]
            other.dynamic_alpha_fn.copy_(alpha(folded))
            other.dynamic_beta_fn.copy_(folded[:, -fracs:].view_as(other.dynamic_beta_fn))
            other.dynamic_alpha_scale.copy_(part.scale[0])
            other.dynamic_beta_scale.copy_(part.scale[1])
    return other, alpha, rows


@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
@pytest.mark.parametrize(("streams", "fracs"), SHAPES)
def test_it_equals_the_package_forward_and_backward(streams, fracs, dynamic):
    """Over two sub-layers, with a function of the read stream between read and write."""
    part = built(streams=streams, fracs=fracs, dynamic=dynamic)
    with torch.no_grad():
        beta = split(part.static, streams, fracs)[2].unflatten(0, (streams, fracs))
        beta.copy_(beta[:, :1].clone().expand_as(beta))
    gain = 1 + 0.3 * noise(DIM // fracs, seed=8)
    other, alpha, rows = packaged(part, streams, fracs, gain)
    start, upstream = noise(2, 3, streams, DIM), noise(2, 3, streams, DIM, seed=2)

    h = mine = start.clone().requires_grad_()
    for _ in range(2):
        x, kept = part.read(h)
        h = part.write(h, torch.sin(3 * x), kept)
    (h * upstream).sum().backward()

    theirs = start.clone().requires_grad_()
    state = theirs.transpose(1, 2).flatten(0, 1)
    for _ in range(2):
        x, add = other(state)
        state = add(torch.sin(3 * x))
    state = state.unflatten(0, (2, streams)).transpose(1, 2)
    (state * upstream).sum().backward()

    close(h, state)
    close(mine.grad, theirs.grad)
    close(alpha(rows(part.static.grad)), other.static_alpha.grad)
    beta = split(part.static.grad, streams, fracs)[2].unflatten(0, (streams, fracs))
    close(beta.sum(1).flatten(), other.static_beta.grad)
    if dynamic:
        unfolded = part.projection.grad * gain[:, None]
        close(alpha(unfolded), other.dynamic_alpha_fn.grad)
        close(unfolded[:, -fracs:], other.dynamic_beta_fn.grad.view(-1, fracs))
        close(part.scale.grad[0], other.dynamic_alpha_scale.grad)
        close(part.scale.grad[1], other.dynamic_beta_scale.grad)


@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
@pytest.mark.parametrize(("streams", "fracs"), SHAPES)
def test_it_equals_the_paper_forward_and_backward(streams, fracs, dynamic):
    part = built(streams=streams, fracs=fracs, dynamic=dynamic, norm_eps=1e-3)
    h = noise(1, 2, streams, DIM).requires_grad_()
    x, kept = part.read(h)
    found = part.write(h, torch.sin(3 * x), kept)
    inputs = [h, *part.parameters()]
    gradients = torch.autograd.grad((found * noise(*found.shape, seed=2)).sum(), inputs)

    def matrices(joined):
        return [[list(row) for row in matrix] for matrix in split(joined, streams, fracs)]

    learned = (*matrices(part.projection), *part.scale) if dynamic else None
    expected = [
        oracle.hyper(
            [list(stream) for stream in token],
            lambda x: [torch.sin(3 * number) for number in x],
            fracs,
            matrices(part.static),
            learned,
            1e-3,
        )
        for token in h[0]
    ]
    expected = torch.stack([torch.stack([torch.stack(x) for x in token]) for token in expected])
    close(found, expected[None])
    loss = (expected * noise(*found.shape, seed=2)[0]).sum()
    close(gradients, torch.autograd.grad(loss, inputs))


def test_static_weights_do_not_depend_on_the_state():
    part = built(dynamic=False)
    assert {name for name, _ in part.named_parameters()} == {"static"}
    a, b = noise(2, 3, 4, DIM), noise(2, 3, 4, DIM, seed=2)
    close(part.read(a)[0] + part.read(b)[0], part.read(a + b)[0])


def test_all_its_parameters_are_vectors_for_the_optimizer(section):
    """So none is orthogonalised and none decays, whatever its shape."""
    lm = LM(ModelConfig.from_dict(section(residual={"kind": "hyper"})))
    groups = partition(lm)
    mixing = {name for name, _ in lm.named_parameters() if "_residual." in name}
    assert len(mixing) == 3 * 2 * 3
    assert mixing <= {name for name, _ in groups["vector"]}


def test_every_parameter_has_a_gradient_after_the_first_step(section, ids):
    """tanh(0) = 0 lets no gradient through to the scales in the first step, and only to them."""
    torch.manual_seed(0)
    lm = LM(ModelConfig.from_dict(section(residual={"kind": "hyper"}))).double()
    optimizer = torch.optim.AdamW(lm.parameters(), 1e-2)
    for step in range(10):
        optimizer.zero_grad()
        logits = lm(ids).logits[:, :-1]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        for name, parameter in lm.named_parameters():
            still = step == 0 and name.endswith("residual.scale")
            assert (parameter.grad.abs().max() == 0) == still, name
        optimizer.step()
    config = lm.config.residual
    h = config.expand(lm.embed(ids))
    x, kept = lm.blocks[0].mix_residual.read(h)
    h = lm.blocks[0].mix_residual.write(h, x, kept)
    for one in range(4):
        for other in range(one):
            assert (h[:, :, one] - h[:, :, other]).abs().max() > 1e-3
