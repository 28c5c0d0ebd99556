"""The contract suite runs every test over every kind of the slots it asks for, in float64.

A test that takes a fixture `mixer`, `feed_forward` or `residual` runs over the configs in
`samples.py`. Nothing else in this folder depends on the kind. `pytest tests/contracts --contracts
my_mixer.py` tests the kinds of a user's own file instead.
"""

import sys
from collections.abc import Callable
from dataclasses import fields
from functools import cache
from itertools import product
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import pytest
import torch

from tests.contracts import samples as tables
from tests.contracts.samples import DEFAULTS, DIM, SAMPLES, USUAL, VOCAB
from tinsmith.core.plugins import import_variants, kind_of
from tinsmith.nn.contract import FeedForwardConfigBase, MixerConfigBase, ResidualConfigBase
from tinsmith.nn.feedforwards import FeedForwardConfig
from tinsmith.nn.mixers import MixerConfig
from tinsmith.nn.model import LM, ModelConfig
from tinsmith.nn.residuals import ResidualConfig


def _kinds(union: Any) -> list[str]:
    while get_origin(union) is Annotated:
        union = get_args(union)[0]
    return [member.kind for member in get_args(union) or (union,)]


SLOTS = {"mixer": MixerConfig, "feed_forward": FeedForwardConfig, "residual": ResidualConfig}
BASES = {
    "mixer": MixerConfigBase,
    "feed_forward": FeedForwardConfigBase,
    "residual": ResidualConfigBase,
}
KINDS = {slot: _kinds(union) for slot, union in SLOTS.items()}
OUTSIDE: set[str] = set()
"""Kinds of the file that `--contracts` names. If there are any, only they are tested."""
OUTSIDE_TABLES = [
    *("SAMPLES", "CACHE_SIZES", "SELECTIVE", "NOT_BITWISE_CAUSAL", "NOT_TRUNCATABLE"),
    *("ZERO_GRAD_AT_INIT", "TOKEN_CHOICE_FLOPS"),
]
"""Tables of `samples.py` that a file of variants may define too."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--contracts", metavar="FILE", help="test the kinds of this Python file instead of our own"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Add the recurrent mixer beside this file, and the kinds of the file of `--contracts`."""
    _add_variants(Path(__file__).with_name("recurrent.py"))
    file = config.getoption("--contracts", None)
    if file:
        OUTSIDE.update(_add_variants(Path(file)))


def _add_variants(file: Path) -> list[str]:
    """Add the kinds and tables of a file of variants to those of the suite; return its kinds."""
    kinds = []
    for variant in import_variants(file):
        module = sys.modules[variant.__module__]
        for name in OUTSIDE_TABLES:
            getattr(tables, name).update(getattr(module, name, ()))
        kind = kind_of(variant)
        assert kind is not None
        slot = next((slot for slot, base in BASES.items() if issubclass(variant, base)), None)
        if slot is None:
            raise pytest.UsageError(f"{file}: '{kind}' is no mixer, feed-forward or residual")
        names = {field.name for field in fields(variant)} - {"kind"}
        default = {name: value for name, value in DEFAULTS[slot].items() if name in names}
        SAMPLES.setdefault(kind, [default])
        if kind not in KINDS[slot]:
            KINDS[slot].append(kind)
        kinds.append(kind)
    return kinds


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
    """Parametrise a test with fixtures of slots over the samples of all kinds of these slots.

    With several slots, each sample runs with the usual partners, and `COMBINATIONS` are added for
    `make test-all`. The full product is not generated. A test marked `costly` runs over the usual
    samples by default and over the others in `make test-all`. The first sample of every kind is
    marked `check`.
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
    """True if at most one name is unusual, or if they are a listed combination. With
    `--contracts`, a kind of the file must be among them.
    """
    if OUTSIDE and not any(name.split("-")[0] in OUTSIDE for name in names):
        return False
    if sum(name not in USUAL for name in names) <= 1:
        return True
    indices = [list(SLOTS).index(slot) for slot in slots]
    return any(
        names == [_first_named(triple[i]) for i in indices] for triple in tables.COMBINATIONS
    )


def _first_named(beginning: str) -> str:
    """Return the first name of a sample that starts with `beginning`."""
    return next(name for name in _all_names() if name.startswith(beginning))


@cache
def _all_names() -> list[str]:
    return [_name(kind, sample) for kind, samples in SAMPLES.items() for sample in samples]


def _marks(names: set[str], costly: bool) -> list[pytest.MarkDecorator]:
    """Return the marks of a combination of samples."""
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
    options = {key: value for key, value in sample.items() if key not in ("heads", "hidden_dim")}
    return "-".join(
        [kind, *(key if value is True else f"{key}={value}" for key, value in options.items())]
    )


def _sample(request: pytest.FixtureRequest) -> dict[str, Any]:
    if isinstance(request.param, str):
        pytest.fail(f"no samples for kind {request.param!r}: add some to {tables.__file__}")
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
    """Fill uninitialised memory with NaN, so that reading it shows, even multiplied by 0."""

    def poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def make_poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = make(*args, **kwargs)
            if tensor.is_floating_point() and not tensor.is_meta:
                with torch.no_grad():
                    tensor.fill_(torch.nan)
            return tensor

        return make_poisoned

    with torch.device("cpu"):
        torch.empty(
            0
        )  # torch.device lists the factories on first use; it must find the original ones
    factories = ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty"))
    for owner, name in factories:
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


Make = Callable[..., LM]


@pytest.fixture
def make() -> Make:
    """(sections of the model config, seed, perturbed, dtype) -> a small LM in eval mode.

    `perturbed` adds noise to every parameter, so that norms of 1, sinks of 0 and equal mixing
    weights cannot hide a mistake.
    """

    def build(
        *,
        mixer: dict[str, Any] = DEFAULTS["mixer"],
        feed_forward: dict[str, Any] = DEFAULTS["feed_forward"],
        residual: dict[str, Any] = DEFAULTS["residual"],
        seed: int = 0,
        perturbed: bool = True,
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
        if perturbed:
            with torch.no_grad():
                for parameter in lm.parameters():
                    parameter += 0.2 * torch.randn_like(parameter)
        return lm

    return build


@pytest.fixture
def lm(make: Make, mixer: dict[str, Any], residual: dict[str, Any]) -> LM:
    """A perturbed float64 model with this mixer and residual."""
    return make(mixer=mixer, residual=residual)


@pytest.fixture
def selective_kinds() -> set[str]:
    """Kinds that select tokens or experts."""
    return tables.SELECTIVE


@pytest.fixture
def expected_cache_size() -> Callable[[Any, int], int]:
    """(config of a mixer, capacity) -> numbers in a layer's cache per row."""

    def count(mixer: Any, capacity: int) -> int:
        if mixer.kind in OUTSIDE - set(tables.CACHE_SIZES):
            pytest.skip(f"{mixer.kind!r} is not in CACHE_SIZES: cache size not tested")
        if mixer.kind not in tables.CACHE_SIZES:
            pytest.fail(f"no cache size for kind {mixer.kind!r}: add it to {tables.__file__}")
        return tables.CACHE_SIZES[mixer.kind](mixer, capacity)

    return count


@pytest.fixture
def has_zero_grad_at_init() -> Callable[[tuple[dict[str, Any], ...], str], bool]:
    """(sections of a model, parameter name) -> True if its gradient is 0 at the first step."""

    def has(sections: tuple[dict[str, Any], ...], name: str) -> bool:
        suffixes = tables.ZERO_GRAD_AT_INIT
        return any(name.endswith(suffixes.get(section["kind"], "\0")) for section in sections)

    return has


@pytest.fixture
def assert_compiles(draw: Callable[..., torch.Tensor]) -> Callable[[LM], None]:
    """Assert that a model compiles without a graph break to equal logits, and on packed rows to
    equal gradients.
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
def is_bitwise_causal(mixer: dict[str, Any]) -> bool:
    """True if no shape inside this mixer depends on the data."""
    return mixer["kind"] not in tables.NOT_BITWISE_CAUSAL


@pytest.fixture
def is_truncatable(mixer: dict[str, Any]) -> bool:
    """True if the cache of this mixer can forget its newest tokens, at least while it is short."""
    return mixer["kind"] not in tables.NOT_TRUNCATABLE


@pytest.fixture
def draw() -> Callable[..., torch.Tensor]:
    """(rows, length, seed) -> random ids (rows, length), a function of the arguments."""

    def ids(rows: int, length: int, seed: int = 1) -> torch.Tensor:
        return torch.randint(
            0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed)
        )

    return ids
