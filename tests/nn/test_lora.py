"""LoRA: equal to the base at initialisation, to the merged model, and to the base when disabled."""

import copy
import math
import re
from dataclasses import replace

import pytest
import torch
from torch import nn

from tinsmith.core.errors import UserError
from tinsmith.infer.engine import Engine
from tinsmith.infer.onednn_weights import PrepackedLinear, prepack_weights
from tinsmith.infer.sample import SamplingParams
from tinsmith.nn import lora
from tinsmith.nn.lora import LoRA
from tinsmith.nn.model import LM, ModelConfig
from tinsmith.objectives.frozen import reference_model
from tinsmith.optim.build import Optimizers
from tinsmith.optim.config import OptimConfig

PLAIN = LoRA(rank=3, alpha=5.0)
LATENT = {"heads": 4, "kv_rank": 8, "q_rank": 12, "nope_dim": 6, "rope_dim": 4, "v_dim": 10}
CHOICE = {"index_heads": 2, "index_dim": 6, "index_topk": 5}
MIXERS = {
    "gqa": {"kind": "gqa", "heads": 4, "kv_heads": 2, "qk_norm": True, "value_residual": True},
    "mla": {"kind": "mla"} | LATENT,
    "nsa": {
        **{"kind": "nsa", "heads": 4, "kv_heads": 2, "compress_block": 4, "compress_stride": 2},
        **{"select_block": 4, "select_count": 4, "window": 5},
    },
    "dsa": {"kind": "dsa"} | LATENT | CHOICE,
    "hybrid": {"kind": "hybrid", "mode": "nsa", "compress_block": 4, "window": 5} | LATENT | CHOICE,
}
every_mixer = pytest.mark.parametrize("mixer", MIXERS.values(), ids=list(MIXERS))


@pytest.fixture
def build():
    """A small model of one mixer in eval mode, every parameter off its first value."""

    def made(mixer: dict | None = None, dtype: torch.dtype = torch.float64, **model) -> LM:
        torch.manual_seed(0)
        layer = {
            "mixer": mixer or MIXERS["gqa"],
            "feed_forward": {"kind": "swiglu", "hidden_dim": 48},
        }
        section = {"vocab_size": 48, "dim": 32, "depth": 2, "max_seq_len": 128, "pattern": [layer]}
        lm = LM(ModelConfig.from_dict(section | model)).to(dtype).eval()
        with torch.no_grad():
            for parameter in lm.parameters():
                parameter += 0.2 * torch.randn_like(parameter)
        return lm

    return made


def stir(model: nn.Module) -> None:
    """As if it had been trained."""
    with torch.no_grad():
        for adapter in lora.adapters(model).values():
            adapter.B.normal_(std=0.1)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


class Experts(nn.Module):
    """Two stacks, stored (E, out, in) and (E, in, out)."""

    EXPERT_STACKS = (
        "up",
        "down",
    )

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 6, 4))
        self.down = nn.Parameter(torch.randn(3, 6, 4))

    def forward(self, x):
        return torch.einsum("eoi,eti->eto", self.up, x).relu() @ self.down


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.experts = Experts()

    def forward(self, x):
        return self.experts(self.first(x))


def test_the_formula_and_its_scaling():
    linear = nn.Sequential(nn.Linear(5, 7)).double()
    x, plain = torch.randn(2, 5).double(), copy.deepcopy(linear)
    for config, scale in ((PLAIN, 5 / 3), (replace(PLAIN, rslora=True), 5 / math.sqrt(3))):
        model = copy.deepcopy(plain)
        lora.add_adapters(model, config)
        stir(model)
        adapter = lora.adapters(model)["0.weight"]
        wanted = plain(x) + scale * x @ adapter.A.T @ adapter.B.T
        torch.testing.assert_close(model(x), wanted, rtol=1e-12, atol=1e-12)


def test_A_is_kaiming_uniform_and_B_is_zero():
    model = nn.Sequential(nn.Linear(400, 7))
    lora.add_adapters(model, LoRA(rank=64))
    adapter = lora.adapters(model)["0.weight"]
    assert adapter.A.abs().max() <= 1 / 20
    assert adapter.A.std().item() == pytest.approx(1 / 20 / math.sqrt(3), rel=0.02)
    assert not adapter.B.any()


@every_mixer
def test_with_B_zero_logits_and_decoding_equal_the_base_to_the_bit(build, ids, mixer):
    lm = build(mixer)
    adapted = copy.deepcopy(lm)
    lora.add_adapters(adapted, LoRA(dropout=0.5))
    with torch.no_grad():
        assert torch.equal(adapted(ids).logits, lm(ids).logits)
        assert torch.equal(decoded(adapted, ids), decoded(lm, ids))


def decoded(lm: LM, ids: torch.Tensor) -> torch.Tensor:
    caches = lm.new_caches(len(ids), ids.shape[1])
    return torch.cat([lm(ids[:, t : t + 1], caches=caches).logits for t in range(ids.shape[1])], 1)


@every_mixer
def test_merged_equals_adapted_and_decoding_equals_the_whole(build, ids, mixer):
    lm = build(mixer)
    lora.add_adapters(lm, PLAIN)
    stir(lm)
    before = state(lm)
    with torch.no_grad():
        wanted, stepwise = lm(ids).logits, decoded(lm, ids)
        lora.merge(lm)
        torch.testing.assert_close(lm(ids).logits, wanted, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(stepwise, wanted, rtol=1e-10, atol=1e-10)
        assert not torch.equal(lm.state_dict()["blocks.0.mixer.o_proj.weight"], before_o(before))
        lora.merge(lm)
        torch.testing.assert_close(lm(ids).logits, wanted, rtol=1e-10, atol=1e-12)
        lora.unmerge(lm)
        assert torch.equal(lm(ids).logits, wanted)
    after = lm.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def before_o(before: dict[str, torch.Tensor]) -> torch.Tensor:
    return before["blocks.0.mixer.o_proj.weight"]


def test_merging_happens_in_float32_and_is_cast_once():
    model = nn.Sequential(nn.Linear(64, 64)).bfloat16()
    lora.add_adapters(model, LoRA(rank=4))
    adapter = lora.adapters(model)["0.weight"]
    assert adapter.A.dtype == adapter.B.dtype == torch.float32
    stir(model)
    wanted = (model[0]._parameters["weight"].double() + 8 * (adapter.B @ adapter.A).double()).to(
        torch.bfloat16
    )
    lora.merge(model)
    assert (model[0].weight == wanted).float().mean() > 0.999


@every_mixer
def test_disabled_adapters_give_the_base_to_the_bit_without_dropout(build, ids, mixer):
    lm = build(mixer, dropout={"embedding": 0.1, "attention": 0.1, "residual": 0.1})
    wanted, stepwise = lm(ids).logits, decoded(lm, ids)
    lora.add_adapters(lm, replace(PLAIN, dropout=0.3))
    with torch.no_grad():
        stir(lm)
    lm.train()
    with reference_model(lm, None) as base:
        assert base is lm
        assert torch.equal(base(ids).logits, wanted)
        assert torch.equal(decoded(base, ids), stepwise)
        assert not base(ids).logits.requires_grad
    assert lm.training
    assert lm.blocks[0].mixer.o_proj.lora["weight"].training
    assert not torch.allclose(lm(ids).logits, wanted, atol=1e-2)


def test_a_frozen_model_is_the_reference_if_there_is_one(build):
    lm, other = build(), build().requires_grad_(False)
    with reference_model(lm, other) as found:
        assert found is other
    with pytest.raises(ValueError, match="no adapters"), reference_model(lm, None):
        pass


def test_DPO_of_adapters_starts_at_the_same_bits_as_its_reference(build, ids):
    lm = build().float().train()
    lora.add_adapters(lm, PLAIN)
    with torch.autocast("cpu", torch.bfloat16):
        mine = lm(ids).logits
        with reference_model(lm, None) as base:
            assert torch.equal(base(ids).logits, mine)


def test_disabling_adapters_survives_an_error_and_nests(build):
    lm = build()
    lora.add_adapters(lm, PLAIN)
    with pytest.raises(KeyError), lora.disable_adapters(lm), lora.disable_adapters(lm):
        raise KeyError
    assert all(adapter.is_active for adapter in lora.adapters(lm).values())
    lora.merge(lm)
    with pytest.raises(ValueError, match="unmerge"), lora.disable_adapters(lm):
        pass


@every_mixer
def test_only_adapters_are_trained_and_the_base_stays_bit_equal(build, ids, mixer):
    lm = build(mixer).train()
    lora.add_adapters(lm, replace(PLAIN, dropout=0.1))
    before = state(lm)
    optimizers = Optimizers.build(lm, None, OptimConfig())
    for _ in range(2):
        out = lm(ids)
        (out.logits.square().mean() + sum(out.losses.values())).backward()
        optimizers.step()
        grads = {name for name, each in lm.named_parameters() if each.grad is not None}
        optimizers.zero_grad()
    trained = {name for name, each in lm.named_parameters() if each.requires_grad}
    assert grads == trained == {name for name in before if ".lora." in name}
    after = lm.state_dict()
    moved = {name for name, tensor in before.items() if not torch.equal(after[name], tensor)}
    assert moved == trained
    assert {name.partition("|")[0] for name in optimizers.state_tensors()} == trained


@every_mixer
def test_checkpointing_changes_no_gradient(build, ids, mixer):
    lm = build(mixer).train()
    lora.add_adapters(lm, replace(PLAIN, dropout=0.2))
    stir(lm)
    found = []
    for checkpointing in (False, True):
        lm.activation_checkpointing = checkpointing
        lm.zero_grad()
        torch.manual_seed(3)
        out = lm(ids)
        (out.logits.square().mean() + sum(out.losses.values())).backward()
        found.append([each.grad for each in lm.parameters() if each.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_dropout_acts_on_the_input_of_A_in_training_only(build, ids):
    lm = build()
    lora.add_adapters(lm, replace(PLAIN, dropout=0.5))
    assert torch.equal(lm.train()(ids).logits, lm.eval()(ids).logits)
    stir(lm)
    assert torch.equal(lm(ids).logits, lm(ids).logits)
    assert not torch.equal(lm.train()(ids).logits, lm(ids).logits)


@pytest.mark.parametrize("mixer", [MIXERS["gqa"], MIXERS["mla"]], ids=["gqa", "mla"])
def test_it_compiles_to_one_graph(build, ids, mixer):
    lm = build(mixer)
    lora.add_adapters(lm, PLAIN)
    stir(lm)
    torch.compiler.reset()
    compiled = torch.compile(lm, fullgraph=True, backend="aot_eager", dynamic=False)
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids).logits, lm(ids).logits, rtol=1e-10, atol=1e-10)
        with lora.disable_adapters(lm):
            torch.testing.assert_close(compiled(ids).logits, lm(ids).logits, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mixer", [MIXERS["gqa"], MIXERS["mla"]], ids=["gqa", "mla"])
def test_the_engine_uses_adapters_and_the_base_if_disabled(build, mixer):
    lm = build(mixer, torch.float32)
    engine = Engine(lm)
    lora.add_adapters(lm, replace(PLAIN, dropout=0.5))
    stir(lm)
    adapted = answer(engine)
    assert adapted == greedily(lm)
    with lora.disable_adapters(lm):
        assert answer(engine) == greedily(lm) != adapted
    assert answer(engine) == adapted
    lora.merge(lm)
    assert answer(engine) == adapted


def answer(engine: Engine) -> list[int]:
    engine.add(range(9), SamplingParams(temperature=0), 12)
    return [event.token for event in engine.run()]


@torch.no_grad()
def greedily(lm: LM) -> list[int]:
    ids = list(range(9))
    for _ in range(12):
        ids.append(int(lm(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[9:]


def test_a_packed_adapted_layer_includes_the_adapter(build, ids):
    lm = build(None, torch.float32)
    lora.add_adapters(lm, PLAIN)
    stir(lm)
    twin = prepack_weights(lm)
    if twin is lm:
        pytest.skip("not packed here")
    assert all(isinstance(m, PrepackedLinear) for m in twin.modules() if isinstance(m, nn.Linear))
    torch.testing.assert_close(twin(ids).logits, lm(ids).logits, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(twin(ids).logits, lm(ids).logits, rtol=1e-4, atol=1e-4)
    assert twin.blocks[0].mixer.q_proj.packed_weight is not None


def test_state_dict_has_the_names_of_the_base_and_two_more_per_target(build):
    lm = build()
    plain = set(lm.state_dict())
    lora.add_adapters(lm, LoRA(targets=("q_proj",)))
    own = {f"blocks.{i}.mixer.q_proj.lora.weight.{leaf}" for i in range(2) for leaf in "AB"}
    assert set(lm.state_dict()) == plain | own
    base, pairs = lora.split_state_dict(lm.state_dict())
    assert set(base) == plain
    assert set(pairs) == {f"blocks.{i}.mixer.q_proj.weight" for i in range(2)}


def test_merged_state_dict_equals_that_of_the_merged_model(build, ids):
    lm = build()
    plain = copy.deepcopy(lm)
    lora.add_adapters(lm, PLAIN)
    stir(lm)
    plain.load_state_dict(
        lora.merged_state_dict(*lora.split_state_dict(lm.state_dict()), PLAIN.scaling)
    )
    lora.merge(lm)
    assert torch.equal(plain(ids).logits, lm(ids).logits)


def test_every_expert_of_a_stack_has_its_own_adapter():
    toy = Toy().double()
    plain, x = copy.deepcopy(toy), torch.randn(3, 2, 4).double()
    lora.add_adapters(toy, replace(PLAIN, targets=("experts.*", "first")))
    assert torch.equal(toy(x), plain(x))
    stir(toy)
    pairs = lora.adapters(toy)
    assert set(pairs) == {"first.weight", "experts.up", "experts.down"}
    assert pairs["experts.up"].A.shape == (3, 3, 4)
    assert pairs["experts.up"].B.shape == (3, 6, 3)
    for name, parameter in plain.named_parameters():
        if name in pairs:
            parameter.data += 5 / 3 * pairs[name].B @ pairs[name].A
    torch.testing.assert_close(toy(x), plain(x), rtol=1e-12, atol=1e-12)
    toy(x).sum().backward()
    assert all(each.grad is not None for each in toy.parameters() if each.requires_grad)
    assert toy.experts._parameters["up"].grad is None
    lora.merge(toy)
    torch.testing.assert_close(toy(x), plain(x), rtol=1e-12, atol=1e-12)
    assert set(toy.state_dict()) >= set(plain.state_dict())


def test_adapters_of_stacks_are_trained_as_matrices():
    toy = Toy()
    lora.add_adapters(toy, LoRA(targets=("experts.up", "first")))
    groups = Optimizers.build(toy, None, OptimConfig()).learning_rates()
    assert set(groups) == {"matrix"}


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        ("all", 14),
        (("all",), 14),
        ("up_proj", 2),
        (("q_proj", "v_proj"), 4),
        (("mixer.*",), 8),
        (("blocks.0.*_proj",), 7),
        (("blocks.1.mixer.q_proj",), 1),
        (("q_proj", "mixer.q_proj", "*"), 14),
    ],
)
def test_targets_are_names_suffixes_or_patterns(build, targets, count):
    lm = build()
    lora.add_adapters(lm, LoRA(targets=targets))
    assert len(lora.adapters(lm)) == count


@pytest.mark.parametrize(
    ("targets", "output"),
    [
        (("q_prj",), r"'q_prj' names no linear layer.*mixer\.q_proj.*Did you mean 'q_proj'"),
        (("q_proj", "nothing"), "'nothing' names no linear layer of this model; there are"),
        (("embed",), "'embed' is not a linear layer that can be adapted; there are"),
        (("head",), "'head' is not a linear layer that can be adapted"),
        (("mix_norm",), "'mix_norm' is not a linear layer that can be adapted"),
    ],
)
def test_an_invalid_target_is_refused_in_one_line_and_nothing_changes(build, targets, output):
    lm = build()
    with pytest.raises(UserError, match=output) as error:
        lora.add_adapters(lm, LoRA(targets=targets))
    assert "\n" not in str(error.value)
    assert all(parameter.requires_grad for parameter in lm.parameters())


def test_dropout_of_a_stack_is_refused():
    with pytest.raises(UserError, match=r"lora\.dropout: 0\.1, but experts\.up is a stack"):
        lora.add_adapters(Toy(), LoRA(targets=("up",), dropout=0.1))


@pytest.mark.parametrize(
    ("key", "value", "output"),
    [
        ("rank", 0, "rank=0 must be at least 1"),
        ("alpha", 0.0, "alpha=0.0 must be a number above 0"),
        ("alpha", math.inf, "alpha=inf must be"),
        ("dropout", 1.0, "dropout=1.0 must be at least 0 and below 1"),
        ("targets", (), "targets must name at least one layer"),
    ],
)
def test_invalid_values_are_refused(key, value, output):
    with pytest.raises(ValueError, match=re.escape(output)):
        LoRA(**{key: value})
