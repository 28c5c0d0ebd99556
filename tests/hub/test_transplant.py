"""Transplants (promises H1 to H3, H6 and H8): copied weights, new experts, refused plans."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.oracles.close import close_to
from tinsmith.core.errors import UserError
from tinsmith.hub.from_hf import config_from_hf
from tinsmith.hub.hf import export_folder
from tinsmith.hub.load import load
from tinsmith.hub.transplant import (
    TransplantPlan,
    build_transplant,
    parameter_table,
    transplant_config,
)
from tinsmith.nn.model import LM, ModelConfig
from tinsmith.nn.parameters import count_parameters

close = close_to(1e-12)

QWEN3 = {
    **{"model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024, "head_dim": 128},
    **{"intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16},
    **{"num_key_value_heads": 8, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6},
    **{"rope_theta": 1000000, "tie_word_embeddings": True, "hidden_act": "silu"},
}
"""Config of Qwen3-0.6B."""
KINDS = {
    "dyn_moe": {"kind": "dyn_moe", "experts": 4, "combine": "sum"},
    "topk_moe": {"kind": "topk_moe", "experts": 4, "top_k": 4},
    "deepseek_moe": {"kind": "deepseek_moe", "experts": 4, "top_k": 4},
}


@pytest.fixture
def dense(model):
    return model().double()


@pytest.fixture
def all_experts():
    """All experts on: no cosine is below -1."""

    def switch(lm: LM) -> LM:
        with torch.no_grad():
            for block in lm.blocks:
                block.feed.gate.thresholds.fill_(-2)
        return lm

    return switch


def logits(lm, ids):
    with torch.no_grad():
        return lm.eval()(ids).logits


def test_H1_parameter_counts_of_qwen3_0_6b_equal_the_specification():
    sparse = transplant_config(config_from_hf(QWEN3), TransplantPlan({}))
    lines = {(line.name, line.trainable): line.num_parameters for line in parameter_table(sparse)}
    assert lines == {
        ("embedding", False): 155_582_464,
        ("attention", False): 28 * (6_291_456 + 256),
        ("norms", False): 57 * 1024,
        ("gates", True): 28 * 32 * 1024,
        ("thresholds", True): 896,
        ("experts", True): 896 * 294_912,
    }
    assert lines["embedding", False] + lines["attention", False] == 331_750_400
    with torch.device("meta"):
        built, before = LM(sparse), LM(config_from_hf(QWEN3))
    assert count_parameters(built) == (265_159_552, 331_808_768)
    assert (built.parameter_count(), before.parameter_count()) == (596_968_320, 596_049_920)
    routed = [layer.feed_forward for layer in sparse.layers]
    assert {(f.experts, f.hidden_dim, f.target_experts_per_token, f.combine) for f in routed} == {
        (32, 96, 16, "rescaled_sum")
    }


def test_H1_the_preset_equals_this_transplant():
    made = transplant_config(config_from_hf(QWEN3), TransplantPlan({"router_grad": "smk"}))
    assert made == ModelConfig.preset("tiny-onn-0.6b")


def test_norms_are_trained_if_requested():
    lines = parameter_table(
        transplant_config(config_from_hf(QWEN3), TransplantPlan({}, train_norms=True))
    )
    trained = {line.name: line.num_parameters for line in lines if line.trainable}
    assert trained["norms"] == 57 * 1024
    assert trained["attention"] == 28 * 256


@pytest.mark.parametrize("combine", ["sum", "rescaled_sum"])
@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
def test_H2_all_slices_together_equal_the_dense_model(combine, activation, model, all_experts, ids):
    layer = {
        "mixer": {"kind": "gqa", "heads": 4},
        "feed_forward": {"kind": activation, "hidden_dim": 48},
    }
    dense = model(pattern=[layer]).double()
    plan = TransplantPlan({"experts": 6, "combine": combine}, "slice")
    sparse = all_experts(build_transplant(dense, plan))
    close(logits(sparse, ids), logits(dense, ids))
    sparse.train()
    close(sparse(ids).logits.detach(), logits(dense, ids))


def test_H2_one_slice_less_differs_from_the_dense_model(dense, all_experts, ids):
    sparse = all_experts(
        build_transplant(dense, TransplantPlan({"experts": 6, "combine": "sum"}, "slice"))
    )
    with torch.no_grad():
        sparse.blocks[1].feed.gate.thresholds[3] = 2
    assert (logits(sparse, ids) - logits(dense, ids)).abs().max() > 1e-3


def test_slices_of_the_other_moe_kinds_are_slices_of_the_dense_layer(dense):
    """Their weights are not 1, so it is experts that are compared and not logits."""
    for kind in ("topk_moe", "deepseek_moe"):
        feed = build_transplant(dense, TransplantPlan(KINDS[kind], "slice")).blocks[2].feed
        old = dense.blocks[2].feed
        assert torch.equal(feed.experts.up_proj.weight.flatten(0, 1), old.up_proj.weight)
        assert torch.equal(feed.experts.gate_proj.weight.flatten(0, 1), old.gate_proj.weight)
        assert torch.equal(torch.cat(list(feed.experts.down_proj.weight), 1), old.down_proj.weight)


def test_H3_attention_sub_layers_equal_those_of_transformers(tmp_path, randomised):
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen3Config(
        **{"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 32},
        **{"num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 80},
        **{"rope_theta": 1e6, "tie_word_embeddings": True},
    )
    theirs = randomised(transformers.Qwen3ForCausalLM(config)).double().eval()
    theirs.save_pretrained(tmp_path / "qwen")
    ours = build_transplant(load(tmp_path / "qwen")[0].double(), TransplantPlan({"experts": 8}))
    received: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for number, layer in enumerate(theirs.model.layers):
        layer.self_attn.register_forward_hook(
            lambda _, given, kept, output, number=number: received.update(
                {number: (kept["hidden_states"], output[0])}
            ),
            with_kwargs=True,
        )
    reported: list[torch.Tensor] = []
    with torch.no_grad():
        theirs(torch.randint(80, (2, 17)))
        for number, (
            x,
            _,
        ) in received.items():  # our mixer on their input, in our model's own context
            block = ours.blocks[number]
            block.mix_norm.register_forward_hook(lambda _, given, output, x=x: x)
            block.mixer.register_forward_hook(lambda _, given, output: reported.append(output.y))
        ours(torch.zeros(2, 17, dtype=torch.long))
    assert len(reported) == len(received) == 2
    for (_, expected), found in zip(received.values(), reported, strict=True):
        close_to(1e-6)(found, expected)  # transformers forms its rotary tables in float32


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("init", ["random", "slice"])
def test_copied_weights_are_bit_equal_and_no_dense_feed_forward_remains(kind, init, dense):
    sparse = build_transplant(dense, TransplantPlan(KINDS[kind], init))
    old, new = dense.state_dict(), sparse.state_dict()
    skeleton = {name for name in old if ".feed." not in name}
    assert all(torch.equal(old[name], new[name]) for name in skeleton)
    assert {name for name in new if ".feed." not in name} == skeleton
    assert not (old.keys() & new.keys()) - skeleton
    trained = {name for name, p in sparse.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in sparse.named_parameters() if ".feed." in name}
    assert not {t.data_ptr() for t in new.values()} & {t.data_ptr() for t in old.values()}


@pytest.mark.parametrize("tied", [True, False])
def test_H6_a_tied_head_is_the_embedding(tied, model):
    sparse = build_transplant(model(tie_embeddings=tied), TransplantPlan({"experts": 4}))
    assert (sparse.head.weight is sparse.embed.weight) == tied
    assert not sparse.head.weight.requires_grad


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_H8_an_exported_transplant_loads_with_the_same_frozen_parameters(
    kind, dtype, model, tokenizer, tmp_path, ids
):
    sparse = build_transplant(model(vocab_size=320).to(dtype), TransplantPlan(KINDS[kind]))
    done = export_folder(sparse, tokenizer, tmp_path / "sparse")
    back, _ = load(tmp_path / "sparse")
    assert done.family == ("mixtral" if kind == "topk_moe" else "tinsmith")
    assert back.config.trainable == sparse.config.trainable
    assert back.state_dict().keys() == sparse.state_dict().keys()
    for (name, one), two in zip(
        sparse.state_dict().items(), back.state_dict().values(), strict=True
    ):
        assert torch.equal(one, two), name
    assert count_parameters(back) == count_parameters(sparse)
    assert torch.equal(logits(back, ids), logits(sparse, ids))


def test_a_stock_folder_with_trainable_patterns_loads_in_transformers(model, tmp_path, ids):
    transformers = pytest.importorskip("transformers")
    mixer = {"kind": "gqa", "heads": 4, "kv_heads": 2, "qk_norm": True}
    sparse = build_transplant(model(mixer), TransplantPlan(KINDS["topk_moe"] | {"top_k": 2}))
    assert export_folder(sparse, None, tmp_path / "sparse").family == "qwen3_moe"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, logits(sparse, ids))


def test_training_settings_that_no_stock_family_has_are_kept(model, tmp_path):
    sparse = build_transplant(model(), TransplantPlan(KINDS["topk_moe"] | {"balance": "sequence"}))
    assert export_folder(sparse, None, tmp_path / "sparse").family == "tinsmith"
    assert load(tmp_path / "sparse")[0].config == sparse.config


def test_the_dense_baseline_is_initialised_at_random(dense):
    made = build_transplant(dense, TransplantPlan({"kind": "swiglu", "hidden_dim": 24}))
    assert made.blocks[0].feed.up_proj.weight.shape == (24, 32)
    same = build_transplant(dense, TransplantPlan({"kind": "swiglu"}))
    old, new = (dict(lm.named_parameters()) for lm in (dense, same))
    assert old.keys() == new.keys()
    assert {n for n in old if not torch.equal(old[n], new[n])} == {n for n in old if ".feed." in n}


def test_equal_seeds_give_equal_experts(dense):
    made = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        made.append(
            build_transplant(dense, TransplantPlan({"experts": 4}))
            .blocks[0]
            .feed.experts.up_proj.weight
        )
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


@pytest.mark.parametrize(
    ("feed", "init", "expected"),
    [
        ({"kind": "swiglu"}, "slice", "init=slice: a dense layer of kind=swiglu has no experts"),
        ({"kind": ["dyn_moe"]}, "random", "kind=['dyn_moe'] is not one of dyn_moe, topk_moe"),
        ({"kind": "relu2"}, "random", "kind='relu2' is not one of dyn_moe, topk_moe"),
        ({"kind": "swiglu", "experts": 4}, "random", "experts: unknown key"),
        ({"experts": 0}, "random", "experts=0 must be at least 1"),
        ({"experts": "many"}, "random", "experts='many' must be at least 1"),
        ({"expertz": 3}, "random", "expertz: unknown key"),
        ({"activation": "relu2"}, "random", "activation=relu2, the model's is swiglu"),
        (
            {"experts": 5},
            "random",
            "5 experts do not share 48 hidden units evenly; give `hidden_dim`",
        ),
        ({"experts": 100}, "slice", "100 experts do not share 48 hidden units evenly"),
        (
            {"experts": 5, "hidden_dim": 9},
            "slice",
            "5 experts of width 9 have 45 hidden units, the dense layer has 48",
        ),
        (KINDS["topk_moe"] | {"n_shared_experts": 1}, "slice", "n_shared_experts=1 must be 0"),
    ],
    ids=str,
)
def test_an_invalid_feed_forward_is_refused_in_one_line(feed, init, expected, dense):
    with pytest.raises(UserError) as caught:
        transplant_config(dense.config, TransplantPlan(feed, init))
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_model_without_dense_feed_forwards_is_refused(dense, model):
    sparse = transplant_config(dense.config, TransplantPlan({"experts": 4}))
    with pytest.raises(UserError, match="the model's feed-forward is dyn_moe, not a dense one"):
        transplant_config(sparse, TransplantPlan({}))
    layer = {"mixer": {"kind": "gqa", "heads": 4}}
    layer |= {"feed_forward": {"kind": "swiglu", "hidden_dim": 48, "bias": True}}
    with pytest.raises(UserError, match="has biases"):
        transplant_config(model(pattern=[layer]).config, TransplantPlan({}))


def test_trainable_patterns_of_a_stock_folder_must_be_a_list():
    for wrong in ("all", [1], {}):
        with pytest.raises(UserError, match="tinsmith_trained: must be a list of patterns"):
            config_from_hf(QWEN3 | {"tinsmith_trained": wrong})
    config = config_from_hf(QWEN3 | {"tinsmith_trained": ["norm"]})
    assert replace(config, trainable=("*",)) == config_from_hf(QWEN3)


class Verb:
    """`tinsmith transplant` in this process."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __call__(self, *words: str) -> None:
        import typer

        from tinsmith.cli import app

        arguments = ["transplant", str(self.folder), str(self.out), *words]
        typer.main.get_command(app).main(arguments, standalone_mode=False)

    @property
    def out(self) -> Path:
        return self.folder.parent / "out"

    def refused(self, *words: str) -> str:
        """The message for invalid input; no output remains."""
        before = sorted(self.folder.parent.iterdir())
        with pytest.raises(UserError) as caught:
            self(*words)
        assert "\n" not in str(caught.value)
        assert sorted(self.folder.parent.iterdir()) == before
        return str(caught.value)


@pytest.fixture
def verb(model, tokenizer, tmp_path) -> Verb:
    layer = {
        "mixer": {"kind": "gqa", "heads": 4},
        "feed_forward": {"kind": "swiglu", "hidden_dim": 64},
    }
    export_folder(model(vocab_size=320, pattern=[layer]), tokenizer, tmp_path / "dense")
    return Verb(tmp_path / "dense")


def test_the_command_writes_a_folder_in_which_only_experts_are_trainable(verb, capsys, ids):
    verb("experts=4", "router_grad=smk", "--init", "slice")
    sparse, tokenizer = load(verb.out)
    assert tokenizer is not None
    feed = sparse.config.layers[0].feed_forward
    assert (feed.kind, feed.experts, feed.hidden_dim, feed.router_grad) == ("dyn_moe", 4, 16, "smk")
    assert f"{count_parameters(sparse)}" in capsys.readouterr().out
    card = (verb.out / "README.md").read_text(encoding="utf-8")
    assert str(verb.folder) in card
    assert "frozen" in card


def test_a_dry_run_needs_no_weights_and_writes_nothing(verb, capsys):
    for name in ("model.safetensors", "tokenizer.json"):
        (verb.folder / name).unlink()
    (verb.folder / "config.json").write_text(json.dumps(QWEN3), encoding="utf-8")
    verb("--dry-run")
    output = capsys.readouterr().out
    for number in ("155,582,464", "264,241,152", "331,808,768", "265,159,552", "596,968,320"):
        assert number in output
    assert not verb.out.exists()


def test_invalid_folders_are_refused_in_one_line_and_nothing_partial_is_written(verb, edit):
    file = verb.folder / "model.safetensors"
    whole, config = file.read_bytes(), (verb.folder / "config.json").read_text()
    state = load_file(file)
    assert "no such folder" in Verb(verb.folder.parent / "nowhere").refused()
    save_file({n: t for n, t in state.items() if "norm" not in n}, file, metadata={"format": "pt"})
    assert "input_layernorm.weight is missing" in verb.refused()
    save_file(state | {"more": torch.zeros(3)}, file, metadata={"format": "pt"})
    assert "tensor more is not part of this model" in verb.refused()
    file.write_bytes(whole[:-100])
    assert "not a complete safetensors file" in verb.refused()
    file.write_bytes(whole)
    edit(verb.folder, head_dim=16)
    assert "self_attn.q_proj.weight is [32, 32]; the config asks for [64, 32]" in verb.refused()
    edit(verb.folder, head_dim=8, num_key_value_heads=3)
    assert "num_key_value_heads: 3 does not divide" in verb.refused()
    edit(verb.folder, num_key_value_heads=2, model_type="gpt2")
    assert "model_type: 'gpt2' is not one of llama" in verb.refused()
    (verb.folder / "config.json").unlink()
    assert "not a model" in verb.refused()
    (verb.folder / "config.json").write_text(config)
    verb("experts=4")
    assert "exists and is not empty" in verb.refused()


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(verb, model):
    export_folder(model(), None, verb.folder.parent / "small")
    for name in ("model.safetensors", "config.json"):
        (verb.folder.parent / "small" / name).replace(verb.folder / name)
    output = verb.refused("experts=4")
    assert "vocab_size=96 is too small for the tokenizer" in output
