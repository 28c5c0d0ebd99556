import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from tinsmith import load
from tinsmith.core.errors import UserError
from tinsmith.core.manifest import step_name, write_manifest
from tinsmith.core.yamlfile import write_yaml
from tinsmith.hub.hf import export_folder
from tinsmith.hub.load import load_config, locate
from tinsmith.hub.tensors import save_tensors
from tinsmith.nn import lora


def save_checkpoint(folder, lm, tokenizer=None, **sections):
    """A checkpoint as the trainer leaves it: own names, tied weights once, the resolved config."""
    folder.mkdir(parents=True)
    state = {name: tensor for name, tensor in lm.state_dict().items()}
    if lm.config.tie_embeddings:
        del state["head.weight"]
    save_tensors(folder / "model.safetensors", state)
    recipe = {"schema": 1, "model": lm.config.to_dict(), "train": {"steps": 3}} | sections
    (folder / "config.yaml").write_text(write_yaml(recipe))
    (folder / "state.json").write_text("{}")
    if tokenizer is not None:
        (folder / "tokenizer.json").write_text(tokenizer.to_json())
    write_manifest(folder)
    return folder


def same(left, right):
    state = right.state_dict()
    return all(torch.equal(value, state[name]) for name, value in left.state_dict().items())


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": False}, {"positions": "learned"}])
def test_a_checkpoint_loads_bit_for_bit_with_its_tokenizer(tmp_path, model, tokenizer, changes):
    lm = model({"sinks": True, "value_residual": True}, vocab_size=320, **changes)
    folder = save_checkpoint(tmp_path / step_name(3), lm, tokenizer)
    back, its_tokenizer = load(folder)
    assert same(lm, back)
    assert back.config == lm.config
    assert not back.training
    assert its_tokenizer is not None
    assert its_tokenizer.to_json() == tokenizer.to_json()
    assert (back.head.weight is back.embed.weight) == lm.config.tie_embeddings


def test_a_run_loads_its_final_folder_or_its_newest_valid_checkpoint(tmp_path, model, capsys):
    run = tmp_path / "runs" / "x"
    first, second, third = (model(depth=depth) for depth in (1, 2, 3))
    save_checkpoint(run / "checkpoints" / step_name(10), first)
    newest = save_checkpoint(run / "checkpoints" / step_name(20), second)
    assert same(load(run)[0], second)
    weights = newest / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert same(load(str(run))[0], first)
    output = capsys.readouterr().err
    assert "skipped" in output
    assert "step-00000020: model.safetensors has" in output
    export_folder(third, None, run / "final")
    assert same(load(run)[0], third)


def test_a_flipped_bit_is_detected_when_a_model_is_loaded(tmp_path, model):
    folder = save_checkpoint(tmp_path / "run" / "checkpoints" / step_name(1), model())
    weights = folder / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    with pytest.raises(UserError, match=r"not a valid checkpoint: model\.safetensors was changed"):
        load(folder)
    with pytest.raises(UserError, match=r"no valid checkpoint; step-00000001: model\."):
        load(tmp_path / "run")


def test_a_checkpoint_without_a_manifest_is_never_loaded(tmp_path, model):
    folder = save_checkpoint(tmp_path / step_name(1), model())
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"not a valid checkpoint: manifest\.json is missing"):
        load(folder)


def test_a_checkpoint_of_another_architecture_is_refused_with_the_tensor(tmp_path, model):
    folder = save_checkpoint(tmp_path / step_name(1), model())
    other = {"model": model(depth=4).config.to_dict()}
    (folder / "config.yaml").write_text(write_yaml(other))
    write_manifest(folder)
    with pytest.raises(UserError, match=r"tensor blocks\.3\.mix_norm\.weight is missing"):
        load(folder)
    for text, output in (
        ("a: 1", "has no model section"),
        ("[", "not valid YAML"),
        ("", "no model"),
    ):
        (folder / "config.yaml").write_text(text)
        write_manifest(folder)
        with pytest.raises(UserError, match=output):
            load(folder)


def test_an_unknown_key_in_a_checkpoints_config_is_named_with_its_file(tmp_path, model):
    folder = save_checkpoint(tmp_path / step_name(1), model())
    (folder / "config.yaml").write_text(write_yaml({"model": {"dim": 32, "dpeth": 3}}))
    write_manifest(folder)
    with pytest.raises(UserError, match=r"config\.yaml: model: dpeth: unknown key"):
        load(folder)


def test_device_and_dtype_are_as_requested(tmp_path, model):
    export_folder(model(), None, tmp_path / "x")
    save_checkpoint(tmp_path / "y", model())
    for folder in (tmp_path / "x", tmp_path / "y"):
        for name in ("bf16", "bfloat16", torch.bfloat16):
            lm, _ = load(folder, device="cpu", dtype=name)
            assert {p.dtype for p in lm.parameters()} == {torch.bfloat16}
    with pytest.raises(UserError, match="dtype: 'int8' is not one of fp32, bf16"):
        load(tmp_path / "x", dtype="int8")
    with pytest.raises(UserError, match="device: "):
        load(tmp_path / "x", device="toaster")


def test_the_routing_bias_is_never_rounded(tmp_path, model):
    """As in transformers; adapters folded in beside it change nothing of that."""
    latent = {"heads": 4, "kv_rank": 8, "q_rank": None, "nope_dim": 6, "rope_dim": 4, "v_dim": 10}
    feed = {"kind": "deepseek_moe", "experts": 4, "top_k": 2, "hidden_dim": 12}
    lm = model(pattern=[{"mixer": {"kind": "mla"} | latent, "feed_forward": feed}])
    export_folder(lm, None, tmp_path / "x")
    save_checkpoint(tmp_path / "y", lm)
    section = {"targets": "o_proj", "rank": 2}
    lora.add_adapters(lm, lora.LoRA(**section))
    save_checkpoint(tmp_path / "z", lm, lora=section)
    for folder in (tmp_path / "x", tmp_path / "y", tmp_path / "z"):
        half, _ = load(folder, dtype="bf16")
        assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
        for block, other in zip(half.blocks, lm.blocks, strict=True):
            assert torch.equal(block.feed.bias, other.feed.bias)


def test_prototypes_and_thresholds_are_never_rounded(tmp_path, model):
    """Not when they are read, and not when a half-precision model is written and read again."""
    torch.manual_seed(0)
    feed = {"kind": "dyn_moe", "experts": 4, "hidden_dim": 12}
    lm = model(pattern=[{"mixer": {"kind": "gqa", "heads": 4}, "feed_forward": feed}])
    gates = [block.feed.gate for block in lm.blocks]
    for gate in gates:
        torch.nn.init.normal_(gate.thresholds, std=0.1)
    export_folder(lm, None, tmp_path / "x")
    save_checkpoint(tmp_path / "y", lm)
    before = copy.deepcopy(gates)
    export_folder(lm.bfloat16(), None, tmp_path / "z")
    for folder in (tmp_path / "x", tmp_path / "y", tmp_path / "z"):
        half, _ = load(folder, dtype="bf16")
        assert half.embed.weight.dtype == half.blocks[0].feed.experts.up_proj.weight.dtype
        assert half.embed.weight.dtype == torch.bfloat16
        for block, gate in zip(half.blocks, before, strict=True):
            assert torch.equal(block.feed.gate.prototypes, gate.prototypes)
            assert torch.equal(block.feed.gate.thresholds, gate.thresholds)


def test_a_checkpoint_can_be_loaded_with_rope_scaling(tmp_path, model):
    folder = save_checkpoint(tmp_path / "x", model())
    lm, _ = load(folder, rope_scaling={"kind": "yarn", "factor": 2, "original_max_seq_len": 64})
    assert lm.config.max_seq_len == 128
    assert lm.config.rope.scaling is not None


def test_a_path_without_a_model_lists_what_was_searched(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "weights.safetensors").write_text("x")
    monkeypatch.chdir(tmp_path)
    for path, output in (
        ("empty", r"final/ and checkpoints/ \(a run\), manifest.json .* and config.json"),
        ("weights.safetensors", "is a file; give the folder"),
        ("empty/absent", "empty/absent: no such folder$"),
        ("./absent", "no such folder$"),
        ("/absent/x/y", "no such folder$"),
        ("a b", "no such folder$"),
        ("", "not a model"),
    ):
        with pytest.raises(UserError, match=output) as caught:
            load(path)
        assert "\n" not in str(caught.value)


def test_a_runs_name_is_not_looked_up_on_the_hub(tmp_path, monkeypatch):
    (tmp_path / "kept" / "mine").mkdir(parents=True)
    monkeypatch.setenv("TINSMITH_RUNS", str(tmp_path / "kept"))
    with pytest.raises(UserError, match=r"did you mean .*kept/mine"):
        load("mine")


def test_a_hub_name_is_downloaded_and_reported(tmp_path, model, monkeypatch, capsys):
    import huggingface_hub

    export_folder(model(), None, tmp_path / "snapshots" / "abc123")
    requested = {}

    def fetch(name, **options):
        requested[name] = options
        return str(tmp_path / "snapshots" / "abc123")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    monkeypatch.chdir(tmp_path)
    lm, _ = load("owner/name")
    assert same(lm, model())
    assert set(requested["owner/name"]["allow_patterns"]) == {
        "*.safetensors",
        "*.json",
        "*.txt",
        "*.jinja",
    }
    output = capsys.readouterr().err
    assert "fetching owner/name from the Hugging Face Hub" in output
    assert "revision abc123" in output
    assert load_config("owner/name").depth == model().config.depth
    assert requested["owner/name"]["allow_patterns"] == ["config.json"], "to count needs no weights"


def test_an_offline_hub_name_gives_one_line(tmp_path):
    code = (
        "import tinsmith\ntry: tinsmith.load('owner/name')\nexcept Exception as e: print(repr(e))"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.startswith("UserError(")
    assert "owner/name: no such folder here, and the Hugging Face Hub answered" in done.stdout
    assert done.stdout.count("\n") == 1


def test_locate_returns_the_folder_of_the_weights(tmp_path, model):
    folder = save_checkpoint(tmp_path / "run" / "checkpoints" / step_name(4), model())
    assert locate(tmp_path / "run") == folder
    assert locate(folder) == folder
    export_folder(model(), None, tmp_path / "run" / "final")
    assert locate(tmp_path / "run") == tmp_path / "run" / "final"


def test_loading_does_not_import_the_trainer_or_transformers():
    code = "import sys, tinsmith.hub.load, tinsmith.hub.hf; print([m for m in sys.modules if m in "
    code += "('transformers', 'tinsmith.train', 'datasets', 'pydantic', 'huggingface_hub')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_incomplete_checkpoint_weights_are_refused(tmp_path, model):
    folder = save_checkpoint(tmp_path / "x", model())
    state = load_file(folder / "model.safetensors")
    state["extra"] = torch.zeros(1)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    write_manifest(folder)
    with pytest.raises(UserError, match="tensor extra is not part of this model"):
        load(folder)
    assert json.loads((folder / "manifest.json").read_text())["schema"] == 1
