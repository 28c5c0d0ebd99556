"""The contract suite runs over every member of every union, in float64: what is listed is tested.

A new kind needs configs in SAMPLES that switch its options on, and a mixer the size of its cache
in HELD. Everything else in this folder is about all kinds alike.

`pytest tests/contracts --contracts my_mixer.py` tests the kinds of a user's own file instead. The
file may have tables `SAMPLES`, `HELD`, `CHOOSERS`, `STILL_AT_FIRST` and `GROUPED` like the ones
below. Without samples, a kind is tested with the widths in DEFAULTS.
"""

import sys
from collections.abc import Callable
from dataclasses import fields
from itertools import product
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import pytest
import torch

from tinsmith.core.plugins import import_variants, kind_of
from tinsmith.nn.contract import FeedForwardConfigBase, MixerConfigBase, ResidualConfigBase
from tinsmith.nn.feedforwards import FeedForwardConfig
from tinsmith.nn.mixers import MixerConfig
from tinsmith.nn.model import LM, ModelConfig
from tinsmith.nn.residuals import ResidualConfig

DIM, VOCAB = 32, 48

LATENT = {"heads": 4, "kv_rank": 8, "q_rank": 12, "nope_dim": 6, "rope_dim": 4, "v_dim": 10}
HYBRID = {"compress_block": 4, "window": 5, "index_topk": 5, "index_heads": 2, "index_dim": 6}
SAMPLES: dict[str, list[dict[str, Any]]] = {
    "gqa": [
        {"heads": 4},
        {"heads": 4, "kv_heads": 2},
        {"heads": 4, "qk_norm": True},
        {"heads": 4, "window": 5},
        {"heads": 4, "sinks": True},
        {"heads": 4, "kv_heads": 2, "window": 5, "sinks": True},
        {"heads": 4, "kv_heads": 2, "value_residual": True},
        {"heads": 4, "bias": "all"},
        {"heads": 4, "rope": False},
        {"heads": 4, "kv_heads": 1, "head_dim": 12},
    ],
    "mla": [LATENT, LATENT | {"heads": 2, "kv_rank": 24, "q_rank": None, "v_dim": 4}],
    "dsa": [
        LATENT | {"index_heads": 2, "index_dim": 6, "index_topk": 5},
        LATENT | {"index_heads": 1, "index_dim": 4, "index_topk": 4, "index_target": "selected"},
    ],
    "hybrid": [
        LATENT | HYBRID | {"mode": "nsa"},
        LATENT | HYBRID | {"mode": "swa", "gate": "sigmoid", "q_rank": None},
        LATENT | HYBRID | {"branches": ["compress"], "compress_block": 1},
    ],
    "nsa": [
        {
            **{"heads": 4, "kv_heads": 2, "compress_block": 4, "compress_stride": 2},
            **{"select_block": 4, "select_count": 4, "window": 5, "value_residual": True},
        },
        {
            **{"heads": 4, "kv_heads": 1, "compress_block": 4, "compress_stride": 4},
            **{"select_block": 8, "select_count": 5, "window": 6, "qk_norm": True},
        },
    ],
    "dyn_heads": [
        {"heads": 4, "experts": 4},
        {
            **{"heads": 4, "experts": 3, "kv_heads": 2, "head_dim": 6, "window": 5},
            **{"qk_norm": True, "combine": "sum"},
        },
    ],
    "dyn_lora": [
        {"base": {"kind": "gqa", "heads": 4, "kv_heads": 2}, "experts": 4, "rank": 3},
        {
            "base": {"kind": "gqa", "heads": 4, "value_residual": True, "bias": "all"},
            **{"experts": 3, "rank": 2, "combine": "rescaled_sum"},
        },
    ],
    "swiglu": [{"hidden_dim": 48}, {"hidden_dim": 48, "bias": True}],
    "relu2": [{"hidden_dim": 48}, {"hidden_dim": 48, "bias": True}],
    "topk_moe": [
        {"hidden_dim": 24, "experts": 4, "top_k": 2, "n_shared_experts": 1, "z_weight": 0.001},
        {"hidden_dim": 24, "experts": 5, "top_k": 1, "activation": "relu2", "balance": "squared"},
        {
            "hidden_dim": 24,
            "experts": 4,
            "top_k": 3,
            "norm_topk_prob": False,
            "balance": "sequence",
        },
    ],
    "deepseek_moe": [
        {
            "hidden_dim": 24,
            "experts": 8,
            "top_k": 3,
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 1.5,
        },
        {"hidden_dim": 24, "experts": 7, "top_k": 1, "activation": "relu2", "score": "softmax"},
    ],
    "dyn_moe": [
        {"hidden_dim": 24, "experts": 4},
        {
            "hidden_dim": 24,
            "experts": 6,
            "activation": "relu2",
            "combine": "sum",
            "fallback": "none",
        },
        {"hidden_dim": 24, "experts": 4, "combine": "rescaled_sum", "router_grad": "smk"},
    ],
    "plain": [{}],
    "hyper": [{"streams": 4}, {"streams": 2, "fracs": 2}, {"streams": 2, "dynamic": False}],
    "mhyper": [{"streams": 2}, {"streams": 4, "sinkhorn_iterations": 3}],
}


def _heads(mixer: Any, capacity: int) -> int:
    return (
        2
        * mixer.num_kv_heads
        * mixer.resolve_head_dim(DIM)
        * min(capacity, mixer.window or capacity)
    )


def _own(mixer: Any) -> int:
    return mixer.heads * (mixer.nope_dim + mixer.rope_dim + mixer.v_dim)


HELD: dict[str, Callable[[Any, int], int]] = {
    "gqa": _heads,
    "dyn_heads": lambda mixer, capacity: _heads(mixer.gqa_config, capacity),
    "dyn_lora": lambda mixer, capacity: _heads(mixer.base, capacity),
    "dsa": lambda mixer, capacity: (mixer.kv_rank + mixer.rope_dim + mixer.index_dim) * capacity,
    "hybrid": lambda mixer, capacity: sum(
        {
            "compress": (mixer.kv_rank + mixer.rope_dim)
            * (min(capacity, mixer.compress_block) + capacity // mixer.compress_block),
            "select": capacity * (_own(mixer) + mixer.index_dim),
            "window": min(capacity, mixer.window) * _own(mixer),
        }[branch]
        for branch in mixer.branch_names
    ),
    "mla": lambda mixer, capacity: (mixer.kv_rank + mixer.rope_dim) * capacity,
    "nsa": lambda mixer, capacity: (
        2
        * mixer.num_kv_heads
        * mixer.resolve_head_dim(DIM)
        * (
            capacity
            + min(capacity, mixer.window)
            + min(capacity, mixer.compress_block)
            + max((capacity - mixer.compress_block) // mixer.compress_stride + 1, 0)
        )
    ),
}
"""Numbers that a layer's cache holds for one row: (config, capacity) -> count."""

CHOOSERS = {
    *("dsa", "nsa", "hybrid", "dyn_heads", "dyn_lora"),
    *("topk_moe", "deepseek_moe", "dyn_moe"),
}
"""Kinds that choose among tokens, or experts: rounding may turn a choice, and what was not chosen
has no influence.
"""

STILL_AT_FIRST: dict[str, str] = {"hyper": "residual.scale", "dyn_lora": "_delta.down"}
"""Kind -> how the names end of parameters that have a gradient of exactly 0 in the first step, by
mathematics.

`hyper`: weights are s tanh(N W) + static, so ds = tanh(N W) = 0 as long as W = 0, which is what
makes it the plain residual at first; dW = s N is not 0, so s moves from the second step on. Nothing
else stands still: A_m and A_r are free (no rows or columns that must sum to 1, unlike mHC's), so
even where all streams are equal each weight scales what is read or kept.
`mhyper`: H_res of the first and last sub-layer has no say, but its weights are rows of parameters
whose other rows have; nn/test_mhyper.py looks at the rows.
`dyn_lora`: a change is B A x with B = 0, so dA = B' dy x' = 0 until B has moved.
"""

GROUPED = {"nsa", "dyn_heads", "dyn_lora"}
"""Kinds that group tokens by what they choose. The shape of a product then depends on later tokens,
which may change the last bits of earlier ones: causal to 1e-10, where all others are to the bit.
"""


def _kinds(union: Any) -> list[str]:
    while get_origin(union) is Annotated:
        union = get_args(union)[0]
    return [member.kind for member in get_args(union) or (union,)]


SLOTS = {"mixer": MixerConfig, "feed_forward": FeedForwardConfig, "residual": ResidualConfig}
KINDS = {slot: _kinds(union) for slot, union in SLOTS.items()}
DEFAULTS = {
    "mixer": {"kind": "gqa", "heads": 4, "kv_heads": 2},
    "feed_forward": {"kind": "swiglu", "hidden_dim": 48},
    "residual": {"kind": "plain"},
}


USUAL = {"gqa-kv_heads=2", "plain", "topk_moe-experts=4-top_k=2-n_shared_experts=1-z_weight=0.001"}
"""The usual partners: every mixer runs with the plain residual and this routed feed-forward, and
every residual and feed-forward with this mixer.
"""

TRIPLES = [
    ("gqa-window=5", "swiglu", "hyper-streams=4"),
    ("gqa-sinks", "relu2", "mhyper-streams=2"),
    (
        "gqa-kv_heads=2-value_residual",
        "dyn_moe-experts=4",
        "mhyper-streams=4-sinkhorn_iterations=3",
    ),
    ("mla", "deepseek_moe-experts=7-top_k=1", "hyper-streams=2-fracs=2"),
    ("mla", "dyn_moe-experts=4-combine=rescaled_sum-router_grad=smk", "mhyper-streams=2"),
    ("dsa", "deepseek_moe-experts=8-top_k=3", "hyper-streams=4"),
    ("dsa", "topk_moe-experts=5-top_k=1", "mhyper-streams=4-sinkhorn_iterations=3"),
    ("hybrid", "deepseek_moe-experts=7-top_k=1", "mhyper-streams=4-sinkhorn_iterations=3"),
    ("hybrid", "relu2", "hyper-streams=2-dynamic=False"),
    ("nsa", "deepseek_moe-experts=8-top_k=3", "mhyper-streams=2"),
    ("nsa", "swiglu-bias", "hyper-streams=2-fracs=2"),
    ("dyn_heads", "dyn_moe-experts=6", "hyper-streams=4"),
    ("dyn_lora", "topk_moe-experts=4-top_k=3", "mhyper-streams=2"),
]
"""Unusual combinations over all three slots, by the beginnings of the names of their samples."""


BASES = {
    "mixer": MixerConfigBase,
    "feed_forward": FeedForwardConfigBase,
    "residual": ResidualConfigBase,
}

OUTSIDE: set[str] = set()
"""Kinds of the file that `--contracts` names; if there are any, only they are tested."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--contracts", metavar="FILE", help="test the kinds of this Python file instead of our own"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Import the file of `--contracts` and add its kinds and tables to those of the suite."""
    file = config.getoption("--contracts", None)
    for variant in import_variants(Path(file)) if file else []:
        tables = vars(sys.modules[variant.__module__])
        for name in ("SAMPLES", "HELD", "CHOOSERS", "STILL_AT_FIRST", "GROUPED"):
            globals()[name].update(tables.get(name, ()))
        kind = kind_of(variant)
        assert kind is not None
        slot = next((slot for slot, base in BASES.items() if issubclass(variant, base)), None)
        if slot is None:
            raise pytest.UsageError(f"{file}: '{kind}' is no mixer, feed-forward or residual")
        names = {field.name for field in fields(variant)} - {"kind"}
        default = {name: value for name, value in DEFAULTS[slot].items() if name in names}
        SAMPLES.setdefault(kind, [default])
        KINDS[slot].append(kind)
        OUTSIDE.add(kind)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With `--contracts`, leave out the tests that no kind of the file takes part in."""
    if OUTSIDE:
        taking_part = [item for item in items if _takes_part(item)]
        config.hook.pytest_deselected(items=[item for item in items if item not in taking_part])
        items[:] = taking_part


def _takes_part(item: pytest.Item) -> bool:
    """True if a parameter of this test is a section whose kind the file defines."""
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    return any(isinstance(p, dict) and p.get("kind") in OUTSIDE for p in parameters)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that asks for slots over samples of all kinds of these slots.

    With several slots, each sample runs with the usual partners, and the chosen combinations of
    `TRIPLES` are added for `make test-all`; the full product is not generated. A test marked
    `costly` runs over the usual samples by default and over the others in `make test-all`. The
    first sample of every kind is marked `check`.
    """
    slots = [slot for slot in SLOTS if slot in metafunc.fixturenames]
    samples = [[case for kind in KINDS[slot] for case in _cases(kind)] for slot in slots]
    if not slots:
        return
    costly = metafunc.definition.get_closest_marker("costly") is not None
    cases = [
        pytest.param(
            *(case.values[0] for case in combination),
            id="-".join(str(case.id) for case in combination),
            marks=_marks({str(case.id) for case in combination}, costly),
        )
        for combination in product(*samples)
        if _is_run(slots, [str(case.id) for case in combination])
    ]
    metafunc.parametrize(slots, cases, indirect=True)


def _is_run(slots: list[str], names: list[str]) -> bool:
    """True if at most one name is unusual, or if the names are a chosen combination. With
    `--contracts`, a kind of the file must be among them.
    """
    if OUTSIDE and not any(name.split("-")[0] in OUTSIDE for name in names):
        return False
    if sum(name not in USUAL for name in names) <= 1:
        return True
    indices = [list(SLOTS).index(slot) for slot in slots]
    return any(names == [_first_named(triple[i]) for i in indices] for triple in TRIPLES)


def _first_named(beginning: str) -> str:
    """Return the name of the first sample that begins so."""
    names = (_name(kind, sample) for kind, samples in SAMPLES.items() for sample in samples)
    return next(name for name in names if name.startswith(beginning))


def _marks(names: set[str], costly: bool) -> list[pytest.MarkDecorator]:
    """Marks of a combination of samples."""
    first = {_name(kind, samples[0]) for kind, samples in SAMPLES.items()}
    unusual = names - USUAL
    if len(unusual) > 1 or (costly and unusual):
        return [pytest.mark.slow]
    return [pytest.mark.check] if unusual <= first and not costly else []


def _cases(kind: str) -> list[Any]:
    samples = SAMPLES.get(kind)
    if not samples:
        return [pytest.param(kind, id=f"{kind}-without-samples")]
    return [pytest.param({"kind": kind} | sample, id=_name(kind, sample)) for sample in samples]


def _name(kind: str, sample: dict[str, Any]) -> str:
    reported = {key: value for key, value in sample.items() if key not in ("heads", "hidden_dim")}
    return "-".join(
        [kind, *(key if reported[key] is True else f"{key}={reported[key]}" for key in reported)]
    )


def _sample(request: pytest.FixtureRequest) -> dict[str, Any]:
    if isinstance(request.param, str):
        pytest.fail(f"no samples for kind {request.param!r}: add some to {__file__}")
    return request.param


@pytest.fixture
def mixer(request: pytest.FixtureRequest) -> dict[str, Any]:
    return _sample(request)


@pytest.fixture
def feed_forward(request: pytest.FixtureRequest) -> dict[str, Any]:
    return _sample(request)


@pytest.fixture
def residual(request: pytest.FixtureRequest) -> dict[str, Any]:
    return _sample(request)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nobody wrote is NaN: what reads it, even times zero, shows."""

    def poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def made(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = make(*args, **kwargs)
            if tensor.is_floating_point() and not tensor.is_meta:
                with torch.no_grad():
                    tensor.fill_(torch.nan)
            return tensor

        return made

    with torch.device("cpu"):
        torch.empty(0)  # torch.device lists the factories on first use: that must be the real ones
    factories = ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty"))
    for owner, name in factories:
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


Make = Callable[..., LM]


@pytest.fixture
def make() -> Make:
    """(sections of the model config, seed, stirred, dtype) -> a small LM in eval mode.

    `stirred` moves every parameter off its first value, so that norms of 1, sinks of 0 and equal
    mixing weights cannot hide a mistake.
    """

    def made(
        *,
        mixer: dict[str, Any] = DEFAULTS["mixer"],
        feed_forward: dict[str, Any] = DEFAULTS["feed_forward"],
        residual: dict[str, Any] = DEFAULTS["residual"],
        seed: int = 0,
        stirred: bool = True,
        dtype: torch.dtype = torch.float64,
        **model: Any,
    ) -> LM:
        torch.manual_seed(seed)
        section = {
            "vocab_size": VOCAB,
            "dim": DIM,
            "depth": 3,
            "max_seq_len": 256,
            "residual": residual,
            "pattern": [{"mixer": mixer, "feed_forward": feed_forward}],
        }
        lm = LM(ModelConfig.from_dict(section | model)).to(dtype).eval()
        if stirred:
            with torch.no_grad():
                for parameter in lm.parameters():
                    parameter += 0.2 * torch.randn_like(parameter)
        return lm

    return made


@pytest.fixture
def lm(make: Make, mixer: dict[str, Any], residual: dict[str, Any]) -> LM:
    """A stirred float64 model of this mixer and residual."""
    return make(mixer=mixer, residual=residual)


@pytest.fixture
def choosers() -> set[str]:
    """Kinds that choose among tokens, or experts."""
    return CHOOSERS


@pytest.fixture
def held() -> Callable[[Any, int], int]:
    """Numbers that a layer's cache holds for one row: (config of a mixer, capacity) -> count."""

    def count(mixer: Any, capacity: int) -> int:
        if mixer.kind in OUTSIDE - set(HELD):
            pytest.skip(f"no HELD for {mixer.kind!r}: the size of its cache is not checked")
        if mixer.kind not in HELD:
            pytest.fail(f"no cache size for kind {mixer.kind!r}: add it to HELD in {__file__}")
        return HELD[mixer.kind](mixer, capacity)

    return count


@pytest.fixture
def still() -> Callable[[tuple[dict[str, Any], ...], str], bool]:
    """Whether the parameter `name` of a model with these parts stands still in the first step."""

    def stands(parts: tuple[dict[str, Any], ...], name: str) -> bool:
        endings = [
            STILL_AT_FIRST[kind] for part in parts if (kind := part["kind"]) in STILL_AT_FIRST
        ]
        return any(name.endswith(ending) for ending in endings)

    return stands


@pytest.fixture
def agrees_compiled(draw: Callable[..., torch.Tensor]) -> Callable[[LM], None]:
    """Asserts that a model compiles to one graph without a break and says the same, for plain rows,
    and for packed ones with their gradients.
    """

    def check(lm: LM) -> None:
        torch.compiler.reset()
        compiled = torch.compile(lm, fullgraph=True, backend="aot_eager", dynamic=False)
        ids, segments = draw(2, 12), torch.tensor([[7] * 5 + [3] * 7, [-1] * 2 + [0] * 10])
        found = [model(ids).logits for model in (compiled, lm)]
        torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)
        output = []
        for model in (compiled, lm):
            lm.zero_grad()
            with torch.enable_grad():
                logits = model(ids, segments=segments).logits
                logits[segments >= 0].square().sum().backward()
            output.append([logits, *(parameter.grad for parameter in lm.parameters())])
        torch.testing.assert_close(*output, rtol=1e-10, atol=1e-10)

    return check


@pytest.fixture
def exact(mixer: dict[str, Any]) -> bool:
    """Whether no shape inside this mixer depends on the data."""
    return mixer["kind"] not in GROUPED


@pytest.fixture
def draw() -> Callable[..., torch.Tensor]:
    """(rows, length, seed) -> ids, the same for the same arguments."""

    def ids(rows: int, length: int, seed: int = 1) -> torch.Tensor:
        return torch.randint(
            0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed)
        )

    return ids
