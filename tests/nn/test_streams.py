"""Properties that all residuals with several streams share."""

import pytest
import torch

from tinsmith.core.errors import UserError
from tinsmith.nn.model import LM, ModelConfig

KINDS = ("hyper", "mhyper")
ONE = "streams=1 must be at least 2; one stream is `plain`"
COLD = "must be at least 1e-06"


@pytest.mark.parametrize(
    ("residual", "output"),
    [
        *(({"kind": kind, "streams": 1}, ONE) for kind in KINDS),
        *(({"kind": kind, "streams": 0}, ONE.replace("1", "0")) for kind in KINDS),
        *(({"kind": kind, "stream": 4}, "unknown key. Did you mean 'streams'?") for kind in KINDS),
        ({"kind": "hyper", "fracs": 0}, "fracs=0 must be at least 1"),
        ({"kind": "hyper", "fracs": 5}, "dim=32 must be a multiple of fracs=5"),
        ({"kind": "mhyper", "sinkhorn_iterations": 0}, "sinkhorn_iterations=0 must be at least 1"),
        *(
            ({"kind": "mhyper", "sinkhorn_temperature": cold}, f"temperature={cold} {COLD}")
            for cold in (0.0, -1.0, 9e-7)
        ),
    ],
)
def test_invalid_configs_are_refused_in_one_line(section, residual, output):
    with pytest.raises(UserError) as refused:
        ModelConfig.from_dict(section(residual=residual))
    assert output in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_model_compiles_with_equal_outputs(kind, section, ids):
    torch.manual_seed(0)
    lm = LM(ModelConfig.from_dict(section(depth=1, residual={"kind": kind})))
    torch.compiler.reset()
    compiled = torch.compile(lm, fullgraph=True)
    gradients = []
    for model in (lm, compiled):
        lm.zero_grad()
        logits = model(ids).logits
        logits.square().mean().backward()
        gradients.append([logits, *(parameter.grad for parameter in lm.parameters())])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
