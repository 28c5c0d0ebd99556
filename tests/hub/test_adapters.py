"""PEFT adapter files: PEFT reads what Tinsmith writes, and Tinsmith reads what PEFT writes."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from tinsmith.core.errors import UserError
from tinsmith.hub.hf import export_folder
from tinsmith.hub.peft.adapters import (
    Adapters,
    attach_adapters,
    merge_adapters,
    read_adapters,
    write_adapters,
)
from tinsmith.nn import lora
from tinsmith.nn.lora import LoRA
from tinsmith.nn.model import LM

LATENT = {"kind": "mla", "heads": 4, "kv_rank": 8, "nope_dim": 6, "rope_dim": 4, "v_dim": 10}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"bias": "qkv"},
    "qwen3": {"qk_norm": True},
    "deepseek_v3": LATENT | {"q_rank": 12},
    "deepseek_v3 without q_rank": LATENT | {"q_rank": None},
}
CONFIG = LoRA(rank=3, alpha=5.0)


def targets(mixer: dict[str, Any]) -> tuple[str, ...]:
    """PEFT 0.21 over transformers 5 takes `down_proj` of DeepSeek's dense layers for experts, and
    then adapts nothing: there, attention alone can be compared.
    """
    return ("mixer.*",) if "kind" in mixer else ("mixer.*", "feed.*")


def trained(lm: LM, config: LoRA) -> Adapters:
    """Adapters that have moved, on `lm`."""
    lora.add_adapters(lm, config)
    with torch.no_grad():
        for adapter in lora.adapters(lm).values():
            adapter.B.normal_(std=0.1)
    return Adapters(config, lora.split_state_dict(dict(lm.state_dict()))[1])


def theirs(folder: Path) -> Any:
    import tinsmith.hub.auto  # noqa: F401

    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("mixer", FAMILIES.values(), ids=list(FAMILIES))
def test_peft_loads_exported_adapters_on_the_exported_model(model, ids, tmp_path, mixer, rslora):
    peft = pytest.importorskip("peft")
    lm = model(mixer)
    base = lm(ids).logits
    export_folder(lm, None, tmp_path / "base")
    sizes = {"rank": 3, "alpha": 5.0, "rslora": rslora, "dropout": 0.1, "targets": targets(mixer)}
    made = trained(lm, LoRA(**sizes))
    write_adapters(tmp_path / "adapter", lm.config, made, str(tmp_path / "base"))
    found = peft.PeftModel.from_pretrained(theirs(tmp_path / "base"), str(tmp_path / "adapter"))
    with torch.no_grad():
        close(found(ids).logits, lm(ids).logits)
        assert not torch.allclose(lm(ids).logits, base, atol=1e-2)
        close(found.merge_and_unload()(ids).logits, lm(ids).logits)


def written_by_peft(config, ids, folder) -> Tensor:
    """Save PEFT adapters of `folder`/base to `folder`/adapter and return the logits of PEFT."""
    import peft

    adapted = peft.get_peft_model(theirs(folder / "base"), config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
        wanted = adapted.eval()(ids).logits
    adapted.save_pretrained(folder / "adapter")
    return wanted


@pytest.mark.parametrize("mixer", FAMILIES.values(), ids=list(FAMILIES))
def test_adapters_written_by_peft_attach_and_merge(model, ids, tmp_path, mixer):
    peft = pytest.importorskip("peft")
    lm = model(mixer)
    export_folder(lm, None, tmp_path / "base")
    names = "q_proj|q_b_proj|kv_a_proj_with_mqa|o_proj"
    names += "" if "kind" in mixer else "|down_proj"
    config = peft.LoraConfig(r=4, lora_alpha=7, target_modules=rf".*\.({names})", use_rslora=True)
    wanted = written_by_peft(config, ids, tmp_path)
    made = read_adapters(tmp_path / "adapter", lm.config)
    assert (made.config.rank, made.config.alpha, made.config.rslora) == (4, 7, True)
    folded = copy.deepcopy(lm)
    attach_adapters(lm, made)
    merge_adapters(folded, made)
    with torch.no_grad():
        close(lm(ids).logits, wanted)
        close(folded(ids).logits, wanted)
    assert {name for name, each in lm.named_parameters() if each.requires_grad} == {
        name for name in lm.state_dict() if ".lora." in name
    }


def test_peft_loads_adapters_of_a_tinsmith_architecture(model, ids, tmp_path):
    peft = pytest.importorskip("peft")
    lm = model({"sinks": True})
    export_folder(lm, None, tmp_path / "base")
    made = trained(lm, CONFIG)
    write_adapters(tmp_path / "adapter", lm.config, made, None)
    found = peft.PeftModel.from_pretrained(theirs(tmp_path / "base"), str(tmp_path / "adapter"))
    close(found(ids).logits, lm(ids).logits)


@pytest.mark.parametrize("mixer", FAMILIES.values(), ids=list(FAMILIES))
def test_writing_and_reading_adapters_is_bit_exact(model, tmp_path, mixer):
    lm = model(mixer)
    made = trained(lm, LoRA(targets=("down_proj", "o_proj"), rank=3, alpha=5.0, dropout=0.25))
    write_adapters(tmp_path, lm.config, made, None)
    back = read_adapters(tmp_path, lm.config)
    assert back.config.dropout == 0.25
    assert back.pairs.keys() == made.pairs.keys()
    assert all(
        torch.equal(a, b)
        for k in made.pairs
        for a, b in zip(back.pairs[k], made.pairs[k], strict=True)
    )


def test_forward_and_merge_equal_peft_for_equal_A_and_B(ids):
    """One linear layer, A and B copied: the formula, and merging, are PEFT's."""
    peft = pytest.importorskip("peft")
    ours = torch.nn.Sequential(torch.nn.Linear(6, 5)).double()
    other = peft.get_peft_model(
        copy.deepcopy(ours), peft.LoraConfig(r=3, lora_alpha=5, target_modules=["0"])
    )
    lora.add_adapters(ours, CONFIG)
    adapter = lora.adapters(ours)["0.weight"]
    with torch.no_grad():
        adapter.B.normal_()
        layer = other.base_model.model[0]
        layer.lora_A["default"].weight.copy_(adapter.A)
        layer.lora_B["default"].weight.copy_(adapter.B)
    x = torch.randn(4, 6).double()
    torch.testing.assert_close(ours(x), other(x), rtol=1e-12, atol=1e-12)
    lora.merge(ours)
    merged = other.merge_and_unload()
    torch.testing.assert_close(ours[0].weight, merged[0].weight, rtol=1e-12, atol=1e-12)


@pytest.fixture
def folder(model, tmp_path):
    """A good folder of adapters, and its model."""
    lm = model()
    made = trained(lm, LoRA(targets=("q_proj",), rank=3))
    write_adapters(tmp_path / "adapter", lm.config, made, None)
    return tmp_path / "adapter", lm.config


@pytest.mark.parametrize(
    ("key", "value", "output"),
    [
        ("peft_type", "IA3", "peft_type: 'IA3' is not supported"),
        ("use_dora", True, "use_dora: True is not supported"),
        ("bias", "all", "bias: 'all' is not supported"),
        ("rank_pattern", {"q_proj": 4}, "rank_pattern: .* is not supported"),
        ("modules_to_save", ["lm_head"], "modules_to_save: .* is not supported"),
        ("init_lora_weights", "pissa", "init_lora_weights: 'pissa' is not supported"),
        ("r", 0, "r: must be a whole number from 1"),
        ("r", 4, r"q_proj: lora_A and lora_B are \[3, 32\] and \[32, 3\], not \[4, 32\]"),
        ("lora_alpha", "much", "lora_alpha: must be a number"),
        ("target_parameters", "up", "target_parameters: must be a list"),
    ],
)
def test_unsupported_peft_features_are_refused_with_their_key(folder, key, value, output):
    place, config = folder
    path = place / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(UserError, match=output) as error:
        read_adapters(place, config)
    assert "\n" not in str(error.value)
    assert str(place) in str(error.value)


@pytest.mark.parametrize(
    ("change", "output"),
    [
        (lambda name: name.replace("q_proj", "qkv_proj"), "has no adapter of a weight"),
        (lambda name: name.replace("0.self_attn.q_proj", "0.self_attn.qkv_proj"), "qkv_proj.*no"),
        (
            lambda name: name.replace("layers.2", "layers.3"),
            "layers.3.*belongs to no adapted weight",
        ),
        (lambda name: name.replace("1.self_attn.q_proj.lora_B", "x"), "q_proj.lora_B.* is missing"),
        (lambda name: name.replace("model.layers.0.self_attn.q_proj", "lm_head"), "lm_head.*no"),
    ],
)
def test_tensors_of_another_model_are_refused_by_name(folder, change, output):
    place, config = folder
    path = place / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({change(name): tensor for name, tensor in tensors.items()}, path)
    with pytest.raises(UserError, match=output):
        read_adapters(place, config)


def test_missing_and_pickled_files_give_one_line(folder):
    place, config = folder
    path = place / "adapter_model.safetensors"
    path.rename(place / "adapter_model.bin")
    with pytest.raises(UserError, match=r"no adapter_model.safetensors; adapter_model.bin is pick"):
        read_adapters(place, config)
    path.write_bytes(b"torn")
    with pytest.raises(UserError, match="not a complete safetensors file"):
        read_adapters(place, config)
    with pytest.raises(UserError, match="no such file"):
        read_adapters(place.parent, config)


class Experts(torch.nn.Module):
    EXPERT_STACKS = ("up", "down")

    def __init__(self):
        super().__init__()
        self.up = torch.nn.Parameter(torch.randn(3, 6, 4))
        self.down = torch.nn.Parameter(torch.randn(3, 4, 6))

    def forward(self, x):
        return torch.einsum("eoi,eti->eto", self.down, (x @ self.up.mT).relu())


@pytest.fixture
def experts(model, monkeypatch):
    """(options of gqa) -> a model, one layer of which feeds forward through stacks of experts."""
    from tinsmith.hub.peft import adapters

    plain = adapters.LM

    def fed(lm: LM) -> LM:
        feed = torch.nn.Module()
        feed.experts = Experts()
        lm.blocks[1].feed = feed
        return lm

    monkeypatch.setattr(adapters, "LM", lambda config: fed(plain(config)))
    return lambda mixer: fed(model(mixer))


def test_stacks_of_experts_are_pefts_target_parameters(experts, tmp_path):
    peft = pytest.importorskip("peft")
    lm = experts({"sinks": True})
    plain = copy.deepcopy(lm.blocks[1])
    made = trained(lm, LoRA(targets=("experts.*",), rank=2, alpha=3.0))
    write_adapters(tmp_path, lm.config, made, None)
    back = read_adapters(tmp_path, lm.config)
    assert back.pairs.keys() == {f"blocks.1.feed.experts.{name}" for name in ("up", "down")}
    for name, pair in made.pairs.items():
        assert torch.equal(back.pairs[name].A, pair.A)
        assert torch.equal(back.pairs[name].B, pair.B)
    outer = torch.nn.Module()
    outer.prepare_inputs_for_generation = None
    outer.lm = torch.nn.Module()
    outer.lm.blocks = torch.nn.ModuleList([torch.nn.Identity(), plain])
    theirs = peft.PeftModel.from_pretrained(outer, str(tmp_path))
    x = torch.randn(3, 5, 4)
    with torch.no_grad():
        found = theirs.base_model.model.lm.blocks[1].feed.experts(x)
        close(found, lm.blocks[1].feed.experts(x))
        with lora.disable_adapters(lm):
            assert not torch.allclose(found, lm.blocks[1].feed.experts(x), atol=1e-2)


def test_a_3d_weight_that_is_no_declared_stack_has_no_adapter(experts, tmp_path, monkeypatch):
    lm = experts({"sinks": True})
    write_adapters(tmp_path, lm.config, trained(lm, LoRA(targets=("experts.*",), rank=2)), None)
    monkeypatch.setattr(Experts, "EXPERT_STACKS", ("down",))
    with pytest.raises(UserError, match="belongs to no adapted weight"):
        read_adapters(tmp_path, lm.config)


def test_stacks_without_a_counterpart_in_a_stock_family_are_refused(experts, tmp_path):
    lm = experts({})
    made = trained(lm, LoRA(targets=("experts.up",)))
    with pytest.raises(UserError, match=r"experts\.up is not a separate weight in .*llama"):
        write_adapters(tmp_path, lm.config, made, None)


ROUTED = {"kind": "topk_moe", "experts": 4, "top_k": 2, "hidden_dim": 12}
DEEP = {"kind": "deepseek_moe", "experts": 4, "top_k": 2, "hidden_dim": 12}
LAYERS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"mixer": {"kind": "gqa", "heads": 4, "qk_norm": True}, "feed_forward": ROUTED},
    "mixtral": {"mixer": {"kind": "gqa", "heads": 4}, "feed_forward": ROUTED},
    "deepseek_v3": {"mixer": LATENT | {"q_rank": None}, "feed_forward": DEEP},
}
OWN = {"mixer": {"kind": "gqa", "heads": 4, "sinks": True}, "feed_forward": ROUTED}
EXPERTS = {
    "all": ("mixer.o_proj", "experts.*"),
    "gate": ("experts.gate_proj.weight",),
    "up and down": ("blocks.0.feed.experts.up_*", "blocks.1.feed.experts.down_*"),
}


def routed(model: Any, family: str) -> LM:
    return model(depth=2, pattern=[LAYERS[family]])


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("chosen", EXPERTS.values(), ids=list(EXPERTS))
@pytest.mark.parametrize("family", LAYERS)
def test_peft_loads_adapters_of_stock_moe_families(model, ids, tmp_path, family, chosen, rslora):
    peft = pytest.importorskip("peft")
    lm = routed(model, family)
    base = copy.deepcopy(lm)
    export_folder(lm, None, tmp_path / "base")
    made = trained(lm, LoRA(rank=3, alpha=5.0, rslora=rslora, targets=chosen))
    write_adapters(tmp_path / "adapter", lm.config, made, str(tmp_path / "base"))
    found = peft.PeftModel.from_pretrained(theirs(tmp_path / "base"), str(tmp_path / "adapter"))
    with torch.no_grad():
        wanted = lm(ids).logits
        close(found(ids).logits, wanted)
        assert not torch.allclose(wanted, base(ids).logits, atol=1e-3)
        back = read_adapters(tmp_path / "adapter", base.config)
        attach_adapters(base, back)
        close(base(ids).logits, wanted)


@pytest.mark.parametrize("family", LAYERS)
def test_adapters_of_stock_moe_written_by_peft_attach_and_merge(model, ids, tmp_path, family):
    peft = pytest.importorskip("peft")
    lm = routed(model, family)
    export_folder(lm, None, tmp_path / "base")
    config = peft.LoraConfig(
        **{"r": 4, "lora_alpha": 7, "target_modules": ["o_proj"]},
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    wanted = written_by_peft(config, ids, tmp_path)
    made = read_adapters(tmp_path / "adapter", lm.config)
    assert (made.config.rank, made.config.alpha) == (4, 7)
    assert "blocks.1.feed.experts.up_proj.weight" in made.pairs
    folded = copy.deepcopy(lm)
    attach_adapters(lm, made)
    merge_adapters(folded, made)
    with torch.no_grad():
        assert not torch.allclose(theirs(tmp_path / "base")(ids).logits, wanted, atol=1e-3)
        close(lm(ids).logits, wanted)
        close(folded(ids).logits, wanted)


@pytest.mark.parametrize("layer", [*LAYERS.values(), OWN], ids=[*LAYERS, "tinsmith"])
def test_adapters_of_experts_survive_writing_and_reading(model, ids, tmp_path, layer):
    lm = model(depth=2, pattern=[layer])
    plain = copy.deepcopy(lm)
    made = trained(lm, LoRA(rank=3, alpha=5.0, targets=("experts.*", "mixer.o_proj")))
    write_adapters(tmp_path, lm.config, made, None)
    back = read_adapters(tmp_path, lm.config)
    assert back.pairs.keys() == made.pairs.keys()
    attach_adapters(plain, back)
    with torch.no_grad():
        close(plain(ids).logits, lm(ids).logits)


def test_peft_merges_adapters_of_tinsmith_experts(model, ids, tmp_path):
    peft = pytest.importorskip("peft")
    lm = model(depth=2, pattern=[OWN])
    export_folder(lm, None, tmp_path / "base")
    made = trained(lm, LoRA(rank=3, alpha=5.0, targets=("experts.*",)))
    write_adapters(tmp_path / "adapter", lm.config, made, str(tmp_path / "base"))
    found = peft.PeftModel.from_pretrained(theirs(tmp_path / "base"), str(tmp_path / "adapter"))
    with torch.no_grad():
        close(found.merge_and_unload()(ids).logits, lm(ids).logits)
